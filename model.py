"""The Llama / Mistral / Qwen transformer, scoring preference pairs in packed rows.

    model = load_model("Llama-3-8B-Instruct")               # fp32 weights
    logits = model(token_ids)                               # (T,) -> (T, V)
    logps = model.response_logps(tokens, [(P, C, R)])       # of the response tokens of a row
    save_model(model, "aligned", like="Llama-3-8B-Instruct")

Parts: the transformer; attention in a row of pairs; the vocabulary head, which works through the
vocabulary in chunks; Hugging Face folders, read and written. Parameter names are Hugging Face's and
rotary embedding splits each head in halves as theirs does, so the state dict IS the safetensors
file: no key table, no permutation. Covers Llama 2 and 3.x, Mistral (sliding window), Qwen2 (bias on
q, k and v) and Qwen3 (norms on q and k); any other model or feature in config.json is an error.
Needs torch and safetensors.

Axes: T tokens of a row, H heads, K key/value heads, D head_dim, V vocabulary, N response tokens.
A pair of a row has P prompt tokens, C of the chosen response and R of the rejected one.
A row is one plain (T,) sequence of tokens, several texts end to end, without padding. Every layer
but attention looks at one token at a time. So who sees whom is decided by a function that a caller
hands in, `attend(layer, q, k, v)`. For a row of pairs it calls pair_attention, which picks the
tokens that may see each other. That calls causal_attention, which applies the causal order and the
sliding window. (gpu.py and cpu.py have faster ones.) `positions` say where in its text a token is.
"""
import json
import math
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint


# --- the transformer ------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int                     # width of the MLP
    norm_eps: float
    rope_theta: float
    max_positions: int                  # the longest sequence that the model was made for
    rope_scaling: dict | None = None    # Llama-3.1's, see rope_tables
    window: int | None = None           # a token sees itself and window - 1 before it; None: all
    tied: bool = False                  # the embedding is also the output projection: no lm_head
    qkv_bias: bool = False              # Qwen2
    qk_norm: bool = False               # Qwen3


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # distributed.py sets these two: activation checkpointing of every block; and the device
        # where it computes, if its weights rest on another one (CPU offload).
        self.recompute = False
        self.compute_device = None
        # Held here so that another kernel can take its place, as cpu.py's does.
        self.causal_attention = partial(causal_attention, window=config.window)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.dim),
            "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "norm": nn.RMSNorm(config.dim, config.norm_eps),
        })
        if not config.tied:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        """The output projection, (V, dim)."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    @property
    def device(self):
        return self.compute_device or self.head_weight.device

    def forward(self, tokens):
        """Logits of one plain sequence, all V of them for every token. (T,) -> (T, V). For checks,
        and for projects that copy this file; training never makes all logits."""
        positions = torch.arange(len(tokens), device=tokens.device)
        attend = self.attend_pairs([(len(tokens),)])        # a prompt without responses
        return self.states(tokens, positions, attend) @ self.head_weight.T

    def response_logps(self, tokens, lengths):
        """Log-probs of the response tokens of a row of pairs, laid out as pair_layout does.

        tokens (T,) holds [prompt | chosen | rejected] pair after pair, `lengths` their lengths
        (P, C, R), each at least 1. Returns (N,): chosen, rejected, chosen, rejected, ...
        """
        return self.token_logps(*self.response_states(tokens, lengths))

    def response_states(self, tokens, lengths):
        """(N, dim) states that predict the N response tokens of a row of pairs, and those (N,)."""
        positions, predictors, targets = pair_layout(lengths, tokens.device)
        attend = self.attend_pairs(lengths)
        return self.states(tokens, positions, attend)[predictors], tokens[targets]

    def attend_pairs(self, lengths):
        """attend(layer, q, k, v) for a row of pairs. `lengths` as of pair_attention."""
        def attend(layer, q, k, v):
            return pair_attention(q, k, v, lengths, self.causal_attention)
        return attend

    def token_logps(self, states, targets):
        """Log-probs of target tokens, in fp32 at least. states (N, dim), targets (N,) -> (N,)

        With autograd, for any loss. Training calls target_logps and target_logps_backward itself
        (head_and_loss in train.py), so that all pairs share one gradient of the weight.
        """
        if not torch.is_grad_enabled():
            return target_logps(states, self.head_weight, targets, keep=False)[0]
        return TargetLogps.apply(states, self.head_weight, targets)

    def states(self, tokens, positions, attend):
        """Final normed hidden states of a row. tokens and positions (T,) int64 -> (T, dim)

        attend(layer, q, k, v) -> (T, H, D) decides who sees whom. The number of the layer, from 0,
        is for callers that keep a cache for each (sampler.py).
        """
        x = self.model.embed_tokens(tokens)                                     # (T, dim)
        cos, sin = (table.to(x.dtype) for table in rope_tables(positions, self.config))
        recompute = self.recompute and torch.is_grad_enabled()
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, partial(attend, i), recompute)
        return self.model.norm(x)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend_in_layer, recompute=False):
        # Activation checkpointing stands inside the block's forward and not around the block. So
        # FSDP2, which hooks the block, gathers the weights once for both the second forward pass
        # and the backward pass.
        if recompute:
            # Nothing is random, and to keep the generator's state would wait for the GPU.
            return checkpoint(self.compute, x, cos, sin, attend_in_layer, use_reentrant=False,
                              preserve_rng_state=False)
        return self.compute(x, cos, sin, attend_in_layer)

    def compute(self, x, cos, sin, attend_in_layer):
        q, k, v = self.before_attention(x, cos, sin)    # two functions, which gpu.py may compile
        return self.after_attention(x, attend_in_layer(q, k, v))

    def before_attention(self, x, cos, sin):
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after_attention(self, x, attended):
        x = x + self.self_attn.o_proj(attended.flatten(1))                      # (T, dim)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def project(self, x, cos, sin):
        T = x.shape[0]
        q = self.q_norm(self.q_proj(x).view(T, -1, self.head_dim))              # (T, H, D)
        k = self.k_norm(self.k_proj(x).view(T, -1, self.head_dim))              # (T, K, D)
        v = self.v_proj(x).view(T, -1, self.head_dim)                           # (T, K, D)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x):
        gate = self.gate_proj(x)                                                # (T, hidden_dim)
        up = self.up_proj(x)                                                    # (T, hidden_dim)
        # SwiGLU takes the weight and not the module: hooks and adapters (LoRA) of down_proj would
        # not run. With those write self.down_proj(F.silu(gate) * up). The head is used likewise.
        down = self.down_proj.weight
        out = SwiGLU.apply(gate, up, down)                                      # (T, dim), empty
        # Filled only now: recomputation ends as soon as all that the block keeps is there again,
        # which is here. So it leaves this product out.
        with torch.no_grad():
            return out.addmm_(F.silu(gate).mul_(up), down.T, beta=0)


class SwiGLU(torch.autograd.Function):
    """(silu(gate) * up) @ down.T to autograd, keeping gate and up alone for the backward pass.

    Autograd would also keep silu(gate) and the product. At hidden_dim these are the largest tensors
    of a block, and both are quick to recompute. gate, up (T, hidden_dim) -> (T, dim), not filled.
    No second derivatives.
    """

    @staticmethod
    def forward(ctx, gate, up, down):
        ctx.save_for_backward(gate, up, down)
        return gate.new_empty(len(gate), len(down))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up, down = ctx.saved_tensors
        silu = F.silu(gate)                                                     # (T, hidden_dim)
        grad_down = grad.T @ (silu * up)                                        # (dim, hidden_dim)
        grad_product = grad @ down                                              # (T, hidden_dim)
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        grad_up = silu.mul_(grad_product)                                       # in place
        return grad_gate, grad_up, grad_down


# --- attention in a row of pairs ------------------------------------------------------------------

def rope_tables(positions, config):
    """cos and sin of the rotary embedding's angles, (T, 1, D/2) each, in fp32.

    They are computed for every row and never stored: nothing to load or to shard.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    freq = 1.0 / config.rope_theta**exponent                                    # (D/2,)
    if s := config.rope_scaling:
        # Llama-3.1 stretches the wavelengths that are longer than its original context by `factor`
        # and keeps the short ones, with a ramp between the two.
        context = s["original_max_position_embeddings"]
        turns = context * freq / (2 * math.pi)                  # wavelengths in the context
        ramp = s["high_freq_factor"] - s["low_freq_factor"]
        keep = ((turns - s["low_freq_factor"]) / ramp).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / s["factor"])
    angles = positions[:, None, None] * freq                                    # (T, 1, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates the two halves of each head against each other. (T, H, D) -> (T, H, D)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def pair_layout(lengths, device=None):
    """Where things stand in a row of pairs, given their (P, C, R) lengths.

    Returns three int64 tensors.
    positions (T,): of each token in its text; they start again for the rejected response where the
    prompt ended.
    predictors (N,): the place in the row of the token that predicts each response token. The last
    prompt token predicts the first token of both responses.
    targets (N,): the place in the row of each response token.
    """
    positions = []
    predictors = []
    targets = []
    start = 0
    for P, C, R in lengths:
        chosen = start + P                  # where the chosen response starts in the row
        rejected = chosen + C
        end = rejected + R
        positions += [*range(P + C), *range(P, P + R)]
        predictors += range(chosen - 1, rejected - 1)
        predictors += [chosen - 1, *range(rejected, end - 1)]
        targets += range(chosen, end)
        start = end
    return tuple(to_device(places, device) for places in (positions, predictors, targets))


def pair_attention(q, k, v, lengths, causal_attention):
    """Who sees whom in a row of pairs: each response sees its prompt and itself.

    Two causal calls a pair: prompt and chosen as one sequence, then the queries of rejected against
    the keys of prompt and rejected. It needs no mask over the row. (On GPUs, see gpu.py.)

    q (T, H, D), k and v (T, K, D), lengths of each pair (P, C, R) -> (T, H, D)
    In general a text of the row is a prompt with any number of responses: (P,) or (P, C, R, ...).
    causal_attention(q, k, v) has the window of the model.
    """
    sizes = []
    for P, *responses in lengths:
        first = sum(responses[:1])          # of a prompt alone 0
        sizes += [P + first, *responses[1:]]
    # Split once: the gradient of a split is one concatenation, that of each slice would be a whole
    # (T, H, D) of zeros but for the slice.
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes))
    out = []
    for P, *responses in lengths:
        q_first, k_first, v_first = next(parts)             # prompt and chosen
        out.append(causal_attention(q_first, k_first, v_first))
        for _ in responses[1:]:
            q_other, k_other, v_other = next(parts)         # rejected
            keys = torch.cat((k_first[:P], k_other))                            # (P + R, K, D)
            values = torch.cat((v_first[:P], v_other))
            out.append(causal_attention(q_other, keys, values))
    return torch.cat(out)                                                       # (T, H, D)


def causal_attention(q, k, v, window=None):
    """Causal attention of the last Tq tokens of a sequence of Tk, within a window of tokens.

    q (Tq, H, D), k and v (Tk, K, D) -> (Tq, H, D)
    """
    Tq, Tk = len(q), len(k)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))                      # (1, H or K, T, D)
    if window is None or window >= Tk:
        # Flash kernels: no mask in memory. They align the first query with the first key, so zeros
        # stand in for the queries before ours, and what comes of them is left out. For a rejected
        # response that is its prompt's attention once more, a small part of a step.
        q = F.pad(q, (0, 0, Tk - Tq, 0))                                        # (1, H, Tk, D)
        mask = None
    else:
        places = torch.arange(Tk, device=q.device)
        distance = places[Tk - Tq:, None] - places                              # (Tq, Tk)
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return out[0, :, -Tq:].transpose(0, 1)                                      # (Tq, H, D)


# --- the vocabulary head --------------------------------------------------------------------------

# Logits that are computed at once, in fp32: 8 MiB on CPUs, whose caches hold that, 256 MiB on GPUs.
CHUNK_LOGITS = {"cpu": 2**21, "gpu": 2**26}
# Logits whose exponentials one call may keep for its backward pass; the others are recomputed. 128
# MiB on CPUs, 1 GiB on GPUs, which is 2,092 tokens at Llama-3's vocabulary.
KEPT_LOGITS = {"cpu": 2**25, "gpu": 2**28}


class TargetLogps(torch.autograd.Function):
    """log softmax(states @ weight.T)[target] by target_logps, with its exact gradient.

    states (N, dim), weight (V, dim), targets (N,) -> (N,). No second derivatives.
    """

    @staticmethod
    def forward(ctx, states, weight, targets):
        keep = any(ctx.needs_input_grad)
        logps, logsumexp, ctx.kept = target_logps(states, weight, targets, keep)
        ctx.save_for_backward(states, weight, targets, logsumexp)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight = ctx.saved_tensors[1]
        grad_weight = torch.zeros_like(weight)
        kept = ctx.kept
        # What was kept is used up now; a second backward pass recomputes it.
        ctx.kept = [(None, largest) for _, largest in kept]
        grad_states = target_logps_backward(grad, *ctx.saved_tensors, kept, grad_weight)
        return grad_states, grad_weight, None


@torch.no_grad()
def target_logps(states, weight, targets, keep):
    """Log-probs of targets by online softmax, without autograd (token_logps has it): the vocabulary
    is read chunk after chunk, with the largest logit so far and the sum of exponentials so far.
    states (N, dim), weight (V, dim), targets (N,) from 0 to V - 1: there is no ignore_index.

    A log-prob is z[target] - logsumexp(z), from fp32 logits. At a vocabulary of 128k and the logits
    of a trained model torch's own fp32 log_softmax is off by 1e-5 a token on CPUs, this by 2e-7.

    Returns (logps, logsumexp, kept): (N,), (N, 1), and for each chunk of the vocabulary a pair of
    exps (N, v) and largest (N, 1), where exps = exp(z - largest). With `keep` the exps are kept up
    to KEPT_LOGITS in all; the others are None.
    """
    kept = []
    room = _limit(KEPT_LOGITS, states) if keep else 0
    # Numbers at first, (N, 1) tensors from the first chunk on.
    largest = -torch.inf
    total = 0
    target_z = 0
    for _, chunk_weight, in_chunk, column in _vocabulary_chunks(states, weight, targets):
        z = _logits(states, chunk_weight)                                       # (N, v)
        target_z = target_z + torch.where(in_chunk[:, None], z.gather(1, column), 0)
        before = largest
        largest = z.amax(-1, keepdim=True).clamp_(min=before)
        z.sub_(largest).exp_()
        total = total * (before - largest).exp() + z.sum(-1, keepdim=True)
        room -= z.numel()
        kept.append((z if room >= 0 else None, largest))
        del z                                       # before the next chunk is made
    logps = (target_z - largest - total.log())[:, 0]
    return logps, largest + total.log(), kept


@torch.no_grad()
def target_logps_backward(grad, states, weight, targets, logsumexp, kept, grad_weight):
    """The gradient of states (N, dim) from that of the log-probs, `grad` (N,).

    The gradient of the weight is added to grad_weight (V, dim) and not returned, so that one buffer
    serves all pairs; of bf16 weights it is best in fp32. What target_logps kept is used up.
    """
    grad_states = torch.zeros_like(states, dtype=logsumexp.dtype)
    grad = grad[:, None]
    vocabulary = _vocabulary_chunks(states, weight, targets)
    for i, (chunk, chunk_weight, in_chunk, column) in enumerate(vocabulary):
        exps, largest = kept[i]
        kept[i] = None                              # freed at the end of this turn
        if exps is None:
            exps = _logits(states, chunk_weight).sub_(largest).exp_()
        # d logp / d logits = onehot(target) - softmax(logits)
        grad_logits = exps.mul_(-grad * (largest - logsumexp).exp())            # (N, v)
        grad_logits.scatter_add_(1, column, torch.where(in_chunk[:, None], grad, 0))
        grad_logits = grad_logits.to(weight.dtype)
        _add_product(grad_states, grad_logits, chunk_weight)
        _add_product(grad_weight[chunk], grad_logits.T, states)
        del exps, grad_logits                       # before the next chunk is recomputed
    return grad_states.to(states.dtype)


def _vocabulary_chunks(states, weight, targets):
    """The vocabulary in chunks of v tokens, so that N * v is at most CHUNK_LOGITS.

    Yields the slice of a chunk; its weight (v, dim); which targets are in it (N,); and their
    columns there (N, 1), 0 for the targets that are not.
    """
    size = max(1, _limit(CHUNK_LOGITS, states) // len(states))
    if size > 64:
        size -= size % 64       # odd lengths take GPUs three times as long (benchmarks/README.md)
    for start in range(0, len(weight), size):
        chunk = slice(start, min(start + size, len(weight)))
        in_chunk = (targets >= start) & (targets < chunk.stop)
        column = torch.where(in_chunk, targets - start, 0)[:, None]
        yield chunk, weight[chunk], in_chunk, column


def _logits(states, weight):
    """Logits in fp32 (float64 of float64), (N, v). Of bf16 states GPUs give them unrounded; CPUs
    round them to bf16 first, as most bf16 training does."""
    wide = torch.promote_types(states.dtype, torch.float32)
    if states.device.type == "cpu" or states.dtype == wide:
        return (states @ weight.T).to(wide)
    return torch.mm(states, weight.T, out_dtype=wide)


def _add_product(total, a, b):
    """total += a @ b, in place. total may be fp32 where a and b are bf16."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cpu":
        total += a @ b
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def kept_tokens(states, weight):
    """Of how many tokens target_logps keeps all that its backward pass needs."""
    return _limit(KEPT_LOGITS, states) // len(weight)


def _limit(limits, states):
    return limits["cpu" if states.device.type == "cpu" else "gpu"]


# --- Hugging Face folders: config.json ------------------------------------------------------------

# Fields of config.json that say nothing about the computation: names and versions, special tokens,
# labels, what an older transformers wrote for sampling, what trainers and the hub left. Every other
# field is used below or refused.
IGNORED_FIELDS = set("""
    architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path
    _commit_hash is_llama_config transformers.js_config unsloth_version unsloth_fixed
    bos_token_id eos_token_id pad_token_id unk_token_id tokenizer_class max_sequence_length
    model_max_length id2label label2id problem_type use_cache return_dict output_attentions
    output_hidden_states chunk_size_feed_forward is_encoder_decoder is_decoder initializer_range
    pretraining_tp max_window_layers neftune_noise_alpha _attn_implementation attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled max_length min_length do_sample temperature
    top_k top_p typical_p num_beams num_beam_groups num_return_sequences repetition_penalty
    length_penalty
""".split())

# The fields of each kind of rotary embedding.
ROPE_FIELDS = {
    "default": set(),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_config(folder, handled=()):
    """ModelConfig from `folder`/config.json, in the spelling of transformers 4 or 5.

    handled: names of fields that the caller reads itself. ValueError names the field that is
    missing, wrong or not supported: a model is computed exactly or not at all.
    """
    fields = _ConfigFields(_config_file(folder))
    family = fields.raw.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        fields.refuse("model_type", family, "llama, mistral, qwen2 or qwen3")
    dim = fields.size("hidden_size")
    n_heads = fields.size("num_attention_heads")
    # Without a default the field has to be there.
    n_kv_heads = fields.size("num_key_value_heads", n_heads if family == "llama" else None)
    if n_heads % n_kv_heads:
        fields.wrong("num_key_value_heads", n_kv_heads, f"a divisor of the {n_heads} heads")
    if fields.unread.get("head_dim") is None and family != "qwen3" and dim % n_heads:
        fields.wrong("hidden_size", dim, f"a multiple of the {n_heads} heads, or a head_dim")
    head_dim = fields.size("head_dim", dim // n_heads if family != "qwen3" else None)
    if head_dim % 2:
        fields.wrong("head_dim", head_dim, "an even number: rotary embedding turns its two halves")

    n_layers = fields.size("num_hidden_layers", most=1000)
    rope_theta, rope_scaling = _read_rope(fields)
    window = _read_window(fields, family, n_layers)
    if fields.take("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", fields.raw["hidden_act"], "'silu'")
    for name in ("mlp_bias", "attention_bias"):
        if fields.flag(name):
            fields.refuse(name, True, "False")

    config = ModelConfig(
        vocab_size=fields.size("vocab_size"),
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=fields.size("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope_theta,
        max_positions=fields.size("max_position_embeddings", most=2**31),
        rope_scaling=rope_scaling,
        window=window,
        tied=fields.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )
    fields.refuse_others(handled)
    return config


def read_json(path):
    """The object that a JSON file of a model folder holds.

    ValueError names the file and what is wrong with it. OSError if it cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; expected a JSON file, fetch it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {content!r:.60}")
        # Half a surrogate pair, which an escape can write, is no character.
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON for this purpose (nested too deeply)") from None
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e!s:.300})") from None
    return content


def _each_key_once(pairs):
    """A JSON object as a dict. ValueError if it has a key twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r:.60} twice")
    return content


class _ConfigFields:
    """config.json field by field. What is not taken in the end has to say nothing."""

    def __init__(self, path):
        self.path = path
        self.raw = read_json(path)
        self.unread = dict(self.raw)

    def take(self, name, default=None):
        """The value of a field; `default` where it is absent or null."""
        value = self.unread.pop(name, None)
        return default if value is None else value

    def size(self, name, default=None, most=2**20):
        """A whole number. No model has one past `most`, which would need all memory or all day."""
        value = self.take(name, default)
        if value is None:
            raise ValueError(f"{self.path}: field {name} is missing")
        if type(value) is not int or not 0 < value <= most:
            self.wrong(name, value, f"a whole number from 1 to {most}")
        return value

    def number(self, name, default=None):
        """A number above 0, which no bool is, nor NaN, an infinity or a string."""
        value = self.take(name, default)
        if value is None:
            raise ValueError(f"{self.path}: field {name} is missing")
        if type(value) not in (int, float) or not 0 < value < 1e300:
            self.wrong(name, value, "a positive number")
        return float(value)

    def flag(self, name):
        """True or False; False where the field is absent or null."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            self.wrong(name, value, "true or false")
        return value

    def wrong(self, name, value, expected):
        raise ValueError(f"{self.path}: {name} = {value!r:.80}; expected {expected}")

    def refuse(self, name, value, expected):
        raise ValueError(
            f"{self.path}: {name} = {value!r:.200} is not supported; expected {expected}. "
            "model.py computes Llama, Mistral, Qwen2 and Qwen3 exactly or not at all")

    def refuse_others(self, handled):
        """Refuses fields that nobody took, unless they are null, false, empty or to be ignored."""
        quantization = self.take("quantization_config")
        if quantization:
            self.refuse(
                "quantization_config", quantization,
                "weights that are not quantised: fetch the model that these were made from")
        for name, value in self.unread.items():
            if value and name not in IGNORED_FIELDS and name not in handled:
                self.refuse(
                    name, value, "no such field, or null, false or 0 (if it does not change the "
                    "computation, add it to IGNORED_FIELDS)")


def _read_rope(fields):
    """(theta, scaling or None) of the rotary embedding."""
    rope = {"rope_theta": fields.take("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):    # of transformers 4, and 5
        given = fields.take(name, {})
        if not isinstance(given, dict):
            fields.wrong(name, given, "an object")
        rope |= given
    older = rope.pop("type", None)                      # what rope_type was once called
    kind = rope.pop("rope_type", None) or older or "default"
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        fields.refuse("rope type", kind, "default or llama3")
    if set(rope) != ROPE_FIELDS[kind] | {"rope_theta"}:
        fields.refuse(f"{kind} rope with fields", sorted(rope), f"{sorted(ROPE_FIELDS[kind])}")

    # They are read like fields of config.json itself.
    for name, value in rope.items():
        fields.unread[f"rope's {name}"] = value
    theta = fields.number("rope's rope_theta")
    if kind == "default":
        return theta, None
    context = "original_max_position_embeddings"
    scaling = {context: fields.size(f"rope's {context}", most=2**31)}
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        scaling[name] = fields.number(f"rope's {name}")
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        fields.wrong("rope's high_freq_factor", scaling["high_freq_factor"],
                     f"more than low_freq_factor, {scaling['low_freq_factor']}")
    return theta, scaling


def _read_window(fields, family, n_layers):
    """The sliding window of all layers, or None."""
    window = None
    if family == "mistral" and fields.unread.get("sliding_window", 4096) is not None:
        # Where the field is absent transformers takes 4096; null says that there is no window.
        window = fields.size("sliding_window", 4096, most=2**31)
    elif family.startswith("qwen"):
        if fields.flag("use_sliding_window"):
            fields.refuse("use_sliding_window", True, "false")
        fields.take("sliding_window")                   # has no effect then
    layers = ["sliding_attention" if window else "full_attention"] * n_layers
    found = fields.take("layer_types", layers)
    if found != layers:
        fields.refuse("layer_types", found, f"{layers[0]} in all {n_layers} layers")
    return window


# --- Hugging Face folders: which files count ------------------------------------------------------

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
INDEX = "model.safetensors.index.json"      # {"weight_map": {name of a weight: its file}}

# Everything in a model folder that is not weights, copied byte for byte.
COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "original/tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tekken.json",
    "chat_template*", "additional_chat_templates/*")

# What to do about folders that hold no such model.
MODEL_FILES = "a Hugging Face model folder (config.json, *.safetensors, tokenizer files)"
OTHER_FOLDERS = {       # by a file in them
    "adapter_config.json": "This is a LoRA adapter: merge it into its model (merge_and_unload of "
                           "peft) and save that",
    "snapshots": "This is the hub's cache: name a folder of its snapshots",
    "params.json": "These weights are in Meta's or Mistral's own layout: fetch the config.json and "
                   "model*.safetensors of the same model",
}
HOW_TO_FETCH = """{0}: no such folder; expected {2}. To fetch a model of the Hugging Face hub:
    pip install huggingface_hub
    hf auth login       (only if the model's page asks you to agree to a licence)
    hf download {1} --local-dir {0} --exclude 'consolidated*' --exclude '*.pth' --exclude '*.bin'"""
HOW_TO_CONVERT = """{0}: no *.safetensors files; expected {2}. To convert {1}, with transformers:
    python -c "from transformers import AutoModelForCausalLM as M; \
M.from_pretrained('{0}', torch_dtype='auto').save_pretrained('{0}')\""""
POINTER = b"version https://git-lfs.github.com/spec/"


def model_folder(folder):
    """The Path of a folder. ValueError with what to do if there is none, or half a git clone."""
    folder = Path(folder)
    if not folder.is_dir():
        local = folder
        hub_id = f"ORGANISATION/{folder.name}"
        of_hub = re.fullmatch(r"[\w-]+/[\w.-]+", str(folder)) and not folder.parent.exists()
        if of_hub and folder.parent.name != "models":   # a name of the hub was given
            local = folder.name
            hub_id = folder
        raise ValueError(HOW_TO_FETCH.format(local, hub_id, MODEL_FILES))
    refuse_pointers(copied_files(folder))
    return folder


def copied_files(folder):
    """The files of a folder that save_model copies, as of COPIED_FILES.

    ValueError names a link that leads out of the folder: who made the folder would choose what else
    of this machine goes into the saved model. The hub's cache, whose snapshots are links to its
    blobs, counts as one folder.
    """
    folder = Path(folder)
    places = [folder.resolve()]
    for parent in places[0].parents:
        if parent.name == "snapshots":
            places.append(parent.parent / "blobs")
    for pattern in COPIED_FILES:
        for file in sorted(folder.glob(pattern)):
            target = file.resolve()
            if file.is_symlink() and not file.exists():
                raise ValueError(f"{file}: a link to {target}, where nothing is; fetch the file")
            if not any(target.is_relative_to(place) for place in places):
                raise ValueError(
                    f"{file}: it is a link, or in one, that leads out of the folder, to {target}. "
                    "Files beside the weights are copied when a model is saved, from the folder "
                    f"alone; put the file in its place: cp --remove-destination {target} {file}")
            if file.is_file():
                yield file


def refuse_pointers(files):
    """ValueError if one is what a git clone without LFS leaves in the place of a large file."""
    for file in filter(Path.is_file, files):
        with file.open("rb") as f:
            start = f.read(len(POINTER))
        if start == POINTER:
            raise ValueError(
                f"{file}: a Git LFS pointer in the place of the file; run `git lfs pull` in "
                f"{file.parent}, or fetch it by `hf download`")


def _config_file(folder):
    path = model_folder(folder) / "config.json"
    if not path.exists():
        advice = [text for name, text in OTHER_FOLDERS.items() if (path.parent / name).exists()]
        raise ValueError(". ".join([f"{path}: not found; expected {MODEL_FILES}", *advice]))
    return path


def weight_files(folder):
    """The safetensors files that hold the model of a folder: those of the index, if there is one.
    Others may lie beside them: Mistral's consolidated.safetensors, an adapter, an older save."""
    if (folder / INDEX).exists():
        return _indexed_files(folder)
    for pattern in ("model.safetensors", "model-*.safetensors", "*.safetensors"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise ValueError(HOW_TO_CONVERT.format(folder, ", ".join(pickled), MODEL_FILES))
    raise ValueError(f"{folder}: no *.safetensors files; expected {MODEL_FILES}. *.pth and *.gguf "
                     "are other layouts: fetch the model*.safetensors of the same model")


def _indexed_files(folder):
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    names = set()
    if isinstance(weight_map, dict):
        names = {name if isinstance(name, str) else "" for name in weight_map.values()}
    # The files lie beside the index, so their names are no paths.
    if not names or not all(re.fullmatch(r"[^/\0]+\.safetensors", name) for name in names):
        raise ValueError(f"{index}: expected a JSON object whose weight_map gives each weight "
                         "its *.safetensors file in the folder; fetch it again")
    files = [folder / name for name in sorted(names)]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ValueError(f"{folder}: weights are missing; {INDEX} names files that are not "
                         f"there: {', '.join(absent)}. Fetch them, or the whole folder again")
    return files


def checkpoint_tensors(folder):
    """{name: (shape, dtype, file name)} of a folder's weights, from the headers of its files."""
    folder = model_folder(folder)
    files = weight_files(folder)
    refuse_pointers(files)
    found = {}
    for file in files:
        for name, (shape, dtype) in _header(file).items():
            if name in found:
                raise ValueError(f"{folder}: weight {name} is both in {found[name][2]} and in "
                                 f"{file.name}; move the files of another model away")
            if dtype not in DTYPES:
                raise ValueError(f"{file}: weight {name} is stored as {dtype}; expected one of "
                                 f"{', '.join(DTYPES)} (quantised checkpoints cannot be trained)")
            found[name] = shape, DTYPES[dtype], file.name
    return found


def _header(file):
    """{name: (shape, dtype)} of a safetensors file, in its own words."""
    header = {}
    if not file.is_file():
        raise ValueError(f"{file}: not a file; expected a safetensors file, fetch it again")
    try:
        with safe_open(file, "pt") as f:
            for name in f.keys():
                tensor = f.get_slice(name)
                header[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    except BaseException as e:
        # A panic of the library, which is written in Rust, is no Exception.
        damaged = isinstance(e, (SafetensorError, ValueError, OverflowError))
        if not damaged and type(e).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{file}: not a complete safetensors file ({e}); fetch it again") from None
    return header


# --- Hugging Face folders: loading and saving -----------------------------------------------------

def load_model(folder, dtype=torch.float32, device="cpu", shard=None, build=Transformer,
               handled=()):
    """A Transformer with the weights of a Hugging Face folder, in `dtype`. Training takes fp32:
    bf16 weights do not move at a learning rate of 1e-6. ValueError unless every weight of the model
    is there, of the right shape and finite, and no other.

    shard: a function that is given the model while it is on the meta device, without memory, and
    makes its parameters DTensors, as fully_shard does. Each rank then reads its own slices of the
    files, one tensor after another, and nobody holds the model. All ranks call this together.
    build: makes the model from its ModelConfig, for one with another head.
    handled: as of read_config.
    """
    config = read_config(folder, handled)
    found = checkpoint_tensors(folder)
    with torch.device("meta"):
        model = build(config).to(dtype)
    _check_tensors(folder, model, found)
    if shard:
        shard(model)
    model.to_empty(device=device)

    # Read in place. Some tied models carry their embedding twice: both are read and compared.
    tensors = model.state_dict()
    twice = config.tied and "lm_head.weight" in found
    if twice:
        tensors["lm_head.weight"] = torch.empty_like(model.head_weight)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    files = {f"{folder}/{file}" for _, _, file in found.values()}
    reader.fs.ls = lambda _: files          # it would read every *.safetensors of the folder
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")      # not initialized
        try:
            dcp.load(tensors, storage_reader=reader)
        except dcp.api.CheckpointException as e:
            raise ValueError(f"{', '.join(sorted(files))}: the weights cannot be read "
                             f"({e})") from None

    # This rank's slices. isfinite of a whole tensor would copy it twice; its extremes do not.
    tensors = {name: _local(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{folder}/{found[name][2]}: {name} holds NaN or infinite values")
    if twice and not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
        raise ValueError(
            f"{folder}: config.json ties the output projection to the embedding, but "
            f"{found['lm_head.weight'][2]} holds another lm_head.weight")
    return model


def _check_tensors(folder, model, found):
    """ValueError unless the weights that were found are those of the model."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = set(expected) - set(found)
    if missing:
        read = sorted({file for _, _, file in found.values()})
        raise ValueError(f"{folder}: {len(missing)} weights are missing, {min(missing)} first, in "
                         f"{', '.join(read)}")
    # Old Llama-2 files carry the frequencies of the rotary embedding, which are computed here.
    extra = {name for name in found if not name.endswith("rotary_emb.inv_freq")} - set(expected)
    if model.config.tied:
        extra.discard("lm_head.weight")
    if extra:
        raise ValueError(
            f"{folder}: {len(extra)} weights that the model of config.json does not have, "
            f"{min(extra)} (in {found[min(extra)][2]}) first; move files of another format or "
            "model away")
    for name, shape in expected.items():
        if found[name][0] != shape:
            raise ValueError(f"{folder}/{found[name][2]}: {name} has shape {found[name][0]}; "
                             f"config.json asks for {shape}")


def _local(tensor):
    """This rank's slice of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_model(model, folder, like, dtype=None, shard_bytes=5 * 10**9):
    """Writes `model` as a Hugging Face folder: safetensors of at most shard_bytes and an index, and
    config and tokenizer files as they are in the folder `like`. Weights are stored in `dtype`, by
    default in the one each has in `like` (usually bf16: a model loaded and saved is bit-equal).
    With another `dtype` config.json still names the one of `like`, and loaders that follow it, as
    transformers 5 and vLLM do, round to that unless they are told otherwise.

    All ranks of a sharded model must call this together: they gather one weight after another, and
    rank 0, which holds those of one file at a time, writes. OSError, on all ranks, names the file
    that it cannot write.
    """
    folder = Path(folder)
    like = Path(like)
    stored = checkpoint_tensors(like)
    weights = model.state_dict()
    dtypes = {name: dtype or stored[name][1] for name in weights}
    sizes = {name: p.numel() * dtypes[name].itemsize for name, p in weights.items()}
    files = _files_to_write(sizes, shard_bytes)

    # An error of rank 0 must not leave the others waiting: it writes no more, but goes on
    # gathering, and all ranks raise it in the end.
    writing = not dist.is_initialized() or dist.get_rank() == 0
    gathered = _gather_files(weights, dtypes, files, writing)
    error = None
    if writing:
        try:
            _write_folder(folder, like, files, sizes, gathered)
        except (ValueError, OSError) as e:
            error = e.with_traceback(None)      # which would hold the tensors of a file
    for _, tensors in gathered:
        tensors.clear()
    if any(isinstance(p, DTensor) for p in weights.values()):
        errors = [error]
        dist.broadcast_object_list(errors)      # from rank 0, for which the others wait here
        error = errors[0]
    if error:
        raise error


def _gather_files(weights, dtypes, files, kept):
    """Yields (file, {name: whole tensor}); no tensors unless they are `kept`, on rank 0."""
    for file, names in files.items():
        tensors = {}
        for name in names:
            tensor = weights[name].detach().to(dtypes[name])
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()           # gathered on all ranks
            if kept:
                tensors[name] = tensor.contiguous().cpu()
        yield file, tensors


def _write_folder(folder, like, files, sizes, gathered):
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: holds weights already; name another folder to save in")

    # 1. The index first: while files that it names are missing, this is no model to anybody.
    with _naming(folder / INDEX):
        folder.mkdir(parents=True, exist_ok=True)
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    # 2. The weights. transformers 4.44 refuses files whose metadata do not name the format.
    for file, tensors in gathered:
        with _naming(folder / file):
            save_file(tensors, folder / file, metadata={"format": "pt"})
            shutil.copymode(folder / INDEX, folder / file)      # save_file lets only the owner read
        tensors.clear()                                         # before the next file is gathered

    # 3. Everything else.
    _copy_other_files(like, folder)


@contextmanager
def _naming(file):
    """OSError that names the file that is written, which a full disk's own error does not."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise OSError(f"{file}: cannot be written ({e})") from None


def _files_to_write(sizes, shard_bytes):
    """{file: names of its weights}: the weights in their order, in files of at most shard_bytes."""
    parts = [[]]
    used = 0
    for name, size in sizes.items():
        if used and used + size > shard_bytes:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    files = {}
    for number, names in enumerate(parts, 1):
        files[f"model-{number:05}-of-{len(parts):05}.safetensors"] = names
    return files


def _copy_other_files(source, target):
    for file in copied_files(source):
        copy = target / file.relative_to(source)
        with _naming(copy):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


# --- numbers to a device -------------------------------------------------------------------------

def to_device(numbers, device, dtype=None):
    """Numbers of the CPU, a list or a tensor, as a tensor of the device. A GPU takes them from
    pinned memory, so that nobody waits."""
    numbers = torch.as_tensor(numbers, dtype=dtype)
    if torch.device(device or "cpu").type not in ("cpu", "meta"):
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)
