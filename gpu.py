"""What only GPUs gain from. Without it a run is slower there, and different by rounding alone.

To be rid of it, delete this file, the calls in distributed.py, generate.py, score.py and
sampler.py, and the metric mfu in train.py.

    gpu.speed_up(model, torch.bfloat16)     # after load_model, if it computes on a GPU in bf16

model.py and sampler.py are plain PyTorch. On GPUs two things are worth replacing: attention, by
flash attention over sequences of different lengths in one call; and the launches of a decoding
step, by a CUDA graph. Measured on an H100 by benchmarks/gpu_day.py.

Be warned: which attention PyTorch may choose is a matter of the whole process.
"""
import re
from functools import partial

import torch

from model import Block, to_device


def speed_up(model, dtype, compiled=False):
    """Gives a Transformer that computes in `dtype` on a GPU the kernels of this file, where they
    can serve it, and turns cuDNN's attention off. With `compiled` torch.compile fuses what stands
    between the matrix products of a block: norms, rotary embedding, residuals, SwiGLU.

    cuDNN's is PyTorch's first choice on H100s. It builds a plan for every new shape, and every pair
    has new lengths: a step took six times as long (benchmarks/README.md).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if flash_serves(dtype, model.config.head_dim, model.device):
        model.attend_pairs = partial(
            flash_attend_pairs, device=model.device, window=model.config.window)
        model.decode_attention = flash_decode_attention
    if compiled:
        # Rows of all lengths and all blocks share the two graphs: compiled once, for any T.
        before = torch.compile(Block.before_attention, dynamic=True)
        after = torch.compile(Block.after_attention, dynamic=True)
        for block in model.model.layers:
            block.before_attention = partial(before, block)
            block.after_attention = partial(after, block)


def flash_serves(dtype, head_dim, device):
    """Whether the kernel takes it: 16 bits, heads of 8, 16, ... 256, a card since Ampere."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    half = dtype in (torch.bfloat16, torch.float16)
    return half and head_dim % 8 == 0 and head_dim <= 256


# --- attention ------------------------------------------------------------------------------------

def flash_attention(q, k, v, query_ends, key_ends, longest_query, longest_key, causal=True,
                    window=None, used=None):
    """Attention within each of n sequences that lie end to end, in one kernel (FlashAttention-2,
    arXiv 2307.08691). In causal order the last query sees the last key.

    q (Tq, H, D), k and v (Tk, K, D) -> (Tq, H, D)
    query_ends, key_ends: (n + 1,) int32, where sequences start and the last one ends.
    used: (n,) int32; of the keys of each sequence so many count, the first ones. Default: all.
    """
    # torch.nn.attention.varlen wraps this operator, but its arguments differ between 2.11 and 2.13.
    # HF's window of W tokens: a query itself and W - 1 before it.
    left = -1 if window is None else window - 1
    return torch.ops.aten._flash_attention_forward(
        q, k, v, query_ends, key_ends, longest_query, longest_key, 0.0, causal, False,
        window_size_left=left, window_size_right=0 if causal else -1, seqused_k=used)[0]


def flash_attend_pairs(lengths, device, window=None):
    """model.attend_pairs, by one call a layer for all pairs of a row.

    A pair is two sequences: prompt and chosen, and rejected. Their queries are the row as it is.
    The keys of rejected are its own behind a copy of the prompt's.
    """
    query_ends = [0]
    key_ends = [0]
    places = []                     # in the row, of each key
    longest_query = longest_key = 0
    for P, *responses in lengths:
        prompt = query_ends[-1]     # where it starts in the row
        for i, length in enumerate(responses or [0]):
            start = query_ends[-1]
            end = start + length
            if i == 0:              # the prompt's queries come with the first response
                end += P
            else:
                places += range(prompt, prompt + P)
            places += range(start, end)
            query_ends.append(end)
            key_ends.append(key_ends[-1] + P + length)
            longest_query = max(longest_query, end - start)
            longest_key = max(longest_key, P + length)
    query_ends = to_device(query_ends, device, torch.int32)
    key_ends = to_device(key_ends, device, torch.int32)
    places = to_device(places, device)

    def attend(layer, q, k, v):
        # The gradient of a prompt's key adds up from both places, whose order does not matter.
        keys = k.index_select(0, places)                                # (Tk, K, D)
        values = v.index_select(0, places)
        return flash_attention(
            q, keys, values, query_ends, key_ends, longest_query, longest_key, window=window)
    return attend


def flash_decode_attention(ends, shape, window=None):
    """sampler.decode_attention, without a mask and without waiting: shapes depend on n alone.

    The H/K heads that share a key head are H/K queries of one head, so that each key is read once.
    """
    n = len(ends)
    _, _, S, K, _ = shape
    counts = torch.arange(n + 1, dtype=torch.int32, device=ends.device)
    used = ends + 1                                                     # (n,) keys that are there
    starts = counts * S
    if window is not None:
        # The last `window` keys: a sequence starts later in its row of the cache.
        skipped = (used - window).clamp(min=0)
        used = used - skipped
        starts[:n] += skipped
    used = used.int()

    def read(q, keys, values):
        groups = q.shape[1] // K
        queries = q.unflatten(1, (K, groups)).transpose(1, 2).flatten(0, 1)     # (n H/K, K, D)
        out = flash_attention(
            queries, keys.flatten(0, 1), values.flatten(0, 1), counts * groups, starts, groups, S,
            causal=False, used=used)
        return out.unflatten(0, (n, groups)).transpose(1, 2).flatten(1, 2)      # (n, H, D)
    return read


# --- decoding -------------------------------------------------------------------------------------

class Captured:
    """A function of tensors with n rows each, as a CUDA graph: the GPU runs its kernels without
    waiting for a thousand launches by the CPU. It returns a tensor with n rows, which the next call
    overwrites.

    One graph for each power of two up to `rows`, made when it is needed. The rows that are too many
    hold zeros, so what the function does with them must not matter.
    """

    def __init__(self, function, rows, device):
        self.function = function
        self.rows = rows
        self.device = device
        self.inputs = None          # the graphs' own, (rows,) each
        self.graphs = {}            # {rows: (graph, its output)}
        self.memory = torch.cuda.graph_pool_handle()        # one for all: they take turns

    def __call__(self, *tensors):
        n = len(tensors[0])
        size = min(self.rows, 1 << (n - 1).bit_length())
        if self.inputs is None:
            self.inputs = [x.new_zeros(self.rows, *x.shape[1:]) for x in tensors]
        for x, given in zip(self.inputs, tensors):
            x[:n] = given
            x[n:size] = 0
        if size not in self.graphs:
            self.graphs[size] = self.capture([x[:size] for x in self.inputs])
        graph, out = self.graphs[size]
        graph.replay()
        return out[:n]

    def capture(self, inputs):
        # Once without a graph: libraries set themselves up at the first call.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            out = self.function(*inputs)
        return graph, out


# --- how fast -------------------------------------------------------------------------------------

# FLOP/s in bf16 without sparsity, of the makers' data sheets, by words of a device's name.
PEAKS = {
    "H100 PCIe": 756e12, "H800 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12,
    "GH200": 989e12, "H200": 989e12, "H20": 148e12, "B200": 2250e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "A10G": 70e12, "A10": 125e12}


def peak_flops(device):
    """What a GPU is made for, None if it is not among PEAKS."""
    name = torch.cuda.get_device_name(device)
    # Whole words: an RTX A1000 is no A100.
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)


def useful_flops(c, lengths):
    """FLOP of a step of a model with ModelConfig c that computes prompts once, logits of response
    tokens only, and causal attention. The backward pass is twice the forward pass."""
    block = c.dim * (2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 3 * c.hidden_dim)
    total = 0
    for P, C, R in lengths:
        seen = P * P / 2 + (P * C + C * C / 2) + (P * R + R * R / 2)    # pairs of query and key
        blocks = 2 * block * (P + C + R) + 4 * c.n_heads * c.head_dim * seen
        head = 2 * c.dim * c.vocab_size * (C + R)
        total += c.n_layers * blocks + head
    return 3 * total
