"""What the figures of a training step cost: one update with all of them, and with the losses and the gradient norm alone.

    python -m tests.measure_figures [SHAPE] [SLOTS]

What nobody asks for, XLA leaves out, so the second is the step without them. Processor time, in turn, least of the rounds:
other programs on the machine disturb it little.
"""

import dataclasses
import json
import sys
import time
from functools import partial

import jax

from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import BackboneRun, BatchConfig
from voxcpm2_jax.data import pipeline, synthetic
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.train import backbone, pretrain

ROUNDS = 5
PLAIN = ("loss", "loss_diff", "loss_stop", "grad_norm", "audio_sec")


def main(shape: str = "demo", slots: int = 512) -> dict:
    model = dataclasses.replace(MODELS[shape], dtype="float32")
    run = BackboneRun(model, batch=BatchConfig(rows=1, slots=slots, patches=slots * 3 // 4))
    source = synthetic.Synthetic(
        0,
        vocab_size=model.lm_config.vocab_size,
        patch_shape=(model.patch_size, model.feat_dim),
        median_patches=40,
        max_patches=slots // 2,
    )
    batch = pipeline.host_rows(source, Mix(0, source.index, source.patch_sec, run.batch), 0)
    whole = partial(backbone.train_step, config=run, labels=pretrain.labels_of(source))

    def plain(state, batch):
        state, figures = whole(state, batch)
        return state, {name: figures[name] for name in PLAIN}

    steps = {"all": jax.jit(whole, donate_argnums=0), "plain": jax.jit(plain, donate_argnums=0)}
    sec = {name: [] for name in steps}
    state = jax.jit(partial(backbone.init_state, run))()
    for _ in range(ROUNDS + 1):  # the first compiles
        for name, step in steps.items():
            begin = time.process_time()
            state, _ = jax.block_until_ready(step(state, batch))
            sec[name].append(time.process_time() - begin)
    least = {name: min(times[1:]) for name, times in sec.items()}
    return {"shape": shape, "slots": slots} | least | {"cost": least["all"] / least["plain"] - 1}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:2], *map(int, sys.argv[2:3]))))
