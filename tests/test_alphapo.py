"""The loss against closed forms in 60 digits, the paper's numbers, and a small model under gradient
flow.

    pytest tests/test_alphapo.py
"""
import ast
import itertools
import math
import re
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import mpmath
import pytest
import torch

import alphapo
from alphapo import (alphapo_loss, alphapo_reward, average_logps, displacement_metrics, dpo_loss, margin_losses,
                     pair_metrics, simpo_loss)

mpmath.mp.dps = 60
ALPHAS = [sign * size for size in (1e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.25, 1, 2, 4)
          for sign in (-1, 1)]
LOGPS = [-0.01, -0.1, -0.5, -0.8, -2.0, -11.8, -30.0, -50.0, -80.0]
PAIRS = list(itertools.permutations(LOGPS, 2))      # each in the right order and in the wrong one


def exact_margin(chosen, rejected, alpha, beta, ratio):
    reward = lambda logp: beta * logp if alpha == 0 else -beta * mpmath.expm1(-alpha * logp) / alpha
    return reward(chosen) - reward(rejected) - ratio * beta


def exact_loss(chosen, rejected, alpha, beta, ratio):
    return mpmath.log1p(mpmath.exp(-exact_margin(chosen, rejected, alpha, beta, ratio)))


def exact_gradients(chosen, rejected, alpha, beta, ratio):
    weight = beta / (1 + mpmath.exp(exact_margin(chosen, rejected, alpha, beta, ratio)))
    return -weight * mpmath.exp(-alpha * chosen), weight * mpmath.exp(-alpha * rejected)


def numbers(*values):
    return [mpmath.mpf(float(v)) for v in values]


def loss_and_gradients(pairs, dtype, **knobs):
    chosen, rejected = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in zip(*pairs))
    losses, _, _ = alphapo_loss(chosen, rejected, **knobs)
    losses.sum().backward()
    return chosen.detach(), rejected.detach(), losses.detach(), chosen.grad, rejected.grad


# --- exactness ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_loss_and_gradients_are_exact_to_1e_6(alpha, dtype):
    # The rounded input is the exact input. Below the smallest normal number of a type, 0 is as good
    # as it gets.
    beta, ratio = 2.5, 0.1
    rows = zip(*loss_and_gradients(PAIRS, dtype, alpha=alpha, beta=beta, gamma_beta_ratio=ratio))
    for chosen, rejected, *got in rows:
        args = numbers(chosen, rejected, alpha, beta, ratio)
        for value, exact in zip(got, [exact_loss(*args), *exact_gradients(*args)]):
            limits = torch.finfo(value.dtype)
            # A float32 input cannot hold a gradient of 1e139; a float64 one can.
            if abs(exact) < limits.max:
                error = abs(mpmath.mpf(value.item()) - exact)
                assert error <= 1e-6 * abs(exact) + limits.tiny, (
                    float(chosen), float(rejected), value, exact)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1e-6, 0.25, 2.0])
def test_gradient_formula_is_the_derivative_of_the_loss(alpha):
    for chosen, rejected in [(-0.5, -0.8), (-0.8, -0.5), (-3.0, -2.5)]:
        args = numbers(chosen, rejected, alpha, 2.5, 0.1)
        for side, formula in enumerate(exact_gradients(*args)):
            slope = mpmath.diff(lambda logp: exact_loss(*args[:side], logp, *args[side + 1:]),
                                args[side])
            assert abs(slope - formula) <= mpmath.mpf(10) ** -20 * abs(formula)


@pytest.mark.parametrize("alpha", [-4.0, -0.25, 0.0, 1e-8, 0.25, 1.0, 4.0])
def test_autograd_agrees_with_finite_differences(alpha):
    chosen, rejected = torch.tensor([[-0.5, -0.8, -1.3, -2.0], [-0.8, -0.5, -1.2, -2.1]],
                                    dtype=torch.float64)
    loss = lambda c, r: alphapo_loss(c, r, alpha=alpha, beta=2.5, gamma_beta_ratio=0.1)[0]
    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


def simpo_by_hand(chosen, rejected, beta, ratio):
    margins = beta * chosen.double() - beta * rejected.double() - ratio * beta
    return -torch.nn.functional.logsigmoid(margins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta, ratio", [(2.5, 0.1), (2.5, 0.55), (10.0, 0.3)])
def test_alpha_zero_is_simpo_bit_for_bit(beta, ratio, dtype):
    chosen, rejected, losses, *grads = loss_and_gradients(PAIRS, dtype, alpha=0.0, beta=beta,
                                                          gamma_beta_ratio=ratio)
    expected = simpo_by_hand(chosen.requires_grad_(), rejected.requires_grad_(), beta, ratio)
    assert torch.equal(losses, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.sum(), (chosen, rejected))))
    assert torch.equal(simpo_loss(chosen, rejected, beta=beta, gamma_beta_ratio=ratio)[0], expected)


def test_simpo_loss_is_the_one_of_the_simpo_paper():
    # Meng et al., equation 6, in floats:
    #     -log sigmoid(beta / |y_w| log pi(y_w) - beta / |y_l| log pi(y_l) - gamma)
    losses, chosen_rewards, rejected_rewards = simpo_loss(
        torch.tensor([-0.34]), torch.tensor([-0.5]), beta=2.5, gamma_beta_ratio=0.55)
    margin = 2.5 * -0.34 - 2.5 * -0.5 - 0.55 * 2.5
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-margin)), rel=1e-6)
    assert (chosen_rewards.item(), rejected_rewards.item()) == pytest.approx(
        (2.5 * -0.34, 2.5 * -0.5), rel=1e-6)


@pytest.mark.parametrize("alpha", [-1e-9, 1e-9])
def test_loss_and_gradients_are_continuous_at_alpha_zero(alpha):
    # The distance to SimPO shrinks with alpha: |r_alpha - r_0| is about
    # beta * alpha * l^2 / 2 = 1e-5 at l = -80.
    near = loss_and_gradients(PAIRS, torch.float64, alpha=alpha, beta=2.5, gamma_beta_ratio=0.1)
    at_zero = loss_and_gradients(PAIRS, torch.float64, alpha=0.0, beta=2.5, gamma_beta_ratio=0.1)
    for a, b in zip(near[2:], at_zero[2:]):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=0)


# --- no overflow ----------------------------------------------------------------------------------

def naive_rewards(logps, alpha, beta):
    """How the formula is often coded: the probability first, then its power, in float32."""
    probabilities = torch.tensor(logps, dtype=torch.float32).exp()
    return beta * (1 - probabilities ** -alpha) / alpha


@pytest.mark.parametrize("alpha, pair", [
    (2.0, (-50.0, -50.5)), (2.0, (-50.5, -50.0)), (0.25, (-105.0, -106.0)),
    (0.25, (-106.0, -105.0)), (1.0, (-90.0, -89.0)), (-0.25, (-110.0, -105.0))])
def test_loss_and_gradients_are_finite_where_the_naive_form_is_not(alpha, pair):
    if alpha > 0:
        assert not naive_rewards(pair, alpha, 2.5).isfinite().any()
    else:
        assert naive_rewards(pair, alpha, 2.5).diff() == 0      # p is 0 in float32: both look alike
    _, _, *got = loss_and_gradients([pair], torch.float64, alpha=alpha, beta=2.5,
                                    gamma_beta_ratio=0.1)
    args = numbers(*pair, alpha, 2.5, 0.1)
    for value, exact in zip(got, [exact_loss(*args), *exact_gradients(*args)]):
        assert value.isfinite().all()
        assert value.item() == pytest.approx(float(exact), rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("alpha, digits_lost", [(1e-3, 1e-5), (1e-6, 1e-2)])
def test_reward_keeps_its_digits_at_small_alpha_where_the_naive_form_loses_them(alpha, digits_lost):
    logps = torch.linspace(-0.2, -2, 50)
    exact = torch.tensor([float(-2.5 * mpmath.expm1(-alpha * x) / alpha) for x in numbers(*logps)],
                         dtype=torch.float64)
    relative_error = lambda rewards: (rewards / exact - 1).abs().max()
    assert relative_error(naive_rewards(logps.tolist(), alpha, 2.5)) > digits_lost
    assert relative_error(alphapo_reward(logps, alpha=alpha, beta=2.5)) < 1e-12


@pytest.mark.parametrize("alpha", [-1e-6, -1e-3, -0.5, -1.0])
def test_rewards_and_their_derivatives_keep_all_digits_where_alpha_is_negative(alpha):
    # exp(x) - 1 is wrong by 1e-10 of itself at x = -1e-6, and expm1(x) + 1 by 4e-16 of exp(x) at x = -2.
    logps = torch.linspace(-1.9999, -0.0099, 500, dtype=torch.float64, requires_grad=True)
    rewards = alphapo_reward(logps, alpha=alpha, beta=1.0)
    rewards.sum().backward()
    for logp, reward, slope in zip(numbers(*logps.detach()), rewards.tolist(), logps.grad.tolist()):
        assert abs(reward / (-mpmath.expm1(-alpha * logp) / alpha) - 1) < 1e-15
        assert abs(slope / mpmath.exp(-alpha * logp) - 1) < (2.5e-16 if -alpha * logp < -1 else 6e-16)


# --- the paper's numbers --------------------------------------------------------------------------

def slope(chosen, rejected, alpha, beta=2.5, ratio=0.1):
    """|dL/dv| of a parameter v that moves the chosen log-prob by 1 and the rejected one by 0.5."""
    v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    alphapo_loss(chosen + v, rejected + 0.5 * v, alpha=alpha, beta=beta,
                 gamma_beta_ratio=ratio)[0].backward()
    return v.grad.abs().item()


@pytest.mark.parametrize("alpha, right_order, wrong_order", [
    (-4, ".157", ".039"), (-1, ".443", ".239"), (-0.5, ".474", ".483"), (0, ".472", ".914"),
    (0.25, ".453", "1.24"), (0.5, ".420", "1.67"), (1, ".312", "2.96"), (2, ".044", "8.58"),
    (4, "3.5e-4", "52"), (8, "4e-72", "1436")])
def test_gradient_sizes_of_the_worked_table(alpha, right_order, wrong_order):
    for pair, printed in [((-0.5, -0.8), right_order), ((-0.8, -0.5), wrong_order)]:
        half_a_unit = Decimal(5).scaleb(Decimal(printed).as_tuple().exponent - 1)
        assert abs(Decimal(slope(*pair, alpha)) - Decimal(printed)) <= half_a_unit


def test_gradient_vanishes_as_alpha_goes_to_minus_infinity():
    for pair in [(-0.5, -0.8), (-0.8, -0.5)]:
        sizes = [slope(*pair, alpha) for alpha in (-5, -10, -20, -40)]
        assert sizes == sorted(sizes, reverse=True) and 0 < sizes[-1] < 1e-7


def test_gradient_vanishes_in_the_right_order_and_blows_up_in_the_wrong_one_as_alpha_grows():
    vanishing = [slope(-0.5, -0.8, alpha) for alpha in (2, 4, 6, 8)]
    assert vanishing == sorted(vanishing, reverse=True) and vanishing[-1] < 1e-70
    growing = [slope(-0.8, -0.5, alpha) for alpha in (2, 8, 40, 80)]
    assert growing == sorted(growing) and growing[-1] > 1e25


def test_gradient_is_not_monotonic_in_alpha():
    falling, peak, rising = (slope(-0.5, -0.8, alpha) for alpha in (1, -0.5, -4))
    assert peak > falling and peak > rising


@pytest.mark.parametrize("logp, printed", [(-0.2, "1.05"), (-1.0, "1.28"), (-2.0, "1.65"),
                                           (-11.76, "18.9")])
def test_a_log_prob_weighs_exp_of_minus_alpha_times_itself(logp, printed):
    logps = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    alphapo_reward(logps, alpha=0.25, beta=1.0).backward()
    assert f"{logps.grad.item():.{4 - len(printed.split('.')[0]) - 1}f}" == printed


def test_alpha_one_and_minus_one_shape_the_reward_by_the_geometric_mean_probability():
    probabilities = torch.tensor([0.9, 0.5, 0.01], dtype=torch.float64)
    torch.testing.assert_close(alphapo_reward(probabilities.log(), alpha=1, beta=2.0),
                               2 * (1 - 1 / probabilities))
    torch.testing.assert_close(alphapo_reward(probabilities.log(), alpha=-1, beta=2.0),
                               2 * (probabilities - 1))


# --- gradient flow of a small model (Corollary 3.3) -----------------------------------------------

STEP = 1e-7         # so short that the flow is straight
BETA = 0.25         # small, so that no pair is so right that its gradient is 0 in float64


class TinyModel:
    """A bigram model of 5 tokens, an embedding times an output matrix, that scores one pair of
    responses."""

    def __init__(self, seed):
        rng = torch.Generator().manual_seed(seed)
        theta = torch.randn(2, 5, 3, dtype=torch.float64, generator=rng) * 0.7
        self.theta = theta.requires_grad_()
        prompt = torch.randint(5, (1,), generator=rng)
        self.pair = [torch.cat([prompt, torch.randint(5, (n,), generator=rng)]) for n in (3, 4)]
        self.chosen, self.rejected = (logp.item() for logp in self.logps(self.theta))
        chosen, rejected = (torch.autograd.grad(self.logps(self.theta)[i], self.theta)[0]
                            for i in (0, 1))
        self.g_cc, self.g_cr = (chosen * chosen).sum().item(), (chosen * rejected).sum().item()

    def logps(self, theta):
        """Average log-prob of the chosen and of the rejected response."""
        table = (theta[0] @ theta[1].T).log_softmax(-1)     # (5, 5): log-prob of each next token
        return [table[tokens[:-1], tokens[1:]].mean() for tokens in self.pair]

    def flow(self, alpha):
        """The pair's log-probs and rewards before and after a tiny step down the loss, (2, 4), and
        the step's time."""
        def score(logps):
            rewards = [alphapo_reward(x, alpha=alpha, beta=BETA) for x in logps]
            return torch.stack([*logps, *rewards])

        logps = self.logps(self.theta)
        loss, _, _ = alphapo_loss(*logps, alpha=alpha, beta=BETA, gamma_beta_ratio=0.1)
        gradient, = torch.autograd.grad(loss, self.theta)
        time = STEP / gradient.norm()
        after = score(self.logps(self.theta - time * gradient))
        return torch.stack([score(logps), after]).detach(), time

    def chosen_change(self, alpha):
        (before, after), _ = self.flow(alpha)
        return (after - before)[0].item()


@pytest.fixture(scope="module")
def models():
    """Models with a clear difference between the responses: no sign is a matter of rounding, no
    gradient is 0."""
    candidates = [TinyModel(seed) for seed in range(120)]
    return [model for model in candidates if abs(model.chosen - model.rejected) > 0.2
            and min(model.chosen, model.rejected) > -2.5 and abs(model.g_cr) > 0.02 * model.g_cc]


def test_chosen_log_prob_moves_at_the_rate_of_the_corollary(models):
    for model, alpha in itertools.product(models[:20], [-1.0, 0.0, 0.25, 1.0]):
        margin = float(exact_margin(*numbers(model.chosen, model.rejected, alpha, BETA, 0.1)))
        weight_chosen = math.exp(-alpha * model.chosen)
        weight_rejected = math.exp(-alpha * model.rejected)
        rate = BETA / (1 + math.exp(margin)) * (
            weight_chosen * model.g_cc - weight_rejected * model.g_cr)
        (before, after), time = model.flow(alpha)
        assert ((after - before)[0] / time).item() == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("right_order", [True, False])
def test_chosen_log_prob_rises_on_one_side_of_alpha_0_and_falls_on_the_other(models, right_order):
    tried = 0
    for model in models:
        if model.g_cr <= 0 or (model.chosen > model.rejected) != right_order:
            continue
        alpha_0 = math.log(model.g_cc / model.g_cr) / (model.chosen - model.rejected)
        if abs(alpha_0) > 3:
            continue
        for distance in (0.05, 0.5):
            assert (model.chosen_change(alpha_0 - distance) > 0) == right_order
            assert (model.chosen_change(alpha_0 + distance) < 0) == right_order
        tried += 1
    assert tried >= 5


def test_chosen_log_prob_always_rises_where_the_gradients_are_opposed(models):
    opposed = [model for model in models if model.g_cr <= 0]
    assert len(opposed) >= 5
    assert all(model.chosen_change(alpha) > 0 for model in opposed for alpha in (-2, 0, 0.25, 2))


def test_reward_margin_never_falls_under_the_flow_but_the_log_prob_margin_can(models):
    logp_margin_fell = set()
    for model, alpha in itertools.product(models, [-4.0, 0.0, 0.25, 3.0]):
        (before, after), _ = model.flow(alpha)
        chosen_logp, rejected_logp, chosen_reward, rejected_reward = (after - before).tolist()
        assert chosen_reward > rejected_reward
        if chosen_logp < rejected_logp:
            logp_margin_fell.add(alpha)
    assert logp_margin_fell and 0.0 not in logp_margin_fell


# --- the rest of the file -------------------------------------------------------------------------

def test_dpo_loss_and_gradients_follow_its_formula():
    values = [(-20.0, -31.5, -22.0, -30.0), (-40.0, -12.0, -35.0, -14.0),
              (-300.0, -250.0, -280.0, -100.0)]
    chosen, rejected, chosen_ref, rejected_ref = (
        torch.tensor(x, requires_grad=True) for x in zip(*values))
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, chosen_ref, rejected_ref,
                                                        beta=0.1)
    losses.sum().backward()
    for i, (c, r, c_ref, r_ref) in enumerate(values):
        margin = 0.1 * ((c - c_ref) - (r - r_ref))
        pull = 0.1 / (1 + math.exp(margin))
        assert losses[i].item() == pytest.approx(math.log(1 + math.exp(-margin)), rel=1e-12)
        assert chosen_rewards[i].item() == pytest.approx(0.1 * (c - c_ref), rel=1e-12)
        assert rejected_rewards[i].item() == pytest.approx(0.1 * (r - r_ref), rel=1e-12)
        assert (chosen.grad[i].item(), rejected.grad[i].item()) == pytest.approx(
            (-pull, pull), rel=1e-6)


def test_dpo_loss_subtracts_in_float64():
    # Numbers that are not within a factor of 2 of each other: their difference in float32 is rounded.
    chosen, rejected, chosen_ref, rejected_ref = (torch.tensor([x]) for x in (-1000.1, -0.3, -0.7, -900.9))
    _, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, chosen_ref, rejected_ref, beta=1.0)
    assert chosen_rewards.item() == chosen.item() - chosen_ref.item() != (chosen - chosen_ref).item()
    assert rejected_rewards.item() == rejected.item() - rejected_ref.item() != (rejected - rejected_ref).item()


def test_dpo_loss_keeps_the_digits_of_float64():
    values = -1000.1, -0.3, -0.7, -900.9
    _, chosen_rewards, rejected_rewards = dpo_loss(*(torch.tensor([x], dtype=torch.float64) for x in values), beta=1.0)
    assert (chosen_rewards.item(), rejected_rewards.item()) == (-1000.1 + 0.7, -0.3 + 900.9)


def test_losses_come_in_float64_with_the_rewards_detached():
    chosen, rejected = torch.tensor([[-0.5, -0.8], [-0.7, -0.6]], requires_grad=True)
    triples = [alphapo_loss(chosen, rejected, alpha=0.25, beta=2.5, gamma_beta_ratio=0.1),
               simpo_loss(chosen, rejected, beta=2.5, gamma_beta_ratio=0.1),
               dpo_loss(chosen, rejected, chosen - 1, rejected + 1, beta=0.1)]
    for triple in triples:
        assert all(x.dtype == torch.float64 and x.shape == (2,) for x in triple)
        assert [x.requires_grad for x in triple] == [True, False, False]


def test_rewards_returned_are_the_shaped_rewards():
    chosen, rejected = torch.tensor([-0.5, -2.0]), torch.tensor([-0.25, -3.0])
    _, *rewards = alphapo_loss(chosen, rejected, alpha=0.5, beta=2.0, gamma_beta_ratio=0.3)
    for logps, got in zip([chosen, rejected], rewards):
        expected = [2 * (1 - math.exp(-0.5 * x)) / 0.5 for x in logps.tolist()]
        assert got.tolist() == pytest.approx(expected, rel=1e-12)


# --- noisy labels and DPO on averages -------------------------------------------------------------

SMOOTHING = [0.0, 0.1, 0.3]


@pytest.mark.parametrize("alpha", [-1, 0, 0.25, 1])
@pytest.mark.parametrize("e", SMOOTHING)
def test_label_smoothing_mixes_the_loss_with_that_of_the_swapped_margin(e, alpha):
    # As TRL 1.16's CPOTrainer for simpo and alphapo: the margin is turned around after gamma is taken off it.
    pairs = [(-0.5, -0.8), (-0.8, -0.5), (-0.01, -11.8), (-30.0, -2.0), (-0.3, -0.3)]
    rows = zip(*loss_and_gradients(pairs, torch.float64, alpha=alpha, beta=2.5, gamma_beta_ratio=0.1,
                                   label_smoothing=e))
    for chosen, rejected, *got in rows:
        args = numbers(chosen, rejected, alpha, 2.5, 0.1)

        def mixed(c, r):
            m = exact_margin(c, r, *args[2:])
            share = mpmath.mpf(e)
            return (1 - share) * mpmath.log1p(mpmath.exp(-m)) + share * mpmath.log1p(mpmath.exp(m))

        c, r = args[:2]
        exact = mixed(c, r), mpmath.diff(lambda x: mixed(x, r), c), mpmath.diff(lambda x: mixed(c, x), r)
        for value, expected in zip(got, exact):
            assert value.item() == pytest.approx(float(expected), rel=1e-11)


@pytest.mark.parametrize("e", SMOOTHING)
def test_label_smoothing_of_dpo_is_conservative_dpo(e):
    values = torch.tensor([[-20.0, -40.0], [-31.5, -12.0], [-22.0, -35.0], [-30.0, -14.0]], dtype=torch.float64)
    losses, *_ = dpo_loss(*values, beta=0.1, label_smoothing=e)
    for loss, (c, r, c_ref, r_ref) in zip(losses.tolist(), values.T.tolist()):
        m = 0.1 * ((c - c_ref) - (r - r_ref))
        assert loss == pytest.approx((1 - e) * math.log1p(math.exp(-m)) + e * math.log1p(math.exp(m)), rel=1e-12)


def test_smoothed_losses_are_least_at_the_margin_that_the_noise_allows():
    e, gamma = 0.2, 0.25
    logps = torch.tensor([(gamma + math.log((1 - e) / e)) / 2.5], dtype=torch.float64, requires_grad=True)
    losses, *_ = simpo_loss(logps, torch.zeros(1), beta=2.5, gamma_beta_ratio=0.1, label_smoothing=e)
    losses.backward()
    entropy = -e * math.log(e) - (1 - e) * math.log(1 - e)
    assert abs(logps.grad.item()) < 1e-15 and losses.item() == pytest.approx(entropy, rel=1e-12)


def test_dpo_on_averages_is_that_of_trl():
    # TRL 1.16's DPOTrainer, loss_type "sigmoid_norm": log-ratios summed over the completion's tokens, end token
    # included, over their number; both sides of the ratio have one mask.
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-torch.rand(2, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([[1, 7, 3, 5], [2, 1, 7, 4]])[..., None]
    scores = ((policy - reference) * mask).sum(-1)
    chosen, rejected = scores / mask.sum(-1).clamp(min=1.0)
    expected = -torch.nn.functional.logsigmoid(2.5 * (chosen - rejected))

    lengths = mask.sum(-1).flatten().tolist()
    averages = [average_logps(logps[mask], lengths).view(2, 4) for logps in (policy, reference)]
    losses, *rewards = dpo_loss(*averages[0], *averages[1], beta=2.5)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack(rewards), 2.5 * torch.stack([chosen, rejected]), rtol=1e-12, atol=1e-15)


# --- averages, metrics, the file itself ------------------------------------------------------------

def test_average_logps_divides_each_response_by_its_own_length():
    token_logps = torch.tensor([-1.0, -2.0, -6.0, -4.0, -0.5, -0.25], requires_grad=True)
    averages = average_logps(token_logps, [3, 1, 2])
    assert averages.tolist() == [-3.0, -4.0, -0.375] and averages.dtype == torch.float64
    averages[0].backward()
    assert token_logps.grad.tolist() == pytest.approx([1 / 3] * 3 + [0] * 3)


def test_average_logps_sums_in_float64():
    token_logps = -torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    exact = math.fsum(token_logps.tolist()) / 30_000
    assert average_logps(token_logps, [30_000]).item() == pytest.approx(exact, rel=1e-12)


def test_pair_metrics_are_means_over_the_pairs():
    # The last pair is a tie: not accurate.
    rewards = torch.tensor([[1.0, 2.0, -3.0, 0.5], [0.0, 4.0, -5.0, 0.5]])
    logps = torch.tensor([[-1.0, -2.0, -3.0, -2.0], [-2.0, -1.0, -6.0, -3.0]])
    metrics = {name: value.item() for name, value in pair_metrics(*rewards, *logps).items()}
    assert metrics == {
        "rewards/chosen": 0.125, "rewards/rejected": -0.125, "rewards/margins": 0.25,
        "rewards/accuracies": 0.5,
        "logps/chosen": -2.0, "logps/rejected": -3.0, "logps/margins": 1.0}


def test_displacement_is_measured_from_the_start():
    chosen = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    rejected = torch.tensor([-4.0, -2.0, -2.0, -2.0])
    chosen_start = torch.tensor([-0.5, -1.0, -1.0, -3.0])
    rejected_start = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    metrics = displacement_metrics(chosen, rejected, chosen_start, rejected_start)
    of_all = ("chosen", "rejected", "fell")
    assert {name: metrics[f"displacement/{name}"].item() for name in of_all} == {
        "chosen": -0.25, "rejected": -1.5, "fell": 0.5}


def test_displacement_by_order_tells_groups_of_pairs_apart():
    # right: moved by -0.5 and -0.25, one of two stayed so; wrong: by +1 and, a tie at the start, -2; both changed.
    chosen_start, rejected_start = torch.tensor([[-0.5, -1.0, -2.0, -1.0], [-1.0, -3.0, -1.5, -1.0]])
    chosen, rejected = torch.tensor([[-1.0, -1.25, -1.0, -3.0], [-0.75, -9.0, -4.0, -3.5]])
    metrics = displacement_metrics(chosen, rejected, chosen_start, rejected_start)
    by_order = {name: metrics[f"displacement/{name}"].item()
                for name in ("right", "chosen_right", "chosen_wrong", "accuracy_right", "accuracy_wrong")}
    assert by_order == {"right": 0.5, "chosen_right": -0.375, "chosen_wrong": -0.5, "accuracy_right": 0.5,
                        "accuracy_wrong": 1.0}
    assert metrics["displacement/accuracy_right"].dtype == torch.float64


def test_displacement_of_no_pairs_is_nan():
    better, worse = torch.tensor([1.0]), torch.tensor([0.0])
    metrics = displacement_metrics(better, worse, better, worse)
    assert metrics["displacement/chosen_wrong"].isnan() and metrics["displacement/accuracy_wrong"].isnan()
    assert metrics["displacement/right"] == metrics["displacement/accuracy_right"] == 1


def test_shares_of_pairs_are_float64():
    better, worse = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])
    assert pair_metrics(better, worse, better, worse)["rewards/accuracies"].item() == 1 / 3
    assert displacement_metrics(better, better, worse, worse)["displacement/fell"].item() == 2 / 3


def test_log_probs_of_different_shapes_are_refused():
    pairs, column = torch.zeros(2), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"\(2,\), \(2, 1\)"):
        alphapo_loss(pairs, column, alpha=0.25, beta=2.5, gamma_beta_ratio=0.1)
    with pytest.raises(ValueError, match="different shapes"):
        simpo_loss(torch.zeros(1), pairs, beta=2.5, gamma_beta_ratio=0.1)
    for odd_one in range(4):
        logps = [pairs] * 4
        logps[odd_one] = column
        shapes = [tuple(x.shape) for x in logps]
        with pytest.raises(ValueError, match=re.escape(f"different shapes, {shapes}")):
            dpo_loss(*logps, beta=0.1)


def test_alphapo_py_can_be_copied_alone_and_needs_torch_alone(tmp_path):
    copy = shutil.copy(alphapo.__file__, tmp_path)
    # -I: sys.path holds no folder of ours.
    subprocess.run([sys.executable, "-I", copy], cwd=tmp_path, check=True)
    nodes = list(ast.walk(ast.parse(Path(copy).read_text(encoding="utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += ["." * node.level + (node.module or "")
                for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {module.split(".")[0] for module in modules} - sys.stdlib_module_names == {"torch"}


def test_metrics_of_displacement_are_float64_and_a_tie_is_in_no_order():
    better, worse = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -1.0])
    metrics = displacement_metrics(better.double(), worse.double(), worse.double(), better.double())
    assert {value.dtype for value in metrics.values()} == {torch.float64}
    # At step 0 right, as the tie is not: the third pair, which is wrong by now. The tie is still one.
    assert metrics["displacement/right"].item() == pytest.approx(1 / 3, rel=1e-15)
    assert metrics["displacement/accuracy_right"] == 0 and metrics["displacement/accuracy_wrong"] == 0.5


def test_a_margin_beyond_all_numbers_has_no_loss():
    assert margin_losses(torch.tensor([math.inf, -math.inf], dtype=torch.float64), 0.0).tolist() == [0, math.inf]
