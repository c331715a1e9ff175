import difflib
import random

import numpy as np
import pytest

from voxcpm2_jax.config.corpus import DemoConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import demo, manifest
from voxcpm2_jax.data import audio
from voxcpm2_jax.evaluate import scores, whisper


@pytest.mark.parametrize(
    "text",
    ["372", "3 7 2", "3-7-2.", "Three, seven, two.", "three seven too!", " 3, seven to", "37 2", "THREE SEVEN TWO", "3.72"],
)
def test_digits_reads_every_spelling(text):
    assert scores.digits(text) == ["three", "seven", "two"]


def test_digits_of_other_words():
    assert scores.digits("Oh, one for eight") == ["zero", "one", "four", "eight"]
    assert scores.digits("twelve o'clock") == ["?", "?"]
    assert scores.digits("") == scores.digits(" ... ") == []


def test_edit_distance():
    assert scores.edit_distance("kitten", "sitting") == 3
    assert scores.edit_distance("", "abc") == scores.edit_distance("abc", "") == 3
    rng = random.Random(0)
    for _ in range(50):
        a, b = ("".join(rng.choices("ab", k=rng.randrange(7))) for _ in range(2))
        assert scores.edit_distance(a, b) == scores.edit_distance(b, a) >= abs(len(a) - len(b))
        assert (scores.edit_distance(a, b) == 0) == (a == b)
        longest = sum(block.size for block in difflib.SequenceMatcher(None, a, b).get_matching_blocks())
        assert scores.edit_distance(a, b) <= len(a) + len(b) - 2 * longest


def test_digit_accuracy():
    assert scores.digit_accuracy(["three seven two", "one one"], ["372", "1 1."]) == 1.0
    assert scores.digit_accuracy(["three seven two", "one one"], ["3 7", "1 one"]) == 4 / 5
    assert scores.digit_accuracy(["one two"], [""]) == 0.0
    # Babble is not free, and no string counts below zero.
    assert scores.digit_accuracy(["one two"], ["one two and so on"]) == 0.0
    assert scores.digit_accuracy(["one two", "one two"], ["blah " * 50, "12"]) == 0.5
    with pytest.raises(ValueError):
        scores.digit_accuracy(["one"], [])


def test_word_and_character_error_rates():
    assert scores.word_error_rate(["The cat sat.", "Don't"], ["the CAT sat on", "don’t"]) == 1 / 4
    assert scores.character_error_rate(["ab cd"], ["abcx"]) == 1 / 4


def test_the_judge_hears_the_demo_voice(tmp_path):
    config = DemoConfig(num_digit_clips=1, num_foreign_clips=0, num_heldout=3)
    _, heldout = demo.make_demo(tmp_path, config, num_processes=1)
    recordings = manifest.read_manifest(heldout)
    waveforms = [audio.load(r.audio, 24000) for r in recordings]
    heard = whisper.transcribe(waveforms, 24000, num_processes=1)
    assert scores.digit_accuracy([r.text for r in recordings], heard) == 1.0
    noise_A = 0.1 * np.random.default_rng(0).standard_normal(24000).astype(np.float32)
    (noise,) = whisper.transcribe([noise_A], 24000)
    assert scores.digit_accuracy([recordings[0].text], [noise]) == 0.0


def test_the_judge_refuses_other_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(whisper, "WHISPER_SHA256", "0" * 64)
    with pytest.raises(UserError, match="expected 0000"):
        whisper.whisper_directory()
    assert not list(tmp_path.rglob("*.bin"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'voxcpm2-jax\[eval\]'"):
        whisper.whisper_directory()
