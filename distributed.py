"""Many GPUs and long jobs: ranks, shards and signals. Every function here needs a process group.

    device = join_ranks(timeout_minutes=30)         # torchrun's ranks, or a group of this process
    model = load_sharded(config, device)            # FSDP2; a rank reads its slices of the files
    with noted_signals() as noted: ...              # preemption: finish the step, save, stop
        leave_if(noted)                             # raises Stop on all ranks: an evaluation ends

One code path serves CPUs (gloo) and GPUs (NCCL), one rank and many. `config` is train.py's
TrainConfig, where a function follows several of its fields.
"""
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor

import cpu
import gpu
from command import end_with_parent, open_streams
from model import load_model


# --- ranks ----------------------------------------------------------------------------------------

def ranks_store():
    """(store, rank, number of ranks). Through the store the ranks that torchrun started find each
    other. Without torchrun there is this process alone."""
    if "RANK" not in os.environ:            # not under torchrun
        return dist.HashStore(), 0, 1
    store, rank, world = next(dist.rendezvous("env://"))
    # On one node torchrun keeps the store over restarts, and what dead ranks left in it would be
    # taken for the living.
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    attempt = restart_count() if one_node else 0
    return dist.PrefixStore(f"attempt {attempt}", store), rank, world


def restart_count():
    """How often torchrun has started this rank again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def local_rank():
    """The number of this rank on its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_of_node():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def join_ranks(timeout_minutes):
    """Joins the ranks that torchrun started, or forms a group of this process. Returns the device
    of this rank. Ranks that wait for another one give up after timeout_minutes."""
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    store, rank, world = ranks_store()
    # gloo beside NCCL: objects, signals and checkpoints travel between CPUs.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return device


def leave_ranks():
    """Ends the process group: for a `finally`. After an error other ranks may be gone, and this
    would wait for them, so then only a single process does it."""
    if dist.get_world_size() == 1 or sys.exc_info()[0] in (None, SystemExit):
        dist.destroy_process_group()


def say(*lines):
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)


def from_rank_0(function):
    """What function() returns or raises on rank 0, on every rank. It runs on rank 0 alone, which
    waits for no other; the others wait for it."""
    box = [None, None]                      # what it returned, what it raised
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as e:
            box[1] = e                      # raised below, so that no rank waits for a dead one
    dist.broadcast_object_list(box)
    returned, error = box
    if error is not None:
        raise error
    return returned


def from_all_ranks(function):
    """[function() of each rank], on every rank. What it raises on one, all ranks raise."""
    box = [None, None]                      # what it returned, what it raised
    try:
        box[0] = function()
    except Exception as e:
        box[1] = e
    boxes = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, box)
    for _, error in boxes:
        if error is not None:
            raise error
    return [returned for returned, _ in boxes]


def run_rank(main, explain=lambda error: None):
    """Runs main() as this rank's whole program and ends the process.

    Of an error there is one message, from the first rank that fails, and exit status 1 on all.
    explain(error) may word it. Else ValueError and OSError are for the user, and their own words
    are enough; any other error is a mistake of ours and shows its traceback.
    """
    open_streams()
    # torchrun that is killed leaves its ranks running. They end as after a signal: the step in hand
    # is saved.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)
    store, rank, world = ranks_store()
    status = 0
    try:
        main()
    except KeyboardInterrupt:       # where no step is in hand that could be saved
        status = 128 + signal.SIGINT
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e:      # a panic in a library written in Rust is no Exception
        status = 1
        if first_to_fail(store):
            message = explain(e) or _message(e)
            where = f" (rank {rank})" if world > 1 else ""
            print(f"error{where}: {message}", file=sys.stderr, flush=True)
    end_rank(status, world)


def _message(error):
    # A rank that dies shows on the others as a collective operation that fails.
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    if of_gloo or isinstance(error, dist.DistError):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if "NCCL" in lines[0] and len(lines) > 1:       # its own reason comes last
            lines[0] += f"; {lines[-1].strip()}; NCCL_DEBUG=INFO tells more"
        return ("another rank died, or did not answer in the minutes that ranks wait for each "
                f"other ({lines[0]})")
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return traceback.format_exc()


def first_to_fail(store):
    """Whether no rank has called this before: the one whose error is worth a message."""
    try:
        return store.add("failed", 1) == 1
    except dist.DistError:          # the store's host is gone, so another rank failed before
        return False


def end_rank(status, world):
    """Ends this process. One rank of several skips Python's own shutdown, and so does any after an
    error or a signal. That would wait for ranks that wait for this one, or for a judge's thread
    that hangs. After success of several it may abort: a thread of gloo's can still hold a tensor
    then (seen in one of ten runs of two ranks on a busy machine)."""
    if world > 1 or status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# --- shards ---------------------------------------------------------------------------------------

def load_sharded(config, device):
    """The starting model, in slices over the ranks, ready to compute on `device`. A single process
    that computes in the dtype of its weights needs no slices."""
    # FSDP casts weights to compute_dtype and moves offloaded ones, also for a single process.
    one_process = dist.get_world_size() == 1 and not config.cpu_offload
    whole = one_process and config.compute_dtype == config.weight_dtype

    def prepare(model):
        if device.type == "cpu":
            cpu.speed_up(model)         # before FSDP, which gives modules classes of its own
        if not whole:
            shard_model(model, config, device)

    model = load_model(
        config.model,
        dtype=getattr(torch, config.weight_dtype),
        device="cpu" if config.cpu_offload else device,     # where weights rest
        shard=prepare)
    model.recompute = config.recompute
    if device.type != "cpu":
        gpu.speed_up(model, getattr(torch, config.compute_dtype), config.compile)
    return model


def shard_model(model, config, device):
    """FSDP2: each rank holds a slice of every weight, gradient and moment, in weight_dtype. Only
    the running block, the next one and the root (last norm and head) are gathered at a time, in
    compute_dtype; the embedding for as long as it is read."""
    precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.compute_dtype),
        reduce_dtype=getattr(torch, config.weight_dtype))
    offload = OffloadPolicy()
    if config.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    mesh = device_mesh(config.shard_within_node, device)
    # Each block is gathered and freed as a whole; what is left is the root's. A tied embedding is
    # the head, and stays in the root.
    embedding = [] if model.config.tied else [model.model.embed_tokens]
    for module in [*embedding, *model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for module in embedding:
        module.set_unshard_in_backward(False)           # its gradient needs no weights
    register_fsdp_forward_method(model, "states")       # how we enter it, beside forward
    model.compute_device = device


def device_mesh(shard_within_node, device):
    """The ranks as FSDP sees them: one axis to shard over, and for HSDP (shard_within_node) another
    one before it, to replicate over."""
    world = dist.get_world_size()
    if not shard_within_node:
        return init_device_mesh(device.type, (world,))
    local = ranks_of_node()
    if world % local:
        raise ValueError(f"shard_within_node needs as many ranks on every node; {world} ranks, "
                         f"{local} of them here")
    return init_device_mesh(
        device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))


def set_gradient_sync(model, last_row, every_row):
    """To be called before a row's backward pass. Ranks reduce their gradients in that of a step's
    last row alone; with every_row in that of every row, so that no whole gradients wait between
    rows. Replicas (HSDP) reduce in the last one alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(every_row or last_row)
        model.set_requires_all_reduce(last_row)


def clip_gradients(model, max_norm):
    """Scales the gradients of all ranks to a norm of at most max_norm. Returns the norm before, as
    a float: waits for the GPU."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


def forget_gathered_weights(model):
    """To be called after a forward pass without a backward pass: FSDP keeps the root's weights
    gathered until the backward pass, and would use them on after the next step changed them."""
    if isinstance(model, FSDPModule):
        model.reshard()


# --- signals --------------------------------------------------------------------------------------

class Stop(BaseException):
    """Ends an evaluation early, because a signal came. No Exception: a judge may catch those."""


@contextmanager
def noted_signals():
    """Notes SIGINT and SIGTERM (preemption, Ctrl-C) instead of dying, so that the step in hand can
    be finished and saved. Yields {signal: 1 if it came, else 0}. A second signal kills at once."""
    noted = Noted({signal.SIGINT: 0, signal.SIGTERM: 0})

    def note(number, _):
        noted[number] = 1
        # Copies of one signal, from a launcher and from torchrun, arrive here and count as one.
        time.sleep(1)
        for s in noted:
            signal.signal(s, signal.SIG_DFL)
        with suppress(RuntimeError):        # the signal came in the middle of another print
            say(f"signal   {signal.Signals(number).name}: the step in hand will be finished and "
                "saved; another stops at once")
        if noted.at_once:
            raise Stop

    before = {s: signal.signal(s, note) for s in noted}
    try:
        yield noted
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Noted(dict):
    """{signal: 1 if it came, else 0}."""
    at_once = False         # see stop_at_once

    @contextmanager
    def stop_at_once(self):
        """In its block a signal raises Stop wherever it comes, on this rank alone: for what this
        rank does by itself, and may never end."""
        self.at_once = True
        try:
            if any(self.values()):
                raise Stop
            yield
        finally:
            self.at_once = False


def signal_of_any_rank(noted):
    """The signal that any rank has noted by now, the same on all ranks; None without one."""
    counts = torch.tensor(list(noted.values()))
    dist.all_reduce(counts)                             # of the CPU: waits for no GPU
    for number, count in zip(noted, counts.tolist()):
        if count:
            return number
    return None


def leave_if(noted):
    """Raises Stop on all ranks if any of them has noted a signal. All ranks together."""
    if signal_of_any_rank(noted):
        raise Stop
