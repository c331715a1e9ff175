"""Bad updates: which are skipped, and which batches a run steps over after a rollback.

An update is bad if one of its figures is not finite, or if its loss or its gradient norm, x, is a spike:

    log x > median + spike * (MAD + 0.01)        median and median absolute deviation (MAD) of log x, both over the last
                                                 `window` kept updates

A new stage brings other clips, so its first `window` updates are never spikes. The norm of the update itself is not judged.

    one bad update    is skipped: parameters, optimiser state and averaged weights stay as they are; `step` advances; the
                      batch is named
    `max_in_a_row`    the run rolls back to its last checkpoint. When it reaches the bad batches again, it steps over them:
    bad updates       `step` advances without an update. If it has to roll back to the same checkpoint again, it steps over
                      all batches since then, because an update that looked good may have damaged the state.

The jitted step decides, from global figures: no host is needed, and every process decides alike. From the checkpoint to the
bad batches, training is repeated bit for bit. So a first rollback mends two things: a state that a memory error damaged, and
batches that would break any state.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from voxcpm2_jax import files
from voxcpm2_jax.config.run import GuardConfig
from voxcpm2_jax.processes import from_first


class BrokenRun(RuntimeError):  # noqa: N818
    """The numbers of a step are bad and stay bad; the message is the one line to show."""


# What `judge` adds to an update's figures; only the loop reads them.
VERDICT = ("skipped", "skipped_in_a_row", "loss_limit", "grad_norm_limit")

_LEAST_MAD = 0.01  # 1 % of the value, so that small ripples of a flat loss are no spikes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the verdict needs of past updates; part of the state, saved and restored with it."""

    recent_2W: jax.Array  # log loss and log gradient norm of kept updates, float32; W = window, update n is at n modulo W
    kept: jax.Array  # number of kept updates, int32
    in_a_row: jax.Array  # updates skipped since the last kept one, int32


def init(config: GuardConfig) -> Guard:
    """A guard that has seen no update. It exists even if the guard is off, so that it can be switched on during a run."""
    return Guard(jnp.zeros((2, config.window)), jnp.int32(0), jnp.int32(0))


def judge(config: GuardConfig, old, new, figures: dict, starts: Sequence[int] = (0,)) -> tuple[Any, dict]:
    """Keeps an update or skips it -> (state, figures with VERDICT).

    Args:
        old, new: states (dataclasses with `step` and `guard`) before and after the update.
        figures: of the update, scalars or (sum, count); "loss" and "grad_norm" are required.
        starts: first steps of the run's stages.
    """
    guard = old.guard
    if guard is None or not config.on:
        return dataclasses.replace(new, guard=guard), figures
    now_2 = jnp.stack([figures["loss"], figures["grad_norm"]]).astype(jnp.float32)
    log_2 = jnp.log(jnp.maximum(now_2, jnp.finfo(jnp.float32).tiny))
    limit_2 = jnp.full(2, jnp.inf)
    if config.spike is not None:
        median_21 = jnp.median(guard.recent_2W, axis=1, keepdims=True)
        mad_2 = jnp.median(jnp.abs(guard.recent_2W - median_21), axis=1)
        of_window_2 = median_21[:, 0] + config.spike * (mad_2 + _LEAST_MAD)
        age = jnp.min(jnp.array([jnp.where(old.step < start, old.step, old.step - start) for start in starts]))
        limit_2 = jnp.where(jnp.minimum(guard.kept, age) >= config.window, of_window_2, limit_2)
    # The norms of the update are not judged: the verdict would wait for the whole update, as large as the parameters.
    judged = {name: value for name, value in figures.items() if not name.startswith("update_norm")}
    is_finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(judged)]))
    is_good = is_finite & jnp.all(log_2 <= limit_2)

    remembered = Guard(
        guard.recent_2W.at[:, guard.kept % config.window].set(log_2), guard.kept + 1, jnp.zeros_like(guard.in_a_row)
    )
    skipped = dataclasses.replace(old, step=new.step, guard=dataclasses.replace(guard, in_a_row=guard.in_a_row + 1))
    state = jax.tree.map(lambda x, y: jnp.where(is_good, x, y), dataclasses.replace(new, guard=remembered), skipped)
    verdict = (~is_good, state.guard.in_a_row, *jnp.exp(limit_2))
    return state, figures | {name: jnp.float32(value) for name, value in zip(VERDICT, verdict, strict=True)}


def not_finite(values: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the figures, given as (sum, count), that are not finite; figures of parts only if no total is among them."""
    names = [name for name, pair in values.items() if not all(map(math.isfinite, pair))]
    return [name for name in names if "/" not in name] or names


def complaint(values: dict[str, tuple[float, float]], verdict: dict[str, float]) -> str:
    """Why an update was skipped, in words."""
    broken = not_finite(values)
    if broken:
        return f"not finite: {', '.join(broken)}"
    sizes = {name: (values[name][0], verdict[f"{name}_limit"]) for name in ("loss", "grad_norm")}
    return ", ".join(f"{name} {size:.4g}, over {limit:.4g}" for name, (size, limit) in sizes.items() if not size <= limit)


# ---- batches without an update ---------------------------------------------------------------------------------------


class Ledger:
    """Which batches had no update.

    Skipped batches are recorded only in the checkpoint: a run that resumes from it skips them again by itself. Batches that
    the run steps over are also recorded in WORKDIR/stepped_over.jsonl, one line per batch, before training continues.

    Args:
        saved: `state` from the checkpoint that the run resumes from; None: there is none.
    Attributes:
        skipped: numbers of batches, rising.
        in_a_row: updates skipped since the last kept one; None: the run has just started, rolled back or stepped over a
            batch.
    """

    def __init__(self, workdir, config: GuardConfig, saved: dict | None = None):
        saved = saved or {"skipped": [], "stepped_over": []}
        self._config = config
        self._path = pathlib.Path(workdir) / "stepped_over.jsonl"
        written = from_first(self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else [])
        self._over = {line["batch"]: line for line in (*saved["stepped_over"], *map(json.loads, written))}
        self.skipped: list[int] = list(saved["skipped"])
        self.in_a_row: int | None = None

    def skip(self, batch: int, in_a_row: int) -> None:
        """The update of a batch was skipped."""
        self.skipped.append(batch)
        self.in_a_row = in_a_row

    def keep(self) -> None:
        """An update was kept."""
        self.in_a_row = 0

    def pass_over(self) -> None:
        """The run stepped over a batch."""
        self.in_a_row = None

    @property
    def is_sound(self) -> bool:
        """Whether the newest update was kept, so that its state may be saved."""
        return self.in_a_row == 0

    @property
    def is_stuck(self) -> bool:
        """Whether the run has to roll back."""
        return (self.in_a_row or 0) >= self._config.max_in_a_row

    @property
    def bad(self) -> list[int]:
        """The batches that force the rollback."""
        return self.skipped[-self.in_a_row :] if self.is_stuck else []

    @property
    def state(self) -> dict:
        """Plain data for a checkpoint."""
        return {"skipped": self.skipped, "stepped_over": [self._over[batch] for batch in sorted(self._over)]}

    def is_over(self, batch: int) -> bool:
        """Whether the run steps over this batch."""
        return batch in self._over

    def without_update(self, step: int) -> frozenset[int]:
        """Batches before `step` that were skipped or stepped over."""
        return frozenset(batch for batch in (*self.skipped, *self._over) if batch < step)

    def step_over(self, bad: Sequence[int], back_to: int, clips: Callable[[int], list[str]]) -> str:
        """Decides which batches are stepped over after a rollback, and records them -> the line to report.

        Args:
            bad: batches that forced the rollback.   back_to: step of the checkpoint.   clips: batch -> names of its clips.
        Raises:
            BrokenRun: the run has rolled back to this checkpoint too often.
        """
        what = f"step {bad[-1] + 1}: {len(bad)} bad updates in a row"
        most = self._config.max_rollbacks
        time = 1 + max((line["rollback"] for line in self._over.values() if line["back_to"] == back_to), default=0)
        if time > most:
            raise BrokenRun(f"{what}, after {most} rollbacks to step {back_to}; the run stops, nothing broken is saved")
        batches = [n for n in (bad if time == 1 else range(back_to, bad[-1] + 1)) if n >= back_to and n not in self._over]
        for n in batches:
            self._over[n] = {"batch": n, "back_to": back_to, "rollback": time, "clips": clips(n)}
        if jax.process_index() == 0:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.state["stepped_over"])
            files.replace_file(self._path, text)
        numbers = ", ".join(map(str, batches))
        return f"{what}; rollback {time} of at most {most} to step {back_to}, stepping over batches {numbers}: {self._path}"
