"""A script written for the PyTorch package runs with its import changed: the package's own examples, and its signatures."""

import importlib.metadata
import inspect
import re

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

import voxcpm2_jax
from tests.reference.conftest import SHAPES, build
from voxcpm2_jax.config.plain import UserError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the examples run: the models that they name, which stop soon, and the recording that they name."""
    directory = tmp_path_factory.mktemp("script")
    model = directory / "openbmb" / "VoxCPM2"
    build(model, SHAPES["plain"] | {"max_length": 256})
    tensors = load_file(model / "model.safetensors")
    tensors["stop_proj.weight"] *= 0
    tensors["stop_proj.bias"] = np.full_like(tensors["stop_proj.bias"], 5)
    tensors["stop_head.weight"][:] = [[-1], [1]]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (directory / "pretrained_models").mkdir()
    (directory / "pretrained_models" / "VoxCPM2").symlink_to(model)
    (directory / "path" / "to").mkdir(parents=True)
    soundfile.write(directory / "path" / "to" / "voice.wav", 0.1 * np.random.default_rng(0).normal(size=90), 16000)
    return directory


def examples() -> list[str]:
    """The Python examples of the package's description that use it alone, with this package imported instead."""
    blocks = re.findall(r"```python\n(.*?)```", importlib.metadata.metadata("voxcpm").get_payload(), re.S)
    blocks = [block for block in blocks if "nanovllm" not in block]
    blocks = [re.sub(r"^(from modelscope|snapshot_download).*$", "", block, flags=re.M) for block in blocks]
    return [block.replace("from voxcpm import", "from voxcpm2_jax import") for block in blocks]


def test_the_examples_of_the_package_run(directory, monkeypatch):
    monkeypatch.chdir(directory)
    names = {}
    for block in examples():
        exec(compile(block, "example", "exec"), names)
    written = sorted(path.name for path in directory.glob("*.wav"))
    assert {"demo.wav", "voice_design.wav", "clone.wav", "hifi_clone.wav", "streaming.wav"} <= set(written)
    for name in written:
        info = soundfile.info(name)
        assert info.samplerate == 48000 and info.frames > 0


@pytest.mark.parametrize("name", ["__init__", "from_pretrained"])
def test_models_are_loaded_with_the_same_arguments(name):
    from voxcpm import VoxCPM

    theirs, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (VoxCPM, voxcpm2_jax.VoxCPM))
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]


def test_speech_is_asked_for_with_the_same_arguments():
    from voxcpm import VoxCPM

    theirs = [p for p in inspect.signature(VoxCPM._generate).parameters.values() if p.name not in ("self", "streaming")]
    ours = list(inspect.signature(voxcpm2_jax.VoxCPM.generate).parameters.values())[1:]
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]


def test_every_public_name_is_there_or_says_why_not(directory):
    """Methods about LoRA are refused in a line; every other public name of the class is there."""
    from voxcpm import VoxCPM

    model = voxcpm2_jax.VoxCPM(str(directory / "openbmb" / "VoxCPM2"), device="cpu")
    public = [name for name in vars(VoxCPM) if not name.startswith("_")]
    for name in public:
        assert hasattr(model, name), name
    assert model.tts_model.sample_rate == model.sample_rate == 48000 and not model.lora_enabled
    for refused in (lambda: model.load_lora("lora"), lambda: model.set_lora_enabled(True), lambda: model.get_lora_state_dict()):
        with pytest.raises(UserError, match="no LoRA"):
            refused()
    model.unload_lora()
    model.set_lora_enabled(False)
