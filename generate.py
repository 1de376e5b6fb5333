"""Sample answers from a model folder, in batches, with the chat format that it was trained with.

    python generate.py --model DIR --prompt "What is a preference pair?" --temperature 0
    python generate.py --model DIR --prompts prompts.jsonl --samples 5 --output answers.jsonl

A line of --prompts is {"prompt": "..." or [turns]}; a line of --output adds `all_generated_responses`.

Sequences run as one row of tokens through model.py: all prompts end to end first, then one token of each a step. What
differs from training is attention alone, which here reads a cache of keys and values.
"""
import argparse
import json

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from data.preference import as_messages, read_jsonl
from model import causal_attention, load_model
from tokenizer import CHAT_FORMATS, load_chat_format, load_tokenizer


class KVCache:
    """Keys and values of B sequences of different lengths, in room for S tokens each. Rows are filled from the left."""

    def __init__(self, config, B, S):
        self.window = config.window
        self.shape = config.n_layers, B, S, config.n_kv_heads, config.head_dim
        self.k = self.v = None      # made of the dtype and on the device of the first keys

    def attend_prompts(self, lengths):
        """Attention of a row of prompts of the given lengths; fills the cache."""
        def attend(layer, q, k, v):
            if self.k is None:
                self.k, self.v = k.new_zeros(2, *self.shape)
            out = []
            for b, (q1, k1, v1) in enumerate(zip(q.split(lengths), k.split(lengths), v.split(lengths))):
                self.k[layer, b, :len(k1)], self.v[layer, b, :len(v1)] = k1, v1
                out.append(causal_attention(q1, k1, v1, self.window))
            return torch.cat(out)
        return attend

    def attend_next(self, positions):
        """Attention of a row that is one token of each sequence, at positions (B,); adds it to the cache."""
        S = int(positions.max()) + 1
        distance = positions[:, None] - torch.arange(S, device=positions.device)        # (B, S)
        seen = (distance >= 0) & (distance < (self.window or S + 1))
        rows = torch.arange(len(positions), device=positions.device)

        def attend(layer, q, k, v):
            self.k[layer, rows, positions], self.v[layer, rows, positions] = k, v
            keys, values = (x[layer, :, :S].transpose(1, 2) for x in (self.k, self.v))  # (B, K, S, D)
            q = q.unflatten(1, (keys.shape[1], -1))     # (B, K, H/K, D): the heads of a group as if queries in a row
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])
            return out.flatten(1, 2)                                                    # (B, H, D)
        return attend


def sample(logits, temperature, top_p, uniform):
    """Next tokens (B,) from logits (B, V): greedy at temperature 0, else from the smallest set of likeliest tokens with
    probability top_p. uniform (B,) in [0, 1) decides, so that a sequence does not depend on its neighbours."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    cumulative = probs.cumsum(-1)
    kept = torch.where(cumulative - probs < top_p, probs, 0).cumsum(-1)                 # (B, V)
    choice = (kept <= uniform[:, None] * kept[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, choice.clamp(max=logits.shape[-1] - 1))[:, 0]


@torch.no_grad()
def generate(model, prompts, *, seeds, max_new_tokens, stop_ids, temperature=0.8, top_p=0.95):
    """Answers to B prompts, lists of ids. Returns B lists of ids, without the end token (a list of max_new_tokens ids
    did not come to its end). Each sequence draws from a generator of its own, seeded by seeds (B ints)."""
    device = model.device
    lengths = [len(p) for p in prompts]
    if min(lengths) < 1:
        raise ValueError("a prompt without tokens; expected at least one")
    cache = KVCache(model.config, len(prompts), max(lengths) + max_new_tokens)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    uniform = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators]).to(device)   # (B, max_new)
    stop = torch.tensor(sorted(stop_ids), device=device)

    row = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    states = model.states(row, positions, cache.attend_prompts(lengths))[last]          # (B, dim)
    positions = torch.tensor(lengths, device=device)                                    # of the next tokens
    answers, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        tokens = sample(F.linear(states, model.head_weight), temperature, top_p, uniform[:, step])
        if isinstance(model, FSDPModule):   # its ranks must stay in step, even if they should round differently
            dist.broadcast(tokens, 0)
        ended |= torch.isin(tokens, stop)
        answers.append(torch.where(ended, -1, tokens))
        if ended.all():                                                                 # this waits for the GPU
            break
        states = model.states(tokens, positions, cache.attend_next(positions))
        positions = positions + 1
    return [[t for t in answer if t >= 0] for answer in torch.stack(answers, 1).tolist()]


def answer(model, tokenizer, chat, prompts, *, samples=1, batch_size=32, seed=0, **settings):
    """`samples` answers to each prompt (a string or a list of turns), as a list of lists of texts. settings are those
    of `generate`. The n-th answer of the job depends on seed and n, not on the batch it falls in."""
    ids = [chat.encode_prompt(as_messages(p)) for p in prompts for _ in range(samples)]
    texts = []
    for i in range(0, len(ids), batch_size):
        batch = ids[i:i + batch_size]
        seeds = [seed * 1_000_003 + i + b for b in range(len(batch))]
        texts += map(tokenizer.decode, generate(model, batch, seeds=seeds, stop_ids=chat.stop_ids, **settings))
    return [texts[i:i + samples] for i in range(0, len(texts), samples)]


def main():
    parser = argparse.ArgumentParser(description="Sample answers from a Hugging Face model folder.")
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--prompt", help="one prompt; its answers are printed")
    parser.add_argument("--prompts", help="JSON Lines file of prompts")
    parser.add_argument("--output", help="JSON Lines file to write")
    parser.add_argument("--samples", type=int, default=1, help="answers a prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat_format", choices=CHAT_FORMATS, help="read from the model's files if not given")
    args = parser.parse_args()
    if bool(args.prompt) == bool(args.prompts) or bool(args.prompts) != bool(args.output):
        parser.error("give --prompt, or --prompts with --output")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.model)
    chat = load_chat_format(args.model, tokenizer, args.chat_format)
    model = load_model(args.model, torch.bfloat16 if device == "cuda" else torch.float32, device)
    rows = [row for _, row in read_jsonl(args.prompts)] if args.prompts else [{"prompt": args.prompt}]
    answers = answer(model, tokenizer, chat, [row["prompt"] for row in rows], samples=args.samples, seed=args.seed,
                     batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                     top_p=args.top_p)
    if args.prompt:
        print("\n---\n".join(answers[0]))
        return
    with open(args.output, "w", encoding="utf-8") as f:
        for row, texts in zip(rows, answers):
            print(json.dumps(row | {"all_generated_responses": texts}, ensure_ascii=False), file=f)


if __name__ == "__main__":
    main()
