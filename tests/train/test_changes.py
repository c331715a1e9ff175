"""Which fields of its config may differ between a checkpoint and the run that resumes from it."""

import dataclasses
import re
from functools import partial

import jax
import pytest

from voxcpm2_jax.checkpoint import arrays
from voxcpm2_jax.config.model import MODELS, AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import CHANGES, FREE, SCHEDULE, BackboneRun, BatchConfig, OptimConfig, VAERun
from voxcpm2_jax.train import backbone
from voxcpm2_jax.train.start import Start, check_changes, differences

TINY = BackboneRun(model=MODELS["tiny"], batch=BatchConfig(slots=128, patches=80))


def run_config(**changes):
    return to_dict(dataclasses.replace(TINY, **changes)) | {"data": {"codec_sha256": "a"}}


@pytest.mark.parametrize("is_branch", [False, True])
def test_changed_config(capsys, is_branch):
    old = run_config()
    new = run_config(seed=1, num_steps=7, mesh=(2, 2, 2)) | {"data": {"codec_sha256": "b"}, "added": 3}
    new["optim"]["learning_rate"], new["optim"]["beta1"], new["batch"]["rows"] = 1.0, 0.5, 4
    changed = {"seed", "num_steps", "mesh", "data.codec_sha256", "added", "optim.learning_rate", "optim.beta1", "batch.rows"}
    assert {field for field, _ in differences(old, new)} == changed
    check = {"step": 5, "old": old, "new": new, "is_branch": is_branch}
    with pytest.raises(UserError) as error:
        check_changes("CKPT", start=Start(rules=CHANGES), **check)
    refused = {"seed", "data.codec_sha256", "optim.beta1", "batch.rows"} | (
        {"optim.learning_rate"} - {"optim.learning_rate" * is_branch}
    )
    for field in changed:
        assert (f"{field}: " in str(error.value)) == (field in refused)
    assert "seed: 0 -> 1 (order of the data, noise of every update)" in str(error.value)
    assert "add --accept-config-changes" in str(error.value) and capsys.readouterr().err == ""
    check_changes("CKPT", start=Start(rules=CHANGES, accept_changes=True), **check)
    said = capsys.readouterr().err
    assert all(f"checkpoint's: {field}: " in said for field in changed) and "added: (none) -> 3" in said
    check_changes("CKPT", start=Start(), **check)


@pytest.mark.parametrize("accept_changes", [False, True])
@pytest.mark.parametrize(
    "path, value",
    [("guard.window", 64), ("optim.mu_dtype", "bfloat16"), ("optim.optimizer", "muon"), ("optim.ema_decay", 0.9)],
)
def test_changes_of_the_saved_arrays_are_refused_even_if_accepted(path, value, accept_changes):
    """Restoring would fail anyway, so the message offers no flag. Each of these fields does change the arrays."""
    group, name = path.split(".")
    changed = dataclasses.replace(TINY, **{group: dataclasses.replace(getattr(TINY, group), **{name: value})})
    shapes = [jax.tree.leaves(jax.eval_shape(partial(backbone.init_state, run))) for run in (TINY, changed)]
    assert [(x.shape, x.dtype) for x in shapes[0]] != [(x.shape, x.dtype) for x in shapes[1]]
    start = Start(rules=CHANGES, accept_changes=accept_changes)
    for old, new in ((TINY, changed), (changed, TINY)):
        with pytest.raises(UserError, match=f"{path}: .* set it back, or start in a new workdir$"):
            check_changes("CKPT", 5, to_dict(old), to_dict(new), start, is_branch=True)


def test_a_decay_may_change_if_accepted():
    runs = [to_dict(dataclasses.replace(TINY, optim=OptimConfig(ema_decay=decay))) for decay in (0.9, 0.99)]
    with pytest.raises(UserError, match="or add --accept-config-changes"):
        check_changes("CKPT", 5, *runs, Start(rules=CHANGES), is_branch=False)
    check_changes("CKPT", 5, *runs, Start(rules=CHANGES, accept_changes=True), is_branch=False)


def length(num_steps, **optim):
    return to_dict(dataclasses.replace(TINY, num_steps=num_steps, optim=OptimConfig(warmup_steps=10, **optim)))


@pytest.mark.parametrize(
    ("optim", "step", "rates"),
    [
        ({}, 100, "5e-06 -> 5.64e-05"),  # a cosine at its end would rise to half of its peak
        ({"schedule": "wsd", "decay_steps": 20}, 90, "5.25e-05 -> 0.0001"),  # amid the decay
        ({"schedule": "wsd", "decay_steps": 20}, 80, None),  # the trunk may become longer
        ({"schedule_steps": 100}, 100, None),
        ({"schedule": "constant"}, 100, None),
    ],
)
def test_a_longer_run_must_not_change_the_present_learning_rate(capsys, optim, step, rates):
    runs = length(100, **optim), length(200, **optim)
    start = Start(rules=CHANGES)
    if rates is not None:
        with pytest.raises(UserError, match=f"learning rate of update {step}: {rates} .*optim.schedule_steps"):
            check_changes("CKPT", step, *runs, start, is_branch=False)
        start = dataclasses.replace(start, accept_changes=True)
    check_changes("CKPT", step, *runs, start, is_branch=False)
    check_changes("CKPT", step, *runs, Start(rules=CHANGES), is_branch=True)
    said = capsys.readouterr().err
    assert said.count("num_steps: 100 -> 200") == 2 and said.count(f"learning rate of update {step}") == 2 * (rates is not None)


def test_every_field_of_a_run_has_a_rule():
    """A new field needs a rule that says whether it may change under a checkpoint."""
    for run in (TINY, VAERun(vae=AudioVAEConfig())):
        flat = arrays.flatten(dataclasses.asdict(run))
        for field in {path.replace("/", ".") for path in flat} | set(vars(run)):
            assert any(re.match(pattern, field) for pattern, *_ in CHANGES), field
    kinds = {field: kind for field in ("num_steps", "optim.schedule") for p, kind, _ in CHANGES if re.match(p, field)}
    assert kinds["num_steps"] == FREE and SCHEDULE in {kind for _, kind, _ in CHANGES}
