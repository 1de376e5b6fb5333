"""Align a Llama, Mistral or Qwen model on preference pairs with AlphaPO (or SimPO, or DPO).

    python train.py                                     # embedded default: tiny model, 2 cores
    python train.py --model Llama-3.2-1B-Instruct --data pairs.jsonl --eval_pairs 256
    torchrun --nproc_per_node 8 train.py configs/llama3_8b_armorm.toml --output runs/first --resume

A Hugging Face folder goes in and comes out. To read: the knobs; the objective, from a packed row of
pairs to losses and gradients; one optimiser step; evaluation; a run and its loop. What is printed,
flags and recipes come last.

Mixed precision on GPUs (on CPUs all that is bf16 here is fp32 by default):

    bf16        compute_dtype: gathered weights, activations, and the gradients of one row
    fp32        weight_dtype: the master weights, sharded over the ranks by FSDP2; AdamW's moments;
                gradients summed over rows and ranks
    fp32        the vocabulary head's logits and softmax, and the log-probs of tokens
    float64     averages over tokens, rewards, losses

A run writes into its folder what checkpoint.py describes.
"""
import argparse
import dataclasses
import datetime
import json
import math
import os
import statistics
import sys
import time
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import gpu
from alphapo import alphapo_loss, average_logps, displacement_metrics, dpo_loss, pair_metrics
from checkpoint import (
    check_same_run, check_space, claim_output, finish_checkpoint, identity_of, load_checkpoint,
    log_metrics, model_digest, newest_checkpoint, read_metrics, read_run, save_checkpoint)
from command import unlock_all
from data.files import is_finite_number, read_json, write_whole
from data.preference import (
    PackedPairs, PreferencePair, are_kept, check_fit, content_hash, epoch_steps, hold_out,
    keep_pairs, load_pairs, pack, read_kept_pairs)
from distributed import (
    Noted, Stop, clip_gradients, forget_gathered_weights, from_rank_0, join_ranks, leave_if,
    leave_ranks, load_sharded, local_rank, noted_signals, ranks_of_node, restart_count, run_rank,
    say, set_gradient_sync, signal_of_any_rank)
from judge import Judge, load_judge
from model import (
    Transformer, checkpoint_tensors, kept_tokens, read_config, target_logps, target_logps_backward,
    to_device)
from tokenizer import ChatFormat, load_chat

ROOT = Path(__file__).resolve().parent


# --- the knobs ------------------------------------------------------------------------------------

@dataclass
class TrainConfig:
    # The job. Paths in a recipe are relative to the recipe.
    model: str = ""                     # Hugging Face folder of the starting model
    data: list[str] = field(default_factory=list)           # files of pairs
    eval_data: list[str] = field(default_factory=list)      # held-out pairs of their own
    eval_pairs: int = 0                 # or: so many pairs of `data`, all of a prompt together
    skip_bad_lines: bool = False        # drop and count malformed lines instead of stopping
    as_it_stands: bool = False          # accept text with chat marks in it, instead of refusing it
    output: str = ""                    # run folder; empty: the first free runs/METHOD-001, ...
    chat_format: str = ""               # llama3, chatml, ...; empty: the model's chat template
    date: str = ""                      # 2026-01-31, for templates that write it; empty: today,
                                        # and when a run is resumed that of its first day

    # The method. Knobs left out take METHODS' defaults; one that the method lacks is an error.
    method: str = "alphapo"             # alphapo, simpo, dpo or dpo_norm (DPO on averages)
    alpha: float | None = None          # reward shape; 0 is SimPO
    beta: float | None = None           # reward scale
    gamma_beta_ratio: float | None = None       # target reward margin, as a share of beta
    sft_weight: float = 0.0             # adds so much of the chosen response's -log-prob per token
    label_smoothing: float = 0.0        # share of pairs whose order is taken to be wrong, below 0.5

    # The optimiser: PyTorch's AdamW with its betas and eps, cosine to zero.
    learning_rate: float = 7e-7
    warmup_ratio: float = 0.1           # of all steps
    weight_decay: float = 0.0           # on matrices only
    max_grad_norm: float = 1.0
    pairs_per_step: int = 128
    epochs: int = 1
    max_steps: int = 0                  # so many steps at most, schedule included; 0: all
    seed: int = 0                       # of the order of pairs, held-out pairs and judged samples

    # Size.
    max_length: int = 2048              # drops pairs whose prompt with a response is longer
    max_prompt_length: int = 1800       # drops pairs with longer prompts
    cache: str = "runs/cache"           # keeps tokens of large data; empty: tokenise every time
    tokens_per_micro_batch: int = 8192  # a packed row; a step is as many rows as its pairs need
    recompute: bool = False             # activation checkpointing: less memory, a fifth slower
    compile: bool = False               # on GPUs: 3 % faster, the first step half a minute later

    # Ranks. None of these changes what is computed.
    shard_within_node: bool = False     # HSDP: shard over a node, replicate over nodes
    cpu_offload: bool = False           # weights, gradients and optimiser rest in CPU memory
    sync_every_micro_batch: bool = False        # reduce gradients after each row: saves 4 bytes a
                                                # weight for more traffic
    timeout_minutes: float = 30         # for ranks to wait for each other before they give up

    # Precision.
    weight_dtype: str = "float32"       # of weights, gradients, optimiser; float64 is for checks
    compute_dtype: str = ""             # of activations; empty: bfloat16 on GPUs if weights are
                                        # float32, else weight_dtype

    # Looking and saving.
    save_every: int = 0                 # steps between checkpoints; 0: at the end, or where a
                                        # signal stops the run: a crash then loses all of it
    keep_last: int = 2                  # checkpoints kept, older ones are deleted; 0: all
    eval_every: int = 0                 # steps between evaluations; 0: before and after training
    peak_tflops: float = 0              # of a GPU in bf16, for the metric mfu; 0: of known ones
    judge: str = ""                     # FILE.py:FUNCTION, called with (prompt turns, answer)
    judge_prompts: str = ""             # held-out prompts; one sampled answer to each is judged
    max_new_tokens: int = 512           # of a judged answer
    save_dtype: str = ""                # bfloat16, float32, ...; empty: as in the starting model's
                                        # files. config.json goes on naming the starting model's

    # This call alone.
    resume: bool = False                # go on from the newest complete checkpoint in `output`


# The knobs of each method and their defaults: those of the paper's Table 3 for Mistral-7B, its DPO
# baseline, and SimPO's beta for DPO on averages. DPO's acts on sums: on answers of N tokens a beta
# of 2.5 / N is dpo_norm's 2.5.
METHODS = {
    "alphapo": {"alpha": 0.25, "beta": 2.5, "gamma_beta_ratio": 0.1},
    "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.1},
    "dpo": {"beta": 0.01},
    "dpo_norm": {"beta": 2.5},
}
PATHS = ("model", "data", "eval_data", "output", "cache", "judge", "judge_prompts")
CALL = ("resume",)
# What may change when a run is resumed. Model and pairs may have moved: the shape of the model and
# the tokens of the pairs are compared instead (checkpoint.identity_of).
MAY_CHANGE = (
    *PATHS, *CALL, "tokens_per_micro_batch", "recompute", "shard_within_node", "cpu_offload",
    "compile", "peak_tflops", "sync_every_micro_batch", "timeout_minutes", "save_every",
    "keep_last", "eval_every", "skip_bad_lines", "as_it_stands")
CACHE_BYTES = 20 * 10**6        # smaller data is tokenised in a few seconds
MAX_SKIPPED = 3                 # steps in a row that are not finite; then the run gives up
RETRY_SECONDS = 60              # between two tries to save the end of a run on a full disk


# --- the objective --------------------------------------------------------------------------------

# The columns of `results`, a (B, 5) tensor in float64 with a row for each pair.
LOSS, CHOSEN_REWARD, REJECTED_REWARD, CHOSEN_LOGP, REJECTED_LOGP = range(5)


def pair_loss(config, pairs, chosen_logps, rejected_logps):
    """Losses and rewards of B pairs, from their average log-probs. sft_weight adds the chosen
    response's negative average to the loss of any method.

    chosen_logps, rejected_logps (B,) -> (losses, chosen_rewards, rejected_rewards), each (B,)
    """
    knobs = {"beta": config.beta, "label_smoothing": config.label_smoothing}
    if config.method in ("alphapo", "simpo"):
        losses, *rewards = alphapo_loss(            # SimPO has no alpha, which is alpha = 0
            chosen_logps, rejected_logps,
            alpha=config.alpha or 0.0, gamma_beta_ratio=config.gamma_beta_ratio, **knobs)
    elif config.method in ("dpo", "dpo_norm"):
        # Against those of the starting model. DPO is defined on sums, dpo_norm on averages.
        reference = [pair.ref_logps for pair in pairs]                          # (B, 2)
        lengths = [pair.lengths[1:] if config.method == "dpo" else (1, 1) for pair in pairs]
        reference = to_device(reference, chosen_logps.device, torch.float64)
        C, R = to_device(lengths, chosen_logps.device).T                        # (B,) each
        losses, *rewards = dpo_loss(
            chosen_logps * C, rejected_logps * R, *reference.T, **knobs)
    else:
        raise ValueError(f"method {config.method!r} has no loss here")
    return losses - config.sft_weight * chosen_logps, *rewards


def run_row(model, row, config, grad_scale=None):
    """Scores the B pairs of a packed row: results (B, 5). To train, grad_scale is given: then it
    also adds the gradient of grad_scale * (sum of losses) to .grad of the weights."""
    # 1. The layers, for the whole row: states that predict the N response tokens, and those tokens.
    tokens = to_device(row.tokens, model.device)                                # (T,)
    states, targets = model.response_states(tokens, row.lengths)                # (N, dim), (N,)

    # 2. Head and loss. FSDP keeps the root's weights (the head's is one) gathered after the forward
    #    pass, so that head_weight is a whole, ordinary tensor.
    results, grad_states = head_and_loss(
        states, targets, model.head_weight, row.pairs, config, grad_scale)

    # 3. Backward through the layers, once. At its end FSDP reduces whatever is in .grad of the
    #    root's weights, including what head_and_loss added.
    if grad_scale is not None:
        states.backward(grad_states)
    return results


def head_and_loss(states, targets, weight, pairs, config, grad_scale=None):
    """Vocabulary head and loss of B pairs: (results (B, 5), gradient of the states or None).

    states (N, dim) predict the targets (N,), the response tokens of pair after pair. With
    grad_scale the gradient of `weight` (V, dim) is added to its .grad, by hand: autograd would make
    another (V, dim) for every group of pairs.
    It runs some pairs at a time, forward and backward: as many as leave no logits to recompute.
    """
    training = grad_scale is not None
    grad_states = None
    if training:
        grad_states = torch.empty_like(states)
        # Summed in fp32, because in bf16 each group would round it. (Of fp32 it is .grad itself.)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = (torch.zeros_like(weight, dtype=wide) if weight.grad is None
                       else weight.grad.to(wide))
    results = []
    end = 0
    for group in groups_of(pairs, kept_tokens(states, weight)):
        sizes = [n for pair in group for n in pair.lengths[1:]]                 # C, R, C, R, ...
        start = end
        end = start + sum(sizes)
        inputs = states[start:end], weight, targets[start:end]
        token_logps, logsumexp, kept = target_logps(*inputs, keep=training)     # (sum of sizes,)
        token_logps.requires_grad_(training)    # a new leaf: autograd has the loss alone, from here
        averages = average_logps(token_logps, sizes).view(-1, 2)                # (pairs, 2)
        losses, *rewards = pair_loss(config, group, *averages.T)
        results.append(torch.column_stack((losses, *rewards, averages)).detach())
        if training:
            (grad,) = torch.autograd.grad(grad_scale * losses.sum(), token_logps)
            grad_states[start:end] = target_logps_backward(
                grad, *inputs, logsumexp, kept, grad_weight)
    if training:
        weight.grad = grad_weight.to(weight.dtype)
    return torch.cat(results), grad_states


def groups_of(pairs, room):
    """Pairs in their order, in groups of at most `room` response tokens, or of one pair."""
    groups = []
    left = -1
    for pair in pairs:
        n = sum(pair.lengths[1:])
        if n > left:
            groups.append([])
            left = room
        groups[-1].append(pair)
        left -= n
    return groups


def run_rows(model, rows, config, grad_scale=None):
    """Scores B pairs that are packed into rows for all ranks; each rank runs its own rows. Returns
    results (B, 5) of all pairs, on every rank, in the order in which `pack` was given them.

    With grad_scale the gradients of the rows add up (gradient accumulation), and FSDP averages them
    over the ranks. All ranks call this together, in a process group.
    """
    training = grad_scale is not None
    n_pairs = sum(len(row.indices) for row in rows)
    results = torch.zeros(n_pairs, 5, dtype=torch.float64, device=model.device)
    rows = rows[dist.get_rank()::dist.get_world_size()]
    for row in rows:
        if training:
            set_gradient_sync(
                model, last_row=row is rows[-1], every_row=config.sync_every_micro_batch)
        if row.indices:
            of_pairs = run_row(model, row, config, grad_scale)
            results.index_copy_(0, to_device(row.indices, model.device), of_pairs)
        else:
            # A filler (see pack): FSDP's collective operations need all ranks to run as many rows.
            run_row(model, row, config, 0.0 if training else None)
    dist.all_reduce(results)            # each pair is 0 but on its own rank; a NaN stays one
    return results


# --- one optimiser step ---------------------------------------------------------------------------

@dataclass
class StepOutcome:
    results: torch.Tensor           # (B, 5), on every rank
    rows: list[PackedPairs]         # what the pairs were packed into
    grad_norm: float                # before clipping
    applied: bool                   # False: not all was finite, weights and moments stayed
    seconds: float                  # that forward and backward passes took


def train_step(model, optimizer, pairs, rate, config):
    """One AdamW step on B pairs, at learning rate `rate`. All ranks call it together with the same
    pairs. What is computed is the same function of these on any number of ranks and rows, up to
    the rounding of sums that are taken in another order."""
    # 1. Packed rows, the same number for each rank.
    world = dist.get_world_size()
    rows = pack(pairs, config.tokens_per_micro_batch, world)

    # 2. The gradient of the mean loss over all B pairs. FSDP divides the sum over ranks by `world`,
    #    so each rank scales its losses by world / B.
    began = time.perf_counter()
    results = run_rows(model, rows, config, grad_scale=world / len(pairs))
    grad_norm = clip_gradients(model, config.max_grad_norm)
    seconds = time.perf_counter() - began       # of all that the GPU did: clipping waits for it

    # 3. The step, unless something is not finite: the numbers of all ranks are the same.
    for group in optimizer.param_groups:
        group["lr"] = rate
    applied = math.isfinite(grad_norm) and results.isfinite().all().item()
    if applied:
        optimizer.step()
    optimizer.zero_grad()
    return StepOutcome(results, rows, grad_norm, applied, seconds)


def learning_rate(step, total, config):
    """Of steps 0 to total - 1: a linear warm-up, not from 0, then a cosine towards zero."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    angle = math.pi * (step - warmup) / (total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(angle))


# --- evaluation -----------------------------------------------------------------------------------

@torch.no_grad()
def score_pairs(model, pairs, config, noted=None):
    """Results (B, 5) of B pairs, in their order, on every rank. With `noted`, of noted_signals, it
    raises Stop on all of them after a signal."""
    results = []
    try:
        # As many at a time as a step takes: a signal waits for no more.
        for i in range(0, len(pairs), config.pairs_per_step):
            if noted is not None:
                leave_if(noted)
            some = pairs[i:i + config.pairs_per_step]
            rows = pack(some, config.tokens_per_micro_batch, dist.get_world_size())
            results.append(run_rows(model, rows, config))
    finally:
        forget_gathered_weights(model)      # no backward pass follows that would
    return torch.cat(results)


def reference_logps(model, pairs, config):
    """Log-probs of B pairs under the model as it is now, (B, 2): sums for DPO, averages for
    dpo_norm. That is all that they need of their reference: no second model is kept. ValueError
    names a pair without finite ones."""
    averages = score_pairs(model, pairs, config)[:, [CHOSEN_LOGP, REJECTED_LOGP]].cpu()
    for pair, finite in zip(pairs, averages.isfinite().all(1).tolist()):
        if not finite:
            raise ValueError(f"{pair.source}: its log-probs under the starting model, which are "
                             "DPO's reference, are not finite")
    if config.method == "dpo_norm":
        return averages
    return averages * torch.tensor([pair.lengths[1:] for pair in pairs])        # (B, 2)


def metrics_of(results, start=None):
    """Means over pairs, as a dict of floats, of results (B, 5) and of how they moved since `start`,
    the results of the same pairs at step 0."""
    losses, chosen_rewards, rejected_rewards, chosen, rejected = results.T
    metrics = {"loss": losses.mean()}
    metrics |= pair_metrics(chosen_rewards, rejected_rewards, chosen, rejected)
    if start is not None:
        metrics |= displacement_metrics(
            chosen, rejected, start[:, CHOSEN_LOGP], start[:, REJECTED_LOGP])
    values = torch.stack(list(metrics.values())).tolist()           # waits for the GPU, once
    return dict(zip(metrics, values))


def evaluate(run, step):
    """Scores the held-out pairs, and sampled answers by the judge; prints and logs both. Raises
    Stop on all ranks after a signal, and has logged nothing then."""
    metrics = {}
    if run.held_out:
        results = score_pairs(run.model, run.held_out, run.config, run.noted).cpu()
        if step == 0:
            run.progress["start"] = results
        metrics = metrics_of(results, run.progress["start"])
        say(evaluation_line(step, metrics, len(results)))
    if run.judge:
        metrics |= judge_answers(run, step)
    if metrics:
        line = {"step": step}
        for name, value in metrics.items():
            line[f"eval_{name}"] = value
        run.evaluations.append(line)
        run.log(line)


def judge_answers(run, step):
    """Has sampled answers scored; returns the metrics and prints them. Whatever fails is told, and
    is no reason to stop."""
    try:
        answers, scores, failure = run.judge(run.model, run.noted)
        metrics = judged_metrics(run, answers, scores)
    except ValueError as e:         # of the sampler or the chat format: the same on all ranks
        say(f"judge    step {step}: no answers ({e})")
        return {}
    say(judged_line(step, metrics, len(scores)))
    if failure:
        say(f"judge    {metrics['judge_failed']} answers have no score. The first, {failure}")
    if dist.get_rank() == 0:
        run.judge.keep(run.output, step, answers, scores)
        if step == len(run.steps):
            run.judge.show_change(run.output, answers, scores)
    return metrics


def judged_metrics(run, answers, scores):
    """Of the answers that have a score; the others (NaN) are counted."""
    scored = [score for score in scores if math.isfinite(score)]
    stderr = math.nan
    if len(scored) > 1:
        stderr = statistics.stdev(scored) / math.sqrt(len(scored))
    lengths = [len(run.chat.encode_response(answer)) for answer in answers]
    metrics = {
        "judge_score": statistics.fmean(scored) if scored else math.nan,
        "judge_stderr": stderr,
        "judge_tokens": statistics.mean(lengths)}
    if len(scored) < len(scores):
        metrics["judge_failed"] = len(scores) - len(scored)
    return metrics


# --- a run ----------------------------------------------------------------------------------------

@dataclass
class Run:
    config: TrainConfig
    model: Transformer
    optimizer: torch.optim.Optimizer
    chat: ChatFormat
    judge: Judge | None
    pairs: list[PreferencePair]         # to train on
    held_out: list[PreferencePair]
    steps: list[list[int]]              # which of `pairs` each step takes
    output: Path                        # the run's folder
    evaluations: list[dict]             # logged so far
    checkpoint: Path | None             # the newest
    finished: bool                      # nothing is left to do
    # What a checkpoint holds beside weights and moments: "step", how many are done; "skipped" and
    # "skipped_in_a_row"; "start", the results of the held-out pairs at step 0; "reference", DPO's
    # log-probs of all pairs at step 0.
    progress: dict
    noted: Noted | None = None          # the signals that came
    seconds_between: float = 0.0        # from the last step to the one in hand
    unlogged: list[dict] = field(default_factory=list)      # lines that the disk had no room for

    def log(self, *lines):
        """Logs lines on rank 0. What cannot be written waits for the next call: no reason to
        stop."""
        if dist.get_rank() == 0:
            self.unlogged += lines
            try:
                log_metrics(self.output, self.unlogged)
                self.unlogged.clear()
            except OSError as e:
                say(f"note     {e}; {len(self.unlogged)} lines of metrics wait to be logged")


def main(config):
    """Runs one job on the ranks that torchrun started, or alone. Returns its evaluations, the
    objects of metrics.jsonl with eval_ names, step 0 first. After a signal the run is saved, and
    this raises SystemExit with 128 + the number of the signal."""
    device = join_ranks(config.timeout_minutes)
    try:
        run = open_run(config, device)
        if not run.finished:
            with noted_signals() as run.noted:
                train(run)
        return run.evaluations
    finally:
        leave_ranks()
        unlock_all()


def make_optimizer(model, config):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]         # norms, biases: not decayed
    groups = [{"params": matrices, "weight_decay": config.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    # The moments are made now: a run may have to be saved before the first step that is applied.
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def train(run):
    """The loop: from the step where the run is to its end, or to a signal."""
    config, progress = run.config, run.progress
    first, n_steps = progress["step"], len(run.steps)

    def due(step, every):
        return step == n_steps or (every and step % every == 0)

    step_ended = time.perf_counter()
    try:
        evaluated = [line["step"] for line in run.evaluations]
        if (first == 0 or due(first, config.eval_every)) and first not in evaluated:
            evaluate(run, first)
        began = time.perf_counter()
        for i in range(first, n_steps):
            # 1. The step.
            step_began = time.perf_counter()
            run.seconds_between = step_began - step_ended
            pairs = [run.pairs[j] for j in run.steps[i]]
            rate = learning_rate(i, n_steps, config)
            outcome = train_step(run.model, run.optimizer, pairs, rate, config)
            skipped = not outcome.applied       # its pairs and its place in the schedule are spent
            progress["step"] = i + 1
            progress["skipped"] += skipped
            progress["skipped_in_a_row"] = progress["skipped_in_a_row"] + 1 if skipped else 0

            # 2. Print it and log it.
            step_ended = time.perf_counter()
            metrics = step_metrics(run, outcome, pairs, rate, step_ended - step_began)
            run.log(metrics)
            left = (step_ended - began) / (i + 1 - first) * (n_steps - i - 1)
            say(step_line(metrics, n_steps, left))
            if skipped:
                say(skipped_line(outcome, metrics))
            if progress["skipped_in_a_row"] == MAX_SKIPPED:
                raise ValueError(
                    f"step {i + 1}: {MAX_SKIPPED} steps in a row were not finite and not applied. "
                    f"The pairs are named above and in {run.output}/metrics.jsonl; checkpoints are "
                    "as they were")

            # 3. Save, then evaluate: whatever becomes of the evaluation, the step is not lost.
            leave_if(run.noted)
            if due(i + 1, config.save_every):
                save(run)
            if due(i + 1, config.eval_every):
                evaluate(run, i + 1)
    except Stop:
        stop(run)

    # 4. What is left is a plain Hugging Face folder.
    from_rank_0(lambda: finish_checkpoint(run.checkpoint))
    if run.unlogged:
        run.log()
    say("saved. To load it: transformers.AutoModelForCausalLM.from_pretrained("
        f'"{run.checkpoint}")')


def save(run):
    """Saves the step in hand. At the end of a run it waits for a disk that is full."""
    at_end = run.progress["step"] == len(run.steps)
    # An evaluation that is still to come can fail, and is resumed from the whole state.
    last = at_end and not run.held_out and not run.judge
    while True:
        try:
            run.checkpoint = save_checkpoint(
                run.model, run.optimizer, run.progress, run.config, run.output, last)
            break
        except OSError as e:
            if not at_end or signal_of_any_rank(run.noted):
                raise
            say(f"waiting  {e}; trying again every {RETRY_SECONDS} s. A signal gives up")
        for _ in range(RETRY_SECONDS):
            time.sleep(1)
            if signal_of_any_rank(run.noted):
                break
    if not last:
        say(f"saved    {run.checkpoint}")


def stop(run):
    """Ends a run after a signal, with all its steps saved."""
    step = run.progress["step"]
    saved = int(run.checkpoint.name[5:]) if run.checkpoint else 0
    if step > saved:
        save(run)
    if run.unlogged:
        run.log()
    number = signal_of_any_rank(run.noted)
    say(f"stopped  by {Signals(number).name} after step {step}; --resume --output "
        f"{run.output} goes on")
    raise SystemExit(128 + number)


def open_run(config, device):
    """All that the loop needs: data, model, folder, and where in the run this call begins."""
    # 1. Data: the tokens of all pairs, in the memory of every rank. What cannot be trained is
    #    refused before data are read.
    say(f"ranks    {dist.get_world_size()} on {device.type}")
    model_config = read_config(config.model)
    checkpoint_tensors(config.model)
    config, chat = open_chat(config)
    pairs, held_out, dropped = read_pairs(config, chat, model_config.max_positions)
    steps = []
    for epoch in range(config.epochs):
        steps += epoch_steps(len(pairs), config.pairs_per_step, config.seed, epoch)
        if config.max_steps and len(steps) >= config.max_steps:
            steps = steps[:config.max_steps]
            break
    judge = open_judge(config, chat) if config.judge else None

    # 2. Model and optimiser.
    model = load_sharded(config, device)
    optimizer = make_optimizer(model, config)

    # 3. The folder, and the checkpoint to go on from.
    output = open_folder(config, model.config, pairs, held_out)
    first, checkpoint = newest_checkpoint(output, len(steps))
    lines = from_rank_0(lambda: read_metrics(output, first) if checkpoint else [])
    evaluations = [line for line in lines if any(name.startswith("eval_") for name in line)]
    finished = from_rank_0(
        lambda: first == len(steps) and not (checkpoint / "train_state" / ".metadata").exists())
    # Zeros of the right shape: load_checkpoint fills them in place.
    progress = {
        "step": first, "skipped": 0, "skipped_in_a_row": 0,
        "start": torch.zeros(len(held_out), 5, dtype=torch.float64),
        "reference": torch.zeros(len(pairs) + len(held_out), 2, dtype=torch.float64)}
    run = Run(config, model, optimizer, chat, judge, pairs, held_out, steps, output, evaluations,
              checkpoint, finished, progress)
    if finished:
        from_rank_0(lambda: finish_checkpoint(checkpoint))
        say(f"resume   {checkpoint} is the end of this run; nothing to do")
        return run
    from_rank_0(lambda: check_space(model, config, output, last=False))
    if dist.get_rank() == 0:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_whole(output / "metrics.jsonl", text)
        write_config(config, output / "config.toml")
        report(run, dropped)

    # 4. Weights, moments and counters of the checkpoint; the reference of DPO.
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer, progress)
        say(f"resume   {checkpoint}, {len(steps) - first} steps to go")
    if config.method in ("dpo", "dpo_norm"):
        if not checkpoint:
            progress["reference"] = reference_logps(model, pairs + held_out, config)
        for pair, ref_logps in zip(pairs + held_out, progress["reference"].tolist()):
            pair.ref_logps = tuple(ref_logps)
    return run


def open_chat(config):
    """(config, chat format) of the model. The date that its template writes, if it writes one, is
    kept in the config: that of a run's first day is used to the end of the run."""
    def first_day():
        began = read_run(Path(config.output)) if config.output else None
        kept = began["config"].get("date") if began else None
        return config.date or kept or datetime.date.today().isoformat()

    chat = load_chat(config.model, config.chat_format or None, from_rank_0(first_day))
    if config.date and not chat.date:
        raise ValueError(
            f"date = {config.date} is given, but {chat.source} writes none; leave it out")
    return dataclasses.replace(config, date=chat.date or ""), chat


def read_pairs(config, chat, max_positions):
    """(pairs to train on, held-out pairs, dropped). ValueError names a pair that does not fit."""
    pairs, dropped = tokenised_pairs(config, config.data, chat)
    if config.eval_data:
        held_out, dropped_held_out = tokenised_pairs(config, config.eval_data, chat)
        for reason, n in dropped_held_out.items():
            dropped[f"{reason} (held out)"] += n
    else:
        pairs, held_out = hold_out(pairs, config.eval_pairs, config.seed)
        if len(held_out) < config.eval_pairs:
            say(f"data     {len(held_out)} pairs are held out, not {config.eval_pairs}: pairs of "
                "one prompt stay together, and no prompt that is left has as few as are missing")
    check_fit(pairs + held_out, config.tokens_per_micro_batch)

    def longest_sequence(pair):
        return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))

    longest = max(pairs + held_out, key=longest_sequence)
    if longest_sequence(longest) > max_positions:
        raise ValueError(f"{longest.source}: longer than the {max_positions} positions of "
                         f"{config.model}; set max_length to that")
    return pairs, held_out, dropped


def tokenised_pairs(config, files, chat):
    """load_pairs, once: of large files what comes out is kept in config.cache under a hash of all
    that goes in, and all ranks of a node read it there. Small files every rank reads for itself."""
    limits = config.max_length, config.max_prompt_length
    flags = {"skip_bad_lines": config.skip_bad_lines, "as_it_stands": config.as_it_stands}
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file")
    if not config.cache or sum(os.path.getsize(file) for file in files) < CACHE_BYTES:
        return load_pairs(files, chat, *limits, **flags)

    # The code that tokenises is part of what goes in, and so are the model's files.
    sources = [ROOT / "tokenizer.py"]
    sources += [ROOT / "data" / f"{name}.py" for name in ("files", "dialogues", "preference")]
    key = content_hash(
        [*files, *sources], files, model_digest(config.model), type(chat).__name__, chat.date,
        limits, flags)
    kept = Path(config.cache) / f"{key[:32]}.safetensors"
    if local_rank() == 0 and not are_kept(kept):
        workers = len(os.sched_getaffinity(0))
        say(f"data     {', '.join(files)}: tokenising in {workers} processes")
        keep_pairs(kept, *load_pairs(files, chat, *limits, workers, **flags))
    dist.barrier()
    say(f"data     tokens are kept in {kept}")
    return read_kept_pairs(kept)


def open_judge(config, chat):
    return Judge(
        load_judge(config.judge), config.judge_prompts, chat,
        max_new_tokens=config.max_new_tokens, seed=config.seed,
        as_it_stands=config.as_it_stands, skip_bad_lines=config.skip_bad_lines)


def open_folder(config, model_config, pairs, held_out):
    """The run's folder, on every rank. ValueError unless it is new or this run's own."""
    restarts = torch.tensor(restart_count())
    dist.all_reduce(restarts, dist.ReduceOp.MAX)        # torchrun tells only the node that failed
    restarted = restarts.item() > 0
    output = from_rank_0(
        lambda: claim_output(config.output, config.method, config.resume, restarted))
    knobs = {}
    for name, value in dataclasses.asdict(config).items():
        if name not in MAY_CHANGE:
            knobs[name] = value
    identity = identity_of(knobs, model_config, pairs, held_out)
    from_rank_0(lambda: check_same_run(output, identity))
    return output


# --- what is printed and logged -------------------------------------------------------------------

def step_metrics(run, outcome, pairs, rate, seconds):
    """The line of metrics.jsonl of a step."""
    metrics = {"step": run.progress["step"], **metrics_of(outcome.results)}
    metrics |= {"grad_norm": outcome.grad_norm, "learning_rate": rate, "pairs": len(pairs)}
    is_clipped = outcome.applied and outcome.grad_norm > run.config.max_grad_norm
    metrics["clipped"] = int(is_clipped)        # the mean over steps is the share of clipped ones
    metrics |= work_of(outcome.rows, seconds) | speed_of(run, outcome, seconds)
    metrics["skipped"] = run.progress["skipped"]
    if not outcome.applied:
        # Where all losses are finite and the gradient is not, it may be any of the pairs.
        finite = outcome.results.isfinite().all(1).tolist()
        sources = [pair.source for pair, fine in zip(pairs, finite) if not fine]
        metrics["not_finite"] = sources or [pair.source for pair in pairs]
    return metrics


def work_of(rows, seconds):
    """What a step was as work: how many tokens, how evenly dealt to the ranks, how fast."""
    world = dist.get_world_size()
    tokens = [len(row.tokens) if row.indices else 0 for row in rows]
    waited_for = 0                      # of each round of rows the heaviest one, by all ranks
    for i in range(0, len(rows), world):
        waited_for += max(tokens[i:i + world])
    total = sum(tokens)
    return {
        "tokens": total,
        "micro_batches": len(rows) // world,
        "imbalance": waited_for * world / total,        # 1 is even
        "tokens_per_second": total / seconds}


def speed_of(run, outcome, seconds):
    """Where a step's time went, and what a GPU had to hold and made of it."""
    speed = {
        "seconds": seconds,
        "seconds_rows": outcome.seconds,                # of these, forward and backward passes
        "seconds_between": run.seconds_between}         # before: saving, evaluating, printing
    device = run.model.device
    if device.type != "cpu":
        speed["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9     # of rank 0
        peak = run.config.peak_tflops * 1e12 or gpu.peak_flops(device)
        if peak:
            lengths = [n for row in outcome.rows if row.indices for n in row.lengths]
            flops = gpu.useful_flops(run.model.config, lengths)
            speed["mfu"] = flops / seconds / dist.get_world_size() / peak
    return speed


def step_line(m, n_steps, seconds_left):
    return (f"step {m['step']}/{n_steps}  loss {m['loss']:.4f}  accuracy "
            f"{m['rewards/accuracies']:.2f}  margin {m['rewards/margins']:.4f}  chosen "
            f"{m['logps/chosen']:.4f}  rejected {m['logps/rejected']:.4f}  grad "
            f"{m['grad_norm']:.3f}  lr {m['learning_rate']:.2e}  {m['tokens_per_second']:.0f} "
            f"tokens/s  {seconds_left / 60:.1f} min left")


def skipped_line(outcome, m):
    what = "the loss is not finite, of"
    if outcome.results.isfinite().all():
        what = "the gradient is not finite, by any of"
    names = m["not_finite"]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"skipped  step {m['step']}: {what} {', '.join(names[:8])}{more}"


def judged_line(step, m, n_answers):
    return (f"judge    step {step}: {m['judge_score']:.1f} +- {m['judge_stderr']:.1f}, mean of "
            f"{n_answers - m.get('judge_failed', 0)} sampled answers to held-out prompts, "
            f"{m['judge_tokens']:.0f} tokens each")


def evaluation_line(step, m, n_pairs):
    return (f"eval     step {step}: loss {m['loss']:.4f}  accuracy {m['rewards/accuracies']:.3f}  "
            f"margin {m['rewards/margins']:.4f}  chosen {m['logps/chosen']:.4f}  rejected "
            f"{m['logps/rejected']:.4f}; since step 0: chosen {m['displacement/chosen']:+.4f}, "
            f"rejected {m['displacement/rejected']:+.4f}, chosen fell in "
            f"{m['displacement/fell']:.0%} of {n_pairs} pairs")


def report(run, dropped):
    """Prints the first lines of a run: what is about to be trained on what."""
    config, chat = run.config, run.chat
    knobs = ", ".join(f"{name} {getattr(config, name):g}" for name in METHODS[config.method])
    for name in ("sft_weight", "label_smoothing"):
        if getattr(config, name):
            knobs += f", {name} {getattr(config, name):g}"
    print(f"method   {config.method}: {knobs}")
    report_model(config, run.model)
    tokenizer = chat.tokenizer
    stops = " ".join(tokenizer.piece(i) for i in sorted(chat.stop_ids))
    print(f"tokens   {type(tokenizer).__name__} of {tokenizer.vocab_size}, generation ends at "
          f"{stops}")
    if tokenizer.note:
        print(f"note     {tokenizer.note}")
    dated = f" on {chat.date}" if chat.date else ""
    print(f"layout   {chat.source}{dated}; without a system turn it begins {chat.opening()!r}")
    report_data(run, dropped)
    report_pair(min(run.pairs, key=len), tokenizer)


def report_model(config, model):
    c = model.config
    n_weights = sum(p.numel() for p in model.parameters())
    print(f"model    {config.model}: {n_weights / 1e6:.1f} M parameters in {config.weight_dtype}, "
          f"computing in {config.compute_dtype}, {c.n_layers} layers of {c.dim}, vocabulary "
          f"{c.vocab_size}, window {c.window or 'none'}")
    fields = read_json(Path(config.model) / "config.json")
    named = fields.get("dtype") or fields.get("torch_dtype")
    if config.save_dtype and named and config.save_dtype != named:
        print(f"saving   in {config.save_dtype}; config.json goes on naming {named}, to which "
              "transformers 5 and vLLM round unless they are told "
              f"dtype={config.save_dtype}")
    shards = "whole on the one rank"
    if isinstance(model, FSDPModule):
        world, local = dist.get_world_size(), ranks_of_node()
        shards = f"sharded over {world}"
        if config.shard_within_node:
            shards = f"sharded over {local} and replicated {world // local} times"
        if config.cpu_offload:
            shards += ", resting in CPU memory"
    print(f"shards   weights {shards}")


def report_data(run, dropped):
    config, pairs = run.config, run.pairs
    print(f"data     {len(pairs)} pairs to train on, {len(run.held_out)} held out; "
          f"{sum(dropped.values())} dropped")
    for reason, n in dropped.most_common():
        print(f"         - {n} dropped: {reason}")

    def quantiles(part):
        lengths = sorted(len(getattr(pair, part)) for pair in pairs)
        shown = [str(lengths[int(q * (len(lengths) - 1))]) for q in (0, 0.5, 0.9, 1)]
        return f"{part} {' / '.join(shown)}"

    print(f"lengths  tokens, least / median / 90 % / most: {quantiles('prompt')}; "
          f"{quantiles('chosen')}; {quantiles('rejected')}")
    world = dist.get_world_size()
    n_rows = len(pack(pairs[:config.pairs_per_step], config.tokens_per_micro_batch, world))
    mean = statistics.mean(map(len, pairs))
    epoch = math.ceil(len(pairs) / config.pairs_per_step)
    print(f"batch    {config.pairs_per_step} pairs a step of {mean:.0f} tokens on average, in rows "
          f"of at most {config.tokens_per_micro_batch} (some {n_rows} a step, {n_rows // world} a "
          f"rank); {config.epochs} epochs of {epoch} steps; {len(run.steps)} steps in all")


def report_pair(pair, tokenizer):
    """One pair token by token, its scored tokens in brackets."""
    def show(ids):
        return " ".join(repr(tokenizer.piece(i))[1:-1] for i in ids.tolist())

    print(f"pair     {pair.source}, token by token; [scored]:")
    print(f"         prompt    {show(pair.prompt)}")
    print(f"         chosen   [{show(pair.chosen)}]")
    print(f"         rejected [{show(pair.rejected)}]", flush=True)


# --- flags and recipes ----------------------------------------------------------------------------

def parse_config(argv):
    """TrainConfig from the command line: [recipe.toml] --field value ... Flags win over the recipe.
    Without a recipe and a model it is configs/tiny.toml."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("recipe", nargs="?", default=None, help="TOML file of defaults")
    types = typing.get_type_hints(TrainConfig)
    for name, kind in types.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        elif kind == list[str]:
            parser.add_argument(f"--{name}", nargs="+", metavar="FILE")
        else:
            of_flag = float if kind == float | None else kind
            parser.add_argument(f"--{name}", type=of_flag, metavar=name.upper())

    def error(message):
        raise ValueError(f"{message}; --help lists the flags")

    parser.error = error        # one line from one rank, as for every other error
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("recipe")
    if recipe is None and "model" not in flags:
        recipe = ROOT / "configs" / "tiny.toml"
    defaults = read_recipe(recipe, types) if recipe else {}
    return resolve_config(TrainConfig(**defaults | flags))


def read_recipe(path, types):
    """The fields of a TOML recipe, type-checked, paths made relative to where it is. ValueError
    names the key."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: cannot be read as a TOML recipe ({e})") from None
    accepted = {float: (int, float), float | None: (int, float), list[str]: (list,)}
    keys = [name for name in types if name not in CALL]
    for name, value in values.items():
        if name not in keys:
            raise ValueError(f"{path}: unknown key {name!r}; expected one of {', '.join(keys)}")
        kind = types[name]
        fits = isinstance(value, accepted.get(kind, (kind,)))
        if kind == list[str]:
            fits = fits and all(isinstance(item, str) for item in value)
        if kind in (int, float, float | None):
            fits = fits and is_finite_number(value)
        if not fits:
            expected = getattr(kind, "__name__", kind)
            raise ValueError(f"{path}: {name} = {value!r}; expected {expected}")
        if name in PATHS and value:
            values[name] = _each(value, lambda p: os.path.relpath(path.parent / p))
    return values


def _each(value, function):
    """function(value), or of each of its items where it is a list."""
    return [function(item) for item in value] if isinstance(value, list) else function(value)


# What the numbers of TrainConfig have to be.
POSITIVE = (
    "beta", "learning_rate", "max_grad_norm", "pairs_per_step", "epochs", "max_length",
    "max_prompt_length", "tokens_per_micro_batch", "max_new_tokens", "timeout_minutes")
FINITE = ("alpha", "gamma_beta_ratio", "sft_weight", "weight_decay", "peak_tflops")
NOT_NEGATIVE = (
    "sft_weight", "weight_decay", "max_steps", "eval_every", "eval_pairs", "seed", "save_every",
    "keep_last", "peak_tflops")
DTYPES = {      # "": a default
    "save_dtype": ("", "float32", "bfloat16", "float16", "float64"),
    "weight_dtype": ("float32", "float64"),
    "compute_dtype": ("", "bfloat16", "float32", "float64"),
}


def resolve_config(config):
    """Fills in the defaults of the method and of compute_dtype, and checks the rest. ValueError
    names the field."""
    config = with_method_knobs(config)
    check_numbers(config)
    if not config.model or not config.data:
        raise ValueError("model and data are needed: --model FOLDER --data FILE [FILE ...]")
    if config.eval_data and config.eval_pairs:
        raise ValueError("eval_data and eval_pairs are both given; expected one of them")
    names_function = ":" in config.judge
    if bool(config.judge) != bool(config.judge_prompts) or (config.judge and not names_function):
        raise ValueError("judge needs FILE.py:FUNCTION, and judge_prompts beside it")
    for name, allowed in DTYPES.items():
        value = getattr(config, name)
        if value not in allowed:
            expected = ", ".join(allowed).lstrip(", ")
            expected += " or nothing" if "" in allowed else ""
            raise ValueError(f"{name} = {value!r}; expected {expected}")
    if config.date:
        try:
            datetime.date.fromisoformat(config.date)
        except ValueError:
            raise ValueError(
                f"date = {config.date!r}; expected a date like 2026-01-31") from None
    if config.compile and not torch.cuda.is_available():
        raise ValueError("compile is for GPUs, where it pays; leave it out on CPUs")
    if not config.compute_dtype:
        mixed = torch.cuda.is_available() and config.weight_dtype == "float32"
        compute_dtype = "bfloat16" if mixed else config.weight_dtype
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
    return config


def with_method_knobs(config):
    if config.method not in METHODS:
        raise ValueError(f"method = {config.method!r}; expected one of {', '.join(METHODS)}")
    for knob in dict.fromkeys(knob for knobs in METHODS.values() for knob in knobs):
        given = getattr(config, knob)
        default = METHODS[config.method].get(knob)
        if given is None:
            config = dataclasses.replace(config, **{knob: default})
        elif default is None:
            raise ValueError(
                f"{knob} = {given} is given, but {config.method} has no such knob; leave it out")
    return config


def check_numbers(config):
    for name, value in dataclasses.asdict(config).items():
        if type(value) is int and value >= 2**63:
            raise ValueError(f"{name} = {value}; expected a number below 2**63")
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:      # None: a knob of another method
            raise ValueError(f"{name} = {value}; expected a positive number")
    for name in FINITE:
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} = {value}; expected a finite number")
    for name in NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} = {getattr(config, name)}; expected 0 or more")
    if config.timeout_minutes > 10**6:
        raise ValueError(f"timeout_minutes = {config.timeout_minutes}; expected at most a million")
    if not 0 <= config.label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing = {config.label_smoothing}; expected a share of pairs, below 0.5")
    if not 0 <= config.warmup_ratio <= 1:
        raise ValueError(
            f"warmup_ratio = {config.warmup_ratio}; expected a share of the steps, 0 to 1")


def write_config(config, path):
    """The resolved config as a TOML recipe; paths absolute, so that it runs from anywhere."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if name in CALL or value is None:
            continue
        if name in PATHS and value:
            value = _each(value, os.path.abspath)
        # JSON writes these values as TOML does.
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}\n")
    write_whole(path, "".join(lines))


def advice(error):
    """What to say of an error instead of its own words, or None."""
    if isinstance(error, torch.OutOfMemoryError):
        return (f"{error}\n`python plan.py` estimates what a GPU has to hold; --recompute, a "
                "smaller --tokens_per_micro_batch, --sync_every_micro_batch and --cpu_offload "
                "lower it")
    return None


def start(argv):
    """The command: trains as the flags say, and ends this process if that fails."""
    run_rank(lambda: main(parse_config(argv)), advice)


if __name__ == "__main__":
    start(sys.argv[1:])
