"""Losses and gradient norms of 50 steps against stored ones, so that no change alters the method unseen. In float64
they are the same but for rounding on every machine.

    pytest tests/test_trajectory.py
    PYTHONPATH=. python tests/test_trajectory.py            # stores them anew, and says what changed

Whoever stores them anew says in the commit why the method is another one.
"""
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train import main, parse_config

TINY = Path(__file__).parent.parent / "data" / "tiny"
STORED = Path(__file__).parent / "trajectory.json"
NAMES = ("loss", "grad_norm", "eval_loss")
STEPS = {"alphapo": 50, "simpo": 20, "dpo": 20}

pytestmark = pytest.mark.usefixtures("one_thread")


def make_job(folder):
    """One layer of the embedded model, and 38 of its pairs: 33 to train on, in epochs of 8 steps of 4 and one of 1."""
    shutil.copytree(TINY / "model", folder / "model")
    settings = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    tensors = load_file(folder / "model/model.safetensors")
    later = tuple(f"model.layers.{i}." for i in range(1, settings["num_hidden_layers"]))
    kept = {name: w for name, w in tensors.items() if not name.startswith(later)}
    save_file(kept, folder / "model/model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in (TINY / "pairs.jsonl").read_text().splitlines()]
    rows = [row for row in rows if max(row["all_rm_scores"]) > min(row["all_rm_scores"])][:38]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trajectory(job, **changes):
    """{name: its numbers, step after step} of a run in which every knob of the method and the optimiser counts."""
    output = Path(tempfile.mkdtemp(dir=job)) / "out"
    # Several rows a step, gradients on both sides of the clipping, and a warm-up of 6.5 steps (of 20: 2.6), rounded up.
    flags = {"model": job / "model", "data": job / "pairs.jsonl", "output": output, "eval_pairs": 5, "eval_every": 10,
             "pairs_per_step": 4, "epochs": 6, "tokens_per_micro_batch": 120, "learning_rate": 3e-4,
             "warmup_ratio": 0.13, "weight_decay": 0.1, "max_grad_norm": 2.0, "sft_weight": 0.1,
             "weight_dtype": "float64", "save_dtype": "float32", **changes}
    main(parse_config([str(x) for name, value in flags.items() for x in (f"--{name}", value)]))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in NAMES}


def largest_difference(found, expected):
    """Relative."""
    assert found.keys() == expected.keys()
    return max(abs(a - b) / abs(b) for name in expected for a, b in zip(found[name], expected[name], strict=True))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


@pytest.mark.parametrize("method", STEPS)
def test_steps_are_those_that_were_stored(method, job, stored):
    norms = stored[method]["grad_norm"]
    assert len(stored[method]["loss"]) == len(norms) == STEPS[method]
    assert method == "dpo" or min(norms) < 2 < max(norms)
    assert largest_difference(trajectory(job, method=method, max_steps=STEPS[method]), stored[method]) < 1e-9


@pytest.mark.parametrize("change", [
    {"gamma_beta_ratio": 0.2},              # as if gamma were subtracted twice
    {"warmup_ratio": 0.1},                  # as if 2.6 steps of warm-up were 2
    {"method": "alphapo", "alpha": 1e-6}], ids=str)
def test_a_small_change_of_the_method_is_another_trajectory(change, job, stored):
    found = trajectory(job, **{"method": "simpo", "max_steps": 20} | change)
    assert largest_difference(found, stored["simpo"]) > 1e-8


if __name__ == "__main__":
    torch.set_num_threads(1)
    new = {}
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder) / "job")
        for method, steps in STEPS.items():
            new[method] = trajectory(job, method=method, max_steps=steps)
    if STORED.exists():
        old = json.loads(STORED.read_text())
        for method in STEPS:
            change = largest_difference(new[method], old[method])
            print(f"{method}: largest relative difference from before {change:.1e}")
    STORED.write_text(json.dumps(new, indent=1) + "\n")
