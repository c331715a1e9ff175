"""Schedules against values worked out by hand, AdamW against PyTorch's, the decay mask, averaged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from voxcpm2_jax import optim
from voxcpm2_jax.config import OptimConfig, UserError, from_dict


def curve(num_steps, steps, **fields):
    lr = optim.schedule(OptimConfig(**fields), num_steps)
    return np.array([lr(step) for step in steps])


def test_cosine():
    fields = {"learning_rate": 2.0, "warmup_steps": 4, "end_ratio": 0.1}
    np.testing.assert_allclose(curve(104, range(5), **fields), [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(curve(104, (54, 104, 1000), **fields), [2 * (0.1 + 0.9 / 2), 0.2, 0.2], rtol=1e-6)


def test_wsd_is_flat_until_its_decay():
    fields = {"learning_rate": 1.0, "warmup_steps": 10, "schedule": "wsd", "decay_fraction": 0.2, "end_ratio": 0.05}
    got = curve(100, (0, 9, 10, 50, 80, 90, 100, 101), **fields)
    np.testing.assert_allclose(got, [0.1, 1, 1, 1, 1, 0.05 + 0.95 / 2, 0.05, 0.05], rtol=1e-6)


def test_constant_and_a_schedule_of_its_own_length():
    np.testing.assert_allclose(curve(5, (0, 4, 99), learning_rate=1.0, warmup_steps=0, schedule="constant"), [1, 1, 1])
    fields = {"learning_rate": 1.0, "warmup_steps": 2, "schedule_steps": 50}
    np.testing.assert_array_equal(curve(10, range(60), **fields), curve(1000, range(60), **fields))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_run_shorter_than_its_warm_up(schedule):
    """A try of three steps with a config made for thousands only climbs."""
    got = curve(3, range(3), learning_rate=1.0, warmup_steps=1000, schedule=schedule, decay_fraction=0.0)
    np.testing.assert_allclose(got, [0.001, 0.002, 0.003], rtol=1e-6)


def test_schedule_is_float32_inside_jit():
    lr = jax.jit(optim.schedule(OptimConfig(), 10))(jnp.int32(3))
    assert lr.dtype == jnp.float32 and lr.shape == ()


def test_matrices_alone_decay():
    """Scanned layers stack norm scales to [L, D]: rank says nothing, the name does."""
    params = {
        "base_lm": {"embed": {"embedding": 0}, "layers": {"q": {"kernel": 0, "bias": 0}, "attn_norm": {"scale": 0}}},
        "feat_encoder": {"special_token": 0, "norm": {"scale": 0}},
    }
    assert optim.decay_mask(params) == {
        "base_lm": {
            "embed": {"embedding": True},
            "layers": {"q": {"kernel": True, "bias": False}, "attn_norm": {"scale": False}},
        },
        "feat_encoder": {"special_token": False, "norm": {"scale": False}},
    }


def test_adamw_equals_pytorch():
    """Clip, moments, bias correction, decay of the kernel alone, over steps with large and small gradients."""
    config = OptimConfig(learning_rate=0.01, warmup_steps=3, weight_decay=0.1, clip_norm=1.0, beta1=0.8, beta2=0.9)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
    grads = [{k: (rng.normal(size=v.shape) * 10.0 ** rng.integers(-2, 2)).astype(np.float32) for k, v in params.items()}
             for _ in range(6)]  # fmt: skip

    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
    groups = [{"params": [theirs["kernel"]], "weight_decay": 0.1}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    judge = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-8)
    lr = optim.schedule(config, 6)
    tx = optim.make(config, 6)
    state = tx.init(params)
    for step, grad in enumerate(grads):
        for k, p in theirs.items():
            p.grad = torch.tensor(grad[k])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        for group in judge.param_groups:
            group["lr"] = float(lr(step))
        judge.step()
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    for k, p in theirs.items():
        np.testing.assert_allclose(params[k], p.detach().numpy(), rtol=2e-6, atol=2e-7)


def test_ema_follows_the_weights():
    ema = optim.ema_update({"kernel": jnp.float32(1)}, {"kernel": jnp.bfloat16(3)}, 0.75)
    assert ema["kernel"] == 1.5 and ema["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [("schedule", "linear"), ("learning_rate", 0), ("beta2", 1.0), ("clip_norm", 0.0), ("ema_decay", 1.5), ("end_ratio", -1)],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(UserError, match=f"optim.{field}"):
        from_dict(OptimConfig, {field: value})
