"""Pictures of a report: spectrograms as PNG."""

import io
import os
import warnings

import numpy as np


def draw_spectrograms(
    path: str | os.PathLike, audio_A: np.ndarray, other_A: np.ndarray, rate: int, titles: tuple[str, str]
) -> None:
    """Draws the spectrograms of two clips side by side, as a PNG of about 40 kB.

    Args:
        audio_A, other_A: both at `rate` Hz.   titles: of the two spectrograms.
    """
    import matplotlib
    import PIL.Image

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), sharey=True, constrained_layout=True)
    window, hop = 1024, 256
    for axis, x_A, title in zip(axes, (audio_A, other_A), titles):
        x_A = np.pad(x_A, (0, max(0, window - len(x_A))))
        blocks = np.lib.stride_tricks.sliding_window_view(x_A, window)[::hop] * np.hanning(window)
        level_db = 20 * np.log10(np.abs(np.fft.rfft(blocks)).T + 1e-4)
        extent = (0, len(x_A) / rate, 0, rate / 2)
        axis.imshow(level_db, origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=30)
        axis.set_title(title, parse_math=False)  # a transcript may have dollar signs
        axis.set(xlabel="s")
    axes[0].set_ylabel("Hz")
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # its font lacks many scripts and draws boxes
        figure.savefig(drawn, dpi=75)
    pyplot.close(figure)
    PIL.Image.open(drawn).convert("RGB").quantize(32, dither=PIL.Image.Dither.NONE).save(path, format="PNG", optimize=True)
