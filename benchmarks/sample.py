"""Time of greedy answers against transformers' generate, on the same prompts and in turn.

    python -m benchmarks.sample --model SmolLM2-135M-Instruct --prompts prompts.jsonl

Both answer the same prompts in fp32, --batch_size at once: ours by continuous batching;
transformers in batches of prompts of like length, padded on the left. A round is one job each, in
processes of their own (workers.py). The result is the median of the rounds' ratios, so that a
machine that slows down slows both. All figures go to benchmarks/sample.json. Tokens are counted
without end tokens, and answers are compared token for token.
"""
import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

import cpu
from benchmarks.workers import Turns, Worker, machine
from command import run_command
from data.files import check_output, write_whole
from data.prompts import read_prompts
from model import load_model
from sampler import generate
from tokenizer import load_chat


def ours(model, prompts, stop_ids, max_new_tokens, batch_size):
    """A list of ids for each prompt (a list of ids), without the end token."""
    answers = generate(
        model, prompts, seeds=[(0, i) for i in range(len(prompts))], stop_ids=stop_ids,
        temperature=0, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [ids for ids, in answers]


@torch.no_grad()
def theirs(model, prompts, stop_ids, max_new_tokens, batch_size):
    """The same by a model of transformers."""
    answers = [None] * len(prompts)
    pad = min(stop_ids)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        # 1. A batch, padded on the left.
        batch = longest_first[start:start + batch_size]
        longest = len(prompts[batch[0]])
        tokens = torch.full((len(batch), longest), pad)
        seen = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            begin = longest - len(prompts[i])
            tokens[row, begin:] = torch.tensor(prompts[i])
            seen[row, begin:] = 1

        # 2. Its answers, each up to its end token.
        sequences = model.generate(
            tokens, attention_mask=seen, max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=sorted(stop_ids), pad_token_id=pad)
        for i, ids in zip(batch, sequences[:, longest:].tolist()):
            ends = [n for n, token in enumerate(ids) if token in stop_ids]
            answers[i] = ids[:ends[0]] if ends else ids
    return answers


def load_way(name, folder):
    """answer(prompts, stop_ids, max_new_tokens, batch_size) of one way, with its model."""
    if name == "ours":
        model = load_model(folder)
        cpu.speed_up(model)
        return partial(ours, model)
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return partial(theirs, model)


def serve(args, prompts, stop_ids):
    """One way, as the process of a Worker: a step is the whole job."""
    answer = load_way(args.serve, args.model)
    answer(prompts[:2], stop_ids, max_new_tokens=2, batch_size=2)       # warms up
    turns = Turns(warm_up=0)
    for _ in range(args.rounds):
        turns.wait()
        began = time.perf_counter()
        answers = answer(prompts, stop_ids, args.max_new_tokens, args.batch_size)
        turns.done(time.perf_counter() - began, answers=answers)


def measure(args):
    """The figures of each round: seconds of both, tokens of ours, and how many answers agree."""
    flags = ["--model", args.model, "--prompts", args.prompts, "--prompts_used", args.prompts_used,
             "--max_new_tokens", args.max_new_tokens, "--batch_size", args.batch_size,
             "--rounds", args.rounds]
    workers = {}
    for way in ("ours", "transformers"):
        workers[way] = Worker("benchmarks.sample", "--serve", way, *flags)
    rounds = []
    for _ in range(args.rounds):
        steps = {way: worker.take_step() for way, worker in workers.items()}
        answers = steps["ours"]["answers"]
        same = [a == b for a, b in zip(answers, steps["transformers"]["answers"])]
        rounds.append({
            "seconds": {way: step["seconds"] for way, step in steps.items()},
            "tokens": sum(map(len, answers)),
            "same_answers": sum(same)})
        print(f"round {len(rounds)}: {rounds[-1]}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.kill()
    return rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--prompts", required=True, help="file of prompts, as for generate.py")
    parser.add_argument("--prompts_used", type=int, default=32, help="the first so many")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/sample.json")
    parser.add_argument("--serve", metavar="WAY", help="used by this program itself")
    args = parser.parse_args()
    chat = load_chat(args.model)
    _, _, prompts = read_prompts(args.prompts, chat.encode_prompt)
    prompts = prompts[:args.prompts_used]
    if args.serve:
        return serve(args, prompts, chat.stop_ids)

    check_output(args.output, args.prompts)
    rounds = measure(args)
    ratio = statistics.median(r["seconds"]["transformers"] / r["seconds"]["ours"] for r in rounds)
    rate = {}
    for way in ("ours", "transformers"):
        rate[way] = statistics.median(r["tokens"] / r["seconds"][way] for r in rounds)
    same = min(r["same_answers"] for r in rounds)
    results = machine() | {
        "threads": torch.get_num_threads(),
        "model": Path(args.model).resolve().name,
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "times_as_long_as_ours": ratio,
        "tokens_per_second": rate,
        "same_answers": same,
        "rounds": rounds,
    }
    write_whole(args.output, json.dumps(results, indent=1) + "\n")
    rates = ", ".join(f"{way} {r:.0f}" for way, r in rate.items())
    print(f"ours is {ratio:.2f} times as fast as transformers; tokens/s {rates}; "
          f"{same} of {len(prompts)} answers the same")


if __name__ == "__main__":
    run_command(main)
