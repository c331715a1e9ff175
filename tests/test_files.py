"""Files are written whole or not at all, whatever fails, and however many hosts write the same one."""

import errno
import os
import pathlib

import numpy as np
import pytest

from voxcpm2_jax import files
from voxcpm2_jax.config.plain import UserError

pytestmark = pytest.mark.fast


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "sound.wav"
    path.write_text("old")
    with files.aside(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path and temporary.suffix == ".wav" and temporary.name.startswith(".")
    assert names(tmp_path) == ["sound.wav"] and path.read_text() == "new"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with files.aside(tmp_path / "a.json") as one, files.aside(tmp_path / "a.json") as other:
        one.write_text("one")
        other.write_text("other")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "one"


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.replace_file(path, "old")
    with pytest.raises(ZeroDivisionError), files.aside(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert names(tmp_path) == ["a.txt"] and path.read_text() == "old"


def test_a_block_that_writes_nothing_changes_nothing(tmp_path):
    with files.aside(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_a_temporary_file_may_have_a_name_for_readers(tmp_path):
    with files.aside(tmp_path / "a.wav", name="a.wav.part") as temporary:
        temporary.write_text("half")
        assert names(tmp_path) == ["a.wav.part"]
    assert names(tmp_path) == ["a.wav"]


def test_sync_flushes_the_file_before_the_rename_and_the_directory_after_it(tmp_path, monkeypatch):
    calls = []
    rename, fsync = pathlib.Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(pathlib.Path, "replace", lambda self, target: (calls.append("rename"), rename(self, target)))
    files.replace_file(tmp_path / "a.txt", "ü", sync=True)
    temporary, *rest = calls
    assert pathlib.Path(temporary).parent == tmp_path and rest == ["rename", str(tmp_path)]
    assert (tmp_path / "a.txt").read_bytes() == "ü".encode()


def test_flush_of_a_directory_may_be_unknown_to_the_file_system(tmp_path, monkeypatch):
    def refuse(code):
        def fsync(file):
            raise OSError(code, "refused")

        monkeypatch.setattr(os, "fsync", fsync)

    (tmp_path / "a").write_text("")
    refuse(errno.EINVAL)
    files.flush(tmp_path)
    with pytest.raises(OSError, match="refused"):
        files.flush(tmp_path / "a")
    refuse(errno.EIO)
    with pytest.raises(OSError, match="refused"):
        files.flush(tmp_path)


def test_json_and_arrays(tmp_path):
    files.write_json(tmp_path / "a.json", {"ü": [1]})
    files.save_array(tmp_path / "a.npy", np.arange(3))
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ü": [\n    1\n  ]\n}\n'
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2] and names(tmp_path) == ["a.json", "a.npy"]


def test_a_fresh_directory_is_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), files.fresh_directory(tmp_path / "new" / "inner") as temporary:
        (temporary / "a").write_text("half")
        _ = 1 / 0
    assert names(tmp_path / "new") == []
    with files.fresh_directory(tmp_path / "new" / "inner") as temporary:
        (temporary / "a").write_text("whole")
    assert names(tmp_path / "new") == ["inner"]
    with pytest.raises(UserError, match="absent or empty"), files.fresh_directory(tmp_path / "new"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), files.fresh_directory(tmp_path / "file" / "inner"):
        pass


def test_once_keeps_what_another_host_made_first(tmp_path):
    path = tmp_path / "codec"

    def write(temporary):
        (temporary / "codec").mkdir()
        (temporary / "codec" / "mine").write_text("")
        path.mkdir()
        (path / "theirs").write_text("")

    files.once(path, write)
    assert names(tmp_path) == ["codec"] and names(path) == ["theirs"]
    files.once(path, lambda temporary: pytest.fail("it is there already"))
    with pytest.raises(UserError, match="other: cannot be written"):
        files.once(tmp_path / "other", lambda temporary: None)
    assert names(tmp_path) == ["codec"]


@pytest.mark.parametrize("torn", ["", '{"step": 9, "lo', "\x00\x00"])
def test_heal_drops_the_torn_line_and_later_steps(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    assert files.heal(path, 5) is None and not path.exists()
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 5, "loss": 0.5}\n{"step": 8, "loss": 9.0}\n' + torn)
    assert files.heal(path, 5) == {"step": 5, "loss": 0.5}
    assert path.read_text() == '{"step": 2, "loss": 1.0}\n{"step": 5, "loss": 0.5}\n'
    assert files.heal(path, 1) is None and path.read_text() == ""


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    files.check_file(tmp_path / "a.json")
    files.check_directory(tmp_path / "new" / "inner")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nothing" / "a.json", tmp_path / "file" / "a.json"):
        with pytest.raises(UserError, match="its directory must exist and be writable"):
            files.check_file(path)
    for path in (tmp_path / "file", tmp_path / "file" / "inner", pathlib.Path("/proc/new")):
        with pytest.raises(UserError, match="expected a directory, or a name for a new one"):
            files.check_directory(path)
