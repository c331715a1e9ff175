"""The checkpoints of a run that a branch can start from (`voxcpm2-jax checkpoints`).

A branch is a run with --resume-from=WORKDIR/checkpoints/STEP. It usually starts where the learning rate still is at its peak,
and ends in a decay of its own.
"""

import pathlib

from voxcpm2_jax import optim
from voxcpm2_jax.checkpoint.steps import complete_steps, read_meta
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.run import CheckpointConfig, OptimConfig

WARM_UP, STABLE, DECAY = "warm-up", "stable", "decay"


def branch_points(workdir) -> list[dict]:
    """The complete checkpoints of a run, oldest first, as plain data.

    Returns:
        of each: "step"; "phase" of the schedule and "learning_rate" of the next update; "hours" of audio trained on so far
        (None for a codec); "kept": "always", or "newest" if a later checkpoint will replace it (the one with the best held-out
        figure stays all the same); "path", the value of --resume-from.
    Raises:
        UserError: not the workdir of a run, or one that another version of this package wrote.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    steps = sorted(complete_steps(directory))
    if not steps:
        raise UserError(f"{workdir}: no complete checkpoint in {directory}; expected the workdir of a run that has saved one")
    return [_point(directory / str(step)) for step in steps]


def _point(path: pathlib.Path) -> dict:
    meta = read_meta(path)
    config, step = meta["config"], meta["step"]
    if "optim" not in config:
        raise UserError(f"{path}: holds weights alone (import-torch wrote it); start from it with --init-params={path}")
    schedule, keeping = from_dict(OptimConfig, config["optim"]), from_dict(CheckpointConfig, config["checkpoint"])
    rate = float(optim.schedule(schedule, config["num_steps"])(step))
    below = WARM_UP if step < schedule.warmup_steps else DECAY
    counts = [count["hours"] for count in meta["data"].values()]
    return {
        "step": step,
        "phase": STABLE if rate >= schedule.learning_rate * (1 - 1e-6) else below,
        "learning_rate": rate,
        "hours": round(sum(counts), 3) if counts else None,
        "kept": "always" if keeping.keep_every_steps and step % keeping.keep_every_steps == 0 else "newest",
        "path": str(path),
    }
