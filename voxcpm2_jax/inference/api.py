"""VoxCPM: a loaded model that speaks. Keyword names and defaults are those of the same class of the PyTorch package.

model = VoxCPM.from_pretrained("DIR")
wav = model.generate("Hello there.")                                       # zero-shot
wav = model.generate("(a deep, slow voice)Hello there.")                   # voice design
wav = model.generate("Hello there.", reference_wav_path="voice.wav")       # cloning
wav = model.generate("And then", prompt_wav_path="a.wav", prompt_text="First,")   # continuation

A Request becomes a row of the decode loop (`_lay_out`), the loop draws latent patches (decode.py), and the codec turns
these into audio.
"""

import dataclasses
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from voxcpm2_jax import sequence
from voxcpm2_jax.checkpoint.arrays import Weights
from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.request import Request, as_requests
from voxcpm2_jax.config.text import check_control, markup, written
from voxcpm2_jax.inference import arguments, decode, load, room
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.processes import say
from voxcpm2_jax.vae import autoencoder, streaming

# The codec decodes a continuation together with the prompt's last patches, whose audio is then cut off.
CONTEXT_PATCHES = 3


@dataclasses.dataclass(frozen=True)
class Speech:
    """One utterance.

    Attributes:
        audio_A: float32 at `VoxCPM.sample_rate`.   patches_MPC: its latents.
        seed: of the try that was kept.   num_tries: 1 if nothing was drawn again.
        is_bad_case: it has `retry_badcase_ratio_threshold` patches per text token or more.
        stopped_by: "stop head"; "max_len", the request's limit; or "max_length": the model had no slot left, the speech
            is cut off.
    """

    audio_A: np.ndarray
    patches_MPC: np.ndarray
    seed: int
    stopped_by: str
    num_tries: int
    is_bad_case: bool = False


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request and the row that it becomes."""

    request: Request
    row: decode.Row
    context_MPC: np.ndarray  # decoded before the speech, then cut off; empty unless the prefix ends with audio
    bad_case_patches: float  # this many patches or more are a bad case
    max_tries: int


class VoxCPM:
    """A backbone, its codec and its tokenizer, from a directory; `from_parts` takes them from memory.

    The arguments are those of the PyTorch package's class; arguments.py tells what becomes of each.

    Args:
        voxcpm_model_path: a training workdir, one step of it, or a directory in the released PyTorch layout. Weights that are
            wider than the model's `dtype` are cast to it. They are read group by group (load.py). Programs that this process
            compiles from then on are kept on disk (compiled.py), so that the next process starts faster.
        device: "cpu", "cuda", "tpu", with ":1" for the second; None: JAX's default.
    Raises:
        UserError: not such a directory, a file in it is missing or does not fit, or an argument cannot be taken.
    """

    def __init__(
        self,
        voxcpm_model_path: str | os.PathLike,
        zipenhancer_model_path: str | None = None,
        enable_denoiser: bool | None = None,
        optimize: bool | None = None,
        device: str | None = None,
        lora_config=None,
        lora_weights_path: str | os.PathLike | None = None,
    ):
        from voxcpm2_jax import compiled, workdir
        from voxcpm2_jax.data.tokenizer import load_tokenizer

        arguments.check(
            lora_config=lora_config, lora_weights_path=lora_weights_path, optimize=optimize,
            enable_denoiser=enable_denoiser, zipenhancer_model_path=zipenhancer_model_path,
        )  # fmt: skip
        device = arguments.find_device(device)
        opened = workdir.open_model(arguments.local_directory(voxcpm_model_path))
        tokenizer = load_tokenizer(opened.tokenizer_dir)
        compiled.keep()
        self._set(opened.config, opened.weights, opened.vae_config, opened.vae_params, tokenizer, device)

    @classmethod
    def from_parts(cls, config: ModelConfig, params, vae_config: AudioVAEConfig, vae_params, tokenizer) -> "VoxCPM":
        """A model from parts in memory.

        Args:
            params: backbone parameters as in training.
            tokenizer: a data.tokenizer.Tokenizer; its `rule` decides how texts are written.
        Raises:
            UserError: the tokenizer has ids that the model has no embedding for.
        """
        model = cls.__new__(cls)
        model._set(config, params, vae_config, vae_params, tokenizer, None)
        return model

    @classmethod
    def from_pretrained(
        cls,
        hf_model_id: str | os.PathLike = "openbmb/VoxCPM2",
        load_denoiser: bool | None = None,
        zipenhancer_model_id: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        optimize: bool | None = None,
        device: str | None = None,
        lora_config=None,
        lora_weights_path: str | os.PathLike | None = None,
        **kwargs,
    ) -> "VoxCPM":
        """Loads a directory that the constructor takes, or a model on the Hugging Face hub.

        Args:
            hf_model_id: the directory, or "OWNER/NAME" on the hub, which needs the package huggingface_hub.
            cache_dir, local_files_only: where the hub's client keeps files, and whether it may download.
        Raises:
            UserError: as the constructor.
        """
        arguments.check(lora_config=lora_config, lora_weights_path=lora_weights_path)
        path = arguments.local_directory(hf_model_id, cache_dir, local_files_only=local_files_only)
        return cls(path, zipenhancer_model_id, load_denoiser, optimize, device, **kwargs)

    def _set(self, config, params, vae_config, vae_params, tokenizer, device: jax.Device | None) -> None:
        if tokenizer.vocab_size > config.lm_config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the model embeds {config.lm_config.vocab_size} "
                "(lm_config.vocab_size); they are not of the same checkpoint"
            )
        self.config = config
        self.vae_config = vae_config
        self.tokenizer = tokenizer
        with jax.default_device(device):
            if isinstance(params, Weights):
                params = load.unrolled(params, config.dtype)
            else:
                params = jax.jit(voxcpm2.unrolled_params)(params)
        # Put on a named device, they stay there, and so does all that is computed from them.
        self._params = params if device is None else jax.device_put(params, device)
        self._vae_params = jax.device_put(vae_params, device)

    @property
    def tts_model(self) -> "VoxCPM":
        """This model: scripts for the PyTorch package ask `model.tts_model.sample_rate`."""
        return self

    lora_enabled = False  # here and below: what scripts for the PyTorch package may ask of a model without LoRA

    def load_lora(self, lora_weights_path) -> tuple:
        """Refused."""
        raise arguments.no_lora("load_lora")

    def get_lora_state_dict(self) -> dict:
        """Refused."""
        raise arguments.no_lora("get_lora_state_dict")

    def set_lora_enabled(self, enabled: bool) -> None:
        """Refused if `enabled`."""
        if enabled:
            raise arguments.no_lora("set_lora_enabled")

    def unload_lora(self) -> None:
        """Nothing is loaded."""

    @property
    def sample_rate(self) -> int:
        """Hz of all audio that this model returns."""
        return self.vae_config.out_sample_rate

    def generate(
        self,
        text: str,
        prompt_wav_path: str | os.PathLike | None = Request.prompt_wav_path,
        prompt_text: str | None = Request.prompt_text,
        reference_wav_path: str | os.PathLike | None = Request.reference_wav_path,
        cfg_value: float = Request.cfg_value,
        inference_timesteps: int = Request.inference_timesteps,
        min_len: int = Request.min_len,
        max_len: int = Request.max_len,
        normalize: bool = Request.normalize,
        denoise: bool = Request.denoise,
        retry_badcase: bool = Request.retry_badcase,
        retry_badcase_max_times: int = Request.retry_badcase_max_times,
        retry_badcase_ratio_threshold: float = Request.retry_badcase_ratio_threshold,
        seed: int | None = Request.seed,
        *,
        noise: np.ndarray | None = Request.noise,
    ) -> np.ndarray:
        """Speaks one text -> float32 [samples] at `sample_rate`. `Request` explains the arguments.

        Raises:
            UserError: bad text, audio or setting; the speech does not end within the model's `max_length`.
        """
        request = Request(
            text, prompt_wav_path, prompt_text, reference_wav_path, cfg_value, inference_timesteps, min_len, max_len, normalize,
            denoise, retry_badcase, retry_badcase_max_times, retry_badcase_ratio_threshold, seed, noise=noise,
        )  # fmt: skip
        (speech,) = self.speak([request])
        if speech.stopped_by == decode.NO_ROOM:
            raise decode.no_room(self.config)
        return speech.audio_A

    def generate_batch(self, requests: Sequence[Request | Mapping]) -> list[np.ndarray]:
        """Speaks several requests together -> the audio of each; see `speak`."""
        return [speech.audio_A for speech in self.speak(requests)]

    def speak(self, requests: Sequence[Request | Mapping]) -> list[Speech]:
        """Speaks several requests together; none depends on the others.

        They are drawn in as few batches as `decode.BATCH_SLOTS` allows, so memory does not grow with their number.
        Speech that does not end within the model's `max_length` is cut off there; `stopped_by` says so.

        Args:
            requests: Requests, or mappings of their fields.
        Raises:
            UserError: bad text, audio or setting in any of them.
        """
        jobs = [self._lay_out(request) for request in as_requests(requests)]
        speeches: list[Speech | None] = [None] * len(jobs)
        todo = list(range(len(jobs)))
        tries = 0
        while todo:
            tries += 1
            again = []
            # Rows of one batch have the same number of Euler steps, and all or none have given noise.
            kinds = {i: (jobs[i].request.inference_timesteps, jobs[i].row.noise_MPC is None) for i in todo}
            for num_steps, is_drawn in sorted(set(kinds.values())):
                group = [i for i in todo if kinds[i] == (num_steps, is_drawn)]
                rows = [dataclasses.replace(jobs[i].row, seed=jobs[i].row.seed + tries - 1) for i in group]
                all_drawn = decode.generate(self._params, self.config, rows, num_steps=num_steps)
                for i, row, drawn in zip(group, rows, all_drawn):
                    is_bad = len(drawn.patches_MPC) >= jobs[i].bad_case_patches
                    if is_bad and tries < jobs[i].max_tries:
                        again.append(i)
                    else:
                        audio_A = self._audio(jobs[i].context_MPC, drawn.patches_MPC)
                        speeches[i] = Speech(audio_A, drawn.patches_MPC, row.seed, drawn.stopped_by, tries, is_bad)
            todo = again
        return speeches

    def generate_streaming(self, *args, **kwargs) -> Iterator[np.ndarray]:
        """Speaks one text patch by patch; takes `generate`'s arguments, does not retry bad cases.

        Yields:
            float32 [samples of one patch]; together they are what `generate` returns.
        """
        return self._stream(self._lay_out(Request(*args, **kwargs)))

    def _stream(self, job: _Job) -> Iterator[np.ndarray]:
        state = autoencoder.decode_state(self.vae_config, 1)
        for patch_PC in job.context_MPC:
            _, state = self._decode_patch(patch_PC, state)
        for patch_PC in decode.stream(self._params, self.config, job.row, num_steps=job.request.inference_timesteps):
            audio_A, state = self._decode_patch(patch_PC, state)
            yield audio_A

    def _decode_patch(self, patch_PC, state):
        audio_BA, state = streaming.decode_step(self._vae_params, self.vae_config, patch_PC[None], state, self.sample_rate)
        return np.asarray(audio_BA[0]), state

    def _lay_out(self, request: Request) -> _Job:
        """Tokenizes the text and encodes the recordings of a request."""
        text, whole = self._written(request)
        num_tokens = len(self.tokenizer.encode(text))
        reference_MPC = prompt_MPC = None
        text_ids = self.tokenizer.encode(whole)
        max_sec = room.check(self.config, self.vae_config, request, len(text_ids))
        if request.reference_wav_path is not None:
            reference_MPC = self.encode_file(request.reference_wav_path, pad="right", max_sec=max_sec)
        if request.prompt_wav_path is not None:
            prompt_MPC = self.encode_file(request.prompt_wav_path, pad="left", max_sec=max_sec)
        prefix = sequence.lay_out(text_ids, reference_MPC=reference_MPC, prompt_MPC=prompt_MPC)
        bad_case_patches = num_tokens * request.retry_badcase_ratio_threshold
        may_retry = request.retry_badcase and request.noise is None
        max_tries = request.retry_badcase_max_times if may_retry else 1
        row = decode.Row(
            prefix,
            seed=secrets.randbits(31) if request.seed is None else int(request.seed),
            noise_MPC=self._noise(request),
            min_len=request.min_len,
            max_len=min(int(bad_case_patches + 10), request.max_len),
            cfg_value=request.cfg_value,
        )
        # A continuation joins the prompt's audio without a gap. Its context may reach back into the reference clip's audio.
        context_MPC = np.zeros((0, self.config.patch_size, self.config.feat_dim), np.float32)
        if prompt_MPC is not None:
            context_MPC = prefix.patches_MPC[-CONTEXT_PATCHES:]
        return _Job(request, row, context_MPC, bad_case_patches, max_tries)

    def _written(self, request: Request) -> tuple[str, str]:
        """The text of a request as it is tokenized: alone, and after the prompt's."""
        text, whole = written(self.tokenizer.rule, request.text, request.prompt_text)
        check_control(self.tokenizer.control_pieces(whole))
        if marks := markup(whole):
            say(f"text has {', '.join(marks)}: the model reads it as words, unless it was trained on such marks")
        return text, whole

    def _noise(self, request: Request) -> np.ndarray | None:
        if request.noise is None:
            return None
        noise = np.asarray(request.noise, np.float32)
        shape = (self.config.patch_size, self.config.feat_dim)
        if noise.ndim != 3 or noise.shape[1:] != shape or not len(noise):
            raise UserError(f"noise must have shape [patches, {shape[0]}, {shape[1]}], got {list(noise.shape)}")
        return noise

    def encode_file(
        self, path: str | os.PathLike, *, pad: str, start_sec=None, end_sec=None, max_sec: float = math.inf
    ) -> np.ndarray:
        """Latents [M, P, C] of an audio file.

        Args:
            pad: "left" or "right": the side that is padded with silence to whole patches.
            start_sec, end_sec: the part of the file to encode; None: from its start, to its end.
            max_sec: the longest accepted recording.
        Raises:
            UserError: the file has no audio, less than one patch, or more than `max_sec`.
        """
        from voxcpm2_jax.data import audio

        P, hop = self.config.patch_size, self.vae_config.encoder_hop
        part = {"start_sec": start_sec, "end_sec": end_sec, "max_sec": max_sec}
        audio_A = audio.load(path, self.vae_config.sample_rate, min_samples=P * hop, **part)
        audio_A = audio.pad_to_patches(audio_A, P * hop, pad)
        return streaming.encode(self._vae_params, self.vae_config, audio_A).reshape(-1, P, self.vae_config.latent_dim)

    def decode(self, utterances: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Audio [samples] of each utterance's latents [M, P, C]; they are decoded one after the other."""
        C, hz = self.config.feat_dim, self.sample_rate
        return [streaming.decode(self._vae_params, self.vae_config, x_MPC.reshape(-1, C), hz) for x_MPC in utterances]

    def _audio(self, context_MPC: np.ndarray, patches_MPC: np.ndarray) -> np.ndarray:
        """Decodes patches after their context, and cuts the context's audio off."""
        (audio_A,) = self.decode([np.concatenate([context_MPC, patches_MPC])])
        return audio_A[len(context_MPC) * self.config.patch_size * self.vae_config.decoder_hop :]
