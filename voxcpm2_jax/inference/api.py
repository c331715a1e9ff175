"""VoxCPM: a loaded model that speaks. Keyword names and defaults are those of the reference's class of the same name.

model = VoxCPM.from_pretrained("DIR")
wav = model.generate("Hello there.")                                       # zero-shot
wav = model.generate("(a deep, slow voice)Hello there.")                   # voice design
wav = model.generate("Hello there.", reference_wav_path="voice.wav")       # cloning
wav = model.generate("And then", prompt_wav_path="a.wav", prompt_text="First,")   # continuation
"""

import dataclasses
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from voxcpm2_jax import sequence
from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.inference import decode
from voxcpm2_jax.inference.request import check_settings
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.vae import autoencoder

CONTEXT_PATCHES = 3  # of the prefill's audio, decoded before the first drawn patch of a continuation and then dropped

_encode = partial(jax.jit, static_argnums=1)(autoencoder.encode)
_decode = partial(jax.jit, static_argnums=1)(autoencoder.decode)
_decode_step = partial(jax.jit, static_argnums=1)(autoencoder.decode_step)


@dataclasses.dataclass(frozen=True)
class Speech:
    """One utterance and how it came about.

    Attributes:
        audio_A: float32 at `VoxCPM.sample_rate`.   patches_MPC: its latents.   seed: of the try that is heard.
        stopped_by: "stop head"; "max_len", the limit of the request; or "max_length", no slot was left in the model and
            the speech is cut off.   num_tries: 1 without a bad case.
    """

    audio_A: np.ndarray
    patches_MPC: np.ndarray
    seed: int
    stopped_by: str
    num_tries: int


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request, checked and laid out."""

    row: decode.Row
    num_steps: int
    context_MPC: np.ndarray  # last patches of the prefill's audio if it ends with audio, else none
    bad_case_patches: float  # as many patches or more are a bad case
    max_tries: int


class VoxCPM:
    """A backbone, its codec and its tokenizer.

    Args:
        params: backbone parameters as in training.   tokenizer: has `encode(text) -> ids` and `vocab_size`.
    Raises:
        UserError: a tokenizer with ids that the model has no embedding for.
    """

    def __init__(self, config: ModelConfig, params, vae_config: AudioVAEConfig, vae_params, tokenizer):
        if tokenizer.vocab_size > config.lm_config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the model embeds {config.lm_config.vocab_size} "
                "(lm_config.vocab_size); they are not of the same checkpoint"
            )
        self.config = config
        self.vae_config = vae_config
        self.tokenizer = tokenizer
        self._params = jax.jit(voxcpm2.unrolled_params)(params)
        self._vae_params = vae_params

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "VoxCPM":
        """Loads a training workdir, one step of it, or a directory in the released PyTorch layout.

        Raises:
            UserError: not such a directory, or a file in it is missing or does not fit.
        """
        from voxcpm2_jax import workdir
        from voxcpm2_jax.data.tokenizer import load_tokenizer

        loaded = workdir.load_model(path)
        return cls(loaded.config, loaded.params, loaded.vae_config, loaded.vae_params, load_tokenizer(loaded.tokenizer_dir))

    @property
    def sample_rate(self) -> int:
        """Hz of everything this model returns."""
        return self.vae_config.out_sample_rate

    def generate(
        self, text: str, prompt_wav_path: str | None = None, prompt_text: str | None = None,
        reference_wav_path: str | None = None, cfg_value: float = 2.0, inference_timesteps: int = 10, min_len: int = 2,
        max_len: int = 4096, normalize: bool = False, denoise: bool = False, retry_badcase: bool = True,
        retry_badcase_max_times: int = 3, retry_badcase_ratio_threshold: float = 6.0, seed: int | None = None, *,
        noise: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Speaks one text -> float32 [samples] at `sample_rate`.

        Args:
            text: what to say; "(description)" in front of it sets voice or style. White space is collapsed.
            prompt_wav_path, prompt_text: audio to continue and its transcript; both or neither.
            reference_wav_path: a voice to clone.   cfg_value: guidance, 0 to 10, useful 1.5 to 3.
            inference_timesteps: Euler steps a patch, 1 to 1000.   min_len, max_len: patches (of 160 ms).
            retry_badcase: draw again with the next seed while the speech has `retry_badcase_ratio_threshold` patches
                a text token or more, at most `retry_badcase_max_times` times in all.
            seed: of the noise; None takes one by chance.
            noise: float32 [patches, P, C] in place of the sampler's own draws; nothing is drawn beyond its end.
        Raises:
            UserError: bad text, audio or setting; speech past the model's `max_length`.
        """
        request = {k: v for k, v in locals().items() if k != "self"}
        (speech,) = self.speak([request])
        if speech.stopped_by == decode.NO_ROOM:
            raise decode.no_room(self.config)
        return speech.audio_A

    def generate_batch(self, requests: Sequence[Mapping]) -> list[np.ndarray]:
        """Speaks several requests at once, each a mapping of `generate`'s arguments; none depends on its neighbours.

        One that runs past the model's `max_length` is cut off there; `speak` says which.
        """
        return [speech.audio_A for speech in self.speak(requests)]

    def speak(self, requests: Sequence[Mapping]) -> list[Speech]:
        """`generate_batch` with seeds, latents and the reason why each utterance ended."""
        jobs = [self._prepare(**request) for request in requests]
        speeches: list[Speech | None] = [None] * len(jobs)
        todo = list(range(len(jobs)))
        tries = 0
        while todo:
            tries += 1
            again = []
            # One program draws rows with as many steps and the same kind of noise.
            kinds = {i: (jobs[i].num_steps, jobs[i].row.noise_MPC is None) for i in todo}
            for num_steps, is_drawn in sorted(set(kinds.values())):
                group = [i for i in todo if kinds[i] == (num_steps, is_drawn)]
                rows = [dataclasses.replace(jobs[i].row, seed=jobs[i].row.seed + tries - 1) for i in group]
                all_drawn = decode.generate(self._params, self.config, rows, num_steps=num_steps)
                for i, row, drawn in zip(group, rows, all_drawn):
                    if len(drawn.patches_MPC) >= jobs[i].bad_case_patches and tries < jobs[i].max_tries:
                        again.append(i)
                    else:
                        audio_A = np.zeros(0, np.float32)
                        speeches[i] = Speech(audio_A, drawn.patches_MPC, row.seed, drawn.stopped_by, tries)
            todo = again
        return self._with_audio(speeches, [job.context_MPC for job in jobs])

    def generate_streaming(self, *args, **kwargs) -> Iterator[np.ndarray]:
        """Speaks one text patch by patch; takes `generate`'s arguments, does not retry bad cases.

        Yields:
            float32 [samples of one patch]; together they are what `generate` returns.
        """
        names = list(VoxCPM.generate.__annotations__)
        job = self._prepare(**(dict(zip(names, args)) | kwargs))
        return self._stream(job)

    def _stream(self, job: _Job) -> Iterator[np.ndarray]:
        state = autoencoder.decode_state(self.vae_config, 1)
        for patch_PC in job.context_MPC:
            _, state = self._decode_patch(patch_PC, state)
        for patch_PC in decode.stream(self._params, self.config, job.row, num_steps=job.num_steps):
            audio_A, state = self._decode_patch(patch_PC, state)
            yield audio_A

    def _decode_patch(self, patch_PC, state):
        audio_BA, state = _decode_step(self._vae_params, self.vae_config, patch_PC[None], state, self.sample_rate)
        return np.asarray(audio_BA[0]), state

    def _prepare(
        self, text, prompt_wav_path=None, prompt_text=None, reference_wav_path=None, cfg_value=2.0, inference_timesteps=10,
        min_len=2, max_len=4096, normalize=False, denoise=False, retry_badcase=True, retry_badcase_max_times=3,
        retry_badcase_ratio_threshold=6.0, seed=None, noise=None,
    ) -> _Job:  # fmt: skip
        check_settings(text=text, prompt_wav_path=prompt_wav_path, prompt_text=prompt_text, cfg_value=cfg_value,
                       inference_timesteps=inference_timesteps, min_len=min_len, max_len=max_len,
                       retry_badcase_max_times=retry_badcase_max_times,
                       retry_badcase_ratio_threshold=retry_badcase_ratio_threshold)  # fmt: skip
        for name, is_on in (("normalize", normalize), ("denoise", denoise)):
            if is_on:
                raise UserError(f"{name}=True is not available in this package; prepare the input yourself")
        text = re.sub(r"\s+", " ", text)
        num_tokens = len(self.tokenizer.encode(text))
        reference_MPC = None if reference_wav_path is None else self.encode_file(reference_wav_path, pad="right")
        prompt_MPC = None if prompt_wav_path is None else self.encode_file(prompt_wav_path, pad="left")
        prefix = sequence.lay_out(
            self.tokenizer.encode((prompt_text or "") + text), reference_MPC=reference_MPC, prompt_MPC=prompt_MPC
        )
        shape = (self.config.patch_size, self.config.feat_dim)
        if noise is not None:
            noise = np.asarray(noise, np.float32)
            if noise.ndim != 3 or noise.shape[1:] != shape or not len(noise):
                raise UserError(f"noise must have shape [patches, {shape[0]}, {shape[1]}], got {list(noise.shape)}")
        row = decode.Row(
            prefix,
            seed=secrets.randbits(31) if seed is None else int(seed),
            noise_MPC=noise,
            min_len=min_len,
            max_len=min(int(num_tokens * retry_badcase_ratio_threshold + 10), max_len),
            cfg_value=cfg_value,
        )
        # Only a prefix that ends with audio is continued without a seam; any audio in it may serve as context.
        context_MPC = prefix.patches_MPC[-CONTEXT_PATCHES:] if prompt_MPC is not None else np.zeros((0, *shape), np.float32)
        may_retry = retry_badcase and noise is None
        return _Job(
            row,
            num_steps=inference_timesteps,
            context_MPC=context_MPC,
            bad_case_patches=num_tokens * retry_badcase_ratio_threshold if may_retry else np.inf,
            max_tries=retry_badcase_max_times,
        )

    def encode_file(self, path: str | os.PathLike, *, pad: str, start_sec=None, end_sec=None) -> np.ndarray:
        """Latents [M, P, C] of an audio file, padded with silence to whole patches, on the "left" or the "right".

        Args:
            start_sec, end_sec: the part that is meant; None: its ends.
        Raises:
            UserError: no audio there, or less than one patch of it.
        """
        from voxcpm2_jax.data import audio

        P, hop = self.config.patch_size, self.vae_config.encoder_hop
        audio_A = audio.load(path, self.vae_config.sample_rate, start_sec, end_sec, min_samples=P * hop)
        audio_A = audio.pad_to_patches(audio_A, P * hop, pad)
        num_frames = len(audio_A) // hop
        # The encoder is causal: what pads to a bucket behind the clip does not change the clip's latents.
        padded_A = np.pad(audio_A, (0, decode.bucket(num_frames) * hop - len(audio_A)))
        latents_BTC = _encode(self._vae_params, self.vae_config, padded_A[None])
        return np.asarray(latents_BTC[0, :num_frames]).reshape(-1, P, self.vae_config.latent_dim)

    def decode(self, utterances: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Audio [samples] of latents [M, P, C], all utterances together."""
        C, hop = self.config.feat_dim, self.vae_config.decoder_hop
        whole = [patches_MPC.reshape(-1, C) for patches_MPC in utterances]
        if not whole:
            return []
        # The decoder is causal too.
        latents_BTC = np.zeros((len(whole), decode.bucket(max(map(len, whole))), C), np.float32)
        for b, x_TC in enumerate(whole):
            latents_BTC[b, : len(x_TC)] = x_TC
        audio_BA = np.asarray(_decode(self._vae_params, self.vae_config, latents_BTC, self.sample_rate))
        return [audio_A[: len(x_TC) * hop] for audio_A, x_TC in zip(audio_BA, whole)]

    def _with_audio(self, speeches: list[Speech], contexts: list[np.ndarray]) -> list[Speech]:
        """Decodes every utterance behind its context, which is dropped again."""
        patch_samples = self.config.patch_size * self.vae_config.decoder_hop
        decoded = self.decode([np.concatenate([c, s.patches_MPC]) for s, c in zip(speeches, contexts)])
        return [
            dataclasses.replace(s, audio_A=audio_A[len(c) * patch_samples :])
            for s, c, audio_A in zip(speeches, contexts, decoded)
        ]
