"""Held-out clips that are trained on are found, by the recording and the part of it."""

import dataclasses

import numpy as np
import pytest

from tests.data.test_pipeline import HEADER
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data import identity
from voxcpm2_jax.data.identity import IDENTITY, Known, check_heldout
from voxcpm2_jax.data.shards import IDENTITY_FILE, write_header

pytestmark = pytest.mark.fast


def drawn(rng, num):
    """Parts of few files, so that many overlap and many touch."""
    table = np.zeros(num, IDENTITY)
    table["file"], table["speaker"] = rng.integers(1, 9, num), rng.integers(0, 5, num)
    table["start_sec"] = rng.integers(0, 40, num)
    table["end_sec"] = np.where(rng.random(num) < 0.1, np.inf, table["start_sec"] + rng.integers(1, 4, num))
    return table


def test_overlaps_are_all_pairs_of_parts_that_share_time():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table, held = drawn(rng, 40), drawn(rng, rng.integers(1, 30))
        expected = {
            (i, j)
            for i, a in enumerate(table)
            for j, b in enumerate(held)
            if a["file"] == b["file"] and max(a["start_sec"], b["start_sec"]) < min(a["end_sec"], b["end_sec"])
        }
        found = list(zip(*(numbers.tolist() for numbers in Known(held).overlaps(table))))
        assert set(found) == expected and len(found) == len(expected)
    assert not len(Known(held[:0]).overlaps(table)[0])


def test_a_name_of_several_parts_is_not_another_one():
    names = [("a", "b"), ("ab",), ("", "ab"), ("a", None), ("a",)]
    assert len({identity.hash_name(*name) for name in names}) == 5


def write(directory, rows=None):
    """The header and identities of a directory of shards."""
    directory.mkdir()
    crc32 = {}
    if rows is not None:
        np.save(directory / IDENTITY_FILE, np.array([identity.identity(*row) for row in rows], IDENTITY))
        crc32 = {IDENTITY_FILE: 0}
    write_header(directory, dataclasses.replace(HEADER, sources_sha256=directory.name, crc32=crc32))
    return directory


def test_held_out_clips_are_compared_with_all_training_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_BLOCK", 2)  # several blocks
    one = write(tmp_path / "one", [(f"{i}.wav", None, None, "d", "ann") for i in range(5)])
    two = write(tmp_path / "two", [("long.wav", 10.0, 20.0, "d", None)])
    old = write(tmp_path / "old")
    fresh = write(tmp_path / "fresh", [("f.wav", None, None, "d", "bob"), ("long.wav", 20.0, None, "d", None)])
    voices = write(tmp_path / "voices", [(f"v{i}.wav", None, None, "d", name) for i, name in enumerate(("ann", "bob", "ann"))])
    copies = write(tmp_path / "copies", [("f.wav", None, None, "d", None), ("4.wav", 1.0, 2.0, "d", None)])
    across = write(tmp_path / "across", [("long.wav", 19.0, 21.0, "e", None)] * 2)
    assert check_heldout([one, two], [fresh]) == []
    (line,) = check_heldout([two, one], [fresh, voices])
    assert line.startswith(f"{voices}: 2 of 3 held-out clips are of speakers who are also trained on")
    for bad, message in ((copies, "1 of 2 clips are also trained on, first clip 1"), (across, "2 of 2 clips are also trained")):
        with pytest.raises(UserError, match=message):
            check_heldout([one, two], [fresh, bad])
    with pytest.raises(UserError, match=f"{two}: held-out clips made from the same recordings as the training clips of {two}"):
        check_heldout([one, two], [two])
    (line,) = check_heldout([one, old], [fresh])
    assert line.startswith(f"{old}: shards older than identity.npy; not checked")
    with pytest.raises(UserError, match="also trained on"):  # what can be compared is
        check_heldout([old, one], [copies])
