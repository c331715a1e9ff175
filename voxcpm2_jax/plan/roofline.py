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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from voxcpm2_jax import flops
from voxcpm2_jax.chips import CHIPS, LINKS_REACHED
from voxcpm2_jax.config.model import MODELS, TransformerConfig
from voxcpm2_jax.config.run import REMAT_POLICIES, BackboneRun, BatchConfig
from voxcpm2_jax.flops import PRODUCTS, STACKS, layer_params, layer_widths, num_params
from voxcpm2_jax.plan.machine import Collective, Machine

# Share of slots and patches that a packed batch uses, and slots of a segment as attention meets them (squares / slots): of
# rows of 4,096 slots, log-normal speech (median 7 s) in 15 languages. `python tests/measure_mixing.py 1e6 1e7`.
SLOTS_USED, PATCHES_USED = 0.996, 0.985
SEGMENT_SLOTS = 117

PASSES = ("forward", "backward")


# ---- work ------------------------------------------------------------------------------------------------------------


def remat_of(config: BackboneRun, part: str) -> str:
    """The remat policy of a stack."""
    return config.remat_local or config.remat if part in ("locenc", "locdit") else config.remat


def saved_bytes(c: TransformerConfig, remat: str) -> int:
    """Bytes a position and layer, in bfloat16, that the backward pass finds saved: the layer's input and what is named."""
    D, QKV, O, F = layer_widths(c).values()
    saved = REMAT_POLICIES[remat]
    if saved is None:  # operands of all products, and what lies between them
        return 2 * (4 * D + 2 * QKV + O + 3 * F)
    K = c.num_kv_heads * c.head_dim
    widths = {"q": O, "k": K, "v": K, "attention": O, "o": D, "gate": F, "up": F}
    return 2 * (D + sum(widths[name] for name in saved))


# The array that tells whether a product's result is saved; "down" needs none, since nothing reads its result again.
_MADE_BY = {"qkv": "q", "o": "o", "gate_up": "gate"}


def recomputed_products(remat: str) -> tuple[str, ...]:
    """The products that the backward pass computes once more."""
    saved = REMAT_POLICIES[remat]
    return () if saved is None else tuple(product for product, array in _MADE_BY.items() if array not in saved)


def recomputes_attention(remat: str) -> bool:
    """Whether the backward pass runs attention's forward pass once more."""
    saved = REMAT_POLICIES[remat]
    return saved is not None and "attention" not in saved


def _moved_bytes(c: TransformerConfig, products: Iterable[str] = PRODUCTS) -> int:
    """Bytes a position and layer that these products read and write in a forward pass, with what is fused into them."""
    D, QKV, O, F = layer_widths(c).values()
    # Attention, which reads q, k and v, is counted with "o".
    moved = {"qkv": D + QKV, "o": QKV + O + O + 2 * D, "gate_up": D + F, "down": F + 2 * D}
    return 2 * sum(moved[name] for name in products)


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
    """Parts that the rows of a batch are split into."""
    return mesh[0] * mesh[1]


def row_sizes(batch: BatchConfig, rows: float) -> dict[str, float]:
    """What so many rows of a batch hold when they are full, as `flops.positions` takes it."""
    targets = batch.target_patches or batch.patches
    return {"slots": rows * batch.slots, "patches": rows * batch.patches, "targets": rows * targets}


def passes(config: BackboneRun, batch: BatchConfig, mesh: Sequence[int], *, skips_segments: bool) -> list[Pass]:
    """The work of one update by part and pass, on one device.

    Args:
        mesh: (replica, data, tensor), no -1.   skips_segments: attention computes nothing between segments.
    """
    model = config.model
    rows = batch.rows / row_shards(mesh)
    tensor, parts = mesh[2], config.accumulate
    sizes = row_sizes(batch, rows)
    positions_of = flops.positions(model, **sizes)
    causal = (min(SEGMENT_SLOTS, batch.slots) if skips_segments else batch.slots) / 2
    keys_of = {"tslm": causal, "ralm": causal, "locenc": model.locenc_slots, "locdit": model.locdit_slots}
    work = []
    for part in STACKS:
        c, remat = getattr(model, part), remat_of(config, part)
        positions, again = positions_of[part], recomputed_products(remat)
        L = c.num_layers
        products = 2.0 * L * positions * layer_params(c) / tensor
        attention = 4.0 * L * positions * keys_of[part] * c.num_heads * c.head_dim / tensor
        weights = 2.0 * L * parts * layer_params(c) / tensor
        moved, kept = L * positions * _moved_bytes(c) / tensor, L * positions * saved_bytes(c, remat)
        products_again = products * layer_params(c, again) / layer_params(c)
        weights_again = weights * layer_params(c, again) / layer_params(c)
        moved_again = moved * _moved_bytes(c, again) / _moved_bytes(c)
        work += [
            Pass(part, False, products, attention, weights + moved + kept, moved),
            # A backward product is two; attention's has five products for the forward's two (the logits once more).
            Pass(
                part,
                True,
                2 * products + products_again,
                (2.5 + recomputes_attention(remat)) * attention,
                2 * (weights + moved) + weights_again + moved_again + kept,
                2 * moved + moved_again,
            ),
        ]
    whole = flops.forward_flops(model, **sizes, squares=0)
    rest = sum(whole[name] for name in ("fsq", "projections", "stop"))
    width, local = model.tslm.width, model.locdit.width
    moved = 2.0 * (sizes["slots"] * 8 * width + sizes["targets"] * (4 * width + 8 * local))
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
    positions_of = flops.positions(config.model, **row_sizes(batch, batch.rows))
    for part in STACKS:
        c = getattr(config.model, part)
        times = c.num_layers * config.accumulate
        weights = 2 * layer_params(c) // tensor
        rows_bytes = int(2 * positions_of[part] / row_shards(mesh) / config.accumulate * c.width)
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
            sums = 2 + ("o" in recomputed_products(remat_of(config, part)))  # gradients of what "qkv" and "gate_up" read
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
    positions = flops.positions(model, **row_sizes(batch, rows))
    params = num_params(model)
    kept = sum(
        getattr(model, part).num_layers * positions[part] * saved_bytes(getattr(model, part), remat_of(config, part))
        for part in STACKS
    )
    # What a layer's backward pass holds at once: its own activations and about as many gradients of them.
    working = max(2 * positions[part] * saved_bytes(getattr(model, part), "none") / mesh[2] for part in STACKS)
    layer = max(layer_params(getattr(model, part)) for part in STACKS) / mesh[2]
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
    sizes = {"slots": _MEASURED_SLOTS, "patches": _MEASURED_PATCHES, "targets": _MEASURED_PATCHES}
    positions = flops.positions(model, **sizes)[part]
    again = recomputed_products("full")
    params, moved = (3 * count(c) + count(c, again) for count in (layer_params, _moved_bytes))
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
        useful_flops=flops.train_flops(
            config.model, slots=slots, patches=patches, targets=targets, squares=slots * min(SEGMENT_SLOTS, batch.slots)
        ),
        executed_flops=sum(p.flops for p in work) * row_shards(mesh) * mesh[2],
        audio_sec=patches * config.patch_sec,
        peak_flops=machine.devices * machine.flops,
    )
