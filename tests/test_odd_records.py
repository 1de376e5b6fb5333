"""Odd inputs to every reader of records, recipes, metrics and kept tokens: an answer, or an error that names the place;
never another exception, a hang or a silent loss. And what is written and read again, packed, ordered or held out.

    pytest tests/test_odd_records.py
    EXAMPLES=20000 pytest tests/test_odd_records.py         # of each property, about 10 minutes
"""
import contextlib
import gzip
import json
import math
import os
import signal
import time
from collections import Counter
from inspect import Parameter, Signature, signature
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import plan
import plot
from data import pairs as pairs_command
from data.dialogues import checked_text
from data.files import Dropped, read_json, read_jsonl, read_records, write_records
from data.preference import (PreferencePair, are_kept, best_against_worst, encode_pair, epoch_steps, hold_out,
                             keep_pairs, load_pairs, pack, read_kept_pairs)
from data.prompts import read_prompts
from experiments import drift
from small import random_pairs
from test_preference import LetterChat

SECONDS = 5             # that a reader may take for one small input
BATCH = 20              # inputs of one seed: hypothesis takes longer to draw a seed than a reader to read them


def examples(default=1000, **makers):
    """Runs a test on so many inputs, made by functions of a Random. Seeded: every run makes the same ones."""
    n = int(os.environ.get("EXAMPLES", default))

    def decorate(test):
        def on_inputs(*args, **kwargs):
            fixtures = on_inputs.__signature__.bind(*args, **kwargs).arguments
            r = Random(fixtures.pop("seed"))
            for _ in range(BATCH):
                inputs = {name: make(r) for name, make in makers.items()}
                try:
                    test(**fixtures, **inputs)
                except BaseException as e:
                    e.add_note(f"the input was {inputs!r:.3000}")
                    raise

        others = [parameter for name, parameter in signature(test).parameters.items() if name not in makers]
        seed = Parameter("seed", Parameter.POSITIONAL_OR_KEYWORD)
        on_inputs.__name__ = test.__name__
        on_inputs.__signature__ = Signature([*others, seed])
        set_up = settings(max_examples=math.ceil(n / BATCH), derandomize=True, database=None, deadline=None,
                          suppress_health_check=list(HealthCheck))
        return set_up(given(seed=st.integers(0, 2**64 - 1))(on_inputs))
    return decorate


def one_of(*choices):
    return lambda r: r.choice(choices)


def between(least, most):
    return lambda r: r.randint(least, most)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("odd")


def found_or_told(read, place):
    """read(), or None where it raised ValueError or OSError, which has to name the place. It may not hang."""
    def out_of_time(*_):
        raise AssertionError(f"more than {SECONDS} s")
    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(SECONDS)
    try:
        return read()
    except (ValueError, OSError) as e:
        assert str(place) in str(e), f"{e!r} does not name {place}"
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- inputs ---------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
TEXTS = ["", " ", "\n", "é", "👋", "\x00", "\ufeff", "\u2028", "\x85", "\r", "<|im_start|>user\nq", "[INST]",
         "\n\nHuman: q\n\nAssistant:", "</s>", "'\"\\", "%s {0}", "a" * 5000, "owl", "moss", "owl, moss."]
NUMBERS = [0, 1, 2, -1, 0.5, -2.25, 10**308, -10**308, 2**63, 1e308, -1e308, 5e-324, -0.0, 1e16, 123456789]


def text(r):
    if r.random() < 0.7:
        return r.choice(TEXTS)
    return "".join(chr(r.choice([r.randrange(128), r.randrange(0xd800), r.randrange(0xe000, 0x110000)]))
                   for _ in range(r.randrange(6)))


def number(r):
    return r.choice(NUMBERS) if r.random() < 0.8 else r.gauss(0, 1)


def value(r, depth=0):
    """Whatever JSON can hold."""
    kind = r.randrange(4 if depth > 2 else 7)
    if kind < 2:
        return text(r)
    if kind == 2:
        return number(r)
    if kind == 3:
        return r.choice([None, True, False])
    if kind < 6:
        return [value(r, depth + 1) for _ in range(r.randrange(3))]
    return {text(r): value(r, depth + 1) for _ in range(r.randrange(3))}


def turns(r):
    roles = ["user", "assistant", "user", "assistant", "system", "tool", ""]
    return [{"role": r.choice(roles) if r.random() < 0.9 else value(r), "content": text_or_any(r)}
            for _ in range(r.randrange(4))]


def text_or_any(r):
    return text(r) if r.random() < 0.8 else value(r)


def text_or_turns(r):
    return text(r) if r.random() < 0.6 else turns(r)


def some(make, most=3):
    return lambda r: [make(r) for _ in range(r.randrange(most + 1))]


def two(make):
    return lambda r: [make(r), make(r)]


# What a column of this name should hold; others hold text.
KINDS = {"all_rm_scores": some(number), "all_generated_responses": some(text), "history": some(two(text), 2),
         "all_scorer_scores": some(two(number)), "chosen": text_or_turns, "rejected": text_or_turns,
         "prompt": text_or_turns, "turns": turns}


def columns(*names):
    """Makes records with most of these columns, or some, and one more: each with a value of its kind, or now and then
    any."""
    def make(r):
        share = r.choice([0.3, 0.9])
        record = {"another": value(r)} if r.random() < 0.3 else {}
        for name in r.sample(names, len(names)):
            if r.random() < share:
                record[name] = KINDS.get(name, text)(r) if r.random() < 0.85 else value(r)
        return record
    return make


def any_record(r):
    return {text(r): value(r) for _ in range(r.randrange(4))}


# What Python's json writes and JSON does not have, in pieces that lines are spoilt with.
PIECES = [b"\xff", b"\xed\xa0\xbd", b"\x00", BOM, b"\n", b"\r", b" ", b"{", b"}", b"[", b"]", b'"', b",", b":", b"NaN",
          b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"\\ud83d", b'"\\udc4b"', b"[" * 2000, b'{"a":' * 500,
          b'{"a": 1, "a": 2}', b"null", b"true", b"\\", b"\x1f\x8b", b"PAR1", b"PK\x03\x04", b"\xff\xfe",
          "é".encode("latin-1"), b"{}\n", b"//", b"'"]


def spoilt(r, content):
    """Bytes of which some are changed, or that are cut, joined or of another encoding."""
    content = bytearray(content)
    for _ in range(r.randrange(4)):
        how = r.choice(["flip", "flip", "piece", "piece", "cut", "tail", "twice"])
        at = r.randrange(len(content) + 1)
        if how == "flip" and at < len(content):
            content[at] ^= 1 << r.randrange(8)
        elif how == "piece":
            content[at:at] = r.choice(PIECES)
        elif how == "cut":
            del content[at:]
        elif how == "tail":
            del content[:at]
        elif how == "twice":
            content += content[at:]
    if r.random() < 0.1:
        encoding = r.choice(["utf-16", "utf-16-le", "utf-32", "cp1252"])
        content = content.decode("utf-8", "replace").encode(encoding, "replace")
    return bytes(content)


def spoilt_lines(make, most=3):
    """Makes files of up to so many records, in JSON Lines."""
    return lambda r: spoilt(r, as_lines(some(make, most)(r)))


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


# --- files of records -----------------------------------------------------------------------------

FORMS = {
    "lines": as_lines,
    "array": lambda records: json.dumps(records).encode(),
    "indented array": lambda records: json.dumps(records, indent=1, ensure_ascii=False).encode(),
    "byte-order mark": lambda records: BOM + as_lines(records),
    "Windows": lambda records: as_lines(records).replace(b"\n", b"\r\n"),
    "gzip": lambda records: gzip.compress(as_lines(records), 1),
}
records = some(any_record, 4)


@examples(records=records, form=one_of(*sorted(FORMS)))
def test_every_form_gives_back_the_records_that_were_written(folder, records, form):
    (folder / "rows").write_bytes(FORMS[form](records))
    assert [record for _, record in read_records([folder / "rows"])] == records


@examples(records=records)
def test_what_is_written_is_read_again(folder, records):
    write_records(folder / "rows", records)
    assert [record for _, record in read_jsonl(folder / "rows")] == records


def use(record, source):
    """Takes a third of the records, drops a third and refuses a third."""
    if len(record) % 3 == 1:
        raise Dropped("of one column")
    if len(record) % 3 == 2:
        raise ValueError("of two columns")
    return record


@examples(2000, content=spoilt_lines(any_record, 4))
def test_no_line_is_lost_in_silence_and_each_bad_one_is_told_by_its_place(folder, content):
    path = folder / "rows"
    path.write_bytes(content)
    dropped = Counter()
    found = found_or_told(lambda: list(read_records([path], use, dropped, skip_bad_lines=True)), path)
    if found is None or content.removeprefix(BOM).lstrip()[:1] == b"[" or content.startswith(b"\x1f\x8b"):
        return
    # The oracle splits and parses for itself.
    lines = content.removeprefix(BOM).split(b"\n")
    assert len(found) + sum(dropped.values()) == sum(1 for line in lines if line.strip())
    for source, record in found:
        line = lines[int(source.removeprefix(f"{path}:")) - 1]
        assert record == json.loads(line.decode())
    for reason in dropped:
        assert reason == "of one column" or f"{path}:" in reason
    # Nothing that UTF-8 or JSON lack goes further.
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


@examples(content=lambda r: spoilt(r, FORMS[r.choice(sorted(FORMS))](some(any_record)(r))),
          skip=one_of(None, False, True))
def test_files_of_every_form_that_are_spoilt_are_read_or_refused_by_name(folder, content, skip):
    (folder / "rows").write_bytes(content)
    found_or_told(lambda: list(read_records([folder / "rows"], skip_bad_lines=skip)), f"{folder}/rows")


@examples(content=lambda r: spoilt(r, as_lines([any_record(r)])))
def test_a_file_of_json_holds_an_object_or_is_refused_by_name(folder, content):
    (folder / "run.json").write_bytes(content)
    found = found_or_told(lambda: read_json(folder / "run.json"), "run.json")
    if found is not None:
        assert found == json.loads(content)
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


# --- dialogues, prompts, pairs --------------------------------------------------------------------

def read_one(path, record, use):
    """(what use makes of a file of this record, or None; the count of what was dropped)."""
    path.write_bytes(as_lines([record]))
    dropped = Counter()
    found = found_or_told(lambda: [item for _, item in read_records([path], use, dropped)], f"{path}:1: ")
    assert found is None or len(found) + sum(dropped.values()) == 1
    return found[0] if found else None


PAIR_COLUMNS = ["prompt", "chosen", "rejected", "instruction", "input", "question", "system", "history", "tools",
                "all_generated_responses", "all_rm_scores"]


@examples(2000, record=columns(*PAIR_COLUMNS), as_it_stands=one_of(False, True))
def test_a_record_is_a_pair_that_holds_its_answers_or_is_told(folder, record, as_it_stands):
    def encode(record, source):
        return encode_pair(record, source, LetterChat(), 50, 30, as_it_stands)
    pair = read_one(folder / "rows", record, encode)
    if pair is None:
        return
    answers = record.get("chosen"), record.get("rejected")
    if "chosen" not in record or "rejected" not in record:
        scores = record["all_rm_scores"]
        order = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
        worst_first = min(range(len(scores)), key=lambda i: (scores[i], i))
        answers = [record["all_generated_responses"][i] for i in (order[-1], worst_first)]
    for tokens, answer in zip((pair.chosen, pair.rejected), answers):
        text = answer if isinstance(answer, str) else answer[-1]["content"]
        assert tokens.tolist() == [*map(ord, text.strip()), 3]
    assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 50


def good_prompt(r):
    return {r.choice(["prompt", "prompt", "instruction"]): text(r)}


def prompt(r):
    others = columns("prompt", "instruction", "input", "question_id", "turns", "system", "history")
    return good_prompt(r) if r.random() < 0.7 else others(r)


@examples(records=some(prompt, 4), skip=one_of(False, True))
def test_prompts_are_read_dropped_or_told(folder, records, skip):
    path = folder / "rows"
    path.write_bytes(as_lines(records))
    dropped = Counter()
    found = found_or_told(lambda: read_prompts(path, LetterChat().encode_prompt, dropped, skip), path)
    if found is not None:
        shape, kept, prompts = found
        assert len(kept) == len(prompts) and len(kept) + sum(dropped.values()) == len(records)
        assert [record for record in records if record in kept] and shape in ("responses", "alpaca_eval", "arena_hard")


def scored(r):
    if r.random() < 0.3:
        return columns("prompt", "all_generated_responses", "all_rm_scores", "all_scorer_scores", "system")(r)
    return {"prompt": text(r), "all_generated_responses": two(text)(r), "all_rm_scores": two(number)(r),
            "all_scorer_scores": some(two(number))(r)}


@examples(record=scored, uncertainty=one_of(0, 0.5, 1e308), min_gap=one_of(0.0, 1.0, 1e308))
def test_the_best_score_is_no_less_than_the_worst_and_both_are_numbers(folder, record, uncertainty, min_gap):
    def use(record, source):
        return pairs_command.make_pair(record, min_gap, uncertainty, as_it_stands=True)
    pair = read_one(folder / "rows", record, use)
    if pair is None:
        return
    gap = pair["chosen_score"] - pair["rejected_score"]
    assert gap > 0 and gap >= min_gap
    answers = record["all_generated_responses"]
    assert pair["chosen"] in answers and pair["rejected"] in answers
    json.dumps(pair, allow_nan=False)
    with contextlib.redirect_stdout(None):
        pairs_command.print_means([pair, pair])
    if not uncertainty:
        _, best, worst = best_against_worst(record, as_it_stands=True)
        scores = list(map(float, record["all_rm_scores"]))
        assert scores[best] == max(scores) and scores[worst] == min(scores)


def test_scores_that_floats_cannot_tell_apart_are_a_tie():
    record = {"prompt": "q", "all_generated_responses": ["a", "b"], "all_rm_scores": [10**308, 1e308]}
    with pytest.raises(Dropped, match="all scores equal"):
        best_against_worst(record)


@pytest.mark.parametrize("text", [
    "[INST]\n", "\n<|im_start|>user\n", "<|user|>\n", "USER: ", "### Instruction:\n",
    "<|start_header_id|>x<|end_header_id|>\n", "Human: \n\n", "</s>", " ", "<s>"])
def test_marks_that_repeat_without_end_are_looked_through_at_once(text):
    began = time.perf_counter()
    checked_text("x" + text * 20_000, "prompt")
    assert time.perf_counter() - began < SECONDS


# --- kept tokens ----------------------------------------------------------------------------------


def lengths(r):
    return [tuple(r.choices(range(1, 13), k=3)) for _ in range(r.randrange(1, 13))]


@examples(lengths=lengths, places=lambda r: r.choices(["a 7.json: item 1", "b: 3.jsonl:4", "c:1:22"], k=12),
          dropped=lambda r: {text(r): r.randrange(1, 9) for _ in range(r.randrange(3))})
def test_kept_pairs_come_back_as_they_were(folder, lengths, places, dropped):
    pairs = random_pairs(lengths)
    for pair, place in zip(pairs, places):
        pair.source = place
    keep_pairs(folder / "kept", pairs, Counter(dropped))
    found, found_dropped = read_kept_pairs(folder / "kept")
    assert found_dropped == dropped and [p.source for p in found] == [p.source for p in pairs]
    for p, q in zip(found, pairs):
        for name in ("prompt", "chosen", "rejected"):
            assert np.array_equal(getattr(p, name), getattr(q, name)) and getattr(p, name).dtype == np.int32


@pytest.fixture(scope="module")
def kept(folder):
    """The bytes of a small file of kept pairs."""
    keep_pairs(folder / "whole", random_pairs([(3, 4, 5), (2, 2, 2)]), Counter(odd=1))
    return (folder / "whole").read_bytes()


def test_a_bit_of_kept_pairs_that_flips_is_found_wherever_it_is(folder, kept):
    for bit in range(0, 8 * len(kept), 5):
        content = bytearray(kept)
        content[bit // 8] ^= 1 << bit % 8
        (folder / "kept").write_bytes(content)
        with pytest.raises(ValueError, match="/kept: damaged .*; delete it, and the pairs are tokenised again"):
            read_kept_pairs(folder / "kept")


@examples(seed=between(0, 2**64))
def test_spoilt_files_of_kept_pairs_are_told_by_name(folder, kept, seed):
    content = spoilt(Random(seed), kept)
    (folder / "kept").write_bytes(content)
    found = found_or_told(lambda: read_kept_pairs(folder / "kept"), f"{folder}/kept: damaged")
    assert (found is not None) == (content == kept)


def test_kept_pairs_of_other_sizes_or_without_a_checksum_are_damaged(folder, kept, capsys):
    assert are_kept(folder / "whole") and not are_kept(folder / "absent")
    tensors = load_file(folder / "whole")
    cases = [({}, {}), ({}, None), ({"lengths": -tensors["lengths"]}, {"sha256": "0"}),
             ({"lengths": tensors["lengths"][:1]}, {"sha256": "0"}),
             ({"places": tensors["places"] + 5}, {"sha256": "0"})]
    for changes, metadata in cases:
        if metadata is not None:
            metadata = {"files": '["a:"]', "dropped": "{}"} | metadata
        save_file(tensors | changes, folder / "kept", metadata=metadata)
        with pytest.raises(ValueError, match="kept: damaged"):
            read_kept_pairs(folder / "kept")
        assert not are_kept(folder / "kept") and "kept: damaged" in capsys.readouterr().out


def test_a_clock_that_jumps_back_does_not_show_in_how_long_tokenising_took(folder, monkeypatch, capsys):
    write_records(folder / "many", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 10_000)
    clock = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    load_pairs([folder / "many"], LetterChat(), 100, 100)
    seconds = int(capsys.readouterr().out.split("tokenised in ")[1].split()[0])
    assert 0 <= seconds < 60


# --- order and packing ----------------------------------------------------------------------------

@examples(lengths=lengths, room=between(0, 60), ranks=between(1, 5))
def test_a_packed_row_is_its_pairs_as_plain_sequences_end_to_end(lengths, room, ranks):
    pairs = random_pairs(lengths)
    longest = max(map(sum, lengths))
    with pytest.raises(ValueError, match=r"pairs.jsonl:\d+: the pair has"):
        pack(pairs, longest - 1, ranks)
    rows = pack(pairs, longest + room, ranks)
    assert len(rows) % ranks == 0 and sorted(i for row in rows for i in row.indices) == [*range(len(pairs))]
    for row in rows:
        expected = [pairs[i] for i in row.indices] or [min(pairs, key=len)]
        assert len(row.tokens) <= longest + room and row.lengths == [pair.lengths for pair in row.pairs]
        plain = [t for pair in row.pairs for part in (pair.prompt, pair.chosen, pair.rejected) for t in part.tolist()]
        assert row.tokens.tolist() == plain
        if row.indices:
            assert all(p is q for p, q in zip(row.pairs, expected, strict=True))
        else:
            assert len(row.pairs) == 1 and len(row.pairs[0]) == len(expected[0])
    # No more rows than pairs could need.
    assert len(rows) <= -(-max(len(pairs), 1) // ranks) * ranks


@examples(n=between(0, 200), per_step=between(1, 50), seed=between(0, 2**63), epoch=between(0, 2**31))
def test_an_order_is_a_permutation_and_a_pure_function(n, per_step, seed, epoch):
    steps = epoch_steps(n, per_step, seed, epoch)
    assert sorted(i for step in steps for i in step) == [*range(n)] and epoch_steps(n, per_step, seed, epoch) == steps
    assert all(len(step) == per_step for step in steps[:-1]) and len(steps) == math.ceil(n / per_step)
    if n > 50:
        assert epoch_steps(n, per_step, seed, epoch + 1) != steps != epoch_steps(n, per_step, seed + 1, epoch)


@examples(prompts=lambda r: r.choices(range(10), k=r.randrange(1, 31)), n=between(0, 30),
          seed=between(0, 2**63))
def test_no_prompt_is_on_both_sides_and_no_pair_on_none(prompts, n, seed):
    ids = np.array([5], dtype=np.int32)
    pairs = [PreferencePair(np.array([p], dtype=np.int32), ids, ids, f"a:{i}") for i, p in enumerate(prompts)]
    place = {id(pair): i for i, pair in enumerate(pairs)}
    try:
        training, held_out = hold_out(pairs, n, seed)
    except ValueError as e:
        assert n >= len(pairs) or min(Counter(prompts).values()) > n > 0, e
        return
    sides = [[place[id(pair)] for pair in side] for side in (training, held_out)]
    assert sides[0] == sorted(sides[0]) and sides[1] == sorted(sides[1]) and len(held_out) <= n
    assert sorted(sides[0] + sides[1]) == [*range(len(pairs))]
    assert not {prompts[i] for i in sides[0]} & {prompts[i] for i in sides[1]}


# --- recipes, metrics, experiments ----------------------------------------------------------------

TOML_VALUES = ["1", "0", "-1", "true", "false", "nan", "inf", "1.0", "1e400", "9" * 400, "9" * 5000, '"8"', '""', "[1]",
               "[" * 2000, "{a = 1}", "1979-05-27", '"\\ud83d"', '"é"', "''", "2048", '"models/x"']


def recipe(r):
    names = [*plan.NUMBERS, *plan.SWITCHES, "model", "beta", "a.b", "[x]"]
    return "".join(f"{r.choice(names)} = {r.choice(TOML_VALUES)}\n" for _ in range(r.randrange(4))).encode()


@examples(content=lambda r: spoilt(r, recipe(r)))
def test_a_recipe_is_read_strictly_or_refused_by_name(folder, content):
    (folder / "odd.toml").write_bytes(content)
    fields = found_or_told(lambda: plan.read_recipe(folder / "odd.toml"), "odd.toml")
    for name, value in (fields or {}).items():
        assert type(value) is (int if name in plan.NUMBERS else bool if name in plan.SWITCHES else str)


@examples(number=one_of(*plan.NUMBERS, "gpus"),
          value=one_of(-1, 0, 1, 2, 8192, 10**12, 10**12 + 1, 10**400, -10**400))
def test_numbers_of_a_plan_are_positive_and_no_more_than_can_be(number, value):
    args = found_or_told(lambda: plan.parse_args(["--model", "x", f"--{number}", f" {value}"]), number)
    assert (args is not None) == (0 < value <= 10**12)


METRICS = [metric for _, metric, _ in plot.RUN_CURVES]


def evaluation(r):
    """A line of metrics.jsonl; now and then a field of it is missing or odd."""
    names = ["eval_displacement/chosen", "step", *METRICS, "eval_judge_score", "eval_judge_stderr"]
    line = {name: r.choice([0, 1.5, -2, None, 1e99]) for name in names} | {"step": r.randrange(9)}
    if r.random() < 0.5:
        line[r.choice(names)] = value(r)
    if r.random() < 0.3:
        del line[r.choice(names)]
    return line


@examples(content=spoilt_lines(evaluation))
def test_metrics_are_numbers_to_draw_or_told_by_line(folder, content):
    (folder / "metrics.jsonl").write_bytes(content)
    found = found_or_told(lambda: plot.read_run(folder), "metrics.jsonl")
    if found is not None:
        for line in found[1]:
            drawn = [line["step"], *plot.column([line], METRICS[0])]
            assert all(isinstance(value, (int, float)) for value in drawn)


RUN = {"label": "alpha = 0", "alpha": 0, "kl": 0.5, "score": 50.0, "displacement_chosen": -0.1, "step": 8}


def run_of_experiment(r):
    record = dict(RUN)
    if r.random() < 0.5:
        record[r.choice(list(RUN))] = value(r)
    if r.random() < 0.3:
        del record[r.choice(list(RUN))]
    return record


@examples(content=spoilt_lines(run_of_experiment))
def test_runs_of_an_experiment_are_numbers_to_draw_or_told_by_line(folder, content):
    (folder / "runs.jsonl").write_bytes(content)
    found = found_or_told(lambda: plot.read_drift(folder / "runs.jsonl"), "runs.jsonl")
    if found is not None:
        assert found and all(isinstance(label, str) for label in found)


@pytest.mark.parametrize("lines, runs", [
    ([{name: 0 for name in ["step", *METRICS]}], [RUN | {"kl": 0, "alpha": None, "label": "$"}]),
    ([{name: 1e99 for name in ["step", *METRICS]}, {name: -1e99 for name in ["step", *METRICS]}],
     [{name: 1e99 for name in RUN} | {"label": "\x00"}, {name: -1e99 for name in RUN} | {"label": "👋"}])])
def test_what_is_read_can_be_drawn(folder, lines, runs):
    write_records(folder / "metrics.jsonl", lines)
    write_records(folder / "runs.jsonl", runs)
    for what, source in (("runs", folder), ("drift", folder / "runs.jsonl")):
        with contextlib.redirect_stdout(None):
            plot.main([what, str(source), "--output", str(folder / "picture.png")])
        plot.plt.close("all")
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


@examples(content=spoilt_lines(prompt))
def test_drift_reads_its_prompts_or_tells_their_place(folder, content):
    (folder / "prompts.jsonl").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        patch.setattr(drift, "load_chat", lambda folder: LetterChat())
        patch.setattr(drift, "load_fast", lambda folder: None)
        seen = []

        def measured(model, start, chat, prompts, **settings):
            seen.extend(prompts)
            return {"kl": 0, "kl_stderr": 0, "tokens": 1, "cut": 0}
        patch.setattr(drift, "drift", measured)
        argv = ["--model", "x", "--start", "y", "--prompts", str(folder / "prompts.jsonl")]
        found_or_told(lambda: drift.main(argv), "prompts.jsonl")
        assert all(turns[-1]["content"].strip() for turns in seen)


@pytest.mark.parametrize("content, message", [
    ("", "odd: no (runs|evaluations|prompts)|odd/metrics.jsonl: no evaluations"),
    ('{"eval_displacement/chosen": 1, "label": "x", "prompt": null}\n',
     "odd.*:1: (step is None|kl is None|no field prompt)")])
@pytest.mark.parametrize("what", ["runs", "drift", "prompts"])
def test_an_empty_file_and_a_field_that_is_missing_are_told(what, content, message, tmp_path, monkeypatch):
    path = tmp_path / "odd"
    if what == "runs":
        path.mkdir()
        (path / "metrics.jsonl").write_text(content)
    else:
        path.write_text(content)
    monkeypatch.setattr(drift, "load_chat", lambda folder: LetterChat())
    with pytest.raises(ValueError, match=message):
        if what == "prompts":
            drift.main(["--model", "x", "--start", "y", "--prompts", str(path)])
        else:
            plot.main([what, str(path), "--output", str(tmp_path / "a.png")])


def test_a_picture_that_cannot_be_written_is_known_first_and_what_it_replaces_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "runs.jsonl").write_bytes(as_lines([RUN]))
    (tmp_path / "a.png").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(plot, "drift", lambda file: pytest.fail("long work"))
        for output in ("absent/a.png", ".", "runs.jsonl"):
            with pytest.raises((ValueError, OSError), match="cannot be written|input and output are one file"):
                plot.main(["drift", str(tmp_path / "runs.jsonl"), "--output", str(tmp_path / output)])
    plot.main(["drift", str(tmp_path / "runs.jsonl"), "--output", str(tmp_path / "a.png")])
    assert f"replaces {tmp_path}/a.png\n" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [["--samples", "0"], ["--max_new_tokens", "0"], ["--seed", "-1"]])
def test_flags_of_drift_are_checked_before_models_are_loaded(flags):
    with pytest.raises(ValueError, match=f"{flags[0][2:]} = {flags[1]}; expected"):
        drift.main(["--model", "x", "--start", "y", "--prompts", "z", *flags])
