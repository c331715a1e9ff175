"""LocDiT in chunks of patches: memory for one chunk at a time, however many patches a device has.

Patches do not see each other, and LocDiT's outputs only enter a weighted sum, the loss. So their gradient is known but for a
factor when they are computed, and the forward pass computes the gradients too: all layers forward and back on some patches,
then on the next ones. Only the sums over chunks stay in memory.

The weights are gathered once, before the first chunk. Their gradients are summed over chunks on each device, and over devices
once, after the last chunk. Results equal those of all patches at once but for rounding. Figures are reduced to one maximum per
device. A mesh with tensor parallelism cannot split patches in this way (`can_split`).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from voxcpm2_jax import sharding
from voxcpm2_jax.models.product import Weight


def can_split(num_patches: int) -> bool:
    """Whether each device of the mesh in use can compute its patches by itself."""
    mesh = sharding.mesh_in_use()
    return mesh.empty or (mesh.shape["tensor"] == 1 and num_patches % mesh.size == 0)


def sum_patches(run: Callable, params: dict, inputs, constants, at_once: int):
    """The sum of `run` over all patches.

    Args:
        run: (params, inputs, constants of some patches) -> (float32 scalar, (outputs of these patches, figures)).
        params: those of the backbone that `run` uses.   inputs, constants: trees of arrays [R, ..]; constants get no gradient.
        at_once: most patches in a chunk.
    Returns:
        the scalar; and what has no gradient: (outputs [R, ..], figures).
    """
    return _sum(run, at_once, params, inputs, constants)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(run, at_once, params, inputs, constants):
    shares = _Shares(params)

    def on_device(params, patches):
        weights = shares.gather(params)
        sums, (outputs, figures) = jax.lax.map(lambda patches: run(weights, *patches), _split(patches, at_once))
        return shares.over_devices(jnp.sum(sums)), (_join(outputs), _maxima(figures))

    return shares.on_devices(on_device, params, (inputs, constants), results=(jax.P(), shares.patches))


def _sum_forward(run, at_once, params, inputs, constants):
    shares = _Shares(params)

    def on_device(params, patches):
        weights = shares.gather(params)

        def chunk(patches):
            def scalar(trained, inputs):
                return run(_with(weights, trained), inputs, patches[1])

            (part, others), slopes = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(_trained(weights), patches[0])
            return (part, slopes[0]), (others, slopes[1])

        (total, of_weights), ((outputs, figures), of_inputs) = _add_up(chunk, _split(patches, at_once))
        total, of_params = shares.over_devices(total), shares.scatter(of_weights)
        return total, (_join(outputs), _maxima(figures)), of_params, _join(of_inputs)

    results = jax.P(), shares.patches, shares.specs, shares.patches
    total, others, *slopes = shares.on_devices(on_device, params, (inputs, constants), results)
    return (total, others), (slopes, params)


def _sum_backward(run, at_once, saved, cotangents):
    slopes, params = saved
    of_params, of_inputs = jax.tree.map(lambda x: (x.astype(jnp.float32) * cotangents[0]).astype(x.dtype), slopes)
    return _with(params, of_params, value=None), of_inputs, None


_sum.defvjp(_sum_forward, _sum_backward)


# ---- chunks ----------------------------------------------------------------------------------------------------------


def _split(tree, at_once: int):
    """[R, ..] -> [chunks, R / chunks, ..]: as few chunks as `at_once` allows, all of one size."""
    num_patches = len(jax.tree.leaves(tree)[0])
    chunks = next(n for n in range(-(-num_patches // at_once), num_patches + 1) if num_patches % n == 0)
    return jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), tree)


def _join(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _add_up(chunk: Callable, chunks):
    """Scans over chunks -> (the sum of the first results of `chunk`, a stack of the second ones)."""
    shapes = jax.eval_shape(chunk, jax.tree.map(lambda x: x[0], chunks))[0]

    def add(total, one):
        first, second = chunk(one)
        return jax.tree.map(jnp.add, total, first), second

    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), chunks)


def _maxima(figures):
    return jax.tree.map(lambda x: jnp.max(x).reshape(1), figures)


# ---- devices ---------------------------------------------------------------------------------------------------------


class _Shares:
    """What each device of the mesh in use holds of some parameters and of the patches. Without a mesh, one device holds all.

    Attributes:
        specs: of the parameters, those halves of a `Weight` that get a gradient.   patches: of an array of patches.
    """

    def __init__(self, params: dict):
        self._mesh = sharding.mesh_in_use()
        self._axes = () if self._mesh.empty else sharding.RULES["batch"]
        self._shapes = jax.eval_shape(lambda: _trained(params))
        self._all_specs = jax.tree_util.tree_map_with_path(self._specs_of, params, is_leaf=_is_weight)
        self.specs, self.patches = _trained(self._all_specs), jax.P(self._axes)

    def _specs_of(self, path, x):
        dims = sharding.param_dims(sharding.path_name(path), (x.original if _is_weight(x) else x).ndim)
        return jax.tree.map(lambda x: jax.P() if self._mesh.empty else sharding.spec(x.shape, dims, self._mesh), x)

    def on_devices(self, f: Callable, params: dict, patches, results: tuple):
        """`f` on each device, with its shares; `results`: how its results make up the whole ones."""
        if self._mesh.empty:
            return f(params, patches)
        shares = self._all_specs, self.patches
        return jax.shard_map(f, in_specs=shares, out_specs=results, check_vma=False)(params, patches)

    def over_devices(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, self._axes)

    def gather(self, params: dict) -> dict:
        """Whole parameters from the shares of all devices. What a `Weight` trains has no value here, only a gradient."""

        def whole(x, spec):
            for dim, axis in self._dims(spec):
                x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
            return x

        weights = jax.tree.map(whole, params, self._all_specs)
        trained = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes)
        return jax.tree.map(
            lambda x, zeros: x._replace(original=zeros) if _is_weight(x) else x, weights, trained, is_leaf=_is_weight
        )

    def scatter(self, of_weights: dict) -> dict:
        """The sum over all devices of gradients of whole parameters; each device keeps its share of it."""

        def share(x, spec):
            for dim, axis in self._dims(spec):
                x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
            return jax.lax.psum(x, tuple(axis for axis in self._axes if axis not in spec))

        return jax.tree.map(share, of_weights, self.specs)

    def _dims(self, spec) -> list[tuple[int, str]]:
        """The dims of a parameter that are split over devices, each with its axis of the mesh."""
        return [(dim, axis) for dim, axis in enumerate(spec) if axis in self._axes]


# ---- parameters ------------------------------------------------------------------------------------------------------


def _trained(params: dict) -> dict:
    """What gets a gradient: of a `Weight` its original."""
    return jax.tree.map(lambda x: x.original if _is_weight(x) else x, params, is_leaf=_is_weight)


def _with(params: dict, trained: dict, **changes) -> dict:
    """The reverse of `_trained`, with other changes of each `Weight`."""

    def one(x, new):
        return x._replace(original=new, **changes) if _is_weight(x) else new

    return jax.tree.map(one, params, trained, is_leaf=_is_weight)


def _is_weight(x) -> bool:
    return isinstance(x, Weight)
