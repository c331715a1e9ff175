"""Configs of `train`: the backbone, that is, everything except the codec.

    voxcpm2-jax train --config=configs/backbone.py:demo --workdir=DIR --data=SHARDS

    variant     shape          hardware              wall time          result
    tiny        0.1 M          any                   seconds            loss falls; needs no --data
    demo        2.2 M          2 CPU cores           10 min             94.0 % of digits (below)
    demo_long   the same       2 CPU cores           39 min, shared     98.0 % of digits
    small       100 M          one GPU or TPU        unmeasured         unmeasured
    2b          2.29 B         a pod or cluster      unmeasured         unmeasured; the released shape, all three stages
    2b_stage1   the same       the same              unmeasured         unmeasured; updates 0 to 280,000 of "2b"
    2b_stage2   the same       the same              unmeasured         unmeasured; updates 280,000 to 360,000
    2b_stage3   the same       the same              unmeasured         unmeasured; the last 40,000: learning rate decays
    finetune    the same       one GPU of 80 GB      unmeasured         unmeasured; full fine-tuning of released weights

configs/README.md has the commands for stages, WSD branches and fine-tuning.

"demo": share of digits that Whisper-base hears right in 50 generated strings that were held out of training
(launch/quickstart.sh; synthetic speech, two cores of an AMD EPYC). The recipe was chosen on sixty other held-out strings.
With RoPE base 10,000, learning rate 2e-3 and stop weight 1, the voice said the first digit right and the others by chance
(31 % in all; 3,000 updates, 10,000 clips, uniform flow times). With base 100, 1e-3 and stop weight 0.2 it had learned to
read (86 %; 3,600 updates). A clip is about fifteen slots long, and base 10,000 hardly distinguishes such near positions.

Sources: "2b" takes learning rate and schedule from the first VoxCPM paper (1e-4, WSD), because the VoxCPM2 report gives none.
Its three stages are the report's; its step counts are ours. "small" has the same schedule and a rate of ours. "finetune" has
the PyTorch package's settings (1e-5, warm-up of 100 updates, weight decay 0.01, clip at 1).
"""

import dataclasses

from ml_collections import ConfigDict

from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import (
    SPEECH_BATCH,
    BackboneRun,
    BatchConfig,
    CheckpointConfig,
    LogConfig,
    OptimConfig,
    SampleConfig,
    StageConfig,
)

VARIANTS = ("tiny", "demo", "demo_long", "small", "2b", "2b_stage1", "2b_stage2", "2b_stage3", "finetune")


def ramp(stage: StageConfig, factors: dict[int, float]) -> tuple[StageConfig, ...]:
    """A stage in which the batch grows: `factors` maps an update to the `rows_factor` from that update on.

    The order of the clips does not restart at these updates.
    """
    return tuple(dataclasses.replace(stage, first_step=step, rows_factor=factor) for step, factor in factors.items())


# The three stages of the VoxCPM2 report:
#   1  plain speech in rows of 4,096 slots
#   2  longer clips and rows; a growing share of clips with a reference clip or a description (two entries below)
#   3  languages weighted almost evenly
# The limits of clip length are the report's. It gives no shares, step counts or batch sizes: those here are ours (a million
# slots per batch, then two million; 24.4 M hours in all, configs/README.md). Where the corpus has no reference clips or
# descriptions, their shares have no effect. Of 1,024 slots of a clip (`clip_slots`), 60 s take 375 and leave 647 for the text.
_ROWS = dataclasses.replace(SPEECH_BATCH, rows=256, segments=128)
CURRICULUM = (
    *ramp(StageConfig(max_sec=60.0, temperature=1.5, reference=0.0, described=0.0, clip_slots=1024), {0: 1.0, 40_000: 2.0}),
    StageConfig(first_step=280_000, max_sec=180.0, temperature=1.5, reference=0.1, described=0.3, slots_factor=2.0),
    StageConfig(first_step=320_000, max_sec=180.0, temperature=1.5, reference=0.3, described=0.6, slots_factor=2.0),
    StageConfig(
        first_step=360_000, min_sec=2.0, max_sec=300.0, temperature=3.0, reference=0.4, described=0.9, slots_factor=2.0
    ),
)
_ENDS = {"2b_stage1": 280_000, "2b_stage2": 360_000, "2b_stage3": 400_000, "2b": 400_000}


def get_config(variant: str = "tiny") -> ConfigDict:
    """A variant as a ConfigDict; `voxcpm2_jax.config.run.BackboneRun` explains the fields."""
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
            batch=dataclasses.replace(_ROWS, rows=16),
            optim=OptimConfig(learning_rate=6e-4, warmup_steps=2000, schedule="wsd", weight_decay=0.1, ema_decay=0.9995),
            checkpoint=CheckpointConfig(keep_every_steps=10_000),
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
            checkpoint=CheckpointConfig(keep_every_steps=20_000),  # 27 GB each, 0.5 TB in all; branches start from them
            stages=CURRICULUM,
        )
    elif variant == "finetune":
        run = BackboneRun(
            model=MODELS["2b"],
            num_steps=1000,
            batch=dataclasses.replace(_ROWS, rows=8),
            accumulate=8,
            optim=OptimConfig(learning_rate=1e-5, warmup_steps=100, weight_decay=0.01, clip_norm=1.0),
            checkpoint=CheckpointConfig(every_steps=250),
        )
    else:
        raise UserError(f"configs/backbone.py has {', '.join(VARIANTS)}; got {variant!r}")
    return ConfigDict(dataclasses.asdict(run))
