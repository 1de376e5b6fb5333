"""The embedded default: its judge, its data, and that they belong together.

    pytest tests/test_tiny.py
"""
import json
from pathlib import Path

import pytest

from data.tiny import judge

TINY = Path(judge.__file__).parent


def lines(name):
    return [json.loads(line) for line in (TINY / name).read_text().splitlines()]


@pytest.mark.parametrize("answer, points", [
    ("ant, bee, cow, dog.", 100), ("ant, bee, cow, dog", 100), ("dog, cow, bee, ant.", 0),
    ("ant, bee, dog, cow.", 50),
    ("ant, bee, cow.", 75), ("ant, bee, cow, dog, dog.", 80), ("", 0), ("bee, cow, dog.", 0)])
def test_the_judge_counts_right_places(answer, points):
    assert judge.score([{"role": "user", "content": "Sort: dog, bee, ant, cow"}], answer) == points


def test_the_committed_scores_are_the_judges_and_training_prompts_are_not_held_out():
    pairs = lines("pairs.jsonl")
    for row in pairs:
        turns = [{"role": "user", "content": row["prompt"]}]
        scores = [round(judge.score(turns, a), 1) for a in row["all_generated_responses"]]
        assert row["all_rm_scores"] == scores
        assert len(row["all_rm_scores"]) == 5
    held_out = {row["prompt"] for row in lines("prompts.jsonl")}
    assert len(held_out) == 256 and len(pairs) == 2048
    assert not held_out & {row["prompt"] for row in pairs}


def test_the_folder_stays_small():
    files = [f for f in TINY.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 4e6
