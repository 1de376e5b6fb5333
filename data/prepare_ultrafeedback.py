"""Turns the published on-policy sets of SimPO's and AlphaPO's papers into JSON Lines for train.py.

    pip install datasets                # needed here alone, so it is not in requirements.txt
    python -m data.prepare_ultrafeedback llama3-ultrafeedback-armorm
    python -m data.prepare_ultrafeedback llama3-ultrafeedback
    python -m data.prepare_ultrafeedback mistral-instruct-ultrafeedback

Run it from the repository's root. The sets are answers of Llama-3-8B-Instruct, scored by ArmoRM,
then by PairRM, and of Mistral-7B-Instruct-v0.2, scored by PairRM. Each is fetched from
huggingface.co/datasets/princeton-nlp, or read from a folder of its parquet files that is named
instead.

Writes train.jsonl and test.jsonl into data/NAME (or --output), with the columns of FIELDS as they
were published: 5 answers of the starting model with their scores, and the pair that was made of
them. The pair is what train.py trains on.
"""
import argparse
from pathlib import Path

from command import run_command
from data.files import Dropped, check_output, write_records
from data.preference import best_against_worst, parse_record

ROOT = Path(__file__).resolve().parent.parent

# The sets that the papers trained on, and the columns that are kept of them.
SETS = ("llama3-ultrafeedback-armorm", "llama3-ultrafeedback", "mistral-instruct-ultrafeedback")
FIELDS = ("prompt_id", "prompt", "all_generated_responses", "all_rm_scores", "chosen", "rejected")


def convert(record):
    """(line to write, whether its published pair is best against worst) of one record.

    ValueError if the record is malformed: chosen and rejected have to be lists of turns that begin
    with the prompt.
    """
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; found {', '.join(record)}")
    line = {name: record[name] for name in FIELDS}

    # Only the shape of the pair is checked here. Which texts are taken, train.py decides when it
    # reads the file.
    _, chosen, rejected = parse_record(line, as_it_stands=True)
    try:
        _, best, worst = best_against_worst(line, as_it_stands=True)
    except Dropped:
        return line, False      # a tie: which answer is best is not told by the scores

    # The pair repeats two of the answers, at times with other white space around them.
    answers = line["all_generated_responses"]
    is_best = chosen.strip() == answers[best].strip()
    is_worst = rejected.strip() == answers[worst].strip()
    return line, is_best and is_worst


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare_ultrafeedback", description=__doc__.split("\n")[0])
    parser.add_argument("source", help=f"{', '.join(SETS)}, or a folder of parquet files")
    parser.add_argument("--output", help="folder to write into; data/NAME if not given")
    args = parser.parse_args(argv)

    # 1. What to read, and where it goes: known before it is fetched.
    name = args.source      # of the data set, or of the folder
    if args.source in SETS:
        name = f"princeton-nlp/{args.source}"
    elif not Path(args.source).is_dir():
        raise ValueError(f"{args.source}: no such folder; expected one or {', '.join(SETS)}")
    # A folder of parquet files is called by its own name in data/ too.
    folder = Path(args.output or ROOT / "data" / Path(args.source).resolve().name)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        check_output(folder / f"{split}.jsonl")

    # 2. Fetch the set, or read it from a folder.
    from datasets import load_dataset       # here, so that --help works without it
    splits = load_dataset(name)
    if "train" not in splits or "test" not in splits:
        raise ValueError(f"{name}: found the splits {', '.join(splits)}; expected train and test")

    # 3. Write both splits. Where scores would make another pair, that is counted and told.
    for split in ("train", "test"):
        lines = []
        n_differing = 0
        for number, record in enumerate(splits[split], 1):
            try:
                line, agrees = convert(record)
            except ValueError as e:
                raise ValueError(f"{name}, {split}, row {number}: {e}") from None
            lines.append(line)
            if not agrees:
                n_differing += 1
        write_records(folder / f"{split}.jsonl", lines)

        note = ""
        if n_differing:
            note = (f"; in {n_differing} the pair is not the best answer against the worst by "
                    "score, and kept as published")
        print(f"{folder / split}.jsonl: {len(lines)} lines{note}")


if __name__ == "__main__":
    run_command(main)
