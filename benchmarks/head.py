"""The vocabulary head alone, with its gradient: ours against Liger-Kernel's chunked SimPO loss.

    pip install -r benchmarks/requirements.txt && pip install --no-deps liger-kernel==0.8.5
    python -m benchmarks.head

The same random hidden states, pairs and weight. Liger takes padded rows of prompt and response, a
pair at a time, and projects all of their positions; ours takes the states that predict response
tokens. Both without torch.compile. The loss is SimPO's, which is what Liger has. Processes and
turns as in step.py. Of cpu.py ours has the matrix products, which are all that it does for a head.
"""
import argparse
import json
import statistics

import torch

import cpu
from benchmarks.lengths import pair_lengths
from benchmarks.scaling import random_pairs
from benchmarks.workers import WARM_UP, Turns, Worker, machine
from command import run_command
from data.files import check_output, write_whole
from train import LOSS, TrainConfig, head_and_loss

BETA = 2.5
GAMMA_BETA_RATIO = 0.1


def states_and_weight(vocab, width, lengths):
    """Random hidden states of the two sequences of each pair, (P + C, width) and (P + R, width);
    their target tokens, (C,) and (R,); and the weight of the head, (vocab, width)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def draw_tokens(n):
        return torch.randint(vocab, (n,), generator=generator)

    states = [(draw(P + C, width), draw(P + R, width)) for P, C, R in lengths]
    targets = [(draw_tokens(C), draw_tokens(R)) for _, C, R in lengths]
    return states, targets, draw(vocab, width) / width**0.5


def ours(vocab, width, lengths):
    """The loss of each step of the head as train.py has it."""
    cpu.multiply_by_onednn()
    sequences, targets, weight = states_and_weight(vocab, width, lengths)
    predicting = []
    for (P, _, _), pair in zip(lengths, sequences):
        predicting += [sequence[P - 1:-1] for sequence in pair]
    states = torch.cat(predicting)                                              # (N, width)
    targets = torch.cat([tokens for pair in targets for tokens in pair])        # (N,)
    del sequences, predicting
    pairs = random_pairs(lengths, vocab)
    config = TrainConfig(method="simpo", beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO)
    weight.requires_grad_()
    while True:
        results, _ = head_and_loss(states, targets, weight, pairs, config, 1 / len(pairs))
        weight.grad = None                      # before the next step's memory is measured
        yield results[:, LOSS].mean().item()


def liger(vocab, width, lengths):
    """The loss of each step of Liger-Kernel's head."""
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss
    sequences, targets, weight = states_and_weight(vocab, width, lengths)
    longest = max(P + max(C, R) for P, C, R in lengths)
    # Rows of all chosen sequences, then of all rejected ones.
    states = torch.zeros(2 * len(lengths), longest - 1, width)
    labels = torch.full((2 * len(lengths), longest - 1), -100)
    for i, (P, C, R) in enumerate(lengths):
        for side, n in enumerate((C, R)):
            row = side * len(lengths) + i
            states[row, :P + n - 1] = sequences[i][side][:-1]
            labels[row, P - 1:P + n - 1] = targets[i][side]
    del sequences
    states.requires_grad_()
    weight.requires_grad_()
    head = LigerFusedLinearSimPOLoss(
        beta=BETA, gamma=GAMMA_BETA_RATIO * BETA, compute_nll_loss=False, compiled=False)
    while True:
        total = head(weight, states, labels)[0]
        total.backward()
        states.grad = None                      # before the next step's memory is measured
        weight.grad = None
        yield total.item()


WAYS = {"ours": ours, "liger": liger}


def measure(vocab, args):
    """The figures of one vocabulary, as a dict."""
    flags = ["--vocab", vocab, "--width", args.width, "--pairs", args.pairs,
             "--max_length", args.max_length, "--rounds", args.rounds]
    workers = {way: Worker("benchmarks.head", "--serve", way, *flags) for way in WAYS}
    losses = {way: worker.take_step()["loss"] for way, worker in workers.items()}
    # The peak above the weight's gradient, which both allocate in each step.
    gradient = 4 * vocab * args.width
    peaks = {way: worker.take_step()["peak"] - gradient for way, worker in workers.items()}
    rounds = []
    for _ in range(args.rounds):
        rounds.append({way: worker.take_step() for way, worker in workers.items()})
    for worker in workers.values():
        worker.kill()
    ratios = [r["liger"]["seconds"] / r["ours"]["seconds"] for r in rounds]
    return {
        "vocabulary": vocab,
        "first_losses": losses,
        "liger_times_as_long": statistics.median(ratios),
        "peak_bytes": peaks,
        "rounds": rounds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="benchmarks/head.json")
    parser.add_argument("--serve", choices=WAYS, help="used by this program itself")
    args = parser.parse_args()
    lengths = pair_lengths(args.pairs, max_length=args.max_length)
    if args.serve:
        way = WAYS[args.serve](args.vocab[0], args.width, lengths)
        return Turns().serve(way, args.rounds + WARM_UP)

    check_output(args.output)
    results = machine() | {"arguments": vars(args), "lengths": lengths, "vocabularies": []}
    for vocab in args.vocab:
        r = measure(vocab, args)
        results["vocabularies"].append(r)
        write_whole(args.output, json.dumps(results, indent=1) + "\n")
        peaks = [f"{way} {peak / 1e6:.0f} MB" for way, peak in r["peak_bytes"].items()]
        print(f"vocabulary {vocab}: ours is {r['liger_times_as_long']:.2f} times as fast as Liger; "
              f"peak above the weight and its gradient {', '.join(peaks)}; "
              f"losses {r['first_losses']}", flush=True)


if __name__ == "__main__":
    run_command(main)
