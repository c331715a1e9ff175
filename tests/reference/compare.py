"""Comparing with the PyTorch package: how near is near, and its random draws replaced by given ones."""

import contextlib
from unittest import mock

import numpy as np
import torch

from voxcpm2_jax import sequence
from voxcpm2_jax.bench import reference

BOUND = 1e-5
errors: list[float] = []  # of the test that runs; conftest.py collects the worst of each file


def close(ours, theirs) -> float:
    """Asserts the same shape and a relative error in norm of at most BOUND."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    ours = np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape
    errors.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
    assert errors[-1] <= BOUND, f"relative error {errors[-1]:.2e}"
    return errors[-1]


@contextlib.contextmanager
def sampler_noise(noise_MPC):
    """Inside, patch i of a generation starts from noise i."""
    noise = iter(torch.from_numpy(np.asarray(noise_MPC)).transpose(1, 2))

    def randn(shape, **_):
        z_1CP = next(noise)[None]
        assert tuple(shape) == tuple(z_1CP.shape)
        return z_1CP

    with mock.patch.object(torch, "randn", randn):
        yield


def reference_losses(model, clip: sequence.Sequence, draws_M) -> dict:
    """The PyTorch package's two mean losses of one clip; `draws_M` = (time, noise, drop) or with start, one entry a patch."""
    with reference.training_draws(*(reference.at_slots([clip], [x_M]) for x_M in draws_M)):
        return reference.losses(model, reference.pad([clip]))
