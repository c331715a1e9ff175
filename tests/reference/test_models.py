"""Every module of the backbone against its live counterpart, float32, 1e-5 relative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.reference.compare import close
from voxcpm2_jax.models import flow
from voxcpm2_jax.models.attention import causal_mask
from voxcpm2_jax.models.local import time_embedding
from voxcpm2_jax.models.voxcpm2 import VoxCPM2


def call(pair, function, *args, jitted=True):
    """Runs `function(module, *args)` on our model with the pair's parameters."""

    def run(params, *args):
        return VoxCPM2(pair.loaded.config).apply({"params": params}, *args, method=function)

    return (jax.jit(run) if jitted else run)(pair.loaded.params, *args)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", ["base_lm", "residual_lm"])
def test_language_model(pair, name):
    width = pair.loaded.config.tslm.width
    x_BTD = normal(2, 17, width)
    with torch.no_grad():
        theirs, _ = getattr(pair.torch_model, name)(inputs_embeds=torch.from_numpy(x_BTD), is_causal=True)
    position_BT = np.tile(np.arange(17), (2, 1))
    mask_BTS = causal_mask(jnp.ones((2, 17), jnp.int32))
    ours, _ = call(pair, lambda m, x: getattr(m, name)(x, position_BT, mask_BTS), x_BTD)
    close(ours, theirs)


def test_late_positions(pair):
    """LongRoPE at the end of the table, where angles are largest."""
    T = pair.loaded.config.lm_config.max_position_embeddings
    x_BTD = normal(1, T, pair.loaded.config.tslm.width)
    with torch.no_grad():
        theirs, _ = pair.torch_model.base_lm(inputs_embeds=torch.from_numpy(x_BTD), is_causal=True)
    mask_BTS = causal_mask(jnp.ones((1, T), jnp.int32))
    ours, _ = call(pair, lambda m, x: m.base_lm(x, np.arange(T)[None], mask_BTS), x_BTD)
    close(ours[:, -8:], theirs[:, -8:])


def test_local_encoder(pair):
    c = pair.loaded.config
    x_RPC = normal(9, c.patch_size, c.feat_dim)
    with torch.no_grad():
        theirs = pair.torch_model.enc_to_lm_proj(pair.torch_model.feat_encoder(torch.from_numpy(x_RPC)[None]))[0]
    close(call(pair, lambda m, x: m.encode_patches(x), x_RPC), theirs)


def test_local_diffusion_transformer(pair):
    c = pair.loaded.config
    R, width = 7, c.locdit.width
    x, cond = normal(R, c.patch_size, c.feat_dim, seed=1), normal(R, c.patch_size, c.feat_dim, seed=2)
    prefix, t = normal(R, 2, width, seed=3), np.linspace(0, 1, R, dtype=np.float32)
    dt = (t * 0.3).astype(np.float32)
    estimator = pair.torch_model.feat_decoder.estimator
    with torch.no_grad():
        theirs = estimator(
            torch.from_numpy(x).transpose(1, 2), torch.from_numpy(prefix).reshape(R, -1), torch.from_numpy(t),
            torch.from_numpy(cond).transpose(1, 2), torch.from_numpy(dt),
        ).transpose(1, 2)  # fmt: skip
    close(call(pair, lambda m, *a: m.velocity(*a), x, prefix, cond, t, dt), theirs)


def test_time_embedding(pair):
    width = pair.loaded.config.locdit.width
    t_R = np.linspace(0, 1, 33, dtype=np.float32)
    close(time_embedding(t_R, width), pair.torch_model.feat_decoder.estimator.time_embeddings(torch.from_numpy(t_R)))


def test_quantiser(pair):
    x_RD = normal(40, pair.loaded.config.tslm.width)
    layer = pair.torch_model.fsq_layer
    with torch.no_grad():
        x = torch.from_numpy(x_RD)
        z = torch.tanh(layer.in_proj(x)) * layer.scale
        clear = ((z - z.floor() - 0.5).abs() > 1e-4).all(dim=-1)  # a tie may fall to either side
        theirs = layer(x)[clear]
    assert clear.sum() > 20
    close(call(pair, lambda m, x: m.fsq_layer(x), x_RD[clear.numpy()]), theirs)


def test_stop_head(pair):
    x_RD = normal(5, pair.loaded.config.tslm.width)
    model = pair.torch_model
    with torch.no_grad():
        theirs = model.stop_head(model.stop_actn(model.stop_proj(torch.from_numpy(x_RD))))
    close(call(pair, lambda m, x: m.stop_logits(x), x_RD), theirs)


@pytest.mark.parametrize(("num_steps", "cfg_value"), [(10, 2.0), (4, 3.0), (30, 1.0), (60, 1.5)])
def test_sampler(pair, num_steps, cfg_value):
    c = pair.loaded.config
    noise, cond = normal(3, c.patch_size, c.feat_dim, seed=5), normal(3, c.patch_size, c.feat_dim, seed=6)
    prefix = normal(3, 2, c.locdit.width, seed=7)
    decoder = pair.torch_model.feat_decoder
    grid = torch.linspace(1, 0, num_steps + 1)
    grid = grid + (torch.cos(torch.pi / 2 * grid) - 1 + grid)
    with torch.no_grad():
        theirs = decoder.solve_euler(
            torch.from_numpy(noise).transpose(1, 2), grid, torch.from_numpy(prefix).reshape(3, -1),
            torch.from_numpy(cond).transpose(1, 2), cfg_value,
        ).transpose(1, 2)  # fmt: skip

    def sample(m, noise):
        def velocities(x, t, dt):
            return m.velocity(x, prefix, cond, t, dt), m.velocity(x, np.zeros_like(prefix), cond, t, dt)

        return flow.sample(velocities, noise, num_steps=num_steps, cfg_value=cfg_value)

    # The sampler's scan over a bound module: parameters are constants here.
    close(call(pair, sample, noise, jitted=False), theirs)
