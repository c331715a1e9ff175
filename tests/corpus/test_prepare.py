import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from tensorflow_datasets.core import constants

from tests.corpus.codecs import VAE, random_params
from tests.corpus.test_datasets import ljspeech, vctk
from tests.corpus.test_embedded import write_packages
from voxcpm2_jax.config.corpus import DataConfig, DebianConfig
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.text import written
from voxcpm2_jax.corpus import demo, encode, manifest, prepare, shard
from voxcpm2_jax.corpus.prepare import make_shards
from voxcpm2_jax.data import audio, shards
from voxcpm2_jax.data.identity import check_heldout
from voxcpm2_jax.data.tokenizer import load_tokenizer, train_tokenizer
from voxcpm2_jax.vae import autoencoder
from voxcpm2_jax.workdir import codec_sha256

P, HOP = 2, 64
TEXTS = ["hello there", "good morning", "a b c", "numbers of words", "the end", "again and again", "yes"]


@pytest.fixture(scope="module")
def vae_params():
    return random_params()


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300).save(directory)
    return directory


def record(path, sec, seed, rate=16000):
    rng = np.random.default_rng(seed)
    soundfile.write(path, 0.2 * rng.standard_normal(round(sec * rate)), rate)
    return path


@pytest.fixture
def recordings(tmp_path):
    secs = (0.45, 0.21, 0.45, 0.45, 0.9, 0.05, 3.0)  # the last two are too short and too long
    found = [manifest.Recording(record(tmp_path / f"{i}.wav", sec, i), text) for i, (sec, text) in enumerate(zip(secs, TEXTS))]
    found[1] = manifest.Recording(found[1].audio, found[1].text, description="low voice", is_prompt=True, speaker="x")
    found[2] = manifest.Recording(found[2].audio, found[2].text, ref_audio=found[0].audio, dataset="own")
    found[4] = manifest.Recording(found[4].audio, found[4].text, start_sec=0.2, end_sec=0.65)
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    found.insert(2, manifest.Recording(tmp_path / "bad.wav", "bad"))
    found.insert(4, manifest.Recording(tmp_path / "missing.wav", "missing"))
    found.append(manifest.Recording(found[0].audio, "bad reference", ref_audio=tmp_path / "missing.wav"))
    manifest.write_manifest(tmp_path / "m.jsonl", found)
    return [found[i] for i in (0, 1, 3, 5, 6)]


def config_of(tmp_path, tokenizer_dir, **changes):
    fields = {
        "source": "manifest", "manifest": str(tmp_path / "m.jsonl"), "tokenizer": str(tokenizer_dir), "patch_size": P,
        "min_sec": 0.1, "max_sec": 2.0, "latent_dtype": "float32", "shard_clips": 2, "encode_sec": 1.0,
    }  # fmt: skip
    return DataConfig(**(fields | changes))


def test_shards_hold_what_the_codec_gives_clip_by_clip(tmp_path, recordings, tokenizer_dir, vae_params):
    header = make_shards(config_of(tmp_path, tokenizer_dir), tmp_path / "out", vae_params, VAE)
    assert header == shards.read_header(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    lengths = np.load(tmp_path / "out" / shards.LENGTHS_FILE)
    source = shards.grain_source([tmp_path / "out"], [header])
    assert len(source) == len(recordings) == header.num_clips == len(lengths)
    encode = jax.jit(autoencoder.encode, static_argnums=1)

    def latents(path, *part):
        audio_A = audio.pad_to_patches(audio.load(path, 8000, *part), P * HOP, "right")
        return np.asarray(encode(vae_params, VAE, audio_A[None]))[0].reshape(-1, P, 3)

    frames = []
    for recording, clip, sizes in zip(recordings, map(shards.from_record, source), lengths):
        assert clip.text == recording.text and clip.text_ids.tolist() == tokenizer.encode(recording.text)
        described = tokenizer.encode(recording.full_text) if recording.description else []
        assert (clip.described_ids is not None) == bool(described) and list(
            () if clip.described_ids is None else clip.described_ids
        ) == described

        wanted_MPC = latents(recording.audio, recording.start_sec, recording.end_sec)
        np.testing.assert_allclose(clip.patches_MPC, wanted_MPC, atol=1e-5 * np.abs(wanted_MPC).max())
        if recording.ref_audio:
            np.testing.assert_allclose(clip.reference_MPC, latents(recording.ref_audio), rtol=1e-4)
        reference = len(clip.reference_MPC) if recording.ref_audio else 0
        group = header.groups.index((clip.dataset, clip.language or "unknown"))
        expected = (len(clip.text_ids), len(clip.patches_MPC), reference, recording.is_prompt, len(described), group)
        assert sizes.item() == expected
        assert (clip.description, clip.speaker, clip.is_prompt) == (
            recording.description,
            recording.speaker,
            recording.is_prompt,
        )
        frames.append(clip.patches_MPC.reshape(-1, 3))
    frames_TC = np.concatenate(frames).astype(np.float64)
    np.testing.assert_allclose(header.latent_mean, frames_TC.mean(0), rtol=1e-6)
    np.testing.assert_allclose(header.latent_std, frames_TC.std(0), rtol=1e-6)
    np.testing.assert_allclose(header.latent_min, frames_TC.min(0), rtol=1e-12)
    np.testing.assert_allclose(header.latent_max, frames_TC.max(0), rtol=1e-12)
    assert header.hours == pytest.approx(len(frames_TC) * HOP / 8000 / 3600)
    assert header.skipped == {"unreadable": 1, "missing": 1, "too short": 1, "too long": 1, "reference missing": 1}
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert reasons == ["unreadable", "missing", "too short", "too long", "reference missing"]
    assert (header.encoder_hz, header.decoder_hz, header.patch_sec, header.latent_dim) == (8000, 24000, P * HOP / 8000, 3)
    assert (tmp_path / "out" / "codec" / "config.json").is_file() and not [
        f for f in tmp_path.iterdir() if f.name.startswith(".")
    ]


def test_the_stored_type_is_the_latents_rounded(tmp_path, recordings, tokenizer_dir, vae_params):
    exact, rounded = (
        make_shards(config_of(tmp_path, tokenizer_dir, latent_dtype=dtype), tmp_path / dtype, vae_params, VAE)
        for dtype in ("float32", "float16")
    )
    sources = [shards.grain_source([tmp_path / h.latent_dtype], [h]) for h in (exact, rounded)]
    for a, b in zip(*sources):
        a, b = shards.from_record(a), shards.from_record(b)
        np.testing.assert_array_equal(a.patches_MPC.astype(np.float16), b.patches_MPC.astype(np.float16))
    assert exact.codec_sha256 == rounded.codec_sha256 == codec_sha256(vae_params, VAE)
    assert exact.sources_sha256 == rounded.sources_sha256 and exact.tokenizer_sha256 == rounded.tokenizer_sha256


def test_trimming_and_held_out_clips(tmp_path, recordings, tokenizer_dir, vae_params):
    quiet = np.zeros(8000)
    sound, rate = soundfile.read(recordings[0].audio)
    soundfile.write(tmp_path / "wide.wav", np.concatenate([quiet, sound, quiet]), rate)
    manifest.write_manifest(tmp_path / "h.jsonl", [manifest.Recording(tmp_path / "wide.wav", "hello there")])
    config = config_of(tmp_path, tokenizer_dir, heldout=str(tmp_path / "h.jsonl"), trim="silence", trim_keep_ms=0.0)
    make_shards(config, tmp_path / "out", vae_params, VAE)
    header = shards.read_header(tmp_path / "out" / "heldout")
    lengths = np.load(tmp_path / "out" / "heldout" / shards.LENGTHS_FILE)
    assert header.num_clips == 1 and abs(lengths["patches"][0] - 0.45 * 8000 / (P * HOP)) <= 2
    assert (header.trim, header.trim_db) == ("silence", -50.0)


def test_held_out_recordings_are_not_trained_on(tmp_path, recordings, tokenizer_dir, vae_params):
    """Parts of a file count if they overlap; where a manifest lies does not matter."""
    with pytest.raises(UserError, match=r"heldout .*m\.jsonl: the same recordings as manifest; expected others"):
        make_shards(config_of(tmp_path, tokenizer_dir, heldout=str(tmp_path / "m.jsonl")), tmp_path / "out", vae_params, VAE)
    whole, part = recordings[0], dataclasses.replace(recordings[4], start_sec=0.5, end_sec=0.9)
    beside = dataclasses.replace(recordings[4], start_sec=0.65, end_sec=None)
    (tmp_path / "sub").mkdir()
    manifest.write_manifest(tmp_path / "sub" / "h.jsonl", [beside, whole])
    config = config_of(tmp_path, tokenizer_dir, heldout=str(tmp_path / "sub" / "h.jsonl"))
    header = make_shards(config, tmp_path / "out", vae_params, VAE)
    assert header.num_clips == 4 and header.skipped["held out"] == 2  # the last recording has the audio of the first
    assert not check_heldout([tmp_path / "out"], [tmp_path / "out" / "heldout"])
    manifest.write_manifest(tmp_path / "h2.jsonl", [beside, part])
    make_shards(config_of(tmp_path, tokenizer_dir, manifest=str(tmp_path / "h2.jsonl")), tmp_path / "two", vae_params, VAE)
    with pytest.raises(UserError, match=r"two: 1 of 2 clips are also trained on, first clip 1; expected clips that"):
        check_heldout([tmp_path / "out"], [tmp_path / "two"])


def test_a_codec_of_unusable_scale_is_refused_before_everything_is_encoded(
    tmp_path, recordings, tokenizer_dir, vae_params, monkeypatch
):
    config = config_of(tmp_path, tokenizer_dir)
    with pytest.raises(UserError, match=r"out: the latents' standard deviation is .*; expected 0\.3 to 3\.0"):
        make_shards(config, tmp_path / "out", random_params(scale=1.0), VAE)  # too little audio to judge before the end
    assert len(list((tmp_path / "out").glob("*.npz"))) == 5 and not (tmp_path / "out" / shards.HEADER_FILE).exists()
    monkeypatch.setattr(encode, "_SCALE_SEC", 1.0)
    with pytest.raises(UserError, match=r"the first 0 minutes of audio \(up to .*wav\): the latents' standard deviation is "):
        make_shards(config, tmp_path / "soon", random_params(scale=0.001), VAE)
    assert not (tmp_path / "soon" / shards.HEADER_FILE).exists() and len(list((tmp_path / "soon").glob("*.npz"))) < 4
    assert make_shards(config, tmp_path / "good", vae_params, VAE).num_clips == 5


@pytest.mark.parametrize(
    "loudest, message", [(1e6, "latents up to .*e\\+.*, expected at most 65504"), (np.inf, "not finite numbers")]
)
def test_every_array_is_checked_and_its_file_named(
    tmp_path, recordings, tokenizer_dir, vae_params, monkeypatch, loudest, message
):  # fmt: skip
    """A reference clip too, which is not in the statistics of the latents."""
    soundfile.write(tmp_path / "loud.wav", np.random.default_rng(0).uniform(-1, 1, 8000), 16000)
    really = autoencoder.encode

    def overflows(params, config, audio_BA):
        factor_B = jnp.where(jnp.abs(audio_BA).max(axis=1) > 0.9, jnp.float32(loudest), jnp.float32(1))
        return really(params, config, audio_BA) * factor_B[:, None, None]

    monkeypatch.setattr(autoencoder, "encode", overflows)
    with_reference = dataclasses.replace(recordings[3], ref_audio=tmp_path / "loud.wav")
    manifest.write_manifest(tmp_path / "m.jsonl", [*recordings[:3], with_reference])
    config = config_of(tmp_path, tokenizer_dir, latent_dtype="float16")
    with pytest.raises(
        UserError, match=f"loud.wav: the codec returns latents .*{message}|loud.wav: the codec returns {message}"
    ):
        make_shards(config, tmp_path / "out", vae_params, VAE)


def content(directory):
    """Every file that training reads, by name."""
    names = [f.name for f in directory.iterdir() if f.suffix in (".array_record", ".npy") or f.name == "skipped.jsonl"]
    return {name: (directory / name).read_bytes() for name in names}


def test_a_run_that_was_stopped_goes_on(tmp_path, recordings, tokenizer_dir, vae_params, monkeypatch):
    config = config_of(tmp_path, tokenizer_dir)
    expected = make_shards(config, tmp_path / "straight", vae_params, VAE)
    really, made = shard.make_shard, []

    def stops(directory, name, *args):
        if len(made) == 2:
            (directory / ".half").write_bytes(b"torn")
            raise KeyboardInterrupt
        made.append(name)
        really(directory, name, *args)

    monkeypatch.setattr(shard, "make_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        make_shards(config, tmp_path / "stopped", vae_params, VAE)
    with pytest.raises(UserError, match="no shards here"):
        shards.read_header(tmp_path / "stopped")
    monkeypatch.setattr(shard, "make_shard", lambda *args: (made.append(args[1]), really(*args)))
    assert make_shards(config, tmp_path / "stopped", vae_params, VAE) == expected
    assert len(made) == len(set(made)) == 5 and content(tmp_path / "stopped") == content(tmp_path / "straight")
    assert make_shards(config, tmp_path / "stopped", vae_params, VAE) == expected and len(made) == 5  # nothing is left to do


def test_part_files_of_earlier_versions_are_read(tmp_path, recordings, tokenizer_dir, vae_params):
    """They have other names for some arrays, and matrices in place of structured ones."""
    config = config_of(tmp_path, tokenizer_dir)
    expected = make_shards(config, tmp_path / "out", vae_params, VAE)
    files = content(tmp_path / "out")
    earlier = {"lengths": "lengths_N6", "moments": "moments_4C", "origins": "origins_N", "embeddings": "embeddings_ED"}
    for path in (tmp_path / "out").glob("*.npz"):
        with np.load(path) as file:
            arrays = dict(file)
        arrays["lengths"] = np.array(arrays["lengths"].tolist(), np.int32).reshape(-1, 6)
        del arrays["identities"]
        arrays["moments"] = np.stack([arrays["moments"][name] for name in arrays["moments"].dtype.names])
        np.savez(path, **{earlier.get(name, name): array for name, array in arrays.items()})
    for name in (shards.LENGTHS_FILE, shards.IDENTITY_FILE, shards.HEADER_FILE):
        (tmp_path / "out" / name).unlink()
    del files[shards.IDENTITY_FILE], expected.crc32[shards.IDENTITY_FILE]
    assert make_shards(config, tmp_path / "out", vae_params, VAE) == expected and content(tmp_path / "out") == files


def test_hosts_share_the_work(tmp_path, recordings, tokenizer_dir, vae_params):
    expected = make_shards(config_of(tmp_path, tokenizer_dir), tmp_path / "alone", vae_params, VAE)
    shared = [
        make_shards(config_of(tmp_path, tokenizer_dir, host=i, num_hosts=3), tmp_path / "shared", vae_params, VAE)
        for i in (2, 0, 1)
    ]
    assert shared == [None, None, expected] and content(tmp_path / "alone") == content(tmp_path / "shared")


def test_the_last_host_writes_the_header_whoever_was_slow(tmp_path, recordings, tokenizer_dir, vae_params, monkeypatch):
    """Host 1 comes and goes while host 0 is between the held-out shards and the others."""
    manifest.write_manifest(tmp_path / "h.jsonl", [manifest.Recording(record(tmp_path / "h.wav", 0.4, 9), "held")] * 5)
    held = {"heldout": str(tmp_path / "h.jsonl")}
    really, results = shard.make_missing, []

    def slow(directory, corpora, encoder, config, check):
        if directory.name != "heldout" and config.host == 0:
            other = config_of(tmp_path, tokenizer_dir, host=1, num_hosts=2, **held)
            results.append(make_shards(other, tmp_path / "out", vae_params, VAE))
        really(directory, corpora, encoder, config, check)

    monkeypatch.setattr(shard, "make_missing", slow)
    config = config_of(tmp_path, tokenizer_dir, host=0, num_hosts=2, **held)
    header = make_shards(config, tmp_path / "out", vae_params, VAE)
    assert results == [None] and header == shards.read_header(tmp_path / "out")
    assert shards.read_header(tmp_path / "out" / "heldout").num_clips == 5


def test_a_second_process_of_the_same_host_is_refused(tmp_path, recordings, tokenizer_dir, vae_params, monkeypatch):
    """It used to delete the half-made shard of the first."""
    config = config_of(tmp_path, tokenizer_dir)
    really, refusals = encode.ClipEncoder.clips, []

    def meanwhile(self, *args):
        yield from really(self, *args)
        if not refusals:  # the shard is written, but not renamed
            for share in ({}, {"host": 1, "num_hosts": 3}):
                with pytest.raises(UserError) as refusal:
                    make_shards(dataclasses.replace(config, **share), tmp_path / "out", vae_params, VAE)
                refusals.append(str(refusal.value))

    monkeypatch.setattr(encode.ClipEncoder, "clips", meanwhile)
    header = make_shards(config, tmp_path / "out", vae_params, VAE)
    assert len(refusals) == 2 and all("out: host 0 of 1, process" in refusal for refusal in refusals)
    monkeypatch.undo()
    assert header == make_shards(config, tmp_path / "alone", vae_params, VAE)
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_a_mistake_on_the_way_costs_no_finished_shard(tmp_path, recordings, tokenizer_dir, vae_params, monkeypatch):
    config = config_of(tmp_path, tokenizer_dir)
    really, made = shard.make_shard, []

    def fails(directory, name, *args):
        if made:
            raise UserError("the disk is full")
        made.append(directory / f"{name}.array_record")
        really(directory, name, *args)

    monkeypatch.setattr(shard, "make_shard", fails)
    with pytest.raises(UserError, match="the disk is full"):
        make_shards(config, tmp_path / "out", vae_params, VAE)
    assert made[0].is_file()


def test_shards_of_something_else_are_left_alone(tmp_path, recordings, tokenizer_dir, vae_params):
    config = config_of(tmp_path, tokenizer_dir)
    make_shards(config, tmp_path / "out", vae_params, VAE)
    before = content(tmp_path / "out")
    for changes, message in (({"max_sec": 1.0}, "max_sec: 2.0, now 1.0"), ({"shard_clips": 3}, "shard_clips: 2, now 3")):
        with pytest.raises(UserError, match=f"holds shards made from something else .{message}"):
            make_shards(config_of(tmp_path, tokenizer_dir, **changes), tmp_path / "out", vae_params, VAE)
    other = jax.tree.map(lambda x: x + 1, vae_params)
    with pytest.raises(UserError, match="codec_sha256: "):
        make_shards(config, tmp_path / "out", other, VAE)
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"audio": "0.wav", "text": "one more"}\n')
    with pytest.raises(UserError, match=r"sources_sha256: .* recordings: 10, now 11"):
        make_shards(config, tmp_path / "out", vae_params, VAE)
    assert content(tmp_path / "out") == before


def test_prepare_refuses(tmp_path, recordings, tokenizer_dir, vae_params):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="already there"):
        make_shards(config_of(tmp_path, tokenizer_dir), tmp_path / "full", vae_params, VAE)
    manifest.write_manifest(tmp_path / "m.jsonl", [manifest.Recording(tmp_path / "missing.wav", "a")])
    with pytest.raises(UserError, match=r"none of 1 recordings can be used; the first: .*missing\.wav: no such audio file"):
        make_shards(config_of(tmp_path, tokenizer_dir), tmp_path / "out", vae_params, VAE)
    with pytest.raises(UserError, match="no such manifest"):
        make_shards(config_of(tmp_path, tokenizer_dir, manifest="no.jsonl"), tmp_path / "out", vae_params, VAE)
    assert not (tmp_path / "out").exists() and not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_a_mistake_leaves_a_directory_as_it_was(tmp_path, recordings, tokenizer_dir, vae_params):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"a vocabulary of 5000 pieces \(vocab_size\): Vocabulary size too high"):
        make_shards(config_of(tmp_path, "", vocab_size=5000), tmp_path / "out", vae_params, VAE)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "m.jsonl").rename(tmp_path / "whole.jsonl")
    away = [dataclasses.replace(r, audio=tmp_path / "away" / r.audio.name, ref_audio=None) for r in recordings]
    manifest.write_manifest(tmp_path / "m.jsonl", away)
    with pytest.raises(UserError, match="none of 5 recordings can be used"):
        make_shards(config_of(tmp_path, tokenizer_dir), tmp_path / "out", vae_params, VAE)
    assert not list((tmp_path / "out").iterdir())
    shared = config_of(tmp_path, tokenizer_dir, num_hosts=2, shard_clips=9)
    with pytest.raises(UserError, match="none of 5 recordings can be used"):
        make_shards(shared, tmp_path / "out", vae_params, VAE)
    (tmp_path / "away").mkdir()
    for recording in away:  # the recordings are there again
        shutil.copy(tmp_path / recording.audio.name, recording.audio)
    assert make_shards(shared, tmp_path / "out", vae_params, VAE).num_clips == 5


def test_where_a_manifest_lies_does_not_matter(tmp_path, recordings, tokenizer_dir, vae_params):
    first = make_shards(config_of(tmp_path, tokenizer_dir), tmp_path / "out", vae_params, VAE)
    shutil.copy(tmp_path / "m.jsonl", tmp_path / "again.jsonl")
    config = config_of(tmp_path, tokenizer_dir, manifest=str(tmp_path / "again.jsonl"), encode_sec=0.5)
    assert make_shards(config, tmp_path / "out", vae_params, VAE).num_clips == first.num_clips


def test_a_recording_that_is_too_long_is_not_decoded(tmp_path, recordings, tokenizer_dir, vae_params, monkeypatch):
    """A recording that is far too long takes no memory, with or without end_sec."""
    soundfile.write(tmp_path / "hour.wav", np.zeros(16000 * 9), 16000)
    bad = [manifest.Recording(tmp_path / "hour.wav", "one"), manifest.Recording(tmp_path / "hour.wav", "two", end_sec=8.0)]
    manifest.write_manifest(tmp_path / "m.jsonl", [*recordings, *bad])
    longest = []
    really = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: longest.append(len(x := really(*a, **k))) or x)
    for trim in ("none", "silence"):
        header = make_shards(config_of(tmp_path, tokenizer_dir, trim=trim), tmp_path / trim, vae_params, VAE)
        assert header.skipped["too long"] == 2
    assert max(longest) < 16000 * 4.1


def test_codec_hash_sees_every_parameter_and_the_config(vae_params):
    known = codec_sha256(vae_params, VAE)
    changed = jax.tree.map(np.copy, vae_params)
    jax.tree.leaves(changed)[-1].flat[0] += 1e-6
    assert known == codec_sha256(jax.tree.map(jax.numpy.asarray, vae_params), VAE)
    assert known != codec_sha256(changed, VAE) and known != codec_sha256(vae_params, AudioVAEConfig())


def test_buckets_waste_a_third_at_most():
    for patches in range(5, 400):
        assert patches <= encode._bucket(patches) < 1.5 * patches
    assert len({encode._bucket(patches) for patches in range(1, 376)}) < 16


def configs():
    path = pathlib.Path(__file__).parents[2] / "configs" / "data.py"
    spec = importlib.util.spec_from_file_location("configs_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configs():
    module = configs()
    for variant in module.VARIANTS:
        plain = module.get_config(variant)
        if variant == "manifest":
            with pytest.raises(UserError, match=r"--config\.manifest=FILE"):
                from_dict(DataConfig, plain.to_dict())
            plain.manifest = "a.jsonl,b.jsonl"
        config = from_dict(DataConfig, plain.to_dict())
        assert config.source == (variant if variant in ("debian", "manifest") else "demo")
        assert config.trim == ("silence" if variant == "manifest" else "none")  # the others' clips are trimmed when made
    with pytest.raises(UserError, match="got 'huge'"):
        module.get_config("huge")


def test_shards_of_tensorflow_sets(tmp_path, tokenizer_dir, vae_params, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    vctk(tmp_path)
    ljspeech(tmp_path)
    names = "tfds:vctk/mic1@train[1:],tfds:ljspeech"
    config = config_of(tmp_path, tokenizer_dir, manifest=names, heldout="tfds:vctk/mic1@train[:1]")
    header = make_shards(config, tmp_path / "out", vae_params, VAE)
    assert header.num_clips == 5 and not header.skipped and ",".join(header.sources) == names
    assert header.groups == (("vctk", "en"), ("ljspeech", "en"))
    assert shards.read_header(tmp_path / "out" / "heldout").num_clips == 1
    clips = [shards.from_record(record) for record in shards.grain_source([tmp_path / "out"], [header])]
    texts = [("please 1", "p226"), ("please 2", "p225"), ("one 0", "linda"), ("one 1", "linda"), ("one 2", "linda")]
    assert [(clip.text, clip.speaker) for clip in clips] == texts
    with pytest.raises(UserError, match="sources_sha256"):
        make_shards(config_of(tmp_path, tokenizer_dir, manifest="tfds:ljspeech"), tmp_path / "out", vae_params, VAE)


def test_shards_of_debians_recordings(tmp_path, tokenizer_dir, vae_params):
    packages = write_packages(tmp_path)
    debian = DebianConfig(languages="en,it", num_heldout=1, packages=str(packages))
    config = config_of(tmp_path, tokenizer_dir, source="debian", manifest="", debian=debian)
    header = make_shards(config, tmp_path / "out", vae_params, VAE)
    assert header.sources == ("debian",) and header.groups == (("debian", "en"), ("debian", "it")) and not header.skipped
    held = shards.read_header(tmp_path / "out" / "heldout").num_clips
    assert header.num_clips + held == 10 and held in (2, 3, 4)  # one text per language, some of two recordings
    assert make_shards(config, tmp_path / "out", vae_params, VAE) == header
    assert sorted(path.name for path in (tmp_path / "out" / "debian").iterdir()) == [
        "copyright-en.txt", "copyright-it.txt", "flac", "heldout.jsonl", "train.jsonl"
    ]  # fmt: skip


def test_tiny_demo_from_start_to_finish(tmp_path, vae_params):
    config = from_dict(DataConfig, configs().get_config("tiny").to_dict())
    (tmp_path / "out" / ".demo.killed").mkdir(parents=True)  # left by a killed run, or in use by another host
    header = make_shards(config, tmp_path / "out", vae_params, VAE)
    assert header.num_clips == 70 and header.sources == ("demo",) and not header.skipped
    assert shards.read_header(tmp_path / "out" / "heldout").num_clips == 8
    assert len(manifest.read_manifest(tmp_path / "out" / "demo" / "heldout.jsonl")) == 8
    clip = shards.from_record(shards.grain_source([tmp_path / "out"], [header])[69])
    assert clip.description in [description for description, _ in demo.FOREIGN.values()]
    assert (
        load_tokenizer(tmp_path / "out" / "tokenizer").encode(f"({clip.description}){clip.text}") == clip.described_ids.tolist()
    )


def test_prepare_needs_a_codec(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match="prepare needs a codec: --vae=CKPT"):
        prepare.prepare(config_of(tmp_path, tokenizer_dir), tmp_path / "out", None)


def test_the_vocabulary_is_of_the_corpus_and_balanced_by_language(tmp_path):
    english = [
        manifest.Recording(tmp_path / "x", f"  one {word}  two", language="en") for word in ("three", "four", "five") * 40
    ]
    turkish = [manifest.Recording(tmp_path / "x", "günaydın ışığı söndürür", description="a voice")]

    def made(**changes):
        tokenizer = prepare._tokenizer(DataConfig(vocab_size=310, **changes), [english, turkish])
        tokenizer.save(tmp_path / "made")
        return tokenizer, (tmp_path / "made" / "tokenizer.json").read_bytes()

    train_tokenizer([*(" ".join(r.text.split()) for r in english), f"(a voice){turkish[0].text}"], 310).save(tmp_path / "plain")
    as_it_is, content = made()
    assert content == (tmp_path / "plain" / "tokenizer.json").read_bytes(), "at temperature 1 all text"
    even, content = made(vocab_temperature=100.0)
    assert content == made(vocab_temperature=100.0)[1], "whichever host makes it"
    assert len(even.encode("günaydın")) < len(as_it_is.encode("günaydın"))
    with pytest.raises(UserError, match=r"a vocabulary of 310 pieces .*: .*too high"):
        made(vocab_chars=60)


def test_transcripts_have_one_form_which_goes_with_the_tokenizer(tmp_path, vae_params):
    """Decomposed, described, in capitals; and rows that nobody could say are left out of clips and vocabulary."""
    texts = ["CAFE\u0301 ONE\u00ad ", "two three", "(low) FOUR FIVE", "...", "six</s>", "seven [noise] <sil>"]
    found = [manifest.Recording(record(tmp_path / f"{i}.wav", 0.3, i), text) for i, text in enumerate(texts)]
    found[1] = dataclasses.replace(found[1], text="TWO THREE", description="\uff08a low voice\uff09")
    manifest.write_manifest(tmp_path / "m.jsonl", found)
    config = config_of(tmp_path, "", vocab_size=300, sentence_case=True)
    header = make_shards(config, tmp_path / "out", vae_params, VAE)
    assert header.skipped == {"no words": 1, "control pieces": 1, "markup": 1}
    assert header.text == {"form": 1, "sentence_case": True}
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer.rule == config.text_rule
    clips = shards.Shards(tmp_path / "out")
    assert [tokenizer.decode(clip.text_ids) for clip in clips] == ["Caf\u00e9 one", "Two three", "(low)Four five"]
    assert tokenizer.decode(clips[1].described_ids) == "(a low voice)Two three"
    for clip, recording in zip(clips, found):  # generation reads what the shards hold
        ids = clip.text_ids if clip.described_ids is None else clip.described_ids
        assert tokenizer.encode(written(tokenizer.rule, recording.full_text, None)[1]) == ids.tolist()
    assert {"E", "[", "\u0301"}.isdisjoint(tokenizer._backend.get_vocab())
    kept = make_shards(config_of(tmp_path, "", vocab_size=300, markup="keep"), tmp_path / "kept", vae_params, VAE)
    assert kept.skipped == {"no words": 1, "control pieces": 1}
    with pytest.raises(UserError, match=r"cannot be used together: text \{'form': 1, 'sentence_case': True\} and"):
        other = dataclasses.replace(header, text={"form": 1, "sentence_case": False})
        shards.check_alike([tmp_path / "out", tmp_path / "kept"], [header, other])


def test_faulty_lines_are_left_out_counted_and_listed(tmp_path, tokenizer_dir, vae_params, capsys):
    good = [{"audio": str(record(tmp_path / f"{i}.wav", 0.3, i)), "text": text} for i, text in enumerate(TEXTS[:3])]
    lines = [json.dumps(entry) for entry in good]
    (tmp_path / "m.jsonl").write_text("\n".join([lines[0], "{", lines[1], '{"audio": "a.wav"}', lines[2]]))
    config = config_of(tmp_path, tokenizer_dir)
    with pytest.raises(UserError, match=r"2 of 5 entries cannot be used: .*m\.jsonl:2: not valid JSON .*m\.jsonl:4: no text"):
        make_shards(config, tmp_path / "out", vae_params, VAE, strict=True)
    assert not (tmp_path / "out").exists() and not capsys.readouterr().err
    header = make_shards(config, tmp_path / "out", vae_params, VAE)
    assert header.num_clips == 3 and header.skipped == {"faulty line": 2}
    assert "2 of 5 entries left out" in capsys.readouterr().err
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["audio"], line["reason"]) for line in listed] == [
        (f"{tmp_path}/m.jsonl:{number}", "faulty line") for number in (2, 4)
    ]
