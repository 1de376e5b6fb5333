"""Some of the faults of faults.py, one or two of each kind, and what has to hold beside its rule.
`make faults` runs all of them.

    python -m pytest tests/test_faults.py
"""
from collections import Counter

import numpy as np
import pytest

import faults
import train
from data.preference import PreferencePair, keep_pairs, read_kept_pairs

CASES = [       # how many ranks, which fault
    (1, "SIGKILL: the model's files of step 4"),
    (2, "SIGKILL: half of train_state is removed"),
    (2, "SIGKILL: evaluating the last step"),           # with save_every 0: it loses nothing any more
    (1, "SIGTERM: evaluating step 4"),                  # leaves the evaluation, and takes no further step
    (2, "SIGINT: before step 4 gets its name"),
    (2, "judge: hangs"),
    (1, "judge: panics"),
    (2, "judge: raises_at_last"),
    (2, "disk full: tensors of one rank of step 4"),
    (1, "disk full: weights of the last step, twice"),
    (1, "disk full: metrics.jsonl, four times"),
    (2, "damage: flip __0_0.distcp"),
    (1, "damage: a forged .metadata"),
    (1, "two jobs: on one folder"),
    (2, "launcher: SIGKILL in a step"),
    (2, "streams: stdout and stderr are gone"),
    (1, "clock: goes back"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return faults.Place(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("world, name", CASES, ids=str)
def test_a_fault_costs_no_step_that_was_due_to_be_saved_and_changes_no_weight(world, name, place):
    faults.check(faults.FAULTS[name], world, place)


def test_an_unharmed_run_folder_has_right_checksums_and_a_flipped_bit_anywhere_shows(place, tmp_path):
    """The rule's own instrument, by hand."""
    state = place.undisturbed_run(1) / "step-000004" / "train_state"
    assert faults.sums_are_right(state)
    for file in ("__0_0.distcp", ".metadata"):
        whole = (state / file).read_bytes()
        (state / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not faults.sums_are_right(state)
        (state / file).write_bytes(whole)
    assert faults.sums_are_right(state)


def test_every_flipped_bit_of_kept_tokens_is_an_error_that_names_their_file(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "x.safetensors"
    ids = [rng.integers(0, 400, n).astype(np.int32) for n in (5, 9, 7)]
    keep_pairs(file, [PreferencePair(*ids, f"a.jsonl:{i}") for i in range(1, 5)], Counter(short=2))
    whole = file.read_bytes()
    for at in range(8, len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        with pytest.raises(ValueError, match="x.safetensors: damaged"):
            read_kept_pairs(file)


def test_only_the_epochs_that_a_run_takes_are_put_into_order(place, tmp_path, monkeypatch):
    """--epochs 20000 --max_steps 1 once listed all epochs first."""
    asked, whole = [], train.epoch_steps
    monkeypatch.setattr(train, "epoch_steps", lambda *args: asked.append(args) or whole(*args))
    argv = [*place.argv(tmp_path / "out"), "--epochs", "20000", "--max_steps", "1"]
    train.main(train.parse_config(argv))
    assert len(asked) == 1 and len(faults.metrics(tmp_path / "out")) == 3
