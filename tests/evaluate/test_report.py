"""The report on held-out texts: what is scored, and that every set goes the same way."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
from tensorflow_datasets.core import constants

from tests.corpus.test_datasets import ljspeech
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus.manifest import Recording, write_manifest
from voxcpm2_jax.evaluate import report


@pytest.fixture
def manifest(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.normal(size=16000), 16000)
    texts = ("one two", "three", "four five")
    write_manifest(tmp_path / "heldout.jsonl", [Recording(str(tmp_path / f"{i}.wav"), text) for i, text in enumerate(texts)])
    return tmp_path / "heldout.jsonl"


def test_three_sets_one_judge(manifest, released_dir, tmp_path, monkeypatch):
    """A judge that hears the recordings right and nothing else."""
    heard = iter([["1 2", "three", "4-5"], ["one", "", "four five six"], ["", "three", "nine nine"]])
    monkeypatch.setattr(report.judge, "whisper_directory", lambda: tmp_path)
    monkeypatch.setattr(report.judge, "transcribe", lambda waves, rate: next(heard))
    config = EvaluateConfig(measure="digits", inference_timesteps=2, num_pictures=1)
    result = report.evaluate(config, released_dir, manifest, tmp_path / "out")
    scores = {name: values["digits right"] for name, values in result["scores"].items()}
    # Of five digits: all; one of "one two" and, one too many, one of "four five"; the three.
    assert scores == pytest.approx({"recordings": 1.0, "reconstructions": 2 / 5, "generated": 1 / 5})
    assert result["scores"]["generated"]["strings right"] == pytest.approx(1 / 3)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert len(list((tmp_path / "out" / "audio").glob("*.wav"))) == 3
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_parts_of_recordings_and_sets_of_tensorflow_are_heard_as_they_are(released_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    ljspeech(tmp_path)
    soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).normal(size=32000), 16000)
    whole = Recording(tmp_path / "long.wav", "one")
    parts = [dataclasses.replace(whole, start_sec=0.3, end_sec=0.3 + sec) for sec in (0.2, 0.5)]
    write_manifest(tmp_path / "m.jsonl", parts)
    sec: list[list[float]] = []
    monkeypatch.setattr(report.judge, "whisper_directory", lambda: tmp_path)
    monkeypatch.setattr(
        report.judge, "transcribe", lambda waves, rate: sec.append([len(x) / rate for x in waves]) or ["one"] * len(waves)
    )
    config = EvaluateConfig(inference_timesteps=1, num_pictures=0)
    for name, recorded in ((tmp_path / "m.jsonl", [0.2, 0.5]), ("tfds:ljspeech@train[:2]", [0.25, 0.25])):
        sec.clear()
        result = report.evaluate(config, released_dir, name, tmp_path / "out")
        assert result["manifest"] == str(name)
        assert sec[0] == pytest.approx(recorded, abs=1e-3)
        assert sec[1] == pytest.approx(np.ceil(np.array(recorded) / 0.16) * 0.16)  # whole patches


def test_an_empty_manifest_is_refused(tmp_path, released_dir):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="empty manifest"):
        report.evaluate(EvaluateConfig(), released_dir, tmp_path / "none.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
