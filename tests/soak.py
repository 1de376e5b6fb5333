"""A soak: 2,000 steps of the tiny model, evaluated, judged and saved as a real run is. Run by hand:

    make soak                                       # one rank, some minutes
    make soak ARGS="--ranks 2"                      # two, sharded over them

It fails unless each rank's memory after the last step is within 2 % of that after step 200, steps take as long at the
end as at the beginning, metrics.jsonl has each step and evaluation once, and the learning rate is its closed form's
at every step. Memory and processor time of the ranks are read from outside, in /proc, after each step.

A machine that others use is slower at one time than at another, in processor time too. So a step's is divided by that
of a fixed piece of work, done here at the same time. What the clock says is printed and not judged.
"""
import argparse
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"
STEPS = 2000
EVERY = 100                 # steps between evaluations, and between checkpoints
RATE, WARMUP = 3e-5, 200    # warmup_ratio 0.1
MEMORY = 0.02               # may grow by so much of itself
SLOWER = 0.15               # and the processor time of a step by so much
WINDOW = 200                # steps: the medians of so many are compared


def start_ranks(n, output):
    """The processes of the run; only the first one's output is kept, to be read as it comes."""
    prompts = output.parent / "prompts.jsonl"
    prompts.write_text("".join((TINY / "prompts.jsonl").open().readlines()[:16]))
    flags = {"model": TINY / "model", "data": TINY / "pairs.jsonl", "output": output, "eval_pairs": 16,
             "judge": f"{TINY}/judge.py:score", "judge_prompts": prompts, "max_new_tokens": 40,
             "pairs_per_step": 4, "epochs": 100, "max_steps": STEPS, "learning_rate": RATE, "warmup_ratio": 0.1,
             "eval_every": EVERY, "save_every": EVERY}
    command = [sys.executable, "train.py", *(str(x) for name, value in flags.items() for x in (f"--{name}", value))]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(n):
        env = {"OMP_NUM_THREADS": "1"}
        if n > 1:       # as torchrun sets them
            env |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        out = subprocess.DEVNULL if rank else subprocess.PIPE
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=out, text=True))
    return ranks


def memory(pid):
    """Resident bytes of a process."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def processor_time(pid):
    """Seconds of a process's main thread, which does the work here. Where others use the machine too, they change less
    than those of a clock."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def yardstick():
    """Processor time of a fixed piece of work."""
    began = time.thread_time()
    sum(i * i for i in range(20_000))
    return time.thread_time() - began


def watch(ranks):
    """Reads the run's output to its end -> {step: (memory of each rank, processor time so far, yardstick)}, status."""
    seen = {}
    for line in ranks[0].stdout:
        step = re.match(r"step (\d+)/", line)
        if step:
            seen[int(step[1])] = [memory(p.pid) for p in ranks], processor_time(ranks[0].pid), yardstick()
        if not step or int(step[1]) % EVERY == 0:
            print(line, end="", flush=True)
    return seen, [p.wait() for p in ranks]


def closed_form(step):
    """The learning rate of a step, 1 to STEPS, by another formula than train.py's."""
    if step <= WARMUP:
        return RATE * step / WARMUP
    return RATE * math.cos(math.pi / 2 * (step - 1 - WARMUP) / (STEPS - WARMUP)) ** 2


def checks(seen, lines, wall):
    """[(what, at first, at last, whether it holds)]"""
    early = range(WINDOW, 2 * WINDOW)
    late = range(STEPS - WINDOW + 1, STEPS + 1)
    rows = []
    for rank in range(len(seen[STEPS][0])):
        first, last = (statistics.median(seen[step][0][rank] for step in steps) / 1e6 for steps in (
            range(WINDOW, WINDOW + 20), range(STEPS - 19, STEPS + 1)))
        rows.append((f"memory of rank {rank}, MB", f"{first:.1f}", f"{last:.1f}", last <= (1 + MEMORY) * first))

    own, of_work = ([statistics.median(time_of(step) for step in steps) for steps in (early, late)] for time_of in (
        lambda step: seen[step][1] - seen[step - 1][1], lambda step: seen[step][2]))
    first, last = (x / y for x, y in zip(own, of_work))
    rows.append(("processor time a step / fixed work", f"{first:.2f}", f"{last:.2f}", last <= (1 + SLOWER) * first))
    rows.append(("processor time a step, ms: told", f"{own[0] * 1e3:.1f}", f"{own[1] * 1e3:.1f}", True))
    first, last = (statistics.median(wall[step] for step in steps) * 1e3 for steps in (early, late))
    rows.append(("time a step, ms: told", f"{first:.1f}", f"{last:.1f}", True))

    steps = [line["step"] for line in lines if "loss" in line]
    rows.append(("lines of steps", STEPS, len(steps), steps == [*range(1, STEPS + 1)]))
    evaluated = [line["step"] for line in lines if "eval_loss" in line and "eval_judge_score" in line]
    expected = [*range(0, STEPS + 1, EVERY)]
    rows.append(("lines of evaluations", len(expected), len(evaluated), evaluated == expected))
    rows.append(("other lines", 0, len(lines) - len(steps) - len(evaluated), len(lines) == STEPS + len(expected)))

    rates = {line["step"]: line["learning_rate"] for line in lines if "loss" in line}
    error = max(abs(rates[step] - closed_form(step)) / RATE for step in rates)
    rows.append(("learning rate, error of its peak", 0, f"{error:.0e}", error < 1e-15))
    rows.append(("learning rate at the end", f"{closed_form(STEPS):.6e}", f"{rates.get(STEPS, math.nan):.6e}",
                 math.isclose(rates.get(STEPS, math.nan), closed_form(STEPS), rel_tol=1e-9)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        ranks = start_ranks(args.ranks, output)
        try:
            seen, status = watch(ranks)
        finally:
            for p in ranks:
                p.kill()
        if any(status):
            sys.exit(f"soak: the run ended with {status}")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        wall = {line["step"]: line["tokens"] / line["tokens_per_second"] for line in lines if "loss" in line}
        rows = checks(seen, lines, wall)
    print(f"\n{STEPS} steps, {args.ranks} rank(s)")
    for what, first, last, holds in rows:
        print(f"  {what:34} {first:>14} {last:>14}  {'holds' if holds else 'DOES NOT HOLD'}")
    sys.exit(not all(holds for *_, holds in rows))


if __name__ == "__main__":
    main()
