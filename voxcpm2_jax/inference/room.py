"""Whether the recordings of a request fit into the model's slots, told from their headers before anything is encoded."""

import math
import os
from collections.abc import Iterable

from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.request import Request
from voxcpm2_jax.config.text import written


def check(config: ModelConfig, vae_config: AudioVAEConfig, request: Request, num_text_ids: int) -> float:
    """The seconds that a recording of the request may have.

    A recording takes one slot for each patch of its audio, beside the text, the marks around the reference clip and, at least,
    one patch of speech.

    Args:
        num_text_ids: of the text, with the prompt's text.
    Raises:
        UserError: a recording is too long, missing or unreadable.
    """
    patch_sec = config.patch_size * vae_config.encoder_hop / vae_config.sample_rate
    marks = 1 + 2 * (request.reference_wav_path is not None)
    free = config.max_length - num_text_ids - marks - 1
    patches = {path: _patches(path, patch_sec) for path in _recordings(request)}
    if patches and sum(patches.values()) > free:
        longest = max(patches, key=patches.get)
        fits = max(0, free - sum(patches.values()) + patches[longest]) * patch_sec
        beside = "with this text and the other recording" if len(patches) > 1 else "with this text"
        raise UserError(
            f"{longest}: {patches[longest] * patch_sec:.1f} s are too long; {beside}, at most {fits:.1f} s fit into the "
            f"model's {config.max_length} slots (max_length)"
        )
    return max(0, free) * patch_sec


def check_all(checkpoint: str | os.PathLike, requests: Iterable[Request]) -> None:
    """`check` of all requests that have recordings, from a checkpoint's configuration and tokenizer alone."""
    from voxcpm2_jax import workdir
    from voxcpm2_jax.data.tokenizer import load_tokenizer

    requests = [request for request in requests if _recordings(request)]
    if not requests:
        return
    config, vae_config, tokenizer_dir = workdir.open_configs(checkpoint)
    tokenizer = load_tokenizer(tokenizer_dir)
    for request in requests:
        _, text = written(tokenizer.rule, request.text, request.prompt_text)
        check(config, vae_config, request, len(tokenizer.encode(text)))


def _recordings(request: Request) -> list[str | os.PathLike]:
    return [path for path in (request.reference_wav_path, request.prompt_wav_path) if path is not None]


def _patches(path: str | os.PathLike, patch_sec: float) -> int:
    """0 where the header does not tell; such a recording is refused while it is decoded."""
    from voxcpm2_jax.data import audio

    sec = audio.properties(path).sec
    return 0 if sec is None else math.ceil(sec / patch_sec)
