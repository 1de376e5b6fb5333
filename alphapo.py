"""AlphaPO: align a language model on preference pairs with a shaped, reference-free reward.

    losses, chosen_rewards, rejected_rewards = alphapo_loss(
        chosen_logps, rejected_logps, alpha=0.25, beta=2.5, gamma_beta_ratio=0.1)
    losses.mean().backward()

The method of "AlphaPO: Reward Shape Matters for LLM Alignment" (Gupta et al., ICML 2025, arXiv 2501.03884)
as pure functions of tensors, with the two baselines of the paper (SimPO, DPO) and what to log. Needs torch alone.

Names: `*_logps` are AVERAGE log-probs per token of a response, shape (B,), one number a pair, unless a docstring
says they are sums. All of it is computed in float64 whatever comes in: it is a handful of numbers a pair, and
exp(-alpha * logps) leaves float32 behind at |alpha * logps| = 88 (float64: 709).
"""
import torch
import torch.nn.functional as F


def average_logps(token_logps, lengths):
    """Mean log-prob per token of each response.

    token_logps: (R,) log-probs of the tokens of N responses laid end to end, each with its one end token.
    lengths: N ints that add up to R. Returns (N,) in float64.
    (In a padded batch the same number is `(token_logps * mask).sum(-1) / mask.sum(-1)`.)
    """
    return torch.stack([response.mean(dtype=torch.float64) for response in token_logps.split(list(lengths))])


def alphapo_reward(logps, *, alpha, beta):
    """The shaped reward, beta * (1 - exp(-alpha * logps)) / alpha; its limit beta * logps at alpha = 0.  (B,) -> (B,)

    expm1 keeps every digit as alpha -> 0, where 1 - p**-alpha in float32 has lost 5 % at alpha = 1e-6. For x < -1 it is
    exp that keeps them: autograd takes the derivative of expm1(x) as expm1(x) + 1, which cancels there.
    """
    logps = logps.double()
    if alpha == 0:
        return beta * logps
    x = -alpha * logps
    return -beta * torch.where(x < -1, x.exp() - 1, x.expm1()) / alpha


def alphapo_loss(chosen_logps, rejected_logps, *, alpha, beta, gamma_beta_ratio):
    """-log sigmoid(r(chosen) - r(rejected) - gamma), with r = alphapo_reward and gamma = gamma_beta_ratio * beta.

    chosen_logps, rejected_logps: (B,) average log-probs per token. alpha shapes the reward (0 is SimPO), beta scales
    it, gamma_beta_ratio sets the target reward margin. Returns (losses, chosen_rewards, rejected_rewards), each (B,)
    in float64, the rewards detached. The gradient that results, with m = r(chosen) - r(rejected) - gamma:
        d loss / d chosen_logps   = -sigmoid(-m) * beta * exp(-alpha * chosen_logps)
        d loss / d rejected_logps = +sigmoid(-m) * beta * exp(-alpha * rejected_logps)
    """
    _check_pairs(chosen_logps, rejected_logps)
    chosen_rewards = alphapo_reward(chosen_logps, alpha=alpha, beta=beta)
    rejected_rewards = alphapo_reward(rejected_logps, alpha=alpha, beta=beta)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma_beta_ratio * beta)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def simpo_loss(chosen_logps, rejected_logps, *, beta, gamma_beta_ratio):
    """SimPO (Meng et al. 2024, arXiv 2405.14734): AlphaPO at alpha = 0. Same shapes and return as alphapo_loss."""
    return alphapo_loss(chosen_logps, rejected_logps, alpha=0.0, beta=beta, gamma_beta_ratio=gamma_beta_ratio)


def dpo_loss(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, *, beta):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290): -log sigmoid(r(chosen) - r(rejected)), r = beta * (logp - ref).

    Unlike the rest of this file it takes SUMMED log-probs of whole responses, (B,) each; `*_ref_logps` are those of
    the frozen starting model. Returns (losses, chosen_rewards, rejected_rewards) as alphapo_loss does.
    """
    _check_pairs(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    chosen_rewards = beta * (chosen_logps.double() - chosen_ref_logps.double())
    rejected_rewards = beta * (rejected_logps.double() - rejected_ref_logps.double())
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def pair_metrics(chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """What to log of B pairs, as a dict of 0-d tensors (means over the pairs) under TRL's names.

    Two margins on purpose: under AlphaPO the reward margin can grow while the log-prob margin shrinks.
    """
    return {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).double().mean(),
        "logps/chosen": chosen_logps.mean(),
        "logps/rejected": rejected_logps.mean(),
        "logps/margins": (chosen_logps - rejected_logps).mean(),
    }


def displacement_metrics(chosen_logps, rejected_logps, chosen_start, rejected_start):
    """Likelihood displacement: how average log-probs (B,) moved since the start of training, on the same pairs.

    `displacement/fell` is the share of pairs whose chosen response became less likely (paper, section 3).
    """
    return {
        "displacement/chosen": (chosen_logps - chosen_start).mean(),
        "displacement/rejected": (rejected_logps - rejected_start).mean(),
        "displacement/fell": (chosen_logps < chosen_start).double().mean(),
    }


def _check_pairs(*logps):
    # (B,) against (B, 1) would broadcast to (B, B) and train on pairs that do not exist.
    if len({tuple(x.shape) for x in logps}) != 1:
        raise ValueError(f"log-probs of different shapes, {[tuple(x.shape) for x in logps]}: expected one (B,) for all")
