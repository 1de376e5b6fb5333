"""Preference pairs: from rows of files to tokens, from tokens to packed rows.

    pairs, dropped = load_pairs(["pairs.jsonl"], chat, max_length=2048, max_prompt_length=1800)
    for step in epoch_steps(len(pairs), pairs_per_step=128, seed=0, epoch=0):
        for row in pack([pairs[i] for i in step], tokens_per_row=8192): ...

A row of a file (data/files.py) is one of
    {"prompt": "...", "chosen": "...", "rejected": "..."}                                   three strings
    {"prompt": "..." or [turns], "chosen": [turns], "rejected": [turns]}                    message lists
    {"chosen": [turns], "rejected": [turns]}                                                the prompt inside them
    {"prompt": "..." or [turns], "all_generated_responses": [...], "all_rm_scores": [...]}  best against worst
where a turn is {"role": "system" | "user" | "assistant", "content": "..."}. Beside chosen and rejected the prompt may be
called instruction (with or without input) or question. Columns that change it, `system` and `history`, are used; what is
no text, as tools and images, is refused by name (data/dialogues.py); other fields are left alone.
A row that is none of them is a bad line, named by file and line. A pair that cannot teach or does not fit is dropped and
counted; nothing is ever cut.
"""
import hashlib
import heapq
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.dialogues import (as_messages, checked_text, checked_turns, end_mark, prompt_turns, refuse_more_than_text,
                            same_turns, with_system)
from data.files import Dropped, read_rows, written_whole

PROMPT_FIELDS = ("prompt", "instruction", "question")       # beside chosen and rejected; the first one that is there


@dataclass
class PreferencePair:
    prompt: np.ndarray     # int32 ids; ends where a response starts
    chosen: np.ndarray     # with its one end token
    rejected: np.ndarray
    source: str            # file:line, or file: item N
    ref_logps: tuple[float, float] = (math.nan, math.nan)    # DPO only: summed log-probs under the starting model

    def __len__(self):
        """Tokens in a row: the prompt is there once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass
class PackedPairs:
    """A row of pairs end to end, [prompt | chosen | rejected] each, no padding."""
    tokens: torch.Tensor                    # (T,) int64
    lengths: list[tuple[int, int, int]]     # (prompt, chosen, rejected) of each pair; add up to T
    pairs: list[PreferencePair]
    indices: list[int]                      # of the pairs in what was packed; empty: the row does not count (see pack)


# --- reading ----------------------------------------------------------------------------------------------------------

def as_answers(row, as_it_stands=False):
    """(prompt turns, answers) of a row of sampled answers. ValueError if malformed."""
    if row.get("prompt") is None:
        raise ValueError("no field prompt beside all_generated_responses")
    answers = row.get("all_generated_responses")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError("all_generated_responses; expected a list of strings")
    return prompt_turns(row, "prompt", as_it_stands), answers


def best_against_worst(row, as_it_stands=False):
    """(prompt turns, index of the best answer, index of the worst) of a row of scored answers. ValueError if
    malformed, Dropped for a tie."""
    prompt, answers = as_answers(row, as_it_stands)
    scores = row.get("all_rm_scores")
    if not isinstance(scores, list) or not all(type(s) in (int, float) and math.isfinite(s) for s in scores):
        raise ValueError("all_rm_scores; expected a list of finite numbers")
    if len(answers) != len(scores) or len(answers) < 2:
        raise ValueError(f"{len(answers)} responses and {len(scores)} scores; expected as many of both, 2 or more")
    if max(scores) == min(scores):
        raise Dropped("all scores equal")
    return prompt, scores.index(max(scores)), scores.index(min(scores))


def parse_row(row, as_it_stands=False):
    """(prompt turns, chosen text, rejected text) of one row, white space as it is there. ValueError if malformed, Dropped
    for a tie."""
    if "chosen" in row and "rejected" in row:
        return _parse_pair(row, as_it_stands)
    if "all_generated_responses" in row and "all_rm_scores" in row:
        prompt, best, worst = best_against_worst(row, as_it_stands)
        return prompt, row["all_generated_responses"][best], row["all_generated_responses"][worst]
    raise ValueError(f"fields {sorted(row)}; expected chosen and rejected, or all_generated_responses and "
                     "all_rm_scores")


def _parse_pair(row, as_it_stands):
    prompt, chosen, rejected = _prompt_and_answers(row, as_it_stands)
    mark = end_mark(chosen)
    if mark and mark == end_mark(rejected) and not as_it_stands:
        raise ValueError(f"chosen and rejected end with {mark}; expected bare text, for the model's own chat format "
                         "adds its end token. Take it off, or --as_it_stands takes the texts as they stand")
    return prompt, chosen, rejected


def _prompt_and_answers(row, as_it_stands):
    refuse_more_than_text(row, "the row")
    before, chosen = _split_answer(row["chosen"], "chosen", as_it_stands)
    before_rejected, rejected = _split_answer(row["rejected"], "rejected", as_it_stands)
    if not same_turns(before, before_rejected):
        raise ValueError("chosen and rejected differ before their last turn; expected one prompt for both")
    field = next((name for name in PROMPT_FIELDS if row.get(name) is not None), None)
    if field is None and not before:
        raise ValueError("no field prompt, and chosen holds the answer alone; expected one or the other to hold "
                         "the prompt")
    if before and row.get("history"):
        raise ValueError("history beside dialogues in chosen and rejected; expected the earlier turns in one of the two")
    if before:
        before = checked_turns(with_system(before, row), "chosen", as_it_stands)
    if field is None:
        return before, chosen, rejected
    prompt = prompt_turns(row, field, as_it_stands)
    if not before:
        return prompt, chosen, rejected
    # Some sets repeat a single turn of the dialogue as the prompt; the dialogue itself is what is answered.
    repeats_a_turn = isinstance(row[field], str) and any(same_turns(prompt[-1:], [turn]) for turn in before)
    if not repeats_a_turn and not same_turns(prompt, before):
        raise ValueError(f"field {field} differs from the turns before the answer in chosen")
    return before, chosen, rejected


def _split_answer(value, field, as_it_stands):
    """(turns before the answer, the answer) of a string or a list of turns."""
    if isinstance(value, str):
        return [], checked_text(value, field, as_it_stands)
    if not isinstance(value, list):
        raise ValueError(f"{field} is {value!r:.80}; expected a string or a list of turns")
    turns = as_messages(value, field)
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{field} ends with a turn of {turns[-1]['role']!r}; expected 'assistant'")
    return turns[:-1], turns[-1]["content"]


def encode_pair(row, source, chat, max_length, max_prompt_length, as_it_stands=False):
    """The PreferencePair of one row. max_length bounds the prompt with either response, as a sequence of its own.
    ValueError if malformed, Dropped if it cannot teach or does not fit."""
    prompt, chosen, rejected = parse_row(row, as_it_stands)
    if not prompt[-1]["content"].strip():
        raise Dropped("an empty prompt")
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an empty answer")
    ids = [chat.encode_prompt(prompt), chat.encode_response(chosen), chat.encode_response(rejected)]
    if ids[1] == ids[2]:
        # What is stripped of an answer is the chat format's decision: another one may keep this pair.
        stripped = chosen != rejected and chosen.strip() == rejected.strip()
        raise Dropped("answers that differ only in white space, which the chat format strips" if stripped
                      else "identical answers")
    if len(ids[0]) > max_prompt_length:
        raise Dropped(f"prompt over max_prompt_length = {max_prompt_length}")
    if len(ids[0]) + max(len(ids[1]), len(ids[2])) > max_length:
        raise Dropped(f"prompt with response over max_length = {max_length}")
    return PreferencePair(*(np.array(x, dtype=np.int32) for x in ids), source)


def load_pairs(files, chat, max_length, max_prompt_length, workers=1, skip_bad_lines=False, as_it_stands=False):
    """(pairs, dropped) of files of rows; dropped counts what was left out, by reason. ValueError names the bad lines by
    file and line, unless they are to be skipped. workers > 1: rows are tokenised in as many forked processes."""
    encode = partial(encode_pair, chat=chat, max_length=max_length, max_prompt_length=max_prompt_length,
                     as_it_stands=as_it_stands)
    pairs, dropped, began = [], Counter(), time.time()
    for _, pair in read_rows(files, encode, dropped, skip_bad_lines, workers):
        pairs.append(pair)
        if len(pairs) % 10_000 == 0:
            print(f"data     {len(pairs)} pairs tokenised in {time.time() - began:.0f} s", flush=True)
    if not pairs:
        reasons = "; ".join(f"{n} {reason}" for reason, n in dropped.items()) or "the files are empty"
        raise ValueError(f"{', '.join(map(str, files))}: no pairs left to use ({reasons})")
    return pairs, dropped


# --- keeping what was tokenised ---------------------------------------------------------------------------------------

def content_hash(files, *others):
    """Of the content of files and the values of others (numbers, strings), in hexadecimal."""
    sha = hashlib.sha256(repr(others).encode())
    for file in files:
        with open(file, "rb") as f:
            sha.update(hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()


def keep_pairs(path, pairs, dropped):
    """Writes pairs to a file for `read_kept_pairs`: all tokens in a row, lengths, and where they came from. OSError that
    names the file if it cannot be written whole."""
    files = {}                  # "pairs.jsonl:" or "pairs.json: item ", and its number
    places = []
    for pair in pairs:
        file = pair.source.rstrip("0123456789")
        places.append((files.setdefault(file, len(files)), int(pair.source[len(file):])))
    tensors = {
        "tokens": np.concatenate([ids for p in pairs for ids in (p.prompt, p.chosen, p.rejected)]),
        "lengths": np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs], dtype=np.int32),
        "places": np.array(places, dtype=np.int32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"files": json.dumps(list(files)), "dropped": json.dumps(dropped)})
        except SafetensorError as e:
            raise OSError(f"{e}; make room, or name a cache folder on another disk") from e


def read_kept_pairs(path):
    """(pairs, dropped) that `keep_pairs` wrote."""
    try:
        with safe_open(path, "np") as f:
            files, dropped = (json.loads(f.metadata()[name]) for name in ("files", "dropped"))
            tokens, lengths, places = (f.get_tensor(name) for name in ("tokens", "lengths", "places"))
    except SafetensorError as e:
        raise ValueError(f"{path}: damaged ({e}); delete it, and the pairs are tokenised again") from None
    parts = np.split(tokens, lengths.ravel().cumsum()[:-1])
    pairs = [PreferencePair(*parts[3 * i:3 * i + 3], f"{files[file]}{number}")
             for i, (file, number) in enumerate(places.tolist())]
    return pairs, Counter(dropped)


# --- order and packing ------------------------------------------------------------------------------------------------

def hold_out(pairs, n, seed):
    """(training pairs, held-out pairs), drawn by seed; both keep the order of the files. Pairs of one prompt stay on one
    side. Prompts are drawn until n pairs are held out; one whose pairs would make it more than n is passed over, so that
    where prompts repeat it may be fewer."""
    if not 0 <= n < len(pairs):
        raise ValueError(f"cannot hold out {n} of {len(pairs)} pairs")
    of_prompt = {}
    for i, pair in enumerate(pairs):
        of_prompt.setdefault(pair.prompt.tobytes(), []).append(i)
    held = set()
    for i in np.random.default_rng(seed).permutation(len(pairs)).tolist():
        together = of_prompt[pairs[i].prompt.tobytes()]
        if i not in held and len(held) + len(together) <= n:
            held.update(together)
    if n and not held:
        raise ValueError(f"cannot hold out {n} of {len(pairs)} pairs: every prompt has more of them, and pairs of one prompt "
                         "stay together; raise eval_pairs")
    return [p for i, p in enumerate(pairs) if i not in held], [p for i, p in enumerate(pairs) if i in held]


def epoch_steps(n_pairs, pairs_per_step, seed, epoch):
    """The pairs of each optimiser step of an epoch, as lists of indices: a pure function of its arguments, so that a
    resumed run needs no data-loader state. The last step takes what is left."""
    order = np.random.default_rng([seed, epoch]).permutation(n_pairs).tolist()
    return [order[i:i + pairs_per_step] for i in range(0, n_pairs, pairs_per_step)]


def pack(pairs, tokens_per_row, ranks=1):
    """Deals pairs onto about as few rows as hold at most tokens_per_row tokens each: longest first, onto the lightest
    row, so that rows are of near-equal work. Every pair is in exactly one row, whole.

    The number of rows is a multiple of `ranks`: rank r takes rows[r::ranks], and all ranks run as many. Where there are
    fewer pairs than rows, the rows left over hold the shortest pair once more and no indices: run them with weight 0.
    """
    check_fit(pairs, tokens_per_row)
    lengths = [len(pair) for pair in pairs]
    by_length = sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True)
    n_rows = ranks * math.ceil(sum(lengths) / tokens_per_row / ranks)
    while True:
        rows, loads = [[] for _ in range(n_rows)], [(0, row) for row in range(n_rows)]      # loads: a heap
        for i in by_length:
            load, lightest = loads[0]
            rows[lightest].append(i)
            heapq.heapreplace(loads, (load + lengths[i], lightest))
        if max(loads)[0] <= tokens_per_row:
            return [_pack_row([pairs[i] for i in row or by_length[-1:]], row) for row in rows]
        n_rows += ranks * max(1, n_rows // 100 // ranks)


def check_fit(pairs, tokens_per_row):
    """ValueError that names the longest pair if no row can hold it."""
    longest = max(pairs, key=len)
    if len(longest) > tokens_per_row:
        raise ValueError(f"{longest.source}: the pair has {len(longest)} tokens, more than tokens_per_micro_batch = "
                         f"{tokens_per_row}; raise that, or lower max_length")


def _pack_row(pairs, indices):
    tokens = np.concatenate([ids for p in pairs for ids in (p.prompt, p.chosen, p.rejected)])
    lengths = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
    return PackedPairs(torch.from_numpy(tokens).long(), lengths, pairs, indices)
