"""Scores of a model's speech on held-out texts, beside the recordings of these texts and their codec reconstructions.

    recordings        the real speech: the best score that this judge gives
    reconstructions   recordings through the codec: the best that a backbone can reach with this codec
    generated         the texts, spoken by the model: the first try of each
    retried           the same, where bad cases (speech far too long for its text) are drawn again, as `generate` does

The judge (whisper.py) transcribes all in the same way, in the language that the manifest names for each recording, and
scores.py counts the errors. A recording without a language is taken for English. Speech is judged as it lies in audio/, in 16
bits. Audio is loaded or decoded when the judge takes it, so few clips are in memory at once, however many texts there are.
"""

import collections
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from voxcpm2_jax import files, workdir
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.request import Request
from voxcpm2_jax.config.text import check_speakable
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.corpus.manifest import Recording
from voxcpm2_jax.data import audio
from voxcpm2_jax.evaluate import pictures, scores, whisper
from voxcpm2_jax.inference.api import VoxCPM

RESULT_FILE = "result.json"
SETS = ("recordings", "reconstructions", "generated", "retried")
DEFAULT_LANGUAGE = "en"


class Spoken(NamedTuple):
    """Speech on disk."""

    path: pathlib.Path
    sec: float
    stopped_by: str
    is_bad_case: bool


class AllSpoken(NamedTuple):
    """All speech, by number of the text."""

    first: dict[int, Spoken]
    retried: dict[int, Spoken]  # of the texts whose first try was a bad case
    first_tries_sec: float  # how long the first tries took


def evaluate(
    config: EvaluateConfig, checkpoint: str | os.PathLike, manifest: str | os.PathLike, output: str | os.PathLike
) -> dict:
    """Writes result.json, the generated audio and some spectrograms to `output` -> the content of result.json.

    Args:
        manifest: held-out recordings with their texts, anything that `corpus.sources.open_corpus` opens.
    Returns:
        "scores": set -> measure -> value, over all texts.   "by_language": the same for each language, if there are several.
        "languages": code -> number of texts, and the unit that WER (or "digits") counts.
        "left_out": recordings that are not scored, with the reason.
        "texts_without_language": how many were taken for English.   "rows": each text with its transcripts.
    Raises:
        UserError: no checkpoint, no manifest, no judge installed, a language that the judge does not know, or an output
            directory that cannot be written to.
    """
    recordings, left_out = _speakable(sources.open_corpus(manifest))
    languages = _languages(config, recordings, manifest)
    whisper.whisper_directory()  # raises before anything is spoken if the judge is not installed
    chosen, unusable = _usable(recordings, checkpoint)
    recordings, languages = [recordings[i] for i in chosen], [languages[i] for i in chosen]
    left_out += unusable
    model = VoxCPM.from_pretrained(checkpoint)
    output = pathlib.Path(output)
    try:
        (output / "audio").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error})") from None

    rate, texts = model.sample_rate, [r.text for r in recordings]

    def recording(i: int) -> np.ndarray:
        return audio.load(recordings[i].audio, rate, recordings[i].start_sec, recordings[i].end_sec)

    def reconstruction(i: int) -> np.ndarray:
        r = recordings[i]
        return model.decode([model.encode_file(r.audio, pad="right", start_sec=r.start_sec, end_sec=r.end_sec)])[0]

    def judge(waveform, numbers: Sequence[int]) -> list[str]:
        return whisper.transcribe(map(waveform, numbers), rate, [languages[i] for i in numbers])

    everything = range(len(texts))
    heard = {"recordings": judge(recording, everything), "reconstructions": judge(reconstruction, everything)}
    spoken = _speak(model, config, [r.full_text for r in recordings], output / "audio")
    heard["generated"] = judge(lambda i: _read(spoken.first[i].path), everything)
    again = sorted(spoken.retried)
    heard_again = dict(zip(again, judge(lambda i: _read(spoken.retried[i].path), again))) if again else {}
    heard["retried"] = [heard_again.get(i, transcript) for i, transcript in enumerate(heard["generated"])]
    for i in _spread(len(texts), config.num_pictures):
        titles = f"recording: {texts[i]}", f"generated, heard as: {heard['generated'][i]}"
        picture = output / f"spectrogram_{i:04d}.png"
        pictures.draw_spectrograms(picture, recording(i), _read(spoken.first[i].path), rate, titles)
    first = [spoken.first[i] for i in everything]
    seconds = sum(speech.sec for speech in first)
    result = {
        "checkpoint": str(checkpoint),
        "manifest": str(manifest),
        "texts": len(texts),
        "config": to_dict(config),
        **_all_scores(config, texts, heard, languages),
        "left_out": left_out,
        "texts_without_language": sum(not r.language for r in recordings),
        "generated_sec": round(seconds, 2),
        "real_time_factor": round(spoken.first_tries_sec / seconds, 3),  # compilation included
        "stopped_by_stop_head": sum(speech.stopped_by == "stop head" for speech in first),
        "retried": len(again),
        "bad_after_retries": sum(speech.is_bad_case for speech in spoken.retried.values()),
        "rows": [
            {"text": text, "language": languages[i]} | {name: heard[name][i] for name in SETS} for i, text in enumerate(texts)
        ],
    }
    files.replace_file(output / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def show(result: dict) -> None:
    """Prints the result as a table on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['texts']} held-out texts, transcribed by Whisper-base")
    columns = list(result["scores"]["generated"])
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for code, of_sets in {"": result["scores"], **result.get("by_language", {})}.items():
        for name in SETS:
            cells = [f"{100 * of_sets[name][column]:.1f} %" for column in columns]
            table.add_row(f"{name}, {code}" if code else name, *cells)
    console = Console(stderr=True)
    console.print(table)
    if codes := [code for code, of in result["languages"].items() if of["unit"] == "character"]:
        console.print(f"WER counts characters in {', '.join(codes)}.")
    if left_out := result["left_out"]:
        first = f"{left_out[0]['audio']}: {left_out[0]['reason']}"
        console.print(f"Left out: {len(left_out)}, listed in {RESULT_FILE}; the first: {first}")
    if num_texts := result["texts_without_language"]:
        console.print(f"Texts without a language, taken for English: {num_texts}.")


def _speakable(corpus: sources.Corpus) -> tuple[list[Recording], list[dict[str, str]]]:
    """The recordings whose texts can be spoken, and the others with the reason."""
    recordings, left_out = [], []
    for recording in corpus:
        try:
            check_speakable(recording.full_text, None)
            recordings.append(recording)
        except UserError as error:
            left_out.append({"audio": str(recording.audio), "reason": str(error)})
    if not recordings:
        raise UserError(f"{corpus.name}: none of {len(left_out)} texts can be spoken; the first: {left_out[0]['reason']}")
    return recordings, left_out


def _usable(recordings: Sequence[Recording], checkpoint: str | os.PathLike) -> tuple[list[int], list[dict[str, str]]]:
    """The numbers of the recordings whose audio can be used, each decoded to its end, and the others with the reason."""
    config, codec, _ = workdir.open_configs(checkpoint)
    least_sec = config.patch_size * codec.encoder_hop / codec.sample_rate

    def fault(recording: Recording) -> audio.BadRecording | None:
        try:
            sec = audio.check(recording.audio, recording.start_sec, recording.end_sec)
        except audio.BadRecording as error:
            return error
        short = f"{recording.audio}: {sec:.3f} s is too short; expected at least {least_sec:.3f} s, one patch"
        return audio.BadRecording("too short", short) if sec < least_sec else None

    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(fault, recordings))
    chosen = [i for i, error in enumerate(faults) if error is None]
    left_out = [{"audio": str(r.audio), "reason": str(error)} for r, error in zip(recordings, faults) if error]
    if not chosen:
        raise UserError(f"none of {len(left_out)} recordings can be used; the first: {left_out[0]['reason']}")
    return chosen, left_out


def _languages(config: EvaluateConfig, recordings: Sequence[Recording], manifest) -> list[str]:
    """The language code of each recording; raises UserError for what cannot be scored."""
    try:
        languages = [whisper.language_code(r.language or DEFAULT_LANGUAGE) for r in recordings]
    except UserError as error:
        raise UserError(f"{manifest}: {error}") from None
    if config.measure == "digits" and (others := sorted(set(languages) - {"en"})):
        raise UserError(
            f"{manifest}: measure=digits counts English digits, got recordings in {', '.join(others)}; use measure=words"
        )
    return languages


def _speak(model: VoxCPM, config: EvaluateConfig, texts: list[str], directory: pathlib.Path) -> AllSpoken:
    """Speaks text 7 into 0007.wav, and again into retried/0007.wav if that is a bad case."""
    settings = {"cfg_value": config.cfg_value, "inference_timesteps": config.inference_timesteps, "retry_badcase": False}
    requests = [Request(text, seed=config.seed + i, **settings) for i, text in enumerate(texts)]
    # A batch runs until its longest row ends, so texts of similar length share one.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    first, retried, seconds = {}, {}, 0.0
    for start in range(0, len(order), config.batch_texts):
        group = order[start : start + config.batch_texts]
        begin = time.monotonic()
        first |= _into_files(model, {i: requests[i] for i in group}, directory)
        seconds += time.monotonic() - begin
        bad = {i: _again(requests[i]) for i in group if first[i].is_bad_case}
        retried |= _into_files(model, bad, directory / "retried")
    return AllSpoken(first, retried, seconds)


def _again(request: Request) -> Request:
    """The tries that `generate` makes after the first."""
    more = request.retry_badcase_max_times - 1
    return dataclasses.replace(request, seed=request.seed + 1, retry_badcase=True, retry_badcase_max_times=more)


def _into_files(model: VoxCPM, requests: Mapping[int, Request], directory: pathlib.Path) -> dict[int, Spoken]:
    spoken = {}
    for i, speech in zip(requests, model.speak(list(requests.values()))):
        path = directory / f"{i:04d}.wav"
        directory.mkdir(exist_ok=True)
        audio.save(path, speech.audio_A, model.sample_rate)
        sec = len(speech.audio_A) / model.sample_rate
        spoken[i] = Spoken(path, sec, speech.stopped_by, speech.is_bad_case)
    return spoken


def _read(path: pathlib.Path) -> np.ndarray:
    import soundfile

    return soundfile.read(path, dtype="float32")[0]


def _all_scores(config: EvaluateConfig, texts: list[str], heard: dict[str, list[str]], languages: list[str]) -> dict:
    def scores_of(chosen: Sequence[int]) -> dict[str, dict[str, float]]:
        pick = {name: [transcripts[i] for i in chosen] for name, transcripts in heard.items()}
        wanted, codes = [texts[i] for i in chosen], [languages[i] for i in chosen]
        return {name: _scores(config, wanted, pick[name], codes) for name in SETS}

    counts = sorted(collections.Counter(languages).items())
    units = {code: "digit" if config.measure == "digits" else scores.unit(code) for code, _ in counts}
    result = {
        "scores": scores_of(range(len(texts))),
        "languages": {code: {"texts": count, "unit": units[code]} for code, count in counts},
    }
    if len(counts) > 1:
        result["by_language"] = {code: scores_of([i for i, c in enumerate(languages) if c == code]) for code, _ in counts}
    return result


def _scores(config: EvaluateConfig, texts: list[str], heard: list[str], languages: list[str]) -> dict[str, float]:
    if config.measure == "digits":
        whole = np.mean([scores.digits(text) == scores.digits(h) for text, h in zip(texts, heard)])
        return {"digits right": scores.digit_accuracy(texts, heard), "strings right": float(whole)}
    return {
        "WER": scores.word_error_rate(texts, heard, languages),
        "CER": scores.character_error_rate(texts, heard),
    }


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(most, count))}) if most else []
