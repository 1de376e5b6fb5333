"""Pairs of scored answers, and the published sets. Run: pytest tests/test_pairs.py"""
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import prepare_ultrafeedback
from data.files import Dropped, read_jsonl
from data.pairs import main, make_pair
from data.preference import parse_record

ROW = {"prompt": "q", "all_generated_responses": ["mid", "low", "high"],
       "all_rm_scores": [2.0, 1.0, 4.0]}
# Means 3, 2, 4 and standard deviations 0, 1, 3: less one deviation 3, 1, 1; less two 3, 0, -2.
TWO = ROW | {"all_rm_scores": [3.0, 2.0, 4.0], "all_scorer_scores": [[3, 1, 7], [3, 3, 1]]}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def run(tmp_path, *rows, **options):
    """The pairs that the command writes."""
    argv = ["--input", write(tmp_path / "scored.jsonl", *rows), "--output",
            str(tmp_path / "pairs.jsonl")]
    main(argv + [word for name, value in options.items() for word in (f"--{name}", str(value))])
    return [row for _, row in read_jsonl(tmp_path / "pairs.jsonl")]


def test_the_best_answer_is_set_against_the_worst(tmp_path):
    assert run(tmp_path, ROW) == [
        {"prompt": "q", "chosen": "high", "rejected": "low", "chosen_score": 4.0,
         "rejected_score": 1.0}]


def test_train_reads_the_same_pairs_from_both_files(tmp_path):
    rows = [ROW, ROW | {"prompt": [{"role": "system", "content": "s"},
                                   {"role": "user", "content": "q"}]}, TWO]
    assert [parse_record(row) for row in run(tmp_path, *rows)] == [parse_record(row) for row in rows]


def test_scores_go_before_a_pair_that_the_line_holds_already():
    assert make_pair(ROW | {"chosen": "low", "rejected": "high"})["chosen"] == "high"


def test_what_is_dropped_is_counted_by_reason_and_the_rest_summed_up(tmp_path, capsys):
    rows = [ROW, ROW | {"all_rm_scores": [1.0, 1.0, 1]}, ROW | {"all_rm_scores": [1.0, 1.9, 1.5]},
            ROW | {"all_rm_scores": [5.0, 6.0, 5.5]}]
    pairs = run(tmp_path, *rows, min_gap=1)
    assert [pair["chosen"] for pair in pairs] == ["high", "low"]        # a gap of 1 stays
    out = capsys.readouterr().out
    assert "2 in" in out and "2 dropped" in out and "1 dropped: all scores equal" in out
    assert "1 dropped: gap under min_gap = 1" in out
    assert "chosen 5 on average, rejected 3, gap 2" in out      # (4 + 6) / 2, (1 + 5) / 2
    # high low, low mid
    assert "chosen 4 characters on average, rejected 3; chosen is the longer in 50%" in out


@pytest.mark.parametrize("K, chosen, rejected, scores", [
    (0, "high", "low", (4, 2)), (0.5, "mid", "low", (3, 1.5)), (2, "mid", "high", (3, -2))])
def test_uncertain_scores_are_lowered_by_their_spread(K, chosen, rejected, scores):
    pair = make_pair(TWO, uncertainty=K)
    assert (pair["chosen"], pair["rejected"]) == (chosen, rejected)
    assert (pair["chosen_score"], pair["rejected_score"]) == pytest.approx(scores)
    assert [statistics.pstdev(s) for s in zip(*TWO["all_scorer_scores"])] == [0, 1, 3]


@pytest.mark.parametrize("K, chosen, rejected, scores", [
    (0.1, "high", "low", (3.1, 1.9)), (0.5, "mid", "high", (3, -0.5)), (2, "mid", "high", (3, -14))])
def test_scores_can_be_lowered_by_their_variance(K, chosen, rejected, scores):
    # Variances 0, 1, 9 (Yang et al. 2024: mean less K variances of an ensemble of reward models).
    pair = make_pair(TWO, uncertainty=K, spread="variance")
    assert (pair["chosen"], pair["rejected"]) == (chosen, rejected)
    assert (pair["chosen_score"], pair["rejected_score"]) == pytest.approx(scores)


def test_agree_keeps_the_pairs_whose_order_every_scorer_confirms(tmp_path, capsys):
    # Of the best and the worst by the mean, "high" and "low". A tie confirms nothing; "mid" does not matter.
    confirmed = [[[3, 1, 7], [3, 1, 2]], [[0, 1, 2], [9, -5, -4], [0, 0, 1]]]
    refused = [[[3, 1, 7], [3, 3, 1]], [[0, 1, 2], [0, 5, 5]], [[0, 2, 1], [0, 1, 8]]]
    rows = [ROW | {"prompt": f"{i}", "all_scorer_scores": scores} for i, scores in enumerate(confirmed + refused)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--input", f"{tmp_path}/scored.jsonl", "--output", f"{tmp_path}/pairs.jsonl", "--agree"])
    assert [row["prompt"] for _, row in read_jsonl(tmp_path / "pairs.jsonl")] == ["0", "1"]
    assert "3 dropped: order that not every scorer confirms" in capsys.readouterr().out


def test_agree_needs_the_scores_of_two_scorers():
    for odd in (None, [[1, 2, 3]], [[1, 2, 3], [1, 2]]):
        with pytest.raises(ValueError, match="all_scorer_scores.*; expected"):
            make_pair(ROW | {"all_scorer_scores": odd}, agree=True)
    with pytest.raises(ValueError, match="two scorers or more, for --agree"):
        make_pair(ROW, agree=True)


def test_the_gap_is_that_of_the_lowered_scores():
    make_pair(TWO, min_gap=1.5, uncertainty=0.5)
    with pytest.raises(Dropped, match="gap under min_gap = 1.6"):
        make_pair(TWO, min_gap=1.6, uncertainty=0.5)


@pytest.mark.parametrize("row, options, message", [
    ("{", {}, "scored.jsonl:2: not valid JSON"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {},
     "scored.jsonl:2: all_generated_responses; expected a list"),
    (ROW | {"all_rm_scores": [1, 2]}, {}, "scored.jsonl:2: 3 responses and 2 scores"),
    ({"prompt": "q", "all_generated_responses": ["a", "b"]}, {},
     "all_rm_scores; expected a list of finite numbers"),
    (ROW, {"uncertainty": 1},
     "scored.jsonl:2: all_scorer_scores; expected the lists of two scorers or more"),
    (TWO | {"all_scorer_scores": [[1, 2, 3]]}, {"uncertainty": 1},
     "the lists of two scorers or more"),
    (TWO | {"all_scorer_scores": [[1, 2, 3], [1, 2]]}, {"uncertainty": 1},
     "scorer 2; expected a list of 3"),
    (TWO | {"all_scorer_scores": [[1, 2, None], [1, 2, 3]]}, {"uncertainty": 1},
     "scorer 1; expected a list of 3"),
    (ROW, {"min_gap": -1}, "min_gap = -1.0; expected 0 or more"),
    (ROW, {"uncertainty": "nan"}, "uncertainty = nan; expected 0 or more"),
    (ROW, {"spread": "variance"}, "spread = variance is of --uncertainty; give that too")])
def test_what_is_malformed_is_refused_by_line_or_option(row, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, TWO, row, **options)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_no_pairs_at_all_and_an_output_that_is_the_input_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no pairs left to write \(1 gap under min_gap = 9\)"):
        run(tmp_path, ROW, min_gap=9)
    with pytest.raises(ValueError, match="input and output are one file"):
        main(["--input", f"{tmp_path}/scored.jsonl", "--output",
              f"{tmp_path}/../{tmp_path.name}/scored.jsonl"])
    assert (tmp_path / "scored.jsonl").read_text()


def test_what_cannot_be_written_is_known_before_anything_is_read(tmp_path, monkeypatch):
    scored = write(tmp_path / "scored.jsonl", ROW)
    (tmp_path / "hard.jsonl").hardlink_to(scored)
    monkeypatch.setattr("data.pairs.make_pairs", lambda *args: pytest.fail("long work"))
    for output in ("absent/pairs.jsonl", ".", "hard.jsonl", "scored.jsonl"):
        with pytest.raises((ValueError, OSError), match="cannot be written|input and output are one file"):
            main(["--input", scored, "--output", f"{tmp_path}/{output}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard.jsonl", "scored.jsonl"]


def test_a_file_that_is_replaced_is_said_and_stays_whole_until_the_new_one_is(tmp_path, capsys):
    run(tmp_path, ROW)
    assert "replaces" not in capsys.readouterr().out
    before = (tmp_path / "pairs.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    scored = write(tmp_path / "scored.jsonl", *[ROW] * 1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))        # what a full disk looks like
    try:
        with pytest.raises(OSError, match="pairs.jsonl: cannot be written"):
            main(["--input", scored, "--output", f"{tmp_path}/pairs.jsonl"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "pairs.jsonl").read_bytes() == before and len([*tmp_path.iterdir()]) == 2
    capsys.readouterr()
    assert len(run(tmp_path, ROW, ROW)) == 2
    assert f"replaces {tmp_path}/pairs.jsonl\n" in capsys.readouterr().out


def test_scores_near_the_largest_number_make_a_pair_and_means_that_are_numbers(tmp_path, capsys):
    huge = ROW | {"all_rm_scores": [0, -10**308, 1.7e308]}
    assert len(run(tmp_path, huge, huge)) == 2
    assert "chosen 1.7e+308 on average, rejected -1e+308" in capsys.readouterr().out
    for scores in ([1.7e308, 1, 1], [0, -10**308, 1.7e308]):
        two = ROW | {"all_scorer_scores": [scores, scores]}
        with pytest.raises(ValueError, match="scored.jsonl:1: all_scorer_scores holds .* too large"):
            run(tmp_path, two, uncertainty=1)


def test_answers_that_are_none_are_a_bad_line_with_uncertainty_too(tmp_path):
    for odd in (None, 3, {}):
        with pytest.raises(ValueError, match="scored.jsonl:1: all_generated_responses; expected"):
            run(tmp_path, TWO | {"all_generated_responses": odd}, uncertainty=1)


def test_a_locale_that_is_not_utf_8_ends_no_command(tmp_path):
    output = tmp_path / "päre 👋.jsonl"
    environment = os.environ | {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "data.pairs", "--input", write(tmp_path / "scored.jsonl", ROW | {"prompt": "naïve"}),
         "--output", os.fsencode(output)], env=environment, capture_output=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text(encoding="utf-8"))["prompt"] == "naïve"


# --- the published sets ---------------------------------------------------------------------------

def published(chosen="high", rejected="low", **fields):
    turns = lambda answer: [{"role": "user", "content": "q"},
                            {"role": "assistant", "content": answer}]
    return ROW | {"prompt_id": "1", "chosen": turns(chosen), "rejected": turns(rejected),
                  "split": "x"} | fields


def load_from(monkeypatch, **splits):
    asked = []
    load = lambda name: asked.append(name) or splits
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    return asked


def test_the_published_sets_are_written_as_they_are_and_read_by_train(
        tmp_path, monkeypatch, capsys):
    asked = load_from(monkeypatch, train=[published(), published(chosen="mid")], test=[published()])
    prepare_ultrafeedback.main(["llama3-ultrafeedback-armorm", "--output", str(tmp_path / "a/b")])
    assert asked == ["princeton-nlp/llama3-ultrafeedback-armorm"]
    lines = [row for _, row in read_jsonl(tmp_path / "a/b/train.jsonl")]
    assert lines[0] == {name: published()[name] for name in prepare_ultrafeedback.FIELDS}
    assert [parse_record(row)[1:] for row in lines] == [("high", "low"), ("mid", "low")]
    assert len(list(read_jsonl(tmp_path / "a/b/test.jsonl"))) == 1
    assert "train.jsonl: 2 lines; in 1 the pair is not the best answer" in capsys.readouterr().out


def test_a_tie_by_score_counts_as_another_pair():
    assert prepare_ultrafeedback.convert(published())[1] is True
    assert prepare_ultrafeedback.convert(published(all_rm_scores=[1.0, 1.0, 1.0]))[1] is False


@pytest.mark.parametrize("row, message", [
    ({"prompt": "q"}, "train, row 2: no column prompt_id, all_generated_responses"),
    (published(chosen=None), "train, row 2: turn"),
    (published(all_rm_scores=[1, 2]), "train, row 2: 3 responses and 2 scores")])
def test_a_row_of_another_shape_is_named(row, message, tmp_path, monkeypatch):
    load_from(monkeypatch, train=[published(), row], test=[])
    with pytest.raises(ValueError, match=message):
        prepare_ultrafeedback.main(["mistral-instruct-ultrafeedback", "--output", str(tmp_path)])


def test_where_a_set_goes_is_known_before_it_is_fetched(tmp_path, monkeypatch):
    asked = load_from(monkeypatch, train=[published()], test=[published()])
    (tmp_path / "out/test.jsonl").mkdir(parents=True)
    with pytest.raises(OSError, match="out/test.jsonl: cannot be written .a folder"):
        prepare_ultrafeedback.main(["llama3-ultrafeedback", "--output", str(tmp_path / "out")])
    assert asked == [] and [path.name for path in (tmp_path / "out").iterdir()] == ["test.jsonl"]


def test_another_set_or_splits_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError,
                       match="no such folder; expected one or llama3-ultrafeedback-armorm"):
        prepare_ultrafeedback.main(["ultrafeedback"])
    load_from(monkeypatch, train_prefs=[])
    with pytest.raises(ValueError, match="found the splits train_prefs; expected train and test"):
        prepare_ultrafeedback.main([str(tmp_path)])
