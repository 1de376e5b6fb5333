"""From the start of train.py to its first step on many pairs: tokenised for the first time, and
read from the cache.

    python -m benchmarks.startup --model DIR [--pairs 60000]

Writes pairs of random words with the lengths of lengths.py (60,000 are 250 MB) to a temporary
folder. Prints the seconds and the peak memory of train.py's process itself (model included) in both
cases, and once on 8 pairs, to compare. Linux.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.lengths import pair_lengths
from benchmarks.workers import ROOT
from command import run_command

TOKENS_PER_WORD = 2.5


def write_pairs(path, n):
    """n pairs of random words, as JSON Lines."""
    rng = np.random.default_rng(0)
    letters = list("etaoinshrdlucmfwypvbgk")
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(20_000)]
    ranks = np.minimum(rng.zipf(1.3, 4_000_000) - 1, len(words) - 1)    # common words are common
    with open(path, "w") as f:
        for lengths in pair_lengths(n):
            row = {}
            for field, length in zip(("prompt", "chosen", "rejected"), lengths):
                start = rng.integers(len(ranks) - 2000)
                end = start + max(2, int(length / TOKENS_PER_WORD))
                row[field] = " ".join(words[rank] for rank in ranks[start:end])
            print(json.dumps(row), file=f)


def run_to_first_step(model, data, folder, name):
    """(seconds, peak memory in bytes) of train.py until the report of a run is printed: the next
    thing is the first step."""
    began = time.perf_counter()
    run = subprocess.Popen(
        [sys.executable, "train.py", "--model", model, "--data", str(data),
         "--output", str(folder / name), "--cache", str(folder / "cache"), "--max_length", "2048"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith(("data", "lengths")):
            print(f"    {line.rstrip()}", flush=True)
        if line.startswith("pair "):
            break
    else:
        raise RuntimeError("train.py ended before its first step; its own output says why")
    seconds = time.perf_counter() - began
    status = Path(f"/proc/{run.pid}/status").read_text()
    run.kill()
    return seconds, int(status.split("VmHWM:")[1].split()[0]) * 1024


def main():
    parser = argparse.ArgumentParser(
        description="From the start of train.py to its first step on many pairs.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=60_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        few = folder / "few.jsonl"
        many = folder / "many.jsonl"
        write_pairs(few, 8)
        write_pairs(many, args.pairs)
        print(f"{args.pairs} pairs, {many.stat().st_size / 1e6:.0f} MB")
        for name, data in (("few", few), ("first", many), ("again", many)):
            seconds, peak = run_to_first_step(args.model, data, folder, name)
            print(f"{name:6} {seconds:6.1f} s to the first step, peak {peak / 1e6:6.0f} MB",
                  flush=True)


if __name__ == "__main__":
    run_command(main)
