"""Lengths of preference pairs as they are in a real set, for benchmarks on random tokens.

The quantiles are those of 796 AlpacaEval prompts with a judged better and worse answer, in the chat format and tokens of
SmolLM2 (9 pairs over 2,048 tokens left out); logarithms of chosen and rejected lengths correlate by 0.83, prompts with
neither. Lengths alone were taken over, no text.
"""
import numpy as np

QUANTILES = [0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1]
PROMPT = [33, 39, 43, 52, 71, 105, 299, 539]
CHOSEN = [2, 98, 247, 475, 617, 748, 1122, 1828]
REJECTED = [3, 76, 185, 342, 478, 623, 1027, 1734]
CORRELATION = 0.83


def pair_lengths(n, seed=0, max_length=2048):
    """n times (prompt, chosen, rejected) lengths in tokens; pairs with a sequence over max_length are drawn again."""
    rng, lengths = np.random.default_rng(seed), []
    while len(lengths) < n:
        z = rng.normal(size=3)
        z[2] = CORRELATION * z[1] + (1 - CORRELATION**2) ** 0.5 * z[2]
        # The rank of a normal number among many, by its logistic approximation (off by less than 0.01).
        ranks = 1 / (1 + np.exp(-1.702 * z))
        P, C, R = (round(float(np.interp(u, QUANTILES, table))) for u, table in zip(ranks, (PROMPT, CHOSEN, REJECTED)))
        if P + max(C, R) <= max_length:
            lengths.append((P, C, R))
    return lengths
