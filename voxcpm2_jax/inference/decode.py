"""The decode loop: prefixes in, audio patches out, for a batch of rows.

    prefill   reads each row's prefix into a KV cache
    step      noise -> LocDiT -> patch; stop head; patch -> LocEnc -> TSLM -> RALM
    loop      `while_loop` over `step` until every row is done; `stream` calls the same step once per patch

A row's result does not depend on the other rows: patch i of a row is drawn with `fold_in(row's key, i)`. So many rows are
drawn in several batches, of BATCH_SLOTS cache slots at most, and memory does not depend on their number. Shapes, the number of
rows among them, are rounded up to powers of two, so that few programs are compiled.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from voxcpm2_jax import sequence
from voxcpm2_jax.config.model import ModelConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.models import generation

# Why a row ended: the stop head, the request's max_len (or the end of its noise), or the model's max_length.
STOP, MAX_LEN, NO_ROOM = "stop head", "max_len", "max_length"

# Rows x slots of the KV caches of a batch, unless one row needs more. In the release a slot takes 37 kB in bfloat16: 1.2 GB.
BATCH_SLOTS = 1 << 15


@dataclasses.dataclass(frozen=True)
class Row:
    """One row to draw; `inference.api` makes it from a Request.

    Attributes:
        prefix: laid out without a target.
        seed: of the row's noise.   noise_MPC: replaces the noise; every row of a batch has it or none.
        min_len, max_len: the stop head is ignored for the first `min_len + 1` patches; at most `max_len` patches.
        cfg_value: guidance.
    """

    prefix: sequence.Sequence
    seed: int
    noise_MPC: np.ndarray | None
    min_len: int
    max_len: int
    cfg_value: float


class Drawn(NamedTuple):
    """The result of one row."""

    patches_MPC: np.ndarray  # float32
    stopped_by: str  # STOP, MAX_LEN or NO_ROOM


class RowArrays(NamedTuple):
    """The settings of all rows as arrays."""

    keys_B: jax.Array
    noise_BMPC: jax.Array | None
    min_len_B: jax.Array
    max_len_B: jax.Array
    cfg_B: jax.Array


class State(NamedTuple):
    """The loop's state between two patches. Rows that are done are still computed; what they draw is discarded."""

    index: jax.Array  # patches drawn so far
    step: generation.Step
    is_done_B: jax.Array
    is_stopped_B: jax.Array  # done because of the stop head
    num_patches_B: jax.Array  # patches of the row's result


@partial(jax.jit, static_argnames=("config", "cache_slots"))
def prefill(params, config: ModelConfig, batch: sequence.Batch, *, cache_slots: int) -> State:
    """The state before the first patch; one prefix per row of `batch`."""
    step = generation.prefill(params, config, batch, cache_slots=cache_slots)
    B = len(step.length_B)
    return State(jnp.int32(0), step, jnp.zeros(B, bool), jnp.zeros(B, bool), jnp.zeros(B, jnp.int32))


def _decode_step(params, config: ModelConfig, state: State, rows: RowArrays, *, num_steps: int):
    """Draws one patch for every row -> (state, patch_BPC)."""
    if rows.noise_BMPC is None:
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(rows.keys_B, state.index)
        noise_BPC = jax.vmap(lambda key: jax.random.normal(key, (config.patch_size, config.feat_dim)))(keys_B)
    else:
        noise_BPC = rows.noise_BMPC[:, state.index]
    patch_BPC, stop_B = generation.draw_patch(params, config, state.step, noise_BPC, num_steps=num_steps, cfg_value=rows.cfg_B)
    # The stop rule, as in the PyTorch package: `index` counts from 0 and must be greater than min_len.
    stop_B &= state.index > rows.min_len_B
    is_last_B = state.index + 1 >= rows.max_len_B
    state = State(
        index=state.index + 1,
        step=generation.read_patch(params, config, state.step, patch_BPC),
        is_done_B=state.is_done_B | stop_B | is_last_B,
        is_stopped_B=jnp.where(state.is_done_B, state.is_stopped_B, stop_B),
        num_patches_B=jnp.where(state.is_done_B, state.num_patches_B, state.index + 1),
    )
    return state, patch_BPC


decode_step = jax.jit(_decode_step, static_argnames=("config", "num_steps"))


@partial(jax.jit, static_argnames=("config", "num_steps", "buffer_patches"))
def decode(params, config: ModelConfig, state: State, rows: RowArrays, *, num_steps: int, buffer_patches: int):
    """Draws until every row is done -> (patches_BMPC, num_patches_B, is_stopped_B); M is `buffer_patches`."""

    def body(carry):
        state, patches_BMPC = carry
        index = state.index
        state, patch_BPC = _decode_step(params, config, state, rows, num_steps=num_steps)
        return state, patches_BMPC.at[:, index].set(patch_BPC)

    patches_BMPC = jnp.zeros((len(state.is_done_B), buffer_patches, config.patch_size, config.feat_dim))
    state, patches_BMPC = jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].is_done_B), body, (state, patches_BMPC))
    return patches_BMPC, state.num_patches_B, state.is_stopped_B


def bucket(n: int, *, least: int = 32) -> int:
    """The next power of two, `least` at least."""
    return max(least, 1 << (n - 1).bit_length())


def _limit(config: ModelConfig, row: Row) -> int:
    """The most patches of a row: its own limit, the model's room, and the length of its noise.

    Raises:
        UserError: the prefix leaves no slot for a patch.
    """
    n = row.prefix.num_slots
    if n >= config.max_length:
        raise UserError(f"text and prompt audio take {n} slots of the model's {config.max_length} (max_length); shorten them")
    return min(row.max_len, config.max_length - n, len(row.noise_MPC) if row.noise_MPC is not None else row.max_len)


def _cache_slots(rows: Sequence[Row], limits: Sequence[int]) -> int:
    return bucket(bucket(max(row.prefix.num_slots for row in rows)) + max(limits))


def _start(params, config: ModelConfig, rows: Sequence[Row]) -> tuple[State, RowArrays]:
    """Prefills the rows."""
    limits = [_limit(config, row) for row in rows]
    batch = sequence.pack(
        [[row.prefix] for row in rows],
        num_slots=bucket(max(row.prefix.num_slots for row in rows)),
        num_patches=bucket(max(row.prefix.num_patches for row in rows), least=8),
        patch_shape=(config.patch_size, config.feat_dim),
    )
    noise_BMPC = None
    if any(row.noise_MPC is not None for row in rows):
        assert all(row.noise_MPC is not None for row in rows), "either all rows or none have noise"
        noise_BMPC = np.zeros((len(rows), bucket(max(limits)), config.patch_size, config.feat_dim), np.float32)
        for b, row in enumerate(rows):
            noise_BMPC[b, : limits[b]] = row.noise_MPC[: limits[b]]
    arrays = RowArrays(
        keys_B=jax.vmap(jax.random.key)(np.array([row.seed % 2**32 for row in rows], np.uint32)),
        noise_BMPC=noise_BMPC,
        min_len_B=np.array([row.min_len for row in rows], np.int32),
        max_len_B=np.array(limits, np.int32),
        cfg_B=np.array([row.cfg_value for row in rows], np.float32),
    )
    return prefill(params, config, batch, cache_slots=_cache_slots(rows, limits)), arrays


def _stopped_by(config: ModelConfig, row: Row, num_patches: int, is_stopped: bool) -> str:
    if is_stopped:
        return STOP
    is_full = row.prefix.num_slots + num_patches >= config.max_length and num_patches < row.max_len
    return NO_ROOM if is_full else MAX_LEN


def no_room(config: ModelConfig) -> UserError:
    """The error to raise for a row that was stopped by NO_ROOM."""
    return UserError(
        f"the speech did not end within the model's {config.max_length} slots (max_length), text and prompt audio included; "
        "shorten the text or set a smaller maximum length"
    )


def generate(params, config: ModelConfig, rows: Sequence[Row], *, num_steps: int) -> list[Drawn]:
    """Draws all rows, in as few batches as BATCH_SLOTS allows.

    Args:
        params: of the unrolled form (`voxcpm2.unrolled_params`).   num_steps: Euler steps per patch.
    Raises:
        UserError: a prefix leaves no slot for a patch.
    """
    drawn: dict[int, Drawn] = {}
    for group in _batches(config, rows):
        drawn |= zip(group, _generate(params, config, [rows[i] for i in group], num_steps=num_steps))
    return [drawn[i] for i in range(len(rows))]


def _batches(config: ModelConfig, rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of the rows of each batch; rows of about the same length share one."""
    limits = [_limit(config, row) for row in rows]
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (rows[i].prefix.num_slots + limits[i], i)):
        more = [*batches[-1], i] if batches else [i]
        if len(more) > 1 and len(more) * _cache_slots([rows[j] for j in more], [limits[j] for j in more]) > BATCH_SLOTS:
            batches.append([i])
        else:
            batches[-1:] = [more]
    return [sorted(batch) for batch in batches]


def _generate(params, config: ModelConfig, rows: Sequence[Row], *, num_steps: int) -> list[Drawn]:
    # One more row costs far less than a program for one more number of rows. The additional ones end with their first patch.
    more = bucket(len(rows), least=1) - len(rows)
    state, arrays = _start(params, config, [*rows, *[dataclasses.replace(rows[0], max_len=1)] * more])
    buffer_patches = bucket(max(arrays.max_len_B.tolist()))
    results = jax.device_get(decode(params, config, state, arrays, num_steps=num_steps, buffer_patches=buffer_patches))
    return [
        Drawn(patches_MPC[:n].copy(), _stopped_by(config, row, int(n), bool(is_stopped)))
        for row, patches_MPC, n, is_stopped in zip(rows, *results)
    ]


def stream(params, config: ModelConfig, row: Row, *, num_steps: int) -> Iterator[np.ndarray]:
    """Yields the patches [P, C] of one row as they are drawn; the same patches as `generate`.

    Raises:
        UserError: the prefix leaves no slot for a patch; or, after the last patch that fits, the speech has not ended.
    """
    state, arrays = _start(params, config, [row])
    while not state.is_done_B[0]:
        state, patch_BPC = decode_step(params, config, state, arrays, num_steps=num_steps)
        yield np.asarray(patch_BPC[0])
    if _stopped_by(config, row, int(state.num_patches_B[0]), bool(state.is_stopped_B[0])) == NO_ROOM:
        raise no_room(config)
