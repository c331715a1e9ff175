"""Weights from disk to the form that generation wants, one group at a time.

    stacked parameters on disk -> read -> compute dtype, if that is smaller -> layers, q/k/v and gate/up fused -> device

The result is that of `voxcpm2.unrolled_params`. Groups are read in the order of their size: while the largest one is in memory
twice, little else is. So loading takes little more memory than the weights take afterwards.
"""

import math
import re

import jax
import numpy as np

from voxcpm2_jax.checkpoint.arrays import Weights, nest
from voxcpm2_jax.models.transformer import FUSED, fuse

_PART_OF = {part: name for name, parts in FUSED.items() for part in parts}


def unrolled(weights: Weights, dtype: str) -> dict:
    """Parameters of the unrolled form of `VoxCPM2` on the default device.

    Args:
        dtype: that the model computes in. Wider parameters are cast to it, as each use would do.
    """
    groups: dict[str, list[str]] = {}
    for path in weights.shapes:
        groups.setdefault(_target(path), []).append(path)
    sizes = {target: sum(math.prod(weights.shapes[path]) for path in paths) for target, paths in groups.items()}
    flat = {}
    for target in sorted(groups, key=sizes.get, reverse=True):
        flat |= _load(target, groups[target], weights, np.dtype(dtype))
    return nest(flat)


def _load(target: str, paths: list[str], weights: Weights, dtype: np.dtype) -> dict[str, jax.Array]:
    """One group: a parameter on the device, or one for each layer."""
    arrays = {path.split("/")[-2]: _narrowed(weights.read(path), dtype) for path in paths}
    stack, is_layered, rest = target.partition("/layers/")
    if not is_layered:
        (array,) = arrays.values()
        return jax.block_until_ready({target: jax.device_put(array)})
    name, loaded = rest.split("/")[0], {}
    for i in range(len(next(iter(arrays.values())))):
        if name in FUSED:
            layer = fuse(name, [arrays[part][i] for part in FUSED[name]], np)
        else:
            layer = arrays[name][i]
        loaded[f"{stack}/layers_{i}/{rest}"] = jax.device_put(layer)
    return jax.block_until_ready(loaded)


def _target(path: str) -> str:
    """The path of the group that a stacked parameter belongs to."""
    match = re.fullmatch(r"(.*/layers)/(\w+)/(\w+)", path)
    return f"{match[1]}/{_PART_OF.get(match[2], match[2])}/{match[3]}" if match else path


def _narrowed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return array.astype(dtype) if dtype.itemsize < array.dtype.itemsize else array
