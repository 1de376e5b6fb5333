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
from alphapo import alphapo_loss, alphapo_reward
from experiments import equal_kl, four_words, order
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


SENTENCE = "The sailor crossed the old bridge with a basket of pepper."


@pytest.mark.parametrize("answer, points", [
    (SENTENCE, 100),
    (f"  {SENTENCE}\n", 100),
    ("Sailors crossed the old BRIDGE with their baskets full of peppers!", 100),         # plurals, capitals
    ("The sailor crossed the old bridge with a dog on it.", 50),
    ("The tailor crossed the footbridge with a pepperoni and a basketball.", 0),       # other words
    ("Sailor, bridge, basket, pepper.", 50),                                          # too short
    (SENTENCE[:-1] + " and went on and on along the river until he came home.", 50),     # 22 words
    ("The sailor crossed the old bridge with a basket and much pepper " + "again " * 7 + "again.", 100),     # 20
    ("The sailor crossed the bridge: basket, pepper.", 50),                           # 7 words
    ("The old sailor crossed the bridge: basket, pepper.", 100),                      # 8
    (SENTENCE[:-1], 50),
    (SENTENCE.replace(" with", "\nwith"), 50),
    ("Sailor\nbridge", 12.5),
    ("", 0)])
def test_the_judge_of_four_words(answer, points):
    turns = [{"role": "user", "content": "Use all of these words: sailor, bridge, basket, pepper."}]
    assert four_words.score(turns, answer) == points


def test_prompts_of_four_words_are_those_of_their_seed(tmp_path):
    texts = []
    for seed in (0, 0, 1):
        four_words.main(["--prompts", "50", "--seed", f"{seed}", "--output", str(tmp_path / "p.jsonl")])
        texts.append([json.loads(line)["prompt"] for line in open(tmp_path / "p.jsonl")])
    assert texts[0] == texts[1] and not set(texts[0]) & set(texts[2])
    for text in texts[0]:
        given = text.removesuffix(".").rpartition(": ")[2].split(", ")
        assert len(set(given)) == 4 and set(given) <= set(four_words.NOUNS)
        assert four_words.score([{"content": text}], f"Here are {' and '.join(given)}, all of them.") == 100


FOUR_WORDS = Path(four_words.__file__).parent


def test_the_pairs_of_four_words_have_the_scores_of_the_judge_and_prompts_of_their_seed(tmp_path):
    made = {}
    for seed, n in ((0, 587), (1, 128)):
        four_words.main(["--prompts", f"{n}", "--seed", f"{seed}", "--output", str(tmp_path / "p.jsonl")])
        made[seed] = [json.loads(line)["prompt"] for line in open(tmp_path / "p.jsonl")]
    assert made[1] == [json.loads(line)["prompt"] for line in open(FOUR_WORDS / "four_words_prompts.jsonl")]
    pairs = [json.loads(line) for line in open(FOUR_WORDS / "four_words_pairs.jsonl")]
    assert len(pairs) == 576 and {pair["prompt"] for pair in pairs} <= set(made[0])
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert four_words.score([{"content": pair["prompt"]}], pair[side]) == pair[f"{side}_score"]
        assert pair["chosen_score"] >= pair["rejected_score"] + 20
    means = [sum(pair[f"{side}_score"] for pair in pairs) / 576 for side in ("chosen", "rejected")]
    page = (FOUR_WORDS / "README.md").read_text(encoding="utf-8")
    assert "answers score {:.0f} and rejected ones {:.0f}.".format(*means) in page


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


# --- equal_kl.py ----------------------------------------------------------------------------------------------------

def measured(label, seed, *points):
    """Measurements of a run: (KL, score) at steps 0, 8, ..."""
    return [{"label": label, "seed": seed, "step": 8 * i, "kl": kl, "score": score,
             "displacement_chosen": score / 100, "displacement_rejected": 0.0} for i, (kl, score) in enumerate(points)]


def test_a_metric_at_a_kl_lies_on_the_line_between_two_measurements():
    run = measured("x", 0, (0, 50), (0.1, 70), (0.3, 60), (0.2, 10), (0.5, 0))
    for kl, expected in ((0.05, 60), (0.1, 70), (0.2, 65), (0.25, 62.5), (0.4, 10 / 3)):    # where it is first
        assert equal_kl.at_kl(run, kl, "score") == pytest.approx(expected)
    assert equal_kl.at_kl(run, 0.51, "score") is None


def test_the_table_at_equal_kl_is_paired_and_says_who_never_gets_there(monkeypatch):
    monkeypatch.setattr(equal_kl, "COMPARED", (equal_kl.SIMPO, "other"))
    monkeypatch.setattr(equal_kl, "KLS", (0.1, 0.4))
    rows = []
    for seed, above in enumerate((1, 1, 1, 1, 6.1)):        # differences of 2 with a standard error of 1
        rows += measured(equal_kl.SIMPO, seed, (0, 50), (0.2, 50 + 20 * seed), (0.5, 0))
        rows += measured("other", seed, (0, 50 + 2 * above), (0.2, 50 + 20 * seed), (0.4 if seed else 0.3, 0))
    lines = equal_kl.table(rows).splitlines()
    assert lines[2].startswith(f"| {equal_kl.SIMPO} | +70.0 | +0.700 | +0.000 | ")
    assert lines[3].startswith("| other - SimPO | +2.0 +- 1.0 | +0.020 +- 0.010 | ")
    assert lines[3].count(" 1 of 5 never get there |") == 3


# --- order.py -------------------------------------------------------------------------------------------------------

ORDER = [json.loads(line) for line in order.RESULTS.read_text().splitlines()]


@pytest.mark.parametrize("alpha", [-1, 0.25, 1, 2])
def test_a_matched_simpo_has_the_slope_of_the_shaped_reward_at_the_point(alpha):
    logp = torch.tensor([-0.7], dtype=torch.float64, requires_grad=True)
    matched = order.matched_beta(alpha, 2.5, logp.item())
    slopes = [torch.autograd.grad(alphapo_reward(logp, alpha=a, beta=beta).sum(), logp)[0].item()
              for a, beta in ((alpha, 2.5), (0, matched))]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-12) and slopes[0] != pytest.approx(2.5, rel=0.1)
    # And the same target margin: near the point the losses of a pair, and their gradients, agree.
    chosen, rejected = logp + 1e-6, logp - 1e-6
    losses = [alphapo_loss(chosen, rejected, alpha=a, beta=beta, gamma_beta_ratio=order.GAMMA / beta)[0]
              for a, beta in ((alpha, 2.5), (0, matched))]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-11)


def test_the_runs_of_order_are_matched_at_the_mean_log_prob_of_the_start():
    mean = order.tiny_pairs()[2].mean().item()
    for r in ORDER:
        assert r["beta"] == pytest.approx(order.matched_beta(r["alpha"], order.BETA, mean) if r["method"] == "simpo"
                                          else order.BETA, rel=1e-6)


def test_every_way_of_order_has_every_seed_once():
    keys = [(r["labels"], r["seed"], r["method"], r["alpha"]) for r in ORDER]
    ways = [("simpo", 0), *((method, alpha) for alpha in order.ALPHAS for method in ("alphapo", "simpo"))]
    assert len(keys) == 70 and set(keys) == {
        (labels, seed, *way) for labels in order.LABELS for seed in order.SEEDS for way in ways}
    # Paired: what is right at step 0 depends on the seed and the labels alone.
    shares = {(r["labels"], r["seed"], r["trained_on"]["right"], r["held_out"]["right"]) for r in ORDER}
    assert len(shares) == 10 and {r["steps"] for r in ORDER} == {20}


def test_a_split_holds_out_the_same_pairs_whatever_is_flipped():
    held_out, trained_on, none = order.split(1752, 0.0, 3)
    again, same, flipped = order.split(1752, 0.4, 3)
    assert (held_out, trained_on, none) == (again, same, [])
    assert sorted(held_out + trained_on) == list(range(1752)) and len(held_out) == order.HELD_OUT
    assert len(set(flipped)) == 496 and set(flipped) <= set(trained_on)
    assert order.split(1752, 0.4, 4)[0] != held_out


def test_most_wrong_pairs_of_noisy_labels_are_flipped_ones():
    _, pairs, start = order.tiny_pairs()
    shares = []
    for seed in order.SEEDS:
        _, trained_on, flipped = order.split(len(pairs), 0.4, seed)
        labelled = start.clone()
        labelled[flipped] = labelled[flipped].flip(1)
        wrong = {i for i in trained_on if not labelled[i, 0] > labelled[i, 1]}
        shares.append(len(wrong & set(flipped)) / len(wrong))
    page = " ".join((order.ROOT / "experiments" / "README.md").read_text(encoding="utf-8").split())
    assert f"{100 * sum(shares) / 5:.0f} % of the wrong ones were flipped" in page
    assert f"the mean log-prob of the start, {start.mean():.2f}:" in page


def order_run(seed, method, alpha, right, wrong):
    found = {"chosen_right": right, "chosen_wrong": wrong, "chosen": (3 * right + wrong) / 4, "right": 0.75,
             "accuracy_right": 1.0, "accuracy_wrong": 0.5}
    return {"labels": "clean", "seed": seed, "method": method, "alpha": alpha, "trained_on": found, "held_out": found}


def test_differences_are_paired_by_seed():
    # Seeds differ by 0.1, ways by 0.001, 0.002 and 0.003 in the right group: mean 2, standard error 1 / sqrt(3).
    rows = [order_run(seed, "simpo", 0, 0.1 * seed, 0.5) for seed in range(3)]
    rows += [order_run(seed, "alphapo", 1, 0.1 * seed + 0.001 * (seed + 1), 0.49) for seed in range(3)]
    way, base = ("alphapo", 1), order.SIMPO
    assert order.difference(rows, "clean", way, base, "held_out", "right") == pytest.approx((2, 1 / math.sqrt(3)))
    assert order.difference(rows, "clean", way, base, "held_out", "wrong") == pytest.approx((-10, 0), abs=1e-9)
    assert order.difference(rows, "clean", base, None, "held_out", "accuracy") == pytest.approx((87.5, 0))
    assert [order.cell(*x) for x in ((2.0, 0.9), (-2.0, 1.1))] == ["**+2.0 +- 0.9**", "-2.0 +- 1.1"]


def test_the_figure_of_order_shows_the_differences_with_their_errors():
    figure = order.draw(ORDER)
    for i, place in enumerate(order.PLACES):
        for j, labels in enumerate(order.LABELS):
            panel = figure.axes[2 * i + j]
            means = [list(container.lines[0].get_ydata()) for container in panel.containers]
            for group in order.GROUPS:
                for base in (order.SIMPO, None):
                    expected = [order.difference(ORDER, labels, ("alphapo", a), base or ("simpo", a), place, group)[0]
                                for a in order.ALPHAS]
                    assert expected in means


def test_one_run_of_order_moves_what_it_says(monkeypatch, tmp_path):
    # Two steps' worth of pairs, most of them held out.
    monkeypatch.setattr(order, "HELD_OUT", 1752 - 80)
    monkeypatch.setattr(order, "RATE", 1e-3)
    r = order.run("40 % flipped", 0, "alphapo", 1, 2.5)
    assert r["steps"] == 2 and r["clipped"] == 1
    assert 0.3 < r["trained_on"]["right"] < 0.75 < r["held_out"]["right"]       # labels as given; clean
    assert r["trained_on"]["rejected"] < r["trained_on"]["chosen"]
