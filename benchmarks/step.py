"""One whole optimiser step (forward, backward, clipping, AdamW) here and elsewhere: the same weights, pairs and machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step.py                          # the vocabulary of Llama-2, 4 pairs a step: 6 minutes on 2 cores
    python benchmarks/step.py --vocab 128256 --trl_batches 1 2 --output benchmarks/step-128k.json         # Llama-3's

ours     train.py's step
padded   a plain step with transformers, a pair at a time: chosen and rejected padded side by side, logits of every position
trl-NxM  TRL's CPOTrainer with loss_type="alphapo", N pairs a batch, M batches a step, as a user runs it

Each way is a process of its own, with the same model loaded. They take steps in turn, A B C A B C, while the others wait, so
that a machine whose speed drifts slows all of them; what counts is the median of the ratios of a round. Peak memory is what a
second step adds to weights, gradients and AdamW's moments. Linux.
"""
import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from lengths import pair_lengths

ALPHA, BETA, GAMMA_BETA_RATIO, LEARNING_RATE = 0.25, 2.5, 0.1, 1e-6
BOS, EOS, PAD = 0, 1, 2
WARM_UP = 2     # steps of each way: their time does not count, their memory does


def write_job(folder, vocab, width, layers, lengths):
    """A random Llama in a Hugging Face folder with a tokenizer, and pairs."""
    from safetensors.torch import save_file

    from model import Transformer, read_config
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "vocab_size": vocab,
              "intermediate_size": width * 11 // 4, "num_hidden_layers": layers, "num_attention_heads": width // 64,
              "num_key_value_heads": max(1, width // 256), "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
              "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Transformer(read_config(folder))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    write_pairs(folder, vocab, lengths)


def write_pairs(folder, vocab, lengths):
    """A tokenizer whose words are its ids, and pairs of random tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}      # BOS, EOS, PAD
    names = [*special.values(), *map("w{}".format, range(3, vocab))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(3, vocab, (n,), generator=generator).tolist()
    pairs = [{"prompt": [BOS, *draw(P - 1)], "chosen": [*draw(C - 1), EOS], "rejected": [*draw(R - 1), EOS]}
             for P, C, R in lengths]
    (folder / "pairs.json").write_text(json.dumps(pairs))


# --- the ways: generators that take one step each time they are asked, and yield its loss ----------------------------

def ours(folder, pairs, tokens_per_row):
    from data.preference import PreferencePair, pack
    from distributed import clip_gradients, join_ranks, reuse_memory
    from model import load_model
    from train import TrainConfig, make_optimizer, resolve_config, run_rows
    config = resolve_config(TrainConfig(model=str(folder), data=["-"], alpha=ALPHA, beta=BETA, learning_rate=LEARNING_RATE,
                                        gamma_beta_ratio=GAMMA_BETA_RATIO, weight_decay=0.0,
                                        tokens_per_micro_batch=tokens_per_row))
    reuse_memory()
    join_ranks(config)
    model = load_model(folder)
    optimizer = make_optimizer(model, config)
    pairs = [PreferencePair(*(np.array(p[part], dtype=np.int32) for part in ("prompt", "chosen", "rejected")), "")
             for p in pairs]
    while True:
        rows = pack(pairs, config.tokens_per_micro_batch)
        results, _ = run_rows(model, rows, config, 1 / len(pairs))
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield results[:, 0].mean().item()


def padded(folder, pairs, batch=1):
    from transformers import AutoModelForCausalLM

    from alphapo import alphapo_loss
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    while True:
        total = 0.0
        for i in range(0, len(pairs), batch):
            some = pairs[i:i + batch]
            rows = [(p["prompt"], p[side]) for side in ("chosen", "rejected") for p in some]
            longest = max(len(prompt) + len(response) for prompt, response in rows)
            tokens = torch.full((len(rows), longest), PAD)
            scored, seen = torch.zeros(len(rows), longest), torch.zeros(len(rows), longest, dtype=torch.long)
            for row, (prompt, response) in enumerate(rows):
                end = len(prompt) + len(response)
                tokens[row, :end], seen[row, :end] = torch.tensor(prompt + response), 1
                scored[row, len(prompt):end] = 1
            logits = model(tokens, attention_mask=seen, use_cache=False).logits[:, :-1]
            logps = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            logps = (logps * scored[:, 1:]).sum(-1) / scored.sum(-1)
            loss = alphapo_loss(*logps.split(len(some)), alpha=ALPHA, beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO)[0]
            (loss.sum() / len(pairs)).backward()
            total += loss.sum().item() / len(pairs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield total


def trl(folder, pairs, steps, batch):
    """Not a generator: TRL has the loop, and asks through `wait` and `done` before and after each step."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    text = lambda ids: " ".join(map("w{}".format, ids))
    rows = [{"prompt": text(p["prompt"][1:]) + " ", "chosen": text(p["chosen"][:-1]), "rejected": text(p["rejected"][:-1])}
            for p in pairs]
    config = CPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type="alphapo", alpha=ALPHA, beta=BETA, simpo_gamma=GAMMA_BETA_RATIO * BETA,
        learning_rate=LEARNING_RATE, per_device_train_batch_size=batch, gradient_accumulation_steps=len(pairs) // batch,
        max_length=4096, max_steps=steps, report_to=[], save_strategy="no", logging_steps=10**6, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(), fp16=False, gradient_checkpointing=False,
        max_grad_norm=1.0, dataloader_pin_memory=False)

    class InOrder(CPOTrainer):
        losses = []

        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)        # each step has the same pairs, as for the others

        def compute_loss(self, *args, **kwargs):
            out = super().compute_loss(*args, **kwargs)
            self.losses.append((out[0] if isinstance(out, tuple) else out).item())
            return out

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            wait()
            trainer.losses.clear()
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            done(time.perf_counter() - self.began, statistics.mean(trainer.losses))

    trainer = InOrder(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=config,
                      processing_class=AutoTokenizer.from_pretrained(folder), train_dataset=Dataset.from_list(rows * steps),
                      callbacks=[Steps()])
    trainer.train()


# --- one process a way ------------------------------------------------------------------------------------------------

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def wait():
    """Until this process is asked to take a step. Before the first WARM_UP its memory is made as low as it gets, to see how
    far a step raises it; afterwards it is left as a run has it, since handing memory back costs time."""
    if not sys.stdin.readline():
        sys.exit()          # nobody asks any more
    if wait.steps < WARM_UP:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")       # the peak begins here
        wait.before = resident("VmRSS")


def done(seconds, loss):
    wait.steps += 1
    print(json.dumps({"seconds": seconds, "loss": loss, "peak": resident("VmHWM") - wait.before}), file=answers, flush=True)


wait.steps = 0


def serve(way, steps):
    """Takes steps of a generator when asked."""
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        loss = next(way)
        done(time.perf_counter() - began, loss)


class Worker:
    """A process that takes a step each time it is asked, and waits in between."""

    def __init__(self, program):
        self.process = subprocess.Popen([sys.executable, *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take_step(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} ended early; its own output says why")
        return json.loads(answer)

    def kill(self):
        self.process.kill()


def machine():
    model = next((line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {"machine": f"{model or platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}


def matmul_rate(width, multiply=lambda a, b: a @ b.T):
    """FLOP/s of a matrix product as the model's own, the best of many."""
    a, b, best = torch.randn(2048, width), torch.randn(width * 11 // 4, width), 0
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(10):
            multiply(a, b)
        best = max(best, 10 * 2 * a.numel() * b.shape[0] / (time.perf_counter() - began))
    return best


def useful_flops(c, lengths):
    """Of a step of a model with ModelConfig c that computes prompts once, logits of response tokens only, and causal
    attention; backward is twice forward."""
    block = c.dim * (2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 3 * c.hidden_dim)
    total = 0
    for P, C, R in lengths:
        seen = P * P / 2 + (P * C + C * C / 2) + (P * R + R * R / 2)       # (query, key) pairs
        total += c.n_layers * (2 * block * (P + C + R) + 4 * c.n_heads * c.head_dim * seen) + 2 * c.dim * c.vocab_size * (C + R)
    return 3 * total


def measure(vocab, args):
    """The figures of one vocabulary, as a dict."""
    from model import checkpoint_tensors, product, read_config
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lengths = pair_lengths(args.pairs, max_length=args.max_length, prompts=args.prompts)
        write_job(folder, vocab, args.width, args.layers, lengths)
        flops = useful_flops(read_config(folder), lengths)
        n_weights = sum(math.prod(shape) for shape, _, _ in checkpoint_tensors(folder).values())
        start = lambda way: Worker([__file__, "--serve", way, str(folder), str(args.rounds + WARM_UP), str(args.tokens_per_row)])
        workers, losses, warm, peaks = {}, {}, {}, {}
        for way in ["ours", "padded"] + [f"trl-{b}x{args.pairs // b}" for b in args.trl_batches]:
            worker = start(way)
            losses[way] = worker.take_step()["loss"]
            last = worker.take_step()
            warm[way], peaks[way] = last["seconds"], last["peak"] - 4 * n_weights     # grown by gradients, not asked for
            rival = next((w for w in workers if w.startswith("trl") and way.startswith("trl")), None)
            if rival and warm[rival] <= warm[way]:      # of TRL's settings only the fastest stays: memory is short
                worker.kill()
                continue
            if rival:
                workers.pop(rival).kill()
            workers[way] = worker
        ways = list(workers)
        best = ways[2]
        rounds = []
        for i in range(args.rounds):
            rounds.append({way: workers[way].take_step() for way in ways}
                          | {"matmul": matmul_rate(args.width), "product": matmul_rate(args.width, product)})
            print(f"vocabulary {vocab}, round {i + 1}: "
                  + ", ".join(f"{way} {rounds[-1][way]['seconds']:.1f} s" for way in ways), file=sys.stderr, flush=True)
        for worker in workers.values():
            worker.kill()

    batch = int(best[4:].split("x")[0])
    longest = [max(P + max(C, R) for P, C, R in lengths[i:i + batch]) for i in range(0, len(lengths), batch)]
    median = lambda figure: {way: statistics.median(figure(r, way) for r in rounds) for way in ways}
    return {
        "vocabulary": vocab, "weights": n_weights, "pairs": args.pairs, "tokens": sum(map(sum, lengths)), "trl_best": best,
        "lengths": lengths, "trl_padding": 1 - sum(2 * P + C + R for P, C, R in lengths) / (2 * batch * sum(longest)),
        "second_prompts": sum(P for P, _, _ in lengths) / sum(2 * P + C + R for P, C, R in lengths), "first_losses": losses,
        "times_as_long_as_ours": median(lambda r, way: r[way]["seconds"] / r["ours"]["seconds"]),
        "pairs_per_second": median(lambda r, way: args.pairs / r[way]["seconds"]),
        "share_of_matmul_rate": median(lambda r, way: flops / r[way]["seconds"] / r["matmul"]),       # PyTorch's own
        "share_of_product_rate": median(lambda r, way: flops / r[way]["seconds"] / r["product"]),     # as model.py's
        "peak_bytes": peaks,
        "warm_seconds": warm, "rounds": rounds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=4, help="a step")
    parser.add_argument("--trl_batches", type=int, nargs="+", default=[1, 2, 4], help="pairs a batch that TRL may choose from")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--prompts", choices=["ultrafeedback", "alpacaeval"], default="ultrafeedback", help="their lengths")
    parser.add_argument("--tokens_per_row", type=int, default=1600, help="ours; has to hold the longest pair")
    parser.add_argument("--output", default="benchmarks/step.json")
    args = parser.parse_args()
    results = machine() | {"arguments": vars(args), "vocabularies": []}
    for vocab in args.vocab:
        r = measure(vocab, args)
        results["vocabularies"].append(r)
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
        print(f"vocabulary {vocab}, {r['tokens']} tokens in {r['pairs']} pairs; TRL best as {r['trl_best']}, "
              f"{r['trl_padding']:.0%} of its positions padding, {r['second_prompts']:.0%} of its tokens second prompts; losses of the first step {r['first_losses']}")
        for way in r["pairs_per_second"]:
            print(f"  {way:10} {r['times_as_long_as_ours'][way]:5.2f} times as long, {r['pairs_per_second'][way]:6.2f} pairs/s, "
                  f"{r['share_of_matmul_rate'][way]:4.0%} of the matmul rate, peak {r['peak_bytes'][way] / 1e6:6.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        answers, sys.stdout = sys.stdout, sys.stderr
        way, folder, steps = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
        pairs = json.loads((folder / "pairs.json").read_text())
        if way.startswith("trl"):
            trl(folder, pairs, steps, int(way[4:].split("x")[0]))
        else:
            serve(ours(folder, pairs, int(sys.argv[5])) if way == "ours" else padded(folder, pairs), steps)
    else:
        main()
