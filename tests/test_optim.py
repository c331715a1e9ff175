"""Schedules against values worked out by hand, AdamW against PyTorch's, Muon against the SVD, what each parameter goes by."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from voxcpm2_jax import optim
from voxcpm2_jax.checkpoint.arrays import flatten
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.run import BackboneRun, OptimConfig
from voxcpm2_jax.vae import autoencoder


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


def test_a_branch_decays_from_its_own_start():
    """The trunk's own decay lies at its end; until the branch leaves it, the two have the same rates to the last bit."""
    fields = {"learning_rate": 1.0, "warmup_steps": 10, "schedule": "wsd", "end_ratio": 0.05}
    branch = fields | {"decay_start": 50, "decay_steps": 20}
    got = curve(70, (0, 9, 49, 50, 55, 60, 70, 71), **branch)
    np.testing.assert_allclose(got, [0.1, 1, 1, 1, 0.05 + 0.95 * 0.75, 0.05 + 0.95 / 2, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_array_equal(curve(70, range(51), **branch), curve(1000, range(51), **fields))
    at_the_end = curve(100, (80, 85, 90, 100), **fields, decay_steps=20)
    np.testing.assert_allclose(at_the_end, [1, 0.05 + 0.95 * 0.75, 0.05 + 0.95 / 2, 0.05], rtol=1e-6)


def test_stages_of_2b_are_parts_of_one_run():
    """Each goes on where the one before ends, by the same curriculum and rates; the last one decays."""
    whole, *stages = (
        from_dict(BackboneRun, load_config(f"configs/backbone.py:2b{stage}")) for stage in ("", "_stage1", "_stage2", "_stage3")
    )
    ends = [stage.num_steps for stage in stages]
    assert ends == sorted(set(ends)) and ends[-1] == whole.num_steps
    assert set(ends[:-1]) < {stage.first_step for stage in whole.stages}
    for stage, end in zip(stages, ends):
        assert dataclasses.replace(stage, num_steps=whole.num_steps) == whole
        steps = (0, 1999, end - 1)
        np.testing.assert_array_equal(*(curve(run.num_steps, steps, **vars(run.optim)) for run in (stage, whole)))
    np.testing.assert_allclose(curve(ends[-1], ends, **vars(whole.optim)), [1e-4, 1e-4, 5e-6], rtol=1e-6)


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


# ---- what each parameter goes by -------------------------------------------------------------------------------------


def by_value(tree):
    """{value: the last two parts of the paths that have it}, layers marked."""
    found = {}
    for path, value in jax.tree.leaves_with_path(tree):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        found.setdefault(value, set()).add(re.sub(r".*/layers/", "layers/", path))
    return found


def test_matrices_alone_decay(tiny_params):
    """Scanned layers stack norm scales to [L, D]: rank says nothing, the name does."""
    found = by_value(optim.decay_mask(tiny_params))
    names = {decays: {path.split("/")[-1] for path in paths} for decays, paths in found.items()}
    assert names == {True: {"kernel", "embedding"}, False: {"scale", "bias", "special_token"}}
    assert {"layers/attn_norm/scale", "layers/mlp_norm/scale", "base_lm/norm/scale"} <= found[False]


def test_codec_decays_by_the_same_names():
    vae = AudioVAEConfig(encoder_dim=2, encoder_rates=(20, 32), latent_dim=16, decoder_dim=16, decoder_rates=(48, 40))
    params = jax.eval_shape(lambda key: autoencoder.init(key, vae), jax.random.key(0))
    found = by_value(optim.decay_mask(params))
    names = {decays: {path.split("/")[-1] for path in paths} for decays, paths in found.items()}
    assert names == {True: {"kernel"}, False: {"gain", "bias", "alpha", "scale"}}


def test_muon_takes_the_matrices_of_the_layers_alone(tiny_params):
    found = by_value(optim.methods(tiny_params))
    assert found["muon"] == {f"layers/{name}/kernel" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {"base_lm/embed/embedding", "stop_head/kernel", "feat_decoder/in_proj/kernel", "layers/attn_norm/scale"} <= found[
        "adamw"
    ]


# ---- updates ---------------------------------------------------------------------------------------------------------


def test_learning_rate_follows_the_step_and_no_counter():
    """An update that is passed over leaves the optimiser's state as it was, and the next one still has its own rate."""
    config = OptimConfig(warmup_steps=10, weight_decay=0.0)
    tx = optim.make(config, 100)
    params, grads = {"bias": jnp.zeros(2)}, {"bias": jnp.array([0.1, -0.2])}
    moves = [tx.update(grads, tx.init(params), params, step=jnp.int32(step))[0]["bias"] for step in (0, 6)]
    np.testing.assert_allclose(moves[1], 7 * moves[0], rtol=1e-6)
    assert not any("learning" in path or "schedule" in path for path in flatten(tx.init(params)))


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
        updates, state = tx.update(grad, state, params, step=step)
        params = optax.apply_updates(params, updates)
    for k, p in theirs.items():
        np.testing.assert_allclose(params[k], p.detach().numpy(), rtol=2e-6, atol=2e-7)


def test_orthogonalize():
    """The directions are those of the SVD; singular values, and the RMS of an update, are those of the docstring."""
    rng = np.random.default_rng(0)
    spread, rms = [], []
    for rows, columns in [(24, 40), (64, 16), (128, 128)]:
        u, _, v = np.linalg.svd(rng.normal(size=(4, rows, columns)), full_matrices=False)
        values = np.stack([np.logspace(0, -decades, u.shape[-1]) for decades in (1, 2, 3, 4)])
        x_LIO = ((u * values[:, None]) @ v).astype(np.float32)
        update = np.asarray(jax.jit(partial(optim._muon_direction, num_inputs=1))(x_LIO))
        got = update / (0.2 * max(rows, columns) ** 0.5)
        assert update.dtype == np.float32
        assert all(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.97 for a, b in zip(got[:2], (u @ v)[:2]))
        spread.append(np.linalg.svd(got, compute_uv=False))
        rms.append(np.sqrt(np.mean(update**2, axis=(1, 2)))[:, None])
    measured = {
        name: np.stack([np.min(table, axis=1), np.max(table, axis=1)], axis=1)
        for name, table in (("singular values", np.hstack(spread)), ("RMS of an update", np.hstack(rms)))
    }
    for name, table in measured.items():
        (line,) = [line for line in optim.orthogonalize.__doc__.splitlines() if line.strip().startswith(f"{name}  ")]
        told = np.array(re.findall(r"([\d.]+) \.\. ([\d.]+)", line), float)
        np.testing.assert_allclose(table, told, atol=0.011, err_msg=name)


def test_muon_moves_every_matrix_alike():
    """Each layer's matrix by itself, heads together, with AdamW's learning rate and decay; the rest goes by AdamW."""
    config = OptimConfig(optimizer="muon", learning_rate=0.5, warmup_steps=0, schedule="constant", weight_decay=0.1)
    rng = np.random.default_rng(0)
    shapes = {"q": (3, 16, 4, 6), "o": (3, 4, 6, 16), "down": (3, 40, 16), "attn_norm": (3, 16)}
    params = {"layers": {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}}
    params["layers"]["attn_norm"] = {"scale": params["layers"]["attn_norm"]["kernel"]}
    grads = jax.tree.map(lambda x: (x + rng.normal(size=x.shape)).astype(np.float32), params)
    for name in ("q", "o", "down"):
        grads["layers"][name]["kernel"][1] *= 1e-4  # a layer of small gradients moves as far as the others
    tx = optim.make(config, 10)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, step=jnp.int32(0))
    decayed = jax.tree.map(lambda u, p: np.asarray(u / -0.5 - 0.1 * p), updates, params)["layers"]
    for name, rows in (("q", 16), ("o", 24), ("down", 40)):
        for layer in decayed[name]["kernel"]:
            found = np.linalg.svd(layer.reshape(rows, -1), compute_uv=False) / (0.2 * max(layer.reshape(rows, -1).shape) ** 0.5)
            assert min(found.ravel()) > 0.6 and max(found.ravel()) < 1.3, (name, found)
            assert 0.16 < np.sqrt(np.mean(layer**2)) < 0.19
    scale, grad = updates["layers"]["attn_norm"]["scale"], grads["layers"]["attn_norm"]["scale"]
    np.testing.assert_allclose(scale, -0.5 * np.sign(grad), rtol=1e-4)
    paths = flatten(state)
    assert (
        sum(path.endswith("q/kernel") for path in paths) == 1 and sum(path.endswith("attn_norm/scale") for path in paths) == 2
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_first_moments_in_bfloat16(optimizer):
    """Half the bytes of a moment, and nearly the same steps."""
    rng = np.random.default_rng(0)
    params = {"layers": {"up": {"kernel": rng.normal(size=(2, 8, 12)).astype(np.float32)}}, "bias": np.zeros(5, np.float32)}
    grads = [jax.tree.map(lambda x: rng.normal(0.3, 1, x.shape).astype(np.float32), params) for _ in range(5)]
    moved = {}
    for mu_dtype in ("float32", "bfloat16"):
        tx = optim.make(OptimConfig(optimizer=optimizer, mu_dtype=mu_dtype, warmup_steps=0, learning_rate=1.0), 100)
        state, update = tx.init(params), jax.jit(tx.update)
        for step, grad in enumerate(grads):
            moved[mu_dtype], state = update(grad, state, params, step=jnp.int32(step))
        for moment, dtype in (("mu/", mu_dtype), ("nu/", "float32")):
            assert {leaf.dtype.name for path, leaf in flatten(state).items() if moment in path} == {dtype}
    for a, b in zip(*map(jax.tree.leaves, moved.values())):
        assert 0 < np.linalg.norm(a - b) < 0.06 * np.linalg.norm(a)


def test_ema_follows_the_weights():
    ema = optim.ema_update({"kernel": jnp.float32(1)}, {"kernel": jnp.bfloat16(3)}, 0.75)
    assert ema["kernel"] == 1.5 and ema["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "linear"),
        ("learning_rate", 0),
        ("beta2", 1.0),
        ("clip_norm", 0.0),
        ("ema_decay", 1.5),
        ("end_ratio", -1),
        ("optimizer", "sgd"),
        ("mu_dtype", "float16"),
        ("muon_beta", 1.0),
        ("decay_steps", 5),
        ("decay_start", 2000),
    ],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(UserError, match=f"optim.{field}"):
        from_dict(OptimConfig, {field: value})


@pytest.mark.parametrize(("field", "value"), [("decay_steps", 0), ("decay_start", 999)])
def test_a_branch_has_a_decay_after_the_warm_up(field, value):
    with pytest.raises(UserError, match=f"optim.{field}"):
        from_dict(OptimConfig, {"schedule": "wsd", field: value})
