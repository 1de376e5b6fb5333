"""Align a Llama or Mistral model on preference pairs with AlphaPO (or SimPO, or DPO): a Hugging Face folder in and out.

    python train.py                                                        # the embedded default: tiny model, 2 cores
    torchrun train.py --model Llama-3.2-1B-Instruct --data pairs.jsonl --alpha 0.25 --beta 2.5 --gamma_beta_ratio 0.1
    torchrun train.py configs/RECIPE.toml --model DIR --data pairs.jsonl   # a recipe gives other defaults

Weights, gradients and optimiser state are fp32. A run writes config.toml, metrics.jsonl and step-NNNNNN/, a model.
"""
import argparse
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alphapo import alphapo_loss, average_logps, displacement_metrics, dpo_loss, pair_metrics, simpo_loss
from data.preference import epoch_steps, hold_out, load_pairs, pack, read_jsonl
from generate import answer
from model import load_model, save_model
from tokenizer import load_chat_format, load_tokenizer

ROOT = Path(__file__).resolve().parent


# --- configuration ----------------------------------------------------------------------------------------------------

@dataclass
class TrainConfig:
    # The job. Paths in a recipe are relative to the recipe.
    model: str = ""                           # Hugging Face folder of the starting model
    data: list[str] = field(default_factory=list)         # JSON Lines files of pairs
    eval_data: list[str] = field(default_factory=list)    # held-out pairs of their own
    eval_pairs: int = 0                       # or: so many pairs of `data` held out
    output: str = ""                          # run folder; empty: the first free of runs/METHOD-001, -002, ...
    chat_format: str = ""                     # llama3, chatml, ...; empty: read from the model's files

    # The method. Knobs left out take METHODS' defaults; a knob that the method does not have is an error.
    method: str = "alphapo"                   # alphapo, simpo or dpo
    alpha: float | None = None                # reward shape; 0 is SimPO
    beta: float | None = None                 # reward scale
    gamma_beta_ratio: float | None = None     # target reward margin, as a share of beta
    sft_weight: float = 0.0                   # adds so much of the chosen answer's negative average log-prob

    # The optimiser. AdamW, cosine to zero.
    learning_rate: float = 7e-7
    warmup_ratio: float = 0.1                 # of all steps
    weight_decay: float = 0.0                 # on matrices only
    max_grad_norm: float = 1.0
    pairs_per_step: int = 128
    epochs: int = 1
    max_steps: int = 0                        # stop there if that is earlier; 0: no
    seed: int = 0                             # of the order of pairs, the held-out pairs and judged samples

    # Size.
    max_length: int = 2048                    # pairs whose prompt with either response is longer are dropped
    max_prompt_length: int = 1800             # so are pairs with longer prompts
    tokens_per_micro_batch: int = 8192        # a packed row; a step is as many rows as its pairs need
    recompute: bool = False                   # recompute activations in the backward pass: less memory, a third slower

    # Looking and saving.
    eval_every: int = 0                       # steps between evaluations; 0: before and after training only
    judge: str = ""                           # FILE.py:FUNCTION, called with (prompt turns, answer), returns a number
    judge_prompts: str = ""                   # JSON Lines of held-out prompts; one sampled answer to each is judged
    max_new_tokens: int = 512                 # of a judged answer (temperature 0.8, top_p 0.95)
    save_dtype: str = ""                      # bfloat16, float32, ...; empty: as in the starting model's files


METHODS = {   # the knobs of each method and their defaults: the paper's Mistral row, and its DPO baseline
    "alphapo": {"alpha": 0.25, "beta": 2.5, "gamma_beta_ratio": 0.1},
    "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.1},
    "dpo": {"beta": 0.01},
}
PATHS = ("model", "data", "eval_data", "output", "judge", "judge_prompts")


def parse_config(argv):
    """TrainConfig from the command line: [recipe.toml] --field value ... Flags win over the recipe. Without a recipe
    and a model it is configs/tiny.toml."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("recipe", nargs="?", default=None, help="TOML file of defaults")
    types = typing.get_type_hints(TrainConfig)
    for name, kind in types.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        elif kind == list[str]:
            parser.add_argument(f"--{name}", nargs="+", metavar="FILE")
        else:
            parser.add_argument(f"--{name}", type=float if kind == float | None else kind, metavar=name.upper())
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("recipe")
    if recipe is None and "model" not in flags:
        recipe = ROOT / "configs" / "tiny.toml"
    return resolve_config(TrainConfig(**(read_recipe(recipe, types) if recipe else {}) | flags))


def read_recipe(path, types):
    """The fields of a TOML recipe, type-checked, paths made relative to where it is. ValueError names the key."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: cannot be read as a TOML recipe ({e})") from None
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{path}: unknown key {name!r}; expected one of {', '.join(types)}")
        kind = types[name]
        wanted = {float: (int, float), float | None: (int, float), list[str]: (list,)}.get(kind, (kind,))
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{path}: {name} = {value!r}; expected {getattr(kind, '__name__', kind)}")
        if name in PATHS and value:
            place = lambda p: os.path.relpath(path.parent / p)
            values[name] = [place(p) for p in value] if isinstance(value, list) else place(value)
    return values


def resolve_config(config):
    """Fills in the method's defaults and the output folder, and checks the rest. ValueError names the field."""
    if config.method not in METHODS:
        raise ValueError(f"method = {config.method!r}; expected one of {', '.join(METHODS)}")
    for knob in ("alpha", "beta", "gamma_beta_ratio"):
        default = METHODS[config.method].get(knob)
        if getattr(config, knob) is None:
            config = dataclasses.replace(config, **{knob: default})
        elif default is None:
            raise ValueError(f"{knob} = {getattr(config, knob)} is given, but {config.method} has no such knob; "
                             "leave it out")
    for name in ("beta", "learning_rate", "max_grad_norm", "pairs_per_step", "epochs", "max_length",
                 "max_prompt_length", "tokens_per_micro_batch", "max_new_tokens"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} = {getattr(config, name)}; expected a positive number")
    for name in ("alpha", "gamma_beta_ratio", "sft_weight", "weight_decay"):
        if getattr(config, name) is not None and not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name} = {getattr(config, name)}; expected a finite number")
    for name in ("sft_weight", "weight_decay", "max_steps", "eval_every", "eval_pairs", "seed"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} = {getattr(config, name)}; expected 0 or more")
    if not 0 <= config.warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio = {config.warmup_ratio}; expected a share of the steps, 0 to 1")
    if not config.model or not config.data:
        raise ValueError("model and data are needed: --model FOLDER --data FILE [FILE ...]")
    if config.eval_data and config.eval_pairs:
        raise ValueError("eval_data and eval_pairs are both given; expected one of them")
    if bool(config.judge) != bool(config.judge_prompts) or (config.judge and ":" not in config.judge):
        raise ValueError("judge needs FILE.py:FUNCTION, and judge_prompts beside it")
    if config.save_dtype not in ("", "float32", "bfloat16", "float16"):
        raise ValueError(f"save_dtype = {config.save_dtype!r}; expected float32, bfloat16, float16 or nothing")
    if not config.output:
        free = next(n for n in range(1, 10**6) if not Path(f"runs/{config.method}-{n:03d}").exists())
        config = dataclasses.replace(config, output=f"runs/{config.method}-{free:03d}")
    elif Path(config.output).exists() and any(Path(config.output).iterdir()):
        raise ValueError(f"output folder {config.output} is not empty; name a new one, or move it away")
    return config


def write_config(config, path):
    """The resolved config as a TOML recipe; paths absolute, so that it runs from anywhere."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if name in PATHS and value:
            value = [os.path.abspath(p) for p in value] if isinstance(value, list) else os.path.abspath(value)
        if value is not None:
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}\n")    # these JSON values are TOML values
    path.write_text("".join(lines))


# --- the objective ----------------------------------------------------------------------------------------------------

def pair_loss(config, pair, chosen, rejected):
    """The loss of one pair from its average log-probs. (1,), (1,) -> (losses, chosen_rewards, rejected_rewards)"""
    if config.method == "alphapo":
        losses, *rewards = alphapo_loss(chosen, rejected, alpha=config.alpha, beta=config.beta,
                                        gamma_beta_ratio=config.gamma_beta_ratio)
    elif config.method == "simpo":
        losses, *rewards = simpo_loss(chosen, rejected, beta=config.beta, gamma_beta_ratio=config.gamma_beta_ratio)
    else:
        ref_chosen, ref_rejected = torch.tensor(pair.ref_logps, dtype=torch.float64, device=chosen.device).split(1)
        losses, *rewards = dpo_loss(chosen * len(pair.chosen), rejected * len(pair.rejected), ref_chosen, ref_rejected,
                                    beta=config.beta)
    return losses - config.sft_weight * chosen, *rewards


def run_row(model, row, config, grad_scale=None):
    """Scores the B pairs of a packed row. With grad_scale it also adds the gradient of grad_scale * (sum of losses).

    Returns (B, 5) in float64: loss, chosen reward, rejected reward, and the average log-probs of chosen and rejected.
    The vocabulary head runs forward and backward a pair at a time, on states cut off from the body: only one pair's
    logits exist at once, none is computed twice, and the body's backward runs once with the gradient collected so far.
    """
    tokens = row.tokens.to(model.head_weight.device)
    states, targets = model.response_states(tokens, row.lengths)                       # (R, dim), (R,)
    sizes = [C + R for _, C, R in row.lengths]
    leaves = [s.detach().requires_grad_(grad_scale is not None) for s in states.split(sizes)]
    results = []
    for pair, leaf, target, (_, C, R) in zip(row.pairs, leaves, targets.split(sizes), row.lengths):
        chosen, rejected = average_logps(model.token_logps(leaf, target), (C, R)).split(1)
        losses, chosen_rewards, rejected_rewards = pair_loss(config, pair, chosen, rejected)
        if grad_scale is not None:
            (grad_scale * losses.sum()).backward()
        results.append(torch.cat((losses, chosen_rewards, rejected_rewards, chosen, rejected)).detach())
    if grad_scale is not None:
        states.backward(torch.cat([leaf.grad for leaf in leaves]))
    return torch.stack(results)


def reference_logps(model, pairs, config):
    """Stores the summed log-probs of every pair under the model as it is now: all that DPO needs of its reference."""
    for pair in pairs:
        pair.ref_logps = (0.0, 0.0)     # read by the loss, which is not used here
    with torch.no_grad():
        for row in pack(pairs, config.tokens_per_micro_batch):
            for pair, (chosen, rejected) in zip(row.pairs, run_row(model, row, config)[:, 3:].tolist()):
                pair.ref_logps = chosen * len(pair.chosen), rejected * len(pair.rejected)


# --- schedule, evaluation, report -------------------------------------------------------------------------------------

def learning_rate(step, total, config):
    """Learning rate of step 0 to total - 1: linear warm-up from one warm-up step's worth, then cosine towards zero."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizer(model, config):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]        # norms and biases are not decayed
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)


def metrics_of(results, start=None):
    """Means over pairs as a dict of floats, from run_row's results (B, 5), and those of step 0 on the same pairs."""
    losses, chosen_rewards, rejected_rewards, chosen, rejected = results.T
    metrics = {"loss": losses.mean(), **pair_metrics(chosen_rewards, rejected_rewards, chosen, rejected)}
    if start is not None:
        metrics |= displacement_metrics(chosen, rejected, *start.T[3:])
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))    # waits for the GPU, once a step


class Judge:
    """Scores one sampled answer to each held-out prompt. Calling it returns (answers, scores)."""

    def __init__(self, config, tokenizer, chat):
        file, function = config.judge.rsplit(":", 1)
        spec = importlib.util.spec_from_file_location("judge", file)
        if spec is None or not Path(file).exists():
            raise ValueError(f"judge = {config.judge!r}; expected a Python file and a function in it, FILE.py:FUNCTION")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"judge = {config.judge!r}: {file} has no function {function}")
        self.score = getattr(module, function)
        rows = list(read_jsonl(config.judge_prompts))
        for source, row in rows:
            if "prompt" not in row:
                raise ValueError(f"{source}: no field prompt")
        self.prompts = [row["prompt"] for _, row in rows]
        self.config, self.tokenizer, self.chat = config, tokenizer, chat

    def __call__(self, model):
        answers = answer(model, self.tokenizer, self.chat, self.prompts, seed=self.config.seed, temperature=0.8,
                         top_p=0.95, max_new_tokens=self.config.max_new_tokens, batch_size=64)
        answers = [texts[0] for texts in answers]
        turns = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in self.prompts]
        return answers, [float(self.score(t, a)) for t, a in zip(turns, answers)]


def report(config, model, tokenizer, chat, pairs, held_out, dropped, total_steps):
    """The first lines of a run: what is about to be trained on what."""
    quantiles = lambda lengths: " / ".join(str(sorted(lengths)[int(q * (len(lengths) - 1))]) for q in (0, 0.5, 0.9, 1))
    knobs = ", ".join(f"{k} {getattr(config, k):g}" for k in METHODS[config.method])
    n_rows = len(pack(pairs[:config.pairs_per_step], config.tokens_per_micro_batch))
    c, head = model.config, model.head_weight
    print(f"method   {config.method}: {knobs}" + (f", sft_weight {config.sft_weight:g}" if config.sft_weight else ""))
    print(f"model    {config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in "
          f"{str(head.dtype)[6:]} on {head.device}, {c.n_layers} layers of {c.dim}, vocabulary {c.vocab_size}, window "
          f"{c.window or 'none'}")
    print(f"tokens   {type(tokenizer).__name__} of {tokenizer.vocab_size}, chat format {type(chat).__name__} "
          f"({'--chat_format' if config.chat_format else 'read from the files'}), generation ends at "
          f"{' '.join(tokenizer.piece(i) for i in sorted(chat.stop_ids))}")
    print(f"data     {len(pairs)} pairs to train on, {len(held_out)} held out; {sum(dropped.values())} dropped"
          + "".join(f"\n         - {n} dropped: {reason}" for reason, n in dropped.most_common()))
    print(f"lengths  tokens, least / median / 90 % / most: prompt {quantiles([len(p.prompt) for p in pairs])}; chosen "
          f"{quantiles([len(p.chosen) for p in pairs])}; rejected {quantiles([len(p.rejected) for p in pairs])}")
    print(f"batch    {config.pairs_per_step} pairs a step of {statistics.mean(map(len, pairs)):.0f} tokens on average, "
          f"in rows of at most {config.tokens_per_micro_batch} (some {n_rows} a step); {config.epochs} epochs of "
          f"{math.ceil(len(pairs) / config.pairs_per_step)} steps; {total_steps} steps in all")
    shortest = min(pairs, key=len)
    show = lambda ids: " ".join(repr(tokenizer.piece(i))[1:-1] for i in ids)
    print(f"pair     {shortest.source}, token by token; [scored]:\n         prompt    {show(shortest.prompt)}\n"
          f"         chosen   [{show(shortest.chosen)}]\n         rejected [{show(shortest.rejected)}]", flush=True)


# --- training ---------------------------------------------------------------------------------------------------------

def main(config):
    """Runs one job. Returns its evaluations, the objects of metrics.jsonl with eval_ names, step 0 first."""
    # 1. One process for now; here is where ranks will meet.
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this version trains in one process; run `torchrun train.py` without --nproc_per_node")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # 2. Data: tokens of all pairs, in memory.
    tokenizer = load_tokenizer(config.model)
    chat = load_chat_format(config.model, tokenizer, config.chat_format or None)
    limits = config.max_length, config.max_prompt_length
    pairs, dropped = load_pairs(config.data, chat, *limits)
    if config.eval_data:
        held_out, dropped_held_out = load_pairs(config.eval_data, chat, *limits)
        dropped.update({f"{reason} (held out)": n for reason, n in dropped_held_out.items()})
    else:
        pairs, held_out = hold_out(pairs, config.eval_pairs, config.seed)
    steps = [step for epoch in range(config.epochs)
             for step in epoch_steps(len(pairs), config.pairs_per_step, config.seed, epoch)]
    steps = steps[:config.max_steps or None]
    eval_rows = pack(held_out, config.tokens_per_micro_batch) if held_out else []
    pack(pairs, config.tokens_per_micro_batch)      # a pair that no row can hold is known before the first step
    judge = Judge(config, tokenizer, chat) if config.judge else None

    # 3. Model and optimiser, fp32: at a learning rate of 1e-6 a step leaves 98 % of bf16 weights where they were.
    model = load_model(config.model, torch.float32, device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{config.model}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding "
                         f"{model.config.vocab_size} rows; the files do not belong together")
    longest = max(pairs + held_out, key=lambda p: len(p.prompt) + max(len(p.chosen), len(p.rejected)))
    if len(longest.prompt) + max(len(longest.chosen), len(longest.rejected)) > model.config.max_positions:
        raise ValueError(f"{longest.source}: longer than the {model.config.max_positions} positions of {config.model}; "
                         "set max_length to that")
    model.recompute = config.recompute
    optimizer = make_optimizer(model, config)
    report(config, model, tokenizer, chat, pairs, held_out, dropped, len(steps))
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_config(config, output / "config.toml")
    log_file = open(output / "metrics.jsonl", "w")

    # 4. DPO compares with the model as it is now; its log-probs are computed once and no second model is kept.
    if config.method == "dpo":
        reference_logps(model, pairs + held_out, config)

    # 5. The loop.
    evaluations, start, first_answers = [], None, None

    def log(metrics):
        print(json.dumps(metrics), file=log_file, flush=True)

    def evaluate(step):
        nonlocal start, first_answers
        m = {}
        if eval_rows:
            with torch.no_grad():
                results = torch.cat([run_row(model, row, config) for row in eval_rows])
            start = results if start is None else start
            m = metrics_of(results, start)
            print(f"eval     step {step}: loss {m['loss']:.4f}  accuracy {m['rewards/accuracies']:.3f}  margin "
                  f"{m['rewards/margins']:.4f}  chosen {m['logps/chosen']:.4f}  rejected {m['logps/rejected']:.4f}; "
                  f"since step 0: chosen {m['displacement/chosen']:+.4f}, rejected {m['displacement/rejected']:+.4f}, chosen "
                  f"fell in {m['displacement/fell']:.0%} of {len(results)} pairs")
        if judge:
            answers, scores = judge(model)
            m["judge_score"] = statistics.mean(scores)
            m["judge_stderr"] = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
            print(f"judge    step {step}: {m['judge_score']:.1f} +- {m['judge_stderr']:.1f}, mean of {len(scores)} "
                  "sampled answers to held-out prompts")
            first_answers = first_answers or (answers, scores)
            if step == len(steps):
                changed = [c for c in zip(judge.prompts, *first_answers, answers, scores) if c[1] != c[3]]
                print(f"         {sum(c[4] > c[2] for c in changed)} answers score higher than at step 0, "
                      f"{sum(c[4] < c[2] for c in changed)} lower; the first four that changed:")
                for prompt, was, was_score, now, now_score in changed[:4]:
                    print(f"         {prompt}\n           before: {was}   ({was_score:.0f})\n"
                          f"           after:  {now}   ({now_score:.0f})")
        if m:
            evaluations.append({"step": step} | {f"eval_{name}": value for name, value in m.items()})
            log(evaluations[-1])

    evaluate(0)
    started = time.time()
    for i, step in enumerate(steps):
        began = time.time()
        rows = pack([pairs[j] for j in step], config.tokens_per_micro_batch)
        results = torch.cat([run_row(model, row, config, grad_scale=1 / len(step)) for row in rows])
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise ValueError(f"step {i + 1}: the gradient is not finite (norm {grad_norm}); nothing was saved. Pairs: "
                             + ", ".join(pairs[j].source for j in step[:8]))
        lr = learning_rate(i, len(steps), config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        now, n_tokens = time.time(), sum(len(row.tokens) for row in rows)
        left = (now - started) / (i + 1) * (len(steps) - i - 1)
        m = {"step": i + 1} | metrics_of(results) | {
            "grad_norm": grad_norm, "learning_rate": lr, "pairs": len(step), "tokens": n_tokens,
            "micro_batches": len(rows), "tokens_per_second": n_tokens / (now - began)}
        log(m)
        print(f"step {i + 1}/{len(steps)}  loss {m['loss']:.4f}  accuracy {m['rewards/accuracies']:.2f}  margin "
              f"{m['rewards/margins']:.4f}  chosen {m['logps/chosen']:.4f}  rejected {m['logps/rejected']:.4f}  grad "
              f"{grad_norm:.3f}  lr {lr:.2e}  {m['tokens_per_second']:.0f} tokens/s  {left / 60:.1f} min left",
              flush=True)
        if config.eval_every and (i + 1) % config.eval_every == 0 and i + 1 < len(steps):
            evaluate(i + 1)
    evaluate(len(steps))

    # 6. A plain Hugging Face folder, under its name only when it is complete.
    folder = output / f"step-{len(steps):06d}"
    save_model(model, output / "saving", like=config.model, dtype=getattr(torch, config.save_dtype, None))
    (output / "saving").rename(folder)
    log_file.close()
    print(f'saved. To load it: transformers.AutoModelForCausalLM.from_pretrained("{folder}")')
    return evaluations


if __name__ == "__main__":
    try:
        main(parse_config(sys.argv[1:]))
    except ValueError as e:
        sys.exit(f"error: {e}")
