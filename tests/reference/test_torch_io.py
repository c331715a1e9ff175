"""The reference is the judge of what we write: it loads it whole, bit for bit."""

from voxcpm2_jax import torch_io


def test_load_finds_every_reference_tensor(pair):
    table = torch_io.backbone_table(pair.loaded.config)
    codec = torch_io.vae_table(pair.loaded.vae_config)
    names = [row.name for row in table] + [f"audio_vae.{row.name}" for row in codec]
    assert sorted(names) == sorted(pair.torch_model.state_dict())
    state = pair.torch_model.state_dict()
    assert all(tuple(state[row.name].shape) == row.torch_shape for row in table)
