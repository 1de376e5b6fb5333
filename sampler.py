"""Sampling from a model: continuous batching over a KV cache, top-p (nucleus) and top-k sampling.

    texts = answer(model, chat, ["What is a preference pair?"], max_new_tokens=512, temperature=0)
    ids = generate(model, prompts, seeds=[(0, i) for i in range(len(prompts))],
                   stop_ids=chat.stop_ids, max_new_tokens=512)

Each step is a forward pass of model.py over the newest token of each running sequence (decoding),
and one over whole prompts (prefill), which take the places of sequences that have ended. Both rows
are without padding. The layers are those of training. Only attention differs: here it reads the
keys and values of earlier tokens from a cache. On a GPU decoding is a CUDA graph (gpu.py),
unless the model is sharded.

Axes: T tokens of a row, n running sequences, B rows of the cache, S tokens of room in each,
P tokens of a prompt, H heads, K key/value heads, D head_dim, dim width, V vocabulary, L layers.
"""
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

import gpu
from data.files import is_finite_number
from model import to_device

# Colder than this the quotients of logits may overflow; answers are greedy long before.
LEAST_TEMPERATURE = 1e-6
# In the place of a token: the logits were not finite; `first` tokens do not reach top_p.
NOT_FINITE = -1
FLAT = -2


# --- the KV cache ---------------------------------------------------------------------------------

class KVCache:
    """Keys and values of up to B sequences of different lengths, with room for S tokens each.

    The n running sequences have the first n rows. Each row is filled from the left.
    """

    def __init__(self, model, B, S):
        c = model.config
        self.model = model
        self.shape = (c.n_layers, B, S, c.n_kv_heads, c.head_dim)
        # Allocated in the dtype and on the device of the first keys.
        self.keys = None
        self.values = None

    def allocate(self, like):
        """Zeros, because unseen places get weight 0 and a NaN times 0 would be NaN."""
        L, B, S, K, D = self.shape
        if like.device.type == "cpu":
            # The tokens of a head lie side by side, because attention reads one head at a time.
            return like.new_zeros(L, B, K, S, D).transpose(2, 3)
        return like.new_zeros(self.shape)

    def attend_prompts(self, prompt_lengths, row, samples):
        """Attention of a row of whole prompts, a function attend(layer, q, k, v) for
        Transformer.states. They enter the cache from `row` on, each `samples` times: one row for
        each of its answers."""
        attend_within = self.model.attend_pairs([(P,) for P in prompt_lengths])

        def attend(layer, q, k, v):
            if self.keys is None:
                self.keys = self.allocate(k)
                self.values = self.allocate(v)
            start = 0
            first = row
            for P in prompt_lengths:
                copies = slice(first, first + samples)
                self.keys[layer, copies, :P] = k[start:start + P]       # (samples, P, K, D)
                self.values[layer, copies, :P] = v[start:start + P]
                start += P
                first += samples
            return attend_within(layer, q, k, v)                        # (T, H, D)
        return attend

    def attend_next(self, ends):
        """Attention of the newest token of each of the first n sequences, a function
        attend(layer, q, k, v). ends (n,): how many tokens the cache has of each, which is where the
        new one goes."""
        n = len(ends)
        rows = torch.arange(n, device=ends.device)
        # gpu.speed_up gives a model another one.
        attention = getattr(self.model, "decode_attention", decode_attention)
        read = attention(ends, self.shape, self.model.config.window)

        def attend(layer, q, k, v):
            keys = self.keys[layer]                                     # (B, S, K, D)
            values = self.values[layer]
            keys[rows, ends] = k
            values[rows, ends] = v
            return read(q, keys[:n], values[:n])                        # (n, H, D)
        return attend

    def move(self, source, target, length):
        """Copies the first `length` tokens of row `source` to row `target`."""
        for cached in (self.keys, self.values):
            cached[:, target, :length] = cached[:, source, :length]


def decode_attention(ends, shape, window):
    """Attention of one query a head in each of n sequences, against the keys in the cache.

    ends (n,): the place of the newest key of each; shape: of the cache, (L, B, S, K, D). Returns a
    function for each layer: q (n, H, D), keys and values (n, S, K, D) -> (n, H, D)
    """
    filled = int(ends.max()) + 1        # places of the cache that are read; waits for a GPU
    distance = ends[:, None] - torch.arange(filled, device=ends.device)         # (n, filled)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    seen = seen[:, None, None]          # for all heads, (n, 1, 1, filled)
    n_kv_heads = shape[3]

    def read(q, keys, values):
        # The H/K heads that share a key head are given to the kernel as H/K queries of one head,
        # so that no key is repeated.
        queries = q.unflatten(1, (n_kv_heads, -1))                      # (n, K, H/K, D)
        keys = keys[:, :filled].transpose(1, 2)                         # (n, K, filled, D)
        values = values[:, :filled].transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return out.flatten(1, 2)                                        # (n, H, D)
    return read


# --- choosing the next token ----------------------------------------------------------------------

def sample(logits, uniform, *, temperature, top_p=1.0, top_k=0, first=256):
    """Next tokens (B,) from logits (B, V), by inverse-CDF sampling.

    At temperature 0 it is the likeliest token. Else a token is drawn from softmax(logits /
    temperature), of which top-k keeps the top_k likeliest tokens (0: all), and top-p (nucleus)
    sampling (Holtzman et al. 2019, arXiv 1904.09751) keeps, of these, the fewest likeliest that
    have top_p of their probability.

    uniform: (B,) in float64, in [0, 1). It alone decides, so a sequence depends on no neighbour.
    first: tokens that are sorted for top-p. Sorting all V would take longer than a block of the
    model, and the `first` largest are nearly always enough; rows that need more have FLAT.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / float(temperature)).softmax(-1)       # (B, V)
    V = probs.shape[-1]

    # 1. Candidates: the likeliest tokens, sorted, or the whole vocabulary in its own order.
    candidates = None
    if top_k or top_p < 1:
        n_candidates = min(top_k or first, V)
        probs, candidates = probs.topk(n_candidates)
    cdf = probs.cumsum(-1, dtype=torch.float64)             # not normalised
    total = cdf[:, -1:]                                     # (B, 1)

    # 2. The nucleus: of the candidates in their order, those up to the first that reaches top_p.
    kept = total
    if top_p < 1:
        wanted = top_p * total if top_k else top_p
        last = (cdf < wanted).sum(-1, keepdim=True)         # its index, (B, 1)
        last.clamp_(max=cdf.shape[-1] - 1)
        kept = cdf.gather(-1, last)                         # its probability, (B, 1)

    # 3. The first candidate whose CDF exceeds uniform * kept. There is one, because uniform < 1
    # makes that product less than kept in float64 too.
    point = uniform[:, None] * kept
    choice = torch.searchsorted(cdf, point, right=True)     # (B, 1)
    choice.clamp_(max=cdf.shape[-1] - 1)                    # for NaN, which the caller refuses
    if candidates is not None:
        choice = candidates.gather(-1, choice)
    tokens = choice[:, 0]

    if top_p < 1 and not top_k and first < V:
        tokens.masked_fill_(total[:, 0] < top_p, FLAT)
    return tokens


def next_tokens(model, logits, uniform, **settings):
    """The next token of each sequence, a list of B ints the same on all ranks of the model; logits,
    uniform and settings are those of `sample`. NOT_FINITE stands for a token of logits that are
    not finite."""
    tokens = sample(logits, uniform, **settings)            # (B,)
    # What is drawn from NaN looks like any other token.
    tokens.masked_fill_(~logits.sum(-1).isfinite(), NOT_FINITE)
    if isinstance(model, FSDPModule):
        dist.broadcast(tokens, 0)       # ranks must stay in step even if they round differently
    tokens = tokens.tolist()            # waits for a GPU
    flat = [i for i, token in enumerate(tokens) if token == FLAT]
    if flat:                            # these are drawn again, from all V
        settings["first"] = logits.shape[-1]
        drawn = next_tokens(model, logits[flat], uniform[flat], **settings)
        for i, token in zip(flat, drawn):
            tokens[i] = token
    return tokens


# --- generation -----------------------------------------------------------------------------------

@dataclass
class Sequence:
    """A running answer."""
    prompt: int                                 # index of its prompt
    sample: int                                 # which of the answers to it
    length: int                                 # tokens in the cache
    random: np.random.Generator
    ids: list = field(default_factory=list)     # the answer so far; the last is not cached yet


@torch.no_grad()
def generate(
    model,
    prompts,                # N lists of ids
    *,
    seeds,                  # N tuples of ints
    stop_ids,               # the tokens that end an answer
    max_new_tokens,
    samples=1,              # answers to each prompt
    batch_size=32,          # answers that run at once
    temperature=0.8,        # 0 is greedy
    top_p=0.95,
    top_k=0,                # 0: all tokens
    progress=None,          # called after each step with (tokens sampled, answers ended)
):
    """Answers to N prompts, by continuous batching: N lists of `samples` lists of ids, without the
    end token. A list of max_new_tokens ids did not come to its end.

    The j-th answer to a prompt draws from a generator of its own, seeded by the prompt's tuple and
    j. It depends on nothing else, but for the rounding of logits. ValueError names a setting or a
    prompt that is out of range. All ranks of a sharded model must call this function together.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sizes = {"samples": samples, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    check_settings(model, **sizes, **sampling)
    check_prompts(model, prompts, max_new_tokens)
    answers = [[None] * samples for _ in prompts]
    # Popped from the end, the longest prompt first: short ones are left to fill the last gaps.
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max(map(len, prompts), default=0)
    n_rows = min(batch_size, samples * len(prompts))
    cache = KVCache(model, n_rows, longest + max_new_tokens)
    decode_step = partial(decode, model, cache)
    if hasattr(model, "decode_attention") and not isinstance(model, FSDPModule):
        decode_step = gpu.Captured(decode_step, n_rows, model.device)
    running = []            # the Sequence of each row of the cache
    while waiting or running:
        # 1. Waiting prompts take the free places, one for each of their answers.
        n_new = min(len(waiting), (batch_size - len(running)) // samples)
        new = [waiting.pop() for _ in range(n_new)]

        # 2. Logits of the next token of each: decoding, then prefill.
        logits = []
        if running:
            last_tokens = [sequence.ids[-1] for sequence in running]
            ends = [sequence.length for sequence in running]
            logits.append(decode_step(
                to_device(last_tokens, model.device), to_device(ends, model.device)))
            for sequence in running:
                sequence.length += 1
        if new:
            new_prompts = [prompts[i] for i in new]
            logits.append(prefill(model, cache, new_prompts, len(running), samples))
        for i in new:
            running += new_sequences(i, len(prompts[i]), seeds[i], samples)
        logits = torch.cat(logits)                          # (B, V)

        # 3. The next token of each sequence.
        uniform = np.array([sequence.random.random() for sequence in running])
        tokens = next_tokens(model, logits, to_device(uniform, model.device), **sampling)
        refuse_not_finite(tokens, running)

        # 4. Sequences that have ended leave.
        ended = end_sequences(cache, running, tokens, stop_ids, max_new_tokens)
        for sequence in ended:
            answers[sequence.prompt][sequence.sample] = sequence.ids
        if progress:
            progress(len(tokens), len(ended))
    return answers


def new_sequences(prompt, length, seed, samples):
    """The Sequences of the `samples` answers to a prompt, each with a generator of its own."""
    sequences = []
    for j in range(samples):
        random = np.random.default_rng((*seed, j))
        sequences.append(Sequence(prompt, j, length, random))
    return sequences


def decode(model, cache, tokens, ends):
    """Logits (n, V) after the newest token of each of n running sequences. tokens (n,); ends (n,):
    how many tokens the cache has of each."""
    states = model.states(tokens, ends, cache.attend_next(ends))        # (n, dim)
    return states @ model.head_weight.T


def prefill(model, cache, prompts, row, samples):
    """Logits after whole prompts, a row for each of the `samples` answers to each. They enter the
    cache from `row` on."""
    tokens = []
    positions = []
    predictors = []             # places of the last token of each prompt, for each answer
    for prompt in prompts:
        tokens += prompt
        positions += range(len(prompt))
        predictors += [len(tokens) - 1] * samples
    device = model.device
    attend = cache.attend_prompts([len(prompt) for prompt in prompts], row, samples)
    states = model.states(to_device(tokens, device), to_device(positions, device), attend)
    return states[to_device(predictors, device)] @ model.head_weight.T


def refuse_not_finite(tokens, running):
    """ValueError that names the prompt of a running sequence whose logits were not finite."""
    if NOT_FINITE in tokens:
        number = 1 + running[tokens.index(NOT_FINITE)].prompt
        raise ValueError(f"prompt {number}: the model's logits are not finite; its weights are "
                         "damaged, or were trained too far")


def end_sequences(cache, running, tokens, stop_ids, max_new_tokens):
    """Gives each running sequence its next token. Takes those that have ended out of `running` and
    of the cache, where the last row moves into the gap, and returns them."""
    ended = []
    # From the last row to the first: a row that moves into a gap has had its token already.
    for row in reversed(range(len(running))):
        sequence = running[row]
        stops = tokens[row] in stop_ids
        if not stops:
            sequence.ids.append(tokens[row])
        if stops or len(sequence.ids) == max_new_tokens:
            ended.append(sequence)
            last = running.pop()
            if last is not sequence:
                cache.move(len(running), row, last.length)
                running[row] = last
    return ended


def check_settings(model, *, samples, batch_size, max_new_tokens, temperature, top_p, top_k):
    """ValueError that names the setting of `generate` that is out of range."""
    positions = model.config.max_positions
    # True and False are ints to Python, and NaN is a number.
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not is_finite_number(value):
            raise ValueError(f"{name} = {value!r:.40}; expected a finite number")
    counts = {"top_k": top_k, "samples": samples, "max_new_tokens": max_new_tokens,
              "batch_size": batch_size}
    for name, value in counts.items():
        if type(value) is not int:
            raise ValueError(f"{name} = {value!r:.40}; expected a whole number")
    settings = (    # name, value, whether it is in range, the range
        ("temperature", temperature, temperature == 0 or temperature >= LEAST_TEMPERATURE,
         f"0 or more, if it is not 0 at least {LEAST_TEMPERATURE}"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("samples", samples, samples > 0, "1 or more"),
        ("max_new_tokens", max_new_tokens, 0 < max_new_tokens < positions,
         f"1 or more, and fewer than the {positions} positions of the model"),
        ("batch_size", batch_size, batch_size >= samples,
         f"room for the {samples} answers to a prompt"),
    )
    for name, value, in_range, expected in settings:
        if not in_range:
            raise ValueError(f"{name} = {value}; expected {expected}")


def check_prompts(model, prompts, max_new_tokens):
    """ValueError that names the first prompt (counted from 1) that is empty or too long."""
    for number, prompt in enumerate(prompts, 1):
        if not fits(model, prompt, max_new_tokens):
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; expected 1 or more, and with "
                f"max_new_tokens = {max_new_tokens} at most the {model.config.max_positions} "
                "positions of the model")


def fits(model, prompt, max_new_tokens):
    """Whether a prompt (ids) is not empty and leaves room for an answer."""
    return 0 < len(prompt) <= model.config.max_positions - max_new_tokens


def answer(model, chat, prompts, *, seed=0, **settings):
    """Answers to N prompts (a string or a list of turns each), as N lists of texts.

    settings are those of `generate`: max_new_tokens must be given. All ranks of a sharded model
    must call this together.
    """
    encoded = []
    seeds = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        encoded.append(chat.encode_prompt(prompt))
        seeds.append((seed, i))
    answers = generate(model, encoded, seeds=seeds, stop_ids=chat.stop_ids, **settings)
    texts = []
    for some in answers:
        texts.append([chat.decode_response(ids) for ids in some])
    return texts
