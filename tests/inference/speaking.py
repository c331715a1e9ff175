"""Settings and checks that the tests of this folder share."""

import numpy as np

from voxcpm2_jax.inference.api import VoxCPM

PATCH_SAMPLES = 7680  # at 48 kHz
# Most tests speak with these settings, so that few programs are compiled.
QUICK = {"inference_timesteps": 2, "max_len": 6, "retry_badcase": False}


def with_stop_head(tiny_parts, *, stops: bool) -> VoxCPM:
    """The voice of `tiny_parts` with a stop head that says the same at every patch."""
    config, params, *rest = tiny_parts
    width = config.tslm.width
    stop = {
        "stop_proj": {"kernel": np.zeros((width, width), np.float32), "bias": np.full(width, 5.0, np.float32)},
        "stop_head": {"kernel": np.tile(np.array([not stops, stops], np.float32), (width, 1))},
    }
    return VoxCPM.from_parts(config, params | stop, *rest)


def assert_same_audio(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
