"""Services that get a run's rows: the real packages in their offline modes, and packages that misbehave."""

import importlib.util
import json
import re
import sqlite3
import time

import numpy as np
import pytest

from voxcpm2_jax import metrics, trackers
from voxcpm2_jax.config.plain import UserError

MEDIA = {
    "sample": metrics.Audio(np.zeros(480, np.float32), 48000),
    "picture": metrics.Image(np.zeros((4, 5, 1), np.uint8)),
}


def write(workdir, name, steps, *, start_step=0, media=None):
    """One start of a run -> the id under which the service has it."""
    with metrics.Writer(
        workdir, start_step=start_step, num_steps=9, services=[name], project="speech", record={"model": {"width": 32}}
    ) as writer:
        for step in steps:
            writer.write(
                step, {"loss": 1 / step, "loss/language/de+at": 2.0, "mfu": None, "slowest_host": "n7"} | (media or {})
            )
    state = json.loads((workdir / f"trackers/{name}.json").read_text())
    assert state["sent"] == max(steps)
    return state["id"]


def resumed(workdir, name) -> str:
    """Two starts of a run, the second of which makes steps 2 and 3 again -> its id."""
    first = write(workdir, name, [1, 2, 3], media=MEDIA)
    assert write(workdir, name, [2, 3, 4], start_step=1) == first and first.startswith(workdir.name)
    return first


# ---- the real packages, each skipped where it is absent; launch/test.sh installs the first two ------------------------


@pytest.fixture
def package(request, monkeypatch):
    """A package, with all the time that it needs on a busy machine."""
    pytest.importorskip(request.param)
    monkeypatch.setattr(trackers, "CLOSE_SEC", 120.0)
    return request.param


@pytest.mark.parametrize("package", ["trackio"], indirect=True)
def test_trackio(package, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = resumed(tmp_path / "voice", "trackio")
    with sqlite3.connect(tmp_path / "trackio/speech.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    found = [(step, json.loads(row)) for name, step, row in rows if name == run]
    assert len(found) == len(rows)
    assert [(step, row["loss"]) for step, row in found if "loss" in row] == [(s, 1 / s) for s in (1, 2, 3, 2, 3, 4)]
    assert {"sample", "picture"} <= {key for _, row in found for key in row}
    out, err = capfd.readouterr()
    assert out == "" and err.count("trackio: trackio show --project speech") == 2


def losses(log: bytes):
    """The losses in a log of W&B, where a value is text in a record of protobuf: key, length, value."""
    for match in re.finditer(rb"\x12\x04loss\x82\x01(.)", log, re.DOTALL):
        yield float(log[match.end() : match.end() + match[1][0]])


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
def test_wandb(package, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = resumed(tmp_path / "voice", "wandb")
    logs = sorted(tmp_path.glob(f"voice/wandb/offline-run-*-{run}/run-{run}.wandb"))
    found = [set(losses(log.read_bytes())) for log in logs]
    assert found == [{1 / s for s in steps} for steps in ((1, 2, 3), (2, 3, 4))]
    assert all(b"loss/language/de+at" in log.read_bytes() for log in logs)
    assert list(tmp_path.rglob("media/audio/sample_*.wav")) and list(tmp_path.rglob("media/images/picture_*.png"))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("package", ["mlflow"], indirect=True)
def test_mlflow(package, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    resumed(tmp_path / "voice", "mlflow")
    (history,) = tmp_path.glob("voice/mlruns/*/*/metrics/loss")
    assert [line.split()[1:] for line in history.read_text().splitlines()] == [[str(1 / s), str(s)] for s in (1, 2, 3, 2, 3, 4)]
    assert (history.parent / "loss.language.de_at").is_file() and (history.parents[1] / "params/model.width").is_file()
    assert list(tmp_path.rglob("artifacts/sample/*.wav")) and list(tmp_path.rglob("artifacts/picture/*.png"))


# ---- packages that misbehave -----------------------------------------------------------------------------------------

FAKE = """
import time
def init(**settings): {init}
def log(figures, step):
    {log}
    with open({path!r}, "a") as file: file.write(f"{{step}} ")
def finish(): {finish}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a package called trackio, which writes the steps that it gets to a file -> that file."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(trackers, "CLOSE_SEC", 60.0)
    path = tmp_path / "got"

    def make(init="pass", log="pass", finish="pass"):
        (tmp_path / "trackio.py").write_text(FAKE.format(init=init, log=log, finish=finish, path=str(path)))
        return path

    return make


@pytest.mark.parametrize(
    ("fault", "sent", "said"),
    [
        (
            {"init": "raise RuntimeError('no\\nnetwork')"},
            -1,
            ["trackio is given up: no network", "trackio: nothing was sent; "],
        ),
        ({"init": "import os; os.abort()"}, -1, ["trackio: nothing was sent"]),
        ({"log": "if step == 2: time.sleep(1000)"}, 1, ["trackio: steps after 1 were not sent"]),
        ({"log": "if step == 2: 1 / 0"}, 1, ["trackio is given up: division by zero", "trackio: steps after 1 were not sent"]),
        ({"finish": "time.sleep(1000)"}, 3, []),
    ],
)
def test_a_service_cannot_stop_a_training_and_gets_the_rest_later(tmp_path, fake, monkeypatch, capfd, fault, sent, said):
    got = fake(**fault)
    with metrics.Writer(tmp_path / "run", start_step=0, num_steps=9, services=["trackio"], project="p") as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0} | MEDIA)
        while json.loads((tmp_path / "run/trackers/trackio.json").read_text())["sent"] < sent:
            time.sleep(0.1)
        if "sleep" in str(fault):
            monkeypatch.setattr(trackers, "CLOSE_SEC", 0.5)
        begin = time.monotonic()
    assert "sleep" not in str(fault) or time.monotonic() - begin < 10
    monkeypatch.setattr(trackers, "CLOSE_SEC", 60.0)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    err = capfd.readouterr().err
    assert all(line in err for line in said) and "Traceback" not in err and ("sent" in err) == bool(said)
    already = got.read_text() if got.exists() else ""
    fake()
    write(tmp_path / "run", "trackio", [4], start_step=3)
    assert already + "1 2 3 4 ".removeprefix(already) == got.read_text()


def test_a_service_far_behind_gets_no_more_until_the_next_start(tmp_path, fake, monkeypatch, capfd):
    monkeypatch.setattr(trackers, "_MOST_ROWS", 2)
    monkeypatch.setattr(trackers, "CLOSE_SEC", 0.5)
    got = fake(init="time.sleep(1000)")
    with metrics.Writer(tmp_path / "run", start_step=0, num_steps=9, services=["trackio"], project="p") as writer:
        for step in range(1, 9):
            writer.write(step, {"loss": np.float32(1.0), "sample": metrics.Audio(np.zeros(100_000, np.float32), 48000)})
    assert "trackio is 2 rows behind: it gets no more until the next start" in capfd.readouterr().err
    fake()
    monkeypatch.setattr(trackers, "CLOSE_SEC", 60.0)
    write(tmp_path / "run", "trackio", [9], start_step=8)
    assert got.read_text() == "1 2 3 4 5 6 7 8 9 "


def test_a_service_that_is_chosen_later_gets_the_earlier_rows(tmp_path, fake):
    got = fake()
    with metrics.Writer(tmp_path / "run", start_step=0, num_steps=9) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    write(tmp_path / "run", "trackio", [3, 4], start_step=2)
    assert got.read_text() == "1 2 3 4 "


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"log\.trackers: mlflow: not installed; pip install 'voxcpm2-jax\[mlflow\]'"):
        trackers.check(["mlflow"])
    (tmp_path / "nobody").mkdir()  # as W&B leaves wandb/ in the working directory
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="nobody: not installed"):
        trackers.check(["nobody"])
