"""Damage of any kind to what score.py and generate.py go on with, and any settings of the sampler: the
result is the undisturbed one, or there is one error.

    pytest tests/test_odd_jobs.py
    EXAMPLES=20000 pytest tests/test_odd_jobs.py        # 20,000 generated inputs a test
"""
import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import generate as generate_py
import score as score_py
from generate import Answer, Job, claim_parts, join_parts
from sampler import generate, next_tokens
from small import small_model

# The same inputs in every run. An example may create files: their time says nothing.
many = settings(max_examples=int(os.environ.get("EXAMPLES", 1000)), derandomize=True, deadline=None,
                database=None, suppress_health_check=list(HealthCheck))


@st.composite
def damaged(draw, data):
    """Bytes with one to three faults: cut anywhere, a byte changed, lines joined or twice or gone."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        fault = draw(st.sampled_from(["cut", "flip", "byte", "join", "twice", "gone", "end"]))
        if fault == "cut":
            data = data[:place]
        elif fault in ("flip", "byte"):
            if not data:
                continue
            byte = draw(st.integers(0, 255)) if fault == "byte" else data[place] ^ 1 << draw(st.integers(0, 7))
            data = data[:place] + bytes([byte]) + data[place + 1:]
        elif fault == "end":
            data = data.removesuffix(b"\n")
        else:
            lines = data.splitlines(keepends=True) or [b""]
            i = draw(st.integers(0, len(lines) - 1))
            lines[i] = {"join": lines[i].rstrip(b"\n"), "twice": lines[i] * 2, "gone": b""}[fault]
            data = b"".join(lines)
    return data


# --- score.py -------------------------------------------------------------------------------------

ROWS = [{"prompt": "q", "all_generated_responses": ["a", "bcd"], "id": 7},
        {"prompt": [{"role": "user", "content": "größer 👋"}], "all_generated_responses": ["}", ""]},
        {"prompt": "q", "all_generated_responses": ["é\n{\"", "b"], "scorers": ["old"], "note": {"a": [1.5, None]}},
        {"prompt": "q", "all_generated_responses": ["one"], "chosen": "x", "rejected": "y"}]
# What scores are cannot be checked: only where they stand.
SCORES = re.compile(rb'("all_rm_scores": |"all_scorer_scores": )[^"]*(, "scorers")')


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(folder, the flags of a call, the bytes of its output) by number of scorers."""
    jobs = {}
    for n_scorers in (1, 2):
        folder = tmp_path_factory.mktemp("score")
        (folder / "judge.py").write_text("def a(turns, answer): return len(answer) * 1.25\n"
                                         "def b(turns, answer): return -len(turns[0]['content'])\n")
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        judges = [f"{folder}/judge.py:{name}" for name in "ab"[:n_scorers]]
        flags = ["--input", f"{folder}/in.jsonl", "--output", f"{folder}/out.jsonl", "--judge", *judges]
        score_py.main(flags)
        jobs[n_scorers] = folder, flags, (folder / "out.jsonl").read_bytes()
    return jobs


@many
@given(data=st.data())
def test_scoring_goes_on_from_any_damage_to_the_undisturbed_result_or_to_one_error(scored, data):
    n_scorers = data.draw(st.sampled_from([1, 2]), "scorers")
    folder, flags, whole = scored[n_scorers]
    output = folder / "out.jsonl"
    partial = folder / "out.jsonl.partial"
    found = data.draw(damaged(whole), "found")
    where = data.draw(st.sampled_from(["out.jsonl", "out.jsonl.partial", "both"]), "where")
    for file, is_there in ((output, where != "out.jsonl.partial"), (partial, where != "out.jsonl")):
        file.unlink(missing_ok=True)
        if is_there:
            file.write_bytes(found)
    try:
        score_py.main(flags)
    except ValueError as e:
        assert re.match(rf"{re.escape(str(output))}(\.partial)?:\d+: ", str(e)) and "\n" not in str(e)
        # Nothing is lost: what was found stays as it was.
        if where != "out.jsonl.partial":
            assert output.read_bytes() == found
        if where != "out.jsonl":
            assert partial.read_bytes() == found
    else:
        result = output.read_bytes()
        assert not partial.exists()
        if result != whole:
            masked = SCORES.sub(rb"\1\2", result)
            assert masked == SCORES.sub(rb"\1\2", whole) and len(result.splitlines()) == len(ROWS)
            # The mean of two scorers is checked too: a fault in one number does not pass.
            for line in map(json.loads, result.splitlines()):
                for i, of_answer in enumerate(zip(*line.get("all_scorer_scores", []))):
                    assert line["all_rm_scores"][i] == sum(of_answer) / 2
    assert not (folder / "out.jsonl.lock").exists()


def test_scoring_goes_on_from_a_cut_at_any_byte(scored):
    for folder, flags, whole in scored.values():
        for name in ("out.jsonl", "out.jsonl.partial"):
            first = whole.index(b"\n")
            # Every byte once, and some of them in the other ways.
            step = 1 if name == "out.jsonl.partial" and len(flags) == 6 else 7
            for cut in range(0, len(whole) + 1, step):
                for left in ("out.jsonl", "out.jsonl.partial"):
                    (folder / left).unlink(missing_ok=True)
                (folder / name).write_bytes(whole[:cut])
                if name == "out.jsonl" and 0 < cut < first:
                    # A first line that is no line may be anything.
                    with pytest.raises(ValueError, match="out.jsonl:1: "):
                        score_py.main(flags)
                    continue
                score_py.main(flags)
                assert (folder / "out.jsonl").read_bytes() == whole, cut


# --- generate.py ----------------------------------------------------------------------------------

BATCHES = [[3, 0], [1, 4], [2]]


def job_of(folder, **identity):
    records = [{"prompt": f"q{i}"} for i in range(5)]
    identity = {"samples": 2, "temperature": 0.8, "weights": [["a.safetensors", 3, 12]], "date": None} | identity
    return Job("responses", records, [[1]] * 5, BATCHES, {"samples": 2, "max_new_tokens": 9}, identity,
               folder / "a.jsonl", folder / "a.jsonl.parts")


def answers_of(batch, word="a"):
    return [[Answer(f"{word} {i} ü\n\"", i + 1, True), Answer("", 9, i > 2)] for i in batch]


def write_parts(job, todo, word="a"):
    for b in todo:
        generate_py.write_part(job, b, answers_of(BATCHES[b], word))


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """(a job, {name: bytes} of its whole folder of parts, those of another job, bytes of its output)"""
    others = tmp_path_factory.mktemp("other")
    other = job_of(others, temperature=0.7)
    write_parts(other, claim_parts(other), "b")
    job = job_of(tmp_path_factory.mktemp("job"))
    write_parts(job, claim_parts(job))
    files = {file.name: file.read_bytes() for file in job.parts.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_py, "say", print)
        join_parts(job, "model")
        assert not job.parts.exists()
        yield job, files, {file.name: file.read_bytes() for file in other.parts.iterdir()}, job.output.read_bytes()


@many
@given(data=st.data())
def test_sampling_goes_on_from_any_damage_to_the_undisturbed_result_or_to_one_error(answered, data):
    job, files, others, whole = answered
    parts = sorted(set(files) - {"job.json"})
    # 1. What is found.
    files = dict(files)
    for name in data.draw(st.lists(st.sampled_from(sorted(files)), max_size=3), "names"):
        fault = data.draw(st.sampled_from(["damaged", "gone", "other", "swapped", "left"]), "fault")
        if fault == "damaged" and name in files:
            files[name] = data.draw(damaged(files[name]), "content")
        elif fault == "gone":
            files.pop(name, None)
        elif fault == "other":
            files[name] = others[name]
        elif fault == "swapped":
            files[name] = files.get(data.draw(st.sampled_from(parts)), b"")
        else:
            files[f"{name[:-5]}.12.tmp.json"] = b"{"
    shutil.rmtree(job.parts, ignore_errors=True)
    job.output.unlink(missing_ok=True)
    job.parts.mkdir()
    for name, content in files.items():
        (job.parts / name).write_bytes(content)

    # 2. The same command goes on, and a part may vanish meanwhile.
    try:
        todo = claim_parts(job)
    except ValueError as e:
        assert re.match(rf"{re.escape(str(job.parts))}(/job.json)?: ", str(e)) and "\n" not in str(e)
        assert "job.json" not in files or files["job.json"] != answered[1]["job.json"]
        assert {file.name: file.read_bytes() for file in job.parts.iterdir()} == files
        return
    write_parts(job, todo)
    vanished = data.draw(st.sampled_from([None, *parts]), "vanished")
    if vanished:
        (job.parts / vanished).unlink()
        with pytest.raises(ValueError, match=f"{vanished}: not found; all other parts are kept"):
            join_parts(job, "model")
        assert not job.output.exists()
        todo = claim_parts(job)
        assert todo == [parts.index(vanished)]
        write_parts(job, todo)
    join_parts(job, "model")
    assert job.output.read_bytes() == whole and not job.parts.exists()


# --- the sampler ----------------------------------------------------------------------------------

ODD = st.one_of(st.booleans(), st.none(), st.floats(), st.integers(-3, 10**400), st.text(max_size=3),
                st.sampled_from([1e-40, 5e-324, 1e308, 10**400, -0.0]))


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_thread):
    return small_model(tmp_path_factory.mktemp("model"), dtype=torch.float32)


@many
@given(data=st.data())
def test_any_settings_are_refused_by_name_or_give_answers_within_them(model, data):
    asked = {
        "temperature": st.one_of(st.sampled_from([0, 1e-6, 1, 1e300]), st.floats(0, 3)),
        "top_p": st.floats(0, 1), "top_k": st.integers(0, 70), "samples": st.integers(0, 3),
        "max_new_tokens": st.integers(0, 6), "batch_size": st.integers(1, 8),
    }
    asked = {name: data.draw(values, name) for name, values in asked.items()}
    if data.draw(st.booleans(), "odd"):
        name = data.draw(st.sampled_from(sorted(asked)))
        asked[name] = data.draw(ODD, f"odd {name}")
    prompts = data.draw(st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=5), min_size=1, max_size=3))
    stop_ids = data.draw(st.sets(st.integers(0, 59), max_size=20))
    try:
        found = generate(model, prompts, seeds=[(0, i) for i in range(len(prompts))], stop_ids=stop_ids, **asked)
    except ValueError as e:
        assert re.match("temperature|top_p|top_k|samples|max_new_tokens|batch_size|prompt 1 has", str(e))
        assert not in_range(asked), e
        return
    assert in_range(asked)
    assert [len(answers) for answers in found] == [asked["samples"]] * len(prompts)
    for ids in (ids for answers in found for ids in answers):
        assert len(ids) <= asked["max_new_tokens"]
        assert all(0 <= token < 60 and token not in stop_ids for token in ids)


def in_range(asked):
    """Whether every setting is of its type and within its limits, for a model of 256 positions."""
    counts = [asked[name] for name in ("top_k", "samples", "max_new_tokens", "batch_size")]
    if not all(type(count) is int for count in counts):
        return False
    temperature = asked["temperature"]
    top_p = asked["top_p"]
    if type(temperature) not in (int, float) or type(top_p) not in (int, float):
        return False
    return ((temperature == 0 or 1e-6 <= temperature < 2**1024) and 0 < top_p <= 1 and asked["top_k"] >= 0
            and 1 <= asked["samples"] <= asked["batch_size"] and 1 <= asked["max_new_tokens"] <= 251)


@many
@given(order=st.permutations(range(12)), scale=st.floats(0.01, 1e4), temperature=st.floats(1e-6, 1e-4),
       uniform=st.floats(0, 1, exclude_max=True), top_p=st.floats(0, 1, exclude_min=True), top_k=st.integers(0, 20))
def test_a_temperature_near_0_is_greedy(order, scale, temperature, uniform, top_p, top_k):
    logits = torch.tensor([order], dtype=torch.float32) * scale        # no two nearer than 0.01
    uniform = torch.tensor([uniform], dtype=torch.float64)
    for t in (temperature, 0):
        found = next_tokens(None, logits, uniform, temperature=t, top_p=top_p, top_k=top_k)
        assert found == [order.index(11)]
