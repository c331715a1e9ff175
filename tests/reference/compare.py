"""Judging against the reference: how near is near, and its random draws replaced by given ones."""

import contextlib
from unittest import mock

import numpy as np
import torch
from voxcpm.modules.locdit import unified_cfm

from voxcpm2_jax import sequence

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
def training_draws(time_T, noise_TPC, drop_T, start_T=None):
    """Inside, `compute_loss` over T slots takes these times, this noise and this guidance dropout."""
    time_T, drop_T = torch.from_numpy(np.asarray(time_T)), torch.from_numpy(np.asarray(drop_T))
    start_T = time_T if start_T is None else torch.from_numpy(np.asarray(start_T))
    noise_TCP = torch.from_numpy(np.asarray(noise_TPC)).transpose(1, 2)
    # compute_loss draws: rand for the dropout (kept if above the rate), rand and randn_like for noise on the condition
    # (its scale is zero), then randn_like for the flow's noise.
    uniforms = iter([torch.where(drop_T, 0.0, 1.0), torch.zeros(len(time_T))])
    normals = iter([torch.zeros_like(noise_TCP), noise_TCP])
    with (
        mock.patch.object(unified_cfm.UnifiedCFM, "sample_r_t", lambda self, x, **_: (start_T, time_T)),
        mock.patch.object(torch, "rand", lambda *_, **__: next(uniforms)),
        mock.patch.object(torch, "randn_like", lambda *_, **__: next(normals)),
    ):
        yield


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
    """The reference's two mean losses of one clip; `draws_M` = (time, noise, drop) or with start, one entry a patch."""
    T = clip.num_slots

    def at_slots(x_M):
        x_T = np.zeros((T, *x_M.shape[1:]), x_M.dtype)
        x_T[clip.slot_M] = x_M
        return x_T

    audio_T, loss_T, stop_T = np.zeros(T), np.zeros(T), np.zeros(T, np.int64)
    audio_T[clip.slot_M] = 1
    loss_T[clip.slot_M] = clip.target_M
    stop_T[clip.slot_M] = clip.stop_M
    feats_TPC = at_slots(clip.patches_MPC)
    as_torch = {
        "text_tokens": clip.tokens_T.astype(np.int64), "text_mask": 1 - audio_T, "audio_feats": feats_TPC,
        "audio_mask": audio_T, "loss_mask": loss_T, "position_ids": np.arange(T), "labels": stop_T,
    }  # fmt: skip
    with training_draws(*map(at_slots, draws_M)):
        return model(**{k: torch.from_numpy(v)[None] for k, v in as_torch.items()})
