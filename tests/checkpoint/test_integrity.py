"""Damaged checkpoints: every kind of file, every kind of damage; each is named, and the step before is used."""

import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.checkpoint.states import State, assert_equal, begin, kept
from voxcpm2_jax.checkpoint import arrays, integrity
from voxcpm2_jax.checkpoint.manager import Checkpoints
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.workdir import load_params


def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return Checkpoints(tmp_path / "run", keep=3, every_steps=1)


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def add_file(path):
    path.with_name("unexpected").write_bytes(b"1")


# One file of each kind in a step.
KINDS = (
    "params/manifest.ocdbt", "params/d/*", "params/ocdbt.process_0/d/*", "params/ocdbt.process_0/manifest.ocdbt",
    "opt_state/_METADATA", "params/_sharding", "params/array_metadatas/process_0", "step/manifest.ocdbt", "meta/metadata",
    integrity.CHECKSUMS_FILE,
)  # fmt: skip


def test_every_kind_of_file_is_damaged_below(saved):
    files = [p.relative_to(saved[0] / "checkpoints" / "2") for p in (saved[0] / "checkpoints" / "2").rglob("*") if p.is_file()]
    others = [f for f in files if not any(f.match(k) or f.match(f"*/{k.split('/', 1)[-1]}") for k in KINDS)]
    assert {f.name for f in others} == {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, truncate, flip, add_file])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, tmp_path, capsys, kind, damage):
    checkpoints = copy(saved, tmp_path)
    step = checkpoints.directory / "2"
    file = sorted(step.glob(kind))[-1]
    damage(file)
    with pytest.raises(UserError, match=r"/2: damaged checkpoint: .*; use another step: 1$"):
        integrity.verify(tmp_path / "run")
    state, meta = begin(checkpoints, saved[1][2])
    assert_equal(state, saved[1][1])
    assert meta["step"] == 1
    damaged, aside, line = capsys.readouterr().err.splitlines()
    name = file.with_name("unexpected") if damage is add_file else file
    # If the list of checksums was altered, the message may name a file of the list.
    named = "" if kind == integrity.CHECKSUMS_FILE and damage is flip else f"{name.relative_to(step)} "
    assert damaged.startswith(f"DAMAGED CHECKPOINT {step}: {named}")
    assert aside == f"skipped and renamed to {checkpoints.directory}/2.damaged"
    assert line == f"starting from step 1 of {tmp_path / 'run'} (resume)"
    # The run can save step 2 again.
    checkpoints.save(2, state, {"config": {}})
    checkpoints.close()
    assert checkpoints.verified_step() == 2 and (checkpoints.directory / "2.damaged").is_dir()


def test_a_file_that_cannot_be_read_is_not_called_altered(saved, monkeypatch):
    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(integrity, "_crc32", refuse)
    with pytest.raises(UserError, match=r"params/_METADATA cannot be read \(Input/output error\)"):
        integrity.verify(saved[0], "params")


def test_everything_is_flushed_to_disk_before_a_step_counts_as_saved(tmp_path, monkeypatch):
    """Files and directories that TensorStore did not flush itself, and at last the directory that holds the step's number."""
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    checkpoints = Checkpoints(tmp_path, keep=1, every_steps=1)
    checkpoints.save(1, State(np.int32(1), {"kernel": np.ones(3)}, {}), {"config": {}})
    checkpoints.close()
    step = checkpoints.directory / "1"
    names = {name.replace(".orbax-checkpoint-tmp", "") for name in flushed}  # where it is after the renames
    for path in (step, *step.rglob("*")):
        assert str(path) in names or path.name == integrity.CHECKSUMS_FILE, path
    assert pathlib.Path(flushed[-1]) == checkpoints.directory


def test_a_run_with_only_damaged_checkpoints_does_not_start_afresh(saved, tmp_path, capsys):
    checkpoints = copy(saved, tmp_path)
    for step in (1, 2):
        truncate(checkpoints.directory / str(step) / "params" / "manifest.ocdbt")
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint is damaged \(2, 1\)"):
            begin(checkpoints, saved[1][2])
    checkpoints.close()


@pytest.mark.parametrize("name", ["3", "notes", "4.bak"])
def test_other_directories_among_the_checkpoints(saved, tmp_path, capsys, name):
    shutil.copytree(saved[0], tmp_path / "run")
    directory = tmp_path / "run" / "checkpoints" / name
    directory.mkdir()
    (directory / "file").write_text("mine")
    checkpoints = Checkpoints(tmp_path / "run", keep=3, every_steps=1)
    _, meta = begin(checkpoints, saved[1][2])
    assert meta["step"] == 2
    checkpoints.save(3, saved[1][2], {"config": {}})
    checkpoints.close()
    assert kept(checkpoints) == [1, 2, 3]
    said = capsys.readouterr().err
    if name == "3":
        assert f"DAMAGED CHECKPOINT {directory}: it has neither checksums.json nor meta/" in said
    else:
        assert "DAMAGED" not in said and (directory / "file").read_text() == "mine"


def test_a_step_of_an_earlier_version_is_read_and_reported_as_not_verified(saved, tmp_path, capsys):
    checkpoints = copy(saved, tmp_path)
    for step in (1, 2):
        path = checkpoints.directory / str(step)
        (path / integrity.CHECKSUMS_FILE).unlink()
        (path / "meta" / "metadata").write_text(json.dumps({"step": step, "config": {"n": 1}}))
    state, _ = begin(checkpoints, saved[1][2])
    checkpoints.close()
    assert_equal(state, saved[1][2])
    assert "(resume), not verified: an earlier version saved it without checksums" in capsys.readouterr().err
    assert load_params(tmp_path / "run")[2] == 2


def test_readers_refuse_damaged_weights_only(saved, tmp_path):
    checkpoints = copy(saved, tmp_path)
    checkpoints.close()
    flip(checkpoints.directory / "2" / "opt_state" / "manifest.ocdbt")
    assert_equal(load_params(tmp_path / "run")[1], jax.tree.map(np.asarray, saved[1][2].params))
    flip(next((checkpoints.directory / "2" / "params" / "ocdbt.process_0" / "d").iterdir()))
    for read in (load_params, arrays.array_specs):
        with pytest.raises(UserError, match=r"damaged checkpoint: params/ocdbt.process_0/d/\w+ was altered"):
            read(tmp_path / "run")
