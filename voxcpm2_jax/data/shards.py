"""Shards on disk: their format, and random access to their clips.

    SHARDS/header.json            provenance, statistics of the latents, totals
    SHARDS/lengths.npy            LENGTHS [clips] (clips.py); a plan needs nothing else
    SHARDS/identity.npy           IDENTITY [clips] (identity.py): which recording each clip was made from
    SHARDS/pairs.npy              int32 [clips, k], if prepare chose them: the clips that may be a clip's reference clip
    SHARDS/shard-00000-of-00002.array_record   ArrayRecord, one clip per record
    SHARDS/codec, tokenizer       copies of the codec and the tokenizer that were used, laid out as in a workdir

A record is one line of JSON (names, types and shapes of its arrays, then the other fields of the clip) and then the bytes
of the arrays. Latents are stored in the type that the header names and returned as float32.

Altered data is never trained on: ArrayRecord checks a hash of each record when it is read, the header holds checksums of
the .npy files, and the lengths of each clip are compared with lengths.npy, which finds mixed-up shards.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from voxcpm2_jax.config.model import ModelConfig
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.data.clips import Clip, Index, as_lengths
from voxcpm2_jax.data.records import Part, ReadError, Records, patiently
from voxcpm2_jax.files import replace_file

HEADER_FILE, LENGTHS_FILE, PAIRS_FILE, IDENTITY_FILE = "header.json", "lengths.npy", "pairs.npy", "identity.npy"

# Flow matching starts from noise of standard deviation 1; latents far from that scale are not learned.
STD_RANGE = (0.3, 3.0)  # over all channels
MAX_CHANNEL_STD = 5.0
DEAD_CHANNEL_STD = 0.2  # the codec does not use a channel below it, which does no harm

# ---- header ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What is in the shards and how it was made."""

    num_clips: int
    hours: float  # of the clips, without reference clips
    patch_size: int  # P, latent frames in a patch
    latent_dim: int  # C
    patch_sec: float
    encoder_hz: int  # rate of the codec's input
    decoder_hz: int  # rate of the codec's output
    codec_sha256: str  # of the codec's parameters and config
    tokenizer_sha256: str  # of tokenizer.json
    vocab_size: int
    groups: tuple[tuple[str, str], ...]  # dataset and language, by the number in lengths.npy
    latent_dtype: str
    latent_mean: tuple[float, ...]  # [C], over all frames of the clips
    latent_std: tuple[float, ...]
    latent_min: tuple[float, ...]
    latent_max: tuple[float, ...]
    shards: tuple[str, ...]  # file names, in the order of the clips
    trim_db: float  # silence lies this far below the loudest 10 ms
    trim_keep_ms: float
    sources: tuple[str, ...]  # manifests, "demo" or "debian"
    sources_sha256: str  # of the manifests' bytes
    skipped: dict = field(default_factory=dict)  # number of skipped recordings, by reason
    versions: dict = field(default_factory=dict)  # of the packages that made the shards
    trim: str | None = None  # what was cut at the ends: "none", "silence", "vad"; None: shards older than this field
    models: dict = field(default_factory=dict)  # "vad", "speaker": names and hashes of the models that were used
    pairs: dict = field(default_factory=dict)  # how reference clips were chosen, and for how many clips; empty: not at all
    crc32: dict = field(default_factory=dict)  # of the .npy files; empty: shards older than this field
    text: dict = field(default_factory=dict)  # the TextRule of the transcripts; empty: shards older than this field


def read_header(directory: str | os.PathLike) -> Header:
    """The header of a directory of shards.

    Raises:
        UserError: no such directory, or one that `prepare` did not finish.
    """
    path = pathlib.Path(directory) / HEADER_FILE
    try:
        content = json.loads(patiently(lambda: path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{directory}: no shards here (no {HEADER_FILE}); make some with voxcpm2-jax prepare") from None
    except NotADirectoryError:
        raise UserError(f"{directory}: a file; expected a directory of shards made by voxcpm2-jax prepare") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); prepare the shards again") from None
    return from_dict(Header, content, where=str(path))


def write_header(directory: str | os.PathLike, header: Header) -> None:
    text = json.dumps(dataclasses.asdict(header), ensure_ascii=False, indent=1) + "\n"
    replace_file(pathlib.Path(directory) / HEADER_FILE, text)


def crc32(path: pathlib.Path) -> int:
    """The checksum of a file that the header holds."""

    def read() -> int:
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        return crc

    return patiently(read)


_SAME = (
    "patch_size", "latent_dim", "patch_sec", "encoder_hz", "decoder_hz", "codec_sha256", "tokenizer_sha256", "vocab_size",
)  # fmt: skip


def check_alike(paths: list[pathlib.Path], headers: list[Header]) -> None:
    """Raises UserError if directories of shards differ in codec, tokenizer, text or patches: one run cannot use them."""
    for path, header in zip(paths[1:], headers[1:]):
        unlike = [
            f"{name} {getattr(headers[0], name)!r:.14} and {getattr(header, name)!r:.14}"  # the beginning of a hash
            for name in _SAME
            if getattr(headers[0], name) != getattr(header, name)
        ]
        if headers[0].text and header.text and headers[0].text != header.text:
            unlike.append(f"text {headers[0].text} and {header.text}")
        if unlike:
            raise UserError(f"{paths[0]} and {path} cannot be used together: {'; '.join(unlike)}")


def _joined(headers: list[Header], groups) -> Header:
    """One header for several directories; the statistics of the latents are those of the first."""
    if len(headers) == 1:
        return headers[0]
    return dataclasses.replace(
        headers[0],
        num_clips=sum(header.num_clips for header in headers),
        hours=sum(header.hours for header in headers),
        groups=groups,
        shards=tuple(name for header in headers for name in header.shards),
        sources=tuple(name for header in headers for name in header.sources),
        sources_sha256=" ".join(header.sources_sha256 for header in headers),
    )


# ---- records ---------------------------------------------------------------------------------------------------------

_ID_ARRAYS = ("text_ids", "described_ids")


def to_record(clip: Clip, latent_dtype: str) -> bytes:
    """A clip as one record."""
    content: dict[str, Any] = {"arrays": []}
    blobs = []
    for name, value in clip._asdict().items():
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value, dtype="int32" if name in _ID_ARRAYS else latent_dtype)
            content["arrays"].append([name, array.dtype.name, array.shape])
            blobs.append(array.tobytes())
        elif value is not None:
            content[name] = value
    return b"".join([json.dumps(content, ensure_ascii=False).encode(), b"\n", *blobs])


def from_record(record: bytes) -> Clip:
    """The clip of a record, its latents as float32."""
    start = record.index(b"\n") + 1
    content = json.loads(record[:start])
    for name, dtype, shape in content.pop("arrays"):
        array = np.frombuffer(record, np.dtype(dtype), count=math.prod(shape), offset=start).reshape(shape)
        content[name] = array if name in _ID_ARRAYS else array.astype(np.float32)
        start += array.nbytes
    return Clip(**content)


def write_shard(path: pathlib.Path, clips: Iterable[Clip], latent_dtype: str) -> int:
    """Writes clips into one ArrayRecord file -> their number. Without clips it writes no file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, count = None, 0
    for clip in clips:
        record = to_record(clip, latent_dtype)
        with _disk_errors(path):
            writer = writer or ArrayRecordWriter(str(path), "group_size:1")
            writer.write(record)
        count += 1
    if writer:
        with _disk_errors(path):
            writer.close()
    return count


@contextlib.contextmanager
def _disk_errors(path: pathlib.Path):
    """array_record reports a full disk as a RuntimeError; this makes it an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path}: {error}") from None


# ---- reading ---------------------------------------------------------------------------------------------------------


class Shards:
    """Random access to the clips of one or more directories of shards; a clips.Source.

    Args:
        directories: one, or several separated by commas; their clips follow one another.
    Attributes:
        header: of the directory, or the joined header of all.   paths: the directories.
        dead_channels: latent channels that hardly vary.
    Raises:
        UserError: not a directory of shards, missing files, latents on a scale that a model cannot learn, or directories
            made with different codecs, tokenizers, forms of text or patches.
    """

    def __init__(self, directories: str | os.PathLike):
        self.paths = paths = [pathlib.Path(name) for name in str(directories).split(",") if name]
        if len({path.resolve() for path in paths}) < max(len(paths), 1):
            raise UserError(f"shards {directories}: expected one or more directories, each once")
        headers = [read_header(path) for path in paths]
        check_alike(paths, headers)
        lengths, pairs, groups, num_clips = [], [], {}, 0
        for path, header in zip(paths, headers):
            own_lengths, own_pairs = _read_index(path, header)
            numbers = [groups.setdefault(tuple(group), len(groups)) for group in header.groups]
            own_lengths["group"] = np.array(numbers, np.int32)[own_lengths["group"]]
            lengths.append(own_lengths)
            pairs.append(np.where(own_pairs < 0, own_pairs, own_pairs + num_clips))
            num_clips += header.num_clips
        self.header = header = _joined(headers, tuple(groups))
        widest = max(table.shape[1] for table in pairs)
        pairs = [np.pad(table, ((0, 0), (0, widest - table.shape[1])), constant_values=-1) for table in pairs]
        self.index = Index(np.concatenate(lengths), header.groups, np.concatenate(pairs) if widest else None)
        self._records = grain_source(paths, headers)
        if len(self._records) != num_clips:
            raise UserError(
                f"{directories}: {num_clips} clips in {HEADER_FILE}, {len(self._records)} in the shards; "
                "prepare the shards again"
            )
        for path, header in zip(paths, headers):
            check_scale(np.array(header.latent_std), str(path))
        dead = [np.flatnonzero(np.array(header.latent_std) < DEAD_CHANNEL_STD) for header in headers]
        self.dead_channels = np.unique(np.concatenate(dead)).tolist()
        self.patch_shape = (header.patch_size, header.latent_dim)
        self.patch_sec = header.patch_sec
        self.vocab_size = header.vocab_size

    def __len__(self) -> int:
        return len(self.index.lengths)

    def __getitem__(self, index: int) -> Clip:
        index = int(index)
        clip, lengths = from_record(self._records[index]), self.index.lengths[index]
        if (len(clip.text_ids), len(clip.patches_MPC)) != (lengths["text"], lengths["patches"]):
            raise UserError(f"{self._records.place(index)} does not match {LENGTHS_FILE}; prepare the shards again")
        return clip


def check_fit(shards: Shards, model: ModelConfig, patch_sec: float | None = None, *, where: str) -> None:
    """Raises UserError with every difference if the model cannot be trained on the shards."""
    header = shards.header
    both = {
        "patch size (model.patch_size)": (header.patch_size, model.patch_size),
        "latent channels (model.feat_dim)": (header.latent_dim, model.feat_dim),
        "vocabulary (model.lm_config.vocab_size)": (header.vocab_size, model.lm_config.vocab_size),
        "seconds of a patch (patch_sec)": (header.patch_sec, header.patch_sec if patch_sec is None else patch_sec),
    }
    wrong = [f"{name}: shards {theirs}, config {ours}" for name, (theirs, ours) in both.items() if theirs != ours]
    if wrong:
        raise UserError(f"{where} does not fit this config: {'; '.join(wrong)}")


def grain_source(directories: Iterable[str | os.PathLike], headers: Iterable[Header]) -> Records:
    """Random access to the raw records of directories of shards."""
    files = [Part(str(pathlib.Path(path) / name)) for path, header in zip(directories, headers) for name in header.shards]
    return Records(files, "prepare the shards again")


def load_array(path: pathlib.Path):
    """np.load; a damaged file is a UserError, a machine that fails a ReadError."""
    try:
        return patiently(lambda: np.load(path))
    except ReadError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and prepare the shards again") from None


def _read_index(path: pathlib.Path, header: Header) -> tuple[np.ndarray, np.ndarray]:
    """Lengths, and pairs or a table without columns, of a directory in which no file is missing or altered."""
    files = (*header.shards, LENGTHS_FILE, *[PAIRS_FILE] * bool(header.pairs), *header.crc32)
    missing = sorted(set(files) - set(patiently(lambda: os.listdir(path))))
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; prepare the shards again")
    for name, crc in header.crc32.items():
        if crc32(path / name) != crc:
            raise UserError(f"{path / name}: altered since it was made (CRC-32); prepare the shards again")
    lengths = as_lengths(load_array(path / LENGTHS_FILE))
    if len(lengths) != header.num_clips:
        raise UserError(
            f"{path}: {header.num_clips} clips in {HEADER_FILE}, {len(lengths)} in {LENGTHS_FILE}; prepare the shards again"
        )
    pairs = load_array(path / PAIRS_FILE) if header.pairs else np.zeros((len(lengths), 0), np.int32)
    if pairs.ndim != 2 or len(pairs) != len(lengths) or pairs.max(initial=-1) >= len(lengths):
        raise UserError(f"{path}: {PAIRS_FILE} belongs to other clips; prepare the shards again")
    return lengths, pairs


def check_scale(std_C: np.ndarray, where: str) -> None:
    """Raises UserError if a model cannot learn latents with these standard deviations."""
    low, high = STD_RANGE
    overall = float(np.sqrt(np.mean(std_C**2)))
    if not low <= overall <= high or std_C.max() > MAX_CHANNEL_STD:
        raise UserError(
            f"{where}: the latents' standard deviation is {overall:.3g}, {std_C.max():.3g} in the widest channel; "
            f"expected {low} to {high} and at most {MAX_CHANNEL_STD}. Flow matching needs latents of about unit scale: "
            "train the codec further, or rescale its latents"
        )
