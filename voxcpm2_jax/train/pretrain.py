"""TODO train.pretrain."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils

from voxcpm2_jax import metrics, processes, sharding
from voxcpm2_jax.checkpoint import arrays, steps
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import CHANGES, BackboneRun
from voxcpm2_jax.data import packing, synthetic
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.evaluate.validation import Validation
from voxcpm2_jax.flops import forward_flops
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.sequence import Batch
from voxcpm2_jax.train import loop
from voxcpm2_jax.train.backbone import init_state, train_step
from voxcpm2_jax.train.start import Start
from voxcpm2_jax.train.state import TrainState


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
    from voxcpm2_jax.torch_io import minicpm
    from voxcpm2_jax.workdir import open_weights

    if init_params is not None:
        weights, params = open_weights(init_params, config.model), {}
    else:
        weights = minicpm.load_tslm(init_tslm, config.model)
        scratch = jax.jit(lambda: voxcpm2.init(jax.random.key(config.seed), config.model), out_shardings=layout)
        params = arrays.flatten(scratch())
    for path, place in arrays.flatten(layout).items():
        if path in weights.shapes:
            array = np.asarray(weights.read(path), np.float32)
            params[path] = jax.make_array_from_callback(array.shape, place, lambda index, array=array: array[index])
    return arrays.nest(params)


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
        _keep_provenance(workdir, source.paths, source.header)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(partial(init_state, config))
        layout = sharding.param_shardings(shapes, mesh)
        fresh = f"scratch (seed {config.seed})" + ("" if data else ", on synthetic clips of no voice, as there is no --data")
        if steps.has_steps(workdir) or resume_from is not None:
            state = sharding.abstract(shapes, layout)
            if unused := init_params or init_tslm:
                processes.say(f"{unused} is not used: the run goes on from a checkpoint of its own")
        else:
            _check_provenance(init_params, source)
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
        return synthetic.synthetic_corpus(
            config.seed,
            vocab_size=model.lm_config.vocab_size,
            patch_shape=(model.patch_size, model.feat_dim),
            patch_sec=config.patch_sec,
            max_patches=min(config.batch.slots // 2, config.batch.target_patches or config.batch.patches),
        )
    from voxcpm2_jax.data.shards import Shards, check_fit

    shards = Shards(data)
    check_fit(shards, model, config.patch_sec, where=str(data))
    if shards.dead_channels:
        processes.say(f"{data}: latent channels {shards.dead_channels} hardly vary; the codec does not use them")
    return shards


def _open_heldout(config: BackboneRun, source: packing.Source, data, heldout) -> packing.Source | None:
    """The clips of the held-out loss, found to be made like those that are trained on."""
    if data is None and heldout is not None:
        raise UserError("--heldout goes with --data: held-out clips must be made like those that are trained on")
    if heldout is None and data is not None:
        heldout = ",".join(str(path / "heldout") for path in source.paths if (path / "heldout").is_dir())
    if not heldout or not config.validation.every_steps:
        return None
    from voxcpm2_jax.data.shards import Shards, check_alike

    shards = Shards(heldout)
    check_alike([*source.paths[:1], shards.paths[0]], [source.header, shards.header])
    return shards


def _made_of(source: packing.Source) -> dict:
    """What the run hears, for its config.json and checkpoints: a run that goes on with something else says so."""
    header = getattr(source, "header", None)
    if header is None:
        return {"clips": len(source)}
    names = ("sources", "sources_sha256", "codec_sha256", "tokenizer_sha256", "hours")
    return {"clips": len(source)} | {name: getattr(header, name) for name in names}


def _keep_provenance(workdir: pathlib.Path, directories: Sequence[pathlib.Path], header) -> None:
    """Copies what made the shards into the workdir, whose checkpoints then speak by themselves; refuses another's shards."""
    from voxcpm2_jax.workdir import check_provenance

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
    check_provenance(workdir, header, name=f"this run ({workdir})", advice=advice)


def _check_provenance(init_params, source) -> None:
    """Refuses shards whose latents or ids mean something else than those that the weights were trained on."""
    header = getattr(source, "header", None)
    if init_params is None or header is None:
        return
    from voxcpm2_jax.workdir import check_provenance

    check_provenance(init_params, header, name=f"--init-params={init_params}")


def _batches(source, mix: Mix, mesh, start_step: int) -> Iterator[Batch]:
    """Batches over all devices; each process reads the clips of the rows that its own devices hold."""
    from voxcpm2_jax.data import pipeline

    parts = pipeline.batches(source, mix, start_step, rows_of=partial(sharding.local_rows, mesh))
    with contextlib.closing(parts):  # its threads read ahead
        for step, part in enumerate(parts, start_step):
            yield sharding.global_batch(part, mesh, mix.batch_of(step).rows)


def _flops(config: BackboneRun, row: dict) -> dict[str, float]:
    used = {name: row[name] for name in ("slots", "patches", "targets", "squares")}
    return {part: 3.0 * flops for part, flops in forward_flops(config.model, **used).items()}


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

    def run(state: TrainState):
        for name, value in validation.figures(state.best_params).items():
            yield f"val_{name}", value

    return loop.Evaluator(config.validation.every_steps, run)


def _speaker(config: BackboneRun, workdir: pathlib.Path) -> loop.Evaluator:
    """Speaks the sample texts with the weights of the moment: audio and a picture of its spectrogram.

    The first process does, on one of its devices; the others hand it their share of the weights and wait, for in the next
    step the time would be a stall.
    """
    if jax.process_index() != 0:

        def hand_over(state: TrainState):
            _whole(state.best_params, config)
            multihost_utils.sync_global_devices("samples")
            return ()

        return loop.Evaluator(config.samples.every_steps, hand_over)
    from voxcpm2_jax.data.tokenizer import load_tokenizer
    from voxcpm2_jax.inference.api import VoxCPM
    from voxcpm2_jax.workdir import load_codec

    vae_config, vae_params = load_codec(workdir)
    tokenizer = load_tokenizer(workdir / "tokenizer")

    def run(state: TrainState):
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
