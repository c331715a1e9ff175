"""What a run reports: means over the steps between two logs, useful FLOPs and MFU, and the places they are written to.

    WORKDIR/metrics.jsonl      one JSON object per logged step; the record: a resumed run heals and continues it
    WORKDIR/tensorboard/       the same scalars, and evaluators' images and audio, if tensorboardX is installed
    standard error             one live line on a terminal, else one plain line per logged step

    WORKDIR/profile/           what `--profile-steps` traced, for XProf

A train step's metrics are scalars (their mean over the steps is reported), pairs (sum, count) (divided once) or Tables
of such pairs. Names that begin with a word ending in `_max` are maxima: the largest of the steps is reported. A scalar
whose name ends in `_sec` counts seconds of data and is also reported per second of wall time.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from voxcpm2_jax import chips
from voxcpm2_jax.config import ModelConfig, TransformerConfig, UserError

# ---- accumulation ----------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Pairs (sum, count) under names of their own, X of them in two arrays: one transfer for many figures.

    Stands in a step's metrics under the beginning of its names: "loss_diff/time/" has "loss_diff/time/0.0-0.1" and so on.
    """

    sum_X: Any
    count_X: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def is_max(name: str) -> bool:
    """Whether the figure of that name is a maximum: "activation_max/tslm"."""
    return name.split("/")[0].endswith("_max")


def fetch(metrics: dict) -> dict[str, tuple[float, float]]:
    """Metrics of one step on the host as (sum, count); waits for the step."""
    pairs = {}
    for name, value in jax.device_get(metrics).items():
        if isinstance(value, Table):
            columns = (value.names, value.sum_X, value.count_X)
            pairs |= {name + last: (float(total), float(count)) for last, total, count in zip(*columns, strict=True)}
        else:
            pairs[name] = (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value), 1.0)
    return pairs


def combine(parts: dict) -> dict:
    """Sums, pairs and Tables of the parts of a batch, one behind the other on the first axis, as those of the whole."""
    return {
        name: jax.tree.map(lambda x, name=name: (jnp.max if is_max(name) else jnp.sum)(x, axis=0), value)
        for name, value in parts.items()
    }


class Meter:
    """Sums of (sum, count) pairs, in float64, and maxima; `state` is plain data that continues them exactly."""

    def __init__(self, state: dict[str, list[float]] | None = None):
        self.state = {} if state is None else state

    def add(self, values: dict[str, tuple[float, float]]) -> None:
        for name, (total, count) in values.items():
            old = self.state.get(name, [0.0, 0.0])
            if not is_max(name):
                self.state[name] = [old[0] + total, old[1] + count]
            elif old[1] and count:
                self.state[name] = [max(old[0], total), count]
            else:  # of an update that was skipped there is none
                self.state[name] = [total, count] if count else old

    def means(self) -> dict[str, float | None]:
        """None where nothing was counted."""
        return {name: total / count if count else None for name, (total, count) in self.state.items()}


# ---- figures of a batch ----------------------------------------------------------------------------------------------

TIME_BINS = tuple(f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10))  # of flow time, 0 (clean) .. 1 (noise)
MOST_NAMES = 32  # of data sets, and of languages; those with less audio than the largest are "other"


class Labels(NamedTuple):
    """The groups that clips are told by: X names such as "language/en", and the three that each label is a member of."""

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]  # by label


def name_labels(labels: Sequence[tuple[str, str, str]], weights: Sequence[float]) -> Labels:
    """The groups of labels.

    Args:
        labels: (dataset, language, mode) of every label.
        weights: audio of every label that bears loss, to keep the largest by; what has none gets no name (-1).
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
    """Sums and counts of patches by data set, language and mode."""
    member_BM3 = jnp.asarray(labels.members)[jnp.maximum(label_BM, 0)]
    is_member_BMX = jnp.any(member_BM3[..., None] == jnp.arange(len(labels.names))[None, None, None], axis=2)
    return _split(pair_BM, is_member_BMX, labels.names)


def _split(pair_BM, is_member_BMX, names) -> Table:
    sums = (jnp.sum(jnp.where(is_member_BMX, x_BM[..., None], 0.0), axis=(0, 1)) for x_BM in pair_BM)
    return Table(*sums, names)


def count_levels(level_BTQ: jax.Array, is_audio_BT: jax.Array, scale: int) -> jax.Array:
    """[Q, 2 scale + 1]: how often each level, -scale .. scale, stands in the audio slots of a batch."""
    is_level_BTQX = level_BTQ[..., None] == jnp.arange(-scale, scale + 1)[None, None, None]
    return jnp.sum(is_level_BTQX & is_audio_BT[:, :, None, None], axis=(0, 1), dtype=jnp.float32)


def fsq_figures(count_QX: jax.Array) -> dict[str, jax.Array]:
    """How the quantiser uses its levels, by their counts.

    Returns:
        fsq_usage: share of the levels of a dim that occur, mean of the dims.   fsq_entropy: in bits, mean of the dims; at
        most log2 of their number, where all come equally often.
    """
    share_QX = count_QX / jnp.maximum(jnp.sum(count_QX, axis=1, keepdims=True), 1.0)
    bits_Q = -jnp.sum(jax.scipy.special.xlogy(share_QX, share_QX), axis=1) / math.log(2.0)
    return {"fsq_usage": jnp.mean((count_QX > 0).astype(jnp.float32)), "fsq_entropy": jnp.mean(bits_Q)}


def of_parts(values: dict[str, jax.Array]) -> Table:
    """A number of each part of the model."""
    value_X = jnp.stack(list(values.values()))
    return Table(value_X, jnp.ones_like(value_X), tuple(values))


def norms(tree: dict) -> dict[str, jax.Array]:
    """The norm of each top-level branch of a tree laid out like the parameters, float32."""
    return {
        name: jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(branch)))
        for name, branch in tree.items()
    }


# ---- useful work -----------------------------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, *, slots, patches, targets, squares) -> dict[str, float]:
    """FLOPs of the matrix products of one forward pass, by part; work spent on padding and recomputation is not useful.

    Args:
        slots: slots in use (text and audio).   patches: audio patches in use.   targets: those that bear loss.
        squares: sum over segments of their length squared; slots * mean length is a fair estimate.
    """
    c = config
    width, local, P, C, Q = c.tslm.width, c.locdit.width, c.patch_size, c.feat_dim, c.scalar_quantization_latent_dim
    causal_pairs = (squares + slots) / 2
    enc_rows, dit_rows = 1 + P, 3 + 2 * P  # special token + patch; two prefix tokens + time + previous patch + patch
    projections = (
        patches * c.locenc.width * width  # enc_to_lm_proj
        + slots * 2 * width * width  # fusion_concat_proj
        + targets * 2 * width * local  # lm_to_dit_proj, res_to_dit_proj
    )
    return {
        "tslm": _stack_flops(c.tslm, slots, causal_pairs),
        "ralm": _stack_flops(c.ralm, slots, causal_pairs),
        "locenc": _stack_flops(c.locenc, patches * enc_rows, patches * enc_rows**2) + 2 * patches * P * C * c.locenc.width,
        "locdit": _stack_flops(c.locdit, targets * dit_rows, targets * dit_rows**2)
        + 2 * targets * (3 * P * C * local + 4 * local * local),  # in, cond, out projections; the two time MLPs
        "fsq": 2 * patches * 2 * width * Q,
        "projections": 2 * projections,
        "stop": 2 * targets * (width * width + 2 * width),
    }


def _stack_flops(c: TransformerConfig, positions, pairs) -> float:
    """Layers over `positions`, with `pairs` (query, key) pairs in their attention."""
    per_position = c.width * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 3 * c.width * c.mlp_width
    return 2.0 * c.num_layers * (positions * per_position + pairs * 2 * c.num_heads * c.head_dim)


def train_flops(config: ModelConfig, *, slots, patches, targets, squares) -> float:
    """Useful FLOPs of one update: forward, and twice that for the backward pass. Arguments as in `forward_flops`."""
    parts = forward_flops(config, slots=slots, patches=patches, targets=targets, squares=squares)
    return 3.0 * sum(parts.values())


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by `jax.Device.device_kind`; None where none is known (a CPU)."""
    chip = chips.of_kind(device_kind)
    return None if chip is None else chip.device_flops


def mfu(flops: float, step_sec: float) -> float | None:
    """Model FLOP utilisation of all devices, 0 to 1, for `flops` useful ones in each step; None on unknown devices."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else flops / (step_sec * peak * jax.device_count())


# ---- tracing ---------------------------------------------------------------------------------------------------------


class Profiler:
    """Traces some updates for XProf (`xprof WORKDIR/profile`, or TensorBoard's profile plugin); a context manager.

    Args:
        steps: (a, b): updates a, a + 1 .. b - 1; None: none.   directory: where the trace goes.
    """

    def __init__(self, steps: tuple[int, int] | None, directory):
        self._steps, self._directory = steps, str(directory)
        self._is_on = False

    def at(self, step: int, running: Any = None) -> None:
        """Called before update number `step` is dispatched; the trace begins or ends here if it is time.

        Args:
            running: results of the update before, still on the devices; waited for where the trace begins and ends, so
                that it holds whole updates.
        """
        is_wanted = self._steps is not None and self._steps[0] <= step < self._steps[1]
        if is_wanted == self._is_on:
            return
        jax.block_until_ready(running)
        if is_wanted:
            jax.profiler.start_trace(self._directory)
            self._is_on = True
        else:
            self._stop()

    def _stop(self) -> None:
        self._is_on = False
        jax.profiler.stop_trace()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._is_on:
            self._stop()


def profile_steps(text: str) -> tuple[int, int]:
    """ "100:103" -> (100, 103).

    Raises:
        UserError: not two step numbers, the first below the second.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--profile-steps={text}: expected A:B, two step numbers with A < B; updates A .. B - 1 are traced")
    return int(match[1]), int(match[2])


# ---- writing ---------------------------------------------------------------------------------------------------------


class Audio(NamedTuple):
    """A figure to hear."""

    samples_A: Any  # float32, -1 .. 1
    rate_hz: int


class Image(NamedTuple):
    """A figure to see."""

    pixels_HWC: Any  # uint8, or float32 0 .. 1


def heal(path, last_step: int) -> dict | None:
    """Cuts metrics.jsonl back to whole lines of steps up to `last_step` -> its last row; None if none is left."""
    path = pathlib.Path(path)
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # torn by whatever ended the run
    rows = [line for line in lines if json.loads(line)["step"] <= last_step]
    replace_file(path, "".join(rows))
    return json.loads(rows[-1]) if rows else None


def replace_file(path, text: str) -> None:
    """Writes aside, then renames: a reader sees the old file or the new one."""
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class Writer:
    """Writes rows of figures from the first process; a context manager.

    Args:
        start_step: updates that were finished before; rows beyond it are dropped.   num_steps: length of the run.
    Attributes:
        last_row: the newest row in metrics.jsonl, None before the first.
    """

    def __init__(self, workdir, *, start_step: int, num_steps: int):
        workdir = pathlib.Path(workdir)
        self.last_row: dict | None = None
        self._num_steps = num_steps
        self._file = self._board = self._progress = None
        if jax.process_index() != 0:
            return
        self.last_row = heal(workdir / "metrics.jsonl", start_step)
        self._file = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        if sys.stderr.isatty():
            self._progress = _live_line()
            self._task = self._progress.add_task("train", total=num_steps, completed=start_step, figures="")
            self._progress.start()

    def write(self, step: int, figures: dict) -> None:
        """One row: numbers (or None) go everywhere, Audio and Image to TensorBoard."""
        media = {k: v for k, v in figures.items() if isinstance(v, Audio | Image)}
        row = {"step": step} | {k: number(v) for k, v in figures.items() if k not in media}
        self.last_row = row
        if self._file is None:
            return
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board:
            self._write_board(step, row, media)
        if self._progress:
            self._progress.update(self._task, figures=_in_words(row))
        else:
            print(f"step {step}/{self._num_steps}  {_in_words(row)}", file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Moves the live line; called for every step."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def _write_board(self, step, row, media):
        for name, value in row.items():
            if name != "step" and value is not None:
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
        for part in (self._file, self._board):
            if part is not None:
                part.close()
        if self._progress:
            self._progress.stop()


def number(value) -> float | int | None:
    """JSON has no NaN and no infinity: what was not measured and what diverged are both null."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


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
