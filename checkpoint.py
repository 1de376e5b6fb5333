"""The folder of a run: what makes it this run, its checkpoints, and where it goes on.

    output = claim_output(config.output, config.method, config.resume, restarted=False)
    step, folder = newest_checkpoint(output, last_step)
    save_checkpoint(model, optimizer, progress, config, output, last=False)
    load_checkpoint(folder, model, optimizer, progress)     # on any number of ranks

    run.json        what the run is: its knobs, the shape of its model, the digest of its pairs
    config.toml     the resolved config: give it back to repeat the run
    metrics.jsonl   an object a step, and one an evaluation
    step-000400/    a Hugging Face folder. Every one but the last of the run also has train_state/
                    in it: fp32 weights, moments and counters, by torch.distributed.checkpoint

A checkpoint is written under another name and gets its own once it is complete.
"""
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from data.files import write_whole
from distributed import from_rank_0
from model import checkpoint_tensors, save_model


# --- the folder of a run --------------------------------------------------------------------------

def claim_output(output, method, resume, restarted):
    """The run folder, made if need be: `output`, or the first free of runs/METHOD-001, -002, ...

    ValueError if it holds a run that may not be resumed. A rank that torchrun restarted goes on
    without `resume`, but only with what its own torchrun began. Rank 0 only.
    """
    if output:
        output = Path(output)
        if output.exists() and any(output.iterdir()):
            # A folder that is no run may be somebody's work: it is never written to.
            began = read_run(output)
            if began is None:
                raise ValueError(f"output folder {output} is not empty and holds no run.json, so "
                                 "no run; name another one")
            if not resume and not (restarted and began["job"] == this_job()):
                raise ValueError(f"output folder {output} is not empty; --resume to go on with its "
                                 "run, or name a new one")
    elif resume or restarted:
        raise ValueError("a run can be resumed only by the name of its folder; give --output")
    else:
        number = 1
        while Path(f"runs/{method}-{number:03d}").exists():
            number += 1
        output = Path(f"runs/{method}-{number:03d}")
    output.mkdir(parents=True, exist_ok=True)
    return output


def this_job():
    """The torchrun that this rank belongs to: its host and process, the same over restarts."""
    return f"{os.uname().nodename} {os.getppid()}"


def read_run(output):
    """run.json of a run folder. None without it, ValueError if it is damaged."""
    path = output / "run.json"
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text())
        parts = [run[part] for part in ("config", "model", "pairs")]
        if "job" in run and all(isinstance(part, dict) for part in parts):
            return run
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: damaged; expected what a run wrote there when it began. Name a new "
                     "output folder")


def identity_of(knobs, model_config, pairs, held_out):
    """What has to stay the same for a run to be resumed: its knobs, the shape of its model, and the
    tokens of its pairs."""
    return {
        "config": knobs,
        "model": dataclasses.asdict(model_config),
        "pairs": {"data": _digest(pairs), "held-out data": _digest(held_out)},
    }


def _digest(pairs):
    sha = hashlib.sha256()
    for pair in pairs:
        # Lengths too: the same tokens may be cut otherwise.
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            sha.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return f"{len(pairs)} pairs, sha256 {sha.hexdigest()[:16]}"


def check_same_run(output, identity):
    """Compares the identity of a run with run.json, if there is one, and writes it there.
    ValueError names the first difference. Rank 0 only."""
    before = read_run(output) or identity           # a new run is the same as itself
    titles = {"config": "{}", "model": "config.json's {}", "pairs": "{}"}
    for part, title in titles.items():
        for name, new in identity[part].items():
            old = before[part].get(name)
            if old != new:
                raise ValueError(
                    f"{output}: its run has {title.format(name)} = {old!r}, found {new!r} now; "
                    "resume it as it was started, or name a new output folder")
    write_whole(output / "run.json", json.dumps({"job": this_job()} | identity, indent=1))


def read_metrics(output, step):
    """The lines of metrics.jsonl up to a step, [] without the file. What a killed run logged after
    that is undone by resuming there. Lines that cannot be read, as the last one may be then, are
    left out, and named."""
    path = output / "metrics.jsonl"
    lines = []
    if not path.exists():
        return lines
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            if line["step"] <= step:
                lines.append(line)
        except (ValueError, TypeError, KeyError):
            print(f"resume   {path}:{number} is damaged and left out")
    return lines


def log_metrics(output, metrics):
    """Appends a line to metrics.jsonl. JSON has no NaN: numbers that are not finite become null.
    Rank 0 only."""
    line = {}
    for name, value in metrics.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        line[name] = value if finite else None
    with open(output / "metrics.jsonl", "a") as f:
        print(json.dumps(line), file=f)


# --- checkpoints ----------------------------------------------------------------------------------

def newest_checkpoint(output, last_step):
    """(step, folder) of the newest complete checkpoint, (0, None) without one. Prints what it
    passes over. Rank 0 only."""
    whole = checkpoints(output)
    # Those of a run that was killed while it wrote them, or deleted them.
    for folder in sorted(set(output.glob("step-*")) - set(whole.values())):
        print(f"resume   passing over {folder}: it was not written to the end")
    for step, folder in sorted(whole.items(), reverse=True):
        is_model = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
        # torch.distributed.checkpoint writes .metadata last.
        goes_on = (folder / "train_state" / ".metadata").exists()
        if is_model and (goes_on or step == last_step):
            return step, folder
        missing = "train_state" if is_model else "model"
        print(f"resume   passing over {folder}: it has no {missing} in it")
    return 0, None


def checkpoints(output):
    """{step: folder} of a run folder, those that bear the name of a whole one."""
    found = {}
    for folder in output.glob("step-*"):
        if re.fullmatch(r"step-\d{6,}", folder.name):
            found[int(folder.name[5:])] = folder
    return found


def train_state(model, optimizer, progress):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "progress": progress}


def save_checkpoint(model, optimizer, progress, config, output, last):
    """Writes step-NNNNNN under a name that says it is incomplete, and gives it its own once all
    ranks are done; then deletes all but config.keep_last. The last one holds the model alone:
    nothing is left to resume. Returns its folder. All ranks together."""
    folder = output / f"step-{progress['step']:06d}"
    writing = folder.with_suffix(".incomplete")

    def prepare():
        check_space(model, config, output, last)
        shutil.rmtree(writing, ignore_errors=True)      # of a run that was killed here

    def complete():
        # The same step may have been saved before, by a run that a signal stopped after it.
        if folder.exists():
            folder.rename(folder.with_suffix(".replaced.incomplete"))
        writing.rename(folder)
        _delete_old(output, progress["step"], config.keep_last)

    # 1. Everything, under the name that says it is incomplete.
    from_rank_0(prepare)
    try:
        dtype = getattr(torch, config.save_dtype, None)
        save_model(model, writing, like=config.model, dtype=dtype)
        if not last:
            state = train_state(model, optimizer, progress)
            dcp.save(state, checkpoint_id=writing / "train_state")
    except (OSError, dcp.api.CheckpointException) as e:
        reason = first_failure(e) if isinstance(e, dcp.api.CheckpointException) else e
        raise OSError(f"{writing}: cannot be written ({reason}); earlier checkpoints are as they "
                      "were") from e
    # 2. A checkpoint alone says how to repeat the run. Then it gets its name.
    if not last and dist.get_rank() == 0:
        shutil.copyfile(output / "config.toml", writing / "train_state" / "config.toml")
    from_rank_0(complete)
    return folder


def _delete_old(output, step, keep_last):
    """Deletes checkpoints before `step`, so that keep_last stay with that of `step` (0: all stay),
    and whatever is incomplete."""
    whole = checkpoints(output)
    older = sorted(s for s in whole if s < step)
    surplus = len(older) - (keep_last - 1) if keep_last else 0
    for s in older[:max(0, surplus)]:
        # Never half of a checkpoint under the name of a whole one.
        whole[s].rename(whole[s].with_suffix(".incomplete"))
        print(f"deleted  {whole[s]}, older than the last {keep_last}")
    for rest in output.glob("step-*.incomplete"):
        if rest.is_symlink():           # somebody moved it to another disk: that stays
            rest.unlink()
        else:
            shutil.rmtree(rest)


def load_checkpoint(folder, model, optimizer, progress):
    """Fills model, optimiser and progress with what save_checkpoint wrote. All ranks together, on
    any number of them. ValueError if it cannot be read."""
    # dcp.load fills in place, by the slices that this number of ranks has.
    state = train_state(model, optimizer, progress)
    try:
        dcp.load(state, checkpoint_id=folder / "train_state")
    except dcp.api.CheckpointException as e:
        raise ValueError(
            f"{folder}/train_state: cannot be read ({first_failure(e)}); it may be damaged or "
            "another model's. Move the folder away to go on from the one before it") from e
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])


def first_failure(checkpoint_exception):
    """The error of the first rank that failed, in words."""
    rank, (error, _) = min(checkpoint_exception.failures.items())
    return f"rank {rank}: {type(error).__name__}: {error}"


def check_space(model, config, output, last):
    """ValueError unless a checkpoint fits on the disk. Rank 0 only."""
    # The model as it is stored, 2 bytes a weight in bf16; with train_state 12 bytes more.
    dtype = getattr(torch, config.save_dtype, None)
    need = 0
    for shape, stored, _ in checkpoint_tensors(config.model).values():
        need += math.prod(shape) * (dtype or stored).itemsize
    if not last:
        for p in model.parameters():
            need += 3 * p.numel() * p.element_size()        # the weights and two moments
    free = shutil.disk_usage(output).free
    if free < need:
        raise ValueError(
            f"{output}: a checkpoint needs {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB "
            "free; make room, or name an output folder on another disk. Earlier checkpoints are as "
            "they were")
