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
        ({"audio": "a.wav", "text": 7}, "text must be str, got 7"),
        ({"audio": "a.wav", "text": None}, "text must be str, got None"),
        ({"audio": "a.wav", "text": "a", "duration": "1"}, "duration must be float"),
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
    for path, message in (
        (tmp_path / "no", "no such manifest"),
        (tmp_path, "not a manifest"),
        (written(tmp_path, {"audio": "a.wav", "text": "a"}) / "m.jsonl", "not a manifest"),
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
