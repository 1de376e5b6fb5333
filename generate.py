"""Sample answers from a model folder, in batches, with the chat format that it was trained with.

    python generate.py --model DIR --prompt "What is a preference pair?" --temperature 0
    python generate.py --model DIR --prompts prompts.jsonl --samples 5 --output answers.jsonl
    torchrun --nproc_per_node 8 generate.py --model DIR --prompts prompts.jsonl --output answers.jsonl

A line of --prompts is {"prompt": "..." or [turns]}; a line of --output adds `all_generated_responses`. Prompts of
AlpacaEval 2 or Arena-Hard become their files of answers (data/prompts.py). A command that was killed goes on where it
was when it is given again: finished batches are in OUTPUT.parts.

Sequences run as one row of tokens through model.py: a step's row is the newest token of each running sequence and then,
where others came to their end, whole prompts that take their places. What differs from training is attention alone,
which here reads a cache of keys and values.
"""
import argparse
import datetime
import json
import math
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from data.dialogues import as_messages, checked_text
from data.files import write_whole
from data.preference import content_hash
from data.prompts import answers_text, read_prompts
from distributed import end_rank, first_to_fail, from_rank_0, join_ranks, ranks_store, say
from model import causal_attention, checkpoint_tensors, load_model, product, read_config
from tokenizer import CHAT_FORMATS, check_vocabulary, load_chat_format, load_tokenizer


# --- the cache --------------------------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of up to B sequences of different lengths, in room for S tokens each, filled from the left. The n
    that are running have its first n rows."""

    def __init__(self, config, B, S):
        self.window = config.window
        self.shape = 2, config.n_layers, B, config.n_kv_heads, S, config.head_dim   # what a head reads lies together
        self.kv = None      # made of the dtype and on the device of the first keys

    def attend(self, lengths, prompts, copies, device):
        """Attention of a step's row: the next token of each running sequence, which have `lengths` (n) tokens in the
        cache, then prompts of the given numbers of tokens. Adds all to the cache, each prompt to `copies` rows."""
        n, S = len(lengths), max(lengths, default=0) + 1
        lengths = torch.tensor(lengths, dtype=torch.long, device=device)
        rows, places = torch.arange(n, device=device), torch.arange(S, device=device)
        distance = lengths[:, None] - places                                            # (n, S)
        seen = (distance >= 0) & (distance < (self.window or S + 1))

        def attend(layer, q, k, v):
            if self.kv is None:
                self.kv = k.new_zeros(self.shape)       # what is not filled gets a weight of 0, but must be a number
            keys, values = self.kv[:, layer]                                            # (B, K, S, D)
            out = []
            if n:
                keys[rows, :, lengths], values[rows, :, lengths] = k[:n], v[:n]
                grouped = q[:n].unflatten(1, (k.shape[1], -1))      # (n, K, H/K, D): heads of a group as if queries
                out.append(F.scaled_dot_product_attention(grouped, keys[:n, :, :S], values[:n, :, :S],
                                                          attn_mask=seen[:, None, None]).flatten(1, 2))
            start, row = n, n
            for P in prompts:
                q1, k1, v1 = (x[start:start + P] for x in (q, k, v))
                keys[row:row + copies, :, :P], values[row:row + copies, :, :P] = k1.transpose(0, 1), v1.transpose(0, 1)
                out.append(causal_attention(q1, k1, v1, self.window))
                start, row = start + P, row + copies
            return torch.cat(out)                                                       # (T, H, D)
        return attend

    def move(self, source, target, length):
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]


# --- sampling ---------------------------------------------------------------------------------------------------------

def sample(logits, uniform, *, temperature, top_p=1.0, top_k=0, first=256):
    """Next tokens (B,) from logits (B, V): the likeliest at temperature 0, else drawn from softmax(logits /
    temperature), of which the top_k likeliest tokens are kept (0: all), and of these the fewest likeliest that have
    top_p of their probability. uniform (B,), float64 in [0, 1), decides: a sequence depends on no neighbour.

    Sorting V numbers would take longer than a block of the model; nearly always the `first` largest are enough."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits.float() / temperature).softmax(-1), None
    V = probs.shape[-1]
    if top_k or top_p < 1:
        probs, order = probs.topk(min(top_k or first, V))                               # sorted, largest first
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    mass = cumulative[:, -1:]
    if top_p < 1:
        limit = top_p * mass if top_k else top_p
        kept = (cumulative < limit).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)    # the last one kept
        mass = cumulative.gather(-1, kept)
    # The first token whose cumulative probability exceeds uniform * mass, which is less than mass in float64 too.
    choice = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True)
    tokens = (choice if order is None else order.gather(-1, choice))[:, 0]
    if top_p < 1 and not top_k and first < V:
        short = cumulative[:, -1] < top_p
        if short.any():                                                                 # this waits for the GPU
            tokens[short] = sample(logits[short], uniform[short], temperature=temperature, top_p=top_p, first=V)
    return tokens


@dataclass
class Sequence:
    prompt: int                 # which one
    sample: int                 # which of its answers
    length: int                 # tokens in the cache
    random: np.random.Generator
    ids: list = field(default_factory=list)     # of the answer so far; the last one is not in the cache yet


@torch.no_grad()
def generate(model, prompts, *, seeds, stop_ids, max_new_tokens, samples=1, batch_size=32, temperature=0.8, top_p=0.95,
             top_k=0, progress=lambda tokens, answers: None):
    """`samples` answers to each of N prompts, lists of ids. Returns N lists of `samples` lists of ids, without the end
    token (a list of max_new_tokens ids did not come to its end). batch_size answers run at once.

    The n-th answer to a prompt draws from a generator of its own, seeded by the prompt's tuple in seeds (N,) and n; it
    depends on nothing else, but for the rounding of logits. progress is told of each step's tokens and ended answers.
    """
    check(model, prompts, temperature=temperature, top_p=top_p, top_k=top_k, samples=samples, batch_size=batch_size,
          max_new_tokens=max_new_tokens)
    if not prompts:
        return []
    answers, device = [[None] * samples for _ in prompts], model.device
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))    # popped from the end: the longest first
    cache = KVCache(model.config, min(batch_size, samples * len(prompts)), len(prompts[waiting[-1]]) + max_new_tokens)
    running = []                                                            # the Sequence of each row of the cache
    while waiting or running:
        # 1. Prompts take the places that are free.
        n_new = min(len(waiting), (batch_size - len(running)) // samples)
        new = [waiting.pop() for _ in range(n_new)]
        # 2. The row: the newest token of each running sequence, then prompts; and which states predict the next.
        lengths, P = [s.length for s in running], [len(prompts[i]) for i in new]
        row = [s.ids[-1] for s in running] + [token for i in new for token in prompts[i]]
        positions = lengths + [t for n in P for t in range(n)]
        ends = [len(running) + end for end in accumulate(P)]
        predictors = [*range(len(running))] + [end - 1 for end in ends for _ in range(samples)]
        states = model.states(torch.tensor(row, device=device), torch.tensor(positions, device=device),
                              cache.attend(lengths, P, samples, device))[predictors]                # (B, dim)
        for s in running:
            s.length += 1
        running += [Sequence(i, n, len(prompts[i]), np.random.default_rng([*seeds[i], n]))
                    for i in new for n in range(samples)]
        # 3. The next tokens.
        uniform = torch.tensor([s.random.random() for s in running], dtype=torch.float64, device=device)
        logits = product(states, model.head_weight)                                             # (B, V)
        tokens = sample(logits, uniform, temperature=temperature, top_p=top_p, top_k=top_k)     # (B,)
        if isinstance(model, FSDPModule):   # its ranks must stay in step, even if they should round differently
            dist.broadcast(tokens, 0)
        # 4. Sequences that have ended go, and the last row moves to where each was.
        for b, token in reversed([*enumerate(tokens.tolist())]):                    # this waits for the GPU
            s = running[b]
            if token not in stop_ids:
                s.ids.append(token)
            if token in stop_ids or len(s.ids) == max_new_tokens:
                answers[s.prompt][s.sample] = s.ids
                last = running.pop()
                if last is not s:
                    cache.move(len(running), b, last.length)
                    running[b] = last
        progress(len(tokens), len(tokens) - len(running))
    return answers


def check(model, prompts, *, batch_size, max_new_tokens, samples, temperature, top_p, top_k):
    """ValueError that names what is out of range."""
    for name, value, good, expected in (
            ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
            ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1"), ("top_k", top_k, top_k >= 0, "0 or more"),
            ("samples", samples, samples > 0, "1 or more"),
            ("max_new_tokens", max_new_tokens, 0 < max_new_tokens < model.config.max_positions,
             f"1 or more, and fewer than the {model.config.max_positions} positions of the model"),
            ("batch_size", batch_size, batch_size >= samples, f"room for the {samples} answers to a prompt")):
        if not good:
            raise ValueError(f"{name} = {value}; expected {expected}")
    for i, prompt in enumerate(prompts):
        if not fits(model, prompt, max_new_tokens):
            raise ValueError(f"prompt {i + 1} has {len(prompt)} tokens; expected 1 or more, and with max_new_tokens = "
                             f"{max_new_tokens} at most the {model.config.max_positions} positions of the model")


def fits(model, prompt, max_new_tokens):
    return 0 < len(prompt) <= model.config.max_positions - max_new_tokens


def answer(model, chat, prompts, *, seed=0, **settings):
    """Answers to each prompt (a string or a list of turns), as a list of lists of texts. settings are those of
    `generate`. All ranks of a sharded model must call this together."""
    ids = [chat.encode_prompt(as_messages(p)) for p in prompts]
    answers = generate(model, ids, seeds=[(seed, i) for i in range(len(ids))], stop_ids=chat.stop_ids, **settings)
    return [[chat.decode_response(a) for a in some] for some in answers]


# --- jobs: a file of prompts, many ranks, going on after a kill -------------------------------------------------------

def claim_parts(parts, job, n_batches):
    """The numbers of the batches that are not done yet, in the folder of those that are, which is made if need be.
    ValueError if it is another job's. Rank 0 only."""
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "job.json"
    before = json.loads(file.read_text()) if file.exists() else job
    for key in job:
        if before.get(key) != job[key]:
            raise ValueError(f"{parts}: holds answers with {key} = {before.get(key)!r}, found {job[key]!r} now; go on "
                             "with the same command, or remove the folder to begin anew")
    write_whole(file, json.dumps(job, indent=1))
    return [b for b in range(n_batches) if not (parts / f"{b:06d}.json").exists()]


def first_day(args):
    """The date for chat templates that write today's: the one given, that of the job to go on with, or today's. Rank 0
    only."""
    job = Path(f"{args.output}.parts") / "job.json"
    began = json.loads(job.read_text()).get("date") if job.exists() else None
    return args.date or began or datetime.date.today().isoformat()


def kept_answer(chat, ids, max_new_tokens):
    """(text, number of tokens, whether the text encodes to the sampled ids again) of an answer. Ids may not: a model can
    sample "a" and "b" where encoding gives "ab"."""
    text = chat.decode_response(ids)
    try:
        again = chat.encode_response(text)
    except ValueError:      # of no use for training; it is the reader of pairs that will say so
        again = []
    same = again[:-1] == ids or len(ids) == max_new_tokens and again[:len(ids)] == ids
    return text, len(ids), same


def progress_line(n_answers):
    """A function to be told of tokens and answers as they come: says every 10 seconds how far rank 0 is, its tokens a
    second, and the time left at its rate of answers."""
    began = said = time.time()
    n_tokens = done = 0

    def progress(tokens, answers):
        nonlocal said, n_tokens, done
        n_tokens, done, now = n_tokens + tokens, done + answers, time.time()
        if done and (now - said > 10 or done == n_answers):
            said, left = now, (now - began) / done * (n_answers - done)
            say(f"answers  {done}/{n_answers} on rank 0 of {dist.get_world_size()}  {n_tokens / (now - began):.0f} "
                f"tokens/s  {left / 60:.1f} min left")
    return progress


def run_job(args, model, chat):
    """Answers a file of prompts on all ranks, each with the whole model. The batches are the same on any number of
    ranks, and a batch's answers are kept once it is done."""
    def encode(turns):
        prompt = chat.encode_prompt(turns)
        if not fits(model, prompt, args.max_new_tokens):
            raise ValueError(f"the prompt has {len(prompt)} tokens; expected, with max_new_tokens = {args.max_new_tokens}, at "
                             f"most the {model.config.max_positions} positions of the model")
        return prompt

    settings = {name: getattr(args, name)
                for name in ("samples", "batch_size", "max_new_tokens", "temperature", "top_p", "top_k")}
    check(model, [], **settings)
    dropped = Counter()
    shape, rows, ids = read_prompts(args.prompts, encode, dropped, args.skip_bad_lines, args.as_it_stands)
    if shape == "alpaca_eval" and args.samples > 1:
        raise ValueError(f"samples = {args.samples}; expected 1, AlpacaEval has one answer a prompt")
    by_length = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    size = max(1, 4 * args.batch_size // args.samples)      # within a batch of so many prompts places are refilled
    batches = [by_length[i:i + size] for i in range(0, len(ids), size)]
    weights = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(Path(args.model).glob("*.safetensors"))]
    job = settings | {"seed": args.seed, "prompts": content_hash([args.prompts]), "weights": weights,
                      "chat_format": type(chat).__name__, "date": chat.date, "device": model.device.type,
                      "skip_bad_lines": args.skip_bad_lines, "as_it_stands": args.as_it_stands}
    output, parts = Path(args.output), Path(args.output + ".parts")

    def begin():
        if output.exists():
            raise ValueError(f"{output}: exists already; name another file, or remove it")
        return claim_parts(parts, job, len(batches))

    todo = from_rank_0(begin)
    say(f"prompts  {len(ids)} of {len(ids[by_length[-1]])} to {len(ids[by_length[0]])} tokens in {len(batches)} "
        f"batches, {len(batches) - len(todo)} of them done before"
        + "".join(f"\n         - {n} dropped: {reason}" for reason, n in dropped.most_common()))
    mine = todo[dist.get_rank()::dist.get_world_size()]
    progress = progress_line(args.samples * sum(len(batches[b]) for b in mine))
    for b in mine:
        answers = generate(model, [ids[i] for i in batches[b]], seeds=[(args.seed, i) for i in batches[b]],
                           stop_ids=chat.stop_ids, progress=progress, **settings)
        texts = [[kept_answer(chat, a, args.max_new_tokens) for a in some] for some in answers]
        write_whole(parts / f"{b:06d}.json", json.dumps(texts))
    dist.barrier()

    def finish():
        answers = [None] * len(ids)
        for b, batch in enumerate(batches):
            for i, texts in zip(batch, json.loads((parts / f"{b:06d}.json").read_text())):
                answers[i] = texts
        texts = [[(text, n) for text, n, _ in some] for some in answers]
        write_whole(output, answers_text(shape, rows, texts, args.name or Path(args.model).resolve().name))
        shutil.rmtree(parts)
        cut = sum(n == args.max_new_tokens for some in answers for _, n, _ in some)
        other = sum(not same for some in answers for _, _, same in some)
        say(f"written  {output}; {cut} of {len(ids) * args.samples} answers did not come to their end within "
            f"max_new_tokens = {args.max_new_tokens}; {other} encode to other tokens than were sampled, which read the "
            "same, and are trained on as those")

    from_rank_0(finish)


def main(argv):
    parser = argparse.ArgumentParser(description="Sample answers from a Hugging Face model folder.")
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--prompt", help="one prompt; its answers are printed")
    parser.add_argument("--prompts", help="file of prompts: JSON Lines, a JSON array, ...")
    parser.add_argument("--output", help="file to write; its shape follows that of the prompts")
    parser.add_argument("--samples", type=int, default=1, help="answers a prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16, help="answers at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the model in AlpacaEval's and Arena-Hard's files; its folder's if not given")
    parser.add_argument("--chat_format", choices=CHAT_FORMATS, help="instead of the chat template of the model's folder")
    parser.add_argument("--date", help="2026-01-31, for chat templates that write it; that of the job's first day if not given")
    parser.add_argument("--skip_bad_lines", action="store_true",
                        help="drop and count bad lines, and prompts too long to answer, instead of stopping")
    parser.add_argument("--as_it_stands", action="store_true", help="take prompts that are laid out already as they stand")
    parser.set_defaults(timeout_minutes=7 * 24 * 60)        # ranks that are done wait for the last one
    args = parser.parse_args(argv)
    if bool(args.prompt) == bool(args.prompts) or bool(args.prompts) != bool(args.output):
        parser.error("give --prompt, or --prompts with --output")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}; expected 0 or more")

    device = join_ranks(args)
    try:
        if args.prompt:
            checked_text(args.prompt, "--prompt", args.as_it_stands)
        read_config(args.model)             # what is no model is told to be none first
        checkpoint_tensors(args.model)
        tokenizer = load_tokenizer(args.model)
        chat = load_chat_format(args.model, tokenizer, args.chat_format, from_rank_0(lambda: first_day(args)))
        model = load_model(args.model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        check_vocabulary(args.model, chat, model.config.vocab_size)
        if args.prompts:
            run_job(args, model, chat)
        else:
            texts = answer(model, chat, [args.prompt], samples=args.samples, batch_size=args.samples,
                           seed=args.seed, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                           top_p=args.top_p, top_k=args.top_k)
            say("\n---\n".join(texts[0]))
    finally:
        if dist.get_world_size() == 1 or sys.exc_info()[0] is None:
            dist.destroy_process_group()    # after an error the others may be gone, and this would wait for them


if __name__ == "__main__":
    store, rank, world = ranks_store()
    status = 0
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        status = 1
        if first_to_fail(store):
            print(f"error: {e}", file=sys.stderr, flush=True)
    end_rank(status, world)
