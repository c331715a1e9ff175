"""Corpora that are made on the spot, as recordings beside manifests: train.jsonl and, if anything is held out, heldout.jsonl.

There are two:

    demo      digit strings by a neural English voice (hibari-tts, Apache-2.0), and some words of five more languages by
              espeak-ng voices, each with a description. Synthetic: figures made on it say so.
    debian    voice prompts of the Asterisk telephone exchange, out of Debian's packages: real recordings at 16 kHz with
              transcripts, one speaker a language: Allison Smith (en, es), June Wallack (fr), Carlo Flora (it), Maxim Topal's
              ivrvoice.ru (ru). CC-BY-SA-3.0, the Russian ones CC-BY-3.0: each package's copyright file, which has the
              credits, is put beside the recordings, with a line on what was changed. Of the Spanish transcripts most are
              written without accents.
"""

import ctypes
import functools
import gzip
import importlib.util
import multiprocessing
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np

from voxcpm2_jax.config import DebianConfig, DemoConfig, UserError
from voxcpm2_jax.data import audio
from voxcpm2_jax.data.corpus import Recording, write_manifest

TRAIN, HELDOUT = "train.jsonl", "heldout.jsonl"
DEMO_HZ = 24000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _write(directory: pathlib.Path, train: list[Recording], heldout: list[Recording]) -> tuple[pathlib.Path, pathlib.Path]:
    if heldout:
        write_manifest(directory / HELDOUT, heldout)
    write_manifest(directory / TRAIN, train)
    return directory / TRAIN, directory / HELDOUT


# ---- demo corpus -----------------------------------------------------------------------------------------------------

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
    """What the demo corpus says, a function of the config alone.

    Returns:
        digit strings to train on (all ten digits alone first, then a seeded draw, strings may repeat), held-out digit
        strings (distinct, of 2 digits and more, never among the former; the ten strings of one digit are too few to
        hold any out), and pairs (espeak-ng voice, word).
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
        # Strings of n digits n**2 times: there are 10**n of them, and few that come often are learned by heart.
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
    """Speaks the demo corpus into `directory`: wav/*.wav (24 kHz, trimmed), then train.jsonl and heldout.jsonl.

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
    # espeak-ng keeps state between its calls: the same sound each time needs one fresh process and one order.
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
    return _write(directory, recordings(english[: len(train)]) + robot_recordings, recordings(english[len(train) :]))


def _speak_english(directory: pathlib.Path, config: DemoConfig, names_texts: list[tuple[str, str]]) -> dict[str, float]:
    """Writes clips of the English voice; the result is the seconds of each."""
    voice = _english_voice()
    durations = {}
    for name, text in names_texts:
        # Commas make it a list of digits, each clear of the next. The seed moves only the voice's noise.
        spoken = text.replace(" ", ", ").capitalize() + "."
        durations[name] = _write_clip(directory, name, voice(spoken, seed=zlib.crc32(f"{config.seed} {name}".encode())))
    return durations


@functools.cache
def _english_voice():
    from hibari import Hibari

    return Hibari(voice="heart", threads=1)


def _speak_robots(directory: pathlib.Path, config: DemoConfig, robots: list[tuple[str, str, str]]) -> dict[str, float]:
    """Writes clips of the espeak-ng voices; the result is the seconds of each."""
    say = _espeak()
    durations = {}
    for name, voice, word in robots:
        audio_A = say(voice, word)
        durations[name] = _write_clip(directory, name, 0.3 * audio_A / np.abs(audio_A).max())  # as loud as the English voice
    return durations


def _espeak() -> Callable[[str, str], np.ndarray]:
    """espeak-ng as a function (voice, text) -> float32 [A] at DEMO_HZ. Its sound depends on the calls before."""
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
    audio_A = audio.trim_silence(audio_A, DEMO_HZ)
    audio.save(directory / f"wav/{name}.wav", audio_A, DEMO_HZ)
    return round(len(audio_A) / DEMO_HZ, 4)


# ---- Debian's recordings ---------------------------------------------------------------------------------------------

_DEBIAN_HZ = 16000
_KEEP_MS = 100.0  # of silence at the ends: the recordings breathe out
_NO_SPEECH = re.compile(r"silence/.*|beep(err)?|(as|des)cending-2tone|confbridge-(join|leave)|tt-monkeys")
_SIGN = re.compile(r"\[[^\w\]]*\]|[“”]")  # the sign that a prompt names, such as "at [@]", and quotes
_REMARK = re.compile(r"[][<>(){}*#/|\"]|\w-\w+:")  # remarks, signs, and the name of the next prompt in the same line
_MOST_LETTERS_A_SEC = 18.5  # of the quickest speech in it; more are the transcript of something else
_MOST_SEC = 60.0


def make_debian(directory: str | os.PathLike, config: DebianConfig) -> tuple[pathlib.Path, pathlib.Path]:
    """Fetches and unpacks voice prompts into `directory`: flac/LANGUAGE/NAME.flac, copyright files, then the manifests.

    Left out: prompts without speech, those whose transcript is missing or is not what is said, and those of over a minute.

    Returns:
        The manifests of training and of held-out recordings; no text is in both.
    Raises:
        UserError: a tool or a package that is not there, or fewer texts than are to be held out.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError("the debian corpus needs av: pip install 'voxcpm2-jax[demo]'")
    directory = pathlib.Path(directory)
    train: list[Recording] = []
    heldout: list[Recording] = []
    with tempfile.TemporaryDirectory() as scratch:
        for language in config.languages.split(","):
            root = pathlib.Path(scratch) / language
            packages = _packages(language, config.packages, pathlib.Path(scratch))
            for package in packages:
                _run("dpkg-deb", "-x", package, root)
            recordings = _decode_prompts(root, language, directory / "flac" / language)
            _credit(directory, root, language, packages)
            held = _held_out([r.text for r in recordings], config, language)
            for recording in recordings:
                (heldout if _words(recording.text) in held else train).append(recording)
    return _write(directory, train, heldout)


def _decode_prompts(root: pathlib.Path, language: str, target: pathlib.Path) -> list[Recording]:
    """Writes what can be learnt from of an unpacked language as target/NAME.flac."""
    from rich.console import Console
    from rich.progress import track

    voices = sorted((root / _SOUNDS).glob("*/"))
    if len(voices) != 1:
        raise UserError(f"the packages of {language}: expected one voice in {_SOUNDS}, got {len(voices)}; not a known version")
    speaker = voices[0].name.split("_")[-1].lower()  # of such as en_US_f_Allison
    prompts = list(_prompts(root, voices[0], language))
    for parent in {(target / name).parent for name, _ in prompts}:
        parent.mkdir(parents=True, exist_ok=True)
    recordings = []
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(_decode, voices[0] / f"{name}.g722", target / f"{name}.flac") for name, _ in prompts]
        bar = track(jobs, f"decoding {language}", console=Console(stderr=True), disable=not sys.stderr.isatty())
        for (name, text), job in zip(prompts, bar):
            file, sec = target / f"{name}.flac", job.result()
            if sec > _MOST_SEC or sum(map(str.isalnum, text)) > _MOST_LETTERS_A_SEC * sec:
                file.unlink()
            else:
                recordings.append(Recording(file, text, duration=sec, dataset="debian", language=language, speaker=speaker))
    return recordings


_SOUNDS = pathlib.PurePath("usr/share/asterisk/sounds")
_DOCS = pathlib.PurePath("usr/share/doc")


def _packages(language: str, given: str, scratch: pathlib.Path) -> list[pathlib.Path]:
    """The package of transcripts and that of recordings, downloaded unless their directory is given."""
    names = [f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-g722"]
    directory = pathlib.Path(given) if given else scratch
    if not given:
        _run("apt-get", "download", *names, cwd=scratch)
    found = [sorted(directory.glob(f"{name}_*.deb")) for name in names]
    for name, files in zip(names, found):
        if not files:
            raise UserError(f"{directory}: no package {name}_*.deb here")
    return [files[-1] for files in found]


def _run(*command: str | os.PathLike, cwd: pathlib.Path | None = None) -> None:
    instead = "or give --config.debian.packages=DIR with the packages in it"
    try:
        done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"the debian corpus needs {command[0]}: use a Debian or Ubuntu system, {instead}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines() or ["no reason"]
        advice = f"; run apt-get update as root first, {instead}" if command[0] == "apt-get" else ""
        raise UserError(f"{command[0]} {command[1]} failed ({said[0]}){advice}")


def _prompts(root: pathlib.Path, voice: pathlib.Path, language: str) -> Iterator[tuple[str, str]]:
    """(name, transcript) of the recordings whose transcript is clear, by name."""
    listing = root / _DOCS / f"asterisk-core-sounds-{language}" / f"core-sounds-{language}.txt.gz"
    if not listing.is_file():
        raise UserError(f"the packages of {language}: no {listing.relative_to(root)}; not a known version")
    texts: dict[str, set[str]] = {}
    for line in gzip.decompress(listing.read_bytes()).decode("utf-8-sig").splitlines():
        name, _, text = line.partition(":")
        if not line.startswith(";"):
            texts.setdefault(name, set()).add(" ".join(_SIGN.sub(" ", text).split()))
    for path in sorted(voice.rglob("*.g722")):
        name = str(path.relative_to(voice).with_suffix(""))
        said = texts.get(name, set())
        if len(said) == 1 and not _NO_SPEECH.fullmatch(name) and _is_clear(*said):
            yield name, *said


def _is_clear(text: str) -> bool:
    """Whether a transcript is what is said: no remarks, nothing that is written otherwise than it is spoken."""
    in_a_word = (match[1].islower() for match in re.finditer(r"\?\s*(\w)", text))  # a ? stands for a letter that was lost
    return any(map(str.isalpha, text)) and not _REMARK.search(text) and not any(in_a_word)


def _decode(source: pathlib.Path, target: pathlib.Path) -> float:
    """G.722 to FLAC, without the silence at its ends; the result is its seconds."""
    import av

    with av.open(str(source), format="g722") as container:
        audio_A = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    audio_A = audio.trim_silence(audio_A / np.float32(2**15), _DEBIAN_HZ, keep_ms=_KEEP_MS)
    audio.save(target, audio_A, _DEBIAN_HZ)
    return round(len(audio_A) / _DEBIAN_HZ, 4)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _held_out(texts: list[str], config: DebianConfig, language: str) -> set[str]:
    """The words of the texts that are not trained on, a seeded draw from those of four words and more."""
    several = sorted({words for words in map(_words, texts) if len(words.split()) >= 4})
    if len(several) <= config.num_heldout:
        raise UserError(f"debian: num_heldout {config.num_heldout} is too many: {language} has {len(several)} texts of 4 words")
    return set(random.Random(f"{config.seed} {language}").sample(several, config.num_heldout))


def _credit(directory: pathlib.Path, root: pathlib.Path, language: str, packages: list[pathlib.Path]) -> None:
    """Whose recordings they are, under which licence, and what was done to them."""
    copyright_file = root / _DOCS / f"asterisk-core-sounds-{language}-g722" / "copyright"
    head = (
        f"Recordings in flac/{language} come from the Debian packages {' and '.join(p.name for p in packages)}.\n"
        "Changed: decoded from G.722 to FLAC, silence cut from the ends. The packages' copyright file follows.\n\n"
    )
    text = copyright_file.read_text(encoding="utf-8")
    (directory / f"copyright-{language}.txt").write_text(head + text, encoding="utf-8")
