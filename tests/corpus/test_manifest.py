import errno
import hashlib
import json
import pathlib

import pytest

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import manifest, sources
from voxcpm2_jax.data import records

pytestmark = pytest.mark.fast


def written(tmp_path, *entries):
    path = tmp_path / "m.jsonl"
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def test_manifest_round_trip(tmp_path):
    recordings = [
        manifest.Recording(tmp_path / "a" / "ä.wav", "hei\nmaailma", language="fi", description="quiet"),
        manifest.Recording(
            tmp_path / "b.wav", "你好", tmp_path / "a" / "r.wav", 1.5, 2.0, 3, True, "set", start_sec=0.5, end_sec=1.0
        ),
    ]
    path = tmp_path / "m.jsonl"
    manifest.write_manifest(path, recordings)
    assert manifest.read_manifest(path) == recordings
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["audio"] == "a/ä.wav"
    assert recordings[0].full_text == "(quiet)hei\nmaailma" and recordings[1].full_text == "你好"


def test_manifest_of_the_reference_reads(tmp_path):
    (recording,) = manifest.read_manifest(
        written(
            tmp_path,
            {"audio": "/x/a.wav", "text": "hi", "ref_audio": None, "duration": 2, "dataset_id": 1, "is_prompt": 0, "extra": []},
            "",
        )
    )
    assert str(recording.audio) == "/x/a.wav" and recording.duration == 2.0 and recording.dataset_id == 1
    assert recording.ref_audio is None and recording.is_prompt is False


@pytest.mark.parametrize(
    "entry, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ({"text": "a"}, "no audio"),
        ({"audio": "a.wav"}, "no text"),
        ({"audio": "a.wav", "text": "  "}, "no text"),
        ({"audio": "a.wav", "text": ["a"]}, r"text must be str, got \['a'\]"),
        ({"audio": "a.wav", "text": True}, "text must be str, got True"),
        ({"audio": "a.wav", "text": None}, "no text; its keys are audio, text"),
        ({"audio": {"bytes": None, "path": None}, "text": "a"}, "audio has no path"),
        ({"audio": "a.wav", "text": "a", "duration": "long"}, "duration must be float, got 'long'"),
        ({"audio": "a.wav", "text": "a", "duration": True}, "duration must be float, got True"),
        ({"audio": "a.wav", "text": "a", "dataset_id": 1.5}, "dataset_id must be int, got 1.5"),
        ({"audio": "a.wav", "text": "a", "end_sec": "inf"}, "end_sec must be a finite number, got inf"),
        ({"audio": "a.wav", "text": "a", "is_prompt": "yes"}, "is_prompt must be bool"),
        ({"audio": "a.wav", "text": "a", "dataset_id": True}, "dataset_id must be int"),
        ({"audio": "a.wav", "text": "a", "ref_adio": "b"}, "unknown key 'ref_adio'; did you mean 'ref_audio'"),
        ({"audio": "a.wav", "text": "a", "start_sec": 2, "end_sec": 1}, "do not bound a part"),
        ({"audio": "a.wav", "text": "a", "start_sec": float("nan")}, "start_sec must be a finite number, got nan"),
        ({"audio": "a.wav", "text": "a", "speaker": "\ud800"}, "speaker is not valid Unicode"),
    ],
)
def test_manifest_errors_name_the_line(tmp_path, entry, message):
    with pytest.raises(UserError, match=message) as caught:
        manifest.read_manifest(written(tmp_path, {"audio": "a.wav", "text": "fine"}, entry))
    assert "m.jsonl:2: " in str(caught.value)


def test_manifest_that_is_none(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF\x24\0\0\0WAVE")
    (tmp_path / "utf16.jsonl").write_text('{"audio": "a.wav", "text": "a"}', encoding="utf-16")
    for path, message in (
        (tmp_path / "no", "no such manifest"),
        (tmp_path, "not a manifest"),
        (written(tmp_path, {"audio": "a.wav", "text": "a"}) / "m.jsonl", "not a manifest"),
        (tmp_path / "a.wav", "binary data, or UTF-16; expected a list of recordings in UTF-8"),
        (tmp_path / "utf16.jsonl", "binary data, or UTF-16"),
        (written(tmp_path), "empty manifest"),
    ):
        with pytest.raises(UserError, match=message):
            manifest.read_manifest(path)


def test_a_disk_that_fails_for_a_while_makes_no_faulty_manifest(tmp_path, monkeypatch):
    path = written(tmp_path, {"audio": "a.wav", "text": "a"}, {"audio": "b.wav", "text": "b", "order": 3})
    errors, really = [], pathlib.Path.open

    def opened(self, *args):
        if errors:
            raise errors.pop()
        return really(self, *args)

    monkeypatch.setattr(pathlib.Path, "open", opened)
    monkeypatch.setattr(records.time, "sleep", lambda _: None)
    errors += [OSError(errno.EIO, "Input/output error")] * 2
    found = manifest.Manifest(path)
    errors += [OSError(errno.ESTALE, "Stale file handle")] * 2
    assert (found[1].text, found[1].order, found[0].order) == ("b", 3.0, None) and not errors
    errors += [OSError(errno.EIO, "Input/output error")] * 100
    with pytest.raises(records.ReadError, match="Input/output error"):
        manifest.Manifest(path)


def test_a_name_that_is_no_tfds_name_is_a_manifest(tmp_path):
    path = written(tmp_path, {"audio": "a.wav", "text": "hello"})
    found = sources.open_corpus(str(path))
    assert [r.text for r in found] == ["hello"] and found.name == str(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="no such manifest"):
        sources.open_corpus("tfd:librispeech")


def test_manifests_as_people_have_them(tmp_path):
    (tmp_path / "cafe\u0301").mkdir()
    (tmp_path / "cafe\u0301" / "u\u0308.wav").touch()  # as macOS writes names
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.wav").touch()
    path = written(
        tmp_path,
        '\ufeff{"audio": "a.wav", "text": "1", "ref_audio": "", "speaker": 12, "session": 3.0, "duration": "1", "order": ""}\r',
        {
            "audio": {"path": "a.wav", "bytes": None, "sampling_rate": 16000},
            "text": 1984,
            "speaker": float("nan"),
            "is_prompt": "True",
        },
        {"audio": "caf\u00e9/\u00fc.wav", "text": "a", "description": " ", "dataset_id": "2", "start_sec": "0.5", "end_sec": 1},
        {"audio": "cafe\u0301/\u00fc.wav", "text": "a", "is_prompt": 0.0, "dataset_id": 3.0},
        {"audio_filepath": "a.wav", "text": "a", "offset": 2.5, "duration": 1.0},  # NeMo
        {"path": "sub\\a.wav", "sentence": "a", "client_id": 7, "locale": "de"},
        {"audio": "a.wav", "text": "a", "start": 1, "end": "2.5"},  # aligners
    )
    one, two, three, four, five, six, seven = manifest.Manifest(path)
    assert (one.ref_audio, one.speaker, one.session, one.duration, one.order) == (None, "12", "3", 1.0, None)
    assert (two.audio, two.text, two.speaker, two.is_prompt) == (tmp_path / "a.wav", "1984", None, True)
    assert three.audio.exists() and four.audio == three.audio and three.identity[0] == four.identity[0]
    assert (three.description, three.dataset_id, three.start_sec, three.end_sec) == (None, 2, 0.5, 1.0)
    assert (four.is_prompt, four.dataset_id) == (False, 3)
    assert (five.start_sec, five.end_sec) == (2.5, 3.5)
    assert (seven.start_sec, seven.end_sec) == (1.0, 2.5)
    assert six.audio.exists() and (six.text, six.speaker, six.language) == ("a", "7", "de")


def test_faulty_lines_are_left_out_and_listed(tmp_path, capsys):
    good = {"audio": "a.wav", "text": "fine"}
    path = written(tmp_path, good, "{", "", {"audio": "b.wav"}, good, {"audio": "c.wav", "text": "c", "speker": "d"})
    found = manifest.Manifest(path)
    assert len(found) == 2 and [r.text for r in found] == ["fine"] * 2 and found.num_faults == 3
    faults = list(found.faults())
    assert [where for where, _ in faults] == [f"{path}:2", f"{path}:4", f"{path}:6"]
    assert [message.split(" (")[0] for _, message in faults] == [
        "not valid JSON", "no text; its keys are audio", "unknown key 'speker'; did you mean 'speaker'?"
    ]  # fmt: skip
    assert len(sources.open_corpus(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: 3 of 5 entries left out: {path}:2: not valid JSON") and line.endswith(
        "did you mean 'speaker'?"
    )
    with pytest.raises(UserError, match="3 of 5 entries cannot be used: "):
        sources.open_corpus(path, strict=True)
    for bad in (b"\xff\xfe{\x00}\n" * 9, b"[" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"binary data, or UTF-16|not valid JSON") as error:
            sources.open_corpus(path)
        assert "\n" not in str(error.value)
