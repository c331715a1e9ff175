"""What an update costs on chips that need not be there: FLOPs, bytes and seconds by part. The arithmetic behind `plan`.

    seconds of a pass = max(FLOPs / peak, HBM bytes / bandwidth, ICI bytes / links, DCN bytes / network)     the bound
    seconds of an update = those of its passes (forward and backward of each part) + the optimiser's HBM traffic

The bound lets everything overlap perfectly inside a pass. A collective is *exposed* where a layer's transfers take longer
than the layer's own work, so that no schedule can hide them; those outside of the layers may also run beside LocEnc. The
calibrated figure has no such optimism: products run at the share of the peak, and all around them at the share of the
memory's bandwidth, that one H100 was measured to reach.

What is counted: products and attention as they are executed (padding, recomputation, and all of the causal triangle where
a kernel does not skip other segments); in HBM each product's operands and result once, in bfloat16, norms and activations
fused into them, weights once a pass, what the backward pass keeps, and the optimiser's state.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from voxcpm2_jax import metrics
from voxcpm2_jax.chips import CHIPS, LINKS_REACHED, Chip, rings
from voxcpm2_jax.config import MODELS, BackboneRun, BatchConfig, ModelConfig, TransformerConfig

# Share of slots and patches that a packed batch uses, and slots of a segment as attention meets them (squares / slots): of
# rows of 4,096 slots, log-normal speech (median 7 s) in 15 languages. `python tests/measure_mixing.py 1e6 1e7`.
SLOTS_USED, PATCHES_USED = 0.996, 0.985
SEGMENT_SLOTS = 117

STACKS = ("locenc", "tslm", "ralm", "locdit")
PASSES = ("forward", "backward")


# ---- machines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Chips joined by fast links into `slices`, and slices by a network."""

    name: str
    chip: Chip
    slices: int  # TPU slices; NVLink domains of GPUs
    torus: tuple[int, ...] | None  # chips of a slice along each dimension; None: all of a slice reach all others alike
    slice_chips: int

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.slices * self.slice_chips * self.chip.devices

    @property
    def slice_devices(self) -> int:
        return self.slice_chips * self.chip.devices

    @property
    def flops(self) -> float:
        return self.chip.device_flops

    @property
    def hbm_bytes(self) -> float:
        return self.chip.device_hbm_bytes

    @property
    def hbm_bytes_per_sec(self) -> float:
        return self.chip.hbm_bytes_per_sec / self.chip.devices

    @property
    def dcn_bytes_per_sec(self) -> float:
        """The network's share of a device; the slowest link, where the maker names no network."""
        return (self.chip.dcn_bytes_per_sec or self.chip.ici_bytes_per_sec) / self.chip.devices

    def links(self, spans: Sequence[int] | None) -> float:
        """Bytes a second that a device of a collective takes in over its links.

        Args:
            spans: chips that the group covers along each dimension of the torus, and 1 along what more coordinates JAX has;
                None where there is no torus.
        A ring fills both links of a dimension. The line of a dimension that is not closed, or not covered whole, fills one:
        its end has no other.
        """
        link = self.chip.ici_bytes_per_sec / self.chip.devices
        if self.torus is None or spans is None:
            return link * self.chip.ici_links
        used = sum(2 if self._is_ring(i, n) else 1 for i, n in enumerate(spans) if n > 1)
        return link * max(used, 1)

    def detour(self, spans: Sequence[int] | None) -> float:
        """How much longer an all-to-all takes than a device's bytes over its links: most go through others on their way.

        Half of the bytes cross the middle of a dimension of n chips: n / 4 times a chip's over one link, on a ring over two.
        """
        if self.torus is None or spans is None:
            return 1.0
        crossed = max((n / (8 if self._is_ring(i, n) else 4) for i, n in enumerate(spans) if n > 1), default=0.0)
        return max(1.0, crossed * self.links(spans) * self.chip.devices / self.chip.ici_bytes_per_sec)

    def _is_ring(self, dimension: int, span: int) -> bool:
        return span == self.torus[dimension] and rings(self.torus)[dimension]

    def spans(self, devices: int) -> tuple[int, ...] | None:
        """Chips along each dimension of a group of that many devices of one slice, side by side."""
        if self.torus is None:
            return None
        left, spans = max(devices // self.chip.devices, 1), []
        for size in reversed(self.torus):
            n = math.gcd(left, size)
            spans.append(n)
            left //= n
        return tuple(reversed(spans))


# ---- collectives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """One collective of the program, `times` an update."""

    kind: str  # "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
    part: str  # a stack, or "rest"
    backward: bool
    times: int
    whole_bytes: int  # the gathered result, the reduced operand
    group: int  # devices that take part
    group_in_slice: int  # those of them in one slice
    spans: tuple[int, ...] | None = None  # chips that the group covers along the slice's dimensions
    axes: tuple[str, ...] = ()  # of the mesh

    def wire_bytes(self) -> tuple[float, float]:
        """(ICI, DCN) bytes that a device takes in, once.

        Between slices each device moves its share of what its slice lacks; inside, the links spread it.
        """
        n, m, whole = self.group, self.group_in_slice, self.whole_bytes
        if self.kind == "collective-permute":
            return (0.0, whole) if m == 1 < n else (whole, 0.0)
        if self.kind == "all-to-all":
            return whole * (m - 1) / n, whole * (n - m) / n
        twice = 2.0 if self.kind == "all-reduce" else 1.0
        return twice * whole * (m - 1) / m, twice * whole * (n - m) / n / m

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """(ICI, DCN) seconds, once, at the links' peak."""
        ici, dcn = self.wire_bytes()
        spans = self.spans
        if self.kind == "collective-permute" and machine.torus is not None:
            spans = (1,) * len(machine.torus)  # a neighbour is reached over one link
        slower = machine.detour(spans) if self.kind == "all-to-all" else 1.0
        return ici * slower / machine.links(spans), dcn / machine.dcn_bytes_per_sec


# ---- work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remat:
    """A policy of the backward pass: what of a layer it finds ready, and what it computes once more."""

    kept: tuple[str, ...]  # arrays, named as in `_widths`
    again: tuple[str, ...] = ()  # products, named as in `_products`; none needs what "down" made
    attention: float = 0.0  # share of attention's forward work


# config.REMAT_POLICIES.
REMATS = {
    "full": Remat(("D",), ("qkv", "o", "gate_up"), 1.0),
    "narrow": Remat(("D", "QKV", "O", "D"), ("gate_up",)),
    "products": Remat(("D", "QKV", "O", "D", "F", "F")),
    "none": Remat(("D", "D", "D", "D", "QKV", "QKV", "O", "F", "F", "F")),
}


def remat_of(config: BackboneRun, part: str) -> str:
    """The policy of a stack."""
    return config.remat_local or config.remat if part in ("locenc", "locdit") else config.remat


def _widths(c: TransformerConfig) -> dict[str, int]:
    return {
        "D": c.width,
        "QKV": (c.num_heads + 2 * c.num_kv_heads) * c.head_dim,
        "O": c.num_heads * c.head_dim,
        "F": c.mlp_width,
    }


def kept_bytes(c: TransformerConfig, remat: str) -> int:
    """Bytes a position and layer that wait for the backward pass, in bfloat16."""
    widths = _widths(c)
    return 2 * sum(widths[name] for name in REMATS[remat].kept)


_PRODUCTS = ("qkv", "o", "gate_up", "down")


def _products(c: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Each product of a layer: its parameters, and the elements a position that it reads and writes with what is fused."""
    D, QKV, O, F = _widths(c).values()
    return {
        "qkv": (D * QKV, D + QKV),
        "o": (O * D, QKV + O + O + 2 * D),  # with attention, which reads q, k, v
        "gate_up": (2 * D * F, D + F),
        "down": (F * D, F + 2 * D),
    }


def _moved_bytes(c: TransformerConfig, products: Iterable[str] = _PRODUCTS) -> int:
    """Bytes a position and layer that these products read and write in a forward pass."""
    return 2 * sum(_products(c)[name][1] for name in products)


def _layer_params(c: TransformerConfig, products: Iterable[str] = _PRODUCTS) -> int:
    return sum(_products(c)[name][0] for name in products)


def num_params(model: ModelConfig) -> int:
    """Parameters of the backbone's matrices; norms, biases and the special token are some 0.03 % more."""
    width, local, C, Q = model.tslm.width, model.locdit.width, model.feat_dim, model.scalar_quantization_latent_dim
    stacks = sum(getattr(model, part).num_layers * _layer_params(getattr(model, part)) for part in STACKS)
    rest = (
        model.lm_config.vocab_size * width
        + C * model.locenc.width
        + 3 * C * local
        + 4 * local * local
        + 2 * width * Q
        + model.locenc.width * width
        + 2 * width * local
        + 3 * width * width
        + 2 * width
    )
    return stacks + rest


@dataclass(frozen=True)
class Pass:
    """One part's forward or backward work in an update, on one device; sums over its layers and micro-batches."""

    part: str
    backward: bool
    product_flops: float
    attention_flops: float
    hbm_bytes: float
    moved_bytes: float  # those of them that are operands and results of products, weights apart

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops


def row_shards(mesh: Sequence[int]) -> int:
    return mesh[0] * mesh[1]


def passes(config: BackboneRun, batch: BatchConfig, mesh: Sequence[int], *, skips_segments: bool) -> list[Pass]:
    """The work of one update by part and pass, on one device.

    Args:
        mesh: (replica, data, tensor), no -1.   skips_segments: attention computes nothing between segments.
    """
    model = config.model
    rows = batch.rows / row_shards(mesh)
    tensor, parts = mesh[2], config.accumulate
    targets = batch.target_patches or batch.patches
    pairs = rows * batch.slots * (min(SEGMENT_SLOTS, batch.slots) if skips_segments else batch.slots) / 2
    enc_rows, dit_rows = 1 + model.patch_size, 3 + 2 * model.patch_size
    sizes = {
        "tslm": (rows * batch.slots, pairs),
        "ralm": (rows * batch.slots, pairs),
        "locenc": (rows * batch.patches * enc_rows, rows * batch.patches * enc_rows**2),
        "locdit": (rows * targets * dit_rows, rows * targets * dit_rows**2),
    }
    work = []
    for part in STACKS:
        c, remat = getattr(model, part), REMATS[remat_of(config, part)]
        positions, pairs_of_part = sizes[part]
        L = c.num_layers
        products = 2.0 * L * positions * _layer_params(c) / tensor
        attention = 4.0 * L * pairs_of_part * c.num_heads * c.head_dim / tensor
        weights = 2.0 * L * parts * _layer_params(c) / tensor
        moved, kept = L * positions * _moved_bytes(c) / tensor, L * positions * kept_bytes(c, remat_of(config, part))
        products_again = products * _layer_params(c, remat.again) / _layer_params(c)
        weights_again = weights * _layer_params(c, remat.again) / _layer_params(c)
        moved_again = moved * _moved_bytes(c, remat.again) / _moved_bytes(c)
        work += [
            Pass(part, False, products, attention, weights + moved + kept, moved),
            # A backward product is two; attention's has five products for the forward's two (the logits once more).
            Pass(
                part,
                True,
                2 * products + products_again,
                (2.5 + remat.attention) * attention,
                2 * (weights + moved) + weights_again + moved_again + kept,
                2 * moved + moved_again,
            ),
        ]
    whole = metrics.forward_flops(
        model, slots=rows * batch.slots, patches=rows * batch.patches, targets=rows * targets, squares=0
    )
    rest = sum(whole[name] for name in ("fsq", "projections", "stop"))
    moved = 2.0 * rows * (batch.slots * 8 * model.tslm.width + targets * (4 * model.tslm.width + 8 * model.locdit.width))
    work += [Pass("rest", False, rest, 0.0, moved, moved), Pass("rest", True, 2 * rest, 0.0, 2 * moved, 2 * moved)]
    return work


def layer_collectives(config: BackboneRun, batch: BatchConfig, machine: Machine, mesh: Sequence[int]) -> list[Collective]:
    """The collectives of the layers as FSDP and tensor parallelism need them, for a program that was not compiled.

    Weights are gathered in bfloat16 before each layer's forward and backward pass; their gradients are all-reduced over
    all that read other rows (what XLA makes of it, where a reduce-scatter would do with half).
    """
    replica, data, tensor = mesh
    per_slice = machine.slice_devices

    def group(n: int, stride: int) -> tuple[int, int, tuple[int, ...] | None]:
        """n devices, `stride` apart: how many of them are in a slice, and where."""
        inside = max(1, min(n, per_slice // stride)) if stride <= per_slice else 1
        return n, inside, machine.spans(min(inside * stride, per_slice))

    found = []
    for part in STACKS:
        c = getattr(config.model, part)
        times = c.num_layers * config.accumulate
        weights = 2 * _layer_params(c) // tensor
        positions = batch.rows * (
            batch.slots
            if part in ("tslm", "ralm")
            else batch.patches * (1 + config.model.patch_size)
            if part == "locenc"
            else (batch.target_patches or batch.patches) * (3 + 2 * config.model.patch_size)
        )
        rows_bytes = int(2 * positions / row_shards(mesh) / config.accumulate * c.width)
        if data > 1:
            n, inside, spans = group(data, tensor)
            for backward in (False, True):
                found.append(Collective("all-gather", part, backward, times, weights, n, inside, spans, ("data",)))
        if replica * data > 1:
            n, inside, spans = group(replica * data, tensor)
            axes = tuple(name for name, size in (("replica", replica), ("data", data)) if size > 1)
            found.append(Collective("all-reduce", part, True, times, weights, n, inside, spans, axes))
        if tensor > 1:
            n, inside, spans = group(tensor, 1)
            sums = 2 + ("o" in REMATS[remat_of(config, part)].again)  # gradients of what "qkv" and "gate_up" read
            found.append(Collective("all-reduce", part, False, 2 * times, rows_bytes, n, inside, spans, ("tensor",)))
            found.append(Collective("all-reduce", part, True, sums * times, rows_bytes, n, inside, spans, ("tensor",)))
    return found


def update_bytes(config: BackboneRun, mesh: Sequence[int]) -> float:
    """HBM bytes that the optimiser reads and writes on one device: gradients, weights, moments, average."""
    params = num_params(config.model) / (mesh[1] * mesh[2])
    return params * (4 + 2 * state_bytes_per_param(config))


def state_bytes_per_param(config: BackboneRun) -> int:
    """Float32 weights, the optimiser's moments, the average. Muon has one moment; what it leaves to AdamW is not counted."""
    first = 2 if config.optim.mu_dtype == "bfloat16" else 4
    second = 0 if config.optim.optimizer == "muon" else 4
    return 4 + first + second + (0 if config.optim.ema_decay is None else 4)


def memory(config: BackboneRun, batch: BatchConfig, mesh: Sequence[int]) -> dict[str, float]:
    """Bytes on one device by kind, estimated; where there is a compiler, it knows better."""
    model = config.model
    shards = mesh[1] * mesh[2]
    rows = batch.rows / row_shards(mesh) / config.accumulate
    targets = batch.target_patches or batch.patches
    positions = {
        "tslm": rows * batch.slots,
        "ralm": rows * batch.slots,
        "locenc": rows * batch.patches * (1 + model.patch_size),
        "locdit": rows * targets * (3 + 2 * model.patch_size),
    }
    params = num_params(model)
    kept = sum(
        getattr(model, part).num_layers * positions[part] * kept_bytes(getattr(model, part), remat_of(config, part))
        for part in STACKS
    )
    # What a layer's backward pass holds at once: its own activations and about as many gradients of them.
    working = max(2 * positions[part] * kept_bytes(getattr(model, part), "none") / mesh[2] for part in STACKS)
    layer = max(_layer_params(getattr(model, part)) for part in STACKS) / mesh[2]
    return {
        "state": params * state_bytes_per_param(config) / shards,
        "gradients": 4.0 * params / shards,
        "kept for the backward pass": kept,
        "one layer's backward pass": working,
        "weights of two layers, gradients of one": 2 * 2 * layer + 2 * layer if shards > 1 else 0.0,
    }


# ---- seconds ---------------------------------------------------------------------------------------------------------

# Measured on one H100 80 GB, released shape, 8,192 slots and 5,248 patches, cuDNN attention on packed rows, full remat:
# seconds of forward and backward, and of AdamW in float32. Products ran at 510 TFLOP/s (790 for a large one alone).
_MEASURED_SEC = {"tslm": 0.177, "ralm": 0.051, "locdit": 0.240, "locenc": 0.105}
_MEASURED_UPDATE_SEC = 0.037
_MEASURED_SLOTS, _MEASURED_PATCHES = 8192, 5248
_MEASURED_PRODUCT_FLOPS = 510e12


def products_reached() -> float:
    """Share of the peak that products of this size reach."""
    return _MEASURED_PRODUCT_FLOPS / CHIPS["h100"].peak_bf16_flops


@functools.cache
def _around(part: str) -> float:
    """Measured seconds around a stack's products, by those that moving `_moved_bytes` once would take at full bandwidth."""
    model = MODELS["2b"]
    c = getattr(model, part)
    positions = {
        "tslm": _MEASURED_SLOTS,
        "ralm": _MEASURED_SLOTS,
        "locenc": _MEASURED_PATCHES * (1 + model.patch_size),
        "locdit": _MEASURED_PATCHES * (3 + 2 * model.patch_size),
    }[part]
    again = REMATS["full"].again
    params, moved = (3 * count(c) + count(c, again) for count in (_layer_params, _moved_bytes))
    product_sec = 2.0 * c.num_layers * positions * params / _MEASURED_PRODUCT_FLOPS
    moved_sec = c.num_layers * positions * moved / CHIPS["h100"].hbm_bytes_per_sec
    return (_MEASURED_SEC[part] - product_sec) / moved_sec


@dataclass(frozen=True)
class Seconds:
    """A pass by what could hold it up; all of an update, on one device."""

    part: str
    backward: bool
    compute: float
    hbm: float
    ici: float
    dcn: float
    calibrated_compute: float  # products and all around them, as an H100 would reach
    beside: float = 0.0  # other work that the transfers may run beside

    @property
    def bound(self) -> float:
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def exposed(self) -> float:
        """What of the transfers no schedule can hide."""
        return max(0.0, max(self.ici, self.dcn) - self.work - self.beside)

    @property
    def work(self) -> float:
        return max(self.compute, self.hbm)

    @property
    def calibrated(self) -> float:
        return max(self.calibrated_compute, self.ici / LINKS_REACHED, self.dcn / LINKS_REACHED)


@dataclass(frozen=True)
class Prediction:
    """An update on a machine, predicted."""

    passes: tuple[Seconds, ...]
    update_sec: float
    calibrated_update_sec: float
    useful_flops: float  # of all devices
    executed_flops: float
    audio_sec: float  # that the batch holds
    peak_flops: float  # of all devices

    @property
    def bound_sec(self) -> float:
        return sum(p.bound for p in self.passes) + self.update_sec

    @property
    def calibrated_sec(self) -> float:
        return sum(p.calibrated for p in self.passes) + self.calibrated_update_sec

    @property
    def exposed_sec(self) -> float:
        return sum(p.exposed for p in self.passes)

    def mfu(self, step_sec: float) -> float:
        return self.useful_flops / (step_sec * self.peak_flops)

    def audio_hours_per_day(self, step_sec: float) -> float:
        return self.audio_sec / step_sec * 24.0


def predict(
    config: BackboneRun, batch: BatchConfig, machine: Machine, mesh: Sequence[int], collectives: Iterable[Collective]
) -> Prediction:
    """The roofline of one update, and what measured efficiencies make of it.

    Args:
        collectives: of the compiled program, or `layer_collectives`.
    """
    work = passes(config, batch, mesh, skips_segments=machine.torus is None)
    ici, dcn = {}, {}
    for one in collectives:
        key = one.part, one.backward
        ici_sec, dcn_sec = one.seconds(machine)
        ici[key] = ici.get(key, 0.0) + one.times * ici_sec
        dcn[key] = dcn.get(key, 0.0) + one.times * dcn_sec
    rows = []
    for p in work:
        key = p.part, p.backward
        around = 0.0 if p.part == "rest" else _around(p.part)
        rows.append(
            Seconds(
                *key,
                compute=p.flops / machine.flops,
                hbm=p.hbm_bytes / machine.hbm_bytes_per_sec,
                ici=ici.get(key, 0.0),
                dcn=dcn.get(key, 0.0),
                calibrated_compute=p.flops / (products_reached() * machine.flops)
                + around * p.moved_bytes / machine.hbm_bytes_per_sec,
            )
        )
    # What lies outside of the layers (text's embeddings, weights and gradients of projections) needs nothing that LocEnc makes.
    idle = {p.backward: max(0.0, p.work - max(p.ici, p.dcn)) for p in rows if p.part == "locenc"}
    rows = [dataclasses.replace(p, beside=idle[p.backward]) if p.part == "rest" else p for p in rows]
    update_sec = update_bytes(config, mesh) / machine.hbm_bytes_per_sec
    # AdamW in float32 reads gradient, weight and two moments, and writes all but the gradient: 28 bytes a parameter.
    ideal_sec = 28.0 * num_params(MODELS["2b"]) / CHIPS["h100"].hbm_bytes_per_sec
    slots, patches = batch.rows * batch.slots * SLOTS_USED, batch.rows * batch.patches * PATCHES_USED
    targets = min(patches, batch.rows * (batch.target_patches or batch.patches) * PATCHES_USED)
    return Prediction(
        passes=tuple(rows),
        update_sec=update_sec,
        calibrated_update_sec=update_sec * _MEASURED_UPDATE_SEC / ideal_sec,
        useful_flops=metrics.train_flops(
            config.model, slots=slots, patches=patches, targets=targets, squares=slots * min(SEGMENT_SLOTS, batch.slots)
        ),
        executed_flops=sum(p.flops for p in work) * row_shards(mesh) * mesh[2],
        audio_sec=patches * config.patch_sec,
        peak_flops=machine.devices * machine.flops,
    )
