"""Cutting the ends of recordings: silence by level, or everything that is not speech by silero's detector.

    trim_silence      keeps from the first to the last 10 ms whose RMS is near enough to the loudest
    trim_to_speech    keeps from the first to the last speech that the detector finds; cuts noise as well (extra "eval")

Both keep some audio before and after that, because speech begins and ends softly.
"""

import hashlib
import importlib.util
import math
import pathlib

import numpy as np

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data.audio import resample


def trim_silence(audio_A: np.ndarray, rate: int, *, threshold_db: float = -40.0, keep_ms: float = 40.0) -> np.ndarray:
    """Cuts the silence before and after the sound (see `sound_span`).

    Args:
        keep_ms: silence to keep at each end, if there is that much.
    """
    return _cut(audio_A, rate, sound_span(audio_A, rate, threshold_db=threshold_db), keep_ms)


def trim_to_speech(audio_A: np.ndarray, rate: int, *, keep_ms: float = 200.0) -> np.ndarray:
    """Cuts what comes before the first and after the last speech. Returns an empty array if no speech is detected.

    Args:
        keep_ms: audio to keep at each end, if there is that much.
    """
    start, end = speech_span(audio_A, rate)
    return _cut(audio_A, rate, (start, end), keep_ms) if start < end else audio_A[:0]


def _cut(audio_A: np.ndarray, rate: int, span: tuple[int, int], keep_ms: float) -> np.ndarray:
    keep = round(keep_ms * rate / 1000)
    return audio_A[max(0, span[0] - keep) : span[1] + keep]


def sound_span(audio_A: np.ndarray, rate: int, *, threshold_db: float = -40.0) -> tuple[int, int]:
    """First and last sample + 1 of the sound: where the RMS of 10 ms exceeds `threshold_db` relative to the loudest 10 ms.

    Each 10 ms are measured without their mean: an offset is no sound.
    """
    window = max(1, rate // 100)
    blocks = np.pad(audio_A, (0, -len(audio_A) % window), mode="edge" if len(audio_A) else "constant").reshape(-1, window)
    power = blocks.var(axis=1, dtype=np.float64)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (threshold_db / 10))
    return (int(loud[0]) * window, min((int(loud[-1]) + 1) * window, len(audio_A))) if len(loud) else (0, len(audio_A))


# ---- voice activity --------------------------------------------------------------------------------------------------

VAD_HZ = 16000
# Speech begins where its probability in 32 ms exceeds `threshold` and ends where it falls below `neg_threshold`, which is
# low because soft consonants at the end hardly count as speech. Sounds under 60 ms are not speech.
VAD_OPTIONS = {"threshold": 0.5, "neg_threshold": 0.2, "min_speech_duration_ms": 60}


def load_vad() -> dict:
    """Loads silero's voice activity detector, which faster-whisper contains -> its name, hash and options, for provenance.

    Raises:
        UserError: faster-whisper is not installed.
    """
    if importlib.util.find_spec("faster_whisper") is None:
        raise UserError("trim 'vad' needs faster-whisper, which contains the detector: pip install 'voxcpm2-jax[eval]'")
    from faster_whisper import vad

    vad.get_vad_model()  # faster-whisper keeps it; loaded here, before threads ask for it
    (file,) = pathlib.Path(vad.get_assets_path()).glob("silero_vad*.onnx")
    return {"name": file.stem, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} | VAD_OPTIONS


def speech_span(audio_A: np.ndarray, rate: int) -> tuple[int, int]:
    """First and last sample + 1 of the detected speech; (0, 0) if there is none. Threads may call it at once."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    options = VadOptions(**VAD_OPTIONS, min_silence_duration_ms=100, speech_pad_ms=0)
    found = get_speech_timestamps(resample(audio_A, rate, VAD_HZ), options)
    if not found:
        return 0, 0
    start, end = found[0]["start"] / VAD_HZ, found[-1]["end"] / VAD_HZ
    return int(start * rate), min(math.ceil(end * rate), len(audio_A))
