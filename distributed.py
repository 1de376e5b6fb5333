"""What many GPUs and long jobs add to train.py: ranks, shards, checkpoints, signals, and a plan of the memory it takes.

    device = join_ranks(config)                         # the ranks of torchrun, or a group of this one process
    model = load_sharded(config, device)                # FSDP2; every rank reads its own slices of the files
    folder = save_checkpoint(model, optimizer, progress, config, output, last=False)
    load_checkpoint(folder, model, optimizer, progress) # on any number of ranks

`config` is train.py's TrainConfig; each function reads the few fields it names. One code path serves CPU (gloo) and GPUs
(NCCL), one rank and many.
"""
import ctypes
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor

from data.files import write_whole
from model import BLOCK_LOGITS, KEPT_LOGITS, Transformer, checkpoint_tensors, load_model, read_config, save_model


# --- ranks ------------------------------------------------------------------------------------------------------------

def ranks_store():
    """(store, rank, number of ranks): through the store the ranks that torchrun started find each other. Without torchrun
    there is this process alone."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank, world = next(dist.rendezvous("env://"))
    # On one node torchrun keeps the store over restarts, and what the dead left in it would be taken for the living.
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    return dist.PrefixStore(f"attempt {restart_count() if one_node else 0}", store), rank, world


def restart_count():
    """How often torchrun has started this rank again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join_ranks(config):
    """Joins the ranks that torchrun started, or forms a group of this one process. Returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = ranks_store()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timedelta(minutes=config.timeout_minutes))
    return device


def reuse_memory():
    """Keeps what a CPU run frees instead of handing it back: glibc otherwise gets every large tensor from the kernel anew,
    page by page, a tenth of a step's time. Elsewhere, and on GPUs, it does nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not torch.cuda.is_available():
        libc.mallopt(-4, 0)                 # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)         # M_TRIM_THRESHOLD: so much stays when it is free


def say(*lines):
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)


def from_rank_0(function):
    """What function() returns or raises on rank 0, on every rank; it runs on rank 0 alone. Also a barrier."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as e:
            box[1] = e
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def first_to_fail(store):
    """Whether no rank has called this before: the one whose error is worth a message."""
    try:
        return store.add("failed", 1) == 1
    except dist.DistError:      # its host is gone, so somebody was
        return False


def end_rank(status, world):
    """Ends this process; one of several without Python's own shutdown. After an error that would wait for ranks that wait for
    this one, and after success a thread of gloo's that only now lets go of its last tensor aborts the process (seen in one of
    ten runs of two ranks on a busy machine)."""
    if world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# --- shards -----------------------------------------------------------------------------------------------------------

def device_mesh(config, device):
    """The ranks as FSDP sees them: one axis to shard over, and with shard_within_node one to replicate over before it."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not config.shard_within_node:
        return init_device_mesh(device.type, (world,))
    if world % local:
        raise ValueError(f"shard_within_node needs as many ranks on every node; {world} ranks, {local} of them here")
    return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))


def shard_model(model, config, device):
    """FSDP2: each rank holds a slice of every weight, gradient and moment. Whole are only the weights of the block at
    work and the next, in compute_dtype, and those of the root (embedding, norm, head)."""
    dtypes = MixedPrecisionPolicy(param_dtype=getattr(torch, config.compute_dtype),
                                  reduce_dtype=getattr(torch, config.weight_dtype))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    mesh = device_mesh(config, device)
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=dtypes, offload_policy=offload)
    register_fsdp_forward_method(model, "states")       # our way in, beside forward
    model.compute_device = device


def load_sharded(config, device):
    """The starting model, in slices over the ranks. One process that computes in its weights' dtype needs no slices."""
    sharded = dist.get_world_size() > 1 or config.cpu_offload or config.compute_dtype != config.weight_dtype
    model = load_model(config.model, getattr(torch, config.weight_dtype), "cpu" if config.cpu_offload else device,
                       partial(shard_model, config=config, device=device) if sharded else None)
    model.recompute = config.recompute
    return model


def clip_gradients(model, max_norm):
    """Scales the gradients of all ranks to a norm of at most max_norm. Returns the norm before; waits for the GPU."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def forget_gathered_weights(model):
    """To be called after a forward pass without a backward pass: FSDP keeps the root's weights gathered until the
    backward pass, and would go on using them after the next step has changed them."""
    if isinstance(model, FSDPModule):
        model.reshard()


# --- checkpoints ------------------------------------------------------------------------------------------------------

def claim_output(config, restarted):
    """The run folder, made if need be. ValueError if it holds something that is not to be gone on with. A rank that
    torchrun restarted goes on without --resume, but only with what its own torchrun began. Rank 0 only."""
    if config.output:
        output = Path(config.output)
        if output.exists() and any(output.iterdir()):
            began = read_run(output)
            if began is None:
                raise ValueError(f"output folder {output} is not empty and holds no run.json, so no run; name another one")
            if not config.resume and not (restarted and began["job"] == this_job()):
                raise ValueError(f"output folder {output} is not empty; --resume to go on with its run, or name a new one")
    elif config.resume or restarted:
        raise ValueError("a run can be resumed only by the name of its folder; give --output")
    else:
        free = next(n for n in range(1, 10**6) if not Path(f"runs/{config.method}-{n:03d}").exists())
        output = Path(f"runs/{config.method}-{free:03d}")
    output.mkdir(parents=True, exist_ok=True)
    return output


def this_job():
    """The torchrun that this rank belongs to: its host and process, the same over restarts."""
    return f"{os.uname().nodename} {os.getppid()}"


def read_run(output):
    """run.json of a run folder: what makes the run what it is. None without it, ValueError if it is damaged."""
    path = output / "run.json"
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text())
        if all(isinstance(run[part], dict) for part in ("config", "model", "pairs")) and "job" in run:
            return run
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: damaged; expected what a run wrote there when it began. Name a new output folder")


def check_same_run(output, identity):
    """Compares what makes a run what it is with run.json, if there is one, and writes it there. ValueError names the
    difference. Rank 0 only."""
    before = read_run(output) or identity
    for part, title in (("config", "{}"), ("model", "config.json's {}"), ("pairs", "{}")):
        for name in identity[part]:
            old, new = before[part].get(name), identity[part][name]
            if old != new:
                raise ValueError(f"{output}: its run has {title.format(name)} = {old!r}, found {new!r} now; resume it "
                                 "as it was started, or name a new output folder")
    write_whole(output / "run.json", json.dumps({"job": this_job()} | identity, indent=1))


def newest_checkpoint(output, last_step):
    """(step, folder) of the newest complete checkpoint, (0, None) without one; says what it passes over. Rank 0 only."""
    whole = checkpoints(output)
    for folder in sorted(set(output.glob("step-*")) - set(whole.values())):
        print(f"resume   passing over {folder}: it was not written to the end")
    for step, folder in sorted(whole.items(), reverse=True):
        is_model = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
        if is_model and (step == last_step or (folder / "train_state" / ".metadata").exists()):
            return step, folder
        print(f"resume   passing over {folder}: it has no {'train_state' if is_model else 'model'} in it")
    return 0, None


def checkpoints(output):
    """{step: folder} of a run folder, those that bear the name of a whole one."""
    return {int(f.name[5:]): f for f in output.glob("step-*") if re.fullmatch(r"step-\d{6,}", f.name)}


def train_state(model, optimizer, progress):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "progress": progress}


def save_checkpoint(model, optimizer, progress, config, output, last):
    """Writes step-NNNNNN under a name that says it is incomplete, and gives it its own once all ranks are done. The last
    one holds the model alone: nothing is left to resume. Then deletes all but keep_last."""
    folder = output / f"step-{progress['step']:06d}"
    writing = folder.with_suffix(".incomplete")

    def prepare():
        check_space(model, config, output, last)
        shutil.rmtree(writing, ignore_errors=True)      # of a run that was killed here

    def complete():
        if folder.exists():
            folder.rename(folder.with_suffix(".replaced.incomplete"))
        writing.rename(folder)
        older = sorted(step for step in checkpoints(output) if step < progress["step"])
        for step in older[:max(0, len(older) - config.keep_last + 1)] if config.keep_last else []:
            old = checkpoints(output)[step]
            old.rename(old.with_suffix(".incomplete"))      # never half of a checkpoint under the name of a whole one
            print(f"deleted  {old}, older than the last {config.keep_last}")
        for rest in output.glob("step-*.incomplete"):
            rest.unlink() if rest.is_symlink() else shutil.rmtree(rest)

    from_rank_0(prepare)
    try:
        save_model(model, writing, like=config.model, dtype=getattr(torch, config.save_dtype, None))
        if not last:
            dcp.save(train_state(model, optimizer, progress), checkpoint_id=writing / "train_state")
    except (OSError, dcp.api.CheckpointException) as e:
        reason = first_failure(e) if isinstance(e, dcp.api.CheckpointException) else e
        raise OSError(f"{writing}: cannot be written ({reason}); earlier checkpoints are as they "
                      "were") from e
    if not last and dist.get_rank() == 0:
        shutil.copyfile(output / "config.toml", writing / "train_state" / "config.toml")
    from_rank_0(complete)
    return folder


def load_checkpoint(folder, model, optimizer, progress):
    """Fills model, optimiser and progress with what save_checkpoint wrote, on any number of ranks."""
    state = train_state(model, optimizer, progress)
    try:
        dcp.load(state, checkpoint_id=folder / "train_state")
    except dcp.api.CheckpointException as e:
        raise ValueError(f"{folder}/train_state: cannot be read ({first_failure(e)}); it may be damaged or another "
                         "model's. Move the folder away to go on from the one before it") from e
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def first_failure(checkpoint_exception):
    rank, (error, _) = min(checkpoint_exception.failures.items())
    return f"rank {rank}: {type(error).__name__}: {error}"


def check_space(model, config, output, last):
    """ValueError unless a checkpoint fits on the disk."""
    kept = getattr(torch, config.save_dtype, None)
    weights = sum(math.prod(shape) * (kept or dtype).itemsize
                  for shape, dtype, _ in checkpoint_tensors(config.model).values())
    moments = 0 if last else 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    need = weights + moments
    if (free := shutil.disk_usage(output).free) < need:
        raise ValueError(f"{output}: a checkpoint needs {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; make "
                         "room, or name an output folder on another disk. Earlier checkpoints are as they were")


def read_metrics(output, step):
    """The lines of metrics.jsonl up to a step, [] without the file. What a killed run logged after that is undone by
    resuming there. Lines that cannot be read, as the last one may be then, are left out, and told."""
    path, lines = output / "metrics.jsonl", []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(line)
            if line["step"] <= step:
                lines.append(line)
        except (ValueError, TypeError, KeyError):
            print(f"resume   {path}:{number} is damaged and left out")
    return lines


# --- signals ----------------------------------------------------------------------------------------------------------

@contextmanager
def noted_signals():
    """SIGINT and SIGTERM are only noted, in the dict that this gives: the step in hand is to be finished and saved. One
    that comes later kills at once."""
    noted = {signal.SIGINT: 0, signal.SIGTERM: 0}

    def note(number, _):
        noted[number] = 1
        time.sleep(1)       # copies of the same signal, from a launcher and from torchrun, arrive here and count as one
        for s in noted:
            signal.signal(s, signal.SIG_DFL)
        say(f"signal   {signal.Signals(number).name}: the step in hand will be finished and saved; another stops at "
            "once")

    before = {s: signal.signal(s, note) for s in noted}
    try:
        yield noted
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# --- memory -----------------------------------------------------------------------------------------------------------

def kept_per_token(c, recompute):
    """Numbers kept for the backward pass per token of a row, of a model with ModelConfig c."""
    # In a block: inputs of two norms and what follows them, queries, keys and values (the prompt's and rejected's twice)
    # and what comes of them (twice), gate and up.
    inside = 4 * c.dim + 3 * c.n_heads * c.head_dim + 4 * c.n_kv_heads * c.head_dim + 2 * c.hidden_dim
    return c.n_layers * c.dim + inside if recompute else c.n_layers * inside


def plan(config):
    """Prints what each of so many GPUs would hold at its fullest, from config.json alone: an estimate, but for `state`.

    state: fp32 weights, gradients and two moments, divided by the ranks they are sharded over. waiting: whole fp32
    gradients, between the micro-batches of a step. gathered: bf16 weights of the root and of two blocks, gradients of one
    in bf16 and fp32. activations: of a full row. logits: of one pair, and of a block more.
    """
    c = read_config(config.model)
    with torch.device("meta"):
        model = Transformer(c)
    n, block = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.model.layers[0].parameters())
    root, T, bf16 = n - c.n_layers * block, config.tokens_per_micro_batch, 2
    parts = {"gathered": bf16 * (root + 2 * block) + (bf16 + 4) * max(root, block),
             "activations": bf16 * T * kept_per_token(c, config.recompute),
             "logits": (4 * min(KEPT_LOGITS["gpu"], 2 * config.max_length * c.vocab_size)
                        + (4 + bf16) * BLOCK_LOGITS["gpu"])}
    print(f"{config.model}: {n / 1e9:.2f} G parameters, {c.n_layers} blocks of {block / 1e6:.1f} M; rows of {T} tokens, "
          f"{'with' if config.recompute else 'without'} recomputation; GB a GPU:")
    print(f"{'GPUs':>6}{'state':>10}" + "".join(f"{name:>13}" for name in parts) + f"{'waiting':>10}{'in all':>10}"
          "   a step")
    for gpus in config.plan or (8, 16, 64):
        shards = min(gpus, 8) if config.shard_within_node else gpus
        state = 0 if config.cpu_offload else 16 * n / shards
        row = gpus * T / config.pairs_per_step
        waiting = 0 if config.sync_every_micro_batch else 4 * n
        print(f"{gpus:>6}{state / 1e9:>10.1f}" + "".join(f"{size / 1e9:>13.1f}" for size in parts.values())
              + f"{waiting / 1e9:>10.1f}{(state + sum(parts.values()) + waiting) / 1e9:>10.1f}   "
              f"{config.pairs_per_step} pairs, {config.pairs_per_step / gpus:g} a GPU; one row each, and nothing waiting, up "
              f"to {row:.0f} tokens a pair")
