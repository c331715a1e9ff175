"""The losses of the codec: log-mel distance, distance of compressed complex spectra, KL divergence; there is no discriminator.

    mel        mean |log10 mel(x) - log10 mel(y)| over seven STFT windows, magnitudes clamped at 1e-5
    spectrum   mean |X |X|^-0.7 - Y |Y|^-0.7| over three STFT windows: magnitudes to the power 0.3, phases as they are
    kl         KL(N(mu, exp(logvar)) || N(0, 1)), mean over channels and frames

The mel term, with its settings, is that of DAC (descript-audio-codec). DAC's windows of 32 .. 2048 samples are meant for
44.1 kHz; at another rate they are multiplied by a power of two, so that they last about as long. The spectrum term uses three
of these windows, so both terms share their transforms. The mel term ignores phase; the spectrum term aligns the low harmonics.

Sources: DAC, arXiv 2306.06546, and its published configuration (no linear-magnitude term, hop = window / 4); compressed
spectra: "Phase-aware speech enhancement" (Lee et al.), with the usual exponent of 0.3.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np

_DAC_HZ = 44100
_DAC_MELS = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 160, 2048: 320}  # window in samples: bins
_CLAMP = 1e-5
_SPECTRUM_WINDOWS = (256, 1024, 2048)  # samples at DAC's rate
_COMPRESSION = 0.3
_FLOOR = 1e-2  # added to magnitudes before they are compressed: otherwise near-silence would get most of the gradient


def mel_distance(audio_BA, target_BA, hz: int):
    """Multi-scale log-mel distance, mean over the scales."""
    distances = []
    for dac_window, bins in _DAC_MELS.items():
        mel_BTE, target_mel_BTE = (log_mel(x_BA, hz, _window(dac_window, hz), bins) for x_BA in (audio_BA, target_BA))
        distances.append(jnp.mean(jnp.abs(mel_BTE - target_mel_BTE)))
    return sum(distances) / len(distances)


def spectrum_distance(audio_BA, target_BA, hz: int):
    """Mean absolute distance of compressed complex spectra, mean over the windows."""
    distances = []
    for dac_window in _SPECTRUM_WINDOWS:
        x, y = (spectrum(audio, _window(dac_window, hz)) for audio in (audio_BA, target_BA))
        x, y = (jnp.stack([z.real, z.imag]) * (_magnitude(z) + _FLOOR)[None] ** (_COMPRESSION - 1) for z in (x, y))
        distances.append(jnp.mean(jnp.abs(x - y)))
    return sum(distances) / len(distances)


def kl_divergence(mu_BTC, logvar_BTC):
    """From the posterior to a unit normal, nats, mean over rows, frames and channels."""
    return 0.5 * jnp.mean(jnp.square(mu_BTC) + jnp.exp(logvar_BTC) - 1.0 - logvar_BTC)


def log_mel(audio_BA, hz: int, window: int, bins: int):
    """log10 of the mel magnitudes, [B, T, bins]."""
    magnitude_BTE = _magnitude(spectrum(audio_BA, window))
    return jnp.log10(jnp.maximum(magnitude_BTE @ mel_filters(hz, window, bins), _CLAMP))


def spectrum(audio_BA, window: int):
    """Short-time Fourier transform, Hann window, hop window / 4, reflected ends: complex [B, T, window / 2 + 1]."""
    assert window % 4 == 0, window
    hop = window // 4
    B, A = audio_BA.shape
    num_frames = A // hop + 1
    audio_BA = jnp.pad(audio_BA, ((0, 0), (window // 2, window // 2)), mode="reflect")[:, : (num_frames + 3) * hop]
    hops_BTE = audio_BA.reshape(B, num_frames + 3, hop)
    frames_BTE = jnp.concatenate([hops_BTE[:, i : i + num_frames] for i in range(4)], axis=2)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return jnp.fft.rfft(frames_BTE * jnp.asarray(hann, jnp.float32)[None, None])


def _window(dac_window: int, hz: int) -> int:
    """The power of two that lasts about as long at `hz` as a DAC window at its own rate, in samples."""
    return max(8, int(dac_window * 2.0 ** round(math.log2(hz / _DAC_HZ))))


def _magnitude(z):
    """|z|, with a gradient at zero."""
    return jnp.sqrt(jnp.square(z.real) + jnp.square(z.imag) + 1e-12)


@functools.lru_cache
def mel_filters(hz: int, window: int, bins: int) -> np.ndarray:
    """Triangles of equal area on Slaney's mel scale from 0 to hz / 2, float32 [window / 2 + 1, bins]."""
    # Linear to 1 kHz (15 mels), then logarithmic: 27 mels for a factor of 6.4.
    log_step = math.log(6.4) / 27
    to_mel = hz / 2 * 3 / 200 if hz <= 2000 else 15 + math.log(hz / 2000) / log_step
    mels = np.linspace(0, to_mel, bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(log_step * (mels - 15)))
    lines = np.linspace(0, hz / 2, window // 2 + 1)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.maximum(0, np.minimum((lines - low) / (centre - low), (high - lines) / (high - centre)))
    return (triangles * 2 / (high - low)).astype(np.float32)
