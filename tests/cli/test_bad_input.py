"""Every mistake a user can make, through the command line: exit code 2, one line that says what to do, nothing written."""

import json
import time

import numpy as np
import pytest
import soundfile
from tensorflow_datasets.core import constants

from voxcpm2_jax.cli import main

QUICK = ("--inference-timesteps=1", "--max-len=2", "--min-len=0", "--seed=1")


@pytest.fixture
def speak(released_dir, refusal):
    """Runs `generate` with a good checkpoint and a mistake in the other arguments; returns the one line."""

    def run(*argv, output="out.wav"):
        return refusal("generate", f"--checkpoint={released_dir}", *argv, f"--output={output}")

    return run


def noise(sec, rate, channels=1, seed=0):
    return 0.2 * np.random.default_rng(seed).normal(size=(round(sec * rate), channels))


# ---- text and modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments --text --input is required"),
        (["--text="], "--text must not be empty"),
        (["--text=   "], "--text must not be empty"),
        (["--text=\n\t"], "--text must not be empty"),
        (["--text"], "argument --text: expected one argument"),
        (["--text=a", "--text-file=b"], "unrecognized arguments: --text-file=b"),
        (["--text=a", "--control="], "--control must not be empty"),
        (["--text=a", "--control=( )"], "--control must not be empty"),
        (["--text=(deep)"], "text must have a letter or a digit to say, got '(deep)'"),
        (["--text=a</s>"], "text spells </s>, which a model reads as control pieces"),
        (["--text=(deep)a", "--prompt-audio=ok.wav", "--prompt-text=b"], "a description, (deep), does not go with a prompt"),
        (["--text=a", "--control=deep", "--prompt-text=b"], "--control does not go with --prompt-text"),
        (
            ["--text=a", "--control=deep", "--prompt-text=b", "--prompt-audio=ok.wav"],
            "--control does not go with --prompt-text",
        ),
        (["--text=a", "--prompt-audio=ok.wav"], "prompt audio without prompt text"),
        (["--text=a", "--prompt-text=b"], "prompt text without prompt audio"),
        (["--text=a", "--prompt-text=b", "--reference-audio=ok.wav"], "prompt text without prompt audio"),
        (["--text=a", "--cfg-value=-1"], "cfg_value must lie between 0 and 10"),
        (["--text=a", "--cfg-value=10.5"], "cfg_value must lie between 0 and 10"),
        (["--text=a", "--cfg-value=inf"], "cfg_value must lie between 0 and 10"),
        (["--text=a", "--cfg-value=two"], "argument --cfg-value: invalid float value: 'two'"),
        (["--text=a", "--inference-timesteps=0"], "inference_timesteps must lie between 1 and 1000"),
        (["--text=a", "--inference-timesteps=1001"], "inference_timesteps must lie between 1 and 1000"),
        (["--text=a", "--inference-timesteps=2.5"], "argument --inference-timesteps: invalid int value: '2.5'"),
        (["--text=a", "--max-len=0"], "min_len and max_len must satisfy"),
        (["--text=a", "--min-len=-1"], "min_len and max_len must satisfy"),
        (["--text=a", "--seed=2147483648"], "seed must lie between 0 and 2147483647"),
        (["--text=\udcff"], "text is not valid Unicode"),
    ],
)
def test_texts_modes_and_settings(speak, tmp_path, argv, message):
    soundfile.write(tmp_path / "ok.wav", noise(0.5, 16000), 16000)
    assert message in speak(*argv)


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_a_text_longer_than_the_model(speak, tmp_path, stream):
    (tmp_path / "out.wav").write_bytes(b"what was there before")
    assert "slots of the model's 512 (max_length); shorten them" in speak("--text=" + "one two three " * 300, *stream)


# ---- recordings ------------------------------------------------------------------------------------------------------


def write_bad_recordings(directory):
    (directory / "empty.wav").write_bytes(b"")
    (directory / "text.wav").write_text("this is not a recording " * 50)
    (directory / "folder.wav").mkdir()
    soundfile.write(directory / "no_samples.wav", np.zeros((0, 1)), 16000)
    soundfile.write(directory / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(directory / "short.wav", noise(0.1, 16000), 16000)
    soundfile.write(directory / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(directory / "ok.flac", noise(0.5, 16000), 16000)
    whole = (directory / "ok.flac").read_bytes()
    (directory / "cut.flac").write_bytes(whole[:40])
    (directory / "cut.wav").write_bytes(b"RIFF\x00\x00")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.wav", "=missing.wav: no such file"),
        ("folder.wav", "=folder.wav: no such file"),
        ("empty.wav", "empty.wav: not a readable recording"),
        ("text.wav", "text.wav: not a readable recording"),
        ("cut.wav", "cut.wav: not a readable recording"),
        ("cut.flac", "cut.flac: "),
        ("no_samples.wav", "no_samples.wav: empty recording"),
        ("silent.wav", "silent.wav: silent (peak 0.0e+00)"),
        ("short.wav", "short.wav: 0.100 s is too short; expected at least 0.160 s"),
        ("nan.wav", "nan.wav: samples that are not finite numbers, the first at 0.000 s"),
    ],
)
@pytest.mark.parametrize("flags", [("--reference-audio={}",), ("--prompt-audio={}", "--prompt-text=b")])
def test_unusable_recordings(speak, tmp_path, name, message, flags):
    write_bad_recordings(tmp_path)
    assert message in speak("--text=a", *(flag.format(name) for flag in flags))


@pytest.mark.parametrize("flags", [(), ("--stream",)])
def test_half_an_hour_of_reference_is_refused_from_its_header(speak, tmp_path, monkeypatch, flags):
    """Before weights are loaded, and before the recording is decoded; a FLAC without a stored length too."""
    from voxcpm2_jax.data import audio
    from voxcpm2_jax.inference.api import VoxCPM

    monkeypatch.setattr(VoxCPM, "from_pretrained", None)
    monkeypatch.setattr(audio, "load", None)
    soundfile.write(tmp_path / "long.flac", noise(1800, 1000), 1000)
    content = (tmp_path / "long.flac").read_bytes()
    (tmp_path / "no_length.flac").write_bytes(content[:21] + bytes([content[21] & 0xF0, 0, 0, 0, 0]) + content[26:])
    soundfile.write(tmp_path / "ok.wav", noise(0.5, 16000), 16000)
    # 512 slots: the text's 2, three marks, one patch of speech, and 4 patches of the prompt.
    prompt = ("--prompt-audio=ok.wav", "--prompt-text=b")
    for name, more, fits in (("long.flac", (), "81.0"), ("no_length.flac", prompt, "80.2")):
        started = time.monotonic()
        line = speak("--text=a", f"--reference-audio={name}", *more, *flags)
        assert f"{name}: 1800.0 s are too long; with this text" in line
        assert f"at most {fits} s fit into the model's 512 slots" in line
        assert time.monotonic() - started < 1.0


def test_a_bad_recording_while_streaming_leaves_no_file(speak, tmp_path):
    write_bad_recordings(tmp_path)
    assert "silent" in speak("--text=a", "--reference-audio=silent.wav", "--stream")


@pytest.mark.parametrize(
    ("name", "rate", "channels"), [("a.wav", 8000, 1), ("b.flac", 44100, 6), ("c.wav", 11025, 2), ("d.ogg", 48000, 2)]
)
def test_every_rate_and_number_of_channels_is_taken(released_dir, tmp_path, capsys, name, rate, channels):
    soundfile.write(tmp_path / name, noise(0.4, rate, channels), rate)
    argv = ["generate", f"--checkpoint={released_dir}", "--text=one", f"--reference-audio={tmp_path / name}", *QUICK]
    assert main.main([*argv, f"--output={tmp_path}/out.wav"]) == 0
    said = json.loads(capsys.readouterr().out)
    audio_A, hz = soundfile.read(tmp_path / "out.wav")
    assert hz == 48000 and len(audio_A) == 2 * 7680 == said["sec"] * 48000
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.wav"])


# ---- where the speech goes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no/out.wav", "no/out.wav: cannot be written; its directory must exist"),
        ("file/out.wav", "file/out.wav: cannot be written"),
        ("folder.wav", "folder.wav: cannot be written"),
        ("out.mp4", "out.mp4: expected a name that ends in .wav"),
        ("out", "out: expected a name that ends in .wav"),
    ],
)
@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_outputs_that_cannot_be_written(speak, tmp_path, output, message, stream):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.wav").mkdir()
    assert message in speak("--text=a", *stream, output=output)


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_an_output_that_only_the_system_refuses(speak, monkeypatch, stream):
    """A file system that reports a directory as writable and then refuses to write to it."""
    monkeypatch.setattr("os.access", lambda *_: True)
    assert "/proc/out.wav: cannot be written" in speak("--text=one", *QUICK, *stream, output="/proc/out.wav")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input=no.txt", "--output-dir=d"], "--input=no.txt"),
        (["--input=blank.txt", "--output-dir=d"], "--input=blank.txt: contains no text"),
        (["--input=latin.txt", "--output-dir=d"], "--input=latin.txt: 'utf-8' codec can't decode"),
        (["--input=.", "--output-dir=d"], "--input=."),
        (
            ["--input=signs.txt", "--output-dir=d"],
            "--input=signs.txt, line 3: text must have a letter or a digit to say, got '...'",
        ),
        (["--input=lines.txt", "--output-dir=lines.txt"], "--output-dir=lines.txt"),
        (["--input=lines.txt", "--output=a.wav"], "--input with --output-dir"),
        (["--input=lines.txt"], "one of the arguments --output --output-dir is required"),
    ],
)
def test_files_of_texts(refusal, released_dir, tmp_path, argv, message):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "lines.txt").write_text("one\n")
    (tmp_path / "signs.txt").write_text("\ufeffone\u2028two\n\n...\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("fünf".encode("latin-1"))
    assert message in refusal("generate", f"--checkpoint={released_dir}", *argv)


# ---- training --------------------------------------------------------------------------------------------------------

TINY = "--config=configs/backbone.py:tiny"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.batch.rows=6", "batch.rows 6 cannot be split over 8 devices (mesh (-1, -1, 1))"),
        ("--config.mesh=1,3,1", "mesh (1, 3, 1) (replica, data, tensor) does not fit 8 devices"),
        ("--config.mesh=0,-1,1", "mesh (0, -1, 1) (replica, data, tensor) does not fit 8 devices"),
        ("--config.mesh=8", "mesh: expected 3 values, got 1"),
        ("--config.mesh=1,2,4", "tensor 4 does not divide base_lm/layers/k/kernel, whose kv_heads are 2"),
        (
            "--config.batch.row=8",
            "--config.batch.row: unknown key; config.batch has clip_slots, patches, rows, segments, slots",
        ),
        ("--config.optim.learning_rate=high", "--config.optim.learning_rate=high"),
        ("--config.optim.schedule=steps", "optim.schedule: expected cosine, wsd or constant, got 'steps'"),
        ("--config.num_steps=0", "num_steps must be at least 1, got 0"),
        ("--config.seed=-1", "seed must be 0 or more, and less than 2^32, got -1"),
        ("--config.stop_weight=nan", "stop_weight must be a number of 0 or more, got nan"),
        ("--config.patch_sec=-1.0", "patch_sec must be a number over 0, got -1.0"),
        ("--config.samples.every_steps=-4", "samples.every_steps must be at least 0, got -4"),
        ("--profile-steps=9:3", "--profile-steps=9:3: expected A:B"),
        ("--config.model.lm_config.num_attention_heads=0", "lm_config.num_attention_heads must be at least 1"),
        ("--config.model.encoder_config.num_heads=3", "encoder_config: 3 heads cannot share 2 key/value heads evenly"),
        ("--config.model.dtype=float16", "model.dtype float16: small gradients become zero in it"),
        ("--config.batch.slots=1024", "batch.slots 1024 exceed model.max_length 512"),
        ("--config.batch.target_patches=100", "target_patches at most patches"),
        ("--config.stages=({'slots_factor': 8.0},)", "batch.slots 1024 exceed model.max_length 512"),
        ("--config.stages=({'first_step': 5},)", "expected one from step 0 on; the first begins at step 5"),
    ],
)
def test_runs_that_cannot_start(refusal, override, message):
    assert message in refusal("train", TINY, "--workdir=run", override)


@pytest.mark.parametrize("workdir", ["file", "file/run", "/proc/run"])
@pytest.mark.parametrize("config", ["train configs/backbone.py:tiny", "train-vae configs/vae.py:tiny"])
def test_workdirs_that_cannot_be_written(refusal, tmp_path, workdir, config):
    (tmp_path / "file").write_text("")
    name, config = config.split()
    assert "cannot be written; expected a directory" in refusal(name, f"--config={config}", f"--workdir={workdir}")


_TRAIN = "train --config=configs/backbone.py:tiny --workdir=run"


@pytest.mark.parametrize("command", ["bench data --config=configs/backbone.py:tiny --data={}", f"{_TRAIN} --data=a,{{}}"])
def test_places_that_are_not_here(refusal, command):
    assert "hdfs://host/run: expected a local path" in refusal(*command.format("hdfs://host/run").split())


def test_directories_without_shards(refusal, tmp_path):
    for name, content in {"json": b"{", "binary": b"\xff\xfe\x00", "list": b"[]", "other": b'{"clips": 3}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "header.json").write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, message in (
        ("nothing", "nothing: no shards here (no header.json); make some with voxcpm2-jax prepare"),
        ("empty", "empty: no shards here"),
        ("file", "file: a file; expected a directory of shards"),
        ("json", "header.json: not valid JSON"),
        ("binary", "header.json: not valid JSON"),
        ("list", "header.json: expected fields of Header, got []"),
        ("other", "header.json.clips: unknown key"),
    ):
        assert message in refusal("train", TINY, "--workdir=run", f"--data={path}")


# ---- data and evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (None, "m.jsonl"),
        ("", "m.jsonl"),
        ("not json", "m.jsonl"),
        ('{"text": "a"}', "audio"),
        ('{"audio": "a.wav"}', "text"),
        ('{"audio": "a.wav", "text": "a", "speeker": "b"}', "speeker"),
        ('{"audio": [3], "text": "a"}', "audio"),
    ],
)
def test_bad_manifests(refusal, released_dir, tmp_path, line, message):
    if line is not None:
        (tmp_path / "m.jsonl").write_text(line + "\n")
    argv = ["--config=configs/data.py:manifest", "--config.manifest=m.jsonl", f"--vae={released_dir}", "--output=shards"]
    assert message in refusal("prepare", *argv)


def test_prepare_without_a_codec_or_a_place(refusal, released_dir, tmp_path):
    (tmp_path / "m.jsonl").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("")
    manifest = "--config=configs/data.py:manifest", "--config.manifest=m.jsonl"
    assert "prepare needs a codec: --vae=CKPT" in refusal("prepare", *manifest, "--output=shards")
    assert "nothing: no such directory" in refusal("prepare", *manifest, "--output=shards", "--vae=nothing")
    assert "already there" in refusal("prepare", *manifest, "--output=full", f"--vae={released_dir}")


def test_lists_of_names_that_are_empty(refusal, released_dir):
    assert "--manifest=,: names no recordings" in refusal("doctor", "--manifest=,")
    argv = "--config=configs/data.py:manifest", "--config.manifest=,", f"--vae={released_dir}", "--output=shards"
    assert "source 'manifest' needs --config.manifest=FILE[,FILE]" in refusal("prepare", *argv)
    argv = "--config=configs/backbone.py:tiny", "--data=,", "--workdir=run"
    assert "expected one or more directories, each once" in refusal("train", *argv)


def test_a_name_that_no_file_can_have(refusal, released_dir, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": f"{'a' * 300}.wav", "text": "one"}) + "\n")
    argv = "--config.manifest=m.jsonl", f"--config.tokenizer={released_dir}", f"--vae={released_dir}", "--output=shards"
    assert "none of 1 recordings can be used; the first: " in refusal("prepare", "--config=configs/data.py:manifest", *argv)


@pytest.mark.parametrize("encoder", ["json:loads", "no_such_module:x", "json:nothing", "builtins:dict"])
def test_bad_speaker_encoders(refusal, released_dir, tmp_path, encoder):
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": "one"}\n')
    argv = "--config.manifest=m.jsonl", f"--config.pairs.encoder={encoder}", f"--vae={released_dir}", "--output=shards"
    assert f"pairs.encoder {encoder}: " in refusal("prepare", "--config=configs/data.py:manifest", *argv)


def test_evaluate_without_recordings_or_a_model(refusal, released_dir, tmp_path, monkeypatch):
    from voxcpm2_jax.evaluate import whisper

    monkeypatch.setattr(whisper, "whisper_directory", lambda: tmp_path)
    config = "--config=configs/evaluate.py:tiny"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": "one"}\n')
    for data, checkpoint, message in (
        ("no.jsonl", released_dir, "no.jsonl"),
        ("empty.jsonl", released_dir, "empty.jsonl"),
        ("m.jsonl", "nothing", "nothing: no such directory; expected a training workdir"),
    ):
        assert message in refusal("evaluate", config, f"--data={data}", f"--checkpoint={checkpoint}", "--output=judged")


def test_missing_tensorflow_data_sets(refusal, released_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    advice = "prepare it once, with TensorFlow: tfds.builder('ljspeech', file_format='array_record')"
    manifest = "--config=configs/data.py:manifest", "--config.manifest=tfds:ljspeech"
    for argv in (
        ("doctor", "--manifest=tfds:ljspeech"),
        ("prepare", *manifest, f"--vae={released_dir}", "--output=shards"),
        ("train-vae", "--config=configs/vae.py:tiny", "--data=tfds:ljspeech", "--workdir=codec"),
        ("evaluate", "--config=configs/evaluate.py:tiny", "--data=tfds:ljspeech", f"--checkpoint={released_dir}", "--output=o"),
    ):
        assert advice in refusal(*argv)
    assert "expected one of tfds:voxcpm2_demo/tiny" in refusal("doctor", "--manifest=tfds:voxcpm2_demo")
    monkeypatch.setattr(constants, "DATA_DIR", "/dev/null/tfds")
    assert "cannot be made in /dev/null/tfds" in refusal("doctor", "--manifest=tfds:voxcpm2_demo/tiny")


def test_debian_packages_that_are_not_available(refusal, monkeypatch):
    debian = "prepare", "--config=configs/data.py:debian", "--output=out"
    assert "languages must be some of en,es,fr,it,ru" in refusal(*debian, "--config.debian.languages=xx")
    assert "nothing: no package asterisk-core-sounds-en_*.deb here" in refusal(*debian, "--config.debian.packages=nothing")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs apt-get: use a Debian or Ubuntu system" in refusal(*debian)
