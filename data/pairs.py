"""Makes preference pairs of scored answers: to each prompt the best answer against the worst.

    python data/pairs.py --input scored.jsonl --output pairs.jsonl
    python data/pairs.py --input scored.jsonl --output pairs.jsonl --min_gap 0.01 --uncertainty 1

The input is what data/score.py writes. train.py reads such files too, by the same rule but without these options.
A line of the output is {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}. Only ties and small gaps are
dropped here; empty, identical and too long answers are when train.py reads the pairs.

--uncertainty K takes K standard deviations between the scorers (of one answer's scores, as of a whole population) off
its mean score, for best and worst alike: answers on which scorers disagree are chosen less often and rejected more.
"""
import argparse
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)   # the project's root and not data/, for its modules

from data.dialogues import as_messages, same_turns
from data.files import Dropped, read_rows, write_rows
from data.preference import best_against_worst


def cautious_scores(row, uncertainty):
    """Of every answer the mean of its scores less `uncertainty` standard deviations. ValueError if malformed."""
    scores, n = row.get("all_scorer_scores"), len(row.get("all_generated_responses", ()))
    if not isinstance(scores, list) or len(scores) < 2:
        raise ValueError("all_scorer_scores; expected the lists of two scorers or more, for --uncertainty")
    for i, one in enumerate(scores, 1):
        fine = isinstance(one, list) and all(type(s) in (int, float) and math.isfinite(s) for s in one)
        if not fine or len(one) != n:
            raise ValueError(f"all_scorer_scores, scorer {i}; expected a list of {n} finite numbers, one an answer")
    return [statistics.fmean(s) - uncertainty * statistics.pstdev(s) for s in zip(*scores)]


def make_pair(row, min_gap=0.0, uncertainty=0.0, as_it_stands=False):
    """The pair of one row of scored answers, as a dict. ValueError if malformed, Dropped if it is not to be used."""
    if uncertainty:
        row = row | {"all_rm_scores": cautious_scores(row, uncertainty)}
    turns, best, worst = best_against_worst(row, as_it_stands)
    answers, scores = row["all_generated_responses"], row["all_rm_scores"]
    if scores[best] - scores[worst] < min_gap:
        raise Dropped(f"gap under min_gap = {min_gap:g}")
    # The prompt as it was given, unless columns (system, history) add to it: the pair holds none of them.
    prompt = row["prompt"] if same_turns(as_messages(row["prompt"]), turns) else turns
    return {"prompt": prompt, "chosen": answers[best], "rejected": answers[worst], "chosen_score": scores[best],
            "rejected_score": scores[worst]}


def make_pairs(path, min_gap=0.0, uncertainty=0.0, skip_bad_lines=False, as_it_stands=False):
    """(pairs, dropped) of a file of rows; dropped counts what was left out, by reason. ValueError names the bad lines."""
    def use(row, source):
        return make_pair(row, min_gap, uncertainty, as_it_stands)

    dropped = Counter()
    pairs = [pair for _, pair in read_rows([path], use, dropped, skip_bad_lines)]
    if not pairs:
        reasons = "; ".join(f"{n} {reason}" for reason, n in dropped.items()) or "the file is empty"
        raise ValueError(f"{path}: no pairs left to write ({reasons})")
    return pairs, dropped


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", required=True, help="file of scored answers, as data/score.py writes it")
    parser.add_argument("--output", required=True, help="JSON Lines file of pairs to write")
    parser.add_argument("--min_gap", type=float, default=0.0, help="drop pairs whose scores differ by less")
    parser.add_argument("--uncertainty", type=float, default=0.0, metavar="K",
                        help="standard deviations between scorers that are taken off a score")
    parser.add_argument("--skip_bad_lines", action="store_true", help="drop and count bad lines instead of stopping")
    parser.add_argument("--as_it_stands", action="store_true", help="take prompts that are laid out already as they stand")
    args = parser.parse_args(argv)
    for name in ("min_gap", "uncertainty"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} = {getattr(args, name)}; expected 0 or more")
    if Path(args.input).resolve() == Path(args.output).resolve():
        raise ValueError(f"{args.output}: input and output are one file; expected two")

    pairs, dropped = make_pairs(args.input, args.min_gap, args.uncertainty, args.skip_bad_lines,
                                args.as_it_stands)
    write_rows(args.output, pairs)
    mean = statistics.fmean
    chosen, rejected = (mean(p[f"{which}_score"] for p in pairs) for which in ("chosen", "rejected"))
    print(f"pairs    {len(pairs)} in {args.output}; {sum(dropped.values())} dropped"
          + "".join(f"\n         - {n} dropped: {reason}" for reason, n in dropped.most_common()))
    print(f"scores   chosen {chosen:.4g} on average, rejected {rejected:.4g}, gap {chosen - rejected:.4g}")
    print(f"lengths  chosen {mean(len(p['chosen']) for p in pairs):.0f} characters on average, rejected "
          f"{mean(len(p['rejected']) for p in pairs):.0f}; chosen is the longer in "
          f"{mean(len(p['chosen']) > len(p['rejected']) for p in pairs):.0%}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
