"""The objective, its gradients, the configuration and whole small runs. Run: pytest tests/test_train.py"""
import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import cpu
import model as model_py
import train
from data.preference import PackedPairs, load_pairs, pack
from checkpoint import claim_output
from distributed import join_ranks, load_sharded
from model import load_model
from small import TIMES, random_pairs, sequence_logp, small_model
from tokenizer import load_chat
from train import (CHOSEN_LOGP, CHOSEN_REWARD, LOSS, REJECTED_LOGP, REJECTED_REWARD, TrainConfig, learning_rate, main,
                   make_optimizer, pair_loss, parse_config, reference_logps, resolve_config, run_row, train_step)

ROOT = Path(train.__file__).parent
TINY = ROOT / "data" / "tiny"
LENGTHS = [(5, 7, 3), (1, 1, 1), (9, 2, 12), (4, 1, 6), (3, 8, 8), (12, 4, 1)]


def config_of(**knobs):
    return resolve_config(TrainConfig(model="m", data=["d"], output="absent", **knobs))


def tiny_config(output, **changes):
    """The embedded default, cut short and without its judge."""
    config = parse_config(["--output", str(output)])
    return dataclasses.replace(config, **{"judge": "", "judge_prompts": "", "max_steps": 3, "pairs_per_step": 8,
                                          "eval_pairs": 16} | changes)


def metrics_of_run(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def one_rank():
    """A process group of this process, as main makes for itself."""
    join_ranks(timeout_minutes=1)
    yield
    torch.distributed.destroy_process_group()


# --- the objective and its gradient ---------------------------------------------------------------------------------

def reference_loss(model, start, pair, config):
    """The loss of one pair, from sequences run alone, by formulas written out here. `start` is DPO's frozen model."""
    chosen, rejected = (sequence_logp(model, pair.prompt, y) for y in (pair.chosen, pair.rejected))
    if config.method in ("dpo", "dpo_norm"):
        with torch.no_grad():
            ref_chosen, ref_rejected = (sequence_logp(start, pair.prompt, y) for y in (pair.chosen, pair.rejected))
    if config.method == "dpo":
        margin = config.beta * ((chosen - ref_chosen).sum() - (rejected - ref_rejected).sum())
    elif config.method == "dpo_norm":
        margin = config.beta * ((chosen - ref_chosen).mean() - (rejected - ref_rejected).mean())
    elif config.method == "simpo":
        margin = config.beta * (chosen.mean() - rejected.mean() - config.gamma_beta_ratio)
    else:
        p_chosen, p_rejected = chosen.mean().exp(), rejected.mean().exp()
        margin = (config.beta / config.alpha * (p_rejected**-config.alpha - p_chosen**-config.alpha)
                  - config.beta * config.gamma_beta_ratio)
    losses = [torch.log1p(torch.exp(-m)) for m in (margin, -margin)]        # of the pair, and of the pair swapped
    e = config.label_smoothing
    return (1 - e) * losses[0] + e * losses[1] - config.sft_weight * chosen.mean()


def set_reference(model, pairs, config):
    for pair, logps in zip(pairs, reference_logps(model, pairs, config).tolist()):
        pair.ref_logps = tuple(logps)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("knobs", [
    {"method": "alphapo"}, {"method": "alphapo", "alpha": -0.5, "sft_weight": 0.3}, {"method": "simpo"},
    {"method": "dpo", "beta": 0.1}, {"method": "dpo_norm", "beta": 0.5}, {"method": "alphapo", "label_smoothing": 0.2},
    {"method": "simpo", "label_smoothing": 0.1}, {"method": "dpo", "beta": 0.1, "label_smoothing": 0.4}],
    ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_losses_and_gradients_of_a_step_do_not_depend_on_packing_or_accumulation(knobs, recompute, tmp_path, one_rank):
    config, pairs = config_of(**knobs), random_pairs(LENGTHS)
    model, start = small_model(tmp_path), small_model(tmp_path, seed=1)
    if config.method in ("dpo", "dpo_norm"):
        set_reference(start, pairs, dataclasses.replace(config, tokens_per_micro_batch=40))
    losses = torch.stack([reference_loss(model, start, pair, config) for pair in pairs])
    expected = torch.autograd.grad(losses.mean(), list(model.parameters()))
    expected_loss = {pair.source: loss.item() for pair, loss in zip(pairs, losses)}

    model.recompute = recompute
    for budget in (23, 40, 10**4):
        for order in (pairs, pairs[::-1]):
            model.zero_grad()
            for row in pack(order, budget):
                results = run_row(model, row, config, grad_scale=1 / len(pairs))
                for pair, loss in zip(row.pairs, results[:, LOSS].tolist()):
                    assert loss == pytest.approx(expected_loss[pair.source], rel=1e-10)
            for p, grad in zip(model.parameters(), expected):
                assert (p.grad - grad).norm() <= 1e-10 * grad.norm()


def test_scoring_without_gradient_gives_the_same_numbers_and_touches_nothing(tmp_path):
    model, config = small_model(tmp_path), config_of()
    (row,) = pack(random_pairs(LENGTHS), 10**4)
    with torch.no_grad():
        scores = run_row(model, row, config)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(scores, run_row(model, row, config, grad_scale=1.0))
    for pair, (_, _, _, chosen, rejected) in zip(row.pairs, scores.tolist()):
        assert chosen == pytest.approx(sequence_logp(model, pair.prompt, pair.chosen).mean().item(), abs=1e-12)
        assert rejected == pytest.approx(sequence_logp(model, pair.prompt, pair.rejected).mean().item(), abs=1e-12)


def test_pairs_are_scored_in_their_order_as_many_at_a_time_as_a_step_takes(tmp_path, one_rank):
    model, pairs = small_model(tmp_path), random_pairs(LENGTHS)
    at_once = train.score_pairs(model, pairs, config_of(pairs_per_step=100))
    for n in (1, 2, 4, 5):
        assert torch.allclose(train.score_pairs(model, pairs, config_of(pairs_per_step=n)), at_once, rtol=1e-12, atol=0)
    assert at_once.shape == (len(pairs), 5)


def test_scoring_stops_after_a_signal(tmp_path, one_rank):
    model, pairs, config = small_model(tmp_path), random_pairs(LENGTHS), config_of(pairs_per_step=2)
    assert len(train.score_pairs(model, pairs, config, {signal.SIGTERM: 0})) == len(pairs)
    with pytest.raises(train.Stop):
        train.score_pairs(model, pairs, config, {signal.SIGTERM: 1})


@pytest.mark.parametrize("room", [0, 40])
def test_the_head_of_half_weights_adds_up_its_gradient_in_fp32_and_over_rows(room, tmp_path, monkeypatch):
    monkeypatch.setattr(model_py, "KEPT_LOGITS", {"cpu": room * 60})
    generator = torch.Generator().manual_seed(0)
    pairs, config = random_pairs(LENGTHS), config_of()
    N = sum(C + R for _, C, R in LENGTHS)
    states = torch.randn(N, 8, generator=generator).bfloat16()
    weight = torch.randn(60, 8, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(60, (N,), generator=generator)
    exact = [x.detach().double().requires_grad_() for x in (states, weight)]
    logps = (exact[0] @ exact[1].T).log_softmax(-1)[torch.arange(N), targets]
    sizes = [n for _, C, R in LENGTHS for n in (C, R)]
    chosen, rejected = torch.stack([part.mean() for part in logps.split(sizes)]).view(-1, 2).T
    pair_loss(config, pairs, chosen, rejected)[0].sum().backward()
    for times in (1, 2):        # rows
        _, grad_states = train.head_and_loss(states, targets, weight, pairs, config, 1.0)
        assert weight.grad.dtype == grad_states.dtype == torch.bfloat16
        for found, expected in ((weight.grad, times * exact[1].grad), (grad_states, exact[0].grad)):
            assert (found.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("column", [CHOSEN_LOGP, REJECTED_LOGP])
def test_a_reference_that_is_not_finite_is_refused_by_the_name_of_its_pair(column, tmp_path, monkeypatch, one_rank):
    whole = train.run_rows

    def run_rows(*args, **options):
        results = whole(*args, **options)
        results[2, column] = math.nan
        return results
    monkeypatch.setattr(train, "run_rows", run_rows)
    with pytest.raises(ValueError, match=r"^pairs.jsonl:3: its log-probs under the starting model"):
        reference_logps(small_model(tmp_path), random_pairs(LENGTHS), config_of(method="dpo"))


@pytest.mark.parametrize("tokens", [0, 16, 17, 30, 40])
def test_no_tensor_holds_the_logits_of_more_tokens_than_are_kept_or_of_one_pair(tmp_path, monkeypatch, tokens):
    vocab_size = 997      # a width that nothing else in the model has
    monkeypatch.setattr(model_py, "KEPT_LOGITS", {"cpu": tokens * vocab_size + 5})
    model = small_model(tmp_path, vocab_size=vocab_size)
    (row,) = pack(random_pairs(LENGTHS, vocab_size), 10**4)
    tallest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal tallest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                # logits are (tokens, V); the head's weight, seen transposed, is (32, V)
                if isinstance(t, torch.Tensor) and t.ndim == 2 and t.shape[1] == vocab_size and t.shape[0] != 32:
                    tallest = max(tallest, t.shape[0])
            return out

    with Watch():
        run_row(model, row, config_of(), grad_scale=1.0)
    # As many pairs in their order as fit.
    groups = [0]
    for _, C, R in [pair.lengths for pair in row.pairs]:
        if groups[-1] + C + R > tokens:
            groups.append(0)
        groups[-1] += C + R
    assert tallest == max(groups) >= max(C + R for _, C, R in LENGTHS) == 16
    assert tokens < 30 or tallest > 16


def test_alpha_zero_is_simpo_bit_for_bit(tmp_path):
    model = small_model(tmp_path, dtype=torch.float32)
    (row,) = pack(random_pairs(LENGTHS), 10**4)
    grads, results = [], []
    for config in (config_of(alpha=0.0, beta=2.0), config_of(method="simpo", beta=2.0)):
        model.zero_grad()
        results.append(run_row(model, row, config, grad_scale=1.0))
        grads.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(*results) and all(map(torch.equal, *grads))


@pytest.mark.parametrize("method", ["dpo", "dpo_norm"])
def test_dpo_starts_at_log_2_with_no_margin(method, tmp_path, one_rank):
    model, config, pairs = small_model(tmp_path), config_of(method=method), random_pairs(LENGTHS)
    set_reference(model, pairs, config)
    (row,) = pack(pairs, 10**4)
    scores = run_row(model, row, config, grad_scale=1.0)
    assert scores[:, LOSS].tolist() == pytest.approx([math.log(2)] * len(pairs), rel=1e-12)
    assert scores[:, [CHOSEN_REWARD, REJECTED_REWARD]].abs().max() < 1e-12


def test_a_method_without_a_loss_is_refused():
    pairs = random_pairs(LENGTHS[:1])
    config = dataclasses.replace(config_of(), method="ppo")
    with pytest.raises(ValueError, match="method 'ppo' has no loss here"):
        pair_loss(config, pairs, torch.tensor([-1.0]), torch.tensor([-2.0]))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_slices_have_the_kernels_of_cpus_too(tied, tmp_path, one_rank):
    model = small_model(tmp_path, tie_word_embeddings=tied, dtype=torch.float32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = config_of(weight_dtype="float32", compute_dtype="bfloat16")
    sliced = load_sharded(dataclasses.replace(config, model=str(tmp_path)), torch.device("cpu"))
    assert isinstance(sliced, FSDPModule) and isinstance(sliced.model.embed_tokens, cpu.Embedding)
    assert isinstance(sliced.model.norm, cpu.RMSNorm) and sliced.causal_attention.func is cpu.blocked_attention


def as_rank(rank, world, monkeypatch, all_reduce=None):
    monkeypatch.setattr(train.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)


@pytest.mark.parametrize("grad_scale", [None, 0.25])
def test_each_rank_runs_its_own_rows_and_fillers_count_for_nothing(grad_scale, tmp_path, monkeypatch):
    """Two ranks one after the other in this process: their gradients add up in .grad, as FSDP adds them."""
    config, model = config_of(), small_model(tmp_path)
    pairs = random_pairs([(5, 7, 3), (9, 2, 12), (3, 8, 8)])
    rows = pack(pairs, 23, ranks=2)
    assert [len(row.indices) for row in rows] == [1, 1, 1, 0]
    whole_row, scales, synced = train.run_row, [], []

    def noted_row(model, row, config, grad_scale=None):
        scales.append(grad_scale)
        return whole_row(model, row, config, grad_scale)

    monkeypatch.setattr(train, "run_row", noted_row)
    monkeypatch.setattr(train, "set_gradient_sync",
                        lambda model, last_row, every_row: synced.append((last_row, every_row)))
    own_results = []

    def all_reduce(results):
        own_results.append(results.clone())
        results += 100

    for rank in (0, 1):
        as_rank(rank, 2, monkeypatch, all_reduce)
        with torch.set_grad_enabled(grad_scale is not None):
            assert torch.equal(train.run_rows(model, rows, config, grad_scale), own_results[rank] + 100)

    losses = torch.stack([reference_loss(model, None, pair, config) for pair in pairs])
    assert sum(own_results)[:, LOSS].tolist() == pytest.approx(losses.tolist(), rel=1e-10)
    for rank, own in enumerate(own_results):
        assert own.any(1).nonzero()[:, 0].tolist() == sorted(i for row in rows[rank::2] for i in row.indices)
    if grad_scale is None:
        assert scales == [None] * 4 and synced == []
        assert all(p.grad is None for p in model.parameters())
    else:
        assert scales == [0.25, 0.25, 0.25, 0.0] and synced == [(False, False), (True, False)] * 2
        for p, grad in zip(model.parameters(), torch.autograd.grad(0.25 * losses.sum(), list(model.parameters()))):
            assert (p.grad - grad).norm() <= 1e-10 * grad.norm()


def test_scoring_gives_gathered_weights_up_at_its_end(tmp_path, one_rank, monkeypatch):
    model, freed = small_model(tmp_path), []
    monkeypatch.setattr(train, "forget_gathered_weights", freed.append)
    train.score_pairs(model, random_pairs(LENGTHS), config_of())
    assert freed == [model]


# --- metrics --------------------------------------------------------------------------------------------------------

def test_metrics_of_results_are_means_of_their_columns():
    results, start = torch.rand(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, chosen_reward, rejected_reward, chosen, rejected = results.mean(0).tolist()
    names = {
        "loss": loss, "rewards/chosen": chosen_reward, "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": sum(row[1] > row[2] for row in results.tolist()) / 4,
        "logps/chosen": chosen, "logps/rejected": rejected, "logps/margins": chosen - rejected}
    moved = {
        "displacement/chosen": chosen - start[:, 3].mean().item(),
        "displacement/rejected": rejected - start[:, 4].mean().item(),
        "displacement/fell": sum(a[3] < b[3] for a, b in zip(results.tolist(), start.tolist())) / 4}
    was_right = start[:, 3] > start[:, 4]
    assert 0 < was_right.sum() < 4
    moved["displacement/right"] = was_right.double().mean().item()
    for name, group in (("right", was_right), ("wrong", ~was_right)):
        moved[f"displacement/chosen_{name}"] = (results - start)[group, 3].mean().item()
        is_right = results[group, 3] > results[group, 4]
        moved[f"displacement/accuracy_{name}"] = is_right.double().mean().item()
    assert train.metrics_of(results) == pytest.approx(names, abs=1e-12)
    assert train.metrics_of(results, start) == pytest.approx(names | moved, abs=1e-12)


def rows_of(*tokens):
    """Rows of so many tokens; fillers are negative."""
    return [PackedPairs(torch.zeros(abs(n)), [], [], [0] if n > 0 else []) for n in tokens]


def test_the_work_of_a_step_is_counted_over_ranks_without_fillers(monkeypatch):
    as_rank(0, 2, monkeypatch)
    # Three rounds of two ranks. They wait for 4, 10 and 5 tokens.
    work = train.work_of(rows_of(4, -9, 10, 6, 5, 1), seconds=0.5)
    assert work == {"tokens": 26, "micro_batches": 3, "imbalance": 2 * (4 + 10 + 5) / 26, "tokens_per_second": 52}
    assert type(work["micro_batches"]) is int


def test_a_step_is_logged_with_its_metrics_and_the_pairs_that_were_not_finite(monkeypatch):
    as_rank(0, 1, monkeypatch)
    model = SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(progress={"step": 7, "skipped": 2}, config=config_of(max_grad_norm=1.25), model=model,
                          seconds_between=0.75)
    pairs = random_pairs(LENGTHS[:3])
    results = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outcome = train.StepOutcome(results, rows_of(4, 10), 1.5, applied=True, seconds=1.75)
    line = train.step_metrics(run, outcome, pairs, 1e-6, seconds=2)
    assert line == train.metrics_of(results) | {
        "step": 7, "grad_norm": 1.5, "clipped": 1, "learning_rate": 1e-6, "pairs": 3, "tokens": 14, "micro_batches": 2,
        "imbalance": 1, "tokens_per_second": 7, "skipped": 2, "seconds": 2, "seconds_rows": 1.75,
        "seconds_between": 0.75}
    for norm, applied, clipped in ((1.25, True, 0), (0.3, True, 0), (1.3, True, 1), (math.inf, False, 0)):
        outcome = dataclasses.replace(outcome, grad_norm=norm, applied=applied)
        assert train.step_metrics(run, outcome, pairs, 1e-6, 2)["clipped"] == clipped
    # A gradient that is not finite may be of any pair.
    outcome = dataclasses.replace(outcome, grad_norm=math.inf, applied=False)
    assert train.step_metrics(run, outcome, pairs, 1e-6, 2)["not_finite"] == [pair.source for pair in pairs]
    results[1, REJECTED_REWARD] = math.nan
    assert train.step_metrics(run, outcome, pairs, 1e-6, 2)["not_finite"] == [pairs[1].source]


# --- schedule and optimiser -----------------------------------------------------------------------------------------

def test_the_learning_rate_warms_up_and_follows_a_cosine():
    config = config_of(learning_rate=8.0, warmup_ratio=0.25)
    rates = [learning_rate(step, 16, config) for step in range(16)]
    assert rates[:4] == [2, 4, 6, 8]
    assert rates[4] == 8 and rates[10] == pytest.approx(4) and 0 < rates[15] < 0.2
    assert rates[7] == pytest.approx(4 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(0, 1, config) == 8 and learning_rate(0, 3, config_of(warmup_ratio=0.0)) == 7e-7


def test_a_warm_up_of_part_of_a_step_takes_the_whole_step():
    config = config_of(learning_rate=8.0, warmup_ratio=0.1)
    assert [learning_rate(step, 16, config) for step in range(3)] == [4, 8, 8]                  # 1.6 steps
    assert learning_rate(3, 16, config) == pytest.approx(4 * (1 + math.cos(math.pi / 14)))


def test_norms_and_biases_are_not_decayed(tmp_path):
    model = small_model(tmp_path, model_type="qwen2")       # has biases
    optimizer = make_optimizer(model, config_of(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name


def test_a_step_of_fewer_pairs_takes_their_mean(tmp_path, one_rank):
    """The last step of an epoch: its gradient is that of the mean over its own pairs."""
    config, pairs = config_of(pairs_per_step=128, tokens_per_micro_batch=40), random_pairs(LENGTHS)
    model = small_model(tmp_path)
    losses = torch.stack([reference_loss(model, None, pair, config) for pair in pairs])
    expected = torch.autograd.grad(losses.mean(), list(model.parameters()))
    outcome = train_step(model, make_optimizer(model, config), pairs, 1e-3, config)
    assert outcome.applied and len(outcome.rows) > 1 and 0 < outcome.seconds < 60
    assert outcome.results[:, LOSS].tolist() == pytest.approx(losses.tolist(), rel=1e-10)
    norm = torch.cat([grad.flatten() for grad in expected]).norm().item()
    assert outcome.grad_norm == pytest.approx(norm, rel=1e-10)


def test_a_step_is_applied_at_its_rate_and_leaves_no_gradient(tmp_path, one_rank):
    config, pairs = config_of(max_grad_norm=0.5, learning_rate=1.0), random_pairs(LENGTHS)
    model, same = small_model(tmp_path), small_model(tmp_path)
    losses = torch.stack([reference_loss(same, None, pair, config) for pair in pairs])
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(same.parameters(), 0.5)
    torch.optim.AdamW(same.parameters(), lr=1e-3, weight_decay=0.0).step()
    train_step(model, make_optimizer(model, config), pairs, 1e-3, config)
    for p, q in zip(model.parameters(), same.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
        assert p.grad is None


@pytest.mark.parametrize("what", ["gradient", "reward"])
def test_a_step_is_not_applied_if_a_gradient_or_a_result_alone_is_not_finite(what, tmp_path, one_rank, monkeypatch):
    model, config, pairs = small_model(tmp_path), config_of(), random_pairs(LENGTHS)
    if what == "gradient":
        model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    else:
        def infinite_rewards(*args):
            losses, *rewards = pair_loss(*args)
            return losses, *[reward * math.inf for reward in rewards]

        monkeypatch.setattr(train, "pair_loss", infinite_rewards)
    optimizer = make_optimizer(model, config)
    before = [p.detach().clone() for p in model.parameters()]
    outcome = train_step(model, optimizer, pairs, 1e-3, config)
    assert not outcome.applied
    assert math.isfinite(outcome.grad_norm) == (what != "gradient")
    assert outcome.results.isfinite().all() == (what == "gradient")
    assert all(map(torch.equal, model.parameters(), before)) and all(p.grad is None for p in model.parameters())
    assert len(optimizer.state) == len(before)
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in optimizer.state.values())


# --- configuration --------------------------------------------------------------------------------------------------

def test_without_arguments_it_is_the_tiny_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claim = lambda output, config: claim_output(output, config.method, config.resume, restarted=False)
    config = parse_config([])
    assert Path(config.model).resolve() == TINY / "model" and claim("", config) == Path("runs/alphapo-001")
    assert (config.alpha, config.beta, config.gamma_beta_ratio) == (0.25, 2.5, 0.1)
    assert claim("", parse_config(["--seed", "3"])) == Path("runs/alphapo-002")


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "m"\ndata = ["a.jsonl"]\nlearning_rate = 1e-6\nbeta = 10\nrecompute = true\n')
    config = parse_config([str(recipe), "--beta", "2", "--no-recompute"])
    assert (config.learning_rate, config.beta, config.recompute, config.epochs) == (1e-6, 2.0, False, 1)
    assert Path(config.data[0]).resolve() == tmp_path / "a.jsonl"      # paths are relative to the recipe
    assert parse_config([str(recipe), "--data", "x", "y"]).data == ["x", "y"]


@pytest.mark.parametrize("toml, message", [
    ("learning_rat = 1", "unknown key 'learning_rat'"), ("epochs = 1.5", "epochs = 1.5; expected int"),
    ("beta = true", "beta = True; expected"), ('data = "a"', "data = 'a'; expected"),
    ("a = = b", "cannot be read as a TOML"), ("recompute = 1", "recompute = 1; expected bool"),
    ("resume = true", "unknown key 'resume'")])
def test_a_bad_recipe_is_an_error_that_names_file_and_key(toml, message, tmp_path):
    (tmp_path / "r.toml").write_text(toml)
    with pytest.raises(ValueError) as error:
        parse_config([str(tmp_path / "r.toml"), "--model", "m"])
    assert message in str(error.value) and "r.toml" in str(error.value)


@pytest.mark.parametrize("flags, message", [
    ("--method ppo", "method = 'ppo'; expected one of alphapo, simpo, dpo, dpo_norm"),
    ("--method simpo --alpha 0.1", "alpha = 0.1 is given, but simpo has no such knob"),
    ("--method dpo --gamma_beta_ratio 1", "but dpo has no such knob"), ("--beta 0", "beta = 0.0; expected a positive"),
    ("--alpha nan", "alpha = nan; expected a finite"), ("--pairs_per_step 0", "pairs_per_step = 0"),
    ("--label_smoothing 0.5", "label_smoothing = 0.5"), ("--label_smoothing nan", "label_smoothing = nan"),
    ("--label_smoothing -0.1", "label_smoothing = -0.1"), ("--warmup_ratio 2", "warmup_ratio = 2.0"),
    ("--eval_data x --eval_pairs 3", "expected one of them"), ("--compile", "compile is for GPUs"),
    ("--save_dtype int8", "save_dtype = 'int8'"), ("--seed -1", "seed = -1"), ("--judge j.py:f", "judge needs"),
    ("--learning_rate inf", "learning_rate = inf"), ("--weight_dtype bfloat16", "weight_dtype = 'bfloat16'"),
    ("--compute_dtype float8", "compute_dtype = 'float8'"), ("--keep_last -1", "keep_last = -1"),
    ("--timeout_minutes 0", "timeout_minutes = 0"), ("--epochs 1.5", "--epochs: invalid int")])
def test_a_bad_flag_is_an_error_that_names_it(flags, message):
    with pytest.raises(ValueError) as error:
        parse_config(["--model", "m", "--data", "d", *flags.split()])
    assert message in str(error.value)


def test_an_unknown_flag_and_missing_data_end_the_program_with_one_line():
    run = lambda *flags: subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    unknown, absent = run("--learning_rat", "1"), run("--model", str(TINY / "model"))
    assert unknown.returncode == 1 and unknown.stderr.startswith("error: unrecognized arguments: --learning_rat")
    assert absent.returncode == 1 and absent.stderr.startswith("error: model and data are needed")
    assert "Traceback" not in unknown.stderr + absent.stderr and unknown.stderr.count("\n") == 1


def test_an_output_folder_in_use_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        main(tiny_config(tmp_path))
    with pytest.raises(ValueError, match="give --output"):
        main(parse_config(["--resume"]))


# --- whole runs -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the embedded default, without its judge: (its folder, what main returned)."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, main(tiny_config(output))


def test_a_run_logs_every_step_and_evaluates_before_and_after(run):
    output, evaluations = run
    lines = metrics_of_run(output)
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (0, True), (1, False), (2, False), (3, False), (3, True)]
    assert [lines[0], lines[-1]] == evaluations
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected", "logps/margins"}
    assert names | {"grad_norm", "learning_rate", "tokens_per_second"} <= set(lines[1])
    displacement = {"displacement/chosen", "displacement/rejected", "displacement/fell"}
    assert {f"eval_{name}" for name in names | displacement} <= set(lines[0])
    assert [lines[0][f"eval_{name}"] for name in sorted(displacement)] == [0, 0, 0]
    assert lines[0]["eval_displacement/right"] == lines[0]["eval_rewards/accuracies"]       # alpha keeps the order
    assert lines[1]["clipped"] == (lines[1]["grad_norm"] > 1)
    moved = lines[-1]["eval_logps/chosen"] - lines[0]["eval_logps/chosen"]
    assert lines[-1]["eval_displacement/chosen"] == pytest.approx(moved, abs=1e-9) and moved != 0
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def test_the_first_training_loss_is_that_of_the_starting_model_by_hand(run):
    output, _ = run
    config = tiny_config("unused")
    model, chat = load_model(config.model), load_chat(config.model)
    pairs, _ = load_pairs(config.data, chat, config.max_length, config.max_prompt_length)
    pairs, held_out = train.hold_out(pairs, config.eval_pairs, config.seed)
    step = train.epoch_steps(len(pairs), config.pairs_per_step, config.seed, 0)[0]
    with torch.no_grad():
        by_hand = lambda batch: sum(reference_loss(model, None, pair, config).item() for pair in batch) / len(batch)
        lines = metrics_of_run(output)
        assert lines[0]["eval_loss"] == pytest.approx(by_hand(held_out), rel=1e-5)
        assert lines[1]["loss"] == pytest.approx(by_hand([pairs[i] for i in step]), rel=1e-5)


def test_the_saved_folder_is_a_plain_hugging_face_model(run):
    folder = run[0] / "step-000003"
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (TINY / "model" / name).read_bytes()
    tokens = torch.arange(3, 60)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder)
    with torch.no_grad():
        assert (theirs(tokens[None]).logits[0] - ours(tokens)).abs().max() < 1e-5
    start = load_model(TINY / "model")
    assert any(not torch.equal(p, q) for p, q in zip(ours.parameters(), start.parameters()))


def test_the_saved_config_repeats_the_run_exactly(run, tmp_path):
    saved = tomllib.loads((run[0] / "config.toml").read_text())
    assert saved["alpha"] == 0.25 and saved["max_steps"] == 3
    main(parse_config([str(run[0] / "config.toml"), "--output", str(tmp_path / "again")]))
    strip = lambda lines: [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    assert strip(metrics_of_run(tmp_path / "again")) == strip(metrics_of_run(run[0]))


def dated_model(folder):
    """The embedded model with a chat template that writes the date."""
    shutil.copytree(TINY / "model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    rest = settings["chat_template"].removeprefix("{{ bos_token }}")
    settings["chat_template"] = "{{ bos_token + strftime_now('%d %b %Y') }}" + rest
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_templates_date_is_kept_with_the_run_and_used_again_by_resume(tmp_path, capsys):
    config = tiny_config(tmp_path / "out", model=str(dated_model(tmp_path / "model")), eval_pairs=0, max_steps=1)
    main(dataclasses.replace(config, date="2026-01-31"))
    assert "on 2026-01-31; without a system turn it begins '<s>31 Jan 2026" in capsys.readouterr().out
    assert tomllib.loads((tmp_path / "out" / "config.toml").read_text())["date"] == "2026-01-31"
    main(dataclasses.replace(config, resume=True))                          # on a later day
    with pytest.raises(ValueError, match="date = '2026-01-31'"):
        main(dataclasses.replace(config, resume=True, date="2026-02-01"))


def test_a_date_that_is_not_asked_for_or_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="date = 2026-01-31 is given"):
        main(tiny_config(tmp_path / "out", date="2026-01-31"))
    with pytest.raises(ValueError, match="date = 'today'"):
        config_of(date="today")


def test_a_pad_token_past_the_embedding_is_harmless_and_a_word_there_is_refused(tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "model")
    config = tiny_config(tmp_path / "out", model=str(tmp_path / "model"), eval_pairs=0, max_steps=1)
    token = {"content": "<pad>", "special": True}
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    write = lambda: (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"added_tokens_decoder": {"420": token}}))
    write()
    main(config)
    token["special"] = False                                                # text may turn into it
    write()
    with pytest.raises(ValueError, match="use 421 tokens .'<pad>' is the last., the embedding has 420 rows"):
        main(dataclasses.replace(config, output=str(tmp_path / "other")))


def test_large_data_is_tokenised_once(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "CACHE_BYTES", 1)
    cache = tmp_path / "cache"
    main(tiny_config(tmp_path / "first", cache=str(cache)))
    (kept,) = cache.iterdir()
    monkeypatch.setattr(train, "load_pairs", None)
    main(tiny_config(tmp_path / "again", cache=str(cache)))
    for name in ("first", "again"):
        for a, b in zip(metrics_of_run(run[0]), metrics_of_run(tmp_path / name), strict=True):
            assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    assert "296 dropped: all scores equal" in capsys.readouterr().out.split("tokens are kept in")[2]
    with pytest.raises(TypeError):      # other limits are other pairs
        main(tiny_config(tmp_path / "other", cache=str(cache), max_length=100))
    with pytest.raises(ValueError, match="absent.jsonl: no such file"):
        main(tiny_config(tmp_path / "other", data=["absent.jsonl"]))
    assert [*cache.iterdir()] == [kept]


def test_accumulation_and_recomputation_give_the_same_run(run, tmp_path):
    main(tiny_config(tmp_path / "small", tokens_per_micro_batch=120, recompute=True))
    for a, b in zip(metrics_of_run(run[0]), metrics_of_run(tmp_path / "small")):
        assert b.get("micro_batches", 9) > 3 >= a.get("micro_batches", 1)
        for name in set(a) & {"loss", "grad_norm", "eval_loss", "eval_logps/chosen"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5)


@pytest.fixture
def short_config(tmp_path):
    """A run of six steps of two pairs each."""
    rows = [json.loads(line) for line in (TINY / "pairs.jsonl").read_text().splitlines()[:40]]
    rows = [row for row in rows if max(row["all_rm_scores"]) > min(row["all_rm_scores"])][:14]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_config(tmp_path / "out", data=[str(tmp_path / "pairs.jsonl")], eval_pairs=2, pairs_per_step=2,
                       max_steps=0, epochs=1)


@pytest.mark.parametrize("bad_steps", [{1, 2, 4, 5}, {1, 2, 3}])
def test_a_run_gives_up_after_steps_in_a_row_that_are_not_finite_and_not_after_as_many_apart(bad_steps, short_config,
                                                                                             monkeypatch):
    loss, steps = train.run_rows, []

    def sometimes_nan(model, rows, config, grad_scale=None):
        if grad_scale is None:
            return loss(model, rows, config)
        steps.append(len(steps) + 1)
        return loss(model, rows, config, grad_scale) * (math.nan if steps[-1] in bad_steps else 1)

    monkeypatch.setattr(train, "run_rows", sometimes_nan)
    if bad_steps == {1, 2, 3}:
        with pytest.raises(ValueError, match="step 3: 3 steps in a row were not finite"):
            main(short_config)
    else:
        main(short_config)
    skipped = [line["skipped"] for line in metrics_of_run(short_config.output) if "skipped" in line]
    assert skipped == ([1, 2, 3] if bad_steps == {1, 2, 3} else [1, 2, 2, 3, 4, 4])


def test_the_last_step_is_evaluated_once_and_saved_once(short_config, monkeypatch):
    save, saved = train.save_checkpoint, []

    def save_and_note(model, optimizer, progress, *rest):
        saved.append(progress["step"])
        return save(model, optimizer, progress, *rest)

    monkeypatch.setattr(train, "save_checkpoint", save_and_note)
    evaluations = main(dataclasses.replace(short_config, eval_every=3, save_every=2))
    lines = metrics_of_run(short_config.output)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6] == [e["step"] for e in evaluations]
    assert saved == [2, 4, 6]


@pytest.mark.parametrize("method", ["simpo", "dpo", "dpo_norm"])
def test_the_baselines_run_from_the_same_recipe(method, tmp_path):
    config = parse_config(["--method", method, "--output", str(tmp_path / "out")])
    config = dataclasses.replace(config, judge="", judge_prompts="", max_steps=2, pairs_per_step=8, eval_pairs=16)
    first, last = main(config)
    assert last["eval_loss"] < first["eval_loss"] and (tmp_path / "out" / "step-000002").exists()


def test_fp32_weights_can_be_saved_and_the_judge_sees_sampled_answers(tmp_path):
    (tmp_path / "judge.py").write_text("def length(turns, answer):\n    assert turns[-1]['role'] == 'user'\n"
                                       "    return len(answer)\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Sort these words: owl, moss"}\n' * 2)
    first, last = main(tiny_config(tmp_path / "out", max_steps=1, save_dtype="float32", judge_prompts=str(
        tmp_path / "prompts.jsonl"), judge=f"{tmp_path}/judge.py:length"))
    assert first["eval_judge_score"] > 3 and last["eval_judge_score"] > 3
    assert all(w.dtype == torch.float32 for f in (tmp_path / "out/step-000001").glob("*.safetensors")
               for w in load_file(f).values())


def test_a_judge_that_is_not_there_is_named(tmp_path):
    (tmp_path / "judge.py").write_text("")
    (tmp_path / "prompts.jsonl").write_text('{"text": "hi"}\n')
    config = tiny_config(tmp_path / "out", judge_prompts=str(tmp_path / "prompts.jsonl"))
    for judge, message in (("absent.py:f", "expected a Python file"), (f"{tmp_path}/judge.py:f", "has no function f")):
        with pytest.raises(ValueError, match=message):
            main(dataclasses.replace(config, judge=judge))
    with pytest.raises(ValueError, match="prompts.jsonl:1: no field prompt"):
        main(dataclasses.replace(config, judge=f"{TINY}/judge.py:score"))


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text()) | {"vocab_size": 400}
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    weights = load_file(tmp_path / "model/model.safetensors")
    cut = {name: w[:400].contiguous() if "embed" in name or "head" in name else w for name, w in weights.items()}
    save_file(cut, tmp_path / "model/model.safetensors")
    with pytest.raises(ValueError, match="use 420 tokens .*, the embedding has 400 rows"):
        main(tiny_config(tmp_path / "out", model=str(tmp_path / "model")))
    assert not (tmp_path / "out").exists()


def test_pairs_longer_than_the_models_positions_are_refused(tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text()) | {"max_position_embeddings": 30}
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"pairs.jsonl:\d+: longer than the 30 positions"):
        main(tiny_config(tmp_path / "out", model=str(tmp_path / "model")))
