"""What a GPU would be asked to do, seen by benchmarks/dry.py without one. Run: pytest tests/test_gpu_dry.py

Each part runs in a process of its own, because the dry run changes PyTorch. `python tests/test_gpu_dry.py` runs all
checks in one process and stops at the first that fails: so gpu_mutants.py asks whether they notice a change.
"""
import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 2
PAIR = (200, 900, 800)      # tokens of prompt, chosen and rejected; two pairs a row, two rows a rank
PAIRS_A_ROW = 2
ROWS = 2
TOKENS = 4096

# Kernels element by element and copies: what there are now, so that more of them are noticed.
ROW = 69                    # a row: rope's tables, the last norm, the embedding's gradient, which sorts
BLOCK = 70                  # a block of a row, forward and backward: norms, rope, residuals, SwiGLU
RECOMPUTED = 15             # its forward pass once more, without down's product
NORMS = 8                   # those of queries and keys, or the sums of biases' gradients
CHUNK = 34                  # of the vocabulary, a group of pairs, forward and backward
TWICE = 2                   # one that is made twice, because there is no room to keep it
LOSS = 65                   # of a group of pairs, with its averages, forward and backward
PEAK = 13.4                 # GB that step() holds at its peak
TOKEN = 91                  # of decoding
REWARD = 76                 # all kernels of a reward
GIGABYTES = 126.7           # that step() reads and writes beside products and attention, FSDP's copies included


# --- what is run ------------------------------------------------------------------------------------------------------

@functools.cache
def step(model="Llama-3-8B", gpus=8, lengths=PAIR, layers=LAYERS, node=8, method="alphapo", **knobs):
    """A dry step of two rows a rank."""
    from benchmarks import dry
    pairs = gpus * ROWS * PAIRS_A_ROW
    config = dry.config_for(
        method=method, pairs_per_step=pairs, tokens_per_micro_batch=max(TOKENS, PAIRS_A_ROW * sum(lengths)),
        max_length=lengths[0] + lengths[1], **knobs)
    c = dry.config_of(model, layers)
    recorder = dry.dry_step(c, config, dry.pairs_of([lengths] * pairs, (-1.0, -1.0)), gpus, node)
    recorder.config, recorder.c, recorder.gpus = config, c, gpus
    recorder.lengths = lengths
    return recorder


@functools.cache
def sampling(**settings):
    from benchmarks import dry
    c = dry.config_of("Llama-3-8B", LAYERS)
    recorder = dry.dry_sample(c, batch=16, **settings)
    recorder.c = c
    return recorder


@functools.cache
def scoring(model="Llama-3-8B"):
    from benchmarks import dry
    config = dry.config_for(tokens_per_micro_batch=TOKENS)
    pairs = 8 * ROWS * PAIRS_A_ROW
    c = dry.config_of(model, 8)         # enough that what they would keep is more than the root
    recorder = dry.dry_score(c, config, dry.pairs_of([PAIR] * pairs), 8)
    recorder.c = c
    return recorder


@functools.cache
def rewarding():
    from benchmarks import dry
    return dry.dry_rewards(dry.config_of("Llama-3-8B", LAYERS), 300, [200, 300, 250])


def sizes(c):
    """Weights: of all, of a block, of the root."""
    import plan
    n, block = plan.count_weights(c)
    return n, block, n - c.n_layers * block


# --- checks of any step -----------------------------------------------------------------------------------------------

def right_dtypes(r, sums=False):
    """sums: biases and their gradients are in bf16, which CUDA adds up in fp32 and then rounds."""
    seen = r.seen
    assert set(seen.products) == {"bfloat16"}, f"matmuls in {dict(seen.products)}"
    low = {name for name, dtype in seen.exact if dtype not in ("float32", "float64")}
    assert low <= ({"addmm", "sum"} if sums else set()), f"in less than fp32: {low}"
    # Averages and losses are in float64: a number a token at most.
    assert max(seen.wide.values(), default=0) <= sum(r.lengths), f"float64 of size: {dict(seen.wide)}"
    if not r.config.cpu_offload:
        assert set(seen.optimiser) == {"float32"}, f"AdamW of {dict(seen.optimiser)}"


def right_waits(r):
    # The gradient's norm, which the host has if gradients rest there, and whether all results are finite.
    assert r.seen.waits == {"item": 1 if r.config.cpu_offload else 2}, dict(r.seen.waits)
    # Of a row: tokens, positions, predictors, targets, where sequences and keys end, keys, which pairs. DPO: lengths
    # and reference of a group.
    a_row = 8 + (2 * groups(r)[0] if r.config.method == "dpo" else 0)
    copies = dict(r.seen.copies)
    found = copies.pop(("to the device", "not blocking"))
    if r.config.cpu_offload:        # weights come and gradients go, none of them waited for
        assert set(copies) == {("to the host", "not blocking")}, copies
    else:
        assert found == r.rows * a_row and not copies, (found, copies)


def groups(r):
    """(groups of pairs that the head takes of a row; chunks of the vocabulary for each; how many it makes twice)"""
    from model import CHUNK_LOGITS, KEPT_LOGITS
    responses = sum(r.lengths[1:])
    pairs = min(PAIRS_A_ROW, max(1, KEPT_LOGITS["gpu"] // r.c.vocab_size // responses))
    size = CHUNK_LOGITS["gpu"] // (pairs * responses)
    size -= size % 64
    chunks = -(-r.c.vocab_size // size)
    return PAIRS_A_ROW // pairs, chunks, max(0, chunks - KEPT_LOGITS["gpu"] // (pairs * responses * size))


def right_collectives(r, ranks=8, replicas=1):
    n, block, root = sizes(r.c)
    L, rows = r.c.n_layers, r.rows
    embedding = int(not r.c.tied)       # by itself, before the blocks, and not again for its gradient
    reduced_rows = rows if r.config.sync_every_micro_batch else 1
    found = {}
    for c in r.seen.collectives:
        number, size = found.get((c.name, c.dtype, c.ranks), (0, 0))
        found[c.name, c.dtype, c.ranks] = number + 1, size + c.bytes
    gathered = found.pop(("_allgather_base_", "bfloat16", ranks), (0, 0))
    assert gathered[0] == rows * (embedding + 1 + 2 * L), f"gathers: {gathered}"
    assert gathered[1] == pytest.approx(rows * 2 * (root + 2 * L * block), rel=1e-3), "bytes gathered"
    reduced = found.pop(("_reduce_scatter_base_", "float32", ranks), (0, 0))
    assert reduced[0] == reduced_rows * (embedding + L + 1), f"reductions: {reduced}"
    assert reduced[1] == pytest.approx(reduced_rows * 4 * n, rel=1e-3), "bytes reduced"
    if replicas > 1:
        summed = found.pop(("allreduce_", "float32", replicas), (0, 0))
        assert summed[0] == embedding + L + 1, f"sums over replicas: {summed}"
        assert summed[1] == pytest.approx(4 * n / ranks, rel=1e-3), "bytes summed over replicas"
    small = sum(size for _, size in found.values())     # results, the gradient's norm
    names = {name for name, *_ in found}
    expected = {"allreduce_"} if r.config.cpu_offload else {"allreduce_", "all_reduce"}     # norms of the host: gloo's
    assert names == expected and small < 1e5, found


def right_kernels(r):
    L, rows = r.c.n_layers, r.rows
    n_groups, chunks, twice = groups(r)
    a_block = 7 * 3 + (6 if r.config.recompute else 0)      # down's product is not needed again
    matmuls = rows * (a_block * L + n_groups * (3 * chunks + twice))
    assert r.seen.kernels["matmul"] == matmuls, f"{r.seen.kernels['matmul']} matmuls, expected {matmuls}"
    assert not any(r.seen.odd.values()), f"rows of odd lengths: {dict(r.seen.odd)}"
    # Element by element, and copies. AdamW, clipping and FSDP take all weights at once.
    found = r.seen.kernels["element by element"] + r.seen.kernels["copies"]
    a_block = BLOCK + (RECOMPUTED if r.config.recompute else 0) + (NORMS if r.c.qk_norm or r.c.qkv_bias else 0)
    most = rows * (L * a_block + n_groups * (CHUNK * chunks + TWICE * twice + LOSS) + ROW)
    if r.config.cpu_offload or r.gpus == 1:
        most += 7 * (9 * L + 3)                     # FSDP takes weight after weight then
    assert found <= most, f"{found} element by element, at most {most} expected: {dict(r.seen.ops)}"
    several = r.seen.kernels["optimiser"]
    assert several <= 5 * 9 * L or r.gpus == 1, f"{several} launches of AdamW, clipping and FSDP"


def right_memory(r):
    from benchmarks import dry
    planned = dry.planned_bytes(r.c, r.config, r.gpus)
    assert 0.98 <= planned / r.peak <= 1.1, f"planned {planned / 1e9:.2f} GB, at the peak {r.peak / 1e9:.2f}"
    assert abs(r.left) < 1e6, f"{r.left / 1e6:.1f} MB more after the step than before"


def right_attention(r):
    """Flash attention alone, once a layer and row, of no more than who sees whom."""
    calls = r.rows * r.c.n_layers
    forward = 2 * calls if r.config.recompute else calls
    expected = {"_flash_attention_forward": forward, "_flash_attention_backward": calls}
    assert r.seen.attention == expected, f"attention by {dict(r.seen.attention)}"
    P, C, R = r.lengths
    work = sum(seen_keys(queries, keys, r.c.window) for queries, keys in ((P + C, P + C), (R, P + R)))
    work *= PAIRS_A_ROW * r.c.n_heads * r.c.head_dim * (4 * forward + 10 * calls)
    assert r.seen.flops["attention"] == pytest.approx(work, rel=1e-3), f"{r.seen.flops['attention']:.3g}, {work:.3g}"


def seen_keys(queries, keys, window):
    """By the last `queries` of so many tokens."""
    return sum(min(i + 1, window or keys) for i in range(keys - queries, keys))


def flash_alone(seen, calls):
    assert seen.attention == {"_flash_attention_forward": calls}, f"attention by {dict(seen.attention)}"


def right_step(r, ranks=8, replicas=1, sums=False):
    right_dtypes(r, sums)
    right_waits(r)
    right_collectives(r, ranks, replicas)
    right_kernels(r)
    right_attention(r)
    right_memory(r)


# --- the checks -------------------------------------------------------------------------------------------------------

def a_step_on_8_ranks_computes_in_bf16_and_adds_up_in_fp32():
    right_dtypes(step())


def a_step_waits_for_its_norm_and_results_alone():
    right_waits(step())


def a_step_gathers_bf16_and_reduces_fp32_once():
    right_collectives(step())


def a_step_has_no_more_kernels_and_moves_no_more_bytes_than_stated():
    right_kernels(step())
    moved = sum(step().seen.bytes[kind] for kind in ("element by element", "copies", "optimiser")) / 1e9
    assert moved <= GIGABYTES, f"{moved:.1f} GB read and written beside products and attention"


def attention_is_one_flash_call_a_layer_and_row():
    right_attention(step())


def a_step_holds_what_the_plan_says_and_leaves_nothing():
    right_memory(step())
    assert step().peak / 1e9 <= PEAK, f"{step().peak / 1e9:.2f} GB at the peak"


def attention_of_cudnn_which_plans_for_every_length_is_off():
    import torch
    step()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def one_rank_talks_to_none_and_is_else_the_same():
    r = step(gpus=1)
    right_dtypes(r)
    right_waits(r)
    right_kernels(r)
    right_attention(r)
    assert sum(c.bytes for c in r.seen.collectives) < 1e5, r.seen.collectives


def replicas_sum_their_gradients_once_in_fp32():
    r = step(gpus=16, shard_within_node=True)
    right_step(r, replicas=2)


def replicas_sum_once_when_every_row_is_reduced():
    right_collectives(step(gpus=16, shard_within_node=True, sync_every_micro_batch=True), replicas=2)


def nothing_hides_what_root_and_embedding_exchange_and_blocks_hide_the_rest():
    from benchmarks import dry
    for r, replicas in ((step(), 1), (step(gpus=16, shard_within_node=True), 2)):
        _, block, root = sizes(r.c)
        sizes_exposed = [r.rows * 2 * root, 4 * root] + [4 * root / 8] * (replicas - 1)
        seconds = dry.predicted_seconds(r.seen, 8, block)["collectives, exposed"]
        assert seconds == pytest.approx(sum(sizes_exposed) / dry.NODE_RATE, rel=0.01)


def recomputation_and_sync_hold_less_and_gather_as_often():
    r = step(recompute=True, sync_every_micro_batch=True)
    right_step(r)
    assert r.peak < 0.8 * step().peak


def recomputation_does_not_read_the_random_generator():
    assert step(recompute=True, sync_every_micro_batch=True).seen.rng_reads == 0


def offload_moves_weights_and_gradients_without_waiting():
    r = step(cpu_offload=True)
    right_step(r)
    n, *_ = sizes(r.c)
    copied = r.seen.copied
    assert copied["to the host"] == pytest.approx(4 * n / 8, rel=0.01)      # fp32 gradients, once


def dpo_copies_its_reference_and_is_else_the_same():
    r = step(method="dpo")
    right_step(r)


def windows_take_no_mask_and_no_memory():
    lengths = (200, 4900, 4900)
    r, whole = (step(model, lengths=lengths) for model in ("Mistral-7B-window", "Mistral-7B"))
    right_step(r)
    right_step(whole)
    assert r.peak == whole.peak and r.seen.kernels == whole.seen.kernels


def tied_weights_are_gathered_and_reduced_once():
    right_step(step("Llama-3.2-1B"))


def biases_of_qwen2_change_nothing_else():
    right_step(step("Qwen2.5-7B"), sums=True)


def norms_of_qwen3_change_nothing_else():
    right_step(step("Qwen3-8B"))


def scoring_pairs_keeps_nothing_and_forgets_the_gathered_weights():
    r = scoring()
    assert set(r.seen.products) == {"bfloat16"} and not r.seen.wide
    flash_alone(r.seen, 8 * ROWS)
    n, block, root = sizes(r.c)
    gathers = [c for c in r.seen.collectives if c.name == "_allgather_base_"]
    assert len(gathers) == 1 + (1 + 8) * ROWS, len(gathers)     # the root once
    assert {c.dtype for c in gathers} == {"bfloat16"}
    assert not r.seen.waits and r.seen.copies == {("to the device", "not blocking"): 8 * ROWS}, r.seen
    assert abs(r.left) < 1e6, f"{r.left / 1e6:.1f} MB left"
    held = r.peak - r.at_start          # root and embedding in FSDP's buffer and in place
    assert held < 1.01 * 2 * 2 * root, f"{held / 1e9:.2f} GB"


def a_reward_model_waits_for_nothing_and_has_its_head_in_fp32():
    r = rewarding()
    # Seven matmuls a layer read two each, and attention three.
    assert r.seen.products == {"bfloat16": 17 * LAYERS, "float32": 2}, dict(r.seen.products)
    flash_alone(r.seen, LAYERS)
    assert not r.seen.wide, dict(r.seen.wide)
    assert not r.seen.waits and r.seen.copies == {("to the device", "not blocking"): 6}, r.seen
    assert sum(r.seen.kernels.values()) <= REWARD, r.seen.kernels


def decoding_waits_once_a_token_and_takes_flash_attention():
    r = sampling()
    flash_alone(r.seen, LAYERS)
    assert r.seen.waits == {"tolist": 1}, dict(r.seen.waits)
    # Tokens and places; the random numbers.
    assert r.seen.copies == {("to the device", "not blocking"): 3}, r.seen.copies


def decoding_is_in_bf16_with_small_float64_and_few_kernels():
    r = sampling()
    assert set(r.seen.products) == {"bfloat16"}, dict(r.seen.products)
    assert max(r.seen.wide.values(), default=0) <= 16 * 256, dict(r.seen.wide)      # not of the vocabulary
    assert r.seen.kernels["matmul"] == 7 * LAYERS + 1
    kernels = r.seen.kernels["element by element"] + r.seen.kernels["copies"]
    assert kernels <= TOKEN, dict(r.seen.ops)
    # A token reads the weights once, and the keys and values that are there.
    c = r.c
    _, block, _ = sizes(c)
    weights = 2 * (LAYERS * block + c.vocab_size * c.dim)
    cache = 2 * 2 * LAYERS * 16 * 1010 * c.n_kv_heads * c.head_dim
    traffic = sum(r.seen.bytes.values())
    assert traffic < 1.25 * (weights + cache), f"{traffic / 1e9:.2f} GB a token"


def prefill_is_fused_and_makes_logits_of_last_tokens_alone():
    r = sampling()
    flash_alone(r.prefill, LAYERS)
    assert set(r.prefill.products) == {"bfloat16"}, dict(r.prefill.products)
    c = r.c
    _, block, _ = sizes(c)
    assert r.prefill.flops["matmul"] < 1.01 * (2 * LAYERS * block * 16 * 1000 + 2 * 16 * c.vocab_size * c.dim)


def the_plan_is_right_on_4_8_and_64_gpus():
    from benchmarks import dry
    # At full depth, and all knobs: benchmarks/dry.json, which test_readme.py compares.
    for model, gpus, knobs in (
            ("Llama-3-8B", 64, {"recompute": True}), ("Llama-3-8B", 4, {"recompute": True}), ("Mistral-7B", 8, {}),
            ("Llama-3.2-1B", 64, {}), ("Qwen2.5-7B", 8, {"sync_every_micro_batch": True}),
            ("Qwen3-8B", 8, {"cpu_offload": True})):
        config = dry.checked_config(gpus, knobs)
        c = dry.config_of(model, layers=3)
        r = dry.dry_step(c, config, dry.pairs_of([dry.LONGEST] * config.pairs_per_step), gpus)
        planned = dry.planned_bytes(c, config, gpus) / r.peak
        assert 0.97 <= planned <= 1.06, f"{model} on {gpus} GPUs, {knobs}: {planned:.2f} of the peak"


PARTS = {
    "a step": [
        a_step_on_8_ranks_computes_in_bf16_and_adds_up_in_fp32, a_step_waits_for_its_norm_and_results_alone,
        a_step_gathers_bf16_and_reduces_fp32_once,
        a_step_has_no_more_kernels_and_moves_no_more_bytes_than_stated, attention_is_one_flash_call_a_layer_and_row,
        a_step_holds_what_the_plan_says_and_leaves_nothing,
        attention_of_cudnn_which_plans_for_every_length_is_off],
    "sampling and scoring": [
        scoring_pairs_keeps_nothing_and_forgets_the_gathered_weights,
        a_reward_model_waits_for_nothing_and_has_its_head_in_fp32,
        decoding_waits_once_a_token_and_takes_flash_attention,
        decoding_is_in_bf16_with_small_float64_and_few_kernels,
        prefill_is_fused_and_makes_logits_of_last_tokens_alone],
    "knobs": [
        one_rank_talks_to_none_and_is_else_the_same, replicas_sum_their_gradients_once_in_fp32,
        replicas_sum_once_when_every_row_is_reduced,
        nothing_hides_what_root_and_embedding_exchange_and_blocks_hide_the_rest,
        recomputation_and_sync_hold_less_and_gather_as_often,
        recomputation_does_not_read_the_random_generator, offload_moves_weights_and_gradients_without_waiting,
        dpo_copies_its_reference_and_is_else_the_same],
    "models": [
        windows_take_no_mask_and_no_memory, tied_weights_are_gathered_and_reduced_once,
        biases_of_qwen2_change_nothing_else, norms_of_qwen3_change_nothing_else],
    "the plan": [the_plan_is_right_on_4_8_and_64_gpus],
}

# --- processes --------------------------------------------------------------------------------------------------------

@functools.cache
def outcomes(part):
    """{name of a check: None, or how it failed}, of a process that ran the part."""
    ran = subprocess.run([sys.executable, __file__, part], capture_output=True, text=True, timeout=600, cwd=ROOT,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(PARTS[part]), ran.stdout + ran.stderr
    return {name: error for line in lines for name, error in json.loads(line).items()}


def cases():
    for part, checks in PARTS.items():
        for check in checks:
            yield pytest.param(part, check.__name__, id=check.__name__)


@pytest.mark.parametrize("part, check", list(cases()))
def test_on_a_gpu(part, check):
    error = outcomes(part)[check]
    assert error is None, error


def main(parts):
    sys.path[:0] = [str(ROOT)]
    stop = not parts
    for part in parts or PARTS:
        for check in PARTS[part]:
            error = None
            try:
                check()
            except Exception as e:
                error = str(e) if isinstance(e, AssertionError) and str(e) else traceback.format_exc()
            if stop and error:
                sys.exit(f"{check.__name__}: {error}")
            print(json.dumps({check.__name__: error}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
