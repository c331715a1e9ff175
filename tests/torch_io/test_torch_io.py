"""The tables cover every parameter, both directions are exact, and one message names all that is wrong with a file."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from voxcpm2_jax import convert, torch_io, workdir
from voxcpm2_jax.checkpoint import arrays
from voxcpm2_jax.config.model import AudioVAEConfig, DiTConfig, LMConfig, LocalConfig, ModelConfig, RopeScaling
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.data.tokenizer import load_tokenizer, train_tokenizer
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.torch_io import tables
from voxcpm2_jax.torch_io.released import load, save
from voxcpm2_jax.vae import autoencoder

CONFIG = ModelConfig(
    lm_config=LMConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=3, num_key_value_heads=2,
        kv_channels=6, vocab_size=390, use_mup=False, rope_scaling=RopeScaling(),
    ),
    patch_size=2, feat_dim=4, residual_lm_num_layers=2, scalar_quantization_latent_dim=8,
    encoder_config=LocalConfig(hidden_dim=20, ffn_dim=28, num_heads=2, num_layers=1, kv_channels=6),
    dit_config=DiTConfig(hidden_dim=12, ffn_dim=36, num_heads=2, num_layers=2, kv_channels=6),
    max_length=64,
)  # fmt: skip
VAE = AudioVAEConfig(encoder_dim=4, encoder_rates=(2, 3), latent_dim=4, decoder_dim=20, decoder_rates=(3, 2, 3))


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def random_params(table, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return arrays.nest(
        {
            path: rng.standard_normal(group[0].shape if group[0].layer is None else (len(group), *group[0].shape)).astype(dtype)
            for path, group in tables.by_path(table).items()
        }
    )


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].tobytes() == b[path].tobytes(), path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three", "un deux trois", "eins zwei drei"] * 4, 330)


@pytest.fixture(scope="module")
def model():
    """Parameters in bfloat16, codec in float32."""
    return (
        random_params(tables.backbone_table(CONFIG), 0, ml_dtypes.bfloat16),
        random_params(tables.vae_table(VAE), 1),
    )


@pytest.fixture
def released(tmp_path, model, tokenizer):
    save(tmp_path / "released", CONFIG, model[0], VAE, model[1], tokenizer, raw=None)
    return tmp_path / "released"


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---- the table -----------------------------------------------------------------------------------------------------


def test_table_is_the_parameter_tree_of_the_backbone():
    wanted = {
        path: leaf.shape for path, leaf in flat(jax.eval_shape(lambda k: voxcpm2.init(k, CONFIG), jax.random.key(0))).items()
    }
    assert {path: leaf.shape for path, leaf in flat(random_params(tables.backbone_table(CONFIG), 0)).items()} == wanted


@pytest.mark.parametrize("change", [{}, {"depthwise": False}, {"sr_bin_boundaries": None}])
def test_table_is_the_parameter_tree_of_the_codec(change):
    config = dataclasses.replace(VAE, **change)
    wanted = {
        path: leaf.shape
        for path, leaf in flat(jax.eval_shape(lambda k: autoencoder.init(k, config), jax.random.key(0))).items()
    }
    assert {path: leaf.shape for path, leaf in flat(random_params(tables.vae_table(config), 0)).items()} == wanted


def test_released_shape_has_577_and_312_tensors():
    lm = LMConfig(kv_channels=128, use_mup=False)
    config = ModelConfig(
        lm_config=lm,
        encoder_config=LocalConfig(num_layers=12, kv_channels=128),
        dit_config=DiTConfig(num_layers=12, kv_channels=128),
    )
    backbone, codec = tables.backbone_table(config), tables.vae_table(AudioVAEConfig())
    assert (len(backbone), sum(np.prod(row.torch_shape) for row in backbone)) == (577, 2_290_004_544)
    assert (len(codec), sum(np.prod(row.torch_shape) for row in codec if row.path)) == (312, 94_213_954)


@pytest.mark.parametrize("table", [tables.backbone_table(CONFIG), tables.vae_table(VAE)])
def test_every_row_goes_there_and_back(table):
    assert len({row.name for row in table}) == len(table)
    assert len({(row.path, row.layer) for row in table}) == len(table)
    for row in table:
        tensor = np.arange(np.prod(row.torch_shape)).reshape(row.torch_shape)
        ours = row.from_torch(tensor)
        assert ours.shape == row.shape
        np.testing.assert_array_equal(row.to_torch(ours), tensor)


# ---- whole directories ---------------------------------------------------------------------------------------------


def test_save_then_load_gives_every_byte_back(released, model, tokenizer):
    loaded = load(released)
    assert (loaded.config, loaded.vae_config) == (CONFIG, VAE)
    assert_same(loaded.params, model[0])
    assert_same(loaded.vae_params, model[1])
    assert load_tokenizer(loaded.tokenizer_dir).encode("one deux") == tokenizer.encode("one deux")
    assert load_file(released / "audiovae.safetensors")["decoder.sr_bin_boundaries"].tolist() == [20000, 30000, 40000]


def test_load_and_save_are_names_of_the_package(released, model):
    """Outside code calls torch_io.load(DIR) and reads these attributes."""
    loaded = torch_io.load(released)
    assert (loaded.config, loaded.vae_config) == (CONFIG, VAE)
    assert_same(loaded.params, model[0])
    assert_same(loaded.vae_params, model[1])
    assert torch_io.save is save
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        torch_io.lode  # noqa: B018


def test_jax_arrays_are_saved_as_numpy_ones(tmp_path, released, model, tokenizer):
    save(tmp_path / "again", CONFIG, jax.tree.map(jax.numpy.asarray, model[0]), VAE, model[1], tokenizer)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (released / "model.safetensors").read_bytes()


def test_our_safetensors_equal_the_library_s(released, tmp_path):
    save_file(load_file(released / "audiovae.safetensors"), tmp_path / "other", metadata={"format": "pt"})
    assert (tmp_path / "other").read_bytes() == (released / "audiovae.safetensors").read_bytes()


def test_unknown_config_keys_warn_once_and_come_back(released, tmp_path, model):
    raw = json.loads((released / "config.json").read_text())
    raw["dit_config"]["mean_mode"] = False
    raw["strange"] = {"a": [1]}
    (released / "config.json").write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match=r"dit_config\.mean_mode, strange\.a") as record:
        loaded = load(released)
    assert len(record) == 1
    save(tmp_path / "again", loaded.config, loaded.params, VAE, loaded.vae_params, released, raw=loaded.raw)
    assert json.loads((tmp_path / "again/config.json").read_text()) == raw


def test_shards_with_an_index(released, model):
    tensors = load_file(released / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, chosen in halves.items():
        save_file({name: tensors[name] for name in chosen}, released / shard)
    index = {"weight_map": {name: shard for shard, chosen in halves.items() for name in chosen}}
    (released / "model.safetensors.index.json").write_text(json.dumps(index))
    (released / "model.safetensors").unlink()
    assert_same(load(released).params, model[0])
    (released / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: no such file"):
        load(released)


def test_the_file_s_rate_boundaries_count(released):
    edit(released / "audiovae.safetensors", lambda t: t.update({"decoder.sr_bin_boundaries": np.array([1, 2, 3], np.int32)}))
    assert load(released).vae_config.sr_bin_boundaries == (1, 2, 3)


@pytest.mark.parametrize("nested", [False, True])
def test_codec_from_a_torch_file(released, model, nested):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(released / "audiovae.safetensors").items()}
    (released / "audiovae.safetensors").unlink()
    torch.save({"state_dict": tensors} if nested else tensors, released / "audiovae.pth")
    assert_same(load(released).vae_params, model[1])


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_trap_15_every_wrong_tensor_is_named(released):
    def spoil(tensors):
        del tensors["stop_head.weight"], tensors["base_lm.layers.1.mlp.up_proj.weight"]
        tensors["base_lm.layers.0.self_attn.q_proj.lora_A"] = np.zeros((2, 2), np.float32)
        tensors["audio_vae.encoder.fc_mu.bias"] = np.zeros(4, np.float32)
        tensors["stop_proj.bias"] = np.zeros(3, ml_dtypes.bfloat16)
        tensors["stop_proj.weight"] = tensors["stop_proj.weight"].astype(np.int32)
        tensors["base_lm.layers.2.input_layernorm.weight"] = np.zeros(16, np.float32)

    edit(released / "model.safetensors", spoil)
    edit(released / "audiovae.safetensors", lambda t: t.update({"decoder.sr_bin_boundaries": np.zeros(3, np.int64)}))
    with pytest.raises(UserError) as error:
        load(released)
    message = str(error.value)
    assert "8 tensors differ" in message
    for part in (
        "missing stop_head.weight [2,16]",
        "missing base_lm.layers.1.mlp.up_proj.weight [24,16]",
        "unexpected base_lm.layers.0.self_attn.q_proj.lora_A",
        "unexpected audio_vae.encoder.fc_mu.bias",
        "stop_proj.bias is bfloat16[3], expected shape [16]",
        "stop_proj.weight is int32[16,16], expected bfloat16 or float16 or float32",
        "base_lm.layers.2.input_layernorm.weight is float32[16], other layers are bfloat16",
        "decoder.sr_bin_boundaries is I64[3], expected int32",
        "merge the LoRA",
        "without that prefix",
    ):
        assert part in message, part


def test_pickles_that_are_no_tensors_are_refused(released):
    torch = pytest.importorskip("torch")
    (released / "audiovae.safetensors").unlink()
    torch.save({"a": print}, released / "audiovae.pth")
    with pytest.raises(UserError, match="not a plain torch file"):
        load(released)


def test_torch_absent(released, monkeypatch):
    (released / "audiovae.safetensors").rename(released / "audiovae.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="needs PyTorch"):
        load(released)


@pytest.mark.parametrize("name", ["model.safetensors", "audiovae.safetensors"])
def test_absent_and_broken_files(released, name):
    whole = (released / name).read_bytes()
    (released / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name}: not a whole safetensors file"):
        load(released)
    (released / name).unlink()
    with pytest.raises(UserError, match=f"expected one of {name}"):
        load(released)


def test_parameters_that_do_not_fit_are_named_and_nothing_is_left(tmp_path, model, tokenizer):
    params = dict(model[0], extra=np.zeros(1, np.float32), stop_head={"kernel": np.zeros((2, 2), np.float64)})
    del params["stop_proj"]
    with pytest.raises(UserError) as error:
        save(tmp_path / "out", CONFIG, params, VAE, model[1], tokenizer)
    for part in ("missing stop_proj/kernel", "unexpected extra", "stop_head/kernel is [2, 2], expected [16, 2]", "float64"):
        assert part in str(error.value), part
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_not_overwritten(released, model, tokenizer):
    with pytest.raises(UserError, match="absent or empty"):
        save(released, CONFIG, model[0], VAE, model[1], tokenizer)


# ---- training workdirs ---------------------------------------------------------------------------------------------


def test_import_then_export_gives_every_file_back(released, tmp_path, model):
    convert.import_torch(released, tmp_path / "work")
    convert.export_torch(tmp_path / "work", tmp_path / "back")
    for name in ("config.json", "model.safetensors", "audiovae.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (released / name).read_bytes(), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "released", "work"]

    config, params, step = workdir.load_params(tmp_path / "work")
    assert step == 0 and config["model"]["feat_dim"] == 4
    assert_same(params, model[0])
    for path in (tmp_path / "work", tmp_path / "work/checkpoints/0", released):
        loaded = workdir.load_model(path)
        assert (loaded.config, loaded.vae_config) == (CONFIG, VAE)
        assert_same(loaded.params, model[0])
        assert_same(loaded.vae_params, model[1])
        load_tokenizer(loaded.tokenizer_dir)


def test_export_of_a_released_directory_makes_one_file_each(released, tmp_path):
    torch = pytest.importorskip("torch")
    codec = (released / "audiovae.safetensors").read_bytes()
    torch.save(
        {k: torch.from_numpy(v) for k, v in load_file(released / "audiovae.safetensors").items()}, released / "audiovae.pth"
    )
    (released / "audiovae.safetensors").unlink()
    convert.export_torch(released, tmp_path / "back")
    assert (tmp_path / "back/audiovae.safetensors").read_bytes() == codec
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (released / name).read_bytes(), name


@pytest.fixture
def trained(released, tmp_path, model):
    """A workdir as training leaves it: float32 weights, and a config that says bfloat16."""
    convert.import_torch(released, tmp_path / "imported")
    params = arrays.flatten(jax.tree.map(lambda leaf: leaf.astype(np.float32) * 1.0001, model[0]))
    arrays.save_arrays(tmp_path / "work", 3, params, {"config": {"model": to_dict(CONFIG)}})
    for part in ("codec", "tokenizer"):
        shutil.copytree(tmp_path / "imported" / part, tmp_path / "work" / part)
    return tmp_path / "work"


def dtypes(directory, name="model.safetensors"):
    return {tensor.dtype.name for tensor in load_file(directory / name).values()}


def test_an_export_has_the_dtype_of_the_config(trained, released, tmp_path):
    """Of a checkpoint of training, which keeps float32; the released directory of the same shape is no smaller."""
    parts = convert.export_torch(trained, tmp_path / "out")
    assert dtypes(tmp_path / "out") == {"bfloat16"} and dtypes(tmp_path / "out", "audiovae.safetensors") == {"float32", "int32"}
    assert (tmp_path / "out/model.safetensors").stat().st_size == (released / "model.safetensors").stat().st_size
    backbone, codec = parts["backbone"], parts["codec"]
    assert (backbone["dtype"], backbone["checkpoint_dtype"], codec["dtype"]) == ("bfloat16", "float32", "float32")
    num_params = sum(np.prod(row.torch_shape) for row in tables.backbone_table(CONFIG))
    assert (backbone["bytes"], backbone["checkpoint_bytes"]) == (2 * num_params, 4 * num_params)
    wanted = workdir.load_params(trained)[1]["stop_proj"]["kernel"].astype(ml_dtypes.bfloat16)
    assert load(tmp_path / "out").params["stop_proj"]["kernel"].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", ["trained", "released"])
def test_an_export_has_the_dtype_that_is_asked_for(request, source, tmp_path, dtype):
    """config.json follows, by which the PyTorch package computes."""
    source = request.getfixturevalue(source)
    convert.export_torch(source, tmp_path / "out", dtype=dtype)
    assert dtypes(tmp_path / "out") == {dtype} and json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    ours, theirs = flat(load(tmp_path / "out").params), flat(workdir.load_model(source).params)
    assert all(ours[path].tobytes() == theirs[path].astype(dtype).tobytes() for path in theirs)


def test_weights_that_are_narrower_than_the_config_stay(released, tmp_path):
    raw = json.loads((released / "config.json").read_text()) | {"dtype": "fp32"}
    (released / "config.json").write_text(json.dumps(raw))
    convert.export_torch(released, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (released / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text()) == raw


def test_numbers_that_a_dtype_cannot_hold_are_named(released, tmp_path):
    edit(released / "model.safetensors", lambda t: t.update({"stop_proj.bias": np.full(16, 1e5, ml_dtypes.bfloat16)}))
    with pytest.raises(UserError, match=r"stop_proj\.bias: 16 numbers are too large for float16 \(up to 9.98e\+04\); choose"):
        convert.export_torch(released, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_workdir_without_codec_is_refused(released, tmp_path):
    convert.import_torch(released, tmp_path / "work")
    shutil.rmtree(tmp_path / "work/codec")
    with pytest.raises(UserError, match=r"work/codec: no such directory"):
        convert.export_torch(tmp_path / "work", tmp_path / "back")
