"""What a run reports: figures of a step, their means between two logged steps, and where they are written.

    WORKDIR/metrics.jsonl      one JSON object per logged step; a resumed run repairs and continues this file
    WORKDIR/tensorboard/       the same scalars, and evaluators' images and audio, if tensorboardX is installed
    services                   the same, where `log.trackers` names some (trackers.py)
    standard error             a live line on a terminal, else one line per logged step

What a train step returns by name, and what is logged of it for all steps since the last row:

    scalar             the mean over the steps
    pair (sum, count)  sum of the sums / sum of the counts
    Table              the same for many named pairs at once (class `Table`)

Two kinds of names are special. If the part before the first "/" ends in `_max` ("activation_max/tslm"), the maximum over the
steps is logged instead. A scalar that ends in `_sec` is seconds of audio, and is also logged per second of wall time.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from voxcpm2_jax.files import heal
from voxcpm2_jax.trackers import Tracker

# ---- accumulation ----------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Several named pairs (sum, count) in two arrays [X], so that one transfer brings many figures to the host.

    Its key in the metrics is the common prefix of the names: "loss_diff/time/" gives "loss_diff/time/0.0-0.1" and so on.
    """

    sum_X: Any
    count_X: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def is_max(name: str) -> bool:
    """Whether the figure of that name is a maximum: "activation_max/tslm"."""
    return name.split("/")[0].endswith("_max")


def fetch(metrics: dict) -> dict[str, tuple[float, float]]:
    """Waits for a step and brings its metrics to the host, as (sum, count) by name."""
    pairs = {}
    for name, value in jax.device_get(metrics).items():
        if isinstance(value, Table):
            columns = (value.names, value.sum_X, value.count_X)
            pairs |= {name + last: (float(total), float(count)) for last, total, count in zip(*columns, strict=True)}
        else:
            pairs[name] = (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value), 1.0)
    return pairs


def combine(parts: dict) -> dict:
    """Metrics of a batch from those of its micro-batches, which are stacked on the first axis."""
    return {
        name: jax.tree.map(lambda x, name=name: (jnp.max if is_max(name) else jnp.sum)(x, axis=0), value)
        for name, value in parts.items()
    }


class Meter:
    """Sums of (sum, count) pairs in float64, and maxima; `state` is plain data from which they continue exactly."""

    def __init__(self, state: dict[str, list[float]] | None = None):
        self.state = {} if state is None else state

    def add(self, values: dict[str, tuple[float, float]]) -> None:
        for name, (total, count) in values.items():
            old = self.state.get(name, [0.0, 0.0])
            if not is_max(name):
                self.state[name] = [old[0] + total, old[1] + count]
            elif old[1] and count:
                self.state[name] = [max(old[0], total), count]
            else:  # a skipped update has no value
                self.state[name] = [total, count] if count else old

    def means(self) -> dict[str, float | None]:
        """Means and maxima by name; None if nothing was counted."""
        return {name: total / count if count else None for name, (total, count) in self.state.items()}


# ---- figures of a batch ----------------------------------------------------------------------------------------------

TIME_BINS = tuple(f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10))  # of flow time, 0 (clean) .. 1 (noise)
MOST_NAMES = 32  # of datasets, and of languages, that are logged by name: those with most audio; the rest is "other"


class Labels(NamedTuple):
    """The groups that losses are reported for: names such as "language/en", and the three groups of each label."""

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]  # by label: dataset, language, mode


def name_labels(labels: Sequence[tuple[str, str, str]], weights: Sequence[float]) -> Labels:
    """The groups of labels.

    Args:
        labels: (dataset, language, mode) of every label.
        weights: amount of audio that bears loss, by label; decides which names are kept. Labels without any get -1.
    """
    names: dict[str, int] = {}
    columns = []
    for kind, column in zip(("dataset", "language", "mode"), zip(*labels)):
        audio: dict[str, float] = dict.fromkeys(column, 0.0)
        for name, weight in zip(column, weights, strict=True):
            audio[name] += weight
        kept = sorted(audio, key=lambda name: -audio[name])[:MOST_NAMES]
        shown = [f"{kind}/{name if name in kept else 'other'}".replace(" ", "-") for name in column]
        columns.append([names.setdefault(name, len(names)) if audio[own] else -1 for own, name in zip(column, shown)])
    return Labels(tuple(names), tuple(zip(*columns)))


def by_time(pair_BM: tuple[jax.Array, jax.Array], time_BM: jax.Array) -> Table:
    """Sums and counts of patches by flow time."""
    bin_BM = jnp.clip((time_BM * len(TIME_BINS)).astype(jnp.int32), 0, len(TIME_BINS) - 1)
    return _split(pair_BM, bin_BM[..., None] == jnp.arange(len(TIME_BINS))[None, None], TIME_BINS)


def by_label(pair_BM: tuple[jax.Array, jax.Array], label_BM: jax.Array, labels: Labels) -> Table:
    """Sums and counts of patches by dataset, language and mode."""
    member_BM3 = jnp.asarray(labels.members)[jnp.maximum(label_BM, 0)]
    is_member_BMX = jnp.any(member_BM3[..., None] == jnp.arange(len(labels.names))[None, None, None], axis=2)
    return _split(pair_BM, is_member_BMX, labels.names)


def _split(pair_BM, is_member_BMX, names) -> Table:
    sums = (jnp.sum(jnp.where(is_member_BMX, x_BM[..., None], 0.0), axis=(0, 1)) for x_BM in pair_BM)
    return Table(*sums, names)


def count_levels(level_BTQ: jax.Array, is_audio_BT: jax.Array, scale: int) -> jax.Array:
    """[Q, 2 scale + 1]: how often each level, -scale .. scale, occurs in the audio slots of a batch."""
    is_level_BTQX = level_BTQ[..., None] == jnp.arange(-scale, scale + 1)[None, None, None]
    return jnp.sum(is_level_BTQX & is_audio_BT[:, :, None, None], axis=(0, 1), dtype=jnp.float32)


def fsq_figures(count_QX: jax.Array) -> dict[str, jax.Array]:
    """How evenly the quantiser uses its levels, from their counts.

    Returns:
        fsq_usage: share of the levels of a dim that occur, mean of the dims.   fsq_entropy: in bits, mean of the dims; at
        most log2 of their number, where all come equally often.
    """
    share_QX = count_QX / jnp.maximum(jnp.sum(count_QX, axis=1, keepdims=True), 1.0)
    bits_Q = -jnp.sum(jax.scipy.special.xlogy(share_QX, share_QX), axis=1) / math.log(2.0)
    return {"fsq_usage": jnp.mean((count_QX > 0).astype(jnp.float32)), "fsq_entropy": jnp.mean(bits_Q)}


def of_parts(values: dict[str, jax.Array]) -> Table:
    """One number per part of the model."""
    value_X = jnp.stack(list(values.values()))
    return Table(value_X, jnp.ones_like(value_X), tuple(values))


def norms(tree: dict) -> dict[str, jax.Array]:
    """The norm of each top-level branch of a tree laid out like the parameters, float32."""
    return {
        name: jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(branch)))
        for name, branch in tree.items()
    }


# ---- writing ---------------------------------------------------------------------------------------------------------


class Audio(NamedTuple):
    """Audio to log."""

    samples_A: Any  # float32, -1 .. 1
    rate_hz: int


class Image(NamedTuple):
    """A picture to log."""

    pixels_HWC: Any  # uint8, or float32 0 .. 1


class Writer:
    """Writes rows of figures, on process 0 only; a context manager.

    Args:
        start_step: updates finished before; later rows in the file are removed.   num_steps: length of the run.
        services, project: names of trackers.SERVICES that get the rows too, and their name for what the run belongs to.
        record: the run's config, for the services.
    Attributes:
        last_row: the newest row in metrics.jsonl, None before the first.
    """

    def __init__(
        self, workdir, *, start_step: int, num_steps: int, services: Sequence[str] = (), project: str = "", record: Mapping = {}
    ):
        workdir = pathlib.Path(workdir)
        self.last_row: dict | None = None
        self._num_steps = num_steps
        self._path = self._board = self._progress = None
        self._trackers: list[Tracker] = []
        if jax.process_index() != 0:
            return
        self.last_row = heal(workdir / "metrics.jsonl", start_step)
        self._path = workdir / "metrics.jsonl"
        if importlib.util.find_spec("tensorboardX"):
            self._board = _summary_writer()(str(workdir / "tensorboard"), purge_step=start_step + 1)
        if sys.stderr.isatty():
            self._progress = _live_line()
            self._task = self._progress.add_task("train", total=num_steps, completed=start_step, figures="")
            self._progress.start()
        for name in services:
            try:
                self._trackers.append(Tracker(name, workdir, project, record, start_step))
            except OSError as error:
                print(f"{name} gets no rows: {error}", file=sys.stderr)

    def write(self, step: int, figures: dict) -> None:
        """Writes one row: numbers (or None) everywhere, text to the file, Audio and Image to TensorBoard and the services."""
        media = {k: v for k, v in figures.items() if isinstance(v, Audio | Image)}
        row = {"step": step} | {k: v if isinstance(v, str) else number(v) for k, v in figures.items() if k not in media}
        self.last_row = row
        if self._path is None:
            return
        # Closed after every row: a bucket that is mounted through a cache gets a file when it is closed.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._board:
            self._write_board(step, row, media)
        for tracker in self._trackers:
            tracker.send(row, {k: v if isinstance(v, Audio) else (v.pixels_HWC, None) for k, v in media.items()})
        if self._progress:
            self._progress.update(self._task, figures=_in_words(row))
        else:
            print(f"step {step}/{self._num_steps}  {_in_words(row)}", file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Advances the live line; called after every step."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def _write_board(self, step, row, media):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
        for name, value in media.items():
            if isinstance(value, Audio):
                self._board.add_audio(name, value.samples_A, step, sample_rate=value.rate_hz)
            else:
                self._board.add_image(name, value.pixels_HWC, step, dataformats="HWC")
        self._board.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for tracker in self._trackers:
            tracker.close()
        if self._board:
            self._board.close()
        if self._progress:
            self._progress.stop()


def number(value) -> float | int | None:
    """A number for JSON, which has no NaN and no infinity: they become None, like figures that were not measured."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


def _summary_writer():
    """tensorboardX's writer. It imports PyTorch where that is installed, which would take 3 s and 0.2 GB for nothing."""
    is_absent = "torch" not in sys.modules
    if is_absent:
        sys.modules["torch"] = None  # an import of it is an ImportError, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if is_absent:
            del sys.modules["torch"]
    return SummaryWriter


def _in_words(row: dict) -> str:
    shown = ("loss", "loss_diff", "loss_stop", "val_loss_diff", "step_sec", "audio_sec_per_sec", "mfu", "goodput")
    return "  ".join(f"{name} {row[name]:.4g}" for name in shown if row.get(name) is not None)


def _live_line():
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    )
