"""One shard: its clips in an ArrayRecord file, and beside it a part file (.npz) with what the header and index record.

    OUTPUT/shard-00003-of-00040.array_record   the usable ones of recordings 3 S .. 4 S - 1, S = shard_clips
    OUTPUT/shard-00003-of-00040.npz            written last: the shard is complete when this file exists

A shard depends on its recordings alone, so it makes no difference which host makes it, and when.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import speaker
from voxcpm2_jax.corpus.encode import ClipEncoder, Skipped
from voxcpm2_jax.corpus.manifest import Recording
from voxcpm2_jax.corpus.moments import MOMENTS, Moments
from voxcpm2_jax.corpus.sources import Corpus, Joined
from voxcpm2_jax.data.clips import LENGTHS, as_lengths
from voxcpm2_jax.data.identity import IDENTITY
from voxcpm2_jax.data.records import ReadError
from voxcpm2_jax.data.shards import load_array, write_shard

# ---- part files ------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What header and index need of one shard: all arrays of its part file but the embeddings."""

    lengths: np.ndarray  # LENGTHS [clips], groups numbered as below
    groups: np.ndarray  # [groups, 2] text: dataset, language
    moments: np.ndarray  # MOMENTS [C]
    num_frames: np.ndarray
    skipped: np.ndarray  # [skipped, 4] text: the fields of encode.Skipped
    origins: np.ndarray  # speaker.ORIGIN [clips]; empty if no pairs are wanted
    num_embeddings: np.ndarray
    identities: np.ndarray | None  # IDENTITY [clips]; None: the shard was made before this field


_EMBEDDINGS = "embeddings"  # float16 [embeddings, width], of the clips that take part in pairs, in order
# Part files of earlier versions have these names, and plain matrices in place of the two structured arrays.
_EARLIER = {
    "lengths": "lengths_N6", "moments": "moments_4C", "origins": "origins_N", _EMBEDDINGS: "embeddings_ED", "identities": None,
}  # fmt: skip


def part_file(directory: pathlib.Path, name: str) -> pathlib.Path:
    return directory / f"{name}.npz"


def read_part(directory: pathlib.Path, name: str) -> Part:
    with load_array(part_file(directory, name)) as file:
        part = Part(**{field: _array(file, field) for field in Part._fields})
    moments = part.moments if part.moments.dtype == MOMENTS else np.ascontiguousarray(part.moments.T).view(MOMENTS)[:, 0]
    return part._replace(lengths=as_lengths(part.lengths), moments=moments, origins=speaker.as_origins(part.origins))


def read_embeddings(directory: pathlib.Path, name: str) -> np.ndarray:
    with load_array(part_file(directory, name)) as file:
        return _array(file, _EMBEDDINGS)


def _array(file, name: str) -> np.ndarray | None:
    name = name if name in file else _EARLIER[name]
    return None if name is None else file[name]


# ---- making shards ---------------------------------------------------------------------------------------------------


def shard_names(corpora: list[Corpus], shard_clips: int) -> list[str]:
    """The names of all shards of some corpora, without suffix."""
    num_shards = math.ceil(sum(map(len, corpora)) / shard_clips)
    return [f"shard-{i:05d}-of-{num_shards:05d}" for i in range(num_shards)]


def make_missing(
    directory: pathlib.Path, corpora: list[Corpus], encoder: ClipEncoder, config: DataConfig, check: Callable[[], None]
) -> None:  # fmt: skip
    """Makes those of this host's shards of a directory that are not complete; `check` raises if the host lost its claim."""
    directory.mkdir(exist_ok=True)
    names, size = shard_names(corpora, config.shard_clips), config.shard_clips
    recordings = Joined(corpora)
    mine = range(config.host, len(names), config.num_hosts)
    todo = [i for i in mine if not part_file(directory, names[i]).exists()]
    bar = _bar("encoding", len(mine) * size)
    with bar, ThreadPoolExecutor() as pool:
        bar.advance(0, (len(mine) - len(todo)) * size)
        for i in todo:
            make_shard(directory, names[i], recordings.part(i * size, (i + 1) * size), encoder, config, check, pool, bar)


def make_shard(
    directory: pathlib.Path, name: str, recordings: Iterable[Recording], encoder: ClipEncoder, config: DataConfig,
    check: Callable[[], None], pool: ThreadPoolExecutor, bar,
) -> None:  # fmt: skip
    """Writes one shard, then its part file."""
    lengths: list[tuple[int, ...]] = []
    groups: dict[tuple[str, str], int] = {}
    moments = Moments(encoder.latent_dim)
    skipped: list[Skipped] = []
    origins: list[tuple] = []
    identities: list[tuple] = []
    embeddings: list[np.ndarray] = []

    def clips():
        for recording, clip, embedding in encoder.clips(recordings, skipped, pool, bar):
            if config.pairs.encoder:
                voice = None if embedding is None else (clip.dataset, clip.speaker, clip.session)
                part = (recording.start_sec, recording.end_sec)
                origins.append(speaker.origin(str(recording.audio), *part, voice, recording.order))
                embeddings.extend([] if embedding is None else [embedding.astype(np.float16)])
            reference, described = (0 if x is None else len(x) for x in (clip.reference_MPC, clip.described_ids))
            group = groups.setdefault((clip.dataset, clip.language or "unknown"), len(groups))
            lengths.append((len(clip.text_ids), len(clip.patches_MPC), reference, clip.is_prompt, described, group))
            identities.append(recording.identity)
            moments.add(clip.patches_MPC)
            yield clip

    check()
    for leftover in directory.glob(f".{name}.*"):  # of this host, which was killed while it made this shard
        leftover.unlink(missing_ok=True)
    try:
        with files.aside(directory / f"{name}.array_record") as temporary:
            write_shard(temporary, clips(), config.latent_dtype)
            check()
        part = Part(
            np.array(lengths, LENGTHS), np.array(list(groups), str).reshape(-1, 2), moments.table,
            np.array(moments.num_frames), np.array(skipped, str).reshape(-1, 4),
            np.array(origins, speaker.ORIGIN), np.array(len(embeddings)), np.array(identities, IDENTITY),
        )  # fmt: skip
        with files.aside(part_file(directory, name)) as temporary:
            np.savez(temporary, **part._asdict(), **{_EMBEDDINGS: np.array(embeddings, np.float16)})
            check()
    except ReadError:  # of a recording
        raise
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None


def _bar(what: str, total: int):
    """A progress bar with the hours done, the speed relative to real time, and the time that remains."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Hours(ProgressColumn):
        def render(self, task):
            hours = task.fields["hours"]
            return Text(f"{hours:.2f} h, {hours * 3600 / (task.elapsed or math.inf):.0f} x real time")

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), Hours(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    bar.add_task("", total=total, hours=0.0)
    return bar
