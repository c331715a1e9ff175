import dataclasses
import hashlib
import json

import numpy as np
import pytest

from voxcpm2_jax.config import DemoConfig, UserError
from voxcpm2_jax.data import audio, corpus

SMALL = DemoConfig(num_digit_clips=17, num_foreign_clips=3, max_digits=3, num_heldout=4)


def manifest(tmp_path, *entries):
    path = tmp_path / "m.jsonl"
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def test_manifest_round_trip(tmp_path):
    recordings = [
        corpus.Recording(tmp_path / "a" / "ä.wav", "hei\nmaailma", language="fi", description="quiet"),
        corpus.Recording(
            tmp_path / "b.wav", "你好", tmp_path / "a" / "r.wav", 1.5, 2.0, 3, True, "set", start_sec=0.5, end_sec=1.0
        ),
    ]
    path = tmp_path / "m.jsonl"
    corpus.write_manifest(path, recordings)
    assert corpus.read_manifest(path) == recordings
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["audio"] == "a/ä.wav"
    assert recordings[0].full_text == "(quiet)hei\nmaailma" and recordings[1].full_text == "你好"


def test_manifest_of_the_reference_reads(tmp_path):
    (recording,) = corpus.read_manifest(
        manifest(
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
    ],
)
def test_manifest_errors_name_the_line(tmp_path, entry, message):
    with pytest.raises(UserError, match=message) as caught:
        corpus.read_manifest(manifest(tmp_path, {"audio": "a.wav", "text": "fine"}, entry))
    assert "m.jsonl:2: " in str(caught.value)


def test_manifest_that_is_none(tmp_path):
    for path, message in (
        (tmp_path / "no", "no such manifest"),
        (tmp_path, "not a manifest"),
        (manifest(tmp_path), "empty manifest"),
    ):
        with pytest.raises(UserError, match=message):
            corpus.read_manifest(path)


def test_held_out_strings_are_never_in_training():
    for seed in range(5):
        config = dataclasses.replace(DemoConfig(), seed=seed)
        train, heldout, foreign = corpus.demo_texts(config)
        assert len(train) == config.num_digit_clips and len(heldout) == len(set(heldout)) == 50
        assert not set(train) & set(heldout)
        assert {len(t.split()) for t in heldout} == {2, 3, 4} and {len(t.split()) for t in train} == {1, 2, 3, 4}
        assert set(" ".join(train).split()) == set(" ".join(heldout).split()) == set(corpus.DIGITS)
        assert len(foreign) <= 0.15 * (len(train) + len(foreign)) and {voice for voice, _ in foreign} == set(corpus.FOREIGN)
        assert corpus.demo_texts(config) == (train, heldout, foreign)
    assert corpus.demo_texts(DemoConfig())[1] != corpus.demo_texts(DemoConfig(seed=1))[1]


def test_demo_config_refuses():
    for change in ({"num_foreign_clips": 3000}, {"max_digits": 1}, {"num_heldout": 151}, {"num_digit_clips": 0}):
        with pytest.raises(UserError, match="demo: "):
            DemoConfig(**change)


def test_demo_corpus_is_the_same_each_time(tmp_path):
    hashes = []
    for name, processes in (("a", 1), ("b", 2)):
        train, heldout = corpus.make_demo(tmp_path / name, SMALL, num_processes=processes)
        files = sorted((tmp_path / name).rglob("*.*"))
        hashes.append({str(f.relative_to(tmp_path / name)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert hashes[0] == hashes[1] and len(hashes[0]) == 17 + 3 + 4 + 2

    recordings = corpus.read_manifest(train)
    texts, held, foreign = corpus.demo_texts(SMALL)
    assert [r.text for r in recordings] == texts + [word for _, word in foreign]
    assert [r.text for r in corpus.read_manifest(heldout)] == held
    for r in recordings:
        x_A = audio.load(r.audio, corpus.DEMO_HZ)
        assert abs(len(x_A) / corpus.DEMO_HZ - r.duration) < 1e-3 and 0.15 < r.duration < 2
        for end_A in (x_A[:240], x_A[-240:]):  # short silent ends
            assert np.abs(end_A).max() < 0.1 * np.abs(x_A).max()
        assert (r.language == "en") == (r.description is None)
    robot = recordings[-1]
    assert robot.full_text == f"({corpus.FOREIGN[robot.language][0]}){robot.text}"


def test_demo_corpus_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "hibari" else True)
    with pytest.raises(UserError, match=r"needs hibari: pip install 'voxcpm2-jax\[demo\]'"):
        corpus.make_demo(tmp_path, SMALL)
