"""Where every array lives: the mesh, the logical dims of each parameter, and the table from dims to mesh axes.

Mesh axes are ("replica", "data", "tensor"): parameters are copied over replica, split over data (FSDP) and tensor;
a batch is split over replica and data. Model code names logical dims only, through `constrain`.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from voxcpm2_jax.config import UserError

MESH_AXES = ("replica", "data", "tensor")

# Logical dim -> mesh axes. "embed" is what FSDP splits, the wide dims of a matrix are what tensor parallelism splits.
RULES: dict[str, Any] = {
    "batch": ("replica", "data"),
    "embed": "data",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    None: None,
}

# Parameter path -> logical dims. Each path of the backbone matches exactly one rule, of its own rank.
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


def make_mesh(shape: tuple[int, int, int] = (1, -1, 1), devices=None) -> Mesh:
    """A mesh over `devices` (all by default); one entry of `shape` may be -1 and takes what is left.

    Raises:
        UserError: the shape does not use the devices exactly.
    """
    devices = jax.devices() if devices is None else devices
    known = int(np.prod([n for n in shape if n != -1]))
    is_sound = all(n == -1 or n >= 1 for n in shape) and list(shape).count(-1) <= 1
    if not is_sound or len(devices) % known or (-1 not in shape and known != len(devices)):
        raise UserError(
            f"mesh {tuple(shape)} (replica, data, tensor) does not fit {len(devices)} devices; -1 may stand once for the rest"
        )
    shape = tuple(len(devices) // known if n == -1 else n for n in shape)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Pins the layout of an activation by its logical dims; does nothing outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, dims, mesh))


def spec(shape: tuple[int, ...], dims: tuple[str | None, ...], mesh) -> PartitionSpec:
    """The mesh axes of an array by its logical dims; a dim that the mesh does not divide stays whole."""
    return PartitionSpec(*(_axes(dim, size, mesh) for dim, size in zip(dims, shape, strict=True)))


def _axes(dim, size, mesh):
    """The mesh axes of a dim, or None where they do not divide its size."""
    axes = RULES[dim]
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes if names and size % int(np.prod([mesh.shape[n] for n in names])) == 0 else None


def param_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf: parameters by PARAM_AXES, their optimiser moments likewise, scalars copied."""

    def one(path, leaf):
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, spec(leaf.shape, param_dims(name, leaf.ndim), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def param_dims(path: str, ndim: int) -> tuple[str | None, ...]:
    """The logical dims of the parameter at `path`, which may stand under a prefix such as an optimiser's moments."""
    found = {dims for pattern, dims in PARAM_AXES if re.search(rf"(^|/){pattern}$", path) and len(dims) == ndim}
    assert len(found) == 1, f"{path} of rank {ndim} matches {len(found)} rules of PARAM_AXES, expected one"
    return found.pop()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over replica and data."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
