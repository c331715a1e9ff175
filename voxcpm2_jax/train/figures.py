"""Pictures of sound that a training logs."""

import numpy as np

from voxcpm2_jax.vae import losses


def spectrogram(audio_A: np.ndarray, hz: int) -> np.ndarray:
    """Log-mel spectrogram as a grey picture, low frequencies at the bottom: uint8 [80 x 2, frames x 2, 1]."""
    log_mel_TE = np.asarray(losses.log_mel(audio_A[None], hz, window=1024, bins=80)[0])
    grey = np.clip(255 * (log_mel_TE + 5.0) / 5.0, 0, 255).astype(np.uint8).T[::-1]
    return np.repeat(np.repeat(grey, 2, axis=0), 2, axis=1)[:, :, None]
