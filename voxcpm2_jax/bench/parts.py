"""Each stack of the model by itself, as training runs it: forward and backward, for `bench train --parts` and `bench clock`.

As a script (`python parts.py < job.json`) it compiles one stack for one TPU chip that is not here, with the package that it
finds: bench/clock.py also runs it on other versions of this package. It uses only what versions have in common.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from voxcpm2_jax.models import attention, voxcpm2


class Part(NamedTuple):
    """A stack: the name of its parameters; (params, x, segment_BT, position_BT) -> (y, figures); and what x is."""

    module: str
    run: Callable
    x: jax.ShapeDtypeStruct


def parts_of(config, compute) -> dict[str, Part]:
    """The four stacks at the sizes of the run's batch.

    Args:
        config: BackboneRun.   compute: Compute.
    """
    model, batch, dtype = config.model, config.batch, jnp.dtype(config.model.dtype)
    module = voxcpm2.VoxCPM2(model, compute)
    B, P, C = batch.rows, model.patch_size, model.feat_dim

    def lm(name):
        def stack(model, x_BTD, position_BT, sees):
            return getattr(model, name)(x_BTD, position_BT, sees)[0]

        def run(params, x_BTD, segment_BT, position_BT):
            sees = attention.find_segments(segment_BT, batch.segments)
            with jax.named_scope(name):
                return module.apply({"params": params}, x_BTD, position_BT, sees, method=stack, mutable=["figures"])

        return Part(name, run, jax.ShapeDtypeStruct((B, batch.slots, model.tslm.width), dtype))

    def locenc(params, x_RPC, *_):
        return module.apply({"params": params}, x_RPC, method="encode_patches", mutable=["figures"])

    def locdit(params, x_RPC, *_):
        prefix_R2D, t_R = jnp.zeros((len(x_RPC), 2, model.locdit.width), dtype), jnp.full(len(x_RPC), 0.5)
        inputs = (x_RPC, prefix_R2D, x_RPC, t_R, jnp.zeros_like(t_R))
        return module.apply({"params": params}, *inputs, method="velocity", mutable=["figures"])

    def patches(name, run, number):
        return Part(name, run, jax.ShapeDtypeStruct((B * number, P, C), jnp.float32))

    return {
        "tslm": lm("base_lm"),
        "ralm": lm("residual_lm"),
        "locenc": patches("feat_encoder", locenc, batch.patches),
        "locdit": patches("feat_decoder", locdit, batch.target_patches or batch.patches),
    }


def gradient(part: Part, model, products: str | None = None):
    """Forward and backward of a stack: (own_params, x, rest, segment_BT, position_BT) -> (loss, figures), gradients.

    `rest`: parameters outside of all stacks, which LocEnc's projection is one of.
    """
    products = {} if products is None else {"products": products}  # which earlier versions do not have

    def loss(own_params, x, rest, segment_BT, position_BT):
        params = voxcpm2.to_compute(rest | {part.module: own_params}, model, **products)
        y, figures = part.run(params, x, segment_BT, position_BT)
        return jnp.sum(y.astype(jnp.float32) ** 2), figures

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def outside(params: dict) -> dict:
    """The parameters outside of all stacks."""
    return {name: of for name, of in params.items() if "layers" not in of}


def _compile(job: dict) -> dict:
    """Compiles a stack for one chip, and writes the program to job["program"] -> seconds and bytes."""
    from jax.experimental import topologies

    from voxcpm2_jax import sharding
    from voxcpm2_jax.config.plain import from_dict
    from voxcpm2_jax.config.run import BackboneRun
    from voxcpm2_jax.models.compute import Compute

    config = from_dict(BackboneRun, job["config"])
    devices = topologies.get_topology_desc(topology_name=job["topology"], platform="tpu").devices[:1]
    mesh = sharding.make_mesh((1, 1, 1), devices=devices)
    part = parts_of(config, Compute.of(config, mesh))[job["part"]]
    params = jax.eval_shape(lambda: voxcpm2.init(jax.random.key(0), config.model))
    slots = jax.ShapeDtypeStruct((config.batch.rows, config.batch.slots), jnp.int32)
    inputs = (params[part.module], part.x, outside(params), slots, slots)
    whole = jax.NamedSharding(mesh, jax.P())
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), inputs)
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        program = jax.jit(gradient(part, config.model, config.products)).lower(*inputs).compile(compiler_options=job["options"])
    pathlib.Path(job["program"]).write_text(program.as_text())
    temporary = program.memory_analysis().temp_size_in_bytes
    return {"compile_sec": round(time.perf_counter() - begin, 1), "temporary_bytes": temporary}


if __name__ == "__main__":
    print(json.dumps(_compile(json.load(sys.stdin))))
