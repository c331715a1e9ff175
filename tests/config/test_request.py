"""A request is checked without a model, and holds the defaults of generation."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.request import Request
from voxcpm2_jax.inference.api import VoxCPM

pytestmark = pytest.mark.fast

BAD = [
    ({"text": ""}, "text must not be empty or only spaces, got ''"),
    ({"text": " \n"}, "text must not be empty or only spaces"),
    ({"text": None}, "text must not be empty or only spaces, got None"),
    ({"normalize": True}, "normalize=True is not available"),
    ({"denoise": True}, "denoise=True is not available"),
    ({"prompt_text": "a"}, "got prompt text without prompt audio"),
    ({"prompt_wav_path": "a.wav"}, "got prompt audio without prompt text"),
    ({"cfg_value": -0.1}, "cfg_value must lie between 0 and 10"),
    ({"cfg_value": 10.1}, "cfg_value must lie between 0 and 10"),
    ({"cfg_value": float("nan")}, "cfg_value must lie between 0 and 10"),
    ({"inference_timesteps": 0}, "inference_timesteps must lie between 1 and 1000, got 0"),
    ({"inference_timesteps": 1001}, "inference_timesteps must lie between 1 and 1000"),
    ({"min_len": -1}, "min_len and max_len must satisfy"),
    ({"max_len": 0}, "min_len and max_len must satisfy"),
    ({"min_len": 5, "max_len": 4}, "got 5 and 4"),
    ({"retry_badcase_max_times": 0}, "retry_badcase_max_times must be over 0, got 0"),
    ({"retry_badcase_ratio_threshold": 0}, "retry_badcase_ratio_threshold must be over 0, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_requests(arguments, message):
    with pytest.raises(UserError) as error:  # a ValueError, as in the PyTorch package
        Request(**{"text": "one"} | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_limits_themselves_are_allowed():
    Request("one", cfg_value=0.0, inference_timesteps=1000, min_len=0, max_len=1)
    Request("one", cfg_value=10.0, inference_timesteps=1, min_len=5, max_len=5, retry_badcase_max_times=1)


def test_generate_takes_the_fields_of_a_request(monkeypatch):
    """The same names, order, kinds, defaults and annotations; and each argument reaches its field."""
    _, *arguments = inspect.signature(VoxCPM.generate, eval_str=False).parameters.values()
    fields = list(inspect.signature(Request).parameters.values())
    assert [(p.name, p.kind, p.default) for p in arguments] == [(p.name, p.kind, p.default) for p in fields]

    class AskedError(Exception):
        pass

    def speak(self, requests):
        raise AskedError(*requests)

    monkeypatch.setattr(VoxCPM, "speak", speak)
    values = {
        "text": "one", "prompt_wav_path": "a", "prompt_text": "b", "reference_wav_path": "c", "cfg_value": 1.5,
        "inference_timesteps": 4, "min_len": 1, "max_len": 9, "normalize": False, "denoise": False, "retry_badcase": True,
        "retry_badcase_max_times": 2, "retry_badcase_ratio_threshold": 5.0, "seed": 7, "noise": [1],
    }  # fmt: skip
    with pytest.raises(AskedError) as asked:
        VoxCPM.generate(object.__new__(VoxCPM), **values)
    assert dataclasses.asdict(asked.value.args[0]) == values


def test_evaluation_starts_from_the_same_defaults():
    assert (EvaluateConfig().cfg_value, EvaluateConfig().inference_timesteps) == (2.0, 10)
    assert (EvaluateConfig().cfg_value, EvaluateConfig().inference_timesteps) == (
        Request.cfg_value,
        Request.inference_timesteps,
    )


def test_a_request_needs_no_jax():
    """The command line imports it before it knows which command runs."""
    program = "import sys, voxcpm2_jax.config.request; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
