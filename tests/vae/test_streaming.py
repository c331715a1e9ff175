"""The codec over long signals: the same result as at once, in memory that does not depend on their length."""

import pathlib
from functools import partial

import jax
import numpy as np
import pytest

from voxcpm2_jax.vae import autoencoder, streaming

CHUNK = 32


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """So that one program is compiled each way."""
    monkeypatch.setattr(streaming, "CHUNK_FRAMES", CHUNK)


@pytest.fixture(scope="module")
def codec(tiny_parts):
    _, _, vae_config, vae_params, _ = tiny_parts
    return vae_params, vae_config


def test_chunks_give_what_one_call_gives(codec):
    """Two chunks and the beginning of a third."""
    at_once = partial(jax.jit, static_argnums=1)
    latents_TC = np.random.default_rng(0).normal(size=(67, 16)).astype(np.float32)
    audio_A = streaming.decode(*codec, latents_TC, 48000)
    np.testing.assert_allclose(audio_A, at_once(autoencoder.decode)(*codec, latents_TC[None], 48000)[0], atol=2e-5)
    np.testing.assert_array_equal(streaming.decode(*codec, latents_TC[:5], 48000), audio_A[: 5 * 1920])
    speech_A = np.random.default_rng(1).normal(size=67 * 640 - 7).astype(np.float32)
    found_TC = streaming.encode(*codec, speech_A)
    np.testing.assert_allclose(found_TC, at_once(autoencoder.encode)(*codec, speech_A[None])[0], rtol=1e-4, atol=2e-5)


def test_memory_does_not_depend_on_the_length(codec):
    """A minute of audio. At once, decoding it takes 330 MB."""
    frames = 1500
    latents_TC, speech_A = np.zeros((frames, 16), np.float32), np.zeros(frames * 640, np.float32)
    for code, one_chunk, whole, size in (
        (partial(streaming.decode, *codec, target_hz=48000), latents_TC[:CHUNK], latents_TC, 4 * 1920 * frames),
        (partial(streaming.encode, *codec), speech_A[: CHUNK * 640], speech_A, 4 * 640 * frames),
    ):
        code(one_chunk)
        assert peak_growth(partial(code, whole)) < 2 * size + 50e6, "the signal, and what a chunk takes"


def peak_growth(function) -> int:
    """By how many bytes the resident memory of this process grows at most while the function runs."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is resident now
    before = resident("VmHWM")
    function()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    (line,) = [x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1]) * 1024
