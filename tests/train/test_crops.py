"""Crops that are read from files: the same as those of whole recordings, at any hours; bad recordings are left out."""

import json

import numpy as np
import pytest
import soundfile

from tests.data.containers import CUT, SPEECH_A, WHOLE
from tests.train.test_vae import config  # noqa: F401
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.data import audio
from voxcpm2_jax.train import crops
from voxcpm2_jax.train.crops import Crops, Units, open_files


def corpus_of(directory, *lines):
    path = directory / "train.jsonl"
    path.write_text("".join(json.dumps({"text": "some words"} | line) + "\n" for line in lines))
    return sources.open_corpus(path)


@pytest.mark.parametrize(("hz", "suffix"), [(24000, "wav"), (16000, "flac"), (44100, "wav"), (22050, "flac")])
def test_a_crop_of_a_file_is_the_same_part_of_the_whole(tmp_path, config, hz, suffix):  # noqa: F811
    phases = 2 * np.pi * np.array([[100.0], [330.0], [870.0]]) * np.arange(3 * hz) / hz
    wave_A = 0.1 * np.sin(phases + np.array([[0.0], [1.0], [2.0]])).sum(axis=0)
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([wave_A, 0.5 * wave_A], axis=1), hz)
    corpus = corpus_of(tmp_path, {"audio": f"a.{suffix}"}, {"audio": f"a.{suffix}", "start_sec": 0.5, "end_sec": 2.75})
    vae, unit = config.vae, Units.of(config.vae)
    files = open_files(vae, corpus, tmp_path / "run")
    for clip, (start, end) in enumerate(((0.0, 3.0), (0.5, 2.75))):
        target_A = audio.load(tmp_path / f"a.{suffix}", vae.out_sample_rate, start, end)
        input_A = audio.resample(target_A, vae.out_sample_rate, vae.sample_rate)
        assert 0 <= round((end - start) / unit.sec) - files.units_N[clip] <= 1
        for first, count in ((0, 800), (1, 700), (5000, 6400), (files.units_N[clip] - 900, 900)):
            got_input_A, got_target_A = files.read(clip, int(first), count)
            for got_A, whole_A, n in ((got_target_A, target_A, unit.decoder), (got_input_A, input_A, unit.encoder)):
                assert got_A.shape == (count * n,)
                expected_A = whole_A[first * n :][: count * n]
                # A part begins at a whole sample of the file, up to one before its place.
                atol = 2e-3 if hz % 8000 == 0 else 2 * np.pi * 870 / hz * 0.2
                np.testing.assert_allclose(got_A[: len(expected_A)], expected_A, atol=atol)


def test_batches_are_the_same_for_any_share_of_the_rows(tmp_path, config):  # noqa: F811
    soundfile.write(tmp_path / "a.wav", SPEECH_A, 16000)
    soundfile.write(tmp_path / "b.wav", SPEECH_A[:300], 16000)  # shorter than a crop
    corpus = corpus_of(tmp_path, {"audio": "a.wav"}, {"audio": "b.wav"})
    batches = Crops(config, open_files(config.vae, corpus, tmp_path / "run"))
    whole, again = batches.batch(3, 5), batches.batch(3, 5)
    part = batches.batch(3, 5, [1, 6])
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name])
        np.testing.assert_array_equal(whole[name][[1, 6]], part[name])
    assert np.abs(whole["input_BA"]).max() > 0.1


def test_bad_recordings_are_left_out_and_listed_before_training(tmp_path, config, capsys, monkeypatch):  # noqa: F811
    (tmp_path / "m4a").write_bytes(WHOLE["m4a"]())
    (tmp_path / "pipe").write_bytes(WHOLE["flac without a length"]())
    (tmp_path / "cut").write_bytes(CUT["wav"]())
    (tmp_path / "text").write_bytes(b"no audio")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    names = ("missing", "m4a", "cut", "pipe", "text", "silent.wav")
    corpus = corpus_of(tmp_path, *({"audio": name} for name in names))
    files = open_files(config.vae, corpus, tmp_path / "run")
    assert len(files.units_N) == 2
    assert "left out 4 of 6 recordings (1 missing, 1 cut off, 1 unreadable, 1 silent)" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["missing", "cut off", "unreadable", "silent"]
    assert lines[1]["audio"].endswith("cut") and "0.60 s are there" in lines[1]["message"]
    Crops(config, files).batch(0, 0)
    assert len(crops.samples(config.vae, corpus, 2)) == 2
    # A run that resumes does not decode everything again, and another corpus is not taken for this one.
    monkeypatch.setattr(crops, "_decode_all", None)
    np.testing.assert_array_equal(open_files(config.vae, corpus, tmp_path / "run").units_N, files.units_N)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"none of 1 recordings can be used; the first: .*cut: cut off"):
        open_files(config.vae, corpus_of(tmp_path, {"audio": "cut"}), tmp_path / "run")
