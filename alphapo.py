"""AlphaPO: align a language model on preference pairs with a shaped, reference-free reward.

    losses, chosen_rewards, rejected_rewards = alphapo_loss(
        chosen_logps, rejected_logps, alpha=0.25, beta=2.5, gamma_beta_ratio=0.1)
    losses.mean().backward()

The method of "AlphaPO: Reward Shape Matters for LLM Alignment" (Gupta et al., ICML 2025,
arXiv 2501.03884) as pure functions of tensors: first the reward and the loss, then the paper's two
baselines (SimPO and DPO) and the metrics to log. Needs torch alone.

A pair is one prompt with a chosen and a rejected response. `*_logps` are AVERAGE log-probs per
token of a response under the model in training, of shape (B,): one number a pair. Only DPO takes
sums. Rewards and losses are computed in float64, whatever comes in. That is cheap for a handful of
numbers a pair, and exp(-alpha * logps) overflows float32 where -alpha * logps > 88 (at alpha = 2 a
response of -44 per token), float64 at 709.
"""
import torch
import torch.nn.functional as F


# --- the method -----------------------------------------------------------------------------------

def alphapo_reward(logps, *, alpha, beta):
    """The shaped reward of each response.  (B,) -> (B,) in float64

        r(logps) = beta * (1 - exp(-alpha * logps)) / alpha
        r(logps) = beta * logps                                 at alpha = 0, its limit: SimPO
    """
    logps = logps.double()
    if alpha == 0:
        return beta * logps

    # exp(x) - 1 loses its digits as x -> 0, and expm1(x) keeps them. For x < -1, which only a
    # negative alpha reaches, exp(x) is better: autograd computes the derivative of expm1(x) as
    # expm1(x) + 1, which cancels there, and that of exp(x) as exp(x).
    x = -alpha * logps
    exp_minus_1 = torch.where(x < -1, x.exp() - 1, x.expm1())
    return -beta * exp_minus_1 / alpha


def alphapo_loss(chosen_logps, rejected_logps, *, alpha, beta, gamma_beta_ratio,
                 label_smoothing=0.0):
    """The loss of each pair: -log sigmoid(r(chosen_logps) - r(rejected_logps) - gamma).

    chosen_logps, rejected_logps: (B,) average log-probs per token.
    alpha: the shape of the reward r (see alphapo_reward); 0 is SimPO.
    beta: the scale of the reward.
    gamma_beta_ratio: the target reward margin is gamma = gamma_beta_ratio * beta.
    label_smoothing: the share of labels taken to be wrong (see margin_losses).
    Returns (losses, chosen_rewards, rejected_rewards), each (B,) in float64, the rewards detached.
    ValueError if the shapes differ.

    What alpha changes is how hard a response is pushed. With m = r(chosen) - r(rejected) - gamma,

        d loss / d chosen_logps   = -sigmoid(-m) * beta * exp(-alpha * chosen_logps)
        d loss / d rejected_logps = +sigmoid(-m) * beta * exp(-alpha * rejected_logps)

    so alpha = 0 pushes both alike, alpha > 0 pushes the less likely response harder, and alpha < 0
    the more likely one.
    """
    _check_same_shape(chosen_logps, rejected_logps)
    chosen_rewards = alphapo_reward(chosen_logps, alpha=alpha, beta=beta)
    rejected_rewards = alphapo_reward(rejected_logps, alpha=alpha, beta=beta)

    # The loss is log 2 at the target margin gamma and, without smoothing, goes to 0 beyond it.
    margins = chosen_rewards - rejected_rewards             # (B,)
    losses = margin_losses(margins - gamma_beta_ratio * beta, label_smoothing)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def margin_losses(m, label_smoothing):
    """L(m) = -log sigmoid(m) of margins m (B,); if a share e = label_smoothing of the labels is
    taken to be wrong, (1 - e) * L(m) + e * L(-m), as in conservative DPO (Mitchell 2023).

    gamma is off m before it is turned around, as in TRL: the least loss is at gamma + log(1/e - 1).
    """
    losses = -F.logsigmoid(m)
    return losses + label_smoothing * m if label_smoothing else losses      # L(-m) = L(m) + m


def average_logps(token_logps, lengths):
    """The mean log-prob per token of each response: what the reward is a function of.

    token_logps: (N,) log-probs of the tokens of M responses laid end to end, without padding. The
    end-of-turn token of a response is one of its tokens.
    lengths: M ints, each at least 1, that add up to N. Returns (M,) in float64.
    """
    responses = token_logps.split(list(lengths))
    averages = [response.mean(dtype=torch.float64) for response in responses]
    return torch.stack(averages)


def _check_same_shape(*logps):
    # (B,) against (B, 1) would broadcast to (B, B), and train on pairs that do not exist.
    shapes = [tuple(x.shape) for x in logps]
    if len(set(shapes)) != 1:
        raise ValueError(f"log-probs of different shapes, {shapes}: expected one (B,) for all")


# --- the paper's baselines ------------------------------------------------------------------------

def simpo_loss(chosen_logps, rejected_logps, **knobs):
    """SimPO (Meng et al. 2024, arXiv 2405.14734): AlphaPO at alpha = 0, its other knobs and what
    it returns those of alphapo_loss."""
    return alphapo_loss(chosen_logps, rejected_logps, alpha=0.0, **knobs)


def dpo_loss(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, *, beta,
             label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290): -log sigmoid(r(chosen) - r(rejected)), where
    r = beta * (logps - ref_logps) is DPO's implicit reward.

    Unlike the rest of this file it takes SUMMED log-probs of whole responses, (B,) each. Given
    averages, all four over the same tokens, it is length-normalised DPO (arXiv 2411.15124).
    `*_ref_logps` are those under the frozen reference model, the model that training started from.
    Returns (losses, chosen_rewards, rejected_rewards) as alphapo_loss does.
    """
    _check_same_shape(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    chosen_rewards = beta * (chosen_logps.double() - chosen_ref_logps.double())
    rejected_rewards = beta * (rejected_logps.double() - rejected_ref_logps.double())
    losses = margin_losses(chosen_rewards - rejected_rewards, label_smoothing)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# --- metrics --------------------------------------------------------------------------------------

def pair_metrics(chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """What to log of B pairs, from their (B,) numbers: means over the pairs, as a dict of 0-d
    tensors. The names are those that TRL's trainers log, and "logps/margins" beside them."""
    is_accurate = chosen_rewards > rejected_rewards         # a tie is not accurate
    # Two margins on purpose: under AlphaPO the reward margin can grow while that of the log-probs
    # shrinks.
    return {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "rewards/accuracies": is_accurate.double().mean(),      # whatever the target margin
        "logps/chosen": chosen_logps.mean(),
        "logps/rejected": rejected_logps.mean(),
        "logps/margins": (chosen_logps - rejected_logps).mean(),
    }


def displacement_metrics(chosen_logps, rejected_logps, chosen_start, rejected_start):
    """Likelihood displacement: how far average log-probs have moved since training started.

    All four are (B,), of the same pairs; `*_start` are the average log-probs at step 0.
    `displacement/fell` is the share of pairs whose chosen response became less likely, although
    its reward margin may have grown (paper, section 3). What alpha does to a pair depends on its
    order (Corollary 3.3): "right" pairs, a share `displacement/right`, had the likelier chosen
    response at step 0, "wrong" ones not. Returns a dict of 0-d tensors, NaN for means of no pairs.
    """
    chosen_change = chosen_logps - chosen_start
    was_right = chosen_start > rejected_start
    is_right = (chosen_logps > rejected_logps).double()
    return {
        "displacement/chosen": chosen_change.mean(),
        "displacement/rejected": (rejected_logps - rejected_start).mean(),
        "displacement/fell": (chosen_logps < chosen_start).double().mean(),
        "displacement/right": was_right.double().mean(),
        "displacement/chosen_right": chosen_change[was_right].mean(),
        "displacement/chosen_wrong": chosen_change[~was_right].mean(),
        "displacement/accuracy_right": is_right[was_right].mean(),
        "displacement/accuracy_wrong": is_right[~was_right].mean(),
    }
