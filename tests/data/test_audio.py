import errno
import itertools
import os

import librosa
import numpy as np
import pytest
import soundfile

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data import audio, records
from voxcpm2_jax.evaluate import pictures


def tone(rate, sec=0.5, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    time = np.arange(round(sec * rate))[:, None] / rate
    hz = rng.uniform(100, 1500, channels)
    return (0.3 * np.sin(2 * np.pi * hz * time) + 0.02 * rng.standard_normal((len(time), channels))).astype(np.float32)


FORMATS = {"wav": {}, "flac": {}, "mp3": {}, "ogg": {}, "opus": {"format": "OGG", "subtype": "OPUS"}}


@pytest.mark.parametrize("suffix", FORMATS)
def test_load_equals_the_reference_loader(tmp_path, suffix):
    rates = (48000,) if suffix == "opus" else (8000, 22050, 44100, 48000)
    for rate, channels, wanted in itertools.product(rates, (1, 2), (16000, 24000)):
        path = tmp_path / f"{rate}-{channels}.{suffix}"
        soundfile.write(path, tone(rate, channels=channels), rate, **FORMATS[suffix])
        expected_A, _ = librosa.load(path, sr=wanted, mono=True)
        got_A = audio.load(path, wanted)
        assert got_A.dtype == np.float32 and got_A.shape == expected_A.shape
        np.testing.assert_allclose(got_A, expected_A, atol=1e-6, rtol=0)


def test_load_a_part_of_many_channels_equals_the_reference_loader(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(44100, 2.0, channels=6), 44100)
    expected_A, _ = librosa.load(path, sr=16000, mono=True, offset=0.31, duration=0.77)
    np.testing.assert_allclose(audio.load(path, 16000, 0.31, 1.08), expected_A, atol=1e-6, rtol=0)
    assert len(audio.load(path, 16000, 1.5)) == 8000
    assert len(audio.load(path, 16000, None, 0.5)) == 8000


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_part_deep_inside_is_what_decoding_everything_gives_there(tmp_path, suffix):
    path = tmp_path / f"long.{suffix}"
    soundfile.write(path, tone(48000, 20.0), 48000, **FORMATS[suffix])
    whole_A = audio.load(path, 48000)
    for start in (0.5, 7.123, 19.2):
        part_A = audio.load(path, 48000, start, start + 0.6)
        assert len(part_A) in (28799, 28800)
        expected_A = whole_A[int(start * 48000) :][: len(part_A)]
        # Opus remembers what it has decoded before; the others are exact.
        np.testing.assert_allclose(part_A, expected_A, atol=0.03 if suffix == "opus" else 1e-6)


def test_a_part_costs_no_more_than_itself(tmp_path, monkeypatch):
    """A long recording that many clips are cut from is not decoded from its beginning."""
    asked = []
    really = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **kw: asked.append(n) or really(self, n, **kw))
    soundfile.write(tmp_path / "a.flac", tone(16000, 20.0), 16000)
    audio.load(tmp_path / "a.flac", 24000, 15.0, 15.5)
    assert asked == [8000]


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "float32", "float64"])
def test_a_stored_recording_equals_the_same_file(tmp_path, channels, dtype):
    samples_of_file = np.round(tone(22050, channels=channels) * 2**15) / 2**15
    soundfile.write(tmp_path / "a.wav", samples_of_file, 22050, subtype="PCM_16")
    samples = samples_of_file.astype(dtype) if dtype.startswith("float") else np.round(samples_of_file * 2**15).astype(dtype)
    stored = audio.Stored("set#3", lambda: (samples if channels > 1 else samples[:, 0], 22050))
    assert str(stored) == "set#3" and stored == audio.Stored("set#3", None) != audio.Stored("set#4", None)
    assert audio.properties(stored)[:3] == audio.properties(tmp_path / "a.wav")[:3] == (22050, channels, 0.5)
    for args in ((22050,), (16000,), (16000, 0.1), (16000, None, 0.3), (24000, 0.11, 0.27), (16000, 0.4, 0.55)):
        np.testing.assert_allclose(audio.load(stored, *args), audio.load(tmp_path / "a.wav", *args), atol=1e-6)


def test_quiet_integers_are_16_bits_and_large_ones_32():
    samples = np.array([0, 2**14, -(2**15)])
    for scale, expected in ((1, [0, 0.5, -1]), (2**16, [0, 0.5, -1])):
        np.testing.assert_array_equal(audio.load(audio.Stored("a", lambda: (samples * scale, 8000)), 8000), expected)  # noqa: B023


def test_a_stored_file_equals_the_file(tmp_path):
    for suffix, options in FORMATS.items():
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, tone(48000), 48000, **options)
        stored = audio.Stored("a", lambda: (path.read_bytes(), None))  # noqa: B023
        assert audio.properties(stored)[:3] == (48000, 1, 0.5)
        np.testing.assert_array_equal(audio.load(stored, 16000, 0.1, 0.4), audio.load(path, 16000, 0.1, 0.4))


def test_a_stored_recording_is_refused_by_its_name():
    def stored(samples, rate):
        return audio.Stored("set@train#7", lambda: (samples, rate))

    for recording, args, reason in (
        (stored(b"not audio", None), (), "unreadable"),
        (stored(np.zeros(0, np.int16), 16000), (), "empty"),
        (stored(np.zeros(9000, np.int16), 16000), (), "silent"),
        (stored(np.array([1.0, np.nan]), 16000), (), "not finite"),
        (stored(np.ones(16000, np.int16), 16000), (1.5,), "bad part"),
    ):
        with pytest.raises(audio.BadRecording, match="set@train#7: ") as caught:
            audio.load(recording, 16000, *args)
        assert caught.value.reason == reason


def test_load_refuses_with_one_clear_line(tmp_path):
    def written(name, samples, rate=16000, **options):
        soundfile.write(tmp_path / name, samples, rate, **options)
        return tmp_path / name

    nan = tone(16000)
    nan[100] = np.nan
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF but not really a recording")
    (tmp_path / "nothing.mp3").write_bytes(b"")
    good = written("good.wav", tone(16000))
    cases = [
        ((tmp_path / "missing.wav",), {}, "missing", "no such audio file"),
        ((tmp_path,), {}, "missing", "no such audio file"),
        ((tmp_path / ("a" * 300),), {}, "missing", "no such audio file"),
        ((f"{tmp_path}/a\0",), {}, "missing", "no such audio file"),
        ((tmp_path / "corrupt.wav",), {}, "unreadable", "not a readable recording"),
        ((tmp_path / "nothing.mp3",), {}, "unreadable", "not a readable recording"),
        ((written("empty.wav", np.zeros(0, np.float32)),), {}, "empty", "empty recording"),
        ((written("silent.wav", np.zeros(16000, np.float32)),), {}, "silent", "silent"),
        ((written("nan.wav", nan, subtype="FLOAT"),), {}, "not finite", "not finite"),
        ((good,), {"min_samples": 8001}, "too short", "too short; expected at least"),
        ((good,), {"start_sec": 0.6}, "bad part", "starts at 0.6 s, but the recording has 0.50 s"),
        ((good,), {"start_sec": 0.3, "end_sec": 0.7}, "bad part", "ends at 0.50 s, but the part at 0.70 s"),
        ((good,), {"start_sec": 0.3, "end_sec": 0.2}, "bad part", "expected 0 <= start < end"),
    ]
    for args, options, reason, message in cases:
        with pytest.raises(audio.BadRecording, match=message) as caught:
            audio.load(*args, sample_rate=16000, **options)
        assert caught.value.reason == reason and "\n" not in str(caught.value)
    assert len(audio.load(good, 16000, min_samples=8000)) == 8000


def test_a_disk_that_fails_is_not_a_bad_recording(tmp_path, monkeypatch, capsys):
    """Reading /proc/self/mem from its beginning is an I/O error. libsndfile calls it an unknown format."""
    pauses = []
    monkeypatch.setattr(records.time, "sleep", pauses.append)
    for function in (lambda path: audio.load(path, 16000), audio.properties):
        with pytest.raises(records.ReadError, match="Input/output error"):
            function("/proc/self/mem")
    soundfile.write(tmp_path / "good.wav", tone(16000), 16000)
    link = tmp_path / "a.wav"
    link.symlink_to("/proc/self/mem")

    def mend(_):
        link.unlink()
        link.symlink_to("good.wav")

    monkeypatch.setattr(records.time, "sleep", mend)
    np.testing.assert_array_equal(audio.load(link, 16000), audio.load(tmp_path / "good.wav", 16000))
    assert pauses == 2 * list(records.PAUSES_SEC) and "Input/output error; next attempt in 1 s" in capsys.readouterr().err


def test_a_path_that_the_machine_fails_to_look_up_is_not_called_missing(tmp_path, monkeypatch):
    def stale(_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(records.time, "sleep", lambda _: None)
    monkeypatch.setattr(audio.os, "stat", stale)
    with pytest.raises(records.ReadError, match="Stale file handle"):
        audio.load(tmp_path / "a.wav", 16000)


def test_trap_9_reference_pads_right_prompt_pads_left():
    x_A = np.arange(1, 6, dtype=np.float32)
    assert audio.pad_to_patches(x_A, 4, "right").tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert audio.pad_to_patches(x_A, 4, "left").tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert audio.pad_to_patches(x_A, 5, "left").tolist() == x_A.tolist()


def test_save_is_whole_or_not_at_all(tmp_path):
    x_A = tone(24000)[:, 0]
    audio.save(tmp_path / "a.wav", x_A, 24000)
    np.testing.assert_allclose(audio.load(tmp_path / "a.wav", 24000), x_A, atol=1 / 32000)
    assert os.listdir(tmp_path) == ["a.wav"]
    (tmp_path / "taken.wav").mkdir()
    for path in (tmp_path / "no" / "a.wav", tmp_path / "a.wav" / "b.wav", tmp_path / "a.xyz", tmp_path / "taken.wav"):
        with pytest.raises(UserError, match="cannot be written"):
            audio.save(path, x_A, 24000)
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "taken.wav"]


def test_picture(tmp_path):
    pictures.draw_spectrograms(tmp_path / "a.png", tone(16000)[:, 0], np.zeros(100, np.float32), 16000, ("left", "right"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
