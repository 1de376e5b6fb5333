"""The README's table of speed, from the committed results of the other programs here.

    python benchmarks/table.py                  # prints it
    python benchmarks/table.py --write          # puts it into README.md, between its marks
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from data.preference import pack
from distributed import kept_per_token
from model import BLOCK_LOGITS, KEPT_LOGITS
from scaling import random_model, random_pairs

MARKS = "<!-- benchmarks/table.py -->\n", "<!-- end -->"


def read(name):
    return json.loads((HERE / f"{name}.json").read_text())


def table():
    rows, of_onednn = [], []
    for name in ("step", "step-128k"):
        (r,) = read(name)["vocabularies"]
        times, share, peak, best = r["times_as_long_as_ours"], r["share_of_matmul_rate"], r["peak_bytes"], r["trl_best"]
        of_onednn.append(f"{r['share_of_product_rate']['ours']:.0%} at {r['vocabulary']:,}")
        megabytes = lambda way: f"{peak[way] / 1e6:,.0f} MB"
        others = ", ".join(f"{r['warm_seconds'][way] / r['warm_seconds']['ours']:.1f} at {way[4:].split('x')[0]}"
                           for way in r["warm_seconds"] if way.startswith("trl") and way != best)
        rows += [(f"optimiser step, vocabulary {r['vocabulary']:,}, {r['pairs']} pairs of {r['tokens'] // r['pairs']} tokens",
                  f"TRL, {best[4:].split('x')[0]} pair a batch, its best" + (f" ({others})" if others else ""),
                  f"{times[best]:.2f}", f"{share['ours']:.0%} / {share[best]:.0%}", f"{megabytes('ours')} / {megabytes(best)}"),
                 ("the same", "padded rows, logits of every position, a pair at a time", f"{times['padded']:.2f}",
                  f"{share['ours']:.0%} / {share['padded']:.0%}", f"{megabytes('ours')} / {megabytes('padded')}")]
    for r in read("head")["vocabularies"]:
        rows.append((f"vocabulary head and its gradient, {r['vocabulary']:,}", "Liger-Kernel, chunked SimPO loss",
                     f"{r['liger_times_as_long']:.2f}", "", " / ".join(f"{r['peak_bytes'][way] / 1e6:,.0f} MB" for way in ("ours", "liger"))))
    r = read("sample")
    rows.append((f"greedy answers, SmolLM2-135M, batch {r['batch_size']}", "transformers' generate",
                 f"{r['times_as_long_as_ours']:.2f}", "", ""))
    lines = ["| what | against | takes times as long | useful share of PyTorch's matmul rate, ours / theirs | peak memory, ours / theirs |",
             "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return ("\n".join(lines) + "\n\n" + f"Of the rate of oneDNN's matmul, which ours takes on this machine, its useful share is "
            f"{' and '.join(of_onednn)}.\n" + growth() + predictions())


def growth():
    """What scaling.py found, as sentences."""
    r = read("scaling")
    rest, pairs = [x["without_attention"] for x in r["length"].values()], list(r["pairs"].values())
    return (f"A token costs {min(rest):.0f} to {max(rest):.0f} us besides attention in pairs of {min(map(int, r['length']))} to "
            f"{max(map(int, r['length'])):,} tokens; a pair costs {min(pairs):.1f} to {max(pairs):.1f} ms in steps of 8 to 128. "
            + "Sharing the prompt makes a step "
            + " and ".join(f"{x['gain']:.2f} times as fast where {name} (by tokens alone: {x['ideal']:.2f})"
                           for name, x in r["sharing"].items())
            + ", with r prompt tokens for each of a response.\n")


def predictions():
    """A step's memory by the count of --plan, and what was measured, as a sentence."""
    parts = []
    for name in ("step", "step-128k"):
        results = read(name)
        args, (r,) = results["arguments"], results["vocabularies"]
        config, V = random_model(args["width"], args["layers"], vocab=8).config, r["vocabulary"]
        row = max(pack(random_pairs(r["lengths"], V), args["tokens_per_row"]), key=lambda row: len(row.tokens))
        kept = len(row.tokens) * kept_per_token(config, recompute=False)
        logits = min(KEPT_LOGITS["cpu"], V * max(C + R for _, C, R in row.lengths)) + BLOCK_LOGITS["cpu"]
        parts.append(f"{4 * (kept + logits) / 1e6:.0f} MB at {V:,} (measured: {r['peak_bytes']['ours'] / 1e6:.0f})")
    return ("The peak that `--plan` counts, activations of the heaviest row and logits of its longest pair, is "
            + ", ".join(parts) + ".\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        readme = HERE.parent / "README.md"
        before, rest = readme.read_text().split(MARKS[0])
        readme.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1], 1)[1])
    else:
        print(table())
