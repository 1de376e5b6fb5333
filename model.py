"""The Llama / Mistral transformer, read from and written to Hugging Face folders, scoring pairs in packed rows.

    model = load_model("Llama-3-8B-Instruct")             # fp32 weights, strict
    logits = model(token_ids)                             # (T,) -> (T, vocab)
    logps = model.response_logps(tokens, [(P, C, R)])     # a packed row of pairs -> log-probs of the response tokens
    save_model(model, "aligned", like="Llama-3-8B-Instruct")

Parameter names are Hugging Face's and RoPE splits each head in halves as theirs does, so the state dict IS the
safetensors file: no key table, no permutation. Covers Llama 2 and 3.x, Mistral (sliding window), Qwen2 (q/k/v bias)
and Qwen3 (norms on q and k); any other model or feature in config.json is an error. Needs torch and safetensors.

Axes: T tokens of a row, R response tokens of them, H heads, K key/value heads, D head_dim, dim width, V vocabulary.
A row is a plain (T,) sequence of tokens, several texts end to end. All layers but attention see tokens one by one, so
who sees whom is decided by one function, `attend(layer, q, k, v)`, and where a token stands by `positions`.
"""
import json
import math
import re
import shutil
import warnings
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
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

# The vocabulary head computes so many logits at once, as fp32: on CPUs 8 MiB, which their caches hold. It keeps so many of a
# pair for the backward pass, and computes the others again: on GPUs 1 GiB, 2,092 tokens at Llama-3's vocabulary.
BLOCK_LOGITS = {"cpu": 2**21, "gpu": 2**26}
KEPT_LOGITS = {"cpu": 2**25, "gpu": 2**28}

# PyTorch multiplies fp32 matrices on CPUs by MKL, at half the speed of oneDNN on AMD's with AVX-512. Its way to oneDNN is an
# operator of its compiler's.
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


# --- config -----------------------------------------------------------------------------------------------------------

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
    max_positions: int                  # the longest sequence the model was made for
    rope_scaling: dict | None = None    # Llama-3.1's: factor, low_freq_factor, high_freq_factor, original_max_...
    window: int | None = None           # a token sees itself and the window - 1 tokens before it; None: all
    tied: bool = False                  # the embedding is also the output projection; there is no lm_head
    qkv_bias: bool = False              # Qwen2
    qk_norm: bool = False               # Qwen3


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


def read_config(folder, others=()):
    """ModelConfig from `folder`/config.json, in the spelling of transformers 4 or 5. ValueError names the field.
    others: fields that the caller answers for."""
    path = model_folder(folder) / "config.json"
    if not path.exists():
        advice = [text for name, text in OTHER_FOLDERS.items() if (path.parent / name).exists()]
        raise ValueError(". ".join([f"{path}: not found; expected {MODEL_FILES}", *advice]))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found {raw!r:.60}")
    unread = dict(raw)

    def refuse(field, value, expected):
        raise ValueError(f"{path}: {field} = {value!r:.200} is not supported; expected {expected}. "
                         "model.py computes Llama, Mistral, Qwen2 and Qwen3 exactly or not at all")

    def take(field, default=None):
        value = unread.pop(field, None)
        return default if value is None else value

    def need(field, default=None):
        value = take(field, default)
        if value is None:
            raise ValueError(f"{path}: field {field} is missing")
        if not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{path}: {field} = {value!r}; expected a positive number")
        return value

    family = raw.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        refuse("model_type", family, "llama, mistral, qwen2 or qwen3")
    dim, n_heads = need("hidden_size"), need("num_attention_heads")

    # transformers 4: rope_theta and rope_scaling (whose type was once called "type"); transformers 5: rope_parameters.
    rope = {"rope_theta": take("rope_theta", 10000.0), **take("rope_scaling", {}), **take("rope_parameters", {})}
    rope_theta = float(rope.pop("rope_theta"))
    rope_type = [rope.pop(name, None) for name in ("type", "rope_type")]
    rope_type = rope_type[1] or rope_type[0] or "default"
    if rope_type not in ("default", "llama3"):
        refuse("rope type", rope_type, "default or llama3")
    expected = {"llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
                "default": set()}[rope_type]
    if set(rope) != expected:
        refuse(f"{rope_type} rope with fields", sorted(rope), f"{sorted(expected)}")

    window = None
    if family == "mistral" and unread.get("sliding_window", 4096) is not None:
        window = need("sliding_window", 4096)      # transformers' value where the field is absent; null is no window
    elif family.startswith("qwen"):
        if take("use_sliding_window", False):
            refuse("use_sliding_window", True, "false")
        take("sliding_window")                     # of no effect then
    layer_types = set(take("layer_types", [])) or {"sliding_attention" if window else "full_attention"}
    if layer_types != {"sliding_attention" if window else "full_attention"}:
        refuse("layer_types", sorted(layer_types), "the same attention in every layer")

    for field, only in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", False)):
        if (value := take(field, only)) != only:
            refuse(field, value, repr(only))
    config = ModelConfig(
        vocab_size=need("vocab_size"), dim=dim, n_layers=need("num_hidden_layers"), n_heads=n_heads,
        n_kv_heads=need("num_key_value_heads", n_heads if family == "llama" else None),
        head_dim=need("head_dim", None if family == "qwen3" else dim // n_heads), hidden_dim=need("intermediate_size"),
        norm_eps=need("rms_norm_eps"), rope_theta=rope_theta, max_positions=need("max_position_embeddings"),
        rope_scaling=rope or None, window=window,
        tied=take("tie_word_embeddings", False), qkv_bias=family == "qwen2", qk_norm=family == "qwen3")

    if take("quantization_config"):
        refuse("quantization_config", raw["quantization_config"],
               "weights that are not quantised: fetch the model that these were made from")
    for field, value in unread.items():
        if value and field not in IGNORED_FIELDS and field not in others:     # a null, false or empty one says nothing
            refuse(field, value, "no such field, or null, false or 0 (if it does not change the "
                   "computation, add it to IGNORED_FIELDS)")
    return config


# --- attention: who sees whom in a row --------------------------------------------------------------------------------

def causal_attention(q, k, v, window=None):
    """Plain causal attention of the last Tq tokens of a sequence of Tk. q (Tq, H, D), k and v (Tk, K, D) -> (Tq, H, D)"""
    Tq, Tk, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    window = Tk if window is None else window
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))                     # (1, H or K, T, D)
    if q.is_cuda and window >= Tk:                                             # flash kernels, no mask in memory
        mask = causal_lower_right(Tq, Tk) if Tq < Tk else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              enable_gqa=groups > 1)[0].transpose(0, 1)
    if q.is_cuda:                                                              # a mask with enable_gqa is slow there
        k, v, groups = *(x.repeat_interleave(groups, 1) for x in (k, v)), 1
    # On CPUs 128 queries at a time, against the keys that any of them sees: is_causal took 14 to 37 % longer.
    size, end, out = Tq if q.is_cuda else min(Tq, 128), Tk - Tq, []
    unseen = q.new_full((size, Tk), -torch.inf)
    mask = unseen.triu(Tk - size + 1) + unseen.tril(Tk - size - window)        # 0 for keys that a query sees
    for some in q.split(size, 2):                                              # (1, H, n, D)
        n = some.shape[2]
        end += n
        keys = slice(max(0, end - n + 1 - window), end)
        out.append(F.scaled_dot_product_attention(some, k[:, :, keys], v[:, :, keys], enable_gqa=groups > 1,
                                                  attn_mask=mask[-n:, keys.start - end:])[0].transpose(0, 1))
    return torch.cat(out)                                                      # (Tq, H, D)


def pair_attention(q, k, v, pairs, window=None):
    """Attention in a row of [prompt | chosen | rejected] pairs: each response sees the prompt and itself.

    Two causal calls a pair: prompt and chosen, and the queries of rejected against the keys of prompt and rejected. That
    repeats nothing but the prompt's keys and values, and on CPU it beat or equalled every other formulation tried.
    """
    sizes, out = [size for P, C, R in pairs for size in (P + C, R)], []
    # Split once: the gradient of a split is one concatenation, that of a slice a whole row of zeros.
    parts = zip(*(x.split(sizes) for x in (q, k, v)))                          # (q, k, v) of P+C, of R, of P+C, ...
    for (P, _, _), (q1, k1, v1), (q2, k2, v2) in zip(pairs, parts, parts):
        out.append(causal_attention(q1, k1, v1, window))
        out.append(causal_attention(q2, torch.cat((k1[:P], k2)), torch.cat((v1[:P], v2)), window))
    return torch.cat(out)                                                      # (T, H, D)


def pair_layout(pairs, device=None):
    """Where things stand in a row of pairs, given [(P, C, R), ...] lengths of prompt, chosen and rejected.

    Returns three int64 tensors: positions (T,), which restart for `rejected` where the prompt ended; predictors (R,),
    the row index of the token whose state predicts each response token (the last prompt token predicts the first of
    both responses); targets (R,), the row index of each response token. R runs chosen, rejected, pair after pair.
    """
    positions, predictors, targets, start = [], [], [], 0
    for P, C, R in pairs:
        positions += [*range(P + C), *range(P, P + R)]
        last, chosen_end = start + P - 1, start + P + C
        predictors += [*range(last, last + C), last, *range(chosen_end, chosen_end + R - 1)]
        targets += range(start + P, chosen_end + R)
        start = chosen_end + R
    return tuple(torch.tensor(x, device=device) for x in (positions, predictors, targets))


def rope_tables(positions, config):
    """cos and sin of the rotary angles, (T, 1, D/2) each, in fp32. Computed, never stored: nothing to load or shard."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    freq = 1.0 / config.rope_theta**exponent                                   # (D/2,)
    if s := config.rope_scaling:
        # Llama-3.1: wavelengths longer than the original context are stretched by `factor`, short ones kept, with a
        # ramp between.
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)   # in the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / s["factor"])
    angles = positions[:, None, None] * freq                                   # (T, 1, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates the two halves of each head against each other. (T, H, D) -> (T, H, D)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# --- matrix products --------------------------------------------------------------------------------------------------

def by_onednn(x):
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


def product(a, b):
    """a @ b.T, without gradient. (n, k), (m, k) -> (n, m)"""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "") if by_onednn(a) else a @ b.T


def outer(a, b):
    """a.T @ b, which is how gradients of weights come about. (n, m), (n, k) -> (m, k)"""
    if by_onednn(a) and a.shape[1] > b.shape[1]:
        return product(b.T, a.T).T              # the first is copied if it is a transpose: let that be the narrower one
    return product(a.T, b.T)


def add_outer(total, a, b):
    """total += a.T @ b"""
    return total.add_(outer(a, b)) if by_onednn(a) else total.addmm_(a.T, b)


class Product(torch.autograd.Function):
    """x @ weight.T by `product`, and its gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return product(grad, weight.T), outer(grad, x)


class Linear(nn.Linear):
    """nn.Linear, on CPUs by `product`."""

    def forward(self, x):
        if x.is_cuda:
            return super().forward(x)
        y = Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


# --- the transformer --------------------------------------------------------------------------------------------------

class SwiGLU(torch.autograd.Function):
    """(silu(gate) * up) @ down.T, with silu(gate) and the product computed again in the backward pass: of the four
    (T, hidden_dim) tensors of a block, the largest there are, two are kept. gate, up (T, hidden_dim) -> (T, dim)"""

    @staticmethod
    def forward(ctx, gate, up, down):
        ctx.save_for_backward(gate, up, down)
        return product(F.silu(gate).mul_(up), down)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up, down = ctx.saved_tensors
        silu = F.silu(gate)
        grad_down = outer(grad, silu * up)
        grad = product(grad, down.T)                                            # (T, hidden_dim)
        return torch.ops.aten.silu_backward(grad * up, gate), silu.mul_(grad), grad_down


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, as nn.RMSNorm. CUDA has a kernel for it; on CPUs PyTorch composes it
    of eight operations and keeps three tensors like x for the backward pass, NormByHand one."""

    def forward(self, x):
        return super().forward(x) if x.is_cuda else NormByHand.apply(x, self.weight, self.eps)


class NormByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1]).add_(eps).rsqrt_()        # 1 / rms(x)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale                                                       # x / rms(x), in fp32 at least
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad.to(unit.dtype), unit)[..., None] / x.shape[-1]
        return (grad - unit * along).mul_(scale).to(x.dtype), grad_weight.to(weight.dtype), None


class Embedding(nn.Embedding):
    """nn.Embedding, whose gradient on CPUs is added to weight.grad, if there is one, for the tokens at hand: PyTorch makes
    one of the whole vocabulary for every row of pairs, and adds that."""

    def forward(self, tokens):
        return super().forward(tokens) if tokens.is_cuda else RowsByHand.apply(self.weight, tokens)


class RowsByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, tokens):
        ctx.weight, ctx.tokens = weight, tokens
        return weight[tokens]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        total = ctx.weight.grad
        if total is None:
            return torch.zeros_like(ctx.weight).index_add_(0, ctx.tokens, grad), None
        total.index_add_(0, ctx.tokens, grad)
        return None, None


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend):
        T = x.shape[0]
        q = self.q_norm(self.q_proj(x).view(T, -1, self.head_dim))             # (T, H, D)
        k = self.k_norm(self.k_proj(x).view(T, -1, self.head_dim))             # (T, K, D)
        v = self.v_proj(x).view(T, -1, self.head_dim)                          # (T, K, D)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)              # (T, H, D)
        return self.o_proj(out.reshape(T, -1))                                 # (T, dim)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)                          # (T, hidden_dim)
        return SwiGLU.apply(gate, up, self.down_proj.weight)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend, recompute=False):
        # Recomputation is in here, and not around the block, so that sharding (FSDP2) wraps it and gathers weights once.
        if recompute:
            return checkpoint(self.compute, x, cos, sin, attend, use_reentrant=False)
        return self.compute(x, cos, sin, attend)

    def compute(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False          # recompute each block in the backward pass: less memory, a third more work
        self.compute_device = None      # where it computes, if not where its weights rest (CPU offload)
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(config.vocab_size, config.dim),
            "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "norm": RMSNorm(config.dim, config.norm_eps),
        })
        if not config.tied:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight   # (V, dim)

    @property
    def device(self):
        return self.compute_device or self.head_weight.device

    def states(self, tokens, positions, attend):
        """Final normed hidden states of a row. tokens and positions (T,) int64 -> (T, dim).

        attend(layer, q, k, v) -> (T, H, D) decides who sees whom; layer counts from 0.
        """
        x = self.model.embed_tokens(tokens)                                    # (T, dim)
        cos, sin = (table.to(x.dtype) for table in rope_tables(positions, self.config))
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, partial(attend, i), self.recompute and torch.is_grad_enabled())
        return self.model.norm(x)

    def forward(self, tokens):
        """Logits of one plain sequence, all V of them for every token: for checks, not for training. (T,) -> (T, V)"""
        attend = lambda layer, q, k, v: causal_attention(q, k, v, self.config.window)
        positions = torch.arange(len(tokens), device=tokens.device)
        return Product.apply(self.states(tokens, positions, attend), self.head_weight)

    def response_states(self, tokens, pairs):
        """The states that predict the response tokens of a packed row, and those tokens: (R, dim) and (R,) from (T,).

        The row holds [prompt | chosen | rejected] pair after pair, the prompt once; `pairs` lists their lengths
        (P, C, R), each at least 1.
        """
        positions, predictors, targets = pair_layout(pairs, tokens.device)
        attend = lambda layer, q, k, v: pair_attention(q, k, v, pairs, self.config.window)
        return self.states(tokens, positions, attend)[predictors], tokens[targets]

    def token_logps(self, states, targets):
        """Log-probs of target tokens, in fp32 at least. states (R, dim), targets (R,) -> (R,)"""
        return TargetLogps.apply(states, self.head_weight, targets)

    @torch.no_grad()
    def run_head(self, states, targets, sizes, loss, grad_scale=None):
        """Calls loss(i, log-probs) for groups of targets, of given sizes that add up to R: a number for the i-th group's
        log-probs (size,). states (R, dim), targets (R,).

        With grad_scale it also adds the gradient of grad_scale * (sum of losses) to the head weight's, and returns that of
        the states (R, dim), for states.backward. Log-probs and their gradient are computed a group after another, so that
        only one group's logits are kept at once; autograd would need a second gradient of the weight for that.
        """
        weight, grad_states, start = self.head_weight, torch.empty_like(states), 0
        if grad_scale is not None and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        for i, size in enumerate(sizes):
            group = slice(start, start + size)
            logps, *kept = _logps(states[group], weight, targets[group], keep=grad_scale is not None)
            if grad_scale is None:
                loss(i, logps)
            else:
                with torch.enable_grad():
                    (grad,) = torch.autograd.grad(grad_scale * loss(i, logps.requires_grad_()), logps)
                grad_states[group] = _logps_backward(grad, states[group], weight, targets[group], *kept, weight.grad)
            start, kept = start + size, None
        return None if grad_scale is None else grad_states

    def response_logps(self, tokens, pairs):
        """Log-probs of the response tokens of a packed row, as response_states lays them out. -> (R,)"""
        return self.token_logps(*self.response_states(tokens, pairs))


class TargetLogps(torch.autograd.Function):
    """log softmax(states @ weight.T)[target] with its gradient by hand, a block of the vocabulary after another.

    A log-prob is z[target] - logsumexp(z), in fp32 (of bf16 logits, if the states are bf16): at a 128k vocabulary and the
    logits of a trained model torch's own fp32 CPU log_softmax is off by 1e-5 a token, this by 2e-7.
    """

    @staticmethod
    def forward(ctx, states, weight, targets):
        logps, logsumexp, ctx.blocks = _logps(states, weight, targets, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(states, weight, targets, logsumexp)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_weight = torch.zeros_like(ctx.saved_tensors[1])
        blocks, ctx.blocks = ctx.blocks, [(None, largest) for _, largest in ctx.blocks]          # what is kept is overwritten
        return _logps_backward(grad, *ctx.saved_tensors, blocks, grad_weight), grad_weight, None


def _limit(logits, states):
    return logits["cpu" if states.device.type == "cpu" else "gpu"]


def _blocks(states, targets, weight):
    """The vocabulary in blocks of v whose logits, for all R states, are at most BLOCK_LOGITS: the block, its weight
    (v, dim), which targets are in it (R,), and their columns there (R, 1), 0 for the others."""
    size = max(1, _limit(BLOCK_LOGITS, states) // len(states))
    for start in range(0, len(weight), size):
        block = slice(start, min(start + size, len(weight)))
        here = (targets >= start) & (targets < block.stop)
        yield block, weight[block], here, torch.where(here, targets - start, 0)[:, None]


def _logits(states, weight):
    return product(states, weight).to(torch.promote_types(states.dtype, torch.float32))


def _logps(states, weight, targets, keep):
    """Log-probs of targets (R,), logsumexp of the logits (R, 1), and of each block exp(z - m) of its logits z (R, v) and m
    (R, 1), the largest logits so far. exp(z - m) is None unless asked for, and beyond KEPT_LOGITS in all."""
    blocks, room = [], _limit(KEPT_LOGITS, states) if keep else 0
    largest, total, target_z = -torch.inf, 0, 0
    for _, block, here, column in _blocks(states, targets, weight):
        z = _logits(states, block)
        target_z = target_z + torch.where(here[:, None], z.gather(1, column), 0)
        before, largest = largest, z.amax(-1, keepdim=True).clamp_(min=largest)
        z.sub_(largest).exp_()
        total = total * (before - largest).exp() + z.sum(-1, keepdim=True)
        room -= z.numel()
        blocks.append((z if room >= 0 else None, largest))
        del z                                                                  # free a block before making the next
    return (target_z - largest - total.log())[:, 0], largest + total.log(), blocks


def _logps_backward(grad, states, weight, targets, logsumexp, blocks, grad_weight):
    """Gradient of the states (R, dim) from that of the log-probs (R,); adds that of the weight to grad_weight. What was
    kept is overwritten."""
    grad_states, grad = torch.zeros_like(states, dtype=logsumexp.dtype), grad[:, None]
    for (exps, largest), (block, weight, here, column) in zip(blocks, _blocks(states, targets, weight)):
        if exps is None:
            exps = _logits(states, weight).sub_(largest).exp_()
        # d logp / d logits = onehot(target) - softmax(logits)
        grad_logits = exps.mul_(-grad * (largest - logsumexp).exp())           # (R, v)
        grad_logits.scatter_add_(1, column, torch.where(here[:, None], grad, 0))
        grad_logits = grad_logits.to(weight.dtype)
        grad_states += product(grad_logits, weight.T)
        add_outer(grad_weight[block], grad_logits, states)
        del exps, grad_logits
    return grad_states.to(states.dtype)


# --- Hugging Face folders ---------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"      # {"weight_map": {name of a weight: its file}}

# Everything in a model folder that is not weights, copied byte for byte.
COPIED_FILES = ("config.json", "generation_config.json", "tokenizer*", "original/tokenizer*",
                "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                "tekken.json", "chat_template*", "additional_chat_templates/*")

# What to do about folders that are no such model: see model_folder, weight_files and read_config.
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
        is_hub_id = re.fullmatch(r"[\w-]+/[\w.-]+", str(folder)) and not folder.parent.exists()
        local, hub = (folder.name, folder) if is_hub_id else (folder, f"ORGANISATION/{folder.name}")
        raise ValueError(HOW_TO_FETCH.format(local, hub, MODEL_FILES))
    refuse_pointers(file for pattern in COPIED_FILES for file in folder.glob(pattern))
    return folder


def refuse_pointers(files):
    """ValueError if one is what a git clone without LFS leaves in the place of a large file."""
    for file in filter(Path.is_file, files):
        with file.open("rb") as f:
            if f.read(len(POINTER)) == POINTER:
                raise ValueError(f"{file}: a Git LFS pointer in the place of the file; run "
                                 f"`git lfs pull` in {file.parent}, or fetch it by `hf download`")


def weight_files(folder):
    """The safetensors files that hold the model of a folder: those of the index, if there is one.
    Others may lie beside them: Mistral's consolidated.safetensors, an adapter, an older save."""
    index = folder / INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: expected a JSON object whose weight_map gives each weight "
                             "its file; fetch it again") from None
        if absent := [file.name for file in files if not file.exists()]:
            raise ValueError(f"{folder}: weights are missing; {INDEX} names files that are not "
                             f"there: {', '.join(absent)}. Fetch them, or the whole folder again")
        return files
    for pattern in ("model.safetensors", "model-*.safetensors", "*.safetensors"):
        if files := sorted(folder.glob(pattern)):
            return files
    if pickled := sorted(file.name for file in folder.glob("pytorch_model*.bin")):
        raise ValueError(HOW_TO_CONVERT.format(folder, ", ".join(pickled), MODEL_FILES))
    raise ValueError(f"{folder}: no *.safetensors files; expected {MODEL_FILES}. *.pth and *.gguf "
                     "are other layouts: fetch the model*.safetensors of the same model")


def checkpoint_tensors(folder):
    """{name: (shape, dtype, file name)} of a folder's weights, from the headers of its files."""
    folder, found = model_folder(folder), {}
    files = weight_files(folder)
    refuse_pointers(files)
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                header = {name: f.get_slice(name) for name in f.keys()}
                header = {name: (tuple(t.get_shape()), t.get_dtype()) for name, t in header.items()}
        except SafetensorError as e:
            raise ValueError(f"{file}: not a complete safetensors file ({e}); fetch it again") from None
        for name, (shape, dtype) in header.items():
            if name in found:
                raise ValueError(f"{folder}: weight {name} is both in {found[name][2]} and in "
                                 f"{file.name}; move the files of another model away")
            if dtype not in DTYPES:
                raise ValueError(f"{file}: weight {name} is stored as {dtype}; expected one of "
                                 f"{', '.join(DTYPES)} (quantised checkpoints cannot be trained)")
            found[name] = shape, DTYPES[dtype], file.name
    return found


def load_model(folder, dtype=torch.float32, device="cpu", shard=None, build=Transformer, others=()):
    """A Transformer with the weights of a Hugging Face folder, in `dtype` (fp32 for training: bf16 weights do not move
    at learning rate 1e-6). Every weight must be there, of the right shape and finite, and no other; else ValueError.

    shard: a function that is given the model while it is still without memory (on the meta device) and makes its
    parameters DTensors, as fully_shard does. Each rank then reads its own slices of the files, one tensor after another,
    and nobody holds the model. All ranks must call this together.
    build: makes the model from its ModelConfig, for one with another head; others as of read_config.
    """
    config, found = read_config(folder, others), checkpoint_tensors(folder)
    with torch.device("meta"):
        model = build(config).to(dtype)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}

    # Old Llama-2 files carry the rotary frequencies, which are derived; some tied models carry their embedding twice.
    extra = {name for name in found if not name.endswith("rotary_emb.inv_freq")} - set(expected)
    extra -= {"lm_head.weight"} if config.tied else set()
    if missing := set(expected) - set(found):
        read = sorted({file for _, _, file in found.values()})
        raise ValueError(f"{folder}: {len(missing)} weights are missing, {min(missing)} first, in "
                         f"{', '.join(read)}")
    if extra:
        raise ValueError(f"{folder}: {len(extra)} weights that the model of config.json does not have, {min(extra)} "
                         f"(in {found[min(extra)][2]}) first; move files of another format or model away")
    for name, shape in expected.items():
        if found[name][0] != shape:
            raise ValueError(f"{folder}/{found[name][2]}: {name} has shape {found[name][0]}; config.json asks for "
                             f"{shape}")

    if shard:
        shard(model)
    model.to_empty(device=device)
    tensors = model.state_dict()
    if config.tied and "lm_head.weight" in found:
        tensors["lm_head.weight"] = torch.empty_like(model.head_weight)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    files = {f"{folder}/{file}" for _, _, file in found.values()}
    reader.fs.ls = lambda _: files          # it would read every *.safetensors that is there
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")    # that there is one process is no news
        try:
            dcp.load(tensors, storage_reader=reader)
        except dcp.api.CheckpointException as e:
            raise ValueError(f"{folder}: its weights cannot be read ({e})") from None
    mine = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}     # this rank's slices
    for name, t in mine.items():
        if t.numel() and not torch.stack(t.aminmax()).isfinite().all():      # isfinite of it all would copy it twice
            raise ValueError(f"{folder}/{found[name][2]}: {name} holds NaN or infinite values")
    twin = mine.get("lm_head.weight") if config.tied else None
    if twin is not None and not torch.equal(twin, mine["model.embed_tokens.weight"]):
        raise ValueError(f"{folder}: config.json ties the output projection to the embedding, but "
                         f"{found['lm_head.weight'][2]} holds another lm_head.weight")
    return model


def save_model(model, folder, like, dtype=None, shard_bytes=5 * 10**9):
    """Writes `model` as a Hugging Face folder: safetensors of at most shard_bytes and an index, and
    config and tokenizer files as they are in the folder `like`. Weights are stored in `dtype`, by
    default in the one each has in `like` (usually bf16: a model loaded and saved is bit-equal).
    With another `dtype` config.json still names the one of `like`, and loaders that follow it, as
    transformers 5 and vLLM do, round to that unless they are told otherwise.

    All ranks of a sharded model must call this together: they gather one weight after another, and
    rank 0, which holds those of one file at a time, writes. OSError if it cannot.
    """
    folder, like = Path(folder), Path(like)
    stored, weights = checkpoint_tensors(like), model.state_dict()
    dtypes = {name: dtype or stored[name][1] for name in weights}
    sizes = {name: p.numel() * dtypes[name].itemsize for name, p in weights.items()}

    # 1. Which weights go into which file.
    parts, used = [[]], 0
    for name, size in sizes.items():
        if used and used + size > shard_bytes:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = dict(zip(names if len(parts) > 1 else ["model.safetensors"], parts))

    # 2. The index first: while files that it names are missing, this is no model to anybody.
    writing = not dist.is_initialized() or dist.get_rank() == 0
    if writing:
        if any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder}: holds weights already; name another folder to save in")
        folder.mkdir(parents=True, exist_ok=True)
        weight_map = {name: file for file, part in files.items() for name in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    # 3. The weights. transformers 4.44 refuses files whose metadata do not name the format.
    for file, part in files.items():
        tensors = {}
        for name in part:
            t = weights[name].detach().to(dtypes[name])
            t = t.full_tensor() if isinstance(t, DTensor) else t
            if writing:
                tensors[name] = t.contiguous().cpu()
        if writing:
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as e:
                raise OSError(f"{folder / file}: cannot be written ({e})") from None
            shutil.copymode(folder / INDEX, folder / file)      # save_file lets only the owner read

    # 4. Everything else.
    for pattern in COPIED_FILES if writing else ():
        for file in filter(Path.is_file, like.glob(pattern)):
            target = folder / file.relative_to(like)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    if any(isinstance(p, DTensor) for p in weights.values()):
        dist.barrier()
