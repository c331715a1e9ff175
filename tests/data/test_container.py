"""Recordings are read to their real end; what the header says of it is reported."""

import importlib.util
import io

import numpy as np
import pytest
import soundfile

from tests.data.containers import CUT, HZ, SEC, SPEECH_A, WHOLE, encoded, flac, mp3, written
from voxcpm2_jax.config.sound import SoundConfig
from voxcpm2_jax.data import audio
from voxcpm2_jax.data.container import Length, Mended, look


def correlation(a_A, b_A):
    length = min(len(a_A), len(b_A))
    return np.corrcoef(a_A[:length], b_A[:length])[0, 1]


@pytest.mark.parametrize("name", WHOLE)
def test_a_recording_is_read_to_its_end(tmp_path, name):
    path = tmp_path / "a.wav"  # the name does not count
    path.write_bytes(WHOLE[name]())
    found = audio.read(path)
    assert not found.is_cut and found.sec == pytest.approx(SEC, abs=0.13)  # codecs add some
    audio_A = audio.load(path, HZ)
    shift = int(np.argmax(np.correlate(audio_A[:26600], SPEECH_A[:24000], "valid")))
    assert correlation(audio_A[shift:], SPEECH_A) > 0.95
    part_A = audio.load(path, HZ, 1.2, 1.5)
    assert len(part_A) in range(4700, 4801)
    if (
        name.startswith("webm")
        or name in ("mka", "opus", "mp3 without a tag")
        or "m4a" in name
        or "aac" in name
        or "mp4" in name
    ):
        assert max(correlation(part_A[100:-100], audio_A[19200 + n :][100 : len(part_A) - 100]) for n in range(-99, 99)) > 0.9
    else:
        np.testing.assert_allclose(part_A, audio_A[19200:][: len(part_A)], atol=1e-5)
    header = audio.properties(path)
    assert header.sec is None or header.sec == pytest.approx(SEC, abs=0.13)
    stored = audio.Stored("a", lambda: (path.read_bytes(), None))
    np.testing.assert_array_equal(audio.load(stored, HZ), audio_A)


@pytest.mark.parametrize("name", CUT)
def test_a_recording_that_was_cut_off_is_told(tmp_path, name):
    path = tmp_path / "a.wav"
    path.write_bytes(CUT[name]())
    with pytest.raises(audio.BadRecording, match=r"cut off: .* are there") as caught:
        audio.load(path, HZ)
    assert caught.value.reason == "cut off"
    found = audio.read(path)
    assert found.is_cut and 0 <= found.sec < 1.99 + 0.02 * ("large" in name)
    if found.sec > 0.3:  # a part of what is there is as good as any
        assert len(audio.load(path, HZ, 0.1, 0.3)) in (3199, 3200)
        assert len(audio.load(path, HZ, rules=SoundConfig(cut="keep"))) == round(found.sec * HZ)


def test_two_mp3s_one_after_the_other_are_both_read(tmp_path):
    """The first one's tag counts only its own frames."""
    (tmp_path / "a.mp3").write_bytes(mp3() + mp3())
    assert audio.read(tmp_path / "a.mp3").sec == pytest.approx(2 * SEC, abs=0.2)


def test_headers_are_quoted(tmp_path):
    def note(content):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.write_bytes(content)
        return audio.read(path).note

    assert note(written("WAV")[:16044]) == "the header states 2.00 s, 0.50 s are there"
    assert note(flac(8000)) == "the header states 0.50 s, 2.00 s are there"
    assert note(flac(0)) == "the header states no length, 2.00 s are there"
    for name in ("ogg", "m4a", "webm", "aac", "opus", "gsm in wav", "wav with tags at the end", "rf64", "w64", "sphere"):
        assert not note(WHOLE[name]()), name


def test_a_damaged_recording_is_not_used_up_to_the_damage(tmp_path):
    for content, message in ((written("FLAC"), "damaged between 0.0 and 4.1 s"), (mp3(), "damaged|cut off")):
        middle = len(content) // 2
        content[middle : middle + 1000] = bytes(1000)
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(audio.BadRecording, match=message):
            audio.load(tmp_path / "a", HZ)


def test_what_is_no_recording_is_called_by_its_name(tmp_path, monkeypatch):
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "a pointer of Git LFS; fetch"),
        (b"\n<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x03\x04" + bytes(99), "a zip archive"),
        (bytes(99), "expected wav, flac, mp3, ogg, opus, m4a or webm"),
    ):
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(audio.BadRecording, match=message):
            audio.load(tmp_path / "a.wav", HZ)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.m4a").write_bytes(encoded("ipod", "aac"))
    with pytest.raises(audio.BadRecording, match="m4a, webm and others need PyAV: pip install"):
        audio.load(tmp_path / "a.m4a", HZ)


def test_a_video_gives_its_sound_and_one_without_is_refused(tmp_path):
    import av

    def video(with_sound):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            pictures = container.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p")
            sound = container.add_stream("aac", rate=HZ, layout="mono") if with_sound else None
            for i in range(3):
                frame = av.VideoFrame(64, 64, "yuv420p")
                frame.pts = i
                container.mux(pictures.encode(frame))
            container.mux(pictures.encode(None))
            if with_sound:
                frame = av.AudioFrame.from_ndarray(SPEECH_A[None], format="fltp", layout="mono")
                frame.sample_rate = HZ
                container.mux(sound.encode(frame))
                container.mux(sound.encode(None))
        (tmp_path / "a.mp4").write_bytes(file.getvalue())
        return tmp_path / "a.mp4"

    assert audio.read(video(True)).sec == pytest.approx(SEC, abs=0.13)
    with pytest.raises(audio.BadRecording, match="no audio in it"):
        audio.read(video(False))


def test_a_check_finds_what_loading_would(tmp_path):
    """Block by block, so that hours take no memory."""
    nan_A = SPEECH_A.copy()
    nan_A[20000] = np.nan
    for name, content, reason in (
        ("whole", written("WAV"), None),
        ("pipe", WHOLE["flac without a length"](), None),
        ("m4a", WHOLE["m4a"](), None),
        ("cut", CUT["wav"](), "cut off"),
        ("empty", written("WAV", samples=SPEECH_A[:0]), "empty"),
        ("silent", written("WAV", samples=0 * SPEECH_A + 0.1), "silent"),
        ("nan", written("WAV", "FLOAT", nan_A), "not finite"),
        ("scale", written("WAV", "FLOAT", 5620 * SPEECH_A), "wrong scale"),
        ("antiphase", written("WAV", samples=np.stack([SPEECH_A, -SPEECH_A], axis=1)), None),
    ):
        (tmp_path / name).write_bytes(content)
        for function in (audio.check, lambda path: len(audio.load(path, HZ)) / HZ):
            if reason:
                with pytest.raises(audio.BadRecording) as caught:
                    function(tmp_path / name)
                assert caught.value.reason == reason
            else:
                assert function(tmp_path / name) == pytest.approx(SEC, abs=0.13)
    assert audio.check(tmp_path / "whole", 0.5, 0.75) == 0.25


def test_reading_takes_no_more_than_asked(tmp_path):
    """Containers without seeking, and lengths that nobody knows, are limited too."""
    for name in ("gsm in wav", "aac", "flac without a length"):
        (tmp_path / "a").write_bytes(WHOLE[name]())
        with pytest.raises(audio.BadRecording, match=r"too long; expected at most 1.0 s"):
            audio.load(tmp_path / "a", HZ, max_sec=1.0)


def test_a_mended_file_reads_as_a_file():
    content = bytes(range(100))
    file = Mended(io.BytesIO(content), Length(patches=((10, b"ab"), (98, b"cd")), front=b"front", skip=3))
    expected = b"front" + content[3:10] + b"ab" + content[12:98] + b"cd"
    assert file.read() == expected and file.seek(0, io.SEEK_END) == len(expected)
    for start in range(len(expected)):
        file.seek(start)
        assert file.read(7) == expected[start : start + 7]
        assert file.tell() == min(start + 7, len(expected))


@pytest.mark.parametrize("block", [192, 1000, 4096])
def test_the_last_frame_of_flac_is_found(block):
    """Also where blocks differ in size, frames have long numbers, and the length is unknown."""
    rng = np.random.default_rng(block)
    for hz in (8000, 16000, 44100, 12345):
        file = io.BytesIO()
        samples = rng.standard_normal((block * 37 + 5, 1 + block % 2)) * 0.1
        soundfile.write(file, samples, hz, format="FLAC")
        length = look(file)
        assert length.said == length.there == len(samples) and not length.patches
