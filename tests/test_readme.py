"""The README's tables are those of the committed results. Run: pytest tests/test_readme.py"""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "experiments")]

import alpha
import table

README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDIES = {study: [json.loads(line) for line in study.results.read_text().splitlines()]
           for study in (alpha.TINY, alpha.SMOLLM2)}
ROWS = STUDIES[alpha.TINY]


def test_the_table_of_speed_is_that_of_the_committed_results():
    assert table.table() in README


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.recipe)
def test_the_tables_of_alphas_are_those_of_the_committed_runs(study):
    assert alpha.table(study, STUDIES[study]) in README


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.recipe)
def test_every_way_had_the_same_search_and_seeds(study):
    for label in study.ways:
        mine = [r for r in STUDIES[study] if r["label"] == label]
        search = {(r["learning_rate"], r["seed"]) for r in mine if r["seed"] in study.search_seeds}
        final = [(r["learning_rate"], r["seed"]) for r in mine if r["seed"] in study.seeds]
        assert search == {(rate, seed) for rate in study.rates for seed in study.search_seeds}
        assert sorted(final) == [(alpha.best_rate(study, STUDIES[study], label), seed) for seed in study.seeds]


def test_the_table_is_of_means_over_the_final_seeds():
    rows = [r | {"score": 10.0 * r["seed"] if r["seed"] < 5 else 1.0} for r in ROWS]
    assert alpha.table(alpha.TINY, rows).count(" | 20.0 +- 15.8 | ") == len(alpha.WAYS)      # of 0, 10, ..., 40
