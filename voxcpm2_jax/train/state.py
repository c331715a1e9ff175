"""TODO train.state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from voxcpm2_jax import metrics
from voxcpm2_jax.config.run import OptimConfig
from voxcpm2_jax.optim import ema_update, make, schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes. `step` counts the batches gone by; `ema` is None without averaged weights."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    guard: Any = None  # what train/guard.py remembers; None: updates are not judged

    @property
    def best_params(self):
        """The weights to listen to: the average where there is one."""
        return self.params if self.ema is None else self.ema


def fresh_state(config: OptimConfig, num_steps: int, params) -> TrainState:
    """The state before the first of `num_steps` updates."""
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, make(config, num_steps).init(params), ema)


def apply_update(config: OptimConfig, num_steps: int, state: TrainState, grads) -> tuple[TrainState, dict]:
    """One update -> (state, norms of gradient and update, whole and by part, and learning rate)."""
    tx = make(config, num_steps)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else ema_update(state.ema, params, config.ema_decay)
    figures = {"learning_rate": schedule(config, num_steps)(state.step)}
    for name, tree in (("grad_norm", grads), ("update_norm", updates)):
        figures |= {name: optax.global_norm(tree), f"{name}/": metrics.of_parts(metrics.norms(tree))}
    return TrainState(state.step + 1, params, opt_state, ema), figures
