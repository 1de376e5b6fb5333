"""Does this model folder score as transformers scores it? Average log-probs of pairs, packed here
and one by one there.

    pip install -r tests/requirements.txt
    python -m benchmarks.compare --model DIR --data pairs.jsonl [--pairs 8]

For a checkpoint that you are about to train, or one that was just saved. Both run in fp32 on the
CPU.
"""
import argparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from alphapo import average_logps
from command import run_command
from data.preference import load_pairs, pack
from model import load_model
from tokenizer import load_chat


def average_by_transformers(model, prompt, response):
    """Average log-prob of one response by a model of transformers. prompt, response: arrays."""
    tokens = torch.from_numpy(np.concatenate((prompt, response))).long()
    logits = model(tokens[None]).logits[0, len(prompt) - 1:-1].double()         # (N, V)
    return logits.log_softmax(-1)[range(len(response)), response].mean()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description="Does this model folder score as transformers scores it?")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--chat_format")
    args = parser.parse_args()

    # 1. Ours: all pairs in one row.
    chat = load_chat(args.model, args.chat_format)
    pairs, _ = load_pairs([args.data], chat, args.max_length, args.max_length)
    (row,) = pack(pairs[:args.pairs], 10**9)
    ours = load_model(args.model)
    sizes = []
    for _, C, R in row.lengths:
        sizes += [C, R]
    found = average_logps(ours.response_logps(row.tokens, row.lengths), sizes)

    # 2. Theirs: a sequence at a time.
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    expected = []
    for pair in row.pairs:
        for response in (pair.chosen, pair.rejected):
            expected.append(average_by_transformers(theirs, pair.prompt, response))
    difference = (found - torch.stack(expected)).abs().max()
    print(f"{len(sizes)} responses of {len(row.pairs)} pairs: average log-probs {found.mean():.4f} "
          f"in the mean; largest difference from transformers {difference:.1e}")


if __name__ == "__main__":
    run_command(main)
