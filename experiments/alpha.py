"""The paper's question: what does alpha do? AlphaPO at seven alphas (0 is SimPO), and DPO.

    python experiments/alpha.py tiny            # 20 minutes on 2 cores; goes on where it was; writes experiments/tiny.jsonl
    python experiments/alpha.py smollm2         # on the pairs of README's whole loop: half an hour
    python experiments/alpha.py tiny --table    # the README's table from that file

Every way gets the same pairs, steps, beta and target margin. On the embedded tiny model each also gets the same search for a
learning rate, the one whose judged score is highest on a seed that the table does not use, and five seeds; on SmolLM2 there is
time for six of them, one rate and one seed. Each run is `python train.py configs/RECIPE.toml` with other knobs.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.dialogues import prompt_turns
from data.files import read_jsonl, write_rows

WAYS = {f"alpha = {a:g}": ("alphapo", a) for a in (-1, -0.25)} | {"SimPO (alpha = 0)": ("simpo", 0)} \
    | {f"alpha = {a:g}": ("alphapo", a) for a in (0.1, 0.25, 0.5, 1)} | {"DPO (beta = 0.01)": ("dpo", None)}


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
SMOLLM2 = Study("smollm2", rates=(5e-5,), search_seeds=(), seeds=(0,),
                ways=tuple(way for way in WAYS if way not in ("alpha = 0.1", "alpha = 0.5")))


def run(study, label, rate, seed):
    """One run and what came of it, as a dict."""
    import torch

    from drift import drift
    from model import load_model
    from tokenizer import load_chat_format, load_tokenizer
    from train import parse_config
    method, alpha = WAYS[label]
    output = ROOT / "runs" / "alpha" / f"{study.recipe}-{method}-{alpha}-{rate:g}-{seed}"
    knobs = ["--method", method, "--learning_rate", f"{rate}", "--seed", f"{seed}", "--output", str(output), "--resume"]
    knobs += ["--alpha", f"{alpha}"] if method == "alphapo" else []
    output.parent.mkdir(parents=True, exist_ok=True)
    argv = [str(ROOT / "configs" / f"{study.recipe}.toml"), *knobs]
    done = subprocess.run([sys.executable, ROOT / "train.py", *argv],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{output}: {done.stderr}")
    lines = [line for _, line in read_jsonl(output / "metrics.jsonl")]
    before, *_, after = [line for line in lines if "eval_judge_score" in line]
    (folder,) = output.glob("step-*")
    config = parse_config(argv)
    chat = load_chat_format(folder, load_tokenizer(folder))
    prompts = [prompt_turns(row, "prompt") for _, row in read_jsonl(config.judge_prompts)]
    torch.set_num_threads(1)
    d = drift(load_model(folder), load_model(config.model), chat, prompts, seed=seed, max_new_tokens=config.max_new_tokens,
              batch_size=64)
    return {"label": label, "method": method, "alpha": alpha, "learning_rate": rate, "seed": seed,
            "score_before": before["eval_judge_score"], "tokens_before": before["eval_judge_tokens"],
            "score": after["eval_judge_score"], "score_stderr": after["eval_judge_stderr"], "accuracy": after["eval_rewards/accuracies"],
            "reward_margin": after["eval_rewards/margins"], "logp_margin": after["eval_logps/margins"],
            "displacement_chosen": after["eval_displacement/chosen"], "fell": after["eval_displacement/fell"],
            "displacement_rejected": after["eval_displacement/rejected"], "answer_tokens": after["eval_judge_tokens"],
            "kl": d["kl"], "kl_stderr": d["kl_stderr"]}


def best_rate(study, rows, label):
    """The learning rate of the search with the highest mean score."""
    scores = {rate: [r["score"] for r in rows if r["label"] == label and r["learning_rate"] == rate
                     and r["seed"] in study.search_seeds] for rate in study.rates}
    return max(scores, key=lambda rate: statistics.mean(scores[rate])) if study.search_seeds else study.rates[0]


def table(study, rows):
    """Markdown, a line a way."""
    return table_of_seeds(study, rows) if len(study.seeds) > 1 else table_of_a_seed(rows)


def table_of_a_seed(rows):
    """Standard errors are over answers."""
    lines = ["| | judged score | accuracy | chosen moved by | rejected moved by | chosen fell | KL, nats a token | tokens an answer |",
             "|---" * 8 + "|",
             "| before | {:.1f} | | | | | | {:.0f} |".format(rows[0]["score_before"], rows[0]["tokens_before"])]
    for r in sorted(rows, key=lambda r: list(WAYS).index(r["label"])):
        lines.append("| {label} | {score:.1f} +- {score_stderr:.1f} | {accuracy:.3f} | {displacement_chosen:+.3f} | "
                     "{displacement_rejected:+.3f} | {fell:.0%} | {kl:.4f} +- {kl_stderr:.4f} | {answer_tokens:.0f} |".format(**r))
    return "\n".join(lines)


def table_of_seeds(study, rows):
    """Mean and standard deviation over the seeds; and one run of the search at its highest rate."""
    pushed = f"pushed, rate {study.rates[-1]:g} on seed {study.search_seeds[0]}"
    lines = ["| | learning rate | judged score | accuracy | chosen moved by | chosen fell | KL, nats a token | tokens an answer "
             f"| {pushed}: score | chosen moved by | KL |", "|---" * 11 + "|"]
    for label in study.ways:
        mine = [r for r in rows if r["label"] == label]
        some = [r for r in mine if r["seed"] in study.seeds]
        (far,) = (r for r in mine if r["seed"] == study.search_seeds[0] and r["learning_rate"] == study.rates[-1])
        of = lambda metric: (statistics.mean(r[metric] for r in some), statistics.stdev(r[metric] for r in some))
        lines.append("| {} | {:g} | {:.1f} +- {:.1f} | {:.3f} +- {:.3f} | {:+.3f} +- {:.3f} | {:.0%} | {:.3f} +- {:.3f} | {:.1f} "
                     "| {:.1f} | {:+.3f} | {:.2f} |"
                     .format(label, some[0]["learning_rate"], *of("score"), *of("accuracy"), *of("displacement_chosen"),
                             of("fell")[0], *of("kl"), of("answer_tokens")[0], far["score"], far["displacement_chosen"],
                             far["kl"]))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=["tiny", "smollm2"])
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    study = {"tiny": TINY, "smollm2": SMOLLM2}[args.study]
    rows = [row for _, row in read_jsonl(study.results)] if study.results.exists() else []

    def run_all(jobs):
        done = {(r["label"], r["learning_rate"], r["seed"]) for r in rows}
        with ThreadPoolExecutor(os.cpu_count()) as pool:     # each run has one thread
            for row in pool.map(lambda job: run(study, *job), [job for job in jobs if job not in done]):
                rows.append(row)
                write_rows(study.results, rows)
                print(f"{row['label']:18} rate {row['learning_rate']:g} seed {row['seed']}: score {row['score']:.1f}, chosen "
                      f"{row['displacement_chosen']:+.3f}, KL {row['kl']:.4f}", flush=True)

    if not args.table:
        run_all([(label, rate, seed) for label in study.ways for rate in study.rates for seed in study.search_seeds])
        run_all([(label, best_rate(study, rows, label), seed) for seed in study.seeds for label in study.ways])
    print(table(study, rows))


if __name__ == "__main__":
    main()
