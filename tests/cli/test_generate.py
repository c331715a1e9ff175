"""`generate`: what it asks of the model, what it writes, what it refuses before it loads one."""

import json
import os

import numpy as np
import pytest
import soundfile

from voxcpm2_jax.cli import generate, main
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.request import Request


def run(*argv):
    return main.main([str(a) for a in argv])


@pytest.fixture
def voice(monkeypatch, tmp_path):
    """Replaces a loaded model: returns constants, and records the requests."""
    from voxcpm2_jax import workdir
    from voxcpm2_jax.inference import api, room

    class Voice:
        sample_rate = 48000
        asked, loaded = [], []

        @classmethod
        def from_pretrained(cls, path):
            cls.loaded.append(path)
            return cls()

        config = MODELS["tiny"]

        def speak(self, requests):
            self.asked.append(requests)
            reasons = ["max_length" if "endless" in request.text else "stop head" for request in requests]
            return [api.Speech(np.full(480 * (1 + i), 0.5, np.float32), None, 7, why, 1) for i, why in enumerate(reasons)]

        def generate_streaming(self, **request):
            self.asked.append([Request(**request)])
            yield from (np.full(480, x, np.float32) for x in (0.25, 0.5))

    monkeypatch.setattr(api, "VoxCPM", Voice)
    monkeypatch.setattr(workdir, "kind", lambda path: "released")
    monkeypatch.setattr(room, "check_all", lambda checkpoint, requests: None)
    return Voice


def test_generate_one_text(tmp_path, voice, capsys):
    (tmp_path / "voice.wav").write_bytes(b"")
    output = tmp_path / "a.wav"
    code = run("generate", "--checkpoint=C", "--text=Hello", "--control=deep voice", f"--reference-audio={tmp_path}/voice.wav",
               "--cfg-value=1.5", "--inference-timesteps=5", "--seed=3", f"--output={output}")  # fmt: skip
    assert code == 0 and voice.loaded == ["C"]
    voice_file = f"{tmp_path}/voice.wav"
    request = Request("(deep voice)Hello", reference_wav_path=voice_file, cfg_value=1.5, inference_timesteps=5, seed=3)
    assert voice.asked == [[request]]
    audio, rate = soundfile.read(output)
    assert rate == 48000 and audio.shape == (480,)
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(output) and said["sec"] == 0.01 and said["stopped_by"] == "stop head"


def test_generate_lines(tmp_path, voice, capsys, monkeypatch):
    monkeypatch.setattr(generate, "_BATCH_LINES", 2)
    (tmp_path / "lines.txt").write_text("one\n\nthree\n  \n五\n", encoding="utf-8")
    assert run("generate", "--checkpoint=C", f"--input={tmp_path}/lines.txt", f"--output-dir={tmp_path}/out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["0001.wav", "0003.wav", "0005.wav"]
    assert [[request.text for request in batch] for batch in voice.asked] == [["one", "three"], ["五"]]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_line_without_end_does_not_stop_the_others(tmp_path, voice, capsys):
    (tmp_path / "lines.txt").write_text("one\nendless\nthree\n", encoding="utf-8")
    assert run("generate", "--checkpoint=C", f"--input={tmp_path}/lines.txt", f"--output-dir={tmp_path}/out") == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["0001.wav", "0003.wav"]
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.count("\n") == 1 and "0002.wav is not written: the speech did not end within the model's 512 slots" in err


def test_generate_streams_into_a_file_that_is_renamed_when_it_is_complete(tmp_path, voice, capsys):
    output = tmp_path / "a.wav"
    assert run("generate", "--checkpoint=C", "--text=Hello", "--stream", f"--output={output}") == 0
    audio, _ = soundfile.read(output)
    np.testing.assert_allclose(audio[[0, -1]], [0.25, 0.5], atol=1e-4)
    assert len(audio) == 960 and os.listdir(tmp_path) == ["a.wav"]
    assert json.loads(capsys.readouterr().out)["sec"] == 0.02


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text=", "--output=a.wav"], "--text must not be empty"),
        (["--text=  ", "--output=a.wav"], "--text must not be empty"),
        (["--text=a"], "one of the arguments --output --output-dir is required"),
        (["--text=a", "--output-dir=d"], "--text goes with --output"),
        (["--text=a", "--input=x", "--output=a.wav"], "not allowed with"),
        (
            ["--text=a", "--output=a.wav", "--control=deep", "--prompt-audio=p.wav", "--prompt-text=b"],
            "--control does not go with",
        ),
        (["--text=a", "--output=a.wav", "--control= "], "--control must not be empty"),
        (["--text=a", "--output=a.wav", "--prompt-text=b"], "prompt text without prompt audio"),
        (["--text=a", "--output=a.wav", "--prompt-audio=b.wav"], "prompt audio without prompt text"),
        (["--text=a", "--output=a.wav", "--prompt-audio=no.wav", "--prompt-text=b"], "--prompt-audio=no.wav: no such file"),
        (["--text=a", "--output=a.wav", "--reference-audio=no.wav"], "--reference-audio=no.wav: no such file"),
        (["--text=a", "--output=no/a.wav"], "no/a.wav: cannot be written"),
        (["--text=a", "--output=a.xyz"], "ends in .wav"),
        (["--text=a", "--output=a.wav", "--cfg-value=11"], "cfg_value must lie between 0 and 10"),
        (["--text=a", "--output=a.wav", "--cfg-value=nan"], "cfg_value must lie"),
        (["--text=a", "--output=a.wav", "--cfg-value=x"], "invalid float value: 'x'"),
        (["--text=a", "--output=a.wav", "--inference-timesteps=0"], "inference_timesteps must lie between 1 and 1000"),
        (["--text=a", "--output=a.wav", "--min-len=9", "--max-len=3"], "min_len <= max_len"),
        (["--text=a", "--output=a.wav", "--seed=-1"], "seed must lie"),
        (["--input=no.txt", "--output-dir=d"], "--input=no.txt"),
        (["--input=blank.txt", "--output-dir=d"], "contains no text"),
        (["--input=lines.txt", "--output-dir=d", "--stream"], "--stream goes with --text"),
        (["--input=lines.txt", "--output-dir=lines.txt"], "--output-dir=lines.txt"),
    ],
)
def test_generate_refuses_before_it_loads(refusal, tmp_path, voice, argv, message):
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "lines.txt").write_text("a\n")
    assert message in refusal("generate", "--checkpoint=C", *argv)
    assert voice.loaded == []


def test_generate_refuses_a_directory_that_is_no_checkpoint(refusal, tmp_path):
    argv = ["generate", "--text=a", f"--output={tmp_path}/a.wav"]
    assert "no such directory" in refusal(*argv, f"--checkpoint={tmp_path}/nothing")
    assert "not a checkpoint" in refusal(*argv, f"--checkpoint={tmp_path}")
