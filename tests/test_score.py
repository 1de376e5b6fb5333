"""Judges and reward models that score answers, against transformers.

    pytest tests/test_score.py
"""
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import score as score_py
from data.files import read_jsonl
from data.preference import load_pairs
from judge import load_judge
from oracles import LLAMA3_MODEL, llama3_prompt
from score import RewardScorer, load_reward_model, main, rewards
from test_preference import LetterChat
from tokenizer import load_chat_format, load_tokenizer

ROOT = Path(score_py.__file__).parent
TINY = ROOT / "data/tiny"
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2,
             max_position_embeddings=200)
CASES = {"llama": ("llama", {}), "tied": ("llama", {"tie_word_embeddings": True}),
         "mistral": ("mistral", {"sliding_window": 12})}
TURNS = [{"role": "user", "content": "Sort these words: owl, moss, fern"}]
ANSWERS = ["fern, moss, owl.", "owl", "",
           "moss, fern, owl, and then some more words that nobody asked for."]


def randomise(model, seed=0):
    """Weights of a size at which every part of a model shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def scalar(request, tmp_path_factory):
    """(folder of a reward model with the tiny model's tokenizer, the same model of transformers)"""
    folder = tmp_path_factory.mktemp(request.param)
    kind, changes = CASES[request.param]
    config = AutoConfig.for_model(kind, vocab_size=420, num_labels=1, **SIZES | changes)
    theirs = randomise(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))
    theirs.save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / "model" / file, folder)
    return folder, theirs


@torch.no_grad()
def expected_rewards(folder, theirs):
    """Rewards by transformers, every sequence alone and the prompt in each."""
    chat = load_chat_format(folder, load_tokenizer(folder))
    sequences = [chat.encode_prompt(TURNS) + chat.encode_response(answer) for answer in ANSWERS]
    return [theirs(torch.tensor([ids])).logits.item() for ids in sequences]


def least_difference(numbers):
    return min(abs(a - b) for i, a in enumerate(numbers) for b in numbers[:i])


def test_a_scalar_head_gives_transformers_rewards(scalar):
    folder, theirs = scalar
    expected = expected_rewards(folder, theirs)
    assert RewardScorer(folder)(TURNS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert least_difference(expected) > 1e-2        # they can be told apart


def test_answers_that_do_not_fit_in_a_row_take_several(scalar, monkeypatch):
    folder, theirs = scalar
    rows = []
    monkeypatch.setattr(score_py, "TOKENS_PER_ROW", 50)
    monkeypatch.setattr(score_py, "rewards",
                        lambda *args: rows.append(len(args[2])) or rewards(*args))
    expected = expected_rewards(folder, theirs)
    assert RewardScorer(folder)(TURNS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert len(rows) > 1 and sum(rows) == len(ANSWERS)


def test_the_head_computes_in_fp32_where_the_model_is_bf16(scalar):
    folder, theirs = scalar
    model = load_reward_model(folder, torch.bfloat16)
    chat = load_chat_format(folder, load_tokenizer(folder))
    found = rewards(model, chat.encode_prompt(TURNS), [chat.encode_response(a) for a in ANSWERS])
    assert found.dtype == torch.float32 and model.model.norm.weight.dtype == torch.bfloat16
    assert found.tolist() != found.bfloat16().tolist()          # finer than bf16 numbers
    assert found.tolist() == pytest.approx(expected_rewards(folder, theirs), abs=0.5)


# --- ArmoRM ---------------------------------------------------------------------------------------

GATING = {"num_objectives": 5, "gating_hidden_dim": 24, "gating_n_hidden": 3,
          "gating_temperature": 2}
HEAD = {"regression_layer.weight": (5, 32), "reward_transform_matrix": (5, 5),
        "gating.logit_scale": (1,),
        "gating.layers.0.weight": (24, 32), "gating.layers.0.bias": (24,),
        "gating.layers.1.weight": (24, 24),
        "gating.layers.1.bias": (24,), "gating.layers.2.weight": (24, 24),
        "gating.layers.2.bias": (24,),
        "gating.layers.3.weight": (5, 24), "gating.layers.3.bias": (5,)}


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """(folder of a small ArmoRM with Llama-3's tokenizer, transformers' model, weights of the
    head)"""
    folder = tmp_path_factory.mktemp("gated")
    config = AutoConfig.for_model("llama", vocab_size=128256, **SIZES)
    theirs = randomise(AutoModel.from_config(config, dtype=torch.float32))
    generator = torch.Generator().manual_seed(1)
    head = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in HEAD.items()}
    body = {f"model.{name}": w for name, w in theirs.state_dict().items()}
    save_file(body | head, folder / "model.safetensors")
    fields = GATING | {"auto_map": {"AutoModelForSequenceClassification": "modeling_custom.Gated"},
                       "num_labels": 5}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | fields))
    shutil.copy(LLAMA3_MODEL, folder)
    return folder, theirs, head


def gated_reward(theirs, head, ids):
    """ArmoRM's score of one sequence in plain steps: the gate's token is searched for from the
    end."""
    states = theirs(torch.tensor([ids])).last_hidden_state[0]
    pattern = [128009, 128006, 78191, 128007, 271]
    x = states[max(i for i in range(len(ids)) if ids[i:i + 5] == pattern)]
    for i in range(4):
        x = head[f"gating.layers.{i}.weight"] @ x + head[f"gating.layers.{i}.bias"]
        x = x.clamp(min=0) if i < 3 else x
    gate = torch.exp(x / 2) / torch.exp(x / 2).sum() * head["gating.logit_scale"]
    objectives = head["regression_layer.weight"] @ states[-1]
    matrix = head["reward_transform_matrix"]
    return sum(gate[j] * sum(objectives[i] * matrix[i, j] for i in range(5)) for j in range(5))


@torch.no_grad()
def test_the_gated_head_gives_armorms_rewards_on_the_official_tokens(gated):
    folder, theirs, head = gated
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
             {"role": "assistant", "content": "Hello!"}, *TURNS]        # the pattern is there twice
    expected = []
    for answer in ANSWERS:
        ids = llama3_prompt([*turns, {"role": "assistant", "content": answer}])
        ids = ids[:-4]      # less the header that follows
        expected.append(gated_reward(theirs, head, ids).item())
    assert RewardScorer(folder)(turns, ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert least_difference(expected) > 1e-2


def test_what_is_no_reward_model_of_a_known_kind_is_refused(gated, scalar, tmp_path):
    with pytest.raises(ValueError, match="no weight score.weight or regression_layer.weight"):
        RewardScorer(TINY / "model")

    def changed(folder, name, **fields):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | fields))
        return copy
    with pytest.raises(ValueError, match="gating.layers.0.weight has shape .24, 32.; config.json "
                                         "asks for .25, 32."):
        RewardScorer(changed(gated[0], "width", gating_hidden_dim=25))
    with pytest.raises(ValueError, match="gating_temperature are 5, 24, 3, 0; expected positive "
                                         "numbers"):
        RewardScorer(changed(gated[0], "temperature", gating_temperature=0))
    with pytest.raises(ValueError, match="pad_token_id = 2 of config.json is the end token"):
        RewardScorer(changed(scalar[0], "padded", pad_token_id=2))
    # Code of its own may compute anything.
    with pytest.raises(ValueError, match="auto_map = .* is not supported"):
        RewardScorer(changed(scalar[0], "custom", auto_map={"AutoModel": "x.py"}))

    sentencepiece = changed(gated[0], "tokens")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / "model" / file, sentencepiece)
    with pytest.raises(ValueError, match="its gate reads Llama-3's tokens .128009, "):
        RewardScorer(sentencepiece)


@pytest.mark.parametrize("field, value", [("gating_temperature", True), ("gating_temperature", "2"),
                                          ("num_objectives", True), ("gating_n_hidden", 3.0)])
def test_numbers_of_the_head_are_read_strictly(field, value, gated, tmp_path):
    folder = shutil.copytree(gated[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=f"config.json: .*{value}.*; expected positive numbers"):
        load_reward_model(folder)


@pytest.mark.parametrize("text, message", [
    ('"gating_temperature": NaN', "config.json: gating_temperature is NaN"),
    ('"gating_temperature": 1e400', "config.json: gating_temperature is Infinity"),
    ('"pad_token_id": true', "config.json: pad_token_id = True; expected an id or null")])
def test_config_json_of_a_reward_model_has_finite_numbers(text, message, gated, tmp_path):
    folder = shutil.copytree(gated[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["gating_temperature"], config["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(config)[:-1] + f", {text}}}")
    with pytest.raises(ValueError, match=message):
        load_reward_model(folder)


def test_a_reward_model_is_known_by_its_files_and_its_chat_format(scalar, tmp_path):
    folder = shutil.copytree(scalar[0], tmp_path / "rm")
    names = {RewardScorer(folder).name}
    assert names == {RewardScorer(scalar[0]).name.replace(scalar[0].name, "rm")}
    names.add(RewardScorer(folder, "mistral-v1").name)
    changes = ("config.json", {"rms_norm_eps": 1e-4}), ("tokenizer_config.json", {"note": 1}), \
        ("generation_config.json", {"eos_token_id": [2, 5]})
    for file, change in changes:
        fields = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(fields | change))
        names.add(RewardScorer(folder).name)
    # The same weights in a file of another size.
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors",
              metadata={"format": "pt", "note": "x" * 64})
    names.add(RewardScorer(folder).name)
    assert len(names) == 6 and all(re.fullmatch("rm [0-9a-f]{8}", name) for name in names)


def test_a_sequence_longer_than_the_models_positions_is_refused(scalar):
    with pytest.raises(ValueError, match=r"prompt and answer 2 have \d+ tokens, more than the 200 "
                                         "positions"):
        RewardScorer(scalar[0])(TURNS, ["owl", "owl " * 200])


# --- judges and files -----------------------------------------------------------------------------

JUDGES = """
def length(turns, answer): return len(answer)
def half(turns, answer): return len(turns[-1]["content"] + answer) / 2
def word(turns, answer): return "good"
def nan(turns, answer): return float("nan")
def broken(turns, answer): return answer.index("?")
def none(turns, answer): return None
def yes(turns, answer): return True
def huge(turns, answer): return 10 ** 400
def endless(turns, answer): return 10 ** 5000
def leaves(turns, answer): raise SystemExit(0)
def things(turns, answer): return Thing()
class Thing:
    def __float__(self): raise KeyError
    def __repr__(self): raise KeyError
number = 1
"""
ROW = {"prompt": "q", "all_generated_responses": ["a", "bcd"], "id": 7}


@pytest.fixture
def job(tmp_path):
    """job(rows, *judges) scores lines by judges of JUDGES and returns the lines of the output."""
    (tmp_path / "judge.py").write_text(JUDGES)

    def job(rows, *judges):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
        main(["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/out.jsonl", "--judge",
              *(f"{tmp_path}/judge.py:{judge}" for judge in judges)])
        return [row for _, row in read_jsonl(tmp_path / "out.jsonl")]
    job.output = tmp_path / "out.jsonl"
    return job


def without_digests(row):
    """A scored line with the names of its scorers as they were given."""
    names = [re.fullmatch("(.*) [0-9a-f]{8}", name)[1] for name in row["scorers"]]
    return row | {"scorers": names}


def test_a_judge_adds_its_scores_to_a_line(job, capsys):
    scored = ROW | {"all_rm_scores": [1.0, 3.0], "scorers": ["judge.py:length"]}
    (row,) = job([ROW], "length")
    assert without_digests(row) == scored
    assert f"{row['scorers'][0]}: mean 2, standard deviation 1, 1 to 3" in capsys.readouterr().out


def test_several_scorers_keep_their_scores_beside_the_mean(job):
    assert [without_digests(row) for row in job([ROW], "length", "half")] == [ROW | {
        "all_rm_scores": [1.0, 2.5], "all_scorer_scores": [[1.0, 3.0], [1.0, 2.0]],
        "scorers": ["judge.py:length", "judge.py:half"]}]


def test_a_judge_and_a_reward_model_score_together(job, scalar, tmp_path):
    job([{"prompt": TURNS, "all_generated_responses": ANSWERS}], "length")
    main(["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/both.jsonl",
          "--judge", f"{tmp_path}/judge.py:length", "--reward_model", str(scalar[0])])
    ((_, row),) = read_jsonl(tmp_path / "both.jsonl")
    expected = expected_rewards(*scalar)
    assert row["all_scorer_scores"][0] == [len(answer) for answer in ANSWERS]
    assert row["all_scorer_scores"][1] == pytest.approx(expected, abs=1e-5)
    means = [(len(a) + r) / 2 for a, r in zip(ANSWERS, expected)]
    assert row["all_rm_scores"] == pytest.approx(means, abs=1e-5)
    assert without_digests(row)["scorers"] == ["judge.py:length", scalar[0].name]


def test_earlier_scores_and_pairs_are_replaced_and_counted(job, capsys):
    before = ROW | {"all_rm_scores": [9, 1], "chosen": "a", "rejected": "bcd",
                    "all_scorer_scores": [[9, 1], [9, 1]]}
    scored = ROW | {"all_rm_scores": [1.0, 3.0], "scorers": ["judge.py:length"]}
    assert [without_digests(row) for row in job([before, ROW], "length")] == [scored] * 2
    assert "1 had been scored or paired before, which is replaced" in capsys.readouterr().out


def test_a_labelled_file_says_how_often_each_scorer_is_right(job, capsys):
    # length scores 1 2 3 4 and half 1 1.5 2 2.5: what is right depends on the labels alone.
    answers = ["a", "bc", "def", "ghij"]
    row = {"prompt": "q", "all_generated_responses": answers}
    rows = [row | {"labels": [1, 2, 3, 4]},         # 6 of 6 pairs, the best
            row | {"labels": [4, 2, 3, 1]},         # 1 of 6, not
            row | {"labels": [0, 5, 0, 5]},         # 3 of 4, one of the two that are best
            row | {"labels": [0, 5, 5, 0]},         # 2 of 4, not
            row | {"labels": [7, 7, 7, 7]},         # says nothing
            row,                                    # no labels
            {"instruction": "q", "chosen": "long", "rejected": "low", "system": "s", "subset": 5},  # 1 of 1, the best
            {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}],
             "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "na"}]}]   # a tie is wrong
    scored = job(rows, "length", "half")
    told = f"{13 / 22:.1%} of 22 pairs of answers in the order of their labels, 50.0% of 6 best"
    assert capsys.readouterr().out.count(told) == 2         # each scorer
    assert scored[6]["all_generated_responses"] == ["long", "low"] and scored[6]["labels"] == [1, 0]
    # What is not part of the prompt stays: accuracies by subset can be made of it.
    assert scored[6]["subset"] == 5 and not {"instruction", "system", "chosen"} & scored[6].keys()
    assert [turn["content"] for turn in scored[6]["prompt"]] == ["s", "q"]
    assert scored[7]["all_scorer_scores"][0] == [2.0, 2.0]
    # Gone on with, or whole already, it says the same of the whole file.
    lines = job.output.read_text().splitlines(keepends=True)
    job.output.write_text("".join(lines[:3]))
    for _ in range(2):
        assert job(rows, "length", "half") == scored
        assert capsys.readouterr().out.count(told) == 2


def test_accuracies_are_those_of_rmb():
    # RMB: a pair is right if the chosen response scores higher; a best-of-n list if its winner beats every loser.
    found, of = score_py.accuracies([1, 0, 0, 0], [0.5, 0.1, 0.7, 0.5])
    assert (found["pairs"], found["best"], of["pairs"], of["best"]) == (1, 0, 3, 1)
    found, of = score_py.accuracies([0, 1, 0], [0.1, 0.5, 0.4])
    assert (found["pairs"], found["best"], of["pairs"], of["best"]) == (2, 1, 2, 1)


def test_a_file_without_labels_tells_no_accuracy(job, capsys):
    job([ROW], "length")
    assert "pairs of answers" not in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0, 20])
def test_an_output_that_is_begun_is_gone_on_with(job, cut, capsys):
    rows = [ROW | {"id": i, "prompt": f"q{i}"} for i in range(4)]
    whole = job(rows, "length")
    lines = job.output.read_text().splitlines(keepends=True)
    job.output.write_text("".join(lines[:2]) + lines[2][:cut])
    assert job(rows, "length") == whole
    assert "2 of 4 lines are scored already" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0, 1, 20])
@pytest.mark.parametrize("whole_lines", [0, 2])
def test_the_output_has_its_name_once_it_is_whole(job, whole_lines, cut, capsys):
    rows = [ROW | {"id": i, "prompt": f"q{i}"} for i in range(4)]
    rows += [ROW | {"all_generated_responses": ["a?", "b"]}]
    partial = job.output.with_name("out.jsonl.partial")
    with pytest.raises(RuntimeError, match="answer 2: failed with ValueError"):
        job([ROW | {"all_generated_responses": ["a?", "b?"]}, rows[-1]], "broken")
    assert not job.output.exists() and len(partial.read_text().splitlines()) == 1
    partial.unlink()
    whole = job(rows, "length")
    assert len(whole) == 5 and not partial.exists()

    lines = job.output.read_text().splitlines(keepends=True)
    job.output.unlink()
    partial.write_text("".join(lines[:whole_lines]) + lines[whole_lines][:cut])
    assert job(rows, "length") == whole and not partial.exists()
    assert ("2 of 5 lines are scored already" in capsys.readouterr().out) == (whole_lines == 2)
    job.output.unlink()
    partial.write_text(lines[0])
    with pytest.raises(ValueError, match="out.jsonl.partial:1: found another line than"):
        job(rows, "half")
    assert partial.read_text() == lines[0]


def test_an_output_of_other_answers_or_scorers_is_left_as_it_is(job):
    job([ROW], "length")
    before = job.output.read_text()
    for rows, judge in (([ROW], "half"), ([ROW | {"prompt": "r"}], "length"), ([], "length")):
        with pytest.raises(ValueError, match="out.jsonl:1: found another line than"):
            job(rows, judge)
    job.output.write_text("a file of somebody's")
    with pytest.raises(ValueError, match="out.jsonl:1: not valid JSON"):
        job([ROW], "length")
    assert before and job.output.read_text() == "a file of somebody's"


def test_another_judge_of_the_same_name_is_another_scorer(job, tmp_path):
    rows = [ROW | {"id": i} for i in range(3)]
    job(rows, "length")
    lines = job.output.read_bytes().splitlines(keepends=True)
    job.output.write_bytes(b"".join(lines[:2]))
    # Of the same size and, to a clock of seconds, the same time: compiled files in a cache look valid.
    (tmp_path / "judge.py").write_text(JUDGES.replace("return len(answer)", "return-len(answer)"))
    with pytest.raises(ValueError, match=r"out.jsonl:1: found another line than .*in.jsonl:1 scored by "
                                         r"judge.py:length [0-9a-f]{8}: scorers = \['judge.py:length "):
        score(tmp_path, "length")
    assert job.output.read_bytes() == b"".join(lines[:2])
    job.output.unlink()
    score(tmp_path, "length")
    assert [row["all_rm_scores"] for _, row in read_jsonl(job.output)] == [[-1.0, -3.0]] * 3


def score(folder, *judges):
    main(["--input", f"{folder}/in.jsonl", "--output", f"{folder}/out.jsonl", "--judge",
          *(f"{folder}/judge.py:{judge}" for judge in judges)])


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_last_line_that_lost_only_its_end_is_never_joined_to_the_next(job, n, name):
    rows = [ROW | {"id": i} for i in range(3)]
    job(rows, "length")
    whole = job.output.read_bytes()
    lines = whole.splitlines(keepends=True)
    job.output.unlink()
    job.output.with_name(name).write_bytes(b"".join(lines[:n])[:-1])
    job(rows, "length")
    assert job.output.read_bytes() == whole


def test_a_line_whose_answers_or_other_fields_were_changed_is_refused(job):
    rows = [ROW | {"id": i} for i in range(3)]
    job(rows, "length")
    lines = job.output.read_text().splitlines(keepends=True)
    for old, new in (('"id": 1', '"id": 2'), ('"bcd"', '"bce"'), ("[1.0, 3.0]", "[1.0]"), ("[1.0", "[true")):
        assert old in lines[1]
        job.output.write_text(lines[0] + lines[1].replace(old, new))
        with pytest.raises(ValueError, match="out.jsonl:2: found another line than .*in.jsonl:2"):
            job(rows, "length")
    job.output.write_text("".join(lines) + lines[2])
    with pytest.raises(ValueError, match="out.jsonl:4: found another line than the 3 of the input"):
        job(rows, "length")


def test_an_output_that_is_whole_is_left_alone_and_said_to_be(job, capsys):
    job([ROW], "length")
    before = job.output.stat()
    job([ROW], "length")
    assert job.output.stat() == before
    assert "out.jsonl: all 1 lines are scored already; nothing is left to do" in capsys.readouterr().out


def test_an_output_of_something_else_is_not_replaced_by_what_its_partial_became(job):
    job([ROW], "length")
    job.output.rename(f"{job.output}.partial")
    job.output.write_text("a file of somebody's")
    with pytest.raises(ValueError, match="out.jsonl:1: not valid JSON"):
        job([ROW], "length")
    assert job.output.read_text() == "a file of somebody's"


def test_a_second_job_on_the_same_output_is_told_who_is_at_work(job, tmp_path):
    with open(tmp_path / "out.jsonl.lock", "w") as held:
        held.write("process 12 on node3")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out.jsonl.lock: process 12 on node3 is at work on this output"):
            job([ROW], "length")
        assert not job.output.exists()
    for judge in ("length", "length", "half"):      # the lock ends with a job, also one that fails
        try:
            job([ROW], judge)
        except ValueError as e:
            assert judge == "half" and "found another line" in str(e)
    assert not (tmp_path / "out.jsonl.lock").exists()


def test_where_the_output_cannot_be_is_told_before_anything_is_loaded(job, tmp_path, monkeypatch):
    job([ROW], "length")
    monkeypatch.setattr(score_py, "load_judge", lambda name: pytest.fail("a judge was loaded"))
    (tmp_path / "file").touch()
    for output, message in (("absent/out.jsonl", "there is no folder .*absent; make it"),
                            ("file/out.jsonl", "there is no folder .*file"), (".", "not a file")):
        with pytest.raises(ValueError, match=message):
            main(["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/{output}", "--judge", "x.py:y"])


def test_no_answers_are_said_to_be_none(job):
    with pytest.raises(ValueError, match="in.jsonl: no answers to score"):
        job([], "length")
    assert not job.output.exists()


def test_a_judge_that_changes_its_turns_changes_no_others(job, tmp_path):
    (tmp_path / "own.py").write_text("def clears(turns, answer):\n    turns[0].clear()\n"
                                     "    turns.clear()\n    return 0\n")
    job([ROW], "half")
    expected = job.output.read_text().split('"all_rm_scores": ')[1][:10]
    main(["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/b.jsonl", "--judge",
          f"{tmp_path}/own.py:clears", f"{tmp_path}/judge.py:half"])
    ((_, row),) = read_jsonl(tmp_path / "b.jsonl")
    assert row["all_scorer_scores"] == [[0.0, 0.0], json.loads(expected)]


def test_scores_near_the_largest_float_have_a_mean(job, tmp_path, capsys):
    (tmp_path / "own.py").write_text("def big(turns, answer): return 1.5e308\n")
    job([ROW], "half")
    main(["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/b.jsonl", "--judge",
          *[f"{tmp_path}/own.py:big"] * 2])
    ((_, row),) = read_jsonl(tmp_path / "b.jsonl")
    assert row["all_rm_scores"] == [1.5e308] * 2
    assert "mean 1.5e+308, standard deviation 0," in capsys.readouterr().out


def test_a_clock_that_jumps_does_not_show(job, monkeypatch, capsys):
    jumps = iter(range(0, -10**9, -86400))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    job([ROW], "length")
    monkeypatch.undo()
    assert "1 lines scored in 0 s" in capsys.readouterr().out


# --- whole commands -------------------------------------------------------------------------------

SLOW = """
import time
def score(turns, answer):
    print("a judge that prints", answer * 1000)
    if turns[0]["content"] == "close":
        import sys
        sys.stdout.close()
    if answer == "stuck":
        time.sleep(1000)
    return len(answer)
"""


@pytest.fixture
def files(tmp_path):
    """(the flags of a command, lines) of 4 rows that are scored by SLOW."""
    rows = [ROW | {"id": i, "prompt": "q" * 100} for i in range(4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "slow.py").write_text(SLOW)
    return rows, ["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/out.jsonl",
                  "--judge", f"{tmp_path}/slow.py:score"]


def start(flags, **settings):
    # What a shell starts in the background is deaf to SIGINT, and so are its children.
    settings = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} | settings
    return subprocess.Popen([sys.executable, "score.py", *flags], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                            **settings)


def test_a_judge_that_closes_stdout_does_not_end_scoring(files, tmp_path):
    rows = [row | {"prompt": "close"} for row in files[0]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = start(files[1], stdout=subprocess.DEVNULL)
    _, errors = job.communicate()
    assert job.returncode == 0 and not errors
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4


def test_a_stdout_that_is_gone_does_not_end_scoring(files, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    job = start(files[1], stdout=writer)
    os.close(writer)
    _, errors = job.communicate()
    assert job.returncode == 0 and not errors
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_judge_that_never_returns_is_ended_by_a_signal_at_once(files, number, tmp_path):
    rows, flags = files
    rows = rows[:2] + [ROW | {"all_generated_responses": ["stuck"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = start(flags, stdout=subprocess.DEVNULL)
    partial = tmp_path / "out.jsonl.partial"
    until = time.monotonic() + 120
    while not partial.exists() or partial.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.05)
    job.send_signal(number)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == (130 if number == signal.SIGINT else -number)
    assert not errors
    assert partial.read_bytes().count(b"\n") == 2
    # What a dead job leaves of its lock keeps nobody out.
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    main(flags)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_is_named_and_the_same_command_goes_on(files, tmp_path):
    main(files[1])
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    size = len(whole) // 2 + 20         # in the middle of the third line
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    job = start(files[1], stdout=subprocess.DEVNULL, preexec_fn=limit)
    _, errors = job.communicate()
    assert job.returncode == 1 and errors.startswith(f"error: {tmp_path}/out.jsonl.partial: cannot be written")
    assert errors.count("\n") == 1
    lines = whole.splitlines(keepends=True)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == b"".join(lines[:2])
    main(files[1])
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("row, message", [
    ("[]", "expected a JSON object"),
    ({"prompt": "q"}, "all_generated_responses; expected a list of strings"),
    ({"all_generated_responses": ["a"]}, "no field prompt"),
    (ROW | {"all_generated_responses": []}, "is empty"),
    (ROW | {"labels": [1]}, "labels is .*; expected 2 finite numbers"),
    (ROW | {"labels": "ab"}, "labels is 'ab'; expected 2 finite numbers"),
    ({"prompt": "q", "chosen": "a", "rejected": 3}, "rejected"),
    (ROW | {"prompt": 3}, "prompt is 3")])
def test_a_malformed_line_is_named_before_anything_is_scored(row, message, job):
    with pytest.raises(ValueError, match=f"in.jsonl:2: .*{message}"):
        job([ROW, row], "length")
    assert not job.output.exists()


def test_what_a_judge_gets_wrong_is_named(job):
    for judge, found in (("word", "'good'"), ("nan", "nan"), ("none", "None"), ("yes", "True"),
                         ("huge", "1000000"), ("endless", "an object of int"),
                         ("things", "an object of Thing")):
        with pytest.raises(ValueError, match=f"in.jsonl:1: judge .*:{judge}, answer 1: gave {found}.*; "
                                             "expected a finite number"):
            job([ROW], judge)
    for judge, reason in (("broken", "ValueError: substring"), ("leaves", "SystemExit: 0")):
        with pytest.raises(RuntimeError, match=f"judge .*:{judge}, answer 1: failed with {reason}") as caught:
            job([ROW], judge)
        assert isinstance(caught.value.__cause__, ValueError | SystemExit)
        assert caught.value.__notes__[0].endswith("in.jsonl:1")
    assert not job.output.exists()


@pytest.mark.parametrize("name, message", [
    ("length", "expected a Python file and a function in it"),
    ("absent.py:length", "expected a Python file"),
    ("data:length", "expected a Python file"), ("{}/judge.py:absent", "has no function absent"),
    ("{}/judge.py:number", "has no function number")])
def test_a_judge_that_is_not_there_is_named(name, message, tmp_path):
    (tmp_path / "judge.py").write_text(JUDGES)
    with pytest.raises(ValueError, match=message):
        load_judge(name.format(tmp_path))


@pytest.mark.parametrize("text, message", [
    ("x = 1\n1 / 0", "failed with ZeroDivisionError: division by zero .*own.py, line 2"),
    ("def f(:", "failed with SyntaxError: .*line 1"),
    ("import sys\nsys.exit(0)", "failed with SystemExit: 0 .*own.py, line 2"),
    ("import no_such_module", "failed with ModuleNotFoundError"),
    ("x = '\0'", "failed with (ValueError|SyntaxError)"),
    (b"x = '\xff'", "failed with SyntaxError")])
def test_a_judge_that_cannot_be_loaded_is_named(text, message, tmp_path):
    (tmp_path / "own.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"judge = '.*own.py:f': .*own.py cannot be loaded, it {message}"):
        load_judge(f"{tmp_path}/own.py:f")


def test_a_judge_that_is_a_folder_or_has_other_colons_is_named(tmp_path):
    (tmp_path / "own.py").mkdir()
    (tmp_path / "a:b.py").write_text("def f(turns, answer): return 1")
    for name in (f"{tmp_path}/own.py:f", f"{tmp_path}/a:b.py:f:g", f"{tmp_path}/a:b.py", ":", "", "a.py:"):
        with pytest.raises(ValueError, match="expected a Python file and a function in it"):
            load_judge(name)
    assert load_judge(f"{tmp_path}/a:b.py:f")([], "") == 1


def test_a_call_needs_a_scorer(capsys):
    with pytest.raises(SystemExit):
        main(["--input", "a", "--output", "b"])
    assert "give --judge, --reward_model or both" in capsys.readouterr().err


def test_the_loop_from_answers_to_pairs_by_its_commands(tmp_path):
    """The embedded answers, scored anew and paired, are the pairs that train.py makes of the
    embedded scores."""
    rows = [row for _, row in read_jsonl(TINY / "pairs.jsonl")][:200]
    unscored = [{name: row[name] for name in ("prompt", "all_generated_responses")} for row in rows]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unscored))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scoring = ["score.py", "--judge", f"{TINY}/judge.py:score"]
    pairing = ["-m", "data.pairs"]
    for command, source, target in ((scoring, "answers", "scored"), (pairing, "scored", "pairs")):
        files = ["--input", f"{tmp_path}/{source}.jsonl", "--output", f"{tmp_path}/{target}.jsonl"]
        done = subprocess.run([sys.executable, *command, *files], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
    scored = [row for _, row in read_jsonl(tmp_path / "scored.jsonl")]
    # The embedded scores are rounded.
    assert all(math.isclose(a, b, abs_tol=0.051) for new, old in zip(scored, rows, strict=True)
               for a, b in zip(new["all_rm_scores"], old["all_rm_scores"], strict=True))
    read = lambda file: load_pairs([tmp_path / file], LetterChat(), 1000, 1000)
    (ours, dropped), (theirs, dropped_theirs) = read("pairs.jsonl"), read("rows.jsonl")
    tokens = lambda pairs: [[ids.tolist() for ids in (p.prompt, p.chosen, p.rejected)]
                            for p in pairs]
    assert tokens(ours) == tokens(theirs) and len(ours) > 100
    assert f"{len(rows) - len(ours)} dropped: all scores equal" in done.stdout and not dropped
    assert dropped_theirs == {"all scores equal": len(rows) - len(ours)}
