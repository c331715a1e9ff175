"""Configs: the released file there and back, its defaults, strictness, impossible values, sizes of the presets."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from voxcpm2_jax.config.corpus import DataConfig, DebianConfig, DemoConfig, PairsConfig
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.model import (
    MODELS,
    AudioVAEConfig,
    DiTConfig,
    FlowConfig,
    LMConfig,
    LocalConfig,
    ModelConfig,
    RopeScaling,
)
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict
from voxcpm2_jax.config.released import read_released, to_released
from voxcpm2_jax.config.run import (
    BackboneRun,
    BatchConfig,
    CheckpointConfig,
    LogConfig,
    OptimConfig,
    StageConfig,
    VAELossConfig,
    VAERun,
)
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.torch_io import tables
from voxcpm2_jax.vae import autoencoder

pytestmark = pytest.mark.fast

FACTORS = [1.0 + 0.25 * i for i in range(64)]
RELEASED = {  # the release's fields and their order, keys that no part reads among them
    "architecture": "voxcpm2",
    "lm_config": {
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 32768, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05, "rope_theta": 10000, "kv_channels": 128,
        "rope_scaling": {"type": "longrope", "long_factor": FACTORS, "short_factor": FACTORS,
                         "original_max_position_embeddings": 32768},
        "vocab_size": 73448, "use_mup": False, "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4,
    },
    "patch_size": 4, "feat_dim": 64, "scalar_quantization_latent_dim": 512, "scalar_quantization_scale": 9,
    "residual_lm_num_layers": 8, "residual_lm_no_rope": True,
    "encoder_config": {"hidden_dim": 1024, "ffn_dim": 4096, "num_heads": 16, "num_layers": 12, "kv_channels": 128},
    "dit_config": {
        "hidden_dim": 1024, "ffn_dim": 4096, "num_heads": 16, "num_layers": 12, "kv_channels": 128, "mean_mode": False,
        "cfm_config": {"sigma_min": 1e-06, "solver": "euler", "t_scheduler": "log-norm", "inference_cfg_rate": 2.0},
    },
    "audio_vae_config": {
        "encoder_dim": 128, "encoder_rates": [2, 5, 8, 8], "latent_dim": 64, "decoder_dim": 2048,
        "decoder_rates": [8, 6, 5, 2, 2, 2], "sample_rate": 16000, "out_sample_rate": 48000,
        "sr_bin_boundaries": [20000, 30000, 40000],
    },
    "max_length": 8192, "device": "cuda", "dtype": "bfloat16",
}  # fmt: skip


# Local heads are as wide as the LM's, whose RoPE factors they share; everything else may be absent.
BARE = {"architecture": "voxcpm2", "encoder_config": {"kv_channels": 128}, "dit_config": {"kv_channels": 128}}


def changed(path, value, base=RELEASED):
    """A copy of nested dicts with one entry set."""
    copy = json.loads(json.dumps(base))
    *parents, last = path.split(".")
    node = copy
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return copy


@pytest.fixture
def read(tmp_path):
    def read_content(content):
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return read_released(tmp_path)

    return read_content


# ---- the released file -----------------------------------------------------------------------------------------------


def test_released_file_comes_back_as_it_was(read):
    released = read(RELEASED)
    again = to_released(released.model, released.vae, released.raw)
    assert again == RELEASED and list(again) == list(RELEASED)
    assert json.dumps(again) == json.dumps(RELEASED)  # numbers as they were written, 12 not 12.0
    assert released.unknown == ("dit_config.mean_mode",)


def test_released_file_is_the_2b_preset(read):
    model = read(RELEASED).model
    rope = dataclasses.replace(MODELS["2b"].lm_config.rope_scaling, long_factor=tuple(FACTORS), short_factor=tuple(FACTORS))
    assert model == dataclasses.replace(MODELS["2b"], lm_config=dataclasses.replace(MODELS["2b"].lm_config, rope_scaling=rope))
    assert read(RELEASED).vae == AudioVAEConfig()


def test_a_file_of_our_own_is_read_as_the_same_model(read):
    for model in MODELS.values():
        vae = AudioVAEConfig(latent_dim=model.feat_dim)
        released = read(to_released(model, vae))
        assert (released.model, released.vae, released.unknown) == (model, vae, ())


def test_absent_keys_take_the_references_defaults(read):
    released = read(BARE)
    lm, flow, vae = released.model.lm_config, released.model.dit_config.cfm_config, released.vae
    assert lm.use_mup and not released.model.residual_lm_no_rope and flow.training_cfg_rate == 0.1
    assert vae.depthwise and not vae.use_noise_block and vae.cond_type == "scale_bias"
    assert not released.model.dit_config.dit_mean_mode
    assert to_released(released.model, released.vae, released.raw) == BARE


def test_a_changed_field_is_written_and_the_others_stay(read):
    released = read(RELEASED)
    model = dataclasses.replace(
        released.model, dtype="float32", lm_config=dataclasses.replace(released.model.lm_config, use_mup=True)
    )
    expected = changed("dtype", "float32", changed("lm_config.use_mup", True))
    assert to_released(model, released.vae, released.raw) == expected
    bare = read(BARE)
    model = dataclasses.replace(bare.model, max_length=100)
    assert to_released(model, bare.vae, bare.raw) == BARE | {"max_length": 100}


def test_unknown_keys_are_kept_and_given_back(read):
    content = changed("extra", {"a": {"b": 1}}, changed("audio_vae_config.window", 3, changed("lm_config.new", [1])))
    released = read(content)
    assert set(released.unknown) == {"extra.a.b", "audio_vae_config.window", "lm_config.new", "dit_config.mean_mode"}
    assert to_released(released.model, released.vae, released.raw) == content


def test_runtime_keys_are_neither_unknown_nor_of_the_model(read):
    content = changed("device", "mps", changed("architecture", "VoxCPM2"))
    released = read(content)
    assert released.unknown == ("dit_config.mean_mode",)
    assert to_released(released.model, released.vae, released.raw) == content


@pytest.mark.parametrize(
    ("written", "meant"), [("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp32", "float32"), ("float32", "float32")]
)
def test_aliases_of_dtype(read, written, meant):
    content = changed("dtype", written)
    released = read(content)
    assert released.model.dtype == meant
    assert to_released(released.model, released.vae, released.raw) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("[1]", "got 'no object'"),
        ("{}", "got 'none'"),
        ({"architecture": "voxcpm"}, """expected "architecture": "voxcpm2", got 'voxcpm'"""),
        (changed("patch_size", "4"), "patch_size: expected int, got '4'"),
        (changed("patch_size", 4.5), "patch_size: expected int, got 4.5"),
        (changed("patch_size", True), "patch_size: expected int, got True"),
        (changed("lm_config.use_mup", 1), "lm_config.use_mup: expected bool, got 1"),
        (changed("lm_config", []), "lm_config: expected fields of LMConfig"),
        (changed("audio_vae_config.encoder_rates", 640), "encoder_rates: expected a list, got 640"),
        (changed("audio_vae_config.encoder_rates", [2, "5"]), r"encoder_rates[1]: expected int, got '5'"),
        (changed("audio_vae_config.latent_dim", 32), "feat_dim 64 differs from audio_vae_config.latent_dim 32"),
    ],
)  # fmt: skip
def test_files_that_are_no_config(read, content, message):
    with pytest.raises(UserError) as error:
        read(content)
    assert message in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file; expected a released VoxCPM2 directory"):
        read_released(tmp_path)


# ---- impossible values -----------------------------------------------------------------------------------------------

SIZES = (
    "patch_size", "feat_dim", "residual_lm_num_layers", "scalar_quantization_latent_dim", "scalar_quantization_scale",
    "max_length", *(f"lm_config.{name}" for name in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "kv_channels", "max_position_embeddings", "vocab_size", "rope_scaling.original_max_position_embeddings")),
    *(f"{part}.{name}" for part in ("encoder_config", "dit_config")
      for name in ("hidden_dim", "ffn_dim", "num_heads", "num_layers", "kv_channels")),
    *(f"audio_vae_config.{name}" for name in ("encoder_dim", "latent_dim", "decoder_dim", "sample_rate", "out_sample_rate")),
)  # fmt: skip


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("path", SIZES)
def test_sizes_below_one(read, path, value):
    with pytest.raises(UserError) as error:
        read(changed(path, value))
    assert path.split(".")[-1] in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("lm_config.vocab_size", 104, "vocab_size must be over 104"),
        ("lm_config.num_key_value_heads", 3, "lm_config: 16 heads cannot share 3 key/value heads evenly"),
        ("encoder_config.num_heads", 5, "encoder_config: 5 heads cannot share 2 key/value heads evenly"),
        ("dit_config.num_heads", 3, "dit_config: 3 heads cannot share 2 key/value heads evenly"),
        ("lm_config.kv_channels", 127, "lm_config: head size must be even for RoPE, got 127"),
        ("lm_config.kv_channels", 64, "lm_config: rope_scaling needs 32 factors (half the head size), got 64"),
        ("encoder_config.kv_channels", 32, "encoder_config: rope_scaling needs 16 factors"),
        ("lm_config.rope_scaling.short_factor", [1.0], "rope_scaling needs 64 factors (half the head size), got 1"),
        ("dit_config.hidden_dim", 33, "dit_config.hidden_dim must be even"),
        ("dit_config.hidden_dim", 2, "dit_config.hidden_dim must be even and at least 4"),
        ("dit_config.cfm_config.t_scheduler", "cosine", "t_scheduler must be log-norm or uniform, got 'cosine'"),
        ("dit_config.cfm_config.solver", "rk4", "solver must be euler, got 'rk4'"),
        ("dit_config.cfm_config.training_cfg_rate", 1.0, "training_cfg_rate must lie in [0, 1), got 1.0"),
        ("dtype", "float64", "dtype must be one of bfloat16, float16, float32, got 'float64'"),
        ("audio_vae_config.encoder_rates", [], "encoder_rates and decoder_rates must not be empty"),
        ("audio_vae_config.decoder_rates", [1920, 0], "every rate must be at least 1"),
        ("audio_vae_config.decoder_dim", 63, "decoder_dim 63 cannot be halved 6 times"),
        ("audio_vae_config.sr_bin_boundaries", [30000, 20000], "sr_bin_boundaries must rise strictly"),
        ("audio_vae_config.cond_type", "film", "cond_type 'film' is not supported"),
        ("audio_vae_config.use_noise_block", True, "use_noise_block is not supported"),
        ("audio_vae_config.cond_out_layer", True, "cond_out_layer is not supported"),
    ],
)
def test_impossible_values(read, path, value, message):
    with pytest.raises(UserError) as error:
        read(changed(path, value))
    assert message in str(error.value)


def test_a_head_needs_room_where_its_size_follows_from_the_width():
    with pytest.raises(UserError, match="encoder_config: 16 heads do not fit a width of 8"):
        ModelConfig(encoder_config=LocalConfig(hidden_dim=8, kv_channels=None))


@pytest.mark.parametrize("rates", [(48000, 16000), (48000, 48000), (16000, 16000), (16000, 44100), (24000, 48000)])
def test_trap_14_rates_that_do_not_agree_raise(read, rates):
    """16 kHz in, 48 kHz out, 25 frames a second on both sides."""
    sample_rate, out_sample_rate = rates
    content = changed("audio_vae_config.sample_rate", sample_rate, changed("audio_vae_config.out_sample_rate", out_sample_rate))
    with pytest.raises(UserError, match="sample rates and strides must agree"):
        read(content)
    with pytest.raises(UserError, match="sample rates and strides must agree"):
        AudioVAEConfig(sample_rate=sample_rate, out_sample_rate=out_sample_rate)


def test_trap_14_strides_that_do_not_agree_raise():
    with pytest.raises(UserError, match=r"16000/640 frames per second, decoder takes 48000/960"):
        AudioVAEConfig(decoder_rates=(8, 6, 5, 2, 2))
    vae = AudioVAEConfig()
    assert (vae.encoder_hop, vae.decoder_hop) == (640, 1920)


TINY = MODELS["tiny"]
BRANCH = OptimConfig(schedule="wsd", warmup_steps=9, decay_start=60, decay_steps=20)


@pytest.mark.parametrize(
    ("cls", "values", "field"),
    [
        (OptimConfig, {"learning_rate": 0.0}, "optim.learning_rate"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps"),
        (OptimConfig, {"schedule": "steps"}, "optim.schedule"),
        (OptimConfig, {"schedule_steps": 0}, "optim.schedule_steps"),
        (OptimConfig, {"decay_fraction": 1.5}, "optim.decay_fraction"),
        (OptimConfig, {"end_ratio": -0.1}, "optim.end_ratio"),
        (OptimConfig, {"beta1": 1.0}, "optim.beta1"),
        (OptimConfig, {"beta2": 1.0}, "optim.beta2"),
        (OptimConfig, {"eps": 0.0}, "optim.eps"),
        (OptimConfig, {"weight_decay": -1.0}, "optim.weight_decay"),
        (OptimConfig, {"clip_norm": 0.0}, "optim.clip_norm"),
        (OptimConfig, {"ema_decay": 1.0}, "optim.ema_decay"),
        (CheckpointConfig, {"every_steps": 0}, "every_steps"),
        (CheckpointConfig, {"keep": 0}, "keep"),
        (LogConfig, {"every_steps": 0}, "log.every_steps"),
        (LogConfig, {"slow_share": 0.0}, "log.slow_share must be None or a share over 0, got 0.0"),
        (LogConfig, {"trackers": ("wandb", "neptune")}, "log.trackers: expected some of wandb, trackio, mlflow, got neptune"),
        (LogConfig, {"project": ""}, "log.project"),
        (BatchConfig, {"rows": 0}, "rows"),
        (BatchConfig, {"slots": 0}, "slots"),
        (BatchConfig, {"patches": 0}, "patches"),
        (BatchConfig, {"patches": 8, "target_patches": 9}, "target_patches"),
        (BackboneRun, {"model": TINY, "num_steps": 0}, "num_steps"),
        (
            BackboneRun,
            {"model": TINY, "num_steps": 70, "optim": BRANCH, "batch": BatchConfig(slots=64, patches=1)},
            "num_steps 70 ends the run amid its decay, 20 updates from optim.decay_start 60 on; expected 80 or more",
        ),
        (BackboneRun, {"model": TINY, "accumulate": 0}, "accumulate"),
        (BackboneRun, {"model": TINY, "remat": "some"}, "remat"),
        (BackboneRun, {"model": TINY, "products": "int4"}, "products must be None or one of int8, fp8, got 'int4'"),
        (BackboneRun, {"model": dataclasses.replace(TINY, dtype="float16")}, "train in bfloat16 or float32"),
        (BackboneRun, {"model": TINY, "batch": BatchConfig(slots=513, patches=1)}, "batch.slots 513"),
        (DemoConfig, {"num_digit_clips": 0}, "num_digit_clips"),
        (DemoConfig, {"num_foreign_clips": 4000}, "num_foreign_clips"),
        (DemoConfig, {"max_digits": 1}, "max_digits"),
        (DemoConfig, {"num_heldout": 1000}, "num_heldout"),
        (DebianConfig, {"languages": "en,de"}, "languages"),
        (DebianConfig, {"languages": ""}, "languages"),
        (DebianConfig, {"languages": "en,en"}, "languages"),
        (DebianConfig, {"num_heldout": -1}, "num_heldout"),
        (DataConfig, {"source": "web"}, "source"),
        (DataConfig, {"source": "manifest"}, "manifest"),
        (DataConfig, {"manifest": "a.jsonl"}, "manifest"),
        (DataConfig, {"vocab_size": 104}, "vocab_size"),
        (DataConfig, {"patch_size": 0}, "patch_size"),
        (DataConfig, {"min_sec": 2.0, "max_sec": 1.0}, "min_sec"),
        (DataConfig, {"trim_db": 0.0}, "trim_db"),
        (DataConfig, {"trim": "both"}, "trim"),
        (DataConfig, {"trim_keep_ms": -1.0}, "trim_keep_ms"),
        (DataConfig, {"latent_dtype": "int8"}, "latent_dtype"),
        (DataConfig, {"shard_clips": 0}, "shard_clips"),
        (DataConfig, {"encode_sec": 0.0}, "encode_sec"),
        (PairsConfig, {"encoder": "ge2e"}, "encoder"),
        (PairsConfig, {"min_cosine": 1.0}, "min_cosine"),
        (PairsConfig, {"references": 0}, "references"),
        (PairsConfig, {"min_sec": 2.0, "max_sec": 1.0}, "min_sec"),
        (PairsConfig, {"seed": -1}, "seed"),
        (VAERun, {"vae": AudioVAEConfig(), "rows": 0}, "rows"),
        (VAERun, {"vae": AudioVAEConfig(), "crop_frames": 0}, "crop_frames"),
        (VAERun, {"vae": AudioVAEConfig(), "num_samples": -1}, "num_samples"),
        (VAERun, {"vae": AudioVAEConfig(), "loss": VAELossConfig(mel=-1.0)}, "loss"),
        (EvaluateConfig, {"measure": "letters"}, "measure"),
        (EvaluateConfig, {"batch_texts": 0}, "batch_texts"),
    ],
)  # fmt: skip
def test_run_configs_refuse_what_no_run_can_do(cls, values, field):
    with pytest.raises(UserError) as error:
        cls(**values)
    assert field in str(error.value)


# ---- dataclass <-> plain data ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[float, ...] = ()
    nested: tuple[tuple[int, int], ...] = ()
    name: str = "x"
    limit: int | None = 3
    is_on: bool = False


def test_from_dict_makes_the_declared_types():
    got = from_dict(
        Outer,
        {"inner": {"size": 3.0, "share": 1}, "many": [1, 2.5], "nested": [[0, 5], (7, 9)], "limit": None, "is_on": True},
    )
    assert got == Outer(inner=Inner(3, 1.0), many=(1.0, 2.5), nested=((0, 5), (7, 9)), limit=None, is_on=True)
    assert type(got.inner.size) is int and type(got.inner.share) is float and type(got.many[0]) is float
    assert from_dict(Outer, {}) == Outer()
    assert from_dict(Outer, to_dict(got)) == got


def test_a_tuple_of_two_types_gives_each_place_its_own():
    assert from_dict(Outer, {"pair": [3, 0.5]}).pair == (3, 0.5)
    assert type(from_dict(Outer, {"pair": [3, 1]}).pair[1]) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"sise": 1}}, "config.inner.sise: unknown key; Inner has share, size"),
        ({"inner": 3}, "config.inner: expected fields of Inner, got 3"),
        ({"inner": None}, "config.inner: expected fields of Inner, got None"),
        ({"inner": {"size": "1"}}, "config.inner.size: expected int, got '1'"),
        ({"inner": {"size": None}}, "config.inner.size: expected int, got None"),
        ({"inner": {"size": 1.5}}, "config.inner.size: expected int, got 1.5"),
        ({"inner": {"share": "a"}}, "config.inner.share: expected float, got 'a'"),
        ({"inner": {"share": True}}, "config.inner.share: expected float, got True"),
        ({"pair": [1]}, "config.pair: expected 2 values, got 1"),
        ({"pair": "12"}, "config.pair: expected a list, got '12'"),
        ({"many": 3}, "config.many: expected a list, got 3"),
        ({"many": [1, "b"]}, "config.many[1]: expected float, got 'b'"),
        ({"nested": [[1, 2], [3]]}, "config.nested[1]: expected 2 values, got 1"),
        ({"name": 3}, "config.name: expected str, got 3"),
        ({"limit": True}, "config.limit: expected int, got True"),
        ({"is_on": 1}, "config.is_on: expected bool, got 1"),
        ([], "config: expected fields of Outer, got []"),
    ],
)
def test_from_dict_is_strict(data, message):
    with pytest.raises(UserError) as error:
        from_dict(Outer, data)
    assert str(error.value).startswith(message)


def test_unknown_keys_are_collected_if_asked_for():
    unknown = {}
    assert from_dict(Outer, {"a": 1, "inner": {"b": 2, "size": 4}}, unknown=unknown) == Outer(inner=Inner(4))
    assert unknown == {"a": 1, "inner": {"b": 2}}


@pytest.mark.parametrize("cls", [AudioVAEConfig, OptimConfig, DataConfig, EvaluateConfig, LMConfig])
def test_every_default_is_valid_and_comes_back(cls):
    assert from_dict(cls, to_dict(cls())) == cls()


def test_backbone_run_comes_back():
    run = BackboneRun(
        model=TINY,
        batch=BatchConfig(slots=64, patches=32),
        stages=(StageConfig(max_sec=2.0), StageConfig(first_step=10, weights=(("en", 2.0),))),
        mesh=(2, -1, 1),
    )
    assert from_dict(BackboneRun, to_dict(run)) == run


# ---- derived sizes ---------------------------------------------------------------------------------------------------


def test_rope_factors_are_long_only_past_the_original_length():
    rope = RopeScaling(long_factor=(2.0,) * 64, short_factor=(3.0,) * 64, original_max_position_embeddings=32768)
    short = ModelConfig(lm_config=LMConfig(kv_channels=128, rope_scaling=rope), encoder_config=LocalConfig(kv_channels=128),
                        dit_config=DiTConfig(kv_channels=128))  # fmt: skip
    long = dataclasses.replace(short, lm_config=dataclasses.replace(short.lm_config, max_position_embeddings=65536))
    assert short.tslm.rope_factor[0] == short.locdit.rope_factor[0] == 3.0 and short.tslm.rope_scale == 1.0
    assert long.tslm.rope_factor[0] == long.locenc.rope_factor[0] == 2.0
    assert long.tslm.rope_scale == pytest.approx(math.sqrt(1 + math.log(2) / math.log(32768)))
    assert dataclasses.replace(short, residual_lm_no_rope=True).ralm.rope_factor is None


def test_models_are_there_by_name():
    assert set(MODELS) == {"tiny", "demo", "small", "2b"}
    for name, model in MODELS.items():
        assert from_dict(ModelConfig, to_dict(model), where=name) == model
        assert model.ralm.rope_factor is None and model.embed_scale == 1.0 and model.tslm.residual_scale == 1.0
        assert len({stack.num_kv_heads for stack in (model.tslm, model.ralm, model.locenc, model.locdit)}) == 1
    assert MODELS["2b"].dtype == "bfloat16" and MODELS["tiny"].dtype == "float32"
    assert MODELS["2b"].dit_config.cfm_config == FlowConfig(inference_cfg_rate=2.0)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_parameter_counts_of_the_release():
    """REFERENCE: the table of the report's parts, from the shapes alone."""
    shapes = jax.eval_shape(lambda key: voxcpm2.init(key, MODELS["2b"]), jax.random.key(0))
    parts = {name: count(shapes.pop(name)) for name in ("base_lm", "residual_lm", "feat_encoder", "feat_decoder")}
    assert parts == {
        "base_lm": 1_471_744_000, "residual_lm": 377_522_176, "feat_encoder": 207_711_232, "feat_decoder": 212_040_768,
    }  # fmt: skip
    assert count(shapes) == 20_986_368
    assert count(shapes) + sum(parts.values()) == 2_290_004_544


def test_parameter_count_of_the_codec():
    shapes = jax.eval_shape(lambda key: autoencoder.init(key, AudioVAEConfig()), jax.random.key(0))
    assert count(shapes) == 94_213_954


def test_tensors_of_the_release():
    backbone, codec = tables.backbone_table(MODELS["2b"]), tables.vae_table(AudioVAEConfig())
    assert (len(backbone), len(codec)) == (577, 312)
    assert sum(int(np.prod(row.torch_shape)) for row in backbone) == 2_290_004_544
    assert sum(int(np.prod(row.torch_shape)) for row in codec if row.path) == 94_213_954
