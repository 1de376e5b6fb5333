"""Lengths of preference pairs as they are in real sets, for benchmarks on random tokens.

Responses: the quantiles are those of 796 AlpacaEval prompts with a judged better and worse answer,
in the chat format and tokens of SmolLM2 (9 pairs over 2,048 tokens left out). The logarithms of
chosen and rejected lengths correlate by 0.83, and prompts correlate with neither. Lengths alone
were taken over, no text.

Prompts: AlpacaEval's (short questions, half of them up to 52 tokens), or UltraFeedback's, which
AlphaPO trains on. Their mean of 185 tokens is from the paper (arXiv 2310.01377, table 1). That set
mixes questions with long documents; a log-normal distribution with a deviation of 1.1 stands for
that, and the deviation is our assumption.
"""
import numpy as np

QUANTILES = [0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1]
PROMPT = [33, 39, 43, 52, 71, 105, 299, 539]
CHOSEN = [2, 98, 247, 475, 617, 748, 1122, 1828]
REJECTED = [3, 76, 185, 342, 478, 623, 1027, 1734]
CORRELATION = 0.83
ULTRAFEEDBACK_MEAN = 185
ULTRAFEEDBACK_DEVIATION = 1.1


def pair_lengths(n, seed=0, max_length=2048, prompts="ultrafeedback"):
    """(prompt, chosen, rejected) lengths of n pairs, in tokens. Pairs with a sequence longer than
    max_length are drawn again. prompts: "ultrafeedback" or "alpacaeval"."""
    rng = np.random.default_rng(seed)
    lengths = []
    while len(lengths) < n:
        z = rng.normal(size=3)
        z[2] = CORRELATION * z[1] + (1 - CORRELATION**2) ** 0.5 * z[2]
        # The share of normal numbers below each, by the logistic approximation (within 0.01).
        ranks = 1 / (1 + np.exp(-1.702 * z))
        P = _quantile(ranks[0], PROMPT)
        C = _quantile(ranks[1], CHOSEN)
        R = _quantile(ranks[2], REJECTED)
        if prompts == "ultrafeedback":
            factor = np.exp(ULTRAFEEDBACK_DEVIATION * z[0] - ULTRAFEEDBACK_DEVIATION**2 / 2)
            P = max(PROMPT[0], round(ULTRAFEEDBACK_MEAN * float(factor)))
        if P + max(C, R) <= max_length:
            lengths.append((P, C, R))
    return lengths


def _quantile(rank, table):
    return round(float(np.interp(rank, QUANTILES, table)))
