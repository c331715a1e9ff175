"""The PyTorch package loads the directories that ours writes: every tensor bit for bit, none missing, none unexpected."""

import dataclasses
import json

import jax
import ml_dtypes
import pytest
import torch

from voxcpm2_jax import convert
from voxcpm2_jax.torch_io import released, tables


@pytest.fixture
def strictly(monkeypatch, load_reference):
    """Loads a directory with the PyTorch package's code; fails if a key is missing or unexpected."""
    from voxcpm.model.voxcpm2 import VoxCPM2Model

    results = []
    original = VoxCPM2Model.load_state_dict

    def load_state_dict(self, *args, **kwargs):
        results.append(original(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(VoxCPM2Model, "load_state_dict", load_state_dict)

    def load(directory):
        model = load_reference(directory)
        (result,) = results
        results.clear()
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        return model

    return load


def assert_same_state(model, other, dtype=None):
    state, wanted = model.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        value = wanted[name].to(dtype) if dtype and not name.startswith("audio_vae.") else wanted[name]
        assert tensor.dtype == value.dtype and torch.equal(tensor, value), name


def test_the_table_has_every_tensor_of_the_reference(pair):
    table = tables.backbone_table(pair.loaded.config)
    codec = tables.vae_table(pair.loaded.vae_config)
    state = pair.torch_model.state_dict()
    assert sorted([row.name for row in table] + [f"audio_vae.{row.name}" for row in codec]) == sorted(state)
    assert all(tuple(state[row.name].shape) == row.torch_shape for row in table)
    assert all(tuple(state[f"audio_vae.{row.name}"].shape) == row.torch_shape for row in codec)


def test_the_reference_loads_what_we_save(pair, strictly, judge, tmp_path):
    loaded = pair.loaded
    released.save(
        tmp_path / "ours", loaded.config, loaded.params, loaded.vae_config, loaded.vae_params, loaded.tokenizer_dir, loaded.raw
    )
    assert json.loads((tmp_path / "ours/config.json").read_text()) == loaded.raw
    assert_same_state(strictly(tmp_path / "ours"), pair.torch_model)
    assert judge(tmp_path / "ours")("one 二 три") == judge(pair.directory)("one 二 три")


def test_the_reference_loads_a_config_of_our_own(pair, strictly, tmp_path):
    loaded = pair.loaded
    released.save(tmp_path / "ours", loaded.config, loaded.params, loaded.vae_config, loaded.vae_params, loaded.tokenizer_dir)
    assert_same_state(strictly(tmp_path / "ours"), pair.torch_model)


def test_the_reference_loads_bfloat16(pair, strictly, tmp_path):
    loaded = pair.loaded
    config = dataclasses.replace(loaded.config, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), loaded.params)
    released.save(tmp_path / "ours", config, params, loaded.vae_config, loaded.vae_params, loaded.tokenizer_dir, loaded.raw)
    assert_same_state(strictly(tmp_path / "ours"), pair.torch_model, torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_loads_an_export_in_another_dtype(pair, strictly, tmp_path, dtype):
    convert.export_torch(pair.directory, tmp_path / "ours", dtype=dtype)
    assert_same_state(strictly(tmp_path / "ours"), pair.torch_model, getattr(torch, dtype))


def test_the_reference_loads_an_exported_import(pair, strictly, tmp_path):
    convert.import_torch(pair.directory, tmp_path / "work")
    convert.export_torch(tmp_path / "work", tmp_path / "ours")
    assert_same_state(strictly(tmp_path / "ours"), pair.torch_model)
