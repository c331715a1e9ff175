"""Which TPUs multiply in 8 bits: cycles of an 8192^3 product in bfloat16 over those in int8 and in fp8, by the TPU compiler.

    python tests/measure_products.py [TOPOLOGY ..]      needs the extra "tpu", no TPU; half a minute a topology

chips.py's table of 8-bit products is made from it.
"""

import re
import sys

from voxcpm2_jax.plan.compile import CHILD_ENVIRONMENT

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SIZE = 8192


def cycles(topology: str) -> dict[str, int]:
    """Estimated cycles of the product by dtype."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    found = {}
    for dtype, result in ((jnp.bfloat16, jnp.float32), (jnp.int8, jnp.int32), (jnp.float8_e4m3fn, jnp.float32)):
        x_XY = jax.ShapeDtypeStruct((SIZE, SIZE), dtype, sharding=jax.sharding.SingleDeviceSharding(device))
        product = jax.jit(lambda x, y, result=result: jnp.matmul(x, y, preferred_element_type=result))
        text = product.lower(x_XY, x_XY).compile().as_text()
        found[jnp.dtype(dtype).name] = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    return found


if __name__ == "__main__":
    import os

    os.environ.update(CHILD_ENVIRONMENT)
    for name in sys.argv[1:] or TOPOLOGIES:
        first, *others = cycles(name).items()
        print(
            f"{name}: {first[0]} {first[1]:,} cycles; "
            + ", ".join(f"{of} {first[1] / n:.2f} times as fast" for of, n in others)
        )
