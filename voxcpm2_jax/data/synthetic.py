"""TODO data.synthetic."""

import math

import numpy as np

from voxcpm2_jax.data.packing import PATCHES, TEXT, Clip, Index

# ---- synthetic corpus ------------------------------------------------------------------------------------------------


class Synthetic:
    """A seeded corpus in memory that a model can learn: each token sounds for `patches_per_token` patches.

    A token has its own mean patch; a clip's patches are those means of its tokens in turn, plus noise, at unit variance.
    So what is said, how it goes on and when it ends all follow from the text. Ids of special tokens do not occur.

    Args:
        num_clips: clips of an epoch.   vocab_size: ids 105 .. vocab_size - 1 occur.   patch_shape: (P, C).
        median_patches, sigma, max_patches: of the log-normal distribution of a clip's patches.
        noise: standard deviation that does not follow from the tokens.
    """

    def __init__(
        self,
        seed: int,
        *,
        num_clips: int = 512,
        vocab_size: int = 512,
        patch_shape: tuple[int, int] = (4, 64),
        patch_sec: float = 0.16,
        median_patches: float = 12.0,
        sigma: float = 0.5,
        max_patches: int = 375,
        patches_per_token: int = 2,
        noise: float = 0.3,
    ):
        first_id = 105
        assert vocab_size > first_id and max_patches >= patches_per_token
        rng = np.random.default_rng((seed, 0))
        patches = median_patches * np.exp(sigma * rng.standard_normal(num_clips))
        tokens = np.clip(np.rint(patches / patches_per_token), 1, max_patches // patches_per_token).astype(np.int32)
        lengths = np.zeros((num_clips, 6), np.int32)
        lengths[:, TEXT], lengths[:, PATCHES] = tokens, tokens * patches_per_token
        self.index = Index(lengths, (("synthetic", "none"),))
        self.patch_shape, self.patch_sec, self.vocab_size = patch_shape, patch_sec, vocab_size
        self._seed, self._repeats, self._noise, self._first_id = seed, patches_per_token, noise, first_id
        self._mean_VPC = rng.standard_normal((vocab_size, *patch_shape), np.float32) * np.float32(math.sqrt(1 - noise**2))

    def __len__(self) -> int:
        return len(self.index.lengths)

    def __getitem__(self, index: int) -> Clip:
        rng = np.random.default_rng((self._seed, 1, int(index)))
        text_ids = rng.integers(self._first_id, self.vocab_size, self.index.lengths[index, TEXT], dtype=np.int32)
        mean_MPC = np.repeat(self._mean_VPC[text_ids], self._repeats, axis=0)
        noise_MPC = rng.standard_normal(mean_MPC.shape, np.float32)
        return Clip(text_ids, mean_MPC + np.float32(self._noise) * noise_MPC, dataset="synthetic")


def synthetic_corpus(seed: int, **options) -> Synthetic:
    """A seeded in-memory corpus with the face of shards; options as in `Synthetic`."""
    return Synthetic(seed, **options)
