"""Batches of any step: the rows that mixing.py plans, read from a source and put together ahead of time by threads.

    step -> Mix.rows -> clips read from the source -> laid out -> packed -> Batch

A batch depends on its step alone, so a run that resumes starts the iterator at the next step.
"""

from collections.abc import Callable, Iterator, Sequence

from voxcpm2_jax.data.clips import Draw, Source, label, lay_out_draw
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.sequence import Batch, pack


def batches(
    source: Source,
    mix: Mix,
    start_step: int = 0,
    *,
    prefetch: int = 2,
    rows_of: Callable[[int], Sequence[int]] = range,
) -> Iterator[Batch]:
    """The batches of steps start_step, start_step + 1, ... without end.

    Args:
        prefetch: batches that are assembled ahead.
        rows_of: maps the number of rows of a batch to the rows to assemble here. All by default; a run of several
            processes passes those that this process's devices hold.
    """
    import grain

    def batch_of(step: int) -> Batch:
        return host_rows(source, mix, step, rows_of(mix.batch_of(step).rows))

    steps = grain.MapDataset.range(start_step, 2**31)
    options = grain.ReadOptions(num_threads=max(1, prefetch), prefetch_buffer_size=max(1, prefetch))
    return iter(steps.map(batch_of).to_iter_dataset(options))


def host_rows(source: Source, mix: Mix, step: int, rows: Sequence[int] | None = None) -> Batch:
    """The batch of one step, or some of its rows."""
    budgets = mix.batch_of(step)
    return assemble(source, mix.rows(step, rows), num_slots=budgets.slots, num_patches=budgets.patches)


def assemble(source: Source, rows: Sequence[Sequence[Draw]], *, num_slots: int, num_patches: int) -> Batch:
    """The batch whose row i holds the draws rows[i]."""
    laid_out = [[lay_out_draw(source, draw) for draw in row] for row in rows]
    labels = [[label(source.index, draw) for draw in row] for row in rows]
    return pack(laid_out, num_slots=num_slots, num_patches=num_patches, patch_shape=source.patch_shape, labels=labels)
