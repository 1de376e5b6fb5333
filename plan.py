"""The memory that training takes on each GPU, from config.json alone: an estimate on paper.

    python plan.py --model Meta-Llama-3-8B-Instruct --recompute --gpus 8 16 64
    python plan.py configs/llama3_8b_armorm.toml --gpus 8

Flags are those of train.py that change the memory, and a recipe gives other defaults. Nothing is
loaded, so the model's folder may hold config.json alone. A line for each number of GPUs, in GB:

    state           fp32 weights, gradients and two moments, over the ranks that they are sharded
                    over; exact
    waiting         whole fp32 gradients, less their shards: they wait between the rows of a step,
                    if a rank has several
    activations     of a full row, kept for the backward pass
    head            what is held in all while the head works on the last row
    backward        ... while the backward pass is in the last block or the first
    step            ... while AdamW works
    in all          the largest of these three

Then a sentence says what each knob that is not set would save.

DPO takes no more: its reference is two numbers a pair, computed before the first step. Sliding
windows take no masks. The counts are within 5 % of dry runs of the step (benchmarks/dry.py); on
top come the workspaces of kernels, what the allocator loses, and NCCL, some 2 to 4 GB as a rule of
thumb.
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

SAVERS = ("recompute", "sync_every_micro_batch", "cpu_offload")

BF16, FP32 = 2, 4       # bytes
GPUS_OF_A_NODE = 8
PHASES = ("head", "backward", "step")
MOST = 10**12           # of any number that is given: what is more is a slip


def kept_in_block(c):
    """Numbers that a block keeps for the backward pass per token of a row."""
    # The inputs of two norms and what follows them; queries and what comes of them; keys and
    # values, with a half for prompts, whose keys are there twice; gate and up.
    heads = 2 * c.n_heads * c.head_dim + 3 * c.n_kv_heads * c.head_dim
    if c.qk_norm:
        heads += (c.n_heads + c.n_kv_heads) * c.head_dim    # queries and keys before their norms
    return 4 * c.dim + heads + 2 * c.hidden_dim


def kept_per_token(c, recompute):
    """Numbers kept per token of a row in the last block's backward pass, where most are."""
    at_work = kept_in_block(c) if recompute else 0
    return kept_at_head(c, recompute) + at_work


def kept_at_head(c, recompute):
    """The same, before the backward pass has begun."""
    if recompute:
        return c.n_layers * c.dim       # the inputs of all blocks
    return c.n_layers * kept_in_block(c)


def count_weights(c):
    """Weights of the model and of one block."""
    with torch.device("meta"):                  # takes no memory itself
        model = Transformer(c)
    n = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    return n, block


def memory(c, args, gpus):
    """{what: bytes} that each of `gpus` GPUs holds, by the names above, of a model with ModelConfig
    c and train.py's fields in `args`."""
    # 1. The sizes of the model.
    n, block = count_weights(c)
    head = c.vocab_size * c.dim
    # Gathered from the first block to the last one: the last norm and the head.
    root = n - c.n_layers * block - (0 if c.tied else head)
    tokens = args.tokens_per_micro_batch

    # 2. What rests: weights and two moments in shards, and the gradients of rows before this one.
    shards = min(gpus, GPUS_OF_A_NODE) if args.shard_within_node else gpus
    shard = 0 if args.cpu_offload else FP32 * n / shards        # in CPU memory then
    several_rows = args.pairs_per_step > gpus * max(1, tokens // (2 * args.max_length))
    gradients = 0
    if several_rows:
        gradients = shard if args.sync_every_micro_batch else FP32 * n
    rest = 3 * shard + gradients

    # 3. What comes and goes. Before the backward pass there are the last norm's input, the states
    #    that predict, and their gradients.
    activations = BF16 * tokens * kept_per_token(c, args.recompute)
    before = BF16 * tokens * (kept_at_head(c, args.recompute) + 3 * c.dim)
    # The head's gradient is summed in fp32.
    of_head = BF16 * root + FP32 * head
    room = max(KEPT_LOGITS["gpu"] // c.vocab_size, 2 * args.max_length)     # of a group of pairs
    logits = min(min(tokens, room) * c.vocab_size, KEPT_LOGITS["gpu"] + CHUNK_LOGITS["gpu"])
    # Then the sum is rounded to bf16, in which FSDP takes it.
    of_head += max(FP32 * logits, BF16 * head)
    # In a block's backward pass: its weights and gradients, and four tensors of the MLP's width.
    in_block = BF16 * (root + head + 2 * block) + BF16 * 4 * tokens * c.hidden_dim
    # In the last block all activations are there. FSDP's buffer holds the weights of the next one;
    # the fp32 gradients of the block before are on their way to other ranks, and what that one had
    # kept is free again.
    freed = BF16 * tokens * (c.dim if args.recompute else kept_in_block(c))
    last_block = rest + in_block + BF16 * block + max(0, FP32 * block - freed) + activations
    # In the first one the gradients of all others are there, in shards, of a step's only row too.
    reduced = 0 if args.cpu_offload else FP32 * c.n_layers * block / shards
    first_block = 3 * shard + max(gradients, reduced) + in_block + FP32 * block
    first_block += BF16 * tokens * (c.dim + kept_in_block(c))
    return {
        "state": 4 * shard,
        "waiting": max(0, gradients - shard),
        "activations": activations,
        "head": rest + of_head + before,
        "backward": max(last_block, first_block),
        "step": 4 * shard,
    }


def plan(args):
    """Prints what each GPU would hold at its fullest."""
    c = read_config(args.model)
    n, block = count_weights(c)
    tokens = args.tokens_per_micro_batch
    recomputing = "with" if args.recompute else "without"
    print(f"{args.model}: {n / 1e9:.2f} G parameters, {c.n_layers} blocks of {block / 1e6:.1f} M; "
          f"rows of {tokens} tokens, {recomputing} recomputation; GB a GPU:")
    for i, gpus in enumerate(args.gpus):
        parts = memory(c, args, gpus)
        if i == 0:
            titles = "".join(f"{name:>13}" for name in parts)
            print(f"{'GPUs':>6}{titles}{'in all':>10}   a step")
        sizes = "".join(f"{size / 1e9:>13.1f}" for size in parts.values())
        total = in_all(parts)
        mean_length = gpus * tokens / args.pairs_per_step
        print(f"{gpus:>6}{sizes}{total / 1e9:>10.1f}   "
              f"{args.pairs_per_step} pairs, {args.pairs_per_step / gpus:g} a GPU; one row each, "
              f"and nothing waiting, up to {mean_length:.0f} tokens a pair")
    print(savings(c, args, args.gpus[0]))


def savings(c, args, gpus):
    """What each knob that is not set would save on so many GPUs, as a sentence."""
    now = in_all(memory(c, args, gpus))
    changes = {f"--{name}": {name: True} for name in SAVERS if not getattr(args, name)}
    half = args.tokens_per_micro_batch // 2
    if half >= 2 * args.max_length:         # a pair has to fit
        changes[f"--tokens_per_micro_batch {half}"] = {"tokens_per_micro_batch": half}
    parts = []
    for flag, change in changes.items():
        changed = argparse.Namespace(**vars(args) | change)
        parts.append(f"{flag} {(now - in_all(memory(c, changed, gpus))) / 1e9:.1f}")
    if not parts:
        return "No knob is left that saves memory, but more GPUs."
    return f"On {gpus} GPUs would save, each alone, in GB: {', '.join(parts)}."


def in_all(parts):
    return max(parts[name] for name in PHASES)


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
