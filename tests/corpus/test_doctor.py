"""The doctor finds every planted fault, and none in a faultless corpus."""

import json

import numpy as np
import pytest
import soundfile

from voxcpm2_jax.cli import main
from voxcpm2_jax.corpus import doctor
from voxcpm2_jax.data.tokenizer import train_tokenizer

RATE = 16000


def sound(sec, seed=0, rate=RATE):
    return 0.2 * np.random.default_rng(seed).standard_normal(round(sec * rate))


@pytest.fixture
def sane(tmp_path):
    """Forty clips of two speakers, each with words of its own, written as a manifest."""
    entries = []
    for i in range(40):
        soundfile.write(tmp_path / f"{i}.wav", sound(1.0 + 0.02 * i, i), RATE)
        text = f"word{i} and then another{i}"
        entries.append({"audio": f"{i}.wav", "text": text, "speaker": "ab"[i % 2], "language": "en", "dataset": "d"})
    return entries


def save(tmp_path, entries, name="m.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return tmp_path / name


def found(tmp_path, entries, heldout=None, **options):
    heldout = [save(tmp_path, heldout, "h.jsonl")] if heldout else []
    report = doctor.examine([save(tmp_path, entries)], heldout, **options)
    return {finding["kind"]: finding for finding in report["findings"]}, report


def test_a_sound_corpus_has_no_findings(tmp_path, sane):
    kinds, report = found(tmp_path, sane)
    assert not kinds and report["ok"] and report["clips"] == 40 and report["speakers"] == 2
    assert report["hours"] == pytest.approx(sum(1.0 + 0.02 * i for i in range(40)) / 3600, abs=1e-4)
    assert report["by_language"].keys() == {"en"} and report["rates"] == {"16000": 40}
    assert report["forecast"]["rows_per_epoch"] == 1 and report["forecast"]["tokens_guessed"]


def silence(sec):
    return np.zeros(round(sec * RATE))


def clip(**changes):
    """A manifest entry with some fields changed."""
    return {"audio": "new.wav", "text": "something new here", "speaker": "a", "language": "en", "dataset": "d"} | changes


FAULTS = {
    "missing": (clip(), None),
    "unreadable": (clip(), b"not audio"),
    "empty": (clip(), sound(0)),
    "silent": (clip(), silence(1)),
    "bad part": (clip(start_sec=5.0), sound(1, 50)),
    "too short": (clip(text="ab"), sound(0.1, 50)),
    "too long": (clip(text="long " * 400), sound(61)),
    "no words": (clip(text="?!" * 9), sound(1, 50)),
    "unusable reference": (clip(ref_audio="gone.wav"), sound(1, 50)),
    "reference is itself": (clip(ref_audio="new.wav"), sound(1, 50)),
    "trailing silence": (clip(), np.concatenate([sound(1, 50), silence(0.7)])),
    "leading silence": (clip(), np.concatenate([silence(0.7), sound(1, 50)])),
    "clipping": (clip(), np.clip(20 * sound(1, 50), -1, 1)),
    "wrong duration": (clip(duration=9.0), sound(1, 50)),
    "text or duration outlier": (clip(text="a very long text " * 40), sound(0.5)),
    "duplicate text": (clip(text="word0 and then another0"), sound(1, 99)),
    "duplicate audio": (clip(), sound(1.0, 0)),
    "upper case": (clip(text="SHOUTED WORDS"), sound(1, 50)),
    "no partner": (clip(speaker="lonely"), sound(1, 50)),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found(tmp_path, sane, kind):
    entry, audio = FAULTS[kind]
    if isinstance(audio, bytes):
        (tmp_path / "new.wav").write_bytes(audio)
    elif audio is not None:
        soundfile.write(tmp_path / "new.wav", audio, RATE)
    kinds, report = found(tmp_path, [*sane, entry])
    assert kinds.keys() == {kind}
    finding = kinds[kind]
    assert finding["count"] == 1 and "new.wav" in finding["examples"][0] and finding["meaning"]
    assert report["ok"] == (doctor.KINDS[kind][0] == doctor.LOOK)


def test_references_are_opened(tmp_path, sane):
    soundfile.write(tmp_path / "long.wav", sound(3, 51), RATE)
    (tmp_path / "text.wav").write_bytes(b"not audio")
    part = {"audio": "long.wav", "start_sec": 1.0, "end_sec": 2.0}
    kinds, _ = found(tmp_path, [*sane, clip(**part, text="within its own reference", ref_audio="long.wav")])
    assert kinds.keys() == {"reference is itself"}
    kinds, _ = found(tmp_path, [*sane, clip(**part, text="beside no recording", ref_audio="text.wav")])
    assert kinds["unusable reference"]["examples"][0].endswith("text.wav: unreadable")


def test_words_are_shown_as_they_are_and_counted_as_prepare_does(tmp_path, sane, capsys):
    soundfile.write(tmp_path / "new.wav", sound(1, 50), RATE)
    tokenizer = train_tokenizer([*(entry["text"] for entry in sane), "\u00e9cole " * 9], 310)
    kinds, _ = found(tmp_path, [*sane, clip(text="e\u0301cole " * 3)], tokenizer=tokenizer)
    assert not kinds
    kinds, report = found(tmp_path, [*sane, clip(text="[NOISE] HELLO [/NOISE] THERE", speaker="[/b]")])
    doctor.show(report)
    assert "upper case" in kinds and "[/NOISE]" in capsys.readouterr().err.replace("\n", "")


def test_faults_of_rates_and_channels(tmp_path, sane):
    soundfile.write(tmp_path / "stereo.wav", np.stack([sound(1, 5), sound(1, 6)], axis=1), RATE)
    soundfile.write(tmp_path / "low.wav", sound(1, 7, 8000), 8000)
    entries = [*sane, clip(audio="stereo.wav", text="one thing"), clip(audio="low.wav", text="other thing")]
    kinds, report = found(tmp_path, entries)
    assert kinds.keys() == {"several channels", "low rate", "mixed rates"}
    assert report["rates"] == {"8000": 1, "16000": 41} and not report["ok"]


def test_validation_that_was_trained_on(tmp_path, sane):
    soundfile.write(tmp_path / "copy.wav", sound(1.0, 0), RATE)
    soundfile.write(tmp_path / "fresh.wav", sound(1.0, 77), RATE)
    fresh = clip(audio="fresh.wav", speaker="c")
    kinds, report = found(tmp_path, sane, [fresh])
    assert not kinds and report["ok"]
    kinds, report = found(tmp_path, sane, [fresh, clip(audio="copy.wav", speaker="c"), clip(audio="fresh.wav", speaker="a")])
    assert {kind: finding["count"] for kind, finding in kinds.items()} == {"audio in validation": 1, "speaker in validation": 1}
    assert not report["ok"]


def test_characters_that_the_vocabulary_does_not_cover(tmp_path, sane):
    tokenizer = train_tokenizer([entry["text"] for entry in sane], 310)
    kinds, report = found(tmp_path, sane, tokenizer=tokenizer)
    assert not kinds and not report["forecast"]["tokens_guessed"]
    soundfile.write(tmp_path / "new.wav", sound(1, 50), RATE)
    kinds, _ = found(tmp_path, [*sane, clip(text="word1 \u4f60 \u00df")], tokenizer=tokenizer)
    assert kinds.keys() == {"bytes"} and kinds["bytes"]["examples"][0].endswith("\u00df \u4f60")


def test_forecast(tmp_path, sane):
    batch = doctor.BatchConfig(rows=2, slots=64, patches=40)
    _, report = found(tmp_path, sane, batch=batch)
    forecast = report["forecast"]
    assert forecast["steps_per_epoch"] == forecast["rows_per_epoch"] / 2 > 3
    assert 0.5 < forecast["slots_used"] <= 1 and forecast["clips_that_fit_no_row"] == 0
    _, report = found(tmp_path, sane, batch=doctor.BatchConfig(rows=2, slots=12, patches=8))
    assert report["forecast"]["clips_that_fit_no_row"] == 40 and "rows_per_epoch" not in report["forecast"]


def test_command_line(tmp_path, sane, capsys):
    manifest = save(tmp_path, sane)
    assert main.main(["doctor", f"--manifest={manifest}", f"--output={tmp_path}/report"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] and "no findings" not in out and "40 clips" in err
    assert json.loads((tmp_path / "report" / "report.json").read_text())["clips"] == 40
    assert (tmp_path / "report" / "distributions.png").stat().st_size > 5000
    save(tmp_path, [*sane, clip()])
    assert main.main(["doctor", f"--manifest={manifest}"]) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not report["ok"] and "missing" in err and report["findings"][0]["examples"] == [f"{tmp_path}/new.wav"]
    for arguments, message in (
        ([f"--manifest={tmp_path}/no.jsonl"], "no such manifest"),
        ([f"--manifest={manifest}", f"--tokenizer={tmp_path}"], "no tokenizer"),
        ([f"--manifest={manifest}", f"--output={manifest}"], "cannot be written"),
        ([f"--manifest={manifest}", "--slots=0"], "must be at least 1"),
        ([], "--manifest"),
    ):
        assert main.main(["doctor", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_samples_that_are_no_numbers(tmp_path, sane):
    soundfile.write(tmp_path / "new.wav", np.where(np.arange(RATE) == 99, np.nan, sound(1)), RATE, subtype="FLOAT")
    kinds, report = found(tmp_path, [*sane, clip()])
    assert kinds.keys() == {"not finite"} and not report["ok"]


def test_characters_without_a_piece(tmp_path, sane):
    class Small:
        def encode(self, text):
            return [0] * len(text)

        def uncovered(self, text):
            return [c for c in "q" if c in text], []

    soundfile.write(tmp_path / "new.wav", sound(1, 50), RATE)
    kinds, report = found(tmp_path, [*sane, clip(text="quite new")], tokenizer=Small())
    assert kinds.keys() == {"unknown characters"} and not report["ok"]


def test_every_kind_is_planted_somewhere():
    planted = FAULTS.keys() | {"several channels", "low rate", "mixed rates", "not finite", "unknown characters", "bytes"}
    assert planted | {"audio in validation", "speaker in validation"} == doctor.KINDS.keys()
