"""What a GPU makes of it: exactness of its log-probs, tokens a second and MFU of an 8B-shaped model cut to a few layers.

    python benchmarks/gpu.py                                    # one GPU of 80 GB; a few minutes. Not run on a GPU yet
    python benchmarks/gpu.py --trl 1 2 4                        # and TRL, so many pairs a batch (benchmarks/requirements.txt)
    python benchmarks/gpu.py --dim 256 --layers 2 --tokens 512 --pairs 4 --rounds 1 --trl 1      # a CPU can check that it runs

Whole steps of train.py (bf16 compute, fp32 weights, gradients, moments), by setting: activations kept or recomputed, the MLPs
compiled or not, prompts shared or computed twice. Settings take turns; medians. TRL comes after them, as both together need too
much memory: fp32 weights under autocast to bf16. MFU counts a step's useful work (step.py) against --peak. Compiling is not a
knob of train.py: it becomes one if this shows a gain.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data.preference import pack
from distributed import clip_gradients, join_ranks, load_sharded
from lengths import pair_lengths
from model import Transformer, load_model, read_config
from scaling import prompts_twice, random_pairs
from step import WARM_UP, Worker, machine, useful_flops, write_pairs
from train import TrainConfig, make_optimizer, resolve_config, run_rows


def write_model(folder, dim, layers, vocab):
    """Llama-3-8B's shape at dim 4096, with random weights."""
    from safetensors.torch import save_file
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": dim, "intermediate_size": dim * 7 // 2, "num_hidden_layers": layers,
        "num_attention_heads": dim // 128, "num_key_value_heads": max(1, dim // 512), "vocab_size": vocab,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu", "tie_word_embeddings": False}))
    torch.manual_seed(0)
    with torch.device("meta"):
        names = {name: p.shape for name, p in Transformer(read_config(folder)).named_parameters()}
    save_file({name: (0.02 * torch.randn(shape) if len(shape) > 1 else torch.ones(shape)).bfloat16()
               for name, shape in names.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def exactness(folder, pairs, device):
    """Largest difference of average log-probs between bf16 on the device and fp32 on the CPU."""
    (row,), averages = pack(pairs, 10**6), []
    sizes = [n for _, C, R in row.lengths for n in (C, R)]
    with torch.no_grad():
        for dtype, where in ((torch.float32, "cpu"), (torch.bfloat16, device)):
            model = load_model(folder, dtype, where)
            logps = model.response_logps(row.tokens.to(where), row.lengths)
            averages.append(torch.stack([x.double().mean() for x in logps.cpu().split(sizes)]))
    return (averages[0] - averages[1]).abs().max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8, help="of Llama-3-8B's 32")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=8192, help="of a row")
    parser.add_argument("--pairs", type=int, default=32, help="a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of the GPU in bf16: an H100's")
    parser.add_argument("--trl", type=int, nargs="*", default=[], help="pairs a batch that TRL takes")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    max_length = min(2048, args.tokens // 2)
    lengths = pair_lengths(args.pairs, max_length=max_length)
    pairs = random_pairs(lengths, args.vocab)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), lengths, pairs, args)


def measure(folder, lengths, pairs, args):
    write_model(folder, args.dim, args.layers, args.vocab)
    config = resolve_config(TrainConfig(model=str(folder), data=["-"], compute_dtype="bfloat16"))
    device = join_ranks(config)
    error = exactness(folder, pairs[:2], device)
    print(f"average log-probs in bf16 on {device} differ from fp32 on the CPU by at most {error:.1e}", flush=True)
    model = load_sharded(config, device)
    optimizer = make_optimizer(model, config)
    flops, tokens = useful_flops(model.config, lengths), sum(map(sum, lengths))
    plain = [layer.mlp.forward for layer in model.model.layers]
    compiled = [torch.compile(forward, dynamic=True) for forward in plain]

    def step(recompute, compiling, shared):
        model.recompute = recompute
        for layer, forward in zip(model.model.layers, compiled if compiling else plain):
            layer.mlp.forward = forward
        began = time.perf_counter()
        if shared:
            run_rows(model, pack(pairs, args.tokens), config, 1 / len(pairs))
        else:
            for row in pack(pairs, args.tokens):
                prompts_twice(model, row.pairs)()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    settings = {f"{'recomputed' if r else 'kept'}, {'compiled' if c else 'eager'}, prompts {'shared' if s else 'twice'}": (r, c, s)
                for r, c, s in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 0))}
    results = machine() | {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                           "arguments": vars(args), "largest_error": error, "settings": {}}
    taken, peaks = {name: [] for name in settings}, {}
    for i in range(args.rounds + 1):
        for name, setting in settings.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = step(*map(bool, setting))
            peaks[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            taken[name] += [seconds] if i else []       # the first round compiles
    del model, optimizer, plain, compiled, step         # they hold memory
    if args.trl:
        torch.cuda.empty_cache()
        write_pairs(folder, args.vocab, lengths)
    for batch in args.trl:
        name = f"TRL, {batch} a batch"
        worker = Worker([str(ROOT / "benchmarks" / "step.py"), "--serve", f"trl-{batch}x{args.pairs // batch}", str(folder),
                         str(args.rounds + WARM_UP)])
        taken[name] = [worker.take_step()["seconds"] for _ in range(args.rounds + WARM_UP)][WARM_UP:]
        peaks[name] = 0                                 # not seen from here
        worker.kill()
    for name, times in taken.items():
        seconds = statistics.median(times)
        results["settings"][name] = {"seconds": seconds, "tokens_per_second": tokens / seconds,
                                     "mfu": flops / seconds / args.peak, "peak_bytes": peaks[name]}
        print(f"{name:42} {tokens / seconds:8.0f} tokens/s  MFU {flops / seconds / args.peak:.1%}  peak {peaks[name] / 1e9:.1f} GB")
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
