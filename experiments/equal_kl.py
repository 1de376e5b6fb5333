"""Ways at equal KL: how good are answers, and how far is the chosen log-prob, once a model has gone
equally far from its start?

    python -m experiments.equal_kl              # 30 runs, 20 minutes on 2 cores; continues
    python -m experiments.equal_kl --table      # the table in experiments/README.md
    python plot.py drift experiments/equal_kl.jsonl --output experiments/drift.png

At equal steps one way has gone further than another, and whatever it does more of may be no more
than that. So each run is measured on its way: every 8 steps the judge's score, the displacement and
the KL to the start (drift.py). Between two measurements they are taken to change in proportion to
KL. The rate is three times the tiny recipe's, which takes every way past the best answers. The ways
share pairs, order and the seeds of their samples, so differences are paired. Results go to
experiments/equal_kl.jsonl, a line a measurement.
"""
import argparse
import shutil

from command import run_command
from data.files import read_jsonl, write_records
from experiments.alpha import (
    ROOT, SIMPO, TINY, TINY_MATCHED, WAYS, at_once, cell, drift_of_run, mean_and_error, train_way)

RESULTS = ROOT / "experiments" / "equal_kl.jsonl"
COMPARED = (SIMPO, "alpha = -1", "alpha = 0.25", "alpha = 1", TINY_MATCHED,
            "DPO on averages (beta = 2.5)")
SEEDS = (0, 1, 2, 3, 4)
RATE = 1e-4
EVERY = 8                       # steps between measurements
KLS = (0.2, 0.4, 0.7)           # nats a token


def run(label, seed):
    """Trains one way; its measurements, as a list of dicts."""
    output = ROOT / "runs" / "equal_kl" / f"{label}-{seed}".replace(" ", "")
    argv = train_way(TINY, label, RATE, seed, output, "--eval_every", f"{EVERY}",
                     "--save_every", f"{EVERY}", "--keep_last", "0")
    measurements = []
    for _, line in read_jsonl(output / "metrics.jsonl"):
        if "eval_judge_score" in line:
            step = line["step"]
            kl = drift_of_run(argv, output / f"step-{step:06d}", seed)["kl"] if step else 0.0
            measurements.append({
                "label": label,
                "alpha": WAYS[label][1],
                "seed": seed,
                "step": step,
                "kl": kl,
                "score": line["eval_judge_score"],
                "displacement_chosen": line["eval_displacement/chosen"],
                "displacement_rejected": line["eval_displacement/rejected"],
                "accuracy": line["eval_rewards/accuracies"],
            })
    shutil.rmtree(output)
    return measurements


def at_kl(measurements, kl, metric):
    """A metric where a run first comes to a KL, on the line between the measurements around it.
    None if it never does."""
    for last, this in zip(measurements, measurements[1:]):
        if this["kl"] >= kl:
            share = (kl - last["kl"]) / (this["kl"] - last["kl"])
            return last[metric] + share * (this[metric] - last[metric])
    return None


def table(rows):
    """Markdown: what SimPO has at each KL, and what the others have less SimPO on the same seed."""
    runs = {}
    for r in rows:
        runs.setdefault((r["label"], r["seed"]), []).append(r)
    seeds = [seed for seed in SEEDS if all((label, seed) in runs for label in COMPARED)]
    if len(seeds) < 2:
        return f"{len(seeds)} seeds have runs of all ways; a table needs 2 or more"
    metrics = {"score": ("score", 1), "displacement_chosen": ("chosen log-prob moved by", 3),
               "displacement_rejected": ("rejected", 3)}
    columns = [(kl, metric) for kl in KLS for metric in metrics]
    lines = [
        f"| at a KL of, {len(seeds)} seeds | "
        + " | ".join(f"{kl:g}: {metrics[metric][0]}" for kl, metric in columns) + " |",
        "|---" * (len(columns) + 1) + "|"]
    for label in COMPARED:
        cells = []
        for kl, metric in columns:
            digits = metrics[metric][1]
            values = [at_kl(runs[label, seed], kl, metric) for seed in seeds]
            if None in values:
                cells.append(f"{values.count(None)} of {len(seeds)} never get there")
                continue
            if label != SIMPO:
                values = [value - at_kl(runs[SIMPO, seed], kl, metric)
                          for value, seed in zip(values, seeds)]
            mean, error = mean_and_error(values)
            cells.append(cell(mean, error, digits) if label != SIMPO else f"{mean:+.{digits}f}")
        name = label if label == SIMPO else f"{label} - SimPO"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args(argv)
    rows = [row for _, row in read_jsonl(RESULTS)] if RESULTS.exists() else []
    if not args.table:
        write_records(RESULTS, rows)            # that it can be written is known before the runs
        found = {(r["label"], r["seed"]) for r in rows}
        todo = [(label, seed) for seed in SEEDS for label in COMPARED
                if (label, seed) not in found]
        for measurements in at_once(run, todo):
            rows += measurements
            rows.sort(key=lambda r: (COMPARED.index(r["label"]), r["seed"], r["step"]))
            write_records(RESULTS, rows)
            last = measurements[-1]
            print(f"{last['label']:28} seed {last['seed']}: KL {last['kl']:.3f}, score "
                  f"{last['score']:.1f}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    run_command(main)
