"""Damaged and wrong checkpoints, through every command that reads one: exit code 2, one line, nothing written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from voxcpm2_jax.cli import main
from voxcpm2_jax.data.tokenizer import train_tokenizer

QUICK = ("--inference-timesteps=1", "--max-len=2", "--min-len=0", "--seed=1")


@pytest.fixture
def copy(released_dir, tmp_path):
    """A copy of a checkpoint, to damage."""
    shutil.copytree(released_dir, tmp_path / "copy")
    return tmp_path / "copy"


COMMANDS = {
    "generate": ("generate", "--checkpoint={}", "--text=a", "--output=out.wav"),
    "export-torch": ("export-torch", "{}", "exported"),
    "import-torch": ("import-torch", "{}", "imported"),
}


def command(name, path):
    return [argument.format(path) for argument in COMMANDS[name]]


@pytest.mark.parametrize("name", ["generate", "export-torch"])
def test_directories_without_a_checkpoint(refusal, tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for path, message in (
        ("nothing", "nothing: no such directory; expected a training workdir"),
        ("file", "file: a file, not a directory"),
        ("empty", "empty: not a checkpoint; expected a training workdir (checkpoints/STEP/)"),
        ("run", "run: a training workdir without a complete checkpoint"),
    ):
        assert message in refusal(*command(name, path))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_lora_directory_says_that_it_is_one_and_names_its_base(refusal, tmp_path, name):
    """Of the PyTorch package, of PEFT, and a run of the PyTorch package with several of them."""
    said = "LoRA weights, not a checkpoint; give its base /models/VoxCPM2 as the checkpoint"
    (tmp_path / "run/step_0001000").mkdir(parents=True)
    save_file({"a.lora_A": np.zeros(1, np.float32)}, tmp_path / "run/step_0001000/lora_weights.safetensors")
    (tmp_path / "run/step_0001000/lora_config.json").write_text('{"base_model": "/models/VoxCPM2", "lora_config": {"r": 32}}')
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text('{"base_model_name_or_path": "/models/VoxCPM2"}')
    for path in ("run", "run/step_0001000", "peft"):
        assert f"{path}: {said}" in refusal(*command(name, path))
    (tmp_path / "run/step_0001000/lora_config.json").write_text("{}")
    assert "give its base, which its files do not name, as the checkpoint" in refusal(*command(name, "run"))


def test_directories_that_cannot_be_imported(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nothing", "empty"):
        assert "no such file; expected a released VoxCPM2 directory with config.json" in refusal(*command("import-torch", path))


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("file", ["model.safetensors", "audiovae.safetensors"])
def test_files_that_are_cut_short_or_missing(refusal, copy, name, file):
    whole = (copy / file).read_bytes()
    for size in (len(whole) // 2, 100, 4, 0):
        (copy / file).write_bytes(whole[:size])
        assert f"{file}: not a whole safetensors file" in refusal(*command(name, copy))
    (copy / file).unlink()
    assert f"expected one of {file}" in refusal(*command(name, copy))


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("patch_size", 0, "patch_size must be at least 1, got 0"),
        ("patch_size", "four", "patch_size: expected int, got 'four'"),
        ("lm_config.num_attention_heads", 0, "lm_config.num_attention_heads must be at least 1, got 0"),
        ("lm_config.num_key_value_heads", 3, "4 heads cannot share 3 key/value heads evenly"),
        ("lm_config", None, "lm_config: expected fields of LMConfig, got None"),
        ("audio_vae_config.sample_rate", 48000, "sample rates and strides must agree"),
        ("architecture", "voxcpm", """expected "architecture": "voxcpm2", got 'voxcpm'"""),
        ("lm_config.hidden_size", 64, "tensors differ from what config.json describes"),
        ("residual_lm_num_layers", 2, "tensors differ from what config.json describes: missing residual_lm.layers.1"),
    ],
)  # fmt: skip
def test_impossible_configs(refusal, copy, name, path, value, message):
    config = json.loads((copy / "config.json").read_text())
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    (copy / "config.json").write_text(json.dumps(config))
    assert message in refusal(*command(name, copy))


def test_a_config_that_is_not_json(refusal, copy):
    for content in (b"{", b"\xff\xfe\x00", b""):
        (copy / "config.json").write_bytes(content)
        assert "config.json: not valid JSON" in refusal(*command("generate", copy))


def test_unknown_keys_of_a_released_config_are_no_mistake(copy, tmp_path, capsys):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"strange": 1}))
    with pytest.warns(UserWarning, match="unknown keys strange"):
        assert main.main(["generate", f"--checkpoint={copy}", "--text=one", *QUICK, f"--output={tmp_path}/out.wav"]) == 0
    assert json.loads(capsys.readouterr().out)["stopped_by"] in ("stop head", "max_len")


def test_every_tensor_that_differs_is_in_the_line(refusal, copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["stop_head.weight"]
    tensors["audio_vae.x"] = np.zeros(1, np.float32)
    save_file(tensors, copy / "model.safetensors")
    line = refusal(*command("generate", copy))
    assert "missing stop_head.weight" in line and "unexpected audio_vae.x" in line and "hint: move" in line


@pytest.mark.parametrize("name", list(COMMANDS))
def test_tokenizers_without_the_special_ids(refusal, copy, name):
    content = json.loads((copy / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    without = {piece: i for piece, i in vocab.items() if i not in (101, 104)}
    small = {piece: i for piece, i in vocab.items() if i < 100}
    swapped = {"<s>": 2, "</s>": 1} | {piece: i for piece, i in vocab.items() if i not in (1, 2)}
    for pieces, message in (
        (without, "no piece has id 101 (an audio or reference mark); no piece has id 104"),
        (small, "pieces; expected over 104, the last special id"),
        (swapped, "the special ids are not where the model expects them"),
    ):
        merges = [m for m in content["model"]["merges"] if {*m, "".join(m)} <= pieces.keys()]
        added = [token for token in content["added_tokens"] if token["content"] in pieces]
        changed = content | {"model": content["model"] | {"vocab": pieces, "merges": merges}, "added_tokens": added}
        (copy / "tokenizer.json").write_text(json.dumps(changed))
        assert message in refusal(*command(name, copy))
    (copy / "tokenizer.json").write_text("{}")
    assert "expected a BPE vocabulary" in refusal(*command(name, copy))
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").unlink()
    assert "no tokenizer; expected tokenizer.json or tokenizer.model" in refusal(*command(name, copy))


def test_a_tokenizer_of_another_model(refusal, copy):
    texts = ["a different corpus with quite some more words in it", "so that there are pieces enough"]
    train_tokenizer(texts * 3, 386).save(copy)
    assert "the tokenizer has 386 pieces, the model embeds 384" in refusal(*command("generate", copy))


@pytest.mark.parametrize("name", ["import-torch", "export-torch"])
def test_conversions_overwrite_nothing(refusal, released_dir, tmp_path, name):
    for destination in ("imported", "exported"):
        (tmp_path / destination).mkdir()
        (tmp_path / destination / "mine").write_text("")
    assert "already there; choose a directory that is absent or empty" in refusal(*command(name, released_dir))
