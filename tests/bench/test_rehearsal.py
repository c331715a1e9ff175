"""A short rehearsal: real processes, all stages, a kill, a stop, fewer processes, a branch. The long one is a command."""

import numpy as np
import pytest

from voxcpm2_jax.bench import rehearsal
from voxcpm2_jax.bench.harness import metric_rows, saved_steps
from voxcpm2_jax.cli import main
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.data.shards import Shards


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    run = from_dict(BackboneRun, load_config("configs/backbone.py:2b"))
    directory = tmp_path_factory.mktemp("rehearsal")
    return directory, rehearsal.rehearsal(run, directory, clips=20_000, shards=40, processes=2, workers=1)


def test_all_goes_well(rehearsed):
    directory, result = rehearsed
    assert result["ok"] and result["problems"] == []
    killed, stopped, ended, branch = result["training"]
    assert all(killed["codes"]) and stopped["codes"] == [75, 75] and ended["codes"] == branch["codes"] == [0]
    assert stopped["start_step"] == 16 and branch["start_step"] == 16 and branch["step"] == 20
    assert 16 in saved_steps(directory / "run"), "what a branch starts from is kept"
    rows = metric_rows(directory / "run")
    assert [row["step"] for row in rows] == list(range(1, rehearsal.STEPS + 1))
    assert np.isfinite([row["loss"] for row in rows]).all() and "val_loss" in rows[19]


def test_every_stage_is_told(rehearsed):
    _, result = rehearsed
    starts = [line.split()[1] for line in result["stages"]]
    assert starts == ["0", "40,000", "280,000", "320,000", "360,000"]
    assert not any("asks for" in line for line in result["stages"]) and result["plan"]["hours"] > 1e7


def test_the_corpus_is_as_large_as_it_says(rehearsed):
    directory, result = rehearsed
    assert (result["corpus"]["clips"], result["corpus"]["shards"]) == (20_000, 40)
    source = Shards(directory / "shards")
    assert len(source) == 20_000 and len(np.unique(np.load(directory / "shards" / "identity.npy")["file"])) == 20_000
    own = source.index.pairs[:, 0]
    assert 0.2 < (own >= 0).mean() < 0.4
    lengths, paired = source.index.lengths, np.flatnonzero(own >= 0)
    assert (lengths["group"][paired] == lengths["group"][own[paired]]).all()


@pytest.mark.parametrize("sizes", ["--shards=15", "--clips=100", "--processes=3"])
def test_wrong_sizes_are_refused(sizes, capsys):
    assert main.main(["bench", "rehearsal", "--config=configs/backbone.py:2b", sizes]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
