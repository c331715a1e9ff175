"""What a script passes when it loads a model: directories, names on the hub, devices, LoRA, and what is ignored."""

import logging
import sys

import jax
import numpy as np
import pytest

from tests.inference.speaking import QUICK
from voxcpm2_jax import VoxCPM
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.inference import arguments


def test_both_names_of_the_directory_and_what_has_no_meaning(released_dir, caplog, monkeypatch):
    opened = []
    monkeypatch.setattr(VoxCPM, "_set", lambda self, *parts: opened.append(parts))
    with caplog.at_level(logging.WARNING):
        VoxCPM.from_pretrained(str(released_dir), load_denoiser=False, optimize=False, device="auto", local_files_only=True)
        VoxCPM(voxcpm_model_path=str(released_dir), enable_denoiser=False)
        assert not caplog.records  # what is not asked for is not missed
        VoxCPM.from_pretrained(hf_model_id=released_dir, load_denoiser=True, optimize=True)
    assert len(opened) == 3 and opened[0][0] == opened[1][0] == opened[2][0]
    (record,) = caplog.records
    assert record.getMessage().endswith("no denoiser: optimize=True, enable_denoiser=True")


def test_a_model_computes_where_the_script_says(released_dir, voice):
    model = VoxCPM.from_pretrained(released_dir, device="cpu:1")
    spoken = model.generate("one two", seed=1, **QUICK)
    np.testing.assert_array_equal(spoken, voice.generate("one two", seed=1, **QUICK))
    where = [array.devices() for array in jax.tree.leaves((model._params, model._vae_params))]
    assert set.union(*where) == {jax.devices("cpu")[1]}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "device='mps': expected None, 'auto', or one of cpu, cuda, gpu, tpu"),
        ("cuda:x", "device='cuda:x': expected None, 'auto', or one of"),
        (0, "device=0: expected None, 'auto', or one of"),
        ("cpu:99", "device='cpu:99': there are 8, counted from 0"),
        ("cuda", "device='cuda': JAX finds none here, only cpu"),
    ],
)
def test_devices_that_are_not_there(device, message):
    with pytest.raises(UserError) as error:
        arguments.find_device(device)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("lora", [{"lora_config": {"r": 8}}, {"lora_weights_path": "lora"}])
def test_lora_is_refused(lora):
    for load in (VoxCPM, VoxCPM.from_pretrained):
        with pytest.raises(UserError, match=f"{next(iter(lora))}: this package has no LoRA yet"):
            load("nothing", **lora)


@pytest.mark.parametrize("path", [None, "", 3, b"model"])
def test_a_directory_has_a_name(path):
    for load in (VoxCPM, VoxCPM.from_pretrained):
        with pytest.raises(UserError, match="expected the directory of a model as a string or path, got "):
            load(path)


def test_a_name_on_the_hub(released_dir, tmp_path, monkeypatch):
    """The hub's client finds what it has kept; without it, or without the model, one line says so. No network is used."""
    monkeypatch.chdir(tmp_path)
    name = "someone/VoxCPM2-tiny"
    kept = tmp_path / "hub" / "models--someone--VoxCPM2-tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "snapshots").mkdir()
    (kept / "refs" / "main").write_text("0123")
    (kept / "snapshots" / "0123").symlink_to(released_dir)
    where = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    assert arguments.local_directory(name, **where).resolve() == released_dir.resolve()
    with pytest.raises(UserError) as error:
        arguments.local_directory("someone/else", **where)
    assert str(error.value).startswith("someone/else: no such directory, and not loaded from the Hugging Face hub: LocalEntry")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^someone/VoxCPM2-tiny: no such directory; .* pip install huggingface_hub$"):
        VoxCPM.from_pretrained(name, **where)
    for path in ("./someone/else", "a/b/c", "nothing"):  # not of the hub
        with pytest.raises(UserError, match=r"nothing|else|a/b/c"):
            VoxCPM.from_pretrained(path, **where)
