"""The demo corpus, synthesised on the spot: digit strings in English, and words of five other languages.

The digit strings are spoken by a neural English voice (hibari-tts, Apache-2.0), the words by espeak-ng voices, each with a
description. All of it is synthetic, and figures measured on it have to say so.
"""

import ctypes
import functools
import importlib.util
import multiprocessing
import os
import pathlib
import random
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from voxcpm2_jax.config.corpus import DemoConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus.manifest import Recording, write_split
from voxcpm2_jax.corpus.trim import trim_silence
from voxcpm2_jax.data import audio

DEMO_HZ = 24000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# espeak-ng voice: (description, words)
FOREIGN = {
    "de": (
        "a German robot voice",
        "Wasser Feuer Sonne Mond Garten Fenster Tisch Apfel Brot Milch "
        "Hund Katze Vogel Baum Blume Straße Haus Schule Morgen Abend",
    ),
    "fr": (
        "a French robot voice",
        "maison jardin fenêtre soleil lune pomme pain lait chien chat "
        "oiseau arbre fleur rue école matin soir rivière montagne musique",
    ),
    "es": (
        "a Spanish robot voice",
        "agua fuego sol luna jardín ventana mesa manzana pan leche "
        "perro gato pájaro árbol flor calle casa escuela mañana noche",
    ),
    "it": (
        "an Italian robot voice",
        "acqua fuoco sole luna giardino finestra tavolo mela pane latte "
        "cane gatto uccello albero fiore strada casa scuola mattina sera",
    ),
    "pt": (
        "a Portuguese robot voice",
        "água fogo sol lua jardim janela mesa maçã pão leite "
        "cão gato pássaro árvore flor rua casa escola manhã noite",
    ),
}  # fmt: skip


def demo_texts(config: DemoConfig) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """The texts of the demo corpus, a function of the config alone.

    Returns:
        Digit strings to train on (first the ten digits alone, then a seeded draw with repetition); held-out digit strings
        (distinct, never trained on, of 2 digits and more, since there are only ten strings of one digit); and pairs
        (espeak-ng voice, word).
    """
    lengths = range(2, config.max_digits + 1)
    draw = random.Random(f"{config.seed} held out")
    heldout: dict[str, None] = {}
    while len(heldout) < config.num_heldout:
        heldout[_digits(draw, lengths[len(heldout) % len(lengths)])] = None
    draw = random.Random(f"{config.seed} train")
    every_length = range(1, config.max_digits + 1)
    train = list(DIGITS[: config.num_digit_clips])
    while len(train) < config.num_digit_clips:
        # Strings of n digits are drawn n**2 times as often as single digits: there are 10**n of them, and strings that
        # repeat often are learned by heart.
        (length,) = draw.choices(every_length, weights=[n**2 for n in every_length])
        text = _digits(draw, length)
        if text not in heldout:
            train.append(text)
    words = [(voice, word) for voice, (_, words) in FOREIGN.items() for word in words.split()]
    draw.shuffle(words)
    foreign = [words[i % len(words)] for i in range(config.num_foreign_clips)]
    return train, sorted(heldout, key=lambda text: (len(text.split()), text)), foreign


def _digits(draw: random.Random, length: int) -> str:
    return " ".join(draw.choices(DIGITS, k=length))


def make_demo(directory: str | os.PathLike, config: DemoConfig, *, num_processes: int = 2) -> tuple[pathlib.Path, pathlib.Path]:
    """Synthesises the demo corpus into `directory`: wav/*.wav (24 kHz, trimmed), then train.jsonl and heldout.jsonl.

    Returns:
        The two manifests.
    Raises:
        UserError: the voices are not installed, or the directory cannot be written.
    """
    from rich.console import Console
    from rich.progress import track

    for package in ("hibari", "espeakng_loader"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the demo corpus needs {package}: pip install 'voxcpm2-jax[demo]'")
    directory = pathlib.Path(directory)
    try:
        (directory / "wav").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
    train, heldout, foreign = demo_texts(config)

    english = [(f"train-{i:05d}", text) for i, text in enumerate(train)]
    english += [(f"heldout-{i:05d}", text) for i, text in enumerate(heldout)]
    robots = [(f"robot-{i:05d}", *pair) for i, pair in enumerate(foreign)]
    jobs = [(directory, config, english[i : i + 50]) for i in range(0, len(english), 50)]
    # espeak-ng keeps state between calls: for the same sound every time it needs one fresh process and one order.
    spawn = multiprocessing.get_context("spawn")
    durations: dict[str, float] = {}
    with ProcessPoolExecutor(1, spawn) as robot_pool, ProcessPoolExecutor(num_processes, spawn) as pool:
        pending = [robot_pool.submit(_speak_robots, directory, config, robots)] if robots else []
        pending += [pool.submit(_speak_english, *job) for job in jobs]
        for future in track(pending, "speaking", console=Console(stderr=True), disable=not sys.stderr.isatty()):
            durations |= future.result()

    def recordings(names_texts):
        return [
            Recording(
                directory / f"wav/{name}.wav", text, duration=durations[name], dataset="demo", language="en", speaker="heart"
            )
            for name, text in names_texts
        ]

    robot_recordings = [
        Recording(directory / f"wav/{name}.wav", word, duration=durations[name], dataset="demo", language=voice,
                  speaker=f"espeak-{voice}", description=FOREIGN[voice][0])
        for name, voice, word in robots
    ]  # fmt: skip
    return write_split(directory, recordings(english[: len(train)]) + robot_recordings, recordings(english[len(train) :]))


def _speak_english(directory: pathlib.Path, config: DemoConfig, names_texts: list[tuple[str, str]]) -> dict[str, float]:
    """Writes clips of the English voice -> the seconds of each."""
    voice = _english_voice()
    durations = {}
    for name, text in names_texts:
        # With commas the voice reads a list and separates the digits. The seed changes only the voice's noise.
        spoken = text.replace(" ", ", ").capitalize() + "."
        durations[name] = _write_clip(directory, name, voice(spoken, seed=zlib.crc32(f"{config.seed} {name}".encode())))
    return durations


@functools.cache
def _english_voice():
    from hibari import Hibari

    return Hibari(voice="heart", threads=1)


def _speak_robots(directory: pathlib.Path, config: DemoConfig, robots: list[tuple[str, str, str]]) -> dict[str, float]:
    """Writes clips of the espeak-ng voices -> the seconds of each."""
    say = _espeak()
    durations = {}
    for name, voice, word in robots:
        audio_A = say(voice, word)
        durations[name] = _write_clip(directory, name, 0.3 * audio_A / np.abs(audio_A).max())  # as loud as the English voice
    return durations


def _espeak() -> Callable[[str, str], np.ndarray]:
    """espeak-ng as a function (voice, text) -> float32 [A] at DEMO_HZ. Its sound depends on earlier calls."""
    import espeakng_loader

    synchronous, utf8 = 2, 1
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise UserError(f"espeak-ng does not start (code {rate}); reinstall espeakng-loader")
    parts: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, _events):
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)

    def say(voice: str, text: str) -> np.ndarray:
        parts.clear()
        if library.espeak_SetVoiceByName(voice.encode()):
            raise UserError(f"espeak-ng has no voice {voice!r}")
        data = text.encode()
        failed = library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, utf8, None, None)
        assert not failed and collect, failed
        return audio.resample(np.concatenate(parts) / np.float32(32768), rate, DEMO_HZ)

    return say


def _write_clip(directory: pathlib.Path, name: str, audio_A: np.ndarray) -> float:
    audio_A = trim_silence(audio_A, DEMO_HZ)
    audio.save(directory / f"wav/{name}.wav", audio_A, DEMO_HZ)
    return round(len(audio_A) / DEMO_HZ, 4)
