"""Pictures of the method and of runs. Needs matplotlib (pip install matplotlib), which nothing else here does.

    python plot.py shapes --output shapes.png                              # the reward for a set of alphas
    python plot.py runs runs/first runs/second --output runs.png           # how held-out pairs moved, run by run
    python plot.py drift experiments/tiny.jsonl --output drift.png         # score against KL, from experiments/alpha.py
"""
import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")       # files, not windows
import matplotlib.pyplot as plt
import torch

from alphapo import alphapo_reward
from data.files import read_jsonl, written_whole

ALPHAS = (-1, -0.25, 0, 0.1, 0.25, 0.5, 1)


def colour(alpha):
    """Blue below 0, black at SimPO, orange to red above."""
    if alpha == 0:
        return "black"
    return plt.get_cmap("Blues" if alpha < 0 else "autumn_r")(0.25 + 0.6 * min(abs(alpha), 1) ** 0.5)


def style(axes, title, x, y):
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def shapes():
    """The reward and its slope against the average log-prob, at beta = 1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    logps = torch.linspace(-3, -0.02, 300, dtype=torch.float64)
    for alpha in ALPHAS:
        label = f"alpha = {alpha:g}" + (" (SimPO)" if alpha == 0 else "")
        left.plot(logps, alphapo_reward(logps, alpha=alpha, beta=1.0), color=colour(alpha), label=label)
        right.plot(logps, torch.exp(-alpha * logps), color=colour(alpha))
    style(left, "reward", "average log-prob per token", "(1 - exp(-alpha l)) / alpha")
    style(right, "its slope: how hard an answer is pushed", "average log-prob per token", "exp(-alpha l)")
    left.set_ylim(-6, 0.2)
    right.set_yscale("log")
    left.legend(fontsize=8, frameon=False)
    return figure


def read_run(folder):
    """(name, evaluations) of a run folder: the lines of metrics.jsonl that hold eval_ metrics."""
    folder = Path(folder)
    lines = [line for _, line in read_jsonl(folder / "metrics.jsonl")]
    evaluations = [line for line in lines if "eval_displacement/chosen" in line]
    if not evaluations:
        raise ValueError(f"{folder}/metrics.jsonl: no evaluations of held-out pairs; expected a run with --eval_pairs or "
                         "--eval_data (and --eval_every for more than two points)")
    return folder.name, evaluations


def runs(folders):
    """Held-out trajectories of run folders: log-probs, both margins, and the judge's score where there is one."""
    read = [read_run(folder) for folder in folders]
    judged = any("eval_judge_score" in line for _, lines in read for line in lines)
    figure, axes = plt.subplots(1, 3 + judged, figsize=(3.6 * (3 + judged), 3.4))
    for i, (name, lines) in enumerate(read):
        hue, steps = f"C{i}", [line["step"] for line in lines]
        for panel, metric, dash in ((0, "eval_displacement/chosen", "-"), (0, "eval_displacement/rejected", "--"),
                                    (1, "eval_rewards/margins", "-"), (2, "eval_logps/margins", "-")):
            label = name if dash == "-" else None
            axes[panel].plot(steps, [line[metric] for line in lines], dash, color=hue, label=label, marker=".")
        points = [(line["step"], line["eval_judge_score"], line["eval_judge_stderr"] or 0) for line in lines
                  if line.get("eval_judge_score") is not None]
        if points:
            axes[3].errorbar(*map(list, list(zip(*points))[:2]), yerr=[p[2] for p in points], color=hue, marker=".", capsize=2)
    style(axes[0], "chosen (line) and rejected (dashed)", "step", "log-prob per token since step 0")
    style(axes[1], "reward margin", "step", "chosen - rejected")
    style(axes[2], "log-prob margin", "step", "chosen - rejected")
    if judged:
        style(axes[3], "judge, on sampled answers", "step", "mean score")
    axes[0].axhline(0, color="grey", linewidth=0.8)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def drift(file):
    """Judged score and displacement against KL to the start, a point a run of experiments/alpha.py; a line joins
    the means at each learning rate."""
    groups = {}
    for _, row in read_jsonl(file):
        groups.setdefault(row["label"], []).append(row)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    for label, rows in groups.items():
        alpha = rows[0]["alpha"]
        hue = "tab:green" if alpha is None else colour(alpha)
        for axes, metric in ((left, "score"), (right, "displacement_chosen")):
            axes.scatter([row["kl"] for row in rows], [row[metric] for row in rows], color=hue, s=12, alpha=0.5)
            rates = sorted({row["learning_rate"] for row in rows})
            mean = lambda name, rate: statistics.mean(row[name] for row in rows if row["learning_rate"] == rate)
            axes.plot([mean("kl", r) for r in rates], [mean(metric, r) for r in rates], color=hue, linewidth=1, label=label)
            axes.set_xscale("log")
    style(left, "score of sampled answers", "KL to the start, nats per token", "judge's mean score")
    style(right, "likelihood displacement", "KL to the start, nats per token", "change of the chosen log-prob")
    right.axhline(0, color="grey", linewidth=0.8)
    left.legend(fontsize=8, frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["shapes", "runs", "drift"])
    parser.add_argument("inputs", nargs="*", help="run folders, or the file of an experiment")
    parser.add_argument("--output", required=True, help="picture file")
    args = parser.parse_args()
    if {"shapes": args.inputs, "runs": not args.inputs, "drift": len(args.inputs) != 1}[args.what]:
        parser.error("shapes takes no input, runs one folder or more, drift one file")
    figure = {"shapes": shapes, "runs": lambda: runs(args.inputs), "drift": lambda: drift(*args.inputs)}[args.what]()
    figure.tight_layout()
    with written_whole(args.output) as temporary:
        figure.savefig(temporary, dpi=130)
    print(args.output)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
