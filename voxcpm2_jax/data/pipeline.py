"""TODO data.pipeline."""

from collections.abc import Callable, Iterator, Sequence

from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.packing import Source, assemble
from voxcpm2_jax.sequence import Batch

# ---- batches ---------------------------------------------------------------------------------------------------------


def batches(
    source: Source,
    mix: Mix,
    start_step: int = 0,
    *,
    prefetch: int = 2,
    rows_of: Callable[[int], Sequence[int]] = range,
) -> Iterator[Batch]:
    """The batches of steps start_step, start_step + 1, .. without end, assembled ahead of time by threads.

    Args:
        prefetch: batches that are made ahead.
        rows_of: number of rows of a batch -> those that are assembled here; all by default, in a run of many processes those
            that this process's devices hold.
    """
    import grain

    def batch_of(step: int) -> Batch:
        return host_rows(source, mix, step, rows_of(mix.batch_of(step).rows))

    steps = grain.MapDataset.range(start_step, 2**31)
    options = grain.ReadOptions(num_threads=max(1, prefetch), prefetch_buffer_size=max(1, prefetch))
    return iter(steps.map(batch_of).to_iter_dataset(options))


def host_rows(source: Source, mix: Mix, step: int, rows: Sequence[int] | None = None) -> Batch:
    """The batch of one step, or some rows of it."""
    budgets = mix.batch_of(step)
    return assemble(source, mix.rows(step, rows), num_slots=budgets.slots, num_patches=budgets.patches)
