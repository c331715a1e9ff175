"""Lists of recordings in the formats of others; those of lhotse and Hugging Face are written by their own libraries."""

import gzip
import json

import numpy as np
import pytest
import soundfile

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import doctor, sources
from voxcpm2_jax.data import audio

RATE = 16000


def sound(path, sec=0.5, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.2 * np.random.default_rng(seed).standard_normal(round(sec * RATE)), RATE)
    return path


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def told(found):
    """The last part of each fault's place, and its message."""
    return [(where.rpartition(":")[2], message) for where, message in found.faults()]


@pytest.mark.fast
def test_ljspeech(tmp_path):
    sound(tmp_path / "wavs" / "LJ001-0001.wav")
    rows = 'LJ001-0001|Printing, 1 of "many|Printing, one of "many\nLJ001-0002|in being||\n\nLJ001-0003\nLJ001-0004||\n'
    path = written(tmp_path / "metadata.csv", rows)
    for name in (path, tmp_path):
        found = sources.find_corpus(name)
        one, two = found
        assert (one.audio, one.text) == (tmp_path / "wavs" / "LJ001-0001.wav", 'Printing, one of "many')
        assert two.text == "in being" and [where for where, _ in told(found)] == ["4", "5"]


@pytest.mark.fast
def test_common_voice(tmp_path):
    sound(tmp_path / "clips" / "cv_1.mp3.wav").rename(tmp_path / "clips" / "cv_1.mp3")
    header = "client_id\tpath\tsentence_id\tsentence\tup_votes\tage\tlocale\n"
    rows = 'ab12\tcv_1.mp3\tf00\t"Ja" sagte er.\t2\t\tde\ncd34\tcv_2\tf01\t"Nein\t2\t\tde\nef\t\tf02\tLeer\t2\t\tde\nx\ty\n'
    found = sources.find_corpus(written(tmp_path / "train.tsv", header + rows))
    one, two = found
    assert (one.audio, one.text) == (tmp_path / "clips" / "cv_1.mp3", '"Ja" sagte er.')
    assert (one.speaker, one.language) == ("ab12", "de") and one.audio.exists()
    assert (two.audio.name, two.text) == ("cv_2.mp3", '"Nein')
    assert [where for where, _ in told(found)] == ["4", "5"] and told(found)[1][1] == "2 columns, the header has 7"


@pytest.mark.fast
def test_tables_with_a_header(tmp_path):
    rows = '\ufefffile_name,transcription,speaker_id,start_sec,ignored\na.wav,"Hello, ""you""\nthere",7,0.5,x\nb.wav,,7,,\n'
    found = sources.find_corpus(written(tmp_path / "m.csv", rows))
    (one,) = found
    assert (one.audio, one.text) == (tmp_path / "a.wav", 'Hello, "you"\nthere')
    assert (one.speaker, one.start_sec) == ("7", 0.5) and told(found)[0][1].startswith("no text")
    (one,) = sources.open_corpus(written(tmp_path / "m.tsv", 'text\taudio\n"say ""hi"""\tb.wav\n'))
    assert (one.audio.name, one.text) == ("b.wav", 'say "hi"')
    (one,) = sources.open_corpus(written(tmp_path / "s.csv", "Audio;Text\nb.wav;hi, you\n"))
    assert (one.audio.name, one.text) == ("b.wav", "hi, you")
    for name, text, message in (
        ("none.csv", "a.wav,hello\n", "its first line must name the columns, among them audio and text, got 'a.wav,hello'"),
        ("empty.csv", "", "its first line must name the columns"),
        ("header.csv", "audio,text\n", "empty manifest"),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_corpus(written(tmp_path / name, text))
    (tmp_path / "latin.csv").write_bytes("audio,text\na.wav,fünf\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv: cannot be read .* expected a list of recordings in UTF-8"):
        sources.open_corpus(tmp_path / "latin.csv")


def kaldi(tmp_path, **files):
    for name, text in files.items():
        written(tmp_path / "kaldi" / name.replace("wav", "wav.scp"), text)
    return tmp_path / "kaldi"


@pytest.mark.fast
def test_kaldi(tmp_path, monkeypatch):
    sound(tmp_path / "kaldi" / "a.wav", 2.0)
    monkeypatch.chdir(tmp_path)
    sound(tmp_path / "corpus" / "b.wav")  # relative to the recipe
    wav = "rec1 a.wav\nrec2\tcorpus/b.wav\nrec3 sph2pipe -f wav c.sph |\nrec4 /x/raw.ark:17\n"
    found = sources.find_corpus(
        kaldi(tmp_path, wav=wav, text="rec1 hello  there\nrec2 you\nrec3 c\nrec4 d\nrec5 e\n", utt2spk="rec1 s1\n")
    )
    one, two = found
    assert (one.audio, one.text, one.speaker, one.start_sec) == (tmp_path / "kaldi" / "a.wav", "hello  there", "s1", None)
    assert two.audio == tmp_path / "corpus" / "b.wav"
    assert [(where, message.split(":")[0]) for where, message in told(found)] == [
        ("rec3", "its audio is a command"), ("rec4", "its audio is inside an archive"),
        ("rec5", "wav.scp has no recording rec5"),
    ]  # fmt: skip
    segments = "u1 rec1 0.5 1.25\nu2 rec1 1.25 -1\nu3 rec9 0 1\nu4 rec1 2\nu5 rec1 1 0.5\nu6 rec1 0 1\n"
    text = "u1 one\nu2 two\nu3 three\nu4 four\nu5 five\n"
    found = sources.find_corpus(kaldi(tmp_path, segments=segments, text=text, utt2lang="u1 en\n"))
    assert [(r.text, r.start_sec, r.end_sec, r.language) for r in found] == [
        ("one", 0.5, 1.25, "en"),
        ("two", 1.25, None, None),
    ]
    assert [where for where, _ in told(found)] == ["u3", "u4", "u5", "u6"]
    (tmp_path / "kaldi" / "text").unlink()
    with pytest.raises(UserError, match=r"Kaldi's directories have wav\.scp and text"):
        sources.open_corpus(tmp_path / "kaldi")


@pytest.mark.fast
def test_json_in_other_wrappings(tmp_path):
    entries = [{"audio": "a.wav", "text": "one"}, {"audio": "b.wav"}, 3]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    written(tmp_path / "array.json", json.dumps(entries, indent=1))
    written(tmp_path / "list.txt", lines)
    for name, text in (("lines.jsonl.gz", lines), ("array.json.gz", json.dumps(entries))):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    for name in ("array.json", "list.txt", "lines.jsonl.gz", "array.json.gz"):
        found = sources.find_corpus(tmp_path / name)
        assert [(r.text, r.audio) for r in found] == [("one", tmp_path / "a.wav")] and found.name == str(tmp_path / name)
        assert [where[0] for where, _ in told(found)] in (["2", "3"],) and "expected an object, got 3" in told(found)[1][1]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        sources.open_corpus(tmp_path / "cut.jsonl.gz")
    with pytest.raises(UserError, match="a directory of no known format; expected Kaldi's"):
        sources.open_corpus(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_cuts_of_lhotse(tmp_path, suffix):
    import lhotse

    def cut(name, start, sec, *parts, **changes):
        recording = lhotse.Recording.from_file(sound(tmp_path / f"{name}.wav", 2.0), recording_id=name)
        supervisions = [
            lhotse.SupervisionSegment(f"{name}-{i}", name, begin, length, text=text, speaker="s", language="en")
            for i, (begin, length, text) in enumerate(parts)
        ]
        found = lhotse.MonoCut(name, start, sec, 0, supervisions=supervisions, recording=recording)
        return found.perturb_speed(1.1) if changes else found

    whole = cut("a", 0.0, 2.0, (0.0, 2.0, "all of it"))
    parts = cut("b", 0.5, 1.0, (0.0, 0.5, "first"), (0.5, 0.5, "second"), (0.1, 0.2, None))
    fast = cut("c", 0.0, 2.0, (0.0, 2.0, "fast"), speed=1.1)
    lhotse.CutSet.from_cuts([whole, parts, fast, whole.pad(3.0).with_id("d")]).to_file(tmp_path / f"cuts.{suffix}")
    found = sources.find_corpus(tmp_path / f"cuts.{suffix}")
    assert [(r.text, r.start_sec, r.end_sec, r.speaker, r.language) for r in found] == [
        ("all of it", None, None, "s", "en"), ("first", 0.5, 1.0, "s", "en"), ("second", 1.0, 1.5, "s", "en"),
    ]  # fmt: skip
    assert [where for where, _ in told(found)][::2] == ["b-2", "d"] and "its recording has transforms" in told(found)[1][1]
    assert len(audio.load(found[1].audio, RATE, found[1].start_sec, found[1].end_sec)) == RATE // 2


def test_data_sets_of_hugging_face(tmp_path):
    import datasets

    files = [sound(tmp_path / f"{i}.wav", 0.5 + 0.1 * i, i) for i in range(2)]
    held = [
        {"bytes": files[0].read_bytes(), "path": None},
        {"bytes": None, "path": str(files[1])},
        {"bytes": None, "path": str(files[0])},
    ]
    speakers = datasets.ClassLabel(names=["ann", "bob"])
    made = datasets.Dataset.from_dict({"audio": held, "sentence": ["one", "two", ""], "speaker_id": [0, 1, -1]})
    made.select([0]).save_to_disk(tmp_path / "plain")
    (one,) = sources.open_corpus(tmp_path / "plain")
    assert len(audio.load(one.audio, RATE)) == 8000
    made = made.cast_column("audio", datasets.Audio()).cast_column("speaker_id", speakers)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "many")
    for name in (tmp_path / "one", tmp_path / "many", f"{tmp_path}/many@train"):
        found = sources.find_corpus(name)
        assert [(r.text, r.speaker) for r in found] == [("one", "ann"), ("two", "bob")]
        assert [len(audio.load(r.audio, RATE)) for r in found] == [8000, 9600] and told(found)[0][0] == "2"
    (held_out,) = sources.open_corpus(f"{tmp_path}/many@test")
    assert held_out.text == "two" and held_out.identity != found[1].identity
    with pytest.raises(UserError, match=r"its splits are train, test; name one of them as .*many@SPLIT"):
        sources.open_corpus(f"{tmp_path}/many@dev")
    datasets.Dataset.from_dict({"audio": ["0.wav"], "text": ["by path"], "day": [1]}).save_to_disk(tmp_path / "paths")
    (one,) = sources.open_corpus(tmp_path / "paths")
    assert one.audio == tmp_path / "paths" / "0.wav"
    datasets.Dataset.from_dict({"audio": ["0.wav"], "caption": ["a"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="its columns are audio, caption; expected audio and text"):
        sources.open_corpus(tmp_path / "other")


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lhotse", None)
    path = written(tmp_path / "cuts.jsonl", '{"id": "a", "type": "MonoCut"}\n')
    with pytest.raises(UserError, match=r"cuts of lhotse; to read it, install the package lhotse \(extra 'lhotse'\)"):
        sources.open_corpus(path)


def test_doctor_lists_all_faulty_lines(tmp_path):
    sound(tmp_path / "a.wav")
    path = written(tmp_path / "m.jsonl", "{\n" * 9 + '{"audio": "a.wav", "text": "one two"}\n' + '{"text": "no"}\n')
    report = doctor.examine([path], output=tmp_path / "out")
    (faulty,) = [finding for finding in report["findings"] if finding["kind"] == "faulty line"]
    assert faulty["count"] == 10 and [line.split(": ")[0] for line in faulty["examples"]] == [
        f"{path}:{number}" for number in (*range(1, 10), 11)
    ]
    assert not report["ok"] and report["clips"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "findings.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "faulty line" for line in lines) == 10
    assert doctor.examine([written(tmp_path / "none.jsonl", "{\n")])["clips"] == 0
