"""Random access to the records of many ArrayRecord files, of which a bounded number is open at a time.

What a read can meet, and what follows:

    a damaged file          UserError at once: ArrayRecord checks a hash of each record when it is read
    a machine that fails    EIO, ESTALE, a mount that went away, no file descriptors left: the file is opened anew after
                            growing pauses, for two minutes; then ReadError, on which a command ends with exit code 1

A corpus of 10^7 clips has 2,442 shards, more than the 1,024 files that a process may usually open. The limit is raised as
far as the machine allows, and the files that were used last stay open.
"""

import bisect
import errno
import functools
import itertools
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from voxcpm2_jax.config.plain import UserError

T = TypeVar("T")

_MOST_OPEN = 4096  # files; an open one of 4,096 clips takes 60 kB of memory
_OPENERS = 16  # threads that open files at the start
_BUFFER_BYTES = 32768
_BY_SYSTEM = re.compile(r"\w+\(\) failed: ")  # array_record reports failures of system calls so, damage in other words

# ---- reading on a machine that may fail --------------------------------------------------------------------------------

PAUSES_SEC = (1, 2, 4, 8, 16, 32, 64)  # before each further attempt; together less than a stall of WatchdogConfig

# The path itself is wrong or forbidden: another attempt gives the same.
_OF_THE_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}


class ReadError(OSError):
    """The machine failed to read, in several attempts. It is no mistake of the user: commands end with exit code 1."""


def patiently(read: Callable[[], T], pauses_sec: Sequence[float] | None = None) -> T:
    """What `read` returns. While it raises an OSError, it is called again after growing pauses, each of which is reported.

    Args:
        pauses_sec: default PAUSES_SEC.
    Raises:
        ReadError: the last attempt failed too.   OSError: the path is wrong or forbidden.
    """
    pauses_sec = PAUSES_SEC if pauses_sec is None else pauses_sec
    for pause in (*pauses_sec, None):
        try:
            return read()
        except OSError as error:
            if error.errno in _OF_THE_PATH:
                raise
            if pause is None:
                raise ReadError(f"cannot read: {error}; {len(pauses_sec) + 1} attempts in {sum(pauses_sec)} s") from None
            print(f"cannot read: {error}; next attempt in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError


# ---- files -----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Records of one file."""

    path: str
    first: int = 0
    count: int | None = None  # None: up to the last


class Records(Sequence):
    """The records of some files one after the other, as bytes; safe to share between threads.

    Args:
        advice: what to do about a damaged file, for messages.
    Raises:
        UserError: a file is damaged.   ReadError: the machine fails. Both also when a record is read.
    """

    def __init__(self, parts: Sequence[Part], advice: str):
        self._parts, self._advice, self._has_given_up = parts, advice, False
        most = _most_open(len(parts))
        self._reader = functools.lru_cache(most)(_reader)  # one that is evicted is closed after its last use
        with ThreadPoolExecutor(min(most, _OPENERS)) as pool:
            self._ends = list(itertools.accumulate(pool.map(self._count, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        part, number = self.find(index)
        return self._ask(part, lambda reader: reader.read([number])[0], lambda: f"{self.place(index)} cannot be read")

    def place(self, index: int) -> str:
        """The file of a record and its number in it, for messages."""
        part, number = self.find(index)
        return f"{part.path}: clip {number} (number {index} of the corpus)"

    def find(self, index: int) -> tuple[Part, int]:
        """The part of a record, and the record's number in the file."""
        index = range(len(self))[index]
        i = bisect.bisect_right(self._ends, index)
        part = self._parts[i]
        return part, part.first + index - (self._ends[i - 1] if i else 0)

    def _count(self, part: Part) -> int:
        if part.count is not None:
            return part.count
        return self._ask(part, lambda reader: reader.num_records(), lambda: f"{part.path}: incomplete or damaged") - part.first

    def _ask(self, part: Part, question: Callable[..., T], complaint: Callable[[], str]) -> T:
        """question(reader of the file). array_record raises RuntimeError for whatever happens."""

        def once() -> T:
            try:
                return question(self._reader(part.path))
            except RuntimeError as error:
                if not _BY_SYSTEM.search(str(error)):
                    raise UserError(f"{complaint()} ({error}); {self._advice}") from None
                self._reader.cache_clear()  # frees descriptors; and after an error a file has to be opened anew
                raise OSError(str(error)) from None  # it names the file

        try:
            return patiently(once, () if self._has_given_up else None)
        except ReadError:
            self._has_given_up = True  # queued reads of other threads do not keep the process from ending
            raise


def _reader(path: str):
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=_BUFFER_BYTES)
    if not reader.ok():
        reader.close()  # raises what went wrong
    return reader


def _most_open(num_files: int) -> int:
    """How many of some files may be open: half of the descriptors that are left, once the limit is raised."""
    soft, hard = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    is_open = len(os.listdir("/dev/fd"))
    wanted = min(is_open + 2 * min(num_files, _MOST_OPEN), hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(1, min((max(soft, wanted) - is_open) // 2, _MOST_OPEN))
