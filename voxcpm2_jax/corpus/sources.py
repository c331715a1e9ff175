"""Where recordings come from: `open_corpus` of a name.

    FILE                                    a manifest, JSON lines (manifest.py)
    tfds:NAME[/CONFIG][:VERSION][@SPLIT]    a TensorFlow data set on this machine (datasets.py)

The embedded corpora (demo.py, debian.py) are read through the manifests that they write.
"""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
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
