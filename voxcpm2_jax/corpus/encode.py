"""Recordings to clips: load, trim, pad, encode with the codec, tokenize, and embed the voice if pairs are wanted.

    recording -> load at the codec's rate -> trim -> pad right to whole patches -> codec -> latents
              -> text normalised -> tokenizer -> ids of the text and of "(description)text"

Files are opened in threads; the codec runs on batches of half an hour of audio. A recording that cannot be used is skipped
with a reason. A codec that cannot be used is refused at the first latents that show it: numbers that are not finite or that
the stored type cannot hold, in a clip or a reference clip, and a scale that a model cannot learn, after ten minutes of audio.
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.text import control_marks, markup, says_something
from voxcpm2_jax.corpus import speaker, trim
from voxcpm2_jax.corpus.manifest import Recording
from voxcpm2_jax.corpus.moments import Moments
from voxcpm2_jax.corpus.sources import in_threads
from voxcpm2_jax.data import audio
from voxcpm2_jax.data.clips import Clip
from voxcpm2_jax.data.identity import IDENTITY, Known
from voxcpm2_jax.data.shards import check_scale
from voxcpm2_jax.data.tokenizer import Tokenizer
from voxcpm2_jax.vae import autoencoder

_ROUND_SEC = 1800.0  # of audio in memory at once
_SCALE_SEC = 600.0  # of audio, after which the scale of the latents is known well enough to refuse the codec


class Encoded(NamedTuple):
    """A clip, the recording that it was made from, and the embedding of its voice if it takes part in pairs."""

    recording: Recording
    clip: Clip
    embedding: np.ndarray | None  # float32


class Skipped(NamedTuple):
    """A recording that cannot be used; the fields of a line of skipped.jsonl."""

    audio: str
    start_sec: str  # empty: the beginning
    reason: str
    message: str


class _Loaded(NamedTuple):
    recording: Recording
    audio_A: np.ndarray  # at the codec's rate, whole patches
    reference_A: np.ndarray | None


def text_fault(recording: Recording, config: DataConfig, tokenizer: Tokenizer | None) -> audio.BadRecording | None:
    """Why a transcript cannot be trained on; `tokenizer` knows its own control pieces."""
    name, text = recording.audio, recording.full_text
    if not says_something(recording.text):
        return audio.BadRecording("no words", f"{name}: a transcript without a letter or digit: {recording.text!r:.80}")
    if pieces := tokenizer.control_pieces(text) if tokenizer else control_marks(text):
        return audio.BadRecording("control pieces", f"{name}: its transcript spells {', '.join(pieces)}")
    if config.markup == "skip" and (marks := markup(text)):
        return audio.BadRecording("markup", f"{name}: annotations in its transcript: {', '.join(marks)}")
    return None


class ClipEncoder:
    """Turns recordings into clips with one codec, one tokenizer and, if pairs are wanted, one speaker encoder.

    Recordings that share audio with `held_out` are skipped.
    """

    def __init__(
        self, config: DataConfig, vae_params, vae_config: AudioVAEConfig, tokenizer: Tokenizer,
        speaker_encoder: speaker.Encoder | None, held_out: Known | None = None,
    ):  # fmt: skip
        self._config, self._tokenizer, self._speaker_encoder = config, tokenizer, speaker_encoder
        self._held_out = held_out
        self.latent_dim = vae_config.latent_dim
        self._moments, self._is_scale_checked = Moments(vae_config.latent_dim), False
        self._largest = float(jnp.finfo(config.latent_dtype).max)
        self._rate = vae_config.sample_rate
        self._patch_samples = config.patch_size * vae_config.encoder_hop
        encode = jax.jit(autoencoder.encode, static_argnums=1)
        self._encode = lambda audio_BA: encode(vae_params, vae_config, audio_BA)

    def clips(
        self, recordings: Iterable[Recording], skipped: list[Skipped], pool: ThreadPoolExecutor, bar
    ) -> Iterator[Encoded]:
        """The clips of all usable recordings, in order; appends the others to `skipped`.

        Args:
            pool: threads that open recordings.   bar: a progress bar with a field "hours".
        """
        limit = round(_ROUND_SEC * self._rate)
        waiting: list[_Loaded] = []
        samples = seen = 0

        def encoded():
            nonlocal waiting, samples, seen
            yield from self._encoded(waiting)
            bar.advance(0, seen)
            bar.update(0, hours=bar.tasks[0].fields["hours"] + samples / self._rate / 3600)
            waiting, samples, seen = [], 0, 0

        for recording, loaded in in_threads(pool, self.load, recordings):
            seen += 1
            if isinstance(loaded, audio.BadRecording):
                start = "" if recording.start_sec is None else str(recording.start_sec)
                skipped.append(Skipped(str(recording.audio), start, loaded.reason, str(loaded)))
            else:
                waiting.append(loaded)
                samples += len(loaded.audio_A)
            if samples >= limit:
                yield from encoded()
        yield from encoded()

    # ---- loading -----------------------------------------------------------------------------------------------------

    def load(self, recording: Recording) -> _Loaded | audio.BadRecording:
        """A recording and its reference clip, trimmed and padded; or why it cannot be used."""
        try:
            if fault := text_fault(recording, self._config, self._tokenizer):
                raise fault
            if self._held_out and len(self._held_out.overlaps(np.array([recording.identity], IDENTITY))[0]):
                raise audio.BadRecording("held out", f"{recording.audio}: a held-out clip, which is not trained on")
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
        config, rate = self._config, self._rate
        shortest = max(round(config.min_sec * rate), self._patch_samples)
        longest = config.max_sec if config.trim == "none" else 2 * config.max_sec  # trimming may leave few enough
        audio_A = audio.load(path, rate, start_sec, end_sec, min_samples=shortest, max_sec=longest, rules=config.sound)
        if config.trim == "silence":
            audio_A = trim.trim_silence(audio_A, rate, threshold_db=config.trim_db, keep_ms=config.trim_keep_ms)
        elif config.trim == "vad":
            audio_A = trim.trim_to_speech(audio_A, rate, keep_ms=config.trim_keep_ms)
            if not len(audio_A):
                raise audio.BadRecording("no speech", f"{path}: no speech is detected in it")
        sec = len(audio_A) / rate
        if len(audio_A) < shortest:
            expected = shortest / rate
            raise audio.BadRecording("too short", f"{path}: {sec:.3f} s of sound is too short; expected {expected:.3f} s")
        if sec > config.max_sec:
            raise audio.BadRecording("too long", f"{path}: {sec:.1f} s is too long; expected at most {config.max_sec} s")
        return audio.pad_to_patches(audio_A, self._patch_samples, "right")

    # ---- encoding ----------------------------------------------------------------------------------------------------

    def _encoded(self, loaded: list[_Loaded]) -> Iterator[Encoded]:
        embeddings = self._embeddings(loaded)
        audios = [((r.audio, audio_A), (r.ref_audio, reference_A)) for r, audio_A, reference_A in loaded]
        latents = self._latents([pair for pairs in audios for pair in pairs if pair[1] is not None])
        for i, (recording, _, reference_A) in enumerate(loaded):
            patches_MPC = next(latents)
            clip = Clip(
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
            yield Encoded(recording, clip, embeddings.get(i))

    def _embeddings(self, loaded: list[_Loaded]) -> dict[int, np.ndarray]:
        """Of the clips that take part in pairs: those with a named speaker, except prompt clips."""
        if self._speaker_encoder is None:
            return {}
        chosen = [i for i, (recording, *_) in enumerate(loaded) if recording.speaker and not recording.is_prompt]
        if not chosen:
            return {}
        clips = [loaded[i].audio_A for i in chosen]
        return dict(zip(chosen, speaker.embed(self._speaker_encoder, clips, self._rate)))

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(self._config.text_rule.write(text)), np.int32)

    def _latents(self, recordings: list[tuple[pathlib.Path | audio.Stored, np.ndarray]]) -> Iterator[np.ndarray]:
        """Latents [M, P, C] of each recording, given with its name, in order.

        Recordings of about the same length go through the codec together, with zeros after the shorter ones. The codec is
        causal, so these zeros change nothing before them. There are few lengths (`_bucket`), so the codec is compiled few
        times.
        """
        names, audios = zip(*recordings) if recordings else ((), ())
        buckets: dict[int, list[int]] = {}
        for i, audio_A in enumerate(audios):
            buckets.setdefault(_bucket(len(audio_A) // self._patch_samples), []).append(i)
        patch_sec = self._patch_samples / self._rate
        results: dict[int, np.ndarray] = {}
        for patches, members in sorted(buckets.items()):
            batch = max(1, int(self._config.encode_sec / (patches * patch_sec)))
            for start in range(0, len(members), batch):
                chosen = members[start : start + batch]
                audio_BA = np.zeros((batch, patches * self._patch_samples), np.float32)
                for b, i in enumerate(chosen):
                    audio_BA[b, : len(audios[i])] = audios[i]
                latents_BTC = np.asarray(self._encode(audio_BA), np.float32)
                for b, i in enumerate(chosen):
                    latents_MPC = latents_BTC[b].reshape(patches, self._config.patch_size, -1)
                    results[i] = latents_MPC[: len(audios[i]) // self._patch_samples]
                    self._check(results[i], names[i])
        self._check_scale(results.values(), names)
        return (results[i] for i in range(len(audios)))

    def _check(self, latents_MPC: np.ndarray, name: pathlib.Path | audio.Stored) -> None:
        """Every array, whether of a clip or of a reference clip."""
        largest = np.abs(latents_MPC).max()
        if not np.isfinite(largest):
            raise UserError(f"{name}: the codec returns latents that are not finite numbers; it is not a trained codec")
        if largest > self._largest:
            raise UserError(
                f"{name}: the codec returns latents up to {largest:.3g}, expected at most {self._largest:.5g}, the largest "
                f"{self._config.latent_dtype}; train the codec further, or prepare with --config.latent_dtype=bfloat16"
            )

    def _check_scale(self, latents: Iterable[np.ndarray], names: Sequence) -> None:
        """Once, as soon as there is enough audio."""
        if self._is_scale_checked:
            return
        for latents_MPC in latents:
            self._moments.add(latents_MPC)
        sec = self._moments.num_frames * self._patch_samples / self._config.patch_size / self._rate
        if sec >= _SCALE_SEC:
            check_scale(self._moments.std_C, f"the first {sec / 60:.0f} minutes of audio (up to {names[-1]})")
            self._is_scale_checked = True


def _bucket(patches: int) -> int:
    """The next of 4, 6, 8, 12, 16, 24, 32, ..."""
    power = 4
    while power < patches:
        if patches <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power
