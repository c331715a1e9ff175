"""Training of the codec: one update, batches of crops, and what `voxcpm2-jax train-vae` runs.

    crop at the encoder's rate -> posterior -> mu + exp(logvar / 2) noise -> decode -> losses against the same crop at the
    decoder's rate

Update i reads `Crops.batch(seed, i)` and draws its noise from `fold_in(key(seed), i)` at global shape. The decoder is
trained only for its own output rate: the scales and biases of other target rates keep their initial values. All clips are held
in memory. There is no discriminator yet: spectral losses alone give intelligible, metallic speech.
"""

import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from voxcpm2_jax import metrics, sharding
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import CHANGES, VAERun
from voxcpm2_jax.corpus import manifest, sources
from voxcpm2_jax.data import audio
from voxcpm2_jax.train import guard, loop
from voxcpm2_jax.train.figures import spectrogram
from voxcpm2_jax.train.start import Start
from voxcpm2_jax.train.state import TrainState, apply_update, fresh_state
from voxcpm2_jax.vae import autoencoder, losses


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


class Crops:
    """Random crops of waveforms, each at both rates of the codec.

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


def load_clips(recordings: Sequence[manifest.Recording], config: VAERun) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every recording at the encoder's and at the decoder's rate, in memory."""
    inputs, targets = [], []
    for r in recordings:
        target_A = audio.load(r.audio, config.vae.out_sample_rate, r.start_sec, r.end_sec)
        targets.append(target_A)
        inputs.append(audio.resample(target_A, config.vae.out_sample_rate, config.vae.sample_rate))
    return inputs, targets


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(config: VAERun, workdir, data=None, *, resume_from=None, accept_changes: bool = False) -> dict:
    """Trains in `workdir`, and resumes there if it holds a checkpoint -> figures from the last row of metrics.jsonl.

    Args:
        data: a corpus (`sources.open_corpus`), or a directory with train.jsonl; clips of a heldout.jsonl beside it are
            reconstructed as samples. None: synthetic glides.
        resume_from, accept_changes: as in pretrain.py.
    Raises:
        UserError: recordings that cannot be used, rows that cannot be split over the devices, or what `start.begin` refuses.
    """
    if data is None:
        clips = tiny_clips(config)
        samples = [wave_A for wave_A, _ in zip(clips[0], range(config.num_samples))]
    else:
        recordings, heldout = _recordings(data)
        clips = load_clips(recordings, config)
        samples = load_clips(heldout[: config.num_samples], config)[0]
    crops = Crops(config, *clips)
    mesh = sharding.make_mesh()
    if config.rows % mesh.size:
        raise UserError(f"rows {config.rows} cannot be split over {mesh.size} devices")
    with jax.set_mesh(mesh):
        copied = NamedSharding(mesh, PartitionSpec())
        state = jax.jit(partial(init_state, config), out_shardings=copied)()
        origin = Start(resume_from, f"scratch (seed {config.seed})", CHANGES, accept_changes)
        _, row = loop.run(CodecTask(config, crops, mesh, samples), state, workdir, origin=origin)
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
        """Batches over all devices. Every process makes the whole batch, which costs no more than copying it."""
        rows = sharding.local_rows(self._mesh, self.run.rows)
        for step in itertools.count(start):
            batch = self._crops.batch(self.run.seed, step)
            yield sharding.global_batch({name: x_BA[rows] for name, x_BA in batch.items()}, self._mesh, self.run.rows)


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
