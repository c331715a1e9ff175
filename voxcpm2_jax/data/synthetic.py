"""A seeded corpus in memory that a model can learn; `train --config=configs/backbone.py:tiny`, benchmarks and tests use it."""

import math

import numpy as np

from voxcpm2_jax.data.clips import LENGTHS, Clip, Index

_FIRST_ID = 105  # the special ids lie below


class Synthetic:
    """Clips in which each token sounds for `patches_per_token` patches; a clips.Source.

    Every token has its own mean patch. The latents of a clip are the mean patches of its tokens in order, plus noise, at
    unit variance. So the text determines what comes, in which order, and where it ends.

    Args:
        num_clips: clips of an epoch.   vocab_size: ids 105 .. vocab_size - 1 occur.   patch_shape: (P, C).
        median_patches, sigma, max_patches: of the log-normal distribution of a clip's patches.
        noise: standard deviation of the part that does not follow from the tokens.
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
        assert vocab_size > _FIRST_ID and max_patches >= patches_per_token
        rng = np.random.default_rng((seed, 0))
        patches = median_patches * np.exp(sigma * rng.standard_normal(num_clips))
        tokens = np.clip(np.rint(patches / patches_per_token), 1, max_patches // patches_per_token).astype(np.int32)
        lengths = np.zeros(num_clips, LENGTHS)
        lengths["text"], lengths["patches"] = tokens, tokens * patches_per_token
        self.index = Index(lengths, (("synthetic", "none"),))
        self.patch_shape, self.patch_sec, self.vocab_size = patch_shape, patch_sec, vocab_size
        self._seed, self._repeats, self._noise = seed, patches_per_token, noise
        self._mean_VPC = rng.standard_normal((vocab_size, *patch_shape), np.float32) * np.float32(math.sqrt(1 - noise**2))

    def __len__(self) -> int:
        return len(self.index.lengths)

    def __getitem__(self, index: int) -> Clip:
        rng = np.random.default_rng((self._seed, 1, int(index)))
        text_ids = rng.integers(_FIRST_ID, self.vocab_size, self.index.lengths["text"][index], dtype=np.int32)
        mean_MPC = np.repeat(self._mean_VPC[text_ids], self._repeats, axis=0)
        noise_MPC = rng.standard_normal(mean_MPC.shape, np.float32)
        return Clip(text_ids, mean_MPC + np.float32(self._noise) * noise_MPC, dataset="synthetic")
