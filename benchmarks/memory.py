"""Peak memory of one step's forward and backward pass: the vocabulary head a pair at a time, as
train.py has it, and with full logits.

    python -m benchmarks.memory --model DIR --data pairs.jsonl --max_length 1024 \
        --tokens_per_micro_batch 2048

Takes the heaviest row of the first step's pairs, runs it each way in a fresh process, and prints
the peak resident memory above the loaded model: gradients and activations included, the optimiser
not. Takes train.py's flags. Linux.
"""
import os
import resource
import subprocess
import sys

import cpu
from alphapo import average_logps
from benchmarks.workers import ROOT, resident
from data.preference import epoch_steps, hold_out, load_pairs, pack
from model import load_model, pair_attention, pair_layout
from tokenizer import load_chat
from train import LOSS, pair_loss, parse_config, run_row


def full_logits_row(model, row, config, grad_scale):
    """run_row without the head's care: logits of every position, log_softmax, and one backward
    pass. Returns the losses as a column, (B, 1)."""
    def attend(layer, q, k, v):
        return pair_attention(q, k, v, row.lengths, model.causal_attention)

    positions, predictors, targets = pair_layout(row.lengths)
    logits = model.states(row.tokens, positions, attend) @ model.head_weight.T          # (T, V)
    logps = logits.log_softmax(-1)[predictors, row.tokens[targets]]                     # (N,)
    sizes = []
    for _, C, R in row.lengths:
        sizes += [C, R]
    averages = average_logps(logps, sizes).view(-1, 2)                                  # (B, 2)
    losses, *_ = pair_loss(config, row.pairs, *averages.T)                              # (B,)
    (grad_scale * losses.sum()).backward()
    return losses[:, None].detach()


WAYS = {"pair": run_row, "full": full_logits_row}


def measure(way, argv):
    """Runs the row one way, and prints what that took."""
    # 1. The heaviest row of the first step.
    config = parse_config(argv)
    chat = load_chat(config.model, config.chat_format or None)
    pairs, _ = load_pairs(config.data, chat, config.max_length, config.max_prompt_length)
    pairs, _ = hold_out(pairs, config.eval_pairs, config.seed)
    step = epoch_steps(len(pairs), config.pairs_per_step, config.seed, 0)[0]
    rows = pack([pairs[i] for i in step], config.tokens_per_micro_batch)
    row = max(rows, key=lambda row: len(row.tokens))

    # 2. The model, as train.py has it on CPUs.
    model = load_model(config.model)
    model.recompute = config.recompute
    cpu.speed_up(model)

    # 3. The row.
    before = resident("VmRSS")
    results = WAYS[way](model, row, config, grad_scale=1 / len(step))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{way}: row of {len(row.tokens)} tokens in {len(row.pairs)} pairs, vocabulary "
          f"{model.config.vocab_size}; {(peak - before) / 1e6:.0f} MB above the model; mean loss "
          f"{results[:, LOSS].mean():.6f}")


def main(argv):
    way = os.environ.get("MEMORY_WAY")      # train.py has the flags
    if way:
        return measure(way, argv)
    for way in WAYS:
        subprocess.run([sys.executable, "-m", "benchmarks.memory", *argv], cwd=ROOT,
                       env=os.environ | {"MEMORY_WAY": way}, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
