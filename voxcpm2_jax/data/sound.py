"""What the samples of a recording show: level, offset, clipping, channels, scale; and what can be mended of it.

    channels of a recording -> scale -> channels mixed -> offset -> level -> float32 [A]

Every step measures first and alters only what is beyond a limit, so a recording without a fault stays as it is: the mean of
its channels, which is what the PyTorch package's loader returns.
"""

import math
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.config.sound import KEEP, MEND, SKIP, SoundConfig

FULL_SCALE = 8.0  # a peak beyond it (18 dB over full scale) is no loud recording, but one in another unit
OFFSET = 0.01  # of the RMS of the loudest 10 ms: beyond it silence is not 40 dB below speech; noise has 1 / sqrt(samples)
QUIET_DB = -45.0  # RMS of the speech; recordings of speech have -35 to -15
CLIPPED = 1e-3  # share of the samples
DEAD_DB = -40.0  # a channel this far below the loudest one is dead
NARROW = 0.55  # of half the rate: a spectrum that ends below it fits into half the rate
WIDE = 0.9  # of half the rate: MP3 of 48 kHz does not reach it, that of 32 kHz does
_FLAT = 4  # equal samples in a row at the largest value are a flat top


class Figures(NamedTuple):
    """Measurements of a recording; levels in dB relative to full scale."""

    peak: float
    level_db: float  # RMS of the speech: of the 10 ms within 30 dB of the loudest
    offset: float  # mean of the samples
    offset_share: float  # the same relative to the loudest 10 ms
    is_offset: bool  # it is more than chance
    clipped: float  # share of the samples, in the worst channel
    channels: int
    dead: int  # of the channels
    correlation: float  # lowest one of the loudest channel with another live one; 1 for one channel
    lost_db: float  # level of the mean of all channels relative to the loudest channel


def measure(channels_AE: np.ndarray, rate: int) -> Figures:
    """The figures of a recording, not empty, as it is stored."""
    live_E, correlation, lost_db, _ = _channels(channels_AE)
    audio_A = mix(channels_AE)
    offset, loudest, level = _levels(audio_A, rate)
    return Figures(
        float(np.abs(channels_AE).max()), _db(level), offset, abs(offset) / loudest if loudest else 0.0,
        _is_offset(offset, loudest, len(audio_A)),
        max(clipped_share(channel_A) for channel_A in channels_AE.T),
        channels_AE.shape[1], int((~live_E).sum()), correlation, lost_db,
    )  # fmt: skip


def faults(figures: Figures) -> dict[str, str]:
    """The faults that figures show -> a note with the number for each."""
    found = {}
    if figures.peak > FULL_SCALE:
        found["wrong scale"] = f"samples up to {figures.peak:,.5g}, full scale is 1"
    if figures.is_offset:
        share = 100 * figures.offset_share
        found["offset"] = f"a mean of {figures.offset:+.4f} of full scale, {share:.0f} % of the loudest 10 ms"
    if figures.clipped > CLIPPED:
        found["clipping"] = f"{100 * figures.clipped:.2f} % of the samples"
    if figures.level_db < QUIET_DB:
        found["quiet"] = f"speech at {figures.level_db:.1f} dB of full scale, expected -35 to -15"
    if figures.dead:
        found["dead channel"] = (
            f"{figures.dead} of {figures.channels} channels; the mean of all loses {-figures.lost_db:.1f} dB"
        )
    elif _cancel(figures):
        lost = "everything" if figures.lost_db < -90 else f"{-figures.lost_db:.1f} dB"
        found["channels cancel"] = f"correlation {figures.correlation:+.2f}; the mean of {figures.channels} loses {lost}"
    return found


def _cancel(figures: Figures) -> bool:
    return figures.channels > 1 and figures.correlation < 0 and figures.lost_db < -_db(2 * math.sqrt(figures.channels))


def mend(channels_AE: np.ndarray, rate: int, rules: SoundConfig) -> tuple[np.ndarray, str, str]:
    """The audio [A] of a recording by some rules -> (audio, fault for which to skip it or "", a note with its number)."""
    peak = float(np.abs(channels_AE).max())
    if peak > FULL_SCALE:
        if rules.scale == SKIP:
            return channels_AE[:, 0], "wrong scale", f"samples up to {peak:,.5g}, full scale is 1"
        channels_AE = channels_AE / np.float32(next(2.0**bits for bits in (15, 23, 31, 128) if peak <= 2.0**bits))
    skipping = [name for name in ("channels", "offset", "clipped", "quiet") if getattr(rules, name) == SKIP]
    if skipping:
        kinds = {"clipping": "clipped", "dead channel": "channels", "channels cancel": "channels"}
        for kind, note in faults(measure(channels_AE, rate)).items():
            if kinds.get(kind, kind) in skipping:
                return channels_AE[:, 0], kind, note
    audio_A = channels_AE.mean(axis=1) if rules.channels == KEEP else mix(channels_AE)
    if rules.offset == MEND or rules.quiet == MEND:
        offset, loudest, level = _levels(audio_A, rate)
        if rules.offset == MEND and _is_offset(offset, loudest, len(audio_A)):
            audio_A = audio_A - np.float32(offset)
        if rules.quiet == MEND and level > 0 and _db(level) < QUIET_DB:
            gain = 10 ** (rules.level_db / 20) / level
            audio_A = audio_A * np.float32(min(gain, 0.99 / np.abs(audio_A).max()))
    return audio_A, "", ""


def mix(channels_AE: np.ndarray) -> np.ndarray:
    """One channel of several: the mean of those that are not dead; of those that cancel each other, the loudest one."""
    if channels_AE.shape[1] == 1:
        return channels_AE[:, 0]
    live_E, correlation, _, loudest = _channels(channels_AE)
    chosen_AE = channels_AE if live_E.all() else channels_AE[:, live_E]
    audio_A = chosen_AE.mean(axis=1)
    if correlation < 0:
        left = _power(audio_A[:, None])[0] / _power(channels_AE[:, [loudest]])[0]
        if left < 0.25 / chosen_AE.shape[1]:  # a quarter of what channels without correlation leave
            return channels_AE[:, loudest]
    return audio_A


def _channels(channels_AE: np.ndarray) -> tuple[np.ndarray, float, float, int]:
    """(which channels are live, lowest correlation, level of the mean of all in dB, the loudest one); see Figures."""
    power_E = _power(channels_AE)
    loudest = int(power_E.argmax())
    if len(power_E) == 1 or not power_E[loudest]:
        return np.ones(len(power_E), bool), 1.0, 0.0, loudest
    live_E = power_E > power_E[loudest] * 10 ** (DEAD_DB / 10)
    reference_A = channels_AE[:, loudest] - channels_AE[:, loudest].mean()
    correlations = [
        float(np.vdot(reference_A, channels_AE[:, i]) / len(channels_AE) / math.sqrt(power_E[loudest] * power_E[i]))
        for i in np.flatnonzero(live_E)
    ]
    lost = _power(channels_AE.mean(axis=1, keepdims=True))[0] / power_E[loudest]
    return live_E, min(correlations), _db(math.sqrt(lost)), loudest


def _power(channels_AE: np.ndarray) -> np.ndarray:
    """Mean square of each channel without its mean."""
    return channels_AE.var(axis=0, dtype=np.float64)


def _levels(audio_A: np.ndarray, rate: int) -> tuple[float, float, float]:
    """(mean, RMS of the loudest 10 ms, RMS of the 10 ms within 30 dB of it), the last two without the mean."""
    offset = float(audio_A.mean(dtype=np.float64))
    window = min(len(audio_A), max(1, rate // 100))
    blocks = audio_A[: len(audio_A) // window * window].reshape(-1, window) - np.float32(offset)
    power = np.mean(blocks.astype(np.float64) ** 2, axis=1)
    largest = power.max()
    return offset, math.sqrt(largest), math.sqrt(power[power >= largest * 1e-3].mean())


def _is_offset(offset: float, loudest: float, samples: int) -> bool:
    return abs(offset) > loudest * max(OFFSET, 4 / math.sqrt(samples))


def _db(ratio: float) -> float:
    return 20 * math.log10(max(ratio, 1e-10))


def clipped_share(audio_A: np.ndarray) -> float:
    """The share of samples at full scale, or in flat tops at another height; 0 for samples in another unit."""
    peak = np.abs(audio_A).max()
    if peak > FULL_SCALE:
        return 0.0
    share = float(np.mean(np.abs(audio_A) >= 0.9995))
    if peak < 0.1:  # of quiet sounds, rounding makes the tops flat
        return share
    flat = 0
    for bound in (audio_A.max(), audio_A.min()):
        at = np.flatnonzero(audio_A == bound)
        runs = np.diff(np.flatnonzero(np.diff(at, prepend=-2, append=at[-1] + 2) > 1))
        flat += int(runs[runs >= _FLAT].sum())
    return max(share, flat / len(audio_A))


# ---- the spectrum's end ------------------------------------------------------------------------------------------------

_BANDS = 96  # of the spectrum, up to half the rate
_FALL_DB = 15.0  # within four bands: filters of encoders and resamplers fall by more, voices by less


def spectrum_end(audio_A: np.ndarray, rate: int) -> float:
    """The frequency (Hz) at which the spectrum breaks off and never comes back; half the rate if it goes on to its end.

    Encoders and resamplers cut it: at 20.4 kHz an MP3 of 48 kHz, at 15.3 kHz one of 32 kHz (LAME, 96 kbit/s and more, measured
    with noise), at half the lower rate a recording that was resampled from it.
    """
    window = 8 * _BANDS
    if len(audio_A) < window:
        return rate / 2
    blocks = audio_A[: len(audio_A) // window * window].reshape(-1, window)
    power = np.zeros(window // 2)
    for part in np.array_split(blocks, max(1, len(blocks) // 256)):
        power += (np.abs(np.fft.rfft(part * np.hanning(window)))[:, 1:] ** 2).sum(axis=0)
    level = 10 * np.log10(power.reshape(_BANDS, -1).mean(axis=1) / len(blocks) + 1e-12)  # dB, of each band
    above = np.maximum.accumulate(level[::-1])[::-1]  # the loudest from a band on
    falls = level[:-4] - above[4:] > _FALL_DB
    if not falls.any():
        return rate / 2
    first = last = int(np.flatnonzero(falls)[-1])
    while first and falls[first - 1]:
        first -= 1
    has_spectrum = first > _BANDS // 10 and np.mean(level[: first + 1] > above[last + 4] + _FALL_DB) > 0.5  # a tone has none
    end = first + np.argmax(level[first : first + 5] < level[first] - 6)
    return float(end * rate / 2 / _BANDS) if has_spectrum else rate / 2
