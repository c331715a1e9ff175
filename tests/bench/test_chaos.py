"""A short chaos run: real processes, each kind of fault once. The long one is `voxcpm2-jax chaos --config=...:tiny`."""

import json
import re
import shutil

import pytest

from voxcpm2_jax.bench import chaos
from voxcpm2_jax.bench.lab import Lab, rows_of
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import BackboneRun, BatchConfig

RUN = BackboneRun(model=MODELS["tiny"], remat="none", batch=BatchConfig(slots=128))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chaos")
    return directory, chaos.chaos(RUN, directory, quick=True)


def test_every_fault_is_survived_and_no_data_is_lost(quick):
    _, result = quick
    assert [fault for fault in result["faults"] if fault["survived"] < fault["injected"] or fault["lost_data"]] == []
    assert result["ok"] and result["injected"] >= 13
    assert 0 < result["lost_steps"] <= 20 * result["injected"]


def test_a_difference_would_be_seen(quick, tmp_path):
    """What a run that went on wrongly would leave: another loss, a step twice, a save of another state."""
    directory, _ = quick
    lab = Lab(chaos._lively(RUN), tmp_path)
    lab.peace = directory / "peace"
    shutil.copytree(lab.peace, tmp_path / "run")
    assert lab.differences(tmp_path / "run") == []
    rows = rows_of(lab.peace)
    altered = [rows[0] | {"loss": rows[0]["loss"] * (1 + 1e-7)}, *rows[1:]]
    for name, content in (("loss of step 1: .* instead of", altered), ("steps missing or twice", [*rows[:5], *rows[4:]])):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
        assert re.search(name, "; ".join(lab.differences(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    assert any("differs" in line for line in lab.differences(tmp_path / "run"))
