"""launch/quickstart.sh from end to end at tiny scale; what it exports loads and speaks in the PyTorch package."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import soundfile
import torch

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What the script leaves behind."""
    directory = tmp_path_factory.mktemp("quickstart") / "work"
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "JAX_PLATFORMS": "cpu"}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, as on a laptop; quick compilation
    script = subprocess.run(
        ["bash", "launch/quickstart.sh", "tiny", str(directory)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert script.returncode == 0, script.stderr[-3000:]
    return directory


def test_every_step_left_its_result(work):
    result = json.loads((work / "judged" / "result.json").read_text())
    heldout = [json.loads(line)["text"] for line in (work / "recordings" / "heldout.jsonl").read_text().splitlines()]
    trained = {json.loads(line)["text"] for line in (work / "recordings" / "train.jsonl").read_text().splitlines()}
    assert sorted(row["text"] for row in result["rows"]) == sorted(heldout) and not trained & set(heldout)
    assert result["scores"]["recordings"]["digits right"] > 0.9, "the judge does not even hear the recordings"
    assert (work / "judged" / "spectrogram_0000.png").stat().st_size > 10_000
    assert len(list((work / "judged" / "audio").glob("*.wav"))) == len(heldout)
    audio_A, rate = soundfile.read(work / "three_one_four.wav")
    assert rate == 24000 and len(audio_A) > 0 and abs(audio_A).max() > 0
    for run in ("codec", "voice"):
        rows = [json.loads(line) for line in (work / run / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert list((work / run / "tensorboard").iterdir())


def test_the_reference_speaks_with_the_export(work, load_reference):
    model = load_reference(work / "exported")
    with torch.inference_mode():
        wav = model.generate("three one", max_len=4)
    assert model.sample_rate == 24000 and wav.shape[-1] > 0 and torch.isfinite(wav).all()
