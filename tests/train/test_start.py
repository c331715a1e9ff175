"""What the parameters of a new run are: a checkpoint's, a MiniCPM-4's, or nobody's."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.data.test_pipeline import write
from tests.train import test_loop
from voxcpm2_jax import convert, sharding
from voxcpm2_jax.checkpoint import steps
from voxcpm2_jax.checkpoint.arrays import flatten, nest, save_arrays
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun, BatchConfig, CheckpointConfig
from voxcpm2_jax.data.clips import Clip
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.torch_io import released
from voxcpm2_jax.torch_io.minicpm import load_tslm
from voxcpm2_jax.train import backbone, pretrain
from voxcpm2_jax.train.start import Start
from voxcpm2_jax.workdir import codec_sha256, open_weights, save_codec

TINY = MODELS["tiny"]
RUN = BackboneRun(model=TINY, batch=BatchConfig(rows=8, slots=64, patches=40))
SCALES = {"scale_emb": 12, "scale_depth": 1.4}


def assert_equal(tree, expected):
    flat, expected = flatten(tree), flatten(expected)
    assert flat.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(np.asarray(flat[path]), np.asarray(x), err_msg=path)


def layout_of(params, shape=(1, 4, 2)):
    return sharding.param_shardings(params, sharding.make_mesh(shape))


# ---- a checkpoint ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(released_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    convert.import_torch(released_dir, workdir)
    return workdir


@pytest.mark.parametrize("kind", ["released", "training"])
def test_weights_of_a_checkpoint_lie_where_they_belong(kind, released_dir, workdir, tiny_params):
    layout = layout_of(tiny_params)
    params = pretrain.initial_params(RUN, layout, init_params=released_dir if kind == "released" else workdir)
    assert_equal(params, tiny_params)
    assert jax.tree.map(lambda x: x.sharding, params) == layout
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_weights_become_float32(tiny_parts, tmp_path):
    config, params, *rest = tiny_parts
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    released.save(tmp_path / "half", config, half, *rest)
    found = pretrain.initial_params(RUN, layout_of(params), init_params=tmp_path / "half")
    assert_equal(found, jax.tree.map(lambda x: x.astype(np.float32), half))


def test_weights_of_another_model_name_every_field(released_dir):
    lm = dataclasses.replace(TINY.lm_config, vocab_size=400, rope_theta=100.0, scale_emb=3.0)
    other = dataclasses.replace(TINY, lm_config=lm, dtype="bfloat16", max_length=99, scalar_quantization_scale=5)
    with pytest.raises(UserError) as error:
        open_weights(released_dir, other)
    assert str(error.value) == (
        f"{released_dir}: weights of another model than the config's: model.lm_config.rope_theta 10000.0 there, 100.0 here; "
        "model.lm_config.vocab_size 384 there, 400 here; model.scalar_quantization_scale 9 there, 5 here; "
        "a vocabulary cannot be resized"
    )


def test_a_checkpoint_that_its_own_config_does_not_describe(workdir, tiny_params, tmp_path):
    arrays = flatten(tiny_params)
    arrays["strange/kernel"] = arrays.pop("stop_head/kernel")
    arrays["base_lm/norm/scale"] = np.ones(5, np.float32)
    meta = steps.read_meta(steps.step_directory(workdir))
    save_arrays(tmp_path, 0, arrays, {"config": meta["config"]})
    with pytest.raises(UserError) as error:
        open_weights(tmp_path, TINY)
    for problem in ("3 parameters", "missing stop_head/kernel", "unexpected strange/kernel", r"base_lm/norm/scale is [5]"):
        assert problem in str(error.value)


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tiny_parts, tmp_path_factory):
    """Clips of noise that the released directory's codec and tokenizer are said to have made."""
    _, _, vae_config, vae_params, tokenizer = tiny_parts
    rng = np.random.default_rng(0)
    clips = [
        Clip(rng.integers(105, 340, 5).astype(np.int32), rng.normal(size=(6, 4, 16)).astype(np.float32), dataset="d")
        for _ in range(40)
    ]
    directory = tmp_path_factory.mktemp("data") / "shards"
    save_codec(directory, vae_config, vae_params)
    tokenizer.save(directory / "tokenizer")
    codec = codec_sha256(vae_params, vae_config)
    many = {f"latent_{name}": (value,) * 16 for name, value in (("mean", 0.0), ("std", 1.0), ("min", -1.0), ("max", 1.0))}
    return write(directory, clips, patch_size=4, latent_dim=16, vocab_size=384, codec_sha256=codec,
                 tokenizer_sha256=tokenizer.sha256, **many)  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """The arguments that a run's loop is given; nothing is trained."""
    given = types.SimpleNamespace()

    def run(task, state, workdir, **kwargs):
        vars(given).update(kwargs | {"task": task, "state": state})
        return state, {}

    monkeypatch.setattr(pretrain.loop, "run", run)
    return given


@pytest.mark.parametrize("start", ["released_dir", "workdir"])
def test_fine_tuning_starts_from_the_weights_alone(start, request, shards, started, tmp_path, tiny_params):
    path = request.getfixturevalue(start)
    run = dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, ema_decay=0.9))
    pretrain.train(run, tmp_path / "run", shards, init_params=path)
    assert started.origin.fresh == f"the weights of {path} (--init-params)"
    assert_equal(started.state, backbone.init_state(run, tiny_params))


def test_shards_of_another_codec_or_vocabulary_are_refused(shards, started, tiny_parts, tmp_path):
    config, params, vae_config, vae_params, tokenizer = tiny_parts
    released.save(tmp_path / "other", config, params, vae_config, jax.tree.map(lambda x: x + 1, vae_params), tokenizer)
    with pytest.raises(
        UserError, match=r"shards were not made with the codec of --init-params=.*other \(.*\): prepare them with"
    ):
        pretrain.train(RUN, tmp_path / "run", shards, init_params=tmp_path / "other")


def test_a_run_that_goes_on_does_not_look_at_what_it_began_with(started, workdir):
    """The weights it began with may be gone by then."""
    pretrain.train(RUN, workdir, init_params="/nowhere")
    assert started.origin.fresh.startswith("scratch (seed 0)")


# ---- a branch --------------------------------------------------------------------------------------------------------


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_trunk_and_branch_equal_one_run_bitwise(tmp_path, monkeypatch):
    """The branch's decay begins where it leaves the trunk, whose own lies far off; the trunk is only read."""
    trunk = dataclasses.replace(test_loop.OPTIM, schedule="wsd", decay_start=10_000, decay_steps=1)
    branch = dataclasses.replace(trunk, decay_start=6, decay_steps=4)

    def run(workdir, config, num_steps, **start):
        monkeypatch.setattr(test_loop, "OPTIM", config)
        often = CheckpointConfig(every_steps=2, keep=9)
        return test_loop.Toy(8).run(tmp_path / workdir, num_steps, checkpoint=often, **start)[0]

    whole = run("whole", branch, 10)
    stable = run("trunk", trunk, 10)
    before = contents(tmp_path / "trunk")
    parts = run("branch", branch, 10, origin=Start(tmp_path / "trunk" / "checkpoints" / "6"))
    assert contents(tmp_path / "trunk") == before
    assert_equal(parts, whole)
    assert np.linalg.norm(stable.params["kernel"] - whole.params["kernel"]) > 1e-3
    straight, again = (test_loop.learned(tmp_path / workdir) for workdir in ("whole", "branch"))
    assert again == straight[-len(again) :] and [row["step"] for row in again] == [9, 10]


# ---- a MiniCPM-4 -----------------------------------------------------------------------------------------------------


def torch_names(base_lm):
    """The LM as Hugging Face keeps it, by hand: matrices [out, in], heads side by side, one tensor a layer."""
    tensors = {"model.embed_tokens.weight": base_lm["embed"]["embedding"], "model.norm.weight": base_lm["norm"]["scale"]}
    layers = base_lm["layers"]
    for i in range(TINY.tslm.num_layers):
        name = f"model.layers.{i}"
        for which in ("q", "k", "v"):
            kernel_DNH = layers[which]["kernel"][i]
            tensors[f"{name}.self_attn.{which}_proj.weight"] = kernel_DNH.reshape(len(kernel_DNH), -1).T
        o_NHD = layers["o"]["kernel"][i]
        tensors[f"{name}.self_attn.o_proj.weight"] = o_NHD.reshape(-1, o_NHD.shape[-1]).T
        for which in ("gate", "up", "down"):
            tensors[f"{name}.mlp.{which}_proj.weight"] = layers[which]["kernel"][i].T
        tensors[f"{name}.input_layernorm.weight"] = layers["attn_norm"]["scale"][i]
        tensors[f"{name}.post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def minicpm_config(**changes):
    lm = TINY.lm_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_theta")  # fmt: skip
    rope = dataclasses.asdict(lm.rope_scaling)
    rope["rope_type"] = rope.pop("type")
    mine = {"architectures": ["MiniCPMForCausalLM"], "eos_token_id": [2, 5], "rope_scaling": rope, "dim_model_base": 256}
    return {name: getattr(lm, name) for name in names} | mine | SCALES | changes


@pytest.fixture
def minicpm(tiny_params, tmp_path):
    """In two files and an index, with a head that VoxCPM2 has no use for."""
    tensors = torch_names(tiny_params["base_lm"]) | {"lm_head.weight": np.zeros((3, 3), np.float32)}
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(minicpm_config()))
    return tmp_path


def test_tslm_from_a_minicpm(minicpm, tiny_params, capsys):
    """Everything under base_lm/ is the file's, with its scales folded in; the rest is what a run from scratch begins with."""
    layout = layout_of(tiny_params)
    params = pretrain.initial_params(RUN, layout, init_tslm=minicpm)
    assert "not used: lm_head.weight" in capsys.readouterr().err
    folded = flatten(tiny_params["base_lm"])
    folded["embed/embedding"] = folded["embed/embedding"] * np.float32(12)
    for name in ("o", "down"):
        folded[f"layers/{name}/kernel"] = folded[f"layers/{name}/kernel"] * np.float32(1.4 / np.sqrt(2))
    assert_equal(params["base_lm"], nest(folded))
    scratch = jax.jit(lambda: voxcpm2.init(jax.random.key(RUN.seed), TINY), out_shardings=layout)()
    assert_equal(params | {"base_lm": 0}, scratch | {"base_lm": 0})
    assert jax.tree.map(lambda x: x.sharding, params) == layout


def test_tslm_computes_what_the_minicpm_did(minicpm, tiny_params):
    """Our model with muP on the file's weights, and without muP on the folded ones."""
    weights = load_tslm(minicpm, TINY)
    folded = nest({path.removeprefix("base_lm/"): jnp.asarray(weights.read(path)) for path in weights.shapes})
    scaled = dataclasses.replace(TINY, lm_config=dataclasses.replace(TINY.lm_config, use_mup=True, **SCALES))
    assert load_tslm(minicpm, scaled).read("base_lm/embed/embedding").max() == folded["embed"]["embedding"].max() / 12
    tokens_BT = jnp.array([[110, 300, 7, 42]])
    hidden = []
    for config, params in ((scaled, tiny_params["base_lm"]), (TINY, folded)):
        lm = voxcpm2.TextSemanticLM(config, Compute(remat="none"))
        x_BTD = lm.apply({"params": params}, tokens_BT, method="embed")
        y_BTD, _ = jax.jit(lm.apply)({"params": params}, x_BTD, jnp.arange(4)[None], jnp.tri(4, dtype=bool)[None])
        hidden.append(y_BTD)
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=1e-5, atol=1e-5)


def test_tslm_from_one_file(minicpm, tiny_params):
    save_file(torch_names(tiny_params["base_lm"]), minicpm / "all.safetensors")
    for path in (minicpm, minicpm / "all.safetensors"):
        found = load_tslm(path, TINY)
        np.testing.assert_array_equal(found.read("base_lm/layers/q/kernel"), tiny_params["base_lm"]["layers"]["q"]["kernel"])


def test_tslm_differences_are_all_named(minicpm, tiny_params):
    tensors = torch_names(tiny_params["base_lm"])
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors.pop("model.norm.weight")
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    save_file(tensors, minicpm / "all.safetensors")
    with pytest.raises(UserError) as error:
        load_tslm(minicpm / "all.safetensors", TINY)
    for problem in ("3 tensors", "missing model.norm.weight [32]", "unexpected model.layers.0.self_attn.q_proj.bias",
                    "model.layers.1.mlp.up_proj.weight is float32[3,4], expected shape [64,32]"):  # fmt: skip
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (minicpm_config(hidden_size=64, rope_theta=5.0), "hidden_size 64 there, model.lm_config has 32; rope_theta 5.0 there"),
        ({"hidden_size": 32}, "config.json: no intermediate_size, num_hidden_layers"),
        (minicpm_config(rope_scaling={"rope_type": "yarn"}), "type 'yarn'; only longrope is supported"),
        (None, "config.json: no such file; it says how a MiniCPM-4 scales its weights"),
    ],
)
def test_tslm_of_another_kind_is_refused(minicpm, content, message):
    (minicpm / "config.json").unlink() if content is None else (minicpm / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_tslm(minicpm, TINY)
    assert message in str(error.value)
