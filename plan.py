"""The memory that training takes on each GPU, from config.json alone: an estimate on paper.

    python plan.py --model Meta-Llama-3-8B-Instruct --recompute --gpus 8 16 64
    python plan.py configs/llama3_8b_armorm.toml --gpus 8

Flags are those of train.py that change the memory, and a recipe gives other defaults. Nothing is
loaded, so the model's folder may hold config.json alone. A line for each number of GPUs, in GB:

    state           fp32 weights, gradients and two moments, over the ranks that they are sharded
                    over; exact
    gathered        bf16 weights of the root and of two blocks; in bf16 and fp32 the gradients of
                    one block or of the root, whichever is larger
    activations     of a full row
    logits          of one pair, up to KEPT_LOGITS, and of a chunk more
    waiting         whole fp32 gradients, which wait between the rows of a step, if it has several
"""
import argparse
import os
import sys
import tomllib
from pathlib import Path

import torch

from command import run_command
from data.files import read_bytes
from model import CHUNK_LOGITS, KEPT_LOGITS, Transformer, read_config

# The fields of train.py's TrainConfig that change the memory, with its defaults (a test compares).
NUMBERS = {"tokens_per_micro_batch": 8192, "max_length": 2048, "pairs_per_step": 128}
SWITCHES = ("recompute", "sync_every_micro_batch", "shard_within_node", "cpu_offload")

BF16, FP32 = 2, 4       # bytes
GPUS_OF_A_NODE = 8
MOST = 10**12           # of any number that is given: what is more is a slip


def kept_per_token(c, recompute):
    """Numbers kept for the backward pass per token of a row, of a model with ModelConfig c."""
    # In a block: the inputs of two norms and what follows them; queries, keys and values (those of
    # prompt and rejected twice) and what comes of them (twice); gate and up.
    heads = 3 * c.n_heads * c.head_dim + 4 * c.n_kv_heads * c.head_dim
    block = 4 * c.dim + heads + 2 * c.hidden_dim
    if recompute:
        return c.n_layers * c.dim + block       # the inputs of all blocks, and one block at work
    return c.n_layers * block


def plan(args):
    """Prints what each GPU would hold at its fullest."""
    # 1. The sizes of the model, which takes no memory itself.
    c = read_config(args.model)
    with torch.device("meta"):
        model = Transformer(c)
    n = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = n - c.n_layers * block               # embedding, last norm and head
    tokens = args.tokens_per_micro_batch

    # 2. What does not depend on the number of GPUs.
    kept_logits = min(KEPT_LOGITS["gpu"], 2 * args.max_length * c.vocab_size)
    parts = {
        "gathered": BF16 * (root + 2 * block) + (BF16 + FP32) * max(root, block),
        "activations": BF16 * tokens * kept_per_token(c, args.recompute),
        "logits": FP32 * kept_logits + (FP32 + BF16) * CHUNK_LOGITS["gpu"],
    }
    waiting = 0 if args.sync_every_micro_batch else FP32 * n
    recomputing = "with" if args.recompute else "without"
    print(f"{args.model}: {n / 1e9:.2f} G parameters, {c.n_layers} blocks of {block / 1e6:.1f} M; "
          f"rows of {tokens} tokens, {recomputing} recomputation; GB a GPU:")

    # 3. A line for each number of them.
    titles = "".join(f"{name:>13}" for name in parts)
    print(f"{'GPUs':>6}{'state':>10}{titles}{'waiting':>10}{'in all':>10}   a step")
    for gpus in args.gpus:
        shards = min(gpus, GPUS_OF_A_NODE) if args.shard_within_node else gpus
        state = 0 if args.cpu_offload else 4 * FP32 * n / shards    # in CPU memory then
        total = state + sum(parts.values()) + waiting
        sizes = "".join(f"{size / 1e9:>13.1f}" for size in parts.values())
        mean_length = gpus * tokens / args.pairs_per_step
        print(f"{gpus:>6}{state / 1e9:>10.1f}{sizes}{waiting / 1e9:>10.1f}{total / 1e9:>10.1f}   "
              f"{args.pairs_per_step} pairs, {args.pairs_per_step / gpus:g} a GPU; one row each, "
              f"and nothing waiting, up to {mean_length:.0f} tokens a pair")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", help="TOML recipe of train.py")
    parser.add_argument("--model", help="folder with the config.json of a model")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64])
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False)
    # Flags win over the recipe, so it is read between two rounds of parsing.
    recipe = parser.parse_args(argv).recipe
    if recipe:
        parser.set_defaults(**read_recipe(Path(recipe)))
    args = parser.parse_args(argv)
    if not args.model:
        raise ValueError("model is needed: --model FOLDER, or a recipe that names one")
    for name in NUMBERS:
        if not 0 < getattr(args, name) <= MOST:
            raise ValueError(f"{name} = {getattr(args, name)!r:.20}; expected a positive number, "
                             f"{MOST:.0e} at most")
    if not 0 < min(args.gpus) <= max(args.gpus) <= MOST:
        raise ValueError(f"gpus = {args.gpus!r:.60}; expected numbers of GPUs")
    return args


def read_recipe(path):
    """The fields of a recipe that change the memory; train.py checks the others."""
    try:
        values = tomllib.loads(read_bytes(path).decode())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: cannot be read as a TOML recipe ({e})") from None
    fields = {name: values[name] for name in (*NUMBERS, *SWITCHES) if name in values}
    for name, value in fields.items():
        kind = int if name in NUMBERS else bool
        if type(value) is not kind:
            raise ValueError(f"{path}: {name} = {value!r:.60}; expected {kind.__name__}")
    if "model" in values:
        if not isinstance(values["model"], str) or not values["model"]:
            raise ValueError(f"{path}: model = {values['model']!r:.60}; expected a folder")
        fields["model"] = os.path.normpath(path.parent / values["model"])   # relative to it
    return fields


def main():
    plan(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
