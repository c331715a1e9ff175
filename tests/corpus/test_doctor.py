"""The doctor finds every planted fault, and none in a faultless corpus."""

import io
import json
import struct

import numpy as np
import pytest
import soundfile
import soxr

from voxcpm2_jax.cli import main
from voxcpm2_jax.config.run import BatchConfig
from voxcpm2_jax.corpus import comparison, doctor, faults
from voxcpm2_jax.corpus import report as reporting
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


def cut(sec, seed, stated=None):
    """The content of a WAV whose end is missing, or whose header states another number of bytes."""
    file = io.BytesIO()
    soundfile.write(file, sound(sec, seed), RATE, format="WAV")
    content = bytearray(file.getvalue())
    if stated is None:
        return bytes(content[: len(content) // 2])
    content[40:44] = struct.pack("<I", stated)
    return bytes(content)


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
    "control pieces": (clip(text="it ends</s>"), sound(1, 50)),
    "markup": (clip(text="and then [laughter] he said"), sound(1, 50)),
    "unusable reference": (clip(ref_audio="gone.wav"), sound(1, 50)),
    "reference is itself": (clip(ref_audio="new.wav"), sound(1, 50)),
    "trailing silence": (clip(), np.concatenate([sound(1, 50), silence(0.7)])),
    "leading silence": (clip(), np.concatenate([silence(0.7), sound(1, 50)])),
    "clipping": (clip(), np.clip(20 * sound(1, 50), -1, 1)),
    "cut off": (clip(), cut(2.0, 50)),
    "wrong length": (clip(), cut(2.0, 50, stated=0)),
    "wrong scale": (clip(), 5620 * sound(1, 50)),
    "quiet": (clip(), 0.002 * sound(1, 50) / 0.2),
    "offset": (clip(), sound(1, 50) + 0.05),
    "narrow spectrum": (clip(), soxr.resample(sound(1, 50, 8000), 8000, RATE)),
    "wrong duration": (clip(duration=9.0), sound(1, 50)),
    "text or duration outlier": (clip(text="a very long text " * 40), sound(0.5)),
    "duplicate text": (clip(text="word0 and then another0"), sound(1, 99)),
    "duplicate audio": (clip(), sound(1.0, 0)),
    "upper case": (clip(text="(a low voice)SHOUTED WORDS"), sound(1, 50)),
    "no partner": (clip(speaker="lonely"), sound(1, 50)),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found(tmp_path, sane, kind):
    entry, audio = FAULTS[kind]
    if isinstance(audio, bytes):
        (tmp_path / "new.wav").write_bytes(audio)
    elif audio is not None:
        subtype = "FLOAT" if kind == "wrong scale" else "PCM_16"
        soundfile.write(tmp_path / "new.wav", audio, RATE, subtype=subtype)
    kinds, report = found(tmp_path, [*sane, entry])
    assert kinds.keys() == {kind}
    finding = kinds[kind]
    assert finding["count"] == 1 and "new.wav" in finding["examples"][0] and finding["meaning"]
    assert report["ok"] == (faults.KINDS[kind][0] == faults.LOOK)


def test_a_part_that_ends_after_its_recording(tmp_path, sane):
    soundfile.write(tmp_path / "new.wav", sound(1, 50), RATE)
    kinds, _ = found(tmp_path, [*sane, clip(start_sec=0.2, end_sec=1.05)])  # as people round
    assert not kinds
    kinds, report = found(tmp_path, [*sane, clip(end_sec=2.0)])
    assert kinds.keys() == {"bad part"} and not report["ok"]
    assert kinds["bad part"]["examples"][0].endswith("new.wav: ends at 1.00 s, but the part at 2.00 s")


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
    reporting.show(report)
    assert "upper case" in kinds and "[/NOISE]" in capsys.readouterr().err.replace("\n", "")


def test_faults_of_rates_and_channels(tmp_path, sane):
    soundfile.write(tmp_path / "stereo.wav", np.stack([sound(1, 5), sound(1, 6)], axis=1), RATE)
    soundfile.write(tmp_path / "low.wav", sound(1, 7, 8000), 8000)
    entries = [*sane, clip(audio="stereo.wav", text="one thing"), clip(audio="low.wav", text="other thing")]
    kinds, report = found(tmp_path, entries)
    assert kinds.keys() == {"several channels", "low rate", "mixed rates"}
    assert report["rates"] == {"8000": 1, "16000": 41} and not report["ok"]


def test_channels_and_sound_are_named_with_their_numbers(tmp_path, sane):
    x_A = sound(2, 5)
    channels = {"dead": (x_A, 0 * x_A), "antiphase": (x_A, -0.9 * x_A), "opposite": (x_A, -x_A), "apart": (x_A, sound(2, 6))}
    notes = {}
    for name, pair in channels.items():
        soundfile.write(tmp_path / f"{name}.wav", np.stack(pair, axis=1), RATE)
        kinds, _ = found(tmp_path, [*sane, clip(audio=f"{name}.wav")])
        notes |= {(name, kind): finding["examples"][0].rpartition(".wav: ")[2] for kind, finding in kinds.items()}
    assert notes[("dead", "dead channel")] == "1 of 2 channels; the mean of all loses 6.0 dB"
    assert notes[("antiphase", "channels cancel")] == "correlation -1.00; the mean of 2 loses 26.0 dB"
    assert notes[("opposite", "channels cancel")].startswith("correlation -1.00; the mean of 2 loses ")
    assert notes[("apart", "several channels")] == "2, correlation -0.00" and len(notes) == 7
    for name, samples, note in (
        ("quiet", 0.01 * x_A, "speech at -54.0 dB of full scale, expected -35 to -15"),
        ("offset", x_A + 0.1, "a mean of +0.1014 of full scale, 45 % of the loudest 10 ms"),
        ("clipping", np.clip(10 * x_A, -0.5, 0.5), "13.81 % of the samples"),  # below full scale
    ):
        soundfile.write(tmp_path / "new.wav", samples, RATE)
        kinds, _ = found(tmp_path, [*sane, clip()])
        assert kinds.keys() == {name} and note in kinds[name]["examples"][0]
    soundfile.write(tmp_path / "new.wav", np.concatenate([x_A[:RATE], silence(1.0)]) + 0.1, RATE)
    kinds, _ = found(tmp_path, [*sane, clip()])
    assert kinds.keys() == {"offset", "trailing silence"}  # an offset hides no silence


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
    batch = BatchConfig(rows=2, slots=64, patches=40)
    _, report = found(tmp_path, sane, batch=batch)
    forecast = report["forecast"]
    assert forecast["steps_per_epoch"] == forecast["rows_per_epoch"] / 2 > 3
    assert 0.5 < forecast["slots_used"] <= 1 and forecast["clips_that_fit_no_row"] == 0
    _, report = found(tmp_path, sane, batch=BatchConfig(rows=2, slots=12, patches=8))
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
        sha256, rule = "small", None

        def encode(self, text):
            return [0] * len(text)

        def control_pieces(self, text):
            return []

        def uncovered(self, text):
            return [c for c in "q" if c in text], []

    soundfile.write(tmp_path / "new.wav", sound(1, 50), RATE)
    kinds, report = found(tmp_path, [*sane, clip(text="quite new")], tokenizer=Small())
    assert kinds.keys() == {"unknown characters"} and not report["ok"]


def test_every_kind_is_planted_somewhere():
    planted = FAULTS.keys() | {
        faults.FAULTY,
        "several channels",
        "dead channel",
        "channels cancel",
        "doubtful rate",
        "low rate",
        "mixed rates",
        "not finite",
        "unknown characters",
        "bytes",
    }
    assert planted | {"audio in validation", "speaker in validation"} == faults.KINDS.keys()


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path, sane):
    """Forty-four clips, in parts of seven, of which some are at fault; two are held out."""
    for name, seed in (("new", 50), ("other", 51)):
        soundfile.write(tmp_path / f"{name}.wav", sound(1, seed), RATE)
    more = [clip(), clip(text="SHOUTED WORDS"), clip(audio="gone.wav"), clip(audio="other.wav", speaker="lonely")]
    heldout = [clip(audio="other.wav", speaker="c"), clip(audio="new.wav", speaker="a", text="held out")]
    return [save(tmp_path, [*more[:2], *sane, *more[2:]])], [save(tmp_path, heldout, "h.jsonl")]


def lines(directory):
    return [json.loads(line) for line in (directory / "findings.jsonl").read_text().splitlines()]


def test_hosts_and_stops_change_nothing_and_no_recording_is_opened_twice(tmp_path, faulty, monkeypatch):
    monkeypatch.setattr(doctor, "_PART", 7)
    expected = doctor.examine(*faulty, output=tmp_path / "alone")
    assert expected == doctor.examine(*faulty) and not expected["ok"]
    opened, really = [], doctor._open

    def opens(recording, limits):
        if len(opened) == 16:
            opened.append(None)
            raise KeyboardInterrupt
        opened.append(str(recording.audio))
        return really(recording, limits)

    monkeypatch.setattr(doctor, "_open", opens)
    monkeypatch.setattr(doctor.sources.in_threads, "__defaults__", (0,))  # opens none ahead
    shared = {"output": tmp_path / "shared", "num_hosts": 2}
    with pytest.raises(KeyboardInterrupt):
        doctor.examine(*faulty, host=1, **shared)
    assert len(list((tmp_path / "shared").glob("parts-*/*.npz"))) == 2
    assert doctor.examine(*faulty, host=1, **shared) is None
    assert doctor.examine(*faulty, host=0, **shared) == expected
    assert len(opened) - 1 == 46 + 2  # the part that was stopped is opened again
    assert lines(tmp_path / "shared") == lines(tmp_path / "alone")
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"findings.jsonl", "report.json", "distributions.png"}


def test_every_finding_is_in_the_file_and_the_first_of_a_kind_is_told_at_once(tmp_path, sane, capfd, monkeypatch):
    monkeypatch.setattr(doctor, "_PART", 16)
    missing = [clip(audio=f"gone{i}.wav") for i in range(20)]
    report = doctor.examine([save(tmp_path, [*missing, *sane, *sane[:3]])], output=tmp_path / "out")
    found = lines(tmp_path / "out")
    assert {f["kind"]: f["count"] for f in report["findings"]} == {"missing": 20, "duplicate text": 3, "duplicate audio": 3}
    assert [line["where"] for line in found if line["kind"] == "missing"] == [f"{tmp_path}/gone{i}.wav" for i in range(20)]
    repeated = [line for line in found if line["kind"] == "duplicate audio"]
    assert repeated[1] == {"kind": "duplicate audio", "where": f"{tmp_path}/1.wav", "note": f"as {tmp_path}/1.wav"}
    assert capfd.readouterr().err.splitlines() == [f"missing: {tmp_path}/gone0.wav"]


def test_parts_of_another_manifest_are_not_taken(tmp_path, sane, monkeypatch):
    monkeypatch.setattr(doctor, "_PART", 16)
    output = {"output": tmp_path / "out", "num_hosts": 2}
    assert doctor.examine([save(tmp_path, sane)], host=0, **output) is None
    assert doctor.examine([save(tmp_path, [*sane[1:], clip()])], host=1, **output) is None
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_repeats_and_matches():
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 30):
        values, among = (rng.integers(0, 12, n).astype(np.uint64) for n in (size, 17))
        values_l, among_l = values.tolist(), among.tolist()
        repeats = [(i, values_l.index(x)) for i, x in enumerate(values_l) if values_l.index(x) < i]
        assert list(zip(*map(np.ndarray.tolist, comparison._repeats(values)))) == repeats
        matches = [(i, among_l.index(x)) for i, x in enumerate(values_l) if x in among_l]
        assert list(zip(*map(np.ndarray.tolist, comparison._matches(values, among)))) == matches
        assert not len(comparison._matches(values, among[:0])[0])


def test_several_hosts_need_a_directory(tmp_path, sane, capsys):
    manifest = save(tmp_path, sane)
    for arguments, message in ((["--num-hosts=2"], "needs --output"), (["--host=1"], "--host=1: expected 0 to 0")):
        assert main.main(["doctor", f"--manifest={manifest}", *arguments]) == 2
        assert message in capsys.readouterr().err
    shared = [f"--manifest={manifest}", "--num-hosts=2", f"--output={tmp_path}/out"]
    assert main.main(["doctor", *shared, "--host=0"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 40  # one part: the other host has nothing to do
