"""Training of the TTS backbone: state, one update, and the run that `voxcpm2-jax train` starts.

    loss = diff_weight * diff + stop_weight * stop,   each a global sum over its global count

Update i reads `batch(seed, i)` and draws its noise from `fold_in(key(seed), i)` at global shape, so that a result does
not depend on the mesh, nor on `accumulate`: the number of micro-batches that an update adds up.
"""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from voxcpm2_jax import checkpoint, metrics, optim, sharding
from voxcpm2_jax.checkpoint import Start
from voxcpm2_jax.config import CHANGES, BackboneRun, UserError, to_dict
from voxcpm2_jax.data import packing
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.evaluate.validation import Validation
from voxcpm2_jax.models import flow, voxcpm2
from voxcpm2_jax.sequence import Batch
from voxcpm2_jax.train import guard, loop


def init_state(config: BackboneRun, params=None) -> optim.TrainState:
    """A fresh state, from `params` if given, else from scratch by the run's seed."""
    if params is None:
        params = voxcpm2.init(jax.random.key(config.seed), config.model)
    state = optim.init_state(config.optim, config.num_steps, params)
    return dataclasses.replace(state, guard=guard.init(config.guard))


def initial_params(config: BackboneRun, layout, *, init_params=None, init_tslm=None):
    """Parameters to start from, float32, one at a time laid out as `layout` says; None: neither is given, so from scratch.

    Args:
        layout: a sharding for every parameter.
        init_params: any checkpoint of the same model: its weights, averaged ones if it has them, and nothing else.
        init_tslm: a MiniCPM-4 for the text-semantic LM (`torch_io.load_tslm`); all other parts are from scratch.
    Raises:
        UserError: what they hold does not fit the model (every difference is named).
    """
    assert init_params is None or init_tslm is None, "one of them says what the text-semantic LM is"
    if init_params is None and init_tslm is None:
        return None
    from voxcpm2_jax import torch_io

    if init_params is not None:
        weights, params = torch_io.open_weights(init_params, config.model), {}
    else:
        weights = torch_io.load_tslm(init_tslm, config.model)
        scratch = jax.jit(lambda: voxcpm2.init(jax.random.key(config.seed), config.model), out_shardings=layout)
        params = checkpoint.flatten(scratch())
    for path, place in checkpoint.flatten(layout).items():
        if path in weights.shapes:
            array = np.asarray(weights.read(path), np.float32)
            params[path] = jax.make_array_from_callback(array.shape, place, lambda index, array=array: array[index])
    return checkpoint.nest(params)


def draw(key: jax.Array, config: BackboneRun, patches_BMPC, step) -> voxcpm2.Draws:
    """The random part of one update, with `step` updates behind it."""
    flow_config = config.model.dit_config.cfm_config
    time_key, noise_key, drop_key, start_key, mean_key = jax.random.split(key, 5)
    B, M = patches_BMPC.shape[:2]
    time_BM = flow.draw_times(time_key, (B, M), flow_config.t_scheduler)
    start_BM = None
    if config.model.dit_config.dit_mean_mode:
        first, last = flow_config.ratio_r_neq_t_range
        progress = jnp.asarray(step, jnp.float32) / config.num_steps
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


def objective(
    params,
    config: BackboneRun,
    batch: Batch,
    draws: voxcpm2.Draws,
    counts=None,
    labels: metrics.Labels | None = None,
    platform: str = "cpu",
):
    """The weighted loss of a batch -> (scalar, metrics that parts of a batch have as the whole has, see `metrics.combine`).

    Args:
        counts: "diff" and "stop": what the two sums are divided by; None: the batch's own. A micro-batch takes those of the
            whole batch: its losses and gradients are then parts that add up to the whole's.
        labels: the losses are told by them as well.   platform: as in `voxcpm2.loss`.
    """
    terms = voxcpm2.loss_terms(
        params,
        config.model,
        batch,
        draws,
        target_patches=config.batch.target_patches,
        max_segments=config.batch.segments,
        remat=config.remat,
        remat_local=config.remat_local,
        platform=platform,
        with_figures=True,
    )
    of_patches = voxcpm2.patch_figures(terms, batch.stop_BM)
    figures = {name: tuple(jnp.sum(x_BM) for x_BM in pair) for name, pair in of_patches.items()}
    counts = {name: figures[f"loss_{name}"][1] for name in ("diff", "stop")} if counts is None else counts
    diff, stop = (figures[f"loss_{name}"][0] / jnp.maximum(counts[name], 1.0) for name in ("diff", "stop"))
    loss = config.diff_weight * diff + config.stop_weight * stop

    M = terms["target_BM"].shape[1]
    figures["loss_diff/time/"] = metrics.by_time(of_patches["loss_diff"], draws.time_BM[:, :M])
    if labels is not None:
        for name in ("loss_diff", "loss_stop"):
            figures[f"{name}/"] = metrics.by_label(of_patches[name], batch.label_BM[:, :M], labels)
    figures["fsq_levels"] = metrics.count_levels(**terms["quantiser"])
    return loss, figures | {f"{name}/": metrics.of_parts(values) for name, values in terms["maxima"].items()}


def loss_and_grads(
    params,
    config: BackboneRun,
    batch: Batch,
    draws: voxcpm2.Draws,
    labels: metrics.Labels | None = None,
    platform: str = "cpu",
):
    """Loss, metrics and gradients of a batch, in `config.accumulate` parts one after the other.

    The parts are weighted by what they hold, so the result is that of the whole batch at once, to float32 rounding; no
    more than one part's activations are in memory.
    """
    grad = jax.value_and_grad(objective, has_aux=True)
    if config.accumulate == 1:
        (loss, figures), grads = grad(params, config, batch, draws, None, labels, platform)
        return loss, figures, grads
    counts = _counts(config, batch)

    def add(total, part):
        figures, grads = grad(params, config, *part, counts, labels, platform)
        total = jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, grads)
        return sharding.constrain_params(total), figures

    zeros = sharding.constrain_params(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))
    parts = jax.tree.map(partial(_split, parts=config.accumulate), (batch, draws))
    grads, (loss, figures) = jax.lax.scan(add, zeros, parts)
    return jnp.sum(loss), metrics.combine(figures), grads


def _split(x_B, parts: int):
    """[B, ..] -> [parts, B / parts, ..]: each part takes rows of every device, so none has to move."""
    B, *rest = x_B.shape
    x_BA = x_B.reshape(B // parts, parts, *rest)
    return sharding.constrain(jnp.swapaxes(x_BA, 0, 1), None, "batch", *[None] * len(rest))


def _counts(config: BackboneRun, batch: Batch) -> dict:
    """Target frames and patches: what the losses of a whole batch are divided by; they do not depend on the model."""
    M = config.batch.target_patches
    is_target_BM = batch.target_BM[:, :M].astype(bool) & (batch.slot_BM[:, :M] >= 0)
    patches = jnp.sum(is_target_BM.astype(jnp.float32))
    return {"diff": patches * config.model.patch_size, "stop": patches}


def train_step(
    state: optim.TrainState,
    batch: Batch,
    *,
    config: BackboneRun,
    platform: str = "cpu",
    labels: metrics.Labels | None = None,
) -> tuple[optim.TrainState, dict]:
    """One update, which train/guard.py may skip -> (state, metrics).

    Args:
        platform: as in `voxcpm2.loss`.   labels: the losses are also told by dataset, language and mode.
    """
    before = state
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    draws = draw(key, config, batch.patches_BMPC, state.step)
    loss, figures, grads = loss_and_grads(state.params, config, batch, draws, labels, platform)
    figures |= metrics.fsq_figures(figures.pop("fsq_levels"))
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
    starts = [0, *(stage.first_step for stage in config.stages)]
    return guard.judge(config.guard, before, state, figures | figures_of_update, starts)


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(
    config: BackboneRun,
    workdir,
    data=None,
    *,
    heldout=None,
    resume_from=None,
    init_params=None,
    init_tslm=None,
    accept_changes: bool = False,
    profile_steps=None,
) -> dict:
    """Trains in `workdir`, from where it stopped if it holds a checkpoint -> the last row of metrics.jsonl.

    Args:
        data: directory of shards, or several with commas between; None: a seeded corpus in memory, of the model's own shape.
        heldout: the same, for the held-out loss; None: what `prepare` held out of `data`.
        resume_from: another run's workdir or one step of it, whose whole state a new run starts with.
        init_params, init_tslm: what a new run's parameters are, see `initial_params`; the rest of its state is fresh.
        accept_changes: fields of the config may differ from the checkpoint's that must not (`config.CHANGES`).
        profile_steps: (a, b): updates a .. b - 1 are traced for XProf.
    Raises:
        UserError: shards that this model cannot read (every difference is named), a batch that suits no mesh, or what
            `checkpoint.begin` refuses.
    """
    workdir = pathlib.Path(workdir)
    if profile_steps and profile_steps[0] >= config.num_steps:
        raise UserError(f"--profile-steps={'{}:{}'.format(*profile_steps)}: the run ends at step {config.num_steps}")
    source = _open(config, data)
    mix = Mix(config.seed, source.index, source.patch_sec, config.batch, config.stages)
    mesh = sharding.make_mesh(config.mesh)
    row_shards = mesh.shape["replica"] * mesh.shape["data"]
    for batch in mix.batches:
        if batch.rows % (row_shards * config.accumulate):
            parts = f" x {config.accumulate} micro-batches" if config.accumulate > 1 else ""
            raise UserError(f"batch.rows {batch.rows} cannot be split over {row_shards} devices{parts} (mesh {config.mesh})")
    unheard = _open_heldout(config, source, data, heldout)
    if data is not None and jax.process_index() == 0:
        _keep_makers(workdir, source.paths, source.header)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(partial(init_state, config))
        layout = sharding.param_shardings(shapes, mesh)
        fresh = f"scratch (seed {config.seed})" + ("" if data else ", on synthetic clips of no voice, as there is no --data")
        if checkpoint.has_steps(workdir) or resume_from is not None:
            state = sharding.abstract(shapes, layout)
            if unused := init_params or init_tslm:
                sharding.say(f"{unused} is not used: the run goes on from a checkpoint of its own")
        else:
            _check_makers(init_params, source)
            params = initial_params(config, layout.params, init_params=init_params, init_tslm=init_tslm)
            fresh = f"the weights of {init_params} (--init-params)" if init_params else fresh
            fresh = f"the text-semantic LM of {init_tslm} (--init-tslm), else {fresh}" if init_tslm else fresh
            state = jax.jit(partial(init_state, config), out_shardings=layout, donate_argnums=0)(params)
        state, row = loop.run(
            workdir=workdir,
            config=to_dict(config) | {"data": _made_of(source)},
            state=state,
            train_step=_by_shape(config, mix.batches, layout, sharding.platform(mesh), _labels(source)),
            batches_from=partial(_batches, source, mix, mesh),
            num_steps=config.num_steps,
            log=config.log,
            checkpoint=config.checkpoint,
            guard=config.guard,
            watchdog=config.watchdog,
            evaluators=_evaluators(config, workdir, data, unheard, mesh),
            flops_of=partial(_flops, config),
            counters_at=lambda step, without: _heard(mix, source.index, step, config.patch_sec, without),
            clips_at=partial(_clips, mix, source.index),
            origin=Start(resume_from, fresh, CHANGES, accept_changes),
            profile_steps=profile_steps,
        )
    names = ("step", "loss", "loss_diff", "loss_stop", "audio_sec_per_sec", "mfu")
    return {name: row.get(name) for name in names}


def _labels(source: packing.Source) -> metrics.Labels:
    """What the losses are told by, beside their totals."""
    return metrics.name_labels(packing.label_names(source.index), packing.label_patches(source.index).tolist())


def _by_shape(config: BackboneRun, batches, layout, platform: str, labels: metrics.Labels):
    """train_step for batches of each of these budgets, compiled when a stage first brings one; metrics go to every process."""
    programs = {}
    for batch in batches:
        shape = batch.rows, batch.slots, batch.patches
        if shape in programs and programs[shape][0] != batch:
            raise UserError(
                f"stages: batches of {shape} (rows, slots, patches) must agree in target_patches and segments as well"
            )
        program = partial(train_step, config=dataclasses.replace(config, batch=batch), platform=platform, labels=labels)
        programs[shape] = batch, jax.jit(program, donate_argnums=0, out_shardings=(layout, layout.step))

    def run(state, batch):
        _, program = programs[(*batch.tokens_BT.shape, batch.slot_BM.shape[1])]
        return program(state, batch)

    return run


def _heard(mix: Mix, index: packing.Index, step: int, patch_sec: float, without: Iterable[int] = ()) -> dict:
    """What the run has heard before a step: clips and hours by "dataset/language/mode".

    Args:
        without: batches before it that no update came of.
    """
    heard = {name: np.array(counts) for name, counts in mix.heard(step).items()}
    names = packing.label_names(index)
    for draw in (draw for batch in without for row in mix.rows(batch) for draw in row):
        heard[names[packing.label(index, draw)]] -= 1, index.lengths[draw.clip, packing.PATCHES]
    return {
        "/".join(name): {"clips": int(clips), "hours": round(int(patches) * patch_sec / 3600, 6)}
        for name, (clips, patches) in heard.items()
        if clips
    }


def _clips(mix: Mix, index: packing.Index, batch: int) -> list[str]:
    """The clips of a batch as "dataset/language:number", numbers as in the shards, one directory after the other."""
    clips = sorted({draw.clip for row in mix.rows(batch) for draw in row})
    return ["/".join(index.groups[index.lengths[clip, packing.GROUP]]) + f":{clip}" for clip in clips]


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
    pipeline.check_fit(shards, model, config.patch_sec, where=str(data))
    if shards.dead_channels:
        sharding.say(f"{data}: latent channels {shards.dead_channels} hardly vary; the codec does not use them")
    return shards


def _open_heldout(config: BackboneRun, source: packing.Source, data, heldout) -> packing.Source | None:
    """The clips of the held-out loss, found to be made like those that are trained on."""
    if data is None and heldout is not None:
        raise UserError("--heldout goes with --data: held-out clips must be made like those that are trained on")
    if heldout is None and data is not None:
        heldout = ",".join(str(path / "heldout") for path in source.paths if (path / "heldout").is_dir())
    if not heldout or not config.validation.every_steps:
        return None
    from voxcpm2_jax.data import pipeline

    shards = pipeline.Shards(heldout)
    pipeline.check_alike([*source.paths[:1], shards.paths[0]], [source.header, shards.header])
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
    advice = "train in a new workdir, or prepare the shards with the workdir's own"
    torch_io.check_makers(workdir, header, name=f"this run ({workdir})", advice=advice)


def _check_makers(init_params, source) -> None:
    """Refuses shards whose latents or ids mean something else than those that the weights were trained on."""
    header = getattr(source, "header", None)
    if init_params is None or header is None:
        return
    from voxcpm2_jax import torch_io

    torch_io.check_makers(init_params, header, name=f"--init-params={init_params}")


def _batches(source, mix: Mix, mesh, start_step: int) -> Iterator[Batch]:
    """Batches over all devices; each process reads the clips of the rows that its own devices hold."""
    from voxcpm2_jax.data import pipeline

    parts = pipeline.batches(source, mix, start_step, rows_of=partial(sharding.local_rows, mesh))
    with contextlib.closing(parts):  # its threads read ahead
        for step, part in enumerate(parts, start_step):
            yield sharding.global_batch(part, mesh, mix.batch_of(step).rows)


def _flops(config: BackboneRun, row: dict) -> dict[str, float]:
    used = {name: row[name] for name in ("slots", "patches", "targets", "squares")}
    return {part: 3.0 * flops for part, flops in metrics.forward_flops(config.model, **used).items()}


def _evaluators(config: BackboneRun, workdir: pathlib.Path, data, unheard, mesh) -> list[loop.Evaluator]:
    evaluators = []
    if unheard is not None:
        evaluators.append(_validator(config, unheard, mesh))
    if data is not None and config.samples.every_steps:
        evaluators.append(_speaker(config, workdir))
    return evaluators


def _validator(config: BackboneRun, unheard: packing.Source, mesh) -> loop.Evaluator:
    """The held-out loss of the weights to listen to: the averaged ones where there are any, as checkpoints are read."""
    budgets = dataclasses.replace(config.batch, rows=config.batch.rows // config.accumulate)
    validation = Validation(config.model, unheard, budgets, config.validation, mesh)

    def run(state: optim.TrainState):
        for name, value in validation.figures(state.best_params).items():
            yield f"val_{name}", value

    return loop.Evaluator(config.validation.every_steps, run)


def _speaker(config: BackboneRun, workdir: pathlib.Path) -> loop.Evaluator:
    """Speaks the sample texts with the weights of the moment: audio and a picture of its spectrogram.

    The first process does, on one of its devices; the others hand it their share of the weights and wait, for in the next
    step the time would be a stall.
    """
    if jax.process_index() != 0:

        def hand_over(state: optim.TrainState):
            _whole(state.best_params, config)
            multihost_utils.sync_global_devices("samples")
            return ()

        return loop.Evaluator(config.samples.every_steps, hand_over)
    from voxcpm2_jax import torch_io
    from voxcpm2_jax.api import VoxCPM
    from voxcpm2_jax.data.tokenizer import load_tokenizer

    vae_config, vae_params = torch_io.load_codec(workdir)
    tokenizer = load_tokenizer(workdir / "tokenizer")

    def run(state: optim.TrainState):
        params = _whole(state.best_params, config)
        with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])):
            model = VoxCPM(config.model, params, vae_config, vae_params, tokenizer)
            speeches = model.speak([{"text": text, "seed": 0} for text in config.samples.texts])
        multihost_utils.sync_global_devices("samples")
        for i, speech in enumerate(speeches):
            yield f"sample_{i}", metrics.Audio(speech.audio_A, model.sample_rate)

    return loop.Evaluator(config.samples.every_steps, run)


def _whole(params, config: BackboneRun):
    """All of the weights in the memory of every host, in the type that they are multiplied in."""
    params = jax.jit(partial(voxcpm2.to_compute, dtype=config.model.dtype))(params)
    return multihost_utils.process_allgather(params, tiled=True) if jax.process_count() > 1 else jax.device_get(params)
