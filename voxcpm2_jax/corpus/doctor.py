"""`voxcpm2-jax doctor`: finds what is wrong with a corpus before a model is trained on it.

    recordings -> each opened once, in threads -> parts of 4,096 recordings: one row a clip (comparison.py), and findings
    all parts  -> compared with each other -> report: findings, hours, distributions, a forecast of the packed rows

    OUTPUT/parts-HASH/part-00003.jsonl, .npz    findings and rows of a part, as they come; removed when the report is there
    OUTPUT/findings.jsonl                       every finding, one JSON object per line
    OUTPUT/report.json, distributions.png

A run that was stopped continues with the missing parts. Several hosts share an output directory: host i of n makes parts
i, i + n, ..., and a host that finds all parts complete compares them. Memory holds 8 bytes a recording until then, and about
a hundred a clip while clips are compared.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import SPEECH_BATCH, BatchConfig
from voxcpm2_jax.config.sound import EVERYTHING, SoundConfig
from voxcpm2_jax.config.text import TextRule, control_marks, markup, says_something, split_description, visible
from voxcpm2_jax.corpus import comparison, report, sources
from voxcpm2_jax.corpus.comparison import ROW, Clips
from voxcpm2_jax.corpus.faults import FAULTY, KINDS, LOOK, SPOILS, Findings, Limits
from voxcpm2_jax.corpus.manifest import Recording
from voxcpm2_jax.corpus.trim import sound_span
from voxcpm2_jax.data import audio, sound
from voxcpm2_jax.data.identity import hash_name

_PART = 4096  # recordings
_LIMITS = Limits()


def examine(
    manifests: Sequence[str | os.PathLike],
    heldout: Sequence[str | os.PathLike] = (),
    *,
    tokenizer=None,
    batch: BatchConfig = SPEECH_BATCH,
    patch_sec: float = 0.16,
    limits: Limits = _LIMITS,
    output: str | os.PathLike | None = None,
    host: int = 0,
    num_hosts: int = 1,
) -> dict | None:
    """Opens every recording of training and validation -> the report, plain data.

    Args:
        manifests, heldout: names as for `open_corpus`.
        tokenizer: without one, the number of tokens is estimated from the number of characters.
        batch, patch_sec: budgets of a row, for the forecast.
        output: directory for the parts and the report; None: a temporary one.
        host, num_hosts: which share of the parts to make; all hosts need the same output.
    Returns:
        None if other hosts still have parts to make.
    Raises:
        UserError: a manifest or an output that cannot be read.
    """
    training, validation = ([sources.find_corpus(name) for name in names] for names in (manifests, heldout))
    recordings = sources.Joined([*training, *validation])
    num_training = sum(map(len, training))
    seen = [_PART, [c.sha256 for c in training], [c.sha256 for c in validation], asdict(limits), tokenizer and tokenizer.sha256]
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(output or scratch)
        parts = directory / f"parts-{hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]}"
        try:
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written ({error})") from None
        names = [parts / f"part-{i:05d}.npz" for i in range(math.ceil(len(recordings) / _PART))]
        _make_missing(names, recordings, limits, tokenizer, host, num_hosts)
        if not all(name.exists() for name in names):
            return None
        with files.aside(directory / "findings.jsonl") as temporary, temporary.open("wb") as file:
            findings = Findings(file)
            for corpus in (*training, *validation):
                for where, message in corpus.faults():
                    findings.add(FAULTY, where, message)
            try:
                clips = _merge(names, findings, recordings, num_training)
            except FileNotFoundError:  # another host has written the report and removed the parts
                return None
            comparison.compare(findings, clips, limits)
        result = _report(findings, clips, limits) | {
            "forecast": comparison.forecast(clips.training, batch, patch_sec, tokenizer is None)
        }
        if output:
            figures = {"duration_sec": clips.training["sec"], "characters_per_sec": comparison.speed(clips.training)}
            report.write(result, figures, directory)
            shutil.rmtree(parts, ignore_errors=True)
        return result


def _report(findings: Findings, clips: Clips, limits: Limits) -> dict:
    levels = {kind: KINDS[kind][0] for kind in findings.count}
    if findings.count["trailing silence"] <= limits.silence_share * len(clips.training):
        levels["trailing silence"] = LOOK
    found = sorted(findings.count.items(), key=lambda item: (levels[item[0]] != SPOILS, -item[1]))
    return comparison.describe(clips) | {
        "findings": [
            {
                "kind": kind,
                "level": levels[kind],
                "count": count,
                "meaning": KINDS[kind][1],
                "examples": findings.examples[kind],
            }
            for kind, count in found
        ],
        "ok": SPOILS not in [levels[kind] for kind, _ in found],
    }


class Facts(NamedTuple):
    """What opening a recording shows."""

    reason: str | None  # of audio.BadRecording, if it cannot be used
    notes: dict[str, str]  # faults of the file and its sound, that reason among them, with what was measured
    sec: float = 0.0
    rate: int = 0
    channels: int = 1
    leading_sec: float = 0.0
    trailing_sec: float = 0.0
    correlation: float = 1.0  # of the channels
    sound: int = 0  # 64-bit hash of the samples
    reference_reason: str | None = None  # of audio.BadRecording, if its reference clip cannot be used


# ---- parts -----------------------------------------------------------------------------------------------------------


def _make_missing(
    names: Sequence[pathlib.Path], recordings: sources.Joined, limits: Limits, tokenizer, host: int, num_hosts: int
) -> None:  # fmt: skip
    """Makes those of this host's parts that are not complete; the first finding of each kind is printed when it comes."""
    from rich.console import Console
    from rich.progress import Progress

    mine = range(host, len(names), num_hosts)
    sizes = {i: min(_PART, len(recordings) - i * _PART) for i in mine}
    todo = [i for i in mine if not names[i].exists()]
    bar = Progress(console=Console(stderr=True, soft_wrap=True), disable=not sys.stderr.isatty())
    task = bar.add_task("opening recordings", total=sum(sizes.values()), completed=sum(sizes[i] for i in mine if i not in todo))
    told: set[str] = set()

    def say(kind: str, line: str) -> None:
        if kind not in told:
            told.add(kind)
            bar.console.print(line, markup=False, highlight=False)

    with bar, ThreadPoolExecutor() as pool:
        for i in todo:
            opened = sources.in_threads(pool, lambda r: _open(r, limits), recordings.part(i * _PART, (i + 1) * _PART))
            with files.aside(names[i].with_suffix(".jsonl")) as temporary, temporary.open("wb") as file:
                findings = Findings(file, say)
                rows, languages, datasets = [], {}, {}
                for number, (recording, facts) in enumerate(opened, i * _PART):
                    if num_tokens := _check(findings, recording, facts, limits, tokenizer):
                        rows.append((number, *_row(recording, facts, num_tokens, languages, datasets)))
                    bar.advance(task)
            found = json.dumps([findings.count, findings.examples])
            with files.aside(names[i]) as temporary:
                np.savez(
                    temporary, rows=np.array(rows, ROW), languages=np.array(list(languages), str),
                    datasets=np.array(list(datasets), str), found=np.array(found),
                )  # fmt: skip


def _row(recording: Recording, facts: Facts, num_tokens: int, languages: dict, datasets: dict) -> tuple:
    """The ROW of a clip, without its number; adds to the numbers of languages and datasets."""
    speaker, dataset = recording.speaker, recording.dataset or str(recording.dataset_id)
    needs_partner = speaker is not None and recording.ref_audio is None and not recording.is_prompt
    return (
        facts.sec, facts.rate, num_tokens, len(recording.text), facts.sound,
        hash_name(speaker, recording.description, visible(recording.text)),
        hash_name(dataset, speaker, recording.session), 0 if speaker is None else hash_name(speaker),
        languages.setdefault(recording.language or "unknown", len(languages)),
        datasets.setdefault(dataset, len(datasets)), needs_partner,
    )  # fmt: skip


def _merge(names: Sequence[pathlib.Path], findings: Findings, recordings: sources.Joined, num_training: int) -> Clips:
    """All parts together; adds their findings."""
    rows, count = np.empty(len(recordings), ROW), 0
    numbers: dict[str, dict[str, int]] = {"language": {}, "dataset": {}}
    for name in names:
        with np.load(name) as part:
            own = part["rows"]
            for field, of_all in numbers.items():
                found = [of_all.setdefault(text, len(of_all)) for text in part[f"{field}s"].tolist()]
                own[field] = np.array(found, np.int32)[own[field]]
            rows[count : count + len(own)] = own
            count += len(own)
            with name.with_suffix(".jsonl").open("rb") as lines:
                findings.merge(*json.loads(str(part["found"])), lines)
    rows = rows[:count]
    first = np.searchsorted(rows["number"], num_training)
    return Clips(rows[:first], rows[first:], list(numbers["language"]), list(numbers["dataset"]), recordings)


# ---- one recording ---------------------------------------------------------------------------------------------------


def _open(recording: Recording, limits: Limits) -> Facts:
    longest = 10 * limits.max_sec  # of a longer one only its length matters
    try:
        found = audio.read(recording.audio, recording.start_sec, recording.end_sec, max_sec=longest)
        audio_A = audio.mono(recording.audio, found, EVERYTHING)
    except audio.BadRecording as error:
        note = str(error).removeprefix(f"{recording.audio}: ")
        return Facts(error.reason, {error.reason: "" if error.reason == "missing" else note})
    figures, rate = sound.measure(found.channels_AE, found.rate), found.rate
    notes = sound.faults(figures)
    notes |= _spectrum(recording, audio_A, rate)
    if found.note:
        notes["cut off" if found.is_cut else "wrong length"] = found.note
    digest = hashlib.sha1(audio_A.tobytes()).digest()
    start, end = sound_span(audio_A, rate, threshold_db=limits.silence_db)
    return Facts(
        None, notes, len(audio_A) / rate, rate, figures.channels, start / rate, (len(audio_A) - end) / rate,
        figures.correlation, int.from_bytes(digest[:8]), _reference_fault(recording, limits),
    )  # fmt: skip


def _spectrum(recording: Recording, audio_A: np.ndarray, rate: int) -> dict[str, str]:
    """What the end of the spectrum tells of the rate."""
    end, half = sound.spectrum_end(audio_A, rate), rate / 2
    if getattr(recording.audio, "is_rate_guessed", False) and end > sound.WIDE * half:
        note = f"taken for {rate} Hz, the spectrum goes on to {end / 1000:.1f} kHz, which MP3 of this rate does not reach"
        return {"doubtful rate": f"{note}; if the set has 32 kHz, name it tfds:...?rate=32000"}
    if end < sound.NARROW * half:
        return {
            "narrow spectrum": f"it ends at {end / 1000:.1f} kHz of {half / 1000:.1f}, as at a rate of {2 * end / 1000:.0f} kHz"
        }
    return {}


def _reference_fault(recording: Recording, limits: Limits) -> str | None:
    if recording.ref_audio is None:
        return None
    try:
        found = audio.read(recording.ref_audio, max_sec=limits.max_sec)
        audio.mono(recording.ref_audio, found, SoundConfig())
        return "too short" if found.sec < limits.min_sec else None
    except audio.BadRecording as error:
        return error.reason


def _file(recording: pathlib.Path | audio.Stored) -> pathlib.Path | str:
    return recording.resolve() if isinstance(recording, pathlib.Path) else str(recording)


def _check(findings: Findings, recording: Recording, facts: Facts, limits: Limits, tokenizer) -> int:
    """Adds the faults of one recording -> its number of tokens; 0 if it cannot be opened."""
    where = str(recording.audio)
    if not says_something(recording.text):
        findings.add("no words", where, repr(recording.text))
    if pieces := control_marks(recording.full_text) if tokenizer is None else tokenizer.control_pieces(recording.full_text):
        findings.add("control pieces", where, " ".join(pieces))
    elif marks := markup(recording.full_text):
        findings.add("markup", where, " ".join(marks))
    for kind, note in facts.notes.items():
        findings.add(kind, where, note)
    if facts.reason:
        return 0
    _, words = split_description(visible(recording.text))
    if words.isupper() and sum(map(str.isalpha, words)) > 3:
        findings.add("upper case", where, words[:60])
    if recording.ref_audio is not None:
        if facts.reference_reason:
            findings.add("unusable reference", where, f"{recording.ref_audio}: {facts.reference_reason}")
        elif _file(recording.ref_audio) == _file(recording.audio):  # a reference clip is a whole file
            findings.add("reference is itself", where)
    if facts.sec < limits.min_sec:
        findings.add("too short", where, f"{facts.sec:.3f} s")
    if facts.sec > limits.max_sec:
        findings.add("too long", where, f"{facts.sec:.1f} s")
    if facts.trailing_sec > limits.silence_sec:
        findings.add("trailing silence", where, f"{facts.trailing_sec:.2f} s")
    if facts.leading_sec > limits.silence_sec:
        findings.add("leading silence", where, f"{facts.leading_sec:.2f} s")
    if facts.channels > 1:
        findings.add("several channels", where, f"{facts.channels}, correlation {facts.correlation:+.2f}")
    if facts.rate < limits.min_hz:
        findings.add("low rate", where, f"{facts.rate} Hz")
    if recording.duration is not None and abs(recording.duration - facts.sec) > limits.duration_sec:
        findings.add("wrong duration", where, f"{recording.duration} s in the manifest, {facts.sec:.2f} s in the file")
    num_tokens = max(1, round(0.3 * len(recording.full_text)))
    if tokenizer is not None:
        text = (tokenizer.rule or TextRule()).write(recording.full_text)  # as prepare does
        num_tokens = len(tokenizer.encode(text))
        unknown, spelt = tokenizer.uncovered(text)
        if unknown:
            findings.add("unknown characters", where, " ".join(unknown))
        elif spelt:
            findings.add("bytes", where, " ".join(spelt))
    return num_tokens
