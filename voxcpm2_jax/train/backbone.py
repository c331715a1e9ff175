"""One update of the TTS backbone, a pure function of state and batch.

    loss = diff_weight * diff + stop_weight * stop

    diff    flow-matching error of the velocity, mean over all target frames of the batch (logged as "loss_diff")
    stop    cross-entropy of the stop decision, mean over all target patches of the batch ("loss_stop")

Update i reads `batch(seed, i)` and draws its noise from `fold_in(key(seed), i)` at global shape. So its result depends
neither on the mesh nor on `accumulate`, the number of micro-batches that an update adds up.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp

from voxcpm2_jax import chips, metrics, sharding
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.models import flow, voxcpm2
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.sequence import Batch
from voxcpm2_jax.train import guard
from voxcpm2_jax.train.state import TrainState, apply_update, fresh_state


def init_state(config: BackboneRun, params=None) -> TrainState:
    """A fresh state, from `params` if given, else from scratch by the run's seed."""
    if params is None:
        params = voxcpm2.init(jax.random.key(config.seed), config.model)
    return fresh_state(config.optim, config.num_steps, params, guard.init(config.guard))


@functools.cache
def initialiser(config: BackboneRun):
    """`init_state` of this run. It is one and the same function for equal configs, so that JAX traces it once (a second)."""
    return partial(init_state, config)


def abstract_state(config: BackboneRun, mesh) -> TrainState:
    """The state as ShapeDtypeStructs, each with its sharding on the mesh."""
    shapes = jax.eval_shape(initialiser(config))
    return sharding.abstract(shapes, sharding.param_shardings(shapes, mesh))


def draw(key: jax.Array, config: BackboneRun, patches_BMPC, step) -> voxcpm2.Draws:
    """The random part of an update that has `step` updates before it."""
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
    compute: Compute,
    counts=None,
    labels: metrics.Labels | None = None,
):
    """The weighted loss of a batch -> (scalar, metrics; those of micro-batches are joined by `metrics.combine`).

    Args:
        counts: "diff" and "stop": what the two sums are divided by; None: the counts of this batch. A micro-batch is given
            those of the whole batch, so that losses and gradients of all micro-batches add up to those of the batch.
        labels: the losses are also reported by dataset, language and mode.
    """
    terms = voxcpm2.loss_terms(
        params,
        config.model,
        batch,
        draws,
        target_patches=config.batch.target_patches,
        compute=compute,
        with_figures=True,
    )
    of_patches = voxcpm2.patch_figures(terms, batch.stop_BM)
    figures = {name: tuple(jnp.sum(x_BM) for x_BM in pair) for name, pair in of_patches.items()}
    figures["loss_diff"] = (terms["diff_sum"], figures["loss_diff"][1])
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
    compute: Compute,
    labels: metrics.Labels | None = None,
):
    """Loss, metrics and gradients of a batch, computed in `config.accumulate` micro-batches one after the other.

    Each micro-batch is weighted by its target frames and patches, so the result equals that of the whole batch to float32
    rounding. Activations of only one micro-batch are in memory.
    """
    grad = jax.value_and_grad(objective, has_aux=True)
    if config.accumulate == 1:
        (loss, figures), grads = grad(params, config, batch, draws, compute, None, labels)
        return loss, figures, grads
    counts = _counts(config, batch)

    def add(total, part):
        figures, grads = grad(params, config, *part, compute, counts, labels)
        total = jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, grads)
        return sharding.constrain_params(total), figures

    zeros = sharding.constrain_params(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))
    parts = jax.tree.map(partial(_split, parts=config.accumulate), (batch, draws))
    grads, (loss, figures) = jax.lax.scan(add, zeros, parts)
    return jnp.sum(loss), metrics.combine(figures), grads


def _split(x_B, parts: int):
    """[B, ..] -> [parts, B / parts, ..]: each part takes rows of every device, so no row moves between devices."""
    B, *rest = x_B.shape
    x_BA = x_B.reshape(B // parts, parts, *rest)
    return sharding.constrain(jnp.swapaxes(x_BA, 0, 1), None, "batch", *[None] * len(rest))


def _counts(config: BackboneRun, batch: Batch) -> dict:
    """Target frames and patches of a batch, by which its losses are divided; they do not depend on the model."""
    M = config.batch.target_patches
    is_target_BM = batch.target_BM[:, :M].astype(bool) & (batch.slot_BM[:, :M] >= 0)
    patches = jnp.sum(is_target_BM.astype(jnp.float32))
    return {"diff": patches * config.model.patch_size, "stop": patches}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: BackboneRun,
    compute: Compute | None = None,
    labels: metrics.Labels | None = None,
) -> tuple[TrainState, dict]:
    """One update, which train/guard.py may skip -> (state, metrics).

    Args:
        compute: None: as the config says, for the platform of the mesh in use.
        labels: the losses are also reported by dataset, language and mode.
    """
    compute = compute or Compute.of(config)
    before = state
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    draws = draw(key, config, batch.patches_BMPC, state.step)
    loss, figures, grads = loss_and_grads(state.params, config, batch, draws, compute, labels)
    figures |= metrics.fsq_figures(figures.pop("fsq_levels"))
    state, figures_of_update = apply_update(config.optim, config.num_steps, state, grads)
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


def jit_train_step(config: BackboneRun, mesh, labels: metrics.Labels | None = None):
    """`train_step` as one program over a mesh: jitted (state, batch) -> (state, metrics).

    The state is donated and keeps its layout; every process gets the metrics. Trace and call it under `jax.set_mesh(mesh)`.
    """
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    step = partial(train_step, config=config, compute=Compute.of(config, mesh), labels=labels)
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    options = chip.compiler_options if chip else {}
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, layout.step), compiler_options=options)
