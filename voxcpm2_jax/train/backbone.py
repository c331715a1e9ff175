"""Training of the TTS backbone: state, one update, and the run that `voxcpm2-jax train` starts.

    loss = diff_weight * diff + stop_weight * stop,   each a global sum over its global count

Update i reads `batch(seed, i)` and draws its noise from `fold_in(key(seed), i)` at global shape, so that a result does
not depend on the mesh.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from voxcpm2_jax import optim
from voxcpm2_jax.config import BackboneRun
from voxcpm2_jax.models import flow, voxcpm2
from voxcpm2_jax.sequence import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes. `step` counts finished updates; `ema` is None without averaged weights."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def init_state(config: BackboneRun, params=None) -> TrainState:
    """A fresh state, from `params` if given, else from scratch by the run's seed."""
    if params is None:
        params = voxcpm2.init(jax.random.key(config.seed), config.model)
    opt_state = optim.make(config.optim, config.num_steps).init(params)
    ema = None if config.optim.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


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


def objective(params, config: BackboneRun, batch: Batch, draws: voxcpm2.Draws):
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
        remat=config.remat,
    )
    diff, stop = (total / jnp.maximum(count, 1.0) for total, count in (sums["diff"], sums["stop"]))
    loss = config.diff_weight * diff + config.stop_weight * stop
    return loss, {"loss_diff": sums["diff"], "loss_stop": sums["stop"]}


def train_step(state: TrainState, batch: Batch, *, config: BackboneRun) -> tuple[TrainState, dict]:
    """One update -> (state, metrics)."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    progress = state.step.astype(jnp.float32) / config.num_steps
    draws = draw(key, config, batch.patches_BMPC, progress)
    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params, config, batch, draws)
    updates, opt_state = optim.make(config.optim, config.num_steps).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else optim.ema_update(state.ema, params, config.optim.ema_decay)
    metrics |= {
        "loss": loss,
        "grad_norm": optax.global_norm(grads),
        "learning_rate": optim.schedule(config.optim, config.num_steps)(state.step),
        "audio_sec": jnp.sum((batch.slot_BM >= 0).astype(jnp.float32)) * config.patch_sec,
        "slots_used": jnp.mean((batch.segment_BT > 0).astype(jnp.float32)),
        "patches_used": jnp.mean((batch.slot_BM >= 0).astype(jnp.float32)),
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics
