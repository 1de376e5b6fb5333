"""One whole optimiser step (forward, backward, clipping, AdamW) here and elsewhere: the same
weights, pairs and machine.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.step           # the vocabulary of Llama-2, 4 pairs: 6 minutes on 2 cores
    python -m benchmarks.step --vocab 128256 --trl_batches 1 2 --output benchmarks/step-128k.json

ours     train.py's step
padded   a plain step with transformers, a pair at a time: chosen and rejected padded side by side,
         logits of every position
trl-NxM  TRL's CPOTrainer with loss_type="alphapo", N pairs a batch, M batches a step, as a user
         runs it

Each way is a process of its own (workers.py) with the same model loaded. They take steps in turn,
and what counts is the median of the ratios of a round. Peak memory is what a second step adds to
weights, gradients and AdamW's moments. --mkl leaves out oneDNN, as on CPUs without AVX-512. Linux.
"""
import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import cpu
from alphapo import alphapo_loss
from benchmarks.lengths import pair_lengths
from benchmarks.workers import WARM_UP, Turns, Worker, machine
from command import run_command
from data.files import check_output, write_whole
from data.preference import PreferencePair
from distributed import join_ranks, load_sharded
from gpu import useful_flops
from model import Transformer, checkpoint_tensors, read_config
from train import LOSS, TrainConfig, make_optimizer, resolve_config, train_step

ALPHA = 0.25
BETA = 2.5
GAMMA_BETA_RATIO = 0.1
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0
BOS, EOS, PAD = 0, 1, 2
WORKERS_FLAGS = ("serve", "folder")         # not asked for by people


# --- the job: a model, a tokenizer and pairs ------------------------------------------------------

def write_job(folder, vocab, width, layers, lengths):
    """A random Llama in a Hugging Face folder with a tokenizer, and pairs."""
    from safetensors.torch import save_file
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "vocab_size": vocab,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 256),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
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
    ids = {name: i for i, name in enumerate(special.values())}
    for i in range(len(special), vocab):
        ids[f"w{i}"] = i
    words = Tokenizer(models.WordLevel(ids))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)

    generator = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randint(len(special), vocab, (n,), generator=generator).tolist()

    pairs = []
    for P, C, R in lengths:
        pairs.append({
            "prompt": [BOS, *draw(P - 1)],
            "chosen": [*draw(C - 1), EOS],
            "rejected": [*draw(R - 1), EOS]})
    (folder / "pairs.json").write_text(json.dumps(pairs))


# --- the ways: they take a step each time they are asked, and give its loss -----------------------

def ours(folder, pairs, tokens_per_row):
    """The loss of each step of train.py."""
    config = resolve_config(TrainConfig(
        model=str(folder), data=["-"], alpha=ALPHA, beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO,
        learning_rate=LEARNING_RATE, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM,
        tokens_per_micro_batch=tokens_per_row))
    device = join_ranks(config.timeout_minutes)
    model = load_sharded(config, device)
    optimizer = make_optimizer(model, config)
    packable = []
    for pair in pairs:
        parts = [np.array(pair[part], np.int32) for part in ("prompt", "chosen", "rejected")]
        packable.append(PreferencePair(*parts, ""))
    while True:
        step = train_step(model, optimizer, packable, LEARNING_RATE, config)
        yield step.results[:, LOSS].mean().item()


def padded(folder, pairs):
    """The loss of each plain step with transformers."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    while True:
        total = 0.0
        for pair in pairs:
            chosen, rejected = padded_logps(model, pair).split(1)
            losses, *_ = alphapo_loss(
                chosen, rejected, alpha=ALPHA, beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO)
            loss = losses.sum() / len(pairs)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield total


def padded_logps(model, pair):
    """Average log-probs of chosen and rejected, (2,), from two padded rows."""
    prompt = pair["prompt"]
    longest = len(prompt) + max(len(pair["chosen"]), len(pair["rejected"]))
    tokens = torch.full((2, longest), PAD)
    seen = torch.zeros(2, longest, dtype=torch.long)
    scored = torch.zeros(2, longest)
    for row, side in enumerate(("chosen", "rejected")):
        end = len(prompt) + len(pair[side])
        tokens[row, :end] = torch.tensor(prompt + pair[side])
        seen[row, :end] = 1
        scored[row, len(prompt):end] = 1
    logits = model(tokens, attention_mask=seen, use_cache=False).logits[:, :-1]     # (2, T - 1, V)
    logps = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]          # (2, T - 1)
    scored = scored[:, 1:]
    return (logps * scored).sum(-1) / scored.sum(-1)


def trl(folder, pairs, steps, batch, turns):
    """Takes steps of TRL's CPOTrainer. Not a generator: TRL has the loop, and waits for its turn in
    callbacks before and after each step."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    def text(ids):
        return " ".join(f"w{i}" for i in ids)

    rows = []
    for pair in pairs:
        # TRL adds BOS and EOS.
        rows.append({
            "prompt": text(pair["prompt"][1:]) + " ",
            "chosen": text(pair["chosen"][:-1]),
            "rejected": text(pair["rejected"][:-1])})
    cuda = torch.cuda.is_available()
    # TRL leaves PyTorch's choice of attention, and cuDNN's would plan anew for every batch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = CPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="alphapo",
        alpha=ALPHA,
        beta=BETA,
        simpo_gamma=GAMMA_BETA_RATIO * BETA,
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(pairs) // batch,
        max_length=4096,
        max_steps=steps,
        use_cpu=not cuda,
        bf16=cuda,
        fp16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True)

    class InOrder(CPOTrainer):
        losses = []         # of the batches of a step

        def _get_train_sampler(self, *_):
            # Each step has the same pairs, as for the other ways.
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            out = super().compute_loss(*args, **kwargs)
            loss = out[0] if isinstance(out, tuple) else out
            self.losses.append(loss.item())
            return out

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            turns.wait()
            trainer.losses.clear()
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds = time.perf_counter() - self.began
            turns.done(seconds, loss=statistics.mean(trainer.losses))

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(rows * steps),
        callbacks=[Steps()])
    trainer.train()


def trl_batch(way):
    """N of trl-NxM."""
    return int(way.removeprefix("trl-").split("x")[0])


def serve(args):
    """One way, as the process of a Worker."""
    turns = Turns()
    pairs = json.loads((args.folder / "pairs.json").read_text())
    steps = args.rounds + WARM_UP
    if args.serve == "ours":
        turns.serve(ours(args.folder, pairs, args.tokens_per_row), steps)
    elif args.serve == "padded":
        turns.serve(padded(args.folder, pairs), steps)
    else:
        trl(args.folder, pairs, steps, trl_batch(args.serve), turns)


# --- what a step is held against ------------------------------------------------------------------

def pytorch_product(a, b):
    """a @ b.T by PyTorch's own kernel. This operator is not among those that cpu.py replaces."""
    return torch.mm(a, b.T, out=torch.empty(len(a), len(b)))


def product(a, b):
    """a @ b.T as our model has it: by oneDNN after cpu.multiply_by_onednn(), where that is fast."""
    return a @ b.T


def matmul_rate(width, multiply=pytorch_product):
    """FLOP/s of the matrix product of an MLP's size, the best of many."""
    a = torch.randn(2048, width)
    b = torch.randn(width * 11 // 4, width)
    best = 0
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(10):
            multiply(a, b)
        best = max(best, 10 * 2 * a.numel() * len(b) / (time.perf_counter() - began))
    return best


# --- the measurement ------------------------------------------------------------------------------

def measure(vocab, args):
    """The figures of one vocabulary, as a dict."""
    lengths = pair_lengths(args.pairs, max_length=args.max_length, prompts=args.prompts)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_job(folder, vocab, args.width, args.layers, lengths)
        flops = useful_flops(read_config(folder), lengths)
        n_weights = 0
        for shape, _, _ in checkpoint_tensors(folder).values():
            n_weights += math.prod(shape)
        workers, warm_up = start_workers(folder, n_weights, args)
        rounds = take_turns(workers, vocab, args)
    ways = list(workers)
    best = ways[2]
    batch = trl_batch(best)

    # What padding and second prompts are of TRL's tokens.
    sequences = sum(2 * P + C + R for P, C, R in lengths)
    positions = 0
    for i in range(0, len(lengths), batch):
        longest = max(P + max(C, R) for P, C, R in lengths[i:i + batch])
        positions += 2 * batch * longest

    def medians(figure):
        return {way: statistics.median(figure(r, way) for r in rounds) for way in ways}

    def times_as_long(r, way):
        return r[way]["seconds"] / r["ours"]["seconds"]

    def pairs_per_second(r, way):
        return args.pairs / r[way]["seconds"]

    def share_of_pytorch(r, way):
        return flops / r[way]["seconds"] / r["matmul"]

    def share_of_product(r, way):
        return flops / r[way]["seconds"] / r["product"]

    return {
        "vocabulary": vocab,
        "weights": n_weights,
        "pairs": args.pairs,
        "tokens": sum(map(sum, lengths)),
        "trl_best": best,
        "lengths": lengths,
        "trl_padding": 1 - sequences / positions,
        "second_prompts": sum(P for P, _, _ in lengths) / sequences,
        "first_losses": warm_up["loss"],
        "times_as_long_as_ours": medians(times_as_long),
        "pairs_per_second": medians(pairs_per_second),
        "share_of_matmul_rate": medians(share_of_pytorch),
        "share_of_product_rate": medians(share_of_product),
        "peak_bytes": warm_up["peak"],
        "warm_seconds": warm_up["seconds"],
        "rounds": rounds,
    }


def start_workers(folder, n_weights, args):
    """({way: Worker} in the order ours, padded, TRL's best; figures of their first two steps).

    Of TRL's settings only the fastest stays, because memory is short.
    """
    workers = {}
    warm_up = {"loss": {}, "seconds": {}, "peak": {}}       # of each way, TRL's others too
    best = None
    settings = [f"trl-{batch}x{args.pairs // batch}" for batch in args.trl_batches]
    flags = ["--folder", folder, "--rounds", args.rounds, "--tokens_per_row", args.tokens_per_row]
    if args.mkl:
        flags.append("--mkl")
    for way in ["ours", "padded", *settings]:
        worker = Worker("benchmarks.step", "--serve", way, *flags)
        warm_up["loss"][way] = worker.take_step()["loss"]
        second = worker.take_step()
        warm_up["seconds"][way] = second["seconds"]
        # Each step allocates its gradients anew. The peak above them is what counts.
        warm_up["peak"][way] = second["peak"] - 4 * n_weights
        if way in settings:
            if best and warm_up["seconds"][best] <= warm_up["seconds"][way]:
                worker.kill()
                continue
            if best:
                workers.pop(best).kill()
            best = way
        workers[way] = worker
    return workers, warm_up


def take_turns(workers, vocab, args):
    """The figures of each way in each round, and the rates of matrix products beside them."""
    rounds = []
    for i in range(args.rounds):
        figures = {way: worker.take_step() for way, worker in workers.items()}
        seconds = [f"{way} {figures[way]['seconds']:.1f} s" for way in workers]
        print(f"vocabulary {vocab}, round {i + 1}: {', '.join(seconds)}",
              file=sys.stderr, flush=True)
        figures["matmul"] = matmul_rate(args.width)
        figures["product"] = matmul_rate(args.width, product)
        rounds.append(figures)
    for worker in workers.values():
        worker.kill()
    return rounds


def report(r):
    print(f"vocabulary {r['vocabulary']}, {r['tokens']} tokens in {r['pairs']} pairs; TRL best as "
          f"{r['trl_best']}, {r['trl_padding']:.0%} of its positions padding, "
          f"{r['second_prompts']:.0%} of its tokens second prompts; losses of the first step "
          f"{r['first_losses']}")
    for way in r["pairs_per_second"]:
        print(f"  {way:10} ours is {r['times_as_long_as_ours'][way]:5.2f} times as fast, "
              f"{r['pairs_per_second'][way]:6.2f} pairs/s, "
              f"{r['share_of_matmul_rate'][way]:4.0%} of the matmul rate, "
              f"peak {r['peak_bytes'][way] / 1e6:6.0f} MB")


def no_onednn():
    return False


def main():
    parser = argparse.ArgumentParser(
        description="One whole optimiser step here, with padded rows, and in TRL.")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=4, help="a step")
    parser.add_argument("--trl_batches", type=int, nargs="+", default=[1, 2, 4],
                        help="pairs a batch that TRL may choose from")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--prompts", choices=["ultrafeedback", "alpacaeval"],
                        default="ultrafeedback", help="their lengths")
    parser.add_argument("--tokens_per_row", type=int, default=1600,
                        help="ours; has to hold the longest pair")
    parser.add_argument("--mkl", action="store_true", help="leave oneDNN out of ours")
    parser.add_argument("--output", default="benchmarks/step.json")
    parser.add_argument("--serve", metavar="WAY", help="used by this program itself")
    parser.add_argument("--folder", type=Path, help="used by this program itself")
    args = parser.parse_args()
    if args.mkl:
        cpu.has_fast_onednn = no_onednn
    if args.serve:
        return serve(args)

    check_output(args.output)
    cpu.multiply_by_onednn()        # for `product`; the ways have processes of their own
    arguments = {name: value for name, value in vars(args).items() if name not in WORKERS_FLAGS}
    results = machine() | {"arguments": arguments, "vocabularies": []}
    for vocab in args.vocab:
        results["vocabularies"].append(measure(vocab, args))
        write_whole(args.output, json.dumps(results, indent=1) + "\n")
        report(results["vocabularies"][-1])


if __name__ == "__main__":
    run_command(main)
