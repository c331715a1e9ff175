"""From finished shards to a directory that can be trained on: lengths, pairs, the list of skipped recordings, the header.

    shard-*.npz -> lengths.npy, identity.npy, pairs.npy if reference clips are wanted, skipped.jsonl if any were skipped,
                   header.json

The header is written last; a directory without it is not finished.
"""

import hashlib
import importlib.metadata
import json
import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.corpus import speaker
from voxcpm2_jax.corpus.encode import Skipped
from voxcpm2_jax.corpus.faults import FAULTY
from voxcpm2_jax.corpus.moments import Moments
from voxcpm2_jax.corpus.shard import part_file, read_embeddings, read_part, shard_names
from voxcpm2_jax.corpus.sources import Corpus
from voxcpm2_jax.data.shards import IDENTITY_FILE, LENGTHS_FILE, PAIRS_FILE, Header, check_scale, crc32, write_header
from voxcpm2_jax.files import save_array

_PACKAGES = ("voxcpm2_jax", "jax", "flax", "numpy", "soundfile", "soxr", "tokenizers", "array-record")


class Provenance(NamedTuple):
    """What made the shards."""

    config: DataConfig
    vae_config: AudioVAEConfig
    codec_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    models: dict  # "vad", "speaker": names and hashes, if they were used

    @property
    def patch_sec(self) -> float:
        return self.config.patch_size * self.vae_config.encoder_hop / self.vae_config.sample_rate


def sources_sha256(corpora: Iterable[Corpus]) -> str:
    """One hash of all corpora."""
    return hashlib.sha256(" ".join(corpus.sha256 for corpus in corpora).encode()).hexdigest()


def finish(directory: pathlib.Path, corpora: list[Corpus], made_by: Provenance) -> Header | None:
    """Writes everything but the shards, the header last; returns None if a shard is missing.

    Raises:
        UserError: no recording can be used, or the latents have a scale that a model cannot learn.
    """
    config, vae = made_by.config, made_by.vae_config
    names = shard_names(corpora, config.shard_clips)
    if not all(part_file(directory, name).exists() for name in names):
        return None
    groups: dict[tuple[str, str], int] = {}
    moments = Moments(vae.latent_dim)
    all_lengths, origins, identities, num_embeddings, shards = [], [], [], [], []
    skipped: list[Skipped] = []
    for name in names:
        part = read_part(directory, name)
        numbers = [groups.setdefault((str(dataset), str(language)), len(groups)) for dataset, language in part.groups]
        part.lengths["group"] = np.array(numbers, np.int32)[part.lengths["group"]]
        moments.merge(part.moments, int(part.num_frames))
        all_lengths.append(part.lengths)
        skipped += [Skipped(*line) for line in part.skipped.tolist()]
        origins.append(part.origins)
        identities.append(part.identities)
        num_embeddings.append(int(part.num_embeddings))
        if len(part.lengths):
            shards.append(f"{name}.array_record")
    skipped += [Skipped(where, "", FAULTY, message) for corpus in corpora for where, message in corpus.faults()]
    lengths = np.concatenate(all_lengths)
    if not len(lengths):
        for name in names:  # so that the next run opens the recordings again: their disk may have been missing
            part_file(directory, name).unlink(missing_ok=True)
        raise UserError(f"none of {len(skipped)} recordings can be used; the first: {skipped[0].message}")
    check_scale(moments.std_C, str(directory))
    arrays = {LENGTHS_FILE: lengths}
    if all(table is not None for table in identities):
        arrays[IDENTITY_FILE] = np.concatenate(identities)
    pairs = {}
    if config.pairs.encoder:
        origins_of_all = np.concatenate(origins)
        table = speaker.choose(
            origins_of_all,
            lengths["patches"] * made_by.patch_sec,
            num_embeddings,
            lambda shard: read_embeddings(directory, names[shard]),
            config.pairs,
        )
        arrays[PAIRS_FILE] = table
        pairs = to_dict(config.pairs) | {"clips": int((table[:, 0] >= 0).sum()), "compared": sum(num_embeddings)}
        pairs["order_unknown"] = speaker.count_unordered(origins_of_all)
    for name, array in arrays.items():
        save_array(directory / name, array)
    if skipped:
        text = "".join(json.dumps(line._asdict(), ensure_ascii=False) + "\n" for line in skipped)
        files.replace_file(directory / "skipped.jsonl", text)
    header = Header(
        num_clips=len(lengths),
        hours=float(lengths["patches"].sum() * made_by.patch_sec / 3600),
        patch_size=config.patch_size,
        latent_dim=vae.latent_dim,
        patch_sec=made_by.patch_sec,
        encoder_hz=vae.sample_rate,
        decoder_hz=vae.out_sample_rate,
        codec_sha256=made_by.codec_sha256,
        tokenizer_sha256=made_by.tokenizer_sha256,
        vocab_size=made_by.vocab_size,
        groups=tuple(groups),
        latent_dtype=config.latent_dtype,
        latent_mean=tuple(moments.mean_C.tolist()),
        latent_std=tuple(moments.std_C.tolist()),
        latent_min=tuple(moments.table["least"].tolist()),
        latent_max=tuple(moments.table["largest"].tolist()),
        shards=tuple(shards),
        trim=config.trim,
        trim_db=config.trim_db,
        trim_keep_ms=config.trim_keep_ms,
        sources=tuple(corpus.name for corpus in corpora) if config.source == "manifest" else (config.source,),
        sources_sha256=sources_sha256(corpora),
        skipped=dict(Counter(line.reason for line in skipped)),
        versions=_versions(),
        models=made_by.models,
        pairs=pairs,
        text=to_dict(config.text_rule),
        crc32={name: crc32(directory / name) for name in arrays},
    )
    write_header(directory, header)
    return header


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
