"""The checkpoints of a training run: saves in the background, which steps are kept, and the newest undamaged step.

A save copies the state and writes it while training continues. When all files are written and each process has summed its
own, the first process adds the checksums, and only then does the step get its number (steps.py shows the layout). The first
process reports how long it took. A failed save raises SaveFailed at the next call; older steps stay as they are.

Orbax's CheckpointManager (its "v0" interface) does the writing. In Orbax 0.12.8 the newer interface cannot be imported as
`orbax.checkpoint.v1`, and the module that holds it instead is marked experimental.
"""

import contextlib
import functools
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from voxcpm2_jax.checkpoint.arrays import array_fields, flatten, nest
from voxcpm2_jax.checkpoint.integrity import Sealed, SummedPyTree, find_damage, own_sums, write_checksums
from voxcpm2_jax.checkpoint.mirror import Mirror
from voxcpm2_jax.checkpoint.steps import META, complete_steps, read_meta, versions
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.files import flush
from voxcpm2_jax.processes import all_agree, from_first, say


class SaveFailed(RuntimeError):  # noqa: N818
    """A checkpoint could not be written; the message is the line to show to the user."""


class Checkpoints:
    """The checkpoints of one training run.

    Args:
        workdir: created if absent; a Mirror if it lies in a bucket (mirror.py).
        keep: number of newest steps that are kept.   every_steps: updates between two saves.
        keep_every_steps: multiples of this are kept for ever; None: none are.
        best_metric: name of one of the figures given to `save`; the step with its best value is kept too. None: no step is.
        best_mode: "min" or "max": which value is best.
    """

    def __init__(
        self, workdir, keep: int, every_steps: int, *, keep_every_steps: int | None = None, best_metric: str | None = None,
        best_mode: str = "min",
    ):  # fmt: skip
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self._mirror = workdir if isinstance(workdir, Mirror) else None
        # With a Mirror processes share no disk: each writes what its devices hold, and each makes and renames directories.
        self._is_apart = self._mirror is not None and self._mirror.num_processes > 1
        self._processes = ocp.options.MultiprocessingOptions(primary_host=None if self._is_apart else 0)
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
            multiprocessing_options=self._processes,
            enable_per_process_directory_creation=self._is_apart,
        )
        self._saving: int | None = None  # the step that was saved last, finished or not
        self._is_settled = True  # whether it is known to be final
        self._begin_sec = 0.0  # of this step, on the clock
        self._sealed: Sealed | None = None  # by `_seal`, which runs in another thread
        self._items: tuple[str, ...] = ()  # of this step: those that hold arrays
        self._has_failed = False

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        options = {"multiprocessing_options": self._processes}
        arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=False, **options) if self._is_apart else SummedPyTree()
        handlers.add(None, ocp.args.PyTreeSave, arrays)
        handlers.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler(**options))
        return ocp.CheckpointManager(self.directory, options=self._options, handler_registry=handlers)

    def open(self) -> None:
        """Creates the directory and removes unfinished saves in the background; before this (or `save`), it is only read."""
        _ = self._manager

    def is_due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def latest_step(self) -> int | None:
        """Newest complete step, as the first process sees it; None if there is none. Every process must call this."""
        return max(from_first(complete_steps(self.directory)), default=None)

    def verified_step(self) -> int | None:
        """Newest step whose files match their checksums; None if there is no step at all.

        Newer, damaged steps are reported on stderr and renamed. Every process must call this; each reads a share of the files.

        Raises:
            UserError: every checkpoint is damaged.
        """
        damaged: list[int] = []
        for step in sorted(from_first(complete_steps(self.directory)), reverse=True):
            path = self.directory / str(step)
            problem = self._find_damage(path)
            if problem:
                print(f"DAMAGED CHECKPOINT {path}: {problem}", file=sys.stderr, flush=True)
            if all_agree(not problem):
                self._set_aside(damaged)
                return step
            damaged.append(step)
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged ({', '.join(map(str, damaged))}): restore one from a "
                "backup, or start in a new workdir"
            )
        return None

    def _find_damage(self, path: pathlib.Path) -> str:
        """What is wrong with a step, as far as this process looks: at its share of the files, or at all of its own copy."""
        if self._mirror is None:
            return find_damage(path, share=(jax.process_index(), jax.process_count()))
        self._mirror.fetch(int(path.name))
        if not find_damage(path):
            return ""
        self._mirror.fetch(int(path.name), again=True)
        return find_damage(path)

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames damaged steps to STEP.damaged, so that the run can save these steps again."""
        if not steps:
            return
        if jax.process_index() == 0 or self._is_apart:
            for step in steps:
                aside = self.directory / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
                if self._mirror:
                    self._mirror.discard(step)
        say(f"skipped and renamed to {', '.join(f'{self.directory}/{step}.damaged' for step in steps)}")
        all_agree(True)  # no process continues before the rename is done
        if self._is_open:
            self._manager.reload()

    def save(self, step: int, state, meta: dict, figures: Mapping | None = None) -> None:
        """Waits for the save before, then starts this one in the background; `state` may be donated afterwards.

        Args:
            step: finished updates.   state: dataclass of trees; fields without arrays are not saved.
            meta: plain data, with "config" in it.   figures: what was measured at this step, by name; only numbers are kept.
        Raises:
            SaveFailed: the save before failed, or this one could not start.
        """
        numbers = {name: float(x) for name, x in (figures or {}).items() if isinstance(x, int | float) or _is_scalar(x)}
        items = {name: ocp.args.PyTreeSave(nest(flatten(tree))) for name, tree in array_fields(state).items()}
        # Copied, because Orbax writes it in the background while the loop goes on changing these objects.
        kept = json.loads(json.dumps({"step": step, "versions": versions(), "figures": numbers} | meta))
        items[META] = ocp.args.JsonSave(kept)
        self.wait()
        self._saving, self._items = step, tuple(array_fields(state))
        self._is_settled, self._begin_sec = False, time.monotonic()
        if self._best:
            self._best.add(step, numbers, self.directory)
        with self._failures():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def check(self) -> None:
        """Raises SaveFailed if a save that has ended failed; does not wait for one that is running."""
        # The manager's own check_for_errors does not report a failed write; joining its thread does.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk; raises SaveFailed if it failed."""
        with self._failures():
            self._manager.wait_until_finished()
            self._settle()

    def _settle(self) -> None:
        """Flushes the number of the step that is final since the last call, and reports the step."""
        if self._is_settled:
            return
        self._is_settled = True
        if jax.process_index() != 0:
            return
        path = self.directory / str(self._saving)
        for written_last in (*(p for p in path.iterdir() if p.is_file()), path, self.directory):
            flush(written_last)
        sec, size, of_sums = time.monotonic() - self._begin_sec, self._sealed.num_bytes / 1e9, self._sealed.sum_sec
        say(f"step {self._saving} is saved: {size:.3g} GB, final after {sec:.1f} s, {of_sums:.1f} s of them for checksums")

    def close(self) -> None:
        """Waits for the last save, unless a save has failed."""
        if self._is_open and not self._has_failed:
            self.wait()
            self._manager.close()

    @property
    def _is_open(self) -> bool:
        return "_manager" in vars(self)

    def _seal(self) -> None:
        """Called by Orbax on the first process, or on each if they share no disk, when all files of a step are written,
        before the step gets its number."""
        (unfinished,) = self.directory.glob(f"{self._saving}.*tmp*")
        num_parts = 0 if self._is_apart else jax.process_count()
        parts = [own_sums(unfinished / item, i) for item in self._items for i in range(num_parts)]
        self._sealed = write_checksums(unfinished, parts)
        if self._mirror:
            self._sealed = self._mirror.commit(self._saving, unfinished, self._sealed)

    @contextlib.contextmanager
    def _failures(self):
        """Turns the errors that Orbax and the libraries below it raise for a failed save into SaveFailed."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._has_failed = True
            free = shutil.disk_usage(self.directory).free / 1e9
            newest = max(complete_steps(self.directory), default=None)
            left = "there is no older checkpoint" if newest is None else f"step {newest} is whole"
            reason = " ".join(str(error).split())
            raise SaveFailed(
                f"step {self._saving} could not be saved in {self.directory} ({free:.3g} GB free): {reason}; {left}; remove "
                "the cause, then start the same command again"
            ) from error


def _is_scalar(x) -> bool:
    return isinstance(x, np.generic | np.ndarray | jax.Array) and x.ndim == 0


class _Best:
    """Orbax preservation policy that keeps the step with the best value of one figure."""

    def __init__(self, metric: str, mode: str):
        self._metric, self._sign = metric, {"min": 1.0, "max": -1.0}[mode]
        self._figures: dict[int, float] = {}
        self._has_warned = False  # that a step lacks the figure

    def add(self, step: int, figures: Mapping[str, float], directory: pathlib.Path) -> None:
        """Records the figure of a step, and those of the steps that were on disk before this run started."""
        for old in set(complete_steps(directory)) - self._figures.keys():
            path = directory / str(old)
            meta = {} if find_damage(path, (META,)) else read_meta(path)
            self._figures[old] = meta.get("figures", {}).get(self._metric, np.nan)
        if self._metric not in figures and not self._has_warned:
            self._has_warned = True
            say(
                f"checkpoint.best_metric {self._metric} was not measured at step {step} (measured: "
                f"{', '.join(sorted(figures)) or 'nothing'}), so this step cannot be the best; it is measured only where a "
                "held-out evaluation falls on the step of a save"
            )
        self._figures[step] = figures.get(self._metric, np.nan)

    def should_preserve(self, checkpoints, *, context) -> Sequence[bool]:
        costs = {c.step: self._sign * self._figures[c.step] for c in checkpoints}
        best = min((step for step in costs if np.isfinite(costs[step])), key=costs.get, default=None)
        return [c.step == best for c in checkpoints]
