"""Changes of the GPU path, a line each: does tests/test_gpu_dry.py notice them?

    make gpu-mutants                                # all; 15 minutes on 2 cores
    make gpu-mutants ARGS="--only train.py cpu"     # those whose file, text or why has one of these words

Each change is made in a copy of the repository, where the dry checks run until one fails. A text that is not found
exactly once is an error: the code has changed, and the line here has to follow. Exit status 1 if a change is missed
that is not in MISSED, or caught though it is.
"""
import argparse
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"         # a forked child has no threads of its parent

# All that is not the project's, loaded once for all children.
import pytest                                                                                   # noqa: F401
import torch.distributed.checkpoint                                                             # noqa: F401
import torch.distributed.fsdp                                                                   # noqa: F401
import torch.distributed.tensor                                                                 # noqa: F401
import torch.testing._internal.distributed.fake_pg                                              # noqa: F401
import torch.utils.flop_counter                                                                 # noqa: F401

LIMIT = 900             # seconds for a change
ROOT = Path(__file__).resolve().parent.parent

# (file, old text, new text, what is wrong with it)
MUTANTS = [
    # Shards.
    ("distributed.py", "reduce_dtype=getattr(torch, config.weight_dtype)",
     "reduce_dtype=getattr(torch, config.compute_dtype)", "gradients reduced in bf16"),
    ("distributed.py", "param_dtype=getattr(torch, config.compute_dtype)",
     "param_dtype=getattr(torch, config.weight_dtype)", "blocks computed in fp32"),
    ("distributed.py", "model.set_requires_gradient_sync(every_row or last_row)",
     "model.set_requires_gradient_sync(True)", "every row reduced"),
    ("distributed.py", "model.set_requires_gradient_sync(every_row or last_row)",
     "model.set_requires_gradient_sync(last_row)", "sync_every_micro_batch ignored"),
    ("distributed.py", "model.set_requires_all_reduce(last_row)", "model.set_requires_all_reduce(True)",
     "replicas sum after every row"),
    ("distributed.py", "[*embedding, *model.model.layers, model]:", "[*embedding, model]:",
     "all weights gathered at once"),
    ("distributed.py", "offload_policy=offload)\n    for",
     "offload_policy=offload, reshard_after_forward=False)\n    for", "blocks not freed after their forward pass"),
    ("distributed.py", "embedding = [] if model.config.tied else", "embedding = [] if True else",
     "the embedding gathered all the time"),
    ("distributed.py", "        module.set_unshard_in_backward(False) ", "        pass ",
     "the embedding gathered for its gradient"),
    ("distributed.py", "    register_fsdp_forward_method(model, \"states\")", "    pass",
     "FSDP does not see how it is entered"),
    ("distributed.py", "    if config.cpu_offload:\n        offload", "    if False:\n        offload",
     "offload ignored"),
    ("distributed.py", "pin_memory=device.type != \"cpu\"", "pin_memory=False", "offload waits for each copy"),
    ("distributed.py", "(world // local, local), mesh", "(local, world // local), mesh", "shards over nodes"),
    ("distributed.py", "norm = norm.full_tensor()", "norm = norm.to_local()", "each rank clips by its own norm"),
    ("distributed.py", "return norm.item()", "return norm.cpu().item()", "a copy to the host"),
    ("distributed.py", "        model.reshard()", "        pass", "gathered weights kept after an evaluation"),
    ("distributed.py", "        gpu.speed_up(model, getattr(torch, config.compute_dtype), config.compile)",
     "        pass", "nothing of gpu.py"),
    ("distributed.py", "gpu.speed_up(model, getattr(torch, config.compute_dtype)",
     "gpu.speed_up(model, getattr(torch, config.weight_dtype)", "no flash attention, as if in fp32"),
    # The layers.
    ("model.py", "x = self.model.embed_tokens(tokens) ", "x = self.model.embed_tokens(tokens).float() ",
     "fp32 residuals"),
    ("model.py", "(table.to(x.dtype) for table in", "(table for table in", "queries and keys in fp32"),
    ("model.py", "recompute = self.recompute and", "recompute = False and", "recompute ignored"),
    ("model.py", "        out = SwiGLU.apply(gate, up, down) ", "        return self.down_proj(F.silu(gate) * up) ",
     "two more tensors kept a block"),
    ("model.py", "return gate.new_empty(len(gate), len(down))", "return F.silu(gate).mul_(up) @ down.T",
     "down's product made again by recomputation"),
    ("model.py", "grad_up = silu.mul_(grad_product)", "grad_up = silu * grad_product",
     "one more tensor in the backward pass"),
    ("model.py", "grad_down = grad.T @ (silu * up)",
     "grad_down = (grad.T.float() @ (silu * up).float()).to(down.dtype)",
     "a matmul in fp32"),
    ("model.py", "angles = positions[:, None, None] * freq", "angles = positions[:, None, None].double() * freq",
     "rope in float64"),
    ("model.py", "angles = positions[:, None, None] * freq", "angles = (positions[:, None, None] * freq).bfloat16()",
     "rope in bf16"),
    ("model.py", "preserve_rng_state=False)", "preserve_rng_state=True)", "the generator's state read"),
    ("model.py", "return numbers.to(device, non_blocking=True)", "return numbers.to(device)", "blocking copies"),
    ("model.py", "numbers = numbers.pin_memory()", "pass", "copies from memory that is not pinned"),
    # Attention.
    ("gpu.py", "torch.backends.cuda.enable_cudnn_sdp(False)", "pass", "cuDNN's attention may be chosen"),
    ("gpu.py", "    if flash_serves(dtype, model.config.head_dim, model.device):", "    if False:", "plain attention"),
    ("gpu.py", "head_dim <= 256", "head_dim <= 64", "plain attention for heads of 128"),
    ("gpu.py", "        model.decode_attention = flash_decode_attention", "        pass", "plain decoding"),
    ("gpu.py", "window_size_left=left", "window_size_left=-1", "windows ignored"),
    ("gpu.py", "longest_key, 0.0, causal, False,", "longest_key, 0.0, False, False,", "every token sees all"),
    ("gpu.py", "keys = k.index_select(0, places) ", "keys = k[places] ", "a gradient that sorts"),
    ("gpu.py", "values = v.index_select(0, places)", "values = v.index_select(0, places).clone()", "a copy"),
    ("gpu.py", "query_ends = to_device(query_ends, device, torch.int32)",
     "query_ends = torch.tensor(query_ends, dtype=torch.int32, device=device)", "a copy that is waited for"),
    ("gpu.py", "key_ends = to_device(key_ends, device, torch.int32)",
     "key_ends = to_device(query_ends.tolist(), device, torch.int32)", "a wait a row"),
    ("gpu.py", "q, keys, values, query_ends, key_ends", "q.float(), keys.float(), values.float(), query_ends, key_ends",
     "attention in fp32"),
    ("gpu.py", "    used = used.int()", "    used = used.int()\n    int(ends.max())", "a wait a token"),
    ("gpu.py", "keys.flatten(0, 1), values.flatten(0, 1), counts", "keys.flatten(0, 1).clone(), values.flatten(0, 1), "
     "counts",
     "the cache copied every token"),
    ("model.py", "(tokens, positions, attend)[predictors], tokens[targets]",
     "(tokens, positions, attend)[predictors.tolist()], tokens[targets]", "a wait in the row"),
    # The head.
    ("model.py", "return torch.mm(states, weight.T, out_dtype=wide)", "return (states @ weight.T).to(wide)",
     "logits rounded to bf16"),
    ("model.py", "return torch.mm(states, weight.T, out_dtype=wide)", "return states @ weight.T", "logits in bf16"),
    ("model.py", "weight.T, out_dtype=wide)", "weight.T, out_dtype=wide).double()", "logits in float64"),
    ("model.py", "return torch.mm(states, weight.T, out_dtype=wide)", "return states.float() @ weight.float().T",
     "logits by fp32 matmuls"),
    ("model.py", "        size -= size % 64", "        size -= 1 - size % 2", "rows of logits of odd lengths"),
    ("model.py", "return _limit(KEPT_LOGITS, states) // len(weight)", "return 10**9",
     "all pairs at once: logits made twice"),
    ("model.py", "size = max(1, _limit(CHUNK_LOGITS, states) // len(states))", "size = len(weight)",
     "all logits at once"),
    ("model.py", "return limits[\"cpu\" if states.device.type == \"cpu\" else \"gpu\"]", "return limits[\"cpu\"]",
     "chunks for caches of CPUs"),
    ("model.py", "room -= z.numel()", "room -= 0", "all logits kept"),
    ("model.py", "        del z       ", "        pass        ", "a chunk kept while the next is made"),
    ("model.py", "torch.addmm(total, a, b, out_dtype=total.dtype, out=total)", "total += a @ b",
     "the head's gradient made twice"),
    # The step.
    ("train.py", "tokens = to_device(row.tokens, model.device)",
     "tokens = torch.as_tensor(row.tokens).to(model.device)",
     "a blocking copy"),
    ("train.py", "averages)).detach())", "averages)).detach().cpu())", "results copied a group at a time"),
    ("train.py", "        results.append(torch.col", "        losses.sum().item()\n        results.append(torch.col",
     "a wait a group"),
    ("train.py", "reference = to_device(reference, chosen_logps.device, torch.float64)",
     "reference = torch.tensor(reference, device=chosen_logps.device, dtype=torch.float64)", "a blocking copy"),
    ("train.py", "wide = torch.promote_types(weight.dtype, torch.float32)", "wide = weight.dtype",
     "the head's gradient summed in bf16"),
    ("train.py", "results.index_copy_(0, to_device(row.indices, model.device), of_pairs)",
     "results[row.indices] = of_pairs", "an index that is waited for"),
    ("train.py", "logps(*inputs, keep=training)", "logps(*inputs, keep=False)", "logits made twice"),
    ("train.py", "grad_states = torch.empty_like(states)",
     "grad_states = torch.empty_like(states, dtype=torch.float64)",
     "gradients of the states in float64"),
    ("train.py", " if weight.grad is None\n", " if True\n", "the head's gradients of earlier rows lost"),
    ("train.py", "        grad_weight = (torch.zeros_like(weight, dtype=wide)",
     "        weight.grad_twin = torch.zeros_like(weight)\n"
     "        grad_weight = (torch.zeros_like(weight, dtype=wide)",
     "the head's gradient held twice"),
    ("train.py", "dtype=torch.float64, device=model.device)", "dtype=torch.float64)", "results on the host"),
    ("train.py", "    dist.all_reduce(results) ", "    pass ", "ranks do not share their results"),
    ("train.py", "last_row=row is rows[-1]", "last_row=True", "every row reduced"),
    ("train.py", "every_row=config.sync_every_micro_batch", "every_row=False", "sync_every_micro_batch ignored"),
    ("train.py", "    rows = rows[dist.get_rank()::dist.get_world_size()]\n", "", "every rank runs all rows"),
    ("train.py", "lr=config.learning_rate, fused=True)", "lr=config.learning_rate)", "AdamW in many passes"),
    ("train.py", "\"exp_avg\": torch.zeros_like(p),", "\"exp_avg\": torch.zeros_like(p, dtype=torch.bfloat16),",
     "a moment in bf16"),
    ("train.py", "    optimizer.zero_grad()\n", "    optimizer.zero_grad(set_to_none=False)\n",
     "gradients kept between steps"),
    ("train.py", "results.isfinite().all().item()", "results.cpu().isfinite().all().item()", "all results copied"),
    ("train.py", "@torch.no_grad()\ndef score_pairs", "def score_pairs", "an evaluation keeps activations"),
    ("train.py", "        forget_gathered_weights(model) ", "        pass ",
     "gathered weights kept after an evaluation"),
    # Sampling and scoring.
    ("sampler.py", "tokens = tokens.tolist() ", "tokens = [t.item() for t in tokens] ", "a wait an answer"),
    ("sampler.py", "    flat = [i for i, token in enumerate(tokens) if token == FLAT]",
     "    flat = list(range(len(tokens)))[:1] if \"first\" not in settings else []", "a row drawn twice"),
    ("sampler.py", "    tokens = tokens.tolist()    ",
     "    (tokens == FLAT).any().item(); tokens = tokens.tolist()    ", "a second wait a token"),
    ("sampler.py", "probs, candidates = probs.topk(n_candidates)",
     "probs, candidates = probs.sort(-1, descending=True)",
     "the vocabulary sorted, in float64"),
    ("sampler.py", "return states @ model.head_weight.T", "return states.float() @ model.head_weight.float().T",
     "the head in fp32"),
    ("sampler.py", "to_device(last_tokens, model.device), to_device(ends", "torch.tensor(last_tokens, "
     "device=model.device), to_device(ends", "tokens that are waited for"),
    ("sampler.py", "states[to_device(predictors, device)] @ model.head_weight.T",
     "(states @ model.head_weight.T)[to_device(predictors, device)]", "logits of whole prompts"),
    ("score.py", "states[to_device(end_tokens, model.device)]", "states.double()[to_device(end_tokens, model.device)]",
     "states in float64"),
]

# old text of those that are missed, and why that is so.
MISSED = {
    "norm = norm.full_tensor()": "clip_grad_norm_ has added up the ranks' norms already: the same number",
    " if weight.grad is None\n": "FSDP takes the gradient away after every row: it is None",
    "grad_up = silu.mul_(grad_product)": "the peak is a moment before, in silu_backward: no more is held there",
    "numbers = numbers.pin_memory()": "fakes lie in no memory",
}


def start(mutant, folder):
    """Forks a process that runs the dry checks on a copy with this change; its id, or None if the text is not there
    exactly once. PyTorch is loaded already, which is half of what a run takes."""
    file, old, new, _ = mutant
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        return None
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.json"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    (folder / file).write_text(text.replace(old, new))
    pid = os.fork()
    if pid:
        return pid
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    signal.alarm(LIMIT)
    sys.path[0] = str(folder)
    sys.argv = ["tests/test_gpu_dry.py"]
    status = 1
    try:
        runpy.run_path("tests/test_gpu_dry.py", run_name="__main__")
        status = 0
    except SystemExit as e:
        print(e)
        status = int(bool(e.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def reason(folder):
    """Which check failed, and how."""
    lines = [line for line in (folder / "output").read_text().splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if ": " in line and line[0].islower()), 0)
    if lines and lines[first].endswith("Traceback (most recent call last):"):
        return lines[first].split(":")[0] + ": " + lines[-1]
    return lines[first] if lines else "it died"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if any(word in text for word in args.only for text in m)]
    began = time.time()
    wrong = []
    caught = 0
    running = {}            # id of a process -> its change and folder
    with tempfile.TemporaryDirectory() as folder:
        for number, mutant in enumerate([*mutants, *[None] * args.jobs]):
            while running and (len(running) == args.jobs or mutant is None):
                pid, status = os.wait()
                (file, old, _, why), copy = running.pop(pid)
                noticed = status != 0
                caught += noticed
                if noticed == (old in MISSED):
                    wrong.append(why)
                said = MISSED.get(old, reason(copy) if noticed else "no check failed")
                print(f"{'caught' if noticed else 'missed':8}{file:16}{why}\n        {said[:140]}", flush=True)
                shutil.rmtree(copy)
            if mutant is None:
                continue
            copy = Path(folder) / str(number)
            pid = start(mutant, copy)
            if pid is None:
                wrong.append(f"not found once: {mutant[1]!r}")
            else:
                running[pid] = mutant, copy
    print(f"{caught} of {len(mutants)} caught; {time.time() - began:.0f} s")
    if wrong:
        sys.exit("not as expected: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
