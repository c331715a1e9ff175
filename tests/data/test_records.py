import concurrent.futures
import errno
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from tests.data.test_pipeline import same, some_clips, write
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import WatchdogConfig
from voxcpm2_jax.data import records, shards
from voxcpm2_jax.data.records import Part, ReadError, Records
from voxcpm2_jax.data.shards import LENGTHS_FILE, Shards, read_header

CLIPS = some_clips(300)  # in 43 shards


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("many"), CLIPS)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(records.time, "sleep", lambda _: None)


# ---- descriptors -----------------------------------------------------------------------------------------------------

READ_ALL = """
import os, resource, sys
import jax
from array_record.python import array_record_module
from voxcpm2_jax.data.shards import Shards

is_open = lambda: len(os.listdir("/dev/fd"))
soft, hard = (is_open() + int(left) for left in sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
shards, most = Shards(sys.argv[1]), 0
for i in (*range(0, len(shards), 5), *range(len(shards))):
    assert shards[i].text.startswith(f"line {i}" + chr(10)), i
    most = max(most, is_open())
print(most - soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - soft)
"""


@pytest.mark.parametrize("soft, hard", [(12, 12), (12, 1000)])
def test_there_are_more_shards_than_the_process_may_open(directory, soft, hard):
    """43 shards, and 12 descriptors left. A limit that can be raised is, and then every shard stays open."""
    command = [sys.executable, "-c", READ_ALL, directory, str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    beyond, raised_by = map(int, done.stdout.split())
    assert (beyond < 0 and raised_by == 0) if hard == soft else (beyond >= 43 - 12 and raised_by >= 43)


def test_running_out_of_descriptors_is_not_called_damage(directory, capsys):
    """Another part of the process takes all that are left, and gives them back after the second failure."""
    source, limits = Shards(directory), resource.getrlimit(resource.RLIMIT_NOFILE)
    source._records._reader.cache_clear()
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 8, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(ReadError, match=r"open\(\) failed: Too many open files; .*shard-00000-of-00043\.array_record"):
            source[0]
        os.close(taken.pop())
        clip = source[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in taken:
            os.close(file)
    same(clip, CLIPS[0])
    assert capsys.readouterr().err.count("Too many open files") == len(records.PAUSES_SEC)


def test_threads_share_few_readers(directory, monkeypatch):
    monkeypatch.setattr(records, "_MOST_OPEN", 3)
    source = Shards(directory)
    order = np.random.default_rng(0).permutation(len(CLIPS)).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, clip in zip(order, pool.map(source.__getitem__, order)):
            same(clip, CLIPS[i])
    assert source._records._reader.cache_info().currsize == 3


def test_parts_of_files(directory):
    names = [str(directory / name) for name in read_header(directory).shards]
    parts = Records([Part(names[0], 2, 3), Part(names[1], 5), Part(names[0], 0, 1)], "look")
    texts = [shards.from_record(record).text.split()[1] for record in parts]
    assert texts == ["2", "3", "4", "12", "13", "0"] and parts[-1] == parts[5]
    assert parts.place(4) == f"{names[1]}: clip 6 (number 4 of the corpus)"


# ---- a machine that fails --------------------------------------------------------------------------------------------


class Failing:
    """Wraps `function`, which fails a number of times first."""

    def __init__(self, function, error, times):
        self.function, self.error, self.left = function, error, times

    def __call__(self, *args, **kwargs):
        if self.left:
            self.left -= 1
            raise self.error
        return self.function(*args, **kwargs)


def fail_from_now(monkeypatch, directory, number, times):
    """Shards whose next reads meet an error of the system, as array_record reports it -> (shards, what fails)."""
    error = RuntimeError(f"pread() failed: {os.strerror(number)}; reading a file; at byte 7762")
    failing = Failing(records._reader, error, 0)
    monkeypatch.setattr(records, "_reader", failing)
    source = Shards(directory)
    source._records._reader.cache_clear()
    failing.left = times
    return source, failing


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOENT])
def test_a_passing_error_is_tried_again(directory, monkeypatch, capsys, number):
    """ENOENT too: the shard was there at the start."""
    source, _ = fail_from_now(monkeypatch, directory, number, 2)
    same(source[100], CLIPS[100])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and os.strerror(number) in told[1] and told[1].endswith("next attempt in 2 s")


def test_an_error_that_stays_is_the_machines(directory, monkeypatch):
    source, failing = fail_from_now(monkeypatch, directory, errno.EIO, 1000)
    with pytest.raises(ReadError, match=r"Input/output error.*; 8 attempts in 127 s"):
        source[100]
    assert failing.left == 1000 - len(records.PAUSES_SEC) - 1
    with pytest.raises(ReadError, match="1 attempts in 0 s"):
        source[7]
    failing.left = 0
    same(source[7], CLIPS[7])
    assert sum(records.PAUSES_SEC) < WatchdogConfig().min_sec / 2


@pytest.mark.parametrize("name", ["header.json", LENGTHS_FILE, ""])
def test_an_index_that_cannot_be_read_now_is_not_called_damaged(directory, monkeypatch, name):
    calls = {"header.json": (pathlib.Path, "read_text"), LENGTHS_FILE: (np, "load"), "": (os, "listdir")}
    where, attribute = calls[name]
    failing = Failing(getattr(where, attribute), OSError(errno.EIO, "Input/output error"), 2)
    monkeypatch.setattr(where, attribute, lambda *args, **kwargs: failing(*args, **kwargs))
    assert len(Shards(directory)) == len(CLIPS) and not failing.left
    failing.left = 1000
    with pytest.raises(ReadError, match=r"Input/output error.*; 8 attempts in 127 s"):
        Shards(directory)


def test_an_absent_file_is_not_tried_again(tmp_path, capsys):
    with pytest.raises(UserError, match="no shards here"):
        Shards(tmp_path)
    with pytest.raises(UserError, match=r"lengths\.npy: cannot be read \(.*No such file"):
        shards.load_array(tmp_path / LENGTHS_FILE)
    assert not capsys.readouterr().err
