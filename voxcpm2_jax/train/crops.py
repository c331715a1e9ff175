"""Batches of the codec's training: random crops of recordings, read from their files when a batch is made.

    corpus -> every recording decoded once, to its end -> recordings.npz: the usable ones and their seconds
                                                       -> skipped.jsonl: the others, with the reason
    (seed, step) -> for every row a recording and a place in it -> that part of the file, at both rates of the codec

Every second of sound is equally likely. Memory holds 16 bytes a recording and the crops of a few batches, however many hours
there are. Faults of the sound are mended by the defaults of config/sound.py, for each crop.
"""

import collections
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import jax
import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import VAERun
from voxcpm2_jax.config.sound import SoundConfig
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.corpus.manifest import Recording
from voxcpm2_jax.data import audio, sound
from voxcpm2_jax.processes import say

RECORDINGS_FILE, SKIPPED_FILE = "recordings.npz", "skipped.jsonl"
_MARGIN_SEC = 0.05  # read before and after a crop: the resampler's filter is shorter
_SAMPLE_SEC = 20.0  # the longest clip that is reconstructed as a sample
_RULES = SoundConfig()


class Units(NamedTuple):
    """The shortest time that is a whole number of samples at both rates of a codec: those samples."""

    encoder: int
    decoder: int
    sec: float

    @classmethod
    def of(cls, vae: AudioVAEConfig) -> "Units":
        divisor = math.gcd(vae.sample_rate, vae.out_sample_rate)
        return cls(vae.sample_rate // divisor, vae.out_sample_rate // divisor, 1 / divisor)


class Clips(Protocol):
    """Sound that crops are taken from."""

    units_N: np.ndarray  # the length of each clip

    def read(self, clip: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` units of a clip from unit `start` on: float32 [A] at the encoder's rate, and at the decoder's."""


class Waves:
    """Clips in memory, each at both rates."""

    def __init__(self, vae: AudioVAEConfig, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]):
        self._units, self._clips = Units.of(vae), list(zip(inputs, targets, strict=True))
        self.units_N = np.array([len(x_A) // self._units.encoder for x_A in inputs], np.int64)

    def read(self, clip: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        x_A, y_A = (wave_A[start * unit : (start + count) * unit] for wave_A, unit in zip(self._clips[clip], self._units[:2]))
        return x_A, y_A


class Files:
    """Clips in files.

    Args:
        numbers_N, sec_N: of the usable recordings of the corpus.
    """

    def __init__(self, vae: AudioVAEConfig, corpus: sources.Corpus, numbers_N: np.ndarray, sec_N: np.ndarray):
        self._vae, self._units, self._corpus, self._numbers_N = vae, Units.of(vae), corpus, numbers_N
        self.units_N = np.maximum(1, (sec_N / self._units.sec).astype(np.int64))

    def read(self, clip: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        recording, vae, units = self._corpus[int(self._numbers_N[clip])], self._vae, self._units
        before = min(start, math.ceil(_MARGIN_SEC / units.sec))
        after = min(int(self.units_N[clip]) - start - count, math.ceil(_MARGIN_SEC / units.sec))
        begin = (recording.start_sec or 0.0) + (start - before) * units.sec
        found = audio.read(recording.audio, begin, begin + (before + count + after) * units.sec)
        both = []
        audio_A = sound.mend(found.channels_AE, found.rate, _RULES)[0] if len(found.channels_AE) else np.zeros(0, np.float32)
        for rate, unit in ((vae.out_sample_rate, units.decoder), (vae.sample_rate, units.encoder)):
            from_rate = vae.out_sample_rate if both else found.rate  # the encoder hears what the decoder is to say
            audio_A = audio.resample(audio_A, from_rate, rate)
            part_A = audio_A[before * unit :][: count * unit]
            both.append(np.pad(part_A, (0, count * unit - len(part_A))))
        return both[1], both[0]


class Crops:
    """Random crops of clips, each at both rates of the codec."""

    def __init__(self, config: VAERun, clips: Clips):
        vae, self._units = config.vae, Units.of(config.vae)
        self._sizes = (config.crop_frames * vae.encoder_hop, config.crop_frames * vae.decoder_hop)
        self._count = self._sizes[0] // self._units.encoder
        self._clips, self._rows, self._pool = clips, config.rows, ThreadPoolExecutor()
        if not len(clips.units_N):
            raise UserError("the codec needs at least one clip to train on, got none")
        self._share = np.cumsum(clips.units_N) / clips.units_N.sum()  # every second of sound is equally likely

    def batch(self, seed: int, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """`input_BA` and `target_BA` of update `step`: a function of its arguments alone.

        Args:
            rows: which rows of the batch to make; None: all.
        """
        draw = np.random.default_rng((seed, step))
        places = []
        for clip in np.searchsorted(self._share, draw.random(self._rows), side="right").tolist():
            spare = int(self._clips.units_N[clip]) - self._count
            # A clip shorter than the crop stands somewhere within it, silence around it.
            places.append((clip, int(draw.integers(min(spare, 0), max(spare, 0) + 1))))
        chosen = list(self._pool.map(self._crop, [places[row] for row in (range(self._rows) if rows is None else rows)]))
        return {"input_BA": np.stack([x_A for x_A, _ in chosen]), "target_BA": np.stack([y_A for _, y_A in chosen])}

    def _crop(self, place: tuple[int, int]) -> list[np.ndarray]:
        clip, start = place
        count = min(self._count, int(self._clips.units_N[clip]))
        crops = [np.zeros(size, np.float32) for size in self._sizes]
        for x_A, part_A, unit in zip(crops, self._clips.read(clip, max(start, 0), count), self._units):
            part_A = part_A[: len(x_A) - max(-start, 0) * unit]
            x_A[max(-start, 0) * unit :][: len(part_A)] = part_A
        return crops


# ---- recordings ------------------------------------------------------------------------------------------------------


def open_files(vae: AudioVAEConfig, corpus: sources.Corpus, workdir: str | os.PathLike) -> Files:
    """The usable recordings of a corpus. All are decoded once; a run that resumes takes what it found at its start.

    Raises:
        UserError: none is usable.   ReadError: the machine fails to read one.
    """
    workdir = pathlib.Path(workdir)
    known = workdir / RECORDINGS_FILE
    if known.exists():
        with np.load(known) as found:
            if str(found["sha256"]) == corpus.sha256:
                return Files(vae, corpus, found["numbers"], found["sec"])
    numbers, seconds, skipped = _decode_all(corpus)
    if not numbers:
        first = f"; the first: {skipped[0]['message']}" if skipped else ""
        raise UserError(f"{corpus.name}: none of {len(skipped)} recordings can be used{first}")
    found = {"numbers": np.array(numbers, np.int64), "sec": np.array(seconds)}
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)
        files.replace_file(workdir / SKIPPED_FILE, lines)
        with files.aside(known) as temporary, temporary.open("wb") as file:
            np.savez(file, sha256=np.array(corpus.sha256), **found)
    if skipped:
        reasons = collections.Counter(line["reason"] for line in skipped)
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        say(f"left out {len(skipped)} of {len(corpus)} recordings ({listed}); {workdir / SKIPPED_FILE} lists them")
    return Files(vae, corpus, found["numbers"], found["sec"])


def _decode_all(corpus: sources.Corpus) -> tuple[list[int], list[float], list[dict]]:
    """(numbers and seconds of the usable recordings, lines of skipped.jsonl)."""
    from rich.console import Console
    from rich.progress import Progress

    numbers, seconds, skipped = [], [], []
    bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
    task = bar.add_task("decoding recordings", total=len(corpus))
    with bar, ThreadPoolExecutor() as pool:
        for i, (recording, found) in enumerate(sources.in_threads(pool, _seconds, corpus)):
            if isinstance(found, audio.BadRecording):
                line = {"audio": str(recording.audio), "start_sec": recording.start_sec, "reason": found.reason}
                skipped.append(line | {"message": str(found)})
            else:
                numbers.append(i)
                seconds.append(found)
            bar.advance(task)
    return numbers, seconds, skipped


def _seconds(recording: Recording) -> float | audio.BadRecording:
    try:
        return audio.check(recording.audio, recording.start_sec, recording.end_sec)
    except audio.BadRecording as error:
        return error


def samples(vae: AudioVAEConfig, corpus: sources.Corpus, count: int) -> list[np.ndarray]:
    """The first `count` usable recordings at the encoder's rate, each up to 20 s, to be reconstructed."""
    found = []
    for recording in corpus:
        if len(found) == count:
            break
        start = recording.start_sec or 0.0
        try:
            end = start + min(_SAMPLE_SEC, audio.check(recording.audio, start, recording.end_sec))
            target_A = audio.load(recording.audio, vae.out_sample_rate, start, end, rules=_RULES)
        except audio.BadRecording as error:
            say(f"not reconstructed as a sample: {error}")
            continue
        found.append(audio.resample(target_A, vae.out_sample_rate, vae.sample_rate))
    return found
