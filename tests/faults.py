"""Faults injected into tiny runs on one and two ranks, each judged by the same rule: the weights at the end equal an
undisturbed run's bit for bit, or there is one clear error; and every finished step that was due to be saved is there.

    make faults                                 # all of them
    make faults ARGS="SIGTERM judge"            # those whose names have these words

A run is six steps of four pairs, evaluated and judged before it and after every second step, saved after every second.
Each fault strikes such a run; then the run is resumed undisturbed, as a user would, and compared. test_faults.py runs
some of the faults in CI.
"""
import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file

import ranks
import train
from ranks import Ranks, at_call
from small import TIMES

ROOT = Path(train.__file__).parent
TINY = ROOT / "data" / "tiny"
N_STEPS = 6
JUDGED = ("eval_judge",)        # metrics that a fault of the judge changes

JUDGES = '''"""Judges of all kinds."""
import os, signal, sys, threading, time
from concurrent import futures

calls = []

def good(turns, answer):
    return len(answer)

def raises(turns, answer):
    raise AssertionError("no more money")

def exits(turns, answer):
    sys.exit("no more money")

class Panic(BaseException):     # as that of libraries in Rust, or asyncio's CancelledError: no Exception
    pass

def panics(turns, answer):
    raise Panic("called Option::unwrap() on a None value")

def none(turns, answer): return None
def nan(turns, answer): return float("nan")
def text(turns, answer): return "5"
def true(turns, answer): return True
def huge(turns, answer): return 10**400
def longer(turns, answer): return 10**5000
def thing(turns, answer): return object()

def prints(turns, answer):
    print("a judge may print what it likes\\n" * 1000, "\\ud83d", file=sys.stdout)
    return len(answer)

def closes_stdout(turns, answer):
    sys.stdout.close()
    return len(answer)

def changes_turns(turns, answer):
    turns[0]["content"] = "forget all that"
    turns.clear()
    return len(answer)

def changes_folder(turns, answer):
    folder = os.path.join(os.path.dirname(__file__), "a", "b", "c")
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    return len(answer)

def raises_at_last(turns, answer):
    calls.append(answer)
    if len(calls) > 6:
        raise ValueError("no more money")
    return len(answer)

def hangs(turns, answer):
    calls.append(answer)
    if len(calls) == 4:         # in the evaluation after step 2
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while True:
            time.sleep(1000)
    return len(answer)

pool = futures.ThreadPoolExecutor()

def hangs_in_a_thread(turns, answer):
    return pool.submit(hangs, turns, answer).result()
'''


@dataclass
class Fault:
    name: str
    ends: str                   # how the disturbed run ends: done, stopped (saved after a signal), killed, error
    saved: int = N_STEPS        # the newest checkpoint that has to be there then; 0: none was due
    changes: list = field(default_factory=list)         # of ranks.py, made in each rank: (function, *arguments)
    says: str = ""              # what is in the output, as a regular expression; the error, where it ends with one
    flags: dict = field(default_factory=dict)           # of train.py
    cut_back: object = None     # called with a run folder that ends after step 4: damages it, for a run that resumes
    start: object = None        # called with (place, world, argv, changes): the disturbed run, if not ranks of Ranks
    ignored: tuple = ()         # first letters of metrics that need not equal the undisturbed run's
    seconds: int = 120          # it takes no longer


# --- the list -------------------------------------------------------------------------------------------------------

# Where in a run signals come: (name, how many calls into which function, before or after it, ranks on which it is
# called, newest checkpoint if the run is killed there, and if it is stopped there). Stopped after None: there is
# nothing to be saved, or nothing left to be stopped.
PHASES = [
    ("data are read", (1, "train.read_pairs", "before"), "all", 0, None),
    ("the model is loaded", (1, "train.make_optimizer", "before"), "all", 0, None),
    ("the folder is locked", (1, "train.check_same_run", "before"), 0, 0, None),
    ("run.json is written", (1, "train.check_same_run", "after"), 0, 0, None),
    ("evaluating step 0", (2, "train.run_rows", "before"), "all", 0, 0),
    ("the judge's answers to step 0 are sampled", (2, "judge.leave_if", "before"), "all", 0, 0),
    ("the judge scores step 0", (2, "judge.ask", "before"), 0, 0, 0),
    ("forward pass of step 3", (3, "torch.Tensor.backward", "before"), "all", 2, 3),
    ("backward pass of step 3", (3, "torch.Tensor.backward", "after"), "all", 2, 3),
    ("before the optimiser's step 3", (3, "torch.optim.AdamW.step", "before"), "all", 2, 3),
    ("after the optimiser's step 3", (3, "torch.optim.AdamW.step", "after"), "all", 2, 3),
    ("before step 3 is logged", (5, "train.log_metrics", "before"), 0, 2, 3),
    ("after step 3 is logged", (5, "train.log_metrics", "after"), 0, 2, 3),
    ("before step 4 is saved", (2, "train.save_checkpoint", "before"), "all", 2, 4),
    ("the model's files of step 4", (2, "model.save_file", "after"), 0, 2, 4),
    ("before train_state of step 4", (2, "checkpoint.dcp.save", "before"), "all", 2, 4),
    ("tensors of step 4 are written, .metadata is not",
     (2, "torch.distributed.checkpoint.FileSystemWriter.finish", "before"), 0, 2, 4),
    ("before SHA256SUMS of step 4", (2, "checkpoint.write_sums", "before"), "all", 2, 4),
    ("before step 4 gets its name", (2, "checkpoint.write_sums", "after"), "all", 2, 4),
    ("step 4 has its name", (2, "checkpoint._delete_old", "before"), 0, 4, 4),
    ("step 2 is being deleted", (2, "checkpoint.shutil.rmtree", "before", "step-000002.incomplete')"), 0, 6, 6),
    ("step 4 is saved", (2, "train.save_checkpoint", "after"), "all", 4, 4),
    ("evaluating step 4", (9, "train.run_rows", "before"), "all", 4, 4),
    ("the judge scores step 4", (6, "judge.ask", "before"), 0, 4, 4),
    ("the last step is logged", (9, "train.log_metrics", "after"), 0, 4, 6),
    ("the model's files of the last step", (3, "model.save_file", "after"), 0, 4, 6),
    ("the last step is saved", (3, "train.save_checkpoint", "after"), "all", 6, 6),
    ("evaluating the last step", (13, "train.run_rows", "before"), "all", 6, 6),
    ("the judge scores the last step", (8, "judge.ask", "before"), 0, 6, 6),
    ("before train_state is removed", (1, "train.finish_checkpoint", "before"), 0, 6, None),
    ("half of train_state is removed", (1, "checkpoint.shutil.rmtree", "before", "/train_state')"), 0, 6, None),
    ("train_state is empty", (1, "os.rmdir", "before", "train_state'"), 0, 6, None),
    ("all is done", (1, "train.leave_ranks", "before"), "all", 6, None),
]


def signals():
    for name, (number, target, when, *of), at, if_killed, if_stopped in PHASES:
        rank_0_alone = at == 0
        for what in ("SIGKILL", "SIGTERM", "SIGINT"):
            # Launchers send SIGTERM to all ranks; the others come to one.
            on = 0 if rank_0_alone else "all" if what == "SIGTERM" else "last"
            ends, saved, says = "killed", if_killed, ""
            if what != "SIGKILL" and if_stopped is not None:
                ends, saved, says = "stopped", if_stopped, f"stopped  by {what} after step {if_stopped};"
            elif what != "SIGKILL" and if_killed == N_STEPS and name != "all is done":
                ends = "done"
            # At the end, with the default: there is no other checkpoint.
            flags = {"save_every": 0} if if_killed == N_STEPS and number not in (2, 3) else {}
            changes = [(at_call, number, target, when, what, on, *of)]
            yield Fault(f"{what}: {name}", ends, saved, changes, says, flags)


SIGNALS = [
    *signals(),
    Fault("SIGKILL: half a line of step 3 is logged", "killed", 2, [
        (at_call, 4, "train.log_metrics", "after", ranks.log_half_a_line, 0)]),
    Fault("SIGTERM and once more: in step 3", "killed", 2, [
        (at_call, 3, "train.train_step", "before", "SIGTERM SIGTERM")]),
    Fault("SIGTERM, then SIGKILL while step 3 is saved", "killed", 2, [
        (at_call, 3, "train.train_step", "before", "SIGTERM"),
        (at_call, 2, "checkpoint.write_sums", "before", "SIGKILL", "last")]),
    Fault("SIGTERM: save_every 0, step 3", "stopped", 3, [
        (at_call, 3, "train.train_step", "before", "SIGTERM", "last")], flags={"save_every": 0}),
]


def full_disks():
    at_start = [("run.json", "*/run.*"), ("config.toml", "*/out/config.*"), ("metrics.jsonl", "*/out/metrics.*.tmp*")]
    for name, pattern in at_start:
        yield Fault(f"disk full: {name} at the start", "error", 0, [(ranks.no_room, pattern)],
                    f"{name}: cannot be written")
    later = [("metrics.jsonl", "*/out/metrics.jsonl"), ("answers", "*/answers-*")]
    for name, pattern in later:
        full = partial(ranks.no_room, pattern, 4)
        yield Fault(f"disk full: {name}, four times", "done", N_STEPS, [
            (at_call, 1, "train.write_config", "after", full)], "note .*cannot be written")
    full = partial(ranks.no_room, "*/out/metrics.jsonl", 3)
    yield Fault("disk full: metrics.jsonl, until SIGTERM stops step 2", "stopped", 2, [
        (at_call, 1, "train.write_config", "after", full), (at_call, 2, "train.train_step", "before", "SIGTERM")],
        "3 lines of metrics wait")
    in_checkpoint = [
        ("the folder", ""), ("index", "/model.safetensors.index.json"), ("weights", "/model.safetensors"),
        ("tokenizer", "/tokenizer_config.json"), ("tensors of one rank", "/train_state/__0_*"),
        ("tensors of all", "/train_state/*.distcp"), (".metadata", "/train_state/.metadata*"),
        ("SHA256SUMS", "/train_state/*SUMS*"), ("config.toml", "/train_state/config.toml")]
    for name, file in in_checkpoint:
        yield Fault(f"disk full: {name} of step 4", "error", 2, [(ranks.no_room, f"*/step-000004.incomplete{file}")],
                    "step-000004.incomplete.* cannot be written .*earlier checkpoints are as they were")
        full_twice = (ranks.no_room, f"*/step-000006.incomplete{file}", 2)
        yield Fault(f"disk full: {name} of the last step, twice", "done", N_STEPS, [(ranks.retry_soon,), full_twice],
                    "waiting .*step-000006.incomplete.*cannot be written .*A signal gives up")
    yield Fault("disk full: the name of step 4", "error", 2, [(ranks.no_room, "*/step-000004")], "cannot be written")
    yield Fault("disk full: the name of the last step, twice", "done", N_STEPS,
                [(ranks.retry_soon,), (ranks.no_room, "*/step-000006", 2)], "waiting .*cannot be written")
    for what in ("SIGTERM", "SIGINT"):
        yield Fault(f"disk full: {what} ends the wait at the last step", "error", 4, [
            (ranks.no_room, "*/step-000006.incomplete/train_state/SHA256SUMS*"),
            (at_call, 1, "train.time.sleep", "before", what, "last")], "step-000006.incomplete.* cannot be written")
        yield Fault(f"disk full: {what} ends the wait at the last step, save_every 0", "error", 0, [
            (ranks.no_room, "*/step-000006.incomplete/model.safetensors"),
            (at_call, 1, "train.time.sleep", "before", what, "last")], "cannot be written", {"save_every": 0})


def judge(name, ends="done", saved=N_STEPS, says="have no score. The first, answer 1: it", **others):
    return Fault(f"judge: {name}", ends, saved, [], says, {"judge": name}, ignored=JUDGED, **others)


JUDGE_FAULTS = [
    *[judge(name) for name in ("raises", "exits", "panics", "none", "nan", "text", "true", "huge", "longer", "thing")],
    judge("raises_at_last", says="no more money"),
    *[judge(name, says="judge    step 6: ") for name in ("prints", "changes_turns", "changes_folder")],
    judge("closes_stdout", says=""),
    *[judge(name, "stopped", 2, "stopped  by SIGTERM after step 2", seconds=60)
      for name in ("hangs", "hangs_in_a_thread")],
]


# --- damage to a folder that is resumed ------------------------------------------------------------------------------

def flip(file, out):
    (path,) = out.glob(f"step-000004/{file}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(file, out):
    (path,) = out.glob(f"step-000004/{file}")
    path.write_bytes(b"")


def halve(file, out):
    (path,) = out.glob(f"step-000004/{file}")
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def remove(file, out):
    for path in out.glob(file):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Malice:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def forge(out):
    """Replaces .metadata by a pickle that runs code, with the right checksum."""
    state = out / "step-000004" / "train_state"
    old = hashlib.sha256((state / ".metadata").read_bytes()).hexdigest()
    (state / ".metadata").write_bytes(pickle.dumps(Malice(out / "it ran")))
    new = hashlib.sha256((state / ".metadata").read_bytes()).hexdigest()
    (state / "SHA256SUMS").write_text((state / "SHA256SUMS").read_text().replace(old, new))


def damage_both(out):
    flip("train_state/__0_0.distcp", out)
    remove("step-000002/train_state", out)


def name_wrongly(out):
    (out / "step-000004").rename(out / "step-latest")
    (out / "step-9").mkdir()
    (out / "step-000005.incomplete").mkdir()
    (out / "step-000006").mkdir()


def as_a_later_step(out):
    (out / "step-000004").rename(out / "step-000005")


def damage(name, cut_back, says="", ends="done", saved=N_STEPS, changes=(), **others):
    return Fault(f"damage: {name}", ends, saved, list(changes), says, cut_back=cut_back, **others)


def damaged():
    for kind in ("__0_0.distcp", ".metadata", "SHA256SUMS"):
        for how in (flip, empty, halve):
            says = "passing over .*step-000004: .*(is damaged|does not list)"
            yield damage(f"{how.__name__} {kind}", partial(how, f"train_state/{kind}"), says)
        says = "passing over .*step-000004: .*(is damaged|does not list|no train_state)"
        yield damage(f"remove {kind}", partial(remove, f"step-000004/train_state/{kind}"), says)
    for file in ("train_state", "model.safetensors", "config.json"):
        yield damage(f"remove {file}", partial(remove, f"step-000004/{file}"), "passing over")
    yield damage("remove the folder", partial(remove, "step-000004"), "step-000002, 4 steps")
    yield damage("remove all folders", partial(remove, "step-*"), "step 1/6")
    yield damage("remove metrics.jsonl", partial(remove, "metrics.jsonl"), ignored=None)
    yield damage("remove config.toml", partial(remove, "config.toml"))
    yield damage("names", name_wrongly, "passing over .*step-latest")
    yield damage("step 4 is called step 5", as_a_later_step, "step-000005: its train_state holds step 4", "error")
    yield damage("both checkpoints", damage_both, "step-000004: .*step-000002: .*Nothing is left to go on", "error")
    yield damage("a forged .metadata", forge, "step-000004/train_state/.metadata: cannot be read .* names pathlib",
                 "error")
    between = (at_call, 1, "pathlib.Path.rename", "after", "SIGKILL", 0, "step-000004.replaced.incomplete")
    yield damage("SIGKILL between two renames", partial(flip, "train_state/.metadata"), "", "killed", 2, [between])


# --- launchers, streams, clocks, second jobs --------------------------------------------------------------------------

def under_torchrun(place, world, argv, changes):
    """torchrun is killed after three steps. Its ranks have to end by themselves, before or while another job begins."""
    program, log = place / "program.py", place / "torchrun.log"
    program.write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                       "import ranks; ranks.start_with(ranks.slow_pairs, 0.1, sys.argv[1:])\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world, program, *argv]
    with open(log, "w") as f:
        launcher = subprocess.Popen([*map(str, command)], stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: "step 3/6" in log.read_text(), log, 100)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    second = Ranks(world, place / "second", train.start, [*argv, "--resume"])
    codes = second.join()
    assert codes == [0] * world or "is at work on this output" in one_error(second.output()), second.output()
    wait_for(lambda: not any(map(alive, children)), log, 30)
    assert len(children) == world
    return [128 + Signals.SIGTERM] * world, log.read_text()


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and " Z " not in stat.read_text()


def two_jobs(place, world, argv, changes):
    """A second job on the folder of one that is at work, with --resume and without it."""
    first = Ranks(world, place / "log", ranks.start_with, ranks.slow_pairs, 0.1, argv)
    wait_for(lambda: "step 1/6" in first.output(), place)
    for more in (["--resume"], []):
        second = Ranks(world, place / "second", train.start, [*argv, *more])
        assert second.join() == [1] * world, second.output()
        holder = f"out/.lock: process {first.processes[0].pid} on {os.uname().nodename}, since .* is at work"
        assert re.search(holder, one_error(second.output())), second.output()
    return first.join(), first.output()


def into_a_pipe(place, world, argv, changes):
    """train.py | head -1, in processes of its own."""
    command = [sys.executable, ROOT / "train.py", *argv]
    if world > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world]
    with open(place / "stderr", "w") as f:
        running = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=f, text=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    running.stdout.readline()
    running.stdout.close()
    code = running.wait(300)
    return [code] * world, (place / "stderr").read_text()


OTHERS = [
    Fault("launcher: SIGKILL in a step", "stopped", 2, start=under_torchrun, says="stopped  by SIGTERM after step"),
    Fault("two jobs: on one folder", "done", start=two_jobs),
    Fault("streams: stdout is gone", "done", N_STEPS, [(ranks.streams_gone, "stdout")]),
    Fault("streams: stdout and stderr are gone", "done", N_STEPS, [(ranks.streams_gone, "stdout", "stderr")]),
    Fault("streams: stdout and stderr are gone, SIGTERM", "stopped", 3, [
        (ranks.streams_gone, "stdout", "stderr"), (at_call, 3, "train.train_step", "before", "SIGTERM", "last")]),
    Fault("streams: piped into head", "done", start=into_a_pipe, seconds=300),
    Fault("clock: goes back", "done", N_STEPS, [(ranks.clock_goes_back,)]),
    Fault("clock: goes back, SIGTERM", "stopped", 3, [
        (ranks.clock_goes_back,), (at_call, 3, "train.train_step", "before", "SIGTERM")]),
]
FAULTS = {f.name: f for f in [*OTHERS, *full_disks(), *damaged(), *JUDGE_FAULTS, *SIGNALS]}


# --- the rule -------------------------------------------------------------------------------------------------------

class Place:
    """A folder with a model of two layers, data, judges, and undisturbed runs by number of ranks."""

    def __init__(self, root):
        self.root = root
        self.model = root / "model"
        self.undisturbed = {}
        self.lock = threading.Lock()

        # 1. The first half of the embedded model: ranks that share a core pay for every block.
        shutil.copytree(TINY / "model", self.model)
        settings = json.loads((self.model / "config.json").read_text()) | {"num_hidden_layers": 2}
        (self.model / "config.json").write_text(json.dumps(settings))
        tensors = load_file(self.model / "model.safetensors")
        kept = {name: w for name, w in tensors.items() if "layers.2." not in name and "layers.3." not in name}
        save_file(kept, self.model / "model.safetensors", metadata={"format": "pt"})

        # 2. Pairs, prompts, judges.
        rows = [json.loads(line) for line in (TINY / "pairs.jsonl").read_text().splitlines()]
        rows = [row for row in rows if max(row["all_rm_scores"]) > min(row["all_rm_scores"])][:32]
        (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = '{"prompt": "Sort these words: owl, moss"}\n{"prompt": "Sort these words: fern, ash"}\n'
        (root / "prompts.jsonl").write_text(prompts)
        (root / "judges.py").write_text(JUDGES)

    def argv(self, output, judge="good", save_every=2, keep_last=2):
        flags = {
            "model": self.model, "data": self.root / "pairs.jsonl", "output": os.path.relpath(output), "eval_pairs": 8,
            "pairs_per_step": 4, "learning_rate": 1e-4, "eval_every": 2, "save_every": save_every,
            "keep_last": keep_last, "save_dtype": "float32", "judge": f"{self.root}/judges.py:{judge}",
            "judge_prompts": self.root / "prompts.jsonl", "max_new_tokens": 4, "timeout_minutes": 1}
        return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]

    def undisturbed_run(self, world):
        with self.lock:
            if world not in self.undisturbed:
                out = self.root / f"undisturbed-{world}" / "out"
                running = Ranks(world, out.parent, train.start, self.argv(out, keep_last=0))
                assert running.join() == [0] * world, running.output()
                assert len(metrics(out)) == N_STEPS + 4
                self.undisturbed[world] = out
            return self.undisturbed[world]


def check(fault, world, place):
    """AssertionError unless the rule holds for a fault on so many ranks."""
    expected = place.undisturbed_run(world)
    folder = place.root / re.sub(r"\W+", "-", f"{fault.name}-{world}")
    out = folder / "out"
    folder.mkdir()
    argv = place.argv(out, **fault.flags)
    if fault.cut_back:
        shutil.copytree(expected, out, ignore=shutil.ignore_patterns("step-000006", "answers-000006.jsonl"))
        fault.cut_back(out)
        argv += ["--resume"]

    # 1. The disturbed run, and how it ends.
    began = time.monotonic()
    if fault.start:
        codes, output = fault.start(folder, world, argv, fault.changes)
    else:
        running = Ranks(world, folder / "log", ranks.start_with, ranks.all_of, fault.changes, argv)
        codes = running.join(fault.seconds)
        output = running.output()
    seconds = time.monotonic() - began
    ended = f"exit codes {codes} after {seconds:.1f} s\n{output}"
    assert seconds <= fault.seconds and "Traceback" not in output, ended
    errors = len(re.findall("^error", output, re.MULTILINE))
    if fault.ends == "done":
        assert codes == [0] * world and errors == 0, ended
    elif fault.ends == "stopped":
        assert codes in ([143] * world, [130] * world) and errors == 0, ended
    elif fault.ends == "killed":
        assert 0 not in codes or "all is done" in fault.name, ended
        assert {-9, -15, 130} & {*codes} and errors <= 1, ended
    else:
        assert codes == [1] * world, ended
        assert re.search(fault.says, one_error(output)), ended
    assert re.search(fault.says, output), ended

    # 2. What was due to be saved is there, and whatever bears the name of a checkpoint is whole.
    if not fault.cut_back or fault.ends == "done":
        found = {int(path.name[5:]): path for path in out.glob("step-[0-9]?????")}
        assert max(found, default=0) >= fault.saved, ended
        for step, path in found.items():
            assert_same_model(path, expected / path.name) if step in (2, 4, 6) else None
            assert step == N_STEPS or sums_are_right(path / "train_state"), (path, ended)
    assert not (out / "it ran").exists(), "a pickle of a checkpoint was executed"
    if fault.cut_back and fault.ends == "error":
        return          # it is for the user to choose what to go on with

    # 3. Resumed, it ends as if nothing had happened.
    if fault.ends != "done":
        flags = fault.flags | {"judge": "good"}
        resumed = Ranks(world, folder / "log", train.start, [*place.argv(out, **flags), "--resume"])
        codes = resumed.join()
        ended += f"\nresumed: exit codes {codes}\n{resumed.output()}"
        assert codes == [0] * world and f"step {fault.saved}/" not in resumed.output(), ended
    assert_same_model(out / "step-000006", expected / "step-000006")
    if fault.ignored is not None:
        assert_same_metrics(out, expected, fault.ignored)
    assert not list(out.glob("*.incomplete")) and not (out / ".lock").exists(), sorted(out.iterdir())
    assert not (out / "step-000006" / "train_state").exists()
    shutil.rmtree(folder)


def assert_same_model(folder, expected):
    found, expected = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), (folder, name)


def assert_same_metrics(out, expected, ignored):
    """Each step and each evaluation once, in order, with equal numbers (but of speed)."""
    varying = (*TIMES, *ignored)
    found, expected = [
        [{name: value for name, value in line.items() if not name.startswith(varying)} for line in metrics(folder)]
        for folder in (out, expected)]
    assert found == expected, (found, expected)
    for line in metrics(out):
        assert line.get("tokens_per_second", 1) > 0, line


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sums_are_right(state):
    """Whether a train_state is as its SHA256SUMS says, and all of it is listed."""
    lines = (state / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    listed = {path.name for path in state.iterdir()} - {"SHA256SUMS", "config.toml"} == {*sums}
    return listed and all(hashlib.sha256((state / name).read_bytes()).hexdigest() == sums[name] for name in sums)


def one_error(output):
    errors = re.findall("^error.*(?:\n  .*)*", output, re.MULTILINE)
    assert len(errors) == 1, output
    return errors[0]


def wait_for(condition, where, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, where.read_text() if where.is_file() else where
        time.sleep(0.01)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose names have all of these")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    chosen = [f for f in FAULTS.values() if all(word in f.name for word in args.words)]
    place = Place(Path(tempfile.mkdtemp(prefix="faults-")))
    failed = []

    def run(case):
        fault, world = case
        began = time.monotonic()
        try:
            check(fault, world, place)
            verdict, why = "ok", ""
        except (Exception, SystemExit) as e:
            verdict, why = "FAILED", f"\n{type(e).__name__}: {e}"
            failed.append(case)
        print(f"{verdict:6s} {time.monotonic() - began:5.1f} s  {world} ranks  {fault.name}{why}", flush=True)

    # First each fault on one number of ranks, in turns, then on the others: what is wrong shows early.
    cases = []
    for turn in range(len(args.worlds)):
        for i, fault in enumerate(chosen):
            cases.append((fault, args.worlds[(i + turn) % len(args.worlds)]))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, cases))
    print(f"{len(chosen)} faults on {args.worlds} ranks: {len(failed)} failed")
    shutil.rmtree(place.root)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
