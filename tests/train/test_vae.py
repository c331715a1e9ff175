"""Training of the codec: crops, one update, a run that stops and goes on, several devices."""

import dataclasses
import importlib.util
import json
import pathlib
from functools import partial

import jax
import numpy as np
import pytest
import soundfile
from tensorflow_datasets.core import constants

from tests.corpus.test_datasets import ljspeech
from voxcpm2_jax import metrics, workdir
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.run import VAERun
from voxcpm2_jax.train import guard
from voxcpm2_jax.train.crops import Crops, Waves
from voxcpm2_jax.train.vae import _recordings, init_state, tiny_clips, train, train_step

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "vae.py"


def _config(variant, **changes) -> VAERun:
    spec = importlib.util.spec_from_file_location("vae_config", CONFIGS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dataclasses.replace(from_dict(VAERun, module.get_config(variant).to_dict()), **changes)


@pytest.fixture(scope="module")
def config():
    """Two blocks a side: compiling is the cost."""
    codec = AudioVAEConfig(
        encoder_dim=4, encoder_rates=(8, 80), latent_dim=8, decoder_dim=16, decoder_rates=(80, 12), out_sample_rate=24000,
        sr_bin_boundaries=None,
    )  # fmt: skip
    tiny = _config("tiny", vae=codec, num_steps=20, num_samples=0)
    return dataclasses.replace(tiny, optim=dataclasses.replace(tiny.optim, warmup_steps=5))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, config):
    directory = tmp_path_factory.mktemp("whole")
    return directory, train(config, directory)


@pytest.fixture(scope="module")
def step(config):
    return jax.jit(partial(train_step, config=config))


@pytest.mark.parametrize("variant", ["tiny", "demo", "demo_long", "small", "release"])
def test_every_variant_is_a_whole_run(variant):
    config = _config(variant)
    assert config.vae.sample_rate == 16000 and config.vae.out_sample_rate in (24000, 48000)


def test_crops_show_both_rates_the_same_moment(config):
    """A ramp in seconds: what stands at a place of the input stands at the same time of the target."""
    vae = config.vae
    ramps = [np.arange(2 * hz, dtype=np.float32) / hz for hz in (vae.sample_rate, vae.out_sample_rate)]
    batch = Crops(config, Waves(vae, [ramps[0]], [ramps[1]])).batch(0, 3)
    assert batch["input_BA"].shape == (config.rows, config.crop_frames * vae.encoder_hop)
    assert batch["target_BA"].shape == (config.rows, config.crop_frames * vae.decoder_hop)
    np.testing.assert_allclose(batch["input_BA"][:, ::2], batch["target_BA"][:, ::3], atol=1e-6)
    assert len(np.unique(batch["input_BA"][:, 0])) == config.rows


def test_a_short_clip_stands_whole_within_its_crop(config):
    vae = config.vae
    short = [np.ones(320, np.float32)], [np.ones(320 * vae.out_sample_rate // vae.sample_rate, np.float32)]
    batch = Crops(config, Waves(vae, *short)).batch(0, 0)
    np.testing.assert_array_equal(batch["input_BA"].sum(1), 320)
    np.testing.assert_array_equal(batch["target_BA"].sum(1), 480)
    np.testing.assert_allclose(batch["target_BA"].argmax(1) / batch["input_BA"].argmax(1).clip(1), 1.5, atol=0.01)


def test_batches_depend_on_seed_and_step_alone(config):
    crops = Crops(config, tiny_clips(config))
    later = Crops(config, tiny_clips(config))
    later.batch(0, 0)
    np.testing.assert_array_equal(crops.batch(5, 7)["input_BA"], later.batch(5, 7)["input_BA"])
    assert np.abs(crops.batch(5, 7)["input_BA"] - crops.batch(5, 8)["input_BA"]).max() > 0
    assert np.abs(crops.batch(5, 7)["input_BA"] - crops.batch(6, 7)["input_BA"]).max() > 0


def test_no_clip_is_the_users_mistake(config):
    with pytest.raises(UserError, match="at least one clip"):
        Crops(config, Waves(config.vae, [], []))


def test_an_update_moves_every_parameter(config, step):
    crops = Crops(config, tiny_clips(config))
    state = init_state(config)
    new, figures = step(state, crops.batch(0, 0))
    values = {name: pair for name, pair in metrics.fetch(figures).items() if name not in guard.VERDICT}
    assert int(new.step) == 1 and "loss" in values and not guard.not_finite(values)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), state.params, new.params)
    assert all(jax.tree.leaves(moved)), moved


def test_the_loss_falls(whole_run):
    rows = [json.loads(line) for line in (whole_run[0] / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss_mel"] < 0.8 * rows[0]["loss_mel"]


def test_a_run_that_stops_and_goes_on_equals_one_that_never_stopped(tmp_path, config, whole_run):
    schedule = dataclasses.replace(config.optim, schedule_steps=config.num_steps)
    half = dataclasses.replace(config, num_steps=config.num_steps // 2, optim=schedule)
    train(half, tmp_path)
    row = train(dataclasses.replace(half, num_steps=config.num_steps), tmp_path)
    assert (row["step"], row["loss"]) == (whole_run[1]["step"], whole_run[1]["loss"])
    one, other = (workdir.load_codec(directory)[1] for directory in (whole_run[0], tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_on_recordings_leaves_a_codec(tmp_path, config):
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * draw.normal(size=12000), 24000)
    (tmp_path / "train.jsonl").write_text('{"audio": "a.wav", "text": "one"}\n')
    (tmp_path / "heldout.jsonl").write_text('{"audio": "b.wav", "text": "two"}\n')
    short = dataclasses.replace(config, num_steps=2, sample_every_steps=2, num_samples=1)
    row = train(short, tmp_path / "run", tmp_path)
    assert row["step"] == 2 and np.isfinite(row["loss"])
    vae_config, _ = workdir.load_codec(tmp_path / "run")
    assert vae_config == config.vae


def test_what_is_trained_on_and_what_is_listened_to(tmp_path, monkeypatch):
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"audio": "{name}.wav", "text": "one"}}\n')
    for data in (tmp_path, tmp_path / "train.jsonl"):
        assert [part[0].audio.name for part in _recordings(data)] == ["train.wav", "heldout.wav"]
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # where a heldout.jsonl lies that has nothing to do with the set
    ljspeech(tmp_path)
    recordings, listened = _recordings("tfds:ljspeech")
    assert listened is recordings and len(recordings) == 3
    (tmp_path / "heldout.jsonl").unlink()
    assert [part[0].audio.name for part in _recordings(tmp_path)] == ["train.wav", "train.wav"]
    with pytest.raises(UserError, match="no such manifest"):
        _recordings(tmp_path / "missing.jsonl")


def test_rows_that_suit_no_mesh_are_the_users_mistake(tmp_path, config):
    with pytest.raises(UserError, match="rows 3 cannot be split over 8 devices"):
        train(dataclasses.replace(config, rows=3), tmp_path)


def test_sharded_equals_unsharded(config, step):
    crops = Crops(config, tiny_clips(config))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one = many = init_state(config)
    for i in range(2):
        one, figures = step(one, crops.batch(0, i))
        many, sharded = step(many, jax.device_put(crops.batch(0, i), layout))
        np.testing.assert_allclose(sharded["loss"], figures["loss"], rtol=1e-4)
