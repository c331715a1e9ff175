"""Trains with the PyTorch package `voxcpm`, for comparison.

It uses the package's own model and losses as its fine-tuning script does: clips in padded batches, float32 parameters, autocast
to the config's dtype, AdamW. The script also encodes audio and writes metrics in every step; here it does neither.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np

from voxcpm2_jax import sequence
from voxcpm2_jax.config.model import ModelConfig
from voxcpm2_jax.config.plain import UserError, to_dict


def load(config: ModelConfig, device: str):
    """The PyTorch package's model in this shape, randomly initialised by itself, float32, in training mode.

    Args:
        device: "cpu" or "cuda".
    Raises:
        UserError: the package is not installed.
    """
    missing = [name for name in ("torch", "voxcpm") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed: comparing needs pip install voxcpm==2.0.3, which installs torch as well"
        )
    import torch

    if importlib.util.find_spec("torchaudio") is None:  # voxcpm imports it, for parts that are not used here
        stand_in = types.ModuleType("torchaudio")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = stand_in
    from voxcpm.model.voxcpm2 import VoxCPM2Model, VoxCPMConfig

    # Stand-ins: clips are token ids and latents, so that neither tokenizer nor codec is used.
    tokenizer = types.SimpleNamespace(vocab={})
    codec = types.SimpleNamespace(chunk_size=1, decode_chunk_size=1, sample_rate=1, out_sample_rate=1)
    with torch.device(device):
        model = VoxCPM2Model(VoxCPMConfig.model_validate(to_dict(config)), tokenizer, codec, device=device)
    return model.train()


def pad(clips: Sequence[sequence.Sequence]) -> dict[str, np.ndarray]:
    """Clips as one batch of the PyTorch package, padded to the longest."""
    shape = len(clips), max(clip.num_slots for clip in clips)
    batch = {
        "text_tokens": np.zeros(shape, np.int64), "text_mask": np.zeros(shape, np.int32),
        "audio_feats": np.zeros((*shape, *clips[0].patches_MPC.shape[1:]), np.float32),
        "audio_mask": np.zeros(shape, np.int32), "loss_mask": np.zeros(shape, np.int32),
        "position_ids": np.zeros(shape, np.int64), "labels": np.zeros(shape, np.int64),
    }  # fmt: skip
    for b, clip in enumerate(clips):
        batch["text_tokens"][b, : clip.num_slots] = clip.tokens_T
        batch["text_mask"][b, : clip.num_slots] = 1
        batch["text_mask"][b, clip.slot_M] = 0
        batch["audio_mask"][b, clip.slot_M] = 1
        batch["audio_feats"][b, clip.slot_M] = clip.patches_MPC
        batch["loss_mask"][b, clip.slot_M] = clip.target_M
        batch["labels"][b, clip.slot_M] = clip.stop_M
        batch["position_ids"][b, : clip.num_slots] = np.arange(clip.num_slots)
    return batch


def at_slots(clips: Sequence[sequence.Sequence], values: Sequence[np.ndarray]) -> np.ndarray:
    """Values per patch, laid out as `pad` lays out the patches: [clips * longest, ...], zero elsewhere."""
    padded = np.zeros((len(clips), max(clip.num_slots for clip in clips), *values[0].shape[1:]), values[0].dtype)
    for b, (clip, value_M) in enumerate(zip(clips, values)):
        padded[b, clip.slot_M] = value_M
    return padded.reshape(-1, *padded.shape[2:])


def losses(model, batch: dict[str, np.ndarray]) -> dict:
    """The two mean losses of a padded batch, "loss/diff" and "loss/stop"."""
    import torch

    return model(**{name: torch.from_numpy(value).to(model.device) for name, value in batch.items()})


@contextlib.contextmanager
def training_draws(time_T, noise_TPC, drop_T, start_T=None) -> Iterator[None]:
    """Makes the PyTorch package's loss use these values in place of its own random draws, inside the `with` block.

    Args:
        time_T: flow time of each slot.   noise_TPC: standard normal.   drop_T: whether conditioning is dropped.
        start_T: r of mean mode.
    """
    import torch
    from voxcpm.modules.locdit import unified_cfm

    time_T, drop_T = torch.from_numpy(np.asarray(time_T)), torch.from_numpy(np.asarray(drop_T))
    start_T = time_T if start_T is None else torch.from_numpy(np.asarray(start_T))
    noise_TCP = torch.from_numpy(np.asarray(noise_TPC)).transpose(1, 2)
    # compute_loss draws, in this order: rand for the dropout (kept if above the rate), rand and randn_like for noise on the
    # condition (its scale is zero), randn_like for the flow's noise.
    uniforms = iter([torch.where(drop_T, 0.0, 1.0), torch.zeros(len(time_T))])
    normals = iter([torch.zeros_like(noise_TCP), noise_TCP])
    with (
        mock.patch.object(unified_cfm.UnifiedCFM, "sample_r_t", lambda self, x, **_: (start_T, time_T)),
        mock.patch.object(torch, "rand", lambda *_, **__: next(uniforms)),
        mock.patch.object(torch, "randn_like", lambda *_, **__: next(normals)),
    ):
        yield


class Training:
    """Training by the PyTorch package on the same clips, epoch after epoch.

    Args:
        rows: clips in a batch.   learning_rate, weight_decay: of AdamW.
    """

    def __init__(self, config: ModelConfig, clips: Sequence[sequence.Sequence], rows: int, *, learning_rate, weight_decay):
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._torch = torch
        self._dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self._model = load(config, self.device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        order = np.random.default_rng(0).permutation(len(clips))  # as the script's loader shuffles
        padded = [pad([clips[i] for i in order[start : start + rows]]) for start in range(0, len(clips), rows)]
        self._batches = [{name: torch.from_numpy(x).to(self.device) for name, x in batch.items()} for batch in padded]
        slots = sum(batch["text_tokens"].numel() for batch in self._batches)
        self.padding = 1 - sum(clip.num_slots for clip in clips) / slots

    @property
    def device_name(self) -> str:
        return self._torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory on the GPU; None on the CPU."""
        return self._torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def epoch(self) -> None:
        """One update for each batch of clips; returns when the device is done."""
        torch = self._torch
        for batch in self._batches:
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, dtype=self._dtype, enabled=self._dtype != torch.float32):
                outputs = self._model(**batch)
            (outputs["loss/diff"] + outputs["loss/stop"]).backward()
            torch.nn.utils.clip_grad_norm_(
                self._model.parameters(), max_norm=1e9
            )  # as in the script, which wants only the norm
            self._optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
