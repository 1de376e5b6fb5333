"""The README's tables are those of the committed results. Run: pytest tests/test_readme.py"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "experiments")]

import alpha
import table

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [json.loads(line) for line in (ROOT / "experiments" / "tiny.jsonl").read_text().splitlines()]


def test_the_table_of_speed_is_that_of_the_committed_results():
    assert table.table() in README


def test_the_table_of_alphas_is_that_of_the_committed_runs():
    assert alpha.table(ROWS) in README


def test_every_way_had_the_same_search_and_seeds():
    for label in alpha.WAYS:
        search = {(r["learning_rate"], r["seed"]) for r in ROWS if r["label"] == label and r["seed"] in alpha.SEARCH_SEEDS}
        final = [(r["learning_rate"], r["seed"]) for r in ROWS if r["label"] == label and r["seed"] in alpha.SEEDS]
        assert search == {(rate, seed) for rate in alpha.RATES for seed in alpha.SEARCH_SEEDS}
        best = alpha.best_rate([r for r in ROWS if r["seed"] in alpha.SEARCH_SEEDS], label)
        assert sorted(final) == [(best, seed) for seed in alpha.SEEDS]


def test_the_table_is_of_means_over_the_final_seeds():
    rows = [r | {"score": 10.0 * r["seed"] if r["seed"] < 5 else 1.0} for r in ROWS]
    assert alpha.table(rows).count(" | 20.0 +- 15.8 | ") == len(alpha.WAYS)      # of 0, 10, ..., 40
