"""Statistics of latents: sums over frames that can be added up, whoever computed them."""

import numpy as np

MOMENTS = np.dtype(
    [
        ("total", "f8"),  # sum over all frames
        ("squares", "f8"),  # sum of squares
        ("least", "f8"),
        ("largest", "f8"),
    ]
)


class Moments:
    """Statistics of every latent channel, from which the header's mean, deviation and range are computed."""

    def __init__(self, channels: int):
        self.num_frames = 0
        self.table = np.zeros(channels, MOMENTS)
        self.table["least"], self.table["largest"] = np.inf, -np.inf

    def add(self, patches_MPC: np.ndarray) -> None:
        """Adds the frames of a clip."""
        frames_TC = patches_MPC.reshape(-1, patches_MPC.shape[-1]).astype(np.float64)
        table = np.zeros(len(self.table), MOMENTS)
        table["total"], table["squares"] = frames_TC.sum(axis=0), (frames_TC**2).sum(axis=0)
        table["least"], table["largest"] = frames_TC.min(axis=0), frames_TC.max(axis=0)
        self.merge(table, len(frames_TC))

    def merge(self, table: np.ndarray, num_frames: int) -> None:
        """Adds the statistics of other frames."""
        self.num_frames += num_frames
        for name, combine in (("total", np.add), ("squares", np.add), ("least", np.minimum), ("largest", np.maximum)):
            self.table[name] = combine(self.table[name], table[name])

    @property
    def mean_C(self) -> np.ndarray:
        return self.table["total"] / self.num_frames

    @property
    def std_C(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.table["squares"] / self.num_frames - self.mean_C**2, 0))
