"""Training of the codec: state, one update, batches of crops, and the run that `voxcpm2-jax train-vae` starts.

    crop at the encoder's rate -> posterior -> mu + exp(logvar / 2) noise -> decode -> losses against the same crop at the
    decoder's rate

Update i reads `Crops.batch(seed, i)` and draws its noise from `fold_in(key(seed), i)` at global shape. The decoder is
trained with its own rate as the listener's; other buckets of a rate-conditioned codec keep what they began with.
There is no discriminator yet: mel and spectrum distances alone give intelligible, somewhat metallic speech.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from voxcpm2_jax import optim
from voxcpm2_jax.config import UserError, VAERun
from voxcpm2_jax.vae import autoencoder, losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes. `step` counts finished updates; `ema` is None without averaged weights."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def init_state(config: VAERun, key=None) -> TrainState:
    """A fresh state; the key is the run's seed unless given."""
    params = autoencoder.init(jax.random.key(config.seed) if key is None else key, config.vae)
    opt_state = optim.make(config.optim, config.num_steps).init(params)
    ema = None if config.optim.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


def objective(params, config: VAERun, batch: dict, key):
    """The weighted loss of a batch -> (scalar, metrics)."""
    vae, weights = config.vae, config.loss
    mu_BTC, logvar_BTC = autoencoder.posterior(params, vae, batch["input_BA"], use_remat=config.remat)
    logvar_BTC = jnp.clip(logvar_BTC, -20.0, 4.0)  # exp must not overflow in a bad step
    latents_BTC = mu_BTC + jnp.exp(0.5 * logvar_BTC) * jax.random.normal(key, mu_BTC.shape)
    audio_BA = autoencoder.reconstruct(params, vae, latents_BTC, vae.out_sample_rate, use_remat=config.remat)
    mel = losses.mel_distance(audio_BA, batch["target_BA"], vae.out_sample_rate)
    spectrum = losses.spectrum_distance(audio_BA, batch["target_BA"], vae.out_sample_rate)
    kl = losses.kl_divergence(mu_BTC, logvar_BTC)
    metrics = {
        "loss_mel": mel,
        "loss_spectrum": spectrum,
        "loss_kl": kl,
        "latent_std": jnp.std(mu_BTC),
        "posterior_std": jnp.mean(jnp.exp(0.5 * logvar_BTC)),
    }
    return weights.mel * mel + weights.spectrum * spectrum + weights.kl * kl, metrics


def train_step(state: TrainState, batch: dict, *, config: VAERun) -> tuple[TrainState, dict]:
    """One update -> (state, metrics).

    Args:
        batch: `input_BA` at the encoder's rate and `target_BA` at the decoder's, the same whole hops of sound.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params, config, batch, key)
    updates, opt_state = optim.make(config.optim, config.num_steps).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else optim.ema_update(state.ema, params, config.optim.ema_decay)
    seconds = batch["target_BA"].size / config.vae.out_sample_rate
    metrics |= {
        "loss": loss,
        "grad_norm": optax.global_norm(grads),
        "learning_rate": optim.schedule(config.optim, config.num_steps)(state.step),
        "audio_sec": jnp.float32(seconds),
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics


class Crops:
    """Random crops of waveforms, each heard at both rates of the codec.

    Args:
        inputs, targets: the same clips at the encoder's and at the decoder's rate, float32 [A] each.
    """

    def __init__(self, config: VAERun, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]):
        vae = config.vae
        divisor = math.gcd(vae.sample_rate, vae.out_sample_rate)
        # A crop starts at a whole number of units, the shortest time that is whole samples at both rates.
        self._units = (vae.sample_rate // divisor, vae.out_sample_rate // divisor)
        self._sizes = (config.crop_frames * vae.encoder_hop, config.crop_frames * vae.decoder_hop)
        self._clips = list(zip(inputs, targets, strict=True))
        self._rows = config.rows
        if not self._clips:
            raise UserError("the codec needs at least one clip to train on, got none")
        seconds = np.array([len(x) for x, _ in self._clips], np.float64)
        self._share = np.cumsum(seconds) / seconds.sum()  # every second of sound is equally likely

    def batch(self, seed: int, step: int) -> dict[str, np.ndarray]:
        """`input_BA` and `target_BA` of update `step`: a function of its arguments alone."""
        draw = np.random.default_rng((seed, step))
        batch = [np.zeros((self._rows, size), np.float32) for size in self._sizes]
        for row, clip in enumerate(np.searchsorted(self._share, draw.random(self._rows), side="right")):
            spare = (len(self._clips[clip][0]) - self._sizes[0]) // self._units[0]
            # A clip shorter than the crop stands somewhere within it, silence around it.
            start = int(draw.integers(min(spare, 0), max(spare, 0) + 1))
            for x_BA, wave_A, unit in zip(batch, self._clips[clip], self._units):
                part_A = wave_A[max(start, 0) * unit :][: x_BA.shape[1] + min(start, 0) * unit]
                x_BA[row, max(-start, 0) * unit :][: len(part_A)] = part_A
        return {"input_BA": batch[0], "target_BA": batch[1]}

    def batches_from(self, seed: int, step: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches of updates `step`, `step + 1`, .."""
        while True:
            yield self.batch(seed, step)
            step += 1


def tiny_clips(config: VAERun, *, num_clips: int = 16, sec: float = 1.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Seeded harmonic glides at both rates: sound enough for a run that needs no data."""
    draw = np.random.default_rng(config.seed)
    clips: tuple[list, list] = ([], [])
    for _ in range(num_clips):
        low, high, phase = draw.uniform(90, 250), draw.uniform(90, 250), draw.uniform(0, 6, 8)
        for waves, hz in zip(clips, (config.vae.sample_rate, config.vae.out_sample_rate)):
            t_A = np.arange(round(sec * hz)) / hz
            angle_A = 2 * np.pi * (low * t_A + (high - low) * t_A**2 / (2 * sec))
            wave_A = sum(np.sin(k * angle_A + phase[k - 1]) / k for k in range(1, 9))
            waves.append((0.15 * wave_A * np.sin(np.pi * t_A / sec) ** 0.5).astype(np.float32))
    return clips


def load_clips(manifest: pathlib.Path, config: VAERun) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every clip of a manifest at both rates, in memory."""
    from voxcpm2_jax.data import audio, corpus

    inputs, targets = [], []
    for recording in corpus.read_manifest(manifest):
        target_A = audio.load(recording.audio, config.vae.out_sample_rate, recording.start_sec, recording.end_sec)
        targets.append(target_A)
        inputs.append(audio.resample(target_A, config.vae.out_sample_rate, config.vae.sample_rate))
    return inputs, targets
