"""Both worlds from one directory: the live `voxcpm` package and ours, in float32 on the CPU.

Fixtures (session-scoped; nothing is shared with our own writers, the directories are made by torch):

    released   one tiny released directory per shape: .name, .directory, .torch_model (VoxCPM2Model, eval, from_local)
    pair       the same with .loaded, what torch_io.load read from it (.config, .params, .vae_config, .vae_params)
    judge      the PyTorch package's tokenizer of any directory: judge(directory)(text) -> ids
    load_reference   VoxCPM2Model of any directory, as the PyTorch package loads it: load_reference(directory)

Shapes differ in heads, depths, patch, strides, muP, RALM positions, LongRoPE branch, codec file and conditioning:

    plain      P=2, RALM without positions, muP off, short RoPE factors, codec in audiovae.safetensors
    general    P=3, RALM with positions, muP on, long RoPE factors, codec in audiovae.pth under "state_dict"

Every parameter is random and away from its initial value (norms about 1 +- 0.2, biases 0.2, matrices 1 / sqrt(inputs)),
so a tensor that is swapped, dropped or transposed shows. No test here is skipped: without the PyTorch package they fail.
"""

# ruff: noqa: C408  (dict(...) reads like the config files it stands for)

import dataclasses
import importlib.machinery
import importlib.util
import json
import pathlib
import sys
import types

import pytest

if importlib.util.find_spec("torchaudio") is None:  # voxcpm imports it for parts that no test uses
    torchaudio = types.ModuleType("torchaudio")
    torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = torchaudio

from voxcpm2_jax.data.tokenizer import train_tokenizer
from voxcpm2_jax.torch_io.released import Loaded, load

TEXTS = (
    "one two three four five six seven eight nine ten",
    "un deux trois quatre cinq six sept huit neuf dix",
    "eins zwei drei vier fünf sechs sieben acht neun zehn",
    "uno dos tres cuatro cinco seis siete ocho nueve diez",
    "один два три четыре пять шесть семь восемь девять десять",
    "一二三四五六七八九十，你好世界。",
    "Hello, world! (softly) 0123456789",
)


def _factors(size, step):
    return [1.0 + step * i for i in range(size)]


SHAPES = {
    "plain": dict(
        lm_config=dict(
            bos_token_id=1, eos_token_id=2, hidden_size=32, intermediate_size=48, max_position_embeddings=128,
            num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0,
            kv_channels=8, vocab_size=420, use_mup=False, scale_emb=12.0, dim_model_base=256, scale_depth=1.4,
            rope_scaling=dict(type="longrope", long_factor=_factors(4, 0.5), short_factor=_factors(4, 0.25),
                              original_max_position_embeddings=128),
        ),
        patch_size=2, feat_dim=8, residual_lm_num_layers=1, residual_lm_no_rope=True,
        scalar_quantization_latent_dim=16, scalar_quantization_scale=9,
        encoder_config=dict(hidden_dim=24, ffn_dim=40, num_heads=2, num_layers=2, kv_channels=8),
        dit_config=dict(hidden_dim=24, ffn_dim=40, num_heads=2, num_layers=2, kv_channels=8,
                        cfm_config=dict(sigma_min=1e-6, solver="euler", t_scheduler="log-norm", inference_cfg_rate=2.0)),
        audio_vae_config=dict(encoder_dim=4, encoder_rates=[2, 3], latent_dim=8, decoder_dim=32, decoder_rates=[3, 2, 3],
                              sample_rate=16000, out_sample_rate=48000, sr_bin_boundaries=[20000, 30000, 40000]),
        max_length=128, device="cpu", dtype="float32",
    ),
    "general": dict(
        lm_config=dict(
            bos_token_id=1, eos_token_id=2, hidden_size=40, intermediate_size=56, max_position_embeddings=128,
            num_attention_heads=6, num_hidden_layers=3, num_key_value_heads=3, rms_norm_eps=1e-6, rope_theta=5000.0,
            kv_channels=12, vocab_size=450, use_mup=True, scale_emb=3.0, dim_model_base=256, scale_depth=1.4,
            rope_scaling=dict(type="longrope", long_factor=_factors(6, 0.4), short_factor=_factors(6, 0.2),
                              original_max_position_embeddings=64),
        ),
        patch_size=3, feat_dim=6, residual_lm_num_layers=2, residual_lm_no_rope=False,
        scalar_quantization_latent_dim=12, scalar_quantization_scale=5,
        encoder_config=dict(hidden_dim=28, ffn_dim=36, num_heads=3, num_layers=1, kv_channels=12),
        dit_config=dict(hidden_dim=36, ffn_dim=44, num_heads=6, num_layers=2, kv_channels=12,
                        cfm_config=dict(sigma_min=1e-6, solver="euler", t_scheduler="log-norm", training_cfg_rate=0.2)),
        audio_vae_config=dict(encoder_dim=6, encoder_rates=[3, 2, 4], latent_dim=6, decoder_dim=36, decoder_rates=[4, 3, 2],
                              sample_rate=16000, out_sample_rate=16000, sr_bin_boundaries=[20000]),
        max_length=128, device="cpu", dtype="float32",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    directory: pathlib.Path
    torch_model: object
    loaded: Loaded | None = None


@pytest.fixture(scope="session", autouse=True)
def _reference_is_installed():
    if importlib.util.find_spec("voxcpm") is None:
        pytest.fail("the PyTorch package is not installed: pip install --no-deps voxcpm==2.0.3")
    import torch

    torch.set_num_threads(1)  # tiny shapes: a second thread only waits for the first


def randomise(state, seed):
    """New values for every floating tensor of the PyTorch package's state dict, in place: torch, by name and shape."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(".alpha"):  # Snake
            value = torch.exp(0.4 * noise)
        elif name.endswith(".weight_g"):
            value = 0.5 * torch.exp(0.3 * noise)  # larger ones make the deep Snakes chaotic, as no trained codec is
        elif "norm.weight" in name or "scale_embed" in name:
            value = 1 + 0.2 * noise
        elif name.endswith(".bias") or "bias_embed" in name:
            value = 0.2 * noise
        elif "embed_tokens" in name or "special_token" in name:
            value = 0.7 * noise
        else:  # matrices and convolution directions
            value = noise / tensor[0].numel() ** 0.5
        tensor.copy_(value)


def build(directory, shape, *, seed=0, vae_file="audiovae.safetensors"):
    """Writes a released directory of random weights with torch's own writers; returns the torch names it holds."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaTokenizerFast
    from voxcpm.model.voxcpm2 import VoxCPM2Model, VoxCPMConfig
    from voxcpm.modules.audiovae import AudioVAEV2

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"architecture": "voxcpm2"} | shape, indent=1))
    train_tokenizer(TEXTS * 4, 400).save(directory)
    config = VoxCPMConfig.model_validate(shape)
    model = VoxCPM2Model(
        config, LlamaTokenizerFast.from_pretrained(directory), AudioVAEV2(config.audio_vae_config), device="cpu"
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randomise(state, seed)
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith("audio_vae.")}
    codec = {name.removeprefix("audio_vae."): tensor for name, tensor in state.items() if name.startswith("audio_vae.")}
    save_file(backbone, directory / "model.safetensors", metadata={"format": "pt"})
    if vae_file.endswith(".safetensors"):
        save_file(codec, directory / vae_file)
    else:
        torch.save({"state_dict": codec}, directory / vae_file)
    return sorted(backbone), sorted(codec)


def _from_local(directory):
    from voxcpm.model.voxcpm2 import VoxCPM2Model

    return VoxCPM2Model.from_local(str(directory), optimize=False, device="cpu")


@pytest.fixture(scope="session", params=list(SHAPES))
def released(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param) / "released"
    vae_file = {"plain": "audiovae.safetensors", "general": "audiovae.pth"}[request.param]
    build(directory, SHAPES[request.param], seed=len(request.param), vae_file=vae_file)
    return Pair(request.param, directory, _from_local(directory))


@pytest.fixture(scope="session")
def pair(released):
    return dataclasses.replace(released, loaded=load(released.directory))


@pytest.fixture(scope="session")
def load_reference():
    return _from_local


@pytest.fixture(scope="session")
def judge():
    from transformers import LlamaTokenizerFast
    from voxcpm.model.utils import mask_multichar_chinese_tokens

    return lambda directory: mask_multichar_chinese_tokens(LlamaTokenizerFast.from_pretrained(directory))


@pytest.fixture(autouse=True)
def _worst_error(request):
    """Hands the worst relative error of each test to the summary."""
    from tests.reference import compare

    compare.errors.clear()
    yield
    if compare.errors:
        request.node.user_properties.append(("relative error", max(compare.errors)))
