"""What is wrong with a corpus, found before the money is spent.

    manifest -> every recording opened once, in threads -> findings, hours, distributions, a forecast of its rows

A finding is one kind of fault with the recordings that have it. It either spoils a run (the model learns something false,
or a figure lies) or is worth a look. Thresholds stand in `Limits` with their reasons. Memory holds the manifest
and a few numbers a clip.
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
from voxcpm2_jax.corpus import manifest, sources
from voxcpm2_jax.data import audio, packing
from voxcpm2_jax.data.text import normal_text

SPOILS, LOOK = "spoils a run", "worth a look"
_EXAMPLES = 5


@dataclass(frozen=True)
class Limits:
    """Where a fault begins."""

    min_sec: float = 0.16  # one patch
    max_sec: float = 60.0  # what `prepare` leaves in
    silence_sec: float = 0.5  # at an end: a model that hears more never learns to stop
    silence_share: float = 0.01  # of the clips; fewer with such ends do little harm
    silence_db: float = -50.0  # below the loudest 10 ms
    clipped_share: float = 1e-3  # of a clip's samples at full scale
    min_hz: int = 16000  # a lower rate lacks what the codec listens to
    outlier: float = 6.0  # robust standard deviations of log(characters per second) within a language
    duration_sec: float = 0.1  # between what the manifest says and what is there


KINDS = {  # name: (level, what it means)
    "missing": (SPOILS, "the audio file is not there"),
    "unreadable": (SPOILS, "not a recording that can be read"),
    "empty": (SPOILS, "no samples"),
    "not finite": (SPOILS, "samples that are not numbers"),
    "silent": (SPOILS, "nothing to hear"),
    "bad part": (SPOILS, "start_sec and end_sec lie outside the recording"),
    "too short": (SPOILS, "shorter than one patch; prepare leaves it out"),
    "too long": (SPOILS, "longer than max_sec; prepare leaves it out"),
    "no words": (SPOILS, "a transcript without a letter or digit"),
    "reference of no use": (SPOILS, "the reference recording is missing, unreadable or silent; prepare leaves the clip out"),
    "reference is itself": (SPOILS, "a clip as its own reference, or within it, teaches copying"),
    "trailing silence": (SPOILS, "too many clips end in silence: the model learns no end, unless prepare cuts it (trim)"),
    "heard in validation": (SPOILS, "the same audio is in training and validation"),
    "speaker in validation": (SPOILS, "a speaker of training is in validation"),
    "unknown characters": (SPOILS, "the vocabulary has no piece for them"),
    "low rate": (SPOILS, "recorded at a lower rate than the codec hears"),
    "leading silence": (LOOK, "silence before the speech"),
    "clipping": (LOOK, "samples at full scale"),
    "several channels": (LOOK, "mixed down to one"),
    "mixed rates": (LOOK, "a dataset with more than one sample rate"),
    "wrong duration": (LOOK, "the manifest's duration is not the recording's"),
    "text or duration outlier": (LOOK, "far more or less text a second than others of the language"),
    "duplicate text": (LOOK, "one speaker says the same words again"),
    "duplicate audio": (LOOK, "the same sound twice"),
    "upper case": (LOOK, "a transcript in capitals; prepare has sentence_case"),
    "bytes": (LOOK, "characters spelt in bytes: the vocabulary does not cover them"),
    "no partner": (LOOK, "the only clip of its speaker and session: no reference can be chosen"),
}


class Heard(NamedTuple):
    """What opening a recording tells."""

    reason: str | None  # of audio.BadRecording
    sec: float = 0.0
    rate: int = 0
    channels: int = 1
    leading_sec: float = 0.0
    trailing_sec: float = 0.0
    clipped: float = 0.0  # share of samples at full scale
    digest: bytes = b""
    reference_reason: str | None = None  # of audio.BadRecording


class Findings:
    """Faults by kind: their number, and the first few recordings that have them."""

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
    """Looks at every recording of training and validation -> the report, plain data.

    Args:
        manifests, heldout: what `open_corpus` takes.
        tokenizer: has `encode(text) -> ids`; without one, tokens are guessed from the number of characters.
        batch, patch_sec: budgets of a row, for the forecast.
    Raises:
        UserError: a manifest that cannot be read.
    """
    training = [sources.open_corpus(name) for name in manifests]
    validation = [sources.open_corpus(name) for name in heldout]
    findings = Findings()
    table = _Table()
    total = sum(map(len, training)) + sum(map(len, validation))
    for is_validation, recording, heard in _listen(training, validation, limits, total):
        _look_at(findings, table, is_validation, recording, heard, limits, tokenizer)
    _compare(findings, table, limits)
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


def _listen(training, validation, limits: Limits, total: int):
    """(is_validation, recording, what was heard) of all recordings, opened in threads."""
    from rich.console import Console
    from rich.progress import track

    items = ((is_validation, r) for is_validation, group in ((False, training), (True, validation)) for m in group for r in m)
    items = track(items, "listening", total=total, console=Console(stderr=True), disable=not sys.stderr.isatty())
    with ThreadPoolExecutor() as pool:
        for (is_validation, recording), heard in manifest.in_threads(pool, lambda item: _hear(item[1], limits), items):
            yield is_validation, recording, heard


def _hear(recording: manifest.Recording, limits: Limits) -> Heard:
    try:
        rate, channels = audio.properties(recording.audio)
        longest = 10 * limits.max_sec  # of more nothing is worth knowing but that it is too long
        audio_A = audio.load(recording.audio, rate, recording.start_sec, recording.end_sec, max_sec=longest)
    except audio.BadRecording as error:
        return Heard(error.reason)
    start, end = audio.sound_span(audio_A, rate, threshold_db=limits.silence_db)
    return Heard(
        None, len(audio_A) / rate, rate, channels, start / rate, (len(audio_A) - end) / rate,
        float(np.mean(np.abs(audio_A) >= 0.9995)), hashlib.sha1(audio_A.tobytes()).digest(),
        _reference_fault(recording, limits),
    )  # fmt: skip


def _reference_fault(recording: manifest.Recording, limits: Limits) -> str | None:
    if recording.ref_audio is None:
        return None
    try:
        rate, _ = audio.properties(recording.ref_audio)
        audio.load(recording.ref_audio, rate, min_samples=round(limits.min_sec * rate), max_sec=limits.max_sec)
    except audio.BadRecording as error:
        return error.reason


def _look_at(findings, table, is_validation, recording, heard: Heard, limits: Limits, tokenizer) -> None:
    where = str(recording.audio)
    if not any(c.isalnum() for c in recording.text):
        findings.add("no words", where, repr(recording.text))
    if heard.reason:
        findings.add(heard.reason, where)
        return
    if recording.text.isupper() and sum(map(str.isalpha, recording.text)) > 3:
        findings.add("upper case", where, recording.text[:60])
    if recording.ref_audio is not None:
        if heard.reference_reason:
            findings.add("reference of no use", where, f"{recording.ref_audio}: {heard.reference_reason}")
        elif recording.ref_audio.resolve() == recording.audio.resolve():  # a reference is a whole file
            findings.add("reference is itself", where)
    if heard.sec < limits.min_sec:
        findings.add("too short", where, f"{heard.sec:.3f} s")
    if heard.sec > limits.max_sec:
        findings.add("too long", where, f"{heard.sec:.1f} s")
    if heard.trailing_sec > limits.silence_sec:
        findings.add("trailing silence", where, f"{heard.trailing_sec:.2f} s")
    if heard.leading_sec > limits.silence_sec:
        findings.add("leading silence", where, f"{heard.leading_sec:.2f} s")
    if heard.clipped > limits.clipped_share:
        findings.add("clipping", where, f"{100 * heard.clipped:.2f} % of the samples")
    if heard.channels > 1:
        findings.add("several channels", where, str(heard.channels))
    if heard.rate < limits.min_hz:
        findings.add("low rate", where, f"{heard.rate} Hz")
    if recording.duration is not None and abs(recording.duration - heard.sec) > limits.duration_sec:
        findings.add("wrong duration", where, f"{recording.duration} s in the manifest, {heard.sec:.2f} s in the file")
    num_tokens = max(1, round(0.3 * len(recording.full_text)))
    if tokenizer is not None:
        text = normal_text(recording.full_text)  # as prepare does
        num_tokens = len(tokenizer.encode(text))
        unknown, spelt = tokenizer.uncovered(text)
        if unknown:
            findings.add("unknown characters", where, " ".join(unknown))
        elif spelt:
            findings.add("bytes", where, " ".join(spelt))
    table.add(is_validation, recording, heard, num_tokens)


# ---- all of them together --------------------------------------------------------------------------------------------


class _Table:
    """A few numbers of every clip that can be heard; those of validation apart."""

    def __init__(self):
        self.recordings: list[manifest.Recording] = []
        self.sec: list[float] = []
        self.speed: list[float] = []  # characters a second
        self.rate: list[int] = []
        self.tokens: list[int] = []
        self.digest: list[bytes] = []
        self.validation: list[tuple[manifest.Recording, bytes]] = []

    def add(self, is_validation, recording, heard: Heard, num_tokens: int) -> None:
        if is_validation:
            self.validation.append((recording, heard.digest))
            return
        self.recordings.append(recording)
        self.sec.append(heard.sec)
        self.speed.append(len(recording.text) / max(heard.sec, 1e-3))
        self.rate.append(heard.rate)
        self.tokens.append(num_tokens)
        self.digest.append(heard.digest)

    def hours_by(self, key) -> dict[str, float]:
        hours: collections.Counter[str] = collections.Counter()
        for recording, sec in zip(self.recordings, self.sec):
            hours[key(recording)] += sec / 3600
        return {name: round(value, 4) for name, value in hours.most_common()}


def _compare(findings: Findings, table: _Table, limits: Limits) -> None:
    by_language: dict[str | None, list[int]] = collections.defaultdict(list)
    rates: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    said: dict[tuple, str] = {}
    sounded: dict[bytes, str] = {}
    company: collections.Counter[tuple] = collections.Counter()
    for i, recording in enumerate(table.recordings):
        where = str(recording.audio)
        by_language[recording.language].append(i)
        rates[recording.dataset or str(recording.dataset_id)][table.rate[i]] += 1
        words = (recording.speaker, recording.description, " ".join(recording.text.split()))
        if words in said:
            findings.add("duplicate text", where, f"as {said[words]}")
        said.setdefault(words, where)
        if table.digest[i] in sounded:
            findings.add("duplicate audio", where, f"as {sounded[table.digest[i]]}")
        sounded.setdefault(table.digest[i], where)
        company[_voice(recording)] += 1
    for recording in table.recordings:
        is_alone = recording.speaker is not None and company[_voice(recording)] == 1
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
                note = f"{table.speed[i]:.1f} characters a second, usual {math.exp(middle):.1f}"
                findings.add("text or duration outlier", str(table.recordings[i].audio), note)
    speakers = {recording.speaker for recording in table.recordings} - {None}
    for recording, digest in table.validation:
        if digest in sounded:
            findings.add("heard in validation", str(recording.audio), f"as {sounded[digest]}")
        if recording.speaker in speakers:
            findings.add("speaker in validation", str(recording.audio), f"speaker {recording.speaker}")


def _voice(recording: manifest.Recording) -> tuple:
    """Among the clips of one, prepare chooses references."""
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


def _forecast(table: _Table, batch: BatchConfig, patch_sec: float, is_guess: bool) -> dict:
    """Rows of an epoch and how full they are, for the clips that fit a row."""
    lengths = np.zeros((len(table.sec), 6), np.int32)
    lengths[:, packing.TEXT] = table.tokens
    lengths[:, packing.PATCHES] = np.ceil(np.array(table.sec) / patch_sec - 1e-6)
    budgets = np.array([batch.slots, batch.patches, batch.target_patches or batch.patches])
    fits = (packing.sizes(lengths) <= budgets).all(axis=1)
    forecast = {
        "rows": batch.rows, "slots": batch.slots, "patches": batch.patches, "tokens_guessed": is_guess,
        "clips_that_fit_no_row": int((~fits).sum()),
    }  # fmt: skip
    if not fits.any():
        return forecast
    sizes_N3 = packing.sizes(lengths[fits])
    _, num_rows = packing.share_rows(sizes_N3[: packing.WINDOW_CLIPS] / budgets)
    num_rows = num_rows * len(sizes_N3) / min(len(sizes_N3), packing.WINDOW_CLIPS)
    used = sizes_N3.sum(axis=0) / num_rows / budgets
    return forecast | {
        "rows_per_epoch": round(num_rows),
        "steps_per_epoch": round(num_rows / batch.rows, 1),
        "slots_used": round(float(used[0]), 4),
        "patches_used": round(float(used[1]), 4),
        "recommended_patches": packing.recommend_patches(sizes_N3, batch.slots),
    }


# ---- the report ------------------------------------------------------------------------------------------------------


def write(report: dict, directory: str | os.PathLike) -> None:
    """Writes report.json and pictures of the distributions.

    Raises:
        UserError: the directory cannot be written to.
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
    table = Table(title="findings" if report["findings"] else "nothing found")
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
            f"rows of {forecast['slots']} slots and {forecast['patches']} patches: {forecast['rows_per_epoch']} an epoch, "
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
