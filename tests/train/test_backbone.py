"""Training of the backbone: draws, the update, resuming, shards that do not fit."""

import contextlib
import dataclasses
import hashlib
import json
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluate import test_validation
from voxcpm2_jax import metrics, sharding
from voxcpm2_jax.checkpoint import steps
from voxcpm2_jax.config.model import MODELS, AudioVAEConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun, BatchConfig, CheckpointConfig, LogConfig, OptimConfig, ValidationConfig
from voxcpm2_jax.data import pipeline, shards, synthetic
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.shards import Header, Shards
from voxcpm2_jax.data.tokenizer import train_tokenizer
from voxcpm2_jax.train import backbone, guard, pretrain
from voxcpm2_jax.vae import autoencoder
from voxcpm2_jax.workdir import codec_sha256, save_codec

RUN = BackboneRun(
    model=MODELS["tiny"],
    num_steps=6,
    remat="none",
    batch=BatchConfig(rows=8, slots=64, patches=40),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=2, ema_decay=0.9),
    checkpoint=CheckpointConfig(every_steps=3, keep=2),
    log=LogConfig(every_steps=1),
    validation=ValidationConfig(every_steps=3),
)
HELDOUT = synthetic.Synthetic(0, num_clips=8, vocab_size=384, patch_shape=(4, 16), max_patches=32)


def test_trap_13_draws_are_float32_from_global_keys():
    """Whatever the model computes in, and wherever the rows of the batch live."""
    half = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, dtype="bfloat16"))
    shape = (8, 40, RUN.model.patch_size, RUN.model.feat_dim)
    draw = jax.jit(lambda key, patches: backbone.draw(key, half, patches, 0.0))
    draws = draw(jax.random.key(1), jnp.zeros(shape))
    assert draws.time_BM.dtype == draws.noise_BMPC.dtype == jnp.float32
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("x"))
    spread = draw(jax.random.key(1), jax.device_put(jnp.zeros(shape), rows))
    jax.tree.map(np.testing.assert_array_equal, draws, spread)
    assert len({float(t) for t in draws.time_BM[:, 0]}) == 8, "rows share their draws"


def test_mean_mode_draws_a_share_of_intervals_that_grows():
    model = dataclasses.replace(RUN.model, dit_config=dataclasses.replace(RUN.model.dit_config, dit_mean_mode=True))
    run = dataclasses.replace(RUN, model=model)
    shares = []
    for progress in (0.0, 1.0):
        draws = backbone.draw(jax.random.key(0), run, jnp.zeros((40, 100, 4, 16)), progress * run.num_steps)
        assert (draws.start_BM <= draws.time_BM).all()
        shares.append(float(jnp.mean(draws.start_BM < draws.time_BM)))
    assert shares == pytest.approx([0.25, 0.75], abs=0.03)


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "_open_heldout", lambda *_: HELDOUT)
        return workdir, pretrain.train(RUN, workdir)


def test_loss_falls_and_the_result_says_so(straight):
    workdir, result = straight
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(result) == {"step", "loss", "loss_diff", "loss_stop", "audio_sec_per_sec", "mfu"}
    assert result["step"] == 6 and result["loss"] == rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["slots_used"] > 0.8 and rows[-1]["patches_used"] > 0.7


def test_resume_is_exact(straight, tmp_path, monkeypatch):
    """Stopped after three of six updates and started again: the same losses, held-out ones as well, bit for bit."""
    monkeypatch.setattr(pretrain, "_open_heldout", lambda *_: HELDOUT)
    run = pretrain.loop.run

    def stop_early(task, *args, **kwargs):
        task.run = dataclasses.replace(task.run, num_steps=3)
        return run(task, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.loop, "run", stop_early)
        pretrain.train(RUN, tmp_path / "run")
    pretrain.train(RUN, tmp_path / "run")
    exact = ("step", "loss", "loss_diff", "loss_stop", "grad_norm", "val_loss_diff", "val_loss_diff_se/mode/zero-shot")
    first, second = ([[row.get(name) for name in exact] for row in rows_of(d)] for d in (straight[0], tmp_path / "run"))
    assert first == second
    assert [row[0] for row in first if row[-1] is not None] == [3, 6], "the held-out loss is told when it is due"


def test_a_branch_goes_on_from_another_runs_step(straight, tmp_path, capsys):
    """With nothing changed it repeats what the trunk did from there, bit for bit; what would change its meaning is refused."""
    trunk = straight[0] / "checkpoints" / "3"
    changed = dataclasses.replace(RUN, seed=1, optim=dataclasses.replace(RUN.optim, learning_rate=1e-3))
    with pytest.raises(UserError, match=r"seed: 0 -> 1 \(order of the data, noise of every update\); set it back"):
        pretrain.train(changed, tmp_path / "branch", resume_from=trunk)
    assert "config differs" not in capsys.readouterr().err, "what is refused is told in one line"
    assert not (tmp_path / "branch").exists(), "a start that is refused leaves nothing behind"
    with pytest.raises(UserError, match="--profile-steps=6:9: the run ends at step 6"):
        pretrain.train(RUN, tmp_path / "branch", profile_steps=(6, 9))
    pretrain.train(RUN, tmp_path / "branch", resume_from=trunk)
    assert f"starting from step 3 of {straight[0]} (--resume-from)" in capsys.readouterr().err
    exact = ("step", "loss", "loss_diff", "loss_stop", "grad_norm")
    branch, whole = ([[row[name] for name in exact] for row in rows_of(d)] for d in (tmp_path / "branch", straight[0]))
    assert branch == whole[3:] and len(branch) == 3


def test_update_does_not_depend_on_the_mesh(straight):
    """One update on eight devices (the run above) and on one: the loss, and every figure beside it."""
    source = synthetic.Synthetic(0, vocab_size=384, patch_shape=(4, 16), patch_sec=RUN.patch_sec, max_patches=32)
    b = RUN.batch
    mix = Mix(0, source.index, source.patch_sec, b)
    batch = pipeline.host_rows(source, mix, 0)
    state = jax.jit(partial(backbone.init_state, RUN))()
    step = jax.jit(partial(backbone.train_step, config=RUN, labels=pretrain.labels_of(source)))
    sums = metrics.fetch(step(state, batch)[1])
    row = rows_of(straight[0])[0]
    assert sums["loss"][0] == pytest.approx(row["loss"], rel=1e-5)
    meter = metrics.Meter()
    meter.add(sums)
    for name, value in meter.means().items():
        if name in guard.VERDICT:  # for the loop alone
            continue
        expected = None if value is None else pytest.approx(value, rel=_tolerance(name, 1e-4))
        assert row[name] == expected, name

    # The parts of a loss add up to the whole of it, in sum and in count.
    for name, kind in (("loss_diff", "time"), ("loss_diff", "language"), ("loss_stop", "dataset"), ("loss_stop", "mode")):
        parts = [pair for other, pair in sums.items() if other.startswith(f"{name}/{kind}/")]
        assert [sum(column) for column in zip(*parts)] == pytest.approx(sums[name], rel=1e-5)
    assert sums["loss_diff/time/0.3-0.4"][1] > 0 and sums["loss_diff/language/none"] == pytest.approx(sums["loss_diff"])
    is_end = (batch.stop_BM == 1) & batch.target_BM & (batch.slot_BM >= 0)
    assert sums["stop_recall"][1] == is_end.sum() > 0 and sums["stop_recall"][0] == sums["stop_precision"][0]
    for name in ("grad_norm", "update_norm"):
        parts = [total for other, (total, _) in sums.items() if other.startswith(f"{name}/")]
        assert len(parts) == 11 and np.linalg.norm(parts) == pytest.approx(sums[name][0], rel=1e-5)
    assert 0 < sums["fsq_usage"][0] <= 1 and 0 < sums["fsq_entropy"][0] <= np.log2(2 * 9 + 1)
    for stack in ("base_lm", "residual_lm", "feat_encoder", "feat_decoder"):
        assert sums[f"activation_max/{stack}"][0] > 0 and sums[f"logit_bound_max/{stack}"][0] > 0


def _tolerance(name, usual):
    """A level that rounds the other way in another program is one of thousands."""
    return 1e-2 if name.startswith("fsq") else usual


def test_muon_learns_on_a_mesh_with_tensor_parallelism(straight, tmp_path):
    """Its states are split, saved and restored like AdamW's; with bfloat16 moments."""
    muon = dataclasses.replace(RUN.optim, optimizer="muon", mu_dtype="bfloat16")
    run = dataclasses.replace(RUN, optim=muon, mesh=(1, 4, 2), num_steps=8, checkpoint=CheckpointConfig(every_steps=8))
    pretrain.train(run, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(rows_of(straight[0])[0]["loss"], rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert pretrain.train(run, tmp_path / "run")["loss"] == rows[-1]["loss"]


@pytest.fixture(scope="module")
def uneven(tiny_params):
    """Sixteen rows, in some of which nearly nothing bears loss: a mean of the micro-batches' means would be wrong."""
    source = synthetic.Synthetic(0, vocab_size=384, patch_shape=(4, 16), patch_sec=RUN.patch_sec, max_patches=32)
    run = dataclasses.replace(RUN, batch=dataclasses.replace(RUN.batch, rows=16))
    batch = pipeline.host_rows(source, Mix(0, source.index, source.patch_sec, run.batch), 0)
    batch.target_BM[::2, 3:] = False
    state = backbone.init_state(run, tiny_params)
    return run, state, batch, jax.device_get(jax.jit(partial(backbone.train_step, config=run))(state, batch))


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"accumulate": 4}, None),
        ({"accumulate": 2}, (1, 4, 2)),
        ({"locdit_at_once": 50}, None),
        ({"locdit_at_once": 50, "accumulate": 2, "remat_local": "products"}, (2, 4, 1)),
    ],
)
def test_a_batch_in_parts_is_exactly_the_batch(uneven, changes, shape):
    """Micro-batches, and the local stacks in chunks of patches: every figure, and every moment of the optimiser, which after
    one update is the gradient and its square."""
    run, state, batch, (whole, whole_figures) = uneven
    step, layout = partial(backbone.train_step, config=dataclasses.replace(run, **changes)), None
    with contextlib.ExitStack() as stack:
        if shape:
            mesh = sharding.make_mesh(shape)
            stack.enter_context(jax.set_mesh(mesh))
            layout = sharding.param_shardings(state, mesh)
            state, batch = jax.device_put((state, batch), (layout, sharding.batch_sharding(mesh)))
        state, figures = jax.device_get(jax.jit(step, out_shardings=(layout, None))(state, batch))
    figures, whole_figures = metrics.fetch(figures), metrics.fetch(whole_figures)
    assert figures.keys() == whole_figures.keys()
    for name, figure in whole_figures.items():
        np.testing.assert_allclose(figures[name], figure, rtol=_tolerance(name, 5e-6), err_msg=name)
    for tree, expected in ((state.opt_state, whole.opt_state), (state.params, whole.params), (state.ema, whole.ema)):
        for (path, got), wanted in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted), path


def test_micro_batches_take_rows_of_every_device_and_move_none():
    mesh = sharding.make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        x_BT = jax.device_put(jnp.arange(32).reshape(16, 2), sharding.batch_sharding(mesh))
        split = jax.jit(partial(backbone._split, parts=2))
        parts = split(x_BT)
        program = split.lower(x_BT).compile().as_text()
    assert sorted(parts[:, :, 0].ravel().tolist()) == list(range(0, 32, 2))
    assert parts.sharding.spec == jax.P(None, ("replica", "data"))
    assert not re.search("all-gather|all-to-all|collective-permute|all-reduce", program)


def test_a_checkpoint_tells_what_was_heard(straight):
    heard = steps.read_meta(steps.step_directory(straight[0]))["data"]
    rows = rows_of(straight[0])
    hours = sum(row["audio_sec"] for row in rows) / 3600
    assert len(rows) == RUN.num_steps and heard.keys() == {"synthetic/none/zero-shot"}
    assert heard["synthetic/none/zero-shot"]["hours"] == pytest.approx(hours, abs=2e-6)
    assert heard["synthetic/none/zero-shot"]["clips"] > RUN.num_steps * RUN.batch.rows


def test_what_no_update_came_of_was_not_heard():
    mix = Mix(0, HELDOUT.index, HELDOUT.patch_sec, RUN.batch)
    run = dataclasses.replace(RUN, patch_sec=HELDOUT.patch_sec)
    task = pretrain.BackboneTask(run, HELDOUT, mix, sharding.make_mesh())
    (name,) = task.counters(20, frozenset())
    drawn = [draw.clip for step in range(20) if step not in (0, 7, 19) for row in mix.rows(step) for draw in row]
    patches = HELDOUT.index.lengths["patches"][drawn].sum()
    hours = round(int(patches) * HELDOUT.patch_sec / 3600, 6)
    assert task.counters(20, frozenset((0, 7, 19))) == {name: {"clips": len(drawn), "hours": hours}}
    assert task.counters(3, frozenset(range(3))) == {}


def test_rows_that_suit_no_mesh_are_refused(tmp_path):
    run = dataclasses.replace(RUN, batch=dataclasses.replace(RUN.batch, rows=3))
    with pytest.raises(UserError, match=r"batch.rows 3 cannot be split over 8 devices"):
        pretrain.train(run, tmp_path / "run")
    with pytest.raises(UserError, match=r"batch.rows 8 cannot be split over 8 devices x 2 micro-batches"):
        pretrain.train(dataclasses.replace(RUN, accumulate=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shards_of_another_shape_are_refused(tmp_path, monkeypatch):
    header = Header(
        num_clips=1, hours=0.1, patch_size=2, latent_dim=8, patch_sec=0.08, encoder_hz=16000, decoder_hz=16000,
        codec_sha256="", tokenizer_sha256="", vocab_size=400, groups=(), latent_dtype="float16",
        latent_mean=(0.0,), latent_std=(1.0,),
        latent_min=(0.0,), latent_max=(1.0,), shards=(), trim_db=0.0, trim_keep_ms=0.0, sources=(), sources_sha256="",
    )  # fmt: skip
    monkeypatch.setattr(shards, "Shards", lambda _: type("Shards", (), {"header": header}))
    with pytest.raises(UserError) as error:
        pretrain.train(RUN, tmp_path / "run", tmp_path)
    for name in ("model.patch_size", "model.feat_dim", "model.lm_config.vocab_size", "patch_sec"):
        assert name in str(error.value)


def test_held_out_shards_are_found_beside_the_others_and_must_be_made_like_them(tmp_path, capsys):
    clips = [test_validation.clip(i) for i in range(2)]
    train, other = (test_validation.write(tmp_path / name, clips) for name in ("train", "other"))
    source = Shards(train)
    assert pretrain._open_heldout(RUN, source, train, None) is None
    for same in (train, other):
        with pytest.raises(UserError, match=f"{same}: held-out clips made from the same recordings as the training clips"):
            pretrain._open_heldout(RUN, source, train, same)
    test_validation.write(other, clips, sources_sha256="other")
    test_validation.write(train / "heldout", clips[:1], sources_sha256="held out")
    assert len(pretrain._open_heldout(RUN, source, train, None)) == 1
    assert len(pretrain._open_heldout(RUN, source, train, other)) == 2
    assert "not checked whether held-out clips or speakers are also trained on" in capsys.readouterr().err
    without = dataclasses.replace(RUN, validation=ValidationConfig(every_steps=0))
    assert pretrain._open_heldout(without, source, train, None) is None
    test_validation.write(other, clips, codec_sha256="another")
    with pytest.raises(UserError, match="cannot be used together: codec_sha256 'c' and 'another'"):
        pretrain._open_heldout(RUN, source, train, other)
    with pytest.raises(UserError, match="--heldout needs --data"):
        pretrain._open_heldout(RUN, source, None, other)


def test_shards_of_another_codec_or_tokenizer_are_refused(tmp_path):
    """The workdir keeps what made its shards; to go on with others' would mix two kinds of latents or ids."""
    vae = AudioVAEConfig(encoder_dim=4, encoder_rates=(8, 80), latent_dim=4, decoder_dim=16, decoder_rates=(20, 96))
    shards, workdir = tmp_path / "shards", tmp_path / "run"
    workdir.mkdir()
    params = autoencoder.init(jax.random.key(0), vae)
    save_codec(shards, vae, params)
    train_tokenizer(["one two three"] * 9, 288).save(shards / "tokenizer")
    tokenizer_sha256 = hashlib.sha256((shards / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    made = SimpleNamespace(codec_sha256=codec_sha256(params, vae), tokenizer_sha256=tokenizer_sha256, text={})
    pretrain._keep_provenance(workdir, [shards], made)
    pretrain._keep_provenance(workdir, [shards], made)
    for name, message in (("codec_sha256", r"codec: here [0-9a-f]{12}, shards other,"), ("tokenizer_sha256", "tokenizer: ")):
        other = SimpleNamespace(**(vars(made) | {name: "other"}))
        with pytest.raises(UserError, match=message):
            pretrain._keep_provenance(workdir, [shards], other)
    (workdir / "tokenizer" / "text.json").write_text('{"sentence_case": true}')
    other = SimpleNamespace(**(vars(made) | {"text": {"form": 1, "sentence_case": False}}))
    with pytest.raises(UserError, match=r"texts are written by .*False.* in the shards, by .*True.* in "):
        pretrain._keep_provenance(workdir, [shards], other)
    (shards / "heldout").mkdir()
    with pytest.raises(UserError, match="heldout: no codec/ in it"):
        pretrain._keep_provenance(workdir, [shards / "heldout"], made)
