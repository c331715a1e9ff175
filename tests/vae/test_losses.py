"""The codec's losses: their filters against librosa, what they are blind to and what not, gradients at silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax.vae import losses

pytestmark = pytest.mark.fast

HZ = 24000
mel_distance = jax.jit(losses.mel_distance, static_argnums=2)
spectrum_distance = jax.jit(losses.spectrum_distance, static_argnums=2)


def _tone(hz, phase=0.0, amplitude=0.3):
    return jnp.asarray(amplitude * np.sin(2 * np.pi * hz * np.arange(4800)[None] / HZ + phase), jnp.float32)


@pytest.mark.parametrize(("hz", "window", "bins"), [(48000, 2048, 320), (24000, 1024, 80), (16000, 16, 5)])
def test_mel_filters_are_librosas(hz, window, bins):
    import librosa

    expected = librosa.filters.mel(sr=hz, n_fft=window, n_mels=bins)
    np.testing.assert_allclose(losses.mel_filters(hz, window, bins), expected.T, atol=1e-7)


def test_spectrum_is_a_centred_hann_transform():
    audio_BA = jax.random.normal(jax.random.key(0), (2, 100))
    padded = np.pad(audio_BA, ((0, 0), (8, 8)), mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(16) / 16)
    expected = np.stack([np.fft.rfft(padded[:, 4 * t : 4 * t + 16] * hann) for t in range(26)], axis=1)
    np.testing.assert_allclose(losses.spectrum(audio_BA, 16), expected, atol=1e-5)


def test_distances_are_zero_only_for_the_same_sound():
    for distance in (mel_distance, spectrum_distance):
        assert distance(_tone(440), _tone(440), HZ) == 0
        assert distance(_tone(440), _tone(880), HZ) > 0.01


def test_the_spectrum_term_hears_phase_and_the_mel_term_does_not():
    turned = _tone(440, phase=2.0)
    octave = _tone(880)
    mel = [float(mel_distance(x, _tone(440), HZ)) for x in (turned, octave)]
    spectrum = [float(spectrum_distance(x, _tone(440), HZ)) for x in (turned, octave)]
    assert mel[0] < 0.3 * mel[1] and spectrum[0] > 0.5 * spectrum[1]


def test_windows_last_as_long_at_every_rate():
    assert [losses._window(2048, hz) for hz in (48000, 44100, 24000, 16000)] == [2048, 2048, 1024, 1024]


def test_kl_divergence_is_the_textbooks():
    mu, logvar = jnp.full((1, 2, 3), 0.7), jnp.full((1, 2, 3), -1.2)
    expected = 0.5 * (0.7**2 + np.exp(-1.2) - 1 + 1.2)
    np.testing.assert_allclose(losses.kl_divergence(mu, logvar), expected, rtol=1e-6)
    assert losses.kl_divergence(0 * mu, 0 * logvar) == 0


def test_gradients_are_finite_at_silence():
    silence = jnp.zeros((1, 4800))
    for distance in (losses.mel_distance, losses.spectrum_distance):
        grad = jax.jit(jax.grad(lambda x, y, d=distance: d(x, y, HZ)))
        assert np.isfinite(grad(silence, _tone(440))).all() and np.isfinite(grad(silence, silence)).all()
