"""How far a trained model has gone from its start: KL divergence per token, on answers sampled from
the trained model.

    python -m experiments.drift --model runs/first/step-000100 \
        --start SmolLM2-135M-Instruct --prompts held_out.jsonl

Answers are drawn at temperature 1 from the whole distribution, as the definition of KL has it. At
each of their tokens the divergence of the two next-token distributions is summed over the
vocabulary, which is far less noisy than the log-ratio of the token that was drawn. The standard
error is over answers.
"""
import argparse
import math
from collections import Counter

import torch

import cpu
from command import run_command
from data.dialogues import as_messages
from data.prompts import read_prompts
from model import load_model
from sampler import generate
from tokenizer import load_chat


@torch.no_grad()
def kl_of_answer(model, start, prompt, answer):
    """Sum over the tokens of an answer of KL(model || start) in their contexts, in nats. prompt,
    answer: lists of ids."""
    tokens = torch.tensor(prompt + answer, device=model.device)
    answered = slice(len(prompt) - 1, -1)           # the places that predict the answer's N tokens
    logp = model(tokens)[answered].double().log_softmax(-1)                     # (N, V)
    logq = start(tokens)[answered].double().log_softmax(-1)                     # (N, V)
    return (logp.exp() * (logp - logq)).sum().item()


def drift(model, start, chat, prompts, *, samples=1, seed=0, max_new_tokens=512, batch_size=32):
    """KL per token of `samples` answers to each prompt (lists of turns, or strings). Returns a
    dict: kl and kl_stderr in nats per token; tokens per answer; and cut, the share of answers that
    reached max_new_tokens."""
    ids = [chat.encode_prompt(as_messages(prompt)) for prompt in prompts]
    answers = generate(
        model, ids, seeds=[(seed, i) for i in range(len(ids))], stop_ids=chat.stop_ids,
        samples=samples, temperature=1.0, top_p=1.0, max_new_tokens=max_new_tokens,
        batch_size=batch_size)
    sums = []           # the divergence of each answer
    sizes = []          # its tokens
    cut = 0
    for prompt, of_prompt in zip(ids, answers):
        for answer in of_prompt:
            if len(answer) < max_new_tokens:
                answer = answer + [chat.end_id]         # ending is a choice as well
            else:
                cut += 1
            sums.append(kl_of_answer(model, start, prompt, answer))
            sizes.append(len(answer))
    total = sum(sizes)
    kl = sum(sums) / total
    # The standard error of a ratio of two sums over n independent answers.
    n = len(sums)
    squares = sum((divergence - kl * size)**2 for divergence, size in zip(sums, sizes))
    stderr = math.sqrt(squares * n / max(1, n - 1)) / total
    return {"kl": kl, "kl_stderr": stderr, "tokens": total / n, "cut": cut / n}


def load_fast(folder):
    """The model of a folder, on the CPU."""
    model = load_model(folder)
    cpu.speed_up(model)
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="How far a trained model has gone from its start: KL divergence per token.")
    parser.add_argument("--model", required=True, help="folder of the trained model")
    parser.add_argument("--start", required=True, help="folder of the model it was trained from")
    parser.add_argument("--prompts", required=True, help="JSON Lines of held-out prompts")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, least in (("samples", 1), ("max_new_tokens", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"{name} = {getattr(args, name)}; expected {least} or more")

    # The prompts are checked before the models are loaded.
    chat = load_chat(args.model)

    def check(turns):
        chat.encode_prompt(turns)
        return turns

    dropped = Counter()
    _, _, prompts = read_prompts(
        args.prompts, check, dropped, skip_bad_lines=None, required_field="prompt")
    for reason, n in dropped.items():
        print(f"prompts  {n} dropped: {reason}")
    model = load_fast(args.model)
    start = load_fast(args.start)
    d = drift(model, start, chat, prompts, samples=args.samples, seed=args.seed,
              max_new_tokens=args.max_new_tokens)
    print(f"KL to the start {d['kl']:.5f} +- {d['kl_stderr']:.5f} nats per token, on "
          f"{len(prompts) * args.samples} answers of {d['tokens']:.0f} tokens on average; "
          f"{d['cut']:.0%} of them were cut at {args.max_new_tokens}")


if __name__ == "__main__":
    run_command(main)
