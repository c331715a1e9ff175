"""A model's speech of held-out texts, judged beside the recordings and their reconstructions by the codec.

    recordings        what the judge makes of the real thing: the ceiling
    reconstructions   recordings through the codec: what the backbone can reach at most
    generated         texts alone, spoken by the model

All three are heard by the same judge under the same protocol (speech.py).
"""

import json
import os
import pathlib
import time

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.data import audio
from voxcpm2_jax.data.text import normal_text
from voxcpm2_jax.evaluate import pictures, scores, whisper
from voxcpm2_jax.inference.api import Speech, VoxCPM

RESULT_FILE = "result.json"
SETS = ("recordings", "reconstructions", "generated")


def evaluate(
    config: EvaluateConfig, checkpoint: str | os.PathLike, manifest: str | os.PathLike, output: str | os.PathLike
) -> dict:
    """Writes result.json, the audio of all texts and some spectrograms to `output` -> the content of result.json.

    Args:
        manifest: held-out recordings with their texts, anything that data/corpus.py opens.
    Raises:
        UserError: no checkpoint, no manifest, no judge installed, or an output directory that cannot be written to.
    """
    recordings = list(sources.open_corpus(manifest))
    whisper.whisper_directory()  # a judge that is not installed is told of before anything is spoken
    model = VoxCPM.from_pretrained(checkpoint)
    output = pathlib.Path(output)
    try:
        (output / "audio").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error})") from None

    start = time.monotonic()
    spoken = _speak(model, config, [normal_text(r.full_text) for r in recordings])  # as in training
    speaking_sec = time.monotonic() - start
    parts = [{"start_sec": r.start_sec, "end_sec": r.end_sec} for r in recordings]
    coded = [model.encode_file(r.audio, pad="right", **part) for r, part in zip(recordings, parts)]
    sets = {
        "recordings": [audio.load(r.audio, model.sample_rate, **part) for r, part in zip(recordings, parts)],
        "reconstructions": model.decode(coded),
        "generated": [s.audio_A for s in spoken],
    }
    texts = [r.text for r in recordings]
    heard = {name: whisper.transcribe(waves, model.sample_rate) for name, waves in sets.items()}
    for i, speech in enumerate(spoken):
        audio.save(output / "audio" / f"{i:04d}.wav", speech.audio_A, model.sample_rate)
    for i in _spread(len(texts), config.num_pictures):
        pair = sets["recordings"][i], sets["generated"][i]
        titles = f"recording: {texts[i]}", f"generated, heard as: {heard['generated'][i]}"
        pictures.draw_spectrograms(output / f"spectrogram_{i:04d}.png", *pair, model.sample_rate, titles)
    seconds = sum(len(x) for x in sets["generated"]) / model.sample_rate
    result = {
        "checkpoint": str(checkpoint),
        "manifest": str(manifest),
        "texts": len(texts),
        "config": to_dict(config),
        "scores": {name: _scores(config, texts, heard[name]) for name in SETS},
        "generated_sec": round(seconds, 2),
        "real_time_factor": round(speaking_sec / seconds, 3),  # compilation included
        "stopped_by_stop_head": sum(s.stopped_by == "stop head" for s in spoken),
        "retried": sum(s.num_tries > 1 for s in spoken),
        "rows": [{"text": text} | {name: heard[name][i] for name in SETS} for i, text in enumerate(texts)],
    }
    files.replace_file(output / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def show(result: dict) -> None:
    """Prints the result as a table on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['texts']} held-out texts, heard by Whisper-base")
    columns = list(result["scores"]["generated"])
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for name in SETS:
        table.add_row(name, *(f"{100 * result['scores'][name][column]:.1f} %" for column in columns))
    Console(stderr=True).print(table)


def _speak(model: VoxCPM, config: EvaluateConfig, texts: list[str]) -> list[Speech]:
    settings = {"cfg_value": config.cfg_value, "inference_timesteps": config.inference_timesteps}
    requests = [{"text": text, "seed": config.seed + i, **settings} for i, text in enumerate(texts)]
    # Neighbours of like length waste no steps on each other.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    spoken: dict[int, Speech] = {}
    for first in range(0, len(order), config.batch_texts):
        group = order[first : first + config.batch_texts]
        spoken |= zip(group, model.speak([requests[i] for i in group]))
    return [spoken[i] for i in range(len(texts))]


def _scores(config: EvaluateConfig, texts: list[str], heard: list[str]) -> dict[str, float]:
    if config.measure == "digits":
        whole = np.mean([scores.digits(text) == scores.digits(h) for text, h in zip(texts, heard)])
        return {"digits right": scores.digit_accuracy(texts, heard), "strings right": float(whole)}
    return {"WER": scores.word_error_rate(texts, heard), "CER": scores.character_error_rate(texts, heard)}


def _spread(n: int, k: int) -> list[int]:
    """At most k of n indices, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, n - 1, min(k, n))}) if k else []
