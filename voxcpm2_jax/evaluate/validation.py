"""The held-out loss: a figure that depends on the weights and the clips, and on nothing else.

    clip -> (by a hash of its content) layout, flow times, noise -> loss of each of its patches -> sums over the clip
    loss = sum over clips / count over clips, with its standard error over speakers

A clip always gets the same draws: whichever other clips there are, in whichever batch and row it stands, on any mesh, in any
run and after any resume. Its flow times are stratified: the training distribution is cut into as many equally likely
intervals as the clip has target patches, and each patch gets a time from another interval. Conditioning is never dropped,
and mean mode (flow.py) is evaluated at r = t. A clip that can be laid out in several ways
(with a reference clip, with its description) gets one of them. Prompt clips bear no loss and are skipped.

Clips of one speaker are alike, so they are no independent samples: the standard error is that of clusters, one for each speaker
of a dataset. A clip without a named speaker is a cluster of its own.

Devices compute sums per patch; the host adds them up in float64.
"""

import hashlib
import json
import math
import os
import pathlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from voxcpm2_jax import files, metrics, processes, sharding
from voxcpm2_jax.checkpoint.arrays import Weights, flatten, nest
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.model import ModelConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import BatchConfig, ValidationConfig
from voxcpm2_jax.data import packing
from voxcpm2_jax.data.clips import (
    MODES,
    NO_REFERENCE,
    OWN_REFERENCE,
    Draw,
    Index,
    Source,
    label,
    label_names,
    lay_out_draw,
)
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.sequence import Batch, Sequence, pack

RESULT_FILE = "result.json"
LOSSES = ("loss_diff", "loss_stop")


class Item(NamedTuple):
    """A held-out clip with its layout and draws, which never change."""

    label: int  # dataset, language and mode, see `clips.label`
    speaker: tuple[str | None, str] | None  # dataset and speaker; None: not named
    sequence: Sequence
    time_M: np.ndarray  # float32
    noise_MPC: np.ndarray  # float32


class Rows(NamedTuple):
    """A batch with its draws; `batch.label_BM` is the number of each patch's item."""

    batch: Batch
    time_BM: jax.Array
    noise_BMPC: jax.Array


class Validation:
    """The held-out loss of any weights of one model.

    Args:
        source: held-out clips.   budgets: of a batch; clips that fit no row are skipped, with a line on standard error.
        mesh: the devices that share a batch; each process reads all clips and keeps the rows of its own devices.
    Raises:
        UserError: no clip fits.
    """

    def __init__(self, model: ModelConfig, source: Source, budgets: BatchConfig, config: ValidationConfig, mesh):
        self._mesh = mesh
        scheduler = model.dit_config.cfm_config.t_scheduler
        items = [make_item(source, number, config.seed, scheduler) for number in _chosen(source.index, config.max_clips)]
        limits = np.array([budgets.slots, budgets.patches, budgets.target_patches or budgets.patches])
        sizes = np.array([(s.num_slots, s.num_patches, s.num_targets) for _, _, s, _, _ in items]).reshape(-1, 3)
        fits = (sizes <= limits).all(axis=1)
        if not fits.any():
            slots, patches, targets = limits
            raise UserError(
                f"held-out clips: none of {len(items)} bears loss and fits a row of {slots} slots, {patches} patches and "
                f"{targets} target patches"
            )
        if not fits.all():
            processes.say(f"validation: {(~fits).sum()} of {len(items)} clips fit no row and are skipped")
        self._items = [item for item, does_fit in zip(items, fits) if does_fit]
        self._labels = metrics.name_labels(
            label_names(source.index),
            np.bincount([item.label for item in self._items], minlength=len(source.index.groups) * len(MODES)),
        )
        self._cluster_of_item = _clusters([item.speaker for item in self._items])
        row_of_item, num_rows = packing.share_rows(sizes[fits] / limits)
        shards = mesh.shape["replica"] * mesh.shape["data"]
        self._num_rows = shards * math.ceil(min(budgets.rows, num_rows) / shards)
        rows = [np.flatnonzero(row_of_item == row).tolist() for row in range(num_rows)]
        rows += [[]] * (-num_rows % self._num_rows)
        mine = sharding.local_rows(mesh, self._num_rows)
        self._batches = [
            self._pack([rows[start + row] for row in mine], budgets, source.patch_shape)
            for start in range(0, len(rows), self._num_rows)
        ]
        compute = Compute(remat="none", max_segments=max(map(len, rows)), platform=sharding.platform(mesh))
        program = partial(_of_patches, config=model, target_patches=budgets.target_patches, compute=compute)
        whole = jax.NamedSharding(mesh, jax.P())  # replicated, because every process adds up the whole result
        self._program = jax.jit(program, out_shardings=whole)

    @property
    def num_clips(self) -> int:
        return len(self._items)

    @property
    def num_clusters(self) -> int:
        """Over how many speakers, and clips without a named one, standard errors are computed."""
        return len(np.unique(self._cluster_of_item))

    def figures(self, params) -> dict[str, float | None]:
        """Losses and their standard errors ("loss_diff_se"), overall and by flow time, dataset, language and mode.

        Also precision and recall of the stop head. None where nothing was counted, and for errors over fewer than two speakers.
        """
        totals: dict[str, np.ndarray] = {}  # [2, clips]: sums and counts
        by_time = np.zeros((2, len(metrics.TIME_BINS)))
        for rows in self._batches:
            pairs, item_BM, time_BM = jax.device_get(
                self._program(params, sharding.global_batch(rows, self._mesh, self._num_rows))
            )
            is_used_BM = item_BM >= 0
            for name, pair in pairs.items():
                sums = [np.bincount(item_BM[is_used_BM], x_BM[is_used_BM], self.num_clips) for x_BM in pair]
                totals[name] = totals.get(name, 0.0) + np.stack(sums)
            bins = np.minimum(time_BM[is_used_BM] * len(metrics.TIME_BINS), len(metrics.TIME_BINS) - 1).astype(int)
            by_time += [np.bincount(bins, x_BM[is_used_BM], len(metrics.TIME_BINS)) for x_BM in pairs["loss_diff"]]
        return self._divided(totals, by_time)

    def _divided(self, totals, by_time) -> dict[str, float | None]:
        found = {}
        for name in LOSSES:
            found |= {name: _mean(totals[name]), f"{name}_se": standard_error(totals[name], self._cluster_of_item)}
        found |= {name: _mean(totals[name]) for name in ("stop_precision", "stop_recall")}
        found |= {f"loss_diff/time/{name}": _mean(pair) for name, pair in zip(metrics.TIME_BINS, by_time.T[..., None])}
        groups = np.array(self._labels.members)[[item.label for item in self._items]]  # [clips, 3]
        for number, group in enumerate(self._labels.names):
            is_member = (groups == number).any(axis=1)
            for name in LOSSES:
                pair, cluster_of_item = totals[name][:, is_member], self._cluster_of_item[is_member]
                found |= {f"{name}/{group}": _mean(pair), f"{name}_se/{group}": standard_error(pair, cluster_of_item)}
        return found

    def _pack(self, rows: list[list[int]], budgets: BatchConfig, patch_shape) -> Rows:
        """The batch of these rows, given as numbers of items."""
        form = {"num_slots": budgets.slots, "num_patches": budgets.patches}
        items = [[self._items[number] for number in row] for row in rows]
        times = [[item.sequence._replace(patches_MPC=item.time_M[:, None, None]) for item in row] for row in items]
        noises = [[item.sequence._replace(patches_MPC=item.noise_MPC) for item in row] for row in items]
        sequences = [[item.sequence for item in row] for row in items]
        return Rows(
            pack(sequences, **form, patch_shape=patch_shape, labels=rows),
            pack(times, **form, patch_shape=(1, 1)).patches_BMPC[..., 0, 0],
            pack(noises, **form, patch_shape=patch_shape).patches_BMPC,
        )


def _of_patches(params, rows: Rows, *, config: ModelConfig, target_patches: int | None, compute: Compute):
    """Sums and counts of every patch, with its item and flow time."""
    draws = voxcpm2.Draws(rows.time_BM, rows.noise_BMPC, jnp.zeros(rows.time_BM.shape, bool))
    terms = voxcpm2.loss_terms(params, config, rows.batch, draws, target_patches=target_patches, compute=compute)
    M = terms["target_BM"].shape[1]
    return voxcpm2.patch_figures(terms, rows.batch.stop_BM), rows.batch.label_BM[:, :M], rows.time_BM[:, :M]


def evaluate(
    config: EvaluateConfig, checkpoint: str | os.PathLike, shards: str | os.PathLike, output: str | os.PathLike
) -> dict:
    """Writes the held-out loss of a checkpoint (of its averaged weights, if it has them) to result.json -> its content.

    Args:
        shards: made by `prepare` with the checkpoint's codec and tokenizer.   output: directory of result.json.
    Raises:
        UserError: no checkpoint, no shards, shards of another codec or tokenizer, or `output` cannot be written to.
    """
    from voxcpm2_jax import workdir
    from voxcpm2_jax.data.shards import Shards, check_fit

    opened = workdir.open_model(checkpoint)
    source = Shards(shards)
    check_fit(source, opened.config, where=str(shards))
    workdir.check_provenance(checkpoint, source.header)
    output = pathlib.Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error})") from None
    mesh = sharding.make_mesh((1, -1, 1))
    with jax.set_mesh(mesh):
        validation = Validation(opened.config, source, config.batch, config.validation, mesh)
        figures = validation.figures(_on_devices(opened.weights, mesh))
    result = {
        "checkpoint": str(checkpoint), "data": str(shards), "clips": validation.num_clips,
        "clusters": validation.num_clusters, "config": to_dict(config),
    } | {name: metrics.number(value) for name, value in figures.items()}  # fmt: skip
    files.replace_file(output / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def _on_devices(weights: Weights, mesh) -> dict:
    """The parameters, read one by one, so that the host holds no second copy of them."""
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in weights.shapes.items()}
    layouts = flatten(sharding.param_shardings(nest(shapes), mesh))
    return nest({path: jax.device_put(weights.read(path), layouts[path]) for path in shapes})


# ---- clips -----------------------------------------------------------------------------------------------------------


def _chosen(index: Index, max_clips: int) -> list[int]:
    """Numbers of at most `max_clips` clips that bear loss, evenly spread."""
    clips = np.flatnonzero(index.lengths["is_prompt"] == 0)
    return clips[np.linspace(0, len(clips) - 1, min(max_clips, len(clips))).astype(int)].tolist()


def make_item(source: Source, number: int, seed: int, scheduler: str) -> Item:
    """A clip with the draws that its content and the seed determine."""
    clip = source[number]
    content = hashlib.sha256(clip.text_ids.astype("<i4").tobytes() + clip.patches_MPC.astype("<f4").tobytes())
    rng = np.random.default_rng((seed, int.from_bytes(content.digest()[:16], "little")))
    ways = _ways(source.index, number)
    draw = ways[rng.integers(len(ways))]
    sequence = lay_out_draw(source, draw)
    noise_MPC = rng.standard_normal(sequence.patches_MPC.shape, np.float32)
    time_M = np.zeros(sequence.num_patches, np.float32)
    n = sequence.num_targets
    time_M[sequence.target_M] = _quantile((rng.permutation(n) + rng.random(n)) / n, scheduler)
    speaker = (clip.dataset, clip.speaker) if clip.speaker else None
    return Item(label(source.index, draw), speaker, sequence, time_M, noise_MPC)


def _ways(index: Index, number: int) -> list[Draw]:
    """The layouts of a clip: without a reference clip, with its own or each of its pairs; without and with its description."""
    lengths = index.lengths[number]
    descriptions = [False, True] if lengths["described"] else [False]
    references = [NO_REFERENCE]
    if lengths["reference"]:
        references.append(OWN_REFERENCE)
    elif index.pairs is not None:
        references += [int(pair) for pair in index.pairs[number] if pair >= 0]
    return [Draw(number, reference, is_described) for reference in references for is_described in descriptions]


def _quantile(share, scheduler: str):
    """The inverse of the cumulative distribution that `flow.draw_times` draws from."""
    return share if scheduler == "uniform" else scipy.special.expit(scipy.special.ndtri(share) - 0.4)


# ---- sums ------------------------------------------------------------------------------------------------------------


def _mean(pair: np.ndarray) -> float | None:
    """Sum / count of a pair [2, clips] of sums and counts; None if nothing was counted."""
    total, count = pair.sum(axis=1)
    return float(total / count) if count else None


def _clusters(speakers: list) -> np.ndarray:
    """The number of each clip's cluster: clips of one speaker share it, None is a cluster of its own."""
    keys = [("", i) if speaker is None else ("speaker", speaker) for i, speaker in enumerate(speakers)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def standard_error(pair: np.ndarray, cluster_of_clip: np.ndarray) -> float | None:
    """Of the ratio sum / count of a pair [2, clips], if the clusters are independent and the clips of a cluster are not.

    From how far each cluster's sum is from the ratio times its count (the cluster-robust, or sandwich, estimate).
    None for fewer than two clusters.
    """
    sums, counts = (np.bincount(cluster_of_clip, x) for x in pair)
    num_clusters = len(np.unique(cluster_of_clip))
    if num_clusters < 2:
        return None
    residuals = sums - sums.sum() / counts.sum() * counts  # 0 for numbers that no clip has
    return float(np.sqrt(num_clusters / (num_clusters - 1) * np.sum(residuals**2)) / counts.sum())
