"""Where every array lives: the mesh, the logical dims of each parameter, and the table from dims to mesh axes.

Mesh axes are ("replica", "data", "tensor"). Parameters are copied over replica and split over data (FSDP) and tensor; a
batch is split over replica and data. Model code names only logical dims, through `constrain`.

What the axes cost, for a part of the model with p parameters that a device runs over n positions (flops.py). In formulas,
`data` and `tensor` are the sizes of these axes. Functions at the end of this file compute the figures.

    memory      float32 weights, two moments and gradients: 16 p / (data x tensor) bytes, averaged weights 4 p more. The
                released shape (2.29 B) takes 36.6 GB, on 256 devices 0.15 GB each (a little over 36.6 / 256, because norm
                scales and biases are not split).
    data        Forward: gathers 2 p bytes of bfloat16 weights for 2 p n FLOP, that is, n FLOP per byte. The gather is hidden
                if n >= FLOP/s / (bytes/s). Backward: gathers the weights again and scatters 4 p bytes of float32 gradients:
                6 p bytes for 6 p n FLOP with full remat, which needs no more positions, and for 4 p n without, which needs
                1.5 times as many.
    tensor      Each layer sums 2 n D bytes twice, forward and backward, on the critical path; nothing overlaps them. Use it
                only if data alone would leave a device less than one row. Two key/value heads allow at most tensor = 2.
    replica     An all-reduce of 4 p / (data x tensor) bytes of gradients per micro-batch: the only traffic that may cross
                slices. It runs in the backward pass, layer by layer, after the sum over data.

Gradients stay in float32 until they are summed over all devices and micro-batches (models/product.py). Sums in bfloat16
would scatter half as many bytes, but be off by 1.9 % for noise-like gradients of 256 devices in a ring.

Positions that a device needs so that the gather over `data` is hidden. A torus is closed if its dimensions wrap around
(chips.rings); then a chip has twice the links.

    closed torus            open                   8 GPUs on NVLink     hosts of 8 GPUs
    v5e 16x16    1,094      v6e 8x8     5,100      H100  2,443          H100  2,748
    v6e 16x16    2,550      v5e 4x8     2,189
    v5p 8x8x8      850
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from voxcpm2_jax.chips import Chip, gather_bytes_per_sec
from voxcpm2_jax.config.plain import UserError

MESH_AXES = ("replica", "data", "tensor")

# Logical dim -> mesh axes. "embed" is what FSDP splits, the wide dims of a matrix are what tensor parallelism splits.
RULES: dict[str, Any] = {
    "batch": ("replica", "data"),
    "replica": "replica",  # rows, if all devices of a replica hold the same rows
    "embed": "data",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    None: None,
}

# Parameter path -> logical dims. Each path of the backbone matches exactly one rule, of the rank of the parameter.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"base_lm/embed/embedding", ("vocab", "embed")),
    (r".*/layers/(attn_norm|mlp_norm)/scale", ("layers", None)),
    (r".*/layers/q/kernel", ("layers", "embed", "heads", None)),
    (r".*/layers/[kv]/kernel", ("layers", "embed", "kv_heads", None)),
    (r".*/layers/o/kernel", ("layers", "heads", None, "embed")),
    (r".*/layers/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r".*/layers/down/kernel", ("layers", "mlp", "embed")),
    (r"[a-z_]+/norm/scale", (None,)),
    (r"feat_encoder/special_token", (None,)),
    (r"feat_(encoder|decoder)/(in_proj|cond_proj)/kernel", (None, "embed")),
    (r"feat_decoder/out_proj/kernel", ("embed", None)),
    (r"feat_decoder/(delta_)?time_mlp/linear_[12]/kernel", ("embed", None)),
    (r"fsq_layer/(in|out)_proj/kernel", ("embed", None)),
    (r"(enc_to_lm|lm_to_dit|res_to_dit|fusion_concat|stop)_proj/kernel", ("embed", None)),
    (r"stop_head/kernel", ("embed", None)),
    (r".*/bias", (None,)),
)  # fmt: skip


# ---- the mesh --------------------------------------------------------------------------------------------------------


def platform(mesh: Mesh) -> str:
    """The platform of a mesh, which decides the kernels: "cpu", "gpu" or "tpu"."""
    return _known_platform(mesh.devices.flat[0].platform)


def current_platform() -> str:
    """The platform of the mesh in `jax.set_mesh`; without a mesh that of JAX's default device.

    Raises:
        UserError: neither "cpu", "gpu" nor "tpu": it is not known which kernels run there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return _known_platform(mesh.abstract_device.platform if mesh.abstract_device else "of a mesh without devices")
    device = jax.config.jax_default_device or jax.devices()[0]
    return _known_platform(getattr(device, "platform", device))


def _known_platform(name: str) -> str:
    name = {"cuda": "gpu", "rocm": "gpu"}.get(name, name)  # as JAX itself groups them, in `jax.devices("gpu")`
    if name not in ("cpu", "gpu", "tpu"):
        raise UserError(f"platform {name!r}: expected cpu, gpu or tpu")
    return name


def make_mesh(shape: tuple[int, int, int] = (-1, -1, 1), devices=None) -> Mesh:
    """A mesh over `devices`: all by default; those of a topology, to compile for it without having it.

    On TPU the axes follow the torus, and only replica crosses slices: the network between slices carries only
    the sum of gradients. On other platforms devices are ordered by host, with tensor innermost, then data; tensor stays inside
    a host.

    Args:
        shape: devices along (replica, data, tensor). One of them may be -1: the remaining devices. If replica and data are
            both -1, replica is the number of TPU slices.
    Raises:
        UserError: the shape does not use all devices exactly, or an axis would cross slices or hosts that must not.
    """
    devices = list(jax.devices() if devices is None else devices)
    is_tpu = devices[0].platform == "tpu"
    # Without TPU, JAX counts hosts as slices. A single slice may have no number.
    slices = Counter(getattr(device, "slice_index", None) or 0 for device in devices)
    wanted, shape = shape, fill(shape, len(devices), len(slices) if is_tpu else 1)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise UserError(
            f"mesh {tuple(wanted)} (replica, data, tensor) does not fit {len(devices)} devices; one of them may be -1, for the "
            "remaining devices, and replica and data may both be -1"
        )
    replica, data, tensor = shape
    if is_tpu:
        if replica % len(slices):
            raise UserError(
                f"mesh {shape} (replica, data, tensor): {len(slices)} slices need a multiple of {len(slices)} replicas, since "
                f"only the sum of gradients may cross slices; --config.mesh=-1,-1,{tensor} puts one replica on each slice"
            )
        inner = (replica // len(slices), data, tensor)
        try:
            if len(slices) > 1:
                placed = mesh_utils.create_hybrid_device_mesh(
                    inner, (len(slices), 1, 1), devices, allow_split_physical_axes=True
                )
            else:
                placed = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"mesh {shape} (replica, data, tensor) cannot be laid over this TPU: {error}") from None
    else:
        if any(size % tensor for size in slices.values()):
            raise UserError(
                f"mesh {shape} (replica, data, tensor): tensor {tensor} does not divide the {min(slices.values())} devices of "
                "a host; its collectives, several per layer, must stay inside a host"
            )
        order = sorted(devices, key=lambda device: (getattr(device, "slice_index", None) or 0, device.id))
        placed = np.array(order, dtype=object).reshape(shape)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def num_slices(devices: Sequence) -> int:
    """Number of TPU slices that devices belong to."""
    return len({getattr(device, "slice_index", None) or 0 for device in devices})  # a single slice may have no number


def abstract(shapes, layouts):
    """ShapeDtypeStructs with shardings, from a tree of shapes and a tree of shardings; for `restore` and `lower`."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, layouts)


def fill(shape: Sequence[int], num_devices: int, num_slices: int) -> tuple[int, int, int]:
    """The shape with each -1 replaced. If it cannot use the devices exactly, its product differs from their number."""
    if tuple(shape[:2]) == (-1, -1):
        shape = (num_slices, *shape[1:])
    known = math.prod(n for n in shape if n != -1)
    return tuple(num_devices // max(known, 1) if n == -1 else n for n in shape)


# ---- activations and parameters --------------------------------------------------------------------------------------


def mesh_in_use():
    """The mesh of `jax.set_mesh`; empty outside of it, and where code runs on each device by itself (`jax.shard_map`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.sharding.AbstractMesh((), ()) if mesh.manual_axes else mesh


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Constrains the layout of an activation by its logical dims; does nothing where no mesh is in use."""
    mesh = mesh_in_use()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, dims, mesh))


def num_shards(dim: str, size: int) -> int:
    """Number of devices over which the mesh in use splits a logical dim of this size."""
    mesh = mesh_in_use()
    axes = () if mesh.empty else _axes(dim, size, mesh) or ()
    return math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes))


def spec(shape: tuple[int, ...], dims: tuple[str | None, ...], mesh) -> PartitionSpec:
    """The mesh axes of an array by its logical dims; a dim that the axes do not divide is not split."""
    return PartitionSpec(*(_axes(dim, size, mesh) for dim, size in zip(dims, shape, strict=True)))


def _axes(dim, size, mesh):
    """The mesh axes of a dim, or None if they do not divide its size."""
    axes = RULES[dim]
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None


def param_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf: parameters and optimiser moments by PARAM_AXES; scalars and the guard are copied.

    Raises:
        UserError: an axis of the mesh does not divide a dim that it splits.
    """

    def one(path, leaf):
        name = path_name(path)
        if leaf.ndim == 0 or name.startswith("guard/"):
            return NamedSharding(mesh, PartitionSpec())
        dims = param_dims(name, leaf.ndim)
        for dim, size in zip(dims, leaf.shape):
            if _axes(dim, size, mesh) != RULES[dim]:
                raise UserError(
                    f"mesh {tuple(mesh.shape.values())} (replica, data, tensor): {RULES[dim]} {mesh.shape[RULES[dim]]} does "
                    f"not divide {name.rpartition('params/')[2]}, whose {dim} are {size}; make it smaller and replica larger"
                )
        return NamedSharding(mesh, PartitionSpec(*(RULES[dim] for dim in dims)))

    return jax.tree_util.tree_map_with_path(one, tree)


def constrain_params(tree):
    """Constrains a tree that is shaped like the parameters, such as gradients, to the layout of the parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *param_dims(path_name(path), x.ndim)), tree)


def path_name(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def param_dims(path: str, ndim: int) -> tuple[str | None, ...]:
    """The logical dims of the parameter at `path`, which may have a prefix, such as that of optimiser moments."""
    found = [dims for pattern, dims in PARAM_AXES if re.search(rf"(^|/){pattern}$", path)]
    assert [len(dims) for dims in found] == [ndim], f"{path} matches {found} in PARAM_AXES, expected one rule, of rank {ndim}"
    return found[0]


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over replica and data."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def local_rows(mesh: Mesh, num_rows: int) -> list[int]:
    """The rows of a batch that the devices of this process hold, in rising order.

    They need not be contiguous, since a mesh may order devices differently from processes. Other processes may hold the
    same rows, if the tensor axis crosses processes.
    """
    spans = batch_sharding(mesh).addressable_devices_indices_map((num_rows,)).values()
    return sorted({row for (span,) in spans for row in range(num_rows)[span]})


def global_batch(tree, mesh: Mesh, num_rows: int):
    """One batch over all devices, from the arrays that each process made for its `local_rows`."""
    layout = batch_sharding(mesh)

    def one(x):
        return jax.make_array_from_process_local_data(layout, np.asarray(x), (num_rows, *x.shape[1:]))

    return jax.tree.map(one, tree)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def device_bytes(tree, mesh) -> int:
    """Bytes of parameters, moments or gradients on each device; shapes and an AbstractMesh are enough."""
    shards = jax.tree.map(lambda x, layout: math.prod(layout.shard_shape(x.shape)), tree, param_shardings(tree, mesh))
    return sum(n * x.dtype.itemsize for n, x in zip(jax.tree.leaves(shards), jax.tree.leaves(tree), strict=True))


def gather_flop_per_byte(positions: float, weight_bytes: int = 2) -> float:
    """FLOP of a forward pass over `positions` per byte of gathered weights, on one device."""
    return 2 * positions / weight_bytes


def positions_to_hide(chip: Chip, group: Sequence[int], torus: tuple[int, ...] | None = None) -> float:
    """Positions per device at which a forward pass at peak speed takes as long as gathering its weights.

    Args:
        group, torus: the chips that hold one copy of the parameters, as `chips.gather_bytes_per_sec` takes them.
    """
    return chip.peak_bf16_flops / gather_bytes_per_sec(chip, group, torus) / gather_flop_per_byte(1)
