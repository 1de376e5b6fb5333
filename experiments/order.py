"""What alpha does by the order of a pair: how far chosen responses move where the model had the
pair right before training, and where it had it wrong.

    python -m experiments.order             # 70 runs, half an hour on a core; continues if stopped
    python -m experiments.order --table     # the tables in experiments/README.md
    python -m experiments.order --plot experiments/order.png

Corollary 3.3 of the paper: under gradient flow on one pair a larger alpha is worse for the chosen
log-prob of a pair in the right order (the chosen response is the likelier one), and better for that
of a pair in the wrong order. Which of the two is seen in the total depends on the share of either.
So there are runs on clean labels, and runs on labels of which 40 % are flipped. The groups are
looked at on the pairs that were trained on, as they were labelled, which is what the corollary is
about, and on held-out pairs, which are always clean.

To leading order AlphaPO is SimPO with another beta: the slope of its reward at a log-prob l is
beta * exp(-alpha * l). So each alpha is also set against a SimPO whose reward has that slope at the
mean log-prob of the start, and the same target margin. What is left is the shape alone.

All of it is paired: on one seed all ways get the same pairs, flips, order and steps. Results go to
experiments/order.jsonl, a line a run.
"""
import argparse
import contextlib
import functools
import math
import random
import statistics
import tempfile
from pathlib import Path

import torch

import train
from alphapo import displacement_metrics
from command import run_command
from data.files import read_jsonl, write_records
from data.pairs import make_pairs
from data.preference import load_pairs, pack
from experiments.drift import load_fast
from tokenizer import load_chat

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "order.jsonl"
TINY = ROOT / "data" / "tiny"

ALPHAS = (-1, 0.25, 1)
LABELS = {"clean": 0.0, "40 % flipped": 0.4}        # share of the training labels that is flipped
SEEDS = (0, 1, 2, 3, 4)
HELD_OUT = 512
BETA = 2.5
GAMMA = 0.25        # the target margin itself
RATE = 1e-4         # three times the recipe's: pushed


# --- one run --------------------------------------------------------------------------------------

def matched_beta(alpha, beta, logp):
    """The beta of the SimPO whose reward has the slope of AlphaPO's at an average log-prob."""
    return beta * math.exp(-alpha * logp)


@functools.cache
def tiny_pairs():
    """(records, pairs, logps) of all pairs of the tiny task; logps (N, 2) are the average log-probs
    of chosen and rejected responses before training."""
    records, _ = make_pairs(TINY / "pairs.jsonl")
    pairs, _ = load_pairs([TINY / "pairs.jsonl"], load_chat(TINY / "model"), 2048, 1800)
    if len(records) != len(pairs):
        raise ValueError(f"{len(records)} records and {len(pairs)} pairs; expected as many")
    return records, pairs, logps_of(TINY / "model", pairs)


@torch.no_grad()
def logps_of(folder, pairs):
    """Average log-probs of N pairs under the model of a folder, (N, 2)."""
    model = load_fast(folder)
    config = train.TrainConfig(method="simpo", beta=1.0, gamma_beta_ratio=0.0)
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for row in pack(pairs, 8192):
        results = train.run_row(model, row, config)
        logps[row.indices] = results[:, [train.CHOSEN_LOGP, train.REJECTED_LOGP]]
    return logps


def split(n, share, seed):
    """(held out, trained on, flipped) of n pairs, lists of indices: a share of the labels that are
    trained on is flipped. The split is the same for all shares."""
    rng = random.Random(seed)
    indices = list(range(n))
    rng.shuffle(indices)
    trained_on = indices[HELD_OUT:]
    return indices[:HELD_OUT], trained_on, rng.sample(trained_on, round(share * len(trained_on)))


def run(labels, seed, method, alpha, beta):
    """Trains one epoch; what came of it, as a dict."""
    # 1. Train, on a file of pairs of which some are flipped.
    records, pairs, start = tiny_pairs()
    held_out, trained_on, flipped = split(len(pairs), LABELS[labels], seed)
    records = list(records)
    for i in flipped:
        record = records[i]
        records[i] = record | {"chosen": record["rejected"], "rejected": record["chosen"]}
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w") as log:
        folder = Path(folder)
        write_records(folder / "train.jsonl", [records[i] for i in trained_on])
        argv = [
            "--model", TINY / "model", "--data", folder / "train.jsonl", "--output", folder / "run",
            "--method", method, "--beta", beta, "--gamma_beta_ratio", GAMMA / beta,
            "--learning_rate", RATE, "--pairs_per_step", 64, "--seed", seed,
            "--save_dtype", "float32"]          # in bf16 differences as small as these are rounded
        if method == "alphapo":
            argv += ["--alpha", alpha]
        with contextlib.redirect_stdout(log):
            train.main(train.parse_config([str(word) for word in argv]))
        clipped = [line["clipped"] for _, line in read_jsonl(folder / "run" / "metrics.jsonl")]
        (saved,) = (folder / "run").glob("step-*")
        end = logps_of(saved, pairs)

    # 2. How far responses moved. The pairs that were trained on count as they were labelled.
    before = start.clone()
    for logps in (before, end):
        logps[flipped] = logps[flipped].flip(1)

    def moved(indices):
        metrics = displacement_metrics(*end[indices].T, *before[indices].T)
        return {name.removeprefix("displacement/"): x.item() for name, x in metrics.items()}

    return {
        "labels": labels,
        "seed": seed,
        "method": method,
        "alpha": alpha,             # of a matched SimPO: the alpha that it matches
        "beta": beta,
        "learning_rate": RATE,
        "steps": len(clipped),
        "clipped": statistics.mean(clipped),
        "trained_on": moved(trained_on),
        "held_out": moved(held_out),
    }


def run_all(rows):
    """Runs what `rows` does not have yet; adds each run to it and writes them."""
    found = {(r["labels"], r["seed"], r["method"], r["alpha"]) for r in rows}
    mean_logp = tiny_pairs()[2].mean().item()
    ways = [("simpo", 0, BETA)]
    for alpha in ALPHAS:
        ways.append(("alphapo", alpha, BETA))
        ways.append(("simpo", alpha, matched_beta(alpha, BETA, mean_logp)))
    for seed in SEEDS:
        for labels in LABELS:
            for method, alpha, beta in ways:
                if (labels, seed, method, alpha) in found:
                    continue
                rows.append(run(labels, seed, method, alpha, beta))
                write_records(RESULTS, rows)
                print(f"{labels:12} seed {seed} {method:7} alpha {alpha:5} beta {beta:.2f}: chosen "
                      f"{rows[-1]['held_out']['chosen']:+.4f}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for _, row in read_jsonl(RESULTS)] if RESULTS.exists() else []
    write_records(RESULTS, rows)        # that it can be written is known before the runs
    run_all(rows)


if __name__ == "__main__":
    run_command(main)
