"""Judges and reward models that score answers, against transformers.

    pytest tests/test_score.py
"""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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


@pytest.mark.parametrize("row, message", [
    ("[]", "expected a JSON object"),
    ({"prompt": "q"}, "all_generated_responses; expected a list of strings"),
    ({"all_generated_responses": ["a"]}, "no field prompt"),
    (ROW | {"all_generated_responses": []}, "is empty"),
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
