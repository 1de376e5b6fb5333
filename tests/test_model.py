"""model.py against transformers, against committed golden logits, and against sums done by hand in float64.

    python -m pytest tests/test_model.py
"""
import ast
import json
import os
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import cpu
import model as model_py
from alphapo import alphapo_loss, average_logps
from make_golden import CASES, GOLDEN, ROWS, SMALL, TOKENS, transformers_checkpoint, write_checkpoint
from model import (ModelConfig, TargetLogps, causal_attention, load_model, read_config, save_model, target_logps,
                   target_logps_backward)

GOLDEN = json.loads(GOLDEN.read_text())

# Lengths of (prompt, chosen, rejected): a single token everywhere, and texts longer than the window of 16.
PAIRS = [(5, 3, 4), (1, 1, 1), (9, 1, 30), (2, 40, 1), (30, 7, 20)]
ROW = [torch.arange(sum(lengths)) ** 2 * (41 + i) % 101 for i, lengths in enumerate(PAIRS)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{case: a checkpoint folder that transformers wrote}"""
    root = tmp_path_factory.mktemp("checkpoints")
    for case in CASES:
        transformers_checkpoint(case, root / case)
    return {case: root / case for case in CASES}


@pytest.fixture
def copy_of(folders, tmp_path):
    return lambda case: shutil.copytree(folders[case], tmp_path / case)


@pytest.fixture(params=["plain", "cpu.py"])
def load(request):
    """load_model: model.py alone, and with the kernels that train.py gives it on CPUs."""
    def load(folder, dtype=torch.float32):
        model = load_model(folder, dtype)
        if request.param == "cpu.py":
            cpu.speed_up(model)
        return model
    return load


def transformers_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def edit_config(folder, remove=(), **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def edit_weights(folder, edit, file="model.safetensors"):
    weights = load_file(folder / file)
    edit(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


def spell_as_transformers4(folder):
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit_config(folder, remove=("rope_parameters", "dtype"), torch_dtype=config["dtype"], rope_theta=theta,
                rope_scaling=None if rope["rope_type"] == "default" else rope)


# --- logits -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, spelling, copy_of, load):
    folder = copy_of(case)
    if spelling == 4:
        spell_as_transformers4(folder)
    with torch.no_grad():
        expected = transformers_model(folder)(TOKENS[None]).logits[0]
        error = (load(folder)(TOKENS) - expected).abs().max()
    assert 0.5 < expected.std() < 2 and error <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_golden_values(case, tmp_path):
    golden = GOLDEN[case]
    write_checkpoint(tmp_path, golden["config"], golden["shapes"])
    with torch.no_grad():
        error = (load_model(tmp_path)(TOKENS)[ROWS] - torch.tensor(golden["logits"])).abs().max()
    assert error <= 1e-5


def neutral(suffix, value):
    return lambda weights: [weight.fill_(value) for name, weight in weights.items() if name.endswith(suffix)]


# The comparisons above would notice if model.py ignored any of these.
@pytest.mark.parametrize("case, fields, edit", [
    ("llama2", {"rms_norm_eps": 1e-6}, None),
    ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, None),
    ("llama31", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, None),
    ("mistral", {"sliding_window": 17}, None),
    ("llama2", {}, neutral("input_layernorm.weight", 1)),
    ("llama2", {}, neutral("post_attention_layernorm.weight", 1)),
    ("llama2", {}, neutral("model.norm.weight", 1)),
    ("qwen2", {}, neutral("q_proj.bias", 0)),
    ("qwen2", {}, neutral("v_proj.bias", 0)),
    ("qwen2", {}, neutral("k_proj.bias", 0)),
    ("qwen3", {}, neutral("q_norm.weight", 1)),
    ("qwen3", {}, neutral("k_norm.weight", 1)),
], ids=lambda value: "edit" if callable(value) else str(value))     # a name holds no address
def test_every_feature_of_the_golden_checkpoints_shows_in_their_logits(case, fields, edit, tmp_path):
    golden = GOLDEN[case]
    write_checkpoint(tmp_path, golden["config"] | fields, golden["shapes"])
    if edit:
        edit_weights(tmp_path, edit)
    with torch.no_grad():
        change = (load_model(tmp_path)(TOKENS)[ROWS] - torch.tensor(golden["logits"])).abs().max()
    assert change > 1e-3


# --- packed rows ------------------------------------------------------------------------------------------------------

def alone(logits, row, lengths):
    """Log-probs of both responses of a pair, each run as a sequence of its own. logits: (T,) -> (T, V)"""
    prompt, chosen, rejected = row.split(lengths)
    logps = []
    for response in (chosen, rejected):
        predicted = logits(torch.cat((prompt, response)))[len(prompt) - 1:-1]
        logps.append(predicted.double().log_softmax(-1).gather(-1, response[:, None])[:, 0])
    return torch.cat(logps)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("case", CASES)
def test_packed_pairs_equal_each_sequence_alone_in_any_order(case, dtype, tolerance, folders, load):
    model = load(folders[case], dtype)
    with torch.no_grad():
        expected = [alone(model, row, lengths) for row, lengths in zip(ROW, PAIRS)]
        for order in list(permutations(range(len(PAIRS))))[::17]:
            logps = model.response_logps(torch.cat([ROW[i] for i in order]), [PAIRS[i] for i in order])
            assert logps.dtype == dtype
            assert (logps - torch.cat([expected[i] for i in order])).abs().max() <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_packed_pairs_equal_transformers(case, folders, load):
    model, oracle = load(folders[case]), transformers_model(folders[case])
    with torch.no_grad():
        expected = [alone(lambda tokens: oracle(tokens[None]).logits[0], *pair) for pair in zip(ROW, PAIRS)]
        logps = model.response_logps(torch.cat(ROW), PAIRS)
    assert (logps - torch.cat(expected)).abs().max() <= 1e-5


def gradients(model, losses):
    """Of the mean loss over PAIRS, accumulated over `losses`, each the sum over some of them."""
    model.zero_grad()
    for loss in losses:
        (loss / len(PAIRS)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def loss_sum(logps, pairs):
    averages = average_logps(logps, [length for _, C, R in pairs for length in (C, R)])
    return alphapo_loss(averages[0::2], averages[1::2], alpha=0.25, beta=2.5, gamma_beta_ratio=0.1)[0].sum()


def packed_losses(model, packs):
    for pack in packs:
        pairs = [PAIRS[i] for i in pack]
        yield loss_sum(model.response_logps(torch.cat([ROW[i] for i in pack]), pairs), pairs)


def losses_alone(logits):
    return (loss_sum(alone(logits, row, lengths), [lengths]) for row, lengths in zip(ROW, PAIRS))


def largest_difference(grads, expected):
    """Relative to the norm of each parameter's gradient."""
    assert grads.keys() == expected.keys()
    return max(((grads[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


PACKINGS = [[[0, 1, 2, 3, 4]], [[4], [3], [2], [1], [0]], [[3, 1], [4, 0, 2]]]


# A bias on all keys shifts a query's scores alike and so, but for RoPE, does nothing: its gradient is small, and fp32
# leaves it five digits. All others agree to 2e-6.
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("case", ["mistral", "llama32", "qwen2", "qwen3"])
def test_gradient_of_a_step_is_the_same_for_every_packing(case, dtype, tolerance, recompute, folders, load):
    model = load(folders[case], dtype)
    expected = gradients(model, losses_alone(model))
    model.recompute = recompute
    for packs in PACKINGS:
        assert largest_difference(gradients(model, packed_losses(model, packs)), expected) <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_a_step_equals_transformers(case, folders, load):
    model, oracle = load(folders[case]), transformers_model(folders[case])
    expected = gradients(oracle, losses_alone(lambda tokens: oracle(tokens[None]).logits[0]))
    assert largest_difference(gradients(model, packed_losses(model, PACKINGS[2])), expected) <= 5e-5


def test_a_new_model_recomputes_nothing_and_computes_where_its_weights_are(folders):
    model = load_model(folders["llama3"])
    assert model.recompute is False and model.device == torch.device("cpu")
    model.compute_device = torch.device("meta")
    assert model.device == torch.device("meta")
    with pytest.raises(AttributeError):
        model.config.window = 5                     # the layers have been made for another


def test_bf16_weights_compute_in_bf16(folders):
    with torch.no_grad():
        assert load_model(folders["llama3"], torch.bfloat16)(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("recompute, runs", [(False, 1), (True, 2)])
def test_recompute_runs_each_block_again_in_the_backward_pass(recompute, runs, folders):
    model, seen = load_model(folders["llama3"]), []
    model.recompute = recompute
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    gradients(model, packed_losses(model, [[0]]))
    assert len(seen) == runs * SMALL["num_hidden_layers"]


@pytest.mark.parametrize("attention", [causal_attention, cpu.blocked_attention])
@pytest.mark.parametrize("window", [None, 1, 40, 128, 200, 300, 1000])
@pytest.mark.parametrize("Tq, Tk", [(1, 1), (1, 300), (128, 128), (129, 129), (300, 300), (200, 333), (256, 257)])
def test_attention_to_long_texts_equals_softmax_by_hand(Tq, Tk, window, attention):
    """Texts of more queries than are computed at once, and windows that begin before, within and after those."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda T, heads: torch.randn(T, heads, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    q, k, v = inputs = draw(Tq, 4), draw(Tk, 2), draw(Tk, 2)
    out = attention(q, k, v, window)
    distance = torch.arange(Tk - Tq, Tk)[:, None] - torch.arange(Tk)               # (Tq, Tk)
    seen = (distance >= 0) & (distance < (window or Tk))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / 4**0.5
    expected = torch.einsum("hqk,khd->qhd", scores.where(seen, -torch.inf).softmax(-1), v.repeat_interleave(2, 1))
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip((out, *torch.autograd.grad(out, inputs, weights)),
                            (expected, *torch.autograd.grad(expected, inputs, weights))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_window_that_the_text_fills_takes_the_attention_without_a_mask(monkeypatch):
    masked, whole = [], model_py.F.scaled_dot_product_attention

    def watched(q, k, v, mask, **settings):
        masked.append(mask is not None)
        return whole(q, k, v, mask, **settings)
    monkeypatch.setattr(model_py.F, "scaled_dot_product_attention", watched)
    q, k = normal(3, 4, 8), normal(5, 2, 8)
    for window in (5, 6):
        assert torch.equal(causal_attention(q, k, k, window), causal_attention(q, k, k))
    causal_attention(q, k, k, 4)
    assert masked == [False] * 4 + [True]


@pytest.mark.parametrize("attention", [causal_attention, cpu.blocked_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_to_long_texts_keeps_its_dtype(dtype, attention):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(T, heads, 8, generator=generator).to(dtype) for T, heads in ((150, 4), (200, 2), (200, 2)))
    out = attention(q, k, v, 90)
    assert out.dtype == dtype
    exact = attention(q.double(), k.double(), v.double(), 90)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the vocabulary head ----------------------------------------------------------------------------------------------

V, DIM, R = 23, 6, 10


def head(dtype=torch.float64, rows=R, vocab=V):
    """States, weight and targets with log-probs of order -ln V."""
    random = torch.Generator().manual_seed(0)
    states = torch.randn(rows, DIM, generator=random, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, DIM, generator=random, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=random)
    return states.requires_grad_(), weight.requires_grad_(), targets


def head_gradients(logps, states, weight, **options):
    return torch.autograd.grad((logps * torch.arange(1, len(logps) + 1)).sum(), (states, weight), **options)


@pytest.fixture(params=[(R * V, R * V), (R * V, 0), (R * 7, R * V), (R * 7, R * 15), (R, 0)])
def blocks(request, monkeypatch):
    """All in one block or in several, all of them kept or some or none."""
    limit_logits(*request.param, monkeypatch)


def limit_logits(block, kept, monkeypatch):
    monkeypatch.setattr(model_py, "CHUNK_LOGITS", {"cpu": block})
    monkeypatch.setattr(model_py, "KEPT_LOGITS", {"cpu": kept})


def test_target_logps_passes_gradcheck(blocks):
    states, weight, targets = head()
    assert torch.autograd.gradcheck(lambda s, w: TargetLogps.apply(s, w, targets), (states, weight))


def test_the_head_computes_and_keeps_as_many_logits_as_its_comments_say():
    mib = {device: 4 * n / 2**20 for device, n in model_py.CHUNK_LOGITS.items()}        # of fp32
    kept = {device: 4 * n / 2**20 for device, n in model_py.KEPT_LOGITS.items()}
    assert mib == {"cpu": 8, "gpu": 256} and kept == {"cpu": 128, "gpu": 1024}
    assert model_py.KEPT_LOGITS["gpu"] // 128256 == 2092
    limits = {"cpu": 1, "gpu": 2}
    assert model_py._limit(limits, torch.empty(1)) == 1 and model_py._limit(limits, torch.empty(1, device="meta")) == 2


def test_blocks_of_the_head_are_no_wider_than_the_limit_and_not_kept_unless_asked(monkeypatch):
    states, weight, targets = head()
    for block, width in ((1, 1), (R, 1), (2 * R - 1, 1), (7 * R, 7), (100 * R, V)):
        limit_logits(block, 2**28, monkeypatch)
        chunks = [chunk for chunk, *_ in model_py._vocabulary_chunks(states, weight, targets)]
        assert chunks == [slice(start, min(start + width, V)) for start in range(0, V, width)]
    for limit, n_kept in ((14 * R - 1, 1), (14 * R, 2), (V * R, 4), (0, 0)):
        limit_logits(7 * R, limit, monkeypatch)
        _, _, kept = target_logps(states, weight, targets, keep=True)
        assert [exps is not None for exps, _ in kept] == [True] * n_kept + [False] * (4 - n_kept)
    limit_logits(7, 2**28, monkeypatch)
    # One state, so that a block may be one number.
    for keep in (False, True):
        _, _, kept = target_logps(states[:1], weight[:1], targets[:1] * 0, keep)
        assert [exps is not None for exps, _ in kept] == [keep]


def test_scoring_keeps_no_logits(folders, monkeypatch):
    model, asked = load_model(folders["llama2"]), []
    whole = model_py.target_logps

    def noted(states, weight, targets, keep):
        asked.append(keep)
        return whole(states, weight, targets, keep)

    monkeypatch.setattr(model_py, "target_logps", noted)
    with torch.no_grad():
        model.response_logps(ROW[0], PAIRS[:1])
    model.response_logps(ROW[0], PAIRS[:1])
    assert asked == [False, True]


@pytest.mark.parametrize("block", [2**28, R * V, R * V - 1, 4 * R, 4 * R - 1, R, 1])
@pytest.mark.parametrize("kept", [2**28, R * V, R * V - 1, 9 * R, 1, 0])
def test_blocks_of_any_size_equal_log_softmax_in_value_and_gradient(block, kept, monkeypatch):
    limit_logits(block, kept, monkeypatch)
    states, weight, targets = head()
    logps = TargetLogps.apply(states, weight, targets)
    expected = (states @ weight.T).log_softmax(-1)[torch.arange(R), targets]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-13)
    for grad, by_autograd in zip(head_gradients(logps, states, weight), head_gradients(expected, states, weight)):
        torch.testing.assert_close(grad, by_autograd, rtol=0, atol=1e-12)


def test_the_head_adds_the_gradient_of_all_groups_as_autograd_has_it(blocks, folders):
    model, sizes = load_model(folders["llama2"]), (1, 6, 3)
    states, targets = normal(R, 64).requires_grad_(), torch.arange(R) * 10      # of 101 tokens
    loss = lambda i, logps: (i + 2) * logps.mean() ** 2
    expected = sum(loss(i, group) for i, group in enumerate(model.token_logps(states, targets).split(sizes)))
    (0.5 * expected).backward()
    weight, by_autograd = model.head_weight, (states.grad, model.head_weight.grad)
    grad_weight = torch.ones_like(weight)       # what an earlier row left
    values, grad_states = [], []
    for i, (some, ids) in enumerate(zip(states.split(sizes), targets.split(sizes))):
        logps, *kept = target_logps(some, weight, ids, keep=True)
        values.append(loss(i, logps.requires_grad_()))
        (grad,) = torch.autograd.grad(0.5 * values[-1], logps)
        grad_states.append(target_logps_backward(grad, some, weight, ids, *kept, grad_weight))
    assert sum(values).item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat(grad_states), by_autograd[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(grad_weight - 1, by_autograd[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("levels", [
    (-200, -200, -200), (0, -100, -300), (-300, -100, 0), (-200, 0, -95), (150, 0, 150)])
def test_logits_of_any_size_neither_overflow_nor_vanish(levels, monkeypatch):
    """Three blocks of 7 tokens, whose logits lie about these levels. exp(89) and exp(-104) are beyond fp32."""
    limit_logits(R * 7, R * 7, monkeypatch)
    states, weight, _ = head(torch.float32, vocab=21)
    with torch.no_grad():
        states[:, 0] = 1
        weight[:, 0] = torch.tensor(levels).repeat_interleave(7)
    for targets in (torch.arange(R), torch.arange(R) + 21 - R):
        logps = TargetLogps.apply(states, weight, targets)
        exact = [x.detach().double().requires_grad_() for x in (states, weight)]
        expected = (exact[0] @ exact[1].T).log_softmax(-1)[torch.arange(R), targets]
        torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-4)      # fp32 at 300
        for grad, by_autograd in zip(head_gradients(logps, states, weight), head_gradients(expected, *exact)):
            torch.testing.assert_close(grad.double(), by_autograd, rtol=1e-3, atol=0.05)


def test_gradients_of_bf16_states_are_summed_over_blocks_in_fp32(monkeypatch):
    # 600 blocks that add the same to a gradient: a sum in bf16 stays as it is from the 256th on.
    limit_logits(R, 0, monkeypatch)
    states, weight = torch.zeros(R, 2, dtype=torch.bfloat16), torch.ones(600, 2, dtype=torch.bfloat16)
    targets = torch.full((R,), 599)
    logps, *kept = target_logps(states, weight, targets, keep=True)
    grad_weight = torch.zeros_like(weight)
    # The target's weight is taken once and all 600 are given back, each times its probability.
    grad_states = target_logps_backward(torch.ones(R), states, weight, targets, *kept, grad_weight)
    assert grad_states.dtype == torch.bfloat16 and grad_states.abs().max() <= 0.01


@pytest.mark.parametrize("limit", [63, 64, 65, 66, 127, 128, 129, 250])
def test_rows_of_logits_are_of_aligned_lengths_but_for_the_last(limit, monkeypatch):
    """From 64 on multiples of 64: other lengths take GPUs three times as long."""
    limit_logits(3 * limit + 2, 0, monkeypatch)
    states, weight = torch.empty(3, 2), torch.empty(300, 2)
    chunks = [chunk for chunk, *_ in model_py._vocabulary_chunks(states, weight, torch.tensor([0]))]
    widths = [chunk.stop - chunk.start for chunk in chunks]
    assert {*widths[:-1]} == {63 if limit == 63 else 64 if limit < 128 else 128 if limit < 192 else 192}
    assert sum(widths) == 300 and widths[-1] <= widths[0]


class Products(TorchDispatchMode):
    """The operators that multiply matrices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func._schema.name:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bf16_states_give_unrounded_fp32_logits_on_other_devices(dtype):
    aten, wide = torch.ops.aten, torch.promote_types(dtype, torch.float32)
    states, weight = torch.empty(5, 8, dtype=dtype, device="meta"), torch.empty(7, 8, dtype=dtype, device="meta")
    with Products() as products:
        z = model_py._logits(states, weight)
    assert z.shape == (5, 7) and z.dtype == wide
    assert products.seen == [aten.mm.dtype if dtype == torch.bfloat16 else aten.mm.default]

    total = torch.empty(7, 8, dtype=wide, device="meta")
    with Products() as products:
        model_py._add_product(total, z.to(dtype).T, states)
    assert products.seen == [aten.addmm.dtype_out if dtype == torch.bfloat16 else aten.addmm_.default]
    assert total.shape == (7, 8) and total.dtype == wide


def test_a_bf16_product_is_added_in_fp32_on_cpus():
    a, b, total = torch.ones(1, 1).bfloat16(), torch.ones(1, 1).bfloat16(), torch.full((1, 1), 256.0)
    model_py._add_product(total, a, b)
    assert total.item() == 257          # which bf16 rounds to 256


def test_logits_are_kept_of_as_many_tokens_as_their_limit_has_room_for():
    weight = torch.empty(1000, 1)
    assert model_py.kept_tokens(torch.empty(1), weight) == 2**25 // 1000
    assert model_py.kept_tokens(torch.empty(1, device="meta"), weight) == 2**28 // 1000


@pytest.mark.parametrize("blocks", ["one", "many"])
def test_logits_300_apart_in_a_block_neither_overflow_nor_vanish_in_logps(blocks, monkeypatch):
    if blocks == "many":
        limit_logits(2 * 4, 0, monkeypatch)
    z = torch.tensor([[0.0, -300, 200, 199, -100, 100, 198, -300], [-200, -300, -201, -500, -202, -450, -199, -333]])
    targets = torch.tensor([3, 6])
    logps = target_logps(torch.eye(2), z.T.contiguous(), targets, keep=False)[0]
    expected = z.double().log_softmax(-1)[[0, 1], targets]
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=0)


def test_recompute_serves_autograd_grad_and_leaves_the_random_generator_alone(folders, monkeypatch):
    model = load_model(folders["llama3"])
    tokens, lengths = torch.arange(20), [(4, 9, 7)]

    def grads():
        return torch.autograd.grad(model.response_logps(tokens, lengths).sum(), list(model.parameters()))
    expected = grads()
    model.recompute = True
    # To read its state would wait for a GPU.
    monkeypatch.setattr(torch, "get_rng_state", None)
    for ours, theirs in zip(grads(), expected):
        assert torch.equal(ours, theirs)


def test_recomputation_leaves_out_the_product_that_no_gradient_needs(folders):
    model = load_model(folders["llama3"])

    def products_of_backward(recompute):
        model.recompute = recompute
        logps = model.response_logps(torch.arange(20), [(4, 9, 7)])
        with Products() as products:
            logps.sum().backward()
        return len(products.seen)
    # Again are those of q, k, v, o, gate and up; not that of down.
    assert products_of_backward(True) - products_of_backward(False) == 6 * SMALL["num_hidden_layers"]


def test_a_block_by_itself_recomputes_nothing(folders, monkeypatch):
    monkeypatch.setattr(model_py, "checkpoint", None)
    model = load_model(folders["llama3"])
    x = torch.randn(5, model.config.dim)
    cos, sin = model_py.rope_tables(torch.arange(5), model.config)
    out = model.model.layers[0](x, cos, sin, lambda q, k, v: q)
    assert out.shape == x.shape


def test_a_retained_graph_gives_the_same_gradient_again(blocks):
    states, weight, targets = head()
    logps = TargetLogps.apply(states, weight, targets)
    first = head_gradients(logps, states, weight, retain_graph=True)
    again = head_gradients(logps, states, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_bf16_states_give_fp32_logps_and_bf16_gradients(blocks):
    states, weight, targets = head(torch.bfloat16)
    logps = TargetLogps.apply(states, weight, targets)
    assert logps.dtype == torch.float32
    with torch.no_grad():       # given the bf16 logits, nothing more is lost
        expected = F.linear(states, weight).double().log_softmax(-1)[torch.arange(R), targets]
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)

    exact = [x.detach().double().requires_grad_() for x in (states, weight)]
    by_autograd = head_gradients((exact[0] @ exact[1].T).log_softmax(-1)[torch.arange(R), targets], *exact)
    for grad, reference in zip(head_gradients(logps, states, weight), by_autograd):
        assert grad.dtype == torch.bfloat16
        assert (grad - reference).norm() <= 0.02 * reference.norm()


def test_logps_at_a_128k_vocabulary_lack_the_bias_of_log_softmax():
    states, weight, targets = head(torch.float32, rows=16, vocab=128256)
    with torch.no_grad():
        states *= 2                     # logits of size 5: as of a trained model, most of them far below the largest
        picked = torch.arange(len(targets)), targets
        exact = (states.double() @ weight.double().T).log_softmax(-1)[picked]
        bias = (TargetLogps.apply(states, weight, targets) - exact).mean().abs()
        bias_of_log_softmax = ((states @ weight.T).log_softmax(-1)[picked] - exact).mean().abs()
    assert bias < 1e-6 < bias_of_log_softmax


class LogitsAlive(TorchDispatchMode):
    """Follows every storage that holds (R, v) or (v, R) numbers, v one of some widths, and how many live at once."""

    def __init__(self, R, widths):
        super().__init__()
        self.shapes = {shape for v in widths for shape in ((R, v), (v, R))}
        self.storages, self.largest, self.most, self.total = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and tuple(x.shape) in self.shapes:
                self.largest = max(self.largest, x.numel())
                storage = StorageWeakRef(x.untyped_storage())
                self.total += 0 if storage in self.storages else x.numel()
                self.storages[storage] = x.numel()
        self.storages = {storage: n for storage, n in self.storages.items() if not storage.expired()}
        self.most = max(self.most, sum(self.storages.values()))
        return out


@pytest.mark.parametrize("widths, kept", [
    ([17] * 5 + [16], 0), ([34, 34, 33], 0), ([34, 34, 33], 1), ([34, 34, 33], 3)])
def test_a_block_of_logits_exists_at_once_and_those_that_are_kept(widths, kept, folders, monkeypatch):
    model, n = load_model(folders["llama32"]), sum(C + R for _, C, R in PAIRS)      # a vocabulary of 101
    limit_logits(widths[0] * n, widths[0] * n * kept, monkeypatch)
    with LogitsAlive(n, widths) as watch:
        gradients(model, packed_losses(model, [range(len(PAIRS))]))
    # All logits are made, and those that were not kept again in the backward pass: the watch sees them.
    assert watch.total == n * (101 + sum(widths[kept:]))
    assert watch.largest == widths[0] * n
    assert watch.most == n * sum(widths[:max(1, kept + (kept < len(widths)))])


# --- config.json ------------------------------------------------------------------------------------------------------

SMALL_CONFIG = dict(vocab_size=101, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96,
                    norm_eps=1e-3, rope_theta=10000.0, max_positions=128)
LLAMA31_FIELDS = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("case, fields", [
    ("llama2", dict(n_kv_heads=4)),
    ("llama3", dict(rope_theta=500000.0)),
    ("llama32", dict(rope_scaling=LLAMA31_FIELDS, max_positions=512, tied=True)),
    ("head_dim", dict(head_dim=24)),
    ("mistral", dict(window=16)),
    ("mistral_full", dict()),
    ("qwen2", dict(rope_theta=1e6, qkv_bias=True)),
    ("qwen3", dict(head_dim=24, tied=True, qk_norm=True)),
])
def test_config_is_read_in_both_spellings(case, fields, spelling, copy_of):
    folder = copy_of(case)
    if spelling == 4:
        spell_as_transformers4(folder)
    assert read_config(folder) == ModelConfig(**SMALL_CONFIG | fields)


def test_fields_that_old_configs_lack_have_the_defaults_of_transformers(copy_of):
    folder = copy_of("llama2")
    edit_config(folder, remove=("num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings",
                                "attention_bias", "mlp_bias", "hidden_act"))
    assert read_config(folder) == ModelConfig(**SMALL_CONFIG | dict(n_kv_heads=4))
    with torch.no_grad():
        assert (load_model(folder)(TOKENS) - transformers_model(folder)(TOKENS[None]).logits[0]).abs().max() <= 1e-5


def test_mistral_without_a_sliding_window_field_has_the_default_of_transformers(copy_of):
    folder = copy_of("mistral")
    edit_config(folder, remove=("sliding_window",))
    assert read_config(folder).window == transformers_model(folder).config.sliding_window == 4096


@pytest.mark.parametrize("case, fields, named", [
    ("llama2", {"model_type": "gemma"}, "model_type = 'gemma'"),
    ("llama2", {"mlp_bias": True}, "mlp_bias"),
    ("llama2", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope.*'yarn'"),
    ("llama2", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}, "rope.*'linear'"),
    ("llama2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope.*'yarn'"),
    ("llama2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}}, "rope.*factor"),
    ("llama2", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window"),
    ("llama2", {"sliding_window": 16}, "sliding_window"),     # transformers computes Llama without one
    ("llama2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ("llama2", {"num_experts": 8}, "num_experts"),
], ids=str)
def test_an_unsupported_feature_is_an_error_that_names_the_field(case, fields, named, copy_of):
    folder = copy_of(case)
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=f"config.json.*{named}"):
        load_model(folder)


@pytest.mark.parametrize("case, field", [
    *(("llama2", field) for field in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps",
                                      "num_attention_heads", "intermediate_size", "max_position_embeddings")),
    ("mistral", "num_key_value_heads"), ("qwen3", "head_dim"),
])
def test_a_missing_field_is_an_error_that_names_it(case, field, copy_of):
    folder = copy_of(case)
    edit_config(folder, remove=(field,))
    with pytest.raises(ValueError, match=f"config.json.*{field}"):
        read_config(folder)


def test_unknown_fields_that_are_null_false_or_empty_switch_nothing_on(copy_of):
    folder = copy_of("llama2")
    before = read_config(folder)
    edit_config(folder, quantization_config=None, num_experts=0, use_something=False, some_list=[], sliding_window=None)
    assert read_config(folder) == before


@pytest.mark.parametrize("text", ["", '{"model_type": "llama"', "[]", '["llama"]', "3"])
def test_a_malformed_config_is_an_error_that_names_the_file(text, copy_of):
    folder = copy_of("llama2")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        read_config(folder)


def test_a_missing_config_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        load_model(tmp_path)


# --- loading ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_the_names_and_shapes_of_transformers_and_nothing_stays_on_meta(case, folders):
    model = load_model(folders[case])
    ours = {name: p.shape for name, p in model.named_parameters()}
    assert ours == {name: p.shape for name, p in transformers_model(folders[case]).named_parameters()}
    assert ours.keys() == model.state_dict().keys() == load_file(folders[case] / "model.safetensors").keys()
    assert not any(x.is_meta for x in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_arrive_in_the_dtype_asked_for(dtype, folders):
    stored = load_file(folders["qwen2"] / "model.safetensors")
    for name, p in load_model(folders["qwen2"], dtype).state_dict().items():
        assert p.dtype == dtype and torch.equal(p, stored[name].to(dtype))


def test_bf16_weights_arrive_in_an_fp32_model_unchanged(copy_of):
    folder = copy_of("llama3")
    edit_weights(folder, lambda weights: weights.update({k: w.bfloat16() for k, w in weights.items()}))
    stored = load_file(folder / "model.safetensors")
    for name, p in load_model(folder).state_dict().items():
        assert p.dtype == torch.float32 and stored[name].dtype == torch.bfloat16
        assert torch.equal(p, stored[name].float())


@pytest.fixture
def sharded(tmp_path):
    """llama3 as several files with an index, written by transformers."""
    transformers_checkpoint("llama3", tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


def test_sharded_weights_equal_those_of_one_file(sharded, folders):
    one_file = load_model(folders["llama3"]).state_dict()
    for name, p in load_model(sharded).state_dict().items():
        assert torch.equal(p, one_file[name])


def test_a_shard_that_the_index_names_but_is_not_there_is_named(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"missing.*{lost.name}"):
        load_model(sharded)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_malformed_index_of_missing_weights_is_an_error_that_names_it(text, sharded):
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        load_model(sharded)


def test_a_weight_in_two_files_is_an_error_that_names_it_and_both(sharded):
    (sharded / "model.safetensors.index.json").unlink()         # which would say what counts
    first = sorted(sharded.glob("*.safetensors"))[0]
    name, weight = next(iter(load_file(first).items()))
    save_file({name: weight}, sharded / "model-other.safetensors")
    with pytest.raises(ValueError, match=f"{name}.*{first.name}.*model-other.safetensors"):
        load_model(sharded)


@pytest.mark.parametrize("size", [0, 7, 200, -1, -1000])
def test_a_truncated_file_is_an_error_that_names_it(size, copy_of):
    file = copy_of("llama3") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors.*fetch it again"):
        load_model(file.parent)


def test_a_folder_without_weights_is_an_error_that_names_it(copy_of):
    folder = copy_of("llama3")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{folder}.*safetensors"):
        load_model(folder)


NAME = "model.layers.1.mlp.up_proj.weight"


def put(value):
    return lambda weights: weights[NAME][5, 7].fill_(value)


@pytest.mark.parametrize("edit, named", [
    (lambda weights: weights.pop(NAME), f"missing.*{NAME}"),
    (lambda weights: weights.update({"lm_head.bias": torch.ones(3)}), "lm_head.bias.*model.safetensors"),
    (lambda weights: weights.update({NAME: weights[NAME].T.contiguous()}), rf"{NAME}.*\(64, 96\).*\(96, 64\)"),
    (lambda weights: weights.update({NAME: weights[NAME].to(torch.int8)}), f"{NAME}.*I8"),
    (lambda weights: weights.update({NAME: weights[NAME].to(torch.float8_e4m3fn)}), f"{NAME}.*F8"),
    (put(float("nan")), f"model.safetensors.*{NAME}.*NaN"),
    (put(float("inf")), f"model.safetensors.*{NAME}.*infinite"),
    (put(float("-inf")), f"model.safetensors.*{NAME}.*infinite"),
], ids=["missing", "extra", "shape", "int8", "float8", "nan", "inf", "-inf"])
def test_weights_that_do_not_fit_are_an_error_that_names_them(edit, named, copy_of):
    folder = copy_of("llama3")
    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=named):
        load_model(folder)


def test_an_untied_model_without_its_head_is_an_error(copy_of):
    folder = copy_of("llama32")
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lm_head.weight"):
        load_model(folder)


def test_rotary_frequencies_in_old_files_are_passed_over(copy_of):
    folder = copy_of("llama2")
    before = load_model(folder).state_dict()
    edit_weights(folder, lambda weights: weights.update(
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}))
    after = load_model(folder).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_tied_model_may_carry_its_embedding_twice(copy_of):
    folder = copy_of("llama32")
    edit_weights(folder, lambda weights: weights.update(
        {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    with torch.no_grad():
        assert (load_model(folder)(TOKENS) - transformers_model(folder)(TOKENS[None]).logits[0]).abs().max() <= 1e-5


def test_a_tied_model_whose_file_has_another_head_is_an_error(copy_of):
    folder = copy_of("llama32")     # transformers 5 unties such a model and computes with the head of the file
    edit_weights(folder, lambda weights: weights.update(
        {"lm_head.weight": weights["model.embed_tokens.weight"] * 2}))
    with pytest.raises(ValueError, match="lm_head.weight"):
        load_model(folder)


# --- saving -----------------------------------------------------------------------------------------------------------

COPIED = {"tokenizer.json": b'{"version": "1.0"}', "tokenizer.model": b"\x00\xff\x80",
          "tokenizer_config.json": b"{ }\r\n", "special_tokens_map.json": b"{}",
          "chat_template.jinja": b"{{ bos_token }}", "original/tokenizer.model": b"\x00a"}


@pytest.fixture
def source(copy_of):
    """A bf16 checkpoint with fp32 norms and the files of a tokenizer."""
    folder = copy_of("qwen2")
    edit_weights(folder, lambda weights: weights.update(
        {name: w.bfloat16() for name, w in weights.items() if "norm" not in name}))
    (folder / "original").mkdir()
    for name, content in COPIED.items():
        (folder / name).write_bytes(content)
    return folder


def stored_weights(folder):
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 30_000, 1])
def test_a_model_loaded_and_saved_is_bit_equal(shard_bytes, source, tmp_path):
    save_model(load_model(source), tmp_path / "saved", like=source, shard_bytes=shard_bytes)
    before, after = stored_weights(source), stored_weights(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name])
    assert {w.dtype for w in after.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("shard_bytes, several", [(5 * 10**9, False), (30_000, True), (1, True)])
def test_the_index_tells_where_each_weight_is_and_files_keep_to_shard_bytes(shard_bytes, several, source, tmp_path):
    save_model(load_model(source), tmp_path / "saved", like=source, shard_bytes=shard_bytes)
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())["weight_map"]
    weights = {file.name: load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")}
    assert index == {name: file for file, tensors in weights.items() for name in tensors}
    assert (len(weights) > 1) == several
    for tensors in weights.values():
        assert len(tensors) == 1 or sum(w.numel() * w.element_size() for w in tensors.values()) <= shard_bytes


def test_config_and_tokenizer_files_are_copied_byte_for_byte(source, tmp_path):
    save_model(load_model(source), tmp_path / "saved", like=source)
    for name in ("config.json", "generation_config.json", *COPIED):
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 30_000])
@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_loads_in_transformers_and_here_with_equal_logits(case, shard_bytes, folders, tmp_path):
    model = load_model(folders[case])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)                # as after training: not what is in the folder it came from
        save_model(model, tmp_path, like=folders[case], shard_bytes=shard_bytes)
        assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))
        assert (transformers_model(tmp_path)(TOKENS[None]).logits[0] - model(TOKENS)).abs().max() <= 1e-5


def test_save_in_fp32_keeps_what_bf16_would_round_away(source, tmp_path):
    model = load_model(source)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0001)
    save_model(model, tmp_path / "saved", like=source, dtype=torch.float32)
    saved = stored_weights(tmp_path / "saved")
    for name, p in model.state_dict().items():
        assert saved[name].dtype == torch.float32 and torch.equal(saved[name], p)


# --- as PyTorch users expect -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["llama2", "llama32"])         # llama32 is tied
def test_autograd_grad_after_a_backward_pass_works_and_changes_no_gradient(case, folders):
    model = load_model(folders[case])
    parameters = list(model.parameters())
    (row,), (lengths,) = ROW[:1], PAIRS[:1]
    loss = lambda: model.response_logps(row, [lengths]).sum()
    loss().backward()
    before = [p.grad.clone() for p in parameters]
    grads = torch.autograd.grad(loss(), parameters)
    assert all(map(torch.equal, grads, before)) and all(torch.equal(p.grad, g) for p, g in zip(parameters, before))


# --- the file by itself -----------------------------------------------------------------------------------------------

def test_model_py_works_copied_alone_and_imports_only_torch_and_safetensors(tmp_path):
    source = Path(model_py.__file__).read_text()
    (tmp_path / "model.py").write_text(source)
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "safetensors"}

    program = ("import torch; from model import ModelConfig, Transformer; "
               f"print(*Transformer(ModelConfig(**{SMALL_CONFIG}))(torch.arange(5)).shape)")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.stdout.split() == ["5", "101"], done.stderr


ALONE = """
import torch
from alphapo import alphapo_loss, average_logps
from model import load_model
from tokenizer import load_chat

model, chat = load_model(FOLDER), load_chat(FOLDER)
prompt = chat.encode_prompt([{"role": "user", "content": "Sort these words: owl, moss"}])
responses = [chat.encode_response(text) for text in ("owl, moss, fern.", "moss, owl.")]
tokens = torch.tensor(prompt + responses[0] + responses[1])
lengths = (len(prompt), *map(len, responses))

def loss():
    logps = model.response_logps(tokens, [lengths])
    chosen, rejected = average_logps(logps, lengths[1:]).split(1)
    return alphapo_loss(chosen, rejected, alpha=0.25, beta=2.5, gamma_beta_ratio=0.1)[0].mean()

# The log-probs are those of plain sequences and a plain log_softmax.
with torch.no_grad():
    found = model.response_logps(tokens, [lengths]).split(lengths[1:])
    for logps, ids in zip(found, responses):
        predicted = model(torch.tensor(prompt + ids))[len(prompt) - 1:-1].log_softmax(-1)
        torch.testing.assert_close(logps, predicted[range(len(ids)), ids], rtol=0, atol=1e-5)

# backward adds up, autograd.grad gives the same and changes nothing.
parameters = list(model.parameters())
loss().backward()
first = [p.grad.clone() for p in parameters]
grads = torch.autograd.grad(loss(), parameters)
assert all(map(torch.equal, grads, first)) and all(torch.equal(p.grad, g) for p, g in zip(parameters, first))
loss().backward()
for p, g in zip(parameters, first):
    torch.testing.assert_close(p.grad, 2 * g)

# An optimiser of PyTorch's makes the loss fall.
before = loss().item()
torch.optim.SGD(parameters, lr=1e-4).step()
assert loss().item() < before
print("alone", len(parameters))
"""


def test_the_three_files_work_alone_in_an_empty_folder(tmp_path):
    root = Path(model_py.__file__).parent
    for name in ("alphapo.py", "model.py", "tokenizer.py"):
        shutil.copy(root / name, tmp_path)
    program = ALONE.replace("FOLDER", repr(str(root / "data" / "tiny" / "model")))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.stdout.startswith("alone"), done.stderr
