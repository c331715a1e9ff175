"""Configs of the model and the codec, with the field names of the released `config.json`; presets of the model by name.

`ModelConfig` derives the shapes of its four transformer stacks from these fields:

    tslm     text-semantic LM, causal, LongRoPE            ralm     residual acoustic LM, causal, no positions
    locenc   patch -> vector, bidirectional                locdit   velocity of a patch, bidirectional

Defaults are those that the PyTorch package uses for a key that config.json lacks; the released file and the presets below
set `use_mup` to false, although its default is true. A field marked "kept" has no effect: it is here so that an import
followed by an export returns the same file.
"""

import dataclasses
import math
from dataclasses import dataclass

from voxcpm2_jax.config.plain import UserError, check_at_least

# ---- fields of the released file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """LongRoPE: one frequency divisor per rotated pair. The long ones apply if max_position_embeddings > original."""

    type: str = "longrope"  # kept; every type is read as LongRoPE
    long_factor: tuple[float, ...] = ()  # [H / 2]; empty: all ones, which is plain RoPE
    short_factor: tuple[float, ...] = ()  # [H / 2]; likewise
    original_max_position_embeddings: int = 32768  # slots


@dataclass(frozen=True)
class LMConfig:
    """The text-semantic LM, a MiniCPM-4 decoder. The other stacks take from it what they do not set themselves."""

    bos_token_id: int = 1  # kept; the special ids are in sequence.py
    eos_token_id: int = 2  # kept
    hidden_size: int = 2048  # D
    intermediate_size: int = 6144  # F
    max_position_embeddings: int = 32768  # slots; only chooses and scales the LongRoPE factors
    num_attention_heads: int = 16  # N
    num_hidden_layers: int = 28  # L
    num_key_value_heads: int = 2  # K, divides N
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    kv_channels: int | None = None  # H; None: D / N
    rope_scaling: RopeScaling = RopeScaling()
    vocab_size: int = 73448  # V
    use_mup: bool = True  # apply scale_emb and scale_depth
    scale_emb: float = 12.0  # text embedding multiplier, if use_mup
    dim_model_base: int = 256  # kept; muP's base width
    scale_depth: float = 1.4  # residual branches x scale_depth / sqrt(L), if use_mup
    no_rope: bool = False  # no positions in the TSLM, LocEnc and LocDiT

    def __post_init__(self):
        check_at_least(1, self, "lm_config", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
                        "num_key_value_heads", "kv_channels", "max_position_embeddings")  # fmt: skip
        check_at_least(2, self.rope_scaling, "lm_config.rope_scaling", "original_max_position_embeddings")
        ones = (1.0,) * ((self.kv_channels or self.hidden_size // self.num_attention_heads) // 2)
        rope = self.rope_scaling
        filled = dataclasses.replace(rope, long_factor=rope.long_factor or ones, short_factor=rope.short_factor or ones)
        object.__setattr__(self, "rope_scaling", filled)


@dataclass(frozen=True)
class LocalConfig:
    """Shape of LocEnc; LocDiT has the same fields."""

    hidden_dim: int = 1024  # D
    ffn_dim: int = 4096  # F
    num_heads: int = 16  # N
    num_layers: int = 4  # L
    kv_channels: int | None = None  # H; None: D / N


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching: the times of training and the guidance."""

    sigma_min: float = 1e-6  # kept
    solver: str = "euler"  # the only one supported
    t_scheduler: str = "log-norm"  # "log-norm": sigmoid(N(-0.4, 1)); "uniform"
    training_cfg_rate: float = 0.1  # probability that a patch's two conditioning vectors are dropped
    inference_cfg_rate: float = 1.0  # kept; guidance is an argument of generation
    reg_loss_type: str = "l1"  # kept; the loss is squared error for every value, as in the PyTorch package
    ratio_r_neq_t_range: tuple[float, float] = (0.25, 0.75)  # mean mode: share of patches with r != t, from first to last step
    noise_cond_prob_range: tuple[float, float] = (0.0, 0.0)  # noise on the previous patch: not supported in training
    noise_cond_scale: float = 0.0  # likewise


@dataclass(frozen=True)
class DiTConfig(LocalConfig):
    """Shape of LocDiT, and its flow."""

    dit_mean_mode: bool = False  # MeanFlow: the network sees t - r and predicts the mean velocity
    cfm_config: FlowConfig = FlowConfig()


@dataclass(frozen=True)
class AudioVAEConfig:
    """AudioVAE V2: a causal convolutional VAE whose encoder and decoder have different sample rates."""

    encoder_dim: int = 128  # channels before the first block; doubled by each block
    encoder_rates: tuple[int, ...] = (2, 5, 8, 8)  # strides; their product is the encoder hop in samples
    latent_dim: int = 64  # C
    decoder_dim: int = 2048  # channels before the first block; block i ends with decoder_dim // 2**(i + 1)
    decoder_rates: tuple[int, ...] = (8, 6, 5, 2, 2, 2)
    depthwise: bool = True  # depthwise convolutions in the residual units
    sample_rate: int = 16000  # Hz into the encoder
    out_sample_rate: int = 48000  # Hz out of the decoder
    use_noise_block: bool = False  # not supported: the release has none
    sr_bin_boundaries: tuple[int, ...] | None = (20000, 30000, 40000)  # Hz; None: no target-rate conditioning
    cond_type: str = "scale_bias"  # the only one supported
    cond_dim: int = 128  # kept; only other values of cond_type use it
    cond_out_layer: bool = False  # not supported: the release has none

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"audio_vae_config: {message}")

        check(self.encoder_rates and self.decoder_rates, "encoder_rates and decoder_rates must not be empty")
        check(min(self.encoder_rates + self.decoder_rates) >= 1, "every rate must be at least 1")
        check_at_least(1, self, "audio_vae_config", "encoder_dim", "latent_dim", "sample_rate", "out_sample_rate")
        check(
            self.decoder_dim // 2 ** len(self.decoder_rates) >= 1,
            f"decoder_dim {self.decoder_dim} cannot be halved {len(self.decoder_rates)} times",
        )
        check(not self.use_noise_block, "use_noise_block is not supported (the released model has none)")
        check(not self.cond_out_layer, "cond_out_layer is not supported (the released model has none)")
        check(self.cond_type == "scale_bias", f"cond_type {self.cond_type!r} is not supported, only 'scale_bias'")
        if self.sr_bin_boundaries is not None:
            check(
                list(self.sr_bin_boundaries) == sorted(set(self.sr_bin_boundaries)),
                f"sr_bin_boundaries must rise strictly, got {list(self.sr_bin_boundaries)}",
            )
        check(
            self.sample_rate * self.decoder_hop == self.out_sample_rate * self.encoder_hop,
            f"encoder makes {self.sample_rate}/{self.encoder_hop} frames per second, decoder takes "
            f"{self.out_sample_rate}/{self.decoder_hop}; sample rates and strides must agree",
        )

    @property
    def encoder_hop(self) -> int:
        """Input samples per latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def decoder_hop(self) -> int:
        """Output samples per latent frame."""
        return math.prod(self.decoder_rates)


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformerConfig:
    """One transformer stack, with all values resolved."""

    num_layers: int  # L
    width: int  # D
    mlp_width: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rms_norm_eps: float
    rope_theta: float
    rope_factor: tuple[float, ...] | None  # [H / 2]; None: no positional encoding
    rope_scale: float  # LongRoPE attention factor on cos and sin
    residual_scale: float  # on each residual branch; 1 without muP


DTYPES = ("bfloat16", "float16", "float32")
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # short names in a released config.json


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: text-semantic LM, quantiser, residual acoustic LM, local encoder and local diffusion transformer."""

    lm_config: LMConfig = LMConfig()
    patch_size: int = 4  # P, latent frames in a patch
    feat_dim: int = 64  # C
    residual_lm_num_layers: int = 8
    residual_lm_no_rope: bool = False
    scalar_quantization_latent_dim: int = 512  # Q
    scalar_quantization_scale: int = 9  # levels -scale .. scale
    encoder_config: LocalConfig = LocalConfig()
    dit_config: DiTConfig = DiTConfig()
    max_length: int = 8192  # slots of the longest sequence
    dtype: str = "bfloat16"  # of matrix products: a name of DTYPES; trained is in float32 or bfloat16

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"model config: {message}")

        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        check(self.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("patch_size", "feat_dim", "residual_lm_num_layers", "scalar_quantization_latent_dim",
                     "scalar_quantization_scale", "max_length"):  # fmt: skip
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for where in ("encoder_config", "dit_config"):
            local = getattr(self, where)
            check_at_least(1, local, where, "hidden_dim", "ffn_dim", "num_heads", "num_layers", "kv_channels")
        vocab_size = self.lm_config.vocab_size
        check(vocab_size > 104, f"vocab_size must be over 104 (the special ids), got {vocab_size}")
        for name, stack in (("lm_config", self.tslm), ("encoder_config", self.locenc), ("dit_config", self.locdit)):
            check(stack.head_dim >= 1, f"{name}: {stack.num_heads} heads do not fit a width of {stack.width}")
            check(
                stack.num_heads % stack.num_kv_heads == 0,
                f"{name}: {stack.num_heads} heads cannot share {stack.num_kv_heads} key/value heads evenly",
            )
            check(stack.head_dim % 2 == 0, f"{name}: head size must be even for RoPE, got {stack.head_dim}")
            if stack.rope_factor is not None:
                got, expected = len(stack.rope_factor), stack.head_dim // 2
                check(got == expected, f"{name}: rope_scaling needs {expected} factors (half the head size), got {got}")
        width = self.dit_config.hidden_dim
        check(width % 2 == 0 and width >= 4, f"dit_config.hidden_dim must be even and at least 4 (time embedding), got {width}")
        flow = self.dit_config.cfm_config
        check(flow.t_scheduler in ("log-norm", "uniform"), f"t_scheduler must be log-norm or uniform, got {flow.t_scheduler!r}")
        check(flow.solver == "euler", f"solver must be euler, got {flow.solver!r}")
        check(0 <= flow.training_cfg_rate < 1, f"training_cfg_rate must lie in [0, 1), got {flow.training_cfg_rate}")

    def _stack(self, num_layers, width, mlp_width, num_heads, head_dim, no_rope=False) -> TransformerConfig:
        lm = self.lm_config
        rope = lm.rope_scaling
        is_long = lm.max_position_embeddings > rope.original_max_position_embeddings
        stretch = lm.max_position_embeddings / rope.original_max_position_embeddings
        return TransformerConfig(
            num_layers=num_layers,
            width=width,
            mlp_width=mlp_width,
            num_heads=num_heads,
            num_kv_heads=lm.num_key_value_heads,
            head_dim=head_dim or width // num_heads,
            rms_norm_eps=lm.rms_norm_eps,
            rope_theta=lm.rope_theta,
            rope_factor=None if no_rope else (rope.long_factor if is_long else rope.short_factor),
            rope_scale=math.sqrt(1 + math.log(stretch) / math.log(rope.original_max_position_embeddings)),
            residual_scale=lm.scale_depth / math.sqrt(num_layers) if lm.use_mup else 1.0,
        )

    @property
    def tslm(self) -> TransformerConfig:
        lm = self.lm_config
        return self._stack(lm.num_hidden_layers, lm.hidden_size, lm.intermediate_size, lm.num_attention_heads,
                           lm.kv_channels, lm.no_rope)  # fmt: skip

    @property
    def ralm(self) -> TransformerConfig:
        lm = self.lm_config
        return self._stack(self.residual_lm_num_layers, lm.hidden_size, lm.intermediate_size, lm.num_attention_heads,
                           lm.kv_channels, self.residual_lm_no_rope)  # fmt: skip

    @property
    def locenc(self) -> TransformerConfig:
        c = self.encoder_config
        return self._stack(c.num_layers, c.hidden_dim, c.ffn_dim, c.num_heads, c.kv_channels, self.lm_config.no_rope)

    @property
    def locdit(self) -> TransformerConfig:
        c = self.dit_config
        return self._stack(c.num_layers, c.hidden_dim, c.ffn_dim, c.num_heads, c.kv_channels, self.lm_config.no_rope)

    @property
    def locenc_slots(self) -> int:
        """Positions of LocEnc for one patch: the special token and the patch's frames."""
        return 1 + self.patch_size

    @property
    def locdit_slots(self) -> int:
        """Positions of LocDiT for one patch: two prefix tokens, time, the frames of the previous patch and of this one."""
        return 3 + 2 * self.patch_size

    @property
    def embed_scale(self) -> float:
        return self.lm_config.scale_emb if self.lm_config.use_mup else 1.0


# ---- presets ---------------------------------------------------------------------------------------------------------


def _shape(
    *, lm, locenc, locdit, head_dim, ralm_layers, fsq_dim, feat_dim, vocab_size, dtype, max_length, rope=RopeScaling(),
    rope_theta=10000.0, t_scheduler="log-norm",
):  # fmt: skip
    """lm: (layers, D, F, heads, kv heads); locenc, locdit: (layers, D, F, heads)."""
    layers, width, mlp, heads, kv_heads = lm
    flow = FlowConfig(inference_cfg_rate=2.0, t_scheduler=t_scheduler)

    def local(cls, layers, width, mlp, heads, **kwargs):
        return cls(num_layers=layers, hidden_dim=width, ffn_dim=mlp, num_heads=heads, kv_channels=head_dim, **kwargs)

    return ModelConfig(
        lm_config=LMConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=mlp, num_attention_heads=heads,
            num_key_value_heads=kv_heads, kv_channels=head_dim, vocab_size=vocab_size, use_mup=False, rope_scaling=rope,
            rope_theta=rope_theta,
        ),
        feat_dim=feat_dim,
        residual_lm_num_layers=ralm_layers,
        residual_lm_no_rope=True,
        scalar_quantization_latent_dim=fsq_dim,
        encoder_config=local(LocalConfig, *locenc),
        dit_config=local(DiTConfig, *locdit, cfm_config=flow),
        max_length=max_length,
        dtype=dtype,
    )  # fmt: skip


# LongRoPE divisors of the release; the short and the long ones are equal.
_RELEASED_FACTORS = (
    0.9977997200264581, 1.014658295992452, 1.0349680404997148, 1.059429246056193, 1.0888815016813513, 1.1243301355211495,
    1.166977103606075, 1.2182568066927284, 1.2798772354275727, 1.3538666751582975, 1.4426259039919596, 1.5489853358570191,
    1.6762658237220625, 1.8283407612492941, 2.0096956085876183, 2.225478927469756, 2.481536379650452, 2.784415934557119,
    3.1413289096347365, 3.560047844772632, 4.048719380066383, 4.615569542115128, 5.2684819496549835, 6.014438591970396,
    6.858830049237097, 7.804668263503327, 8.851768731513417, 9.99600492938444, 11.228766118181639, 12.536757560834843,
    13.902257701387796, 15.303885189125953, 16.717837610115794, 18.119465097853947, 19.484965238406907, 20.792956681060105,
    22.02571786985731, 23.16995406772833, 24.217054535738416, 25.16289275000465, 26.007284207271347, 26.753240849586767,
    27.40615325712662, 27.973003419175363, 28.461674954469114, 28.880393889607006, 29.237306864684626, 29.540186419591297,
    29.79624387177199, 30.01202719065413, 30.193382037992453, 30.34545697551969, 30.47273746338473, 30.579096895249787,
    30.66785612408345, 30.741845563814174, 30.80346599254902, 30.85474569563567, 30.897392663720595, 30.932841297560394,
    30.962293553185553, 30.986754758742034, 31.007064503249293, 31.02392307921529,
)  # fmt: skip

# Models by name. "2b" is the release; "small" has the same structure with 100 M parameters.
MODELS = {
    "tiny": _shape(
        lm=(2, 32, 64, 4, 2), locenc=(1, 32, 64, 4), locdit=(2, 32, 64, 4), head_dim=8, ralm_layers=1, fsq_dim=16,
        feat_dim=16, vocab_size=384, dtype="float32", max_length=512,
    ),
    "demo": _shape(
        lm=(4, 128, 384, 4, 2), locenc=(1, 128, 384, 4), locdit=(3, 128, 384, 4), head_dim=32, ralm_layers=2, fsq_dim=64,
        feat_dim=16, vocab_size=512, dtype="float32", max_length=1024, rope_theta=100.0, t_scheduler="uniform",
    ),
    "small": _shape(
        lm=(8, 640, 1920, 10, 2), locenc=(4, 448, 1344, 8), locdit=(6, 448, 1344, 8), head_dim=64, ralm_layers=3,
        fsq_dim=256, feat_dim=64, vocab_size=16384, dtype="bfloat16", max_length=8192,
    ),
    "2b": _shape(
        lm=(28, 2048, 6144, 16, 2), locenc=(12, 1024, 4096, 16), locdit=(12, 1024, 4096, 16), head_dim=128, ralm_layers=8,
        fsq_dim=512, feat_dim=64, vocab_size=73448, dtype="bfloat16", max_length=8192,
        rope=RopeScaling(long_factor=_RELEASED_FACTORS, short_factor=_RELEASED_FACTORS),
    ),
}  # fmt: skip
