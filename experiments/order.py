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
mean log-prob of the start, and the same target margin. What is left does not come of that beta.

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
from experiments.alpha import GAMMA, ROOT, cell, mean_and_error
from experiments.drift import load_fast
from tokenizer import load_chat

RESULTS = ROOT / "experiments" / "order.jsonl"
TINY = ROOT / "data" / "tiny"

ALPHAS = (-1, 0.25, 1)
LABELS = {"clean": 0.0, "40 % flipped": 0.4}        # share of the training labels that is flipped
SEEDS = (0, 1, 2, 3, 4)
HELD_OUT = 512
BETA = 2.5
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


# --- table and figure -----------------------------------------------------------------------------

SIMPO = ("simpo", 0)
GROUPS = {"right": "chosen_right", "wrong": "chosen_wrong", "all": "chosen"}
PLACES = {"trained_on": "trained on", "held_out": "held out"}


def comparisons(alpha, beta):
    """(title, way, what it is compared with) of an alpha, whose matched SimPO has this beta."""
    shaped = ("alphapo", alpha)
    matched = ("simpo", alpha)
    return (
        (f"alpha = {alpha:g} - SimPO", shaped, SIMPO),
        (f"SimPO at beta {beta:.2f} - SimPO", matched, SIMPO),
        (f"alpha = {alpha:g} - SimPO at beta {beta:.2f}", shaped, matched),
    )


def value(row, place, group):
    """What a run did to a group of pairs: how far chosen responses moved, in thousandths of a nat
    per token; or the accuracy in percent."""
    found = row[place]
    if group == "accuracy":
        right = found["right"]
        return 100 * (right * found["accuracy_right"] + (1 - right) * found["accuracy_wrong"])
    return 1000 * found[GROUPS[group]]


def difference(rows, labels, way, base, place, group):
    """(mean, standard error) over the seeds of a way less another, on the same seed."""
    of_seeds = {}
    for r in rows:
        if r["labels"] == labels:
            of_seeds[r["method"], r["alpha"], r["seed"]] = value(r, place, group)
    differences = []
    for seed in sorted({seed for _, _, seed in of_seeds}):
        differences.append(of_seeds[*way, seed] - (of_seeds[*base, seed] if base else 0))
    return mean_and_error(differences)


def betas(rows):
    """The beta of the SimPO that each alpha is matched by."""
    return {alpha: next(r["beta"] for r in rows if r["method"] == "simpo" and r["alpha"] == alpha)
            for alpha in ALPHAS}


def table(rows):
    """Markdown: a line for each comparison, on clean and on flipped labels."""
    lines = []
    columns = [(place, group) for place in PLACES for group in GROUPS] + [("held_out", "accuracy")]
    heads = [f"{PLACES[place]}: {group}" for place, group in columns[:-1]]
    heads.append("held out: accuracy, points")
    for labels in LABELS:
        some = next(r for r in rows if r["labels"] == labels)
        lines += [f"| {labels} labels | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
        shares = [f"{statistics.mean(r[place]['right'] for r in rows if r['labels'] == labels):.0%}"
                  for place in PLACES]
        lines.append(f"| pairs that are right at step 0 | {shares[0]} | | | {shares[1]} | | | |")
        moved = [f"{difference(rows, labels, SIMPO, None, *c)[0]:+.1f}" for c in columns[:-1]]
        accuracy, _ = difference(rows, labels, SIMPO, None, *columns[-1])
        lines.append(f"| SimPO (beta {BETA:g}, {some['steps']} steps) | {' | '.join(moved)} "
                     f"| {accuracy:.1f}% |")
        for alpha, beta in betas(rows).items():
            for title, way, base in comparisons(alpha, beta):
                cells = [cell(*difference(rows, labels, way, base, *c)) for c in columns]
                lines.append(f"| {title} | {' | '.join(cells)} |")
        lines.append("")
    clipped = [r["clipped"] for r in rows]
    lines.append(f"{len({r['seed'] for r in rows})} seeds, {len(rows)} runs; {min(clipped):.0%} to "
                 f"{max(clipped):.0%} of a run's steps were clipped.")
    return "\n".join(lines)


def draw(rows):
    """The differences by group: of AlphaPO to SimPO, and to the SimPO of its matched beta."""
    import matplotlib.pyplot as plt
    from plot import style

    figure, axes = plt.subplots(len(PLACES), len(LABELS), figsize=(10, 7.5), sharey="row",
                                layout="constrained")
    colors = {"right": "tab:blue", "wrong": "tab:red", "all": "black"}
    for panels, place in zip(axes, PLACES):
        for panel, labels in zip(panels, LABELS):
            for shift, group in zip((-0.12, 0, 0.12), GROUPS):
                for base, dash in (("SimPO", "-"), ("SimPO at the matched beta", ":")):
                    means = []
                    errors = []
                    for alpha in ALPHAS:
                        other = SIMPO if dash == "-" else ("simpo", alpha)
                        mean, error = difference(
                            rows, labels, ("alphapo", alpha), other, place, group)
                        means.append(mean)
                        errors.append(error)
                    x = [i + shift for i in range(len(ALPHAS))]
                    panel.errorbar(x, means, yerr=errors, fmt="o" + dash, color=colors[group],
                                   markersize=4, capsize=2, label=f"{group}, less {base}")
            panel.axhline(0, color="grey", linewidth=0.8)
            panel.set_xticks(range(len(ALPHAS)), [f"{alpha:g}" for alpha in ALPHAS])
            style(panel, f"pairs {PLACES[place]}, {labels} labels", "alpha",
                  "chosen log-prob less SimPO's, 0.001 nats")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3,
                  fontsize=8, frameon=False)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--plot", metavar="FILE", help="only draw the figure")
    args = parser.parse_args(argv)
    rows = [row for _, row in read_jsonl(RESULTS)] if RESULTS.exists() else []
    if args.plot:
        figure = draw(rows)
        figure.savefig(args.plot, dpi=130)
        return
    if not args.table:
        torch.set_num_threads(1)
        write_records(RESULTS, rows)        # that it can be written is known before the runs
        run_all(rows)
    print(table(rows))


if __name__ == "__main__":
    run_command(main)
