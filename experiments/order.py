"""What alpha does by the order of a pair: how far chosen responses move, where the model had the
pair right before training, and where it had it wrong.

    python -m experiments.order             # 70 runs, half an hour on a core; continues if stopped
    python -m experiments.order --table     # the table in experiments/README.md
    python -m experiments.order --plot experiments/order.png

Corollary 3.3 of the paper: a larger alpha pushes the chosen log-prob of a pair down where the
chosen response is the likelier one ("right"), and up where it is not ("wrong"). Which of the two is
seen in the total depends on how many pairs are right. So there are clean training labels and
labels of which 40 % are flipped; held-out pairs are always clean.

To leading order AlphaPO is SimPO with another beta: the slope of its reward at a log-prob l is
beta * exp(-alpha * l). So each alpha is also set against a SimPO whose reward has that slope at the
mean log-prob of the start, and the same target margin. What is left is the shape alone.

All of it is paired: on one seed all ways get the same pairs, flips, order and steps. Results go to
experiments/order.jsonl, a line a run.
"""
import argparse
import contextlib
import math
import random
import statistics
import tempfile
from pathlib import Path

import torch

import train
from command import run_command
from data.files import read_jsonl, write_records
from data.pairs import make_pairs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "order.jsonl"
TINY = ROOT / "data" / "tiny"

ALPHAS = (-1, 0.25, 1)
FLIPPED = {"clean": 0.0, "40 % flipped": 0.4}       # share of the training labels
SEEDS = (0, 1, 2, 3, 4)
HELD_OUT = 512
BETA = 2.5
GAMMA = 0.25
RATE = 1e-4         # three times the recipe's: pushed
GROUPS = {          # column of the table: field of a run
    "right": "chosen_right", "wrong": "chosen_wrong", "all": "chosen", "accuracy": "accuracy"}


# --- one run --------------------------------------------------------------------------------------

def matched_beta(alpha, beta, logp):
    """The beta of the SimPO whose reward has the slope of AlphaPO's at an average log-prob."""
    return beta * math.exp(-alpha * logp)


def write_pairs(folder, share, seed):
    """Writes train.jsonl, with a share of its labels flipped, and held_out.jsonl, by the seed."""
    pairs, _ = make_pairs(TINY / "pairs.jsonl")
    rng = random.Random(seed)
    rng.shuffle(pairs)
    held_out, pairs = pairs[:HELD_OUT], pairs[HELD_OUT:]
    for i in rng.sample(range(len(pairs)), round(share * len(pairs))):
        chosen, rejected = pairs[i]["chosen"], pairs[i]["rejected"]
        pairs[i] = pairs[i] | {"chosen": rejected, "rejected": chosen}
    write_records(folder / "train.jsonl", pairs)
    write_records(folder / "held_out.jsonl", held_out)


def run(labels, seed, method, alpha, beta):
    """Trains one epoch; what came of it on the held-out pairs, as a dict."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w") as log:
        folder = Path(folder)
        write_pairs(folder, FLIPPED[labels], seed)
        argv = [
            "--model", TINY / "model", "--data", folder / "train.jsonl",
            "--eval_data", folder / "held_out.jsonl", "--output", folder / "run",
            "--method", method, "--beta", beta, "--gamma_beta_ratio", GAMMA / beta,
            "--learning_rate", RATE, "--pairs_per_step", 64, "--seed", seed]
        if method == "alphapo":
            argv += ["--alpha", alpha]
        with contextlib.redirect_stdout(log):
            start, end = train.main(train.parse_config([str(word) for word in argv]))
        lines = [line for _, line in read_jsonl(folder / "run" / "metrics.jsonl")]
    clipped = [line["clipped"] for line in lines if "clipped" in line]
    return {
        "labels": labels,
        "seed": seed,
        "method": method,
        "alpha": alpha,             # of a matched SimPO: the alpha that it matches
        "beta": beta,
        "learning_rate": RATE,
        "steps": len(clipped),
        "clipped": statistics.mean(clipped),
        "start_logp": (start["eval_logps/chosen"] + start["eval_logps/rejected"]) / 2,
        "right": start["eval_displacement/right"],
        "chosen": end["eval_displacement/chosen"],
        "chosen_right": end["eval_displacement/chosen_right"],
        "chosen_wrong": end["eval_displacement/chosen_wrong"],
        "rejected": end["eval_displacement/rejected"],
        "accuracy": end["eval_rewards/accuracies"],
    }


def run_all(rows):
    """Runs what `rows` does not have yet; adds each run to it and writes them."""
    found = {(r["labels"], r["seed"], r["method"], r["alpha"]): r for r in rows}

    def run_one(labels, seed, method, alpha, beta):
        key = labels, seed, method, alpha
        if key not in found:
            found[key] = run(*key, beta)
            rows.append(found[key])
            write_records(RESULTS, rows)
            print(f"{labels:12} seed {seed} {method} alpha {alpha:g} beta {beta:.2f}: chosen "
                  f"{found[key]['chosen']:+.4f}", flush=True)
        return found[key]

    for seed in SEEDS:
        for labels in FLIPPED:
            simpo = run_one(labels, seed, "simpo", 0, BETA)
            for alpha in ALPHAS:
                run_one(labels, seed, "alphapo", alpha, BETA)
                matched = matched_beta(alpha, BETA, simpo["start_logp"])
                run_one(labels, seed, "simpo", alpha, matched)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for _, row in read_jsonl(RESULTS)] if RESULTS.exists() else []
    write_records(RESULTS, rows)        # that it can be written is known before the runs
    run_all(rows)


if __name__ == "__main__":
    run_command(main)
