"""Flow matching for any velocity function: the training loss and the guided Euler sampler.

    x_t = (1 - t) x + t z,   target v = z - x        x: clean latents at t = 0,   z: normal noise at t = 1

Sampling integrates from t = 1 to t = 0; many papers count time the other way.

Mean mode (MeanFlow, arXiv 2505.13447) learns u(x_t, r, t), the mean of the velocity over the times from r to t, so that one
step can go from t to r. Its target is v - (t - r) du/dt, where du/dt is the change of u as t and x_t move along the flow with
r fixed: a Jacobian-vector product with (dx_t, dr, dt) = (v, 0, 1).

CFG-Zero* (arXiv 2503.18886) scales the unconditional velocity by its projection on the conditional one, and skips the first
steps, in which the flow is nearly pure noise.
"""

import jax
import jax.numpy as jnp

ZERO_SHARE = 0.04  # share of the time grid that CFG-Zero* skips; at least the first step


def draw_times(key: jax.Array, shape: tuple[int, ...], scheduler: str) -> jax.Array:
    """Training times in (0, 1), float32: sigmoid(N(-0.4, 1)) for "log-norm"."""
    if scheduler == "uniform":
        return jax.random.uniform(key, shape)
    return jax.nn.sigmoid(jax.random.normal(key, shape) - 0.4)


def loss(velocity, x_RPC, noise_RPC, t_R, r_R=None, *, has_aux: bool = False):
    """Squared error of the predicted velocity, mean over channels.

    Args:
        velocity: (x_t RPC, t_R, dt_R) -> v_RPC.   x_RPC: clean latents.   noise_RPC: standard normal.
        t_R: time.   r_R: the start of the interval in mean mode; None otherwise.
        has_aux: `velocity` returns a pair; its second part is returned as well.
    Returns:
        loss_RP, float32; with `has_aux` also the second part.
    """
    velocity = velocity if has_aux else _with_nothing(velocity)
    t_R11 = t_R[:, None, None]
    x_t = (1 - t_R11) * x_RPC + t_R11 * noise_RPC
    v = noise_RPC - x_RPC
    if r_R is None:
        predicted, aux = velocity(x_t, t_R, jnp.zeros_like(t_R))
        target = v
    else:
        at, along = (x_t, r_R, t_R), (v, jnp.zeros_like(r_R), jnp.ones_like(t_R))
        predicted, slope, aux = jax.jvp(lambda x, r, t: velocity(x, t, t - r), at, along, has_aux=True)
        target = jax.lax.stop_gradient(v - (t_R - r_R)[:, None, None] * slope)
    loss_RP = jnp.mean((predicted - target) ** 2, axis=-1)
    return (loss_RP, aux) if has_aux else loss_RP


def _with_nothing(f):
    return lambda *args: (f(*args), None)


def time_grid(num_steps: int) -> jax.Array:
    """num_steps + 1 times from 1 to 0, denser near 1 (sway sampling with coefficient 1)."""
    t = jnp.linspace(1.0, 0.0, num_steps + 1)
    return t + (jnp.cos(jnp.pi / 2 * t) - 1 + t)


def guide(v_cond, v_uncond, cfg_value) -> jax.Array:
    """CFG-Zero*: the scaled unconditional velocity plus `cfg_value` times its difference from the conditional one.

    `cfg_value` is a scalar or has one value per row.
    """
    cfg_value = jnp.reshape(jnp.asarray(cfg_value, v_cond.dtype), (-1, 1, 1))
    dot = jnp.sum(v_cond * v_uncond, axis=(1, 2), keepdims=True)
    scaled = v_uncond * (dot / (jnp.sum(v_uncond**2, axis=(1, 2), keepdims=True) + 1e-8))
    return scaled + cfg_value * (v_cond - scaled)


def sample(velocities, noise_RPC, *, num_steps: int, cfg_value, mean_mode: bool = False) -> jax.Array:
    """Draws clean latents by Euler steps from noise.

    Args:
        velocities: (x_RPC, t_R, dt_R) -> (conditional, unconditional) velocity.   cfg_value: guidance, scalar or [R].
        num_steps: Euler steps, static; the first `max(1, 0.04 (num_steps + 1))` of them leave x unchanged.
        mean_mode: dt_R is the length of the step; otherwise it is zero.
    """
    grid = time_grid(num_steps)
    num_still = max(1, int((num_steps + 1) * ZERO_SHARE))

    def step(x_RPC, times):
        t, t_next = times
        t_R = jnp.full(x_RPC.shape[0], t)
        v = guide(*velocities(x_RPC, t_R, t_R - t_next if mean_mode else jnp.zeros_like(t_R)), cfg_value)
        return x_RPC - (t - t_next) * v, None

    x_RPC, _ = jax.lax.scan(step, noise_RPC, (grid[num_still:-1], grid[num_still + 1 :]))
    return x_RPC
