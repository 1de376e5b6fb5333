"""Turns the published on-policy sets of SimPO's and AlphaPO's papers into JSON Lines that train.py reads.

    pip install datasets                                                        # here alone; not in requirements.txt
    python data/prepare_ultrafeedback.py llama3-ultrafeedback-armorm            # Llama-3-8B-Instruct, scored by ArmoRM
    python data/prepare_ultrafeedback.py llama3-ultrafeedback                   # the same, by PairRM
    python data/prepare_ultrafeedback.py mistral-instruct-ultrafeedback         # Mistral-7B-Instruct-v0.2, by PairRM

Each is fetched from huggingface.co/datasets/princeton-nlp, or read from a folder of its parquet files that is named
instead. Writes train.jsonl and test.jsonl into data/NAME (or --output): the fields of FIELDS as published, 5 answers of
the starting model with their scores, and the pair that was made of them, which is what is trained on.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)     # and not data/, for the project's modules

from data.files import Dropped, write_rows
from data.preference import best_against_worst, parse_row

SETS = ("llama3-ultrafeedback-armorm", "llama3-ultrafeedback", "mistral-instruct-ultrafeedback")
FIELDS = ("prompt_id", "prompt", "all_generated_responses", "all_rm_scores", "chosen", "rejected")


def convert(row):
    """(line to write, whether its published pair is the best answer against the worst) of one row. ValueError if
    malformed: chosen and rejected are lists of turns that begin with the prompt."""
    if missing := [name for name in FIELDS if name not in row]:
        raise ValueError(f"no column {', '.join(missing)}; found {', '.join(row)}")
    row = {name: row[name] for name in FIELDS}
    _, *pair = parse_row(row, as_it_stands=True)        # what train.py would refuse it refuses there
    try:
        _, best, worst = best_against_worst(row, as_it_stands=True)
    except Dropped:
        return row, False
    expected = [row["all_generated_responses"][i] for i in (best, worst)]
    return row, [text.strip() for text in pair] == [text.strip() for text in expected]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help=f"{', '.join(SETS)}, or a folder of parquet files")
    parser.add_argument("--output", help="folder to write into; data/NAME if not given")
    args = parser.parse_args(argv)
    if args.source not in SETS and not Path(args.source).is_dir():
        raise ValueError(f"{args.source}: no such folder; expected one or {', '.join(SETS)}")
    from datasets import load_dataset
    name = f"princeton-nlp/{args.source}" if args.source in SETS else args.source
    splits = load_dataset(name)
    if not {"train", "test"} <= set(splits):
        raise ValueError(f"{name}: found the splits {', '.join(splits)}; expected train and test")
    folder = Path(args.output or ROOT / "data" / Path(args.source).resolve().name)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines, others = [], 0
        for n, row in enumerate(splits[split], 1):
            try:
                line, agrees = convert(row)
            except ValueError as e:
                raise ValueError(f"{name}, {split}, row {n}: {e}") from None
            others += not agrees
            lines.append(line)
        write_rows(folder / f"{split}.jsonl", lines)
        print(f"{folder / split}.jsonl: {len(lines)} lines"
              + (f"; in {others} the pair is not the best answer against the worst by score, and kept as published"
                 if others else ""))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
