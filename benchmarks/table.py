"""The tables of speed in benchmarks/README.md, from the committed results of the other programs.

    python -m benchmarks.table                  # prints them
    python -m benchmarks.table --write          # puts them into benchmarks/README.md
"""
import sys
from pathlib import Path

from benchmarks import dry
from benchmarks.scaling import model_config, random_pairs
from benchmarks.step import trl_batch
from data.files import read_json, write_whole
from data.preference import pack
from model import CHUNK_LOGITS, KEPT_LOGITS
from plan import kept_per_token

HERE = Path(__file__).resolve().parent
BEGIN_MARK = "<!-- benchmarks/table.py -->\n"
GPU_MARK = "<!-- benchmarks/table.py, of gpu.json -->\n"
PREDICTED_MARK = "<!-- benchmarks/table.py, of dry-h100.json and gpu.json -->\n"
CHANGES_MARK = "<!-- benchmarks/table.py, of dry-before.json and dry-after.json -->\n"
PLAN_MARK = "<!-- benchmarks/table.py, of dry.json and plan.py -->\n"
END_MARK = "<!-- end -->"
COLUMNS = (
    "what", "against", "times as fast", "useful share of PyTorch's matmul rate, ours / theirs",
    "peak memory, ours / theirs")


def read(name):
    return read_json(HERE / f"{name}.json")


def megabytes(ours, theirs):
    return f"{ours / 1e6:,.0f} MB / {theirs / 1e6:,.0f} MB"


def line(cells):
    return "| " + " | ".join(cells) + " |\n"


def table():
    """The table and a few sentences, as Markdown."""
    rows = []
    of_onednn = []
    for name in ("step", "step-128k"):
        (r,) = read(name)["vocabularies"]
        rows += rows_of_steps(r)
        of_onednn.append(f"{r['share_of_product_rate']['ours']:.0%} at {r['vocabulary']:,}")
    rows += rows_of_heads(read("head")["vocabularies"])
    r = read("sample")
    rows.append([
        f"greedy answers, SmolLM2-135M, batch {r['batch_size']}", "transformers' generate",
        f"{r['times_as_long_as_ours']:.2f}", "", ""])
    lines = [line(COLUMNS), "|---" * len(COLUMNS) + "|\n"]
    lines += [line(row) for row in rows]
    return (
        "".join(lines) + "\nOf the rate of oneDNN's matmul, which ours takes on this machine, its "
        f"useful share is {' and '.join(of_onednn)}.\n" + growth() + predictions())


def rows_of_steps(r):
    """Two rows for the figures of one vocabulary: against TRL, and against padded rows."""
    times = r["times_as_long_as_ours"]
    share = r["share_of_matmul_rate"]
    peak = r["peak_bytes"]
    best = r["trl_best"]

    def figures(way):
        return [f"{times[way]:.2f}", f"{share['ours']:.0%} / {share[way]:.0%}",
                megabytes(peak["ours"], peak[way])]

    warm = r["warm_seconds"]
    slower = []             # what TRL's other batches came to
    for way in warm:
        if way.startswith("trl") and way != best:
            slower.append(f"{warm[way] / warm['ours']:.1f} at {trl_batch(way)}")
    trl = f"TRL, {trl_batch(best)} pair a batch, its best"
    if slower:
        trl += f" ({', '.join(slower)})"
    tokens = r["tokens"] // r["pairs"]
    what = f"optimiser step, vocabulary {r['vocabulary']:,}, {r['pairs']} pairs of {tokens} tokens"
    padded = "padded rows, logits of every position, a pair at a time"
    return [[what, trl, *figures(best)], ["the same", padded, *figures("padded")]]


def rows_of_heads(vocabularies):
    rows = []
    for r in vocabularies:
        peak = r["peak_bytes"]
        rows.append([
            f"vocabulary head and its gradient, {r['vocabulary']:,}",
            "Liger-Kernel, chunked SimPO loss",
            f"{r['liger_times_as_long']:.2f}", "", megabytes(peak["ours"], peak["liger"])])
    return rows


def growth():
    """What scaling.py found, as sentences."""
    results = read("scaling")
    tokens = [r["without_attention"] for r in results["length"].values()]
    lengths = [int(T) for T in results["length"]]
    pairs = results["pairs"].values()
    gains = []
    for name, r in results["sharing"].items():
        gains.append(f"{r['gain']:.2f} times as fast where {name} (by tokens alone: "
                     f"{r['ideal']:.2f})")
    return (
        f"A token costs {min(tokens):.0f} to {max(tokens):.0f} us besides attention in pairs of "
        f"{min(lengths)} to {max(lengths):,} tokens; a pair costs {min(pairs):.1f} to "
        f"{max(pairs):.1f} ms in steps of 8 to 128. Sharing the prompt makes a step "
        f"{' and '.join(gains)}, with r prompt tokens for each of a response.\n")


def predictions():
    """A step's memory as plan.py counts it, and what was measured, as a sentence."""
    parts = []
    for name in ("step", "step-128k"):
        results = read(name)
        args = results["arguments"]
        (r,) = results["vocabularies"]
        V = r["vocabulary"]
        config = model_config(args["width"], args["layers"])
        rows = pack(random_pairs(r["lengths"], V), args["tokens_per_row"])
        row = max(rows, key=lambda row: len(row.tokens))
        kept = len(row.tokens) * kept_per_token(config, recompute=False)
        longest = max(C + R for _, C, R in row.lengths)
        logits = min(KEPT_LOGITS["cpu"], V * longest) + CHUNK_LOGITS["cpu"]
        counted = 4 * (kept + logits)
        measured = r["peak_bytes"]["ours"]
        parts.append(f"{counted / 1e6:.0f} MB at {V:,} (measured: {measured / 1e6:.0f})")
    return (
        "The peak that plan.py counts, activations of the heaviest row and logits of its longest "
        f"pair, is {', '.join(parts)}.\n")


def gpu_table():
    """What gpu_day.py found on a GPU, as Markdown."""
    r = read("gpu")
    lines = [
        line(["8 of Llama-3-8B's layers", "tokens/s", "MFU", "peak memory", "kernels a step",
              "busy"]),
        "|---" * 6 + "|\n"]
    for setting, f in r["steps of 8B"].items():
        busy = sum(f["milliseconds"].values()) / 1e3 / f["profiled_seconds"]
        lines.append(line([
            setting, f"{f['tokens_per_second']:,.0f}", f"{f['mfu']:.1%}",
            f"{f['peak_bytes'] / 1e9:.1f} GB", f"{f['kernels']:,}", f"{busy:.0%}"]))
    kept = r["steps of 8B"]["kept"]
    milliseconds = kept["milliseconds"]
    kinds = sorted(milliseconds, key=milliseconds.get, reverse=True)
    parts = ", ".join(f"{kind} {milliseconds[kind]:.0f}" for kind in kinds)
    rate = kept["profiled_flops"] / (milliseconds["matmul"] + milliseconds["attention"]) * 1e3
    lines.append(
        f"\nOf a step with activations kept, {kept['profiled_tokens']:,} tokens in "
        f"{1e3 * kept['profiled_seconds']:.0f} ms, the GPU spends, in ms: {parts}. Products and "
        f"attention run at {rate / 1e12:.0f} TFLOP/s of useful work; a product of 8,192 alone "
        f"reaches {r['card']['matmul_flops'] / 1e12:.0f}, a copy "
        f"{r['card']['copy_bytes'] / 1e12:.1f} TB/s.\n\n")

    title = "sampling, Llama-3-8B's shape, tokens/s"
    lines += [line([title, "batch 1", "32", "128"]), "|---" * 4 + "|\n"]
    for setting, title in (("plain", "plain attention with a mask"), ("flash", "flash attention"),
                           ("graph", "and a CUDA graph")):
        lines.append(line([title] + [
            f"{r['sampler'][f'{setting}, batch {batch}']:,.0f}" for batch in (1, 32, 128)]))
    lines.append("\n")

    ours = r["trl"]["ours"]
    (way,) = (way for way in r["trl"] if way != "ours")
    theirs = r["trl"][way]
    difference = abs(ours["loss"] - theirs["loss"])
    lines.append(
        f"A step of Llama-3.2-1B's shape: {ours['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{ours['mfu']:.0%}, {theirs['seconds'] / ours['seconds']:.2f} times as fast as TRL's with "
        f"{trl_batch(way)} pairs a batch ({theirs['tokens_per_second']:,.0f} tokens/s); the first "
        f"losses differ by {difference:.3f}, in bf16.\n\n")

    lines += [line(["error in bf16", "relative"]), "|---" * 2 + "|\n"]
    lines += [line([what, f"{error:.1e}"]) for what, error in r["exact"].items()]
    run = r["run"]
    largest = max(abs(a - b) for a, b in zip(run["losses"], run["resumed"]))
    lines.append(
        f"\ntrain.py under torchrun with NCCL on one GPU, 12 steps of the embedded model: the loss "
        f"on held-out pairs goes from {run['eval_losses'][0]:.4f} to {run['eval_losses'][-1]:.4f}; "
        f"after a lost end and --resume the losses differ by at most {largest:g}.\n")
    return "".join(lines)


def predicted_table():
    """The steps that an H100 took beside the dry run's, as Markdown."""
    predicted, measured = read("dry-h100"), read("gpu")["steps of 8B"]
    lines = [line(["dry run / H100: ratio", *dry.MEASURED]), "|---" * 4 + "|\n"]
    kinds = ("matmul", "attention", "element by element", "copies", "optimiser")
    columns = []
    for setting in dry.MEASURED:
        p, m = predicted[setting], measured[setting]
        cells = {"kernels": (sum(p["kernels"].values()) + sum(p["copies"].values()), m["kernels"])}
        for kind in kinds:
            cells[f"{kind}, ms"] = 1e3 * p["seconds"][kind], m["milliseconds"][kind]
        cells["the step, ms"] = 1e3 * p["seconds"]["in all"], 1e3 * m["profiled_seconds"]
        cells["MFU, %"] = (
            100 * p["mfu"], 100 * m["profiled_flops"] / m["profiled_seconds"] / dry.PEAK)
        cells["waits"] = sum(p["waits"].values()), m["waits"]
        cells["peak memory, GB"] = p["peak_gb"], m["peak_bytes"] / 1e9
        columns.append(cells)
    for what in columns[0]:
        digits = 1 if what.endswith(("GB", "%")) else 0
        row = []
        for cells in columns:
            ours, theirs = cells[what]
            row.append(f"{ours:,.{digits}f} / {theirs:,.{digits}f}: {ours / theirs:.2f}")
        lines.append(line([what, *row]))
    return "".join(lines)


def changes_table():
    """Dry runs of Llama-3-8B before gpu.py and now, as Markdown."""
    before, after = read("dry-before"), read("dry-after")
    titles = {"kept": "kept", "recomputed": "recomputed", "decoding": "a token of 128 answers"}
    lines = [line(["before -> after", *titles.values()]), "|---" * 4 + "|\n"]

    def row(what, cell, some=titles):
        cells = [f"{cell(before[way])} -> {cell(after[way])}" if way in some else ""
                 for way in titles]
        lines.append(line([what, *cells]))

    def moved(r):
        sizes = r["gb_read_and_written"]
        return f"{sizes['element by element'] + sizes['copies']:,.1f}"

    row("kernels", lambda r: f"{sum(r['kernels'].values()):,}")
    row("of them attention", lambda r: f"{r['kernels']['attention']:,}")
    row("GB read and written element by element and in copies", moved)
    row("waits for the device", lambda r: str(sum(r["waits"].values())))
    row("copies that the host waits for",
        lambda r: str(r["copies"].get("to the device, blocking", 0)))
    row("peak memory, GB a GPU", lambda r: f"{r['peak_gb']:.1f}")
    row("predicted", lambda r: f"{1e3 * r['seconds']['in all']:,.1f} ms")
    row("MFU", lambda r: f"{r['mfu']:.1%}", ("kept", "recomputed"))
    tokens = 128 / after["decoding"]["seconds"]["in all"]
    reached = read("gpu")["sampler"]["graph, batch 128"]
    lines.append(f"\nDecoding, {tokens:,.0f} tokens/s are predicted; with a CUDA graph the H100 "
                 f"reached {reached:,.0f}, {reached / tokens:.2f} of it.\n")
    return "".join(lines)


def plan_table():
    """plan.py beside the peaks of dry steps, as Markdown."""
    cells = {}
    for model, gpus, knobs, peak, planned in planned_peaks():
        row = cells.setdefault((model, gpus), {})
        row[knobs] = f"{peak / 1e9:.1f}: {planned / peak:.2f}"
    columns = list(dict.fromkeys(knobs for row in cells.values() for knobs in row))
    lines = [
        line(["GB at the peak of a dry step: plan.py's share", "GPUs", *columns]),
        "|---" * (2 + len(columns)) + "|\n"]
    for (model, gpus), row in cells.items():
        lines.append(line([model, str(gpus), *(row.get(knobs, "") for knobs in columns)]))
    return "".join(lines)


def planned_peaks():
    """(model, GPUs, knobs, bytes at the peak of the dry run, bytes by plan.py), row by row."""
    for r in read("dry")["rows"]:
        config = dry.checked_config(r["gpus"], dict.fromkeys(r["knobs"], True))
        planned = dry.planned_bytes(dry.config_of(r["model"]), config, r["gpus"])
        knobs = ", ".join(f"`--{name}`" for name in r["knobs"]) or "no knobs"
        yield r["model"], r["gpus"], knobs, 1e9 * r["peak_gb"], planned


TABLES = {
    BEGIN_MARK: table, GPU_MARK: gpu_table, PREDICTED_MARK: predicted_table,
    CHANGES_MARK: changes_table, PLAN_MARK: plan_table}


def main(argv):
    if argv != ["--write"]:
        for make in TABLES.values():
            print(make())
        return
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    for mark, make in TABLES.items():
        before, rest = text.split(mark)
        _, after = rest.split(END_MARK, 1)
        text = before + mark + make() + END_MARK + after
    write_whole(readme, text)


if __name__ == "__main__":
    main(sys.argv[1:])
