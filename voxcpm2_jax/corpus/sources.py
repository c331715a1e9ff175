"""Where recordings come from: `open_corpus` of a name.

    FILE                                    a manifest, JSON lines (manifest.py)
    tfds:NAME[/CONFIG][:VERSION][@SPLIT]    a TensorFlow data set on this machine (datasets.py)

The embedded corpora (demo.py, debian.py) are read through the manifests that they write.
"""

import bisect
import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from voxcpm2_jax.corpus.manifest import TFDS, Manifest, Recording


class Corpus(Protocol):
    """A sequence of recordings, each read when it is asked for."""

    name: str
    sha256: str  # of what it consists of

    def __len__(self) -> int: ...

    def __getitem__(self, index): ...

    def __iter__(self) -> Iterator[Recording]: ...


def open_corpus(name: str | os.PathLike) -> Corpus:
    """The recordings that a name stands for.

    Raises:
        UserError: as `Manifest`; or a data set that is missing or of an unknown kind.
    """
    if str(name).startswith(TFDS):
        from voxcpm2_jax.corpus.datasets import Dataset  # takes seconds to import, and only such names need it

        return Dataset(str(name).removeprefix(TFDS))
    return Manifest(name)


def open_corpora(names: str) -> list[Corpus]:
    """The corpora of several names separated by commas; raises as `open_corpus`."""
    return [open_corpus(name) for name in names.split(",") if name]


class Joined(Sequence):
    """The recordings of several corpora, one after the other."""

    def __init__(self, corpora: Sequence[Corpus]):
        self._corpora = corpora
        self._starts = list(itertools.accumulate(map(len, corpora), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Recording:
        i = bisect.bisect_right(self._starts, index) - 1
        return self._corpora[i][int(index) - self._starts[i]]

    def part(self, start: int, end: int) -> Iterator[Recording]:
        """Recordings start .. end - 1."""
        for corpus, first in zip(self._corpora, self._starts):
            yield from corpus[max(0, start - first) : max(0, end - first)]


def in_threads(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int = 64) -> Iterator[tuple]:
    """(item, function(item)) of all items, in order; at most `ahead` results wait."""
    pending = collections.deque()
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) > ahead:
            item, future = pending.popleft()
            yield item, future.result()
    for item, future in pending:
        yield item, future.result()
