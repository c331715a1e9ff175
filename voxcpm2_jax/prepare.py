"""Recordings to shards: load, trim, pad, codec latents, text ids, provenance.

    manifest -> load at the codec's rate -> trim -> pad right to whole patches -> codec -> records -> shards
             -> tokenizer -> ids of "(description)text"

Everything is written beside the output directory and moved there when it is complete. Recordings that are of no use are
left out, counted by reason in the header and listed in skipped.jsonl.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from voxcpm2_jax import torch_io
from voxcpm2_jax.config import AudioVAEConfig, DataConfig, UserError, to_dict
from voxcpm2_jax.data import audio, corpus, packing, pipeline
from voxcpm2_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from voxcpm2_jax.vae import autoencoder

HELDOUT = "heldout"  # directory of the shards that are not trained on, inside the others
_ROUND_SEC = 1800.0  # recordings in memory at once
_PACKAGES = ("voxcpm2_jax", "jax", "flax", "numpy", "soundfile", "soxr", "tokenizers", "array-record")


def prepare(config: DataConfig, output: str | os.PathLike, vae: str | os.PathLike | None) -> dict:
    """What `voxcpm2-jax prepare` does: `make_shards` with the codec of checkpoint `vae`; the result sums the shards up.

    Without a codec the demo corpus is spoken and nothing else: recordings and manifests that a codec can be trained on.

    Raises:
        UserError: as make_shards, or recordings of one's own without a codec.
    """
    if vae is None:
        if config.source != "demo":
            raise UserError("prepare needs a codec: --vae=CKPT (a workdir of train-vae, or a released directory)")
        return _speak_demo(config, output)
    vae_config, vae_params = torch_io.load_codec(vae)
    start = time.monotonic()
    header = make_shards(config, output, vae_params, vae_config)
    return {
        "output": str(output),
        "clips": header.num_clips,
        "hours": round(header.hours, 4),
        "skipped": header.skipped,
        "vocab_size": header.vocab_size,
        "latent_std": [round(min(header.latent_std), 4), round(max(header.latent_std), 4)],
        "wall_sec": round(time.monotonic() - start, 1),
    }


def _speak_demo(config: DataConfig, output: str | os.PathLike) -> dict:
    with torch_io.fresh_directory(output) as aside:
        train, heldout = corpus.make_demo(aside, config.demo)
        clips = [len(corpus.read_manifest(path)) for path in (train, heldout)]
    return {"output": str(output), "clips": clips[0], "heldout_clips": clips[1]}


def make_shards(config: DataConfig, output: str | os.PathLike, vae_params, vae_config: AudioVAEConfig) -> pipeline.Header:
    """Makes `output`, a directory of shards, and in it `heldout` if there are held-out clips.

    The demo corpus stays in output/demo. Copies of codec and tokenizer lie in output/codec and output/tokenizer.

    Raises:
        UserError: the output is already there, a manifest is wrong, or no recording is of use.
    """
    with torch_io.fresh_directory(output) as aside:
        if config.source == "demo":
            train, heldout = ([path] for path in corpus.make_demo(aside / "demo", config.demo))
        else:
            train, heldout = (
                [pathlib.Path(name) for name in names.split(",") if name] for names in (config.manifest, config.heldout)
            )
        recordings = [recording for path in train for recording in corpus.read_manifest(path)]
        if config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            tokenizer = train_tokenizer((r.full_text for r in recordings), config.vocab_size)
        tokenizer.save(aside / "tokenizer")
        torch_io.save_codec(aside, vae_config, vae_params)
        maker = _Maker(config, tokenizer, aside / "tokenizer", vae_params, vae_config)
        header = maker.write(aside, recordings, train)
        if heldout and (config.source == "manifest" or config.demo.num_heldout):
            (aside / HELDOUT).mkdir()
            maker.write(aside / HELDOUT, [r for path in heldout for r in corpus.read_manifest(path)], heldout)
    return header


def codec_sha256(vae_params: Mapping, vae_config: AudioVAEConfig) -> str:
    """Identifies a codec: the hash of its configuration and of every parameter, by path."""
    digest = hashlib.sha256(json.dumps(to_dict(vae_config), sort_keys=True).encode())
    leaves = jax.tree_util.tree_leaves_with_path(vae_params)
    for path, leaf in sorted((jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _sha256_of_files(paths: Iterable[pathlib.Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# ---- one directory of shards -----------------------------------------------------------------------------------------


class _Loaded(NamedTuple):
    recording: corpus.Recording
    audio_A: np.ndarray  # at the codec's rate, whole patches
    reference_A: np.ndarray | None


class _Maker:
    """Turns recordings into shards with one codec and one tokenizer."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, tokenizer_dir, vae_params, vae_config: AudioVAEConfig):
        self._config, self._tokenizer, self._vae_config = config, tokenizer, vae_config
        self._patch_samples = config.patch_size * vae_config.encoder_hop
        self._patch_sec = self._patch_samples / vae_config.sample_rate
        self._codec_sha256 = codec_sha256(vae_params, vae_config)
        self._tokenizer_sha256 = _sha256_of_files([tokenizer_dir / "tokenizer.json"])
        encode = jax.jit(autoencoder.encode, static_argnums=1)
        self._encode = lambda audio_BA: encode(vae_params, vae_config, audio_BA)

    def write(self, directory: pathlib.Path, recordings: list[corpus.Recording], sources) -> pipeline.Header:
        config, vae = self._config, self._vae_config
        lengths: list[tuple[int, int, int, int]] = []
        moments = _Moments(vae.latent_dim)
        skipped: list[tuple[corpus.Recording, audio.BadRecording]] = []

        def clips():
            for clip in self._clips(recordings, skipped):
                reference = 0 if clip.reference_MPC is None else len(clip.reference_MPC)
                lengths.append((len(clip.text_ids), len(clip.patches_MPC), reference, clip.is_prompt))
                moments.add(clip.patches_MPC)
                yield clip

        shards = pipeline.write_shards(directory, clips(), config.latent_dtype, config.shard_clips)
        if not lengths:
            raise UserError(f"none of {len(recordings)} recordings is of use; the first: {skipped[0][1]}")
        if config.latent_dtype == "float16" and max(-moments.min_C.min(), moments.max_C.max()) > np.finfo(np.float16).max:
            raise UserError("latents exceed the range of float16; prepare with --config.latent_dtype=bfloat16")
        lengths_N4 = np.array(lengths, np.int32)
        np.save(directory / pipeline.LENGTHS_FILE, lengths_N4)
        if skipped:
            lines = [{"audio": str(r.audio), "reason": error.reason, "message": str(error)} for r, error in skipped]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (directory / "skipped.jsonl").write_text(text, encoding="utf-8")
        header = pipeline.Header(
            num_clips=len(lengths),
            hours=float(lengths_N4[:, packing.PATCHES].sum() * self._patch_sec / 3600),
            patch_size=config.patch_size,
            latent_dim=vae.latent_dim,
            patch_sec=self._patch_sec,
            encoder_hz=vae.sample_rate,
            decoder_hz=vae.out_sample_rate,
            codec_sha256=self._codec_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
            vocab_size=self._tokenizer.vocab_size,
            latent_dtype=config.latent_dtype,
            latent_mean=tuple(moments.mean_C.tolist()),
            latent_std=tuple(moments.std_C.tolist()),
            latent_min=tuple(moments.min_C.tolist()),
            latent_max=tuple(moments.max_C.tolist()),
            shards=shards,
            trim_db=config.trim_db,
            trim_keep_ms=config.trim_keep_ms,
            sources=("demo",) if config.source == "demo" else tuple(map(str, sources)),
            sources_sha256=_sha256_of_files(sources),
            skipped=dict(Counter(error.reason for _, error in skipped)),
            versions=_versions(),
        )
        pipeline.write_header(directory, header)
        return header

    def _clips(self, recordings, skipped) -> Iterator[packing.Clip]:
        """The clips of all useful recordings, in order; the others go to `skipped`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        heard_sec, limit = 0.0, round(_ROUND_SEC * self._vae_config.sample_rate)
        with bar, ThreadPoolExecutor() as pool:
            task = bar.add_task("", total=len(recordings), rate="")
            waiting: list[_Loaded] = []
            samples = 0
            for i, (recording, loaded) in enumerate(zip(recordings, _in_order(pool, self._load, recordings))):
                if isinstance(loaded, audio.BadRecording):
                    skipped.append((recording, loaded))
                else:
                    waiting.append(loaded)
                    samples += len(loaded.audio_A)
                if samples >= limit or i == len(recordings) - 1:
                    yield from self._encoded(waiting)
                    heard_sec += samples / self._vae_config.sample_rate
                    elapsed = bar.tasks[0].elapsed or math.inf
                    bar.update(task, completed=i + 1, rate=f"{heard_sec / elapsed:.0f} s of audio per s")
                    waiting, samples = [], 0

    def _load(self, recording: corpus.Recording) -> _Loaded | audio.BadRecording:
        try:
            audio_A = self._audio(recording.audio, recording.start_sec, recording.end_sec)
            if recording.ref_audio is None or recording.is_prompt:
                return _Loaded(recording, audio_A, None)
            return _Loaded(recording, audio_A, self._audio(recording.ref_audio))
        except audio.BadRecording as error:
            return error

    def _audio(self, path, start_sec=None, end_sec=None) -> np.ndarray:
        config, rate = self._config, self._vae_config.sample_rate
        shortest = max(round(config.min_sec * rate), self._patch_samples)
        audio_A = audio.load(path, rate, start_sec, end_sec, min_samples=shortest)
        if config.trim_db:
            audio_A = audio.trim_silence(audio_A, rate, threshold_db=config.trim_db, keep_ms=config.trim_keep_ms)
        sec = len(audio_A) / rate
        if len(audio_A) < shortest:
            raise audio.BadRecording(
                "too short", f"{path}: {sec:.3f} s of sound is too short; expected {shortest / rate:.3f} s"
            )
        if sec > config.max_sec:
            raise audio.BadRecording("too long", f"{path}: {sec:.1f} s is longer than max_sec, {config.max_sec} s")
        return audio.pad_to_patches(audio_A, self._patch_samples, "right")

    def _encoded(self, loaded: list[_Loaded]) -> Iterator[packing.Clip]:
        latents = self._latents([a for item in loaded for a in (item.audio_A, item.reference_A) if a is not None])
        for recording, _, reference_A in loaded:
            patches_MPC = next(latents)
            yield packing.Clip(
                text_ids=np.array(self._tokenizer.encode(recording.full_text), np.int32),
                patches_MPC=patches_MPC,
                reference_MPC=None if reference_A is None else next(latents),
                is_prompt=recording.is_prompt,
                text=recording.text,
                description=recording.description,
                dataset=recording.dataset or str(recording.dataset_id),
                language=recording.language,
                speaker=recording.speaker,
                session=recording.session,
            )

    def _latents(self, audios: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Latents [M, P, C] of each recording, in order.

        Recordings of about one length go through the codec together, zeros after the shorter ones. The codec is causal, so
        those zeros change nothing before them. There are few lengths, so that it is compiled few times.
        """
        groups: dict[int, list[int]] = {}
        for i, audio_A in enumerate(audios):
            groups.setdefault(_bucket(len(audio_A) // self._patch_samples), []).append(i)
        results: dict[int, np.ndarray] = {}
        for patches, members in sorted(groups.items()):
            batch = max(1, int(self._config.encode_sec / (patches * self._patch_sec)))
            for start in range(0, len(members), batch):
                chosen = members[start : start + batch]
                audio_BA = np.zeros((batch, patches * self._patch_samples), np.float32)
                for b, i in enumerate(chosen):
                    audio_BA[b, : len(audios[i])] = audios[i]
                latents_BTC = np.asarray(self._encode(audio_BA), np.float32)
                for b, i in enumerate(chosen):
                    latents_MPC = latents_BTC[b].reshape(patches, self._config.patch_size, -1)
                    results[i] = latents_MPC[: len(audios[i]) // self._patch_samples]
                    if not np.isfinite(results[i]).all():
                        raise UserError("the codec gives latents that are not finite numbers; it is not a trained codec")
        return (results[i] for i in range(len(audios)))


def _bucket(patches: int) -> int:
    """The next of 4, 6, 8, 12, 16, 24, 32, .."""
    power = 4
    while power < patches:
        if patches <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def _in_order(pool: ThreadPoolExecutor, function, items, ahead: int = 64) -> Iterator:
    """map() in threads, in order, never more than `ahead` results waiting."""
    pending = []
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


class _Moments:
    """Mean, standard deviation, least and largest of every latent channel."""

    def __init__(self, channels: int):
        self._count = 0
        self._sum_C = np.zeros(channels)
        self._square_C = np.zeros(channels)
        self.min_C, self.max_C = np.full(channels, np.inf), np.full(channels, -np.inf)

    def add(self, patches_MPC: np.ndarray) -> None:
        frames_TC = patches_MPC.reshape(-1, patches_MPC.shape[-1]).astype(np.float64)
        self._count += len(frames_TC)
        self._sum_C += frames_TC.sum(axis=0)
        self._square_C += (frames_TC**2).sum(axis=0)
        self.min_C = np.minimum(self.min_C, frames_TC.min(axis=0))
        self.max_C = np.maximum(self.max_C, frames_TC.max(axis=0))

    @property
    def mean_C(self) -> np.ndarray:
        return self._sum_C / self._count

    @property
    def std_C(self) -> np.ndarray:
        return np.sqrt(np.maximum(self._square_C / self._count - self.mean_C**2, 0))
