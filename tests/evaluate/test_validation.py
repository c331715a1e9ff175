"""The held-out loss: a clip always gets the same draws, and figures depend on weights and clips alone."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

from tests.data.test_pipeline import HEADER
from voxcpm2_jax import sharding, workdir
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BatchConfig, ValidationConfig
from voxcpm2_jax.data.clips import LENGTHS, MODES, Clip, Index, label_names
from voxcpm2_jax.data.shards import LENGTHS_FILE, write_header, write_shard
from voxcpm2_jax.data.tokenizer import load_tokenizer
from voxcpm2_jax.evaluate import validation
from voxcpm2_jax.evaluate.validation import Validation

TINY = MODELS["tiny"]
GROUPS = (("books", "en"), ("books", "fr"), ("films", "en"))


class InMemory(list):
    patch_shape, patch_sec = (4, 16), 0.16

    def __init__(self, clips):
        super().__init__(clips)
        lengths = [
            (len(c.text_ids), len(c.patches_MPC), 0 if c.reference_MPC is None else len(c.reference_MPC), c.is_prompt,
             0 if c.described_ids is None else len(c.described_ids), GROUPS.index((c.dataset, c.language)))
            for c in clips
        ]  # fmt: skip
        self.index = Index(np.array(lengths, LENGTHS), GROUPS)


def clip(i):
    rng = np.random.default_rng(i)

    def patches(m):
        return rng.standard_normal((m, 4, 16)).astype(np.float16).astype(np.float32)

    dataset, language = GROUPS[i % 3]
    return Clip(
        rng.integers(105, 384, rng.integers(1, 8)).astype(np.int32),
        patches(rng.integers(1, 12)),
        patches(3) if i % 2 == 0 else None,
        rng.integers(105, 384, 9).astype(np.int32) if i % 5 == 0 else None,
        i == 11,
        dataset=dataset,
        language=language,
    )


@pytest.fixture(scope="module")
def clips():
    return [clip(i) for i in range(24)]


def validation_of(clips, mesh_shape, budgets, **changes):
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
    return Validation(TINY, InMemory(clips), budgets, ValidationConfig(**changes), mesh), mesh


def figures_of(clips, mesh_shape, budgets, params, **changes):
    held_out, mesh = validation_of(clips, mesh_shape, budgets, **changes)
    with jax.set_mesh(mesh):
        return held_out.figures(jax.device_put(params, sharding.param_shardings(params, mesh)))


@pytest.fixture(scope="module")
def alone(clips, tiny_params):
    """The figures on one device, two rows a batch."""
    return figures_of(clips, (1, 1, 1), BatchConfig(rows=2, slots=40, patches=24, target_patches=20), tiny_params)


def test_a_clip_keeps_its_draws_whatever_the_other_clips(clips):
    """Whichever clips there are, and in whichever order; another seed gives other draws."""

    def items_of(clips, seed=0):
        source = InMemory(clips)
        return {bytes(clips[i].text_ids): validation.make_item(source, i, seed, "log-norm") for i in range(len(clips))}

    alike, fewer, other = items_of(clips), items_of(clips[::-2]), items_of(clips, seed=1)
    assert len(alike) == 24 and len(fewer) == 12
    for text, item in fewer.items():
        jax.tree.map(np.testing.assert_array_equal, item, alike[text])
    assert all((item.noise_MPC[:1] != other[text].noise_MPC[:1]).all() for text, item in alike.items())
    modes = {label_names(InMemory(clips).index)[item.label][2] for item in alike.values()}
    assert modes == set(MODES), "every layout occurs"


def test_flow_times_are_stratified(clips):
    """One time in each n-th of the distribution that training draws from; patches that are no targets get none."""
    source = InMemory(clips)
    for scheduler, share_of in (("uniform", lambda t: t), ("log-norm", lambda t: _normal_cdf(np.log(t / (1 - t)) + 0.4))):
        for number in range(len(clips)):
            item = validation.make_item(source, number, 0, scheduler)
            share = share_of(item.time_M[item.sequence.target_M].astype(np.float64))
            assert sorted((share * len(share)).astype(int)) == list(range(len(share)))
            assert not item.time_M[~item.sequence.target_M].any()


def _normal_cdf(x):
    from scipy.stats import norm

    return norm.cdf(x)


def test_figures_add_up(clips, alone):
    assert alone["loss_diff_se"] > 0 and alone["loss_stop"] > 0
    assert {name.removeprefix("loss_diff/") for name in alone if name.startswith("loss_diff/") and "time" not in name} == {
        "dataset/books", "dataset/films", "language/en", "language/fr", "mode/zero-shot", "mode/described", "mode/reference",
        "mode/described-reference",
    }  # fmt: skip
    frames = np.array([4 * len(c.patches_MPC) for c in clips]) * [not c.is_prompt for c in clips]
    for kind in ("dataset", "language"):
        names = [getattr(c, kind) for c in clips]
        share = {name: sum(n for n, other in zip(frames, names) if other == name) / frames.sum() for name in set(names)}
        whole = sum(share[name] * alone[f"loss_diff/{kind}/{name}"] for name in share)
        assert whole == pytest.approx(alone["loss_diff"], rel=1e-6)


@pytest.mark.parametrize("speaker_share", [0.0, 0.2])
def test_standard_error_is_the_spread_over_many_sets(speaker_share):
    """4,000 sets of 40 speakers with 1 to 9 clips each, whose losses differ by clip and, in the second case, by speaker too.

    There an estimate that takes clips for independent is too small by a third or more.
    """
    rng = np.random.default_rng(0)
    speaker = np.repeat(np.arange(40), rng.integers(1, 10, 40))
    counts = rng.integers(1, 20, (4000, len(speaker))).astype(float)
    loss = 1 + 0.3 * rng.standard_normal(counts.shape) + speaker_share * rng.standard_normal((4000, 40))[:, speaker]
    sums = counts * loss
    spread = np.std(sums.sum(axis=1) / counts.sum(axis=1))
    estimates = [validation.standard_error(np.stack(pair), speaker) for pair in zip(sums, counts)]
    assert np.mean(estimates) == pytest.approx(spread, rel=0.06)
    if speaker_share:
        independent = [validation.standard_error(np.stack(pair), np.arange(len(speaker))) for pair in zip(sums, counts)]
        assert np.mean(independent) < spread * 2 / 3


def test_standard_error_needs_two_speakers():
    assert validation.standard_error(np.ones((2, 3)), np.array([5, 5, 5])) is None
    assert validation.standard_error(np.ones((2, 3)), np.array([5, 5, 7])) == 0.0


def test_clips_of_a_speaker_of_a_data_set_are_a_cluster(clips):
    """Of the same name in two data sets are two; a clip without a name is one of its own."""
    named = [c._replace(speaker=("anna", "", None, "bert")[i % 4]) for i, c in enumerate(clips)]
    held_out, _ = validation_of(named, (1, 1, 1), BatchConfig(rows=2, slots=40, patches=24))
    named = [c for c in named if not c.is_prompt]
    unnamed = sum(not c.speaker for c in named)
    assert held_out.num_clusters == unnamed + len({(c.dataset, c.speaker) for c in named if c.speaker}) == 12 + 4
    one = [c._replace(speaker="anna", dataset="books", language="en") for c in clips]
    assert validation_of(one, (1, 1, 1), BatchConfig(rows=2, slots=40, patches=24))[0].num_clusters == 1


def test_figures_depend_on_no_mesh_and_no_neighbours(clips, alone, tiny_params):
    """Eight devices with a tensor axis, rows and batches of another size, clips in another order."""
    together = figures_of(clips[::-1], (2, 2, 2), BatchConfig(rows=8, slots=96, patches=60), tiny_params)
    assert together.keys() == alone.keys()
    assert together == {name: None if value is None else pytest.approx(value, rel=2e-5) for name, value in alone.items()}


def test_evaluate_reads_shards_and_checkpoint(clips, alone, released_dir, tmp_path, monkeypatch):
    """From disk, on all devices; shards of another codec or tokenizer are refused.

    A released tokenizer.json and the one that `prepare` wrote into the shards may differ in formatting and still match.
    """
    checkpoint = tmp_path / "released"
    shutil.copytree(released_dir, checkpoint)
    spelt = checkpoint / "tokenizer.json"
    spelt.write_text(json.dumps(json.loads(spelt.read_text(encoding="utf-8"))), encoding="utf-8")
    load_tokenizer(checkpoint).save(tmp_path / "prepared")
    prepared = (tmp_path / "prepared" / "tokenizer.json").read_bytes()
    assert prepared != spelt.read_bytes()
    loaded = workdir.load_model(checkpoint)
    made = {
        "codec_sha256": workdir.codec_sha256(loaded.vae_params, loaded.vae_config),
        "tokenizer_sha256": hashlib.sha256(prepared).hexdigest(),
    }
    shards = write(tmp_path / "shards", clips, **made)
    config = EvaluateConfig(measure="loss", batch=BatchConfig(rows=8, slots=96, patches=60))
    result = validation.evaluate(config, checkpoint, shards, tmp_path / "out")
    assert result["clips"] == 23
    assert {name: result[name] for name in alone} == {
        name: None if value is None else pytest.approx(value, rel=2e-5) for name, value in alone.items()
    }
    assert json.loads((tmp_path / "out" / "result.json").read_text())["loss_diff"] == result["loss_diff"]
    for name in made:
        write(shards, clips, **made | {name: "other"})
        with pytest.raises(UserError, match=f"{name.removesuffix('_sha256')}: .* other"):
            validation.evaluate(config, checkpoint, shards, tmp_path / "out")
    write(shards, clips, **made)
    monkeypatch.setattr(Validation, "figures", lambda self, params: {"loss_diff": np.nan})
    assert validation.evaluate(config, checkpoint, shards, tmp_path / "out")["loss_diff"] is None
    assert "NaN" not in (tmp_path / "out" / "result.json").read_text(), "which no other reader of JSON knows"


def write(directory, clips, **changes):
    directory.mkdir(exist_ok=True)
    write_shard(directory / "all.array_record", clips, "float16")
    np.save(directory / LENGTHS_FILE, InMemory(clips).index.lengths)
    header = dataclasses.replace(
        HEADER, num_clips=len(clips), shards=("all.array_record",), groups=GROUPS, patch_size=4, latent_dim=16, vocab_size=384,
        latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16, **changes,
    )  # fmt: skip
    write_header(directory, header)
    return directory


def test_clips_that_fit_no_row_are_skipped_and_reported(clips, capsys):
    held_out, _ = validation_of(clips, (1, 1, 1), BatchConfig(rows=2, slots=16, patches=8))
    assert 0 < held_out.num_clips < 23
    assert f"{23 - held_out.num_clips} of 23 clips fit no row" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of 23 bears loss and fits a row of 2 slots"):
        validation_of(clips, (1, 1, 1), BatchConfig(rows=2, slots=2, patches=1))
    few, _ = validation_of(clips, (1, 1, 1), BatchConfig(rows=2, slots=40, patches=24), max_clips=5)
    assert few.num_clips == 5
