"""What scripts written for the PyTorch package pass when they load a model, and what becomes of it here.

the directory                            loaded; a name on the Hugging Face hub is found through `huggingface_hub`
device                                   taken: None, "auto", "cpu", "cuda", "gpu", "tpu", with ":N" for one of several
optimize, denoiser and its model's name  ignored, with a line in the log
LoRA                                     refused: there is none in this package yet
"""

import logging
import os
import pathlib

import jax

from voxcpm2_jax.buckets.store import is_url
from voxcpm2_jax.checkpoint.staged import local_checkpoint
from voxcpm2_jax.config.plain import UserError

_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}  # name in a script -> name in JAX

_log = logging.getLogger(__name__)


def local_directory(name, cache_dir=None, *, local_files_only: bool = False) -> pathlib.Path:
    """The directory of a model.

    Args:
        name: a directory, here or in a bucket, or "OWNER/NAME" on the Hugging Face hub.
        cache_dir, local_files_only: of the hub's client: where it keeps what it downloads, and whether it may download.
    Raises:
        UserError: there is no such directory, and the hub's client is not installed or has no such model.
    """
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise UserError(f"expected the directory of a model as a string or path, got {name!r}")
    if is_url(name):
        return pathlib.Path(local_checkpoint(name))
    path = pathlib.Path(name)
    is_on_hub = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if path.exists() or not is_on_hub:
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: no such directory; to download it from the Hugging Face hub, pip install huggingface_hub"
        ) from None
    try:
        return pathlib.Path(snapshot_download(name, cache_dir=cache_dir, local_files_only=local_files_only))
    except Exception as error:  # of the hub, of HTTP, of the network, of the disk
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: no such directory, and not loaded from the Hugging Face hub: {type(error).__name__}: {first_line}"
        ) from None


def find_device(name) -> jax.Device | None:
    """The device that a script names; None where JAX chooses.

    Raises:
        UserError: not a name of a device, or there is no such device.
    """
    if name is None or name == "auto":
        return None
    platform, _, number = str(name).partition(":")
    if platform not in _PLATFORMS or not (number or "0").isdecimal():
        raise UserError(f"device={name!r}: expected None, 'auto', or one of {', '.join(_PLATFORMS)}, with ':1' for the second")
    try:
        devices = jax.devices(_PLATFORMS[platform])
    except RuntimeError:
        raise UserError(f"device={name!r}: JAX finds none here, only {jax.devices()[0].platform}") from None
    if int(number or 0) >= len(devices):
        raise UserError(f"device={name!r}: there are {len(devices)}, counted from 0")
    return devices[int(number or 0)]


def check(*, lora_config, lora_weights_path, **without_meaning) -> None:
    """Refuses LoRA; says once which of the other arguments have no meaning here. None, like False, asks for nothing.

    Raises:
        UserError: a LoRA is given.
    """
    for name, value in (("lora_config", lora_config), ("lora_weights_path", lora_weights_path)):
        if value is not None:
            raise no_lora(name)
    if ignored := ", ".join(f"{name}={value!r}" for name, value in without_meaning.items() if value):
        _log.warning("ignored, since programs are always compiled and there is no denoiser: %s", ignored)


def no_lora(what: str) -> UserError:
    return UserError(f"{what}: this package has no LoRA yet; merge it into the weights, and load the directory of these")
