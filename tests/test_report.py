"""The report on held-out texts: what is scored, and that every set goes the same way."""

import json

import numpy as np
import pytest
import soundfile

from voxcpm2_jax.config import EvaluateConfig, UserError
from voxcpm2_jax.data import corpus
from voxcpm2_jax.evaluate import report


@pytest.fixture
def manifest(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.normal(size=16000), 16000)
    texts = ("one two", "three", "four five")
    corpus.write_manifest(
        tmp_path / "heldout.jsonl", [corpus.Recording(str(tmp_path / f"{i}.wav"), text) for i, text in enumerate(texts)]
    )
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


def test_an_empty_manifest_is_refused(tmp_path, released_dir):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="empty manifest"):
        report.evaluate(EvaluateConfig(), released_dir, tmp_path / "none.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
