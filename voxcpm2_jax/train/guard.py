"""Bad numbers: which updates are not taken, and what a run steps over when they do not end.

    bad     a figure of the update (its own norm aside) is not finite, or its loss or gradient norm is a spike:
            log x > median + spike * (MAD + 0.01),  both over the last `window` updates that were kept; a stage that
            brings other clips or rows has no past to be told from: none is before it is `window` updates old
    1 bad   parameters, optimiser and averaged weights stay as they are; `step` goes on; the batch is named
    m bad   in a row: back to the last checkpoint, and from then on the bad batches are passed over: `step` goes on past
            them without an update. If it breaks again from the same checkpoint, everything since then is passed over,
            for the state may have been led astray by what looked good

The verdict falls inside the jitted step, from global figures, so that it needs no host and is the same on every process.
Replaying from the checkpoint gives the same state up to the bad batches, to the last bit: what the first way back can
mend is memory gone wrong, and a batch that breaks whatever it meets.
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
    """The numbers of some step are bad and stay so; its message is the one line to show."""


# What `judge` adds to an update's figures, for the loop alone.
VERDICT = ("skipped", "skipped_in_a_row", "loss_limit", "grad_norm_limit")

_LEAST_MAD = 0.01  # 1 % of the value: a loss that hardly moves is not to make a spike of every ripple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the verdict remembers; a part of the state, saved and restored with it."""

    recent_2W: jax.Array  # log loss and log gradient norm of updates that were kept, float32; update n is at n modulo W
    kept: jax.Array  # updates that were kept, int32
    in_a_row: jax.Array  # updates skipped since the last one that was kept, int32


def init(config: GuardConfig) -> Guard:
    """There whether the guard is on or off, so that it can be switched in the middle of a run."""
    return Guard(jnp.zeros((2, config.window)), jnp.int32(0), jnp.int32(0))


def judge(config: GuardConfig, old, new, figures: dict, starts: Sequence[int] = (0,)) -> tuple[Any, dict]:
    """Takes an update or leaves it -> (state, figures with VERDICT).

    Args:
        old, new: states (dataclasses with `step` and `guard`) before and after the update.
        figures: of the update; scalars or (sum, count), "loss" and "grad_norm" among them.
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
    # Not asked: norms of the update. The verdict would wait for all of it, held in memory as large as the parameters.
    asked = {name: value for name, value in figures.items() if not name.startswith("update_norm")}
    is_finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(asked)]))
    is_good = is_finite & jnp.all(log_2 <= limit_2)

    remembered = Guard(
        guard.recent_2W.at[:, guard.kept % config.window].set(log_2), guard.kept + 1, jnp.zeros_like(guard.in_a_row)
    )
    skipped = dataclasses.replace(old, step=new.step, guard=dataclasses.replace(guard, in_a_row=guard.in_a_row + 1))
    state = jax.tree.map(lambda x, y: jnp.where(is_good, x, y), dataclasses.replace(new, guard=remembered), skipped)
    verdict = (~is_good, state.guard.in_a_row, *jnp.exp(limit_2))
    return state, figures | {name: jnp.float32(value) for name, value in zip(VERDICT, verdict, strict=True)}


def not_finite(values: dict[str, tuple[float, float]]) -> list[str]:
    """The names among an update's figures, as (sum, count), that are not finite; parts only if no whole is."""
    names = [name for name, pair in values.items() if not all(map(math.isfinite, pair))]
    return [name for name in names if "/" not in name] or names


def complaint(values: dict[str, tuple[float, float]], verdict: dict[str, float]) -> str:
    """What was wrong with a skipped update, in words."""
    broken = not_finite(values)
    if broken:
        return f"not finite: {', '.join(broken)}"
    sizes = {name: (values[name][0], verdict[f"{name}_limit"]) for name in ("loss", "grad_norm")}
    return ", ".join(f"{name} {size:.4g}, over {limit:.4g}" for name, (size, limit) in sizes.items() if not size <= limit)


# ---- what a run steps over -------------------------------------------------------------------------------------------


class Ledger:
    """The batches that no update came of.

    Those that were skipped are kept in the checkpoint alone, for a run that goes on from it skips them again. Those that are
    passed over stand in WORKDIR/stepped_over.jsonl as well, one line a batch, before the run goes on.

    Args:
        saved: `state` of the checkpoint that the run goes on from; None: there is none.
    Attributes:
        skipped: numbers of batches, rising.
        in_a_row: how many updates were skipped since the last one that was kept; None: the run has just started, gone back
            or passed a batch over.
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
        """A batch went by without an update, as it was settled."""
        self.in_a_row = None

    @property
    def is_sound(self) -> bool:
        """Whether the newest update was kept: a state to save, and to go back to."""
        return self.in_a_row == 0

    @property
    def is_stuck(self) -> bool:
        """Whether the run has to go back."""
        return (self.in_a_row or 0) >= self._config.max_in_a_row

    @property
    def bad(self) -> list[int]:
        """The batches that it has to go back for."""
        return self.skipped[-self.in_a_row :] if self.is_stuck else []

    @property
    def state(self) -> dict:
        """Plain data for a checkpoint."""
        return {"skipped": self.skipped, "stepped_over": [self._over[batch] for batch in sorted(self._over)]}

    def is_over(self, batch: int) -> bool:
        """Whether the run passes it over."""
        return batch in self._over

    def without_update(self, step: int) -> frozenset[int]:
        """Batches before `step` that were skipped or passed over."""
        return frozenset(batch for batch in (*self.skipped, *self._over) if batch < step)

    def step_over(self, bad: Sequence[int], back_to: int, clips_at: Callable[[int], list[str]] | None) -> str:
        """Settles what is passed over, when a run is back at its last checkpoint -> what to say of it.

        Args:
            bad: batches that it went back for.   back_to: step of the checkpoint.
            clips_at: batch -> names of what is in it.
        Raises:
            BrokenRun: the run has been there too often.
        """
        what = f"step {bad[-1] + 1}: {len(bad)} bad updates in a row"
        most = self._config.max_rollbacks
        time = 1 + max((line["rollback"] for line in self._over.values() if line["back_to"] == back_to), default=0)
        if time > most:
            raise BrokenRun(f"{what}, after {most} times back to step {back_to}; the run stops, nothing broken is saved")
        batches = [n for n in (bad if time == 1 else range(back_to, bad[-1] + 1)) if n >= back_to and n not in self._over]
        for n in batches:
            clips = clips_at(n) if clips_at else []
            self._over[n] = {"batch": n, "back_to": back_to, "rollback": time, "clips": clips}
        if jax.process_index() == 0:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.state["stepped_over"])
            files.replace_file(self._path, text)
        numbers = ", ".join(map(str, batches))
        return f"{what}; back to step {back_to} (time {time} of at most {most}), passing over batches {numbers}: {self._path}"
