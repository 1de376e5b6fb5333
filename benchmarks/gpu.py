"""What a GPU makes of it: exactness of its log-probs, tokens a second and MFU of an 8B-shaped model
cut to a few layers.

    python -m benchmarks.gpu                # one GPU of 80 GB; a few minutes. Not run on a GPU yet
    python -m benchmarks.gpu --trl 1 2 4    # and TRL, so many pairs a batch (requirements.txt here)

A CPU can check that it runs:

    python -m benchmarks.gpu --dim 256 --layers 2 --tokens 512 --pairs 4 --rounds 1 --trl 1

Whole steps of train.py in mixed precision (bf16 compute; fp32 weights, gradients and moments), by
setting: activations kept or recomputed, the MLPs compiled or not, prompts shared or computed twice.
Settings take turns; figures are medians. TRL comes after them, as both together need too much
memory: fp32 weights under autocast to bf16. MFU counts a step's useful work (step.py) against
--peak. Compiling is not a knob of train.py: it becomes one if this shows a gain.
"""
import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.lengths import pair_lengths
from benchmarks.scaling import prompts_twice, random_pairs
from benchmarks.step import useful_flops, write_pairs
from benchmarks.workers import WARM_UP, Worker, machine
from command import run_command
from data.files import check_output, write_whole
from data.preference import pack
from distributed import clip_gradients, join_ranks, load_sharded
from model import Transformer, load_model, read_config
from train import TrainConfig, make_optimizer, resolve_config, train_step


@dataclass(frozen=True)
class Setting:
    recompute: bool = False
    compiled: bool = False          # the MLPs
    shared: bool = True             # prompts

    def __str__(self):
        activations = "recomputed" if self.recompute else "kept"
        mlps = "compiled" if self.compiled else "eager"
        prompts = "shared" if self.shared else "twice"
        return f"{activations}, {mlps}, prompts {prompts}"


SETTINGS = [
    Setting(), Setting(compiled=True), Setting(recompute=True), Setting(shared=False)]


def write_model(folder, dim, layers, vocab):
    """A folder of Llama-3-8B's shape at dim 4096, with random weights."""
    from safetensors.torch import save_file
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": dim * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": dim // 128,
        "num_key_value_heads": max(1, dim // 512),
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }))
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    tensors = {}
    for name, p in model.named_parameters():
        weight = torch.ones(p.shape) if p.ndim == 1 else 0.02 * torch.randn(p.shape)
        tensors[name] = weight.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def exactness(folder, pairs, device):
    """Largest difference of average log-probs between bf16 on the device and fp32 on the CPU."""
    (row,) = pack(pairs, 10**6)
    sizes = []
    for _, C, R in row.lengths:
        sizes += [C, R]

    def averages(dtype, where):
        model = load_model(folder, dtype, where)
        logps = model.response_logps(row.tokens.to(where), row.lengths)
        return torch.stack([part.double().mean() for part in logps.cpu().split(sizes)])

    exact = averages(torch.float32, "cpu")
    return (averages(torch.bfloat16, device) - exact).abs().max().item()


def measure_ours(folder, pairs, device, args):
    """({setting: seconds of each round}, {setting: peak bytes}) of steps of train.py."""
    config = resolve_config(TrainConfig(
        model=str(folder), data=["-"], tokens_per_micro_batch=args.tokens,
        compute_dtype="bfloat16"))
    model = load_sharded(config, device)
    optimizer = make_optimizer(model, config)
    eager = [layer.mlp.forward for layer in model.model.layers]
    compiled = [torch.compile(forward, dynamic=True) for forward in eager]

    def step(setting):
        model.recompute = setting.recompute
        forwards = compiled if setting.compiled else eager
        for layer, forward in zip(model.model.layers, forwards):
            layer.mlp.forward = forward
        if setting.shared:
            train_step(model, optimizer, pairs, config.learning_rate, config)
            return
        # What train_step does, with other rows.
        for row in pack(pairs, args.tokens):
            prompts_twice(model, row.pairs)()
        clip_gradients(model, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    taken = {str(setting): [] for setting in SETTINGS}
    peaks = {}
    cuda = device.type == "cuda"
    for _ in range(args.rounds + 1):
        for setting in SETTINGS:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            step(setting)
            if cuda:
                torch.cuda.synchronize()
            taken[str(setting)].append(time.perf_counter() - began)
            peaks[str(setting)] = torch.cuda.max_memory_allocated() if cuda else 0
    # The first round compiles.
    return {name: times[1:] for name, times in taken.items()}, peaks


def measure_trl(folder, batch, args):
    """Seconds of each round of TRL with so many pairs a batch."""
    worker = Worker(
        "benchmarks.step", "--serve", f"trl-{batch}x{args.pairs // batch}", "--folder", folder,
        "--rounds", args.rounds)
    seconds = [worker.take_step()["seconds"] for _ in range(WARM_UP + args.rounds)]
    worker.kill()
    return seconds[WARM_UP:]


def measure(folder, lengths, args):
    """All figures, as a dict."""
    write_model(folder, args.dim, args.layers, args.vocab)
    pairs = random_pairs(lengths, args.vocab)
    device = join_ranks(timeout_minutes=30)
    error = exactness(folder, pairs[:2], device)
    print(f"average log-probs in bf16 on {device} differ from fp32 on the CPU by at most "
          f"{error:.1e}", flush=True)
    taken, peaks = measure_ours(folder, pairs, device, args)
    if args.trl:
        torch.cuda.empty_cache()
        write_pairs(folder, args.vocab, lengths)
    for batch in args.trl:
        name = f"TRL, {batch} a batch"
        taken[name] = measure_trl(folder, batch, args)
        peaks[name] = 0             # not seen from here

    flops = useful_flops(read_config(folder), lengths)
    tokens = sum(map(sum, lengths))
    settings = {}
    for name, times in taken.items():
        seconds = median(times)
        r = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / args.peak,
            "peak_bytes": peaks[name],
        }
        settings[name] = r
        print(f"{name:42} {r['tokens_per_second']:8.0f} tokens/s  MFU {r['mfu']:.1%}  "
              f"peak {r['peak_bytes'] / 1e9:.1f} GB")
    return machine() | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "arguments": vars(args),
        "largest_error": error,
        "settings": settings,
    }


def main():
    parser = argparse.ArgumentParser(description="What a GPU makes of a step of train.py.")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8, help="of Llama-3-8B's 32")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=8192, help="of a row")
    parser.add_argument("--pairs", type=int, default=32, help="a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", type=float, default=989e12,
                        help="FLOP/s of the GPU in bf16: an H100's")
    parser.add_argument("--trl", type=int, nargs="*", default=[],
                        help="pairs a batch that TRL takes")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    if args.output:
        check_output(args.output)
    lengths = pair_lengths(args.pairs, max_length=min(2048, args.tokens // 2))
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), lengths, args)
    if args.output:
        write_whole(args.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
