"""Training losses and gradients against the live PyTorch package, clip by clip there, packed here."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from tests.reference.compare import close, reference_losses
from voxcpm2_jax import sequence
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.torch_io import tables


def clips(config, seed=0):
    """Zero-shot, reference, several lengths, and a clip that bears no loss."""
    rng = np.random.default_rng(seed)

    def text(n):
        return rng.integers(105, config.lm_config.vocab_size, n)

    def audio(n):
        return rng.normal(size=(n, config.patch_size, config.feat_dim)).astype(np.float32)

    return [
        sequence.lay_out(text(4), target_MPC=audio(5)),
        sequence.lay_out(text(2), target_MPC=audio(1)),
        sequence.lay_out(text(3), reference_MPC=audio(3), target_MPC=audio(4)),
        sequence.lay_out_prompt_clip(text(3), audio(2)),
        sequence.lay_out(text(6), target_MPC=audio(7)),
    ]


ROWS = ([0, 3, 2], [4, 1])  # how the clips share rows


@pytest.fixture(scope="module")
def case(pair):
    """One packed batch with draws, and the same draws clip by clip."""
    c = pair.loaded.config
    all_clips = clips(c)
    rng = np.random.default_rng(1)
    draws = [
        (rng.uniform(size=s.num_patches).astype(np.float32), rng.normal(size=s.patches_MPC.shape).astype(np.float32),
         rng.uniform(size=s.num_patches) < 0.4)
        for s in all_clips
    ]  # fmt: skip
    batch = sequence.pack(
        [[all_clips[i] for i in row] for row in ROWS], num_slots=40, num_patches=20, patch_shape=(c.patch_size, c.feat_dim)
    )
    packed = []
    for which in range(3):
        x_BM = np.zeros((2, 20, *draws[0][which].shape[1:]), draws[0][which].dtype)
        for b, row in enumerate(ROWS):
            # In a row, targets of all clips come first, then the rest, each in the order of the clips.
            order = [
                (i, m) for is_target in (True, False) for i in row for m in np.flatnonzero(all_clips[i].target_M == is_target)
            ]
            x_BM[b, : len(order)] = np.stack([draws[i][which][m] for i, m in order])
        packed.append(x_BM)
    return all_clips, draws, batch, packed


def packed_loss(config, batch, packed, **kwargs):
    time_BM, noise_BMPC, drop_BM = packed
    return jax.jit(
        lambda params: voxcpm2.loss(params, config, batch, time_BM=time_BM, noise_BMPC=noise_BMPC, drop_BM=drop_BM, **kwargs)
    )


def reference_sums(model, all_clips, draws):
    """Sums over clips of both losses, as torch scalars."""
    diff = stop = 0.0
    for clip, d in zip(all_clips, draws):
        losses = reference_losses(model, clip, d)
        diff = diff + losses["loss/diff"] * clip.num_targets * model.patch_size
        stop = stop + losses["loss/stop"] * clip.num_targets
    return diff, stop


def test_losses_of_packed_rows(pair, case):
    all_clips, draws, batch, packed = case
    ours = packed_loss(pair.loaded.config, batch, packed)(pair.loaded.params)
    with torch.no_grad():
        diff, stop = reference_sums(pair.torch_model, all_clips, draws)
    close(ours["diff"][0], diff)
    close(ours["stop"][0], stop)
    num_targets = sum(s.num_targets for s in all_clips)
    assert ours["diff"][1] == num_targets * pair.loaded.config.patch_size
    assert ours["stop"][1] == num_targets


def test_gradients_of_packed_rows(pair, case):
    """Every parameter's gradient of diff + stop against torch autograd."""
    all_clips, draws, batch, packed = case
    loss = packed_loss(pair.loaded.config, batch, packed, target_patches=12)
    ours = jax.jit(jax.grad(lambda params: sum(total for total, _ in loss(params).values())))(pair.loaded.params)
    model = pair.torch_model.train()  # the quantiser passes gradients straight through only in training mode
    try:
        model.zero_grad()
        sum(reference_sums(model, all_clips, draws)).backward()
    finally:
        model.eval()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for row in tables.backbone_table(pair.loaded.config):
        leaf = functools.reduce(dict.__getitem__, row.path.split("/"), ours)
        got = np.asarray(leaf if row.layer is None else leaf[row.layer])
        close(row.to_torch(got), theirs[row.name])


def test_mean_mode(pair, case):
    """MeanFlow: the target carries the total derivative of the network along the flow."""
    all_clips, draws, batch, packed = case
    c = pair.loaded.config
    config = dataclasses.replace(c, dit_config=dataclasses.replace(c.dit_config, dit_mean_mode=True))
    ours = packed_loss(config, batch, packed, start_BM=packed[0] * np.float32(0.5))(pair.loaded.params)
    model = pair.torch_model
    model.feat_decoder.mean_mode = True
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            diff, _ = reference_sums(model, all_clips, [(*d, d[0] * np.float32(0.5)) for d in draws])
    finally:
        model.feat_decoder.mean_mode = False
    close(ours["diff"][0], diff)
