"""The debian corpus: voice prompts of the Asterisk telephone exchange, from Debian's packages.

Real recordings at 16 kHz with transcripts, one speaker per language: Allison Smith (en, es), June Wallack (fr), Carlo Flora
(it), Maxim Topal's ivrvoice.ru (ru). The licence is CC-BY-SA-3.0, that of the Russian ones CC-BY-3.0. The copyright file of
each package, which holds the credits, is put beside the recordings with a line on what was changed. Most of the Spanish
transcripts are written without accents.
"""

import gzip
import importlib.util
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from voxcpm2_jax.config.corpus import DebianConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus.manifest import Recording, write_split
from voxcpm2_jax.corpus.trim import trim_silence
from voxcpm2_jax.data import audio

_DEBIAN_HZ = 16000
_KEEP_MS = 100.0  # of silence at the ends, where the recordings fade out
_NO_SPEECH = re.compile(r"silence/.*|beep(err)?|(as|des)cending-2tone|confbridge-(join|leave)|tt-monkeys")
_SIGN = re.compile(r"\[[^\w\]]*\]|[“”]")  # the sign that a prompt names, such as "at [@]", and quotes
_REMARK = re.compile(r"[][<>(){}*#/|\"]|\w-\w+:")  # remarks, signs, and the name of another prompt in the same line
_MAX_LETTERS_PER_SEC = 18.5  # the fastest speech among them; a transcript with more belongs to another recording
_MAX_SEC = 60.0


def make_debian(directory: str | os.PathLike, config: DebianConfig) -> tuple[pathlib.Path, pathlib.Path]:
    """Fetches and unpacks voice prompts into `directory`: flac/LANGUAGE/NAME.flac, copyright files, then the manifests.

    Skips prompts without speech, with a missing or wrong transcript, or of more than a minute.

    Returns:
        The manifests of the training recordings and of the held-out ones; no text is in both.
    Raises:
        UserError: a missing tool or package, or fewer texts than are to be held out.
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
    return write_split(directory, train, heldout)


def _decode_prompts(root: pathlib.Path, language: str, target: pathlib.Path) -> list[Recording]:
    """Writes the usable recordings of an unpacked language as target/NAME.flac."""
    from rich.console import Console
    from rich.progress import track

    voices = sorted((root / _SOUNDS).glob("*/"))
    if len(voices) != 1:
        raise UserError(f"the packages of {language}: expected one voice in {_SOUNDS}, got {len(voices)}; not a known version")
    speaker = voices[0].name.split("_")[-1].lower()  # directories are named like en_US_f_Allison
    prompts = list(_prompts(root, voices[0], language))
    for parent in {(target / name).parent for name, _ in prompts}:
        parent.mkdir(parents=True, exist_ok=True)
    recordings = []
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(_decode, voices[0] / f"{name}.g722", target / f"{name}.flac") for name, _ in prompts]
        bar = track(jobs, f"decoding {language}", console=Console(stderr=True), disable=not sys.stderr.isatty())
        for (name, text), job in zip(prompts, bar):
            file, sec = target / f"{name}.flac", job.result()
            if sec > _MAX_SEC or sum(map(str.isalnum, text)) > _MAX_LETTERS_PER_SEC * sec:
                file.unlink()
            else:
                recordings.append(Recording(file, text, duration=sec, dataset="debian", language=language, speaker=speaker))
    return recordings


_SOUNDS = pathlib.PurePath("usr/share/asterisk/sounds")
_DOCS = pathlib.PurePath("usr/share/doc")


def _packages(language: str, given: str, scratch: pathlib.Path) -> list[pathlib.Path]:
    """The package of transcripts and that of recordings; downloads them unless their directory is given."""
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
    """(name, transcript) of the recordings with one clear transcript, in the order of names."""
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
    """Whether a transcript is exactly what is said: no remarks, no signs, no lost letters."""
    in_a_word = (match[1].islower() for match in re.finditer(r"\?\s*(\w)", text))  # a ? in a word replaces a lost letter
    return any(map(str.isalpha, text)) and not _REMARK.search(text) and not any(in_a_word)


def _decode(source: pathlib.Path, target: pathlib.Path) -> float:
    """Converts G.722 to FLAC without the silence at its ends -> its seconds."""
    import av

    with av.open(str(source), format="g722") as container:
        audio_A = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    audio_A = trim_silence(audio_A / np.float32(2**15), _DEBIAN_HZ, keep_ms=_KEEP_MS)
    audio.save(target, audio_A, _DEBIAN_HZ)
    return round(len(audio_A) / _DEBIAN_HZ, 4)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _held_out(texts: list[str], config: DebianConfig, language: str) -> set[str]:
    """The held-out texts, as words: a seeded draw from those of four words and more."""
    several = sorted({words for words in map(_words, texts) if len(words.split()) >= 4})
    if len(several) <= config.num_heldout:
        raise UserError(f"debian: num_heldout {config.num_heldout} is too many: {language} has {len(several)} texts of 4 words")
    return set(random.Random(f"{config.seed} {language}").sample(several, config.num_heldout))


def _credit(directory: pathlib.Path, root: pathlib.Path, language: str, packages: list[pathlib.Path]) -> None:
    """Writes the package's copyright file beside the recordings, with a line on what was changed."""
    copyright_file = root / _DOCS / f"asterisk-core-sounds-{language}-g722" / "copyright"
    head = (
        f"Recordings in flac/{language} come from the Debian packages {' and '.join(p.name for p in packages)}.\n"
        "Changed: decoded from G.722 to FLAC, silence cut from the ends. The packages' copyright file follows.\n\n"
    )
    text = copyright_file.read_text(encoding="utf-8")
    (directory / f"copyright-{language}.txt").write_text(head + text, encoding="utf-8")
