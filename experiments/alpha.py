"""The paper's question on the embedded tiny model: what does alpha do? AlphaPO at seven alphas (0 is SimPO), and DPO.

    python experiments/alpha.py                 # 20 minutes on 2 cores; goes on where it was; writes experiments/tiny.jsonl
    python experiments/alpha.py --table         # the README's table from that file

Every way gets the same pairs, steps, beta, target margin and learning-rate search: the rate whose judged score is highest on
a seed that the table does not use. Each run is `python train.py configs/tiny.toml` with other knobs; five seeds.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.preference import read_jsonl

RESULTS, RUNS = ROOT / "experiments" / "tiny.jsonl", ROOT / "runs" / "alpha"
WAYS = {f"alpha = {a:g}": ("alphapo", a) for a in (-1, -0.25)} | {"SimPO (alpha = 0)": ("simpo", 0)} \
    | {f"alpha = {a:g}": ("alphapo", a) for a in (0.1, 0.25, 0.5, 1)} | {"DPO (beta = 0.01)": ("dpo", None)}
RATES, SEARCH_SEEDS, SEEDS = (1e-5, 3e-5, 1e-4), (10,), (0, 1, 2, 3, 4)


def run(label, rate, seed):
    """One run and what came of it, as a dict."""
    import torch

    from drift import drift
    from model import load_model
    from tokenizer import load_chat_format, load_tokenizer
    method, alpha = WAYS[label]
    output = RUNS / f"{method}-{alpha}-{rate:g}-{seed}"
    knobs = ["--method", method, "--learning_rate", f"{rate}", "--seed", f"{seed}", "--output", str(output), "--resume"]
    knobs += ["--alpha", f"{alpha}"] if method == "alphapo" else []
    output.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, ROOT / "train.py", ROOT / "configs" / "tiny.toml", *knobs],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{output}: {done.stderr}")
    lines = [line for _, line in read_jsonl(output / "metrics.jsonl")]
    before, after = [line for line in lines if "eval_judge_score" in line]
    (folder,) = output.glob("step-*")
    start = load_model(ROOT / "data" / "tiny" / "model")
    chat = load_chat_format(folder, load_tokenizer(folder))
    prompts = [row["prompt"] for _, row in read_jsonl(ROOT / "data" / "tiny" / "prompts.jsonl")]
    torch.set_num_threads(1)
    d = drift(load_model(folder), start, chat, prompts, seed=seed, max_new_tokens=40, batch_size=64)
    return {"label": label, "method": method, "alpha": alpha, "learning_rate": rate, "seed": seed,
            "score_before": before["eval_judge_score"], "score": after["eval_judge_score"],
            "score_stderr": after["eval_judge_stderr"], "accuracy": after["eval_rewards/accuracies"],
            "reward_margin": after["eval_rewards/margins"], "logp_margin": after["eval_logps/margins"],
            "displacement_chosen": after["eval_displacement/chosen"], "fell": after["eval_displacement/fell"],
            "displacement_rejected": after["eval_displacement/rejected"], "answer_tokens": after["eval_judge_tokens"],
            "kl": d["kl"], "kl_stderr": d["kl_stderr"]}


def best_rate(rows, label):
    """The learning rate of the search with the highest mean score. rows: of the search."""
    scores = {rate: [r["score"] for r in rows if r["label"] == label and r["learning_rate"] == rate] for rate in RATES}
    return max(RATES, key=lambda rate: statistics.mean(scores[rate]))


def table(rows):
    """Markdown: a line a way, mean and standard deviation over the seeds; and one run of the search at its highest rate."""
    pushed = f"pushed, rate {RATES[-1]:g} on seed {SEARCH_SEEDS[0]}"
    lines = ["| | learning rate | judged score | accuracy | chosen moved by | chosen fell | KL, nats a token | tokens an answer "
             f"| {pushed}: score | chosen moved by | KL |", "|---" * 11 + "|"]
    for label in WAYS:
        mine = [r for r in rows if r["label"] == label]
        some = [r for r in mine if r["seed"] in SEEDS]
        (far,) = (r for r in mine if r["seed"] == SEARCH_SEEDS[0] and r["learning_rate"] == RATES[-1])
        of = lambda metric: (statistics.mean(r[metric] for r in some), statistics.stdev(r[metric] for r in some))
        lines.append("| {} | {:g} | {:.1f} +- {:.1f} | {:.3f} +- {:.3f} | {:+.3f} +- {:.3f} | {:.0%} | {:.3f} +- {:.3f} | {:.1f} "
                     "| {:.1f} | {:+.3f} | {:.2f} |"
                     .format(label, some[0]["learning_rate"], *of("score"), *of("accuracy"), *of("displacement_chosen"),
                             of("fell")[0], *of("kl"), of("answer_tokens")[0], far["score"], far["displacement_chosen"],
                             far["kl"]))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    rows = [row for _, row in read_jsonl(RESULTS)] if RESULTS.exists() else []

    def run_all(jobs):
        done = {(r["label"], r["learning_rate"], r["seed"]) for r in rows}
        with ThreadPoolExecutor(os.cpu_count()) as pool:     # each run has one thread
            for row in pool.map(lambda job: run(*job), [job for job in jobs if job not in done]):
                rows.append(row)
                with open(RESULTS, "a") as f:
                    print(json.dumps(row), file=f)
                print(f"{row['label']:18} rate {row['learning_rate']:g} seed {row['seed']}: score {row['score']:.1f}, chosen "
                      f"{row['displacement_chosen']:+.3f}, KL {row['kl']:.4f}", flush=True)

    if not args.table:
        run_all([(label, rate, seed) for label in WAYS for rate in RATES for seed in SEARCH_SEEDS])
        search = [r for r in rows if r["seed"] in SEARCH_SEEDS]
        run_all([(label, best_rate(search, label), seed) for seed in SEEDS for label in WAYS])
    print(table(rows))


if __name__ == "__main__":
    main()
