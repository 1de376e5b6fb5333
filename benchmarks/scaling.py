"""How the cost of a step grows with the length of pairs, their number and the width of the model;
and what prefix sharing gains.

    python -m benchmarks.scaling                # five minutes on 2 cores

Forward and backward passes of train.py on random tokens, fp32, in one process. Settings take turns,
so that a machine whose speed drifts slows all of them; figures are medians over rounds.

length   time per token, less attention's (measured alone): should not depend on the length
pairs    time per pair: should not depend on how many there are in a step
width    share of the machine's matmul rate: should not fall as the model grows
sharing  rows that hold the prompt twice, against shared prompts. By the count of tokens alone the
         gain would be (2r + 2) / (r + 2), with r prompt tokens for each token of a response; the
         vocabulary head gains nothing.
"""
import argparse
import json
import time
from statistics import median

import numpy as np
import torch

import cpu
from benchmarks.lengths import pair_lengths
from benchmarks.step import matmul_rate
from benchmarks.workers import machine
from command import run_command
from data.files import check_output, write_whole
from data.preference import PreferencePair, pack
from distributed import join_ranks
from gpu import useful_flops
from model import ModelConfig, Transformer, pair_attention
from train import TrainConfig, head_and_loss, resolve_config, run_rows

CONFIG = resolve_config(TrainConfig(model="-", data=["-"]))
ONE_ROW = 10**6         # tokens a row that hold all pairs of a step


# --- models, pairs and what is timed --------------------------------------------------------------

def model_config(width=512, layers=8, vocab=32000):
    return ModelConfig(
        vocab_size=vocab, dim=width, n_layers=layers, n_heads=width // 64,
        n_kv_heads=max(1, width // 256), head_dim=64, hidden_dim=width * 11 // 4, norm_eps=1e-5,
        rope_theta=1e4, max_positions=8192)


def random_model(**sizes):
    """A model with random weights, as train.py has it on CPUs."""
    torch.manual_seed(0)
    model = Transformer(model_config(**sizes))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    cpu.speed_up(model)
    return model


def random_pairs(lengths, vocab=32000):
    """PreferencePairs of random tokens, of the given (prompt, chosen, rejected) lengths."""
    rng = np.random.default_rng(0)
    pairs = []
    for pair in lengths:
        parts = [rng.integers(3, vocab, n).astype(np.int32) for n in pair]
        pairs.append(PreferencePair(*parts, ""))
    return pairs


def forgetting(model, call):
    """The call, after which the model's gradients are dropped."""
    def both():
        call()
        for p in model.parameters():
            p.grad = None
    return both


def passes(model, pairs, tokens_per_row):
    """A call that runs the forward and backward pass of a step of train.py."""
    def call():
        run_rows(model, pack(pairs, tokens_per_row), CONFIG, 1 / len(pairs))
    return forgetting(model, call)


def attention_alone(model, lengths):
    """A call that runs attention of all layers, forward and backward, on random queries, keys and
    values."""
    c = model.config
    T = sum(map(sum, lengths))
    q = torch.randn(T, c.n_heads, c.head_dim, requires_grad=True)
    k = torch.randn(T, c.n_kv_heads, c.head_dim, requires_grad=True)
    v = torch.randn(T, c.n_kv_heads, c.head_dim, requires_grad=True)

    def call():
        for _ in range(c.n_layers):
            pair_attention(q, k, v, lengths, model.causal_attention).sum().backward()
    return call


def prompts_twice(model, pairs):
    """A call that runs the passes of a step without sharing: [prompt | chosen | prompt | rejected],
    each half a sequence of its own, all in one row."""
    tokens = []
    positions = []
    predictors = []         # places of the tokens that predict a response's
    targets = []
    sizes = []              # tokens of each sequence
    for pair in pairs:
        P = len(pair.prompt)
        for response in (pair.chosen, pair.rejected):
            start = len(tokens)
            end = start + P + len(response)
            tokens += [*pair.prompt, *response]
            positions += range(end - start)
            predictors += range(start + P - 1, end - 1)
            targets += response.tolist()
            sizes.append(end - start)
    tokens = torch.tensor(tokens, device=model.device)                          # (T,)
    positions = torch.tensor(positions, device=model.device)                    # (T,)
    predictors = torch.tensor(predictors, device=model.device)                  # (N,)
    targets = torch.tensor(targets, device=model.device)                        # (N,)

    def attend(layer, q, k, v):
        sequences = zip(q.split(sizes), k.split(sizes), v.split(sizes))
        return torch.cat([model.causal_attention(*sequence) for sequence in sequences])

    def call():
        # As train.run_row, with other states.
        states = model.states(tokens, positions, attend)[predictors]            # (N, dim)
        _, grad_states = head_and_loss(
            states, targets, model.head_weight, pairs, CONFIG, 1 / len(pairs))
        states.backward(grad_states)
    return call


def take_turns(calls, n):
    """{name: [seconds of each round]} of calls that take turns; a first round does not count."""
    taken = {name: [] for name in calls}
    for _ in range(n + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in taken.items()}


# --- the four questions ---------------------------------------------------------------------------

def length_of_pairs(model, rounds, total=4096):
    """The cost of a token in steps of `total` tokens, by the length of their pairs."""
    calls = {}
    for T in (512, 1024, 2048, 4096):
        lengths = [(T // 5, 2 * T // 5, T - 3 * T // 5)] * (total // T)
        calls[T] = passes(model, random_pairs(lengths), total)
        calls[f"attention {T}"] = attention_alone(model, lengths)
    taken = take_turns(calls, rounds)
    results = {}
    for T in (512, 1024, 2048, 4096):
        of_all = [seconds / total * 1e6 for seconds in taken[T]]
        of_attention = [seconds / total * 1e6 for seconds in taken[f"attention {T}"]]
        rest = [a - b for a, b in zip(of_all, of_attention)]
        results[T] = {"us_per_token": median(of_all), "without_attention": median(rest)}
        print(f"length   {T:5} tokens a pair: {results[T]['us_per_token']:6.0f} us a token, "
              f"{results[T]['without_attention']:6.0f} without attention", flush=True)
    return results


def prefix_sharing(model, rounds):
    """How many times as fast a step is when its pairs share their prompts."""
    results = {}
    for r, (P, C) in {1: (400, 400), 2: (600, 300)}.items():
        pairs = random_pairs([(P, C, C)] * 3)
        taken = take_turns({
            "shared": passes(model, pairs, ONE_ROW),
            "twice": forgetting(model, prompts_twice(model, pairs))}, rounds)
        gain = median(t / s for t, s in zip(taken["twice"], taken["shared"]))
        ideal = (2 * r + 2) / (r + 2)
        results[f"r = {r}"] = {"gain": gain, "ideal": ideal}
        print(f"sharing  r = {r}: {gain:.2f} times as fast, {gain / ideal:.0%} of the ideal "
              f"{ideal:.2f}", flush=True)
    return results


def number_of_pairs(rounds):
    """The cost of a pair, in ms, of the same 128 pairs in steps of 8, 32 and 128."""
    model = random_model(width=256, layers=4, vocab=8000)
    lengths = [(P // 4 + 1, C // 4 + 1, R // 4 + 1) for P, C, R in pair_lengths(128)]
    pairs = random_pairs(lengths, vocab=8000)

    def all_steps(n):
        steps = [passes(model, pairs[i:i + n], 2048) for i in range(0, len(pairs), n)]

        def call():
            for step in steps:
                step()
        return call

    taken = take_turns({n: all_steps(n) for n in (8, 32, 128)}, rounds)
    results = {n: median(times) / len(pairs) * 1e3 for n, times in taken.items()}
    for n, ms in results.items():
        print(f"pairs    {n:5} a step: {ms:6.1f} ms a pair", flush=True)
    return results


def width_of_model(rounds):
    """The cost of a token, and the share of PyTorch's matmul rate that is useful work."""
    results = {}
    lengths = pair_lengths(2)
    tokens = sum(map(sum, lengths))
    for width in (256, 512, 1024):
        model = random_model(width=width, layers=4)
        taken = take_turns({"step": passes(model, random_pairs(lengths), ONE_ROW)}, rounds)
        seconds = median(taken["step"])
        share = useful_flops(model.config, lengths) / seconds / matmul_rate(width)
        us = seconds / tokens * 1e6
        results[width] = {"us_per_token": us, "share_of_matmul_rate": share}
        print(f"width    {width:5}: {us:6.0f} us a token, {share:.0%} of the matmul rate",
              flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description="How the cost of a step grows.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/scaling.json")
    args = parser.parse_args()
    check_output(args.output)
    join_ranks(CONFIG.timeout_minutes)
    model = random_model()
    results = machine() | {
        "rounds": args.rounds,
        "length": length_of_pairs(model, args.rounds),
        "sharing": prefix_sharing(model, args.rounds),
        "pairs": number_of_pairs(args.rounds),
        "width": width_of_model(args.rounds),
    }
    write_whole(args.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
