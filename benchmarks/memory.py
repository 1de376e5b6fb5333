"""Peak memory of one step's forward and backward pass: vocabulary head a pair at a time (train.py) against full logits.

    python benchmarks/memory.py --model DIR --data pairs.jsonl --max_length 1024 --tokens_per_micro_batch 2048

Takes the heaviest row of the first step's pairs, runs it each way in a fresh process, and prints the peak resident
memory above the loaded model: gradients and activations included, optimiser not. Takes train.py's flags. Linux.
"""
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alphapo import average_logps
from data.preference import epoch_steps, hold_out, load_pairs, pack
from model import load_model, pair_attention, pair_layout
from tokenizer import load_chat_format, load_tokenizer
from train import pair_loss, parse_config, run_row


def full_logits_row(model, row, config, grad_scale):
    """run_row as it would be without the head's care: logits of every position, log_softmax, one backward pass."""
    positions, predictors, targets = pair_layout(row.lengths)
    attend = lambda layer, q, k, v: pair_attention(q, k, v, row.lengths, model.config.window)
    logits = F.linear(model.states(row.tokens, positions, attend), model.head_weight)     # (T, V)
    logps = logits.log_softmax(-1)[predictors, row.tokens[targets]]                       # (R,)
    averages = average_logps(logps, [n for _, C, R in row.lengths for n in (C, R)]).view(-1, 2)
    losses = [pair_loss(config, pair, *a.split(1))[0] for pair, a in zip(row.pairs, averages)]
    (grad_scale * torch.cat(losses).sum()).backward()
    return torch.cat(losses)[:, None].detach()


def measure(way, argv):
    config = parse_config(argv)
    tokenizer = load_tokenizer(config.model)
    chat = load_chat_format(config.model, tokenizer, config.chat_format or None)
    pairs, _ = load_pairs(config.data, chat, config.max_length, config.max_prompt_length)
    pairs, _ = hold_out(pairs, config.eval_pairs, config.seed)
    step = epoch_steps(len(pairs), config.pairs_per_step, config.seed, 0)[0]
    row = max(pack([pairs[i] for i in step], config.tokens_per_micro_batch), key=lambda row: len(row.tokens))
    model = load_model(config.model)
    model.recompute = config.recompute
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()     # resident now
    results = {"pair": run_row, "full": full_logits_row}[way](model, row, config, grad_scale=1 / len(step))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{way}: row of {len(row.tokens)} tokens in {len(row.pairs)} pairs, vocabulary {model.config.vocab_size}; "
          f"{(peak - before) / 1e6:.0f} MB above the model; mean loss {results[:, 0].mean():.6f}")


if __name__ == "__main__":
    if way := os.environ.get("MEMORY_WAY"):
        measure(way, sys.argv[1:])
    else:
        for way in ("pair", "full"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=os.environ | {"MEMORY_WAY": way}, check=True)
