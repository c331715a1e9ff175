"""Flow matching: time grid, guidance, Euler steps, training times, and the mean-velocity target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax.models import flow

R, P, C = 3, 2, 4


def normal(seed, shape=(R, P, C)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 10, 37])
def test_time_grid(num_steps):
    grid = np.asarray(flow.time_grid(num_steps))
    t = np.linspace(1, 0, num_steps + 1)
    np.testing.assert_allclose(grid, t + (np.cos(np.pi * t / 2) - 1 + t), atol=1e-6)
    assert grid[0] == 1 and abs(grid[-1]) < 1e-6 and grid.dtype == np.float32
    steps = -np.diff(grid)
    assert (steps > 0).all() and (np.diff(steps) > 0).all()  # denser near the noise


def plain_guide(v_cond, v_uncond, cfg_value):
    rows = []
    for c, u, cfg in zip(v_cond.astype(np.float64), v_uncond.astype(np.float64), np.broadcast_to(cfg_value, len(v_cond))):
        scale = (c * u).sum() / ((u * u).sum() + 1e-8)
        rows.append(scale * u + cfg * (c - scale * u))
    return np.stack(rows)


@pytest.mark.parametrize("cfg_value", [0.0, 1.0, 2.0, np.array([0.0, 1.5, 3.0], np.float32)])
def test_guide_against_the_formula(cfg_value):
    c, u = normal(0), normal(1)
    np.testing.assert_allclose(flow.guide(c, u, cfg_value), plain_guide(c, u, cfg_value), rtol=1e-5, atol=1e-6)


def test_guide_by_one_is_the_conditional_velocity_and_a_zero_branch_is_no_trouble():
    c, u = normal(0), normal(1)
    np.testing.assert_allclose(flow.guide(c, u, 1.0), c, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flow.guide(c, np.zeros_like(u), 2.0), 2 * c, rtol=1e-6)


def analytic(x, t, dt):
    """A velocity that depends on everything, conditional and not."""
    t, dt = (jnp.reshape(y, (-1, 1, 1)) for y in (t, dt))
    return jnp.sin(x) + t - 2 * dt, jnp.cos(x) * t + 0.3 + dt


def plain_sample(noise, num_steps, cfg_value, *, mean_mode=False):
    t = np.linspace(1, 0, num_steps + 1)
    grid = t + (np.cos(np.pi * t / 2) - 1 + t)
    x = noise.astype(np.float64)
    for i in range(max(1, int(0.04 * (num_steps + 1))), num_steps):
        t, step = np.full(len(x), grid[i]), grid[i] - grid[i + 1]
        dt = np.full(len(x), step if mean_mode else 0.0)
        c, u = np.sin(x) + (t - 2 * dt)[:, None, None], np.cos(x) * t[:, None, None] + (0.3 + dt)[:, None, None]
        x = x - step * plain_guide(c, u, cfg_value)
    return x


@pytest.mark.parametrize("mean_mode", [False, True])
@pytest.mark.parametrize("num_steps", [2, 10, 60])
def test_sample_against_plain_euler_steps(num_steps, mean_mode):
    noise = normal(2)
    got = flow.sample(analytic, noise, num_steps=num_steps, cfg_value=2.0, mean_mode=mean_mode)
    np.testing.assert_allclose(got, plain_sample(noise, num_steps, 2.0, mean_mode=mean_mode), rtol=1e-4, atol=1e-5)


def test_every_row_has_its_own_guidance():
    noise = normal(3)
    together = flow.sample(analytic, noise, num_steps=5, cfg_value=np.array([1.0, 2.0, 3.0], np.float32))
    for r, cfg_value in enumerate((1.0, 2.0, 3.0)):
        alone = flow.sample(analytic, noise[r : r + 1], num_steps=5, cfg_value=cfg_value)
        np.testing.assert_allclose(together[r], alone[0], rtol=1e-5, atol=1e-6)


def sampled_times(num_steps):
    """The times at which the sampler asks for a velocity that counts."""
    times = []
    with jax.disable_jit():
        flow.sample(lambda x, t, dt: (times.append(float(t[0])) or x, x), normal(4), num_steps=num_steps, cfg_value=2.0)
    return times


def test_trap_6_with_ten_steps_the_first_does_nothing():
    """CFG-Zero*: nine velocities are asked for, from the grid's second time on."""
    times = sampled_times(10)
    np.testing.assert_allclose(times, np.asarray(flow.time_grid(10))[1:10], atol=1e-6)
    one = flow.sample(lambda x, t, dt: (jnp.ones_like(x), jnp.ones_like(x)), np.zeros((R, P, C), np.float32), num_steps=10,
                      cfg_value=2.0)  # fmt: skip
    np.testing.assert_allclose(one, np.full((R, P, C), -np.asarray(flow.time_grid(10))[1]), rtol=1e-5)


@pytest.mark.parametrize(("num_steps", "num_still"), [(1, 1), (10, 1), (48, 1), (49, 2), (100, 4)])
def test_the_share_of_steps_that_keep_the_noise(num_steps, num_still):
    grid = np.asarray(flow.time_grid(num_steps))
    one = flow.sample(lambda x, t, dt: (jnp.ones_like(x), jnp.ones_like(x)), np.zeros((1, 1, 1), np.float32),
                      num_steps=num_steps, cfg_value=1.0)  # fmt: skip
    np.testing.assert_allclose(np.asarray(one).item(), -grid[num_still], atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_times_are_log_normal():
    t = np.asarray(flow.draw_times(jax.random.key(0), (20000,), "log-norm"), np.float64)
    logit = np.log(t / (1 - t))
    assert t.min() > 0 and t.max() < 1
    assert abs(logit.mean() + 0.4) < 0.03 and abs(logit.std() - 1) < 0.03
    assert abs((logit < -0.4).mean() - 0.5) < 0.02 and abs((np.abs(logit + 0.4) < 1).mean() - 0.6827) < 0.02


def test_uniform_training_times():
    t = np.asarray(flow.draw_times(jax.random.key(0), (20000,), "uniform"), np.float64)
    assert t.min() >= 0 and t.max() < 1 and abs(t.mean() - 0.5) < 0.01 and abs(t.var() - 1 / 12) < 0.003


def test_trap_13_times_are_drawn_in_float32():
    t = flow.draw_times(jax.random.key(0), (4, 1000), "log-norm")
    assert t.dtype == jnp.float32 and len(np.unique(t)) > 3900


def test_loss_against_the_formula():
    x, z, t = normal(0), normal(1), np.array([0.1, 0.5, 0.9], np.float32)
    seen = {}

    def velocity(x_t, t_R, dt_R):
        seen.update(x_t=x_t, t=t_R, dt=dt_R)
        return 0.5 * x_t

    got = flow.loss(velocity, x, z, t)
    x_t = (1 - t[:, None, None]) * x + t[:, None, None] * z
    assert got.shape == (R, P) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, ((0.5 * x_t - (z - x)) ** 2).mean(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(seen["x_t"], x_t, rtol=1e-6)
    assert (np.asarray(seen["dt"]) == 0).all() and (np.asarray(seen["t"]) == t).all()


def test_the_true_velocity_has_no_loss():
    x, z, t = normal(0), normal(1), np.array([0.1, 0.5, 0.9], np.float32)
    assert np.abs(flow.loss(lambda *_: z - x, x, z, t)).max() == 0


def mean_velocity(a, x, t, dt):
    """u(x, r, t) as a network sees it, with dt = t - r."""
    t, dt = t.reshape(-1, 1, 1), dt.reshape(-1, 1, 1)
    return a * x * x * t + dt * x + t**3


def test_mean_mode_against_finite_differences():
    """Target v - (t - r) du/dt, the total derivative along (dx/dt = v, r fixed)."""
    x, z = normal(0).astype(np.float64), normal(1).astype(np.float64)
    t, r = np.array([0.3, 0.6, 0.9]), np.array([0.1, 0.6, 0.2])
    v = z - x

    def u(shift):  # along the path, r fixed
        x_t = (1 - t[:, None, None]) * x + t[:, None, None] * z
        return mean_velocity(0.7, x_t + shift * v, t + shift, t + shift - r)

    h = 1e-5
    target = v - (t - r)[:, None, None] * (u(h) - u(-h)) / (2 * h)
    expected = ((u(0.0) - target) ** 2).mean(axis=-1)
    x, z, t, r = (y.astype(np.float32) for y in (x, z, t, r))
    got = flow.loss(lambda *args: mean_velocity(0.7, *args), x, z, t, r)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_mean_mode_with_r_equal_t_is_the_plain_loss_and_the_target_bears_no_gradient():
    x, z, t = normal(0), normal(1), np.array([0.3, 0.6, 0.9], np.float32)
    r = np.array([0.1, 0.2, 0.3], np.float32)
    plain = flow.loss(lambda *args: mean_velocity(0.7, *args), x, z, t)
    np.testing.assert_allclose(flow.loss(lambda *args: mean_velocity(0.7, *args), x, z, t, t), plain, rtol=1e-5)

    def total(a, fixed):
        """The loss with its target from `fixed`: what the gradient must see."""
        v = z - x
        x_t = (1 - t[:, None, None]) * x + t[:, None, None] * z
        _, slope = jax.jvp(
            lambda y, s: mean_velocity(fixed, y, s, s - r),
            (jnp.asarray(x_t), jnp.asarray(t)),
            (jnp.asarray(v), jnp.ones_like(t)),
        )
        target = v - (t - r)[:, None, None] * slope
        return jnp.sum(jnp.mean((mean_velocity(a, x_t, t, t - r) - target) ** 2, axis=-1))

    got = jax.grad(lambda a: jnp.sum(flow.loss(lambda *args: mean_velocity(a, *args), x, z, t, r)))(0.7)
    np.testing.assert_allclose(got, jax.grad(total)(0.7, 0.7), rtol=1e-4)
