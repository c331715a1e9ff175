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
import functools
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from voxcpm2_jax.checkpoint.arrays import array_fields, flatten, nest, restore
from voxcpm2_jax.checkpoint.integrity import find_damage, write_checksums
from voxcpm2_jax.checkpoint.steps import META, complete_steps, read_meta, versions
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.processes import all_agree, from_first, say


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
        return max(from_first(complete_steps(self.directory)), default=None)

    def verified_step(self) -> int | None:
        """Newest step whose files are those that were saved; damaged ones are named on stderr and set aside.

        Every process of the run calls it; each reads its share of the files.

        Returns:
            None if nothing was ever saved.
        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        damaged: list[int] = []
        for step in sorted(from_first(complete_steps(self.directory)), reverse=True):
            path = self.directory / str(step)
            problem = find_damage(path, share=(jax.process_index(), jax.process_count()))
            if problem:
                print(f"DAMAGED CHECKPOINT {path}: {problem}", file=sys.stderr, flush=True)
            if all_agree(not problem):
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
        all_agree(True)  # nobody looks before it is done
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
        items = {name: ocp.args.PyTreeSave(nest(flatten(tree))) for name, tree in array_fields(state).items()}
        # A copy: Orbax writes it in the background, while the loop goes on counting in what it handed over.
        kept = json.loads(json.dumps({"step": step, "versions": versions(), "figures": numbers} | meta))
        items[META] = ocp.args.JsonSave(kept)
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
        steps = complete_steps(self.directory)
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
            newest = max(complete_steps(self.directory), default=None)
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
        for old in set(complete_steps(directory)) - self._figures.keys():
            path = directory / str(old)
            meta = {} if find_damage(path, (META,)) else read_meta(path)
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
