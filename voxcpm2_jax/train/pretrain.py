"""Training of the backbone: what `voxcpm2-jax train` runs.

shards -> Mix (which clips every row of every step holds) -> batches, split over the mesh -> train_step, run by loop.py
"""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils

from voxcpm2_jax import files, flops, metrics, processes, sharding
from voxcpm2_jax.checkpoint import arrays, steps
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import CHANGES, BackboneRun, BatchConfig
from voxcpm2_jax.data import pipeline, synthetic
from voxcpm2_jax.data.clips import Source, label, label_names, label_patches
from voxcpm2_jax.data.forecast import forecast
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.evaluate.validation import Validation
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.sequence import Batch
from voxcpm2_jax.train import ahead, backbone, elastic, loop
from voxcpm2_jax.train.figures import spectrogram
from voxcpm2_jax.train.start import Start
from voxcpm2_jax.train.state import TrainState


def initial_params(config: BackboneRun, layout, *, init_params=None, init_tslm=None):
    """Parameters to start from, float32, read one at a time; None if neither argument is given: the run starts from scratch.

    Args:
        layout: a sharding for every parameter.
        init_params: any checkpoint of the same model. Only its weights are read, the averaged ones if it has them.
        init_tslm: a MiniCPM-4 checkpoint for the text-semantic LM (`minicpm.load_tslm`); the other parts are initialised.
    Raises:
        UserError: the checkpoint does not fit the model (every difference is named).
    """
    assert init_params is None or init_tslm is None, "only one of them can give the text-semantic LM"
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
    planned: elastic.Size | None = None,
) -> dict:
    """Trains in `workdir`, and resumes there if it holds a checkpoint -> figures from the last row of metrics.jsonl.

    Args:
        data: directory of shards, or several separated by commas; None: a seeded synthetic corpus in memory.
        heldout: the same, for the held-out loss; None: the clips that `prepare` held out of `data`.
        resume_from: another run's workdir or one step of it; a new run starts with its whole state.
        init_params, init_tslm: where the parameters of a new run come from, see `initial_params`.
        accept_changes: allow changes of the config that are otherwise refused on resume (`CHANGES` in config/run.py).
        profile_steps: (a, b): updates a .. b - 1 are traced for XProf.
        planned: the machine that mesh and accumulate are made for; they follow if the run finds fewer devices.
    Raises:
        UserError: shards that the model cannot read (every difference is named), a batch that cannot be split over the
            mesh, or what `start.begin` refuses.
    """
    home, workdir = workdir, pathlib.Path(workdir)
    if profile_steps and profile_steps[0] >= config.num_steps:
        raise UserError(f"--profile-steps={'{}:{}'.format(*profile_steps)}: the run ends at step {config.num_steps}")
    config = config if planned is None else _fitted(config, planned)
    source = _open(config, data)
    mix = Mix(config.seed, source.index, source.patch_sec, config.batch, config.stages)
    mesh = sharding.make_mesh(config.mesh)
    row_shards = mesh.shape["replica"] * mesh.shape["data"]
    for batch in config.batches:
        if batch.rows % (row_shards * config.accumulate):
            parts = f" x {config.accumulate} micro-batches" if config.accumulate > 1 else ""
            raise UserError(f"batch.rows {batch.rows} cannot be split over {row_shards} devices{parts} (mesh {config.mesh})")
    heldout_source = _open_heldout(config, source, data, heldout)
    if data is not None and jax.process_index() == 0:
        _keep_provenance(workdir, source.paths, source.header)
    with jax.set_mesh(mesh):
        evaluators = _evaluators(config, workdir, data, heldout_source, mesh)
        task = BackboneTask(config, source, mix, mesh, evaluators, compiled=workdir / "compiled")
        state = backbone.abstract_state(config, mesh)
        fresh = f"scratch (seed {config.seed})" + ("" if data else ", with synthetic clips, since there is no --data")
        if steps.has_steps(workdir) or resume_from is not None:
            if unused := init_params or init_tslm:
                processes.say(f"{unused} is not used: the run continues from a checkpoint of its own")
        else:
            _check_provenance(init_params, source)
            layout = jax.tree.map(lambda x: x.sharding, state)
            params = initial_params(config, layout.params, init_params=init_params, init_tslm=init_tslm)
            fresh = f"the weights of {init_params} (--init-params)" if init_params else fresh
            fresh = f"the text-semantic LM of {init_tslm} (--init-tslm), else {fresh}" if init_tslm else fresh
            start = jax.jit(backbone.initialiser(config), out_shardings=layout, donate_argnums=0)
            state = start() if params is None else start(params)
        _announce(mix, source, config)
        origin = Start(resume_from, fresh, CHANGES, accept_changes)
        _, row = loop.run(task, state, home, origin=origin, profile_steps=profile_steps)
    names = ("step", "loss", "loss_diff", "loss_stop", "audio_sec_per_sec", "mfu")
    return {name: row.get(name) for name in names}


def _fitted(config: BackboneRun, planned: elastic.Size) -> BackboneRun:
    """The run on the devices that it found; says so if some are missing."""
    devices = jax.devices()
    are_slices = devices[0].platform == "tpu"
    present = elastic.Size(sharding.num_slices(devices) if are_slices else 1, len(devices))
    fitted = elastic.fit(config, planned, present, are_slices=are_slices)
    if present.devices < planned.devices:
        processes.say(elastic.describe(config, fitted, planned, present))
    return fitted


class BackboneTask(loop.Task):
    """The backbone, for the loop.

    The train step is compiled once per batch shape, when a stage first brings a batch of that shape, or loaded from
    `compiled`, where `--compile-for` saved it.
    """

    def __init__(
        self,
        config: BackboneRun,
        source: Source,
        mix: Mix,
        mesh,
        evaluators: Sequence[loop.Evaluator] = (),
        *,
        compiled: pathlib.Path | None = None,
    ):
        self.run, self.evaluators = config, evaluators
        self.record = to_dict(config) | {"data": _provenance_of(source)}
        self._source, self._mix, self._mesh, self._compiled = source, mix, mesh, compiled
        labels = labels_of(source)
        self._programs = {
            (batch.rows, batch.slots, batch.patches): backbone.jit_train_step(config.with_batch(batch), mesh, labels)
            for batch in config.batches
        }
        self._ready: set[tuple] = set()  # batch shapes whose program was looked for in `compiled`

    def train_step(self, state, batch: Batch):
        shape = (*batch.tokens_BT.shape, batch.slot_BM.shape[1])
        if shape not in self._ready:
            self._ready.add(shape)
            self._programs[shape] = ahead.compile_step(self._programs[shape], state, batch, self._compiled)
        return self._programs[shape](state, batch)

    def lowered(self, budgets: BatchConfig, state):
        """The train step for a state and batches of these budgets, as `train_step` would compile it."""
        starts = (0, *(stage.first_step for stage in self.run.stages))
        step = next(i for i in starts if self._mix.batch_of(i) == budgets)
        row = pipeline.host_rows(self._source, self._mix, step, [0])  # its shapes and dtypes are those of all rows
        layout = sharding.batch_sharding(self._mesh)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((budgets.rows, *x.shape[1:]), x.dtype, sharding=layout), row)
        return ahead.lower(self._programs[(budgets.rows, budgets.slots, budgets.patches)], state, batch)

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches over all devices; each process reads only the clips of the rows that its own devices hold."""
        parts = pipeline.batches(self._source, self._mix, start, rows_of=partial(sharding.local_rows, self._mesh))
        with contextlib.closing(parts):  # its threads read ahead
            for step, part in enumerate(parts, start):
                yield sharding.global_batch(part, self._mesh, self._mix.batch_of(step).rows)

    def flops(self, row: dict) -> dict[str, float]:
        used = {name: row[name] for name in ("slots", "patches", "targets", "squares")}
        return {part: 3.0 * forward for part, forward in flops.forward_flops(self.run.model, **used).items()}

    def counters(self, step: int, without: frozenset[int]) -> dict:
        """What the model was trained on before a step: clips and hours by "dataset/language/mode"."""
        index = self._source.index
        heard = {name: np.array(counts) for name, counts in self._mix.heard(step).items()}
        names = label_names(index)
        for draw in (draw for batch in without for row in self._mix.rows(batch) for draw in row):
            heard[names[label(index, draw)]] -= 1, index.lengths["patches"][draw.clip]
        return {
            "/".join(name): {"clips": int(clips), "hours": round(int(patches) * self.run.patch_sec / 3600, 6)}
            for name, (clips, patches) in heard.items()
            if clips
        }

    def clips(self, batch: int) -> list[str]:
        """The clips of a batch as "dataset/language:number"; numbers count through all directories of shards."""
        index = self._source.index
        clips = sorted({draw.clip for row in self._mix.rows(batch) for draw in row})
        return ["/".join(index.groups[index.lengths["group"][clip]]) + f":{clip}" for clip in clips]


def compile_ahead(config: BackboneRun, workdir, data, devices) -> list[dict]:
    """Compiles the train step of every stage for devices that are not here, and saves it where `train` looks for it.

    Args:
        data: as in `train`; it decides which datasets and languages the step reports losses by.
        devices: of a topology.
    Returns:
        for each program its "file", "rows", "slots", "bytes" and "compile_sec".
    """
    source = _open(config, data)
    mix = Mix(config.seed, source.index, source.patch_sec, config.batch, config.stages)
    mesh, saved = sharding.make_mesh(config.mesh, devices=devices), []
    with jax.set_mesh(mesh):
        task, state = BackboneTask(config, source, mix, mesh), backbone.abstract_state(config, mesh)
        for batch in config.batches:
            begin = time.perf_counter()
            path = ahead.save(pathlib.Path(workdir) / "compiled", task.lowered(batch, state), state)
            seconds = round(time.perf_counter() - begin, 1)
            size = {"rows": batch.rows, "slots": batch.slots, "bytes": path.stat().st_size}
            saved.append({"file": str(path), "compile_sec": seconds} | size)
    return saved


def labels_of(source: Source) -> metrics.Labels:
    """The datasets, languages and modes that losses are reported by."""
    return metrics.name_labels(label_names(source.index), label_patches(source.index).tolist())


def _announce(mix: Mix, source: Source, config: BackboneRun) -> None:
    """Prints what the run will be trained on, and what its stages ask for in vain."""
    for stage in forecast(mix, source.index, config.num_steps, source.patch_sec):
        processes.say(str(stage))
        for line in stage.lacking if config.stages else ():
            processes.say(f"warning: the stage from step {stage.first_step:,} {line}")


def _open(config: BackboneRun, data) -> Source:
    """The corpus, after checking that it fits the model."""
    model = config.model
    if data is None:
        return synthetic.Synthetic(
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
        processes.say(f"{data}: latent channels {shards.dead_channels} hardly vary: the codec does not use them")
    return shards


def _open_heldout(config: BackboneRun, source: Source, data, heldout) -> Source | None:
    """The clips of the held-out loss, after checking that they are made like the training clips and are none of them."""
    if data is None and heldout is not None:
        raise UserError("--heldout needs --data: held-out clips must have the provenance of the training clips")
    if heldout is None and data is not None:
        heldout = ",".join(str(path / "heldout") for path in source.paths if (path / "heldout").is_dir())
    if not heldout or not config.validation.every_steps:
        return None
    from voxcpm2_jax.data.identity import check_heldout
    from voxcpm2_jax.data.shards import Shards, check_alike

    shards = Shards(heldout)
    check_alike([*source.paths[:1], shards.paths[0]], [source.header, shards.header])
    for line in check_heldout(source.paths, shards.paths):
        processes.say(line)
    return shards


def _provenance_of(source: Source) -> dict:
    """What the run trains on, for config.json and checkpoints, so that resuming with other data is noticed."""
    header = getattr(source, "header", None)
    if header is None:
        return {"clips": len(source)}
    names = ("sources", "sources_sha256", "codec_sha256", "tokenizer_sha256", "hours")
    return {"clips": len(source)} | {name: getattr(header, name) for name in names}


def _keep_provenance(workdir: pathlib.Path, directories: Sequence[pathlib.Path], header) -> None:
    """Copies codec and tokenizer of the shards into the workdir, as its checkpoints need them; refuses shards of others."""
    from voxcpm2_jax.data.tokenizer import load_tokenizer
    from voxcpm2_jax.workdir import check_provenance

    shards = directories[0]
    for part in ("codec", "tokenizer"):
        if not (shards / part).is_dir():
            raise UserError(f"{shards}: no {part}/ in it; expected a directory made by prepare, not its heldout/")
    workdir.mkdir(parents=True, exist_ok=True)
    for part in ("codec", "tokenizer"):
        files.once(workdir / part, lambda temporary, part=part: shutil.copytree(shards / part, temporary / part))
    advice = "train in a new workdir, or prepare the shards with the workdir's own"
    check_provenance(workdir, header, name=f"this run ({workdir})", advice=advice)
    rule = load_tokenizer(workdir / "tokenizer").rule
    if header.text and rule and header.text != to_dict(rule):
        raise UserError(f"texts are written by {header.text} in the shards, by {to_dict(rule)} in {workdir}: {advice}")


def _check_provenance(init_params, source) -> None:
    """Refuses shards whose codec or tokenizer differs from the one that the weights were trained with."""
    header = getattr(source, "header", None)
    if init_params is None or header is None:
        return
    from voxcpm2_jax.workdir import check_provenance

    check_provenance(init_params, header, name=f"--init-params={init_params}")


def _evaluators(config: BackboneRun, workdir: pathlib.Path, data, heldout, mesh) -> list[loop.Evaluator]:
    evaluators = []
    if heldout is not None:
        evaluators.append(_validator(config, heldout, mesh))
    if data is not None and config.samples.every_steps:
        evaluators.append(_speaker(config, workdir))
    return evaluators


def _validator(config: BackboneRun, heldout: Source, mesh) -> loop.Evaluator:
    """The held-out loss, of the averaged weights if there are any."""
    budgets = dataclasses.replace(config.batch, rows=config.batch.rows // config.accumulate)
    validation = Validation(config.model, heldout, budgets, config.validation, mesh)

    def run(state: TrainState):
        for name, value in validation.figures(state.best_params).items():
            yield f"val_{name}", value

    return loop.Evaluator(config.validation.every_steps, run)


def _speaker(config: BackboneRun, workdir: pathlib.Path) -> loop.Evaluator:
    """Speaks the sample texts with the current weights: audio and a picture of its spectrogram.

    Process 0 speaks, on one of its devices. The other processes send it their share of the weights and wait, since waiting
    inside the next step would look like a stall.
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
            model = VoxCPM.from_parts(config.model, params, vae_config, vae_params, tokenizer)
            speeches = model.speak([{"text": text, "seed": 0} for text in config.samples.texts])
        multihost_utils.sync_global_devices("samples")
        for i, speech in enumerate(speeches):
            yield f"sample_{i}", metrics.Audio(speech.audio_A, model.sample_rate)
            yield f"spectrogram_{i}", metrics.Image(spectrogram(speech.audio_A, model.sample_rate))

    return loop.Evaluator(config.samples.every_steps, run)


def _whole(params, config: BackboneRun):
    """All weights in the memory of every host, in the compute dtype."""
    params = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(config.model.dtype), params))(params)
    return multihost_utils.process_allgather(params, tiled=True) if jax.process_count() > 1 else jax.device_get(params)
