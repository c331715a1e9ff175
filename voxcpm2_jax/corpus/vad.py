"""TODO corpus.vad."""

import hashlib
import importlib.util
import math
import pathlib

import numpy as np

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data.audio import cut, resample


def trim_to_speech(audio_A: np.ndarray, rate: int, *, keep_ms: float = 200.0) -> np.ndarray:
    """Cuts what is no speech before the first and after the last speech (see `speech_span`); nothing stays of no speech.

    Args:
        keep_ms: of the rest that stays at each end, as far as there is any.
    """
    start, end = speech_span(audio_A, rate)
    return cut(audio_A, rate, (start, end), keep_ms) if start < end else audio_A[:0]


# ---- voice activity --------------------------------------------------------------------------------------------------

VAD_HZ = 16000
# Speech begins where its probability in 32 ms is over the first, and ends where it is under the second: soft consonants at
# the end keep it that high. Sounds under 60 ms are no speech.
VAD_OPTIONS = {"threshold": 0.5, "neg_threshold": 0.2, "min_speech_duration_ms": 60}


def load_vad() -> dict:
    """Loads silero's voice activity detector, which faster-whisper carries -> what identifies it.

    Raises:
        UserError: faster-whisper is not installed.
    """
    if importlib.util.find_spec("faster_whisper") is None:
        raise UserError("trim 'vad' needs faster-whisper, which carries the detector: pip install 'voxcpm2-jax[eval]'")
    from faster_whisper import vad

    vad.get_vad_model()  # kept by faster-whisper; loaded here, before threads ask for it
    (file,) = pathlib.Path(vad.get_assets_path()).glob("silero_vad*.onnx")
    return {"name": file.stem, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} | VAD_OPTIONS


def speech_span(audio_A: np.ndarray, rate: int) -> tuple[int, int]:
    """First and last sample + 1 of the speech that silero's detector hears; (0, 0): it hears none. Threads may share it."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    options = VadOptions(**VAD_OPTIONS, min_silence_duration_ms=100, speech_pad_ms=0)
    heard = get_speech_timestamps(resample(audio_A, rate, VAD_HZ), options)
    if not heard:
        return 0, 0
    start, end = heard[0]["start"] / VAD_HZ, heard[-1]["end"] / VAD_HZ
    return int(start * rate), min(math.ceil(end * rate), len(audio_A))
