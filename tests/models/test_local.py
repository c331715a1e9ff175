"""The local stacks: bidirectional inside a patch, blind to other patches, and slots in the order that the docstring gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.models.local import LocDiT, LocEnc, time_embedding

CONFIG = MODELS["tiny"]
P, C, D = CONFIG.patch_size, CONFIG.feat_dim, CONFIG.locdit.width
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def encode(tiny_params):
    return jax.jit(lambda x_RPC: LocEnc(CONFIG.locenc).apply({"params": tiny_params["feat_encoder"]}, x_RPC))


@pytest.fixture(scope="module")
def velocity(tiny_params):
    return jax.jit(lambda *inputs: LocDiT(CONFIG.locdit).apply({"params": tiny_params["feat_decoder"]}, *inputs))


@pytest.fixture(scope="module")
def inputs():
    """x_RPC, prefix_R2D, cond_RPC, t_R, dt_R of three patches."""
    return normal(3, P, C), normal(3, 2, D), normal(3, P, C), np.float32([0.1, 0.5, 0.9]), np.zeros(3, np.float32)


def changed(array, row, frame):
    new = array.copy()
    new[row, frame] += 1.0
    return new


def moved(before, after):
    """Which entries along the first dims differ, beyond rounding."""
    return np.abs(np.asarray(before) - np.asarray(after)).max(axis=-1) > 1e-5


def test_the_encoder_sees_every_frame_of_its_patch_and_no_other_patch(encode):
    x_RPC = normal(3, P, C)
    before_RD = encode(x_RPC)
    assert before_RD.shape == (3, CONFIG.locenc.width)
    for frame in range(P):
        np.testing.assert_array_equal(moved(before_RD, encode(changed(x_RPC, 1, frame))), [False, True, False])


def test_the_encoder_tells_the_order_of_frames(encode):
    x_RPC = normal(1, P, C)
    assert moved(encode(x_RPC), encode(x_RPC[:, ::-1])).all(), "positions inside a patch count"


@pytest.mark.parametrize("argument", range(3), ids=["noisy patch", "prefix", "previous patch"])
def test_every_input_reaches_every_frame_of_its_patch_and_no_other_patch(velocity, inputs, argument):
    """A later frame changes the velocity of the first one: attention is bidirectional."""
    before_RPC = velocity(*inputs)
    assert before_RPC.shape == (3, P, C) and before_RPC.dtype == jnp.float32
    for place in range(inputs[argument].shape[1]):
        after_RPC = velocity(*(changed(x, 1, place) if i == argument else x for i, x in enumerate(inputs)))
        np.testing.assert_array_equal(moved(before_RPC, after_RPC), [[False] * P, [True] * P, [False] * P])


@pytest.mark.parametrize("argument", [3, 4], ids=["time", "step"])
def test_time_and_the_length_of_the_step_have_an_effect_of_their_own(velocity, inputs, argument):
    later = [x.copy() for x in inputs]
    later[argument][1] += 0.25
    np.testing.assert_array_equal(moved(velocity(*inputs), velocity(*later)), [[False] * P, [True] * P, [False] * P])


def test_the_velocity_is_read_from_the_noisy_frames_and_not_from_the_previous_patch(velocity, inputs):
    x_RPC, prefix_R2D, cond_RPC, t_R, dt_R = inputs
    swapped = velocity(cond_RPC, prefix_R2D, x_RPC, t_R, dt_R)
    assert moved(velocity(*inputs), swapped).all()


def test_a_fresh_decoder_predicts_no_velocity():
    x_RPC, t_R = jnp.ones((2, P, C)), jnp.full(2, 0.5)
    arguments = x_RPC, jnp.ones((2, 2, D)), x_RPC, t_R, jnp.zeros(2)
    v_RPC, _ = jax.jit(LocDiT(CONFIG.locdit).init_with_output)(jax.random.key(0), *arguments)
    assert not np.asarray(v_RPC).any()


def test_time_embedding_against_the_formula():
    t_R, width = np.float32([0.0, 0.3, 1.0]), 8
    frequency = 10000.0 ** (-np.arange(4) / 3)
    angle = 1000.0 * t_R[:, None] * frequency
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    np.testing.assert_allclose(time_embedding(jnp.asarray(t_R), width), expected, atol=2e-4)
