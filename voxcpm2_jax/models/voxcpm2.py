"""The whole backbone: from text and patches to hidden states, the next patch and the stop decision.

Parts: TSLM, the text-semantic language model; RALM, the residual acoustic language model; FSQ, finite scalar quantisation;
LocEnc and LocDiT, the local encoder and diffusion transformer within one patch (local.py).

    patch -> LocEnc -> enc_to_lm -> e            text -> embedding
    slots (text | e) -> TSLM -> h -> FSQ at audio slots -> h'
    fusion([h' ; e at audio slots]) -> RALM -> r
    slot i is drawn from h'[i-1], r[i-1] and patch[i-1]:  LocDiT -> patch i,  stop head(h'[i-1]) -> continue or stop

Batches are packed: LocEnc runs on the M patches of a row, LocDiT and the stop head on the patches that may bear loss; the
local stacks compute nothing for text or padding. The inputs before a segment's first slot are zeros.

Source: VoxCPM2 report. Differs from the PyTorch package: a row holds several clips, and attention stays within each clip.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from voxcpm2_jax.config.model import ModelConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.models import chunks, flow
from voxcpm2_jax.models.attention import causal_mask, find_segments
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.local import LocDiT, LocEnc
from voxcpm2_jax.models.product import Weight
from voxcpm2_jax.models.transformer import KV, Linear, run_layers, unstack
from voxcpm2_jax.sequence import Batch
from voxcpm2_jax.sharding import constrain


class Embedding(nn.Module):
    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, tokens_BT, dtype):
        table_VD = self.param("embedding", nn.initializers.normal(1.0), (self.vocab_size, self.width))
        # Each device looks up its own columns for all rows of its replica; then an all-to-all exchanges columns for rows.
        # Without these constraints XLA sums gradients of the whole table over all devices: 600 MB for the release, float32.
        x_BTD = table_VD[constrain(tokens_BT, "replica", None)].astype(dtype)
        return constrain(constrain(x_BTD, "replica", None, "embed"), "batch", None, None)


class TextSemanticLM(nn.Module):
    config: ModelConfig
    compute: Compute = Compute()

    def setup(self):
        self.embed_table = Embedding(self.config.lm_config.vocab_size, self.config.tslm.width, name="embed")

    def embed(self, tokens_BT):
        dtype = jnp.dtype(self.config.dtype)
        return self.embed_table(tokens_BT, dtype) * jnp.asarray(self.config.embed_scale, dtype)

    @nn.compact
    def __call__(self, x_BTD, position_BT, sees, cache=None, start_B=None):
        return run_layers(self.config.tslm, self.compute, x_BTD, position_BT, sees, cache, start_B)


class ResidualAcousticLM(nn.Module):
    config: ModelConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x_BTD, position_BT, sees, cache=None, start_B=None):
        return run_layers(self.config.ralm, self.compute, x_BTD, position_BT, sees, cache, start_B)


class FSQ(nn.Module):
    """Finite scalar quantisation to the levels -1, .. -1/s, 0, 1/s .. 1 (s = scale), with a straight-through gradient."""

    latent_dim: int
    scale: int
    width: int

    @nn.compact
    def __call__(self, x_BTD):
        z_BTQ = jnp.tanh(Linear((self.latent_dim,), name="in_proj")(x_BTD).astype(jnp.float32))
        number_BTQ = jnp.round(z_BTQ * self.scale)
        self.sow("figures", "level", jax.lax.stop_gradient(number_BTQ).astype(jnp.int32))
        levels_BTQ = number_BTQ / self.scale
        levels_BTQ = z_BTQ + jax.lax.stop_gradient(levels_BTQ - z_BTQ)
        return Linear((self.width,), name="out_proj")(levels_BTQ.astype(x_BTD.dtype))


class Hidden(NamedTuple):
    """Outputs of the two language models at every slot."""

    semantic_BTD: jax.Array  # h', after the quantiser
    acoustic_BTD: jax.Array  # r
    cache: "Cache | None"


class Cache(NamedTuple):
    """Keys and values of both language models, one KV per layer."""

    base_lm: tuple[KV, ...]
    residual_lm: tuple[KV, ...]


class VoxCPM2(nn.Module):
    """The backbone; every method is a pure function of its parameters."""

    config: ModelConfig
    compute: Compute = Compute()

    def setup(self):
        c = self.config
        width, local = c.tslm.width, c.locdit.width
        self.base_lm = TextSemanticLM(c, self.compute)
        self.residual_lm = ResidualAcousticLM(c, self.compute)
        self.feat_encoder = LocEnc(c.locenc, self.compute.of_locenc)
        self.feat_decoder = LocDiT(c.locdit, self.compute.of_locdit)
        self.fsq_layer = FSQ(c.scalar_quantization_latent_dim, c.scalar_quantization_scale, width)
        self.enc_to_lm_proj = Linear((width,))
        self.lm_to_dit_proj = Linear((local,))
        self.res_to_dit_proj = Linear((local,))
        self.fusion_concat_proj = Linear((width,))
        self.stop_proj = Linear((width,))
        self.stop_head = Linear((2,), use_bias=False)

    def encode_patches(self, patches_RPC):
        """e_RD: the input of the language models for each patch."""
        with jax.named_scope("locenc"):
            return self.enc_to_lm_proj(self.feat_encoder(patches_RPC.astype(jnp.dtype(self.config.dtype))))

    def read(self, embed_BTD, patch_embed_BTD, is_audio_BT, position_BT, sees, cache=None, start_B=None) -> Hidden:
        """Runs both language models. The input is `patch_embed_BTD` at audio slots (`is_audio_BT`), else `embed_BTD`.

        Args:
            embed_BTD: embedded text ids.   sees: as in `attention`.
            cache, start_B: see `run_layers`.
        """
        is_audio_BT1 = is_audio_BT[..., None]
        e_BTD = jnp.where(is_audio_BT1, patch_embed_BTD, jnp.zeros_like(patch_embed_BTD))
        x_BTD = constrain(jnp.where(is_audio_BT1, e_BTD, embed_BTD), "batch", None, None)
        with jax.named_scope("tslm"):
            h_BTD, base = self.base_lm(x_BTD, position_BT, sees, cache and cache.base_lm, start_B)
        with jax.named_scope("fsq"):
            h_BTD = jnp.where(is_audio_BT1, self.fsq_layer(h_BTD), h_BTD)
        with jax.named_scope("ralm"):
            x_BTD = self.fusion_concat_proj(jnp.concatenate([h_BTD, e_BTD], axis=-1))
            r_BTD, residual = self.residual_lm(x_BTD, position_BT, sees, cache and cache.residual_lm, start_B)
        return Hidden(h_BTD, r_BTD, cache and Cache(base, residual))

    def read_batch(self, batch: Batch, cache: Cache | None = None) -> Hidden:
        """Both language models over a packed batch; with a cache, from its first slot on (one segment a row)."""
        B, M, P, C = batch.patches_BMPC.shape
        e_BMD = self.encode_patches(batch.patches_BMPC.reshape(B * M, P, C)).reshape(B, M, -1)
        patch_at_BT = patch_index(batch)
        e_BTD = take(e_BMD, patch_at_BT)
        embed_BTD = self.base_lm.embed(batch.tokens_BT)
        start_B = None
        if cache is None:
            sees = find_segments(batch.segment_BT, self.compute.max_segments, self.compute.clip_slots)
            # Some kernels would silently ignore what exceeds the limits; NaN makes the loss of such a row invalid instead.
            embed_BTD = jnp.where(sees.is_overfull_B[:, None, None], jnp.asarray(jnp.nan, embed_BTD.dtype), embed_BTD)
        else:
            start_B = jnp.zeros(B, jnp.int32)
            sees = causal_mask(batch.segment_BT)
            unseen = cache.base_lm[0].k_BSKH.shape[1] - sees.shape[2]
            sees = jnp.pad(sees, ((0, 0), (0, 0), (0, unseen)))
        return self.read(embed_BTD, e_BTD, patch_at_BT >= 0, batch.position_BT, sees, cache, start_B)

    def prefixes(self, semantic_RD, acoustic_RD):
        """prefix_R2D: the two conditioning tokens of LocDiT."""
        return jnp.stack([self.lm_to_dit_proj(semantic_RD), self.res_to_dit_proj(acoustic_RD)], axis=1)

    def velocity(self, x_RPC, prefix_R2D, cond_RPC, t_R, dt_R):
        with jax.named_scope("locdit"):
            return self.feat_decoder(x_RPC, prefix_R2D, cond_RPC, t_R, dt_R)

    def stop_logits(self, semantic_RD):
        """[R, 2] float32: continue, stop."""
        return self.stop_head(nn.silu(self.stop_proj(semantic_RD))).astype(jnp.float32)

    def everything(self, batch: Batch):
        """Uses every parameter once; only for `init`."""
        hidden = self.read_batch(batch)
        semantic_RD, acoustic_RD = hidden.semantic_BTD[:, 0], hidden.acoustic_BTD[:, 0]
        x_RPC, t_R = batch.patches_BMPC[:, 0], jnp.zeros(len(semantic_RD))
        self.velocity(x_RPC, self.prefixes(semantic_RD, acoustic_RD), x_RPC, t_R, t_R)
        self.stop_logits(semantic_RD)


# ---- packed batches ------------------------------------------------------------------------------------------------


def patch_index(batch: Batch) -> jax.Array:
    """[B, T]: the index of the patch in each slot, -1 for slots without a patch."""
    B, T = batch.tokens_BT.shape
    M = batch.slot_BM.shape[1]
    # A negative index would count from the end, so unused patches get slot T, which mode "drop" ignores.
    slot_BM = jnp.where(batch.slot_BM < 0, T, batch.slot_BM)
    rows = jnp.arange(B)[:, None]
    return jnp.full((B, T), -1, jnp.int32).at[rows, slot_BM].set(jnp.arange(M, dtype=jnp.int32)[None], mode="drop")


def take(x_BM: jax.Array, index_BT: jax.Array) -> jax.Array:
    """x[b, index[b, t]]; zeros where the index is negative."""
    shape = index_BT.shape + (1,) * (x_BM.ndim - 2)
    taken = jnp.take_along_axis(x_BM, jnp.maximum(index_BT, 0).reshape(shape), axis=1)
    return jnp.where((index_BT >= 0).reshape(shape), taken, jnp.zeros_like(taken))


def init(key: jax.Array, config: ModelConfig) -> dict:
    """Initial parameters, float32."""
    one = jnp.zeros((1, 1), jnp.int32)
    patches = jnp.zeros((1, 1, config.patch_size, config.feat_dim))
    batch = Batch(one, one + 1, one, patches, one, one, one)
    return VoxCPM2(config).init(key, batch, method="everything")["params"]


def unrolled_params(params: dict) -> dict:
    """Parameters of the unrolled form of `VoxCPM2`: layers side by side, q/k/v and gate/up fused."""
    stacks = ("base_lm", "residual_lm", "feat_encoder", "feat_decoder")
    return params | {name: unstack(params[name]) for name in stacks}


# ---- training ------------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """The random draws of a training step, one entry per patch."""

    time_BM: jax.Array
    noise_BMPC: jax.Array
    drop_BM: jax.Array  # drop both conditioning vectors
    start_BM: jax.Array | None = None  # mean mode: r <= t


def to_compute(params: dict, config: ModelConfig, products: str | None = None) -> dict:
    """The parameters for training: matrices are cast to the compute dtype, and their gradients are float32.

    They are cast once per step, so that FSDP gathers bf16, not f32, and no layer casts again. The embedding keeps its dtype:
    only the rows that are looked up are cast. LocDiT keeps it in mean mode: see `loss_terms`.

    Args:
        products: of the layers, where nearly all work is. In 8 bits their matrices are rounded here, and FSDP gathers 8 bits.
            Projections, FSQ, time embedding and heads stay: they are 0.4 % of the work, and the losses read them directly.
    """
    dtype = jnp.dtype(config.dtype)
    if dtype == jnp.float32 and products is None:
        return params

    def one(path, x):
        names = [key.key for key in path]
        if names[-1] != "kernel" or (config.dit_config.dit_mean_mode and names[0] == "feat_decoder"):
            return x
        if products is not None and "layers" in names:
            return Weight.in_8_bits(x, products, inputs=(1, 2) if names[-2] == "o" else (1,))  # o: heads, and what is in them
        return x if dtype == jnp.float32 else Weight.of(x, dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def loss_terms(
    params,
    config: ModelConfig,
    batch: Batch,
    draws: Draws,
    *,
    target_patches: int | None = None,
    compute: Compute = Compute(),
    with_figures: bool = False,
) -> dict:
    """Both losses of every patch that may bear loss, not yet summed; arguments as in `loss`.

    In mean mode LocDiT is computed in float32, which costs several times the time of bfloat16. The target of mean mode has
    the slope of the network along the flow, a hundred times as large as the velocity in a random network, because the
    time embedding turns by up to 1000 radians. In bfloat16 the slope is off by 2 %, which is more than the velocity.

    Args:
        with_figures: also return figures of the model's activations.
    Returns:
        "diff_sum": the flow loss of all target patches, summed; it alone has gradients if patches are computed in chunks.
        "diff_BMP" (mean over channels), "stop_BM" (cross-entropy), "stop_logits_BM2", "target_BM"; float32. With figures:
        "quantiser": "level_BTQ" (int32, -scale .. scale), "is_audio_BT" and "scale"; "maxima": "activation_max" (residual
        stream) and "logit_bound_max" (see `logit_bound`), each by stack; they include padding.
    """
    flow_config = config.dit_config.cfm_config
    if flow_config.noise_cond_scale and max(flow_config.noise_cond_prob_range):
        raise UserError("noise_cond_scale: noise on the previous patch is not supported in training; set it to 0")
    model = VoxCPM2(config, compute)
    params = to_compute(params, config, compute.products)
    batch = jax.tree.map(jnp.asarray, batch)
    M = batch.slot_BM.shape[1] if target_patches is None else target_patches
    P, C = config.patch_size, config.feat_dim

    def apply(params, *inputs, method):
        return model.apply({"params": params}, *inputs, method=method, mutable=["figures"] * with_figures)

    def rows(x_BM):
        return x_BM.reshape(-1, *x_BM.shape[2:])

    hidden, figures = apply(params, batch, method="read_batch")

    # Every target is drawn from the slot before its own; a segment's first slot has none.
    slot_BM = batch.slot_BM[:, :M]
    B = len(slot_BM)
    position_BM = jnp.take_along_axis(batch.position_BT, jnp.maximum(slot_BM, 0), axis=1)
    before_BM = jnp.where((slot_BM > 0) & (position_BM > 0), slot_BM - 1, -1)
    semantic_RD = take(hidden.semantic_BTD, before_BM).reshape(B * M, -1)
    acoustic_RD = take(hidden.acoustic_BTD, before_BM).reshape(B * M, -1)
    patch_before_BM = jnp.where(before_BM < 0, -1, jnp.take_along_axis(patch_index(batch), jnp.maximum(before_BM, 0), axis=1))
    cond_RPC = take(batch.patches_BMPC, patch_before_BM).reshape(B * M, P, C)

    prefix_R2D = model.apply({"params": params}, semantic_RD, acoustic_RD, method="prefixes")
    is_dropped_R11 = draws.drop_BM[:, :M].reshape(-1, 1, 1).astype(bool)
    prefix_R2D = jnp.where(is_dropped_R11, jnp.zeros_like(prefix_R2D), prefix_R2D)
    if config.dit_config.dit_mean_mode:
        prefix_R2D = prefix_R2D.astype(jnp.float32)  # LocDiT computes in the dtype of its prefix

    is_target_BM = batch.target_BM[:, :M].astype(bool) & (slot_BM >= 0)

    def flow_loss(params, prefix_R2D, data):
        cond_RPC, is_target_R, *of_flow = data

        def velocity(x_RPC, t_R, dt_R):
            return apply(params, x_RPC, prefix_R2D, cond_RPC, t_R, dt_R, method="velocity")

        diff_RP, figures = flow.loss(velocity, *of_flow, has_aux=True)
        return _weighted_sum(diff_RP, is_target_R), (diff_RP, figures)

    of_flow = (batch.patches_BMPC, draws.noise_BMPC, draws.time_BM, draws.start_BM)
    data = jax.tree.map(lambda x_BM: rows(x_BM[:, :M]).astype(jnp.float32), (is_target_BM, *of_flow))
    if compute.locdit_at_once and chunks.can_split(B * M):
        used = {"feat_decoder": params["feat_decoder"]}
        diff_sum, (diff_RP, of_decoder) = chunks.sum_patches(
            flow_loss, used, prefix_R2D, (cond_RPC, *data), compute.locdit_at_once
        )
    else:
        _, (diff_RP, of_decoder) = flow_loss(params, prefix_R2D, (cond_RPC, *data))
        diff_sum = _weighted_sum(diff_RP.reshape(B, M, P), is_target_BM)
    logits_R2 = model.apply({"params": params}, semantic_RD, method="stop_logits")
    label_R2 = jax.nn.one_hot(batch.stop_BM[:, :M].reshape(-1), 2)
    stop_R = -jnp.sum(jax.nn.log_softmax(logits_R2) * label_R2, axis=-1)
    terms = {
        "diff_BMP": diff_RP.reshape(B, M, P),
        "stop_BM": stop_R.reshape(B, M),
        "stop_logits_BM2": logits_R2.reshape(B, M, 2),
        "target_BM": is_target_BM,
        "diff_sum": diff_sum,
    }
    if with_figures:
        stacks = figures["figures"] | of_decoder["figures"]
        (level_BTQ,) = stacks.pop("fsq_layer")["level"]
        scale = config.scalar_quantization_scale
        terms["quantiser"] = {"level_BTQ": level_BTQ, "is_audio_BT": patch_index(batch) >= 0, "scale": scale}
        terms["maxima"] = _maxima(stacks)
    return terms


def _weighted_sum(diff_XP, weight_X) -> jax.Array:
    return jnp.sum(jnp.sum(diff_XP, axis=-1) * weight_X.astype(jnp.float32))


def _maxima(stacks: dict) -> dict[str, dict[str, jax.Array]]:
    """The maximum over all layers and rows: figure -> stack -> scalar."""
    found: dict = {}
    for stack, figures in stacks.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(figures):
            of_stacks = found.setdefault(path[-2].key, {})  # the last key is the index in the tuple that `sow` makes
            of_stacks[stack] = jnp.maximum(of_stacks.get(stack, 0.0), jnp.max(leaf))
    return found


def patch_figures(terms: dict, stop_BM) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The results of `loss_terms` per patch, as pairs (sum_BM, count_BM) that can be added up over any set of patches.

    Args:
        stop_BM: stop labels of the batch.
    Returns:
        "loss_diff", counted in frames; "loss_stop", counted in patches; "stop_precision" and "stop_recall": correct stops as
        a share of predicted stops, and of true stops.
    """
    M, P = terms["diff_BMP"].shape[1:]
    is_target_BM = terms["target_BM"]
    is_predicted_BM = is_target_BM & (jnp.argmax(terms["stop_logits_BM2"], axis=-1) == 1)
    is_end_BM = is_target_BM & (jnp.asarray(stop_BM)[:, :M] == 1)
    weight_BM, predicted_BM, end_BM, hit_BM = (
        x_BM.astype(jnp.float32) for x_BM in (is_target_BM, is_predicted_BM, is_end_BM, is_predicted_BM & is_end_BM)
    )
    return {
        "loss_diff": (jnp.sum(terms["diff_BMP"], axis=-1) * weight_BM, weight_BM * P),
        "loss_stop": (terms["stop_BM"] * weight_BM, weight_BM),
        "stop_precision": (hit_BM, predicted_BM),
        "stop_recall": (hit_BM, end_BM),
    }


def loss(
    params,
    config: ModelConfig,
    batch: Batch,
    *,
    time_BM,
    noise_BMPC,
    drop_BM,
    start_BM=None,
    target_patches: int | None = None,
    compute: Compute = Compute(),
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The two training losses of a packed batch as (sum, count), not yet divided.

    Args:
        time_BM: flow time of each patch.   noise_BMPC: standard normal.   drop_BM: patches whose two conditioning
            vectors are dropped; the previous-patch condition stays.   start_BM: r of mean mode.
        target_patches: only the first that many patches of a row may bear loss; LocDiT runs on them alone. Static.
        compute: remat, kernels, most clips in a row; see `Compute`. Static.
    Returns:
        "diff": squared velocity error, mean over channels, summed over target frames; count in frames.
        "stop": cross-entropy summed over target patches; count in patches.
    """
    draws = Draws(time_BM, noise_BMPC, drop_BM, start_BM)
    terms = loss_terms(params, config, batch, draws, target_patches=target_patches, compute=compute)
    of_patches = patch_figures(terms, batch.stop_BM)
    sums = {name: tuple(jnp.sum(x_BM) for x_BM in of_patches[f"loss_{name}"]) for name in ("diff", "stop")}
    return sums | {"diff": (terms["diff_sum"], sums["diff"][1])}
