"""Optimisers: learning-rate schedules, AdamW or Muon, weight decay of matrices only, global-norm clip, averaged weights.

    "constant"   linear warm-up, then flat
    "cosine"     linear warm-up, then half a cosine over all the rest
    "wsd"        warm-up, stable, decay: linear warm-up, flat, linear decay over the last `decay_fraction` of the schedule

Update number i (from 0) uses lr(i). The first update of the warm-up uses learning_rate / warmup_steps, not 0. After the
end of the schedule lr stays at `end_ratio * learning_rate`. The stable part of "wsd" is a trunk: a branch can start from any
of its checkpoints, with a decay that `decay_start` and `decay_steps` set.

                                                                    bytes of state per parameter, if `mu_dtype` is
                  parameters                                        float32       bfloat16
    AdamW         all; with "muon" all but those of the layers      4 + 4         2 + 4 (the second moment stays float32)
    Muon          q, k, v, o, gate, up, down of all layers          4             2
    weight decay  kernels and embeddings (DECAYED)                  none          none

Sources: AdamW, arXiv 1711.05101; WSD, MiniCPM, arXiv 2404.06395; Muon, Keller Jordan, 2024; its update scaled to AdamW's,
arXiv 2502.16982.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from voxcpm2_jax.config.run import OptimConfig

# Names of the parameters that weight decay shrinks; norm scales, biases, gains and learned tokens have other names. The
# rule goes by name and not by rank, because scanned layers stack parameters to [L, ...].
DECAYED = ("kernel", "embedding")


def schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the update's number, float32; traceable.

    Args:
        num_steps: length of the run, and of the schedule unless `config.schedule_steps` sets it.
    """
    end = config.schedule_steps or num_steps
    if config.schedule != "wsd":
        start = config.warmup_steps
    else:
        steps = config.decay_steps or round(config.decay_fraction * end)
        start = end - steps if config.decay_start is None else config.decay_start
        end = start + steps
    start = min(max(start, config.warmup_steps), end)

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1.0) / max(config.warmup_steps, 1), 1.0)
        done = jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)  # share of the decay that is over
        if config.schedule == "cosine":
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        elif config.schedule == "wsd":
            left = 1.0 - done
        else:
            left = jnp.ones_like(done)
        return config.learning_rate * warmup * (config.end_ratio + (1.0 - config.end_ratio) * left)

    return lr


def decay_mask(params):
    """True for the leaves that weight decay shrinks: the last component of their path is in DECAYED."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _keys(path)[-1] in DECAYED, params)


def methods(params):
    """The method for each leaf with optimizer "muon": "muon" for the matrices of the layers, else "adamw"."""

    def method(path, _):
        match _keys(path)[-3:]:
            case ["layers", name, "kernel"] if name in MUON:
                return "muon"
        return "adamw"

    return jax.tree_util.tree_map_with_path(method, params)


def _keys(path) -> list[str]:
    return [str(getattr(key, "key", "")) for key in path]


def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a run of `num_steps` updates: clip by global norm, AdamW or Muon, weight decay, learning rate.

    Its `update` takes the number of the update as `step`. The learning rate depends on that number and not on a counter in
    the optimiser's state, so that a skipped update does not shift the schedule.
    """
    mu_dtype = jnp.dtype(config.mu_dtype)
    direction = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=mu_dtype)
    if config.optimizer == "muon":
        direction = optax.partition({"muon": scale_by_muon(config.muon_beta, mu_dtype), "adamw": direction}, methods)
    chain = optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
    )
    lr = schedule(config, num_steps)

    def update(grads, state, params, *, step):
        # The bias correction of optax mixes float and int32 scalars, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            directions, state = chain.update(grads, state, params)
        scale = -lr(step)
        return jax.tree.map(lambda x: scale.astype(x.dtype) * x, directions), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


# ---- Muon ------------------------------------------------------------------------------------------------------------

# The layers' matrices, stacked to [L, inputs.., outputs..], and their number of input dims. All heads form one matrix.
MUON = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
_QUINTIC = (3.4445, -4.7750, 2.0315)  # the slope at 0 is large, at the price of singular values that end near 1, not at 1
_RMS = 0.2  # of the entries of an update whose singular values are all 1; AdamW's updates have about this RMS in practice


class MuonState(NamedTuple):
    mu: Any  # averaged gradients


def scale_by_muon(beta: float, mu_dtype=jnp.float32) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised: the update has about the same size in every singular direction of the matrix.

    Its scale is chosen for entries with an RMS of 0.2 in any shape, about that of AdamW's updates, so that one learning rate
    and one weight decay serve both methods. As `orthogonalize` is not exact, the RMS is less; see there.
    """

    def init(params):
        return MuonState(jax.tree.map(lambda x: jnp.zeros(x.shape, mu_dtype), params))

    def update(grads, state, params=None):
        mu = jax.tree.map(lambda g, m: beta * m.astype(g.dtype) + (1 - beta) * g, grads, state.mu)
        ahead = jax.tree.map(lambda g, m: beta * m + (1 - beta) * g, grads, mu)
        directions = jax.tree_util.tree_map_with_path(lambda path, x: _muon_direction(x, MUON[_keys(path)[-2]]), ahead)
        return directions, MuonState(jax.tree.map(lambda x: x.astype(mu_dtype), mu))

    return optax.GradientTransformation(init, update)


def _muon_direction(x, num_inputs: int):
    x_LIO = x.reshape(len(x), math.prod(x.shape[1 : 1 + num_inputs]), -1)
    return (_RMS * max(x_LIO.shape[1:]) ** 0.5 * orthogonalize(x_LIO)).reshape(x.shape)


def orthogonalize(x_LIO: jax.Array, num_steps: int = 5) -> jax.Array:
    """An approximation of U V' for x = U S V', with products in bfloat16.

    Its singular values, and the RMS of Muon's updates with it, depend on how far the singular values of x are apart. The
    tests measure matrices of 24 x 40, 64 x 16 and 128 x 128, whose singular values are spread evenly in their logarithm:

        largest / smallest of x     10               100              1,000            10,000
        singular values             0.65 .. 1.15     0.66 .. 1.20     0.12 .. 1.20     0.00 .. 1.20
        RMS of an update            0.18 .. 0.18     0.18 .. 0.18     0.17 .. 0.18     0.15 .. 0.16
    """
    is_tall = x_LIO.shape[1] > x_LIO.shape[2]
    y_LIO = jnp.swapaxes(x_LIO, 1, 2) if is_tall else x_LIO  # so that the square products have the size of the short side
    y_LIO = y_LIO / (jnp.linalg.norm(y_LIO, axis=(1, 2), keepdims=True) + 1e-8)
    y_LIO = y_LIO.astype(jnp.bfloat16)
    a, b, c = (jnp.bfloat16(k) for k in _QUINTIC)

    def closer(_, y_LIO):
        square_LII = jnp.einsum("LIO,LJO->LIJ", y_LIO, y_LIO)
        poly_LII = b * square_LII + c * jnp.einsum("LIJ,LJK->LIK", square_LII, square_LII)
        return a * y_LIO + jnp.einsum("LIJ,LJO->LIO", poly_LII, y_LIO)

    y_LIO = jax.lax.fori_loop(0, num_steps, closer, y_LIO)
    return (jnp.swapaxes(y_LIO, 1, 2) if is_tall else y_LIO).astype(x_LIO.dtype)


# ---- state -----------------------------------------------------------------------------------------------------------


def ema_update(ema, params, decay: float):
    """Exponential moving average of the weights after one update: decay * ema + (1 - decay) * params, in ema's dtype."""
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p.astype(e.dtype) - e), ema, params)
