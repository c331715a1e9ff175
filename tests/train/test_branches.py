"""What a branch can start from, and that the steps that the guides start from are kept."""

import dataclasses
import pathlib
import re
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from voxcpm2_jax.checkpoint.manager import Checkpoints
from voxcpm2_jax.cli import main
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict
from voxcpm2_jax.config.run import BackboneRun, BatchConfig, CheckpointConfig, OptimConfig
from voxcpm2_jax.train.branches import branch_points

ROOT = pathlib.Path(__file__).parents[2]
RUN = BackboneRun(
    model=MODELS["tiny"],
    num_steps=20,
    batch=BatchConfig(slots=128, patches=80),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=6, schedule="wsd", decay_steps=6),
    checkpoint=CheckpointConfig(every_steps=2, keep=2, keep_every_steps=4),
)


@dataclasses.dataclass
class State:
    step: jnp.ndarray


def save(workdir, run, steps):
    kept = run.checkpoint
    checkpoints = Checkpoints(workdir, kept.keep, kept.every_steps, keep_every_steps=kept.keep_every_steps)
    for step in steps:
        meta = {"config": to_dict(run), "data": {"a/en/zero-shot": {"clips": step, "hours": step / 2}}}
        checkpoints.save(step, State(jnp.asarray(step)), meta)
    checkpoints.wait()
    checkpoints.close()


def test_branch_points_are_the_steps_that_are_kept(tmp_path, capsys):
    save(tmp_path, RUN, range(2, 19, 2))
    points = [SimpleNamespace(**point) for point in branch_points(tmp_path)]
    assert [(p.step, p.phase, p.kept) for p in points] == [
        (4, "warm-up", "always"), (8, "stable", "always"), (12, "stable", "always"), (16, "decay", "always"),
        (18, "decay", "newest"),
    ]  # fmt: skip
    assert [p.learning_rate for p in points[1:4]] == pytest.approx([1e-3, 1e-3, 1e-3 * (0.05 + 0.95 * 4 / 6)])
    assert points[1].hours == 4 and points[1].path == str(tmp_path / "checkpoints" / "8")
    assert main.main(["checkpoints", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert '"step": 8, "phase": "stable"' in out and "--resume-from" in err


def test_only_the_workdir_of_a_run_has_branch_points(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        branch_points(tmp_path)


def test_the_steps_that_the_guide_branches_from_are_kept():
    """configs/README.md names a step of a trunk of `2b`; by the end of the trunk it must still be there."""
    text = (ROOT / "configs" / "README.md").read_text()
    named = [int(step) for step in re.findall(r"--resume-from=TRUNK/checkpoints/(\d+)", text)]
    run = from_dict(BackboneRun, load_config("configs/backbone.py:2b"))
    starts = [stage.first_step for stage in run.stages if stage.first_step]
    assert len(named) == 1 and len(starts) == 4
    assert [step for step in named + starts if step % run.checkpoint.keep_every_steps] == []
    small = from_dict(BackboneRun, load_config("configs/backbone.py:small"))
    assert small.checkpoint.keep_every_steps == 10_000 and "`small` every 10,000th" in text
    assert run.checkpoint.keep_every_steps == 20_000 and "`2b` keeps every 20,000th" in text
