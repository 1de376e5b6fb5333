"""Processes that take steps in turn, and what they run on. For the other programs of this folder.

    worker = Worker("benchmarks.step", "--serve", "ours")       # python -m benchmarks.step ...
    worker.take_step()                  # {"seconds": ..., "peak": ..., "loss": ...}

Each way to do a thing is a process of its own with its model loaded, and takes a step when it is
asked: A B C A B C. The others wait meanwhile, so that a machine whose speed drifts slows all of
them. On the other side of the pipe such a process has Turns. Linux.
"""
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2     # steps of each way: their time does not count, their memory does


class Worker:
    """A process that takes a step each time it is asked, and waits in between."""

    def __init__(self, module, *arguments):
        program = [sys.executable, "-m", module, *map(str, arguments)]
        self.process = subprocess.Popen(
            program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take_step(self):
        """The figures of one step, as a dict."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} ended early; its own output says why")
        return json.loads(answer)

    def kill(self):
        self.process.kill()


class Turns:
    """What a Worker's process has: wait() before each step, and done() after it."""

    def __init__(self, warm_up=WARM_UP):
        self.warm_up = warm_up
        self.steps = 0
        self.before = 0             # resident bytes before the step
        # Libraries print to stdout, which is kept for the answers.
        self.answers = sys.stdout
        sys.stdout = sys.stderr

    def wait(self):
        """Waits until a step is asked for.

        Before the first steps the memory of this process is made as low as it gets, to see how far
        a step raises it. Afterwards it is left as a run has it: handing memory back costs time.
        """
        if not sys.stdin.readline():
            sys.exit()              # nobody asks any more
        if self.steps < self.warm_up:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")       # the peak begins here
            self.before = resident("VmRSS")

    def done(self, seconds, **figures):
        """Answers with the time of the step, its peak of memory in bytes, and other figures."""
        self.steps += 1
        figures = {"seconds": seconds, "peak": resident("VmHWM") - self.before, **figures}
        print(json.dumps(figures), file=self.answers, flush=True)

    def serve(self, way, steps):
        """Takes steps of a generator, which yields the loss of each."""
        for _ in range(steps):
            self.wait()
            began = time.perf_counter()
            loss = next(way)
            self.done(time.perf_counter() - began, loss=loss)


def resident(field):
    """Resident memory of this process in bytes: now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def machine():
    """What the figures were measured on, as a dict."""
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if "model name" in line:
            name = line.split(": ")[1]
            break
    return {"machine": f"{name}, {os.cpu_count()} cores", "torch": torch.__version__}
