"""Request: the arguments of one generation, with their defaults, checked without a model.

The Python API, the command line and `evaluate` build a Request; the defaults of generation stand here alone. Names, order
and defaults are those of the PyTorch package's `VoxCPM.generate`. This module imports neither JAX nor numpy.
"""

import dataclasses
import os
from typing import TYPE_CHECKING

from voxcpm2_jax.config.plain import UserError

if TYPE_CHECKING:
    import numpy as np

MAX_CFG, MAX_STEPS = 10.0, 1000


@dataclasses.dataclass(frozen=True)
class Request:
    """What to speak, and how.

    Attributes:
        text: what to say; "(description)" in front of it sets voice or style. White space is collapsed.
        prompt_wav_path, prompt_text: audio to continue and its transcript; both or neither.
        reference_wav_path: audio of the voice to clone.
        cfg_value: guidance, 0 to 10, useful 1.5 to 3.   inference_timesteps: Euler steps per patch, 1 to 1000.
        min_len, max_len: in patches (160 ms each in the release). The stop head is ignored for the first `min_len + 1`
            patches; the speech has at most `max_len`.
        normalize, denoise: of the PyTorch package; True raises, since this package does neither.
        retry_badcase: while the speech has `retry_badcase_ratio_threshold` patches per text token or more, draw again
            with the next seed, `retry_badcase_max_times` tries in total.
        seed: of the noise; None picks a random one.
        noise: float32 [patches, P, C], replaces the sampler's draws; the speech ends where it ends. Disables retries.
    Raises:
        UserError: a value that no model accepts.
    """

    text: str
    prompt_wav_path: str | os.PathLike | None = None
    prompt_text: str | None = None
    reference_wav_path: str | os.PathLike | None = None
    cfg_value: float = 2.0
    inference_timesteps: int = 10
    min_len: int = 2
    max_len: int = 4096
    normalize: bool = False
    denoise: bool = False
    retry_badcase: bool = True
    retry_badcase_max_times: int = 3
    retry_badcase_ratio_threshold: float = 6.0
    seed: int | None = None
    noise: "np.ndarray | None" = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.text, str) or not self.text.strip():
            raise UserError(f"text must not be empty or only spaces, got {self.text!r}")
        if (self.prompt_wav_path is None) != (self.prompt_text is None):
            have, lack = ("audio", "text") if self.prompt_text is None else ("text", "audio")
            raise UserError(f"a prompt needs its audio and its text; got prompt {have} without prompt {lack}")
        if not 0 <= self.cfg_value <= MAX_CFG:
            raise UserError(f"cfg_value must lie between 0 and {MAX_CFG:g} (useful: 1.5 to 3), got {self.cfg_value}")
        if not 1 <= self.inference_timesteps <= MAX_STEPS:
            raise UserError(f"inference_timesteps must lie between 1 and {MAX_STEPS}, got {self.inference_timesteps}")
        if self.min_len < 0 or self.max_len < 1 or self.min_len > self.max_len:
            raise UserError(
                f"min_len and max_len must satisfy 0 <= min_len <= max_len, max_len >= 1; got {self.min_len} and {self.max_len}"
            )
        for name in ("retry_badcase_max_times", "retry_badcase_ratio_threshold"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be over 0, got {getattr(self, name)}")
        for name in ("normalize", "denoise"):
            if getattr(self, name):
                raise UserError(f"{name}=True is not available in this package; prepare the input yourself")
