"""Causal convolutions of the codec, each as (x, left context) -> (y, next left context).

Offline the left context is zeros; in streaming it is what the previous call returned, so both are one code path.
Kernels are WIO and weight-normalised: `kernel` and `gain` are separate parameters, folded at run time to
kernel * gain / |kernel|. A convolution's gain is per output channel, a transposed convolution's per input channel.

    Conv            window W, dilation d          left context (W - 1) d samples
    DownConv        window 2 s, stride s          left context s samples (one output frame)
    UpConv          window 2 s, stride s          left context 1 frame; the s samples beyond the end are trimmed

Windows of two strides make the last two plain matrix products over whole frames: y[t] = x[t-1] K_old + x[t] K_new.

Measured on two cores, [8, 6000, 32] float32, forward / gradient in ms (XLA, jax 0.10.2):
    Snake with jnp.sin 14.6 / 16.8, with the polynomial below 0.7 / 1.4 (XLA's CPU sine is not vectorised)
    depthwise window 7 as shifted multiply-adds 1.7 / 70 by autodiff, 1.7 / 15 with the gradient below
    (conv_general_dilated: seconds); a dense window 7 is best left to conv_general_dilated, 6.7 / 20
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# sin(r) = r (S0 + S1 r^2 + ...) on [-pi/2, pi/2], least squares on Chebyshev nodes, largest error 3e-9.
_SIN = tuple(np.float32(c) for c in (9.99999977e-01, -1.66666476e-01, 8.33289916e-03, -1.98008617e-04, 2.59042274e-06))
_PI_HIGH = np.float32(3.140625)  # 8 bits, so q * _PI_HIGH is exact for |q| < 2**16
_PI_LOW = np.float32(np.pi - 3.140625)


def sin_squared(u):
    """sin(u)^2 in float32 by reduction to half a period; error below 1e-6 for |u| < 1e4."""
    q = jnp.round(u * np.float32(1 / np.pi))
    r = (u - q * _PI_HIGH) - q * _PI_LOW
    z = r * r
    s = r * (_SIN[0] + z * (_SIN[1] + z * (_SIN[2] + z * (_SIN[3] + z * _SIN[4]))))
    return s * s


class Snake(nn.Module):
    """x + sin^2(a x) / (a + 1e-9), a per channel."""

    @nn.compact
    def __call__(self, x_BAE):
        alpha_E = self.param("alpha", nn.initializers.ones, (x_BAE.shape[-1],))
        return x_BAE + sin_squared(_channels(alpha_E) * x_BAE) * _channels(1 / (alpha_E + 1e-9))


class Conv(nn.Module):
    """Causal convolution, dense or depthwise."""

    features: int  # output channels; depthwise: as many as come in
    window: int
    dilation: int = 1
    is_depthwise: bool = False

    @nn.compact
    def __call__(self, x_BAE, left_BAE=None):
        in_features = 1 if self.is_depthwise else x_BAE.shape[-1]
        kernel_WIO, bias_E = _weights(self, (self.window, in_features, self.features), gain_dim=2)
        x_BAE, left_BAE = _with_left(x_BAE, left_BAE, (self.window - 1) * self.dilation)
        if self.is_depthwise:
            y_BAE = depthwise(x_BAE, kernel_WIO[:, 0], self.dilation)
        elif self.window == 1:
            y_BAE = x_BAE @ kernel_WIO[0]
        else:
            y_BAE = jax.lax.conv_general_dilated(
                x_BAE, kernel_WIO, (1,), "VALID", rhs_dilation=(self.dilation,), dimension_numbers=("NWC", "WIO", "NWC")
            )
        return y_BAE + _channels(bias_E), left_BAE


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
        return frames_BTE[:, :-1] @ old_EE + frames_BTE[:, 1:] @ new_EE + _channels(bias_E), left_BAE


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
        return y_BTE.reshape(B, T * self.stride, self.features) + _channels(bias_E), left_BTE


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x_BAE, kernel_WE, dilation):
    """Valid depthwise convolution: [B, A + (W - 1) dilation, E] -> [B, A, E], as shifted multiply-adds."""
    W = len(kernel_WE)
    A = x_BAE.shape[1] - (W - 1) * dilation
    return sum(x_BAE[:, w * dilation : w * dilation + A] * _channels(kernel_WE[w]) for w in range(W))


def _depthwise_forward(x_BAE, kernel_WE, dilation):
    return depthwise(x_BAE, kernel_WE, dilation), (x_BAE, kernel_WE)


def _depthwise_backward(dilation, saved, g_BAE):
    x_BAE, kernel_WE = saved
    B, A, E = g_BAE.shape
    W = len(kernel_WE)
    margin = (W - 1) * dilation
    padded_BAE = jnp.pad(g_BAE, ((0, 0), (margin, margin), (0, 0)))
    dx_BAE = depthwise(padded_BAE, kernel_WE[::-1], dilation)
    # One tap at a time, each a product with ones: as W fused reductions XLA's CPU code is five times slower.
    ones = jnp.ones((1, B * A), g_BAE.dtype)

    def tap(w):
        x_w_BAE = jax.lax.dynamic_slice_in_dim(x_BAE, w * dilation, A, axis=1)
        return (ones @ (x_w_BAE * g_BAE).reshape(B * A, E))[0]

    return dx_BAE, jax.lax.map(tap, jnp.arange(W))


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _weights(module, shape_WIO, gain_dim):
    """The folded kernel and the bias. gain_dim: 2 per output channel, 1 per input channel (transposed)."""
    kernel_WIO = module.param("kernel", nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"), shape_WIO)
    dims = tuple(d for d in range(3) if d != gain_dim)
    norm_WIO = jnp.sqrt(jnp.sum(jnp.square(kernel_WIO), dims, keepdims=True))
    gain_E = module.param("gain", lambda _: norm_WIO.reshape(-1))
    bias_E = module.param("bias", nn.initializers.zeros, (shape_WIO[2],))
    return kernel_WIO * (gain_E.reshape(norm_WIO.shape) / norm_WIO), bias_E


def _with_left(x_BAE, left_BAE, size):
    """x with its left context in front (zeros if None), and the context of what follows x."""
    if left_BAE is None:
        left_BAE = jnp.zeros((x_BAE.shape[0], size, x_BAE.shape[2]), x_BAE.dtype)
    x_BAE = jnp.concatenate([left_BAE, x_BAE], axis=1)
    return x_BAE, x_BAE[:, x_BAE.shape[1] - size :]


def _channels(v_E):
    return v_E[None, None, :]
