"""`voxcpm2-jax bench data`: how fast this machine reads training batches.

Runs the data path of training (plan, ArrayRecord, decoding, packing, prefetch) and nothing else. Audio per second of wall
time is the speed with all cores; audio per second of CPU time is the speed of one core.
"""

import math
import os
import tempfile
import time

import numpy as np

from voxcpm2_jax.bench.corpora import write_corpus
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.data import pipeline
from voxcpm2_jax.data.clips import LENGTHS, Clip, Index
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.shards import Shards
from voxcpm2_jax.processes import say

_HOURS = 2.0  # of synthetic clips
_SHARDS = 4


def data(config: BackboneRun, shards: str | os.PathLike | None = None, *, seconds: float = 10.0) -> dict:
    """Seconds of audio in the batches of a run, per second.

    Args:
        config: its batch, stages and seed are used; all rows are read by this host.   shards: made by `prepare`; None:
            synthetic ones, in a temporary directory.   seconds: how long to measure, after the first batch.
    Returns:
        the figures, as plain data.
    Raises:
        UserError: no shards in the directory, no clip fits a row, or `seconds` is not positive.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds must be a number over 0, got {seconds}")
    if shards is not None:
        return _measure(config, shards, seconds)
    with tempfile.TemporaryDirectory(prefix="voxcpm2-bench-") as directory:
        write_synthetic(directory, config)
        return _measure(config, directory, seconds) | {"data": "synthetic"}


def _measure(config: BackboneRun, directory, seconds: float) -> dict:
    source = Shards(directory)
    begin = time.perf_counter()
    mix = Mix(config.seed, source.index, source.patch_sec, config.batch, config.stages)
    batches = pipeline.batches(source, mix)
    first = next(batches)
    first_batch_sec = time.perf_counter() - begin

    num_batches = num_clips = slots = patches = all_slots = all_patches = 0
    begin, begin_cpu = time.perf_counter(), time.process_time()
    wall_sec = 0.0
    while wall_sec < seconds:
        batch = next(batches)
        wall_sec = time.perf_counter() - begin
        num_batches += 1
        num_clips += int(batch.segment_BT.max(axis=1).sum())
        slots += int(np.count_nonzero(batch.segment_BT))
        patches += int(np.count_nonzero(batch.slot_BM >= 0))
        all_slots += batch.segment_BT.size
        all_patches += batch.slot_BM.size
    cpu_sec = time.process_time() - begin_cpu
    batches.close()
    audio_sec = patches * source.patch_sec
    record_bytes = patches * np.prod(source.patch_shape) * np.dtype(source.header.latent_dtype).itemsize
    return {
        "audio_sec_per_sec": round(audio_sec / wall_sec),
        "audio_sec_per_cpu_sec": round(audio_sec / cpu_sec),
        "cores_used": round(cpu_sec / wall_sec, 2),
        "cores": len(os.sched_getaffinity(0)),
        "batches": num_batches,
        "rows": first.tokens_BT.shape[0],
        "clips_per_sec": round(num_clips / wall_sec),
        "latent_mb_per_sec": round(float(record_bytes) / wall_sec / 1e6, 1),
        "slots_used": round(slots / all_slots, 4),
        "patches_used": round(patches / all_patches, 4),
        "first_batch_sec": round(first_batch_sec, 3),
        "wall_sec": round(wall_sec, 2),
        "data": str(directory),
    }


def show(result: dict) -> None:
    """Prints the figures in one line on standard error."""
    say(
        f"{result['audio_sec_per_cpu_sec']:,} s of audio per second and core ({result['audio_sec_per_sec']:,} per second of "
        f"wall time, {result['cores_used']} of {result['cores']} cores busy); rows {result['slots_used']:.1%} full, patches "
        f"{result['patches_used']:.1%}; first batch after {result['first_batch_sec']:.2f} s"
    )


def write_synthetic(directory: str | os.PathLike, config: BackboneRun, hours: float = _HOURS) -> None:
    """Writes shards of noise with the lengths of speech: log-normal, median 7 s, sigma 0.6, 1 to 30 s, 3.2 tokens per second.

    Clips are shortened to fit the rows of the config.
    """
    model, batch = config.model, config.batch
    rng = np.random.default_rng(0)
    longest = min(batch.patches, batch.target_patches or batch.patches, int((batch.slots - 2) / (1 + 3.2 * config.patch_sec)))
    if longest < 1:
        raise UserError(f"batch: {batch.slots} slots hold no clip")
    num_clips = max(_SHARDS, round(hours * 3600 / 8.4))
    sec = (7 * np.exp(0.6 * rng.standard_normal(num_clips))).clip(1, 30)
    patches = np.minimum(np.ceil(sec / config.patch_sec), longest).astype(np.int32)
    lengths = np.zeros(num_clips, LENGTHS)
    lengths["patches"] = patches
    lengths["text"] = np.maximum(1, 3.2 * config.patch_sec * patches)
    shape = (model.patch_size, model.feat_dim)

    def clips(numbers):
        for i in numbers:
            ids = rng.integers(105, model.lm_config.vocab_size, lengths["text"][i], dtype=np.int32)
            patches_MPC = rng.standard_normal((lengths["patches"][i], *shape), np.float32)
            text = "noise " * (len(ids) // 2)
            yield Clip(ids, patches_MPC, text=text, dataset="noise", language="none", speaker=str(i % 50))

    shards = [clips(numbers) for numbers in np.array_split(np.arange(num_clips), _SHARDS)]
    write_corpus(directory, model, config.patch_sec, Index(lengths, (("noise", "none"),)), shards)
