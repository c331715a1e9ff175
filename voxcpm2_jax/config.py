"""Every part's configuration: frozen dataclasses, their validation, derived sizes, and the released config.json.

The field names of the model parts are those of the released `config.json`, so that file and dataclass are one
declaration; `ModelConfig` derives the shape of each of its four transformer stacks from them:

    tslm     text-semantic LM, causal, LongRoPE            ralm     residual acoustic LM, causal, no positions
    locenc   patch -> vector, bidirectional                locdit   velocity of a patch, bidirectional

Unknown keys of a released file are kept beside the config and given back on export; keys of our own run configs
are strict. Defaults are those the reference applies to an absent key (`use_mup` is then true).
"""

import dataclasses
import json
import math
import pathlib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class UserError(ValueError):
    """The user's mistake: its message is the one line to show (what we got, what we expected, what to do)."""


def _check_at_least(least, config, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"{where}.{name} must be at least {least}, got {value}")


# ---- model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """LongRoPE: one frequency divisor per rotated pair; long or short is chosen once, by max > original."""

    type: str = "longrope"
    long_factor: tuple[float, ...] = ()  # [H / 2]; empty: all ones, which is plain RoPE
    short_factor: tuple[float, ...] = ()  # [H / 2]; likewise
    original_max_position_embeddings: int = 32768  # slots


@dataclass(frozen=True)
class LMConfig:
    """MiniCPM-4 decoder; the four stacks of the model inherit from it what they do not set themselves."""

    bos_token_id: int = 1
    eos_token_id: int = 2
    hidden_size: int = 2048  # D
    intermediate_size: int = 6144  # F
    max_position_embeddings: int = 32768  # slots
    num_attention_heads: int = 16  # N
    num_hidden_layers: int = 28  # L
    num_key_value_heads: int = 2  # K, divides N
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    kv_channels: int | None = None  # H; None: D / N
    rope_scaling: RopeScaling = RopeScaling()
    vocab_size: int = 73448  # V
    use_mup: bool = True
    scale_emb: float = 12.0  # text embedding multiplier, if use_mup
    dim_model_base: int = 256  # kept for the released file; no part reads it
    scale_depth: float = 1.4  # residual branches x scale_depth / sqrt(L), if use_mup
    no_rope: bool = False

    def __post_init__(self):
        _check_at_least(1, self, "lm_config", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
                        "num_key_value_heads", "kv_channels", "max_position_embeddings")  # fmt: skip
        _check_at_least(2, self.rope_scaling, "lm_config.rope_scaling", "original_max_position_embeddings")
        ones = (1.0,) * ((self.kv_channels or self.hidden_size // self.num_attention_heads) // 2)
        rope = self.rope_scaling
        filled = dataclasses.replace(rope, long_factor=rope.long_factor or ones, short_factor=rope.short_factor or ones)
        object.__setattr__(self, "rope_scaling", filled)


@dataclass(frozen=True)
class LocalConfig:
    """Shape of LocEnc."""

    hidden_dim: int = 1024  # D
    ffn_dim: int = 4096  # F
    num_heads: int = 16  # N
    num_layers: int = 4  # L
    kv_channels: int | None = None  # H; None: D / N


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching: training times, guidance."""

    sigma_min: float = 1e-6  # kept for the released file; no part reads it
    solver: str = "euler"
    t_scheduler: str = "log-norm"  # "log-norm": sigmoid(N(-0.4, 1)); "uniform"
    training_cfg_rate: float = 0.1  # probability that a patch's two conditioning vectors are dropped
    inference_cfg_rate: float = 1.0
    reg_loss_type: str = "l1"  # kept for the released file; the loss is squared error all the same
    ratio_r_neq_t_range: tuple[float, float] = (0.25, 0.75)  # mean mode: share of patches with r != t, first to last
    noise_cond_prob_range: tuple[float, float] = (0.0, 0.0)
    noise_cond_scale: float = 0.0


@dataclass(frozen=True)
class DiTConfig(LocalConfig):
    """Shape of LocDiT and its flow."""

    dit_mean_mode: bool = False  # MeanFlow: the network sees t - r and predicts the mean velocity
    cfm_config: FlowConfig = FlowConfig()


@dataclass(frozen=True)
class AudioVAEConfig:
    """AudioVAE V2: causal convolutional VAE, encoder and decoder at rates of their own."""

    encoder_dim: int = 128  # channels before the first block; doubled by each block
    encoder_rates: tuple[int, ...] = (2, 5, 8, 8)  # strides; their product is the encoder hop in samples
    latent_dim: int = 64  # C
    decoder_dim: int = 2048  # channels before the first block; block i ends with decoder_dim // 2**(i + 1)
    decoder_rates: tuple[int, ...] = (8, 6, 5, 2, 2, 2)
    depthwise: bool = True
    sample_rate: int = 16000  # Hz into the encoder
    out_sample_rate: int = 48000  # Hz out of the decoder
    use_noise_block: bool = False  # not supported: the release has none
    sr_bin_boundaries: tuple[int, ...] | None = (20000, 30000, 40000)  # Hz; None: no target-rate conditioning
    cond_type: str = "scale_bias"  # the only one supported
    cond_dim: int = 128  # kept for the released file; scale_bias has no use for it
    cond_out_layer: bool = False  # not supported: the release has none

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"audio_vae_config: {message}")

        check(self.encoder_rates and self.decoder_rates, "encoder_rates and decoder_rates must not be empty")
        check(min(self.encoder_rates + self.decoder_rates) >= 1, "every rate must be at least 1")
        _check_at_least(1, self, "audio_vae_config", "encoder_dim", "latent_dim", "sample_rate", "out_sample_rate")
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
            f"encoder makes {self.sample_rate}/{self.encoder_hop} frames per second and decoder eats "
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

    @property
    def frames_per_sec(self) -> float:
        return self.sample_rate / self.encoder_hop


@dataclass(frozen=True)
class TransformerConfig:
    """One stack, everything resolved."""

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


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: two language models, quantiser, local encoder and local diffusion transformer."""

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
    dtype: str = "bfloat16"  # what matrices are multiplied in: "float32", "bfloat16"

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"model config: {message}")

        aliases = {"bf16": "bfloat16", "fp32": "float32"}
        object.__setattr__(self, "dtype", aliases.get(self.dtype, self.dtype))
        check(self.dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        for name in ("patch_size", "feat_dim", "residual_lm_num_layers", "scalar_quantization_latent_dim",
                     "scalar_quantization_scale", "max_length"):  # fmt: skip
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for where in ("encoder_config", "dit_config"):
            local = getattr(self, where)
            _check_at_least(1, local, where, "hidden_dim", "ffn_dim", "num_heads", "num_layers", "kv_channels")
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
    def embed_scale(self) -> float:
        return self.lm_config.scale_emb if self.lm_config.use_mup else 1.0


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


# LongRoPE divisors of the release, short and long alike.
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

# Shapes of the backbone by name. "2b" is the release; "small" is its plan at 100 M parameters.
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


# ---- dataclass <-> plain data --------------------------------------------------------------------------------------


def to_dict(config) -> dict[str, Any]:
    """A dataclass as nested dicts and lists: what JSON holds."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls, data: Mapping[str, Any], *, where: str = "config", unknown: dict | None = None):
    """Builds dataclass `cls` from nested plain data, checking every key and type.

    Args:
        data: nested mappings; absent keys take the dataclass's defaults.
        where: how messages name the place.
        unknown: if given, keys that `cls` does not have are collected here (nested the same way), otherwise they raise.
    Raises:
        UserError: an unknown or missing key or a value of the wrong type, named with its path.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected fields of {cls.__name__}, got {data!r}")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        if key not in names:
            if unknown is None:
                raise UserError(f"{where}.{key}: unknown key; {cls.__name__} has {', '.join(sorted(names))}")
            unknown[key] = value
            continue
        rest = None if unknown is None else {}
        values[key] = _coerce(hints[key], value, f"{where}.{key}", rest)
        if rest:
            unknown[key] = rest
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise UserError(f"{where}: no {', '.join(missing)}; {cls.__name__} needs it")
    return cls(**values)


def _coerce(hint, value, where, unknown):
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where, unknown=unknown)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (hint,) = [o for o in options if o is not type(None)]
        return _coerce(hint, value, where, unknown)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"{where}: expected a list, got {value!r}")
        args = typing.get_args(hint)
        items = list(value)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise UserError(f"{where}: expected {len(args)} values, got {len(items)}")
        hints = args[:1] * len(items) if args[-1] is Ellipsis else args
        return tuple(_coerce(h, item, f"{where}[{i}]", unknown) for i, (h, item) in enumerate(zip(hints, items)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


# ---- the released config.json --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Released:
    """A released config.json: what we understand of it, and the file itself for giving it back."""

    model: ModelConfig
    vae: AudioVAEConfig
    raw: dict[str, Any] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()  # paths of keys that no part reads


# Keys of the file that concern the reference's runtime, not the model.
_RUNTIME_KEYS = ("architecture", "device", "audio_vae_config")


def read_released(path: str | pathlib.Path) -> Released:
    """Reads a released `config.json` (or the directory that holds it).

    Raises:
        UserError: no such file, not JSON, another architecture, an impossible value.
    """
    path = pathlib.Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a released VoxCPM2 directory with config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("architecture", "voxcpm").lower() != "voxcpm2":
        got = raw.get("architecture", "none") if isinstance(raw, dict) else "no object"
        raise UserError(f'{path}: expected "architecture": "voxcpm2", got {got!r}')
    unknown: dict[str, Any] = {}
    model_part = {k: v for k, v in raw.items() if k not in _RUNTIME_KEYS}
    model = from_dict(ModelConfig, model_part, where=str(path), unknown=unknown)
    vae_unknown: dict[str, Any] = {}
    vae = from_dict(AudioVAEConfig, raw.get("audio_vae_config") or {}, where=f"{path}.audio_vae_config", unknown=vae_unknown)
    if vae_unknown:
        unknown["audio_vae_config"] = vae_unknown
    if vae.latent_dim != model.feat_dim:
        raise UserError(f"{path}: feat_dim {model.feat_dim} differs from audio_vae_config.latent_dim {vae.latent_dim}")
    return Released(model, vae, raw, tuple(_paths(unknown)))


def to_released(model: ModelConfig, vae: AudioVAEConfig, raw: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The released file's content for this model; `raw`, an imported file, keeps its own keys and their order.

    A field that `raw` leaves out and that has its default value stays out, so an unchanged import returns `raw`.
    """
    ours = to_dict(model) | {"audio_vae_config": to_dict(vae)}
    if raw is None:
        return {"architecture": "voxcpm2"} | ours | {"device": "cuda"}
    defaults = {f.name: _default(f) for f in dataclasses.fields(ModelConfig)} | {"audio_vae_config": to_dict(AudioVAEConfig())}
    return _merge(raw, ours, defaults)


def _default(field_):
    return to_dict(field_.default) if dataclasses.is_dataclass(field_.default) else field_.default


def _merge(raw, ours, defaults):
    merged = dict(raw)
    for key, value in ours.items():
        old = raw.get(key)
        if isinstance(value, dict):
            nested = _merge(old or {}, value, defaults.get(key, {}))
            if nested or key in raw:
                merged[key] = nested if old is not None or nested else old
        elif key in raw:
            merged[key] = old if _same_value(old, value) else value
        elif value != defaults.get(key):
            merged[key] = value
    return merged


def _same_value(old, value) -> bool:
    aliases = {"bf16": "bfloat16", "fp32": "float32"}
    return old == value or (isinstance(old, str) and aliases.get(old) == value)


def _paths(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# ---- optimiser, logging, checkpoints --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule; see optim.py for the curves and for what each parameter goes by."""

    optimizer: str = "adamw"  # "adamw"; "muon": matrices of the layers by Muon, everything else by AdamW
    learning_rate: float = 1e-4  # peak; one for both
    warmup_steps: int = 1000  # updates of linear warm-up
    schedule: str = "cosine"  # after the warm-up: "cosine", "wsd" (stable, then linear decay), "constant"
    schedule_steps: int | None = None  # updates until the schedule ends; None: as long as the run
    decay_fraction: float = 0.1  # "wsd": share of the schedule that decays
    decay_steps: int | None = None  # "wsd": updates that decay; None: decay_fraction of the schedule
    decay_start: int | None = None  # "wsd": first update that decays, for a branch; None: so that it ends with the schedule
    end_ratio: float = 0.05  # of the peak, at the schedule's end and after
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95  # momentum of Muon
    mu_dtype: str = "float32"  # what first moments are kept in: "float32", "bfloat16" (2 bytes less a parameter)
    weight_decay: float = 0.01  # x learning rate, matrices only
    clip_norm: float | None = 1.0  # global gradient norm; None: no clip
    ema_decay: float | None = None  # averaged weights, per update; None: none are kept

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"optim.{name}: expected {expected}, got {getattr(self, name)!r}")

        check("optimizer", self.optimizer in ("adamw", "muon"), "adamw or muon")
        check("learning_rate", self.learning_rate > 0, "a number over 0")
        check("warmup_steps", self.warmup_steps >= 0, "0 or more updates")
        check("schedule", self.schedule in ("cosine", "wsd", "constant"), "cosine, wsd or constant")
        check("schedule_steps", self.schedule_steps is None or self.schedule_steps >= 1, "None or at least 1 update")
        check("decay_fraction", 0 <= self.decay_fraction <= 1, "a share in [0, 1]")
        for name in ("decay_steps", "decay_start"):
            value = getattr(self, name)
            check(name, value is None or self.schedule == "wsd", f"None, as the schedule is {self.schedule} and not wsd")
        check("decay_steps", self.decay_steps is None or self.decay_steps >= 1, "None or at least 1 update")
        is_warm = self.decay_start is None or self.decay_start >= self.warmup_steps
        check("decay_start", is_warm, f"None or an update after the warm-up of {self.warmup_steps}")
        check("end_ratio", 0 <= self.end_ratio <= 1, "a share in [0, 1]")
        check("beta1", 0 <= self.beta1 < 1, "a number in [0, 1)")
        check("beta2", 0 <= self.beta2 < 1, "a number in [0, 1)")
        check("eps", self.eps > 0, "a number over 0")
        check("muon_beta", 0 <= self.muon_beta < 1, "a number in [0, 1)")
        check("mu_dtype", self.mu_dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check("weight_decay", self.weight_decay >= 0, "0 or more")
        check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "None or a number over 0")
        check("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "None or a number in [0, 1)")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000  # updates between two checkpoints; the last update is always saved
    keep: int = 3  # newest checkpoints that stay
    keep_every_steps: int | None = None  # checkpoints of the steps that it divides stay for ever; None: none do
    best_metric: str | None = None  # figure of an evaluation at the saved step, such as "val_loss_diff": the best stays too
    best_mode: str = "min"  # which figure is best: "min" or "max"

    def __post_init__(self):
        if min(self.every_steps, self.keep) < 1:
            raise UserError(f"checkpoint: every_steps and keep must be at least 1, got {self.every_steps} and {self.keep}")
        if self.keep_every_steps is not None and (self.keep_every_steps < 1 or self.keep_every_steps % self.every_steps):
            raise UserError(
                f"checkpoint.keep_every_steps must be None or a multiple of every_steps ({self.every_steps}), "
                f"got {self.keep_every_steps}"
            )
        if self.best_mode not in ("min", "max"):
            raise UserError(f"checkpoint.best_mode must be min or max, got {self.best_mode!r}")


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 20  # updates between two rows of metrics.jsonl

    def __post_init__(self):
        if self.every_steps < 1:
            raise UserError(f"log.every_steps must be at least 1, got {self.every_steps}")


@dataclass(frozen=True)
class GuardConfig:
    """Which updates are skipped, and what happens when they do not end; see train/guard.py."""

    on: bool = True  # False: a figure that is not finite ends the run
    window: int = 128  # kept updates that a spike is told by; none is before a run or stage has as many
    spike: float | None = 12.0  # median absolute deviations of log loss or log gradient norm over their median; None: any
    max_in_a_row: int = 8  # skipped updates after which the run goes back to its last checkpoint
    max_rollbacks: int = 3  # to the same checkpoint; then the run ends

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"guard.{name}: expected {expected}, got {getattr(self, name)!r}")

        check("window", self.window >= 2, "at least 2 updates")
        check("spike", self.spike is None or self.spike > 0, "None or a number over 0")
        check("max_in_a_row", self.max_in_a_row >= 1, "at least 1 update")
        check("max_rollbacks", self.max_rollbacks >= 0, "0 or more")


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as stuck; see train/watchdog.py."""

    factor: float = 20.0  # x the median step; a step or a wait for data that lasts longer is a stall
    min_sec: float = 300.0  # shorter ones are none
    slow_sec: float = 3600.0  # limit of what is no step: compiling, reading and writing checkpoints, evaluating
    action: str = "report"  # "report": where every thread stands, once a stall; "exit": then also leave with code 1

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"watchdog.{name}: expected {expected}, got {getattr(self, name)!r}")

        check("factor", self.factor > 1, "a number over 1")
        check("min_sec", self.min_sec > 0, "seconds over 0")
        check("slow_sec", self.slow_sec > 0, "seconds over 0")
        check("action", self.action in ("report", "exit"), "report or exit")


# ---- backbone run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchConfig:
    """Budgets of one packed batch."""

    rows: int = 8  # B, over all hosts
    slots: int = 4096  # T, text tokens and patches of a row
    patches: int = 3072  # M, audio patches of a row
    target_patches: int | None = None  # of a row that may bear loss; None: all M
    segments: int | None = None  # clips of a row at most; None: as many as fit. NVIDIA: attention's cost grows with it

    def __post_init__(self):
        if min(self.rows, self.slots, self.patches) < 1 or not 1 <= (self.target_patches or self.patches) <= self.patches:
            raise UserError(f"batch: rows, slots and patches must be at least 1, target_patches at most patches; got {self}")
        if self.segments is not None and self.segments < 1:
            raise UserError(f"batch: segments must be at least 1, or None for as many as fit; got {self.segments}")


@dataclass(frozen=True)
class StageConfig:
    """A stage of the curriculum: what is heard from its first step on; data/mixing.py says how."""

    first_step: int = 0
    min_sec: float = 0.0  # shorter clips are left out
    max_sec: float | None = None  # longer clips are left out; None: none are
    temperature: float = 1.0  # a language of a dataset weighs its hours ** (1 / temperature): over 1 is more even
    weights: tuple[tuple[str, float], ...] = ()  # factors on that, by "dataset", "language" or "dataset/language"
    reference: float = 1.0  # share of the clips with a reference that are laid out with one
    described: float = 1.0  # share of the described clips whose description is read
    prompt: float | None = None  # share of audio that is prompt clips; None: what the corpus has
    batch: BatchConfig | None = None  # budgets; None: those of the run

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"stages: {name}: expected {expected}, got {getattr(self, name)!r}")

        check("first_step", self.first_step >= 0, "0 or more updates")
        check("min_sec", self.min_sec >= 0, "0 or more seconds")
        check("max_sec", self.max_sec is None or self.max_sec > self.min_sec, "None or more seconds than min_sec")
        check("temperature", self.temperature > 0, "a number over 0")
        check("weights", all(factor >= 0 for _, factor in self.weights), "factors of 0 or more")
        for name in ("reference", "described", "prompt"):
            value = getattr(self, name)
            check(name, value is None or 0 <= value <= 1, "a share in [0, 1]")
        check("prompt", self.prompt is None or self.prompt < 1, "a share under 1: prompt clips bear no loss")


@dataclass(frozen=True)
class SampleConfig:
    """What a run says while it trains, for the ear and the eye."""

    every_steps: int = 0  # updates between two times; 0: never
    texts: tuple[str, ...] = ("one two three",)

    def __post_init__(self):
        _check_at_least(0, self, "samples", "every_steps")


# What the backward pass finds ready besides each layer's input, by name; all else in a layer it computes again. "attention"
# is the kernel's own state and exists on TPU alone. The figures of each policy stand in the README.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "narrow": ("q", "k", "v", "attention", "o"),  # gate and up again: the widest arrays, most of the products' work
    "products": ("q", "k", "v", "attention", "o", "gate", "up"),  # only norms, activations and softmax again
    "none": None,  # all that XLA wants to keep
}


@dataclass(frozen=True)
class ValidationConfig:
    """The loss of held-out clips; evaluate/validation.py."""

    every_steps: int = 1000  # updates between two times; 0: never
    max_clips: int = 512  # that are heard, spread evenly over all held-out ones
    seed: int = 0  # of noise, flow times and layouts, which a clip keeps for good; runs to be compared share it

    def __post_init__(self):
        if self.every_steps < 0 or self.max_clips < 1:
            raise UserError(f"validation: every_steps must be 0 or more, max_clips at least 1; got {self}")


@dataclass(frozen=True)
class BackboneRun:
    """One training run of the backbone; configs/backbone.py has the variants."""

    model: ModelConfig
    seed: int = 0  # of parameters, order and noise
    num_steps: int = 1000  # updates
    remat: str = "full"  # what the backward pass recomputes: one of REMAT_POLICIES
    remat_local: str | None = None  # the same for LocEnc and LocDiT, whose products are worth less for their bytes; None: remat
    diff_weight: float = 1.0  # x flow-matching loss
    stop_weight: float = 1.0  # x stop loss
    batch: BatchConfig = BatchConfig()
    accumulate: int = 1  # micro-batches that an update adds up: less memory, the same result
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    # Devices along (replica, data, tensor). One may be -1: what is left; replica and data both: a replica in each TPU slice.
    mesh: tuple[int, int, int] = (-1, -1, 1)
    patch_sec: float = 0.16  # seconds of a patch; the shards' header is checked against it
    stages: tuple[StageConfig, ...] = ()  # curriculum; none: all clips, as they are
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    samples: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()  # of held-out shards, if there are any

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        check("num_steps", self.num_steps >= 1, "at least 1")
        check("seed", 0 <= self.seed < 2**32, "0 or more, and less than 2^32")
        check("accumulate", self.accumulate >= 1, "at least 1")
        check("patch_sec", 0 < self.patch_sec < math.inf, "a number over 0")
        for name in ("diff_weight", "stop_weight"):
            check(name, 0 <= getattr(self, name) < math.inf, "a number of 0 or more")
        for name in ("remat", "remat_local"):
            is_known = getattr(self, name) in REMAT_POLICIES or (name == "remat_local" and self.remat_local is None)
            check(name, is_known, f"one of {', '.join(REMAT_POLICIES)}")
        for batch in (self.batch, *(stage.batch for stage in self.stages if stage.batch)):
            if batch.slots > self.model.max_length:
                raise UserError(f"batch.slots {batch.slots} exceed model.max_length {self.model.max_length}")
        start, steps = self.optim.decay_start, self.optim.decay_steps
        if start is not None and steps is not None and start < self.num_steps < start + steps:
            raise UserError(
                f"num_steps {self.num_steps} ends the run amid its decay, {steps} updates from optim.decay_start {start} on; "
                f"expected {start + steps} or more"
            )


# Whether a field of a run may differ from what its checkpoint was made with. FREE: yes. SCHEDULE: where a run branches off
# another (--resume-from). FIXED: the state would mean something else; only when told to. SHAPE: never, the saved arrays would
# not fit. The first pattern that "FIELD: OLD -> NEW" begins with counts; every field of a run has one.
FREE, SCHEDULE, FIXED, SHAPE = "free", "schedule", "fixed", "shape"
CHANGES: tuple[tuple[str, str, str], ...] = (
    (r"guard\.window\b", SHAPE, "size of what the guard remembers"),
    (r"optim\.(optimizer|mu_dtype)\b", SHAPE, "what the optimiser's moments are and are kept in"),
    (r"optim\.ema_decay: (None ->|.* -> None$)", SHAPE, "whether there are averages"),
    # How long, on what machine, and what is told of it. A schedule without schedule_steps is as long as the run: it stretches.
    (r"(num_steps|remat|remat_local|accumulate|mesh|model\.dtype|model\.max_length)\b", FREE, ""),
    (r"(checkpoint|log|samples|sample_every_steps|num_samples|validation|guard|watchdog|profile)\b", FREE, ""),
    # What another learning rate would be a surprise for in a run that goes on, and is the purpose of a branch.
    (r"optim\.(learning_rate|warmup_steps|schedule|schedule_steps|decay_(fraction|steps|start)|end_ratio)\b", SCHEDULE,
     "how far an update goes"),
    (r"optim\.(weight_decay|clip_norm)\b", SCHEDULE, "how far an update goes"),
    (r"optim\b", FIXED, "what the optimiser's moments and the averages are of"),
    (r"(model|vae)\b", FIXED, "what the weights are of"),
    (r"seed\b", FIXED, "order of the data, noise of every update"),
    (r"(batch|stages|rows|crop_frames)\b", FIXED, "which clips an update reads, which have been heard"),
    (r"(diff_weight|stop_weight|loss)\b", FIXED, "what is minimised"),
    (r"patch_sec\b", FIXED, "length of speech"),
    (r"data\b", FIXED, "what is heard, and what its latents and ids mean"),
)  # fmt: skip


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoConfig:
    """The corpus that is spoken on the spot: digit strings in English, some words of five other languages."""

    seed: int = 0
    num_digit_clips: int = 8000  # English training clips
    num_foreign_clips: int = 300  # at most 15 % of the training clips
    max_digits: int = 4  # of a string
    num_heldout: int = 50  # strings of 2 digits and more that are never in training

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"demo: {message}")

        check(self.num_digit_clips >= 1, f"num_digit_clips must be at least 1, got {self.num_digit_clips}")
        check(
            0 <= self.num_foreign_clips <= 0.15 * (self.num_digit_clips + self.num_foreign_clips),
            f"num_foreign_clips must be at most 15 % of all clips, got {self.num_foreign_clips} beside {self.num_digit_clips}",
        )
        check(2 <= self.max_digits <= 20, f"max_digits must lie in 2..20, got {self.max_digits}")
        check(
            0 <= self.num_heldout <= 50 * (self.max_digits - 1),
            f"num_heldout must lie in 0..{50 * (self.max_digits - 1)} (half of the 2-digit strings), got {self.num_heldout}",
        )


# The demo corpus by name, in rising size.
DEMOS = {
    "tiny": DemoConfig(num_digit_clips=60, num_foreign_clips=10, max_digits=2, num_heldout=8),
    "demo": DemoConfig(),
    "demo_long": DemoConfig(num_digit_clips=12_000, num_foreign_clips=400),
}


@dataclass(frozen=True)
class DebianConfig:
    """Real recordings out of Debian's packages: the voice prompts of the Asterisk telephone exchange."""

    seed: int = 0  # of what is held out
    languages: str = "en,es,fr,it,ru"  # some of these
    num_heldout: int = 20  # texts of each language that are never in training
    packages: str = ""  # directory with the .deb files; empty: apt-get downloads them

    def __post_init__(self):
        known = type(self).languages.split(",")
        chosen = self.languages.split(",")
        if len(set(chosen) & set(known)) < len(chosen):
            raise UserError(f"debian: languages must be some of {','.join(known)} with commas between, got {self.languages!r}")
        _check_at_least(0, self, "debian", "num_heldout")


@dataclass(frozen=True)
class PairsConfig:
    """Which clips may be a clip's reference: others of its speaker and session that sound alike; data/speaker.py.

    All but the encoder may change from one run of `prepare` to the next: the pairs are then chosen anew, and nothing else.
    """

    encoder: str = ""  # of voices: "resemblyzer", or "module:name" of one's own; empty: no pairs
    min_cosine: float = 0.7  # of two voices' embeddings: what is not above it is no pair
    references: int = 4  # k, clips that are kept to draw a clip's reference from
    min_sec: float = 1.0  # shorter clips are nobody's reference
    max_sec: float = 30.0  # longer clips are nobody's reference
    need_session: bool = False  # clips without a session: True: have no pairs; False: a speaker's are one session
    seed: int = 0  # of the choice

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"pairs: {message}")

        known = self.encoder in ("", "resemblyzer") or re.fullmatch(r"[\w.]+:\w+", self.encoder)
        check(known, f"encoder must be resemblyzer, MODULE:NAME or empty, got {self.encoder!r}")
        check(-1 <= self.min_cosine < 1, f"min_cosine must lie in [-1, 1), got {self.min_cosine}")
        check(self.references >= 1, f"references must be at least 1, got {self.references}")
        check(0 <= self.min_sec < self.max_sec, f"expected 0 <= min_sec < max_sec, got {self.min_sec} and {self.max_sec}")
        check(self.seed >= 0, f"seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True)
class DataConfig:
    """What `prepare` makes shards from; configs/data.py has the variants."""

    source: str = "demo"  # "demo": spoken on the spot; "debian": out of Debian's packages; "manifest": what one has
    demo: DemoConfig = DemoConfig()
    debian: DebianConfig = DebianConfig()
    manifest: str = ""  # JSON lines or tfds:NAME (data/corpus.py); several with commas between
    heldout: str = ""  # the same, for clips that are not trained on; they become shards of their own, OUTPUT/heldout
    tokenizer: str = ""  # directory or file; empty: a new vocabulary from the transcripts
    vocab_size: int = 512  # V of a new vocabulary
    vocab_temperature: float = 1.0  # a language counts its characters ** (1 / temperature) in it: over 1 is more even
    vocab_chars: int = 100_000_000  # most characters of text that it is learned from: bounds memory
    patch_size: int = 4  # P, latent frames in a patch
    trim: str = "none"  # cut at both ends: "silence", "vad" (what is no speech, silence or not), "none"
    trim_db: float = -50.0  # silence is this far below the loudest 10 ms
    trim_keep_ms: float = 200.0  # stays at each end, as far as it is there; "vad" hears soft consonants up to 120 ms late
    min_sec: float = 0.16  # shorter clips are left out
    max_sec: float = 60.0  # longer clips are left out
    latent_dtype: str = "float16"  # in the shards: "float16", "bfloat16", "float32"
    sentence_case: bool = False  # transcripts in capitals alone become small letters with capitals at sentence starts
    shard_clips: int = 4096  # recordings of one shard
    host: int = 0  # this machine makes shards host, host + num_hosts, ..
    num_hosts: int = 1
    encode_sec: float = 60.0  # seconds of audio the codec hears at once
    pairs: PairsConfig = PairsConfig()

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"data config: {message}")

        sources = ("demo", "debian", "manifest")
        check(self.source in sources, f"source must be one of {', '.join(sources)}, got {self.source!r}")
        check(self.source != "manifest" or self.manifest.strip(","), "source 'manifest' needs --config.manifest=FILE[,FILE]")
        check(self.source == "manifest" or not (self.manifest or self.heldout), "manifest and heldout need source 'manifest'")
        dtypes = ("float16", "bfloat16", "float32")
        check(self.latent_dtype in dtypes, f"latent_dtype must be one of {', '.join(dtypes)}, got {self.latent_dtype!r}")
        check(self.vocab_size > 104, f"vocab_size must be over 104 (the special ids), got {self.vocab_size}")
        check(self.vocab_temperature > 0, f"vocab_temperature must be over 0, got {self.vocab_temperature}")
        check(self.vocab_chars >= 1, f"vocab_chars must be at least 1, got {self.vocab_chars}")
        check(self.patch_size >= 1, f"patch_size must be at least 1, got {self.patch_size}")
        check(0 < self.min_sec < self.max_sec, f"expected 0 < min_sec < max_sec, got {self.min_sec} and {self.max_sec}")
        check(self.trim in ("none", "silence", "vad"), f"trim must be none, silence or vad, got {self.trim!r}")
        check(self.trim_db < 0, f"trim_db must be negative, got {self.trim_db}; to leave silence, set trim to none")
        check(self.trim_keep_ms >= 0, f"trim_keep_ms must be 0 or more, got {self.trim_keep_ms}")
        check(self.shard_clips >= 1, f"shard_clips must be at least 1, got {self.shard_clips}")
        check(0 <= self.host < self.num_hosts, f"host must lie in 0..num_hosts - 1, got {self.host} of {self.num_hosts}")
        check(self.encode_sec > 0, f"encode_sec must be over 0, got {self.encode_sec}")


# ---- codec run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the codec's losses; see vae/losses.py."""

    mel: float = 15.0
    spectrum: float = 0.25
    kl: float = 5e-5


@dataclass(frozen=True)
class VAERun:
    """One training run of the codec; configs/vae.py has the variants."""

    vae: AudioVAEConfig
    seed: int = 0  # of parameters, crops and noise
    num_steps: int = 1000  # updates
    rows: int = 8  # crops of a batch, over all hosts
    crop_frames: int = 25  # latent frames of a crop
    remat: bool = False  # recompute each block in the backward pass
    loss: VAELossConfig = VAELossConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    sample_every_steps: int = 1000  # updates between two reconstructions of held-out clips
    num_samples: int = 4  # held-out clips that are reconstructed

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"codec run: {name}: expected {expected}, got {getattr(self, name)!r}")

        for name in ("num_steps", "rows", "crop_frames", "sample_every_steps"):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("num_samples", self.num_samples >= 0, "0 or more")
        check("loss", min(self.loss.mel, self.loss.spectrum, self.loss.kl) >= 0, "weights of 0 or more")


# ---- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluateConfig:
    """What `evaluate` measures, and how; configs/evaluate.py has the variants."""

    # "words" (1 - WER) or "digits": what a judge's transcripts of the model's speech are scored by. "loss": of held-out
    # shards; the fields from `validation` on are for it, the others for speech.
    measure: str = "words"
    seed: int = 0  # of the first text's noise; text i takes seed + i
    cfg_value: float = 2.0  # guidance
    inference_timesteps: int = 10  # Euler steps a patch
    batch_texts: int = 16  # spoken together
    num_pictures: int = 4  # spectrograms of recording and speech side by side
    validation: ValidationConfig = ValidationConfig(max_clips=4096)
    batch: BatchConfig = BatchConfig(rows=4, slots=1024, patches=768)  # clips are heard in such batches

    def __post_init__(self):
        if self.measure not in ("words", "digits", "loss"):
            raise UserError(f"measure must be words, digits or loss, got {self.measure!r}")
        if self.batch_texts < 1 or self.num_pictures < 0:
            raise UserError(f"batch_texts must be at least 1 and num_pictures 0 or more; got {self}")
