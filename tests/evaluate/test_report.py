"""The report on held-out texts: three sets, one judge, each text in its own language."""

import dataclasses
import json
import weakref

import numpy as np
import pytest
import soundfile
from tensorflow_datasets.core import constants

from tests.corpus.test_datasets import ljspeech
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus.manifest import Recording, write_manifest
from voxcpm2_jax.evaluate import report


def write(directory, texts, languages=None):
    """A manifest of noise with these texts."""
    rng = np.random.default_rng(0)
    recordings = []
    for i, text in enumerate(texts):
        soundfile.write(directory / f"{i}.wav", 0.1 * rng.normal(size=16000), 16000)
        recordings.append(Recording(directory / f"{i}.wav", text, language=languages[i] if languages else None))
    write_manifest(directory / "heldout.jsonl", recordings)
    return directory / "heldout.jsonl"


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """Stands in for Whisper: keeps what it is asked, and answers with the lists in `answers`, or always with "one"."""

    class Judge:
        answers, languages, seconds = [], [], []
        most_alive = 0  # waveforms of a set that are in memory at the same time

    def transcribe(waves, rate, languages):
        Judge.languages.append(list(languages))
        Judge.seconds.append([])
        seen = []
        for wave_A in waves:
            seen.append(weakref.ref(wave_A))
            Judge.seconds[-1].append(len(wave_A) / rate)
            Judge.most_alive = max(Judge.most_alive, sum(ref() is not None for ref in seen))
        return Judge.answers.pop(0) if Judge.answers else ["one"] * len(languages)

    monkeypatch.setattr(report.whisper, "whisper_directory", lambda: tmp_path)
    monkeypatch.setattr(report.whisper, "transcribe", transcribe)
    return Judge


def test_three_sets_one_judge(judge, released_dir, tmp_path):
    """A judge that hears the recordings right and nothing else."""
    judge.answers += [["1 2", "three", "4-5"], ["one", "", "four five six"], ["", "three", "nine nine"]]
    manifest = write(tmp_path, ["one two", "three", "?!", "four five"])
    config = EvaluateConfig(measure="digits", inference_timesteps=2, num_pictures=1)
    result = report.evaluate(config, released_dir, manifest, tmp_path / "out")
    scores = {name: values["digits right"] for name, values in result["scores"].items()}
    # Of five digits: all; one of "one two" and, one too many, one of "four five"; the three.
    assert scores == pytest.approx({"recordings": 1.0, "reconstructions": 2 / 5, "generated": 1 / 5, "retried": 1 / 5})
    assert judge.most_alive == 1
    assert result["scores"]["generated"]["strings right"] == pytest.approx(1 / 3)
    (left_out,) = result["left_out"]
    assert left_out["audio"].endswith("2.wav") and "letter or a digit" in left_out["reason"] and result["texts"] == 3
    assert judge.languages == [["en"] * 3] * 3 and result["texts_without_language"] == 3
    assert result["languages"] == {"en": {"texts": 3, "unit": "digit"}} and "by_language" not in result
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert len(list((tmp_path / "out" / "audio").glob("*.wav"))) == 3
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_bad_recordings_are_left_out_before_anything_is_spoken(judge, released_dir, tmp_path, monkeypatch):
    manifest = write(tmp_path, ["one", "two", "three", "four"])
    (tmp_path / "0.wav").unlink()
    (tmp_path / "1.wav").write_bytes((tmp_path / "2.wav").read_bytes()[:16000])
    soundfile.write(tmp_path / "3.wav", np.full(1600, 0.1), 16000)
    soundfile.write(tmp_path / "4.wav", 0.1 * np.random.default_rng(0).normal(size=1600), 16000)
    with manifest.open("a") as file:
        file.write('{"audio": "4.wav", "text": "five"}\n')
    result = report.evaluate(EvaluateConfig(inference_timesteps=2, num_pictures=0), released_dir, manifest, tmp_path / "out")
    assert result["texts"] == 1 and [row["text"] for row in result["rows"]] == ["three"]
    reasons = [line["reason"].rpartition(".wav: ")[2] for line in result["left_out"]]
    assert [reason[:10] for reason in reasons] == ["no such au", "cut off: t", "silent (pe", "0.100 s is"]
    (tmp_path / "2.wav").unlink()
    monkeypatch.setattr(report.VoxCPM, "from_pretrained", None)
    with pytest.raises(UserError, match=r"none of 5 recordings can be used; the first: .*0.wav: no such audio file"):
        report.evaluate(EvaluateConfig(), released_dir, manifest, tmp_path / "out")


def test_scores_are_of_first_tries_with_retries_beside_them(judge, released_dir, tmp_path, monkeypatch):
    """Text 1 is a bad case; its retries are heard as well, and only they."""
    asked = []
    speak = report.VoxCPM.speak

    def speak_with_a_bad_case(self, requests):
        asked.extend((r.text, r.seed, r.retry_badcase, r.retry_badcase_max_times) for r in requests)
        return [dataclasses.replace(s, is_bad_case=r.seed == 8) for r, s in zip(requests, speak(self, requests))]

    monkeypatch.setattr(report.VoxCPM, "speak", speak_with_a_bad_case)
    judge.answers += [["one", "two"], ["one", "two"], ["one", "nine"], ["two"]]
    config = EvaluateConfig(measure="digits", inference_timesteps=1, num_pictures=0, seed=7)
    result = report.evaluate(config, released_dir, write(tmp_path, ["one", "two"]), tmp_path / "out")
    assert sorted(asked) == [("one", 7, False, 3), ("two", 8, False, 3), ("two", 9, True, 2)]
    right = {name: values["digits right"] for name, values in result["scores"].items()}
    assert right == {"recordings": 1.0, "reconstructions": 1.0, "generated": 0.5, "retried": 1.0}
    assert (result["retried"], result["bad_after_retries"]) == (1, 0)
    assert [row["retried"] for row in result["rows"]] == ["one", "two"]
    audio = tmp_path / "out" / "audio"
    names = sorted(path.relative_to(audio).as_posix() for path in audio.rglob("*.wav"))
    assert names == ["0000.wav", "0001.wav", "retried/0001.wav"]


def test_each_text_is_heard_and_scored_in_its_language(judge, released_dir, tmp_path, capsys):
    texts, tags = ["मेरा नाम राम है।", "今天天气很好。", "cost $1_a and $x_{", "谢谢"], ["hi-IN", "zh-CN", None, "cmn"]
    judge.answers += [texts, ["मेरा नाम रमा है", "今天天汽很好", "cost", "谢谢"], [""] * 4]
    config = EvaluateConfig(inference_timesteps=2, num_pictures=4)
    result = report.evaluate(config, released_dir, write(tmp_path, texts, tags), tmp_path / "out")
    assert judge.languages == [["hi", "zh", "en", "zh"]] * 3
    assert [row["language"] for row in result["rows"]] == ["hi", "zh", "en", "zh"]
    assert result["texts_without_language"] == 1
    assert result["languages"] == {
        "en": {"texts": 1, "unit": "word"},
        "hi": {"texts": 1, "unit": "word"},
        "zh": {"texts": 2, "unit": "character"},
    }
    rates = {code: sets["reconstructions"]["WER"] for code, sets in result["by_language"].items()}
    assert rates == pytest.approx({"en": 4 / 5, "hi": 1 / 4, "zh": 1 / 8})
    assert result["by_language"]["zh"]["reconstructions"]["CER"] == pytest.approx(1 / 8)
    assert result["scores"]["reconstructions"]["WER"] == pytest.approx((4 + 1 + 1) / (5 + 4 + 8))
    for name, rate in (("recordings", 0.0), ("generated", 1.0)):
        assert {sets[name]["WER"] for sets in (result["scores"], *result["by_language"].values())} == {rate}
    report.show(result)
    table = capsys.readouterr().err
    assert "reconstructions, zh" in table and "WER counts characters in zh" in table and "taken for English: 1" in table


def test_languages_that_cannot_be_scored(judge, tmp_path, monkeypatch):
    """Refused before a model is loaded."""
    monkeypatch.setattr(report.VoxCPM, "from_pretrained", None)
    for measure, texts, tags, message in (
        ("words", ["one", "雨"], ["en", "yue"], "heldout.jsonl: language 'yue': Whisper-base, the judge, does not know it"),
        ("digits", ["one", "eins"], [None, "de"], "measure=digits counts English digits, got recordings in de"),
        ("words", ["?!", "..."], ["en", "de"], "none of 2 texts can be spoken; the first: text must have a letter or a digit"),
    ):
        with pytest.raises(UserError, match=message) as error:
            report.evaluate(EvaluateConfig(measure=measure), "C", write(tmp_path, texts, tags), tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not judge.languages and not (tmp_path / "out").exists()


def test_parts_of_recordings_and_sets_of_tensorflow_are_heard_as_they_are(judge, released_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    ljspeech(tmp_path)
    soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).normal(size=32000), 16000)
    whole = Recording(tmp_path / "long.wav", "one")
    parts = [dataclasses.replace(whole, start_sec=0.3, end_sec=0.3 + sec) for sec in (0.2, 0.5)]
    write_manifest(tmp_path / "m.jsonl", parts)
    config = EvaluateConfig(inference_timesteps=1, num_pictures=0)
    for name, recorded in ((tmp_path / "m.jsonl", [0.2, 0.5]), ("tfds:ljspeech@train[:2]", [0.25, 0.25])):
        judge.seconds.clear()
        result = report.evaluate(config, released_dir, name, tmp_path / "out")
        assert result["manifest"] == str(name)
        assert judge.seconds[0] == pytest.approx(recorded, abs=1e-3)
        assert judge.seconds[1] == pytest.approx(np.ceil(np.array(recorded) / 0.16) * 0.16)  # whole patches


def test_an_empty_manifest_is_refused(tmp_path, released_dir):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="empty manifest"):
        report.evaluate(EvaluateConfig(), released_dir, tmp_path / "none.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
