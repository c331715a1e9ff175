"""FLOPs, bytes, memory and seconds of one update, part by part, by arithmetic alone.

    seconds of a pass    = max(FLOPs / peak, HBM bytes / bandwidth, ICI bytes / links, DCN bytes / network)
    seconds of an update = sum over the passes (forward and backward of each part) + the optimiser's HBM bytes / bandwidth

This is the *bound*: everything inside a pass overlaps perfectly at the vendor's peak rates. A transfer is *exposed* where it
takes longer than the pass's own work, so that no schedule can hide it; transfers outside the layers ("rest") may also overlap
with LocEnc, which does not depend on them.

The *rule of thumb* replaces the peaks by efficiencies measured on one NVIDIA H100 80 GB, 2026-11-23. What was measured
was a plain-JAX sketch of the released shape, not this package's code: the figures stand at `_MEASURED_SEC`. For
other chips they are an assumption: no TPU has been measured.

FLOPs are counted as executed: padding, recomputation, and the whole causal triangle unless the kernel skips other segments.
HBM bytes are each product's operands and result once, in bfloat16 (norms and activations are assumed to be fused into the
products), weights once per pass, activations saved for the backward pass, and the optimiser's state.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from voxcpm2_jax import flops, sharding
from voxcpm2_jax.chips import CHIPS, LINKS_REACHED
from voxcpm2_jax.config.model import MODELS, TransformerConfig
from voxcpm2_jax.config.run import REMAT_POLICIES, BackboneRun, BatchConfig
from voxcpm2_jax.flops import PRODUCTS, STACKS, layer_params, layer_widths, num_params
from voxcpm2_jax.plan.machine import Collective, Machine

# Assumed shares of a batch's slots and patches that hold speech. `python tests/measure_mixing.py 1e6` prints 0.9957 and
# 0.9851 for log-normal synthetic lengths (median 7 s, sigma 0.6, 1 to 30 s; 3.2 text tokens per second) in rows of 4,096 slots
# and 2,680 patches, the budget recommended for these lengths. The same clips fill 0.937 of the 2,816 patches of
# configs/backbone.py:2b, for which hours of audio are therefore 5 % too high here.
SLOTS_USED, PATCHES_USED = 0.996, 0.985
# Assumed length of the segment in which a slot lies, averaged over slots (sum of squared lengths / slots). No command prints
# it; the clips above have 111. The difference changes the useful FLOPs of the released shape by less than 0.1 %.
SEGMENT_SLOTS = 117

PASSES = ("forward", "backward")


# ---- remat -----------------------------------------------------------------------------------------------------------


def remat_of(config: BackboneRun, part: str) -> str:
    """The remat policy of a stack."""
    local = config.remat_local or config.remat
    return {"locenc": local, "locdit": config.remat_locdit or local}.get(part, config.remat)


def eight_bits_of(config: BackboneRun, part: str) -> str | None:
    """The 8-bit products of a stack; None: it multiplies in bfloat16. In mean mode LocDiT does neither."""
    is_float32 = part == "locdit" and config.model.dit_config.dit_mean_mode
    return None if is_float32 else config.products


def positions_at_once(config: BackboneRun, part: str, positions: float) -> float:
    """Of the positions of a stack on one device, those that one chunk has (models/chunks.py); all but for LocDiT."""
    if part != "locdit" or not config.locdit_at_once or config.mesh[2] != 1:
        return positions
    return min(positions, config.locdit_at_once * config.model.locdit_slots)


def saved_bytes(c: TransformerConfig, remat: str) -> int:
    """Bytes per position and layer that are saved for the backward pass, in bfloat16: the layer's input and named arrays."""
    width, qkv, attention, mlp = layer_widths(c).values()
    saved = REMAT_POLICIES[remat]
    if saved is None:  # the operands of all products, and the arrays between them
        return 2 * (4 * width + 2 * qkv + attention + 3 * mlp)
    kv = c.num_kv_heads * c.head_dim
    widths = {"q": attention, "k": kv, "v": kv, "attention": attention, "o": width, "gate": mlp, "up": mlp}
    return 2 * (width + sum(widths[name] for name in saved))


# The saved array that spares the backward pass a product. "down" is never recomputed: no gradient reads its result.
_RESULT_OF = {"qkv": "q", "o": "o", "gate": "gate", "up": "up"}


def recomputed_products(remat: str) -> tuple[str, ...]:
    """The products that the backward pass computes again."""
    saved = REMAT_POLICIES[remat]
    return () if saved is None else tuple(product for product, array in _RESULT_OF.items() if array not in saved)


def recomputes_attention(remat: str) -> bool:
    """Whether the backward pass runs attention's forward pass again."""
    saved = REMAT_POLICIES[remat]
    return saved is not None and "attention" not in saved


# ---- work ------------------------------------------------------------------------------------------------------------


def _moved_bytes(c: TransformerConfig, products: Iterable[str] = PRODUCTS) -> int:
    """Bytes per position and layer that these products, and the operations fused into them, read and write going forward."""
    width, qkv, attention, mlp = layer_widths(c).values()
    # "o" includes attention, which reads q, k and v. Together, "gate" and "up" read x once and write h.
    moved = {
        "qkv": width + qkv, "o": qkv + attention + attention + 2 * width, "gate": width, "up": mlp, "down": mlp + 2 * width
    }  # fmt: skip
    return 2 * sum(moved[name] for name in products)


@dataclass(frozen=True)
class Pass:
    """Work of one part's forward or backward pass in an update, on one device, over all its layers and micro-batches."""

    part: str
    backward: bool
    product_flops: float
    attention_flops: float
    hbm_bytes: float
    moved_bytes: float  # share of hbm_bytes that is operands and results of products, without weights
    eight_bit_flops: float = 0.0  # share of product_flops that is multiplied in 8 bits, twice as fast as in bfloat16

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops

    @property
    def bf16_flops(self) -> float:
        """The FLOPs of bfloat16 products that take as long at the peak."""
        return self.flops - self.eight_bit_flops / 2


def row_shards(mesh: Sequence[int]) -> int:
    """Number of parts that the rows of a batch are split into."""
    return mesh[0] * mesh[1]


def row_sizes(batch: BatchConfig, rows: float) -> dict[str, float]:
    """Slots, patches and targets of so many full rows, as `flops.positions` takes them."""
    targets = batch.target_patches or batch.patches
    return {"slots": rows * batch.slots, "patches": rows * batch.patches, "targets": rows * targets}


def passes(config: BackboneRun, batch: BatchConfig, mesh: Sequence[int], *, skips_segments: bool) -> list[Pass]:
    """The work of one update on one device, by part and pass.

    Args:
        mesh: (replica, data, tensor), no -1.   skips_segments: the attention kernel computes nothing between segments.
    """
    model = config.model
    rows = batch.rows / row_shards(mesh)
    tensor, parts = mesh[2], config.accumulate
    sizes = row_sizes(batch, rows)
    positions_of = flops.positions(model, **sizes)
    window = min(batch.clip_slots or batch.slots, batch.slots)  # what a kernel looks at that does not skip other segments
    causal = min(SEGMENT_SLOTS, batch.slots) / 2 if skips_segments else window * (1 - window / (2 * batch.slots))
    keys_of = {"tslm": causal, "ralm": causal, "locenc": model.locenc_slots, "locdit": model.locdit_slots}
    work = []
    for part in STACKS:
        c, remat = getattr(model, part), remat_of(config, part)
        positions, again = positions_of[part], recomputed_products(remat)
        L = c.num_layers
        products = 2.0 * L * positions * layer_params(c) / tensor
        attention = 4.0 * L * positions * keys_of[part] * c.num_heads * c.head_dim / tensor
        is_short = eight_bits_of(config, part) is not None
        num_chunks = positions / parts / positions_at_once(config, part, positions / parts)
        weights = (1.0 if is_short else 2.0) * L * parts * num_chunks * layer_params(c) / tensor
        moved, kept = L * positions * _moved_bytes(c) / tensor, L * positions * saved_bytes(c, remat)
        products_again = products * layer_params(c, again) / layer_params(c)
        weights_again = weights * layer_params(c, again) / layer_params(c)
        moved_again = moved * _moved_bytes(c, again) / _moved_bytes(c)
        work += [
            Pass(part, False, products, attention, weights + moved + kept, moved, is_short * products),
            # Backward, each product becomes two, of which one, the weight's gradient, is never multiplied in 8 bits; attention
            # has five where forward has two (the logits are recomputed).
            Pass(
                part,
                True,
                2 * products + products_again,
                (2.5 + recomputes_attention(remat)) * attention,
                2 * (weights + moved) + weights_again + moved_again + kept,
                2 * moved + moved_again,
                is_short * (products + products_again),
            ),
        ]
    whole = flops.forward_flops(model, **sizes, squares=0)
    rest = sum(whole[name] for name in ("fsq", "projections", "stop"))
    width, local = model.tslm.width, model.locdit.width
    moved = 2.0 * (sizes["slots"] * 8 * width + sizes["targets"] * (4 * width + 8 * local))
    work += [Pass("rest", False, rest, 0.0, moved, moved), Pass("rest", True, 2 * rest, 0.0, 2 * moved, 2 * moved)]
    return work


def layer_collectives(config: BackboneRun, batch: BatchConfig, machine: Machine, mesh: Sequence[int]) -> list[Collective]:
    """The collectives of the layers under FSDP and tensor parallelism, for a program that is not compiled.

    Weights are gathered in bfloat16, or in 8 bits, before each layer's forward and backward pass. Gradients are all-reduced in
    float32 over replica and data, as XLA does it; a reduce-scatter would move half as much.
    """
    replica, data, tensor = mesh
    per_slice = machine.slice_devices

    def group(n: int, stride: int) -> tuple[int, int, tuple[int, ...] | None]:
        """n devices, `stride` apart -> n, how many of them lie in a slice, the chips that those span."""
        inside = max(1, min(n, per_slice // stride)) if stride <= per_slice else 1
        return n, inside, machine.spans(min(inside * stride, per_slice))

    found = []
    positions_of = flops.positions(config.model, **row_sizes(batch, batch.rows))
    for part in STACKS:
        c = getattr(config.model, part)
        times = c.num_layers * config.accumulate
        gradients = 4 * layer_params(c) // tensor
        weights = gradients // (2 if eight_bits_of(config, part) is None else 4)
        rows_bytes = int(2 * positions_of[part] / row_shards(mesh) / config.accumulate * c.width)
        if data > 1:
            n, inside, spans = group(data, tensor)
            for backward in (False, True):
                found.append(Collective("all-gather", part, backward, times, weights, n, inside, spans, ("data",)))
        if replica * data > 1:
            n, inside, spans = group(replica * data, tensor)
            axes = tuple(name for name, size in (("replica", replica), ("data", data)) if size > 1)
            found.append(Collective("all-reduce", part, True, times, gradients, n, inside, spans, axes))
        if tensor > 1:
            n, inside, spans = group(tensor, 1)
            sums = 2 + (
                "o" in recomputed_products(remat_of(config, part))
            )  # gradients of the inputs of "qkv", and of "gate" and "up"
            found.append(Collective("all-reduce", part, False, 2 * times, rows_bytes, n, inside, spans, ("tensor",)))
            found.append(Collective("all-reduce", part, True, sums * times, rows_bytes, n, inside, spans, ("tensor",)))
    return found


def positions_for_gathers(
    config: BackboneRun, batch: BatchConfig, machine: Machine, mesh: Sequence[int]
) -> tuple[float, float] | None:
    """Positions that FSDP needs to hide its gathers behind a forward pass at peak speed, and those a device has at least.

    Returns:
        (needed, present) per micro-batch; None without FSDP (data = 1).
    """
    _, data, tensor = mesh
    if data == 1:
        return None
    group = (data * tensor,) if machine.torus is None else machine.spans(data * tensor)
    rows = batch.rows / row_shards(mesh) / config.accumulate
    present = min(flops.positions(config.model, **row_sizes(batch, rows)).values())
    return sharding.positions_to_hide(machine.chip, group, machine.torus), present


def update_bytes(config: BackboneRun, mesh: Sequence[int]) -> float:
    """HBM bytes that the optimiser reads and writes on one device: gradients, weights, moments, averaged weights."""
    params = num_params(config.model) / (mesh[1] * mesh[2])
    return params * (4 + 2 * state_bytes_per_param(config))


def state_bytes_per_param(config: BackboneRun) -> int:
    """Bytes of float32 weights, moments and averaged weights per parameter.

    Muon is counted with one moment everywhere, although it leaves some parameters to AdamW.
    """
    first = 2 if config.optim.mu_dtype == "bfloat16" else 4
    second = 0 if config.optim.optimizer == "muon" else 4
    return 4 + first + second + (0 if config.optim.ema_decay is None else 4)


def memory(config: BackboneRun, batch: BatchConfig, mesh: Sequence[int]) -> dict[str, float]:
    """Estimated bytes on one device, by kind. For TPUs the compiler's own figures take precedence."""
    model = config.model
    shards = mesh[1] * mesh[2]
    rows = batch.rows / row_shards(mesh) / config.accumulate
    positions = flops.positions(model, **row_sizes(batch, rows))
    positions |= {part: positions_at_once(config, part, number) for part, number in positions.items()}
    params = num_params(model)
    kept = sum(
        getattr(model, part).num_layers * positions[part] * saved_bytes(getattr(model, part), remat_of(config, part))
        for part in STACKS
    )
    # One layer's backward pass holds its activations and about as many gradients.
    working = max(2 * positions[part] * saved_bytes(getattr(model, part), "none") / mesh[2] for part in STACKS)
    layer = max(layer_params(getattr(model, part)) for part in STACKS) / mesh[2]
    return {
        "state": params * state_bytes_per_param(config) / shards,
        "gradients": (4.0 if config.accumulate == 1 else 8.0) * params / shards,  # of the micro-batch, and their sum
        "kept for the backward pass": kept,
        "one layer's backward pass": working,
        "weights of two layers, gradients of one": 2 * 2 * layer + 4 * layer if shards > 1 else 0.0,
    }


# ---- seconds ---------------------------------------------------------------------------------------------------------

# Measured on one H100 80 GB, 2026-11-23, with a plain-JAX sketch of the released shape (not this package's code): seconds of
# forward and backward of each stack for 8,192 slots and 5,248 patches, bfloat16, cuDNN attention on packed rows, full remat;
# and of AdamW in float32. Products ran at 510 TFLOP/s inside the stacks, one large bfloat16 product by itself at 790.
_MEASURED_SEC = {"tslm": 0.177, "ralm": 0.051, "locdit": 0.240, "locenc": 0.105}
_MEASURED_UPDATE_SEC = 0.037
_MEASURED_SLOTS, _MEASURED_PATCHES = 8192, 5248
_MEASURED_PRODUCT_FLOPS = 510e12


def products_reached() -> float:
    """Share of the peak that matrix products reached in the measurement."""
    return _MEASURED_PRODUCT_FLOPS / CHIPS["h100"].peak_bf16_flops


def assumptions() -> dict:
    """The assumed constants, for the report."""
    return {
        "slots_used": SLOTS_USED,
        "patches_used": PATCHES_USED,
        "segment_slots": SEGMENT_SLOTS,
        "products_reach_of_peak": round(products_reached(), 3),
        "links_reach_of_peak": LINKS_REACHED,
    }


@functools.cache
def _overhead(part: str) -> float:
    """Measured time outside of a stack's products, as a multiple of the time to move `_moved_bytes` at full bandwidth."""
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
    """Seconds of a pass on one device, one field for each resource that could limit it."""

    part: str
    backward: bool
    compute: float
    hbm: float
    ici: float
    dcn: float
    thumb_compute: float  # compute and HBM at the measured efficiencies
    spare: float = 0.0  # work of another pass that may overlap with this one's transfers

    @property
    def bound(self) -> float:
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def exposed(self) -> float:
        """Seconds of transfers that no schedule can hide."""
        return max(0.0, max(self.ici, self.dcn) - self.work - self.spare)

    @property
    def work(self) -> float:
        return max(self.compute, self.hbm)

    @property
    def rule_of_thumb(self) -> float:
        return max(self.thumb_compute, self.ici / LINKS_REACHED, self.dcn / LINKS_REACHED)


@dataclass(frozen=True)
class Prediction:
    """Prediction of one update on a machine."""

    passes: tuple[Seconds, ...]
    update_sec: float
    thumb_update_sec: float
    useful_flops: float  # of all devices
    executed_flops: float
    audio_sec: float  # audio in the batch
    peak_flops: float  # of all devices

    @property
    def bound_sec(self) -> float:
        return sum(p.bound for p in self.passes) + self.update_sec

    @property
    def rule_of_thumb_sec(self) -> float:
        return sum(p.rule_of_thumb for p in self.passes) + self.thumb_update_sec

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
    """Predicts one update: the bound, and the rule of thumb.

    Args:
        collectives: those of the compiled program, or of `layer_collectives`.
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
        overhead = 0.0 if p.part == "rest" else _overhead(p.part)
        rows.append(
            Seconds(
                *key,
                compute=p.bf16_flops / machine.flops,
                hbm=p.hbm_bytes / machine.hbm_bytes_per_sec,
                ici=ici.get(key, 0.0),
                dcn=dcn.get(key, 0.0),
                thumb_compute=p.bf16_flops / (products_reached() * machine.flops)
                + overhead * p.moved_bytes / machine.hbm_bytes_per_sec,
            )
        )
    # Transfers outside of the layers (text embeddings, weights and gradients of projections) do not depend on LocEnc.
    spare = {p.backward: max(0.0, p.work - max(p.ici, p.dcn)) for p in rows if p.part == "locenc"}
    rows = [dataclasses.replace(p, spare=spare[p.backward]) if p.part == "rest" else p for p in rows]
    update_sec = update_bytes(config, mesh) / machine.hbm_bytes_per_sec
    # AdamW in float32 reads gradient, weight and two moments, and writes all but the gradient: 28 bytes a parameter.
    ideal_sec = 28.0 * num_params(MODELS["2b"]) / CHIPS["h100"].hbm_bytes_per_sec
    slots, patches = batch.rows * batch.slots * SLOTS_USED, batch.rows * batch.patches * PATCHES_USED
    targets = min(patches, batch.rows * (batch.target_patches or batch.patches) * PATCHES_USED)
    return Prediction(
        passes=tuple(rows),
        update_sec=update_sec,
        thumb_update_sec=update_sec * _MEASURED_UPDATE_SEC / ideal_sec,
        useful_flops=flops.train_flops(
            config.model, slots=slots, patches=patches, targets=targets, squares=slots * min(SEGMENT_SLOTS, batch.slots)
        ),
        executed_flops=sum(p.flops for p in work) * row_shards(mesh) * mesh[2],
        audio_sec=patches * config.patch_sec,
        peak_flops=machine.devices * machine.flops,
    )
