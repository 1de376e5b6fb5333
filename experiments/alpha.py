"""The paper's question: what does alpha do? AlphaPO at eight alphas (0 is SimPO), DPO, controls.

    python -m experiments.alpha tiny            # half an hour on 2 cores; continues if stopped
    python -m experiments.alpha smollm2         # on SmolLM2's own answers: 15 minutes a run
    python -m experiments.alpha tiny --table    # the tables in experiments/README.md

Runs are kept in experiments/tiny.jsonl or smollm2.jsonl, a line each. All ways get the same pairs,
steps and target margin. On the embedded tiny model each also gets the same search for a learning
rate, the one whose judged score is highest on a seed that the table does not use. On SmolLM2 there
is time for four ways at one rate. Each run is `python train.py configs/RECIPE.toml` with other
knobs.
"""
import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import cpu
from command import run_command
from data.dialogues import prompt_turns
from data.files import read_jsonl, write_records
from experiments.drift import drift, load_fast
from tokenizer import load_chat
from train import parse_config

ROOT = Path(__file__).resolve().parent.parent

SIMPO = "SimPO (alpha = 0)"
# SimPO whose reward has the slope of alpha = 1 at the mean log-prob of all pairs before training,
# -0.16 and -1.84 (order.py says why).
TINY_MATCHED = "SimPO (beta = 2.93)"
SMOLLM2_MATCHED = "SimPO (beta = 15.76)"

# The method, alpha and beta of each way; None is the default.
WAYS = {
    "alpha = -1": ("alphapo", -1, None),
    "alpha = -0.25": ("alphapo", -0.25, None),
    SIMPO: ("simpo", 0, None),
    "alpha = 0.1": ("alphapo", 0.1, None),
    "alpha = 0.25": ("alphapo", 0.25, None),
    "alpha = 0.5": ("alphapo", 0.5, None),
    "alpha = 1": ("alphapo", 1, None),
    "alpha = 2": ("alphapo", 2, None),
    "DPO (beta = 0.01)": ("dpo", None, None),
    # Controls: a larger beta; DPO on averages; DPO with SimPO's beta over the mean length, 11.9.
    TINY_MATCHED: ("simpo", 0, 2.93),
    SMOLLM2_MATCHED: ("simpo", 0, 15.76),
    "DPO on averages (beta = 2.5)": ("dpo_norm", None, None),
    "DPO (beta = 0.21)": ("dpo", None, 0.21),
}
GAMMA = 0.25        # SimPO's target margin, whatever its beta


@dataclass(frozen=True)
class Study:
    recipe: str                 # of configs/; results go to experiments/ under the same name
    rates: tuple                # learning rates, of which a search chooses if there are several
    search_seeds: tuple
    seeds: tuple
    ways: tuple
    contrasts: tuple            # pairs of ways of which the table has the difference, beside SimPO
    digits: int                 # of displacements and KL in the table of differences

    @property
    def results(self):
        return ROOT / "experiments" / f"{self.recipe}.jsonl"


TINY = Study(
    "tiny", rates=(1e-5, 3e-5, 1e-4), search_seeds=(10,), seeds=(0, 1, 2, 3, 4),
    ways=tuple(way for way in WAYS if way != SMOLLM2_MATCHED), digits=4,
    contrasts=(("alpha = 1", TINY_MATCHED), ("DPO on averages (beta = 2.5)", "DPO (beta = 0.21)")))
SMOLLM2 = Study(
    "smollm2", rates=(5e-5,), search_seeds=(), seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    ways=(SIMPO, "alpha = 0.25", "alpha = 1", SMOLLM2_MATCHED), digits=3,
    contrasts=(("alpha = 1", SMOLLM2_MATCHED),))
STUDIES = {study.recipe: study for study in (TINY, SMOLLM2)}


# --- one run --------------------------------------------------------------------------------------

def train_way(study, label, rate, seed, output, *flags):
    """Trains one way from the start, on one core. Returns the words of the command."""
    method, alpha, beta = WAYS[label]
    argv = [
        str(ROOT / "configs" / f"{study.recipe}.toml"), "--method", method,
        "--learning_rate", f"{rate}", "--seed", f"{seed}", "--output", str(output), *flags]
    if method == "alphapo":
        argv += ["--alpha", f"{alpha}"]
    if beta:
        argv += ["--beta", f"{beta}"]
    if beta and method == "simpo":
        argv += ["--gamma_beta_ratio", f"{GAMMA / beta}"]
    shutil.rmtree(output, ignore_errors=True)       # of a run that was cut off
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{output}: {done.stderr}")
    return argv


def run(study, label, rate, seed):
    """One run and what came of it, as a dict."""
    # 1. Train.
    method, alpha, _ = WAYS[label]
    output = ROOT / "runs" / "alpha" / f"{study.recipe}-{label}-{rate:g}-{seed}".replace(" ", "")
    argv = train_way(study, label, rate, seed, output)
    (saved,) = output.glob("step-*")

    # 2. What it measured before and after.
    evaluations = []
    clipped = []            # of each step, 0 or 1
    for _, line in read_jsonl(output / "metrics.jsonl"):
        if "eval_judge_score" in line:
            evaluations.append(line)
        else:
            clipped.append(line["clipped"])
    before = evaluations[0]
    after = evaluations[-1]
    d = drift_of_run(argv, saved, seed)
    shutil.rmtree(output)           # with weights and optimiser: 1.6 GB of SmolLM2's
    return {
        "label": label,
        "method": method,
        "alpha": alpha,
        "learning_rate": rate,
        "seed": seed,
        "logp_before": (before["eval_logps/chosen"] + before["eval_logps/rejected"]) / 2,
        "score_before": before["eval_judge_score"],
        "tokens_before": before["eval_judge_tokens"],
        "score": after["eval_judge_score"],
        "score_stderr": after["eval_judge_stderr"],
        "accuracy": after["eval_rewards/accuracies"],
        "reward_margin": after["eval_rewards/margins"],
        "logp_margin": after["eval_logps/margins"],
        "displacement_chosen": after["eval_displacement/chosen"],
        "right": after["eval_displacement/right"],
        "displacement_right": after["eval_displacement/chosen_right"],
        "displacement_wrong": after["eval_displacement/chosen_wrong"],
        "fell": after["eval_displacement/fell"],
        "displacement_rejected": after["eval_displacement/rejected"],
        "answer_tokens": after["eval_judge_tokens"],
        "clipped": statistics.mean(clipped),
        "kl": d["kl"],
        "kl_stderr": d["kl_stderr"],
    }


def drift_of_run(argv, saved, seed):
    """The drift (drift.py) of a model that a run saved, on the prompts of its judge."""
    torch.set_num_threads(1)            # as many runs as cores go on at once
    config = parse_config(argv)
    prompts = [prompt_turns(row, "prompt") for _, row in read_jsonl(config.judge_prompts)]
    return drift(
        load_fast(saved), load_fast(config.model), load_chat(saved), prompts,
        seed=seed, max_new_tokens=config.max_new_tokens, batch_size=64)


# --- all runs -------------------------------------------------------------------------------------

def run_all(study, rows, jobs):
    """Runs the jobs (label, rate, seed) that `rows` does not have yet. Adds each to `rows`, and
    writes them."""
    done = {(r["label"], r["learning_rate"], r["seed"]) for r in rows}
    todo = [job for job in jobs if job not in done]
    for row in at_once(partial(run, study), todo):
        rows.append(row)
        rows.sort(key=lambda r: (study.ways.index(r["label"]), r["learning_rate"], r["seed"]))
        write_records(study.results, rows)
        print(f"{row['label']:18} rate {row['learning_rate']:g} seed {row['seed']}: score "
              f"{row['score']:.1f}, chosen {row['displacement_chosen']:+.3f}, "
              f"KL {row['kl']:.4f}", flush=True)


def at_once(run, jobs):
    """Yields run(*job) of each job as it ends. As many as there are cores go on at once."""
    cpu.multiply_by_onednn()            # for the whole process, so before there are threads
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for ended in as_completed([pool.submit(run, *job) for job in jobs]):
            yield ended.result()
    finally:
        pool.shutdown(cancel_futures=True)          # those that have not begun


def best_rate(study, rows, label):
    """The learning rate of the search with the highest mean score."""
    if not study.search_seeds:
        return study.rates[0]

    def mean_score(rate):
        return statistics.mean(
            r["score"] for r in rows
            if r["label"] == label and r["learning_rate"] == rate
            and r["seed"] in study.search_seeds)

    return max(study.rates, key=mean_score)


# --- tables ---------------------------------------------------------------------------------------

def paired_seeds(study, rows):
    """The seeds that every way has, at the rate of its search: hours of runs are looked at before
    they are all there."""
    found = {(r["label"], r["learning_rate"], r["seed"]) for r in rows}
    search = {(label, rate, seed) for label in study.ways for rate in study.rates
              for seed in study.search_seeds}
    return [seed for seed in study.seeds if search <= found and all(
        (label, best_rate(study, rows, label), seed) in found for label in study.ways)]


def runs_of(study, rows, label):
    """The runs of a way that the tables are made of, one a seed."""
    rate = best_rate(study, rows, label)
    of_seeds = {r["seed"]: r for r in rows if (r["label"], r["learning_rate"]) == (label, rate)}
    return [of_seeds[seed] for seed in paired_seeds(study, rows)]


def table(study, rows):
    """Markdown: what each way did, and its differences to SimPO."""
    seeds = paired_seeds(study, rows)
    if len(seeds) < 2:
        return f"{len(seeds)} seeds have runs of all ways; a table needs 2 or more"
    return f"{table_of_ways(study, rows)}\n\n{paired_table(study, rows)}"


def paired_table(study, rows):
    """Differences on the same seed, to SimPO and of the study's contrasts: their mean and its
    standard error, bold beyond two."""
    metrics = {                             # of a run: a unit in the table, and its digits
        "score": (1, 1),
        "accuracy": (0.01, 1),
        "displacement_chosen": (1, study.digits),
        "displacement_right": (1, study.digits),
        "displacement_wrong": (1, study.digits),
        "kl": (1, study.digits),
    }
    lines = [
        f"| differences on {len(paired_seeds(study, rows))} seeds | judged score "
        "| accuracy, points | chosen log-prob moved by | in right pairs | in wrong pairs "
        "| KL, nats a token |",
        "|---" * 7 + "|"]
    comparisons = [(label, SIMPO) for label in study.ways if label != SIMPO]
    for label, base in (*comparisons, *study.contrasts):
        cells = []
        for metric, (unit, digits) in metrics.items():
            pairs = zip(runs_of(study, rows, label), runs_of(study, rows, base))
            differences = [(mine[metric] - other[metric]) / unit for mine, other in pairs]
            cells.append(cell(*mean_and_error(differences), digits))
        lines.append(f"| {label} - {base.removesuffix(' (alpha = 0)')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_error(values):
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def cell(mean, error, digits=1):
    """Bold beyond two standard errors."""
    text = f"{mean:+.{digits}f} +- {error:.{digits}f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def table_of_ways(study, rows):
    """Mean and standard deviation over the seeds; and, where a rate was searched for, one run of
    the search at its highest rate."""
    heads = ["", "learning rate", "judged score, 0 to 100", "held-out accuracy",
             "held-out chosen log-prob moved by", "it fell in", "KL, nats a token",
             "tokens an answer", "clipped steps"]
    if study.search_seeds:
        pushed = (study.rates[-1], study.search_seeds[0])
        heads += [f"at {pushed[0]:g} on the search's seed: score", "chosen moved by", "KL"]
    start = runs_of(study, rows, SIMPO)
    before = {metric: statistics.mean(r[metric] for r in start)
              for metric in ("score_before", "tokens_before")}
    lines = [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        f"| before | | {before['score_before']:.1f} | | | | | {before['tokens_before']:.1f} "
        + "| " * (len(heads) - 8) + "|"]
    for label in study.ways:
        runs = runs_of(study, rows, label)

        def mean(metric):
            return statistics.mean(r[metric] for r in runs)

        def spread(metric, digits):
            return (f"{mean(metric):.{digits}f} +- "
                    f"{statistics.stdev(r[metric] for r in runs):.{digits}f}")

        cells = [
            label, f"{runs[0]['learning_rate']:g}", spread("score", 1), spread("accuracy", 3),
            "+" * (mean("displacement_chosen") > 0) + spread("displacement_chosen", 3),
            f"{mean('fell'):.0%}", spread("kl", 3), f"{mean('answer_tokens'):.1f}",
            f"{mean('clipped'):.0%}"]
        if study.search_seeds:
            (r,) = [r for r in rows
                    if (r["label"], r["learning_rate"], r["seed"]) == (label, *pushed)]
            cells += [f"{r['score']:.1f}", f"{r['displacement_chosen']:+.3f}", f"{r['kl']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    study = STUDIES[args.study]
    rows = []
    if study.results.exists():
        rows = [row for _, row in read_jsonl(study.results)]
    others = {row["label"] for row in rows} - set(study.ways)
    if others:
        raise ValueError(f"{study.results}: runs of {', '.join(sorted(others))}; expected those of "
                         f"{', '.join(study.ways)}. Move the file away")
    if not args.table:
        write_records(study.results, rows)      # that it can be written is known before the runs
        # 1. The search.
        jobs = []
        for label in study.ways:
            for rate in study.rates:
                jobs += [(label, rate, seed) for seed in study.search_seeds]
        run_all(study, rows, jobs)
        # 2. The seeds, at the rate that it found.
        jobs = []
        for seed in study.seeds:
            jobs += [(label, best_rate(study, rows, label), seed) for label in study.ways]
        run_all(study, rows, jobs)
    print(table(study, rows))


if __name__ == "__main__":
    run_command(main)
