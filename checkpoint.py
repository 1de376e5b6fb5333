"""The folder of a run: what makes it this run, its checkpoints, and where it goes on.

    output = claim_output(config.output, config.method, config.resume, restarted=False)
    step, folder = newest_checkpoint(output, last_step)
    save_checkpoint(model, optimizer, progress, config, output, last=False)
    load_checkpoint(folder, model, optimizer, progress)     # on any number of ranks

    run.json        what the run is: its knobs, the shape of its model, the digest of its pairs
    config.toml     the resolved config: give it back to repeat the run
    metrics.jsonl   an object a step, and one an evaluation
    step-000400/    a Hugging Face folder. Until the run is finished it also has train_state/ in it:
                    fp32 weights, moments and counters, by torch.distributed.checkpoint

A checkpoint is written under another name and gets its own once it is complete. SHA256SUMS tells a
train_state that was damaged since. It tells nothing of one that was forged: so train_state holds
tensors alone, and nothing in it is unpickled but the few classes that describe them.
"""
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from command import lock
from data.files import append_whole, is_finite_number, parse_line, read_json, write_whole
from data.preference import content_hash
from distributed import from_all_ranks, from_rank_0, say
from model import checkpoint_tensors, copied_files, save_model

LOCK = ".lock"          # held by the job that is at work in a run folder
SUMS = "SHA256SUMS"     # of train_state, as `sha256sum -c` reads it


# --- the folder of a run --------------------------------------------------------------------------

def claim_output(output, method, resume, restarted):
    """The run folder, made if need be and locked: `output`, or the first free of runs/METHOD-001,
    -002, ...

    ValueError if it holds a run that may not be resumed, or another job is at work in it. A rank
    that torchrun restarted goes on without `resume`, but only with what its own torchrun began.
    Rank 0 only.
    """
    if output:
        output = Path(output)
        # A folder that is no run may be somebody's work: it is never written to.
        if output.exists() and _holds_more(output) and not (output / "run.json").exists():
            raise ValueError(f"output folder {output} is not empty and holds no run.json, so no "
                             "run; name another one")
        output.mkdir(parents=True, exist_ok=True)
        # Another job may have begun here, and be at work on it.
        lock(output / LOCK)
        began = read_run(output)
        if began and not resume and not (restarted and began["job"] == this_job()):
            raise ValueError(f"output folder {output} is not empty; --resume to go on with its "
                             "run, or name a new one")
        return output

    if resume or restarted:
        raise ValueError("a run can be resumed only by the name of its folder; give --output")
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        output = Path(f"runs/{method}-{number:03d}")
        try:
            output.mkdir()
        except FileExistsError:
            continue
        lock(output / LOCK)
        return output


def _holds_more(output):
    """Whether a folder holds more than a run leaves that was killed before it began."""
    return any(not re.fullmatch(r"\.lock|run\.\d+\.tmp\.json", file.name)
               for file in output.iterdir())


def this_job():
    """The torchrun that this rank belongs to: its host and process, the same over restarts."""
    return f"{os.uname().nodename} {os.getppid()}"


def read_run(output):
    """run.json of a run folder. None without it, ValueError if it is damaged."""
    path = output / "run.json"
    if not path.exists():
        return None
    try:
        run = read_json(path)
        parts = [run.get(part) for part in ("config", "model", "pairs")]
        if "job" in run and all(isinstance(part, dict) for part in parts):
            return run
    except ValueError:
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


def model_digest(folder, *others):
    """In hexadecimal what the files of a model folder hold and are named, but for its weights; with
    other values (numbers, strings, lists of them)."""
    files = list(copied_files(folder))
    names = [str(file.relative_to(folder)) for file in files]
    return content_hash(files, names, *others)


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
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = parse_line(path, text)
        except ValueError:
            line = {}
        if not is_finite_number(line.get("step")):
            print(f"resume   {path}:{number} is damaged and left out")
        elif line["step"] <= step:
            lines.append(line)
    return lines


def log_metrics(output, lines):
    """Appends lines to metrics.jsonl: all of them, or none and an OSError. JSON has no NaN: numbers
    that are not finite become null. Rank 0 only."""
    text = ""
    for metrics in lines:
        line = {}
        for name, value in metrics.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            line[name] = value if finite else None
        text += json.dumps(line) + "\n"
    append_whole(output / "metrics.jsonl", text)


# --- checkpoints ----------------------------------------------------------------------------------

def newest_checkpoint(output, last_step):
    """(step, folder) of the newest checkpoint that is complete and undamaged, (0, None) if there is
    none of any kind. Says what it passes over. ValueError if that is all there is. All ranks
    together."""
    whole = from_rank_0(lambda: _whole_checkpoints(output))
    passed = []
    for step, folder in sorted(whole.items(), reverse=True):
        fault, goes_on = from_rank_0(lambda: _look_at(folder, step == last_step))
        if goes_on:
            fault = damage(folder / "train_state")
        if fault is None:
            return step, folder
        passed.append(f"{folder}: {fault}")
        say(f"resume   passing over {passed[-1]}")
    if passed:
        raise ValueError(f"{'; '.join(passed)}. Nothing is left to go on from; to begin anew, name "
                         "a new output folder")
    return 0, None


def _whole_checkpoints(output):
    whole = checkpoints(output)
    # Those of a run that was killed while it wrote them, or deleted them.
    for folder in sorted(set(output.glob("step-*")) - set(whole.values())):
        print(f"resume   passing over {folder}: it was not written to the end")
    return whole


def _look_at(folder, is_last):
    """(what a checkpoint lacks, in words, or None; whether it has a train_state to go on from)."""
    if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
        return "it has no model in it", False
    # torch.distributed.checkpoint writes .metadata last, and finish_checkpoint removes it first.
    if (folder / "train_state" / ".metadata").exists():
        return None, True
    return None if is_last else "it has no train_state in it", False


def checkpoints(output):
    """{step: folder} of a run folder, those that bear the name of a whole one."""
    found = {}
    for folder in output.glob("step-*"):
        if re.fullmatch(r"step-\d{6,}", folder.name):
            found[int(folder.name[5:])] = folder
    return found


def train_state(model, optimizer, progress):
    """{name: tensor}: the weights and moments themselves, and copies of the counters."""
    state = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = p.detach()
        for moment, tensor in optimizer.state[p].items():
            state[f"optimizer.{name}.{moment}"] = tensor
    for name, value in progress.items():
        state[f"progress.{name}"] = torch.as_tensor(value)
    return state


def save_checkpoint(model, optimizer, progress, config, output, last):
    """Writes step-NNNNNN under a name that says it is incomplete, and gives it its own once all
    ranks are done; then deletes all but config.keep_last. The last one holds the model alone:
    nothing is left to resume. Returns its folder. OSError, on all ranks, if it cannot be written:
    the other checkpoints are as they were then. All ranks together."""
    folder = output / f"step-{progress['step']:06d}"
    writing = folder.with_suffix(".incomplete")

    def prepare():
        shutil.rmtree(writing, ignore_errors=True)      # of a run that was killed here
        check_space(model, config, output, last)

    def complete():
        # A checkpoint alone says how to repeat the run.
        if not last:
            shutil.copyfile(output / "config.toml", writing / "train_state" / "config.toml")
        # Where there is one of that step already, it was passed over as damaged.
        if folder.exists():
            folder.rename(folder.with_suffix(".replaced.incomplete"))
        writing.rename(folder)

    from_rank_0(prepare)
    try:
        # 1. Everything, under the name that says it is incomplete.
        dtype = getattr(torch, config.save_dtype, None)
        save_model(model, writing, like=config.model, dtype=dtype)
        if not last:
            state = train_state(model, optimizer, progress)
            dcp.save(state, checkpoint_id=writing / "train_state")
            write_sums(writing / "train_state")
        # 2. Its name.
        from_rank_0(complete)
    except (OSError, dcp.api.CheckpointException) as e:
        reason = first_failure(e) if isinstance(e, dcp.api.CheckpointException) else e
        raise OSError(f"{writing}: cannot be written ({reason}); earlier checkpoints are as they "
                      "were") from e
    from_rank_0(lambda: _delete_old(output, progress["step"], config.keep_last))
    return folder


def finish_checkpoint(folder):
    """Takes the train_state out of the last checkpoint, once nothing is left to resume. Rank 0
    only."""
    state = folder / "train_state"
    if state.exists():
        (state / ".metadata").unlink(missing_ok=True)       # half of it is none: see _look_at
        shutil.rmtree(state)
    # What a run left that was killed while it deleted: no save follows that would.
    _delete_old(folder.parent, int(folder.name[5:]), keep_last=0)


def _delete_old(output, step, keep_last):
    """Deletes checkpoints before `step`, so that keep_last stay with that of `step` (0: all stay),
    and whatever is incomplete."""
    whole = checkpoints(output)
    older = sorted(s for s in whole if s < step)
    surplus = len(older) - (keep_last - 1) if keep_last else 0
    try:
        for s in older[:max(0, surplus)]:
            # Never half of a checkpoint under the name of a whole one.
            whole[s].rename(whole[s].with_suffix(".incomplete"))
            print(f"deleted  {whole[s]}, older than the last {keep_last}")
        for rest in output.glob("step-*.incomplete"):
            if rest.is_symlink():           # somebody moved it to another disk: that stays
                rest.unlink()
            else:
                shutil.rmtree(rest)
    except OSError as e:
        print(f"note     an old checkpoint cannot be deleted ({e})")     # no reason to stop


def load_checkpoint(folder, model, optimizer, progress):
    """Fills model, optimiser and progress with what save_checkpoint wrote. All ranks together, on
    any number of them. ValueError if it cannot be read."""
    # dcp.load fills the tensors in place, by the slices that this number of ranks has.
    state = train_state(model, optimizer, progress)
    reader = TensorReader(folder / "train_state")
    try:
        dcp.load(state, storage_reader=reader, planner=TensorPlanner())
    except dcp.api.CheckpointException as e:
        raise ValueError(
            f"{folder}/train_state: cannot be read ({first_failure(e)}); it may be damaged or "
            "another model's. Move the folder away to go on from the one before it") from e
    for name, value in progress.items():
        if isinstance(value, int):
            progress[name] = state[f"progress.{name}"].item()
    # A folder that was renamed: steps would be left out, or logged twice.
    if progress["step"] != int(folder.name[5:]):
        raise ValueError(f"{folder}: its train_state holds step {progress['step']}; expected that "
                         "of its name. Give it its own name back")


class TensorReader(dcp.FileSystemReader):
    """Reads .metadata, a pickle, without running what it may hold. ValueError if it cannot be
    read."""

    def __init__(self, folder):
        super().__init__(folder)
        # Here and not when torch asks: it would log a failure with a traceback, twice on each rank.
        try:
            with open(folder / ".metadata", "rb") as f:
                self.metadata = MetadataUnpickler(f).load()
        except Exception as e:          # a pickle may raise anything
            raise ValueError(
                f"{folder}/.metadata: cannot be read ({e}); it may be damaged or forged. Move the "
                "checkpoint's folder away to go on from the one before it") from e

    def read_metadata(self, *args, **kwargs):
        self.metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return self.metadata


class TensorPlanner(dcp.DefaultLoadPlanner):
    """Refuses entries that are no tensors, which torch would unpickle."""

    def load_bytes(self, read_item, value):
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")


class MetadataUnpickler(pickle.Unpickler):
    """Knows what describes tensors, and nothing else: a pickle that names another function or class
    is an error."""
    known = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},         # "torch.strided" to what it names
        "torch": {"Size"},
        "pathlib": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.known.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


def write_sums(folder):
    """Writes SHA256SUMS of a train_state. A rank reads what it wrote itself: on a shared file
    system others may not see it yet. All ranks together."""
    def mine():
        files = sorted(folder.glob(f"__{dist.get_rank()}_*"))
        if dist.get_rank() == 0:
            files.append(folder / ".metadata")
        return [f"{sha256(file)}  {file.name}\n" for file in files]

    lines = sum(from_all_ranks(mine), [])
    from_rank_0(lambda: write_whole(folder / SUMS, "".join(lines)))


def damage(folder):
    """How a train_state differs from its SHA256SUMS, in words; None if it does not. Each rank reads
    a share of the files. All ranks together."""
    def mine():
        try:
            lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
            listed = {line.split("  ")[-1] for line in lines}
            if listed != {".metadata"} | {file.name for file in folder.glob("*.distcp")}:
                return f"{folder / SUMS} does not list the files that are there"
            for line in lines[dist.get_rank()::dist.get_world_size()]:
                expected, name = line.split("  ")
                if sha256(folder / name) != expected:
                    return f"{folder / name} is damaged (by {SUMS})"
        except (OSError, ValueError) as e:
            return f"{folder} is damaged ({e})"
        return None

    faults = [fault for fault in from_all_ranks(mine) if fault]
    return faults[0] if faults else None


def sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def first_failure(checkpoint_exception):
    """The error of the first rank that failed, in words."""
    rank, (error, _) = min(checkpoint_exception.failures.items())
    return f"rank {rank}: {type(error).__name__}: {error}"


def check_space(model, config, output, last):
    """OSError unless a checkpoint fits on the disk. Rank 0 only."""
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
        raise OSError(
            f"{output}: a checkpoint needs {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB "
            "free; make room, or name an output folder on another disk. Earlier checkpoints are as "
            "they were")
