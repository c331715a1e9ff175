"""Causal convolutions of the codec, each as (x, left context) -> (y, next left context).

Offline, the left context is zeros; in streaming, it is what the previous call returned. Both are one code path.

Kernels are laid out WIO (window, in, out) and weight-normalised: parameters are `kernel` and `gain`, and the weight is
kernel * gain / |kernel|. The gain of a convolution is per output channel, that of a transposed convolution per input channel.

    Conv            window W, dilation d          left context (W - 1) d samples
    DownConv        window 2 s, stride s          left context s samples (one output frame)
    UpConv          window 2 s, stride s          left context 1 frame; the s samples beyond the end are trimmed

Because their window is two strides, the last two are matrix products over whole frames: y[t] = x[t-1] K_old + x[t] K_new.

Why Snake and the depthwise convolution have code of their own: milliseconds on two CPU cores, [8, 6000, 32] float32, jax 0.10.2

                                                         forward   gradient
    Snake with jnp.sin (not vectorised on CPUs)             14.6       16.8
    Snake with the polynomial below                          0.7        1.4
    depthwise, window 7: conv_general_dilated                  seconds
    depthwise: shifted multiply-adds, autodiff               1.7       70
    depthwise: the same with the gradient below              1.7       15
    dense, window 7: conv_general_dilated (used)             6.7       20
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# sin(r) / r and cos(r) as polynomials in r^2 on [-pi/2, pi/2], least squares on Chebyshev nodes, largest error 4e-9.
_SIN = tuple(np.float32(c) for c in (0.999999977, -0.166666476, 0.00833289916, -0.000198008617, 2.59042274e-06))
_COS = tuple(np.float32(c) for c in (1, -0.499999994, 0.0416666362, -0.00138883608, 2.47601321e-05, -2.60510154e-07))
_PI_HIGH = np.float32(3.140625)  # has 8 significant bits, so q * _PI_HIGH is exact for |q| < 2**16
_PI_LOW = np.float32(np.pi - 3.140625)


def _reduced(u):
    """u minus the nearest multiple of pi, which leaves sin^2, cos^2 and sin cos unchanged."""
    q = jnp.round(u * np.float32(1 / np.pi))
    return (u - q * _PI_HIGH) - q * _PI_LOW


def _polynomial(coefficients, z):
    value = coefficients[-1]
    for c in coefficients[-2::-1]:
        value = c + z * value
    return value


@jax.custom_vjp
def snake(x_BAE, alpha_E):
    """x + sin^2(a x) / (a + 1e-9), in float32; the error of sin^2 is below 1e-6 for |a x| < 1e4."""
    r_BAE = _reduced(_channels(alpha_E) * x_BAE)
    sin_BAE = r_BAE * _polynomial(_SIN, r_BAE * r_BAE)
    return x_BAE + sin_BAE * sin_BAE * _channels(1 / (alpha_E + 1e-9))


def _snake_forward(x_BAE, alpha_E):
    return snake(x_BAE, alpha_E), (x_BAE, alpha_E)


def _snake_backward(saved, g_BAE):
    x_BAE, alpha_E = saved
    r_BAE = _reduced(_channels(alpha_E) * x_BAE)
    sin_BAE = r_BAE * _polynomial(_SIN, r_BAE * r_BAE)
    slope_BAE = 2 * sin_BAE * _polynomial(_COS, r_BAE * r_BAE)  # of sin^2
    inverse_E = 1 / (alpha_E + 1e-9)
    dx_BAE = g_BAE * (1 + slope_BAE * _channels(alpha_E * inverse_E))
    dalpha_BAE = g_BAE * (x_BAE * slope_BAE - sin_BAE * sin_BAE * _channels(inverse_E))
    return dx_BAE, _sum_over_time(dalpha_BAE) * inverse_E


snake.defvjp(_snake_forward, _snake_backward)


class Snake(nn.Module):
    """x + sin^2(a x) / (a + 1e-9), a per channel."""

    @nn.compact
    def __call__(self, x_BAE):
        return snake(x_BAE, self.param("alpha", nn.initializers.ones, (x_BAE.shape[-1],)))


class Conv(nn.Module):
    """Causal convolution, dense or depthwise."""

    features: int  # output channels; depthwise: as many as come in
    window: int
    dilation: int = 1
    is_depthwise: bool = False
    initial_gain: float = 1.0  # factor on the weight at the start
    initial_bias: float = 0.0

    @nn.compact
    def __call__(self, x_BAE, left_BAE=None):
        in_features = 1 if self.is_depthwise else x_BAE.shape[-1]
        shape_WIO = (self.window, in_features, self.features)
        kernel_WIO, bias_E = _weights(self, shape_WIO, 2, self.initial_gain, self.initial_bias)
        x_BAE, left_BAE = _with_left(x_BAE, left_BAE, (self.window - 1) * self.dilation)
        if self.is_depthwise:
            y_BAE = depthwise(x_BAE, kernel_WIO[:, 0], self.dilation)
        elif self.window == 1:
            y_BAE = x_BAE @ kernel_WIO[0]
        else:
            y_BAE = jax.lax.conv_general_dilated(
                x_BAE, kernel_WIO, (1,), "VALID", rhs_dilation=(self.dilation,), dimension_numbers=("NWC", "WIO", "NWC")
            )
        return add_bias(y_BAE, bias_E), left_BAE


class DownConv(nn.Module):
    """Causal convolution of window 2 x stride; the input must be whole frames of `stride` samples."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x_BAE, left_BAE=None):
        B, A, E = x_BAE.shape
        kernel_WIO, bias_E = _weights(self, (2 * self.stride, E, self.features), gain_dim=2)
        x_BAE, left_BAE = _with_left(x_BAE, left_BAE, self.stride)
        frames_BTE = x_BAE.reshape(B, A // self.stride + 1, self.stride * E)
        old_EE, new_EE = kernel_WIO.reshape(2, self.stride * E, self.features)
        return add_bias(frames_BTE[:, :-1] @ old_EE + frames_BTE[:, 1:] @ new_EE, bias_E), left_BAE


class UpConv(nn.Module):
    """Causal transposed convolution of window 2 x stride, trimmed by one stride on the right."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x_BTE, left_BTE=None):
        B, T, E = x_BTE.shape
        kernel_WIO, bias_E = _weights(self, (2 * self.stride, E, self.features), gain_dim=1)
        x_BTE, left_BTE = _with_left(x_BTE, left_BTE, 1)
        # Input frame t reaches output frames t (first half of the window) and t + 1 (second half).
        new_EE, old_EE = jnp.moveaxis(kernel_WIO.reshape(2, self.stride, E, self.features), 2, 1).reshape(2, E, -1)
        y_BTE = x_BTE[:, :-1] @ old_EE + x_BTE[:, 1:] @ new_EE
        return add_bias(y_BTE.reshape(B, T * self.stride, self.features), bias_E), left_BTE


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x_BAE, kernel_WE, dilation):
    """Valid depthwise convolution: [B, A + (W - 1) dilation, E] -> [B, A, E], as shifted multiply-adds."""
    A = x_BAE.shape[1] - (len(kernel_WE) - 1) * dilation

    def looped(x_BAE, kernel_WE):
        def tap(y_BAE, w):
            x_w_BAE = jax.lax.dynamic_slice_in_dim(x_BAE, w * dilation, A, axis=1)
            return y_BAE + x_w_BAE * _channels(kernel_WE[w]), None

        return jax.lax.scan(tap, jnp.zeros_like(x_BAE[:, :A]), jnp.arange(len(kernel_WE)))[0]

    def fused(x_BAE, kernel_WE):
        return sum(x_BAE[:, w * dilation : w * dilation + A] * _channels(k_E) for w, k_E in enumerate(kernel_WE))

    # On CPUs XLA would fuse whatever computes x into every tap, repeat it there, and compile for minutes: hence the scan.
    return jax.lax.platform_dependent(x_BAE, kernel_WE, cpu=looped, default=fused)


def _depthwise_forward(x_BAE, kernel_WE, dilation):
    return depthwise(x_BAE, kernel_WE, dilation), (x_BAE, kernel_WE)


def _depthwise_backward(dilation, saved, g_BAE):
    x_BAE, kernel_WE = saved
    A = g_BAE.shape[1]
    margin = (len(kernel_WE) - 1) * dilation
    padded_BAE = jnp.pad(g_BAE, ((0, 0), (margin, margin), (0, 0)))
    dx_BAE = depthwise(padded_BAE, kernel_WE[::-1], dilation)
    # One tap at a time: XLA's CPU code for all taps as fused reductions is five times slower.

    def tap(w):
        return _sum_over_time(jax.lax.dynamic_slice_in_dim(x_BAE, w * dilation, A, axis=1) * g_BAE)

    return dx_BAE, jax.lax.map(tap, jnp.arange(len(kernel_WE)))


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@jax.custom_vjp
def add_bias(x_BAE, bias_E):
    return x_BAE + _channels(bias_E)


add_bias.defvjp(lambda x_BAE, bias_E: (add_bias(x_BAE, bias_E), None), lambda _, g_BAE: (g_BAE, _sum_over_time(g_BAE)))


def _weights(module, shape_WIO, gain_dim, initial_gain=1.0, initial_bias=0.0):
    """Weight and bias of a convolution. gain_dim: 2 if the gain is per output channel, 1 if per input channel (transposed)."""
    kernel_WIO = module.param("kernel", nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"), shape_WIO)
    dims = tuple(d for d in range(3) if d != gain_dim)
    norm_WIO = jnp.sqrt(jnp.sum(jnp.square(kernel_WIO), dims, keepdims=True))
    gain_E = module.param("gain", lambda _: initial_gain * norm_WIO.reshape(-1))
    bias_E = module.param("bias", nn.initializers.constant(initial_bias), (shape_WIO[2],))
    return kernel_WIO * (gain_E.reshape(norm_WIO.shape) / norm_WIO), bias_E


def _with_left(x_BAE, left_BAE, size):
    """x with its left context in front (zeros if None), and the left context for what follows x."""
    if left_BAE is None:
        left_BAE = jnp.zeros((x_BAE.shape[0], size, x_BAE.shape[2]), x_BAE.dtype)
    x_BAE = jnp.concatenate([left_BAE, x_BAE], axis=1)
    return x_BAE, x_BAE[:, x_BAE.shape[1] - size :]


def _sum_over_time(x_BAE):
    """[E]: a matrix product with ones, so that XLA does not fuse the sum with x and compute x again for its other users."""
    x_AE = x_BAE.reshape(-1, x_BAE.shape[-1])
    return (jnp.ones((1, len(x_AE)), x_AE.dtype) @ x_AE)[0]


def _channels(v_E):
    return v_E[None, None, :]
