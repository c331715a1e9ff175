"""TODO corpus.sources."""

import os
from collections.abc import Iterator
from typing import Protocol

from voxcpm2_jax.corpus.manifest import TFDS, Manifest, Recording


class Corpus(Protocol):
    """A sequence of recordings, read as they are asked for, with what it is called and a hash of what it is made of."""

    name: str
    sha256: str

    def __len__(self) -> int: ...

    def __getitem__(self, index): ...

    def __iter__(self) -> Iterator[Recording]: ...


def open_corpus(name: str | os.PathLike) -> Corpus:
    """The recordings that a name stands for (see the top of this file).

    Raises:
        UserError: as `Manifest`, or a data set that is not there or of an unknown kind.
    """
    if str(name).startswith(TFDS):
        from voxcpm2_jax.corpus import datasets  # stands below this file: only such names have need of it

        return datasets.Dataset(str(name).removeprefix(TFDS))
    return Manifest(name)


def open_corpora(names: str) -> list[Corpus]:
    """What several names with commas between stand for; raises as `open_corpus`."""
    return [open_corpus(name) for name in names.split(",") if name]
