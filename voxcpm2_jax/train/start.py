"""Where a run starts: its own checkpoint, another run's, or a fresh state; and which fields of its config may have changed."""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import jax

from voxcpm2_jax import optim
from voxcpm2_jax.checkpoint.arrays import restore
from voxcpm2_jax.checkpoint.integrity import CHECKSUMS_FILE, damaged, find_damage
from voxcpm2_jax.checkpoint.manager import Checkpoints
from voxcpm2_jax.checkpoint.steps import read_meta, step_directory
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.run import FIXED, FREE, SCHEDULE, SHAPE, OptimConfig
from voxcpm2_jax.processes import all_agree, from_first, say
from voxcpm2_jax.workdir import TRAINING, kind


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run without a checkpoint of its own starts, and which fields of its config may differ from a checkpoint's.

    Args:
        resume_from: another run's workdir or one step of it. Its whole state is loaded; nothing is written there.
        fresh: describes the state that is used without a checkpoint, for the message.
        rules: as CHANGES in config/run.py; by default every field may differ.
        accept_changes: every field may differ, except those that decide the shapes of the saved arrays.
    """

    resume_from: str | os.PathLike | None = None
    fresh: str = "scratch"
    rules: Sequence[tuple[str, str, str]] = (("", FREE, ""),)
    accept_changes: bool = False


def begin(checkpoints: Checkpoints, state, config: dict, start: Start):
    """The state to start from, with the layout of `state`, and the checkpoint's meta ({} without a checkpoint).

    The run's own newest undamaged checkpoint comes first, then `start.resume_from`, then `state` itself; one line on
    standard error says which. If there is a checkpoint, the arrays of `state` are deleted, and ShapeDtypeStructs are enough.

    Raises:
        UserError: all checkpoints are damaged, the arrays differ, or the config differs in fields that must not: all
            differences are named.
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
    check_changes(path, old["step"], old["config"], config, start, is_branch)
    layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, state)
    restored = restore(path, layout)
    checkpoints.open()
    unchecked = "" if (path / CHECKSUMS_FILE).is_file() else ", not verified: an earlier version saved it without checksums"
    say(f"starting from step {old['step']} of {path.parent.parent} ({how}){unchecked}")
    return restored


def _whole_step(path) -> pathlib.Path:
    """The step that a path names, after verifying its files. Each process reads its share of them."""
    if kind(path) != TRAINING:
        raise UserError(f"--resume-from={path}: released weights without training state; expected a workdir or one step of it")
    step = pathlib.Path(from_first(str(step_directory(path))))
    problem = find_damage(step, share=(jax.process_index(), jax.process_count()))
    if not all_agree(not problem):
        raise damaged(step, problem or "see the message of another process of this run")
    return step


def check_changes(path, step: int, old: dict, new: dict, start: Start, is_branch: bool) -> None:
    """Names every field that differs, and a jump of the learning rate at this step; raises if some must not differ."""
    refused, accepted, is_final = [], [], False
    found = sorted(differences(old, json.loads(json.dumps(new))))
    rates = [_rate(config, step) for config in (old, new)]
    if None not in rates and not math.isclose(*rates, rel_tol=1e-6):
        found.append((f"learning rate of update {step}", f"{rates[0]:.3g} -> {rates[1]:.3g}"))
    for field, change in found:
        line = f"{field}: {change}"
        rule, why = next(((rule, why) for pattern, rule, why in start.rules if re.match(pattern, line)), (FIXED, "no rule"))
        is_new = change.startswith(_ABSENT) or change.endswith(_ABSENT)  # a field that only one of the two versions has
        is_accepted = start.accept_changes and rule != SHAPE
        if rule == FREE or is_new or (is_branch and rule == SCHEDULE) or is_accepted:
            accepted.append(line)
        else:
            refused.append(f"{line} ({why})")
            is_final |= rule == SHAPE
    if refused:
        ways = "set it back, or start in a new workdir"
        ways = ways if is_final else "set it back, start in a new workdir, or add --accept-config-changes"
        raise UserError(
            f"{path}: the config differs from the checkpoint's in fields its state depends on: {'; '.join(refused)}; {ways}"
        )
    for line in accepted:
        say(f"config differs from the checkpoint's: {line}")


def _rate(config: dict, step: int) -> float | None:
    """The learning rate of an update by a run's config; None if this version does not know its schedule."""
    try:
        return float(optim.schedule(from_dict(OptimConfig, config["optim"]), config["num_steps"])(step))
    except (KeyError, UserError):
        return None


_ABSENT = "(none)"


def differences(old, new, where="") -> Iterator[tuple[str, str]]:
    """(path of a field, "old -> new") wherever two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            inner = f"{where}.{key}" if where else key
            if key in old and key in new:
                yield from differences(old[key], new[key], inner)
            else:
                one, other = (f"{side[key]!r:.80}" if key in side else _ABSENT for side in (old, new))
                yield inner, f"{one} -> {other}"
    elif old != new:
        yield where, f"{old!r:.80} -> {new!r:.80}"
