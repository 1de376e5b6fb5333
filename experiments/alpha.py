"""The paper's question: what does alpha do? AlphaPO at eight alphas (0 is SimPO), DPO, controls.

    python -m experiments.alpha tiny            # 20 minutes on 2 cores; continues where it stopped
    python -m experiments.alpha smollm2         # on pairs of SmolLM2's own answers: half an hour
    python -m experiments.alpha tiny --table    # the table in experiments/README.md

Runs are kept in experiments/tiny.jsonl or smollm2.jsonl, a line each. All ways get the same pairs,
steps, beta and target margin. On the embedded tiny model each also gets the same search for a
learning rate, the one whose judged score is highest on a seed that the table does not use, and five
seeds. On SmolLM2 there is time for six ways, one rate and one seed. Each run is
`python train.py configs/RECIPE.toml` with other knobs.
"""
import argparse
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

# The method, alpha and beta of each way; None is the default.
WAYS = {
    "alpha = -1": ("alphapo", -1, None),
    "alpha = -0.25": ("alphapo", -0.25, None),
    "SimPO (alpha = 0)": ("simpo", 0, None),
    "alpha = 0.1": ("alphapo", 0.1, None),
    "alpha = 0.25": ("alphapo", 0.25, None),
    "alpha = 0.5": ("alphapo", 0.5, None),
    "alpha = 1": ("alphapo", 1, None),
    "alpha = 2": ("alphapo", 2, None),
    "DPO (beta = 0.01)": ("dpo", None, None),
    # Controls. SimPO whose reward has the slope of alpha = 1 at the mean log-prob of the start
    # (order.py); DPO on averages; and DPO whose beta is SimPO's over the mean length, 11.9 tokens.
    "SimPO (beta = 2.93)": ("simpo", 0, 2.93),
    "DPO on averages (beta = 2.5)": ("dpo_norm", None, None),
    "DPO (beta = 0.21)": ("dpo", None, 0.21),
}
SIMPO = "SimPO (alpha = 0)"
GAMMA = 0.25        # SimPO's target margin, whatever its beta


@dataclass(frozen=True)
class Study:
    recipe: str                 # of configs/; results go to experiments/ under the same name
    rates: tuple                # learning rates, of which a search chooses if there are several
    search_seeds: tuple
    seeds: tuple
    ways: tuple = tuple(WAYS)

    @property
    def results(self):
        return ROOT / "experiments" / f"{self.recipe}.jsonl"


TINY = Study("tiny", rates=(1e-5, 3e-5, 1e-4), search_seeds=(10,), seeds=(0, 1, 2, 3, 4))
SMOLLM2 = Study(
    "smollm2", rates=(5e-5,), search_seeds=(), seeds=(0,),
    ways=("alpha = -1", "alpha = -0.25", SIMPO, "alpha = 0.25", "alpha = 1", "DPO (beta = 0.01)"))
STUDIES = {study.recipe: study for study in (TINY, SMOLLM2)}


# --- one run --------------------------------------------------------------------------------------

def run(study, label, rate, seed):
    """One run and what came of it, as a dict."""
    # 1. Train, or take the run that is there.
    method, alpha, beta = WAYS[label]
    name = f"{study.recipe}-{method}-{alpha}-{rate:g}-{seed}" + (f"-beta{beta:g}" if beta else "")
    output = ROOT / "runs" / "alpha" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    argv = [
        str(ROOT / "configs" / f"{study.recipe}.toml"), "--method", method,
        "--learning_rate", f"{rate}", "--seed", f"{seed}", "--output", str(output), "--resume"]
    if method == "alphapo":
        argv += ["--alpha", f"{alpha}"]
    if beta:
        argv += ["--beta", f"{beta}"]
    if beta and method == "simpo":
        argv += ["--gamma_beta_ratio", f"{GAMMA / beta}"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{output}: {done.stderr}")

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
    d = drift_of_run(argv, output, seed)
    return {
        "label": label,
        "method": method,
        "alpha": alpha,
        "learning_rate": rate,
        "seed": seed,
        "score_before": before["eval_judge_score"],
        "tokens_before": before["eval_judge_tokens"],
        "score": after["eval_judge_score"],
        "score_stderr": after["eval_judge_stderr"],
        "accuracy": after["eval_rewards/accuracies"],
        "reward_margin": after["eval_rewards/margins"],
        "logp_margin": after["eval_logps/margins"],
        "displacement_chosen": after["eval_displacement/chosen"],
        "fell": after["eval_displacement/fell"],
        "displacement_rejected": after["eval_displacement/rejected"],
        "answer_tokens": after["eval_judge_tokens"],
        "clipped": statistics.mean(clipped),
        "kl": d["kl"],
        "kl_stderr": d["kl_stderr"],
    }


def drift_of_run(argv, output, seed):
    """The drift (drift.py) of the model that a run saved, on the prompts of its judge."""
    torch.set_num_threads(1)            # as many runs as cores go on at once
    config = parse_config(argv)
    (folder,) = output.glob("step-*")
    prompts = [prompt_turns(row, "prompt") for _, row in read_jsonl(config.judge_prompts)]
    return drift(
        load_fast(folder), load_fast(config.model), load_chat(folder), prompts,
        seed=seed, max_new_tokens=config.max_new_tokens, batch_size=64)


# --- all runs -------------------------------------------------------------------------------------

def run_all(study, rows, jobs):
    """Runs the jobs (label, rate, seed) that `rows` does not have yet, as many at once as there are
    cores. Adds each to `rows`, and writes them."""
    done = {(r["label"], r["learning_rate"], r["seed"]) for r in rows}
    todo = [job for job in jobs if job not in done]

    def run_job(job):
        return run(study, *job)

    cpu.multiply_by_onednn()            # for the whole process, so before there are threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # each run has one thread
        for row in pool.map(run_job, todo):
            rows.append(row)
            write_records(study.results, rows)
            print(f"{row['label']:18} rate {row['learning_rate']:g} seed {row['seed']}: score "
                  f"{row['score']:.1f}, chosen {row['displacement_chosen']:+.3f}, "
                  f"KL {row['kl']:.4f}", flush=True)


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

def finished(study, rows):
    """The ways of a study that have all their runs."""
    found = {(r["label"], r["learning_rate"], r["seed"]) for r in rows}
    ways = []
    for label in study.ways:
        jobs = {(label, rate, seed) for rate in study.rates for seed in study.search_seeds}
        if jobs <= found:
            jobs |= {(label, best_rate(study, rows, label), seed) for seed in study.seeds}
        if jobs <= found:
            ways.append(label)
    return ways


def table(study, rows):
    """Markdown, a line for each way that has all its runs."""
    if len(study.seeds) == 1:
        return table_of_a_seed(rows)
    return f"{table_of_seeds(study, rows)}\n\n{paired_table(study, rows)}"


def paired_table(study, rows):
    """Differences to SimPO on the same seed: their mean and its standard error, bold beyond two."""
    metrics = {"score": (1, 1), "accuracy": (100, 1), "displacement_chosen": (1, 4), "kl": (1, 4)}
    of_seeds = {(r["label"], r["seed"]): r for r in rows if r["seed"] in study.seeds}
    lines = [
        "| less SimPO, seed by seed | learning rate | judged score | accuracy, points "
        "| chosen moved by | KL, nats a token |",
        "|---" * 6 + "|"]
    for label in finished(study, rows):
        if label == SIMPO:
            continue
        cells = [f"{of_seeds[label, study.seeds[0]]['learning_rate']:g}"]
        for metric, (unit, digits) in metrics.items():
            differences = []
            for seed in study.seeds:
                mine, simpo = of_seeds[label, seed], of_seeds[SIMPO, seed]
                differences.append(unit * (mine[metric] - simpo[metric]))
            cells.append(cell(*mean_and_error(differences), digits))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_error(values):
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def cell(mean, error, digits=1):
    """Bold beyond two standard errors."""
    text = f"{mean:+.{digits}f} +- {error:.{digits}f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def table_of_a_seed(rows):
    """Standard errors are over answers."""
    lines = [
        "| | judged score | accuracy | chosen moved by | rejected moved by | chosen fell "
        "| KL, nats a token | tokens an answer |",
        "|---" * 8 + "|",
        f"| before | {rows[0]['score_before']:.1f} | | | | | | {rows[0]['tokens_before']:.0f} |"]
    order = list(WAYS)
    for r in sorted(rows, key=lambda r: order.index(r["label"])):
        lines.append(
            f"| {r['label']} | {r['score']:.1f} +- {r['score_stderr']:.1f} | {r['accuracy']:.3f} "
            f"| {r['displacement_chosen']:+.3f} | {r['displacement_rejected']:+.3f} "
            f"| {r['fell']:.0%} | {r['kl']:.4f} +- {r['kl_stderr']:.4f} "
            f"| {r['answer_tokens']:.0f} |")
    return "\n".join(lines)


def table_of_seeds(study, rows):
    """Mean and standard deviation over the seeds; and one run of the search at its highest rate."""
    pushed_rate = study.rates[-1]
    pushed_seed = study.search_seeds[0]
    lines = [
        "| | learning rate | judged score | accuracy | chosen moved by | chosen fell "
        "| KL, nats a token | tokens an answer "
        f"| pushed, rate {pushed_rate:g} on seed {pushed_seed}: score | chosen moved by | KL |",
        "|---" * 11 + "|"]
    for label in finished(study, rows):
        runs = [r for r in rows if r["label"] == label]
        of_seeds = [r for r in runs if r["seed"] in study.seeds]
        (pushed,) = [r for r in runs
                     if r["seed"] == pushed_seed and r["learning_rate"] == pushed_rate]

        def mean(metric):
            return statistics.mean(r[metric] for r in of_seeds)

        def spread(metric):
            return statistics.stdev(r[metric] for r in of_seeds)

        lines.append(
            f"| {label} | {of_seeds[0]['learning_rate']:g} "
            f"| {mean('score'):.1f} +- {spread('score'):.1f} "
            f"| {mean('accuracy'):.3f} +- {spread('accuracy'):.3f} "
            f"| {mean('displacement_chosen'):+.3f} +- {spread('displacement_chosen'):.3f} "
            f"| {mean('fell'):.0%} | {mean('kl'):.3f} +- {spread('kl'):.3f} "
            f"| {mean('answer_tokens'):.1f} "
            f"| {pushed['score']:.1f} | {pushed['displacement_chosen']:+.3f} "
            f"| {pushed['kl']:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    study = STUDIES[args.study]
    rows = []
    if study.results.exists():
        rows = [row for _, row in read_jsonl(study.results)]
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
