"""A short chaos run: real processes, one fault of each kind. The long one is `voxcpm2-jax chaos --config=...:tiny`."""

import json
import re
import shutil

import pytest

from voxcpm2_jax.bench import chaos
from voxcpm2_jax.bench.harness import Harness, metric_rows
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


def test_differences_are_found(quick, tmp_path):
    """Another loss, a repeated step, a checkpoint of another state: what a wrong resume would leave behind."""
    directory, _ = quick
    harness = Harness(chaos._short_run(RUN), tmp_path)
    harness.control = directory / "control"
    shutil.copytree(harness.control, tmp_path / "run")
    assert harness.differences(tmp_path / "run") == []
    rows = metric_rows(harness.control)
    altered = [rows[0] | {"loss": rows[0]["loss"] * (1 + 1e-7)}, *rows[1:]]
    for name, content in (("loss of step 1: .* instead of", altered), ("steps missing or twice", [*rows[:5], *rows[4:]])):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
        assert re.search(name, "; ".join(harness.differences(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    assert any("differs" in line for line in harness.differences(tmp_path / "run"))
