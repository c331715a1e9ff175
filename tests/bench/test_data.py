"""`bench data`: its figures describe the batches that it read, and it leaves no files behind. No speed is tested."""

import json
import tempfile

import numpy as np
import pytest

from voxcpm2_jax.bench import data
from voxcpm2_jax.cli import main, outcome
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun, BatchConfig
from voxcpm2_jax.data import packing
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.shards import Shards

RUN = BackboneRun(model=MODELS["tiny"], seed=3, batch=BatchConfig(rows=2, slots=512, patches=320))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    data.write_synthetic(directory, RUN, hours=0.1)
    return directory


def test_synthetic_shards_are_shards(shards):
    source = Shards(shards)
    assert source.patch_shape == (4, 16) and abs(source.header.hours - 0.1) < 0.02 and len(source.header.shards) == 4
    for i in (0, len(source) // 2, len(source) - 1):
        clip, lengths = source[i], source.index.lengths[i]
        assert (len(clip.text_ids), len(clip.patches_MPC)) == (lengths["text"], lengths["patches"])
        assert clip.text_ids.min() >= 105 and clip.text_ids.max() < 384 and 0.8 < clip.patches_MPC.std() < 1.2


def test_clips_fit_the_rows_of_small_configs(tmp_path):
    run = BackboneRun(model=MODELS["tiny"], batch=BatchConfig(rows=1, slots=40, patches=24, target_patches=20))
    data.write_synthetic(tmp_path, run, hours=0.02)
    lengths = np.load(tmp_path / "lengths.npy")
    assert (packing.sizes(lengths) <= (40, 24, 20, 1)).all() and lengths["patches"].max() == 20


def test_figures_are_those_of_the_batches(shards):
    result = data.data(RUN, shards, seconds=0.3)
    source = Shards(shards)
    mix = Mix(3, source.index, source.patch_sec, RUN.batch)
    rows = [mix.rows(step) for step in range(1, 1 + result["batches"])]  # the first batch is not measured
    clips = [draw.clip for step in rows for row in step for draw in row]
    slots, patches, *_ = packing.sizes(source.index.lengths[clips]).sum(axis=0)
    num_rows, sec, wall = 2 * result["batches"], patches * source.patch_sec, result["wall_sec"]
    assert result["slots_used"] == pytest.approx(slots / num_rows / 512, abs=1e-4)
    assert result["patches_used"] == pytest.approx(patches / num_rows / 320, abs=1e-4)
    assert 0.3 <= wall < 5 and result["audio_sec_per_sec"] == pytest.approx(sec / wall, rel=0.03)
    assert result["clips_per_sec"] == pytest.approx(len(clips) / wall, rel=0.03)
    assert result["latent_mb_per_sec"] == pytest.approx(patches * 4 * 16 * 2 / wall / 1e6, rel=0.03)
    assert result["audio_sec_per_cpu_sec"] * result["cores_used"] == pytest.approx(result["audio_sec_per_sec"], rel=0.03)
    assert result["rows"] == 2 and result["data"] == str(shards) and result["first_batch_sec"] > 0


def test_the_command_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main.main(["bench", "data", "--config=configs/backbone.py:tiny", "--seconds=0.2", "--config.batch.rows=3"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["rows"] == 3 and result["data"] == "synthetic" and result["audio_sec_per_cpu_sec"] > 0
    assert "s of audio per second and core" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench"], "required: WHAT"),
        (["bench", "fly"], "invalid choice: 'fly'"),
        (["bench", "data"], "required: --config"),
        (["bench", "data", "--config=configs/backbone.py:tiny", "--seconds=0"], "seconds must be a number over 0, got 0.0"),
        (["bench", "data", "--config=configs/backbone.py:tiny", "--seconds=inf"], "seconds must be a number over 0, got inf"),
        (["bench", "data", "--config=configs/backbone.py:tiny", "--data=nowhere"], "nowhere: no shards here"),
        (["bench", "data", "--config=configs/backbone.py:tiny", "--config.batch.slots=3"], "3 slots hold no clip"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main.main(argv) == outcome.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_clips_that_fit_no_row(shards):
    with pytest.raises(UserError, match="clips take more than 64 slots"):
        data.data(BackboneRun(model=MODELS["tiny"], batch=BatchConfig(rows=2, slots=64, patches=48)), shards, seconds=0.1)
