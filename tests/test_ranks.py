"""Many ranks against one, resumed runs against undisturbed ones, and what happens to runs that are disturbed.

    python -m pytest tests/test_ranks.py
"""
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import plan
import ranks
import train
from model import Transformer, load_model, read_config, save_model
from ranks import Ranks, run_ranks
from small import TIMES
from train import main, parse_config

ROOT = Path(train.__file__).parent
TINY = ROOT / "data" / "tiny"
MODEL = None        # see two_layers
FLOAT64 = {"weight_dtype": "float64", "save_dtype": "float64"}
FLOAT32 = {"weight_dtype": "float32", "save_dtype": "float32"}


@pytest.fixture(scope="session", autouse=True)
def two_layers(tmp_path_factory):
    """The first half of the embedded model: ranks that share a core pay for every block."""
    global MODEL
    MODEL = tmp_path_factory.mktemp("model") / "model"
    changed_copy(TINY / "model", MODEL, left_out=("layers.2.", "layers.3."), num_hidden_layers=2)


def changed_copy(model, folder, left_out, **settings):
    """A model folder, copied with other settings in config.json, without the weights whose names have these parts."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in tensors.items() if not any(part in name for part in left_out)},
              folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """78 pairs of the embedded default: 5 are held out, and the last of 10 steps of 8 has only one."""
    rows = [json.loads(line) for line in (TINY / "pairs.jsonl").read_text().splitlines()]
    rows = [row for row in rows if max(row["all_rm_scores"]) > min(row["all_rm_scores"])][:78]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(data, output, /, **changes):
    """20 steps, evaluated and saved in the middle."""
    fields = {"model": MODEL, "data": data, "output": output, "eval_pairs": 5, "pairs_per_step": 8, "epochs": 2,
              "learning_rate": 1e-4, "eval_every": 10, "save_every": 10, "keep_last": 0, **FLOAT64, **changes}
    argv = []
    for name, value in fields.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


def config(*args, **changes):
    return parse_config(flags(*args, **changes))


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output, step=20):
    tensors = {}
    for file in (output / f"step-{step:06d}").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def largest_difference(tensors, expected):
    """Relative to the norm of each tensor."""
    assert tensors.keys() == expected.keys() and tensors
    return max(((tensors[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


def assert_same_metrics(output, expected, rel):
    lines, expected = metrics(output), metrics(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, e in zip(lines, expected):
        for name in e:
            zero = "accuracies" in name and abs(e[name.replace("accuracies", "margins")]) < 1e-12     # DPO at the start
            if name not in (*TIMES, "micro_batches", "imbalance") and not zero:
                assert line[name] == pytest.approx(e[name], rel=rel, abs=1e-12), (line["step"], name)


def assert_bit_equal(output, expected, step=20):
    found, expected = weights(output, step), weights(expected, step)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# --- the same run on any number of ranks ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    """{method: the run folder of 20 steps in float64 on one rank, each step one row}"""
    root = tmp_path_factory.mktemp("one")
    for method in ("alphapo", "dpo"):
        run_ranks(1, root / "log", main, config(data, root / method, method=method))
    return {method: root / method for method in ("alphapo", "dpo")}


@pytest.mark.parametrize("world, options, nodes", [
    (1, {"tokens_per_micro_batch": 150, "recompute": True}, 1),
    (1, {"cpu_offload": True}, 1),
    (2, {}, 1),
    (2, {"tokens_per_micro_batch": 150, "recompute": True}, 1),
    (2, {"method": "dpo", "tokens_per_micro_batch": 150}, 1),
    (3, {"tokens_per_micro_batch": 150}, 1),
    (3, {"tokens_per_micro_batch": 90, "sync_every_micro_batch": True, "recompute": True}, 1),
    (4, {}, 1),
    (4, {"tokens_per_micro_batch": 90, "shard_within_node": True}, 2),
    (4, {"tokens_per_micro_batch": 90, "shard_within_node": True, "sync_every_micro_batch": True}, 2),
    (4, {"shard_within_node": True, "recompute": True, "cpu_offload": True, "method": "dpo"}, 2),
], ids=str)
def test_a_run_is_the_same_on_any_number_of_ranks(world, options, nodes, data, one_rank, tmp_path):
    out, expected = tmp_path / "out", one_rank[options.get("method", "alphapo")]
    log = run_ranks(world, tmp_path, main, config(data, out, **options), nodes=nodes)
    assert (f"weights sharded over {world // nodes if options.get('shard_within_node') else world}" in log) == (
        world > 1 or "cpu_offload" in options)
    assert_same_metrics(out, expected, rel=1e-8)
    assert largest_difference(weights(out), weights(expected)) <= 1e-8
    start = {name: w.double() for name, w in load_file(MODEL / "model.safetensors").items()}
    assert largest_difference(weights(expected), start) > 1e-3      # it is a comparison of something


@pytest.mark.parametrize("world, options, nodes", [(2, {}, 1), (3, {"recompute": True}, 1),
                                                   (4, {"shard_within_node": True}, 2)], ids=str)
def test_losses_and_clipped_gradients_of_an_fp32_step_are_the_same_on_any_number_of_ranks(world, options, nodes, data,
                                                                                          tmp_path):
    # against one rank in float64: no rounding of the reference's own
    run_ranks(1, tmp_path, ranks.save_gradients, config(data, "", max_grad_norm=0.5), tmp_path / "one.pt")
    options |= {"max_grad_norm": 0.5, "tokens_per_micro_batch": 120, **FLOAT32}
    run_ranks(world, tmp_path, ranks.save_gradients, config(data, "", **options), tmp_path / "many.pt", nodes=nodes)
    one, many = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "many.pt")
    torch.testing.assert_close(many["results"], one["results"], rtol=1e-5, atol=1e-6)
    assert one["norm"] > 1 and many["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert largest_difference(many["grads"], one["grads"]) <= 1e-5
    total = sum(grad.norm() ** 2 for grad in many["grads"].values()).sqrt()
    assert total.item() == pytest.approx(0.5, rel=1e-5)


def test_gradients_of_tied_weights_are_the_same_on_two_ranks(data, tmp_path):
    """The embedding is the head then: FSDP gathers it with the root and not by itself."""
    tied = tmp_path / "tied"
    changed_copy(MODEL, tied, left_out=("lm_head.",), tie_word_embeddings=True)
    for world in (1, 2):
        job = config(data, "", model=tied, max_grad_norm=0.5, tokens_per_micro_batch=120)
        run_ranks(world, tmp_path, ranks.save_gradients, job, tmp_path / f"{world}.pt")
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert largest_difference(two["grads"], one["grads"]) <= 1e-10
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-10)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_computes_in_bf16_is_near_and_judges_too(world, data, one_rank, tmp_path):
    """What GPUs do by default, here on the CPU."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Sort these words: owl, moss, fern"}\n' * 3)
    options = {"judge": f"{TINY}/judge.py:score", "judge_prompts": tmp_path / "prompts.jsonl", "max_new_tokens": 12,
               "compute_dtype": "bfloat16", "max_steps": 20, **FLOAT32}
    log = run_ranks(world, tmp_path, main, config(data, tmp_path / "out", **options))
    assert "computing in bfloat16" in log and f"sharded over {world}" in log
    found, expected = metrics(tmp_path / "out"), metrics(one_rank["alphapo"])
    assert len(found) == len(expected) and "eval_judge_score" in found[0] and "eval_judge_score" in found[-1]
    for line, e in zip(found, expected):
        for name in ("loss", "logps/chosen", "eval_loss", "eval_logps/chosen"):
            if name in e:
                assert line[name] == pytest.approx(e[name], rel=0.05, abs=0.02)


def test_the_imbalance_of_the_ranks_is_logged(data, tmp_path):
    run_ranks(2, tmp_path, main, config(data, tmp_path / "out", max_steps=10, tokens_per_micro_batch=150, save_every=0))
    lines = [line for line in metrics(tmp_path / "out") if "imbalance" in line]
    assert len(lines) == 10 and all(1 <= line["imbalance"] < 1.3 and line["micro_batches"] > 1 for line in lines[:9])
    assert lines[9]["imbalance"] == 2 and lines[9]["pairs"] == 1        # one pair on two ranks


# --- resuming ---------------------------------------------------------------------------------------------------------

def cut_back(output, copy):
    """A copy of a run folder as it was when only its middle checkpoint stood, but for metrics logged later."""
    shutil.copytree(output, copy)
    shutil.rmtree(copy / "step-000020")
    with open(copy / "metrics.jsonl", "a") as f:
        f.write('{"step": 21, "lo')
    return copy


@pytest.mark.parametrize("world, options", [
    (1, {}), (2, {}), (2, {"method": "dpo"}), (3, {"tokens_per_micro_batch": 90})], ids=str)
def test_a_resumed_run_equals_one_that_was_not_disturbed_bit_for_bit(world, options, data, tmp_path):
    options |= FLOAT32
    run_ranks(world, tmp_path, main, config(data, tmp_path / "whole", **options))
    cut = cut_back(tmp_path / "whole", tmp_path / "cut")
    log = run_ranks(world, tmp_path, main, config(data, cut, resume=True, **options))
    assert f"resume   {cut}/step-000010, 10 steps to go" in log and "step 11/20" in log and "step 10/20" not in log
    assert_bit_equal(cut, tmp_path / "whole")
    assert_same_metrics(cut, tmp_path / "whole", rel=0)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3)])
def test_a_run_may_be_resumed_on_another_number_of_ranks(before, after, data, one_rank, tmp_path):
    run_ranks(before, tmp_path, main, config(data, tmp_path / "whole"))
    cut = cut_back(tmp_path / "whole", tmp_path / "cut")
    options = {"tokens_per_micro_batch": 150, "recompute": True, "keep_last": 1}
    run_ranks(after, tmp_path, main, config(data, cut, resume=True, **options))
    assert_same_metrics(cut, one_rank["alphapo"], rel=1e-8)
    assert largest_difference(weights(cut), weights(one_rank["alphapo"])) <= 1e-8
    assert not (cut / "step-000010").exists()       # keep_last


def test_a_finished_run_has_nothing_to_resume_and_an_unstarted_one_begins(data, tmp_path):
    first = main(config(data, tmp_path / "out", resume=True, max_steps=2))
    modified = (tmp_path / "out/step-000002/config.json").stat().st_mtime_ns
    assert main(config(data, tmp_path / "out", resume=True, max_steps=2)) == first and len(first) == 2
    assert (tmp_path / "out/step-000002/config.json").stat().st_mtime_ns == modified


def test_incomplete_checkpoints_are_passed_over_and_named(data, tmp_path, capsys):
    main(config(data, tmp_path / "whole", save_every=5))
    cut = cut_back(tmp_path / "whole", tmp_path / "cut")
    (cut / "step-000015").rename(cut / "step-000015.incomplete")
    (cut / "step-000010" / "train_state" / ".metadata").unlink()
    main(config(data, cut, save_every=5, resume=True))
    shown = capsys.readouterr().out
    assert "passing over" in shown and "step-000015.incomplete: it was not written to the end" in shown
    assert "step-000010: it has no train_state in it" in shown and "step-000005, 15 steps to go" in shown
    assert_bit_equal(cut, tmp_path / "whole")
    assert not list(cut.glob("*.incomplete"))


def test_a_judge_that_raises_at_the_end_is_counted_and_costs_nothing(data, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Sort these words: owl, moss"}\n')
    (tmp_path / "judge.py").write_text("calls = []\ndef score(turns, answer):\n    calls.append(1)\n"
                                       "    assert len(calls) < 2, 'no more money'\n    return 1\n")
    options = {"max_steps": 2, "judge": f"{tmp_path}/judge.py:score", "judge_prompts": tmp_path / "prompts.jsonl",
               "max_new_tokens": 4}
    before, after = main(config(data, tmp_path / "out", **options))
    assert before["eval_judge_score"] == 1 and "eval_judge_failed" not in before and after["eval_judge_failed"] == 1
    assert "1 answers have no score. The first, answer 1: it failed with AssertionError: no more money" \
        in capsys.readouterr().out
    assert weights(tmp_path / "out", 2) and metrics(tmp_path / "out")[-1]["eval_judge_score"] is None
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="prompts.jsonl: no prompts"):
        main(config(data, tmp_path / "other", **options))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": []}\n')
    with pytest.raises(ValueError, match="prompts.jsonl:2: prompt is"):
        main(config(data, tmp_path / "other", **options))


def test_answers_that_cannot_be_sampled_end_no_training(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Sort these words: owl, moss"}\n')
    options = {"max_steps": 2, "judge": f"{TINY}/judge.py:score", "judge_prompts": tmp_path / "prompts.jsonl",
               "max_new_tokens": 4}
    monkeypatch.setattr("sampler.sample", lambda logits, uniform, **_: logits.fill_(float("nan")).argmax(-1))
    before, after = main(config(data, tmp_path / "out", **options))
    assert "judge    step 2: no answers (prompt 1: the model's logits are not finite" in capsys.readouterr().out
    assert after["eval_loss"] < before["eval_loss"] and "eval_judge_score" not in after
    assert weights(tmp_path / "out", 2)


def test_answers_that_the_chat_format_refuses_end_no_training(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Sort these words: owl, moss"}\n')
    options = {"max_steps": 1, "judge": f"{TINY}/judge.py:score", "judge_prompts": tmp_path / "prompts.jsonl",
               "max_new_tokens": 4}

    def refuse(run, answers, scores):
        raise ValueError("no end token after it")
    monkeypatch.setattr("train.judged_metrics", refuse)
    main(config(data, tmp_path / "out", **options))
    assert "judge    step 1: no answers (no end token after it)" in capsys.readouterr().out
    assert weights(tmp_path / "out", 1)


def test_a_judge_may_come_with_resume(data, tmp_path, capsys):
    options = {"max_steps": 4, "save_every": 2, "max_new_tokens": 4}
    main(config(data, tmp_path / "out", **options))
    shutil.rmtree(tmp_path / "out/step-000004")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Sort these words: owl, moss"}\n')
    options |= {"judge": f"{TINY}/judge.py:score", "judge_prompts": tmp_path / "prompts.jsonl", "resume": True}
    main(config(data, tmp_path / "out", **options))
    assert "judge    step 4" in capsys.readouterr().out and (tmp_path / "out/answers-000004.jsonl").exists()


def test_a_folder_that_is_no_run_is_not_resumed_not_even_by_a_restart(data, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    for options, restarts in (({"resume": True}, "0"), ({}, "1")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(ValueError, match="mine is not empty and holds no run.json"):
            main(config(data, tmp_path / "mine", **options))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    main(config(data, tmp_path / "run", max_steps=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(config(data, tmp_path / "run", max_steps=2))        # the same job: this process
    monkeypatch.setattr(os, "getppid", lambda: 0)       # nobody's: that of a job in the background may be 1
    with pytest.raises(ValueError, match="run is not empty; --resume to go on"):
        main(config(data, tmp_path / "run", max_steps=2))


def test_damaged_files_of_a_run_are_named(data, tmp_path, capsys):
    main(config(data, tmp_path / "out", max_steps=4, save_every=2))
    good = (tmp_path / "out/run.json").read_text()
    for text in ('{"con', "{}", "[]", '{"job": 1, "config": {}, "model": 3, "pairs": {}}'):
        (tmp_path / "out/run.json").write_text(text)
        with pytest.raises(ValueError, match="out/run.json: damaged"):
            main(config(data, tmp_path / "out", max_steps=4, save_every=2, resume=True))
    (tmp_path / "out/run.json").write_text(good)
    shutil.rmtree(tmp_path / "out/step-000004")
    (tmp_path / "out/step-000004").mkdir()        # not the end of the run: there is no model in it
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    (tmp_path / "out/metrics.jsonl").write_text("\n".join(["7", lines[0][:20], *lines[1:]]))
    main(config(data, tmp_path / "out", max_steps=4, save_every=2, resume=True))
    shown = capsys.readouterr().out
    assert "metrics.jsonl:1 is damaged and left out" in shown and "metrics.jsonl:2 is damaged" in shown
    assert "step-000004: it has no model in it" in shown and "step-000002, 2 steps to go" in shown
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3, 4, 4]


def test_the_checkpoint_just_written_is_never_the_one_that_is_deleted(data, tmp_path):
    main(config(data, tmp_path / "out", max_steps=6, save_every=2))
    shutil.rmtree(tmp_path / "out/step-000006")
    shutil.rmtree(tmp_path / "out/step-000004/train_state")
    with pytest.raises(SystemExit):
        original = train.save_checkpoint
        try:
            def save_once(*args, **kwargs):
                original(*args, **kwargs)
                raise SystemExit
            train.save_checkpoint = save_once
            main(config(data, tmp_path / "out", max_steps=6, save_every=1, keep_last=1, resume=True))
        finally:
            train.save_checkpoint = original
    assert (tmp_path / "out/step-000003/train_state").exists() and not (tmp_path / "out/step-000002").exists()


def test_a_checkpoint_before_the_first_applied_step_changes_nothing(data, tmp_path):
    lines = _lines_of_step(data, train.epoch_steps(73, 8, seed=0, epoch=0)[0])[:1]
    for name, save_every in (("without", 0), ("with", 1)):
        run_ranks(1, tmp_path / "log", ranks.start_with, ranks.not_finite, lines,
                  flags(data, tmp_path / name, max_steps=4, save_every=save_every, **FLOAT32))
    assert metrics(tmp_path / "with")[1]["skipped"] == 1
    assert_bit_equal(tmp_path / "with", tmp_path / "without", step=4)


@pytest.mark.parametrize("changes, named", [
    ({"seed": 1}, "seed = 0, found 1"), ({"pairs_per_step": 4}, "pairs_per_step = 8, found 4"),
    ({"method": "simpo"}, "method = 'alphapo', found 'simpo'"),
    ({"learning_rate": 2e-4}, "learning_rate = 0.0001, found 0.0002"),
    ({"max_steps": 9}, "max_steps = 0, found 9"),
    ({"weight_dtype": "float32"}, "weight_dtype = 'float64', found 'float32'"),
    ("data", "data = '73 pairs, sha256 .*', found '73 pairs, sha256"),
    ("model", "config.json's rope_theta = 10000.0, found 500.0"),
], ids=str)
def test_a_change_that_alters_the_run_is_refused_by_name(changes, named, data, one_rank, tmp_path):
    if changes == "data":
        rows = data.read_text().splitlines()
        answers = json.loads(rows[40])
        answers["all_generated_responses"] = [a + "!" for a in answers["all_generated_responses"]]
        (tmp_path / "other.jsonl").write_text("\n".join([*rows[:40], json.dumps(answers), *rows[41:]]))
        changes = {"data": tmp_path / "other.jsonl"}
    elif changes == "model":
        shutil.copytree(MODEL, tmp_path / "model")
        settings = json.loads((tmp_path / "model/config.json").read_text()) | {"rope_theta": 500.0}
        (tmp_path / "model/config.json").write_text(json.dumps(settings))
        changes = {"model": tmp_path / "model"}
    with pytest.raises(ValueError, match=named):
        main(config(data, one_rank["alphapo"], resume=True, **changes))


def test_data_and_model_may_have_moved(data, tmp_path):
    main(config(data, tmp_path / "whole", max_steps=4, save_every=2))
    shutil.rmtree(tmp_path / "whole/step-000004")
    shutil.copytree(MODEL, tmp_path / "model")
    shutil.copy(data, tmp_path / "moved.jsonl")
    main(config(tmp_path / "moved.jsonl", tmp_path / "whole", model=tmp_path / "model", max_steps=4, save_every=2,
                resume=True))
    assert (tmp_path / "whole/step-000004").exists()


# --- signals, kills, errors -------------------------------------------------------------------------------------------

def wait_for(condition, running, timeout=60):
    end = time.time() + timeout
    while not condition():
        assert time.time() < end and all(p.is_alive() for p in running.processes), running.output()
        time.sleep(0.002)


def steps_logged(output):
    path = output / "metrics.jsonl"
    return path.read_text().count('"grad_norm"') if path.exists() else 0


@pytest.mark.parametrize("world, to, number", [(2, 1, signal.SIGTERM), (1, 0, signal.SIGINT)])
def test_a_signal_to_any_rank_saves_and_stops_all_and_the_run_goes_on_later(world, to, number, data, tmp_path):
    argv = flags(data, tmp_path / "whole", **FLOAT32)
    run_ranks(world, tmp_path / "log", train.start, argv)
    argv = flags(data, tmp_path / "out", resume=True, **FLOAT32)
    running = Ranks(world, tmp_path / "log", train.start, argv)
    wait_for(lambda: steps_logged(tmp_path / "out") >= 2, running)
    os.kill(running.processes[to].pid, number)
    assert running.join() == [128 + number] * world, running.output()
    step = steps_logged(tmp_path / "out")
    assert f"stopped  by {number.name} after step {step};" in running.output() and 2 <= step < 20
    assert (tmp_path / f"out/step-{step:06d}/train_state").exists()
    run_ranks(world, tmp_path / "log", train.start, argv)
    assert_bit_equal(tmp_path / "out", tmp_path / "whole")
    assert_same_metrics(tmp_path / "out", tmp_path / "whole", rel=0)


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_the_resumed_run(data, tmp_path):
    argv = flags(data, tmp_path / "whole", max_steps=4, save_every=0, **FLOAT32)
    run_ranks(2, tmp_path / "log", train.start, argv)
    argv = flags(data, tmp_path / "out", max_steps=4, save_every=0, resume=True, **FLOAT32)
    running = Ranks(2, tmp_path / "log", ranks.start_with, ranks.fails_at_step, 1, 3, "signalled", argv)
    codes = running.join()
    if codes != [128 + signal.SIGTERM] * 2:     # it came after the ranks had told each other: no step is left
        assert codes == [0, 0], running.output()
    else:
        assert len(metrics(tmp_path / "out")) == len(metrics(tmp_path / "whole")) - 1
        run_ranks(2, tmp_path / "log", train.start, argv)
    assert_bit_equal(tmp_path / "out", tmp_path / "whole", step=4)
    assert_same_metrics(tmp_path / "out", tmp_path / "whole", rel=0)
    assert not (tmp_path / "out/step-000004/train_state").exists()


def test_a_second_signal_stops_at_once(data, tmp_path):
    running = Ranks(1, tmp_path, ranks.start_with, ranks.slow_pairs, 0.2, flags(data, tmp_path / "out", eval_pairs=0))
    wait_for(lambda: steps_logged(tmp_path / "out") >= 1, running)
    os.kill(running.processes[0].pid, signal.SIGTERM)
    wait_for(lambda: "another stops at once" in running.output(), running)
    os.kill(running.processes[0].pid, signal.SIGTERM)
    assert running.join() == [-signal.SIGTERM] and not list((tmp_path / "out").glob("step-*"))


def being_written(output, since):
    """Whether a checkpoint is being written that was begun after a time (one that a dead run left does not count)."""
    try:
        return any(f.stat().st_mtime > since for f in output.glob("*.incomplete"))
    except FileNotFoundError:       # it got its name this moment
        return False


def test_kills_at_any_moment_cost_no_more_than_the_steps_since_the_last_save(data, tmp_path):
    """25 times, a rank of two is killed at a random moment, every third time while a checkpoint is being written."""
    changes = {"epochs": 5, "pairs_per_step": 4, "max_steps": 80, "save_every": 2, "keep_last": 3, **FLOAT32}
    run_ranks(2, tmp_path / "log", main, config(data, tmp_path / "whole", **changes))
    out, rng, during_save, lives = tmp_path / "out", random.Random(0), 0, []
    argv = flags(data, out, resume=True, **changes)
    for kill in range(25):
        saved = max([int(f.name[5:]) for f in out.glob("step-??????")], default=0)
        began = time.time()
        running = Ranks(2, tmp_path / "log", train.start, argv)
        if kill % 3 == 2:
            wait_for(lambda: being_written(out, began), running)
        else:
            wait_for(lambda: steps_logged(out) > saved + kill % 3, running)
        time.sleep(rng.random() * (0.03 if kill % 3 == 2 else 0.1))
        during_save += being_written(out, began)
        os.kill(running.processes[kill % 2].pid, signal.SIGKILL)
        codes = running.join(30)
        assert codes[kill % 2] == -signal.SIGKILL and codes[1 - kill % 2] in (1, -signal.SIGKILL), running.output()
        lives.append((saved, steps_logged(out)))
        resumed = re.search(r"step-(\d+), \d+ steps to go", running.output())
        assert resumed is None or int(resumed[1]) == saved, running.output()      # None: killed before it came to that
    assert during_save >= 8 and saved < 80, lives
    run_ranks(2, tmp_path / "log", train.start, argv)
    assert_bit_equal(out, tmp_path / "whole", step=80)
    assert_same_metrics(out, tmp_path / "whole", rel=0)


def test_a_step_that_is_not_finite_is_not_applied_and_names_its_pairs(data, tmp_path):
    argv = flags(data, tmp_path / "whole", save_every=1, max_steps=10, **FLOAT32)
    run_ranks(2, tmp_path / "log", train.start, argv)
    poisoned = metrics(tmp_path / "whole")
    order = train.epoch_steps(73, 8, seed=0, epoch=0)
    out = tmp_path / "out"
    argv = flags(data, out, save_every=1, max_steps=10, **FLOAT32)
    lines = sorted(_lines_of_step(data, order[3]))[:2]
    log = run_ranks(2, tmp_path / "log", ranks.start_with, ranks.not_finite, lines, argv)
    step = [line for line in metrics(out) if line["step"] == 4][0]
    assert sorted(int(source.rsplit(":")[-1]) for source in step["not_finite"]) == lines and step["loss"] is None
    assert step["skipped"] == 1 and metrics(out)[-2]["skipped"] == 1 and poisoned[-2]["skipped"] == 0
    assert f"{data}:{lines[0]}" in log and "skipped  step 4: the loss is not finite, of" in log
    assert_bit_equal(out, tmp_path / "whole", step=3)
    before, after = weights(out, 3), weights(out, 4)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert largest_difference(weights(out, 5), after) > 0


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("how, message", [
    ("killed", r"a worker process died at .*pairs.jsonl:40\b.*: killed, perhaps for want of memory"),
    ("panics", r"pairs.jsonl:40: Panic: called `Option::unwrap\(\)`"),
    ("disk full", r"cache/\w+.safetensors: cannot be written .*make room")])
def test_tokenising_that_fails_ends_all_ranks_within_seconds(how, message, world, data, tmp_path):
    argv = flags(data, tmp_path / "out", cache=tmp_path / "cache")
    began = time.time()
    running = Ranks(world, tmp_path / "log", ranks.start_with, ranks.tokenising_fails, 40, how, argv)
    codes = running.join(60)
    assert codes == [1] * world and re.search(message, running.output()), (codes, running.output())
    assert time.time() - began < 20 and len(re.findall("^error", running.output(), re.MULTILINE)) == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("cache/*"))


def test_a_killed_rank_leaves_no_tokenising_worker_behind(data, tmp_path):
    (tmp_path / "many.jsonl").write_text(data.read_text() * 200)
    argv = flags(tmp_path / "many.jsonl", tmp_path / "out", cache=tmp_path / "cache")
    running = Ranks(1, tmp_path / "log", ranks.start_with, ranks.tokenising_fails, -1, "not at all", argv)
    pid = running.processes[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for(lambda: len(children.read_text().split()) == 2, running)
    workers = children.read_text().split()
    os.kill(pid, signal.SIGKILL)
    assert running.join() == [-signal.SIGKILL]
    end = time.time() + 10

    def alive(worker):
        stat = Path(f"/proc/{worker}/stat")
        return stat.exists() and " Z " not in stat.read_text()

    while any(map(alive, workers)) and time.time() < end:
        time.sleep(0.01)
    assert not any(map(alive, workers))


def _lines_of_step(data, indices):
    pairs = train.load_pairs([data], train.load_chat(MODEL), 2048, 1800)[0]
    pairs, _ = train.hold_out(pairs, 5, seed=0)
    return [int(pairs[i].source.rsplit(":")[-1]) for i in indices]


def test_several_steps_in_a_row_that_are_not_finite_end_the_run(data, tmp_path):
    running = Ranks(2, tmp_path, ranks.start_with, ranks.not_finite, range(1000),
                    flags(data, tmp_path / "out", save_every=0, eval_pairs=0))
    assert running.join() == [1, 1]
    message = "step 3: 3 steps in a row were not finite and not applied"
    assert one_error(running).startswith(message) and not list((tmp_path / "out").glob("step-*"))


def torchrun(*argv, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def test_torchrun_restarts_a_run_that_lost_a_rank_and_it_resumes_by_itself(data, tmp_path):
    run_ranks(2, tmp_path, main, config(data, tmp_path / "whole", **FLOAT32))
    program = tmp_path / "program.py"
    # Python's shutdown is to play no part: gloo's threads abort some processes in it. Here it makes all of them fail.
    program.write_text(f"import atexit, os, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                       "import ranks; atexit.register(os._exit, 7)\n"
                       "ranks.start_with(ranks.fails_at_step, 1, 12, 'killed', sys.argv[1:])\n")
    done = torchrun("--nproc_per_node", 2, "--max_restarts", 1, program, *flags(data, tmp_path / "out", **FLOAT32))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 11/20") == 2 and done.stdout.count("step 10/20") == 1
    assert_bit_equal(tmp_path / "out", tmp_path / "whole")


def test_a_port_in_use_is_an_error_of_torchrun_and_leaves_nothing_behind(data, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = torchrun("--nproc_per_node", 2, "--master_addr", "127.0.0.1", "--master_port", s.getsockname()[1],
                        "train.py", *flags(data, tmp_path / "out"))
    assert done.returncode != 0 and "in use" in done.stderr and not (tmp_path / "out").exists()


def one_error(running):
    """The message of a run that failed: there must be one, from one rank, and no traceback."""
    errors = [line for line in running.output().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "Traceback" not in running.output(), running.output()
    return errors[0].split(": ", 1)[1]


def test_a_rank_that_raises_ends_all_with_its_message(data, tmp_path):
    running = Ranks(2, tmp_path, ranks.start_with, ranks.fails_at_step, 1, 12, "raises", flags(data, tmp_path / "out"))
    assert running.join(60) == [1, 1] and one_error(running) == "this rank gives up"
    assert weights(tmp_path / "out", 10)


def test_a_rank_that_is_killed_ends_the_others_with_one_message(data, tmp_path):
    running = Ranks(3, tmp_path, ranks.start_with, ranks.fails_at_step, 1, 12, "killed", flags(data, tmp_path / "out"))
    assert running.join(60) == [1, -signal.SIGKILL, 1] and "another rank" in one_error(running)
    assert weights(tmp_path / "out", 10)


def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_timeout(data, tmp_path):
    running = Ranks(2, tmp_path, ranks.start_with, ranks.fails_at_step, 1, 3, "hangs",
                    flags(data, tmp_path / "out", timeout_minutes=0.05))
    assert running.join(60)[0] == 1 and "another rank" in one_error(running)


@pytest.mark.parametrize("change, message", [
    ((ranks.small_disk, 10**6), "a checkpoint needs 0.0[0-9]* GB, the disk has 0.00 GB free"),
    ((ranks.small_files, 10**5), "step-000010.incomplete: cannot be written .*File too large.*earlier checkpoints"),
], ids=["full before", "full while writing"])
def test_a_disk_that_is_full_is_one_error_and_earlier_checkpoints_stay(change, message, data, tmp_path):
    out = tmp_path / "out"
    run_ranks(2, tmp_path, main, config(data, out, save_every=5))
    for step in (10, 15, 20):
        shutil.rmtree(out / f"step-{step:06d}")
    before = {f: f.read_bytes() for f in (out / "step-000005").rglob("*") if f.is_file()}
    running = Ranks(2, tmp_path, ranks.start_with, *change, flags(data, out, save_every=5, resume=True))
    assert running.join(60) == [1, 1]
    one_error(running)
    assert re.search(message, one_error(running)), one_error(running)
    assert before == {f: f.read_bytes() for f in (out / "step-000005").rglob("*") if f.is_file()}
    run_ranks(2, tmp_path, main, config(data, out, save_every=5, resume=True))


@pytest.mark.parametrize("output", ["/proc/runs", "/dev/null/runs"])
def test_a_folder_that_cannot_be_written_is_one_error(output, data, tmp_path):
    running = Ranks(2, tmp_path, train.start, flags(data, output))
    assert running.join(60) == [1, 1] and output in one_error(running)


def test_a_missing_shard_of_the_model_is_one_error(data, tmp_path):
    save_model(load_model(MODEL), tmp_path / "model", like=MODEL, shard_bytes=300_000)
    lost = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    lost.unlink()
    running = Ranks(2, tmp_path, train.start, flags(data, tmp_path / "out", model=tmp_path / "model"))
    assert running.join(60) == [1, 1]
    assert "weights are missing" in one_error(running) and lost.name in one_error(running)


def test_weights_that_are_not_finite_are_one_error_whichever_rank_holds_them(data, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["lm_head.weight"][-1, -1] = float("nan")
    save_file(tensors, tmp_path / "model/model.safetensors")
    running = Ranks(2, tmp_path, train.start, flags(data, tmp_path / "out", model=tmp_path / "model"))
    assert running.join(60) == [1, 1] and "lm_head.weight holds NaN" in one_error(running)


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_one_error(data, tmp_path):
    out = tmp_path / "out"
    run_ranks(2, tmp_path, main, config(data, out))
    shutil.rmtree(out / "step-000020")
    state = out / "step-000010" / "train_state"
    file = max(state.glob("*.distcp"), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:1000])
    running = Ranks(2, tmp_path, train.start, flags(data, out, resume=True))
    assert running.join(60) == [1, 1] and f"{file} is damaged (by SHA256SUMS)" in one_error(running)

    wider = json.loads((MODEL / "config.json").read_text()) | {"intermediate_size": 256}
    tensors = {name: w[:256].contiguous() if "gate" in name or "up_proj" in name else w[:, :256].contiguous()
               if "down" in name else w for name, w in load_file(MODEL / "model.safetensors").items()}
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(wider))
    save_file(tensors, tmp_path / "model/model.safetensors")
    run_ranks(1, tmp_path, main, config(data, tmp_path / "other", model=tmp_path / "model"))
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "other/step-000010/train_state", state)
    running = Ranks(2, tmp_path, train.start, flags(data, out, resume=True))
    assert running.join(60) == [1, 1] and "another model" in one_error(running)


# --- loading and saving slices ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("world, options, nodes", [(3, {}, 1), (4, {"shard_within_node": True}, 2)], ids=str)
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 300_000])
def test_a_model_loaded_in_slices_and_saved_is_bit_equal(world, options, nodes, shard_bytes, data, tmp_path):
    saved = tmp_path / "saved"
    run_ranks(world, tmp_path, ranks.load_and_save, config(data, "", **options), saved, shard_bytes, nodes=nodes)
    before, after = load_file(MODEL / "model.safetensors"), {}
    for file in saved.glob("*.safetensors"):
        after |= load_file(file)
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
        assert file.stat().st_mode == (saved / "config.json").stat().st_mode
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in after.values())
    assert before.keys() == after.keys() and not (saved / "sharded").exists()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (shard_bytes < 10**6)
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        assert (saved / name).read_bytes() == (MODEL / name).read_bytes()


def test_a_model_saved_by_two_ranks_loads_in_transformers_with_equal_logits(data, tmp_path):
    run_ranks(2, tmp_path, main, config(data, tmp_path / "out", max_steps=3, weight_dtype="float32", save_dtype=""))
    tokens = torch.arange(3, 60)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out/step-000003", dtype=torch.float32)
    with torch.no_grad():
        ours = load_model(tmp_path / "out/step-000003")(tokens)
        assert (theirs(tokens[None]).logits[0] - ours).abs().max() < 1e-5


def test_no_rank_holds_more_than_its_slices_while_a_gigabyte_is_loaded(data, tmp_path):
    settings = json.loads((MODEL / "config.json").read_text()) | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 32000}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(read_config(folder)).named_parameters()}
    names = sorted(shapes)
    for i in range(3):
        tensors = {name: torch.full(shapes[name], 0.01, dtype=torch.bfloat16) for name in names[i::3]}
        save_file(tensors, folder / f"model-{i}.safetensors")
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    run_ranks(2, tmp_path, ranks.peak_of_loading, config(data, "", model=folder, **FLOAT32), tmp_path / "peak")
    for f in folder.glob("*.safetensors"):
        f.unlink()
    largest_slice = max(shape.numel() for shape in shapes.values()) // 2
    for rank in (0, 1):
        held, own, of_files = json.loads((tmp_path / f"peak-{rank}.json").read_text())
        assert sum(sizes) > 1e9 and held == 2 * sum(shape.numel() for shape in shapes.values())        # half of fp32
        assert own <= held + 2 * largest_slice        # the bf16 slice at hand
        assert of_files <= 0.5 * max(sizes) + 60e6     # half of one file, and pages of libraries


def test_the_plan_counts_the_state_of_each_rank_exactly(data, tmp_path, capsys):
    run_ranks(2, tmp_path, ranks.state_of_a_rank, config(data, "", **FLOAT32), tmp_path / "state")
    held = [json.loads((tmp_path / f"state-{rank}.json").read_text()) for rank in (0, 1)]
    n = sum(p.numel() for p in load_model(MODEL).parameters())
    assert sum(held) == 16 * n and max(held) == min(held)
    plan.plan(plan.parse_args(["--model", str(MODEL), "--gpus", "2"]))
    assert re.search(rf"\n +2 +{16 * n / 2 / 1e9:.1f} ", capsys.readouterr().out)


@pytest.mark.parametrize("argv, message", [
    (["--gpus", "8"], "model is needed"), (["--model", "m", "--gpus", "0"], r"gpus = \[0\]"),
    (["--model", "m", "--max_length", "0"], "max_length = 0; expected a positive number"),
    (["absent.toml"], "absent.toml: cannot be read as a TOML recipe")])
def test_a_plan_that_cannot_be_made_is_an_error_that_names_the_flag(argv, message):
    with pytest.raises(ValueError, match=message):
        plan.parse_args(argv)


def test_the_plan_has_the_defaults_of_training_and_reads_its_recipes(tmp_path):
    args = plan.parse_args(["--model", "m"])
    defaults = train.TrainConfig()
    assert all(getattr(args, name) == getattr(defaults, name) for name in (*plan.NUMBERS, *plan.SWITCHES))
    (tmp_path / "r.toml").write_text('model = "m"\nmax_length = 99\nrecompute = true\nbeta = 2.5\n')
    args = plan.parse_args([str(tmp_path / "r.toml"), "--pairs_per_step", "8"])
    assert (args.model, args.max_length, args.recompute, args.pairs_per_step) == (f"{tmp_path}/m", 99, True, 8)
    assert not plan.parse_args([str(tmp_path / "r.toml"), "--no-recompute"]).recompute
    (tmp_path / "r.toml").write_text("recompute = 1\n")
    with pytest.raises(ValueError, match="r.toml: recompute = 1; expected bool"):
        plan.parse_args([str(tmp_path / "r.toml")])


def test_the_plan_says_which_knob_saves_what(capsys):
    flags = ["--model", str(MODEL), "--gpus", "2"]
    plan.plan(plan.parse_args(flags))
    assert re.search(r"On 2 GPUs would save, .*: --recompute \d.*, --sync_every_micro_batch \d.*, --cpu_offload \d.*, "
                     r"--tokens_per_micro_batch 4096 \d", capsys.readouterr().out)
    plan.plan(plan.parse_args([*flags, "--recompute", "--sync_every_micro_batch", "--cpu_offload",
                               "--tokens_per_micro_batch", "4096"]))
    assert "No knob is left" in capsys.readouterr().out


SYNC = "--sync_every_micro_batch"
EVERY_WAY = [[], [SYNC], [SYNC, "--no-recompute"]]
MISTRAL, LLAMA = (4096, 32, 32, 32000), (4096, 32, 32, 128256)          # dim, layers, heads, vocabulary
PLANNED = [      # tables of READMEs: page, model, its sizes, other flags of each row
    ("RUNNING.md", "Mistral-7B-Instruct-v0.2", MISTRAL, EVERY_WAY),
    ("RUNNING.md", "Meta-Llama-3-8B-Instruct", LLAMA, EVERY_WAY),
    ("RUNNING.md", "Meta-Llama-3-70B-Instruct", (8192, 80, 64, 128256), [[SYNC]]),
    ("README.md", "Mistral-7B-Instruct-v0.2", MISTRAL, [[SYNC]]),
    ("README.md", "Meta-Llama-3-8B-Instruct", LLAMA, [[SYNC]]),
    ("README.md", "Meta-Llama-3-70B-Instruct", (8192, 80, 64, 128256), [[SYNC]]),
]


@pytest.mark.parametrize("page, name, sizes, ways", PLANNED, ids=str)
def test_the_readme_shows_what_the_plan_prints(page, name, sizes, ways, tmp_path, capsys):
    dim, n_layers, n_heads, vocab_size = sizes
    settings = {"model_type": "llama", "hidden_size": dim, "intermediate_size": dim * 7 // 2,
                "num_hidden_layers": n_layers, "num_attention_heads": n_heads, "num_key_value_heads": 8,
                "vocab_size": vocab_size, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    readme = (ROOT / page).read_text()
    row = readme.index(f"| {name}")
    for way in ways:
        plan.plan(plan.parse_args(["--model", str(tmp_path), "--recompute", *way]))
        totals = [line.split()[7] for line in capsys.readouterr().out.splitlines()[2:5]]
        cells = readme[row:].split("\n", 1)[0].split("|")[2:5]
        assert [float(cell) for cell in cells] == [round(float(total)) for total in totals]
        row = readme.index("\n", row) + 1


def test_weights_are_fp32_so_that_a_step_at_a_small_learning_rate_moves_them(data, tmp_path):
    main(config(data, tmp_path / "out", learning_rate=1e-6, warmup_ratio=0, max_steps=1, eval_pairs=0, **FLOAT32))
    start, after = load_file(MODEL / "model.safetensors"), weights(tmp_path / "out", 1)
    moved = sum((after[n] != start[n].float()).sum().item() for n in start)
    moved_in_bf16 = sum((after[n].bfloat16() != start[n]).sum().item() for n in start)
    total = sum(w.numel() for w in start.values())
    assert moved > 0.9 * total and moved_in_bf16 < 0.1 * total
