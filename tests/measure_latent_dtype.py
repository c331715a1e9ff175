"""Measures what it costs to store latents in 16 bits: the loss of a trained model on exact and on rounded latents.

    voxcpm2-jax prepare --config=configs/data.py:manifest --config.manifest=M --config.latent_dtype=float32 \\
        --vae=runs/demo/codec --config.tokenizer=runs/demo/shards/tokenizer --output=SHARDS
    python tests/measure_latent_dtype.py SHARDS runs/demo/voice [BATCHES]      default: 100 batches

Times, noise and dropped conditions are the same for every type, and the model computes in float32, so a difference in loss
comes from the latents alone. "spread" is the standard error of the loss over batches, for comparison.
"""

import dataclasses
import json
import sys
from functools import partial

import jax
import ml_dtypes
import numpy as np

from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.data import pipeline
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.shards import Shards
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.train import backbone
from voxcpm2_jax.workdir import load_params

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def main(shards: str, workdir: str, num_batches: int = 100) -> None:
    source = Shards(shards)
    assert source.header.latent_dtype == "float32", "prepare these shards with --config.latent_dtype=float32"
    config, params, _ = load_params(workdir)
    config.pop("data", None)
    config["model"]["dtype"] = "float32"
    run = from_dict(BackboneRun, config)
    mix = Mix(run.seed + 1, source.index, source.patch_sec, run.batch)

    @partial(jax.jit, static_argnums=0)
    def losses(kind, params, batch, step):
        patches = batch.patches_BMPC.astype(TYPES[kind]).astype(np.float32)
        draws = backbone.draw(jax.random.fold_in(jax.random.key(7), step), run, patches, 0.0)
        _, figures = backbone.objective(params, run, dataclasses.replace(batch, patches_BMPC=patches), draws, Compute.of(run))
        return figures["loss_diff"]

    sums = {kind: [] for kind in TYPES}
    for step in range(num_batches):
        batch = pipeline.host_rows(source, mix, step)
        for kind in TYPES:
            sums[kind].append([float(x) for x in losses(kind, params, batch, step)])
    sums = {kind: np.array(values) for kind, values in sums.items()}
    loss = {kind: values[:, 0].sum() / values[:, 1].sum() for kind, values in sums.items()}
    each = sums["float32"][:, 0] / sums["float32"][:, 1]
    result = {"batches": num_batches, "loss": loss["float32"], "spread": each.std() / np.sqrt(num_batches)}
    for kind in ("float16", "bfloat16"):
        result[f"{kind}_loss_difference"] = loss[kind] - loss["float32"]
    print(json.dumps({name: float(f"{value:.6g}") for name, value in result.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
