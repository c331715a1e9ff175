"""Layouts: text and audio become the slots of a sequence, and sequences become the rows of a batch.

    zero-shot                    text 101 [audio] 102
    reference                    103 (ref) 104 text 101 [audio] 102
    continuation                 prompt-text text 101 (prompt) [audio]
    reference + continuation     103 (ref) 104 prompt-text text 101 (prompt) [audio]
    prompt clip (`is_prompt`)    text 103 (audio) 104

A slot holds a token id or one patch of P latent frames. The numbers are special tokens: 101 and 102 are start and end of the
audio to speak, 103 and 104 start and end of a recording that is only read. [..] bears loss in training and is drawn in
generation; (..) is given: `ref` is a reference clip, a voice to clone, and `prompt` is audio that generation continues.
A *prompt clip* is something else, a training clip that bears no loss. All inputs of training and generation are built here.

Source: VoxCPM2 report, "unified sequence organisation".
"""

import dataclasses
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import jax
import numpy as np

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
AUDIO_START_ID, AUDIO_END_ID = 101, 102
REFERENCE_START_ID, REFERENCE_END_ID = 103, 104


class Sequence(NamedTuple):
    """One clip laid out in slots."""

    tokens_T: np.ndarray  # int32: token id, 0 where the slot holds a patch
    patches_MPC: np.ndarray  # float32 latents in slot order
    slot_M: np.ndarray  # int32: the slot of each patch
    target_M: np.ndarray  # bool: whether the patch bears loss
    stop_M: np.ndarray  # int32: 1 at the last target patch

    @property
    def num_slots(self) -> int:
        return len(self.tokens_T)

    @property
    def num_patches(self) -> int:
        return len(self.slot_M)

    @property
    def num_targets(self) -> int:
        return int(self.target_M.sum())


def lay_out(text_ids, *, reference_MPC=None, prompt_MPC=None, target_MPC=None) -> Sequence:
    """The sequence of a training clip, or without `target_MPC` the prefix that generation continues.

    Args:
        text_ids: int, one-dimensional; for a continuation the prompt's text and the text to speak, tokenised as one string.
        reference_MPC: latents of the reference clip.   prompt_MPC: latents of the audio to continue.
        target_MPC: latents of the clip itself.
    """
    parts = []
    if reference_MPC is not None:
        parts += [[REFERENCE_START_ID], (reference_MPC, False), [REFERENCE_END_ID]]
    parts += [text_ids, [AUDIO_START_ID]]
    if prompt_MPC is not None:
        parts += [(prompt_MPC, False)]
    if target_MPC is not None:
        parts += [(target_MPC, True), [AUDIO_END_ID]]
    return _join(parts)


def lay_out_prompt_clip(text_ids, audio_MPC) -> Sequence:
    """The sequence of a clip with `is_prompt`: the model only reads it, nothing in it bears loss."""
    return _join([text_ids, [REFERENCE_START_ID], (audio_MPC, False), [REFERENCE_END_ID]])


def _join(parts) -> Sequence:
    tokens, patches, slots, targets = [], [], [], []
    for part in parts:
        if isinstance(part, tuple):
            patches_MPC, is_target = part
            start, n = sum(map(len, tokens)), len(patches_MPC)
            tokens.append(np.zeros(n, np.int32))
            slots.append(np.arange(start, start + n, dtype=np.int32))
            patches.append(np.asarray(patches_MPC, np.float32))
            targets.append(np.full(n, is_target))
        else:
            tokens.append(np.asarray(part, np.int32))
    target_M = np.concatenate(targets or [np.zeros(0, bool)])
    stop_M = np.zeros(len(target_M), np.int32)
    stop_M[np.flatnonzero(target_M)[-1:]] = 1
    return Sequence(
        tokens_T=np.concatenate(tokens),
        patches_MPC=np.concatenate(patches) if patches else np.zeros((0, 1, 1), np.float32),
        slot_M=np.concatenate(slots or [np.zeros(0, np.int32)]),
        target_M=target_M,
        stop_M=stop_M,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of T slots and M audio patches; numpy or jax arrays, masks bool or int.

    Attributes:
        tokens_BT: text id, or 0.   segment_BT: 1.. per clip of the row, 0 = padding.
        position_BT: slot within the segment.   patches_BMPC: latents of the row's patches, in any order.
        slot_BM: slot of each patch, -1 = unused.   target_BM: whether it bears loss.
        stop_BM: 1 on a clip's last target patch.   label_BM: the label of each patch's clip, which numbers its dataset,
            language and mode together (data/packing.py); -1 = unused. Only figures use it; None: no labels.
    """

    tokens_BT: Any
    segment_BT: Any
    position_BT: Any
    patches_BMPC: Any
    slot_BM: Any
    target_BM: Any
    stop_BM: Any
    label_BM: Any = None


def pack(
    rows: Seq[Seq[Sequence]],
    *,
    num_slots: int,
    num_patches: int,
    patch_shape: tuple[int, int],
    labels: Seq[Seq[int]] | None = None,
) -> Batch:
    """Writes the sequences of each row side by side. In a row all target patches come before all other patches.

    Args:
        rows: the sequences of each row.   num_slots: T.   num_patches: M.   patch_shape: (P, C).
        labels: of each sequence in each row, for `Batch.label_BM`.
    """
    B, T, M = len(rows), num_slots, num_patches
    batch = Batch(
        tokens_BT=np.zeros((B, T), np.int32),
        segment_BT=np.zeros((B, T), np.int32),
        position_BT=np.zeros((B, T), np.int32),
        patches_BMPC=np.zeros((B, M, *patch_shape), np.float32),
        slot_BM=np.full((B, M), -1, np.int32),
        target_BM=np.zeros((B, M), bool),
        stop_BM=np.zeros((B, M), np.int32),
        label_BM=None if labels is None else np.full((B, M), -1, np.int32),
    )
    for b, row in enumerate(rows):
        t = 0
        next_target, next_other = 0, sum(s.num_targets for s in row)
        for i, s in enumerate(row):
            n = s.num_slots
            assert t + n <= T, f"row {b}: {t + n} slots do not fit {T}"
            batch.tokens_BT[b, t : t + n] = s.tokens_T
            batch.segment_BT[b, t : t + n] = i + 1
            batch.position_BT[b, t : t + n] = np.arange(n)
            for is_target, start in ((True, next_target), (False, next_other)):
                chosen = np.flatnonzero(s.target_M == is_target)
                m = slice(start, start + len(chosen))
                assert m.stop <= M, f"row {b}: {m.stop} patches do not fit {M}"
                batch.patches_BMPC[b, m] = s.patches_MPC[chosen].reshape(-1, *patch_shape)
                batch.slot_BM[b, m] = s.slot_M[chosen] + t
                batch.target_BM[b, m] = is_target
                batch.stop_BM[b, m] = s.stop_M[chosen]
                if labels is not None:
                    batch.label_BM[b, m] = labels[b][i]
                if is_target:
                    next_target = m.stop
                else:
                    next_other = m.stop
            t += n
    return batch
