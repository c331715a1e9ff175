"""AudioVAE V2: a causal convolutional VAE whose encoder and decoder have sample rates of their own.

    audio [A] -> conv_in -> block_0 .. -> mu, logvar [T, C]          A = T x encoder_hop
    latents [T, C] -> conv_in (-> proj) -> block_0 .. -> snake -> conv_out -> tanh -> audio [T x decoder_hop]

    encoder block    three residual units, Snake, strided convolution that doubles the channels
    decoder block    target-rate scale and bias, Snake, transposed convolution that halves the channels, three residual units

Everything is float32 and causal: latent frame t depends on no sample after (t + 1) encoder_hop, and streaming equals offline,
both ways. `target_hz` is the sample rate that the audio is wanted for. Its bucket, the interval between two of the config's
`sr_bin_boundaries`, selects a learned scale and bias per channel; the output always has the decoder's own rate.

Parameter paths here, and names in the released state dict. There, a convolution's kernel, gain and bias are weight_v, weight_g
and bias; here, kernels are transposed to [window, in, out]. d is 1 if depthwise else 0, n the number of decoder blocks.

    encoder/conv_in                     encoder.block.0
    encoder/block_i/unit_j/snake_in     encoder.block.{i+1}.block.{j}.block.0      alpha [E] <- alpha [1, E, 1]
    encoder/block_i/unit_j/conv_in      encoder.block.{i+1}.block.{j}.block.1
    encoder/block_i/unit_j/snake_out    encoder.block.{i+1}.block.{j}.block.2
    encoder/block_i/unit_j/conv_out     encoder.block.{i+1}.block.{j}.block.3
    encoder/block_i/snake               encoder.block.{i+1}.block.3
    encoder/block_i/down                encoder.block.{i+1}.block.4
    encoder/mu, encoder/logvar          encoder.fc_mu, encoder.fc_logvar
    decoder/conv_in                     decoder.model.0
    decoder/proj (depthwise only)       decoder.model.1
    decoder/block_i/rate/{scale,bias}   decoder.sr_cond_model.{i+1+d}.{scale,bias}_embed.weight (if boundaries)
    decoder/block_i/snake               decoder.model.{i+1+d}.block.0
    decoder/block_i/up                  decoder.model.{i+1+d}.block.1             kernel [2s, in, out], gain [in]
    decoder/block_i/unit_j/...          decoder.model.{i+1+d}.block.{j+2}.block.{0,1,2,3}
    decoder/snake, decoder/conv_out     decoder.model.{n+1+d}, decoder.model.{n+2+d}
    (no parameter: the configuration)   decoder.sr_bin_boundaries

Source: VoxCPM2 report, section on AudioVAE V2; the layers are those of descript-audio-codec, made causal.
Differs from the PyTorch package: the initial weights, chosen so that small models start to learn at once. Kernels are scaled
by fan-in; the first gain brings speech to a magnitude of about 1; residual branches and the noise of the latents start small.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.vae.conv import Conv, DownConv, Snake, UpConv

_WINDOW = 7  # of every convolution that is neither pointwise nor strided, except those of mu and logvar
_LATENT_WINDOW = 3
_DILATIONS = (1, 3, 9)  # of a block's three residual units


class ResidualUnit(nn.Module):
    """x + pointwise(snake(causal window 7(snake(x))))."""

    dilation: int
    is_depthwise: bool

    @nn.compact
    def __call__(self, x_BAE, left_BAE=None):
        E = x_BAE.shape[-1]
        h_BAE = Snake(name="snake_in")(x_BAE)
        h_BAE, left_BAE = Conv(E, _WINDOW, self.dilation, self.is_depthwise, name="conv_in")(h_BAE, left_BAE)
        h_BAE = Snake(name="snake_out")(h_BAE)
        h_BAE, _ = Conv(E, 1, initial_gain=0.2, name="conv_out")(h_BAE)
        return x_BAE + h_BAE, left_BAE


class EncoderBlock(nn.Module):
    features: int
    stride: int
    is_depthwise: bool

    @nn.compact
    def __call__(self, x_BAE, state):
        next_state = {}
        for j, dilation in enumerate(_DILATIONS):
            name = f"unit_{j}"
            x_BAE, next_state[name] = ResidualUnit(dilation, self.is_depthwise, name=name)(x_BAE, state.get(name))
        x_BAE = Snake(name="snake")(x_BAE)
        x_BAE, next_state["down"] = DownConv(self.features, self.stride, name="down")(x_BAE, state.get("down"))
        return x_BAE, next_state


class Encoder(nn.Module):
    """audio_BA (whole hops), state -> mu_BTC, logvar_BTC, next state. An empty state is the start of a signal."""

    config: AudioVAEConfig
    use_remat: bool = False  # recompute each block in the backward pass

    @nn.compact
    def __call__(self, audio_BA, state):
        c = self.config
        Block = nn.remat(EncoderBlock) if self.use_remat else EncoderBlock
        next_state = {}
        conv_in = Conv(c.encoder_dim, _WINDOW, initial_gain=10.0, name="conv_in")
        x_BAE, next_state["conv_in"] = conv_in(audio_BA[:, :, None], state.get("conv_in"))
        for i, stride in enumerate(c.encoder_rates):
            name = f"block_{i}"
            block = Block(c.encoder_dim * 2 ** (i + 1), stride, c.depthwise, name=name)
            x_BAE, next_state[name] = block(x_BAE, state.get(name, {}))
        mu_BTC, next_state["mu"] = Conv(c.latent_dim, _LATENT_WINDOW, name="mu")(x_BAE, state.get("mu"))
        logvar = Conv(c.latent_dim, _LATENT_WINDOW, initial_gain=0.1, initial_bias=-4.0, name="logvar")
        logvar_BTC, _ = logvar(x_BAE, state.get("mu"))  # the same input, so the same left context
        return mu_BTC, logvar_BTC, next_state


class Rate(nn.Module):
    """x * scale[bucket] + bias[bucket]; the bucket of the target rate."""

    num_buckets: int

    @nn.compact
    def __call__(self, x_BAE, bucket_B):
        shape = (self.num_buckets, x_BAE.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return x_BAE * scale[bucket_B][:, None] + bias[bucket_B][:, None]


class DecoderBlock(nn.Module):
    features: int
    stride: int
    is_depthwise: bool
    num_buckets: int  # 0: no target-rate conditioning

    @nn.compact
    def __call__(self, x_BAE, bucket_B, state):
        if self.num_buckets:
            x_BAE = Rate(self.num_buckets, name="rate")(x_BAE, bucket_B)
        x_BAE = Snake(name="snake")(x_BAE)
        next_state = {}
        x_BAE, next_state["up"] = UpConv(self.features, self.stride, name="up")(x_BAE, state.get("up"))
        for j, dilation in enumerate(_DILATIONS):
            name = f"unit_{j}"
            x_BAE, next_state[name] = ResidualUnit(dilation, self.is_depthwise, name=name)(x_BAE, state.get(name))
        return x_BAE, next_state


class Decoder(nn.Module):
    """latents_BTC, bucket_B, state -> audio_BA in (-1, 1), next state. An empty state is the start of a signal."""

    config: AudioVAEConfig
    use_remat: bool = False

    @nn.compact
    def __call__(self, latents_BTC, bucket_B, state):
        c = self.config
        num_buckets = 0 if c.sr_bin_boundaries is None else len(c.sr_bin_boundaries) + 1
        Block = nn.remat(DecoderBlock) if self.use_remat else DecoderBlock
        features = c.latent_dim if c.depthwise else c.decoder_dim
        next_state = {}
        conv_in = Conv(features, _WINDOW, is_depthwise=c.depthwise, name="conv_in")
        x_BAE, next_state["conv_in"] = conv_in(latents_BTC, state.get("conv_in"))
        if c.depthwise:
            x_BAE, _ = Conv(c.decoder_dim, 1, name="proj")(x_BAE)
        for i, stride in enumerate(c.decoder_rates):
            name = f"block_{i}"
            block = Block(c.decoder_dim // 2 ** (i + 1), stride, c.depthwise, num_buckets, name=name)
            x_BAE, next_state[name] = block(x_BAE, bucket_B, state.get(name, {}))
        x_BAE = Snake(name="snake")(x_BAE)
        x_BAE, next_state["conv_out"] = Conv(1, _WINDOW, name="conv_out")(x_BAE, state.get("conv_out"))
        return jnp.tanh(x_BAE[:, :, 0]), next_state


def init(key, vae_config: AudioVAEConfig):
    """Fresh parameters, float32: {"encoder": ..., "decoder": ...}."""
    encoder_key, decoder_key = jax.random.split(key)
    audio_BA = jnp.zeros((1, vae_config.encoder_hop))
    latents_BTC = jnp.zeros((1, 1, vae_config.latent_dim))
    encoder = Encoder(vae_config).init(encoder_key, audio_BA, {})
    decoder = Decoder(vae_config).init(decoder_key, latents_BTC, jnp.zeros(1, jnp.int32), {})
    return {"encoder": encoder["params"], "decoder": decoder["params"]}


def posterior(vae_params, vae_config: AudioVAEConfig, audio_BA, *, use_remat=False):
    """Mean and log variance of the latents, each [B, T, C]; audio is padded right with zeros to whole hops."""
    audio_BA = jnp.pad(jnp.asarray(audio_BA, jnp.float32), ((0, 0), (0, -audio_BA.shape[1] % vae_config.encoder_hop)))
    return _encode(vae_params, vae_config, audio_BA, {}, use_remat)[:2]


def encode(vae_params, vae_config: AudioVAEConfig, audio_BA):
    """Latents [B, T, C] of audio at the encoder's rate: the posterior's mean, T = ceil(A / encoder_hop)."""
    with jax.default_matmul_precision("float32"):
        return posterior(vae_params, vae_config, audio_BA)[0]


def decode(vae_params, vae_config: AudioVAEConfig, latents_BTC, target_hz=48000):
    """Audio [B, T x decoder_hop] in (-1, 1) at the decoder's rate.

    Args:
        target_hz: scalar or [B]; conditions, never resamples. A rate equal to a boundary is in the lower bucket.
    """
    with jax.default_matmul_precision("float32"):
        return reconstruct(vae_params, vae_config, latents_BTC, target_hz)


def reconstruct(vae_params, vae_config: AudioVAEConfig, latents_BTC, target_hz=48000, *, use_remat=False):
    """`decode` in whatever matrix precision is set outside: for training."""
    return _decode(vae_params, vae_config, latents_BTC, target_hz, {}, use_remat)[0]


# ---- streaming -------------------------------------------------------------------------------------------------------


def encode_state(vae_config: AudioVAEConfig, batch: int):
    """The streaming encoder's state at the start of a signal: zeros, the left context of every convolution."""
    c = vae_config
    state = {"conv_in": _left(batch, _WINDOW - 1, 1)}
    for i, stride in enumerate(c.encoder_rates):
        E = c.encoder_dim * 2**i
        state[f"block_{i}"] = {"down": _left(batch, stride, E)} | _left_of_units(batch, E)
    return state | {"mu": _left(batch, _LATENT_WINDOW - 1, c.encoder_dim * 2 ** len(c.encoder_rates))}


def decode_state(vae_config: AudioVAEConfig, batch: int):
    """The same for the streaming decoder."""
    c = vae_config
    state = {"conv_in": _left(batch, _WINDOW - 1, c.latent_dim)}
    for i in range(len(c.decoder_rates)):
        E = c.decoder_dim // 2 ** (i + 1)
        state[f"block_{i}"] = {"up": _left(batch, 1, c.decoder_dim // 2**i)} | _left_of_units(batch, E)
    return state | {"conv_out": _left(batch, _WINDOW - 1, E)}


def _left_of_units(batch, features):
    return {f"unit_{j}": _left(batch, (_WINDOW - 1) * dilation, features) for j, dilation in enumerate(_DILATIONS)}


def _left(batch, samples, features):
    return jnp.zeros((batch, samples, features))


def encode_step(vae_params, vae_config: AudioVAEConfig, audio_BA, state):
    """Latents of the next whole hops of audio and the state after them; any chunking gives what `encode` gives."""
    with jax.default_matmul_precision("float32"):
        mu_BTC, _, state = _encode(vae_params, vae_config, audio_BA, state, False)
        return mu_BTC, state


def decode_step(vae_params, vae_config: AudioVAEConfig, latents_BTC, state, target_hz=48000):
    """Audio of the next T frames and the state after them; any chunking gives what `decode` gives."""
    with jax.default_matmul_precision("float32"):
        return _decode(vae_params, vae_config, latents_BTC, target_hz, state, False)


def _encode(vae_params, vae_config, audio_BA, state, use_remat):
    audio_BA = jnp.asarray(audio_BA, jnp.float32)
    return Encoder(vae_config, use_remat).apply({"params": _float32(vae_params["encoder"])}, audio_BA, state)


def _decode(vae_params, vae_config, latents_BTC, target_hz, state, use_remat):
    latents_BTC = jnp.asarray(latents_BTC, jnp.float32)
    boundaries = jnp.asarray(vae_config.sr_bin_boundaries or (), jnp.float32)
    target_hz_B = jnp.broadcast_to(jnp.asarray(target_hz, jnp.float32), latents_BTC.shape[:1])
    bucket_B = jnp.sum(target_hz_B[:, None] > boundaries[None], axis=1)
    decoder = Decoder(vae_config, use_remat)
    return decoder.apply({"params": _float32(vae_params["decoder"])}, latents_BTC, bucket_B, state)


def _float32(params):
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
