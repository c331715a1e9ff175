"""TODO corpus.shard."""

import hashlib
import importlib.metadata
import json
import math
import pathlib
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.corpus import sources, speaker, vad
from voxcpm2_jax.corpus.manifest import Recording, in_threads
from voxcpm2_jax.data import audio, packing
from voxcpm2_jax.data.shards import LENGTHS_FILE, PAIRS_FILE, Header, Moments, crc32, load_array, write_header, write_shard
from voxcpm2_jax.data.text import normal_text
from voxcpm2_jax.data.tokenizer import load_tokenizer
from voxcpm2_jax.files import save_array
from voxcpm2_jax.vae import autoencoder

_ROUND_SEC = 1800.0  # recordings in memory at once
_EMBEDDINGS = "embeddings_ED"  # in a shard's .npz file: float16, of the clips that have a part in pairs, in order
_PACKAGES = ("voxcpm2_jax", "jax", "flax", "numpy", "soundfile", "soxr", "tokenizers", "array-record")


def sources_sha256(manifests: Iterable[sources.Corpus]) -> str:
    return hashlib.sha256(" ".join(manifest.sha256 for manifest in manifests).encode()).hexdigest()


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
    recording: Recording
    audio_A: np.ndarray  # at the codec's rate, whole patches
    reference_A: np.ndarray | None


class _Part(NamedTuple):
    """What header and index need of one shard; an .npz file."""

    lengths_N6: np.ndarray  # int32, columns of packing.py, groups numbered as below
    groups: np.ndarray  # [groups, 2] text
    moments_4C: np.ndarray  # sum, sum of squares, least, largest of every latent channel
    num_frames: np.ndarray
    skipped: np.ndarray  # [skipped, 4] text: audio, start_sec or "", reason, message
    origins_N: np.ndarray  # speaker.ORIGIN; none if no pairs are wanted
    num_embeddings: np.ndarray  # the file holds them as well, under _EMBEDDINGS


class Maker:
    """Turns recordings into shards with one codec and one tokenizer."""

    def __init__(
        self, config: DataConfig, output: pathlib.Path, vae_params, vae_config: AudioVAEConfig, codec_hash: str,
        encoder: speaker.Encoder | None, models: dict,
    ):  # fmt: skip
        self._config, self._vae_config, self._codec_sha256 = config, vae_config, codec_hash
        self._encoder, self._models = encoder, models
        self._patch_samples = config.patch_size * vae_config.encoder_hop
        self._patch_sec = self._patch_samples / vae_config.sample_rate
        self._tokenizer = load_tokenizer(output / "tokenizer")
        self._tokenizer_sha256 = hashlib.sha256((output / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
        encode = jax.jit(autoencoder.encode, static_argnums=1)
        self._encode = lambda audio_BA: encode(vae_params, vae_config, audio_BA)

    def _names(self, manifests: list[sources.Corpus]) -> list[str]:
        num_parts = math.ceil(sum(map(len, manifests)) / self._config.shard_clips)
        return [f"shard-{i:05d}-of-{num_parts:05d}" for i in range(num_parts)]

    def make_parts(self, directory: pathlib.Path, manifests: list[sources.Corpus]) -> None:
        """This host's shards of a directory, as far as they are missing."""
        directory.mkdir(exist_ok=True)
        names, size = self._names(manifests), self._config.shard_clips
        starts = np.cumsum([0, *map(len, manifests)])
        mine = range(self._config.host, len(names), self._config.num_hosts)
        todo = [i for i in mine if not (directory / f"{names[i]}.npz").exists()]
        bar = _bar("encoding", len(mine) * size)
        with bar, ThreadPoolExecutor() as pool:
            bar.advance(0, (len(mine) - len(todo)) * size)
            for i in todo:
                recordings = (
                    recording
                    for manifest, start in zip(manifests, starts)
                    for recording in manifest[max(0, i * size - start) : max(0, (i + 1) * size - start)]
                )
                self._make_part(directory / names[i], recordings, pool, bar)

    def _make_part(self, path: pathlib.Path, recordings: Iterable[Recording], pool, bar) -> None:
        lengths: list[tuple[int, int, int, int, int, int]] = []
        groups: dict[tuple[str, str], int] = {}
        moments = Moments(self._vae_config.latent_dim)
        skipped: list[tuple[str, str, str, str]] = []
        origins: list[tuple] = []
        embeddings: list[np.ndarray] = []

        def clips():
            for recording, clip, embedding_D in self._clips(recordings, skipped, pool, bar):
                if self._encoder:
                    voice = None if embedding_D is None else (clip.dataset, clip.speaker, clip.session)
                    origins.append(speaker.origin(str(recording.audio), recording.start_sec, recording.end_sec, voice))
                    embeddings.extend([] if embedding_D is None else [embedding_D.astype(np.float16)])
                reference, described = (0 if x is None else len(x) for x in (clip.reference_MPC, clip.described_ids))
                group = groups.setdefault((clip.dataset, clip.language or "unknown"), len(groups))
                lengths.append((len(clip.text_ids), len(clip.patches_MPC), reference, clip.is_prompt, described, group))
                moments.add(clip.patches_MPC)
                yield clip

        for left in path.parent.glob(f".{path.name}.*"):  # of this host's, killed while it made this shard
            left.unlink(missing_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            if write_shard(aside, clips(), self._config.latent_dtype):
                aside.replace(path.with_suffix(".array_record"))
            part = _Part(
                np.array(lengths, np.int32).reshape(-1, 6), np.array(list(groups), str).reshape(-1, 2), moments.sums_4C,
                np.array(moments.count), np.array(skipped, str).reshape(-1, 4),
                np.array(origins, speaker.ORIGIN), np.array(len(embeddings)),
            )  # fmt: skip
            with aside.open("wb") as file:
                np.savez(file, **part._asdict(), **{_EMBEDDINGS: np.array(embeddings, np.float16)})
            aside.replace(path.with_suffix(".npz"))
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be written ({error})") from None
        finally:
            aside.unlink(missing_ok=True)

    def finish(self, directory: pathlib.Path, manifests: list[sources.Corpus]) -> Header | None:
        """Puts together what the shards leave of themselves, the header last; None while one is missing."""
        config, vae, names = self._config, self._vae_config, self._names(manifests)
        if not all((directory / f"{name}.npz").exists() for name in names):
            return None
        groups: dict[tuple[str, str], int] = {}
        moments, lengths, skipped, shards, origins, num_embeddings = Moments(vae.latent_dim), [], [], [], [], []
        for name in names:
            with load_array(directory / f"{name}.npz") as file:
                part = _Part(**{field: file[field] for field in _Part._fields})
            numbers = [groups.setdefault((str(dataset), str(language)), len(groups)) for dataset, language in part.groups]
            part.lengths_N6[:, packing.GROUP] = np.array(numbers, np.int32)[part.lengths_N6[:, packing.GROUP]]
            moments.merge(part.moments_4C, int(part.num_frames))
            lengths.append(part.lengths_N6)
            skipped += part.skipped.tolist()
            origins.append(part.origins_N)
            num_embeddings.append(int(part.num_embeddings))
            if len(part.lengths_N6):
                shards.append(f"{name}.array_record")
        lengths_N6 = np.concatenate(lengths)
        if not len(lengths_N6):
            for name in names:  # so that the next run looks again: a disk may have been away
                (directory / f"{name}.npz").unlink(missing_ok=True)
            raise UserError(f"none of {len(skipped)} recordings is of use; the first: {skipped[0][-1]}")
        if config.latent_dtype == "float16" and max(-moments.min_C.min(), moments.max_C.max()) > np.finfo(np.float16).max:
            raise UserError("latents exceed the range of float16; prepare with --config.latent_dtype=bfloat16")
        save_array(directory / LENGTHS_FILE, lengths_N6)
        pairs = {}
        if self._encoder:
            sec_N = lengths_N6[:, packing.PATCHES] * self._patch_sec

            def read(shard: int) -> np.ndarray:
                with np.load(directory / f"{names[shard]}.npz") as file:
                    return file[_EMBEDDINGS]

            pairs_NK = speaker.choose(np.concatenate(origins), sec_N, num_embeddings, read, config.pairs)
            save_array(directory / PAIRS_FILE, pairs_NK)
            pairs = to_dict(config.pairs) | {"clips": int((pairs_NK[:, 0] >= 0).sum()), "compared": sum(num_embeddings)}
        indexes = (LENGTHS_FILE, *[PAIRS_FILE] * bool(pairs))
        if skipped:
            lines = [dict(zip(("audio", "start_sec", "reason", "message"), line)) for line in skipped]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            files.replace_file(directory / "skipped.jsonl", text)
        header = Header(
            num_clips=len(lengths_N6),
            hours=float(lengths_N6[:, packing.PATCHES].sum() * self._patch_sec / 3600),
            patch_size=config.patch_size,
            latent_dim=vae.latent_dim,
            patch_sec=self._patch_sec,
            encoder_hz=vae.sample_rate,
            decoder_hz=vae.out_sample_rate,
            codec_sha256=self._codec_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
            vocab_size=self._tokenizer.vocab_size,
            groups=tuple(groups),
            latent_dtype=config.latent_dtype,
            latent_mean=tuple(moments.mean_C.tolist()),
            latent_std=tuple(moments.std_C.tolist()),
            latent_min=tuple(moments.min_C.tolist()),
            latent_max=tuple(moments.max_C.tolist()),
            shards=tuple(shards),
            trim=config.trim,
            trim_db=config.trim_db,
            trim_keep_ms=config.trim_keep_ms,
            sources=tuple(m.name for m in manifests) if config.source == "manifest" else (config.source,),
            sources_sha256=sources_sha256(manifests),
            skipped=dict(Counter(reason for *_, reason, _ in skipped)),
            versions=_versions(),
            models=self._models,
            pairs=pairs,
            crc32={name: crc32(directory / name) for name in indexes},
        )
        write_header(directory, header)
        return header

    def _clips(self, recordings: Iterable[Recording], skipped: list, pool, bar) -> Iterator[tuple]:
        """(recording, clip, embedding or None) of all useful recordings, in order; the others go to `skipped`."""
        limit = round(_ROUND_SEC * self._vae_config.sample_rate)
        waiting: list[_Loaded] = []
        samples = seen = 0

        def encoded():
            nonlocal waiting, samples, seen
            yield from self._encoded(waiting)
            bar.advance(0, seen)
            bar.update(0, hours=bar.tasks[0].fields["hours"] + samples / self._vae_config.sample_rate / 3600)
            waiting, samples, seen = [], 0, 0

        for recording, loaded in in_threads(pool, self._load, recordings):
            seen += 1
            if isinstance(loaded, audio.BadRecording):
                start = "" if recording.start_sec is None else str(recording.start_sec)
                skipped.append((str(recording.audio), start, loaded.reason, str(loaded)))
            else:
                waiting.append(loaded)
                samples += len(loaded.audio_A)
            if samples >= limit:
                yield from encoded()
        yield from encoded()

    def _load(self, recording: Recording) -> _Loaded | audio.BadRecording:
        try:
            if not recording.text.strip():
                raise audio.BadRecording("no words", f"{recording.audio}: no transcript")
            audio_A = self._audio(recording.audio, recording.start_sec, recording.end_sec)
            if recording.ref_audio is None or recording.is_prompt:
                return _Loaded(recording, audio_A, None)
            try:
                return _Loaded(recording, audio_A, self._audio(recording.ref_audio))
            except audio.BadRecording as error:
                return audio.BadRecording(f"reference {error.reason}", str(error))
        except audio.BadRecording as error:
            return error

    def _audio(self, path: pathlib.Path | audio.Stored, start_sec=None, end_sec=None) -> np.ndarray:
        config, rate = self._config, self._vae_config.sample_rate
        shortest = max(round(config.min_sec * rate), self._patch_samples)
        longest = config.max_sec if config.trim == "none" else 2 * config.max_sec  # what may be left when the ends are cut
        audio_A = audio.load(path, rate, start_sec, end_sec, min_samples=shortest, max_sec=longest)
        if config.trim == "silence":
            audio_A = audio.trim_silence(audio_A, rate, threshold_db=config.trim_db, keep_ms=config.trim_keep_ms)
        elif config.trim == "vad":
            audio_A = vad.trim_to_speech(audio_A, rate, keep_ms=config.trim_keep_ms)
            if not len(audio_A):
                raise audio.BadRecording("no speech", f"{path}: no speech is heard in it")
        sec = len(audio_A) / rate
        if len(audio_A) < shortest:
            raise audio.BadRecording(
                "too short", f"{path}: {sec:.3f} s of sound is too short; expected {shortest / rate:.3f} s"
            )
        if sec > config.max_sec:
            raise audio.BadRecording("too long", f"{path}: {sec:.1f} s is too long; expected at most {config.max_sec} s")
        return audio.pad_to_patches(audio_A, self._patch_samples, "right")

    def _encoded(self, loaded: list[_Loaded]) -> Iterator[tuple[Recording, packing.Clip, np.ndarray | None]]:
        embeddings = self._embeddings(loaded)
        latents = self._latents([a for item in loaded for a in (item.audio_A, item.reference_A) if a is not None])
        for i, (recording, _, reference_A) in enumerate(loaded):
            patches_MPC = next(latents)
            clip = packing.Clip(
                text_ids=self._ids(recording.text),
                described_ids=self._ids(recording.full_text) if recording.description else None,
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
            yield recording, clip, embeddings.get(i)

    def _embeddings(self, loaded: list[_Loaded]) -> dict[int, np.ndarray]:
        """Of the clips that have a part in pairs: those that a speaker is named of, prompt clips aside."""
        if self._encoder is None:
            return {}
        chosen = [i for i, (recording, *_) in enumerate(loaded) if recording.speaker and not recording.is_prompt]
        if not chosen:
            return {}
        clips = [loaded[i].audio_A for i in chosen]
        return dict(zip(chosen, speaker.embed(self._encoder, clips, self._vae_config.sample_rate)))

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(normal_text(text, self._config.sentence_case)), np.int32)

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


def _bar(what: str, total: int):
    """A progress bar with hours done, times real time, and the time that remains."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Hours(ProgressColumn):
        def render(self, task):
            hours = task.fields["hours"]
            return Text(f"{hours:.2f} h, {hours * 3600 / (task.elapsed or math.inf):.0f} x real time")

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), Hours(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    bar.add_task("", total=total, hours=0.0)
    return bar
