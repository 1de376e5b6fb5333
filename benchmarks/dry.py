"""What a GPU would be asked to do, op by op, without one: a dry run of train.py's own step.

    python -m benchmarks.dry --model Llama-3-8B --gpus 8            # a minute on one core
    python -m benchmarks.dry --model models/mine --gpus 64 --recompute --tokens 4096
    python -m benchmarks.dry --model Llama-3-8B --decode 64         # sampling, 64 answers at a time
    python -m benchmarks.dry --check                # plan.py against it: benchmarks/dry.json

--model is a folder with a config.json, or one of shapes.py. Tensors are PyTorch's FakeTensors: they
have a shape, a dtype and a device, and no numbers. Ranks are a fake process group, in which this
process is rank 0. The device is a stand-in, registered as PrivateUse1, that passes for CUDA. So the
project's code runs as it would on a GPU, and what is seen of it is exact: kernels and their dtypes,
which kernel attention takes, where the host waits for the device, copies between the two,
collective operations, bytes alive on the device. Not seen are workspaces inside kernels, what the
allocator loses between blocks, and NCCL's buffers.

The time is a prediction: every kernel takes what its work or its bytes take at the rates below,
whichever is longer, and collective operations hide behind the blocks where FSDP has them overlap.
On one H100 steps took 4 % longer (benchmarks/README.md); of several GPUs nothing was measured.

It takes a process of its own, because it changes PyTorch (stand_in_for_cuda).
"""
import argparse
import contextlib
import json
import math
import os
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import distributed
import gpu
import plan
import score
import train
from benchmarks.lengths import pair_lengths
from benchmarks.shapes import SHAPES, config_of
from benchmarks.workers import machine
from command import run_command
from data.files import check_output, write_whole
from data.preference import PreferencePair
from model import Transformer
from sampler import generate

# Rates of an H100 (SXM), set to what its kernels reached in a step of benchmarks/gpu.json ("kept").
# Alone, a product of 8,192 reached 782e12 there and a copy 3.0e12.
MATMUL_RATE = 750e12        # FLOP/s in bf16
ATTENTION_RATE = 130e12     # FLOP/s of the causal half, forward and backward, at 1,000 tokens
MEMORY_RATE = 2.8e12        # bytes/s read and written by copies and AdamW
ELEMENT_RATE = 2.35e12      # ... by what is done element by element, of mixed dtypes too
NODE_RATE = 300e9           # bytes/s of a GPU to the others of its node
NETWORK_RATE = 50e9         # bytes/s of a GPU to other nodes
SHORTEST_KERNEL = 2e-6      # seconds
LAUNCH = 5e-6               # seconds of the host for each kernel
PEAK = 989e12               # FLOP/s in bf16, what MFU is a share of
GPUS_OF_A_NODE = 8

WIDE = 1000                 # elements: from here on float64 costs


# --- the device -----------------------------------------------------------------------------------

class Nothing:
    """Streams and events: whatever is asked of them, they do nothing."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: Nothing()


class Backend(Nothing):
    """What torch.cuda is to CUDA."""
    Stream = Event = Nothing

    def current_device(self):
        return 0

    def device_count(self):
        return GPUS_OF_A_NODE

    def is_available(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def stream(self, _):
        return contextlib.nullcontext()

    device = stream

    def get_rng_state(self, *_):
        Recorder.active.seen.rng_reads += 1
        return torch.empty(16, dtype=torch.uint8)


class GPU:
    """The stand-in."""
    device = None
    library = None


def on_gpu(t):
    return isinstance(t, FakeTensor) and t.device.type == "dry"


def stand_in_for_cuda():
    """Registers the device and changes PyTorch so that it passes for CUDA: the only place that
    does. For the rest of the process. Returns the device."""
    if GPU.device is not None:
        return GPU.device
    _setup_privateuseone_for_python_backend("dry", Backend())
    GPU.device = torch.device("dry", 0)

    # FakeTensor asks for the numbers one by one; a GPU copies all at once, and the host waits.
    FakeTensor.tolist = _tolist
    # A mode is left while it handles Tensor.backward; recomputation needs it (Functions).
    torch.autograd._engine_run_backward = _inside_functions(torch.autograd._engine_run_backward)
    # FSDP and checkpoint free and fill the storages of gathered weights by this.
    torch.UntypedStorage.resize_ = _resize
    # DTensor finds out shapes by running each op once more, on tensors of the whole shape: no GPU
    # sees those.
    ShardingPropagator._propagate_tensor_meta_non_cached = _unseen(
        ShardingPropagator._propagate_tensor_meta_non_cached)
    # A graph of kernels runs the same kernels.
    gpu.Captured = lambda function, rows, device: function
    # The mesh is made of real numbers, of the CPU.
    distributed.device_mesh = _without_fakes(distributed.device_mesh)
    # CUDA has a kernel of its own for these, where a device without one runs their formulas. It is
    # never called: FakeTensor knows what comes of the op.
    library = torch.library.Library("aten", "IMPL")
    for op in ("silu_backward", "_fused_rms_norm"):
        library.impl(op, _no_kernel, "PrivateUse1")
    GPU.library = library           # what it registers ends with it
    return GPU.device


def _no_kernel(*_, **__):
    raise NotImplementedError("the stand-in computes nothing")


def _tolist(t):
    if on_gpu(t):
        Recorder.active.wait("tolist")

    def zeros(shape):
        return [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0
    return zeros(tuple(t.shape))


_whole_resize = torch.UntypedStorage.resize_


def _resize(storage, size):
    made = _whole_resize(storage, size)
    if Recorder.active:
        Recorder.active.resized(storage)
    return made


def _unseen(function):
    def call(*args):
        if Recorder.active is None:
            return function(*args)
        with Recorder.active.paused():
            return function(*args)
    return call


def _inside_functions(function):
    def call(*args, **kwargs):
        if Recorder.active is None:
            return function(*args, **kwargs)
        with Functions():
            return function(*args, **kwargs)
    return call


def _without_fakes(function):
    def call(*args):
        with unset_fake_temporarily():
            return function(*args)
    return call


class Functions(TorchFunctionMode):
    """What PyTorch decides by the device before any op is seen, decided as for CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            device = kwargs.pop("device", None)
            return from_list(func(*args, **kwargs), args[0], device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and on_gpu(args[0]):
            # An index that is a list becomes a tensor on the host, then travels.
            if isinstance(args[1], list):
                index = torch.tensor(args[1], dtype=torch.long)
                args = (args[0], from_list(index, args[1], GPU.device), *args[2:])
        elif func is torch.Tensor.is_cuda.__get__ and on_gpu(args[0]):
            return True
        elif func is torch.Tensor.pin_memory:
            return args[0]                              # pages of the host, which have no fakes
        elif func is F.scaled_dot_product_attention and on_gpu(args[0]):
            raise NotImplementedError("attention that is not gpu.py's: its kernel is PyTorch's "
                                      "choice, and not known here")
        return func(*args, **kwargs)


def from_list(t, numbers, device):
    """What torch.tensor makes, which remembers the numbers it is made of. It is made on the host:
    PyTorch would make it on a device that is not there."""
    if isinstance(t, FakeTensor):
        t.constant = None               # else ops on it are computed for real
        t.numbers = numbers
    return t if device is None else t.to(device)


# --- what is seen ---------------------------------------------------------------------------------

# Ops that launch nothing, beside views.
HOST_OPS = set("""
    empty empty_like empty_strided new_empty new_empty_strided detach lift_fresh alias _unsafe_view
    set_ resize_ is_same_size record_stream device sym_size sym_stride sym_numel
    sym_storage_offset _local_scalar_dense is_pinned wait_tensor
""".split())
MATMULS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
WRITES_ONLY = {"copy_", "_foreach_copy_", "zero_", "fill_", "zeros_like", "ones_like", "new_zeros",
               "full_like"}
PICKS = {"index", "gather", "embedding", "index_select"}            # read what they return
SCATTERS = {"index_put_", "scatter_add_", "index_add_", "scatter_"}     # touch a part of self
# Sums over many numbers (addmm: the head's gradients), and functions whose rounding shows: fp32 at
# least.
EXACT = {"addmm", "sum", "mean", "amax", "linalg_vector_norm", "_foreach_norm", "cumsum",
         "_softmax", "logsumexp", "cos", "sin", "exp", "exp_", "log"}
GATHERS = {"_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"}
REDUCTIONS = {"_reduce_scatter_base_", "reduce_scatter_", "allreduce_"}
# Ops of more than one kernel: key heads are summed; weights are on their own; two sort.
LAUNCHES = {"_flash_attention_backward": 5, "_fused_rms_norm_backward": 2,
            "embedding_dense_backward": 10, "index_put": 10}
COPIES = {"_to_copy", "copy_", "clone", "cat", "chunk_cat", "all_gather_copy_in",
          "split_with_sizes_copy"}
CHUNK = 65536               # elements a block of a foreach kernel takes; a launch has 320 blocks
PHASES = ("layers, forward", "head", "layers, backward", "optimiser")

def kernel_seconds(kind, flops, size, launches):
    """The time of its work or of its bytes, whichever is longer."""
    rate = {"matmul": MATMUL_RATE, "attention": ATTENTION_RATE}.get(kind, math.inf)
    memory = ELEMENT_RATE if kind == "element by element" else MEMORY_RATE
    return max(flops / rate, size / memory, launches * SHORTEST_KERNEL)


@dataclass
class Collective:
    name: str
    dtype: str
    bytes: int              # of the whole: what is gathered, or what is reduced
    ranks: int


@dataclass
class Seen:
    """Counts of one dry run. Kinds of kernels, as in gpu_day.py: matmul, attention, element by
    element, copies, optimiser."""
    kernels: Counter = field(default_factory=Counter)       # kind -> launches
    ops: Counter = field(default_factory=Counter)           # name -> launches
    flops: Counter = field(default_factory=Counter)         # kind -> FLOPs
    bytes: Counter = field(default_factory=Counter)         # kind -> bytes read and written
    op_bytes: Counter = field(default_factory=Counter)      # name -> the same
    seconds: Counter = field(default_factory=Counter)       # kind -> seconds, predicted
    products: Counter = field(default_factory=Counter)      # dtypes that matmuls and attention read
    odd: Counter = field(default_factory=Counter)           # matmuls to rows of no multiple of 8
    exact: Counter = field(default_factory=Counter)         # (op of EXACT, dtype that it returns)
    optimiser: Counter = field(default_factory=Counter)     # dtypes of what AdamW reads and writes
    wide: Counter = field(default_factory=Counter)          # ops with float64 -> most elements
    attention: Counter = field(default_factory=Counter)     # the kernel that attention takes
    waits: Counter = field(default_factory=Counter)         # what the host waits for
    copies: Counter = field(default_factory=Counter)        # (direction, blocking) -> copies
    copied: Counter = field(default_factory=Counter)        # direction -> bytes
    collectives: list = field(default_factory=list)
    rng_reads: int = 0          # of the state of the random generator: time of the host


class Recorder(TorchDispatchMode):
    """Sees every op on the device, and the bytes alive there."""
    active = None           # the one that is entered

    def __init__(self, yes=True):
        """yes: what a bool on the device is, if the host asks."""
        super().__init__()
        self.yes = yes
        self.phase = PHASES[-1]
        self.block = 0              # weights of a block, where ranks exchange them
        self.sizes = {}             # bytes of each storage alive, by its address
        self.refs = {}
        self.alive = 0
        self._paused = 0
        self.restart()

    def restart(self):
        """Forgets the counts, not what is alive."""
        self.seen = Seen()
        self.peak = self.alive
        self.at_start = self.alive
        self.phase_peaks = Counter()

    def __enter__(self):
        Recorder.active = self
        return super().__enter__()

    def __exit__(self, *args):
        Recorder.active = None
        return super().__exit__(*args)

    @contextlib.contextmanager
    def paused(self):
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def wait(self, name):
        self.seen.waits[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # DTensor takes its ops apart first; what it makes of them comes here again.
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]

        # 1. What depends on the numbers: the host waits for them, and gets some.
        if name == "_local_scalar_dense":
            (t,) = args
            if on_gpu(t):
                self.wait("item")
            return self.yes if t.dtype == torch.bool else t.dtype.is_floating_point * 1.0 or 1
        if name == "nonzero" and on_gpu(args[0]):
            self.wait("nonzero")
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        if name == "index" and on_gpu(args[0]):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if masks:
                self.wait("nonzero")
                return args[0].new_empty((0, *args[0].shape[masks[0].dim():]))

        out = func(*args, **kwargs)

        # 2. Who reads and who writes, by the op's own schema.
        read, written = _operands(func, args, kwargs, out)
        tensors = read + written
        if func.namespace == "prim" or not any(map(on_gpu, tensors)):
            return out
        for t in written:
            self.made(t)
        if name in HOST_OPS or func.is_view:
            return out
        for t in tensors:
            if t.dtype == torch.float64 and t.numel() > WIDE:
                self.seen.wide[name] = max(self.seen.wide[name], t.numel())
        self.count(func, name, args, kwargs, read, written)
        if name in ("_to_copy", "copy_", "clone"):
            for t in read:
                if hasattr(t, "numbers"):
                    written[0].numbers = t.numbers
        return out

    def count(self, func, name, args, kwargs, read, written):
        """Counts one op that launches."""
        # 1. Copies between host and device.
        if name in ("_to_copy", "copy_") and len({t.device.type for t in read + written}) > 1:
            direction = "to the device" if on_gpu(written[0]) else "to the host"
            at = 2 if name == "copy_" else 9
            blocking = not kwargs.get("non_blocking", args[at] if len(args) > at else False)
            self.seen.copies[direction, "blocking" if blocking else "not blocking"] += 1
            self.seen.copied[direction] += sum(map(_bytes, written))
            if blocking and direction == "to the host":
                self.wait("copy")
            return

        # 2. Collective operations.
        if func.namespace in ("c10d", "_c10d_functional"):
            whole = max(map(_bytes, read + written))
            self.seen.collectives.append(
                Collective(name, _short(read[-1].dtype), whole, _group_size(args, kwargs)))
            return

        # 3. Kernels.
        kind = "element by element"
        flops = 0
        launches = LAUNCHES.get(name, 1)
        if name in MATMULS:
            kind = "matmul"
            a, b = [t for t in read if t.dim() >= 2][-2:]
            flops = 2 * math.prod(a.shape) * b.shape[-1]
            self.seen.products.update(_short(t.dtype) for t in (a, b))
            self.seen.odd[name] += b.shape[-1] % 8 > 0
        elif "attention" in name:
            kind = "attention"
            flops = attention_flops(func, args, kwargs)
            self.seen.attention[name] += 1
            self.seen.products.update(_short(t.dtype) for t in args[:3])
        elif name in COPIES:
            kind = "copies"
        elif name.startswith(("_foreach", "_fused_adam")):      # clipping and FSDP's casts too
            kind = "optimiser"
            elements = sum(t.numel() for t in {id(t): t for t in written}.values())
            launches = max(1, math.ceil(elements / CHUNK / 320))
            if name == "_fused_adamw_":
                self.seen.optimiser.update(_short(t.dtype) for t in read + written if on_gpu(t))
        if name in EXACT:
            self.seen.exact.update((name, _short(t.dtype)) for t in written)
        size = _traffic(name, read, written, kwargs)
        self.seen.kernels[kind] += launches
        self.seen.ops[name] += launches
        self.seen.flops[kind] += flops
        self.seen.bytes[kind] += size
        self.seen.op_bytes[name] += size
        self.seen.seconds[kind] += kernel_seconds(kind, flops, size, launches)

    # Bytes alive: a storage counts from the op that makes it until Python or autograd lets it go.
    def made(self, t):
        if not on_gpu(t):
            return
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            self.refs[key] = weakref.ref(storage, lambda _: self.freed(key))
            self.resized(storage)

    def freed(self, key):
        self.alive -= self.sizes.pop(key)
        del self.refs[key]

    def resized(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            return
        size = storage.nbytes()
        self.alive += size - self.sizes[key]
        self.sizes[key] = size
        self.peak = max(self.peak, self.alive)
        self.phase_peaks[self.phase] = max(self.phase_peaks[self.phase], self.alive)


def _operands(func, args, kwargs, out):
    """(tensors that an op reads, tensors that it writes)"""
    read = []
    written = []
    values = [*zip(func._schema.arguments, args)]
    values += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    for argument, value in values:
        tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += tensors
        if not writes or not argument.is_out and argument.name != "out":
            read += tensors
    if not written:
        written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    return read, written


def _group_size(args, kwargs):
    for a in tree_leaves((args, kwargs)):
        if isinstance(a, torch.ScriptObject):
            return dist.ProcessGroup.unbox(a).size()
    return dist.get_world_size()


def _bytes(t):
    """Bytes of a tensor in memory: along an axis that is expanded they are read once."""
    return t.itemsize * math.prod(n for n, s in zip(t.shape, t.stride()) if s)


def _traffic(name, read, written, kwargs):
    if name == "all_gather_copy_in":
        # It returns the buffer that all ranks' shards are gathered in, but fills this rank's alone.
        return 2 * _bytes(written[0])
    if name in WRITES_ONLY or kwargs.get("beta") == 0:
        read = [t for t in read if all(t is not w for w in written)]
    if name in ("zeros_like", "ones_like", "new_zeros", "full_like"):
        read = []
    if name in PICKS:
        return 2 * sum(map(_bytes, written))
    if name in SCATTERS:
        return 3 * sum(_bytes(t) for t in read if all(t is not w for w in written))
    return sum(map(_bytes, read)) + sum(map(_bytes, written))


def _short(dtype):
    return str(dtype).removeprefix("torch.")


def attention_flops(func, args, kwargs):
    """FLOPs of flash attention in sequences that lie end to end, masked places left out."""
    values = {a.name: v for a, v in zip(func._schema.arguments, args)} | kwargs
    q = values["query"]                                                         # (T, H, D)
    starts = values["cum_seq_q"]
    n = len(starts) - 1
    window = values.get("window_size_left")
    # Without the query itself; -1 is no limit.
    window = None if window in (None, -1) else window + 1
    # Where each sequence starts was a list once; if it is not known any more, all are alike.
    lengths = zip(_sizes(starts, len(q), n), _sizes(values["cum_seq_k"], len(values["key"]), n))
    seen = sum(_seen_keys(Tq, Tk, values["is_causal"], window) for Tq, Tk in lengths)
    return (10 if "backward" in func._schema.name else 4) * q.shape[1] * q.shape[2] * seen


def _sizes(starts, total, n):
    if hasattr(starts, "numbers"):
        return np.diff(starts.numbers).tolist()
    return [total / n] * n


def _seen_keys(Tq, Tk, causal, window):
    """Pairs of a query and a key that it sees; queries are the last Tq of Tk tokens."""
    if not causal:
        return Tq * Tk
    seen = Tq * (Tk - Tq / 2)
    if window is not None and window < Tk:
        hidden = Tk - window
        full = max(0, hidden - Tq)          # queries before the first that hides anything
        seen -= (hidden**2 - full**2) / 2
    return seen


# --- jobs -----------------------------------------------------------------------------------------

def config_for(**fields):
    return train.resolve_config(train.TrainConfig(
        model="-", data=["-"], compute_dtype="bfloat16", **fields))


def pairs_of(lengths, ref_logps=None):
    """PreferencePairs of these (prompt, chosen, rejected) lengths; their tokens do not matter."""
    pairs = []
    for P, C, R in lengths:
        parts = [np.zeros(n, np.int32) for n in (P, C, R)]
        pairs.append(PreferencePair(*parts, ""))
        pairs[-1].ref_logps = ref_logps
    return pairs


def join_fake_ranks(gpus, node=GPUS_OF_A_NODE):
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ["LOCAL_WORLD_SIZE"] = str(min(node, gpus))
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())


@contextlib.contextmanager
def recording(yes=True):
    """Everything inside runs on fakes; yields the Recorder."""
    device = stand_in_for_cuda()
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes, Recorder(yes) as recorder, Functions():
        recorder.device = device
        yield recorder


def model_on_gpu(c, config, recorder):
    """The Transformer of load_sharded, without its numbers."""
    def load_model(_, dtype, device, shard):
        with torch.device("meta"):
            model = Transformer(c)
        shard(model)
        return model.to_empty(device=device)

    with mock.patch.object(distributed, "load_model", load_model):
        return distributed.load_sharded(config, recorder.device)


def in_bf16(build, recorder):
    """A whole model with bf16 weights on the device, as for sampling and scoring."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with recorder.device:
            model = build()
    finally:
        torch.set_default_dtype(torch.float32)
    gpu.speed_up(model, torch.bfloat16)
    return model


def noting_phases(recorder, model):
    """Notes which part of a step is at work, so that each has a peak of its own."""
    def enter(phase, function, then=None):
        def call(*args, **kwargs):
            recorder.phase = phase
            made = function(*args, **kwargs)
            recorder.phase = then or phase
            return made
        return call

    patches = contextlib.ExitStack()
    forward, head, backward, optimiser = PHASES
    for owner, name, phase, then in (
            (model, "response_states", forward, None), (train, "head_and_loss", head, backward),
            (train, "clip_gradients", optimiser, None)):
        whole = getattr(owner, name)
        patches.enter_context(mock.patch.object(owner, name, enter(phase, whole, then)))
    return patches


def dry_step(c, config, pairs, gpus, node=GPUS_OF_A_NODE):
    """The Recorder of a whole step of train.py on rank 0 of `gpus`, on these pairs."""
    join_fake_ranks(gpus, node)
    with recording() as recorder:
        model = model_on_gpu(c, config, recorder)
        optimizer = train.make_optimizer(model, config)
        recorder.restart()
        with noting_phases(recorder, model):
            outcome = train.train_step(model, optimizer, pairs, 1e-6, config)
        recorder.rows = len(outcome.rows) // gpus
        _, recorder.block = plan.count_weights(c)
        recorder.left = recorder.alive - recorder.at_start
    return recorder


def dry_score(c, config, pairs, gpus):
    """The Recorder of train.score_pairs on these pairs: an evaluation, or DPO's reference."""
    join_fake_ranks(gpus)
    with recording() as recorder:
        model = model_on_gpu(c, config, recorder)
        recorder.restart()
        train.score_pairs(model, pairs, config)
        recorder.left = recorder.alive - recorder.at_start
    return recorder


def dry_rewards(c, prompt, answers):
    """The Recorder of a reward model in bf16 that scores answers of these lengths."""
    join_fake_ranks(1)
    with recording() as recorder:
        model = in_bf16(lambda: score.ScalarReward(c, {}), recorder)
        model.score.weight.data = model.score.weight.data.float()
        recorder.restart()
        score.rewards(model, [1] * prompt, [[1] * n for n in answers])
    return recorder


def dry_sample(c, batch, prompt=1000, new_tokens=4, **settings):
    """The Recorder of sampling `batch` answers to prompts of as many tokens, in bf16. `prefill` is
    what was Seen in the first step, `seen` that of the last, which decodes alone."""
    join_fake_ranks(1)
    with recording(yes=False) as recorder:
        model = in_bf16(lambda: Transformer(c), recorder)
        recorder.restart()
        steps = []

        def note(*_):
            steps.append(recorder.seen)
            recorder.restart()

        generate(
            model, [[1] * prompt] * batch, seeds=[(0, i) for i in range(batch)], stop_ids={7},
            max_new_tokens=new_tokens, batch_size=batch, progress=note, **settings)
        recorder.prefill = steps[0]
        recorder.seen = steps[-1]
    return recorder


# --- what is told ---------------------------------------------------------------------------------

def predicted_seconds(seen, gpus, block):
    """{part: seconds} of what was Seen on one of `gpus`. In all: what the GPU takes, or what the
    host takes to launch, whichever is longer, and the collectives that nothing hides. block: the
    weights of one."""
    parts = dict(seen.seconds)
    rate = NODE_RATE if gpus <= GPUS_OF_A_NODE else NETWORK_RATE
    # Before the first block nothing hides the gathering of root and embedding, nor behind the last
    # one their reduction. What is as large as a block, or as its shard that replicas (HSDP) add up,
    # is a block's, and hides if there is room. (That of the first and last is left out: 0.4 % of a
    # step of Llama-3-8B within a node.)
    exposed = 0
    total = 0
    for kind, width in ((GATHERS, plan.BF16), (REDUCTIONS, plan.FP32)):
        sizes = [c.bytes for c in seen.collectives if c.name in kind and c.ranks > 1]
        of_blocks = width * block, width * block / GPUS_OF_A_NODE
        exposed += sum(
            size for size in sizes
            if not any(math.isclose(size, of, rel_tol=0.01) for of in of_blocks)) / rate
        total += sum(sizes) / rate
    busy = sum(parts.values())
    parts["collectives, exposed"] = max(exposed, total - busy)
    launching = LAUNCH * sum(seen.kernels.values())
    parts["in all"] = max(busy, launching) + parts["collectives, exposed"]
    return parts


def summary(recorder, gpus=1, useful=0):
    """The dry run as numbers for JSON. useful: FLOP on one of `gpus`."""
    seen = recorder.seen
    seconds = predicted_seconds(seen, gpus, recorder.block)
    gathered = sum(c.bytes for c in seen.collectives if c.name in GATHERS)
    reduced = sum(c.bytes for c in seen.collectives if c.name in REDUCTIONS)
    return {
        "kernels": dict(seen.kernels),
        "tflop": {kind: flops / 1e12 for kind, flops in seen.flops.items() if flops},
        "gb_read_and_written": {kind: size / 1e9 for kind, size in seen.bytes.items()},
        "attention": dict(seen.attention),
        "waits": dict(seen.waits),
        "copies": {", ".join(key): n for key, n in seen.copies.items()},
        "gb_gathered": gathered / 1e9,
        "gb_reduced": reduced / 1e9,
        "seconds": seconds,
        "mfu": useful / seconds["in all"] / PEAK,
        "peak_gb": recorder.peak / 1e9,
        "phases_gb": {phase: size / 1e9 for phase, size in recorder.phase_peaks.items()},
    }


def show(told, seen, ops=12):
    """Prints what summary tells, and the ops that move most."""
    print(f"{'kernels':32}{'number':>8}{'TFLOP':>10}{'GB':>10}{'seconds':>10}")
    for kind, n in told["kernels"].items():
        print(f"{kind:32}{n:>8}{told['tflop'].get(kind, 0):>10.1f}"
              f"{told['gb_read_and_written'][kind]:>10.1f}{told['seconds'][kind]:>10.4f}")
    for name, size in seen.op_bytes.most_common(ops):
        print(f"    {name:28}{seen.ops[name]:>8}{'':10}{size / 1e9:>10.1f}")
    phases = ", ".join(f"{phase} {size:.1f}" for phase, size in told["phases_gb"].items())
    print(f"attention by {told['attention']}; waits {told['waits']}; copies {told['copies']}; "
          f"GB gathered {told['gb_gathered']:.1f}, reduced {told['gb_reduced']:.1f}")
    print(f"predicted {told['seconds']['in all']:.4f} s, of it "
          f"{told['seconds']['collectives, exposed']:.4f} s of collectives that nothing hides; "
          f"MFU {told['mfu']:.1%}; peak {told['peak_gb']:.2f} GB a GPU: {phases}")


def dry_training(model, gpus, layers=None, tokens=8192, pairs=128, lengths=(200, 412, 412),
                 **knobs):
    """(summary, Seen) of a training step on pairs of these lengths."""
    config = config_for(tokens_per_micro_batch=tokens, pairs_per_step=pairs, **knobs)
    c = config_of(model, layers)
    recorder = dry_step(c, config, pairs_of([lengths] * pairs, (-1.0, -1.0)), gpus)
    useful = gpu.useful_flops(c, [lengths] * pairs) / gpus
    return summary(recorder, gpus, useful), recorder.seen


def example_steps():
    """Llama-3-8B kept, recomputed and decoding. For benchmarks/dry-after.json; dry-before.json is
    of the code before gpu.py."""
    sampled = dry_sample(config_of("Llama-3-8B"), 128)
    return {"kept": dry_training("Llama-3-8B", 8)[0],
            "recomputed": dry_training("Llama-3-8B", 8, recompute=True)[0],
            "decoding": summary(sampled)}


def measured_steps():
    """The steps that gpu_day.py measured on an H100, dry: the one that was profiled, and the
    highest peak of those before it. For benchmarks/dry-h100.json."""
    c = config_of("Llama-3-8B", 8)
    found = {}
    for setting, knobs in MEASURED.items():
        config = config_for(pairs_per_step=32, **knobs)
        peaks = []
        for seed in (*MEASURED_SEEDS, PROFILED_SEED):
            lengths = pair_lengths(32, seed=seed)
            recorder = dry_step(c, config, pairs_of(lengths), 1)
            peaks.append(recorder.peak / 1e9)
        found[setting] = summary(recorder, 1, gpu.useful_flops(c, lengths))
        found[setting]["peak_gb"] = max(peaks[:-1])
    return found


MEASURED = {
    "kept": {}, "recomputed": {"recompute": True},
    "recomputed, rows of twice the tokens": {"recompute": True, "tokens_per_micro_batch": 16384}}
MEASURED_SEEDS = (102, 103, 104)        # of the peak
PROFILED_SEED = 105


# --- plan.py, checked -----------------------------------------------------------------------------

CHECKED = ("Llama-3-8B", "Llama-3.2-1B", "Mistral-7B", "Qwen2.5-7B", "Qwen3-8B")
KNOBS = (
    {}, {"recompute": True}, {"cpu_offload": True, "recompute": True},
    {"sync_every_micro_batch": True}, {"recompute": True, "sync_every_micro_batch": True})
LONGEST = (96, 1952, 1952)      # of 2,048 tokens with either response; two fill a row


def checked_config(gpus, knobs):
    """A step of two full rows a rank on 8 GPUs, else of one."""
    pairs = 4 * gpus if gpus == 8 else 2 * gpus
    return config_for(pairs_per_step=pairs, **knobs)


def planned_bytes(c, config, gpus):
    """What plan.py says that a GPU holds at its fullest."""
    names = (*plan.NUMBERS, *plan.SWITCHES)
    args = argparse.Namespace(**{name: getattr(config, name) for name in names})
    return plan.in_all(plan.memory(c, args, gpus))


def check_all():
    """A row for each model, number of GPUs and knobs, at full depth. For benchmarks/dry.json."""
    rows = []
    for model in CHECKED:
        c = config_of(model)
        for gpus in (4, 8, 64):
            for knobs in KNOBS:
                if gpus != 8 and "sync_every_micro_batch" in knobs:
                    continue        # nothing waits between rows where there is one
                config = checked_config(gpus, knobs)
                recorder = dry_step(c, config, pairs_of([LONGEST] * config.pairs_per_step), gpus)
                told = summary(recorder, gpus)
                rows.append({"model": model, "gpus": gpus, "knobs": list(knobs),
                             "peak_gb": told["peak_gb"], "phases_gb": told["phases_gb"]})
                print(f"{model:14}{gpus:>4} GPUs  {planned_bytes(c, config, gpus) / 1e9:6.1f} GB "
                      f"by plan.py, {recorder.peak / 1e9:6.1f} in the dry run  {' '.join(knobs)}",
                      flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description="A step on GPUs, op by op, without any.")
    parser.add_argument("--model", default="Llama-3-8B", help=f"folder, or {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, help="fewer than the model has (of SHAPES)")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of a row")
    parser.add_argument("--pairs", type=int, default=128, help="a step")
    parser.add_argument("--lengths", type=int, nargs=3, default=[200, 412, 412],
                        help="of prompt, chosen and rejected")
    parser.add_argument("--method", default="alphapo")
    for name in plan.SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--decode", type=int, metavar="BATCH", help="sampling instead of training")
    parser.add_argument("--check", action="store_true", help="plan.py on five models; 15 minutes")
    parser.add_argument("--examples", action="store_true", help="see example_steps")
    parser.add_argument("--measured", action="store_true", help="see measured_steps")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    if args.output:
        check_output(args.output)
    began = time.perf_counter()
    if args.check:
        results = {"rows": check_all()}
    elif args.examples or args.measured:
        results = example_steps() if args.examples else measured_steps()
    elif args.decode:
        recorder = dry_sample(config_of(args.model, args.layers), args.decode)
        results = summary(recorder)
        show(results, recorder.seen)
        print(f"{args.decode / results['seconds']['in all']:.0f} tokens/s predicted")
    else:
        knobs = {name: getattr(args, name) for name in (*plan.SWITCHES, "method")}
        results, seen = dry_training(args.model, args.gpus, args.layers, args.tokens, args.pairs,
                                     tuple(args.lengths), **knobs)
        show(results, seen)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.output:
        results = machine() | {"arguments": vars(args)} | results
        write_whole(args.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
