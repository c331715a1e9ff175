"""Tiny voices and recordings that the tests of this folder share."""

import numpy as np
import pytest
import soundfile

from tests.inference.speaking import with_stop_head
from voxcpm2_jax.inference.api import VoxCPM


@pytest.fixture(scope="package")
def voice(tiny_parts):
    """A model with random weights: it babbles."""
    return VoxCPM.from_parts(*tiny_parts)


@pytest.fixture(scope="package")
def brief(tiny_parts):
    """Its stop head says stop at every patch."""
    return with_stop_head(tiny_parts, stops=True)


@pytest.fixture(scope="package")
def endless(tiny_parts):
    """Its stop head never says stop."""
    return with_stop_head(tiny_parts, stops=False)


@pytest.fixture(scope="package")
def recordings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    soundfile.write(directory / "reference.wav", 0.2 * rng.normal(size=(8820, 2)), 22050)  # 0.4 s: 3 patches
    soundfile.write(directory / "prompt.wav", 0.2 * rng.normal(size=4000), 16000)  # 0.25 s: 2 patches
    return directory


@pytest.fixture(scope="package")
def modes(recordings):
    """Arguments of a request in each of the four modes."""
    reference = {"reference_wav_path": recordings / "reference.wav"}
    prompt = {"prompt_wav_path": recordings / "prompt.wav", "prompt_text": "three "}
    return {
        "zero-shot": {"text": "one two"},
        "reference": {"text": "(softly)two"} | reference,
        "continuation": {"text": "two one"} | prompt,
        "reference + continuation": {"text": "four"} | prompt | reference,
    }
