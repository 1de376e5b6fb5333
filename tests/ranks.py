"""Several ranks for the tests: processes forked from one that has imported everything, so that a start takes no time.

Each has the environment that torchrun gives, one thread, and its output in a file.
"""
import builtins
import fnmatch
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch._dynamo        # which the first parameter without memory imports: better once than in every rank
import torch.distributed.checkpoint.state_dict
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

import checkpoint
import model
import train
from data import files, preference
from model import load_model, save_model

# The server that forks them starts as a program of its own and imports this file.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(train.__file__).parent), str(Path(__file__).parent)])
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ranks"])


class Ranks:
    """`world` processes that run function(*args), on `nodes` pretended nodes. Outputs are in folder/rank-N.log."""

    def __init__(self, world, folder, function, *args, nodes=1, **environment):
        # as torchrun's
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            env = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % (world // nodes),
                   "LOCAL_WORLD_SIZE": world // nodes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port,
                   "TORCHELASTIC_USE_AGENT_STORE": True, **environment}
            self.processes.append(FORKS.Process(target=_rank, args=(env, log, function, args)))
            self.processes[-1].start()

    def join(self, timeout=120):
        """Waits for all; returns their exit codes. As torchrun does, it ends the others once one has failed."""
        end = time.time() + timeout
        while any(p.is_alive() for p in self.processes) and not any(p.exitcode for p in self.processes):
            if time.time() > end:
                self.kill()
                raise TimeoutError(f"ranks still run after {timeout} s:\n{self.output()}")
            time.sleep(0.01)
        for p in self.processes:
            p.join(10)      # after a failure: time to fail by themselves
        self.kill()
        return [p.exitcode for p in self.processes]

    def kill(self):
        for p in self.processes:
            p.kill()
            p.join()

    def output(self):
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def _rank(env, log, function, args):
    os.environ |= {name: str(value) for name, value in env.items()}
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background jobs ignore it
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    function(*args)


def run_ranks(world, folder, function, *args, **options):
    """Runs function(*args) on `world` ranks to the end; AssertionError with their output if one fails."""
    ranks = Ranks(world, folder, function, *args, **options)
    codes = ranks.join()
    assert codes == [0] * world, f"exit codes {codes}\n{ranks.output()}"
    return ranks.output()


# --- what the ranks of the tests run, beside train.main and train.start ---------------------------------------------

def start_with(change, *args):
    """train.start(the last argument), after change(the ones before) has been made in this process."""
    *change_args, argv = args
    change(*change_args)
    train.start(argv)


def not_finite(lines):
    """The pairs of these lines of any data file get a loss that is not a number."""
    whole = train.pair_loss

    def pair_loss(config, pairs, chosen, rejected):
        losses, *rewards = whole(config, pairs, chosen, rejected)
        factors = [math.nan if int(pair.source.rsplit(":")[-1]) in lines else 1 for pair in pairs]
        return losses * torch.tensor(factors), *rewards
    train.pair_loss = pair_loss


def fails_at_step(rank, step, how):
    """One rank raises, is killed, hangs or gets a signal in the middle of a step."""
    whole = train.learning_rate

    def learning_rate(i, total, config):
        if i == step and int(os.environ["RANK"]) == rank and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                time.sleep(1000)
            if how == "signalled":
                os.kill(os.getpid(), signal.SIGTERM)
                return whole(i, total, config)
            raise ValueError("this rank gives up")
        return whole(i, total, config)
    train.learning_rate = learning_rate


def slow_pairs(seconds):
    whole = train.pair_loss

    def pair_loss(config, pairs, *logps):
        time.sleep(seconds * len(pairs))
        return whole(config, pairs, *logps)
    train.pair_loss = pair_loss


def small_disk(free):
    shutil.disk_usage = lambda path: type("Usage", (), {"free": free})


def small_files(size):
    """No file may grow beyond `size` bytes: what a disk that fills up while it is written to looks like."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def tokenising_fails(line, how):
    """Data is tokenised in two workers and kept; at this line of it one is killed or panics, or the disk is full."""
    class Panic(BaseException):         # as pyo3's PanicException: no Exception, and here not to be pickled either
        pass

    train.CACHE_BYTES = 1
    files.LINES_PER_TASK = 8
    os.sched_getaffinity = lambda pid: {0, 1}
    whole = preference.encode_pair

    def encode_pair(row, source, **others):
        if source.endswith(f":{line}") and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if source.endswith(f":{line}") and how == "panics":
            raise Panic("called `Option::unwrap()` on a `None` value")
        return whole(row, source, **others)
    preference.encode_pair = encode_pair
    if how == "disk full":
        small_files(4000)


def all_of(changes):
    """Several changes, each a tuple of a function and its arguments."""
    for change, *args in changes:
        change(*args)


def at_call(number, target, when, what, on="all", of=""):
    """Something happens before or after this call of a function, which is named where it is looked up
    ("checkpoint.save_model"). Calls whose arguments do not mention `of` do not count.

    what: names of signals to this process, one after the other, or a function without arguments.
    on: the rank on which it happens, or "all", or "last".
    """
    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    if on != "all" and rank != (last if on == "last" else on):
        return
    holder, _, name = target.rpartition(".")
    holder = pkgutil.resolve_name(holder)
    whole, calls = getattr(holder, name), itertools.count(1)

    def happen():
        if callable(what):
            what()
        else:
            for name in what.split():
                os.kill(os.getpid(), signal.Signals[name])

    @functools.wraps(whole)
    def changed(*args, **kwargs):
        now = (not of or of in str(args)) and next(calls) == number
        if now and when == "before":
            happen()
        returned = whole(*args, **kwargs)
        if now and when == "after":
            happen()
        return returned
    setattr(holder, name, changed)


def no_room(pattern, times=10**9):
    """The disk is full, so many times, for files and folders of these paths: files are made but take no byte."""
    left = [times]

    def full(path):
        hit = left[0] > 0 and fnmatch.fnmatch(str(path), pattern)
        left[0] -= hit
        return hit

    def refusing(whole, error):
        def changed(*args, **kwargs):
            if any(full(arg) for arg in args if isinstance(arg, (str, Path))):
                raise error
            return whole(*args, **kwargs)
        return changed

    whole_open = builtins.open

    def changed_open(file, mode="r", *args, **kwargs):
        if set(mode).isdisjoint("wax") or not full(file):
            return whole_open(file, mode, *args, **kwargs)
        whole_open(file, mode, *args, **kwargs).close()
        return whole_open("/dev/full", mode, *args, **kwargs)

    builtins.open = io.open = changed_open
    error = OSError(28, f"No space left on device: {pattern}")
    for name in ("rename", "replace", "mkdir"):
        setattr(os, name, refusing(getattr(os, name), error))
    model.save_file = refusing(model.save_file, SafetensorError(f"No space left on device (os error 28): {pattern}"))


def streams_gone(*names):
    """The other ends of these streams are closed, as of a terminal or `tee` that has ended."""
    for name in names:
        read, write = os.pipe()
        os.close(read)
        setattr(sys, name, os.fdopen(write, "w", buffering=1))


def clock_goes_back():
    """The wall clock is an hour earlier at every look."""
    whole, looks = time.time, itertools.count(1)
    time.time = lambda: whole() - 3600 * next(looks)


def retry_soon():
    train.RETRY_SECONDS = 1


def log_half_a_line(*args):
    """The next line of metrics.jsonl is written half, and the rank is killed."""
    def append_half(path, text):
        with open(path, "a") as f:
            f.write(text[:40])
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.append_whole = append_half


def save_gradients(config, path):
    """Losses and clipped gradients of the first 16 pairs, whole, to `path`."""
    device = train.join_ranks(config.timeout_minutes)
    model = train.load_sharded(config, device)
    chat = train.load_chat(config.model)
    pairs = train.load_pairs(config.data, chat, config.max_length, config.max_prompt_length)[0][:16]
    world = torch.distributed.get_world_size()
    rows = train.pack(pairs, config.tokens_per_micro_batch, world)
    results = train.run_rows(model, rows, config, grad_scale=world / len(pairs))
    norm = train.clip_gradients(model, config.max_grad_norm)
    whole = lambda t: t.full_tensor() if isinstance(t, DTensor) else t
    grads = {name: whole(p.grad) for name, p in model.named_parameters()}
    if torch.distributed.get_rank() == 0:
        torch.save({"results": results, "norm": norm, "grads": grads}, path)
    torch.distributed.destroy_process_group()


def load_and_save(config, path, shard_bytes):
    device = train.join_ranks(config.timeout_minutes)
    save_model(train.load_sharded(config, device), path, like=config.model, shard_bytes=shard_bytes)
    torch.distributed.destroy_process_group()


def saves_to_a_full_disk(folder, path):
    """Saves a sharded model where a file of 8 kB finds no room, and prints the error of each rank."""
    torch.distributed.init_process_group("gloo")
    model = load_model(folder, shard=lambda model: torch.distributed.fsdp.fully_shard(model))
    if torch.distributed.get_rank() == 0:
        small_files(8_000)
    try:
        save_model(model, path, like=folder, shard_bytes=8_000)
    except (OSError, ValueError) as e:
        print(f"{type(e).__name__}: {e}")
    torch.distributed.destroy_process_group()


def peak_of_loading(config, path):
    """Loads the model and writes the growth of this rank's memory meanwhile: its own, and pages of files; in bytes."""
    def resident():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return [int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]

    device = train.join_ranks(config.timeout_minutes)
    torch.distributed.all_reduce(torch.zeros(1))        # connections have their buffers
    peak, done, before = [0, 0], threading.Event(), resident()

    def watch():
        while not done.wait(0.001):
            peak[:] = map(max, peak, resident())
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = train.load_sharded(config, device)
    done.set()
    watcher.join()
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    growth = [p - b for p, b in zip(peak, before)]
    Path(f"{path}-{torch.distributed.get_rank()}.json").write_text(json.dumps([held, *growth]))
    torch.distributed.destroy_process_group()


def state_of_a_rank(config, path):
    """Bytes of weights, gradients and moments on this rank after a step."""
    device = train.join_ranks(config.timeout_minutes)
    model = train.load_sharded(config, device)
    optimizer = train.make_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.numel() > 1]
    Path(f"{path}-{torch.distributed.get_rank()}.json").write_text(
        json.dumps(sum(t.to_local().numel() * t.element_size() for t in tensors)))
    torch.distributed.destroy_process_group()
