"""Scores sampled answers: adds `all_rm_scores` to JSON Lines with `prompt` and `all_generated_responses`.

    python data/score.py --input answers.jsonl --output scored.jsonl --judge data/tiny/judge.py:score
    python data/score.py --input answers.jsonl --output scored.jsonl --reward_model ArmoRM-Llama3-8B-v0.1

A judge is a Python function, called with (prompt turns, answer), that returns a number. A reward model is a folder in
Hugging Face's format with one of two heads in place of the vocabulary: a single number, `score.weight` (1, dim), as of
LlamaForSequenceClassification (Mistral's and Qwen's are alike), or ArmoRM's gated objectives. It reads the end token of
an answer that is laid out by the chat template of its own folder. Where a template writes more after that (ChatML's
newline), transformers reads the last token of that, and its scores differ.

Several scorers may be given. `all_rm_scores` is then their mean, and `all_scorer_scores` holds the list of each one,
judges first. Nothing is rescaled: next to scores from 0 to 100 those from 0 to 1 do not count, so the end of a run
prints every scorer's mean and spread. `scorers` names them. Lines go to OUTPUT.partial, which gets its name once it is
whole; what the same scorers began there, or in OUTPUT itself, is gone on with.
"""
import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)   # the project's root and not data/, for its modules

from data.files import parse_line, read_rows, written_whole
from data.preference import as_answers
from model import Transformer, causal_attention, checkpoint_tensors, load_model
from tokenizer import CHAT_FORMATS, check_vocabulary, load_chat_format, load_tokenizer

# A row holds the prompt and at most so many tokens with it, or one answer: enough to fill a GPU. At 8B in bf16 the
# widest activations, two of the MLP, take 1 GB.
TOKENS_PER_ROW = 16384
# Fields of a line that came of other scores and would be taken for these.
STALE = ("all_rm_scores", "all_scorer_scores", "scorers", "chosen", "rejected", "chosen_score", "rejected_score")


# --- judges -----------------------------------------------------------------------------------------------------------

def load_judge(name):
    """The function that FILE.py:FUNCTION names. ValueError if there is none."""
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("judge", file)
    if spec is None or not Path(file).is_file():
        raise ValueError(f"judge = {name!r}; expected a Python file and a function in it, FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"judge = {name!r}: {file} has no function {function}")
    return getattr(module, function)


def judge_scorer(name):
    """The scorer of a judge: (prompt turns, N answers) -> N floats."""
    judge = load_judge(name)

    def score(turns, answers):
        scores = []
        for i, answer in enumerate(answers, 1):
            try:
                scores.append(judge(turns, answer))
            except Exception as e:
                raise RuntimeError(f"judge {name} failed on answer {i}") from e
            try:
                scores[-1] = float(scores[-1])
            except (TypeError, ValueError):
                raise ValueError(f"judge {name} gave answer {i} {scores[-1]!r:.40}; expected a number") from None
        return scores
    return score


# --- reward models ----------------------------------------------------------------------------------------------------

class ScalarReward(Transformer):
    """A Transformer whose head is one number: `score.weight` (1, dim)."""
    others = ("num_labels",)        # fields of config.json that it answers for

    def __init__(self, config, fields):
        super().__init__(replace(config, tied=True))        # tied, for there is no lm_head
        self.pad_id = fields.get("pad_token_id")
        self.score = nn.Linear(config.dim, 1, bias=False)

    def reward(self, ends, prompt):
        """Rewards of N answers: states of their end tokens (N, dim), states of the prompt (P, dim) -> (N,)"""
        return self.score(ends)[:, 0]


class GatedReward(Transformer):
    """ArmoRM's head (Wang et al. 2024, arXiv 2406.12845), names and defaults as of its modeling_custom.py: J objectives
    read at the end token, mixed by a gate that reads the prompt.

        reward = sum_j gate_j * (objectives @ reward_transform_matrix)_j
        gate   = logit_scale * softmax(layers(state of the <|eot_id|> that ends the prompt) / temperature)
    """
    defaults = {"num_objectives": 19, "gating_hidden_dim": 1024, "gating_n_hidden": 3, "gating_temperature": 10}
    others = ("num_labels", "auto_map", *defaults)
    # A prompt ends with <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n; the gate reads the first of these.
    prompt_end = [128009, 128006, 78191, 128007, 271]

    def __init__(self, config, fields):
        super().__init__(replace(config, tied=True))        # tied, for there is no lm_head
        self.pad_id = fields.get("pad_token_id")
        J, width, n, self.temperature = (fields.get(name, default) for name, default in self.defaults.items())
        if not all(type(x) is int and x > 0 for x in (J, width, n)) or not self.temperature > 0:
            raise ValueError(f"config.json: {', '.join(self.defaults)} are {J}, {width}, {n}, {self.temperature}; "
                             "expected positive numbers")
        widths = [config.dim] + [width] * n + [J]
        self.regression_layer = nn.Linear(config.dim, J, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.empty(J, J))
        self.gating = nn.ModuleDict({"layers": nn.ModuleList(map(nn.Linear, widths, widths[1:]))})
        self.gating.logit_scale = nn.Parameter(torch.empty(1))

    def reward(self, ends, prompt):
        """Rewards of N answers: states of their end tokens (N, dim), states of the prompt (P, dim) -> (N,)"""
        *hidden, last = self.gating.layers
        x = prompt[-len(self.prompt_end)]
        for layer in hidden:
            x = F.relu(layer(x))
        gate = self.gating.logit_scale * (last(x) / self.temperature).softmax(-1)      # (J,)
        return self.regression_layer(ends) @ self.reward_transform_matrix @ gate       # (N, J) @ (J, J) @ (J,)


def load_reward_model(folder, dtype=torch.float32, device="cpu"):
    """A Transformer with the head that its weights name. The head computes in fp32: in bf16 a score of 0.1 moves in
    steps of 0.0005, and answers that differ would tie."""
    found = checkpoint_tensors(folder)
    kind = GatedReward if "regression_layer.weight" in found else ScalarReward
    if kind is ScalarReward and "score.weight" not in found:
        raise ValueError(f"{folder}: no weight score.weight or regression_layer.weight; expected a reward model")
    fields = lambda: json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model = load_model(folder, dtype, device, build=lambda config: kind(config, fields()), others=kind.others)
    for name, p in model.named_parameters():
        if not name.startswith("model."):
            p.data = p.data.float()
    return model


@torch.no_grad()
def rewards(model, prompt, answers):
    """Rewards (N,) in fp32 of N answers to one prompt, all lists of ids, as one row [prompt | answer | answer ...] in
    which each answer sees the prompt and itself: the prompt is computed once."""
    P, device = len(prompt), model.device
    starts = [*accumulate(map(len, answers), initial=P)]            # and the end of the row
    tokens = torch.tensor([token for ids in (prompt, *answers) for token in ids], device=device)
    positions = torch.cat([torch.arange(P), *(torch.arange(P, P + len(a)) for a in answers)]).to(device)

    def attend(layer, q, k, v):
        out = []
        for start, end in zip(starts, starts[1:]):
            one = (torch.cat((x[:P], x[start:end])) for x in (q, k, v))
            out.append(causal_attention(*one, model.config.window)[P if out else 0:])
        return torch.cat(out)

    states = model.states(tokens, positions, attend)                # (T, dim)
    ends = torch.tensor(starts[1:], device=device) - 1
    return model.reward(states[ends].float(), states[:P].float())


def reward_scorer(folder, chat_format=None, date=None):
    """The scorer of a reward model's folder: (prompt turns, N answers) -> N floats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint_tensors(folder)              # what is no model folder is told to be none first
    tokenizer = load_tokenizer(folder)
    chat = load_chat_format(folder, tokenizer, chat_format, date)
    model = load_reward_model(folder, torch.bfloat16 if device == "cuda" else torch.float32, device)
    longest, prompt_end = model.config.max_positions, getattr(model, "prompt_end", [])
    check_vocabulary(folder, chat, model.config.vocab_size)
    if model.pad_id == chat.end_id:
        raise ValueError(f"{folder}: pad_token_id = {model.pad_id} of config.json is the end token of an answer, so that "
                         "transformers reads the token before it; to read the end token set it to null")
    if prompt_end and chat.encode_prompt([{"role": "user", "content": "Hi"}])[-len(prompt_end):] != prompt_end:
        raise ValueError(f"{folder}: its gate reads Llama-3's tokens {prompt_end} at the end of a prompt; {chat.source} "
                         "ends it otherwise")

    def encode(turns, answers):
        prompt, ids = chat.encode_prompt(turns), [*map(chat.encode_response, answers)]
        for i, answer in enumerate(ids, 1):
            if len(prompt) + len(answer) > longest:
                raise ValueError(f"prompt and answer {i} have {len(prompt) + len(answer)} tokens, more than the {longest} "
                                 f"positions of {folder}; leave the answer out")
        return prompt, ids

    def score(turns, answers):
        prompt, answers = encode(turns, answers)
        rows = [[]]
        for ids in answers:
            if rows[-1] and len(prompt) + sum(map(len, rows[-1])) + len(ids) > TOKENS_PER_ROW:
                rows.append([])
            rows[-1].append(ids)
        return torch.cat([rewards(model, prompt, row) for row in rows]).tolist()

    score.check = encode        # ValueError for what is too long, before anything is scored
    score.date = chat.date      # of a chat template that writes it
    return score


# --- files ------------------------------------------------------------------------------------------------------------

def read_answers(path, scorers=(), dropped=None, skip_bad_lines=False, as_it_stands=False):
    """Yields ("file:line", row, prompt turns, answers) of a file of rows. ValueError names the bad lines; one whose answer
    is too long for a scorer is one of them."""
    def answers_to_score(row, source):
        turns, answers = as_answers(row, as_it_stands)
        if not answers:
            raise ValueError("all_generated_responses is empty; expected an answer or more")
        for scorer in scorers:
            if hasattr(scorer, "check"):
                scorer.check(turns, answers)
        return row, turns, answers

    for source, found in read_rows([path], answers_to_score, dropped, skip_bad_lines):
        yield source, *found


def scored_before(path, lines, names):
    """(how many of `lines` a file holds already, its bytes up to there). `lines` is an iterator of read_answers, which
    moves on; a last line that was cut short does not count. ValueError if it holds other answers or scorers."""
    done, size = 0, 0
    if not path.exists():
        return done, size
    with open(path, "rb") as f:
        for text in f:
            if not text.endswith(b"\n") and (done or path.suffix == ".partial"):
                break
            found = parse_line(f"{path}:{done + 1}", text)
            source, row, *_ = next(lines, ("no more lines", {}))
            what_was_scored = ("prompt", "system", "history", "all_generated_responses")
            wanted = {"scorers": names} | {k: row.get(k) for k in what_was_scored}
            if any(found.get(k) != v for k, v in wanted.items()):
                raise ValueError(f"{path}:{done + 1}: found another line than {source} scored by {', '.join(names)}; "
                                 "expected a new file, or one that the same call began")
            done, size = done + 1, size + len(text)
    return done, size


def begin_output(output, lines, names):
    """(the file to append to, how many of `lines` it holds): OUTPUT.partial, which begins as what there is of OUTPUT."""
    output, begun = Path(output), Path(f"{output}.partial")
    done, size = scored_before(begun if begun.exists() else output, lines, names)
    if done and not begun.exists():
        with written_whole(begun) as temporary:
            shutil.copyfile(output, temporary)
    if begun.exists():
        os.truncate(begun, size)
    return begun, done


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", required=True, help="file of answers, as generate.py writes it")
    parser.add_argument("--output", required=True, help="JSON Lines file to write or to go on with")
    parser.add_argument("--judge", nargs="+", default=[], metavar="FILE.py:FUNCTION")
    parser.add_argument("--reward_model", nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--chat_format", choices=CHAT_FORMATS, help="of reward models; if not given as their files say")
    parser.add_argument("--date", help="2026-01-31, for chat templates of reward models that write it; today if not given")
    parser.add_argument("--skip_bad_lines", action="store_true",
                        help="drop and count bad lines, and those with answers too long to score, instead of stopping")
    parser.add_argument("--as_it_stands", action="store_true", help="take prompts that are laid out already as they stand")
    args = parser.parse_args(argv)
    if not args.judge and not args.reward_model:
        parser.error("give --judge, --reward_model or both")

    read = partial(read_answers, args.input, skip_bad_lines=args.skip_bad_lines, as_it_stands=args.as_it_stands)
    for _ in read():        # bad lines are found now, and not when all models are loaded
        pass
    scorers = [judge_scorer(name) for name in args.judge]
    models = [reward_scorer(folder, args.chat_format, args.date) for folder in args.reward_model]
    names = [Path(name).name for name in args.judge]
    names += [Path(folder).resolve().name + (f" on {scorer.date}" if scorer.date else "")
              for folder, scorer in zip(args.reward_model, models)]
    scorers += models
    dropped = Counter()
    total = sum(1 for _ in read(scorers, dropped))          # and answers that are too long not in an hour
    for reason, n in dropped.most_common():
        print(f"{args.input}: {n} dropped: {reason}", flush=True)
    lines = read(scorers)
    begun, done = begin_output(args.output, lines, names)
    if done:
        print(f"{args.output}: {done} of {total} lines are scored already")

    scores, stale, began, told = [[] for _ in scorers], 0, time.time(), time.time()
    with open(begun, "a", encoding="utf-8") as f:
        for n, (source, row, turns, answers) in enumerate(lines, 1):
            try:
                new = [scorer(turns, answers) for scorer in scorers]
                if not all(math.isfinite(s) for one in new for s in one):
                    raise ValueError(f"scores {new} are not all finite")
            except ValueError as e:
                raise ValueError(f"{source}: {e}") from None
            except Exception as e:
                e.add_note(f"at {source}")
                raise
            stale += any(name in row for name in STALE)
            row = {name: value for name, value in row.items() if name not in STALE}
            row["all_rm_scores"] = [statistics.fmean(of_one) for of_one in zip(*new)]
            if len(new) > 1:
                row["all_scorer_scores"] = new
            print(json.dumps(row | {"scorers": names}, ensure_ascii=False), file=f, flush=True)
            for kept, one in zip(scores, new):
                kept += one
            if time.time() - told > 30:
                told, rate = time.time(), n / (time.time() - began)
                print(f"{done + n}/{total} prompts  {rate:.2f} prompts/s  {(total - done - n) / rate / 60:.0f} min left",
                      flush=True)
    begun.replace(args.output)
    print(f"{args.output}: {total - done} lines scored in {time.time() - began:.0f} s"
          + (f"; {stale} had been scored or paired before, which is replaced" if stale else ""))
    for name, one in zip(names, scores):
        if one:
            print(f"  {name}: mean {statistics.fmean(one):.4g}, standard deviation {statistics.pstdev(one):.4g}, "
                  f"{min(one):.4g} to {max(one):.4g}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
