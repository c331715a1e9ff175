"""Speaker embeddings, and the choice of reference clips: clips of the same voice, for the model to clone from.

    clip -> windows of 1.6 s, one every 0.77 s -> mel powers -> three LSTM layers -> mean over the windows, of unit length
    all clips of one voice (dataset, speaker and session), in the order of recording -> k reference clips of each, at random

A reference clip is another clip of the voice, with a cosine of the two embeddings above a threshold. It is never the clip
directly before, which would teach the model to continue instead of to clone, and never the same or overlapping audio.
The order of recording is that of `Recording.order`, of the parts of a file that of time; clips without either count as recorded
in the order of the manifest or set, and the header says how many they are.

The encoder is GE2E (arXiv 1710.10467) with the weights in the package resemblyzer (Apache-2.0). The package itself is not
imported, because it needs a C extension that drops pauses. Here pauses stay; everything else is the same (tested).
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
from voxcpm2_jax.data.identity import hash_name


class Encoder(Protocol):
    """A model that embeds voices."""

    hz: int  # rate of its input
    sha256: str  # of its weights

    def __call__(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings [clips, D] of clips, each float32 [A] at `hz`; a high cosine means similar voices."""


def load_encoder(name: str) -> Encoder:
    """The encoder of a config: "resemblyzer", or what "module:name" returns when it is called without arguments.

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
        raise UserError(f"pairs.encoder {name}: returns {encoder!r}; expected an encoder (corpus/speaker.py, Encoder)")
    return encoder


def embed(encoder: Encoder, clips: Sequence[np.ndarray], rate: int) -> np.ndarray:
    """Embeddings of clips at `rate`, of unit length, float32 [clips, D].

    Raises:
        UserError: the encoder returns something else.
    """
    embeddings = np.asarray(encoder([audio.resample(audio_A, rate, encoder.hz) for audio_A in clips]), np.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(clips) or not np.isfinite(embeddings).all():
        raise UserError(
            f"the speaker encoder returns {embeddings.shape} for {len(clips)} clips; expected a row of finite numbers for each"
        )
    return _unit_length(embeddings)


def _unit_length(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-6)


# ---- GE2E ------------------------------------------------------------------------------------------------------------

_HOP, _FRAME_SAMPLES, _MELS = 160, 400, 40  # 10 and 25 ms
_FRAMES, _STEP = 160, 77  # mel frames of a window; from one window to the next
_WINDOW_SAMPLES = (_FRAMES - 1) * _HOP + _FRAME_SAMPLES
_LOUDNESS = 10 ** (-30 / 20)  # RMS that quieter clips are raised to
_BATCH = 64  # windows at once


class Resemblyzer:
    """The GE2E encoder of the package resemblyzer, on the device that JAX uses."""

    hz = 16000

    def __init__(self):
        for package in ("resemblyzer", "torch"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"pairs.encoder resemblyzer needs {package}: pip install 'voxcpm2-jax[speaker]' (without a C compiler: "
                    "pip install torch, then pip install --no-deps resemblyzer)"
                )
        import librosa  # takes seconds
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
        mel = librosa.filters.mel(sr=self.hz, n_fft=_FRAME_SAMPLES, n_mels=_MELS).T
        params = {"mel": mel, "lstm": layers, "out": weights["linear.weight"].T, "bias": weights["linear.bias"]}
        self._embed = functools.partial(_embed_windows, jax.tree.map(jnp.asarray, params))

    def __call__(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        windows = ((i, window_A) for i, audio_A in enumerate(clips) for window_A in _windows(audio_A))
        sums = np.zeros((len(clips), 256), np.float32)
        while chosen := list(itertools.islice(windows, _BATCH)):
            audio_BA = np.zeros((_BATCH, _WINDOW_SAMPLES), np.float32)
            for b, (_, window_A) in enumerate(chosen):
                audio_BA[b] = window_A
            embeddings_BD = np.asarray(self._embed(audio_BA))
            np.add.at(sums, [i for i, _ in chosen], embeddings_BD[: len(chosen)])
        return _unit_length(sums)


def _windows(audio_A: np.ndarray) -> Iterator[np.ndarray]:
    """The overlapping windows of a clip, with zeros after its end."""
    audio_A = audio_A * max(1.0, _LOUDNESS / math.sqrt(np.mean(audio_A.astype(np.float64) ** 2)))
    num_frames = math.ceil((len(audio_A) + 1) / _HOP)
    starts = range(0, max(1, num_frames - _FRAMES + _STEP + 1), _STEP)
    if len(starts) > 1 and len(audio_A) - starts[-1] * _HOP < 0.75 * _FRAMES * _HOP:
        starts = starts[:-1]  # much of it would be zeros
    end = starts[-1] * _HOP + _WINDOW_SAMPLES - _FRAME_SAMPLES // 2
    audio_A = np.pad(audio_A, (_FRAME_SAMPLES // 2, max(0, end - len(audio_A))))
    for start in starts:
        yield audio_A[start * _HOP : start * _HOP + _WINDOW_SAMPLES]


@jax.jit
def _embed_windows(params, audio_BA):
    """Embeddings of windows; T is a mel frame here and W a sample of it."""
    with jax.default_matmul_precision("float32"):
        at_TW = _HOP * np.arange(_FRAMES)[:, None] + np.arange(_FRAME_SAMPLES)
        hann_W = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FRAME_SAMPLES) / _FRAME_SAMPLES)
        spectrum = jnp.fft.rfft(audio_BA[:, at_TW] * jnp.asarray(hann_W, jnp.float32)[None, None])
        x_BTD = (jnp.square(spectrum.real) + jnp.square(spectrum.imag)) @ params["mel"]
        for layer in params["lstm"]:
            x_BTD = _lstm(layer, x_BTD)
        x_BD = jax.nn.relu(x_BTD[:, -1] @ params["out"] + params["bias"][None])
        return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=1, keepdims=True), 1e-6)


def _lstm(layer, x_BTD):
    inputs_TBD = jnp.swapaxes(x_BTD @ layer["input"] + layer["bias"][None, None], 0, 1)

    def step(state, input_BD):
        hidden_BD, cell_BD = state
        gates = jnp.split(input_BD + hidden_BD @ layer["hidden"], 4, axis=1)
        input_gate, forget_gate, output_gate = (jax.nn.sigmoid(gates[i]) for i in (0, 1, 3))
        cell_BD = forget_gate * cell_BD + input_gate * jnp.tanh(gates[2])
        hidden_BD = output_gate * jnp.tanh(cell_BD)
        return (hidden_BD, cell_BD), hidden_BD

    zeros_BD = jnp.zeros((x_BTD.shape[0], layer["hidden"].shape[0]), jnp.float32)
    return jnp.swapaxes(jax.lax.scan(step, (zeros_BD, zeros_BD), inputs_TBD)[1], 0, 1)


# ---- pairs -----------------------------------------------------------------------------------------------------------

ORIGIN = np.dtype(
    [
        ("voice", "u8"),  # dataset, speaker and session; 0: the clip takes no part in pairs
        ("file", "u8"),  # the audio file
        ("start_sec", "f4"),  # the part of the file
        ("end_sec", "f4"),
        ("has_session", "?"),
        ("order", "f8"),  # in the order of recording; NaN: not known
    ]
)

_POOL = 256  # candidates that each clip of a large voice is compared with
_MAX_EMBEDDINGS = 1 << 20  # read at once: 0.5 GB, of which two are in memory; a larger voice is split into stretches


def origin(
    file: str, start_sec: float | None, end_sec: float | None, voice: Sequence[str | None] | None, order: float | None = None
) -> tuple:  # fmt: skip
    """The ORIGIN of one clip.

    Args:
        voice: dataset, speaker, session; None: the clip takes no part in pairs.   order: as in Recording.
    """
    number = 0 if voice is None else hash_name(*voice)
    has_session = bool(voice and voice[2])
    end_sec, order = math.inf if end_sec is None else end_sec, math.nan if order is None else order
    return number, hash_name(file), start_sec or 0.0, end_sec, has_session, order


def as_origins(array: np.ndarray) -> np.ndarray:
    """ORIGIN [clips] of a stored array; earlier ones have no order."""
    if array.dtype == ORIGIN:
        return array
    origins = np.zeros(len(array), ORIGIN)
    origins["order"] = math.nan
    for name in array.dtype.names:
        origins[name] = array[name]
    return origins


def count_unordered(origins: np.ndarray) -> int:
    """Clips that take part in pairs and of which neither `order` nor the place in a file says when they were recorded."""
    is_part = (origins["start_sec"] > 0) | np.isfinite(origins["end_sec"])
    return int(((origins["voice"] != 0) & np.isnan(origins["order"]) & ~is_part).sum())


def choose(
    origins: np.ndarray, clip_sec: np.ndarray, sizes: Sequence[int], read: Callable[[int], np.ndarray], config: PairsConfig
) -> np.ndarray:
    """Reference clips of every clip: clip numbers, int32 [clips, k], -1 behind the last.

    In a voice of few clips each clip is compared with all others, in a larger one with `_POOL` others drawn at random.

    Args:
        origins: ORIGIN of all clips.   clip_sec: their lengths.
        sizes: number of embeddings of each shard.
        read: returns the embeddings of a shard by its number, [embeddings, D], in the order of the clips.
    """
    pairs = np.full((len(origins), config.references), -1, np.int32)
    # The arrays below have one entry per embedding, that is, per clip that takes part.
    clips = np.flatnonzero(origins["voice"])
    assert len(clips) == sum(sizes), (len(clips), sizes)
    chosen = np.flatnonzero(origins["has_session"][clips]) if config.need_session else np.arange(len(clips))
    if not len(chosen):
        return pairs
    origins = origins[clips[chosen]]
    # The order of recording; without one files in the order of the manifest, parts of a file by time.
    _, first, number = np.unique(origins["file"], return_index=True, return_inverse=True)
    known = np.nan_to_num(origins["order"], nan=-math.inf)
    order = np.lexsort((origins["start_sec"], first[number], known, origins["voice"]))
    del first, number, known
    origins, chosen = origins[order], chosen[order]
    clips = clips[chosen]
    sec = clip_sec[clips]
    may_be_reference = (sec >= config.min_sec) & (sec <= config.max_sec)
    cuts = np.flatnonzero(np.diff(origins["voice"], prepend=0, append=0))  # between voices; a voice is never 0
    cuts = [cut for start, end in itertools.pairwise(cuts.tolist()) for cut in range(start, end, _MAX_EMBEDDINGS)]
    cuts.append(len(clips))
    voices = track(
        _voices(cuts, chosen, sizes, read), "choosing references", total=len(cuts) - 1,
        console=Console(stderr=True), disable=not sys.stderr.isatty(),
    )  # fmt: skip
    for part, embeddings in voices:
        rng = np.random.default_rng((config.seed, int(clips[part][0])))
        found = _choose_in_voice(origins[part], embeddings, np.flatnonzero(may_be_reference[part]), rng, config)
        pairs[clips[part]] = np.where(found < 0, -1, clips[part][found])
    return pairs


def _voices(cuts: list[int], chosen: np.ndarray, sizes: Sequence[int], read) -> Iterator[tuple[slice, np.ndarray]]:
    """Each voice (cuts[i] .. cuts[i + 1] - 1 of the chosen embeddings) with its embeddings; reads many voices at once."""
    ends = np.cumsum([0, *sizes])
    i = 0
    while i < len(cuts) - 1:
        last = max(i + 1, bisect.bisect_right(cuts, cuts[i] + _MAX_EMBEDDINGS) - 1)
        wanted = chosen[cuts[i] : cuts[last]]
        order = np.argsort(wanted)
        bounds = np.searchsorted(wanted, ends, sorter=order)
        embeddings = None
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            rows = order[bounds[shard] : bounds[shard + 1]]
            of_shard = read(shard)
            assert len(of_shard) == sizes[shard], (shard, len(of_shard), sizes[shard])
            if embeddings is None:
                embeddings = np.empty((len(wanted), of_shard.shape[1]), of_shard.dtype)
            embeddings[rows] = of_shard[wanted[rows] - ends[shard]]
        for start, end in itertools.pairwise(cuts[i : last + 1]):
            yield slice(start, end), embeddings[start - cuts[i] : end - cuts[i]]
        i = last


def _choose_in_voice(origins, embeddings, candidates, rng, config: PairsConfig) -> np.ndarray:
    """Reference clips of the clips of one voice, as numbers among these clips: [clips, k], -1 behind the last.

    Args:
        origins: in the order of recording.   candidates: numbers of the clips that may be reference clips.
    """
    file, start_sec, end_sec = (origins[name] for name in ("file", "start_sec", "end_sec"))
    # Clips that begin at the same place of a file have the same place in the order of recording.
    is_new = (np.diff(file, prepend=file[:1]) != 0) | (np.diff(start_sec, prepend=start_sec[:1]) != 0)
    place = np.cumsum(is_new)
    found = np.full((len(file), config.references), -1, np.int64)
    candidates = rng.permutation(candidates)
    for first in range(0, len(file) if len(candidates) else 0, _POOL):
        own = slice(first, first + _POOL)
        # Each block of clips takes the next candidates, so that all of them are used. Tables are [clips, candidates].
        pool = candidates[(first + np.arange(min(_POOL, len(candidates)))) % len(candidates)]
        cosine = embeddings[own].astype(np.float32) @ embeddings[pool].astype(np.float32).T
        after = place[own, None] - place[pool][None]  # 0: the same place; 1: the clip comes directly after the candidate
        overlaps = file[own, None] == file[pool][None]
        overlaps &= (start_sec[own, None] < end_sec[pool][None]) & (start_sec[pool][None] < end_sec[own, None])
        fits = (cosine > config.min_cosine) & (after != 0) & (after != 1) & ~overlaps
        chance = np.where(fits, rng.random(fits.shape, np.float32), 2.0)
        picks = np.argsort(chance, axis=1)[:, : config.references]
        found[own, : picks.shape[1]] = np.where(np.take_along_axis(fits, picks, axis=1), pool[picks], -1)
    return found
