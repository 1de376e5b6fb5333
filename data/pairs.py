"""Makes preference pairs of scored answers: to each prompt the best answer against the worst.

    python -m data.pairs --input scored.jsonl --output pairs.jsonl
    python -m data.pairs --input scored.jsonl --output pairs.jsonl --min_gap 0.01 --uncertainty 1

Run it from the repository's root. The input is a file of scored answers, as the scoring command
writes it. train.py reads such files too, by the same rule but without these options. A line of the
output is {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}. Only ties and small
gaps are dropped here; empty, identical and too long answers are dropped when train.py reads the
pairs.

--uncertainty K lowers the mean score of an answer by K standard deviations between its scorers (of
these scores as a whole population), for best and worst alike: answers on which scorers disagree are
chosen less often and rejected more often. With --spread variance it is K variances, as in the other
of the two penalties of Bayesian reward models (Yang et al. 2024, arXiv 2402.13210).

--agree keeps a pair only if every scorer puts its answers into this order: scorers that err in
different ways review each other (collaborative reward modelling, Zhang et al. 2025, arXiv
2505.10597).
"""
import argparse
import math
import statistics
from collections import Counter

from command import run_command
from data.dialogues import as_messages, same_turns
from data.files import Dropped, check_output, is_finite_number, read_records, write_records
from data.preference import are_finite_numbers, as_answers, best_against_worst


def make_pairs(path, min_gap=0.0, uncertainty=0.0, skip_bad_lines=False, as_it_stands=False,
               spread="deviation", agree=False):
    """(pairs, dropped) of a file of scored answers; `dropped` counts what was left out, by reason.

    ValueError names the bad lines (skip_bad_lines: they are dropped and counted), or says that no
    pair is left.
    """
    def use(record, source):
        return make_pair(record, min_gap, uncertainty, as_it_stands, spread, agree)

    # A bad line, or one that makes no pair, is dealt with in read_records.
    dropped = Counter()
    pairs = [pair for _, pair in read_records([path], use, dropped, skip_bad_lines)]
    if not pairs:
        reasons = [f"{n} {reason}" for reason, n in dropped.items()] or ["the file is empty"]
        raise ValueError(f"{path}: no pairs left to write ({'; '.join(reasons)})")
    return pairs, dropped


def make_pair(record, min_gap=0.0, uncertainty=0.0, as_it_stands=False, spread="deviation",
              agree=False):
    """The pair of one record of scored answers, as a line to write.

    ValueError if the record is malformed. Dropped for a tie, a gap of scores under min_gap, and
    with `agree` for an order that a scorer does not confirm.
    """
    # From here on the lowered scores are the scores of the answers (of a copy: the record stays).
    if uncertainty:
        record = record | {"all_rm_scores": cautious_scores(record, uncertainty, spread)}
    turns, best, worst = best_against_worst(record, as_it_stands)
    answers = record["all_generated_responses"]
    scores = record["all_rm_scores"]

    # Scores are noisy: a small gap may prefer the worse answer.
    if scores[best] - scores[worst] < min_gap:
        raise Dropped(f"gap under min_gap = {min_gap:g}")
    if agree and not all(of_one[best] > of_one[worst]
                         for of_one in scores_by_scorer(record, "--agree")):
        raise Dropped("order that not every scorer confirms")

    # The prompt stays as it was given, unless columns (system, history) add to it: the line that is
    # written has no such columns.
    prompt = record["prompt"]
    if not same_turns(as_messages(prompt), turns):
        prompt = turns
    return {
        "prompt": prompt,
        "chosen": answers[best],
        "rejected": answers[worst],
        "chosen_score": scores[best],
        "rejected_score": scores[worst],
    }


def scores_by_scorer(record, option):
    """The column all_scorer_scores: a list for each scorer, with a score for each answer.
    ValueError if it is malformed, that names the option which needs it."""
    # The scoring command writes this column where it ran several scorers.
    _, answers = as_answers(record, as_it_stands=True)
    n_answers = len(answers)
    by_scorer = record.get("all_scorer_scores")
    if not isinstance(by_scorer, list) or len(by_scorer) < 2:
        raise ValueError(
            f"all_scorer_scores; expected the lists of two scorers or more, for {option}")
    for i, scores in enumerate(by_scorer, 1):
        if not are_finite_numbers(scores) or len(scores) != n_answers:
            raise ValueError(f"all_scorer_scores, scorer {i}; expected a list of {n_answers} "
                             "finite numbers, one an answer")
    return by_scorer


def cautious_scores(record, uncertainty, spread="deviation"):
    """Of every answer of a record, the mean of its scores less `uncertainty` standard deviations,
    or variances. ValueError if its scores are malformed."""
    spread_of = {"deviation": statistics.pstdev, "variance": statistics.pvariance}[spread]
    # Nothing is rescaled: where the scales of scorers differ, so do their scores for any answer.
    cautious = []
    for scores in zip(*scores_by_scorer(record, "--uncertainty")):      # all scores of one answer
        try:
            score = statistics.fmean(scores) - uncertainty * spread_of(scores)
        except OverflowError:
            score = math.nan
        if not is_finite_number(score):
            raise ValueError(f"all_scorer_scores holds {list(scores)!r:.60} of one answer, too "
                             f"large for their mean less --uncertainty {spread}s to be a number")
        cautious.append(score)
    return cautious


# --- the command ----------------------------------------------------------------------------------

def main(argv=None):
    # 1. Make all pairs before anything is written: a bad line leaves no file behind.
    args = parse_args(argv)
    check_output(args.output, args.input)
    pairs, dropped = make_pairs(
        args.input, args.min_gap, args.uncertainty, args.skip_bad_lines, args.as_it_stands,
        args.spread, args.agree)
    write_records(args.output, pairs)

    # 2. Say what was made of the file.
    print(f"pairs    {len(pairs)} in {args.output}; {sum(dropped.values())} dropped")
    for reason, n in dropped.most_common():
        print(f"         - {n} dropped: {reason}")
    print_means(pairs)


def parse_args(argv):
    """The checked flags. ValueError names one that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m data.pairs", description=__doc__.split("\n")[0])
    parser.add_argument("--input", required=True, help="file of scored answers")
    parser.add_argument("--output", required=True, help="JSON Lines file of pairs to write")
    parser.add_argument("--min_gap", type=float, default=0.0,
                        help="drop pairs whose scores differ by less")
    parser.add_argument("--uncertainty", type=float, default=0.0, metavar="K",
                        help="standard deviations between scorers that are taken off a score")
    parser.add_argument("--spread", choices=("deviation", "variance"),
                        help="what --uncertainty takes off; default: deviation")
    parser.add_argument("--agree", action="store_true",
                        help="drop pairs whose order not every scorer confirms")
    parser.add_argument("--skip_bad_lines", action="store_true",
                        help="drop and count bad lines instead of stopping")
    parser.add_argument("--as_it_stands", action="store_true",
                        help="take prompts that are laid out already as they stand")
    args = parser.parse_args(argv)

    # Errors of values are told as those of data are: in one line, without the usage.
    for name in ("min_gap", "uncertainty"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:       # false for nan too
            raise ValueError(f"{name} = {value}; expected 0 or more")
    if args.spread and not args.uncertainty:
        raise ValueError(f"spread = {args.spread} is of --uncertainty; give that too")
    args.spread = args.spread or "deviation"
    return args


def print_means(pairs):
    """Prints what the pairs prefer: higher scores, by how much, and, often, longer answers."""
    # Means over the pairs. Divided first: sums of huge scores would be no number.
    chosen_score = sum(pair["chosen_score"] / len(pairs) for pair in pairs)
    rejected_score = sum(pair["rejected_score"] / len(pairs) for pair in pairs)
    print(f"scores   chosen {chosen_score:.4g} on average, rejected {rejected_score:.4g}, "
          f"gap {chosen_score - rejected_score:.4g}")

    # A scorer that likes long answers teaches the model to write them.
    chosen_lengths = [len(pair["chosen"]) for pair in pairs]        # in characters
    rejected_lengths = [len(pair["rejected"]) for pair in pairs]
    n_longer = 0
    for chosen, rejected in zip(chosen_lengths, rejected_lengths):
        if chosen > rejected:
            n_longer += 1
    print(f"lengths  chosen {statistics.fmean(chosen_lengths):.0f} characters on average, rejected "
          f"{statistics.fmean(rejected_lengths):.0f}; chosen is the longer in "
          f"{n_longer / len(pairs):.0%}")


if __name__ == "__main__":
    run_command(main)
