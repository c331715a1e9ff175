"""A training whose workdir lies in a bucket: killed while it uploads, resumed elsewhere, by one process and by several."""

import json
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests import processes
from tests.buckets import emulators
from tests.train.test_loop import Toy, assert_equal
from voxcpm2_jax import workdir
from voxcpm2_jax.buckets import store
from voxcpm2_jax.checkpoint import staged
from voxcpm2_jax.checkpoint.manager import SaveFailed
from voxcpm2_jax.checkpoint.mirror import Mirror
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import CheckpointConfig

TRAIN = """
import sys
from voxcpm2_jax import processes
processes.connect()
import jax
from tests.train.test_loop import Toy
from voxcpm2_jax.checkpoint.mirror import Mirror
with Mirror(sys.argv[1]) as home:
    state, _ = Toy(jax.process_count()).run(home, 12)
print("finished", int(state.step))
"""


one_kind = pytest.mark.parametrize("server", ["s3"], indirect=True)


def steps(url):
    return staged.complete_steps(store.objects(url))


def rows(text):
    """Rows of metrics.jsonl, without what depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if "loss" in k or k == "step"} for line in text.splitlines()]


class Gate:
    """Lets an emulator hang when an object is written whose name ends in `name`."""

    def __init__(self, server, name):
        self.is_reached, self._is_open = threading.Event(), threading.Event()
        self._name = name
        server.before_write = self._check

    def _check(self, name):
        if name.endswith(self._name):
            self.is_reached.set()
            self._is_open.wait()

    def open(self):
        self._is_open.set()


@pytest.fixture(scope="module")
def toy():
    return Toy(1)


def test_a_run_killed_while_it_uploads_resumes_elsewhere_bitwise(bucket, toy, tmp_path, monkeypatch):
    whole, _ = toy.run(tmp_path / "whole", 12)
    url = f"{bucket.url}/run"
    gate = Gate(bucket, "checkpoints/8/checksums.json")
    child = subprocess.Popen([sys.executable, "-c", TRAIN, url])
    try:
        assert gate.is_reached.wait(240), "step 8 is uploaded but for its mark"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    bucket.before_write = lambda name: None
    names = store.objects(url)
    assert steps(url) == [4] and any(name.startswith("checkpoints/8/params/") for name in names)
    with pytest.raises(UserError, match="no complete checkpoint"):
        staged.local_checkpoint(f"{url}/checkpoints/8")

    emulators.apply(monkeypatch, bucket.settings, tmp_path / "another machine")
    with Mirror(url) as home:
        assert not any(name.startswith("checkpoints/8/") for name in store.objects(url))
        toy.seen = []
        resumed, _ = toy.run(home, 12)
    gate.open()
    assert toy.seen[0] == 4
    assert_equal(resumed, whole)
    assert steps(url) == [8, 12], "as many as are kept on a local disk"
    assert rows(store.read(f"{url}/metrics.jsonl").decode()) == rows((tmp_path / "whole" / "metrics.jsonl").read_text())
    assert any(name.startswith("tensorboard/") for name in store.objects(url)) and "config.json" in store.objects(url)


@one_kind
def test_a_damaged_step_is_passed_over_and_saved_again(bucket, toy, tmp_path, monkeypatch, capsys):
    url = f"{bucket.url}/run"
    with Mirror(url) as home:
        state, _ = toy.run(home, 8)
    victim = max((name for name in store.objects(url) if name.startswith("checkpoints/8/params/ocdbt")), key=len)
    store.write(f"{url}/{victim}", bytes(store.objects(url)[victim].size))
    emulators.apply(monkeypatch, bucket.settings, tmp_path / "another machine")
    with Mirror(url) as home:
        again, _ = toy.run(home, 8)
    assert_equal(again, state)
    assert "was altered" in capsys.readouterr().err and steps(url) == [4, 8]
    assert workdir.load_params(staged.local_checkpoint(url))[2] == 8


@one_kind
def test_a_store_that_stops_answering_stops_the_run_in_one_line(bucket, toy, monkeypatch):
    monkeypatch.setattr(store, "PAUSES_SEC", (0,))
    url = f"{bucket.url}/run"

    def fail(name):
        if "checkpoints/8/params" in name:
            raise ConnectionResetError

    bucket.before_write = fail
    with (
        pytest.raises(SaveFailed, match=r"step 8 could not be saved .*the bucket does not answer.*step 4 is whole"),
        Mirror(url) as home,
    ):
        toy.run(home, 12)
    assert steps(url) == [4]


@one_kind
def test_two_processes_without_a_common_disk(bucket, tmp_path, monkeypatch):
    """Killed when only one of them has uploaded its part of a step, then resumed by two, then by one."""
    url = f"{bucket.url}/run"
    gate = Gate(bucket, "checkpoints/8/.checksums.process_1.json")
    with processes.start_processes([url], 2, program=("-c", TRAIN)) as started:
        assert gate.is_reached.wait(240), [process.stderr for process in started]
    bucket.before_write = lambda name: None
    assert steps(url) == [4] and any(name.startswith("checkpoints/8/") for name in store.objects(url))
    cache = {"VOXCPM2_JAX_CACHE": str(tmp_path / "others")}
    results = processes.run_processes([url], 2, program=("-c", TRAIN), env=cache, timeout_sec=240)
    gate.open()
    assert [result.stdout.splitlines()[-1] for result in results] == ["finished 12"] * 2, results
    assert "starting from step 4 of" in results[0].stderr and steps(url) == [8, 12]
    emulators.apply(monkeypatch, bucket.settings, tmp_path / "alone")
    with Mirror(url) as home:
        state, _ = Toy(1).run(home, 13, checkpoint=CheckpointConfig(every_steps=4, keep=2))
    assert int(state.step) == 13 and np.isfinite(np.asarray(state.params["kernel"])).all()
    two = {name for name in store.objects(url) if name.startswith("checkpoints/12/params/kernel/")}
    assert {"checkpoints/12/params/kernel/0.0", "checkpoints/12/params/kernel/1.0"} <= two
