"""What `train` trains.

    voxcpm2-jax train --config=configs/backbone.py:demo --workdir=DIR --data=SHARDS

    variant     shape          hardware              wall time          result
    tiny        0.1 M          any                   seconds            loss falls; needs no --data
    demo        2.2 M          2 CPU cores           10 min             94.0 % of digits (below)
    demo_long   the same       2 CPU cores           39 min, shared     98.0 % of digits
    small       100 M          one GPU or TPU        unmeasured         unmeasured
    2b          2.29 B         a pod or cluster      unmeasured         unmeasured; the released shape
    2b_stage1   the same       the same              unmeasured         its first 280,000 updates
    2b_stage2   the same       the same              unmeasured         the next 80,000
    2b_stage3   the same       the same              unmeasured         the last 40,000, in which the learning rate decays
    finetune    the same       one GPU of 80 GB      unmeasured         unmeasured; the released weights, all of them

"demo": the share that Whisper-base hears in 50 digit strings that were never trained on (launch/quickstart.sh; synthetic
speech, two cores of an AMD EPYC). On sixty strings kept out of training to choose the recipe by, a voice with RoPE of base
10,000, a learning rate of 2e-3 and stop weight 1 said the first digit right and the others by chance (31 % in all, 3,000
updates, 10,000 clips, uniform flow times); with base 100, 1e-3 and stop weight 0.2 it had learned to read (86 %, 3,600
updates). Sequences are some fifteen slots long, which base 10,000 hardly tells apart.

Learning rates and step counts of "small" and "2b" follow the first VoxCPM paper (1e-4, WSD) where the report on VoxCPM2 gives
none; its three stages are in "2b". A stage by itself, on data of its own or on another machine, goes on where the one before
ended, and the three together are the updates of "2b"; other shards than the stage before had need --accept-config-changes:

    voxcpm2-jax train --config=configs/backbone.py:2b_stage1 --workdir=S1 --data=SHARDS
    voxcpm2-jax train --config=configs/backbone.py:2b_stage2 --workdir=S2 --data=SHARDS --resume-from=S1
    voxcpm2-jax train --config=configs/backbone.py:2b_stage3 --workdir=S3 --data=SHARDS --resume-from=S2

A "wsd" run is a trunk as long as its rate is stable. A branch takes the state of any of its checkpoints, which it only reads,
and ends in a decay of its own:

    voxcpm2-jax train --config=configs/backbone.py:2b --workdir=TRUNK --data=SHARDS
    voxcpm2-jax train --config=configs/backbone.py:2b --workdir=BRANCH --data=SHARDS --resume-from=TRUNK/checkpoints/200000
        --config.optim.decay_start=200000 --config.optim.decay_steps=20000 --config.num_steps=220000

"finetune" has the reference's settings (1e-5, warm-up of 100, decay 0.01, clip at 1) on shards that prepare made with the
released codec and tokenizer. Eight rows in eight parts suit one device; on 8 devices, --config.accumulate=1:

    voxcpm2-jax train --config=configs/backbone.py:finetune --workdir=DIR --data=SHARDS --init-params=RELEASED
"""

import dataclasses

from ml_collections import ConfigDict

from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun, BatchConfig, CheckpointConfig, LogConfig, OptimConfig, SampleConfig, StageConfig

VARIANTS = ("tiny", "demo", "demo_long", "small", "2b", "2b_stage1", "2b_stage2", "2b_stage3", "finetune")


def ramp(stage: StageConfig, batch: BatchConfig, rows: dict[int, int]) -> tuple[StageConfig, ...]:
    """A stage whose batches grow: `rows` by the update from which on a batch has so many. Clips go on in their order."""
    return tuple(
        dataclasses.replace(stage, first_step=step, batch=dataclasses.replace(batch, rows=n)) for step, n in rows.items()
    )


# The three stages of the report on VoxCPM2: plain speech in rows of 4,096 slots; longer clips and rows, and more and more
# clips that follow a voice or a description; at last all languages nearly alike. Lengths are the report's, shares and step
# counts ours, for it gives none, and so are the batches: a million slots at first, two million soon. All of a stage that
# the corpus does not have (references, descriptions) is left out.
_ROWS = BatchConfig(rows=256, slots=4096, patches=2816, segments=128)
_LONG_ROWS = BatchConfig(rows=256, slots=8192, patches=5632, segments=128)
CURRICULUM = (
    *ramp(StageConfig(max_sec=60.0, temperature=1.5, reference=0.0, described=0.0), _ROWS, {0: 256, 40_000: 512}),
    StageConfig(first_step=280_000, max_sec=180.0, temperature=1.5, reference=0.1, described=0.3, batch=_LONG_ROWS),
    StageConfig(first_step=320_000, max_sec=180.0, temperature=1.5, reference=0.3, described=0.6, batch=_LONG_ROWS),
    StageConfig(
        first_step=360_000, min_sec=2.0, max_sec=300.0, temperature=3.0, reference=0.4, described=0.9, batch=_LONG_ROWS
    ),
)
_ENDS = {"2b_stage1": 280_000, "2b_stage2": 360_000, "2b_stage3": 400_000, "2b": 400_000}


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
    elif variant in _ENDS:
        end = max(_ENDS.values())
        run = BackboneRun(
            model=MODELS["2b"],
            num_steps=_ENDS[variant],
            batch=_ROWS,
            optim=OptimConfig(
                learning_rate=1e-4, warmup_steps=2000, schedule="wsd", schedule_steps=end, decay_steps=40_000, weight_decay=0.1
            ),
            stages=CURRICULUM,
        )
    elif variant == "finetune":
        run = BackboneRun(
            model=MODELS["2b"],
            num_steps=1000,
            batch=BatchConfig(rows=8, slots=4096, patches=2816, segments=128),
            accumulate=8,
            optim=OptimConfig(learning_rate=1e-5, warmup_steps=100, weight_decay=0.01, clip_norm=1.0),
            checkpoint=CheckpointConfig(every_steps=250),
        )
    else:
        raise UserError(f"configs/backbone.py has {', '.join(VARIANTS)}; got {variant!r}")
    return ConfigDict(dataclasses.asdict(run))
