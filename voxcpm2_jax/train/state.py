"""The state of a training, and one update of it; the same for the backbone and the codec."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from voxcpm2_jax import metrics, optim
from voxcpm2_jax.config.run import OptimConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes.

    Attributes:
        step: batches that have been consumed, including those whose update was skipped.
        ema: averaged weights; None without them.
        guard: what train/guard.py remembers; None: no update is judged.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    guard: Any = None

    @property
    def best_params(self):
        """The weights to evaluate and export: the averaged ones if there are any."""
        return self.params if self.ema is None else self.ema


def fresh_state(config: OptimConfig, num_steps: int, params, guard=None) -> TrainState:
    """The state before the first of `num_steps` updates."""
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optim.make(config, num_steps).init(params), ema, guard)


def apply_update(config: OptimConfig, num_steps: int, state, grads) -> tuple[Any, dict]:
    """One update of the optimiser.

    Args:
        state: a dataclass with at least `step`, `params`, `opt_state` and `ema`; its other fields are kept.
    Returns:
        state: after the update.   figures: learning rate, norms of gradient and update, whole and by part.
    """
    tx = optim.make(config, num_steps)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else optim.ema_update(state.ema, params, config.ema_decay)
    figures = {"learning_rate": optim.schedule(config, num_steps)(state.step)}
    for name, tree in (("grad_norm", grads), ("update_norm", updates)):
        figures |= {name: optax.global_norm(tree), f"{name}/": metrics.of_parts(metrics.norms(tree))}
    return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema), figures
