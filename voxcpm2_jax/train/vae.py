"""Training of the codec: one update, batches of crops, and what `voxcpm2-jax train-vae` runs.

    crop at the encoder's rate -> posterior -> mu + exp(logvar / 2) noise -> decode -> losses against the same crop at the
    decoder's rate

Update i reads `Crops.batch(seed, i)` (crops.py) and draws its noise from `fold_in(key(seed), i)` at global shape. The decoder
is trained only for its own output rate: the scales and biases of other target rates keep their initial values. There is no
discriminator yet: spectral losses alone give intelligible, metallic speech.
"""

import collections
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from voxcpm2_jax import metrics, sharding
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import CHANGES, VAERun
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.train import guard, loop
from voxcpm2_jax.train.crops import Crops, Waves, open_files, samples
from voxcpm2_jax.train.figures import spectrogram
from voxcpm2_jax.train.start import Start
from voxcpm2_jax.train.state import TrainState, apply_update, fresh_state
from voxcpm2_jax.vae import autoencoder, losses

_AHEAD = 3  # batches that are made before they are needed


def init_state(config: VAERun, key=None) -> TrainState:
    """A fresh state; the key is the run's seed unless given."""
    params = autoencoder.init(jax.random.key(config.seed) if key is None else key, config.vae)
    return fresh_state(config.optim, config.num_steps, params, guard.init(config.guard))


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
    figures = {
        "loss_mel": mel,
        "loss_spectrum": spectrum,
        "loss_kl": kl,
        "latent_std": jnp.std(mu_BTC),
        "posterior_std": jnp.mean(jnp.exp(0.5 * logvar_BTC)),
    }
    return weights.mel * mel + weights.spectrum * spectrum + weights.kl * kl, figures


def train_step(state: TrainState, batch: dict, *, config: VAERun) -> tuple[TrainState, dict]:
    """One update -> (state, metrics).

    Args:
        batch: `input_BA` at the encoder's rate and `target_BA` at the decoder's, the same whole hops of sound.
    """
    before = state
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    (loss, figures), grads = jax.value_and_grad(objective, has_aux=True)(state.params, config, batch, key)
    state, figures_of_update = apply_update(config.optim, config.num_steps, state, grads)
    seconds = batch["target_BA"].size / config.vae.out_sample_rate
    figures |= {
        "loss": loss,
        "audio_sec": jnp.float32(seconds),
    }
    return guard.judge(config.guard, before, state, figures | figures_of_update)


# ---- data ------------------------------------------------------------------------------------------------------------


def tiny_clips(config: VAERun, *, num_clips: int = 16, sec: float = 1.0) -> Waves:
    """Seeded harmonic glides: sound enough for a run that needs no data."""
    draw = np.random.default_rng(config.seed)
    clips: tuple[list, list] = ([], [])
    for _ in range(num_clips):
        low, high, phase = draw.uniform(90, 250), draw.uniform(90, 250), draw.uniform(0, 6, 8)
        for waves, hz in zip(clips, (config.vae.sample_rate, config.vae.out_sample_rate)):
            t_A = np.arange(round(sec * hz)) / hz
            angle_A = 2 * np.pi * (low * t_A + (high - low) * t_A**2 / (2 * sec))
            wave_A = sum(np.sin(k * angle_A + phase[k - 1]) / k for k in range(1, 9))
            waves.append((0.15 * wave_A * np.sin(np.pi * t_A / sec) ** 0.5).astype(np.float32))
    return Waves(config.vae, *clips)


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(config: VAERun, workdir, data=None, *, resume_from=None, accept_changes: bool = False) -> dict:
    """Trains in `workdir`, and resumes there if it holds a checkpoint -> figures from the last row of metrics.jsonl.

    Args:
        data: a corpus (`sources.open_corpus`), or a directory with train.jsonl; clips of a heldout.jsonl beside it are
            reconstructed as samples. None: synthetic glides.
        resume_from, accept_changes: as in pretrain.py.
    Raises:
        UserError: no recording that can be used, rows that cannot be split over the devices, or what `start.begin` refuses.
    """
    mesh = sharding.make_mesh()
    if config.rows % mesh.size:
        raise UserError(f"rows {config.rows} cannot be split over {mesh.size} devices")
    if data is None:
        clips = tiny_clips(config)
        heard = [clips.read(i, 0, int(clips.units_N[i]))[0] for i in range(min(config.num_samples, len(clips.units_N)))]
    else:
        recordings, heldout = _recordings(data)
        clips = open_files(config.vae, recordings, workdir)
        heard = samples(config.vae, heldout, config.num_samples)
    crops = Crops(config, clips)
    with jax.set_mesh(mesh):
        copied = NamedSharding(mesh, PartitionSpec())
        state = jax.jit(partial(init_state, config), out_shardings=copied)()
        origin = Start(resume_from, f"scratch (seed {config.seed})", CHANGES, accept_changes)
        _, row = loop.run(CodecTask(config, crops, mesh, heard), state, workdir, origin=origin)
    return {name: row.get(name) for name in ("step", "loss", "loss_mel", "loss_kl", "audio_sec_per_sec", "mfu")}


class CodecTask(loop.Task):
    """The codec, for the loop: parameters on every device, rows of a batch over all devices."""

    def __init__(self, config: VAERun, crops: Crops, mesh, samples: Sequence[np.ndarray] = ()):
        self.run, self.record = config, to_dict(config)
        self.evaluators = [_sampler(config, samples)] if samples else []
        self._crops, self._mesh = crops, mesh
        copied = NamedSharding(mesh, PartitionSpec())
        self._program = jax.jit(partial(train_step, config=config), donate_argnums=0, out_shardings=copied)

    def train_step(self, state, batch: dict):
        return self._program(state, batch)

    def batches(self, start: int) -> Iterator[dict]:
        """Batches over all devices, made ahead. Every process reads the crops of its own rows."""
        rows = sharding.local_rows(self._mesh, self.run.rows)
        with ThreadPoolExecutor(1) as ahead:
            waiting = collections.deque()
            for step in itertools.count(start):
                while len(waiting) < _AHEAD:
                    waiting.append(ahead.submit(self._crops.batch, self.run.seed, step + len(waiting), rows))
                yield sharding.global_batch(waiting.popleft().result(), self._mesh, self.run.rows)


def _recordings(data) -> tuple[sources.Corpus, sources.Corpus]:
    """Recordings to train on, and recordings to reconstruct as samples."""
    path = pathlib.Path(data) / "train.jsonl" if pathlib.Path(data).is_dir() else pathlib.Path(data)
    recordings = sources.open_corpus(path if path.is_file() else data)
    heldout = path.with_name("heldout.jsonl")
    return recordings, sources.open_corpus(heldout) if path.is_file() and heldout.is_file() else recordings


def _sampler(config: VAERun, samples: Sequence[np.ndarray]) -> loop.Evaluator:
    """Reconstructs clips with the current weights: audio, and a picture of its mel spectrogram."""
    vae = config.vae
    longest = max(map(len, samples))
    audio_BA = np.stack([np.pad(wave_A, (0, longest - len(wave_A))) for wave_A in samples])
    reconstruct = jax.jit(lambda params: autoencoder.decode(params, vae, autoencoder.encode(params, vae, audio_BA)))

    def run(state: TrainState):
        reconstructed_BA = np.asarray(reconstruct(state.best_params))
        for i, wave_A in enumerate(samples):
            samples_A = reconstructed_BA[i, : len(wave_A) * vae.out_sample_rate // vae.sample_rate]
            yield f"sample_{i}", metrics.Audio(samples_A, vae.out_sample_rate)
            yield f"spectrogram_{i}", metrics.Image(spectrogram(samples_A, vae.out_sample_rate))

    return loop.Evaluator(config.sample_every_steps, run)
