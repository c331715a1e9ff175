"""Which recording each clip was made from, so that no held-out clip is trained on.

    SHARDS/identity.npy    IDENTITY [clips], 24 bytes a clip; shards older than this file have none

Names are kept as 64-bit hashes. Two clips share audio if their parts of one file overlap. The comparison sorts the held-out
clips and reads the training clips in blocks, so its memory does not grow with the corpus.
"""

import hashlib
import math
import pathlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data.records import patiently
from voxcpm2_jax.data.shards import IDENTITY_FILE, load_array, read_header

IDENTITY = np.dtype(
    [
        ("file", "u8"),  # the audio file
        ("start_sec", "f4"),  # the part of the file
        ("end_sec", "f4"),
        ("speaker", "u8"),  # dataset and speaker; 0: the corpus does not name one
    ]
)
_BLOCK = 1 << 20  # clips


def hash_name(*names: str | None) -> int:
    """A 64-bit hash of a name of one or more parts. Among 10^7 names, the chance that two have the same is 3 in a million."""
    content = "\0".join(name or "" for name in names).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def identity(file: str, start_sec: float | None, end_sec: float | None, dataset: str, speaker: str | None) -> tuple:
    """The IDENTITY of one clip; without a part, the clip is the whole file."""
    end_sec = math.inf if end_sec is None else end_sec
    return hash_name(file), start_sec or 0.0, end_sec, hash_name(dataset, speaker) if speaker else 0


class Known:
    """A set of clips, usually the held-out ones, to compare others with."""

    def __init__(self, table: np.ndarray):
        self._order = np.argsort(table["file"], kind="stable")
        self._table = table[self._order]
        self._speakers = np.unique(np.append(table["speaker"], np.uint64(0)))

    def overlaps(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of clips that share audio: numbers in an IDENTITY table, and in this set."""
        files = np.ascontiguousarray(self._table["file"])
        at = np.searchsorted(files, table["file"])
        left = np.arange(len(table))
        pairs = [(left[:0], left[:0])]
        while len(left := left[at[left] < len(files)]):  # the k-th part of the same file in the k-th turn
            left = left[table["file"][left] == files[at[left]]]
            own, other = table[left], self._table[at[left]]
            hits = left[(own["start_sec"] < other["end_sec"]) & (other["start_sec"] < own["end_sec"])]
            pairs.append((hits, self._order[at[hits]]))
            at[left] += 1
        theirs, ours = zip(*pairs)
        return np.concatenate(theirs), np.concatenate(ours)

    def speakers_in(self, table: np.ndarray) -> np.ndarray:
        """The numbers of this set's speakers, 0 for the unnamed ones, who also speak in an IDENTITY table."""
        at = np.searchsorted(self._speakers, table["speaker"])
        at[at == len(self._speakers)] = 0
        found = np.zeros(len(self._speakers), bool)
        found[at[self._speakers[at] == table["speaker"]]] = True
        return self._speakers[found]


def check_heldout(training: Sequence[pathlib.Path], heldout: Sequence[pathlib.Path]) -> list[str]:
    """Compares directories of shards -> what there is to tell about them, one line each.

    Raises:
        UserError: a held-out clip is also trained on.
    """
    advice = "expected clips that are not trained on; prepare other ones and give their shards with --heldout"
    headers = {path: read_header(path) for path in (*training, *heldout)}
    sources = {headers[path].sources_sha256: path for path in training}
    for path in heldout:
        if same := sources.get(headers[path].sources_sha256):
            raise UserError(f"{path}: held-out clips made from the same recordings as the training clips of {same}; {advice}")
    old = [path for path, header in headers.items() if IDENTITY_FILE not in header.crc32]
    lines = [
        f"{path}: shards older than {IDENTITY_FILE}; not checked whether held-out clips or speakers are also trained on"
        for path in old
    ]
    for path in (path for path in heldout if path not in old):
        table = load_array(path / IDENTITY_FILE)
        known, shared, speakers = Known(table), np.zeros(len(table), bool), set()
        for block in (block for other in training if other not in old for block in _blocks(other / IDENTITY_FILE)):
            shared[known.overlaps(block)[1]] = True
            speakers.update(known.speakers_in(block).tolist())
        speakers.discard(0)
        if shared.any():
            first = int(np.flatnonzero(shared)[0])
            raise UserError(f"{path}: {shared.sum()} of {len(table)} clips are also trained on, first clip {first}; {advice}")
        if speakers:
            count = int(np.isin(table["speaker"], np.array(sorted(speakers), np.uint64)).sum())
            lines.append(
                f"{path}: {count} of {len(table)} held-out clips are of speakers who are also trained on; "
                "the held-out loss tells little about new voices"
            )
    return lines


def _blocks(path: pathlib.Path) -> Iterator[np.ndarray]:
    """The rows of an .npy file, some at a time. Not mapped: a failing disk would then end the process with SIGBUS."""
    start = patiently(lambda: np.load(path, mmap_mode="r").offset)
    while len(block := patiently(partial(np.fromfile, path, IDENTITY, _BLOCK, offset=start))):
        yield block
        start += block.nbytes
