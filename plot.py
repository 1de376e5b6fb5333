"""Pictures of the method and of runs. Needs matplotlib (pip install matplotlib), here alone.

    python plot.py shapes --output shapes.png
    python plot.py runs runs/first runs/second --output runs.png
    python plot.py drift experiments/equal_kl.jsonl --output drift.png

shapes  the reward and its slope for a set of alphas
runs    how held-out pairs moved in the training runs of these folders
drift   judged score and likelihood displacement against KL, of a file of experiments/equal_kl.py
"""
import argparse
import math
import statistics
from pathlib import Path

import matplotlib
matplotlib.use("Agg")       # draw into files, not windows
import matplotlib.pyplot as plt
import torch

from alphapo import alphapo_reward
from command import run_command
from data.files import check_output, is_finite_number, read_jsonl, written_whole

# Most of those that experiments/alpha.py compares.
ALPHAS = (-1, -0.25, 0, 0.1, 0.25, 0.5, 1)

LARGEST_DRAWN = 1e100       # matplotlib squares what it draws

# The curves of a run: panel, metric, line style.
RUN_CURVES = (
    (0, "eval_displacement/chosen", "-"),
    (0, "eval_displacement/rejected", "--"),
    (1, "eval_rewards/margins", "-"),
    (2, "eval_logps/margins", "-"),
)

DRIFT_NUMBERS = ("kl", "score", "displacement_chosen", "step")      # of an evaluation

# --- what all pictures share ----------------------------------------------------------------------

def color_of(alpha):
    """Blue below 0, black at SimPO, orange to red above."""
    if alpha == 0:
        return "black"
    colors = plt.get_cmap("Blues" if alpha < 0 else "autumn_r")
    # The square root keeps small alphas apart; both ends of a map are hard to see on white.
    return colors(0.25 + 0.6 * min(abs(alpha), 1) ** 0.5)


def style(axes, title, x, y):
    """Gives a panel its title, the names of its axes and a quiet frame."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def column(records, name):
    """The numbers in a field of records; null, of what was not finite, leaves a gap."""
    return [math.nan if record[name] is None else record[name] for record in records]


def check_fields(record, source, numbers, numbers_or_null):
    """ValueError that names the source unless a record has these fields, as numbers that can be
    drawn."""
    for name in (*numbers, *numbers_or_null):
        value = record.get(name)
        if value is None and name in record and name in numbers_or_null:
            continue
        if not is_finite_number(value) or abs(value) > LARGEST_DRAWN:
            raise ValueError(f"{source}: {name} is {value!r:.60}; expected a number, of a size "
                             f"under {LARGEST_DRAWN:g}")


# --- shapes ---------------------------------------------------------------------------------------

def shapes():
    """The reward and its slope against the average log-prob, at beta = 1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    # Likely answers are on the right; at 0, an answer that is certain, all shapes meet.
    logps = torch.linspace(-3, -0.02, 300, dtype=torch.float64)
    for alpha in ALPHAS:
        label = f"alpha = {alpha:g}"
        if alpha == 0:
            label += " (SimPO)"
        rewards = alphapo_reward(logps, alpha=alpha, beta=1.0)
        slopes = torch.exp(-alpha * logps)
        left.plot(logps, rewards, color=color_of(alpha), label=label)
        right.plot(logps, slopes, color=color_of(alpha))

    style(left, "reward", "average log-prob per token", "(1 - exp(-alpha l)) / alpha")
    style(right, "its slope", "average log-prob per token",
          "exp(-alpha l)")
    left.set_ylim(-6, 0.2)      # alpha = 1 falls to -19
    right.set_yscale("log")     # straight lines of slope -alpha
    left.legend(fontsize=8, frameon=False)
    return figure


# --- runs -----------------------------------------------------------------------------------------

def read_run(folder):
    """(name, evaluations) of a run folder: the lines of metrics.jsonl that hold eval_ metrics.
    ValueError if there are none of held-out pairs."""
    folder = Path(folder)
    evaluations = []
    for source, line in read_jsonl(folder / "metrics.jsonl"):
        if "eval_displacement/chosen" in line:
            check_fields(line, source, ["step"], [metric for _, metric, _ in RUN_CURVES])
            if line.get("eval_judge_score") is not None:
                check_fields(line, source, ["eval_judge_score"], ["eval_judge_stderr"])
            evaluations.append(line)
    if not evaluations:
        raise ValueError(f"{folder}/metrics.jsonl: no evaluations of held-out pairs; expected a "
                         "run with --eval_pairs or --eval_data (and --eval_every for more than "
                         "two points)")
    return folder.name, evaluations


def runs(folders):
    """Held-out pairs over the steps of run folders: log-probs, both margins, and the judge's score
    where there is one."""
    # A fourth panel if any run was judged.
    named_runs = [read_run(folder) for folder in folders]
    is_judged = any("eval_judge_score" in line for _, lines in named_runs for line in lines)
    n_panels = 4 if is_judged else 3
    figure, axes = plt.subplots(1, n_panels, figsize=(3.6 * n_panels, 3.4))

    # Runs differ by color, chosen and rejected by line style.
    for i, (name, lines) in enumerate(named_runs):
        color = f"C{i}"         # the i-th color of matplotlib's cycle
        draw_pairs(axes, name, lines, color)
        if is_judged:
            draw_judge(axes[3], lines, color)

    style(axes[0], "chosen (line) and rejected (dashed)", "step", "log-prob per token since step 0")
    style(axes[1], "reward margin", "step", "chosen - rejected")
    style(axes[2], "log-prob margin", "step", "chosen - rejected")
    if is_judged:
        style(axes[3], "judge, on sampled answers", "step", "mean score")
    # Below this line a response has become less likely than it was.
    axes[0].axhline(0, color="grey", linewidth=0.8)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def draw_pairs(axes, name, lines, color):
    """Draws the curves of one run's evaluations into the first three panels."""
    steps = column(lines, "step")
    for panel, metric, dash in RUN_CURVES:
        # One entry of the legend a run: its dashed curve has none.
        label = name if dash == "-" else None
        values = column(lines, metric)
        axes[panel].plot(steps, values, dash, color=color, label=label, marker=".")


def draw_judge(panel, lines, color):
    """Draws the judge's mean scores of one run, with their standard errors, if it has any."""
    steps = []
    scores = []
    errors = []
    for line in lines:
        if line.get("eval_judge_score") is not None:
            steps.append(line["step"])
            scores.append(line["eval_judge_score"])
            errors.append(line["eval_judge_stderr"] or 0)       # null for a single answer
    if steps:
        panel.errorbar(steps, scores, yerr=errors, color=color, marker=".", capsize=2)


# --- drift ----------------------------------------------------------------------------------------

def read_drift(file):
    """The evaluations of a file of experiments/equal_kl.py, as a list for each label: a method or
    an alpha. ValueError if there are none, or they lack a number."""
    records_by_label = {}
    for source, record in read_jsonl(file):
        label = record.get("label")
        if not isinstance(label, str):
            raise ValueError(f"{source}: label is {label!r:.60}; expected the name of a way")
        check_fields(record, source, DRIFT_NUMBERS, ["alpha"])
        records_by_label.setdefault(label, []).append(record)
    if not records_by_label:
        raise ValueError(f"{file}: no runs; expected a file of experiments/equal_kl.py")
    return records_by_label


def drift(file):
    """Judged score and displacement against KL to the start, a point an evaluation of
    experiments/equal_kl.py; a line joins the means over the seeds at each step."""
    records_by_label = read_drift(file)

    # Each alpha has a color; ways of one alpha, which differ by their beta, have other lines.
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    colors = []
    for label, records in records_by_label.items():
        alpha = records[0]["alpha"]
        color = "tab:green" if alpha is None else color_of(alpha)       # DPO has no alpha
        line = ("-", "--", ":", "-.")[colors.count(color) % 4]
        colors.append(color)
        draw_drift(left, "score", records, color, line, label)
        draw_drift(right, "displacement_chosen", records, color, line, label)

    style(left, "score of sampled answers", "KL to the start, nats per token", "judge's mean score")
    style(right, "likelihood displacement", "KL to the start, nats per token",
          "change of the chosen log-prob")
    right.axhline(0, color="grey", linewidth=0.8)
    left.legend(fontsize=8, frameon=False)
    return figure


def draw_drift(panel, metric, records, color, line, label):
    """Draws a metric against KL: a point an evaluation, and a line through the means."""
    panel.scatter(column(records, "kl"), column(records, metric), color=color, s=8, alpha=0.3)

    mean_kls = []
    mean_values = []
    for step in sorted({record["step"] for record in records}):
        same_step = [record for record in records if record["step"] == step]
        mean_kls.append(statistics.mean(column(same_step, "kl")))
        mean_values.append(statistics.mean(column(same_step, metric)))
    panel.plot(mean_kls, mean_values, line, color=color, linewidth=1, label=label)


# --- the command ----------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["shapes", "runs", "drift"])
    parser.add_argument("inputs", nargs="*", help="run folders, or the file of an experiment")
    parser.add_argument("--output", required=True, help="picture file")
    args = parser.parse_args(argv)
    check_output(args.output, *args.inputs)

    # Each picture with the number of inputs that it takes.
    n_inputs = len(args.inputs)
    if args.what == "shapes" and n_inputs == 0:
        figure = shapes()
    elif args.what == "runs" and n_inputs > 0:
        figure = runs(args.inputs)
    elif args.what == "drift" and n_inputs == 1:
        figure = drift(args.inputs[0])
    else:
        parser.error("shapes takes no input, runs one folder or more, drift one file")

    figure.tight_layout()
    with written_whole(args.output) as temporary:
        figure.savefig(temporary, dpi=130)
    print(args.output)


if __name__ == "__main__":
    run_command(main)
