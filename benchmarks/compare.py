"""Does this model folder score as transformers scores it? Average log-probs of pairs, packed here against one by one there.

    pip install -r tests/requirements.txt
    python benchmarks/compare.py --model DIR --data pairs.jsonl [--pairs 8]

For a checkpoint that you are about to train, or one that was just saved. Both run in fp32 on the CPU.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alphapo import average_logps
from data.preference import load_pairs, pack
from model import load_model
from tokenizer import load_chat_format, load_tokenizer


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--chat_format")
    args = parser.parse_args()

    chat = load_chat_format(args.model, load_tokenizer(args.model), args.chat_format)
    pairs, _ = load_pairs([args.data], chat, args.max_length, args.max_length)
    (row,) = pack(pairs[:args.pairs], 10**9)
    ours, theirs = load_model(args.model), AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    found = average_logps(ours.response_logps(row.tokens, row.lengths), [n for _, C, R in row.lengths for n in (C, R)])

    expected = []
    for pair in row.pairs:
        for response in (pair.chosen, pair.rejected):
            tokens = torch.from_numpy(np.concatenate((pair.prompt, response))).long()
            logits = theirs(tokens[None]).logits[0, len(pair.prompt) - 1:-1].double()
            expected.append(logits.log_softmax(-1)[range(len(response)), response].mean())
    difference = (found - torch.stack(expected)).abs().max()
    print(f"{2 * len(row.pairs)} responses of {len(row.pairs)} pairs: average log-probs {found.mean():.4f} in the mean; "
          f"largest difference from transformers {difference:.1e}")


if __name__ == "__main__":
    main()
