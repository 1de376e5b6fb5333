"""From the start of train.py to its first step on many pairs: tokenised for the first time, and read from the cache.

    python benchmarks/startup.py --model DIR [--pairs 60000]

Writes pairs of random words with the lengths of benchmarks/lengths.py (60,000 are 250 MB) to a temporary folder. Prints the
seconds and the peak memory of train.py's process itself (model included) in both cases, and once on 8 pairs, to compare.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from lengths import pair_lengths


def write_pairs(path, n):
    rng = np.random.default_rng(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choice(list(letters), rng.integers(2, 9))) for _ in range(20_000)]
    ranks = np.minimum(rng.zipf(1.3, 4_000_000) - 1, len(words) - 1)        # common words are common
    with open(path, "w") as f:
        for P, C, R in pair_lengths(n):
            texts = []
            for length in (P, C, R):
                start = rng.integers(len(ranks) - 2000)
                texts.append(" ".join(words[r] for r in ranks[start:start + max(2, length * 2 // 5)]))     # 2.5 tokens a word
            print(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))), file=f)


def seconds_to_first_step(model, data, folder, name):
    """Until the report of a run is printed: the next thing is the first step. And the process's peak memory in bytes."""
    began = time.perf_counter()
    run = subprocess.Popen([sys.executable, "train.py", "--model", model, "--data", str(data), "--output", str(folder / name),
                            "--cache", str(folder / "cache"), "--max_length", "2048"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith(("data", "lengths")):
            print(f"    {line.rstrip()}", flush=True)
        if line.startswith("pair "):
            break
    seconds = time.perf_counter() - began
    status = Path(f"/proc/{run.pid}/status").read_text()
    run.kill()
    return seconds, int(status.split("VmHWM:")[1].split()[0]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=60_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_pairs(folder / "few.jsonl", 8)
        write_pairs(folder / "many.jsonl", args.pairs)
        print(f"{args.pairs} pairs, {(folder / 'many.jsonl').stat().st_size / 1e6:.0f} MB")
        for name, data in (("few", "few"), ("first", "many"), ("again", "many")):
            seconds, peak = seconds_to_first_step(args.model, folder / f"{data}.jsonl", folder, name)
            print(f"{name:6} {seconds:6.1f} s to the first step, peak {peak / 1e6:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
