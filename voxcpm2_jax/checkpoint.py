"""Checkpoints: asynchronous saves, strict restores onto any mesh, where a run starts, what a checkpoint path is.

    WORKDIR/config.json                    what the run was started with
    WORKDIR/metrics.jsonl                  one object per logged step
    WORKDIR/checkpoints/STEP/params/       one Orbax item per field of the state: params, opt_state, ema, step
    WORKDIR/checkpoints/STEP/meta/         JSON: step, config, versions of the libraries, what the loop has to remember
    WORKDIR/checkpoints/STEP/checksums.json        size and CRC-32 of every file of the step
    WORKDIR/checkpoints/STEP.damaged/      a step that was found damaged, set aside by the run that passed it over

A step directory appears under its number, by a rename, only when every file of it is on disk and its checksums are
written; "latest" counts nothing else. Whoever reads a step first compares its files with them: the resuming run all of
them (each process its share) before it takes the step, others the parts that they use. CRC-32 because it costs 0.25 s a
gigabyte and core (SHA-256: 0.55 s) and what it guards against is an accident. Steps of versions that wrote no checksums
are read as they are, and said to be.

Arrays are stored by path alone ("base_lm/layers/q/kernel"), never by the classes that hold them, so a file does not
depend on how optax or a state class is built.

Orbax's CheckpointManager (its "v0" interface) is used: `orbax.checkpoint.v1` does not import in 0.12.8, and its
experimental home is bound to move.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from voxcpm2_jax.config import FIXED, FREE, SCHEDULE, SHAPE, UserError
from voxcpm2_jax.sharding import say

TRAINING, RELEASED = "training", "released"  # what `kind` tells
CHECKSUMS_FILE = "checksums.json"

_META = "meta"
_BARE = "value"  # path of a field that is one array
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "audiovae.safetensors", "audiovae.pth")
_PACKAGES = ("voxcpm2_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Orbax writes these two, with times in them, after the checksums. Nothing of the state is in them.
_UNCOUNTED = (CHECKSUMS_FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 1 << 22  # bytes read at once
_READERS = 4  # files read at once: enough for a local disk, and for a network file system to begin with


class SaveFailed(RuntimeError):  # noqa: N818
    """A checkpoint could not be written; its message is the one line to show."""


class Checkpoints:
    """The checkpoints of one training run.

    Args:
        workdir: made if absent.   keep: newest steps that stay.   every_steps: updates between two saves.
        keep_every_steps: steps that it divides stay for ever; None: none.
        best_metric: name of a figure that `save` is given; the step with the best one stays as well. None: none.
        best_mode: "min" or "max": which of the figures is best.
    """

    def __init__(
        self, workdir, keep: int, every_steps: int, *, keep_every_steps: int | None = None, best_metric: str | None = None,
        best_mode: str = "min",
    ):  # fmt: skip
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self.every_steps = every_steps
        self._best = None if best_metric is None else _Best(best_metric, best_mode)
        policies = [ocp.checkpoint_managers.LatestN(keep)]
        policies += [] if keep_every_steps is None else [ocp.checkpoint_managers.EveryNSteps(keep_every_steps)]
        policies += [] if self._best is None else [self._best]
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._saving: int | None = None  # the newest step that a save was started of
        self._has_failed = False

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory, options=self._options)

    def open(self) -> None:
        """Makes the directory and removes from it what was not finished; until then it is only read. `save` opens as well."""
        _ = self._manager

    def is_due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def latest_step(self) -> int | None:
        """Newest step that is whole on disk, as the first process sees it; None without one. Every process asks."""
        return max(from_first(_steps(self.directory)), default=None)

    def verified_step(self) -> int | None:
        """Newest step whose files are those that were saved; damaged ones are named on stderr and set aside.

        Every process of the run calls it; each reads its share of the files.

        Returns:
            None if nothing was ever saved.
        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        damaged: list[int] = []
        for step in sorted(from_first(_steps(self.directory)), reverse=True):
            path = self.directory / str(step)
            problem = _damage(path, share=(jax.process_index(), jax.process_count()))
            if problem:
                print(f"DAMAGED CHECKPOINT {path}: {problem}", file=sys.stderr, flush=True)
            if _all_agree(not problem):
                self._set_aside(damaged)
                return step
            damaged.append(step)
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged ({', '.join(map(str, damaged))}): bring one back from a copy, "
                "or start in a new workdir"
            )
        return None

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Makes room for these steps, which the run will come to again."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self.directory / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        say(f"passed over: set aside as {', '.join(f'{self.directory}/{step}.damaged' for step in steps)}")
        _all_agree(True)  # nobody looks before it is done
        if self._is_open:
            self._manager.reload()

    def save(self, step: int, state, meta: dict, figures: Mapping | None = None) -> None:
        """Starts saving in the background, once a save still running has ended; `state` may be donated afterwards.

        Args:
            step: finished updates.   state: dataclass of trees; fields without arrays are left out.
            meta: plain data, among it "config".   figures: what was measured of this state; numbers are kept, by name.
        Raises:
            SaveFailed: the save before this one, or this one at its beginning.
        """
        numbers = {name: float(x) for name, x in (figures or {}).items() if isinstance(x, int | float) or _is_scalar(x)}
        items = {name: ocp.args.PyTreeSave(nest(flatten(tree))) for name, tree in _fields(state).items()}
        # A copy: Orbax writes it in the background, while the loop goes on counting in what it handed over.
        kept = json.loads(json.dumps({"step": step, "versions": versions(), "figures": numbers} | meta))
        items[_META] = ocp.args.JsonSave(kept)
        self.wait()
        self._saving = step
        if self._best:
            self._best.add(step, numbers, self.directory)
        with self._failures():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def check(self) -> None:
        """Raises SaveFailed if a background save has failed, once it has ended; never waits."""
        # The manager's own check_for_errors stays silent about a failed write; joining its thread does not.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, state, step: int | None = None):
        """The saved state, laid out as `state` is, and its meta.

        Args:
            state: arrays or ShapeDtypeStructs; shapes, dtypes and shardings are taken from it.
            step: default: the latest.
        Raises:
            UserError: no checkpoint, or one that differs: every missing, extra and misshaped array is named.
        """
        steps = _steps(self.directory)
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            raise UserError(
                f"{self.directory}: no complete checkpoint {step or 'at all'}; there is {sorted(steps) or 'nothing'}"
            )
        return restore(self.directory / str(step), state)

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises SaveFailed if it never will be."""
        with self._failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, unless a save has failed: then there is nothing to wait for."""
        if self._is_open and not self._has_failed:
            self.wait()
            self._manager.close()

    @property
    def _is_open(self) -> bool:
        return "_manager" in vars(self)

    def _seal(self) -> None:
        """Runs on the first process when all files of a step are written, before the step gets its name."""
        (unfinished,) = self.directory.glob(f"{self._saving}.*tmp*")
        write_checksums(unfinished)

    @contextlib.contextmanager
    def _failures(self):
        """Tells of a save that has failed in one line; the errors are those of Orbax and of what it writes with."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._has_failed = True
            free = shutil.disk_usage(self.directory).free / 1e9
            newest = max(_steps(self.directory), default=None)
            left = "there is no older one" if newest is None else f"step {newest} is whole"
            reason = " ".join(str(error).split())
            raise SaveFailed(
                f"step {self._saving} could not be saved in {self.directory} ({free:.3g} GB free): {reason}; {left}; when the "
                "reason is gone, start the same command again"
            ) from error


def _is_scalar(x) -> bool:
    return isinstance(x, np.generic | np.ndarray | jax.Array) and x.ndim == 0


class _Best:
    """Keeps the step with the best figure; a rule of Orbax's for what stays."""

    def __init__(self, metric: str, mode: str):
        self._metric, self._sign = metric, {"min": 1.0, "max": -1.0}[mode]
        self._figures: dict[int, float] = {}
        self._has_told = False  # that a step has no such figure

    def add(self, step: int, figures: Mapping[str, float], directory: pathlib.Path) -> None:
        """Notes what a step is worth, and what those are worth that were there before the run's start."""
        for old in set(_steps(directory)) - self._figures.keys():
            path = directory / str(old)
            meta = {} if _damage(path, (_META,)) else read_meta(path)
            self._figures[old] = meta.get("figures", {}).get(self._metric, np.nan)
        if self._metric not in figures and not self._has_told:
            self._has_told = True
            there = f"it has {', '.join(sorted(figures))}" if figures else "nothing was measured there"
            say(
                f"checkpoint.best_metric {self._metric} is no figure of step {step} ({there}): such a step never counts as the "
                "best; figures come of a held-out evaluation at the very step of a save"
            )
        self._figures[step] = figures.get(self._metric, np.nan)

    def should_preserve(self, checkpoints, *, context) -> Sequence[bool]:
        worth = {c.step: self._sign * self._figures[c.step] for c in checkpoints}
        best = min((step for step in worth if np.isfinite(worth[step])), key=worth.get, default=None)
        return [c.step == best for c in checkpoints]


def restore(path, state):
    """The state that a step directory holds, laid out as `state` is, and its meta; see `Checkpoints.restore`."""
    wanted = {name: flatten(tree) for name, tree in _fields(state).items()}
    _compare(path, wanted)
    fields = {}
    for name, flat in wanted.items():
        found = flatten(_read(path / name, nest(flat)))
        fields[name] = jax.tree.unflatten(jax.tree.structure(getattr(state, name)), [found[key] for key in flat])
    return dataclasses.replace(state, **fields), read_meta(path)


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that a state depends on."""
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in _PACKAGES}


# ---- where a run starts ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts whose workdir holds no checkpoint, and which fields of its config may differ from a checkpoint's.

    Args:
        resume_from: another run's workdir or one step of it; its whole state is taken, the run itself is only read.
        fresh: what the state is without any checkpoint, in words.
        rules: as `config.CHANGES`; by default every field may differ.
        accept_changes: fields that must not differ may, except those that the saved arrays' shapes hang on.
    """

    resume_from: str | os.PathLike | None = None
    fresh: str = "scratch"
    rules: Sequence[tuple[str, str, str]] = (("", FREE, ""),)
    accept_changes: bool = False


def begin(checkpoints: Checkpoints, state, config: dict, start: Start):
    """The state to start from, laid out as `state` is, and its meta; {} if the run starts afresh.

    The run's own newest whole checkpoint counts first, then `start.resume_from`, then `state` itself; one line on stderr
    says which. The memory of `state` is given up for a checkpoint's; ShapeDtypeStructs do where there is one.

    Raises:
        UserError: no whole checkpoint where there should be one, one of other arrays, or fields of the config that must
            not differ and do: each is named.
    """
    step = checkpoints.verified_step()
    unused = f"; --resume-from={start.resume_from} is not used" if step is not None and start.resume_from else ""
    if step is not None:
        path, how = checkpoints.directory / str(step), f"resume{unused}"
    elif start.resume_from is not None:
        path, how = _whole_step(start.resume_from), "--resume-from"
    else:
        checkpoints.open()
        say(f"starting from {start.fresh}")
        return state, {}
    old = read_meta(path)
    is_branch = step is None
    _check_changes(path, old["config"], config, start, is_branch)
    layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, state)
    restored = restore(path, layout)
    checkpoints.open()
    unchecked = "" if (path / CHECKSUMS_FILE).is_file() else ", not verified: an earlier version saved it without checksums"
    say(f"starting from step {old['step']} of {path.parent.parent} ({how}){unchecked}")
    return restored


def _whole_step(path) -> pathlib.Path:
    """The step that a path names, of another run; it must be whole. Each process reads its share of the files."""
    if kind(path) != TRAINING:
        raise UserError(f"--resume-from={path}: released weights, no training state; expected a workdir or one step of it")
    step = pathlib.Path(from_first(str(step_directory(path))))
    problem = _damage(step, share=(jax.process_index(), jax.process_count()))
    if not _all_agree(not problem):
        raise _damaged(step, problem or "another process of this run says what")
    return step


def _check_changes(path, old: dict, new: dict, start: Start, is_branch: bool) -> None:
    """Names every field that differs; raises if one does that must not."""
    refused, accepted, is_final = [], [], False
    for field, change in sorted(_changes(old, json.loads(json.dumps(new)))):
        told = f"{field}: {change}"
        rule, why = next(((rule, why) for pattern, rule, why in start.rules if re.match(pattern, told)), (FIXED, "no rule"))
        is_new = change.startswith(_ABSENT) or change.endswith(_ABSENT)  # a field that one of the two versions has not got
        is_accepted = start.accept_changes and rule != SHAPE
        if rule == FREE or is_new or (is_branch and rule == SCHEDULE) or is_accepted:
            accepted.append(told)
        else:
            refused.append(f"{told} ({why})")
            is_final |= rule == SHAPE
    if refused:
        ways = "set it back, or start in a new workdir"
        ways = ways if is_final else "set it back, start in a new workdir, or add --accept-config-changes"
        raise UserError(
            f"{path}: the config differs from the checkpoint's in what its state means: {'; '.join(refused)}; {ways}"
        )
    for told in accepted:
        say(f"config differs from the checkpoint's: {told}")


_ABSENT = "(none)"


def _changes(old, new, where="") -> Iterator[tuple[str, str]]:
    """(path of a field, "old -> new") wherever two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            inner = f"{where}.{key}" if where else key
            if key in old and key in new:
                yield from _changes(old[key], new[key], inner)
            else:
                one, other = (f"{side[key]!r:.80}" if key in side else _ABSENT for side in (old, new))
                yield inner, f"{one} -> {other}"
    elif old != new:
        yield where, f"{old!r:.80} -> {new!r:.80}"


# ---- checksums -------------------------------------------------------------------------------------------------------


def write_checksums(path) -> None:
    """Writes checksums.json into a step directory whose files are all there."""
    files = _files(path)
    with ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(_crc32, (path / name for name in files))
        content = {name: [size, crc] for (name, size), crc in zip(files.items(), sums)}
    aside = path / f".{CHECKSUMS_FILE}"
    with aside.open("w", encoding="utf-8") as file:
        json.dump({"files": content, "hash": "crc32"}, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path / CHECKSUMS_FILE)


def verify(path, *parts: str) -> None:
    """Compares the files of a workdir's newest step, or of one step, with its checksums.

    Args:
        parts: items to look at, such as "params"; none: the whole step.
    Raises:
        UserError: a file is missing, truncated, altered or foreign; or there is no such checkpoint.
    """
    step = step_directory(path)
    problem = _damage(step, parts)
    if problem:
        raise _damaged(step, problem)


def _damaged(step: pathlib.Path, problem: str) -> UserError:
    others = sorted(set(_steps(step.parent)) - {int(step.name)} if step.name.isdigit() else _steps(step.parent))
    instead = f"name another step of it: {', '.join(map(str, others))}" if others else "there is no other step of it"
    return UserError(f"{step}: damaged checkpoint: {problem}; {instead}")


def _damage(path: pathlib.Path, parts: Sequence[str] = (), share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the files of a step, in words; "" if nothing is.

    Args:
        share: (i, n): contents are read of the i-th of n parts of the files alone.
    """
    if not (path / CHECKSUMS_FILE).is_file():
        if not (path / _META / "metadata").is_file():
            return f"neither {CHECKSUMS_FILE} nor {_META}/ in it; not a checkpoint of ours"
        try:
            is_older = "versions" not in json.loads((path / _META / "metadata").read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{_META}/metadata is not JSON ({error})"
        return "" if is_older else f"{CHECKSUMS_FILE} is missing"
    try:
        recorded = json.loads((path / CHECKSUMS_FILE).read_text(encoding="utf-8"))["files"]
        recorded = {str(name): (int(size), int(crc)) for name, (size, crc) in recorded.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS_FILE} cannot be read ({error!r:.80})"
    found = _files(path)
    if parts:
        recorded, found = ({n: x for n, x in files.items() if n.split("/")[0] in parts} for files in (recorded, found))
    problems = [f"{name} is missing" for name in recorded.keys() - found.keys()]
    problems += [f"{name} is foreign" for name in found.keys() - recorded.keys()]
    common = sorted(recorded.keys() & found.keys(), key=lambda name: (-recorded[name][0], name))
    problems += [f"{n} has {found[n]} bytes, not {recorded[n][0]}" for n in common if found[n] != recorded[n][0]]
    mine = [name for name in common[share[0] :: share[1]] if found[name] == recorded[name][0]]  # large ones dealt out evenly
    with ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(_crc32, (path / name for name in mine))
        problems += [f"{name} was altered (CRC-32)" for name, crc in zip(mine, sums) if crc != recorded[name][1]]
    return "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _files(path: pathlib.Path) -> dict[str, int]:
    """Sizes of the files under a step directory that checksums are kept of, by relative path."""
    found = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if not p.is_dir()}
    return {name: p.lstat().st_size for name, p in found.items() if name not in _UNCOUNTED}


def _crc32(path: pathlib.Path) -> int:
    crc = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
    except OSError:
        return -1  # no checksum: a file that cannot be read is not what was written
    return crc


def _all_agree(is_fine: bool) -> bool:
    """Whether it is fine on every process of the run; all of them ask."""
    if jax.process_count() == 1:
        return is_fine
    return bool(np.all(multihost_utils.process_allgather(np.array(is_fine))))


def from_first(value):
    """The first process's value, plain data, on every process of the run; all of them ask.

    For what is read from a disk that they share and decides what they do next: a network file system may show one of them
    what was there a minute ago.
    """
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(data).tobytes())


# ---- reading without a run -------------------------------------------------------------------------------------------


def kind(path) -> str:
    """What a checkpoint argument is: TRAINING (a workdir or one step of it) or RELEASED (a PyTorch directory).

    Raises:
        UserError: neither of the two, saying what was looked for.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        what = "a file, not a directory" if path.exists() else "no such directory"
        raise UserError(f"{path}: {what}; expected a training workdir, one step of it, or a released PyTorch directory")
    if _is_step(path) or _steps(path / "checkpoints"):
        return TRAINING
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: a training workdir without a complete checkpoint; train until the first save")
    if (path / "config.json").is_file() and any((path / name).is_file() for name in _WEIGHTS):
        return RELEASED
    raise UserError(
        f"{path}: not a checkpoint; expected a training workdir (checkpoints/STEP/), one step of it (params/, meta/), "
        f"or a released PyTorch directory (config.json and one of {', '.join(_WEIGHTS)})"
    )


def has_steps(workdir) -> bool:
    """Whether a run in this directory goes on instead of starting, as the first process sees it. Every process asks."""
    return bool(from_first(_steps(pathlib.Path(workdir).absolute() / "checkpoints")))


def load_params(path):
    """The weights of a training workdir (its latest step) or of one step directory; averaged ones if it has them.

    Returns:
        config: dict, as it was saved.   params: nested dict of numpy arrays.   step: int.
    """
    path = pathlib.Path(path).absolute()
    if kind(path) != TRAINING:
        raise UserError(f"{path}: a released PyTorch directory; expected a training workdir or one step of it")
    item = _weights(path)
    verify(path, _META, item.name)
    meta = read_meta(step_directory(path))
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(item))
    params = ocp.PyTreeCheckpointHandler().restore(epath.Path(item), args=ocp.args.PyTreeRestore(restore_args=restore_args))
    return meta["config"], params, meta["step"]


def step_directory(path) -> pathlib.Path:
    """The step that a workdir (its latest) or a step directory means."""
    path = pathlib.Path(path).absolute()
    return path if _is_step(path) else path / "checkpoints" / str(max(_steps(path / "checkpoints")))


def saved_config(path) -> dict:
    """The config that a workdir's latest step, or a step, was saved with; raises UserError if it is damaged."""
    verify(path, _META)
    return read_meta(step_directory(path))["config"]


def _weights(path) -> pathlib.Path:
    """The item that holds the weights to use."""
    step = step_directory(path)
    return step / ("ema" if (step / "ema").is_dir() else "params")


def read_meta(path) -> dict:
    """The JSON part of one step directory."""
    return ocp.JsonCheckpointHandler().restore(epath.Path(pathlib.Path(path) / _META), args=ocp.args.JsonRestore())


def _steps(directory) -> list[int]:
    """Steps under `directory` that are whole on disk."""
    if not directory.is_dir():
        return []
    return [int(p.name) for p in ocp.utils.checkpoint_steps_paths(directory) if p.name.isdigit()]


def _is_step(path) -> bool:
    return (path / "params").is_dir() and (path / _META).is_dir() and ocp.utils.is_checkpoint_finalized(epath.Path(path))


# ---- one array at a time: conversion of models that do not fit memory ------------------------------------------------


def save_arrays(workdir, step: int, arrays: dict, meta: dict) -> None:
    """Writes a checkpoint of weights alone and returns when it is on disk.

    Args:
        arrays: numpy arrays by path; they may be mapped files, of which at most a few chunks are held in memory.
        meta: plain data, among it "config".
    """
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)  # Orbax warns of both choices below
    try:
        # Orbax's own array handler copies every array first, and its default format (OCDBT) buffers the whole checkpoint.
        handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
        params = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=1 << 26), nest(arrays))
        items = {
            "params": ocp.args.PyTreeSave(nest(arrays), save_args=chunks),
            _META: ocp.args.JsonSave({"step": step, "versions": versions()} | meta),
        }
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        directory = pathlib.Path(workdir).absolute() / "checkpoints"
        handlers = {"params": params, _META: ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
            manager.save(step, args=ocp.args.Composite(**items), force=True)
        write_checksums(directory / str(step))
    finally:
        absl.setLevel(level)


def array_specs(path) -> dict:
    """Shape and dtype, by path, of the weights that `load_params` would read; raises UserError if they are damaged."""
    verify(path, _META, _weights(path).name)
    return flatten(_metadata(_weights(path)))


def read_array(path, key: str) -> np.ndarray:
    """One of the arrays that `array_specs` lists.

    It is read chunk by chunk (a chunk is what one device held), for memory: all chunks at once, as Orbax reads, take the
    array's size three times. So the files are opened here the way that Orbax lays them out.
    """
    item = _weights(path)
    layout = json.loads((item / "_METADATA").read_text(encoding="utf-8"))
    name = key.replace("/", ".")
    if layout["use_ocdbt"]:
        store = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{item}/{name}/"}
    driver = "zarr3" if layout.get("use_zarr3") else "zarr"
    source = ts.open({"driver": driver, "kvstore": store}, open=True).result()
    array = np.empty(source.shape, source.dtype.numpy_dtype)
    chunk = source.chunk_layout.read_chunk.shape
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(source.shape, chunk))):
        where = tuple(slice(start, min(start + step, size)) for start, step, size in zip(corner, chunk, source.shape))
        array[where] = source[where].read().result()
    return array


# ---- trees as flat paths ---------------------------------------------------------------------------------------------


def _fields(state) -> dict:
    """The state's fields that hold arrays."""
    trees = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def flatten(tree) -> dict:
    """Leaves by path, in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") or _BARE: leaf for path, leaf in leaves}


def nest(flat: dict) -> dict:
    """Nested dicts from leaves by path: what `flatten` takes apart."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def _metadata(path):
    """Nested dict of shapes and dtypes of one item."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree


def _read(path, abstract):
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path), args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
    )


def _compare(path, wanted: dict) -> None:
    """Raises one UserError that names every array that is missing, extra or of another shape or dtype."""
    saved_items = {p.name for p in path.iterdir() if p.is_dir()} - {_META}
    found = {f"{item}/{key}": leaf for item in saved_items for key, leaf in flatten(_metadata(path / item)).items()}
    wanted = {f"{item}/{key}": leaf for item, flat in wanted.items() for key, leaf in flat.items()}
    problems = [f"missing {key} {_spec(wanted[key])}" for key in sorted(wanted.keys() - found.keys())]
    problems += [f"extra {key} {_spec(found[key])}" for key in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{key} is {_spec(found[key])}, the run needs {_spec(wanted[key])}"
        for key in sorted(wanted.keys() & found.keys())
        if _spec(found[key]) != _spec(wanted[key])
    ]
    if problems:
        raise UserError(
            f"{path}: the checkpoint does not fit this config ({len(problems)} differences): " + "; ".join(problems)
        )


def _spec(leaf) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
