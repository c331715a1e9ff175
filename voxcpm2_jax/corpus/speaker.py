"""Voices: embeddings of who speaks, and which clips may be a clip's reference.

    clip -> stretches of 1.6 s, one every 0.77 s -> mel powers -> three LSTM layers -> their mean, of unit length
    all clips of one dataset, speaker and session, in the order of recording -> k references of each, drawn by chance

A reference is another clip of the speaker and session whose embedding has a cosine over a threshold: never the clip
directly before, which would teach the model to go on instead of to clone, and never the same or overlapping audio.

The encoder is GE2E (arXiv 1710.10467) with the weights that the package resemblyzer (Apache-2.0) carries. The package
itself is not imported: it wants a C extension for dropping pauses, which this leaves in; all else is the same (a test holds
the two together).
"""

import bisect
import functools
import hashlib
import importlib.util
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from voxcpm2_jax.config.corpus import PairsConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data import audio


class Encoder(Protocol):
    """What embeds voices."""

    hz: int  # rate it hears
    sha256: str  # of its weights

    def __call__(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings [N, D] of N clips, float32 [A] at `hz` each; their cosine says how much two voices are alike."""


def load_encoder(name: str) -> Encoder:
    """The encoder of a config: "resemblyzer", or what "module:name" makes when it is called without arguments.

    Raises:
        UserError: not installed, or not an encoder.
    """
    if name == "resemblyzer":
        return Resemblyzer()
    module, _, attribute = name.partition(":")
    try:
        encoder = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"pairs.encoder {name}: {error}; expected MODULE:NAME with MODULE on PYTHONPATH") from None
    if not (callable(encoder) and hasattr(encoder, "hz") and hasattr(encoder, "sha256")):
        raise UserError(f"pairs.encoder {name}: makes {encoder!r}; expected an encoder (data/speaker.py, Encoder)")
    return encoder


def embed(encoder: Encoder, clips: Sequence[np.ndarray], rate: int) -> np.ndarray:
    """Embeddings of clips at `rate`, of unit length, float32 [N, D].

    Raises:
        UserError: the encoder gives something else.
    """
    embeddings_ND = np.asarray(encoder([audio.resample(audio_A, rate, encoder.hz) for audio_A in clips]), np.float32)
    if embeddings_ND.ndim != 2 or len(embeddings_ND) != len(clips) or not np.isfinite(embeddings_ND).all():
        raise UserError(
            f"the speaker encoder gives {embeddings_ND.shape} for {len(clips)} clips; expected one row of finite numbers a clip"
        )
    return embeddings_ND / np.maximum(np.linalg.norm(embeddings_ND, axis=1, keepdims=True), 1e-6)


# ---- GE2E ------------------------------------------------------------------------------------------------------------

_HOP, _WINDOW, _MELS = 160, 400, 40  # 10 and 25 ms
_FRAMES, _STEP = 160, 77  # of a stretch; from one to the next
_STRETCH = (_FRAMES - 1) * _HOP + _WINDOW  # samples
_LOUDNESS = 10 ** (-30 / 20)  # RMS that quieter clips are raised to
_BATCH = 64  # stretches at once


class Resemblyzer:
    """GE2E as the package resemblyzer has it, on the device that JAX uses."""

    hz = 16000

    def __init__(self):
        for package in ("resemblyzer", "torch"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"pairs.encoder resemblyzer needs {package}: pip install 'voxcpm2-jax[speaker]' (without a C compiler: "
                    "pip install torch, then pip install --no-deps resemblyzer)"
                )
        import torch

        file = pathlib.Path(importlib.util.find_spec("resemblyzer").origin).with_name("pretrained.pt")
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        state = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
        weights = {name: value.numpy() for name, value in state.items()}
        layers = [
            {
                "input": weights[f"lstm.weight_ih_l{i}"].T,
                "hidden": weights[f"lstm.weight_hh_l{i}"].T,
                "bias": weights[f"lstm.bias_ih_l{i}"] + weights[f"lstm.bias_hh_l{i}"],
            }
            for i in range(3)
        ]
        mel_EF = audio.mel_filters(self.hz, _WINDOW, _MELS).T
        params = {"mel": mel_EF, "lstm": layers, "out": weights["linear.weight"].T, "bias": weights["linear.bias"]}
        self._embed = functools.partial(_embed_stretches, jax.tree.map(jnp.asarray, params))

    def __call__(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        stretches = ((i, stretch_A) for i, audio_A in enumerate(clips) for stretch_A in _stretches(audio_A))
        sums_ND = np.zeros((len(clips), 256), np.float32)
        while chosen := list(itertools.islice(stretches, _BATCH)):
            audio_BA = np.zeros((_BATCH, _STRETCH), np.float32)
            for b, (_, stretch_A) in enumerate(chosen):
                audio_BA[b] = stretch_A
            embeddings_BD = np.asarray(self._embed(audio_BA))
            np.add.at(sums_ND, [i for i, _ in chosen], embeddings_BD[: len(chosen)])
        return sums_ND / np.maximum(np.linalg.norm(sums_ND, axis=1, keepdims=True), 1e-6)


def _stretches(audio_A: np.ndarray) -> Iterator[np.ndarray]:
    """A clip as the overlapping stretches that are embedded, zeros behind its end."""
    audio_A = audio_A * max(1.0, _LOUDNESS / math.sqrt(np.mean(audio_A.astype(np.float64) ** 2)))
    num_frames = math.ceil((len(audio_A) + 1) / _HOP)
    starts = range(0, max(1, num_frames - _FRAMES + _STEP + 1), _STEP)
    if len(starts) > 1 and len(audio_A) - starts[-1] * _HOP < 0.75 * _FRAMES * _HOP:
        starts = starts[:-1]  # most of it would be zeros
    end = starts[-1] * _HOP + _STRETCH - _WINDOW // 2
    audio_A = np.pad(audio_A, (_WINDOW // 2, max(0, end - len(audio_A))))
    for start in starts:
        yield audio_A[start * _HOP : start * _HOP + _STRETCH]


@jax.jit
def _embed_stretches(params, audio_BA):
    with jax.default_matmul_precision("float32"):
        at_TW = _HOP * np.arange(_FRAMES)[:, None] + np.arange(_WINDOW)
        hann_W = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
        spectrum_BTE = jnp.fft.rfft(audio_BA[:, at_TW] * jnp.asarray(hann_W, jnp.float32)[None, None])
        x_BTD = (jnp.square(spectrum_BTE.real) + jnp.square(spectrum_BTE.imag)) @ params["mel"]
        for layer in params["lstm"]:
            x_BTD = _lstm(layer, x_BTD)
        x_BD = jax.nn.relu(x_BTD[:, -1] @ params["out"] + params["bias"][None])
        return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=1, keepdims=True), 1e-6)


def _lstm(layer, x_BTD):
    inputs_TBD = jnp.swapaxes(x_BTD @ layer["input"] + layer["bias"][None, None], 0, 1)

    def step(state, input_BD):
        hidden_BD, cell_BD = state
        gates = jnp.split(input_BD + hidden_BD @ layer["hidden"], 4, axis=1)
        let_in, keep, let_out = (jax.nn.sigmoid(gates[i]) for i in (0, 1, 3))
        cell_BD = keep * cell_BD + let_in * jnp.tanh(gates[2])
        hidden_BD = let_out * jnp.tanh(cell_BD)
        return (hidden_BD, cell_BD), hidden_BD

    nothing_BD = jnp.zeros((x_BTD.shape[0], layer["hidden"].shape[0]), jnp.float32)
    return jnp.swapaxes(jax.lax.scan(step, (nothing_BD, nothing_BD), inputs_TBD)[1], 0, 1)


# ---- pairs -----------------------------------------------------------------------------------------------------------

ORIGIN = np.dtype([("voice", "u8"), ("file", "u8"), ("start_sec", "f4"), ("end_sec", "f4"), ("has_session", "?")])
"""Where a clip comes from: dataset, speaker and session (0: it has no part in pairs); audio file; which part of it."""

_POOL = 256  # candidates that each clip of a large voice is compared with
_AT_ONCE = 1 << 20  # embeddings of a reading: 0.5 GB, of which two are in memory; a voice of more is taken in stretches


def origin(file: str, start_sec: float | None, end_sec: float | None, voice: Sequence[str | None] | None) -> tuple:
    """One clip's ORIGIN.

    Args:
        voice: dataset, speaker, session; None: the clip has no part in pairs.
    """
    named = 0 if voice is None else _number("\0".join(name or "" for name in voice))
    has_session = bool(voice and voice[2])
    return named, _number(file), start_sec or 0.0, math.inf if end_sec is None else end_sec, has_session


def _number(name: str) -> int:
    """64 bits that stand for a name: among 10^7 names, two are mistaken for one with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def choose(
    origins_N: np.ndarray, sec_N: np.ndarray, sizes: Sequence[int], read: Callable[[int], np.ndarray], config: PairsConfig
) -> np.ndarray:
    """References of every clip: clip numbers, int32 [N, k], -1 behind the last.

    A voice of few clips is compared with itself whole; each clip of a larger one with as many others, drawn by chance.

    Args:
        origins_N: ORIGIN of all clips.   sec_N: their lengths.
        sizes: embeddings of each shard.   read: shard number -> them, [E, D], in the order of the clips.
    """
    pairs_NK = np.full((len(origins_N), config.references), -1, np.int32)
    clip_E = np.flatnonzero(origins_N["voice"])
    assert len(clip_E) == sum(sizes), (len(clip_E), sizes)
    chosen_E = np.flatnonzero(origins_N["has_session"][clip_E]) if config.need_session else np.arange(len(clip_E))
    if not len(chosen_E):
        return pairs_NK
    origins_E = origins_N[clip_E[chosen_E]]
    # The order of recording: files as they come in the manifest, in them by time.
    _, first, number_E = np.unique(origins_E["file"], return_index=True, return_inverse=True)
    order = np.lexsort((origins_E["start_sec"], first[number_E], origins_E["voice"]))
    del first, number_E
    origins_E, chosen_E = origins_E[order], chosen_E[order]
    clips_E = clip_E[chosen_E]
    sec_E = sec_N[clips_E]
    may_E = (sec_E >= config.min_sec) & (sec_E <= config.max_sec)
    cuts = np.flatnonzero(np.diff(origins_E["voice"], prepend=0, append=0))  # a voice is never 0
    cuts = [cut for start, end in itertools.pairwise(cuts.tolist()) for cut in range(start, end, _AT_ONCE)] + [len(clips_E)]
    voices = track(
        _voices(cuts, chosen_E, sizes, read), "choosing references", total=len(cuts) - 1,
        console=Console(stderr=True), disable=not sys.stderr.isatty(),
    )  # fmt: skip
    for part, embeddings_ED in voices:
        rng = np.random.default_rng((config.seed, int(clips_E[part][0])))
        found_EK = _choose_in_voice(origins_E[part], embeddings_ED, np.flatnonzero(may_E[part]), rng, config)
        pairs_NK[clips_E[part]] = np.where(found_EK < 0, -1, clips_E[part][found_EK])
    return pairs_NK


def _voices(cuts: list[int], chosen_E: np.ndarray, sizes: Sequence[int], read) -> Iterator[tuple[slice, np.ndarray]]:
    """Stretches cuts[i] .. cuts[i + 1] - 1 of the chosen embeddings, with these, as many at once as memory may hold."""
    ends = np.cumsum([0, *sizes])
    i = 0
    while i < len(cuts) - 1:
        last = max(i + 1, bisect.bisect_right(cuts, cuts[i] + _AT_ONCE) - 1)
        wanted_E = chosen_E[cuts[i] : cuts[last]]
        order = np.argsort(wanted_E)
        bounds = np.searchsorted(wanted_E, ends, sorter=order)
        embeddings_ED = None
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            rows = order[bounds[shard] : bounds[shard + 1]]
            of_shard_ED = read(shard)
            assert len(of_shard_ED) == sizes[shard], (shard, len(of_shard_ED), sizes[shard])
            if embeddings_ED is None:
                embeddings_ED = np.empty((len(wanted_E), of_shard_ED.shape[1]), of_shard_ED.dtype)
            embeddings_ED[rows] = of_shard_ED[wanted_E[rows] - ends[shard]]
        for start, end in itertools.pairwise(cuts[i : last + 1]):
            yield slice(start, end), embeddings_ED[start - cuts[i] : end - cuts[i]]
        i = last


def _choose_in_voice(origins_E, embeddings_ED, may_F, rng, config: PairsConfig) -> np.ndarray:
    """References of one voice's clips, by number among them [E, k], -1 behind the last.

    Args:
        origins_E: in the order of recording.   may_F: clips that may be references.
    """
    file_E, start_E, end_E = (origins_E[name] for name in ("file", "start_sec", "end_sec"))
    # Clips that are the same part of a file have one place in the order of recording.
    is_new_E = (np.diff(file_E, prepend=file_E[:1]) != 0) | (np.diff(start_E, prepend=start_E[:1]) != 0)
    place_E = np.cumsum(is_new_E)
    found_EK = np.full((len(file_E), config.references), -1, np.int64)
    may_F = rng.permutation(may_F)
    for first in range(0, len(file_E) if len(may_F) else 0, _POOL):
        of = slice(first, first + _POOL)
        pool_F = may_F[(first + np.arange(min(_POOL, len(may_F)))) % len(may_F)]  # so that all get their turn
        cosine_EF = embeddings_ED[of].astype(np.float32) @ embeddings_ED[pool_F].astype(np.float32).T
        after_EF = place_E[of, None] - place_E[pool_F][None]  # 0: itself, 1: directly after the candidate
        overlaps_EF = file_E[of, None] == file_E[pool_F][None]
        overlaps_EF &= (start_E[of, None] < end_E[pool_F][None]) & (start_E[pool_F][None] < end_E[of, None])
        fits_EF = (cosine_EF > config.min_cosine) & (after_EF != 0) & (after_EF != 1) & ~overlaps_EF
        chance_EF = np.where(fits_EF, rng.random(fits_EF.shape, np.float32), 2.0)
        picks_EK = np.argsort(chance_EF, axis=1)[:, : config.references]
        fits_EK = np.take_along_axis(fits_EF, picks_EK, axis=1)
        found_EK[of, : picks_EK.shape[1]] = np.where(fits_EK, pool_F[picks_EK], -1)
    return found_EK
