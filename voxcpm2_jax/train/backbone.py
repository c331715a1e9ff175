"""Training of the TTS backbone: state, one update, and the run that `voxcpm2-jax train` starts.

    loss = diff_weight * diff + stop_weight * stop,   each a global sum over its global count

Update i reads `batch(seed, i)` and draws its noise from `fold_in(key(seed), i)` at global shape, so that a result does
not depend on the mesh, nor on `accumulate`: the number of micro-batches that an update adds up.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from voxcpm2_jax import metrics, sharding
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.models import flow, voxcpm2
from voxcpm2_jax.sequence import Batch
from voxcpm2_jax.train import guard
from voxcpm2_jax.train.state import TrainState, apply_update, fresh_state


def init_state(config: BackboneRun, params=None) -> TrainState:
    """A fresh state, from `params` if given, else from scratch by the run's seed."""
    if params is None:
        params = voxcpm2.init(jax.random.key(config.seed), config.model)
    state = fresh_state(config.optim, config.num_steps, params)
    return dataclasses.replace(state, guard=guard.init(config.guard))


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
    state: TrainState,
    batch: Batch,
    *,
    config: BackboneRun,
    platform: str = "cpu",
    labels: metrics.Labels | None = None,
) -> tuple[TrainState, dict]:
    """One update, which train/guard.py may skip -> (state, metrics).

    Args:
        platform: as in `voxcpm2.loss`.   labels: the losses are also told by dataset, language and mode.
    """
    before = state
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    draws = draw(key, config, batch.patches_BMPC, state.step)
    loss, figures, grads = loss_and_grads(state.params, config, batch, draws, labels, platform)
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
