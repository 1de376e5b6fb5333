"""What only CPUs gain from. Without it a run is slower there, and different by rounding alone.

To be rid of it, delete this file and the calls in distributed.py, generate.py and score.py.
(benchmarks/ and experiments/ call it as well.)

    cpu.speed_up(model)         # if it computes on a CPU; before fully_shard

model.py is plain PyTorch, whose kernels are made for GPUs first. On CPUs four of them are worth
replacing: matrix products, attention, RMSNorm, and the gradient of the embedding; and memory that
is freed is worth keeping. Results change by rounding alone.

Be warned: matrix products and freed memory are a matter of the whole process, and the gradient of
the embedding is written behind autograd's back. Do not copy this file into a project that trains in
another way.
"""
import ctypes
import warnings
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

QUERIES = 128       # that attention computes at a time

_library = None     # holds our kernels of PyTorch's operators, which last as long as it does


def speed_up(model):
    """Gives a Transformer the kernels of this file, and this process its matrix products."""
    for module in model.modules():
        # Subclasses without state of their own: parameters and their names stay as they are.
        if type(module) is nn.RMSNorm:
            module.__class__ = RMSNorm
        if type(module) is nn.Embedding:
            module.__class__ = Embedding
    model.causal_attention = partial(blocked_attention, window=model.config.window)
    multiply_by_onednn()
    keep_freed_memory()


# --- matrix products ------------------------------------------------------------------------------

def has_fast_onednn():
    """Whether oneDNN multiplies fp32 matrices faster than MKL, which PyTorch takes.

    Measured on AMD's CPUs: with AVX-512 twice as fast, without it a tenth slower. Others were
    not measured.
    """
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return avx512 and torch.backends.mkldnn.is_available()


def multiply_by_onednn():
    """Registers kernels for a @ b and total.addmm_(a, b) on CPUs, in all of this process."""
    global _library
    if _library or not has_fast_onednn():
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # "Overriding a previously registered kernel"
        _library.impl("mm", _mm, "CPU")
        _library.impl("addmm_", _addmm_, "CPU")


def _mm(a, b):
    """a @ b: by oneDNN in fp32, else by PyTorch. (n, k), (k, m) -> (n, m)"""
    fits = a.shape[1] == b.shape[0] and a.numel() > 0 and b.numel() > 0
    if not fits or a.dtype != torch.float32 or b.dtype != torch.float32:
        out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype)
        return torch.mm(a, b, out=out)          # an operator of its own, which is not ours
    if not b.is_contiguous() and not b.T.is_contiguous():
        b = b.contiguous()                      # oneDNN would take a hundred times as long
    # In gradients of weights the first matrix is a transpose, which oneDNN copies. Let it copy the
    # narrower one: (a @ b).T = b.T @ a.T
    if not a.is_contiguous() and a.shape[0] > b.shape[1]:
        return _product(b.T, a).T
    return _product(a, b.T)


def _addmm_(total, a, b, *, beta=1, alpha=1):
    """total = beta * total + alpha * a @ b, in place."""
    if total.dtype == torch.float32 and beta in (0, 1) and alpha == 1:
        product = _mm(a, b)
        return total.add_(product) if beta else total.copy_(product)
    return torch.addmm(total, a, b, beta=beta, alpha=alpha, out=total)


def _product(a, b):
    """a @ b.T by oneDNN. (n, k), (m, k) -> (n, m)

    In eager mode the only way there is a private operator of torch.compile's.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


# --- attention ------------------------------------------------------------------------------------

def blocked_attention(q, k, v, window=None):
    """model.causal_attention, QUERIES queries at a time against the keys that any of them sees.

    PyTorch's is_causal took 14 to 37 % longer, and whole masks grow with the square of the text.
    q (Tq, H, D), k and v (Tk, K, D) -> (Tq, H, D)
    """
    Tq, Tk = q.shape[0], k.shape[0]
    groups = q.shape[1] // k.shape[1]
    window = Tk if window is None else window
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))                      # (1, H or K, T, D)

    # One mask serves all blocks, of the last queries of the text; other blocks take a part of it.
    size = min(Tq, QUERIES)
    unseen = q.new_full((size, Tk), -torch.inf)
    mask = unseen.triu(Tk - size + 1) + unseen.tril(Tk - size - window)         # 0 for seen keys
    out = []
    end = Tk - Tq                               # of the keys that the block's last query sees
    for block in q.split(size, 2):                                              # (1, H, n, D)
        n = block.shape[2]
        end += n
        keys = slice(max(0, end - n + 1 - window), end)
        attended = F.scaled_dot_product_attention(
            block, k[:, :, keys], v[:, :, keys], attn_mask=mask[-n:, keys.start - end:],
            enable_gqa=groups > 1)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)                                                       # (Tq, H, D)


# --- norm and embedding ---------------------------------------------------------------------------

class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight. PyTorch composes it of eight operations on CPUs and keeps three tensors
    like x for the backward pass; this one keeps x."""

    def forward(self, x):
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()                                  # 1 / rms(x)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale                                            # x / rms(x), in fp32 at least
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * weight
        # The part of the gradient along x changes nothing: the norm divides it out.
        along = torch.linalg.vecdot(grad.to(unit.dtype), unit)[..., None] / x.shape[-1]
        grad_x = (grad - unit * along).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class Embedding(nn.Embedding):
    """nn.Embedding whose gradient is added to weight.grad, if there is one, in the rows of its
    tokens. PyTorch makes a gradient of the whole vocabulary for every row of pairs and adds that.

    So torch.autograd.grad does not work with it once weight.grad is there.
    """

    def forward(self, tokens):
        return _Embedding.apply(self.weight, tokens)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, tokens):
        ctx.weight = weight
        ctx.tokens = tokens
        return weight[tokens]                                                   # (T, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        total = ctx.weight.grad
        if total is None:
            return torch.zeros_like(ctx.weight).index_add_(0, ctx.tokens, grad), None
        total.index_add_(0, ctx.tokens, grad)
        return None, None


# --- memory ---------------------------------------------------------------------------------------

def keep_freed_memory():
    """Keeps freed memory in this process. glibc otherwise hands every large tensor back and gets
    the next one from the kernel anew, page by page, which takes a tenth of a step's time. Does
    nothing where the C library is another one."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                 # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)         # M_TRIM_THRESHOLD: so much stays when it is free
