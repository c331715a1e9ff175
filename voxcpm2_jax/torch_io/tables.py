"""The tables of torch tensor <-> parameter: names, shapes and transforms for backbone and codec.

A `Row` says where one torch tensor is stored here: its dims are split (heads), permuted (kernels have their input dims
first), and, in a transformer stack, placed at one index of the stacked layer axis. A stacked parameter has
one row per layer. The config decides which rows there are; files.py reads and writes by them.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig

BOUNDARIES = "decoder.sr_bin_boundaries"  # int32; the only tensor that is no parameter


class Row(NamedTuple):
    """One torch tensor: parameter[layer] = tensor.reshape(split).transpose(order); without [layer] if layer is None."""

    name: str  # of the torch tensor
    path: str | None  # of the parameter; None: not a parameter, its values are in the config
    torch_shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter, without the layer axis."""
        return tuple(self.split[i] for i in self.order)

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(self.split).transpose(self.order)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(np.argsort(self.order)).reshape(self.torch_shape)


def backbone_table(config: ModelConfig) -> list[Row]:
    """The rows of `model.safetensors`: 577 tensors for the released model."""
    rows = []

    def add(name, path, split, order=None, *, torch_shape=None, layer=None):
        order = order or tuple(range(len(split)))
        rows.append(Row(name, path, torch_shape or split, split, order, layer))

    def linear(name, path, num_in, num_out, *, bias=True):
        add(f"{name}.weight", f"{path}/kernel", (num_out, num_in), (1, 0))
        if bias:
            add(f"{name}.bias", f"{path}/bias", (num_out,))

    for name, path, stack in (
        ("base_lm", "base_lm", config.tslm),
        ("residual_lm", "residual_lm", config.ralm),
        ("feat_encoder.encoder", "feat_encoder", config.locenc),
        ("feat_decoder.estimator.decoder", "feat_decoder", config.locdit),
    ):
        D, F, N, K, H = stack.width, stack.mlp_width, stack.num_heads, stack.num_kv_heads, stack.head_dim
        for i in range(stack.num_layers):
            block, layers = f"{name}.layers.{i}", f"{path}/layers"
            for which, heads in (("q", N), ("k", K), ("v", K)):
                add(f"{block}.self_attn.{which}_proj.weight", f"{layers}/{which}/kernel", (heads, H, D), (2, 0, 1),
                    torch_shape=(heads * H, D), layer=i)  # fmt: skip
            add(f"{block}.self_attn.o_proj.weight", f"{layers}/o/kernel", (D, N, H), (1, 2, 0), torch_shape=(D, N * H), layer=i)
            add(f"{block}.mlp.gate_proj.weight", f"{layers}/gate/kernel", (F, D), (1, 0), layer=i)
            add(f"{block}.mlp.up_proj.weight", f"{layers}/up/kernel", (F, D), (1, 0), layer=i)
            add(f"{block}.mlp.down_proj.weight", f"{layers}/down/kernel", (D, F), (1, 0), layer=i)
            add(f"{block}.input_layernorm.weight", f"{layers}/attn_norm/scale", (D,), layer=i)
            add(f"{block}.post_attention_layernorm.weight", f"{layers}/mlp_norm/scale", (D,), layer=i)
        add(f"{name}.norm.weight", f"{path}/norm/scale", (D,))

    C, Q = config.feat_dim, config.scalar_quantization_latent_dim
    lm, encoder, dit = config.tslm.width, config.locenc.width, config.locdit.width
    add("base_lm.embed_tokens.weight", "base_lm/embed/embedding", (config.lm_config.vocab_size, lm))
    add("feat_encoder.special_token", "feat_encoder/special_token", (encoder,), torch_shape=(1, 1, 1, encoder))
    linear("feat_encoder.in_proj", "feat_encoder/in_proj", C, encoder)
    linear("feat_decoder.estimator.in_proj", "feat_decoder/in_proj", C, dit)
    linear("feat_decoder.estimator.cond_proj", "feat_decoder/cond_proj", C, dit)
    linear("feat_decoder.estimator.out_proj", "feat_decoder/out_proj", dit, C)
    for mlp in ("time_mlp", "delta_time_mlp"):
        for half in ("linear_1", "linear_2"):
            linear(f"feat_decoder.estimator.{mlp}.{half}", f"feat_decoder/{mlp}/{half}", dit, dit)
    for name, num_in, num_out in (
        ("fsq_layer/in_proj", lm, Q),
        ("fsq_layer/out_proj", Q, lm),
        ("enc_to_lm_proj", encoder, lm),
        ("lm_to_dit_proj", lm, dit),
        ("res_to_dit_proj", lm, dit),
        ("fusion_concat_proj", 2 * lm, lm),
        ("stop_proj", lm, lm),
    ):
        linear(name.replace("/", "."), name, num_in, num_out)
    linear("stop_head", "stop_head", lm, 2, bias=False)
    return rows


def vae_table(config: AudioVAEConfig) -> list[Row]:
    """The rows of `audiovae.safetensors`: 312 tensors for the released codec."""
    rows = []

    def vector(name, path, size, torch_shape):
        rows.append(Row(name, path, torch_shape, (size,), (0,)))

    def snake(name, path, channels):
        vector(f"{name}.alpha", f"{path}/alpha", channels, (1, channels, 1))

    def conv(name, path, num_in, num_out, width, groups=1, *, is_transposed=False):
        # torch: [out, in / groups, width], transposed convolutions [in, out, width]; here [width, in, out]. A gain has the
        # size of torch's dim 0.
        shape = (num_in, num_out, width) if is_transposed else (num_out, num_in // groups, width)
        rows.append(Row(f"{name}.weight_v", f"{path}/kernel", shape, shape, (2, 0, 1) if is_transposed else (2, 1, 0)))
        vector(f"{name}.weight_g", f"{path}/gain", shape[0], (shape[0], 1, 1))
        vector(f"{name}.bias", f"{path}/bias", num_out, (num_out,))

    def units(name, path, channels, first):
        groups = channels if config.depthwise else 1
        for i in range(3):
            unit, ours = f"{name}.{first + i}.block", f"{path}/unit_{i}"
            snake(f"{unit}.0", f"{ours}/snake_in", channels)
            conv(f"{unit}.1", f"{ours}/conv_in", channels, channels, 7, groups)
            snake(f"{unit}.2", f"{ours}/snake_out", channels)
            conv(f"{unit}.3", f"{ours}/conv_out", channels, channels, 1)

    encoder, C, decoder = config.encoder_dim, config.latent_dim, config.decoder_dim  # channels
    conv("encoder.block.0", "encoder/conv_in", 1, encoder, 7)
    for i, stride in enumerate(config.encoder_rates):
        name, path, channels = f"encoder.block.{i + 1}.block", f"encoder/block_{i}", encoder * 2**i
        units(name, path, channels, 0)
        snake(f"{name}.3", f"{path}/snake", channels)
        conv(f"{name}.4", f"{path}/down", channels, 2 * channels, 2 * stride)
    for which in ("mu", "logvar"):
        conv(f"encoder.fc_{which}", f"encoder/{which}", encoder * 2 ** len(config.encoder_rates), C, 3)
    if config.depthwise:
        conv("decoder.model.0", "decoder/conv_in", C, C, 7, C)
        conv("decoder.model.1", "decoder/proj", C, decoder, 1)
    else:
        conv("decoder.model.0", "decoder/conv_in", C, decoder, 7)
    first = 2 if config.depthwise else 1
    for i, stride in enumerate(config.decoder_rates):
        name, path, num_in, num_out = (
            f"decoder.model.{first + i}.block",
            f"decoder/block_{i}",
            decoder // 2**i,
            decoder // 2 ** (i + 1),
        )
        if config.sr_bin_boundaries is not None:
            shape = (len(config.sr_bin_boundaries) + 1, num_in)
            for which in ("scale", "bias"):
                rows.append(
                    Row(f"decoder.sr_cond_model.{first + i}.{which}_embed.weight", f"{path}/rate/{which}", shape, shape, (0, 1))
                )
        snake(f"{name}.0", f"{path}/snake", num_in)
        conv(f"{name}.1", f"{path}/up", num_in, num_out, 2 * stride, is_transposed=True)
        units(name, path, num_out, 2)
    last = first + len(config.decoder_rates)
    snake(f"decoder.model.{last}", "decoder/snake", decoder // 2 ** len(config.decoder_rates))
    conv(f"decoder.model.{last + 1}", "decoder/conv_out", decoder // 2 ** len(config.decoder_rates), 1, 7)
    if config.sr_bin_boundaries is not None:
        size = (len(config.sr_bin_boundaries),)
        rows.append(Row(BOUNDARIES, None, size, size, (0,)))
    return rows


def by_path(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each parameter, by its path, layers in order."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row.path is not None:
            grouped.setdefault(row.path, []).append(row)
    return grouped


def param_shapes(groups: Mapping[str, list[Row]]) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter, with the layer axis if it is stacked."""
    return {path: group[0].shape if group[0].layer is None else (len(group), *group[0].shape) for path, group in groups.items()}
