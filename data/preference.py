"""Preference pairs: from JSON Lines to tokens, from tokens to packed rows.

    pairs, dropped = load_pairs(["pairs.jsonl"], chat, max_length=2048, max_prompt_length=1800)
    for step in epoch_steps(len(pairs), pairs_per_step=128, seed=0, epoch=0):
        for row in pack([pairs[i] for i in step], tokens_per_row=8192): ...

A line of a file is one of
    {"prompt": "...", "chosen": "...", "rejected": "..."}                                   three strings
    {"prompt": "..." or [turns], "chosen": [turns], "rejected": [turns]}                    message lists
    {"chosen": [turns], "rejected": [turns]}                                                the prompt inside them
    {"prompt": "..." or [turns], "all_generated_responses": [...], "all_rm_scores": [...]}  best against worst
where a turn is {"role": "system" | "user" | "assistant", "content": "..."}; other fields are left alone.
A line that is none of them stops with file and line. A pair that cannot teach or does not fit is dropped and counted;
nothing is ever cut.
"""
import hashlib
import heapq
import itertools
import json
import math
import multiprocessing
import os
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@dataclass
class PreferencePair:
    prompt: np.ndarray     # int32 ids; ends where a response starts
    chosen: np.ndarray     # with its one end token
    rejected: np.ndarray
    source: str            # file:line
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


class Dropped(Exception):
    """A pair that is well-formed but not used; the message is the reason that is counted."""


# --- reading ----------------------------------------------------------------------------------------------------------

def read_jsonl(path):
    """Yields ("file:line", object) of a JSON Lines file. ValueError names the line. Empty lines are passed over."""
    for source, line in read_lines(path):
        yield source, parse_line(source, line)


def read_lines(path):
    """Yields ("file:line", text) of the lines of a file that are not empty."""
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({e})") from None


def parse_line(source, line):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{source}: not valid JSON ({e})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{source}: expected a JSON object, found {line.strip()[:60]}")
    return row


def as_messages(prompt):
    """A prompt as a list of turns: a string is one user turn."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"prompt is {prompt!r:.80}; expected a string or a non-empty list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"turn {turn!r:.80}; expected an object with a string role and a string content")
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]


def as_answers(row):
    """(prompt turns, answers) of a line of sampled answers. ValueError if malformed."""
    if "prompt" not in row:
        raise ValueError("no field prompt beside all_generated_responses")
    answers = row.get("all_generated_responses")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError("all_generated_responses; expected a list of strings")
    return as_messages(row["prompt"]), answers


def best_against_worst(row):
    """(prompt turns, index of the best answer, index of the worst) of a line of scored answers. ValueError if
    malformed, Dropped for a tie."""
    prompt, answers = as_answers(row)
    scores = row.get("all_rm_scores")
    if not isinstance(scores, list) or not all(type(s) in (int, float) and math.isfinite(s) for s in scores):
        raise ValueError("all_rm_scores; expected a list of finite numbers")
    if len(answers) != len(scores) or len(answers) < 2:
        raise ValueError(f"{len(answers)} responses and {len(scores)} scores; expected as many of both, 2 or more")
    if max(scores) == min(scores):
        raise Dropped("all scores equal")
    return prompt, scores.index(max(scores)), scores.index(min(scores))


def parse_row(row):
    """(prompt turns, chosen text, rejected text) of one line. ValueError if malformed, Dropped for a tie."""
    if "chosen" in row and "rejected" in row:
        before, chosen = _split_answer(row["chosen"], "chosen")
        before_rejected, rejected = _split_answer(row["rejected"], "rejected")
        if before != before_rejected:
            raise ValueError("chosen and rejected differ before their last turn; expected one prompt for both")
        if "prompt" not in row and not before:
            raise ValueError("no field prompt, and chosen holds the answer alone; expected one or the other to hold "
                             "the prompt")
        prompt = as_messages(row["prompt"]) if "prompt" in row else before
        if before and prompt != before:
            # Some sets repeat a single turn of the dialogue as the prompt; the dialogue itself is what is answered.
            if not isinstance(row["prompt"], str) or prompt[0] not in before:
                raise ValueError("field prompt differs from the turns before the answer in chosen")
            prompt = before
        return prompt, chosen, rejected

    if "all_generated_responses" in row and "all_rm_scores" in row:
        prompt, best, worst = best_against_worst(row)
        return prompt, row["all_generated_responses"][best], row["all_generated_responses"][worst]

    raise ValueError(f"fields {sorted(row)}; expected chosen and rejected, or all_generated_responses and "
                     "all_rm_scores")


def _split_answer(value, field):
    """(turns before the answer, the answer) of a string or a list of turns."""
    if isinstance(value, str):
        return [], value
    if not isinstance(value, list):
        raise ValueError(f"{field} is {value!r:.80}; expected a string or a list of turns")
    turns = as_messages(value)
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{field} ends with a turn of {turns[-1]['role']!r}; expected 'assistant'")
    return turns[:-1], turns[-1]["content"]


def encode_pair(row, source, chat, max_length, max_prompt_length):
    """The PreferencePair of one line. max_length bounds the prompt with either response, as a sequence of its own."""
    prompt, chosen, rejected = parse_row(row)
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an empty answer")
    ids = [chat.encode_prompt(prompt), chat.encode_response(chosen), chat.encode_response(rejected)]
    if ids[1] == ids[2]:
        raise Dropped("identical answers")
    if len(ids[0]) > max_prompt_length:
        raise Dropped(f"prompt over max_prompt_length = {max_prompt_length}")
    if len(ids[0]) + max(len(ids[1]), len(ids[2])) > max_length:
        raise Dropped(f"prompt with response over max_length = {max_length}")
    return PreferencePair(*(np.array(x, dtype=np.int32) for x in ids), source)


def encode_line(line, chat, max_length, max_prompt_length):
    """The PreferencePair of ("file:line", text), or the reason why it is dropped. ValueError names file:line."""
    source, text = line
    row = parse_line(source, text)
    try:
        return encode_pair(row, source, chat, max_length, max_prompt_length)
    except Dropped as reason:
        return str(reason)
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None


def load_pairs(files, chat, max_length, max_prompt_length, workers=1):
    """(pairs, dropped) of JSON Lines files; dropped counts what was left out, by reason. ValueError names file:line.
    More than one worker: processes forked for it."""
    lines = itertools.chain.from_iterable(map(read_lines, files))
    encode = partial(encode_line, chat=chat, max_length=max_length, max_prompt_length=max_prompt_length)
    pairs, dropped, began = [], Counter(), time.time()
    with multiprocessing.get_context("fork").Pool(workers) if workers > 1 else nullcontext() as pool:
        for n, result in enumerate(pool.imap(encode, lines, chunksize=256) if pool else map(encode, lines), 1):
            if isinstance(result, str):
                dropped[result] += 1
            else:
                pairs.append(result)
            if n % 10_000 == 0:
                print(f"data     {n} lines tokenised in {time.time() - began:.0f} s", flush=True)
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
    """Writes pairs to a file for `read_kept_pairs`: all tokens in a row, lengths, and where they came from."""
    files = list(dict.fromkeys(pair.source.rpartition(":")[0] for pair in pairs))
    tensors = {
        "tokens": np.concatenate([ids for p in pairs for ids in (p.prompt, p.chosen, p.rejected)]),
        "lengths": np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs], dtype=np.int32),
        "places": np.array([(files.index(file), int(number)) for file, _, number in
                            (p.source.rpartition(":") for p in pairs)], dtype=np.int32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(tensors, writing, metadata={"files": json.dumps(files), "dropped": json.dumps(dropped)})
    writing.replace(path)


def read_kept_pairs(path):
    """(pairs, dropped) that `keep_pairs` wrote."""
    try:
        with safe_open(path, "np") as f:
            files, dropped = (json.loads(f.metadata()[name]) for name in ("files", "dropped"))
            tokens, lengths, places = (f.get_tensor(name) for name in ("tokens", "lengths", "places"))
    except SafetensorError as e:
        raise ValueError(f"{path}: damaged ({e}); delete it, and the pairs are tokenised again") from None
    parts = np.split(tokens, lengths.ravel().cumsum()[:-1])
    pairs = [PreferencePair(*parts[3 * i:3 * i + 3], f"{files[file]}:{number}")
             for i, (file, number) in enumerate(places.tolist())]
    return pairs, Counter(dropped)


# --- order and packing ------------------------------------------------------------------------------------------------

def hold_out(pairs, n, seed):
    """(training pairs, n held-out pairs), drawn by seed; both keep the order of the files."""
    if not 0 <= n < len(pairs):
        raise ValueError(f"cannot hold out {n} of {len(pairs)} pairs")
    held = set(np.random.default_rng(seed).permutation(len(pairs))[:n].tolist())
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
