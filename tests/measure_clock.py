"""How far to trust the compiler's clock: dense decoder stacks of published shapes, by the clock and as published.

    python tests/measure_clock.py [NAME ..]      needs the extra "tpu", no TPU; three to ten minutes a shape

Two layers of each shape are compiled for one chip from our blocks, forward and backward, with the remat policy that comes
nearest to the published one, and the chip's compiler options. Casts of weights and initial zeros are left out, since in a run
they are split over all chips; so are transfers. Published: model FLOP utilisation of whole runs, MaxText's README and
performance tables (github.com/AI-Hypercomputer/maxtext). The clock's MFU counts what
a causal mask leaves of attention.
"""

import dataclasses
import json
import sys

from voxcpm2_jax.bench.clock import clock
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import BackboneRun, BatchConfig

#               chip   width  mlp    heads kv  slots remat       published, %
SHAPES = {
    "v5e-7b": ("v5e", 4096, 11008, 32, 32, 2048, "products", "56 to 67"),
    "v5p-70b": ("v5p", 8192, 28672, 64, 8, 4096, "products", "65.4"),
    "v6e-8b": ("v6e", 4096, 14336, 32, 8, 8192, "products", "45.5"),
    "v6e-70b": ("v6e", 8192, 28672, 64, 8, 4096, "full", "43.8 to 50.3"),
}  # fmt: skip


def run_of(width: int, mlp: int, heads: int, kv_heads: int, slots: int, remat: str) -> BackboneRun:
    """A run whose text-semantic LM has two layers of this shape."""
    lm = dataclasses.replace(
        MODELS["2b"].lm_config,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=2,
        kv_channels=128,
    )
    base = MODELS["2b"]
    local = {name: dataclasses.replace(getattr(base, name), num_heads=heads) for name in ("encoder_config", "dit_config")}
    model = dataclasses.replace(base, lm_config=lm, residual_lm_num_layers=1, max_length=slots, **local)
    return BackboneRun(model, remat=remat, batch=BatchConfig(rows=1, slots=slots, patches=8, segments=2))


def main(names) -> None:
    for name in names or SHAPES:
        chip, *shape, remat, published = SHAPES[name]
        result = clock(run_of(*shape, remat), part="tslm", chip=chip)
        (version,) = result["versions"]
        mfu = version["mfu"] * version["sec"] / version["stack_sec"]
        figures = {"shape": name, "remat": remat, "clock_mfu_percent": round(100 * mfu, 1), "published_percent": published}
        print(json.dumps(figures | {"compile_sec": version["compile_sec"], "options": result["options"]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
