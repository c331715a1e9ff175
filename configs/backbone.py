"""What `train` trains.

    voxcpm2-jax train --config=configs/backbone.py:demo --workdir=DIR --data=SHARDS

    variant     shape          hardware              wall time          result
    tiny        0.1 M          any                   seconds            loss falls; needs no --data
    demo        2.2 M          2 CPU cores           9 min              96.0 % of digits (below)
    demo_long   the same       2 CPU cores           39 min, shared     98.0 % of digits
    small       100 M          one GPU or TPU        unmeasured         unmeasured
    2b          2.29 B         a pod or cluster      unmeasured         unmeasured; the released shape

"demo": the share that Whisper-base hears in 50 digit strings that were never trained on (launch/quickstart.sh; synthetic
speech, two cores of an AMD EPYC). On sixty strings kept out of training to choose the recipe by, a voice with RoPE of base
10,000, a learning rate of 2e-3 and stop weight 1 said the first digit right and the others by chance (31 % in all, 3,000
updates, 10,000 clips, uniform flow times); with base 100, 1e-3 and stop weight 0.2 it had learned to read (86 %, 3,600
updates). Sequences are some fifteen slots long, which base 10,000 hardly tells apart.

Learning rates and step counts of "small" and "2b" follow the first VoxCPM paper (1e-4, WSD) where the report on VoxCPM2 gives
none; its three stages are in "2b".
"""

import dataclasses

from ml_collections import ConfigDict

from voxcpm2_jax.config import (
    MODELS,
    BackboneRun,
    BatchConfig,
    CheckpointConfig,
    LogConfig,
    OptimConfig,
    SampleConfig,
    StageConfig,
    UserError,
)

VARIANTS = ("tiny", "demo", "demo_long", "small", "2b")

# The three stages of the report on VoxCPM2: plain speech in rows of 4,096 slots; longer clips and rows, and more and more
# clips that follow a voice or a description; at last all languages nearly alike. Lengths are the report's, shares and step
# counts ours, for it gives none. All of a stage that the corpus does not have (references, descriptions) is left out.
_LONG_ROWS = BatchConfig(rows=128, slots=8192, patches=5632, segments=128)
CURRICULUM = (
    StageConfig(max_sec=60.0, temperature=1.5, reference=0.0, described=0.0),
    StageConfig(first_step=280_000, max_sec=180.0, temperature=1.5, reference=0.1, described=0.3, batch=_LONG_ROWS),
    StageConfig(first_step=320_000, max_sec=180.0, temperature=1.5, reference=0.3, described=0.6, batch=_LONG_ROWS),
    StageConfig(
        first_step=360_000, min_sec=2.0, max_sec=300.0, temperature=3.0, reference=0.4, described=0.9, batch=_LONG_ROWS
    ),
)


def get_config(variant: str = "tiny") -> ConfigDict:
    """A variant as a ConfigDict; the fields and their units stand in config.BackboneRun."""
    if variant == "tiny":
        run = BackboneRun(
            model=MODELS["tiny"],
            num_steps=60,
            remat="none",
            batch=BatchConfig(rows=8, slots=128, patches=80),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=10, ema_decay=0.95),
            checkpoint=CheckpointConfig(every_steps=20, keep=2),
            log=LogConfig(every_steps=5),
        )
    elif variant in ("demo", "demo_long"):
        is_long = variant == "demo_long"
        run = BackboneRun(
            model=MODELS["demo"],
            num_steps=6000 if is_long else 4500,
            remat="none",
            stop_weight=0.2,
            batch=BatchConfig(rows=4 if is_long else 2, slots=128, patches=72),
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=50, end_ratio=0.02, weight_decay=0.1, ema_decay=0.99),
            checkpoint=CheckpointConfig(every_steps=500, keep=2),
            samples=SampleConfig(every_steps=1500, texts=("one two three",)),
        )
    elif variant == "small":
        run = BackboneRun(
            model=MODELS["small"],
            num_steps=100_000,
            batch=BatchConfig(rows=16, slots=4096, patches=2816, segments=128),
            optim=OptimConfig(learning_rate=6e-4, warmup_steps=2000, schedule="wsd", weight_decay=0.1, ema_decay=0.9995),
        )
    elif variant == "2b":
        run = BackboneRun(
            model=MODELS["2b"],
            num_steps=400_000,
            batch=BatchConfig(rows=256, slots=4096, patches=2816, segments=128),
            optim=OptimConfig(learning_rate=1e-4, warmup_steps=2000, schedule="wsd", weight_decay=0.1),
            stages=CURRICULUM,
        )
    else:
        raise UserError(f"configs/backbone.py has {', '.join(VARIANTS)}; got {variant!r}")
    return ConfigDict(dataclasses.asdict(run))
