"""The vocabulary head alone, with its gradient: ours against Liger-Kernel's chunked SimPO loss.

    pip install -r benchmarks/requirements.txt && pip install --no-deps liger-kernel==0.8.5
    python benchmarks/head.py --output benchmarks/head.json

The same random hidden states, pairs and weight. Liger takes padded rows of prompt and response, a pair at a time, and projects
all of their positions; ours takes the states that predict response tokens. Both without torch.compile. SimPO (alpha = 0),
which is what Liger has. Processes and turns as in step.py.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import step
from lengths import pair_lengths

BETA, GAMMA_BETA_RATIO = 2.5, 0.1


def states_and_weight(vocab, width, lengths):
    """Hidden states of each sequence, prompt and response, (P + C, width) and (P + R, width), and the weight."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    sequences = [(draw(P + C, width), draw(P + R, width)) for P, C, R in lengths]
    targets = [(torch.randint(vocab, (C,), generator=generator), torch.randint(vocab, (R,), generator=generator))
               for P, C, R in lengths]
    return sequences, targets, draw(vocab, width) / width**0.5


def ours(vocab, width, lengths):
    from alphapo import average_logps, simpo_loss
    from model import Transformer
    sequences, targets, weight = states_and_weight(vocab, width, lengths)
    states = torch.cat([s[P - 1:-1] for (P, _, _), pair in zip(lengths, sequences) for s in pair])
    targets = torch.cat([t for pair in targets for t in pair])
    del sequences
    weight.requires_grad_()

    def loss(i, logps):
        chosen, rejected = average_logps(logps, lengths[i][1:]).split(1)
        losses.append(simpo_loss(chosen, rejected, beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO)[0].sum() / len(lengths))
        return losses[-1]
    head, sizes = SimpleNamespace(head_weight=weight), [C + R for _, C, R in lengths]
    while True:
        losses = []
        Transformer.run_head(head, states, targets, sizes, loss, 1.0)
        weight.grad = None                      # before the next step's memory is measured
        yield sum(losses).item()


def liger(vocab, width, lengths):
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss
    sequences, targets, weight = states_and_weight(vocab, width, lengths)
    longest = max(P + max(C, R) for P, C, R in lengths)
    states = torch.zeros(2 * len(lengths), longest - 1, width)
    labels = torch.full((2 * len(lengths), longest - 1), -100)
    for side in (0, 1):
        for i, (P, C, R) in enumerate(lengths):
            row, n = side * len(lengths) + i, (C, R)[side]
            states[row, :P + n - 1] = sequences[i][side][:-1]
            labels[row, P - 1:P + n - 1] = targets[i][side]
    del sequences
    states.requires_grad_()
    weight.requires_grad_()
    head = LigerFusedLinearSimPOLoss(beta=BETA, gamma=GAMMA_BETA_RATIO * BETA, compute_nll_loss=False, compiled=False)
    while True:
        total = head(weight, states, labels)[0]
        total.backward()
        states.grad = weight.grad = None        # before the next step's memory is measured
        yield total.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="benchmarks/head.json")
    parser.add_argument("--serve", help="a way; used by this program itself")
    args = parser.parse_args()
    lengths = pair_lengths(args.pairs, max_length=args.max_length)
    if args.serve:
        step.answers, sys.stdout = sys.stdout, sys.stderr
        return step.serve({"ours": ours, "liger": liger}[args.serve](args.vocab[0], args.width, lengths), args.rounds + step.WARM_UP)
    results = step.machine() | {"arguments": vars(args), "lengths": lengths, "vocabularies": []}
    for vocab in args.vocab:
        job = ["--vocab", str(vocab), "--width", str(args.width), "--pairs", str(args.pairs), "--max_length",
               str(args.max_length), "--rounds", str(args.rounds)]
        workers = {way: step.Worker([__file__, *job, "--serve", way]) for way in ("ours", "liger")}
        losses = {way: worker.take_step()["loss"] for way, worker in workers.items()}
        peaks = {way: worker.take_step()["peak"] - 4 * vocab * args.width for way, worker in workers.items()}
        rounds = [{way: worker.take_step() for way, worker in workers.items()} for _ in range(args.rounds)]
        for worker in workers.values():
            worker.kill()
        results["vocabularies"].append({
            "vocabulary": vocab, "first_losses": losses,
            "liger_times_as_long": statistics.median(r["liger"]["seconds"] / r["ours"]["seconds"] for r in rounds),
            "peak_bytes": peaks, "rounds": rounds})
        r = results["vocabularies"][-1]
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
        print(f"vocabulary {vocab}: Liger takes {r['liger_times_as_long']:.2f} times as long; peak above the weight and its "
              f"gradient " + ", ".join(f"{way} {peak / 1e6:.0f} MB" for way, peak in r["peak_bytes"].items())
              + f"; losses {losses}", flush=True)


if __name__ == "__main__":
    main()
