"""Align a Llama or Mistral model on preference pairs with AlphaPO (or SimPO, or DPO): a Hugging Face folder in and out.

    python train.py                                                        # the embedded default: tiny model, 2 cores
    torchrun --nproc_per_node 8 train.py --model Meta-Llama-3-8B-Instruct --data pairs.jsonl --recompute
    torchrun --nproc_per_node 8 train.py configs/RECIPE.toml --output runs/first --resume    # recipe: other defaults
    python train.py --model DIR --plan 8 16 64                             # the memory it takes, from config.json alone

Weights, gradients and optimiser state are fp32, sharded over all ranks (FSDP2); blocks compute in bf16 on GPUs. A run
writes config.toml, metrics.jsonl and step-NNNNNN/, each a Hugging Face folder with, until the last, train_state/ in it.
"""
import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import time
import tomllib
import traceback
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from alphapo import alphapo_loss, average_logps, displacement_metrics, dpo_loss, pair_metrics, simpo_loss
from data.files import write_whole
from data.preference import (check_fit, content_hash, epoch_steps, hold_out, keep_pairs, load_pairs, pack,
                             read_kept_pairs)
from distributed import (check_same_run, check_space, claim_output, clip_gradients, end_rank, first_to_fail,
                         forget_gathered_weights, from_rank_0, join_ranks, load_checkpoint, load_sharded,
                         newest_checkpoint, noted_signals, plan, ranks_store, read_metrics, read_run,
                         restart_count, reuse_memory, save_checkpoint, say)
from judge import Judge, load_judge
from model import COPIED_FILES, checkpoint_tensors, read_config
from tokenizer import check_vocabulary, load_chat_format, load_tokenizer

ROOT = Path(__file__).resolve().parent


# --- configuration ----------------------------------------------------------------------------------------------------

@dataclass
class TrainConfig:
    # The job. Paths in a recipe are relative to the recipe.
    model: str = ""                           # Hugging Face folder of the starting model
    data: list[str] = field(default_factory=list)         # files of pairs
    eval_data: list[str] = field(default_factory=list)    # held-out pairs of their own
    eval_pairs: int = 0                       # or: so many pairs of `data` held out, all of a prompt together
    skip_bad_lines: bool = False              # drop and count malformed lines instead of stopping
    as_it_stands: bool = False                # take text that is laid out already (chat marks, Human: ...) as it stands
    output: str = ""                          # run folder; empty: the first free of runs/METHOD-001, -002, ...
    chat_format: str = ""                     # llama3, chatml, ...; empty: the chat template of the model's folder
    date: str = ""                            # 2026-01-31, for templates that write it; empty: that of the run's first day

    # The method. Knobs left out take METHODS' defaults; a knob that the method does not have is an error.
    method: str = "alphapo"                   # alphapo, simpo or dpo
    alpha: float | None = None                # reward shape; 0 is SimPO
    beta: float | None = None                 # reward scale
    gamma_beta_ratio: float | None = None     # target reward margin, as a share of beta
    sft_weight: float = 0.0                   # adds so much of the chosen answer's negative average log-prob

    # The optimiser. AdamW, cosine to zero.
    learning_rate: float = 7e-7
    warmup_ratio: float = 0.1                 # of all steps
    weight_decay: float = 0.0                 # on matrices only
    max_grad_norm: float = 1.0
    pairs_per_step: int = 128
    epochs: int = 1
    max_steps: int = 0                        # stop there if that is earlier; 0: no
    seed: int = 0                             # of the order of pairs, the held-out pairs and judged samples

    # Size.
    max_length: int = 2048                    # pairs whose prompt with either response is longer are dropped
    max_prompt_length: int = 1800             # so are pairs with longer prompts
    cache: str = "runs/cache"                 # folder where tokens of large data are kept; empty: tokenise every time
    tokens_per_micro_batch: int = 8192        # a packed row; a step is as many rows as its pairs need
    recompute: bool = False                   # recompute activations in the backward pass: less memory, a third slower

    # Ranks. None of these changes what is computed.
    shard_within_node: bool = False           # shard over the GPUs of a node, replicate over nodes: less traffic
    cpu_offload: bool = False                 # weights, gradients and optimiser rest in CPU memory: far less on the GPU
    sync_every_micro_batch: bool = False      # reduce gradients after each row, not once a step: saves 4 bytes a weight
    timeout_minutes: float = 30               # for ranks to wait for each other before they give up

    # Precision.
    weight_dtype: str = "float32"             # of weights, gradients and optimiser; float64 is for checks
    compute_dtype: str = ""                   # of activations; empty: bfloat16 on GPUs, weight_dtype on CPUs

    # Looking and saving.
    save_every: int = 0                       # steps between checkpoints; 0: at the end only, and where a signal stops it
    keep_last: int = 2                        # checkpoints kept, older ones are deleted; 0: all
    eval_every: int = 0                       # steps between evaluations; 0: before and after training only
    judge: str = ""                           # FILE.py:FUNCTION, called with (prompt turns, answer), returns a number
    judge_prompts: str = ""                   # JSON Lines of held-out prompts; one sampled answer to each is judged
    max_new_tokens: int = 512                 # of a judged answer (temperature 0.8, top_p 0.95)
    save_dtype: str = ""                      # bfloat16, float32, ...; empty: as in the starting model's files. config.json
                                              # goes on naming the starting model's

    # This call alone.
    resume: bool = False                      # go on from the newest complete checkpoint in `output`, if there is one
    plan: list[int] | None = None             # print what so many GPUs each would hold, train nothing


METHODS = {   # the knobs of each method and their defaults: the paper's Mistral row, and its DPO baseline
    "alphapo": {"alpha": 0.25, "beta": 2.5, "gamma_beta_ratio": 0.1},
    "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.1},
    "dpo": {"beta": 0.01},
}
PATHS = ("model", "data", "eval_data", "output", "cache", "judge", "judge_prompts")
CALL = ("resume", "plan")
# May change when a run is resumed. The model and the pairs may have moved: their content is compared, not their place.
FREE = (*PATHS, *CALL, "tokens_per_micro_batch", "recompute", "shard_within_node", "cpu_offload",
        "sync_every_micro_batch", "timeout_minutes", "save_every", "keep_last", "eval_every", "skip_bad_lines",
        "as_it_stands")
CACHE_BYTES = 20 * 10**6    # smaller data is tokenised in a few seconds
MAX_SKIPPED = 3     # steps in a row whose loss or gradient is not finite: then the run gives up


def parse_config(argv):
    """TrainConfig from the command line: [recipe.toml] --field value ... Flags win over the recipe. Without a recipe
    and a model it is configs/tiny.toml."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("recipe", nargs="?", default=None, help="TOML file of defaults")
    types = typing.get_type_hints(TrainConfig)
    for name, kind in types.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        elif kind == list[str]:
            parser.add_argument(f"--{name}", nargs="+", metavar="FILE")
        elif name == "plan":
            parser.add_argument("--plan", nargs="*", type=int, metavar="GPUS")
        else:
            parser.add_argument(f"--{name}", type=float if kind == float | None else kind, metavar=name.upper())

    def error(message):
        raise ValueError(f"{message}; --help lists the flags")
    parser.error = error        # one line from one rank, as for every other error
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("recipe")
    if recipe is None and "model" not in flags:
        recipe = ROOT / "configs" / "tiny.toml"
    return resolve_config(TrainConfig(**(read_recipe(recipe, types) if recipe else {}) | flags))


def read_recipe(path, types):
    """The fields of a TOML recipe, type-checked, paths made relative to where it is. ValueError names the key."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: cannot be read as a TOML recipe ({e})") from None
    for name, value in values.items():
        if name not in types or name in CALL:
            raise ValueError(f"{path}: unknown key {name!r}; expected one of "
                             f"{', '.join(n for n in types if n not in CALL)}")
        kind = types[name]
        wanted = {float: (int, float), float | None: (int, float), list[str]: (list,)}.get(kind, (kind,))
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{path}: {name} = {value!r}; expected {getattr(kind, '__name__', kind)}")
        if name in PATHS and value:
            place = lambda p: os.path.relpath(path.parent / p)
            values[name] = [place(p) for p in value] if isinstance(value, list) else place(value)
    return values


def resolve_config(config):
    """Fills in the method's defaults and the compute dtype, and checks the rest. ValueError names the field."""
    if config.method not in METHODS:
        raise ValueError(f"method = {config.method!r}; expected one of {', '.join(METHODS)}")
    for knob in ("alpha", "beta", "gamma_beta_ratio"):
        default = METHODS[config.method].get(knob)
        if getattr(config, knob) is None:
            config = dataclasses.replace(config, **{knob: default})
        elif default is None:
            raise ValueError(f"{knob} = {getattr(config, knob)} is given, but {config.method} has no such knob; "
                             "leave it out")
    for name in ("beta", "learning_rate", "max_grad_norm", "pairs_per_step", "epochs", "max_length",
                 "max_prompt_length", "tokens_per_micro_batch", "max_new_tokens", "timeout_minutes"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} = {getattr(config, name)}; expected a positive number")
    for name in ("alpha", "gamma_beta_ratio", "sft_weight", "weight_decay"):
        if getattr(config, name) is not None and not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name} = {getattr(config, name)}; expected a finite number")
    for name in ("sft_weight", "weight_decay", "max_steps", "eval_every", "eval_pairs", "seed", "save_every",
                 "keep_last"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} = {getattr(config, name)}; expected 0 or more")
    if not 0 <= config.warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio = {config.warmup_ratio}; expected a share of the steps, 0 to 1")
    if not config.model or not config.data and config.plan is None:
        raise ValueError("model and data are needed: --model FOLDER --data FILE [FILE ...]")
    if config.eval_data and config.eval_pairs:
        raise ValueError("eval_data and eval_pairs are both given; expected one of them")
    if bool(config.judge) != bool(config.judge_prompts) or (config.judge and ":" not in config.judge):
        raise ValueError("judge needs FILE.py:FUNCTION, and judge_prompts beside it")
    for name, allowed in (("save_dtype", ("", "float32", "bfloat16", "float16", "float64")),
                          ("weight_dtype", ("float32", "float64")),
                          ("compute_dtype", ("", "bfloat16", "float32", "float64"))):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} = {getattr(config, name)!r}; expected {', '.join(allowed).lstrip(', ')}"
                             + (" or nothing" if "" in allowed else ""))
    try:
        config.date and datetime.date.fromisoformat(config.date)
    except ValueError:
        raise ValueError(f"date = {config.date!r}; expected a date like 2026-01-31") from None
    if not config.compute_dtype:
        compute_dtype = "bfloat16" if torch.cuda.is_available() else config.weight_dtype
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
    if config.plan is not None and not all(n > 0 for n in config.plan):
        raise ValueError(f"plan = {config.plan}; expected numbers of GPUs")
    return config


def write_config(config, path):
    """The resolved config as a TOML recipe; paths absolute, so that it runs from anywhere."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if name in CALL:
            continue
        if name in PATHS and value:
            value = [os.path.abspath(p) for p in value] if isinstance(value, list) else os.path.abspath(value)
        if value is not None:
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}\n")    # these JSON values are TOML values
    write_whole(path, "".join(lines))


def identity_of(config, model, pairs, held_out):
    """What must be the same for a run to go on: config but for FREE, the shape of the model, the tokens of the pairs."""
    def digest(pairs):
        sha = hashlib.sha256()
        for pair in pairs:
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                sha.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        return f"{len(pairs)} pairs, sha256 {sha.hexdigest()[:16]}"
    return {"config": {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE},
            "model": dataclasses.asdict(model.config),
            "pairs": {"data": digest(pairs), "held-out data": digest(held_out)}}


# --- the objective ----------------------------------------------------------------------------------------------------

def pair_loss(config, pair, chosen, rejected):
    """The loss of one pair from its average log-probs. (1,), (1,) -> (losses, chosen_rewards, rejected_rewards)"""
    if config.method == "alphapo":
        losses, *rewards = alphapo_loss(chosen, rejected, alpha=config.alpha, beta=config.beta,
                                        gamma_beta_ratio=config.gamma_beta_ratio)
    elif config.method == "simpo":
        losses, *rewards = simpo_loss(chosen, rejected, beta=config.beta, gamma_beta_ratio=config.gamma_beta_ratio)
    else:
        ref_chosen, ref_rejected = torch.tensor(pair.ref_logps, dtype=torch.float64, device=chosen.device).split(1)
        losses, *rewards = dpo_loss(chosen * len(pair.chosen), rejected * len(pair.rejected), ref_chosen, ref_rejected,
                                    beta=config.beta)
    return losses - config.sft_weight * chosen, *rewards


def run_row(model, row, config, grad_scale=None):
    """Scores the B pairs of a packed row. With grad_scale it also adds the gradient of grad_scale * (sum of losses).

    Returns (B, 5) in float64: loss, chosen reward, rejected reward, and the average log-probs of chosen and rejected.
    The vocabulary head works a pair at a time: only one pair's logits exist at once.
    """
    states, targets = model.response_states(row.tokens.to(model.device), row.lengths)  # (R, dim), (R,)
    results = []

    def loss(i, logps):
        _, C, R = row.lengths[i]
        chosen, rejected = average_logps(logps, (C, R)).split(1)
        losses, chosen_rewards, rejected_rewards = pair_loss(config, row.pairs[i], chosen, rejected)
        results.append(torch.cat((losses, chosen_rewards, rejected_rewards, chosen, rejected)).detach())
        return losses.sum()

    grad_states = model.run_head(states, targets, [C + R for _, C, R in row.lengths], loss, grad_scale)
    if grad_scale is not None:
        states.backward(grad_states)
    return torch.stack(results)


def run_rows(model, rows, config, grad_scale=None, noted={}):
    """Scores B pairs, packed into rows for all ranks; each rank runs its own. With grad_scale it also adds the gradient
    of grad_scale * (sum of losses), averaged over the ranks (by FSDP).

    Returns run_row's (B, 5) for the pairs of all ranks, in the order in which they were given to `pack`, and the signals
    that any rank has `noted` by now, as a list: one all-reduce for both.
    """
    results = torch.zeros(sum(len(row.indices) for row in rows) + 1, 5, dtype=torch.float64, device=model.device)
    rows = rows[dist.get_rank()::dist.get_world_size()]
    for row in rows:
        if grad_scale is not None and isinstance(model, FSDPModule):     # gradients meet in the step's last backward
            model.set_requires_gradient_sync(config.sync_every_micro_batch or row is rows[-1])
            model.set_requires_all_reduce(row is rows[-1])               # and replicas, if there are, then alone
        if row.indices:
            results[row.indices] = run_row(model, row, config, grad_scale)
        else:           # more ranks than pairs: this row only keeps the ranks in step
            run_row(model, row, config, None if grad_scale is None else 0.0)
    for i, count in enumerate(noted.values()):
        results[-1, i] = count
    dist.all_reduce(results)
    return results[:-1], [number for number, count in zip(noted, results[-1].tolist()) if count]


@torch.no_grad()
def score_pairs(model, pairs, config):
    """run_row's (B, 5) of B pairs, in their order, on every rank."""
    results, _ = run_rows(model, pack(pairs, config.tokens_per_micro_batch, dist.get_world_size()), config)
    forget_gathered_weights(model)
    return results


def reference_logps(model, pairs, config):
    """Summed log-probs of N pairs under the model as it is now, (N, 2): all that DPO needs of its reference."""
    lengths = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs], dtype=torch.float64)
    return score_pairs(model, pairs, config)[:, 3:].cpu() * lengths


# --- schedule, evaluation, report -------------------------------------------------------------------------------------

def learning_rate(step, total, config):
    """Learning rate of step 0 to total - 1: linear warm-up from one warm-up step's worth, then cosine towards zero."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizer(model, config):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]        # norms and biases are not decayed
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)
    for p in model.parameters():        # now, and not in the first step: a checkpoint before it would make one of its own
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def metrics_of(results, start=None):
    """Means over pairs as a dict of floats, from run_row's results (B, 5), and those of step 0 on the same pairs."""
    losses, chosen_rewards, rejected_rewards, chosen, rejected = results.T
    metrics = {"loss": losses.mean(), **pair_metrics(chosen_rewards, rejected_rewards, chosen, rejected)}
    if start is not None:
        metrics |= displacement_metrics(chosen, rejected, *start.T[3:])
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))    # waits for the GPU, once a step


def work_of(rows, seconds):
    """What a step was as work: how many tokens, how evenly dealt to the ranks, how fast."""
    world, tokens = dist.get_world_size(), [len(row.tokens) * bool(row.indices) for row in rows]
    heaviest = sum(max(tokens[i:i + world]) for i in range(0, len(rows), world))    # the one that the ranks wait for
    return {"tokens": sum(tokens), "micro_batches": len(rows) // world, "imbalance": heaviest * world / sum(tokens),
            "tokens_per_second": sum(tokens) / seconds}


def first_day(config):
    """The date for chat templates that write today's: the one given, that of the run to go on with, or today's. Rank 0
    only."""
    began = read_run(Path(config.output)) if config.output else None
    return config.date or (began or {"config": {}})["config"].get("date") or datetime.date.today().isoformat()


def tokenised_pairs(config, files, chat):
    """load_pairs, once: of large files what comes out is kept in config.cache under a hash of all that goes in, and
    all ranks of a node read it there. What is small every rank does for itself."""
    limits = config.max_length, config.max_prompt_length
    flags = {"skip_bad_lines": config.skip_bad_lines, "as_it_stands": config.as_it_stands}
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file")
    if not config.cache or sum(os.path.getsize(file) for file in files) < CACHE_BYTES:
        return load_pairs(files, chat, *limits, **flags)
    sources = ("data/files.py", "data/dialogues.py", "data/preference.py", "tokenizer.py")
    tokenizer_files = [f for pattern in COPIED_FILES for f in sorted(Path(config.model).glob(pattern)) if f.is_file()]
    key = content_hash([*files, *tokenizer_files, *(ROOT / s for s in sources)], files, type(chat).__name__, chat.date,
                       limits, flags)
    kept = Path(config.cache) / f"{key[:32]}.safetensors"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not kept.exists():
        workers = len(os.sched_getaffinity(0))
        say(f"data     {', '.join(files)}: tokenising in {workers} processes")
        keep_pairs(kept, *load_pairs(files, chat, *limits, workers, **flags))
    dist.barrier()
    say(f"data     tokens are kept in {kept}")
    return read_kept_pairs(kept)


def report(config, model, tokenizer, chat, pairs, held_out, dropped, total_steps):
    """The first lines of a run: what is about to be trained on what."""
    quantiles = lambda lengths: " / ".join(str(sorted(lengths)[int(q * (len(lengths) - 1))]) for q in (0, 0.5, 0.9, 1))
    knobs = ", ".join(f"{k} {getattr(config, k):g}" for k in METHODS[config.method])
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    n_rows = len(pack(pairs[:config.pairs_per_step], config.tokens_per_micro_batch, world))
    c = model.config
    print(f"method   {config.method}: {knobs}" + (f", sft_weight {config.sft_weight:g}" if config.sft_weight else ""))
    print(f"model    {config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in "
          f"{config.weight_dtype}, computing in {config.compute_dtype}, {c.n_layers} layers of {c.dim}, vocabulary "
          f"{c.vocab_size}, window {c.window or 'none'}")
    fields = json.loads((Path(config.model) / "config.json").read_text(encoding="utf-8"))
    named = fields.get("dtype") or fields.get("torch_dtype")
    if config.save_dtype and named and config.save_dtype != named:
        print(f"saving   in {config.save_dtype}; config.json goes on naming {named}, to which transformers 5 and "
              f"vLLM round unless they are told dtype={config.save_dtype}")
    print("shards   weights "
          + ("whole on the one rank" if not isinstance(model, FSDPModule) else
             f"sharded over {local if config.shard_within_node else world}"
             + (f" and replicated {world // local} times" if config.shard_within_node else "")
             + (", resting in CPU memory" if config.cpu_offload else "")))
    print(f"tokens   {type(tokenizer).__name__} of {tokenizer.vocab_size}, generation ends at "
          f"{' '.join(tokenizer.piece(i) for i in sorted(chat.stop_ids))}")
    if tokenizer.note:
        print(f"note     {tokenizer.note}")
    print(f"layout   {chat.source}" + (f" on {chat.date}" if chat.date else "")
          + f"; without a system turn it begins {chat.opening()!r}")
    print(f"data     {len(pairs)} pairs to train on, {len(held_out)} held out; {sum(dropped.values())} dropped"
          + "".join(f"\n         - {n} dropped: {reason}" for reason, n in dropped.most_common()))
    print(f"lengths  tokens, least / median / 90 % / most: prompt {quantiles([len(p.prompt) for p in pairs])}; chosen "
          f"{quantiles([len(p.chosen) for p in pairs])}; rejected {quantiles([len(p.rejected) for p in pairs])}")
    print(f"batch    {config.pairs_per_step} pairs a step of {statistics.mean(map(len, pairs)):.0f} tokens on average, "
          f"in rows of at most {config.tokens_per_micro_batch} (some {n_rows} a step, {n_rows // world} a rank); "
          f"{config.epochs} epochs of {math.ceil(len(pairs) / config.pairs_per_step)} steps; {total_steps} steps in all")
    shortest = min(pairs, key=len)
    show = lambda ids: " ".join(repr(tokenizer.piece(i))[1:-1] for i in ids.tolist())
    print(f"pair     {shortest.source}, token by token; [scored]:\n         prompt    {show(shortest.prompt)}\n"
          f"         chosen   [{show(shortest.chosen)}]\n         rejected [{show(shortest.rejected)}]", flush=True)


# --- training ---------------------------------------------------------------------------------------------------------

def main(config):
    """Runs one job on the ranks that torchrun started, or alone. Returns its evaluations, the objects of metrics.jsonl
    with eval_ names, step 0 first. SystemExit with 128 + its number after a signal, with the run saved."""
    reuse_memory()
    device = join_ranks(config)
    try:
        return run(config, device)
    finally:
        if dist.get_world_size() == 1 or sys.exc_info()[0] in (None, SystemExit):
            dist.destroy_process_group()    # after an error the others may be gone, and this would wait for them


def run(config, device):
    # 1. Data: tokens of all pairs, in the memory of every rank.
    world = dist.get_world_size()
    say(f"ranks    {world} on {device.type}")
    read_config(config.model)               # what cannot be trained is refused before data are read
    checkpoint_tensors(config.model)
    tokenizer = load_tokenizer(config.model)
    chat = load_chat_format(config.model, tokenizer, config.chat_format or None, from_rank_0(lambda: first_day(config)))
    if config.date and not chat.date:
        raise ValueError(f"date = {config.date} is given, but {chat.source} writes none; leave it out")
    config = dataclasses.replace(config, date=chat.date or "")
    pairs, dropped = tokenised_pairs(config, config.data, chat)
    if config.eval_data:
        held_out, dropped_held_out = tokenised_pairs(config, config.eval_data, chat)
        dropped.update({f"{reason} (held out)": n for reason, n in dropped_held_out.items()})
    else:
        pairs, held_out = hold_out(pairs, config.eval_pairs, config.seed)
        if len(held_out) < config.eval_pairs:
            say(f"data     {len(held_out)} pairs are held out, not {config.eval_pairs}: pairs of one prompt stay together, and "
                "no prompt that is left has as few as are missing")
    steps = [step for epoch in range(config.epochs)
             for step in epoch_steps(len(pairs), config.pairs_per_step, config.seed, epoch)]
    steps = steps[:config.max_steps or None]
    check_fit(pairs + held_out, config.tokens_per_micro_batch)
    judge = None
    if config.judge:
        judge = Judge(load_judge(config.judge), config.judge_prompts, chat, max_new_tokens=config.max_new_tokens,
                      seed=config.seed, as_it_stands=config.as_it_stands, skip_bad_lines=config.skip_bad_lines)

    # 2. Model and optimiser, fp32: at a learning rate of 1e-6 a step leaves 98 % of bf16 weights where they were.
    model = load_sharded(config, device)
    check_vocabulary(config.model, chat, model.config.vocab_size)
    longest = max(pairs + held_out, key=lambda p: len(p.prompt) + max(len(p.chosen), len(p.rejected)))
    if len(longest.prompt) + max(len(longest.chosen), len(longest.rejected)) > model.config.max_positions:
        raise ValueError(f"{longest.source}: longer than the {model.config.max_positions} positions of {config.model}; "
                         "set max_length to that")
    optimizer = make_optimizer(model, config)

    # 3. The run folder, and where in the run this call begins.
    restarts = torch.tensor(restart_count())
    dist.all_reduce(restarts, dist.ReduceOp.MAX)        # torchrun tells only the node that failed
    output = from_rank_0(lambda: claim_output(config, restarts.item() > 0))
    from_rank_0(lambda: check_same_run(output, identity_of(config, model, pairs, held_out)))
    first, checkpoint = from_rank_0(lambda: newest_checkpoint(output, len(steps)))
    lines = from_rank_0(lambda: read_metrics(output, first) if checkpoint else [])
    evaluations = [line for line in lines if any(name.startswith("eval_") for name in line)]
    if first == len(steps) and not (checkpoint / "train_state").exists():
        say(f"resume   {checkpoint} is the end of this run; nothing to do")
        return evaluations
    from_rank_0(lambda: check_space(model, config, output, last=False))
    if dist.get_rank() == 0:
        write_whole(output / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_config(config, output / "config.toml")
        report(config, model, tokenizer, chat, pairs, held_out, dropped, len(steps))

    # What a checkpoint holds beside weights and moments: `start`, the scores of the held-out pairs at step 0, and
    # `reference`, the log-probs of all pairs then, which DPO compares with; no second model is kept.
    progress = {"step": first, "skipped": 0, "skipped_in_a_row": 0,
                "start": torch.zeros(len(held_out), 5, dtype=torch.float64),
                "reference": torch.zeros(len(pairs + held_out), 2, dtype=torch.float64)}
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer, progress)
        say(f"resume   {checkpoint}, {len(steps) - first} steps to go")
    if config.method == "dpo":
        if not checkpoint:
            progress["reference"] = reference_logps(model, pairs + held_out, config)
        for pair, ref_logps in zip(pairs + held_out, progress["reference"].tolist()):
            pair.ref_logps = tuple(ref_logps)

    # 4. The loop.
    def log(metrics):
        if dist.get_rank() == 0:
            whole = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            with open(output / "metrics.jsonl", "a") as f:
                print(json.dumps(whole), file=f)

    def evaluate(step):
        m = {}
        if held_out:
            results = score_pairs(model, held_out, config).cpu()
            if step == 0:
                progress["start"] = results
            m = metrics_of(results, progress["start"])
            say(f"eval     step {step}: loss {m['loss']:.4f}  accuracy {m['rewards/accuracies']:.3f}  margin "
                f"{m['rewards/margins']:.4f}  chosen {m['logps/chosen']:.4f}  rejected {m['logps/rejected']:.4f}; since "
                f"step 0: chosen {m['displacement/chosen']:+.4f}, rejected {m['displacement/rejected']:+.4f}, chosen "
                f"fell in {m['displacement/fell']:.0%} of {len(results)} pairs")
        if judge:
            answers, scores = judge(model)
            m["judge_score"] = statistics.mean(scores)
            m["judge_stderr"] = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
            m["judge_tokens"] = statistics.mean(len(chat.encode_response(a)) for a in answers)
            say(f"judge    step {step}: {m['judge_score']:.1f} +- {m['judge_stderr']:.1f}, mean of {len(scores)} "
                f"sampled answers to held-out prompts, {m['judge_tokens']:.0f} tokens each")
            if dist.get_rank() == 0:
                judge.keep(output, step, answers, scores)
                if step == len(steps):
                    judge.show_change(output, step)
        if m:
            evaluations.append({"step": step} | {f"eval_{name}": value for name, value in m.items()})
            log(evaluations[-1])

    def due(step, every):
        return every and step % every == 0 and step < len(steps)

    evaluated = {line["step"] for line in evaluations}
    if (first == 0 or due(first, config.eval_every)) and first not in evaluated:
        evaluate(first)
    with noted_signals() as noted:
        started = time.time()
        for i in range(first, len(steps)):
            began = time.time()
            batch = [pairs[j] for j in steps[i]]
            rows = pack(batch, config.tokens_per_micro_batch, world)
            results, stopping = run_rows(model, rows, config, world / len(batch), noted)
            grad_norm = clip_gradients(model, config.max_grad_norm)
            lr = learning_rate(i, len(steps), config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            finite = results.isfinite().all(1).tolist()
            applied = all(finite) and math.isfinite(grad_norm)
            if applied:
                optimizer.step()
            optimizer.zero_grad()
            progress |= {"step": i + 1, "skipped": progress["skipped"] + (not applied),
                         "skipped_in_a_row": 0 if applied else progress["skipped_in_a_row"] + 1}

            now = time.time()
            left = (now - started) / (i + 1 - first) * (len(steps) - i - 1)
            m = {"step": i + 1, **metrics_of(results), "grad_norm": grad_norm, "learning_rate": lr, "pairs": len(batch),
                 **work_of(rows, now - began), "skipped": progress["skipped"]}
            if not applied:
                m["not_finite"] = [pair.source for pair, f in zip(batch, finite) if not f] or [p.source for p in batch]
            log(m)
            say(f"step {i + 1}/{len(steps)}  loss {m['loss']:.4f}  accuracy {m['rewards/accuracies']:.2f}  margin "
                f"{m['rewards/margins']:.4f}  chosen {m['logps/chosen']:.4f}  rejected {m['logps/rejected']:.4f}  grad "
                f"{grad_norm:.3f}  lr {lr:.2e}  {m['tokens_per_second']:.0f} tokens/s  {left / 60:.1f} min left")
            if not applied:
                what = "the gradient is not finite, of any of" if all(finite) else "the loss is not finite, of"
                say(f"skipped  step {i + 1}: {what} {', '.join(m['not_finite'][:8])}"
                    + (f" and {len(m['not_finite']) - 8} more" if len(m["not_finite"]) > 8 else ""))
            if progress["skipped_in_a_row"] == MAX_SKIPPED:
                raise ValueError(f"step {i + 1}: {MAX_SKIPPED} steps in a row were not finite and not applied. The pairs "
                                 f"are named above and in {output}/metrics.jsonl; checkpoints are as they were")

            if due(i + 1, config.eval_every) and not stopping:
                evaluate(i + 1)
            if due(i + 1, config.save_every) or stopping:
                folder = save_checkpoint(model, optimizer, progress, config, output, last=False)
                say(f"saved    {folder}")
            if stopping:
                say(f"stopped  by {signal.Signals(stopping[0]).name} after step {i + 1}; --resume --output {output} goes "
                    "on")
                raise SystemExit(128 + stopping[0])

        # 5. A plain Hugging Face folder, also where a judge raises at the last moment.
        try:
            evaluate(len(steps))
        finally:
            folder = save_checkpoint(model, optimizer, progress, config, output, last=True)
    say(f'saved. To load it: transformers.AutoModelForCausalLM.from_pretrained("{folder}")')
    return evaluations


def start(argv):
    """main, with one message from the first rank to fail and exit status 1 on all."""
    store, rank, world = ranks_store()
    status = 0
    try:
        config = parse_config(argv)
        if config.plan is not None:
            plan(config)
        else:
            main(config)
    except KeyboardInterrupt:       # before the loop, which notes it: there is nothing to save
        status = 128 + signal.SIGINT
    except SystemExit as e:
        status = e.code
    except BaseException as e:      # a panic in a library is no Exception
        status = 1
        if first_to_fail(store):
            message = str(e)
            if isinstance(e, torch.OutOfMemoryError):
                message += ("\n--plan estimates what a GPU has to hold; --recompute, a smaller --tokens_per_micro_batch, "
                            "--sync_every_micro_batch and --cpu_offload lower it")
            elif isinstance(e, dist.DistError) or isinstance(e, RuntimeError) and "gloo" in message:
                message = (f"another rank died or did not answer in {config.timeout_minutes:g} minutes "
                           f"({message.splitlines()[0]})")
            elif not isinstance(e, (ValueError, OSError)):      # of ours: the way there helps
                message = traceback.format_exc()
            print(f"error{f' (rank {rank})' if world > 1 else ''}: {message}", file=sys.stderr, flush=True)
    end_rank(status, world)


if __name__ == "__main__":
    start(sys.argv[1:])
