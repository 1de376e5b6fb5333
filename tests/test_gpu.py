"""gpu.py without a GPU: its use of FlashAttention's operator against plain attention in float64, the operator played by
a few lines that follow its documentation; and the bookkeeping of CUDA graphs. Run: pytest tests/test_gpu.py

That the real operator does the same is checked where there is a GPU: python -m benchmarks.gpu_day
"""
import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils.flop_counter     # compiling imports it, which needs the real operator

import distributed
import gpu
import train
from data.preference import pack
from model import ModelConfig
from sampler import generate
from score import rewards
from small import random_pairs, sequence_logp, small_model

MODELS = {"llama": {}, "window": {"model_type": "mistral", "sliding_window": 6},
          "mha": {"num_key_value_heads": 4}, "qwen3": {"model_type": "qwen3", "head_dim": 8}}


def documented_flash(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
                     scale=None, window_size_left=None, window_size_right=None, seqused_k=None, **others):
    """aten::_flash_attention_forward: sequence after sequence, the last query aligned with the last key that is used;
    query i of it sees the keys from i - left to i + right, where -1 is no limit, and causal is right = 0."""
    assert dropout_p == 0 and not return_debug_mask and scale is None and not any(others.values())
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    right = 0 if is_causal else window_size_right
    groups = query.shape[1] // key.shape[1]
    out = []
    for i in range(len(cum_seq_q) - 1):
        q = query[cum_seq_q[i]:cum_seq_q[i + 1]]
        end = cum_seq_k[i + 1] if seqused_k is None else cum_seq_k[i] + seqused_k[i]
        k = key[cum_seq_k[i]:end].repeat_interleave(groups, 1)
        v = value[cum_seq_k[i]:end].repeat_interleave(groups, 1)
        assert 0 < len(q) <= max_q and 0 < len(k) <= max_k
        place = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        unseen = torch.zeros(len(q), len(k), dtype=torch.bool)
        if right >= 0:
            unseen |= place < -right
        if window_size_left >= 0:
            unseen |= place > window_size_left
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v))
    return torch.cat(out), None, None, None, None


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", documented_flash)


def two_models(folder, **changes):
    """One plain, and one as on a GPU, with the same weights in float64."""
    plain = small_model(folder, **changes)
    fast = small_model(folder, **changes)
    fast.attend_pairs = partial(gpu.flash_attend_pairs, device="cpu", window=fast.config.window)
    fast.decode_attention = gpu.flash_decode_attention
    return plain, fast


@pytest.mark.parametrize("kind", MODELS)
def test_pairs_of_all_lengths_are_scored_as_sequences_alone(flash, tmp_path, kind):
    _, fast = two_models(tmp_path / "m", **MODELS[kind])
    lengths = [(5, 9, 7), (1, 1, 1), (12, 1, 20), (3, 15, 1), (20, 2, 2)]
    pairs = random_pairs(lengths)
    (row,) = pack(pairs, 1000)
    found = fast.response_logps(row.tokens, row.lengths)
    expected = []
    with torch.no_grad():
        for pair in row.pairs:
            expected += [sequence_logp(fast, pair.prompt, pair.chosen), sequence_logp(fast, pair.prompt, pair.rejected)]
    assert torch.allclose(found, torch.cat(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_plain_attention(flash, tmp_path, kind):
    plain, fast = two_models(tmp_path / "m", **MODELS[kind])
    (row,) = pack(random_pairs([(5, 9, 7), (2, 1, 30), (8, 8, 1)]), 1000)
    weights = torch.randn(sum(C + R for _, C, R in row.lengths), dtype=torch.float64)
    for model in (plain, fast):
        (model.response_logps(row.tokens, row.lengths) * weights).sum().backward()
    for ours, expected in zip(fast.parameters(), plain.parameters()):
        assert torch.allclose(ours.grad, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_the_sampler_writes_what_it_writes_with_plain_attention(flash, monkeypatch, tmp_path, kind, temperature):
    monkeypatch.setattr(gpu, "Captured", lambda function, rows, device: function)
    plain, fast = two_models(tmp_path / "m", **MODELS[kind])
    generator = random.Random(1)
    prompts = [[generator.randrange(60) for _ in range(n)] for n in (1, 3, 21, 8, 4, 9, 2)]
    settings = dict(seeds=[(0, i) for i in range(len(prompts))], stop_ids={7, 9, 11}, max_new_tokens=17, batch_size=4,
                    temperature=temperature, samples=2)
    assert generate(fast, prompts, **settings) == generate(plain, prompts, **settings)


def test_a_row_of_answers_to_one_prompt_is_rewarded_as_with_plain_attention(flash, tmp_path):
    plain, fast = two_models(tmp_path / "m")
    for model in (plain, fast):
        model.reward = lambda ends, prompt: ends.sum(-1) + prompt.sum()
    prompt, answers = [1, 2, 3, 4], [[5], [6, 7, 8, 9], [10, 11], [5, 6, 7]]
    with torch.no_grad():
        found, expected = (rewards(model, prompt, answers) for model in (fast, plain))
    assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype, head_dim, served", [
    (torch.bfloat16, 128, True), (torch.float16, 64, True), (torch.bfloat16, 256, True), (torch.float32, 128, False),
    (torch.float64, 64, False), (torch.bfloat16, 20, False), (torch.bfloat16, 264, False)])
def test_the_kernel_is_taken_where_it_serves(monkeypatch, tmp_path, dtype, head_dim, served):
    asked = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    model = small_model(tmp_path / "m", head_dim=head_dim)
    gpu.speed_up(model, dtype)
    assert asked == [False]
    assert ("attend_pairs" in vars(model)) == ("decode_attention" in vars(model)) == served


def test_compiled_blocks_compute_the_same_and_are_compiled_once(flash, monkeypatch, tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", partial(whole, backend=backend, fullgraph=True))
    plain, fast = two_models(tmp_path / "m", num_hidden_layers=3)
    gpu.speed_up(fast, torch.float64, compiled=True)
    for seed, lengths in enumerate(([(5, 9, 7), (2, 1, 30)], [(3, 4, 5)], [(40, 1, 1), (2, 2, 2), (9, 9, 9)])):
        (row,) = pack(random_pairs(lengths, seed=seed), 1000)
        for model in (plain, fast):
            model.zero_grad()
            model.recompute = seed == 2
            model.response_logps(row.tokens, row.lengths).sum().backward()
        for ours, expected in zip(fast.parameters(), plain.parameters()):
            assert torch.allclose(ours.grad, expected.grad, rtol=0, atol=1e-12)
    assert len(graphs) == 2


# --- CUDA graphs ----------------------------------------------------------------------------------------------------

class Graph:
    """Replays what was run while it was captured, on the same tensors."""
    capturing = None

    def replay(self):
        self.out.copy_(self.function(*self.inputs))


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for CUDA's. Yields the number of rows of each graph that was captured."""
    sizes = []

    class Captured(gpu.Captured):
        def capture(self, inputs):
            graph, out = super().capture(inputs)
            graph.function, graph.inputs, graph.out = self.function, inputs, out
            sizes.append(len(inputs[0]))
            return graph, out

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(gpu, "Captured", Captured)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    return sizes


def test_graphs_of_powers_of_two_serve_all_numbers_of_rows(graphs):
    double = gpu.Captured(lambda x, y: 2 * x + y, 6, "cpu")
    for n in (1, 5, 3, 6, 2, 4, 5):
        x, y = torch.arange(n), torch.full((n,), 100)
        assert torch.equal(double(x, y), 2 * x + y)
    assert graphs == [1, 6, 4, 2]


@pytest.mark.parametrize("batch_size", [2, 5, 14])
def test_answers_are_the_same_with_graphs(flash, graphs, tmp_path, batch_size):
    plain, fast = two_models(tmp_path / "m")
    generator = random.Random(2)
    prompts = [[generator.randrange(60) for _ in range(n)] for n in (1, 3, 21, 8, 4, 9, 2)]
    settings = dict(seeds=[(0, i) for i in range(len(prompts))], stop_ids={7, 9, 11}, max_new_tokens=17,
                    batch_size=batch_size, samples=2)
    assert generate(fast, prompts, **settings) == generate(plain, prompts, **settings)
    assert len(graphs) == len(set(graphs)) and max(graphs) == batch_size


@pytest.mark.parametrize("dtype, head_dim, card, served", [
    (torch.bfloat16, 128, (8, 0), True), (torch.bfloat16, 128, (9, 0), True), (torch.bfloat16, 128, (7, 5), False),
    (torch.float16, 256, (8, 9), True), (torch.bfloat16, 264, (9, 0), False), (torch.bfloat16, 36, (9, 0), False),
    (torch.float32, 128, (9, 0), False)])
def test_flash_serves_what_its_kernel_takes(monkeypatch, dtype, head_dim, card, served):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    assert gpu.flash_serves(dtype, head_dim, torch.device("cuda")) is served


# --- metrics and errors ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A10G", 70e12), ("NVIDIA A10", 125e12), ("NVIDIA H20", 148e12), ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA H800 PCIe", 756e12),
    ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090", None)])
def test_peaks_are_those_of_the_data_sheets(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu.peak_flops(torch.device("cuda")) == peak


def test_useful_work_is_six_flop_a_weight_and_token_beside_attention():
    c = ModelConfig(vocab_size=1000, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=128,
                    norm_eps=1e-5, rope_theta=1e4, max_positions=100)
    block = 64 * (4 + 2 + 2) * 16 + 4 * 16 * 64 + 3 * 64 * 128
    attention = 0
    for queries in ([(range(10), 0), (range(20), 10), (range(5), 10)],):        # of P, C and R, and keys before them
        attention += sum(i + before + 0.5 for places, before in queries for i in places)
    expected = 6 * (3 * block * 35 + 1000 * 64 * 25) + 3 * 3 * 4 * 4 * 16 * attention
    assert gpu.useful_flops(c, [(10, 20, 5)]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("peak_tflops, mfu", [(0, 0.5), (989 / 4, 2.0)])
def test_the_mfu_is_useful_work_of_all_pairs_against_the_peak_of_all_ranks(monkeypatch, peak_tflops, mfu):
    rows = [SimpleNamespace(indices=[0], lengths=[(1, 2, 3)]), SimpleNamespace(indices=[], lengths=[(9, 9, 9)]),
            SimpleNamespace(indices=[1, 2], lengths=[(4, 5, 6), (7, 8, 9)])]
    monkeypatch.setattr(gpu, "useful_flops", lambda config, lengths: 989e12 * len(lengths))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 10**9)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    model = SimpleNamespace(device=torch.device("cuda"), config=None)
    run = SimpleNamespace(model=model, config=SimpleNamespace(peak_tflops=peak_tflops), seconds_between=0.25)
    speed = train.speed_of(run, SimpleNamespace(rows=rows, seconds=2.5), seconds=3.0)
    assert speed == {"seconds": 3.0, "seconds_rows": 2.5, "seconds_between": 0.25, "peak_memory_gb": 5.0,
                     "mfu": pytest.approx(mfu)}


@pytest.mark.parametrize("error, words", [
    (torch.distributed.DistBackendError(
        "NCCL error in: /pytorch/ProcessGroupNCCL.cpp:94, remote process exited or there was a network error, NCCL "
        "version 2.28.9\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting.\n"
        "Last error:\nNET/Socket: remote peer has closed the connection"),
     ["another rank died", "NCCL error in", "remote peer has closed the connection", "NCCL_DEBUG=INFO"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
     ["CUDA out of memory", "plan.py", "--recompute", "--tokens_per_micro_batch"])])
def test_errors_of_a_gpu_are_a_line_with_what_to_do(monkeypatch, capsys, error, words):
    ended = []
    monkeypatch.setattr(distributed, "end_rank", lambda status, world: ended.append(status))
    monkeypatch.setattr(distributed, "open_streams", lambda: None)

    def main():
        raise error
    distributed.run_rank(main, train.advice)
    message = capsys.readouterr().err
    assert ended == [1] and message.startswith("error: ") and "Traceback" not in message
    for word in words:
        assert word in message


def test_the_program_for_the_day_a_gpu_is_at_hand_runs_to_its_end(tmp_path):
    parts = ["card", "exact", "sampler", "steps of 3B"]     # run takes a minute, 8B compiles, trl is not installed
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--small", "--rounds", "1", "--only", *parts, "--output",
               str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=Path(gpu.__file__).parent, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(parts) < set(found) and found["device"] == "cpu"
    assert found["exact"]["average log-probs, absolute"] < 1e-3
    assert 0 < found["exact"]["the gradient of the head"] < 0.02
    assert {"kept", "recomputed"} < set(found["steps of 3B"])
