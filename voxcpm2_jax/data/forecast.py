"""What a run will be trained on, stage by stage, computed from shards and curriculum; `train` prints it before the first step.

A stage may ask for what a corpus lacks, and still run: for clips of up to 300 s where `prepare` skipped all over 60 s, or for
reference clips where there are none. It then repeats what the stage before had.
"""

from collections.abc import Sequence
from typing import NamedTuple

from voxcpm2_jax.data.clips import Index
from voxcpm2_jax.data.mixing import Mix

_FAR_SHORTER = 2 / 3  # a longest clip below this share of max_sec: the stage asks for longer clips than there are


class Forecast(NamedTuple):
    """A stage: what the corpus has for it, and how much of it the model is trained on."""

    first_step: int
    end_step: int
    rows: int  # per batch
    clips: int
    hours: float  # of these clips
    longest_sec: float
    hours_heard: float  # trained on, repetitions included
    epochs: tuple[float, float]  # of the group that is repeated least, and of the one that is repeated most
    lacking: Sequence[str]  # what the stage asks for in vain, one line each

    def __str__(self) -> str:
        few, many = self.epochs
        epochs = f"{few:.3g}" if f"{few:.3g}" == f"{many:.3g}" else f"{few:.3g} to {many:.3g}"
        return (
            f"steps {self.first_step:,} to {self.end_step:,}: {self.clips:,} clips of {self.hours:,.1f} h, the longest "
            f"{self.longest_sec:.1f} s; trains on {self.hours_heard:,.1f} h, {epochs} epochs, in {self.rows} rows a batch"
        )


def forecast(mix: Mix, index: Index, num_steps: int, patch_sec: float) -> list[Forecast]:
    """The stages that a run of `num_steps` updates reaches.

    Hours are estimated from a packed sample of each group; nothing but that sample is packed.
    """
    found = []
    for stage, following in zip(mix.stages, [*mix.stages[1:], None]):
        end = num_steps if following is None else min(num_steps, following.first_step)
        if end <= stage.first_step:
            break
        rows = stage.order.before((end - stage.first_step) * stage.batch.rows)
        lengths = [index.lengths.take(stream.clips) for stream in stage.streams]
        hours = [float(of["patches"].sum()) * patch_sec / 3600 for of in lengths]
        heard = [n / stream.rows_per_patch * patch_sec / 3600 for n, stream in zip(rows, stage.streams)]
        epochs = [one / whole for one, whole in zip(heard, hours)]
        longest = max(int(of["patches"].max()) for of in lengths) * patch_sec
        config, lacking = stage.config, []
        if config.max_sec is not None and longest < _FAR_SHORTER * config.max_sec:
            lacking.append(
                f"asks for clips of up to {config.max_sec:g} s, but the longest has {longest:.1f} s: prepare the shards with a "
                "longer --config.max_sec, or lower max_sec of the stage"
            )
        has_pair = index.pairs is not None and any((index.pairs[stream.clips] >= 0).any() for stream in stage.streams)
        # A share of 1 is the default: "wherever there is one".
        if 0 < config.reference < 1 and not has_pair and not any((of["reference"] > 0).any() for of in lengths):
            lacking.append(f"asks for reference clips (reference={config.reference:g}), but no clip has one")
        if 0 < config.described < 1 and not any((of["described"] > 0).any() for of in lengths):
            lacking.append(f"asks for descriptions (described={config.described:g}), but no clip has one")
        clips = sum(map(len, lengths))
        totals = clips, sum(hours), longest, sum(heard), (min(epochs), max(epochs))
        found.append(Forecast(stage.first_step, end, stage.batch.rows, *totals, lacking))
    return found
