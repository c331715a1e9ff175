"""From shards on disk to batches: random access to clips, and the batch of any step.

    SHARDS/header.json            provenance, statistics of the latents, totals
    SHARDS/lengths.npy            int32 [clips, 4]: a pack plan needs nothing else (packing.py names the columns)
    SHARDS/shard-00000-of-00002.array_record   ArrayRecord, one clip per record
    SHARDS/codec, tokenizer       what made latents and ids, as a training workdir keeps them

A record is one line of JSON (names, types and shapes of its arrays, then everything else about the clip) and the bytes of
the arrays after it. Latents are stored in the type the header names and given back as float32.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  # numpy then knows "bfloat16" by name
import numpy as np

from voxcpm2_jax.config import UserError, from_dict
from voxcpm2_jax.data.packing import Clip, PackPlan, Source, assemble
from voxcpm2_jax.sequence import Batch

STD_RANGE = (0.2, 5.0)  # of every latent channel: flow matching starts from noise of standard deviation 1


@dataclass(frozen=True)
class Header:
    """What is in the shards and how it was made."""

    num_clips: int
    hours: float  # of the clips, without references
    patch_size: int  # P, latent frames in a patch
    latent_dim: int  # C
    patch_sec: float
    encoder_hz: int  # rate the codec heard the recordings at
    decoder_hz: int  # rate it speaks at
    codec_sha256: str  # of the codec's parameters and config
    tokenizer_sha256: str  # of tokenizer.json
    vocab_size: int
    latent_dtype: str
    latent_mean: tuple[float, ...]  # [C], over all frames of the clips
    latent_std: tuple[float, ...]
    latent_min: tuple[float, ...]
    latent_max: tuple[float, ...]
    shards: tuple[str, ...]  # file names, in the order of the clips
    trim_db: float  # silence cut this far below the loudest 10 ms; 0: left
    trim_keep_ms: float
    sources: tuple[str, ...]  # manifests, or "demo"
    sources_sha256: str  # of the manifests' bytes
    skipped: dict = field(default_factory=dict)  # number of recordings left out, by reason
    versions: dict = field(default_factory=dict)  # of the packages that made the shards


HEADER_FILE, LENGTHS_FILE = "header.json", "lengths.npy"


def read_header(directory: str | os.PathLike) -> Header:
    """The header of a directory of shards.

    Raises:
        UserError: no such directory, or not one that `prepare` finished.
    """
    path = pathlib.Path(directory) / HEADER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory}: no shards here (no {HEADER_FILE}); make some with voxcpm2-jax prepare") from None
    except NotADirectoryError:
        raise UserError(f"{directory}: a file; expected a directory of shards made by voxcpm2-jax prepare") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); prepare the shards again") from None
    return from_dict(Header, content, where=str(path))


def write_header(directory: str | os.PathLike, header: Header) -> None:
    path = pathlib.Path(directory) / HEADER_FILE
    path.write_text(json.dumps(dataclasses.asdict(header), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---- records ---------------------------------------------------------------------------------------------------------


def to_record(clip: Clip, latent_dtype: str) -> bytes:
    """A clip as one record."""
    content: dict[str, Any] = {"arrays": []}
    blobs = []
    for name, value in clip._asdict().items():
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value, dtype="int32" if name == "text_ids" else latent_dtype)
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
        array = np.frombuffer(record, np.dtype(dtype), count=int(np.prod(shape)), offset=start).reshape(shape)
        content[name] = array if name == "text_ids" else array.astype(np.float32)
        start += array.nbytes
    return Clip(**content)


# ---- shards ----------------------------------------------------------------------------------------------------------


def grain_source(directory: str | os.PathLike, header: Header):
    """Random access to the raw records of a directory of shards."""
    import grain

    return grain.sources.ArrayRecordDataSource([str(pathlib.Path(directory) / name) for name in header.shards])


class Shards:
    """Random access to the clips of a directory of shards; a packing.Source.

    Raises:
        UserError: not a directory of shards, files of it missing, or latents on a scale that no model can learn from.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = pathlib.Path(directory)
        self.header = header = read_header(directory)
        missing = [name for name in (*header.shards, LENGTHS_FILE) if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{directory}: {', '.join(missing)} missing; prepare the shards again")
        self.lengths = np.load(directory / LENGTHS_FILE)
        self._records = grain_source(directory, header)
        if not header.num_clips == len(self.lengths) == len(self._records):
            raise UserError(
                f"{directory}: header, {LENGTHS_FILE} and shards disagree ({header.num_clips}, {len(self.lengths)} and "
                f"{len(self._records)} clips); prepare the shards again"
            )
        low, high = STD_RANGE
        outside = [f"{c} ({std:.3g})" for c, std in enumerate(header.latent_std) if not low <= std <= high]
        if outside:
            raise UserError(
                f"{directory}: the standard deviation of latent channel {', '.join(outside)} is outside {low}..{high}; flow "
                "matching needs latents of about unit scale: train the codec further, or rescale its latents"
            )
        self.patch_shape = (header.patch_size, header.latent_dim)
        self.patch_sec = header.patch_sec
        self.vocab_size = header.vocab_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Clip:
        return from_record(self._records[int(index)])


def write_shards(directory: pathlib.Path, clips: Iterable[Clip], latent_dtype: str, shard_clips: int) -> tuple[str, ...]:
    """Writes clips into ArrayRecord shards of `shard_clips` each; the result is their names, in order."""
    from array_record.python.array_record_module import ArrayRecordWriter

    names: list[str] = []
    writer = None
    for i, clip in enumerate(clips):
        if i % shard_clips == 0:
            if writer:
                writer.close()
            names.append(f"part-{len(names):05d}")
            writer = ArrayRecordWriter(str(directory / names[-1]), "group_size:1")
        writer.write(to_record(clip, latent_dtype))
    if writer:
        writer.close()
    final = tuple(f"shard-{i:05d}-of-{len(names):05d}.array_record" for i in range(len(names)))
    for old, new in zip(names, final):
        (directory / old).rename(directory / new)
    return final


# ---- batches ---------------------------------------------------------------------------------------------------------


def batches(
    source: Source, plan: PackPlan, start_step: int = 0, *, prefetch: int = 2, part: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The batches of steps start_step, start_step + 1, .. without end, assembled ahead of time by threads.

    Args:
        prefetch: batches that are made ahead.
        part: (i, n): this host's share, the i-th of n equal runs of rows; all hosts together have the global batch.
    """
    import grain

    host, num_hosts = part
    assert plan.num_rows % num_hosts == 0, (plan.num_rows, num_hosts)
    share = plan.num_rows // num_hosts

    def batch_of(step: int) -> Batch:
        return host_rows(source, plan, step, slice(host * share, (host + 1) * share))

    steps = grain.MapDataset.range(start_step, 2**31)
    options = grain.ReadOptions(num_threads=max(1, prefetch), prefetch_buffer_size=max(1, prefetch))
    return iter(steps.map(batch_of).to_iter_dataset(options))


def host_rows(source: Source, plan: PackPlan, step: int, rows: slice = slice(None)) -> Batch:
    """The batch of one step, or some rows of it."""
    return assemble(source, plan.rows(step)[rows], num_slots=plan.num_slots, num_patches=plan.num_patches)
