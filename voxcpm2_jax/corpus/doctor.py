"""`voxcpm2-jax doctor`: finds what is wrong with a corpus before a model is trained on it.

    manifest -> every recording opened once, in threads -> findings, hours, distributions, a forecast of the packed rows

A finding is one kind of fault and the recordings that have it. Its level says whether it spoils a run (the model learns
something wrong, or a reported figure is wrong) or is worth a look. `Limits` holds the thresholds with their reasons. Memory
holds the manifest and a few numbers per clip.
"""

import collections
import hashlib
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import SPEECH_BATCH, BatchConfig
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.corpus.manifest import Recording
from voxcpm2_jax.corpus.trim import sound_span
from voxcpm2_jax.data import audio, packing
from voxcpm2_jax.data.clips import LENGTHS
from voxcpm2_jax.data.text import normal_text

SPOILS, LOOK = "spoils a run", "worth a look"
_EXAMPLES = 5


@dataclass(frozen=True)
class Limits:
    """The values beyond which a recording is at fault."""

    min_sec: float = 0.16  # one patch
    max_sec: float = 60.0  # the default of `prepare`
    silence_sec: float = 0.5  # at an end: a model trained on more never learns to stop
    silence_share: float = 0.01  # of the clips: up to this share, silence at the end does little harm
    silence_db: float = -50.0  # relative to the loudest 10 ms
    clipped_share: float = 1e-3  # of a clip's samples at full scale
    min_hz: int = 16000  # the codec's input rate: a lower one lacks high frequencies
    outlier: float = 6.0  # robust standard deviations of log(characters per second) within a language
    duration_sec: float = 0.1  # difference between the manifest and the file


KINDS = {  # name: (level, meaning)
    "missing": (SPOILS, "the audio file does not exist"),
    "unreadable": (SPOILS, "not a readable audio file"),
    "empty": (SPOILS, "no samples"),
    "not finite": (SPOILS, "samples that are not finite numbers"),
    "silent": (SPOILS, "nothing but silence"),
    "bad part": (SPOILS, "start_sec and end_sec are not inside the recording"),
    "too short": (SPOILS, "shorter than one patch; prepare skips it"),
    "too long": (SPOILS, "longer than max_sec; prepare skips it"),
    "no words": (SPOILS, "a transcript without a letter or digit"),
    "unusable reference": (SPOILS, "the reference clip is missing, unreadable or silent; prepare skips the clip"),
    "reference is itself": (SPOILS, "the reference clip is or contains the clip itself, which teaches copying"),
    "trailing silence": (SPOILS, "too many clips end in silence: the model never learns to stop, unless prepare cuts it"),
    "audio in validation": (SPOILS, "the same audio is in training and validation"),
    "speaker in validation": (SPOILS, "the same speaker is in training and validation"),
    "unknown characters": (SPOILS, "characters that the vocabulary cannot encode"),
    "low rate": (SPOILS, "a sample rate below the codec's input rate"),
    "leading silence": (LOOK, "silence before the speech"),
    "clipping": (LOOK, "samples at full scale"),
    "several channels": (LOOK, "more than one channel; they are averaged"),
    "mixed rates": (LOOK, "a dataset with more than one sample rate"),
    "wrong duration": (LOOK, "the manifest's duration differs from the recording's"),
    "text or duration outlier": (LOOK, "far more or less text per second than is usual in the language"),
    "duplicate text": (LOOK, "the same speaker says the same words more than once"),
    "duplicate audio": (LOOK, "the same audio more than once"),
    "upper case": (LOOK, "a transcript in capitals; prepare has the option sentence_case"),
    "bytes": (LOOK, "characters without a piece of their own in the vocabulary, encoded as bytes"),
    "no partner": (LOOK, "the only clip of its speaker and session: prepare can choose no reference clip for it"),
}


class Facts(NamedTuple):
    """What opening a recording shows."""

    reason: str | None  # of audio.BadRecording, if it cannot be used
    sec: float = 0.0
    rate: int = 0
    channels: int = 1
    leading_sec: float = 0.0
    trailing_sec: float = 0.0
    clipped: float = 0.0  # share of samples at full scale
    digest: bytes = b""
    reference_reason: str | None = None  # of audio.BadRecording, if its reference clip cannot be used


class Findings:
    """Faults by kind: how many recordings have them, and the first few of these."""

    def __init__(self):
        self.count: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, kind: str, where: str, note: str = "") -> None:
        assert kind in KINDS, kind
        self.count[kind] += 1
        if len(self.examples[kind]) < _EXAMPLES:
            self.examples[kind].append(f"{where}: {note}" if note else where)


def examine(
    manifests: Sequence[str | os.PathLike],
    heldout: Sequence[str | os.PathLike] = (),
    *,
    tokenizer=None,
    batch: BatchConfig = SPEECH_BATCH,
    patch_sec: float = 0.16,
    limits: Limits = Limits(),
) -> dict:
    """Opens every recording of training and validation -> the report, plain data.

    Args:
        manifests, heldout: names as for `open_corpus`.
        tokenizer: without one, the number of tokens is estimated from the number of characters.
        batch, patch_sec: budgets of a row, for the forecast.
    Raises:
        UserError: a manifest that cannot be read.
    """
    training = [sources.open_corpus(name) for name in manifests]
    validation = [sources.open_corpus(name) for name in heldout]
    findings = Findings()
    table = _Table()
    total = sum(map(len, training)) + sum(map(len, validation))
    for is_validation, recording, facts in _open_all(training, validation, limits, total):
        _check_one(findings, table, is_validation, recording, facts, limits, tokenizer)
    _check_all(findings, table, limits)
    spoilt = [kind for kind in findings.count if _level(kind, findings, table, limits) == SPOILS]
    return {
        "clips": len(table.sec),
        "recordings": total,
        "hours": round(sum(table.sec) / 3600, 4),
        "by_language": table.hours_by(lambda r: r.language or "unknown"),
        "by_dataset": table.hours_by(lambda r: r.dataset or str(r.dataset_id)),
        "by_speaker": dict(list(table.hours_by(lambda r: r.speaker or "unknown").items())[:20]),
        "speakers": len({recording.speaker for recording in table.recordings} - {None}),
        "rates": {str(rate): count for rate, count in sorted(collections.Counter(table.rate).items())},
        "duration_sec": _quantiles(table.sec),
        "characters_per_sec": _quantiles(table.speed),
        "findings": [
            {
                "kind": kind,
                "level": _level(kind, findings, table, limits),
                "count": count,
                "meaning": KINDS[kind][1],
                "examples": findings.examples[kind],
            }
            for kind, count in sorted(findings.count.items(), key=lambda item: (item[0] not in spoilt, -item[1]))
        ],
        "forecast": _forecast(table, batch, patch_sec, tokenizer is None),
        "ok": not spoilt,
        "distributions": {"duration_sec": table.sec, "characters_per_sec": table.speed},
    }


# ---- one recording ---------------------------------------------------------------------------------------------------


def _open_all(training, validation, limits: Limits, total: int):
    """(is_validation, recording, facts) of all recordings, opened in threads."""
    from rich.console import Console
    from rich.progress import track

    items = ((is_validation, r) for is_validation, group in ((False, training), (True, validation)) for m in group for r in m)
    items = track(items, "opening recordings", total=total, console=Console(stderr=True), disable=not sys.stderr.isatty())
    with ThreadPoolExecutor() as pool:
        for (is_validation, recording), facts in sources.in_threads(pool, lambda item: _open(item[1], limits), items):
            yield is_validation, recording, facts


def _open(recording: Recording, limits: Limits) -> Facts:
    try:
        rate, channels = audio.properties(recording.audio)
        longest = 10 * limits.max_sec  # of a longer one only its length matters
        audio_A = audio.load(recording.audio, rate, recording.start_sec, recording.end_sec, max_sec=longest)
    except audio.BadRecording as error:
        return Facts(error.reason)
    start, end = sound_span(audio_A, rate, threshold_db=limits.silence_db)
    return Facts(
        None, len(audio_A) / rate, rate, channels, start / rate, (len(audio_A) - end) / rate,
        float(np.mean(np.abs(audio_A) >= 0.9995)), hashlib.sha1(audio_A.tobytes()).digest(),
        _reference_fault(recording, limits),
    )  # fmt: skip


def _reference_fault(recording: Recording, limits: Limits) -> str | None:
    if recording.ref_audio is None:
        return None
    try:
        rate, _ = audio.properties(recording.ref_audio)
        audio.load(recording.ref_audio, rate, min_samples=round(limits.min_sec * rate), max_sec=limits.max_sec)
    except audio.BadRecording as error:
        return error.reason


def _check_one(findings, table, is_validation, recording, facts: Facts, limits: Limits, tokenizer) -> None:
    where = str(recording.audio)
    if not any(c.isalnum() for c in recording.text):
        findings.add("no words", where, repr(recording.text))
    if facts.reason:
        findings.add(facts.reason, where)
        return
    if recording.text.isupper() and sum(map(str.isalpha, recording.text)) > 3:
        findings.add("upper case", where, recording.text[:60])
    if recording.ref_audio is not None:
        if facts.reference_reason:
            findings.add("unusable reference", where, f"{recording.ref_audio}: {facts.reference_reason}")
        elif recording.ref_audio.resolve() == recording.audio.resolve():  # a reference clip is a whole file
            findings.add("reference is itself", where)
    if facts.sec < limits.min_sec:
        findings.add("too short", where, f"{facts.sec:.3f} s")
    if facts.sec > limits.max_sec:
        findings.add("too long", where, f"{facts.sec:.1f} s")
    if facts.trailing_sec > limits.silence_sec:
        findings.add("trailing silence", where, f"{facts.trailing_sec:.2f} s")
    if facts.leading_sec > limits.silence_sec:
        findings.add("leading silence", where, f"{facts.leading_sec:.2f} s")
    if facts.clipped > limits.clipped_share:
        findings.add("clipping", where, f"{100 * facts.clipped:.2f} % of the samples")
    if facts.channels > 1:
        findings.add("several channels", where, str(facts.channels))
    if facts.rate < limits.min_hz:
        findings.add("low rate", where, f"{facts.rate} Hz")
    if recording.duration is not None and abs(recording.duration - facts.sec) > limits.duration_sec:
        findings.add("wrong duration", where, f"{recording.duration} s in the manifest, {facts.sec:.2f} s in the file")
    num_tokens = max(1, round(0.3 * len(recording.full_text)))
    if tokenizer is not None:
        text = normal_text(recording.full_text)  # as prepare does
        num_tokens = len(tokenizer.encode(text))
        unknown, spelt = tokenizer.uncovered(text)
        if unknown:
            findings.add("unknown characters", where, " ".join(unknown))
        elif spelt:
            findings.add("bytes", where, " ".join(spelt))
    table.add(is_validation, recording, facts, num_tokens)


# ---- all recordings together -----------------------------------------------------------------------------------------


class _Table:
    """A few numbers of every clip that can be opened; validation clips are kept apart."""

    def __init__(self):
        self.recordings: list[Recording] = []
        self.sec: list[float] = []
        self.speed: list[float] = []  # characters per second
        self.rate: list[int] = []
        self.tokens: list[int] = []
        self.digest: list[bytes] = []
        self.validation: list[tuple[Recording, bytes]] = []

    def add(self, is_validation, recording, facts: Facts, num_tokens: int) -> None:
        if is_validation:
            self.validation.append((recording, facts.digest))
            return
        self.recordings.append(recording)
        self.sec.append(facts.sec)
        self.speed.append(len(recording.text) / max(facts.sec, 1e-3))
        self.rate.append(facts.rate)
        self.tokens.append(num_tokens)
        self.digest.append(facts.digest)

    def hours_by(self, key) -> dict[str, float]:
        hours: collections.Counter[str] = collections.Counter()
        for recording, sec in zip(self.recordings, self.sec):
            hours[key(recording)] += sec / 3600
        return {name: round(value, 4) for name, value in hours.most_common()}


def _check_all(findings: Findings, table: _Table, limits: Limits) -> None:
    """Adds the faults that only show when recordings are compared with each other."""
    by_language: dict[str | None, list[int]] = collections.defaultdict(list)
    rates: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    first_with_text: dict[tuple, str] = {}
    first_with_audio: dict[bytes, str] = {}
    clips_of_voice: collections.Counter[tuple] = collections.Counter()
    for i, recording in enumerate(table.recordings):
        where = str(recording.audio)
        by_language[recording.language].append(i)
        rates[recording.dataset or str(recording.dataset_id)][table.rate[i]] += 1
        words = (recording.speaker, recording.description, " ".join(recording.text.split()))
        if words in first_with_text:
            findings.add("duplicate text", where, f"as {first_with_text[words]}")
        first_with_text.setdefault(words, where)
        if table.digest[i] in first_with_audio:
            findings.add("duplicate audio", where, f"as {first_with_audio[table.digest[i]]}")
        first_with_audio.setdefault(table.digest[i], where)
        clips_of_voice[_voice(recording)] += 1
    for recording in table.recordings:
        is_alone = recording.speaker is not None and clips_of_voice[_voice(recording)] == 1
        if is_alone and recording.ref_audio is None and not recording.is_prompt:
            findings.add("no partner", str(recording.audio), f"speaker {recording.speaker}")
    for dataset, found in rates.items():
        if len(found) > 1:
            findings.add("mixed rates", dataset, ", ".join(f"{n} at {rate} Hz" for rate, n in found.most_common()))
    for members in by_language.values():
        speed = np.log(np.maximum(np.array([table.speed[i] for i in members]), 1e-3))
        middle = np.median(speed)
        spread = max(1.4826 * np.median(np.abs(speed - middle)), 0.1)
        for i, value in zip(members, speed):
            if len(members) >= 8 and abs(value - middle) > limits.outlier * spread:
                note = f"{table.speed[i]:.1f} characters per second; usual are {math.exp(middle):.1f}"
                findings.add("text or duration outlier", str(table.recordings[i].audio), note)
    speakers = {recording.speaker for recording in table.recordings} - {None}
    for recording, digest in table.validation:
        if digest in first_with_audio:
            findings.add("audio in validation", str(recording.audio), f"as {first_with_audio[digest]}")
        if recording.speaker in speakers:
            findings.add("speaker in validation", str(recording.audio), f"speaker {recording.speaker}")


def _voice(recording: Recording) -> tuple:
    """Dataset, speaker and session: prepare chooses reference clips among those with the same three."""
    return recording.dataset or str(recording.dataset_id), recording.speaker, recording.session


def _level(kind: str, findings: Findings, table: _Table, limits: Limits) -> str:
    if kind == "trailing silence" and findings.count[kind] <= limits.silence_share * len(table.sec):
        return LOOK
    return KINDS[kind][0]


def _quantiles(values: Iterable[float]) -> dict[str, float]:
    values = np.array(list(values))
    if not len(values):
        return {}
    names = {"min": 0, "1 %": 1, "median": 50, "99 %": 99, "max": 100}
    return {name: round(float(np.percentile(values, q)), 3) for name, q in names.items()}


def _forecast(table: _Table, batch: BatchConfig, patch_sec: float, is_estimate: bool) -> dict:
    """Rows of an epoch and how full they are, for the clips that fit a row."""
    lengths = np.zeros(len(table.sec), LENGTHS)
    lengths["text"] = table.tokens
    lengths["patches"] = np.ceil(np.array(table.sec) / patch_sec - 1e-6)
    budgets = np.array(packing.budgets_of(batch))
    sizes = packing.sizes(lengths)
    fits = (sizes <= budgets).all(axis=1)
    forecast = {
        "rows": batch.rows, "slots": batch.slots, "patches": batch.patches, "tokens_guessed": is_estimate,
        "clips_that_fit_no_row": int((~fits).sum()),
    }  # fmt: skip
    if not fits.any():
        return forecast
    sizes = sizes[fits]
    _, num_rows = packing.share_rows(sizes[: packing.WINDOW_CLIPS] / budgets)
    num_rows = num_rows * len(sizes) / min(len(sizes), packing.WINDOW_CLIPS)
    used = sizes.sum(axis=0) / num_rows / budgets
    return forecast | {
        "rows_per_epoch": round(num_rows),
        "steps_per_epoch": round(num_rows / batch.rows, 1),
        "slots_used": round(float(used[packing.SLOTS]), 4),
        "patches_used": round(float(used[packing.PATCHES]), 4),
        "recommended_patches": packing.recommend_patches(sizes, batch.slots),
    }


# ---- the report ------------------------------------------------------------------------------------------------------


def write(report: dict, directory: str | os.PathLike) -> None:
    """Writes report.json and a picture of the distributions.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        plain = {name: value for name, value in report.items() if name != "distributions"}
        files.replace_file(directory / "report.json", json.dumps(plain, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
    _draw(directory / "distributions.png", report["distributions"])


def show(report: dict) -> None:
    """Prints the report as tables on standard error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(stderr=True)
    hours = Table(title=f"{report['clips']} clips, {report['hours']:.2f} h, {report['speakers']} speakers")
    for column in ("language", "hours", "dataset", "hours", "speaker", "hours"):
        hours.add_column(column, justify="right" if column == "hours" else "left")
    columns = [list(report[name].items()) for name in ("by_language", "by_dataset", "by_speaker")]
    for cells in list(itertools.zip_longest(*columns, fillvalue=("", None)))[:12]:
        hours.add_row(*(x for name, value in cells for x in (escape(name), "" if value is None else f"{value:.2f}")))
    console.print(hours)
    table = Table(title="findings" if report["findings"] else "no findings")
    for column in ("", "fault", "clips", "meaning", "for example"):
        table.add_column(column, justify="right" if column == "clips" else "left", overflow="fold")
    for finding in report["findings"]:
        example = finding["examples"][0]
        table.add_row(finding["level"], finding["kind"], str(finding["count"]), finding["meaning"], escape(example))
    if report["findings"]:
        console.print(table)
    forecast = report["forecast"]
    if "rows_per_epoch" in forecast:
        console.print(
            f"rows of {forecast['slots']} slots and {forecast['patches']} patches: {forecast['rows_per_epoch']} per epoch, "
            f"{forecast['steps_per_epoch']} steps of {forecast['rows']} rows; {100 * forecast['slots_used']:.1f} % of slots "
            f"and {100 * forecast['patches_used']:.1f} % of patches used"
        )


def _draw(path: pathlib.Path, distributions: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(distributions), figsize=(10, 3), constrained_layout=True)
    labels = {"duration_sec": "duration (s)", "characters_per_sec": "characters per second"}
    for axis, (name, values) in zip(axes, distributions.items()):
        axis.hist(values, bins=60)
        axis.set(xlabel=labels[name], ylabel="clips")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
