"""Times alternatives for parts of a layer, forward and backward: attention kernels, fused products, remat policies.

    python tests/measure_kernels.py [--shape=2b] [--rows=2] [--slots=4096] [--patches=2816] [--layers=4] [--repeats=5]

Runs on JAX's default device: on a GPU or TPU with `--shape=2b` at full size, on a CPU with `--shape=demo` at a small one.
Candidates are run in turn, so that other load on the machine affects all of them equally; a time is the median of the
repeats. The last line is a JSON object with the same figures. This is a command, not a test.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import REMAT_POLICIES
from voxcpm2_jax.models.attention import attention, find_segments
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.transformer import run_layers


class Stack(nn.Module):
    """A number of layers of one stack."""

    config: object
    remat: str
    platform: str

    @nn.compact
    def __call__(self, x_BTD, segment_BT=None):
        position_BT = jnp.arange(x_BTD.shape[1])[None]
        sees = None if segment_BT is None else find_segments(segment_BT, MAX_SEGMENTS)
        return run_layers(self.config, Compute(self.remat, platform=self.platform), x_BTD, position_BT, sees)[0]


MAX_SEGMENTS, SEGMENT_SLOTS = 128, 64


def gradient(f, num_args):
    """The jitted gradient of f with respect to its first `num_args` arguments."""

    def total(*args):
        return jnp.sum(f(*args).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(total, tuple(range(num_args))))


def take_turns(candidates, repeats):
    """Prints and returns milliseconds and megabytes of temporaries of each candidate.

    Args:
        candidates: name -> (jitted function, arguments).
    """
    figures, times = {}, {name: [] for name in candidates}
    programs = {}
    for name, (f, args) in candidates.items():
        programs[name] = f.lower(*args).compile()
        memory = programs[name].memory_analysis()
        figures[name] = {"temp_mb": round(memory.temp_size_in_bytes / 1e6) if memory else None}
        jax.block_until_ready(programs[name](*args))
    for _ in range(repeats):
        for name, (_, args) in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(programs[name](*args))
            times[name].append(time.perf_counter() - start)
    for name in candidates:
        figures[name]["ms"] = round(1e3 * statistics.median(times[name]), 2)
        print(f"{name:48s} {figures[name]['ms']:10.2f} ms {figures[name]['temp_mb']!s:>8} MB", file=sys.stderr)
    return figures


def attention_candidates(c, rows, slots, dtype, platform):
    """Attention over packed rows: XLA's, and the kernel of the platform."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, slots, n, c.head_dim)), dtype) for n in (c.num_heads, *[c.num_kv_heads] * 2))
    segment_BT = jnp.asarray(np.broadcast_to(np.arange(slots) // SEGMENT_SLOTS + 1, (rows, slots)), jnp.int32)

    def run(q, k, v, segment_BT, platform):
        return attention(q, k, v, find_segments(segment_BT, MAX_SEGMENTS), platform=platform)

    return {
        f"attention, {slots} slots, {name}": (gradient(partial(run, platform=name), 3), (q, k, v, segment_BT))
        for name in dict.fromkeys(("cpu", platform))
    }


def product_candidates(c, rows, positions, dtype):
    """The products q, k, v, gate and up of a local stack: separate, gate and up fused, or also q, k and v fused."""
    rng = np.random.default_rng(0)
    D, F, H = c.width, c.mlp_width, c.head_dim
    widths = {"q": c.num_heads * H, "k": c.num_kv_heads * H, "v": c.num_kv_heads * H, "gate": F, "up": F}
    kernels = {name: jnp.asarray(rng.normal(size=(D, n)) * D**-0.5, dtype) for name, n in widths.items()}
    x = {"3-D input": (rows, positions, D), "2-D input": (rows * positions, D)}

    def run(x, w, groups):
        outs = {}
        for group in groups:
            y = x @ jnp.concatenate([w[name] for name in group], axis=1)
            outs |= dict(zip(group, jnp.split(y, np.cumsum([widths[name] for name in group])[:-1].tolist(), axis=-1)))
        mixed = outs["q"] * jnp.sum(outs["k"] * outs["v"], axis=-1, keepdims=True)
        return jnp.concatenate([mixed, jax.nn.silu(outs["gate"]) * outs["up"]], axis=-1)

    groups = {
        "separate": (("q",), ("k",), ("v",), ("gate",), ("up",)),
        "gate+up": (("q",), ("k",), ("v",), ("gate", "up")),
        "q+k+v, gate+up": (("q", "k", "v"), ("gate", "up")),
    }
    return {
        f"products, {positions} positions, {layout}, {name}": (
            gradient(partial(run, groups=group), 2),
            (jnp.asarray(rng.normal(size=shape), dtype), kernels),
        )
        for layout, shape in x.items()
        for name, group in groups.items()
        if layout == "3-D input" or name == "gate+up"
    }


def stack_candidates(name, c, shape, dtype, platform):
    """Whole layers of a stack under each remat policy."""
    rng = np.random.default_rng(0)
    args = (jnp.asarray(rng.normal(size=(*shape, c.width)), dtype),)
    if name == "tslm":
        segment_BT = np.broadcast_to(np.arange(shape[1]) // SEGMENT_SLOTS + 1, shape)
        args += (jnp.asarray(segment_BT, jnp.int32),)
    shapes = jax.eval_shape(lambda: Stack(c, "full", platform).init(jax.random.key(0), *args))
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.02, dtype), shapes)
    return {
        f"{name}, {c.num_layers} layers, remat {remat}": (gradient(Stack(c, remat, platform).apply, 2), (params, *args))
        for remat in REMAT_POLICIES
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="demo", choices=MODELS)
    for name, default in (("rows", 2), ("slots", 512), ("patches", 256), ("layers", 2), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    model, device = MODELS[args.shape], jax.devices()[0]
    dtype, platform = jnp.dtype(model.dtype), device.platform
    stacks = {name: getattr(model, name) for name in ("tslm", "locenc", "locdit")}
    positions = {"locenc": model.locenc_slots, "locdit": model.locdit_slots}
    print(f"{device.device_kind}, jax {jax.__version__}, {args.shape}, {dtype}", file=sys.stderr)
    figures = take_turns(attention_candidates(stacks["tslm"], args.rows, args.slots, dtype, platform), args.repeats)
    for name, c in stacks.items():
        c = type(c)(**{**vars(c), "num_layers": args.layers})
        rows = args.rows * args.patches
        shape = (args.rows, args.slots) if name == "tslm" else (rows, positions[name])
        if name != "tslm":
            figures |= take_turns(product_candidates(c, rows, positions[name], dtype), args.repeats)
        figures |= take_turns(stack_candidates(name, c, shape, dtype, platform), args.repeats)
    print(json.dumps({"device": device.device_kind, "shape": args.shape, "figures": figures}))


if __name__ == "__main__":
    main()
