"""Directories of shards that benchmarks and injected faults train on: noise or synthetic clips, with a codec of no use."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence

import numpy as np

from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig
from voxcpm2_jax.data.clips import Clip, Index
from voxcpm2_jax.data.shards import (
    IDENTITY_FILE,
    LENGTHS_FILE,
    PAIRS_FILE,
    Header,
    crc32,
    write_header,
    write_shard,
)


def write_corpus(
    directory: str | os.PathLike,
    model: ModelConfig,
    patch_sec: float,
    index: Index,
    shards: Sequence[Iterable[Clip]],
    *,
    copies: int = 1,
    identities: np.ndarray | None = None,
    source: str = "noise",
) -> Header:
    """Writes clips as a directory of shards, without codec and tokenizer.

    Args:
        model: the shape of a patch and the vocabulary.   index: of all clips, those of copies included.
        shards: the clips of each shard.   copies: how often these shards follow one another, as links to the same files.
        identities: IDENTITY [clips], for the comparison with held-out clips.   source: its name in the header.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    total = copies * len(shards)
    names = [f"shard-{i:05d}-of-{total:05d}.array_record" for i in range(total)]
    for name, clips in zip(names, shards):
        write_shard(directory / name, clips, "float16")
    for i in range(len(shards), total):
        _link(directory / names[i % len(shards)], directory / names[i])
    tables = {LENGTHS_FILE: index.lengths, PAIRS_FILE: index.pairs, IDENTITY_FILE: identities}
    tables = {name: table for name, table in tables.items() if table is not None}
    for name, table in tables.items():
        np.save(directory / name, table)
    zeros, ones = (0.0,) * model.feat_dim, (1.0,) * model.feat_dim
    header = Header(
        num_clips=len(index.lengths), hours=float(index.lengths["patches"].sum() * patch_sec / 3600),
        patch_size=model.patch_size, latent_dim=model.feat_dim, patch_sec=patch_sec, encoder_hz=16000, decoder_hz=48000,
        codec_sha256="", tokenizer_sha256="", vocab_size=model.lm_config.vocab_size, groups=index.groups,
        latent_dtype="float16", latent_mean=zeros, latent_std=ones, latent_min=zeros, latent_max=zeros, shards=tuple(names),
        trim_db=0.0, trim_keep_ms=0.0, sources=(source,),
        sources_sha256=hashlib.sha256(source.encode()).hexdigest(),
        pairs={} if index.pairs is None else {"clips": int((index.pairs[:, 0] >= 0).sum())},
        crc32={name: crc32(directory / name) for name in tables},
    )  # fmt: skip
    write_header(directory, header)
    return header


def add_models(directory: pathlib.Path, header: Header) -> None:
    """Adds a codec and a tokenizer, which `train` copies into its workdir; the codec's parameters are zeros."""
    import jax

    from voxcpm2_jax.data.tokenizer import train_tokenizer
    from voxcpm2_jax.vae import autoencoder
    from voxcpm2_jax.workdir import codec_sha256, save_codec

    vae = AudioVAEConfig(
        encoder_dim=2, encoder_rates=(20, 32), latent_dim=header.latent_dim, decoder_dim=16, decoder_rates=(48, 40)
    )
    shapes = jax.eval_shape(lambda key: autoencoder.init(key, vae), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    save_codec(directory, vae, params)
    train_tokenizer(["one two three"] * 9, 288).save(directory / "tokenizer")
    tokenizer = (directory / "tokenizer" / "tokenizer.json").read_bytes()
    hashes = {"codec_sha256": codec_sha256(params, vae), "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()}
    rates = {"encoder_hz": vae.sample_rate, "decoder_hz": vae.out_sample_rate}
    write_header(directory, dataclasses.replace(header, **hashes, **rates))


def _link(path: pathlib.Path, copy: pathlib.Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, copy)
