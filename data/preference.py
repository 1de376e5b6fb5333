"""Preference pairs: from lines of JSON to tokens, from tokens to packed rows.

    pairs, dropped = load_pairs(["pairs.jsonl"], chat, max_length=2048, max_prompt_length=1800)
    for indices in epoch_steps(len(pairs), pairs_per_step=128, seed=0, epoch=0):
        for row in pack([pairs[i] for i in indices], tokens_per_row=8192): ...

`chat` is the chat format of a model (tokenizer.py): it turns prompts and answers into token ids. A
record of a file (data/files.py reads them) has one of these shapes:

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": "..." or [turns], "chosen": [turns], "rejected": [turns]}
    {"chosen": [turns], "rejected": [turns]}                         the prompt inside them
    {"prompt": "..." or [turns],
     "all_generated_responses": [...], "all_rm_scores": [...]}       best against worst

where a turn is {"role": "system" | "user" | "assistant", "content": "..."}. data/dialogues.py says
which columns may hold or change the prompt, and what is refused because it is not text (tools,
images); other columns are ignored.

A record of another shape is a bad line, and named by file and line. A pair of identical answers, or
one that is too long, is dropped and counted. Nothing is ever cut short.
"""
import hashlib
import heapq
import json
import math
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.dialogues import prompt_and_answers, prompt_turns
from data.files import Dropped, is_finite_number, read_records, written_whole


@dataclass
class PreferencePair:
    prompt: np.ndarray     # int32 token ids; ends where a response starts
    chosen: np.ndarray     # the preferred response, with its end-of-turn token
    rejected: np.ndarray   # the other one, likewise
    source: str            # "file:line", or "file: item N"
    # Log-probs under the reference: SUMMED for DPO, averages for dpo_norm. NaN until they are set,
    # so that a step without them is not applied.
    ref_logps: tuple[float, float] = (math.nan, math.nan)

    @property
    def lengths(self):
        """(prompt, chosen, rejected) in tokens."""
        return len(self.prompt), len(self.chosen), len(self.rejected)

    def __len__(self):
        """The tokens that the pair takes in a packed row. The prompt is there once, for both
        responses (prefix sharing)."""
        return sum(self.lengths)


@dataclass
class PackedPairs:
    """A packed row: pairs end to end, [prompt | chosen | rejected] each, without padding. Padding
    would be computed and thrown away.

    A response sees its prompt and itself, never the other response and never another pair
    (pair_attention in model.py).
    """
    tokens: torch.Tensor                    # (T,) int64
    lengths: list[tuple[int, int, int]]     # (prompt, chosen, rejected) of each pair; add up to T
    pairs: list[PreferencePair]
    indices: list[int]                      # of the pairs, in the list that `pack` was given.
                                            # Empty: the row is a filler that must not count


# --- from a record of JSON to a pair --------------------------------------------------------------

def parse_record(record, as_it_stands=False):
    """(prompt turns, chosen text, rejected text) of one record, white space included.

    Text that some chat format has laid out already (<|im_start|>, "Human:" ...) is refused, unless
    as_it_stands. ValueError if the record is malformed, Dropped if all its scores are equal.
    """
    # SimPO's published sets have all of these columns: chosen and rejected take precedence.
    if "chosen" in record and "rejected" in record:
        return prompt_and_answers(record, as_it_stands)
    if "all_generated_responses" in record and "all_rm_scores" in record:
        prompt, best, worst = best_against_worst(record, as_it_stands)
        answers = record["all_generated_responses"]
        return prompt, answers[best], answers[worst]
    raise ValueError(f"fields {sorted(record)}; expected chosen and rejected, or "
                     "all_generated_responses and all_rm_scores")


def best_against_worst(record, as_it_stands=False):
    """(prompt turns, index of the best answer, index of the worst) of a record of scored answers.

    ValueError if the record is malformed, Dropped for a tie.
    """
    prompt, answers = as_answers(record, as_it_stands)
    scores = record.get("all_rm_scores")
    if not are_finite_numbers(scores):
        raise ValueError("all_rm_scores; expected a list of finite numbers")
    if len(answers) != len(scores) or len(answers) < 2:
        raise ValueError(f"{len(answers)} responses and {len(scores)} scores; expected as many of "
                         "both, 2 or more")
    # As floats, which is what scores are elsewhere: larger whole numbers may differ by less.
    scores = [float(score) for score in scores]
    best = max(scores)
    worst = min(scores)
    if best == worst:
        raise Dropped("all scores equal")
    # Of several answers with the same score it is the first.
    return prompt, scores.index(best), scores.index(worst)


def as_answers(record, as_it_stands=False):
    """(prompt turns, answers) of a record of sampled answers. ValueError if it is malformed."""
    if record.get("prompt") is None:
        raise ValueError("no field prompt beside all_generated_responses")
    answers = record.get("all_generated_responses")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("all_generated_responses; expected a list of strings")
    return prompt_turns(record, "prompt", as_it_stands), answers


def are_finite_numbers(values):
    """Whether a value of a record is a list of finite numbers."""
    return isinstance(values, list) and all(map(is_finite_number, values))


def encode_pair(record, source, chat, max_length, max_prompt_length, as_it_stands=False):
    """The PreferencePair of one record, by the chat format `chat`.

    max_length bounds the tokens of the prompt with either response, as a sequence of its own.
    ValueError if the record is malformed, Dropped if the pair cannot teach anything or is too long.
    """
    prompt, chosen, rejected = parse_record(record, as_it_stands)
    if not prompt[-1]["content"].strip():
        raise Dropped("an empty prompt")
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an empty answer")

    # A prompt ends where a response starts, and a response ends with its end-of-turn token: what
    # the model sees and writes where it is served.
    prompt_ids = chat.encode_prompt(prompt)
    chosen_ids = chat.encode_response(chosen)
    rejected_ids = chat.encode_response(rejected)

    if chosen_ids == rejected_ids:
        # The chat format decides what is stripped of an answer: another one may keep this pair.
        if chosen != rejected and chosen.strip() == rejected.strip():
            raise Dropped("answers that differ only in white space, which the chat format strips")
        raise Dropped("identical answers")
    if len(prompt_ids) > max_prompt_length:
        raise Dropped(f"prompt over max_prompt_length = {max_prompt_length}")
    if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > max_length:
        raise Dropped(f"prompt with response over max_length = {max_length}")

    return PreferencePair(
        prompt=np.array(prompt_ids, dtype=np.int32),
        chosen=np.array(chosen_ids, dtype=np.int32),
        rejected=np.array(rejected_ids, dtype=np.int32),
        source=source)


def load_pairs(files, chat, max_length, max_prompt_length, workers=1, skip_bad_lines=False,
               as_it_stands=False):
    """(pairs, dropped) of files of records, in their order; `dropped` counts what was left out, by
    reason.

    workers > 1: records are tokenised in as many forked processes. ValueError names the bad lines
    by file and line (skip_bad_lines: they are dropped and counted), or says that no pair is left.
    """
    # Forked workers inherit this function, and the chat format in it, without pickling.
    def encode(record, source):
        return encode_pair(record, source, chat=chat, max_length=max_length,
                           max_prompt_length=max_prompt_length, as_it_stands=as_it_stands)

    # Large data takes minutes: a line now and then says how far it is.
    pairs = []
    dropped = Counter()
    start = time.monotonic()
    for _, pair in read_records(files, encode, dropped, skip_bad_lines, workers):
        pairs.append(pair)
        if len(pairs) % 10_000 == 0:
            seconds = time.monotonic() - start
            print(f"data     {len(pairs)} pairs tokenised in {seconds:.0f} s", flush=True)

    if not pairs:
        reasons = [f"{n} {reason}" for reason, n in dropped.items()] or ["the files are empty"]
        names = ", ".join(str(file) for file in files)
        raise ValueError(f"{names}: no pairs left to use ({'; '.join(reasons)})")
    return pairs, dropped


# --- order and packing ----------------------------------------------------------------------------

def hold_out(pairs, n, seed):
    """(training pairs, held-out pairs), drawn by seed; both keep the order of the files.

    Pairs of one prompt stay on one side, so that no held-out prompt was trained on. Where prompts
    repeat, it may be fewer than n pairs, never more: a prompt whose pairs would make it more than n
    is passed over. ValueError if n is too many, or if every prompt has more than n pairs.
    """
    if not 0 <= n < len(pairs):
        raise ValueError(f"cannot hold out {n} of {len(pairs)} pairs")
    indices_of_prompt = {}
    for i, pair in enumerate(pairs):
        indices_of_prompt.setdefault(pair.prompt.tobytes(), []).append(i)

    # Pairs are drawn, and each brings the others of its prompt along. Where prompts are unique,
    # these are simply the first n pairs of a seeded permutation.
    held_indices = set()
    for i in np.random.default_rng(seed).permutation(len(pairs)).tolist():
        together = indices_of_prompt[pairs[i].prompt.tobytes()]
        if i not in held_indices and len(held_indices) + len(together) <= n:
            held_indices.update(together)
    if n and not held_indices:
        raise ValueError(f"cannot hold out {n} of {len(pairs)} pairs: every prompt has more of "
                         "them, and pairs of one prompt stay together; raise eval_pairs")

    training = [pair for i, pair in enumerate(pairs) if i not in held_indices]
    held_out = [pair for i, pair in enumerate(pairs) if i in held_indices]
    return training, held_out


def epoch_steps(n_pairs, pairs_per_step, seed, epoch):
    """The pairs of each optimiser step of an epoch, as lists of indices. The last step takes what
    is left.

    The order is a pure function of the arguments: a resumed run needs no data-loader state, and
    any number of ranks agrees on it.
    """
    # Every epoch has an order of its own.
    order = np.random.default_rng([seed, epoch]).permutation(n_pairs).tolist()
    return [order[i:i + pairs_per_step] for i in range(0, n_pairs, pairs_per_step)]


def pack(pairs, tokens_per_row, ranks=1):
    """Packs pairs end to end into rows of at most tokens_per_row tokens: a list of PackedPairs.
    Every pair is in exactly one row, whole.

    This is bin packing by the rule called longest processing time first: the pairs go, longest
    first, each onto the row that has the fewest tokens so far. So rows have nearly equal numbers of
    tokens, and there are about as few as can hold the pairs.

    The number of rows is a multiple of `ranks`: rank r runs rows[r::ranks], so that all ranks run
    the same number of rows. Where that makes more rows than pairs, each row left over is a filler:
    it holds the shortest pair once more and no indices, and must be run with weight 0.
    """
    check_fit(pairs, tokens_per_row)
    n_tokens = [len(pair) for pair in pairs]
    longest_first = sorted(range(len(pairs)), key=n_tokens.__getitem__, reverse=True)

    # Begin with the fewest rows that could hold all tokens, and add rows until no row is too full.
    n_rows = ranks * math.ceil(sum(n_tokens) / tokens_per_row / ranks)
    while True:
        bins = [[] for _ in range(n_rows)]          # the indices of the pairs of each row
        loads = [(0, n) for n in range(n_rows)]     # a heap of (tokens, row): the lightest is first
        for i in longest_first:
            load, lightest = loads[0]
            bins[lightest].append(i)
            heapq.heapreplace(loads, (load + n_tokens[i], lightest))
        heaviest_load, _ = max(loads)
        if heaviest_load <= tokens_per_row:
            break
        n_rows += ranks * max(1, n_rows // 100 // ranks)    # `ranks` more; 1 % of many hundreds

    # Lay the pairs of each bin end to end.
    rows = []
    for indices in bins:
        row_pairs = [pairs[i] for i in indices]
        if not row_pairs:
            row_pairs = [pairs[longest_first[-1]]]
        tokens = torch.from_numpy(_end_to_end(row_pairs)).long()
        lengths = [pair.lengths for pair in row_pairs]
        rows.append(PackedPairs(tokens, lengths, row_pairs, indices))
    return rows


def check_fit(pairs, tokens_per_row):
    """ValueError that names the longest pair if no row can hold it. (What is tokens_per_row here
    is train.py's tokens_per_micro_batch: a micro-batch is a row.)"""
    longest = max(pairs, key=len)
    if len(longest) > tokens_per_row:
        raise ValueError(f"{longest.source}: the pair has {len(longest)} tokens, more than "
                         f"tokens_per_micro_batch = {tokens_per_row}; raise that, or lower "
                         "max_length")


def _end_to_end(pairs):
    """The tokens of pairs, [prompt | chosen | rejected] each, as one array."""
    parts = []
    for pair in pairs:
        parts += [pair.prompt, pair.chosen, pair.rejected]
    return np.concatenate(parts)


# --- a cache of tokenised pairs -------------------------------------------------------------------

def content_hash(files, *others):
    """The key of a cache, in hexadecimal: another one whenever a byte of the files or one of the
    other values (numbers, strings) is another."""
    sha = hashlib.sha256(repr(others).encode())
    for file in files:
        with open(file, "rb") as f:
            sha.update(hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()


def keep_pairs(path, pairs, dropped):
    """Writes what load_pairs returned to a safetensors file, for read_kept_pairs.

    OSError that names the file if it cannot be written whole.
    """
    # A source is a file and a number; each file is named once, "pairs.jsonl:" or
    # "pairs.json: item ".
    file_numbers = {}
    places = []
    for pair in pairs:
        file = pair.source.rstrip("0123456789")
        number_in_file = int(pair.source[len(file):])
        file_number = file_numbers.setdefault(file, len(file_numbers))
        places.append((file_number, number_in_file))

    tensors = {
        "tokens": _end_to_end(pairs),
        "lengths": np.array([pair.lengths for pair in pairs], dtype=np.int32),      # (pairs, 3)
        "places": np.array(places, dtype=np.int32),                                 # (pairs, 2)
    }
    metadata = {"files": json.dumps(list(file_numbers)), "dropped": json.dumps(dropped)}
    metadata["sha256"] = _hash_of_kept(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as e:
            raise OSError(f"{e}; make room, or name a cache folder on another disk") from e


def read_kept_pairs(path):
    """(pairs, dropped) that keep_pairs wrote. ValueError if the file is damaged."""
    try:
        with safe_open(path, "np") as f:
            metadata = f.metadata()
            tensors = {name: f.get_tensor(name) for name in ("tokens", "lengths", "places")}
        # A flipped bit would be a wrong token, trained on unseen.
        if _hash_of_kept(tensors, metadata) != metadata["sha256"]:
            raise ValueError("its checksum is another")
    # What safetensors and numpy say about odd bytes is of many kinds.
    except Exception as e:
        raise ValueError(f"{path}: damaged ({e}); delete it, and the pairs are tokenised "
                         "again") from None

    # The arrays of all pairs are slices (views) of the one of tokens.
    files = json.loads(metadata["files"])
    ends = tensors["lengths"].ravel().cumsum()
    parts = np.split(tensors["tokens"], ends[:-1])      # prompt, chosen, rejected, prompt, ...
    pairs = []
    for i, (file_number, number_in_file) in enumerate(tensors["places"].tolist()):
        prompt, chosen, rejected = parts[3 * i:3 * i + 3]
        source = f"{files[file_number]}{number_in_file}"
        pairs.append(PreferencePair(prompt, chosen, rejected, source))
    return pairs, Counter(json.loads(metadata["dropped"]))


def are_kept(path):
    """Whether read_kept_pairs can read a file. Says so where it is there and cannot."""
    if not path.exists():
        return False
    try:
        read_kept_pairs(path)
    except ValueError as e:
        print(f"data     {e}", flush=True)
        return False
    return True


def _hash_of_kept(tensors, metadata):
    """The checksum of what keep_pairs writes, in hexadecimal."""
    sha = hashlib.sha256()
    for name in ("tokens", "lengths", "places"):
        array = tensors[name]
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array)
    for name in ("files", "dropped"):
        sha.update(f"{name} {metadata[name]}".encode())
    return sha.hexdigest()
