"""Generation against the live PyTorch package: latents and waveforms in four modes, with the same noise, float32."""

import dataclasses

import numpy as np
import pytest
import soundfile
import torch

from tests.reference.compare import close, sampler_noise
from voxcpm2_jax import VoxCPM
from voxcpm2_jax.data.tokenizer import load_tokenizer

TEXT = "two three (four), 你好 five"
PROMPT_TEXT = " one "
NUM_PATCHES = 9
CLEARANCE = 1e-4  # smallest accepted distance of a quantiser input from a rounding tie, in levels


def model_of(loaded):
    tokenizer = load_tokenizer(loaded.tokenizer_dir)
    return VoxCPM.from_parts(loaded.config, loaded.params, loaded.vae_config, loaded.vae_params, tokenizer)


@pytest.fixture(scope="module")
def ours(pair):
    return model_of(pair.loaded)


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """Two recordings at different rates, one of them stereo, neither a whole number of patches."""
    directory = tmp_path_factory.mktemp("voices")
    rng = np.random.default_rng(0)
    paths = {}
    for name, rate, channels, samples in (("reference", 22050, 2, 301), ("prompt", 16000, 1, 91)):
        t = np.arange(samples) / rate
        wave = 0.3 * np.sin(2 * np.pi * 700 * t) + 0.1 * rng.normal(size=samples)
        paths[name] = str(directory / f"{name}.wav")
        soundfile.write(paths[name], np.stack([wave] * channels, axis=1), rate, subtype="FLOAT")
    return paths


MODES = {
    "zero-shot": {},
    "reference": {"reference_wav_path": "reference"},
    "continuation": {"prompt_wav_path": "prompt", "prompt_text": PROMPT_TEXT},
    "reference and continuation": {"reference_wav_path": "reference", "prompt_wav_path": "prompt", "prompt_text": PROMPT_TEXT},
}


def mode_arguments(mode, voices):
    return {k: voices.get(v, v) for k, v in MODES[mode].items()}


def their_generation(model, arguments, noise, **settings):
    """Waveform, latents, and the smallest distance of a quantiser input from a rounding tie, over the audio slots."""
    clearance = [0.5]
    audio_masks = []  # of the prefill; every later call of the quantiser sees one patch
    seen = []
    infer, decode = model._inference, model.audio_vae.decode

    def watch(layer, args, output):
        z = torch.tanh(output) * model.fsq_layer.scale
        z = z[audio_masks.pop().bool()] if audio_masks else z
        clearance.extend((z - z.floor() - 0.5).abs().flatten().tolist())

    handle = model.fsq_layer.in_proj.register_forward_hook(watch)
    model._inference = lambda *args, **kwargs: (audio_masks.append(args[3]), infer(*args, **kwargs))[1]
    model.audio_vae.decode = lambda z, *args, **kwargs: (seen.append(z), decode(z, *args, **kwargs))[1]
    try:
        with sampler_noise(noise):
            wav = model.generate(TEXT, max_len=NUM_PATCHES, cfg_value=2.0, **arguments, **settings)
    finally:
        handle.remove()
        del model.audio_vae.decode, model._inference
    return wav[0].numpy(), seen[0], min(clearance)


def clear_noise(pair, arguments, **settings):
    """The noise of the first seed that keeps quantiser inputs away from ties -> noise, its waveform, its latents."""
    c = pair.loaded.config
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=(NUM_PATCHES, c.patch_size, c.feat_dim)).astype(np.float32)
        wav, latents, clearance = their_generation(pair.torch_model, arguments, noise, **settings)
        if clearance > CLEARANCE:
            return noise, wav, latents
    raise AssertionError("no seed keeps the quantiser away from ties")


@pytest.mark.parametrize("mode", list(MODES))
def test_waveform(pair, ours, voices, mode):
    arguments = mode_arguments(mode, voices)
    noise, wav, latents = clear_noise(pair, arguments)
    (speech,) = ours.speak([{"text": TEXT, "max_len": NUM_PATCHES, "noise": noise, **arguments}])
    theirs = latents[0].T.reshape(-1, *noise.shape[1:])[-len(speech.patches_MPC) :]
    close(speech.patches_MPC, theirs)
    close(speech.audio_A, wav)


def test_steps_and_guidance(pair, ours):
    noise, wav, _ = clear_noise(pair, {}, inference_timesteps=5)
    close(ours.generate(TEXT, max_len=NUM_PATCHES, noise=noise, inference_timesteps=5), wav)


def test_stop(pair, ours):
    """Where the stop head fires, both end at the same patch, for several min_len."""
    head = pair.torch_model.stop_head.weight
    before = head.detach().clone()
    noise, _, _ = clear_noise(pair, {})
    lengths = set()
    try:
        for sign in (1.0, -1.0):
            head.data = before.flip(0) if sign < 0 else before
            params = pair.loaded.params | {"stop_head": {"kernel": head.detach().numpy().T.copy()}}
            flipped = model_of(dataclasses.replace(pair.loaded, params=params))
            for min_len in (0, 2, 4):
                wav, _, _ = their_generation(pair.torch_model, {}, noise, min_len=min_len)
                got = flipped.generate(TEXT, max_len=NUM_PATCHES, min_len=min_len, noise=noise)
                close(got, wav)
                lengths.add(len(wav))
    finally:
        head.data = before
    assert len(lengths) > 1, "no generation was stopped by the stop head"
