"""KL to the start, the judge of the loop, and what the pictures show. Run: pytest tests/test_experiments.py"""
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import concise
import plot
from drift import drift, kl_of_answer
from model import load_model
from tokenizer import load_chat_format, load_tokenizer

TINY = ROOT / "data" / "tiny" / "model"


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
            logp, logq = (m(torch.tensor(prompt + answer[:i]))[-1].log_softmax(-1) for m in models)
            expected += F.kl_div(logq, logp, log_target=True, reduction="sum").item()
    assert kl_of_answer(*models, prompt, answer) == pytest.approx(expected, rel=1e-9)
    assert kl_of_answer(models[1], models[1], prompt, answer) == 0


def test_drift_is_kl_per_token_of_whole_answers_with_its_standard_error(models, monkeypatch):
    chat = load_chat_format(TINY, load_tokenizer(TINY))
    answers = [[[20, 30], [20, 30, 40]], [[50], [60, 61, 62, 63]]]      # the last one is cut
    monkeypatch.setattr("drift.generate", lambda *args, **settings: answers)
    d = drift(*models, chat, ["Sort: a, b", "Sort: c"], samples=2, max_new_tokens=4)
    prompts = [chat.encode_prompt([{"role": "user", "content": c}]) for c in ("Sort: a, b", "Sort: c")]
    whole = [a + [chat.end_id] * (len(a) < 4) for some in answers for a in some]
    sums = torch.tensor([kl_of_answer(*models, p, a) for p, a in zip([prompts[0]] * 2 + [prompts[1]] * 2, whole)])
    sizes = torch.tensor([len(a) for a in whole], dtype=torch.double)
    assert sizes.tolist() == [3, 4, 2, 4] and d["tokens"] == 13 / 4 and d["cut"] == 1 / 4
    assert d["kl"] == pytest.approx((sums.sum() / 13).item())
    # The jackknife: the ratio without each answer in turn.
    without = (sums.sum() - sums) / (13 - sizes)
    assert d["kl_stderr"] == pytest.approx(((without - without.mean()).square().sum() * 3 / 4).sqrt().item(), rel=0.3)


@pytest.mark.parametrize("answer, points", [
    ("word " * 39 + "word.", 100), ("word " * 19 + "word.", 50), ("word " * 79 + "word!", 50), ("word " * 40, 50), ("", 0), ("word\n" * 40, 25),
    ("word " * 39 + "\nword.", 50), ("  " + "word " * 39 + "word?  ", 100)])
def test_the_concise_judge(answer, points):
    assert concise.score([{"role": "user", "content": "?"}], answer) == points


def evaluation(step, score):
    names = ("displacement/chosen", "displacement/rejected", "rewards/margins", "logps/margins")
    return {"step": step} | {f"eval_{name}": step + i / 10 for i, name in enumerate(names)} | {
        "eval_judge_score": score, "eval_judge_stderr": 1.0}


def test_the_picture_of_runs_shows_what_metrics_hold(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps(line) + "\n" for line in [evaluation(0, 40), {"step": 1, "loss": 0.5}, evaluation(5, 60)]))
    panels = plot.runs([tmp_path]).axes
    shown = [[list(line.get_ydata()) for line in panel.lines if len(line.get_xdata()) == 2] for panel in panels]
    assert [0, 5] in shown[0] and [0.1, 5.1] in shown[0] and [0.2, 5.2] in shown[1] and [0.3, 5.3] in shown[2]
    assert [40, 60] in shown[3]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: no evaluations"):
        plot.runs([tmp_path])


def test_the_picture_of_shapes_holds_the_reward():
    left, right = plot.shapes().axes
    assert len(left.lines) == len(plot.ALPHAS)
    for alpha, line in zip(plot.ALPHAS, left.lines):
        l, r = line.get_xdata()[0], line.get_ydata()[0]
        assert r == pytest.approx(l if alpha == 0 else (1 - torch.exp(torch.tensor(-alpha * l, dtype=torch.double)).item()) / alpha)
