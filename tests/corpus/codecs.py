"""A small codec with random weights whose latents have about unit scale, as those of a trained one."""

import jax
import numpy as np

from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.vae import autoencoder

VAE = AudioVAEConfig(
    encoder_dim=2, encoder_rates=(8, 8), latent_dim=3, decoder_dim=8, decoder_rates=(24, 8), sample_rate=8000,
    out_sample_rate=24000,
)  # fmt: skip


def random_params(scale: float = 0.04):
    """Parameters of VAE; `scale` multiplies the latents."""
    shapes = jax.eval_shape(lambda key: autoencoder.init(key, VAE), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.5, 0.5, leaf.shape).astype(np.float32), shapes)
    mu = params["encoder"]["mu"]
    mu["gain"], mu["bias"] = np.float32(scale) * mu["gain"], np.float32(scale) * mu["bias"]
    return params
