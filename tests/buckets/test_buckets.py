"""Staging and publishing, with emulators of both stores: whole or not at all, copied once, one line for whatever is wrong."""

import json
import pathlib
import types

import pytest

from tests.buckets import emulators
from voxcpm2_jax.buckets import publish, store
from voxcpm2_jax.buckets.stage import RECORD, local, stage
from voxcpm2_jax.cli import main
from voxcpm2_jax.config.plain import UserError

pytestmark = pytest.mark.fast


def write(directory, files):
    for name, content in files.items():
        path = pathlib.Path(directory) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def content(directory):
    paths = pathlib.Path(directory).rglob("*")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths if path.is_file()}


FILES = {"config.json": b"{}", "a/große datei": b"x" * 6_000_000, "a/empty": b""}  # over 5 MB: sent in parts


def test_what_is_published_is_staged(bucket, capsys):
    with publish.directory(f"{bucket.url}/out", fresh=True) as made:
        write(made, FILES | {".config.00112233445566778899aabbccddeeff.json": b"?"})  # files.aside of a process that was killed
        assert json.loads(store.read(f"{bucket.url}/out/{RECORD}")) == {"complete": False, "files": {}}
    assert not pathlib.Path(made).exists()
    copy = local(f"{bucket.url}/out")
    assert {name: x for name, x in content(copy).items() if name != RECORD} == FILES
    assert local(f"{bucket.url}/out/config.json,other") == f"{copy}/config.json,other" and local(None) is None
    capsys.readouterr()
    assert local(f"{bucket.url}/out") == copy and capsys.readouterr().err == ""  # once

    store.write(f"{bucket.url}/out/config.json", b"[]")
    with pytest.raises(UserError, match=r"config.json: the copy of 2 bytes differs from what was written there"):
        stage(f"{bucket.url}/out")
    with publish.directory(f"{bucket.url}/out") as made:
        write(made, {"config.json": b"[]"})
    store.delete(f"{bucket.url}/out", ["a/empty"])
    assert {name: x for name, x in content(stage(f"{bucket.url}/out")).items() if name != RECORD} == {
        "config.json": b"[]", "a/große datei": FILES["a/große datei"],
    }  # fmt: skip


@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n", b"\n--==0==--"])
def test_every_byte_arrives(bucket, tmp_path, end):
    whole = bytes(range(256)) + end
    file = tmp_path / "file"
    file.write_bytes(whole)
    store.upload(bucket.url, {"put": file})
    store.write(f"{bucket.url}/written", whole)
    assert [store.read(f"{bucket.url}/{name}") for name in ("put", "written")] == [whole] * 2


def test_an_upload_that_did_not_end_is_not_read_and_can_be_repeated(bucket):
    url = f"{bucket.url}/out"
    store.write(f"{url}/{RECORD}", json.dumps({"complete": False, "files": {}}).encode())  # what a kill leaves
    store.write(f"{url}/config.json", b"{")
    with pytest.raises(UserError, match="its upload has not ended"):
        stage(url)
    with publish.directory(url, fresh=True) as made:
        write(made, {"config.json": b"{}"})
    assert (stage(url) / "config.json").read_bytes() == b"{}"
    with pytest.raises(UserError, match="already there"), publish.directory(url, fresh=True):
        pass
    store.delete(url, ["config.json"])
    with pytest.raises(UserError, match=r"1 of its files are missing, such as config.json"):
        stage(url)


def test_a_command_that_fails_leaves_nothing(bucket):
    with pytest.raises(KeyError), publish.directory(f"{bucket.url}/out") as made:
        write(made, FILES)
        raise KeyError
    assert store.objects(f"{bucket.url}/out") == {} and not pathlib.Path(made).exists()
    with publish.file(f"{bucket.url}/plan.json") as made:
        pathlib.Path(made).write_text("1")
    assert stage(f"{bucket.url}/plan.json").read_text() == "1"


def test_room_for_copies_is_limited(bucket, monkeypatch):
    store.write(f"{bucket.url}/shards/a", b"x" * 2000)
    monkeypatch.setenv("VOXCPM2_JAX_CACHE_GB", "1e-6")
    with pytest.raises(UserError, match=r"2e-06 GB have to be copied .* of at most 1e-06 GB are used.*mount the bucket"):
        stage(f"{bucket.url}/shards")
    monkeypatch.setenv("VOXCPM2_JAX_CACHE_GB", "much")
    with pytest.raises(UserError, match="VOXCPM2_JAX_CACHE_GB=much: expected a number"):
        stage(f"{bucket.url}/shards")


def test_names_that_leave_the_directory_are_refused(bucket, monkeypatch):
    system, path = store._system(f"{bucket.url}/a")
    found = {f"{path}/../../x": {"size": 1, "ETag": "1"}}
    monkeypatch.setattr(system, "find", lambda *_, **__: found)
    with pytest.raises(UserError, match="a name that no file can have"):
        stage(f"{bucket.url}/a")


READING = [
    "doctor --manifest={}",
    "export-torch {} there", "generate --text=a --output=a.wav --checkpoint={}", "checkpoints {}",
]  # fmt: skip
WRITING = ["export-torch nothing {}", "prepare --config=configs/data.py:tiny --output={}"]


@pytest.mark.parametrize("server", ["s3"], indirect=True)
@pytest.mark.parametrize("command", [*READING, *WRITING])
def test_nothing_there(bucket, refusal, command):
    error = refusal(*command.format(f"{bucket.scheme}://absent/run").split())
    assert "://absent/run" in error and ("no such bucket or object" in error or "nothing there" in error)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_refuses_or_does_not_answer_is_one_line(scheme, refusal, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(store, "PAUSES_SEC", ())
    cache = tmp_path_factory.mktemp("cache")
    with emulators.refusing() as settings:
        emulators.apply(monkeypatch, settings, cache)
        for command in (READING[0], READING[1], WRITING[0]):
            error = refusal(*command.format(f"{scheme}://b/x").split())
            assert "access denied; log in" in error and "4711" not in error
    if scheme == "gs":
        from gcsfs import retry

        async def no_time(sec):
            pass

        monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=no_time))
    store._open.cache_clear()  # the port is closed now
    error = refusal(*READING[1].format(f"{scheme}://b/x").split())
    assert f"{scheme}://b/x: the bucket does not answer" in error and "4711" not in error


def test_other_schemes_and_missing_libraries(refusal, monkeypatch):
    assert "hdfs://a/b: expected a local path, gs://BUCKET/NAME" in refusal("export-torch", "hdfs://a/b", "there")
    monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'voxcpm2-jax[bucket]'" in refusal("export-torch", "gs://a/b", "there")
    assert "gs://: names no bucket" in refusal("export-torch", "gs://", "there")


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_released_weights_come_from_a_bucket_and_go_there(bucket, released_dir, capsys):
    url = f"{bucket.url}/models"
    store.upload(f"{url}/released", {name: released_dir / name for name in content(released_dir)})
    for command in ("import-torch {0}/released {0}/run", "export-torch {0}/run {0}/again"):
        assert main.main(command.format(url).split()) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["directory"] == f"{url}/again"
    theirs, ours = content(released_dir), content(stage(f"{url}/again"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_a_manifest_in_a_bucket_names_recordings_beside_it(bucket, tmp_path, capsys):
    import numpy as np
    import soundfile

    tone_A = 0.1 * np.sin(np.arange(32000) * 0.1)
    soundfile.write(tmp_path / "a.wav", tone_A, 16000)
    store.upload(f"{bucket.url}/set", {"wav/a.wav": tmp_path / "a.wav"})
    rows = [{"audio": "wav/a.wav", "text": "one two three"}, {"audio": f"{bucket.url}/set/none.wav", "text": "four five"}]
    store.write(f"{bucket.url}/set/train.jsonl", "\n".join(map(json.dumps, rows)).encode())
    code = main.main(["doctor", f"--manifest={bucket.url}/set/train.jsonl", f"--output={bucket.url}/found"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (missing,) = (found for found in result["findings"] if found["kind"] == "missing")
    assert code == 3 and missing["count"] == 1 and "none.wav" in str(missing["examples"])
    assert "report.json" in store.objects(f"{bucket.url}/found")


def test_a_prefix_whose_only_object_vanishes_meanwhile_is_listed_again(monkeypatch):
    answers = [FileNotFoundError(), {}]

    def find(path, **_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(store, "_system", lambda url: (types.SimpleNamespace(find=find), "bucket/run"))
    assert store.objects("s3://bucket/run") == {} and not answers
    answers += [FileNotFoundError()] * 3
    with pytest.raises(store.Missing):
        store.objects("s3://bucket/run")
