"""How the cost of a step grows with the length of pairs, their number and the width of the model; what sharing prompts gains.

    python benchmarks/scaling.py                # five minutes on 2 cores

Forward and backward passes of train.py on random tokens, fp32, in one process. Settings take turns, so that a machine whose
speed drifts slows all of them; medians over rounds.

length   time per token, attention's (measured alone) taken out: should not depend on the length of a pair
pairs    time per pair: should not depend on how many there are in a step
width    share of the machine's matmul rate: should not fall as the model grows
sharing  packing with the prompt twice against packing with shared prompts. By the count of tokens alone the gain would be
         (2r + 2) / (r + 2), with r prompt tokens for each token of a response; the vocabulary head gains nothing.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data.preference import PreferencePair, pack
from distributed import join_ranks, reuse_memory
from lengths import pair_lengths
from model import ModelConfig, Transformer, causal_attention, pair_attention
from step import machine, matmul_rate, useful_flops
from train import TrainConfig, resolve_config, run_rows

CONFIG = resolve_config(TrainConfig(model="-", data=["-"]))


def random_model(width=512, layers=8, vocab=32000):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(
        vocab_size=vocab, dim=width, n_layers=layers, n_heads=width // 64, n_kv_heads=max(1, width // 256), head_dim=64,
        hidden_dim=width * 11 // 4, norm_eps=1e-5, rope_theta=1e4, max_positions=8192))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    return model


def random_pairs(lengths, vocab=32000):
    rng = np.random.default_rng(0)
    return [PreferencePair(*(rng.integers(3, vocab, n).astype(np.int32) for n in pair), "") for pair in lengths]


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def forgetting(model, call):
    """The call, after which the model's gradients are dropped."""
    def both():
        call()
        for p in model.parameters():
            p.grad = None
    return both


def step(model, pairs, tokens_per_row):
    return forgetting(model, lambda: run_rows(model, pack(pairs, tokens_per_row), CONFIG, 1 / len(pairs)))


def attention_alone(model, lengths):
    """Of all layers, forward and backward, on random queries, keys and values."""
    c, T = model.config, sum(map(sum, lengths))
    q, k, v = (torch.randn(T, n, c.head_dim, requires_grad=True) for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads))

    def call():
        for _ in range(c.n_layers):
            pair_attention(q, k, v, lengths).sum().backward()
    return call


def prompts_twice(model, pairs):
    """The step without sharing: [prompt | chosen | prompt | rejected], each half a sequence of its own. One row."""
    from alphapo import alphapo_loss, average_logps
    tokens, positions, predictors, targets, sizes = [], [], [], [], []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            start, P, n = len(tokens), len(pair.prompt), len(response)
            tokens += [*pair.prompt, *response]
            positions += range(P + n)
            predictors += range(start + P - 1, start + P + n - 1)
            targets += response.tolist()
            sizes.append(P + n)
    tokens, positions, predictors, targets = (torch.tensor(x, device=model.device)
                                              for x in (tokens, positions, predictors, targets))

    def attend(layer, q, k, v):
        return torch.cat([causal_attention(*x) for x in zip(q.split(sizes), k.split(sizes), v.split(sizes))])

    def loss(i, logps):
        chosen, rejected = average_logps(logps, (len(pairs[i].chosen), len(pairs[i].rejected))).split(1)
        return alphapo_loss(chosen, rejected, alpha=CONFIG.alpha, beta=CONFIG.beta,
                            gamma_beta_ratio=CONFIG.gamma_beta_ratio)[0].sum()

    def call():
        states = model.states(tokens, positions, attend)[predictors]
        sizes = [len(p.chosen) + len(p.rejected) for p in pairs]
        states.backward(model.run_head(states, targets, sizes, loss, 1 / len(pairs)))
    return call


def rounds(calls, n):
    """{name: [seconds of each round]} of calls that take turns; a first round does not count."""
    taken = {name: [] for name in calls}
    for i in range(n + 1):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: times[1:] for name, times in taken.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "scaling.json"))
    args = parser.parse_args()
    reuse_memory()
    join_ranks(CONFIG)
    results, median = machine() | {"rounds": args.rounds}, statistics.median

    model, total = random_model(), 4096
    lengths = {T: [(T // 5, 2 * T // 5, T - 3 * T // 5)] * (total // T) for T in (512, 1024, 2048, 4096)}
    calls = {f"{T}": step(model, random_pairs(some), total) for T, some in lengths.items()}
    calls |= {f"{T} attention": attention_alone(model, some) for T, some in lengths.items()}
    taken = rounds(calls, args.rounds)
    results["length"] = {
        T: {"us_per_token": median(s / total * 1e6 for s in taken[f"{T}"]),
            "without_attention": median((s - a) / total * 1e6 for s, a in zip(taken[f"{T}"], taken[f"{T} attention"]))}
        for T in lengths}
    for T, r in results["length"].items():
        print(f"length   {T:5} tokens a pair: {r['us_per_token']:6.0f} us a token, {r['without_attention']:6.0f} without attention",
              flush=True)

    shared, twice = {}, {}
    for name, (P, C) in {"r = 1": (400, 400), "r = 2": (600, 300)}.items():
        pairs = random_pairs([(P, C, C)] * 3)
        shared[name], twice[name] = step(model, pairs, 10**6), forgetting(model, prompts_twice(model, pairs))
    taken = {name: rounds({"shared": shared[name], "twice": twice[name]}, args.rounds) for name in shared}
    results["sharing"] = {}
    for name, r in (("r = 1", 1), ("r = 2", 2)):
        gain, ideal = median(t / s for t, s in zip(taken[name]["twice"], taken[name]["shared"])), (2 * r + 2) / (r + 2)
        results["sharing"][name] = {"gain": gain, "ideal": ideal}
        print(f"sharing  {name}: {gain:.2f} times as fast, {gain / ideal:.0%} of the ideal {ideal:.2f}", flush=True)

    small = random_model(width=256, layers=4, vocab=8000)
    many = random_pairs([(P // 4 + 1, C // 4 + 1, R // 4 + 1) for P, C, R in pair_lengths(128)], vocab=8000)
    # The same 128 pairs in steps of so many.
    calls = {n: [step(small, many[i:i + n], 2048) for i in range(0, 128, n)] for n in (8, 32, 128)}
    taken = rounds({n: (lambda steps: lambda: [call() for call in steps])(steps) for n, steps in calls.items()}, args.rounds)
    results["pairs"] = {n: median(times) / 128 * 1e3 for n, times in taken.items()}
    for n, ms in results["pairs"].items():
        print(f"pairs    {n:5} a step: {ms:6.1f} ms a pair", flush=True)

    results["width"], some = {}, pair_lengths(2)
    for width in (256, 512, 1024):
        model = random_model(width=width, layers=4)
        taken = rounds({"step": step(model, random_pairs(some), 10**6)}, args.rounds)["step"]
        share = useful_flops(model.config, some) / median(taken) / matmul_rate(width)
        results["width"][width] = {"us_per_token": median(taken) / sum(map(sum, some)) * 1e6, "share_of_matmul_rate": share}
        print(f"width    {width:5}: {results['width'][width]['us_per_token']:6.0f} us a token, {share:.0%} of the matmul rate",
              flush=True)
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
