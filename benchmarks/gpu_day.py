"""The day a GPU is at hand: all that is claimed about GPUs, run on one in under nine minutes.

    python -m benchmarks.gpu_day --output benchmarks/gpu.json       # one GPU of 80 GB
    python -m benchmarks.gpu_day --trl 4 8          # and TRL, so many pairs a batch
    python -m benchmarks.gpu_day --small            # on a CPU: does the program run?

Parts, which --only picks:

    card        what matrix products and copies reach on this card
    exact       flash attention against float64; log-probs and gradients in bf16 against fp32
    run         train.py by torchrun with NCCL: train, save, be resumed
    sampler     tokens/s of an 8B model by batch, with a CUDA graph and without
    trl         the same pairs by TRL
    steps of X  whole steps of a model by setting: tokens/s, MFU, peak memory, kernels, waits. Of
                Llama-3-8B 8 layers, as more have no room on one GPU

Whole steps of train.py in mixed precision under FSDP2, on random weights in the shapes of real
models. Each step has new pairs, as in training: kernels that plan for each shape show what they
cost. Lengths are those of benchmarks/lengths.py. MFU counts a step's useful work (gpu.py) against
--peak. Figures are medians.
"""
import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

import gpu
from benchmarks.lengths import pair_lengths
from benchmarks.scaling import random_pairs
from benchmarks.shapes import SHAPES, config_of
from benchmarks.step import write_pairs
from benchmarks.workers import ROOT, WARM_UP, Worker, machine
from command import run_command
from data.files import check_output, write_whole
from data.preference import pack
from distributed import join_ranks, leave_ranks, shard_model
from gpu import useful_flops
from model import Transformer, causal_attention, pair_attention, read_config
from sampler import decode_attention, generate
from train import TrainConfig, make_optimizer, resolve_config, run_rows, train_step

TOKENS = 8192       # of a row
PAIRS = 32          # a step
# Pairs of a step on a CPU, and their longest sequence.
SMALL = {"tokens": 400, "pairs": 4, "max_length": 150}


def train_config(args, **changes):
    tokens = SMALL["tokens"] if args.small else TOKENS
    tokens *= changes.pop("rows", 1)
    settings = {"compute_dtype": "bfloat16", "tokens_per_micro_batch": tokens} | changes
    return resolve_config(TrainConfig(model="-", data=["-"], **settings))


@torch.no_grad()
def fill(model):
    """Random weights, the same every time, of the scale of a real model's."""
    generator = torch.Generator(model.device).manual_seed(0)
    for p in model.parameters():
        p = getattr(p, "_local_tensor", p)
        if p.ndim == 1:
            p.fill_(1)
        else:
            p.normal_(std=0.02, generator=generator)
    model.requires_grad_(True)


def sharded_model(model_config, config, device):
    """What load_sharded makes, without files."""
    with torch.device("meta"):
        model = Transformer(model_config)
    shard_model(model, config, device)
    model.to_empty(device=device)
    model.recompute = config.recompute
    if device.type == "cuda":
        gpu.speed_up(model, getattr(torch, config.compute_dtype), config.compile)
    fill(model)
    return model


class Pairs:
    """New pairs for each step."""

    def __init__(self, args):
        self.n = SMALL["pairs"] if args.small else PAIRS
        self.max_length = SMALL["max_length"] if args.small else 2048
        self.seed = 0

    def lengths(self):
        self.seed += 1
        return pair_lengths(self.n, seed=self.seed, max_length=self.max_length)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call, device, rounds):
    """Seconds of each of some calls, after one that does not count."""
    call()
    taken = []
    for _ in range(rounds):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - began)
    return taken


# --- the parts ------------------------------------------------------------------------------------

def card(device, args):
    """What matrix products and copies reach."""
    size = 256 if args.small else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median(seconds_of(lambda: a @ b, device, 20))
    numbers = torch.randn(2**16 if args.small else 2**30, device=device).bfloat16()
    copy = torch.empty_like(numbers)
    copying = median(seconds_of(lambda: copy.copy_(numbers), device, 10))
    found = {"matmul_flops": 2 * size**3 / product, "copy_bytes": 4 * numbers.numel() / copying}
    print(f"products of {size}: {found['matmul_flops'] / 1e12:.0f} TFLOP/s; copies: "
          f"{found['copy_bytes'] / 1e12:.2f} TB/s read and written")
    return found


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def exact(device, args):
    """Errors relative to float64 or fp32."""
    found = {}
    if device.type == "cuda":
        found |= attention_errors(device)
    found |= step_errors(device, args)
    for name, error in found.items():
        print(f"error of {name}: {error:.1e}")
    return found


def attention_errors(device):
    """Of flash attention in bf16, against plain attention in float64 on the same numbers."""
    lengths = [(50, 200, 120), (3, 5, 300), (700, 40, 1), (1, 1, 1)]
    T = sum(map(sum, lengths))
    found = {}
    for H, K, D, window in ((32, 8, 128, None), (14, 2, 64, None), (32, 8, 128, 100)):
        torch.manual_seed(0)
        sizes = ((T, H, D), (T, K, D), (T, K, D), (T, H, D))
        q, k, v, grad = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in sizes)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        plain = partial(causal_attention, window=window)
        expected = pair_attention(*wide, lengths, plain)
        attend = gpu.flash_attend_pairs(lengths, device, window)
        out = attend(0, *inputs)
        name = f"flash attention, {H} heads to {K}, window {window}"
        found[name] = relative(out, expected)
        grads = torch.autograd.grad(out, inputs, grad)
        expected_grads = torch.autograd.grad(expected, wide, grad.double())
        found[f"its gradients, {H} heads to {K}, window {window}"] = max(
            map(relative, grads, expected_grads))

        # Decoding: 3 sequences in a cache with room for 500.
        shape = (1, 3, 500, K, D)
        ends = torch.tensor([0, 77, 499], device=device)
        keys, values = (torch.randn(shape[1:], device=device).bfloat16() for _ in range(2))
        one = torch.randn(3, H, D, device=device).bfloat16()
        out = gpu.flash_decode_attention(ends, shape, window)(one, keys, values)
        expected = decode_attention(ends, shape, window)(
            one.double(), keys.double(), values.double())
        found[f"decoding, {H} heads to {K}, window {window}"] = relative(out, expected)
    return found


def step_errors(device, args):
    """Of log-probs and gradients of a step in bf16, against fp32 on the same device."""
    c = config_of("small") if args.small else config_of("Llama-3-8B", layers=2)
    pairs = random_pairs(Pairs(args).lengths()[:8], c.vocab_size)
    sides = {}
    for dtype in ("float32", "bfloat16"):
        config = train_config(args, compute_dtype=dtype)
        model = sharded_model(c, config, device)
        rows = pack(pairs, config.tokens_per_micro_batch)
        results = run_rows(model, rows, config, 1 / len(pairs))
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        sides[dtype] = results[:, -2:], grads
        del model
    (logps, grads), (half_logps, half_grads) = sides.values()
    head = "lm_head.weight" if "lm_head.weight" in grads else "model.embed_tokens.weight"
    flat, half_flat = (torch.cat([g.flatten() for g in some.values()])
                       for some in (grads, half_grads))
    return {
        "average log-probs, absolute": (half_logps - logps).abs().max().item(),
        "the gradient of all weights": relative(half_flat, flat.double()),
        "the gradient of the head": relative(half_grads[head], grads[head].double()),
    }


def run(device, args):
    """train.py on the embedded model: the losses of its steps, and those of a resumed run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1",
            "train.py", "--output", str(output), "--max_steps", "12", "--save_every", "4"]
        began = time.perf_counter()
        first = _lines(command, output)
        seconds = time.perf_counter() - began
        # The end is lost, and done again from step 8.
        for file in (output / "step-000012").rglob("*"):
            if file.is_file():
                file.unlink()
        again = _lines([*command, "--resume"], output)
        _done([sys.executable, "generate.py", "--model", str(output / "step-000012"), "--prompt",
               "Sort from A to Z: pear, apple", "--max_new_tokens", "20", "--samples", "4"])
        dpo = Path(folder) / "dpo"
        _lines([*command[:6], "train.py", "--method", "dpo", "--output", str(dpo), "--max_steps",
                "2"], dpo)
    losses = [line["loss"] for line in first if "loss" in line]
    resumed = [line["loss"] for line in again if "loss" in line]
    evaluations = [line["eval_loss"] for line in first if "eval_loss" in line]
    largest = max(abs(a - b) for a, b in zip(losses, resumed))
    print(f"train.py: 12 steps in {seconds:.0f} s, loss on held-out pairs {evaluations[0]:.4f} to "
          f"{evaluations[-1]:.4f}; losses after resuming differ by at most {largest:.1e}")
    return {"seconds": seconds, "losses": losses, "resumed": resumed, "eval_losses": evaluations}


def _done(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def _lines(command, output):
    _done(command)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps(device, args, name, layers=None):
    """{setting: figures} of a model, or of one that is cut to a few layers."""
    found = {}
    c = config_of("small" if args.small else name, layers)
    model = sharded_model(c, train_config(args), device)
    optimizer = make_optimizer(model, train_config(args))
    settings = ["kept", "recomputed", "recomputed, rows of twice the tokens"]
    if layers:
        settings += ["kept, plain attention", "kept, cuDNN's attention", "kept, compiled"]
    for setting in settings:
        figures = measure_steps(model, optimizer, c, setting, device, args)
        found[setting] = figures
        print(f"{name}, {c.n_layers} layers, {setting}: {figures['tokens_per_second']:.0f} "
              f"tokens/s, MFU {figures['mfu']:.1%}, peak {figures['peak_bytes'] / 1e9:.1f} GB, "
              f"{figures['kernels']} kernels and {figures['waits']} waits a step", flush=True)
    return found


def free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_steps(model, optimizer, c, setting, device, args):
    cuda = device.type == "cuda"
    config = train_config(args, rows=2 if "twice" in setting else 1)
    model.recompute = "recomputed" in setting
    fast = vars(model).get("attend_pairs")
    if "plain" in setting or "cuDNN" in setting:
        vars(model).pop("attend_pairs", None)
    torch.backends.cuda.enable_cudnn_sdp("cuDNN" in setting)
    if "compiled" in setting:       # the last setting: it stays so
        gpu.speed_up(model, torch.float32, compiled=True)
    pairs = Pairs(args)
    pairs.seed = 100            # the same for every setting

    def step():
        lengths = pairs.lengths()
        some = random_pairs(lengths, c.vocab_size)
        wait(device)
        began = time.perf_counter()
        outcome = train_step(model, optimizer, some, config.learning_rate, config)
        wait(device)
        taken = time.perf_counter() - began
        return lengths, outcome, taken

    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rates = []
    mfus = []
    times = []
    # cuDNN's takes minutes, and its figure is clear after two.
    for _ in range(min(args.rounds, 2) if "cuDNN" in setting else args.rounds):
        lengths, outcome, taken = step()
        times.append(taken)
        rates.append(sum(map(sum, lengths)) / taken)
        mfus.append(useful_flops(c, lengths) / taken / args.peak)
    figures = {
        "seconds": times, "tokens_per_second": median(rates), "mfu": median(mfus),
        "rows": len(outcome.rows), "grad_norm": outcome.grad_norm,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0}
    figures |= profiled(step, c, device)
    if fast:
        model.attend_pairs = fast
    torch.backends.cuda.enable_cudnn_sdp(False)
    return figures


KINDS = (       # of kernels, by words in their names
    ("attention", ("flash", "fmha", "cudnn", "attention")),
    ("matmul", ("gemm", "nvjet", "cutlass", "cublas", "splitk")),
    ("optimiser", ("FusedAdam", "FusedOptimizer", "multi_tensor_apply")),
    ("collectives", ("nccl",)),
    ("copies", ("Memcpy", "copy", "chunk_cat", "split_with_sizes", "CatArray")),
)


def profiled(step, c, device):
    """Kernels of a step and their milliseconds by kind, and how often the host waits."""
    if device.type != "cuda":
        return {"kernels": 0, "waits": 0, "milliseconds": {}}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        lengths, _, taken = step()
    milliseconds = Counter()
    kernels = 0
    slowest = Counter()
    for event in seen.key_averages():
        if "CUDA" not in str(event.device_type) or event.is_user_annotation:
            continue
        kind = "element by element"
        for name, words in KINDS:
            if any(word in event.key for word in words):
                kind = name
                break
        kernels += event.count
        milliseconds[kind] += event.self_device_time_total / 1e3
        slowest[event.key[:90]] += event.self_device_time_total / 1e3
    waits = sum(e.count for e in seen.key_averages() if e.key == "cudaStreamSynchronize")
    # The busy milliseconds and the whole ones are of the same step.
    return {"kernels": kernels, "waits": waits, "milliseconds": dict(milliseconds),
            "profiled_tokens": sum(map(sum, lengths)), "profiled_seconds": taken,
            "profiled_flops": useful_flops(c, lengths), "slowest": slowest.most_common(25)}


def sampler(device, args):
    """{setting: tokens/s} of decoding, after the prompts."""
    c = config_of("small") if args.small else config_of("Llama-3-8B")
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = Transformer(c)
    torch.set_default_dtype(torch.float32)
    fill(model)
    found = {}
    settings = ["plain", "flash", "graph"] if device.type == "cuda" else ["plain"]
    length, new = (20, 5) if args.small else (1000, 40)
    texts = {}
    for batch in (4,) if args.small else (1, 32, 128):
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(c.vocab_size, (length - i % 50 if length > 50 else length,),
                                 generator=generator).tolist() for i in range(batch)]
        for setting in settings:
            vars(model).pop("decode_attention", None)
            if setting != "plain":
                gpu.speed_up(model, torch.bfloat16)
            captured = gpu.Captured
            if setting == "flash":
                gpu.Captured = lambda function, rows, device: function
            stamps = []
            answers = generate(
                model, prompts, seeds=[(0, i) for i in range(batch)], stop_ids=set(),
                max_new_tokens=new, batch_size=batch, temperature=0,
                progress=lambda *_: stamps.append(time.perf_counter()))
            gpu.Captured = captured
            between = [b - a for a, b in zip(stamps, stamps[1:])]
            texts[setting] = answers
            found[f"{setting}, batch {batch}"] = batch / median(between)
            print(f"sampler, {setting}, batch {batch}: {batch / median(between):.0f} tokens/s, "
                  f"{1e3 * median(between):.1f} ms a token", flush=True)
        if len(settings) == 3:
            same = sum(a == b for x, y in zip(texts["flash"], texts["graph"]) for a, b in zip(x, y))
            print(f"sampler, batch {batch}: {same} of {batch} answers are the same with a graph")
            found[f"same with a graph, batch {batch}"] = same
    return found


def trl(device, args):
    """Steps of TRL and of ours on the same pairs, a model of Llama-3.2-1B's shape."""
    name = "small" if args.small else "Llama-3.2-1B"
    c = config_of(name)
    lengths = Pairs(args).lengths()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_folder(folder, name, device)
        write_pairs(folder, c.vocab_size, lengths)
        ways = ["ours", *(f"trl-{batch}x{len(lengths) // batch}" for batch in args.trl)]
        for way in ways:
            worker = Worker(
                "benchmarks.step", "--serve", way, "--folder", folder, "--rounds", args.rounds,
                "--tokens_per_row", SMALL["tokens"] if args.small else TOKENS)
            try:
                steps = [worker.take_step() for _ in range(WARM_UP + args.rounds)]
            except RuntimeError as e:
                print(f"{way}: {e}")
                continue
            worker.kill()
            seconds = median(step["seconds"] for step in steps[WARM_UP:])
            flops = useful_flops(read_config(folder), lengths)
            found[way] = {
                "seconds": seconds, "tokens_per_second": sum(map(sum, lengths)) / seconds,
                "mfu": flops / seconds / args.peak, "loss": steps[0]["loss"]}
            print(f"{way}: {found[way]['tokens_per_second']:.0f} tokens/s, MFU "
                  f"{found[way]['mfu']:.1%}, loss of the first step {steps[0]['loss']:.4f}",
                  flush=True)
    return found


def write_folder(folder, name, device):
    """A Hugging Face folder with random weights, of one of SHAPES."""
    from safetensors.torch import save_file
    fields = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(SHAPES[name] | fields))
    with device:
        model = Transformer(read_config(folder)).bfloat16()
    fill(model)
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PARTS = {
    "card": card,
    "exact": exact,
    "run": run,
    "sampler": sampler,
    "trl": trl,
    "steps of 8B": partial(steps, name="Llama-3-8B", layers=8),
    "steps of 1B": partial(steps, name="Llama-3.2-1B"),
    "steps of 3B": partial(steps, name="Llama-3.2-3B"),
}


def measure(args):
    device = join_ranks(timeout_minutes=30)
    arguments = vars(args).copy()
    del arguments["output"]             # a place on the machine that measured
    found = machine() | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "arguments": arguments}
    for name in args.only or PARTS:
        if name == "trl" and not args.trl:
            continue
        began = time.perf_counter()
        found[name] = PARTS[name](device, args)
        free(device)
        print(f"--- {name}: {time.perf_counter() - began:.0f} s", flush=True)
        if args.output:
            write_whole(args.output, json.dumps(found, indent=1) + "\n")
    leave_ranks()
    return found


def main():
    parser = argparse.ArgumentParser(description="What a GPU makes of train.py and sampler.py.")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run; default: all")
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=float, default=989e12,
                        help="FLOP/s of the GPU in bf16: an H100's")
    parser.add_argument("--trl", type=int, nargs="*", default=[],
                        help="pairs a batch that TRL takes")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    if args.output:
        check_output(args.output)
    measure(args)


if __name__ == "__main__":
    run_command(main)
