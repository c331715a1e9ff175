"""Where recordings come from: `open_corpus` of a name.

    FILE                                              a manifest, JSON lines (manifest.py)
    FILE or DIRECTORY                                 a list in another format: CSV, TSV, Kaldi, lhotse, Hugging Face (lists.py)
    tfds:NAME[/CONFIG][:VERSION][@SPLIT][?rate=HZ]    a TensorFlow data set on this machine (datasets.py)

The embedded corpora (demo.py, debian.py) are read through the manifests that they write.
"""

import bisect
import collections
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus.lists import open_list
from voxcpm2_jax.corpus.manifest import TFDS, Recording


class Corpus(Protocol):
    """A sequence of recordings, each read when it is asked for."""

    name: str
    sha256: str  # of what it consists of

    num_faults: int  # entries that are left out, because they are no recordings

    def __len__(self) -> int: ...

    def __getitem__(self, index): ...

    def faults(self) -> Iterator[tuple[str, str]]:
        """The place of each entry that is left out, and what is wrong with it."""

    def __iter__(self) -> Iterator[Recording]: ...


def open_corpus(name: str | os.PathLike, *, strict: bool = False) -> Corpus:
    """The recordings that a name stands for. Faulty entries are left out, and a line on standard error counts them.

    Args:
        strict: faulty entries are refused.
    Raises:
        UserError: as `find_corpus`; no entry can be used; or `strict` and one cannot.
    """
    corpus = find_corpus(name)
    if corpus.num_faults:
        found = list(itertools.islice(corpus.faults(), _SHOWN))
        first = "; ".join(f"{where}: {message}" for where, message in found)
        more = f"; and {corpus.num_faults - len(found)} more, which doctor lists" if corpus.num_faults > len(found) else ""
        count = f"{corpus.num_faults} of {len(corpus) + corpus.num_faults} entries"
        if strict or not len(corpus):
            raise UserError(f"{corpus.name}: {count} cannot be used: {first}{more}")
        print(f"{corpus.name}: {count} left out: {first}{more}", file=sys.stderr, flush=True)
    return corpus


_SHOWN = 5  # faulty entries in a line


def find_corpus(name: str | os.PathLike) -> Corpus:
    """The recordings that a name stands for, and the entries that are none.

    Raises:
        UserError: as `open_list`; or a data set that is missing or of an unknown kind.
    """
    if str(name).startswith(TFDS):
        from voxcpm2_jax.corpus.datasets import Dataset  # takes seconds to import, and only such names need it

        return Dataset(str(name).removeprefix(TFDS))
    return open_list(name)


def open_corpora(names: str, *, strict: bool = False) -> list[Corpus]:
    """The corpora of several names separated by commas; raises as `open_corpus`."""
    return [open_corpus(name, strict=strict) for name in names.split(",") if name]


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
