"""Scores sampled answers: adds `all_rm_scores` to files of prompts and answers.

    python score.py --input answers.jsonl --output scored.jsonl --judge data/tiny/judge.py:score
    python score.py --input answers.jsonl --output scored.jsonl --reward_model ArmoRM-Llama3-8B-v0.1

A judge is a Python function, called with (prompt turns, answer), that returns a number. A reward
model is a Hugging Face folder with one of two heads in place of the vocabulary: a single number,
`score.weight` (1, dim), as LlamaForSequenceClassification has it (and Mistral's and Qwen's), or
ArmoRM's gated objectives. It reads the end token of an answer, which is laid out by the chat
template of its own folder. Where a template writes more after that (ChatML's newline), transformers
reads the last token of that, and its scores differ.

Several scorers may be given. `all_rm_scores` is then their mean, `all_scorer_scores` the list of
each one, judges first, and `scorers` their names. Nothing is rescaled: a scorer of 0 to 100 drowns
one of 0 to 1, so the end of a run prints the mean and the spread of each.

Try a scorer on answers whose quality is known before it makes 60,000 pairs. A line may have
`labels`, a number an answer, higher for better; a line with `chosen` and `rejected` and no answers
is taken as two answers with the labels 1 and 0. The end of a run then prints each scorer's
accuracies, pairwise and best of n (RMB, Zhou et al. 2024, arXiv 2410.09893).

Lines go to OUTPUT.partial, which gets its final name once it is whole. The same call goes on with
what it has written there, or in OUTPUT. Scores of different scorers are never mixed: a name in
`scorers` ends with a digest of what the scorer is. That is, for a judge, the bytes of its file and
the function's name (what it imports may change unseen); for a reward model, its config.json, its
tokenizer and template files, the names and sizes of its weight files, and the chat format. So a
line that is found is the one that would be written, byte by byte, but for the scores: these alone
cannot be checked.
"""
import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import cpu
import gpu
from checkpoint import model_digest
from command import lock, run_command, unlock_all
from data.files import (
    append_whole, is_finite_number, parse_line, read_json, read_jsonl, read_records, written_whole)
from data.dialogues import PROMPT_FIELDS, prompt_and_answers
from data.preference import are_finite_numbers, as_answers, content_hash
from judge import ask, load_judge
from model import Transformer, checkpoint_tensors, load_model, to_device, weight_files
from tokenizer import CHAT_FORMATS, load_chat

# A row holds the prompt and at most so many tokens with it, or one answer: enough to fill a GPU.
# At 8B in bf16 the widest activations, two of the MLP, take 1 GB.
TOKENS_PER_ROW = 16384
PROGRESS_SECONDS = 30       # between two lines of progress
DIGITS = 8                  # of a digest, in a scorer's name
# Fields that came of other scores and would be taken to belong to these.
STALE = ("all_rm_scores", "all_scorer_scores", "scorers",
         "chosen", "rejected", "chosen_score", "rejected_score")


# --- judges ---------------------------------------------------------------------------------------

class JudgeScorer:
    """A judge as a scorer: (prompt turns, N answers) -> N floats. name: FILE.py:FUNCTION."""

    def __init__(self, name):
        self.source = name
        self.judge = load_judge(name)
        file, _, function = name.rpartition(":")
        digest = content_hash([file], function)
        self.name = f"{Path(name).name} {digest[:DIGITS]}"      # in the output

    def check(self, turns, answers):
        """A judge takes answers of any length."""

    def __call__(self, turns, answers):
        scores = []
        for number, answer in enumerate(answers, 1):
            try:
                scores.append(ask(self.judge, turns, answer))
            except (ValueError, RuntimeError) as e:
                error = type(e)(f"judge {self.source}, answer {number}: {e}")
                raise error from e.__cause__
        return scores


# --- reward models --------------------------------------------------------------------------------

class ScalarReward(Transformer):
    """A Transformer whose head is one number: `score.weight` (1, dim)."""
    handled = ("num_labels",)       # fields of config.json that are handled here

    def __init__(self, config, fields):
        super().__init__(replace(config, tied=True))        # tied, for there is no lm_head
        self.pad_id = read_pad_id(fields)
        self.score = nn.Linear(config.dim, 1, bias=False)

    def reward(self, ends, prompt):
        """Rewards (N,) of N answers, from the states of their end tokens (N, dim). Those of the
        prompt's tokens (P, dim) do not matter."""
        return self.score(ends)[:, 0]


class GatedReward(Transformer):
    """ArmoRM's head (Wang et al. 2024, arXiv 2406.12845), names and defaults as of its
    modeling_custom.py: J objectives read at the end token, mixed by a gate that reads the prompt.

        reward = sum_j gate_j * (objectives @ reward_transform_matrix)_j
        gate   = logit_scale * softmax(layers(state of the prompt's end) / temperature)
    """
    defaults = {
        "num_objectives": 19,           # J
        "gating_hidden_dim": 1024,
        "gating_n_hidden": 3,           # hidden layers of the gate, an MLP
        "gating_temperature": 10,
    }
    handled = ("num_labels", "auto_map", *defaults)
    # A prompt ends with <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n. The gate
    # reads the first of these.
    prompt_end = [128009, 128006, 78191, 128007, 271]

    def __init__(self, config, fields):
        super().__init__(replace(config, tied=True))        # tied, for there is no lm_head
        self.pad_id = read_pad_id(fields)
        found = [fields.get(name, default) for name, default in self.defaults.items()]
        J, width, n_hidden, self.temperature = found
        sizes = (J, width, n_hidden)
        are_sizes = all(type(size) is int and size > 0 for size in sizes)
        if not are_sizes or not is_finite_number(self.temperature) or self.temperature <= 0:
            raise ValueError(f"config.json: {', '.join(self.defaults)} are "
                             f"{', '.join(map(str, found))}; expected positive numbers")
        self.regression_layer = nn.Linear(config.dim, J, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.empty(J, J))
        # The names of these parameters are those of ArmoRM's files.
        widths = [config.dim] + [width] * n_hidden + [J]
        layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))
        self.gating = nn.ModuleDict({"layers": layers})
        self.gating.logit_scale = nn.Parameter(torch.empty(1))

    def reward(self, ends, prompt):
        """Rewards (N,) of N answers, from the states of their end tokens (N, dim) and of the
        prompt's tokens (P, dim)."""
        x = prompt[-len(self.prompt_end)]                                   # (dim,)
        for layer in self.gating.layers[:-1]:
            x = F.relu(layer(x))
        x = self.gating.layers[-1](x)                                       # (J,)
        gate = self.gating.logit_scale * (x / self.temperature).softmax(-1)
        objectives = self.regression_layer(ends)                            # (N, J)
        return objectives @ self.reward_transform_matrix @ gate             # (N,)


def read_pad_id(fields):
    """pad_token_id of config.json's fields: an int, or None. ValueError if it is neither."""
    pad_id = fields.get("pad_token_id")
    if pad_id is not None and type(pad_id) is not int:
        raise ValueError(f"config.json: pad_token_id = {pad_id!r:.60}; expected an id or null")
    return pad_id


def load_reward_model(folder, dtype=torch.float32, device="cpu"):
    """A Transformer with the head that its weights name. ValueError if they name none.

    The head computes in fp32: in bf16 a score of 0.1 moves in steps of 0.0005, and answers that
    differ would tie.
    """
    found = checkpoint_tensors(folder)
    if "regression_layer.weight" in found:
        kind = GatedReward
    elif "score.weight" in found:
        kind = ScalarReward
    else:
        raise ValueError(f"{folder}: no weight score.weight or regression_layer.weight; expected "
                         "a reward model")

    # load_model calls this once it has checked config.json.
    def build(config):
        return kind(config, read_json(Path(folder) / "config.json"))

    model = load_model(folder, dtype, device, build=build, handled=kind.handled)
    # Names of the body begin with "model.", as in any Hugging Face folder; the rest is the head.
    for name, p in model.named_parameters():
        if not name.startswith("model."):
            p.data = p.data.float()
    return model


@torch.no_grad()
def rewards(model, prompt, answers):
    """Rewards (N,) in fp32 of N answers to one prompt, all lists of ids.

    They run as one row [prompt | answer | answer ...] in which each answer sees the prompt and
    itself (prefix sharing): the prompt goes through the layers once.
    """
    P = len(prompt)
    tokens = list(prompt)
    positions = list(range(P))
    for ids in answers:
        tokens += ids
        positions += range(P, P + len(ids))
    ends = list(accumulate(map(len, answers), initial=P))       # of the prompt and each answer
    attend = model.attend_pairs([(P, *map(len, answers))])
    tokens = to_device(tokens, model.device)
    positions = to_device(positions, model.device)
    states = model.states(tokens, positions, attend)            # (T, dim)
    end_tokens = [end - 1 for end in ends[1:]]
    ends_of_answers = states[to_device(end_tokens, model.device)]
    return model.reward(ends_of_answers.float(), states[:P].float())


class RewardScorer:
    """A reward model as a scorer: (prompt turns, N answers) -> N floats.

    folder: a Hugging Face folder, with its tokenizer. chat_format and date: as of load_chat.
    ValueError if the folder is no reward model, or if its parts do not belong together.
    """

    def __init__(self, folder, chat_format=None, date=None):
        # What is no model folder is told so before anything else.
        checkpoint_tensors(folder)
        self.folder = folder
        self.chat = load_chat(folder, chat_format, date)
        if torch.cuda.is_available():
            self.model = load_reward_model(folder, torch.bfloat16, "cuda")
            gpu.speed_up(self.model, torch.bfloat16)
        else:
            self.model = load_reward_model(folder, torch.float32, "cpu")
            cpu.speed_up(self.model)
        self._check_layout()
        self.name = Path(folder).resolve().name         # in the output
        if self.chat.date:                              # of a chat template that writes it
            self.name += f" on {self.chat.date}"
        sizes = [[file.name, file.stat().st_size] for file in weight_files(Path(folder))]
        digest = model_digest(folder, sizes, type(self.chat).__name__)
        self.name += f" {digest[:DIGITS]}"

    def _check_layout(self):
        """ValueError unless the chat format ends prompts and answers as the head reads them."""
        if self.model.pad_id == self.chat.end_id:
            raise ValueError(
                f"{self.folder}: pad_token_id = {self.model.pad_id} of config.json is the end "
                "token of an answer, so that transformers reads the token before it; to read the "
                "end token set it to null")
        # A gate that reads another token would mix the objectives in some other way, silently.
        if isinstance(self.model, GatedReward):
            wanted = self.model.prompt_end
            prompt = self.chat.encode_prompt([{"role": "user", "content": "Hi"}])
            if prompt[-len(wanted):] != wanted:
                raise ValueError(
                    f"{self.folder}: its gate reads Llama-3's tokens {wanted} at the end of a "
                    f"prompt; {self.chat.source} ends it otherwise")

    def check(self, turns, answers):
        """ValueError if an answer is too long, to be told of before anything is scored."""
        self._encode(turns, answers)

    def _encode(self, turns, answers):
        """(ids of the prompt, ids of each answer). ValueError if one is too long."""
        prompt = self.chat.encode_prompt(turns)
        encoded = []
        longest = self.model.config.max_positions
        for number, answer in enumerate(answers, 1):
            ids = self.chat.encode_response(answer)
            n_tokens = len(prompt) + len(ids)
            if n_tokens > longest:
                raise ValueError(
                    f"prompt and answer {number} have {n_tokens} tokens, more than the {longest} "
                    f"positions of {self.folder}; leave the answer out")
            encoded.append(ids)
        return prompt, encoded

    def __call__(self, turns, answers):
        prompt, encoded = self._encode(turns, answers)
        # Answers that do not fit in a row go into the next one.
        rows = [[]]
        n_tokens = len(prompt)      # of the last row
        for ids in encoded:
            if rows[-1] and n_tokens + len(ids) > TOKENS_PER_ROW:
                rows.append([])
                n_tokens = len(prompt)
            rows[-1].append(ids)
            n_tokens += len(ids)
        scores = [rewards(self.model, prompt, row) for row in rows]
        return torch.cat(scores).tolist()


# --- files ----------------------------------------------------------------------------------------

def read_answers(path, scorers=(), dropped=None, skip_bad_lines=False, as_it_stands=False):
    """Yields ("file:line", record, prompt turns, answers) of a file of records. ValueError names
    the bad lines. One whose answer is too long for a scorer is among them."""
    def answers_to_score(record, source):
        if "all_generated_responses" not in record and {"chosen", "rejected"} <= record.keys():
            turns, *answers = prompt_and_answers(record, as_it_stands)
            # Columns that are in the turns now would be added to them once more.
            rest = {name: value for name, value in record.items()
                    if name not in (*PROMPT_FIELDS, "input", "system", "history")}
            record = rest | {"prompt": turns, "all_generated_responses": answers, "labels": [1, 0]}
        turns, answers = as_answers(record, as_it_stands)
        if not answers:
            raise ValueError("all_generated_responses is empty; expected an answer or more")
        labels = record.get("labels", [0] * len(answers))
        if not are_finite_numbers(labels) or len(labels) != len(answers):
            raise ValueError(f"labels is {labels!r:.60}; expected {len(answers)} finite numbers, "
                             "one an answer")
        for scorer in scorers:
            scorer.check(turns, answers)
        return record, turns, answers

    for source, found in read_records([path], answers_to_score, dropped, skip_bad_lines):
        record, turns, answers = found
        yield source, record, turns, answers


def scored_before(path, lines, names):
    """(number of `lines` that a file holds already, its bytes up to there).

    lines: an iterator of read_answers. names: of the scorers. A last line that was cut short does
    not count. ValueError if the file holds anything else than these lines, scored by these scorers.
    """
    done = 0
    size = 0
    if not path.exists():
        return done, size
    # In binary, because `size` counts bytes.
    with open(path, "rb") as f:
        for text in f:
            place = f"{path}:{done + 1}"
            line = next(lines, None)
            if line is None:
                raise ValueError(f"{place}: found another line than the {done} of the input; "
                                 "name a new output")
            source, record, _, answers = line
            # A line that was cut short ends what is done. If it is the first one, and of OUTPUT,
            # it is refused: the file may be something else, not to be overwritten.
            is_ours = done > 0 or path.suffix == ".partial"
            if is_ours and is_cut(text, record):
                break
            found = parse_line(place, text)
            if found.get("scorers") != names:
                raise ValueError(
                    f"{place}: found another line than {source} scored by {', '.join(names)}: "
                    f"scorers = {found.get('scorers')!r:.200}; go on with the same scorers, or "
                    "name a new output")
            # Its last line may have lost the end of line to an editor, or to a kill.
            if text.removesuffix(b"\n") != line_again(found, record, answers, names):
                raise ValueError(
                    f"{place}: found another line than {source} scored by {', '.join(names)}; "
                    "expected a new file, or one that the same call began; put it right, or name "
                    "a new output")
            done += 1
            size += len(text)
    return done, size


def is_cut(text, record):
    """Whether `text` is the beginning of the scored line of a record, without its end."""
    if text.endswith(b"\n"):
        return False
    try:
        parse_line("", text)
        return False        # whole: the beginning of an object is no JSON
    except ValueError:
        start = as_line(without_scores(record)).removesuffix(b"}")
        return text.startswith(start) or start.startswith(text)


def ends_line(file):
    """Whether the last character of a file ends a line."""
    with open(file, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read() == b"\n"


def line_again(found, record, answers, names):
    """The line that a record would be, in bytes, with the scores that were `found` in one. None if
    these are no scores of its answers."""
    scores = found.get("all_scorer_scores") if len(names) > 1 else [found.get("all_rm_scores")]
    if not isinstance(scores, list) or len(scores) != len(names):
        return None
    for of_one in scores:
        if not isinstance(of_one, list) or len(of_one) != len(answers):
            return None
        if not all(type(score) is float for score in of_one):
            return None
    return as_line(with_scores(record, scores, names))


def begin_output(output, read, names, total):
    """(the file to append to, how many of `total` lines it holds): OUTPUT.partial, which begins as
    what there is of OUTPUT. It is not there if OUTPUT is whole. read: called for an iterator of the
    lines."""
    output = Path(output)
    begun = Path(f"{output}.partial")
    # OUTPUT is looked at in any case: at the end it is replaced.
    done, size = scored_before(output, read(), names)
    if begun.exists():
        done, size = scored_before(begun, read(), names)
    elif done and not (done == total and ends_line(output)):
        # OUTPUT stays as it is until all lines are scored.
        with written_whole(begun) as temporary:
            shutil.copyfile(output, temporary)
    if begun.exists():
        os.truncate(begun, size)        # without a last line that was cut short
        if size and not ends_line(begun):
            append_whole(begun, "\n")
    return begun, done


# --- the command ----------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--input", required=True, help="file of answers, as generate.py writes it")
    flag("--output", required=True, help="JSON Lines file to write or to go on with")
    # The scorers.
    flag("--judge", nargs="+", default=[], metavar="FILE.py:FUNCTION")
    flag("--reward_model", nargs="+", default=[], metavar="FOLDER")
    # How the input is read, and laid out for reward models.
    flag("--chat_format", choices=CHAT_FORMATS,
         help="of reward models; if not given as their files say")
    flag("--date", help="2026-01-31, for chat templates of reward models that write it; today if "
         "not given")
    flag("--skip_bad_lines", action="store_true",
         help="drop and count bad lines, and those with answers too long to score, instead of "
         "stopping")
    flag("--as_it_stands", action="store_true",
         help="take prompts that are laid out already as they stand")
    args = parser.parse_args(argv)
    if not args.judge and not args.reward_model:
        parser.error("give --judge, --reward_model or both")
    return args


def score_line(source, record, turns, answers, scorers):
    """(the record with its scores, the list of each scorer). ValueError names the line."""
    try:
        scores = [scorer(turns, answers) for scorer in scorers]
        # A NaN would be the best or the worst answer by the order of comparisons.
        for of_one in scores:
            if not all(map(math.isfinite, of_one)):
                raise ValueError(f"scores {scores} are not all finite")
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None
    except Exception as e:
        e.add_note(f"at {source}")      # a mistake in the judge: its traceback is needed
        raise
    names = [scorer.name for scorer in scorers]
    return with_scores(record, scores, names), scores


def without_scores(record):
    """A record without what another call wrote of scores, and the pair that was made of them."""
    return {name: value for name, value in record.items() if name not in STALE}


def with_scores(record, scores, names):
    """The record with the scores of each scorer (a list of lists), and the scorers' names."""
    record = without_scores(record)
    record["all_rm_scores"] = [mean(of_answer) for of_answer in zip(*scores)]
    if len(scores) > 1:
        record["all_scorer_scores"] = scores
    record["scorers"] = names
    return record


def mean(values):
    try:
        return statistics.fmean(values)
    except OverflowError:       # their sum is over 1e308
        return math.fsum(value / len(values) for value in values)


def as_line(record):
    """A record as a line of JSON, in bytes and without the end of line."""
    return json.dumps(record, ensure_ascii=False).encode()


def score_lines(lines, scorers, file, done, total):
    """Scores the lines that are left of `total`, and appends them to the file `file`.

    Returns (the scores of each scorer, how many lines had been scored or paired before).
    """
    scores = [[] for _ in scorers]
    n_stale = 0
    began = time.monotonic()
    told = began            # when a line of progress was printed
    for n, (source, record, turns, answers) in enumerate(lines, 1):
        scored, new = score_line(source, record, turns, answers, scorers)
        # At once, because a line may be an hour's or a dollar's worth.
        append_whole(file, as_line(scored).decode() + "\n")
        n_stale += any(name in record for name in STALE)
        for of_one, new_of_one in zip(scores, new):
            of_one += new_of_one
        now = time.monotonic()
        if now - told > PROGRESS_SECONDS:
            told = now
            rate = n / (now - began)
            left = (total - done - n) / rate
            print(f"{done + n}/{total} prompts  {rate:.2f} prompts/s  {left / 60:.0f} min "
                  "left", flush=True)
    return scores, n_stale


def print_accuracies(output, names):
    """Prints how often each scorer agrees with the labels of a scored file, if it has any."""
    right = [Counter() for _ in names]
    of = Counter()
    for _, record in read_jsonl(output):
        labels = record.get("labels", [])
        scores = record.get("all_scorer_scores", [record["all_rm_scores"]])
        for hits, of_one in zip(right, scores):
            found, of_record = accuracies(labels, of_one)
            hits.update(found)
        of.update(of_record)
    if of["pairs"]:
        for name, hits in zip(names, right):
            print(f"  {name}: {hits['pairs'] / of['pairs']:.1%} of {of['pairs']} pairs of answers "
                  f"in the order of their labels, {hits['best'] / of['best']:.1%} of {of['best']} "
                  "best answers found")


def accuracies(labels, scores):
    """(how many pairs of answers are in the order of their labels, and whether the best is found;
    of how many), Counters of "pairs" and "best". Only pairs whose labels differ count. Scores that
    tie are wrong: a best answer is found if its score is above those of all that are worse."""
    pairs = [s > t for a, s in zip(labels, scores) for b, t in zip(labels, scores) if a > b]
    if not pairs:
        return Counter(), Counter()
    best = [s for a, s in zip(labels, scores) if a == max(labels)]
    rest = [s for a, s in zip(labels, scores) if a < max(labels)]
    found = Counter(pairs=sum(pairs), best=int(max(best) > max(rest)))
    return found, Counter(pairs=len(pairs), best=1)


def claim_output(output):
    """Locks the file to write, before hours of work. ValueError or OSError if it cannot be
    written."""
    output = Path(output)
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}; make it, or name another "
                         "output")
    if output.exists() and not output.is_file():
        raise ValueError(f"{output}: not a file; name another output")
    lock(f"{output}.lock")


def main(argv=None):
    args = parse_args(argv)
    try:
        score_file(args)
    finally:
        unlock_all()


def score_file(args):
    """Scores the answers of a file: the whole command, but for its flags."""
    read = partial(read_answers, args.input, skip_bad_lines=args.skip_bad_lines,
                   as_it_stands=args.as_it_stands)

    # 1. The output is ours alone. Bad lines are found before models are loaded, which takes
    # minutes.
    claim_output(args.output)
    for _ in read():
        pass

    # 2. The scorers, judges first.
    scorers = [JudgeScorer(name) for name in args.judge]
    for folder in args.reward_model:
        scorers.append(RewardScorer(folder, args.chat_format, args.date))
    names = [scorer.name for scorer in scorers]

    # 3. Answers that are too long for a scorer are found before an hour of scoring.
    dropped = Counter()
    total = 0
    for _ in read(scorers, dropped):
        total += 1
    for reason, n in dropped.most_common():
        print(f"{args.input}: {n} dropped: {reason}", flush=True)

    # 4. What is scored already.
    begun, done = begin_output(args.output, partial(read, scorers), names, total)
    if not total:
        raise ValueError(f"{args.input}: no answers to score")
    if done == total and not begun.exists():
        print(f"{args.output}: all {total} lines are scored already; nothing is left to do")
        print_accuracies(args.output, names)
        return
    if done:
        print(f"{args.output}: {done} of {total} lines are scored already", flush=True)

    # 5. The rest.
    began = time.monotonic()
    lines = islice(read(scorers), done, None)
    scores, n_stale = score_lines(lines, scorers, begun, done, total)
    begun.replace(args.output)
    stale = ""
    if n_stale:
        stale = f"; {n_stale} had been scored or paired before, which is replaced"
    seconds = time.monotonic() - began
    print(f"{args.output}: {total - done} lines scored in {seconds:.0f} s{stale}")
    for name, of_one in zip(names, scores):
        if of_one:
            print(f"  {name}: mean {mean(of_one):.4g}, standard deviation "
                  f"{statistics.pstdev(of_one):.4g}, {min(of_one):.4g} to {max(of_one):.4g}")
    print_accuracies(args.output, names)


if __name__ == "__main__":
    run_command(main)
