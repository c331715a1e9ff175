"""Training of the TTS backbone: state, one update, and the run that `voxcpm2-jax train` starts.

    loss = diff_weight * diff + stop_weight * stop,   each a global sum over its global count

Update i reads `batch(seed, i)` and draws its noise from `fold_in(key(seed), i)` at global shape, so that a result does
not depend on the mesh.
"""

import dataclasses
import hashlib
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from voxcpm2_jax import metrics, optim, sharding
from voxcpm2_jax.config import BackboneRun, UserError, to_dict
from voxcpm2_jax.data import packing
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.models import flow, voxcpm2
from voxcpm2_jax.sequence import Batch
from voxcpm2_jax.train import loop


def init_state(config: BackboneRun, params=None) -> optim.TrainState:
    """A fresh state, from `params` if given, else from scratch by the run's seed."""
    if params is None:
        params = voxcpm2.init(jax.random.key(config.seed), config.model)
    return optim.init_state(config.optim, config.num_steps, params)


def draw(key: jax.Array, config: BackboneRun, patches_BMPC, progress) -> voxcpm2.Draws:
    """The random part of one update; `progress` is the share of the run behind it, for mean mode."""
    flow_config = config.model.dit_config.cfm_config
    time_key, noise_key, drop_key, start_key, mean_key = jax.random.split(key, 5)
    B, M = patches_BMPC.shape[:2]
    time_BM = flow.draw_times(time_key, (B, M), flow_config.t_scheduler)
    start_BM = None
    if config.model.dit_config.dit_mean_mode:
        first, last = flow_config.ratio_r_neq_t_range
        other_BM = flow.draw_times(start_key, (B, M), flow_config.t_scheduler)
        is_mean_BM = jax.random.uniform(mean_key, (B, M)) < first + progress * (last - first)
        start_BM = jnp.where(is_mean_BM, jnp.minimum(time_BM, other_BM), time_BM)
        time_BM = jnp.where(is_mean_BM, jnp.maximum(time_BM, other_BM), time_BM)
    return voxcpm2.Draws(
        time_BM,
        jax.random.normal(noise_key, patches_BMPC.shape),
        jax.random.bernoulli(drop_key, flow_config.training_cfg_rate, (B, M)),
        start_BM,
    )


def objective(params, config: BackboneRun, batch: Batch, draws: voxcpm2.Draws, platform: str = "cpu"):
    """The weighted loss of a batch -> (scalar, metrics as (sum, count))."""
    sums = voxcpm2.loss(
        params,
        config.model,
        batch,
        time_BM=draws.time_BM,
        noise_BMPC=draws.noise_BMPC,
        drop_BM=draws.drop_BM,
        start_BM=draws.start_BM,
        target_patches=config.batch.target_patches,
        max_segments=config.batch.segments,
        remat=config.remat,
        remat_local=config.remat_local,
        platform=platform,
    )
    diff, stop = (total / jnp.maximum(count, 1.0) for total, count in (sums["diff"], sums["stop"]))
    loss = config.diff_weight * diff + config.stop_weight * stop
    return loss, {"loss_diff": sums["diff"], "loss_stop": sums["stop"]}


def train_step(
    state: optim.TrainState, batch: Batch, *, config: BackboneRun, platform: str = "cpu"
) -> tuple[optim.TrainState, dict]:
    """One update -> (state, metrics); `platform` as in `voxcpm2.loss`."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    progress = state.step.astype(jnp.float32) / config.num_steps
    draws = draw(key, config, batch.patches_BMPC, progress)
    (loss, figures), grads = jax.value_and_grad(objective, has_aux=True)(state.params, config, batch, draws, platform)
    state, figures_of_update = optim.update(config.optim, config.num_steps, state, grads)
    is_patch_BM = batch.slot_BM >= 0
    slots = jnp.sum((batch.segment_BT > 0).astype(jnp.float32))
    patches = jnp.sum(is_patch_BM.astype(jnp.float32))
    figures |= {
        "loss": loss,
        "audio_sec": patches * config.patch_sec,
        "slots": slots,
        "patches": patches,
        "targets": jnp.sum((batch.target_BM.astype(bool) & is_patch_BM).astype(jnp.float32)),
        # n slots of a segment stand at positions 0 .. n - 1, which add up to n (n - 1) / 2.
        "squares": 2 * jnp.sum(jnp.where(batch.segment_BT > 0, batch.position_BT, 0).astype(jnp.float32)) + slots,
        "slots_used": slots / batch.segment_BT.size,
        "patches_used": patches / is_patch_BM.size,
    }
    return state, figures | figures_of_update


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(config: BackboneRun, workdir, data=None) -> dict:
    """Trains in `workdir`, from where it stopped if it holds a checkpoint -> the last row of metrics.jsonl.

    Args:
        data: directory of shards, or several with commas between; None: a seeded corpus in memory, of the model's own shape.
    Raises:
        UserError: shards that this model cannot read (every difference is named), or a batch that suits no mesh.
    """
    workdir = pathlib.Path(workdir)
    source = _open(config, data)
    mix = Mix(config.seed, source.index, source.patch_sec, config.batch, config.stages)
    mesh = sharding.make_mesh(config.mesh)
    row_shards = mesh.shape["replica"] * mesh.shape["data"]
    for batch in mix.batches:
        if batch.rows % row_shards:
            raise UserError(f"batch.rows {batch.rows} cannot be split over {row_shards} devices (mesh {config.mesh})")
    if data is not None and jax.process_index() == 0:
        _keep_makers(workdir, source.paths, source.header)
    with jax.set_mesh(mesh):
        layout = sharding.param_shardings(jax.eval_shape(partial(init_state, config)), mesh)
        state = jax.jit(partial(init_state, config), out_shardings=layout)()
        state, row = loop.run(
            workdir=workdir,
            config=to_dict(config) | {"data": _made_of(source)},
            state=state,
            train_step=_by_shape(config, mix.batches, layout, mesh.devices.flat[0].platform),
            batches_from=partial(_batches, source, mix, sharding.batch_sharding(mesh)),
            num_steps=config.num_steps,
            log=config.log,
            checkpoint=config.checkpoint,
            evaluators=[] if data is None or not config.samples.every_steps else [_speaker(config, workdir)],
            flops_of=partial(_flops, config),
            counters_at=lambda step: _heard(mix, step, config.patch_sec),
        )
    names = ("step", "loss", "loss_diff", "loss_stop", "audio_sec_per_sec", "mfu")
    return {name: row.get(name) for name in names}


def _by_shape(config: BackboneRun, batches, layout, platform: str):
    """train_step for batches of each of these budgets, compiled when a stage first brings one."""
    programs = {}
    for batch in batches:
        shape = batch.rows, batch.slots, batch.patches
        if shape in programs and programs[shape][0] != batch:
            raise UserError(
                f"stages: batches of {shape} (rows, slots, patches) must agree in target_patches and segments as well"
            )
        program = partial(train_step, config=dataclasses.replace(config, batch=batch), platform=platform)
        programs[shape] = batch, jax.jit(program, donate_argnums=0, out_shardings=(layout, None))

    def run(state, batch):
        _, program = programs[(*batch.tokens_BT.shape, batch.slot_BM.shape[1])]
        return program(state, batch)

    return run


def _heard(mix: Mix, step: int, patch_sec: float) -> dict:
    """What the run has heard before a step: clips and hours by "dataset/language/mode"."""
    return {
        "/".join(name): {"clips": clips, "hours": round(patches * patch_sec / 3600, 6)}
        for name, (clips, patches) in mix.heard(step).items()
    }


def _open(config: BackboneRun, data) -> packing.Source:
    """The corpus, found to fit the model."""
    model = config.model
    if data is None:
        return packing.synthetic_corpus(
            config.seed,
            vocab_size=model.lm_config.vocab_size,
            patch_shape=(model.patch_size, model.feat_dim),
            patch_sec=config.patch_sec,
            max_patches=min(config.batch.slots // 2, config.batch.target_patches or config.batch.patches),
        )
    from voxcpm2_jax.data import pipeline

    shards = pipeline.Shards(data)
    pairs = {
        "patch size (model.patch_size)": (shards.header.patch_size, model.patch_size),
        "latent channels (model.feat_dim)": (shards.header.latent_dim, model.feat_dim),
        "vocabulary (model.lm_config.vocab_size)": (shards.header.vocab_size, model.lm_config.vocab_size),
        "seconds of a patch (patch_sec)": (shards.header.patch_sec, config.patch_sec),
    }
    wrong = [f"{name}: shards {theirs}, config {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if wrong:
        raise UserError(f"{data} does not fit this config: {'; '.join(wrong)}")
    if shards.dead_channels and jax.process_index() == 0:
        print(f"{data}: latent channels {shards.dead_channels} hardly vary; the codec does not use them", file=sys.stderr)
    return shards


def _made_of(source: packing.Source) -> dict:
    """What the run hears, for its config.json and checkpoints: a run that goes on with something else says so."""
    header = getattr(source, "header", None)
    if header is None:
        return {"clips": len(source)}
    names = ("sources", "sources_sha256", "codec_sha256", "tokenizer_sha256", "hours")
    return {"clips": len(source)} | {name: getattr(header, name) for name in names}


def _keep_makers(workdir: pathlib.Path, directories: Sequence[pathlib.Path], header) -> None:
    """Copies what made the shards into the workdir, whose checkpoints then speak by themselves; refuses another's shards."""
    from voxcpm2_jax import torch_io

    shards = directories[0]
    for part in ("codec", "tokenizer"):
        if not (shards / part).is_dir():
            raise UserError(f"{shards}: no {part}/ in it; expected a directory that prepare made (the held-out one is no such)")
    workdir.mkdir(parents=True, exist_ok=True)
    for part in ("codec", "tokenizer"):
        if not (workdir / part).exists():
            aside = workdir / f".{part}.incomplete"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(shards / part, aside)
            aside.rename(workdir / part)
    vae_config, vae_params = torch_io.load_codec(workdir)
    tokenizer = (workdir / "tokenizer" / "tokenizer.json").read_bytes()
    there = {
        "codec": (torch_io.codec_sha256(vae_params, vae_config), header.codec_sha256),
        "tokenizer": (hashlib.sha256(tokenizer).hexdigest(), header.tokenizer_sha256),
    }
    wrong = [f"{part}: {workdir} {ours:.12}, {shards} {theirs:.12}" for part, (ours, theirs) in there.items() if ours != theirs]
    if wrong:
        raise UserError(
            f"the shards were not made with this run's codec and tokenizer ({'; '.join(wrong)}, SHA-256): train in a new "
            "workdir, or prepare the shards with the workdir's own"
        )


def _batches(source, mix, layout, start_step: int) -> Iterator[Batch]:
    from voxcpm2_jax.data import pipeline

    for batch in pipeline.batches(source, mix, start_step):
        yield jax.tree.map(lambda x: jax.device_put(x, layout), batch)


def _flops(config: BackboneRun, row: dict) -> float:
    used = {name: row[name] for name in ("slots", "patches", "targets", "squares")}
    return metrics.train_flops(config.model, **used)


def _speaker(config: BackboneRun, workdir: pathlib.Path) -> loop.Evaluator:
    """Speaks the sample texts with the weights of the moment: audio and a picture of its spectrogram."""
    from voxcpm2_jax import torch_io
    from voxcpm2_jax.api import VoxCPM
    from voxcpm2_jax.data.tokenizer import load_tokenizer

    vae_config, vae_params = torch_io.load_codec(workdir)
    tokenizer = load_tokenizer(workdir / "tokenizer")

    def run(state: optim.TrainState):
        params = state.best_params
        model = VoxCPM(config.model, params, vae_config, vae_params, tokenizer)
        for i, speech in enumerate(model.speak([{"text": text, "seed": 0} for text in config.samples.texts])):
            yield f"sample_{i}", metrics.Audio(speech.audio_A, model.sample_rate)

    return loop.Evaluator(config.samples.every_steps, run)
