"""What an update does: learning-rate schedules, AdamW that decays matrices only, global-norm clip, averaged weights.

    lr
    |     ____________            "constant"  ends flat
    |    /            \\  "wsd"    warm-up, stable, linear decay over the last `decay_fraction` of the schedule
    |   /  "cosine"    \\          warm-up, then half a cosine over all the rest
    |__/________________\\_______ updates

Update number i (from 0) uses lr(i); the warm-up's first update already moves (lr / warmup_steps), and from the end of
the schedule on lr stays at `end_ratio * learning_rate`.

Sources: AdamW, arXiv 1711.05101; WSD, MiniCPM, arXiv 2404.06395.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from voxcpm2_jax import metrics
from voxcpm2_jax.config import OptimConfig

# Names of the parameters that weight decay shrinks. Norm scales, biases, gains and learned single tokens go by other
# names: the rule is the name, not the rank, because scanned layers stack them to [L, ...].
DECAYED = ("kernel", "embedding")


def schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the update's number, float32; traceable.

    Args:
        num_steps: length of the run, and of the schedule unless `config.schedule_steps` sets it.
    """
    end = config.schedule_steps or num_steps
    if config.schedule == "wsd":
        start = end - round(config.decay_fraction * end)
    else:
        start = config.warmup_steps
    start = min(max(start, config.warmup_steps), end)

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1.0) / max(config.warmup_steps, 1), 1.0)
        done = jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)  # share of the decay behind us
        if config.schedule == "cosine":
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        elif config.schedule == "wsd":
            left = 1.0 - done
        else:
            left = jnp.ones_like(done)
        return config.learning_rate * warmup * (config.end_ratio + (1.0 - config.end_ratio) * left)

    return lr


def decay_mask(params):
    """True at the leaves that weight decay shrinks: those whose last path component is in DECAYED."""
    return jax.tree_util.tree_map_with_path(lambda path, _: str(getattr(path[-1], "key", "")) in DECAYED, params)


def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW: what `config` describes, for a run of `num_steps` updates."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.adamw(
        schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    chain = optax.chain(clip, adamw)

    def update(grads, state, params=None):
        # optax mixes float and int32 scalars (bias correction), which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(grads, state, params)

    return optax.GradientTransformation(chain.init, update)


def ema_update(ema, params, decay: float):
    """Exponential moving average of the weights after one update: decay * ema + (1 - decay) * params, in ema's dtype."""
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p.astype(e.dtype) - e), ema, params)


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


def init_state(config: OptimConfig, num_steps: int, params) -> TrainState:
    """The state before the first of `num_steps` updates."""
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, make(config, num_steps).init(params), ema)


def update(config: OptimConfig, num_steps: int, state: TrainState, grads) -> tuple[TrainState, dict]:
    """One update -> (state, norms of gradient and update, whole and by part, and learning rate)."""
    updates, opt_state = make(config, num_steps).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else ema_update(state.ema, params, config.ema_decay)
    figures = {"learning_rate": schedule(config, num_steps)(state.step)}
    for name, tree in (("grad_norm", grads), ("update_norm", updates)):
        figures |= {name: optax.global_norm(tree), f"{name}/": metrics.of_parts(metrics.norms(tree))}
    return TrainState(state.step + 1, params, opt_state, ema), figures
