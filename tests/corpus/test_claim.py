"""Two processes never have a claim on the same shard, and a killed one's claim ends."""

import json
import os
import threading
import time

import pytest

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import claim as module
from voxcpm2_jax.corpus.claim import claim

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_BEAT_SEC", 0.02)
    monkeypatch.setattr(module, "_EXPIRY_SEC", 0.5)


def left_behind(directory, host=0, num_hosts=1, **changes):
    """A claim whose holder does nothing."""
    holder = {"machine": "elsewhere", "pid": 7, "place": "elsewhere", "started": "1"} | changes
    path = directory / f".host-{host}-of-{num_hosts}.0.claim"
    path.write_text(json.dumps({"count": "0"} | holder))
    return path


def test_claims_exclude_each_other_if_they_share_a_shard(tmp_path):
    for host, num_hosts, other, others in ((0, 1, 5, 7), (1, 4, 3, 6), (1, 4, 2, 6), (0, 2, 1, 2), (2, 3, 2, 3), (2, 9, 8, 6)):
        shares = bool({*range(host, 500, num_hosts)} & {*range(other, 500, others)})
        with claim(tmp_path, host, num_hosts):
            if shares:
                with pytest.raises(UserError, match=f"host {host} of {num_hosts}, process {os.getpid()} on .*, works on the"):
                    claim(tmp_path, other, others).__enter__()
            else:
                with claim(tmp_path, other, others) as check:
                    check()
    assert not list(tmp_path.iterdir())


def test_a_process_killed_on_this_machine_holds_nothing(tmp_path, capfd):
    for changes in ({"pid": 2**22 + 1}, {"pid": os.getpid()}):  # ended; its id is another process's now
        path = left_behind(tmp_path, place=module._place(), **changes)
        with claim(tmp_path, 0, 1):
            assert not path.exists()
    assert not capfd.readouterr().err


def test_elsewhere_it_counts_whether_the_number_grows(tmp_path, capfd):
    path = left_behind(tmp_path)
    start = time.monotonic()
    with claim(tmp_path, 0, 1):
        assert time.monotonic() - start >= 0.5 and not path.exists()
    assert "process 7 on elsewhere: waiting up to 0 s to see whether it works" in capfd.readouterr().err
    path = left_behind(tmp_path)
    threading.Timer(0.1, path.write_text, [path.read_text().replace('"0"', '"1"')]).start()
    with pytest.raises(UserError, match="host 0 of 1, process 7 on elsewhere, works on the same shards"):
        claim(tmp_path, 0, 1).__enter__()
    assert list(tmp_path.iterdir()) == [path]


def test_a_holder_shows_that_it_works_until_another_takes_over(tmp_path):
    with claim(tmp_path, 3, 4) as check:
        (path,) = tmp_path.iterdir()
        first = path.read_text()
        while path.read_text() == first:
            time.sleep(0.01)
        check()
        path.unlink()
        time.sleep(0.1)
        assert not path.exists()
        with pytest.raises(UserError, match="another one took over host 3 of 4"):
            check()
