"""Speech from prefixes: prefill, one decode step, the jitted loop over it, and why each row stopped.

    prefill   reads each row's prefix into a cache
    step      noise -> LocDiT -> patch; stop?; patch -> LocEnc -> TSLM -> RALM
    loop      `while_loop` over step until every row has stopped; streaming calls the same step once a patch

Rows of a batch do not see each other. Every row has its own noise: patch i is drawn from `fold_in(key, i)`.
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
from voxcpm2_jax.models import voxcpm2

# Why a row ended: the model said so, the caller's limit, or no slot was left in the model.
STOP, MAX_LEN, NO_ROOM = "stop head", "max_len", "max_length"


@dataclasses.dataclass(frozen=True)
class Row:
    """What to draw for one row.

    Attributes:
        prefix: laid out without a target.   seed: of the row's noise.   noise_MPC: given noise in its place.
        min_len, max_len: the stop head is heeded from patch index `min_len + 1` on; at most `max_len` patches.
        cfg_value: guidance.
    """

    prefix: sequence.Sequence
    seed: int = 0
    noise_MPC: np.ndarray | None = None
    min_len: int = 2
    max_len: int = 4096
    cfg_value: float = 2.0


class Drawn(NamedTuple):
    """One row's speech."""

    patches_MPC: np.ndarray  # float32
    stopped_by: str  # STOP, MAX_LEN or NO_ROOM


class State(NamedTuple):
    """State of decoding between two patches; rows that are done draw on, unheard."""

    index: jax.Array  # patches drawn so far
    step: voxcpm2.Step
    is_done_B: jax.Array
    num_patches_B: jax.Array


class Request(NamedTuple):
    """The rows' settings as arrays."""

    keys_B: jax.Array
    noise_BMPC: jax.Array | None
    min_len_B: jax.Array
    max_len_B: jax.Array
    cfg_B: jax.Array


@partial(jax.jit, static_argnames=("config", "cache_slots"))
def prefill(params, config: ModelConfig, batch: sequence.Batch, *, cache_slots: int) -> State:
    step = voxcpm2.prefill(params, config, batch, cache_slots=cache_slots)
    B = len(step.length_B)
    return State(jnp.int32(0), step, jnp.zeros(B, bool), jnp.zeros(B, jnp.int32))


def _decode_step(params, config: ModelConfig, state: State, request: Request, *, num_steps: int):
    """One patch for every row -> (state, patch_BPC, stop_B: what the stop head says)."""
    if request.noise_BMPC is None:
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(request.keys_B, state.index)
        noise_BPC = jax.vmap(lambda key: jax.random.normal(key, (config.patch_size, config.feat_dim)))(keys_B)
    else:
        noise_BPC = request.noise_BMPC[:, state.index]
    patch_BPC, stop_B = voxcpm2.draw_patch(params, config, state.step, noise_BPC, num_steps=num_steps, cfg_value=request.cfg_B)
    num_patches_B = jnp.where(state.is_done_B, state.num_patches_B, state.index + 1)
    is_done_B = state.is_done_B | (stop_B & (state.index > request.min_len_B)) | (state.index + 1 >= request.max_len_B)
    step = voxcpm2.read_patch(params, config, state.step, patch_BPC)
    return State(state.index + 1, step, is_done_B, num_patches_B), patch_BPC, stop_B


decode_step = jax.jit(_decode_step, static_argnames=("config", "num_steps"))


@partial(jax.jit, static_argnames=("config", "num_steps", "buffer_patches"))
def decode(params, config: ModelConfig, state: State, request: Request, *, num_steps: int, buffer_patches: int):
    """Draws until every row is done -> (patches_BMPC, num_patches_B, stopped_B: by the stop head)."""
    B = len(state.is_done_B)

    def body(carry):
        state, patches_BMPC, stopped_B = carry
        index, was_done_B = state.index, state.is_done_B
        state, patch_BPC, stop_B = _decode_step(params, config, state, request, num_steps=num_steps)
        patches_BMPC = patches_BMPC.at[:, index].set(patch_BPC)
        stopped_B = jnp.where(was_done_B, stopped_B, stop_B & (index > request.min_len_B))
        return state, patches_BMPC, stopped_B

    empty = jnp.zeros((B, buffer_patches, config.patch_size, config.feat_dim))
    state, patches_BMPC, stopped_B = jax.lax.while_loop(
        lambda carry: ~jnp.all(carry[0].is_done_B), body, (state, empty, jnp.zeros(B, bool))
    )
    return patches_BMPC, state.num_patches_B, stopped_B


def bucket(n: int, *, least: int = 32) -> int:
    """The next power of two: few shapes, few compilations."""
    return max(least, 1 << (n - 1).bit_length())


def _start(params, config: ModelConfig, rows: Sequence[Row]):
    """Prefills the rows -> (state, request, limits): at most `limits[b]` patches fit behind prefix b."""
    slots = [row.prefix.num_slots for row in rows]
    for n in slots:
        if n >= config.max_length:
            raise UserError(
                f"text and prompt audio take {n} slots of the model's {config.max_length} (max_length); shorten them"
            )
    limits = [
        min(row.max_len, config.max_length - n, len(row.noise_MPC) if row.noise_MPC is not None else row.max_len)
        for row, n in zip(rows, slots)
    ]
    batch = sequence.pack(
        [[row.prefix] for row in rows],
        num_slots=bucket(max(slots)),
        num_patches=bucket(max(row.prefix.num_patches for row in rows), least=8),
        patch_shape=(config.patch_size, config.feat_dim),
    )
    cache_slots = bucket(batch.tokens_BT.shape[1] + max(limits))
    noise_BMPC = None
    if any(row.noise_MPC is not None for row in rows):
        assert all(row.noise_MPC is not None for row in rows), "given noise is for every row or for none"
        noise_BMPC = np.zeros((len(rows), bucket(max(limits)), config.patch_size, config.feat_dim), np.float32)
        for b, row in enumerate(rows):
            noise_BMPC[b, : limits[b]] = row.noise_MPC[: limits[b]]
    request = Request(
        keys_B=jax.vmap(jax.random.key)(np.array([row.seed % 2**32 for row in rows], np.uint32)),
        noise_BMPC=noise_BMPC,
        min_len_B=np.array([row.min_len for row in rows], np.int32),
        max_len_B=np.array(limits, np.int32),
        cfg_B=np.array([row.cfg_value for row in rows], np.float32),
    )
    return prefill(params, config, batch, cache_slots=cache_slots), request, limits


def _stopped_by(config: ModelConfig, row: Row, num_patches: int, is_stopped: bool) -> str:
    if is_stopped:
        return STOP
    is_full = row.prefix.num_slots + num_patches >= config.max_length and num_patches < row.max_len
    return NO_ROOM if is_full else MAX_LEN


def no_room(config: ModelConfig) -> UserError:
    """The error of a row that was stopped by NO_ROOM."""
    return UserError(
        f"the speech did not end within the model's {config.max_length} slots (max_length), text and prompt audio included; "
        "shorten the text or set a smaller maximum length"
    )


def generate(params, config: ModelConfig, rows: Sequence[Row], *, num_steps: int) -> list[Drawn]:
    """Draws all rows together.

    Args:
        params: of the unrolled form (`voxcpm2.unrolled_params`).   num_steps: Euler steps a patch.
    Raises:
        UserError: a prefix that fills the model.
    """
    state, request, limits = _start(params, config, rows)
    patches_BMPC, num_patches_B, stopped_B = jax.device_get(
        decode(params, config, state, request, num_steps=num_steps, buffer_patches=bucket(max(limits)))
    )
    return [
        Drawn(patches_MPC[:n], _stopped_by(config, row, int(n), bool(is_stopped)))
        for row, patches_MPC, n, is_stopped in zip(rows, patches_BMPC, num_patches_B, stopped_B)
    ]


def stream(params, config: ModelConfig, row: Row, *, num_steps: int) -> Iterator[np.ndarray]:
    """Yields the patches [P, C] of one row as they are drawn; the same patches as `generate`.

    Raises:
        UserError: a prefix that fills the model, or, when all that fits has been given, speech that did not end in it.
    """
    state, request, _ = _start(params, config, [row])
    is_stopped = False
    while not state.is_done_B[0]:
        state, patch_BPC, stop_B = decode_step(params, config, state, request, num_steps=num_steps)
        is_stopped = bool(stop_B[0]) and int(state.num_patches_B[0]) - 1 > row.min_len
        yield np.asarray(patch_BPC[0])
    if _stopped_by(config, row, int(state.num_patches_B[0]), is_stopped) == NO_ROOM:
        raise no_room(config)
