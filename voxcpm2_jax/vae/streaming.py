"""The codec over one signal of any length, a few seconds at a time.

    signal -> chunks of CHUNK_FRAMES; the last one padded with zeros -> encode_step or decode_step, with the state between
           -> joined, the padding's result cut off

The codec is causal, so the result is that of the whole signal at once, up to rounding. Beside the signal itself, memory does
not depend on its length. For the CPU, XLA reports 180 MB of temporaries in `decode_step` of the release, which are the weights
with their gains multiplied in, and 85 MB per second of audio in the chunk (`compile().memory_analysis()`, jax 0.10.2).
"""

from functools import partial

import jax
import numpy as np

from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.vae import autoencoder

CHUNK_FRAMES = 128  # 5.12 s in the release
_LEAST_FRAMES = 32  # a chunk has 32, 64 or 128 frames, so that few programs are compiled

encode_step = partial(jax.jit, static_argnums=1)(autoencoder.encode_step)
decode_step = partial(jax.jit, static_argnums=1)(autoencoder.decode_step)


def encode(vae_params, vae_config: AudioVAEConfig, audio_A: np.ndarray) -> np.ndarray:
    """Latents [T, C] of audio at the encoder's rate, which is padded right with zeros to whole hops."""
    hop = vae_config.encoder_hop
    hops_TA = np.pad(audio_A, (0, -len(audio_A) % hop)).reshape(-1, hop)

    def step(hops_TA, state):
        return encode_step(vae_params, vae_config, hops_TA.reshape(1, -1), state)

    latents_TC = np.empty((len(hops_TA), vae_config.latent_dim), np.float32)
    return _in_chunks(step, hops_TA, autoencoder.encode_state(vae_config, 1), latents_TC)


def decode(vae_params, vae_config: AudioVAEConfig, latents_TC: np.ndarray, target_hz: int) -> np.ndarray:
    """Audio [T x decoder_hop] at the decoder's rate; `target_hz` as in `autoencoder.decode`."""

    def step(latents_TC, state):
        return decode_step(vae_params, vae_config, latents_TC[None], state, target_hz)

    audio_TA = np.empty((len(latents_TC), vae_config.decoder_hop), np.float32)
    return _in_chunks(step, latents_TC, autoencoder.decode_state(vae_config, 1), audio_TA).reshape(-1)


def _in_chunks(step, frames_TX: np.ndarray, state, result_TY: np.ndarray) -> np.ndarray:
    """Fills the result frame by frame."""
    for start in range(0, len(frames_TX), CHUNK_FRAMES):
        chunk_TX = frames_TX[start : start + CHUNK_FRAMES]
        T = len(chunk_TX)
        padded = max(_LEAST_FRAMES, 1 << (T - 1).bit_length())
        y, state = step(np.pad(chunk_TX, ((0, padded - T), (0, 0))), state)
        result_TY[start : start + T] = np.asarray(y).reshape(padded, -1)[:T]
    return result_TY
