"""KL to the start, the judge of the loop, and what the pictures show.

Run: pytest tests/test_experiments.py
"""
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import plot
from experiments import concise
from experiments.drift import drift, kl_of_answer
from model import load_model
from tokenizer import load_chat

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny" / "model"


@pytest.fixture(scope="module")
def models():
    """The tiny model, and one that was moved a little."""
    start = load_model(TINY, torch.float64)
    moved = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(0)
    for p in moved.parameters():
        p.data += 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return moved, start


def test_kl_of_an_answer_is_the_sum_over_its_contexts(models):
    prompt, answer = [1, 5, 17, 8], [20, 33, 9, 2]
    with torch.no_grad():
        expected = 0
        for i in range(len(answer)):
            tokens = torch.tensor(prompt + answer[:i])
            logp, logq = (model(tokens)[-1].log_softmax(-1) for model in models)
            expected += F.kl_div(logq, logp, log_target=True, reduction="sum").item()
    assert kl_of_answer(*models, prompt, answer) == pytest.approx(expected, rel=1e-9)
    assert kl_of_answer(models[1], models[1], prompt, answer) == 0


def test_drift_is_kl_per_token_of_whole_answers_with_its_standard_error(models, monkeypatch):
    chat = load_chat(TINY)
    answers = [[[20, 30], [20, 30, 40]], [[50], [60, 61, 62, 63]]]      # the last one is cut
    monkeypatch.setattr("experiments.drift.generate", lambda *args, **settings: answers)
    texts = ["Sort: a, b", "Sort: c"]
    d = drift(*models, chat, texts, samples=2, max_new_tokens=4)

    sums = []
    sizes = []
    for text, of_prompt in zip(texts, answers):
        prompt = chat.encode_prompt([{"role": "user", "content": text}])
        for answer in of_prompt:
            whole = answer + [chat.end_id] * (len(answer) < 4)
            sums.append(kl_of_answer(*models, prompt, whole))
            sizes.append(len(whole))
    assert sizes == [3, 4, 2, 4] and d["tokens"] == 13 / 4 and d["cut"] == 1 / 4
    sums, sizes = torch.tensor(sums), torch.tensor(sizes, dtype=torch.double)
    assert d["kl"] == pytest.approx((sums.sum() / 13).item())
    # The jackknife: the ratio without each answer in turn.
    without = (sums.sum() - sums) / (13 - sizes)
    variance = (without - without.mean()).square().sum() * 3 / 4
    assert d["kl_stderr"] == pytest.approx(variance.sqrt().item(), rel=0.3)


@pytest.mark.parametrize("answer, points", [
    ("word " * 39 + "word.", 100),
    ("word " * 19 + "word.", 50),
    ("word " * 79 + "word!", 50),
    ("word " * 40, 50),
    ("", 0),
    ("word\n" * 40, 25),
    ("word " * 39 + "\nword.", 50),
    ("  " + "word " * 39 + "word?  ", 100)])
def test_the_concise_judge(answer, points):
    assert concise.score([{"role": "user", "content": "?"}], answer) == points


def evaluation(step, score):
    """A line of metrics.jsonl."""
    line = {"step": step, "eval_judge_score": score, "eval_judge_stderr": 1.0}
    names = ("displacement/chosen", "displacement/rejected", "rewards/margins", "logps/margins")
    for i, name in enumerate(names):
        line[f"eval_{name}"] = step + i / 10
    return line


def test_the_picture_of_runs_shows_what_metrics_hold(tmp_path):
    lines = [evaluation(0, 40), {"step": 1, "loss": 0.5}, evaluation(5, 60)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = []          # the curves of each panel
    for panel in plot.runs([tmp_path]).axes:
        curves = [line for line in panel.lines if len(line.get_xdata()) == 2]
        shown.append([list(curve.get_ydata()) for curve in curves])
    assert [0, 5] in shown[0] and [0.1, 5.1] in shown[0]
    assert [0.2, 5.2] in shown[1] and [0.3, 5.3] in shown[2]
    assert [40, 60] in shown[3]

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: no evaluations"):
        plot.runs([tmp_path])


def test_the_picture_of_shapes_holds_the_reward():
    left, right = plot.shapes().axes
    assert len(left.lines) == len(plot.ALPHAS)
    for alpha, line in zip(plot.ALPHAS, left.lines):
        logp, reward = line.get_xdata()[0], line.get_ydata()[0]
        expected = logp if alpha == 0 else (1 - math.exp(-alpha * logp)) / alpha
        assert reward == pytest.approx(expected)
