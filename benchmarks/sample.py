"""Time of greedy answers against transformers' generate, on the same prompts and in turn.

    python benchmarks/sample.py --model SmolLM2-135M-Instruct --prompts prompts.jsonl

Both answer the same prompts in fp32, --batch_size at once: ours with places refilled as sequences end; transformers in
batches of prompts of like length, padded on the left. A round is one job each; the result is the median of the rounds'
ratios, so that a machine that slows down slows both. All figures go to benchmarks/sample.json. Tokens are counted
without end tokens, and answers compared token for token.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data.prompts import read_prompts
from generate import generate
from model import load_model
from step import machine
from tokenizer import load_chat_format, load_tokenizer


def ours(model, prompts, stop_ids, args):
    answers = generate(model, prompts, seeds=[(0, i) for i in range(len(prompts))], stop_ids=stop_ids, temperature=0,
                       max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    return [ids for ids, in answers]


@torch.no_grad()
def theirs(model, prompts, stop_ids, args):
    answers = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(prompts), args.batch_size):
        batch = by_length[start:start + args.batch_size]
        longest = len(prompts[batch[0]])
        tokens = torch.full((len(batch), longest), min(stop_ids))
        seen = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            tokens[row, longest - len(prompts[i]):], seen[row, longest - len(prompts[i]):] = torch.tensor(prompts[i]), 1
        out = model.generate(tokens, attention_mask=seen, max_new_tokens=args.max_new_tokens, do_sample=False,
                             eos_token_id=sorted(stop_ids), pad_token_id=min(stop_ids))[:, longest:].tolist()
        for i, ids in zip(batch, out):
            answers[i] = ids[:next((n for n, token in enumerate(ids) if token in stop_ids), len(ids))]
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--prompts", required=True, help="file of prompts, as for generate.py")
    parser.add_argument("--prompts_used", type=int, default=32, help="the first so many")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/sample.json")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM
    chat = load_chat_format(args.model, load_tokenizer(args.model))
    prompts = read_prompts(args.prompts, chat.encode_prompt)[2][:args.prompts_used]
    ways = {"ours": (ours, load_model(args.model)),
            "transformers": (theirs, AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))}
    for way, model in ways.values():
        way(model, prompts[:2], chat.stop_ids, argparse.Namespace(max_new_tokens=2, batch_size=2))      # warm
    rounds = []
    for _ in range(args.rounds):
        seconds, answers = {}, {}
        for name, (way, model) in ways.items():
            began = time.perf_counter()
            answers[name] = way(model, prompts, chat.stop_ids, args)
            seconds[name] = time.perf_counter() - began
        rounds.append({"seconds": seconds, "tokens": sum(map(len, answers["ours"])),
                       "same_answers": sum(a == b for a, b in zip(*answers.values()))})
        print(f"round {len(rounds)}: {rounds[-1]}", file=sys.stderr, flush=True)

    median = lambda figure: statistics.median(map(figure, rounds))
    ratio = median(lambda r: r["seconds"]["transformers"] / r["seconds"]["ours"])
    rate = {name: median(lambda r: r["tokens"] / r["seconds"][name]) for name in ways}
    same = min(r["same_answers"] for r in rounds)
    results = machine() | {
        "threads": torch.get_num_threads(), "model": Path(args.model).resolve().name, "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)), "batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens,
        "times_as_long_as_ours": ratio, "tokens_per_second": rate, "same_answers": same, "rounds": rounds}
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    print(f"transformers takes {ratio:.2f} times as long; tokens/s "
          + ", ".join(f"{name} {r:.0f}" for name, r in rate.items()) + f"; {same} of {len(prompts)} answers the same")


if __name__ == "__main__":
    main()
