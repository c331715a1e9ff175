"""Request: the arguments of one generation, with their defaults, checked without a model.

The Python API, the command line and `evaluate` build a Request; the defaults of generation stand here alone. Names, order
and defaults are those of the PyTorch package's `VoxCPM.generate`. This module imports neither JAX nor numpy.
"""

import dataclasses
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.text import check_speakable

if TYPE_CHECKING:
    import numpy as np

MAX_CFG, MAX_STEPS, MAX_SEED = 10.0, 1000, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Request:
    """What to speak, and how.

    Attributes:
        text: what to say; "(description)" in front of it sets voice or style. White space is collapsed.
        prompt_wav_path, prompt_text: audio to continue and its transcript; both or neither, and not with a description.
        reference_wav_path: audio of the voice to clone.
        cfg_value: guidance, 0 to 10, useful 1.5 to 3.   inference_timesteps: Euler steps per patch, 1 to 1000.
        min_len, max_len: in patches (160 ms each in the release). The stop head is ignored for the first `min_len + 1`
            patches; the speech has at most `max_len`.
        normalize, denoise: of the PyTorch package; True raises, since this package does neither.
        retry_badcase: while the speech has `retry_badcase_ratio_threshold` patches per text token or more, draw again
            with the next seed, `retry_badcase_max_times` tries in total.
        seed: of the noise, 0 to 2^31 - 1; None picks a random one.
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
        for name, (kinds, expected) in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise UserError(f"{name} must be {expected}, got {value!r}")
        if not self.text.strip():
            raise UserError(f"text must not be empty or only spaces, got {self.text!r}")
        if (self.prompt_wav_path is None) != (self.prompt_text is None):
            have, lack = ("audio", "text") if self.prompt_text is None else ("text", "audio")
            raise UserError(f"a prompt needs its audio and its text; got prompt {have} without prompt {lack}")
        check_speakable(self.text, self.prompt_text)
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
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed must lie between 0 and {MAX_SEED}, got {self.seed}")
        for name in ("normalize", "denoise"):
            if getattr(self, name):
                raise UserError(f"{name}=True is not available in this package; prepare the input yourself")


_PATH = ((str, os.PathLike, type(None)), "the name of a file")
_INTEGER = (numbers.Integral, "an integer")
_NUMBER = (numbers.Real, "a number")
_FLAG = (bool, "True or False")
_KINDS = {  # field -> (accepted types, what they are called)
    "text": (str, "a string"),
    "prompt_wav_path": _PATH,
    "prompt_text": ((str, type(None)), "a string"),
    "reference_wav_path": _PATH,
    "cfg_value": _NUMBER,
    "inference_timesteps": _INTEGER,
    "min_len": _INTEGER,
    "max_len": _INTEGER,
    "normalize": _FLAG,
    "denoise": _FLAG,
    "retry_badcase": _FLAG,
    "retry_badcase_max_times": _INTEGER,
    "retry_badcase_ratio_threshold": _NUMBER,
    "seed": ((numbers.Integral, type(None)), "an integer"),
}


def as_requests(requests: "Sequence[Request | Mapping]") -> list[Request]:
    """Requests from requests or mappings of their fields.

    Raises:
        UserError: one of them is neither, or has an unknown field or a bad value; the message says which.
    """
    if isinstance(requests, str | Mapping | Request) or not hasattr(requests, "__iter__"):
        raise UserError(f"expected a list of requests or mappings, got {requests!r}")
    fields = [field.name for field in dataclasses.fields(Request)]
    found = []
    for number, request in enumerate(requests, 1):
        if isinstance(request, Request):
            found.append(request)
            continue
        if not isinstance(request, Mapping):
            raise UserError(f"request {number}: expected a Request or a mapping of its fields, got {request!r}")
        if unknown := [str(name) for name in request if name not in fields]:
            raise UserError(f"request {number}: unknown {', '.join(unknown)}; a request has {', '.join(fields)}")
        if "text" not in request:
            raise UserError(f"request {number}: no text")
        try:
            found.append(Request(**request))
        except UserError as error:
            raise UserError(f"request {number}: {error}") from None
    return found
