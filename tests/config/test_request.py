"""A request is checked without a model, and holds the defaults of generation."""

import dataclasses
import inspect
import io
import subprocess
import sys

import numpy as np
import pytest

from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.request import Request, as_requests
from voxcpm2_jax.inference.api import VoxCPM

pytestmark = pytest.mark.fast

BAD = [
    ({"text": ""}, "text must not be empty or only spaces, got ''"),
    ({"text": " \n"}, "text must not be empty or only spaces"),
    ({"text": None}, "text must be a string, got None"),
    ({"text": ["one"]}, "text must be a string, got ['one']"),
    ({"prompt_text": 3, "prompt_wav_path": "a.wav"}, "prompt_text must be a string, got 3"),
    ({"reference_wav_path": io.BytesIO()}, "reference_wav_path must be the name of a file, got <_io.BytesIO"),
    ({"prompt_wav_path": b"a.wav", "prompt_text": "a"}, "prompt_wav_path must be the name of a file, got b'a.wav'"),
    ({"cfg_value": "2"}, "cfg_value must be a number, got '2'"),
    ({"cfg_value": True}, "cfg_value must be a number, got True"),
    ({"inference_timesteps": 2.5}, "inference_timesteps must be an integer, got 2.5"),
    ({"max_len": None}, "max_len must be an integer, got None"),
    ({"seed": -1}, "seed must lie between 0 and 2147483647, got -1"),
    ({"seed": 2**31}, "seed must lie between 0 and 2147483647"),
    ({"seed": 1.0}, "seed must be an integer, got 1.0"),
    ({"retry_badcase": "no"}, "retry_badcase must be True or False, got 'no'"),
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


def test_numbers_of_numpy_are_numbers():
    request = Request("one", cfg_value=np.float32(1.5), inference_timesteps=np.int64(3), seed=np.uint32(7))
    assert (request.cfg_value, request.inference_timesteps, request.seed) == (1.5, 3, 7)


LISTS = [
    ("one", "expected a list of requests or mappings, got 'one'"),
    ({"text": "one"}, "expected a list of requests or mappings, got {'text': 'one'}"),
    (None, "expected a list of requests or mappings, got None"),
    ([{"text": "one"}, "two"], "request 2: expected a Request or a mapping of its fields, got 'two'"),
    ([{"txt": "one"}], "request 1: unknown txt; a request has text, prompt_wav_path, "),
    ([{"seed": 1}], "request 1: no text"),
    ([{"text": "one", "cfg_value": "2"}], "request 1: cfg_value must be a number, got '2'"),
]


@pytest.mark.parametrize(("requests", "message"), LISTS)
def test_bad_lists_of_requests(requests, message):
    with pytest.raises(UserError) as error:
        as_requests(requests)
    assert message in str(error.value) and "\n" not in str(error.value)


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
