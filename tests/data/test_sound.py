"""Faults of the sound are measured, and mended or refused as the rules say."""

import numpy as np
import pytest

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.sound import SoundConfig
from voxcpm2_jax.data import audio, sound

HZ = 16000
X_A = np.random.default_rng(0).standard_normal(2 * HZ).astype(np.float32) * 0.1
Y_A = np.random.default_rng(1).standard_normal(2 * HZ).astype(np.float32) * 0.1


def load(*channels, **rules):
    stored = audio.Stored("clip", lambda: (np.stack(channels, axis=1), HZ))
    return audio.load(stored, HZ, rules=SoundConfig(**rules))


def faults(*channels):
    return sound.faults(sound.measure(np.stack(channels, axis=1).astype(np.float32), HZ))


def test_a_recording_without_fault_stays_as_it_is():
    np.testing.assert_array_equal(load(X_A), X_A)
    np.testing.assert_array_equal(load(X_A, Y_A), (X_A + Y_A) / 2)
    np.testing.assert_array_equal(load(X_A, X_A), X_A)
    assert not faults(X_A) and not faults(X_A, Y_A) and not faults(X_A, Y_A, X_A, Y_A, X_A, Y_A)
    hum_A = 0.01 * np.sin(2 * np.pi * 100 * np.arange(HZ) / 48000)  # quiet and slow: its tops are flat by rounding
    assert "clipping" not in faults(np.round(hum_A * 2**15) / 2**15)
    assert "clipping" not in faults(30 * hum_A)


@pytest.mark.parametrize("gain", [0.0, 1e-3])
def test_a_dead_channel_is_left_out(gain):
    assert faults(X_A, gain * Y_A)["dead channel"].endswith("the mean of all loses 6.0 dB")
    np.testing.assert_array_equal(load(X_A, gain * Y_A), X_A)
    np.testing.assert_array_equal(load(gain * Y_A + 0.5, X_A), X_A)  # an offset alone is no sound
    np.testing.assert_array_equal(load(X_A, 0 * X_A, Y_A), (X_A + Y_A) / 2)
    np.testing.assert_array_equal(load(X_A, gain * Y_A, channels="keep"), (X_A + gain * Y_A) / 2)
    with pytest.raises(audio.BadRecording, match="clip: dead channel: 1 of 2"):
        load(X_A, gain * Y_A, channels="skip")


def test_of_channels_that_cancel_the_loudest_is_taken():
    for other_A in (-X_A, -0.8 * X_A, -X_A + 0.1 * Y_A):
        assert "correlation -" in faults(X_A, other_A)["channels cancel"]
        loudest_A = max((X_A, other_A), key=lambda x_A: x_A.var())
        np.testing.assert_array_equal(load(X_A, other_A), loudest_A)
    np.testing.assert_array_equal(load(X_A, -X_A + 2 * Y_A), (X_A + (-X_A + 2 * Y_A)) / 2)
    with pytest.raises(audio.BadRecording, match="silent"):
        load(X_A, -X_A, channels="keep")
    with pytest.raises(audio.BadRecording, match=r"channels cancel: correlation -1.00; the mean of 2 loses everything"):
        load(X_A, -X_A, channels="skip")


def test_an_offset_is_subtracted():
    np.testing.assert_allclose(load(X_A + 0.3), X_A - X_A.mean(), atol=1e-6)
    np.testing.assert_array_equal(load(X_A + np.float32(0.3), offset="keep"), X_A + np.float32(0.3))
    with pytest.raises(audio.BadRecording, match=r"offset: a mean of \+0.3"):
        load(X_A + 0.3, offset="skip")
    with pytest.raises(audio.BadRecording, match="silent"):
        load(np.full(HZ, 0.2))


def test_samples_in_another_unit():
    for scale in (2**15, 2**23, 2**31):
        with pytest.raises(audio.BadRecording, match=r"wrong scale: samples up to [\d,e.+]+, full scale is 1"):
            load(X_A * scale)
        with pytest.raises(audio.BadRecording, match="wrong scale"):
            audio.load(audio.Stored("clip", lambda: (X_A * scale, HZ)), HZ)  # noqa: B023
        np.testing.assert_allclose(load(X_A * scale, scale="mend"), X_A, rtol=1e-6)
    np.testing.assert_array_equal(load(10 * X_A), 10 * X_A)  # loud, but in this unit


def test_quiet_recordings_are_lifted_where_it_is_asked_for():
    quiet_A = np.concatenate([0.02 * X_A, np.zeros(3 * HZ, np.float32)])
    assert faults(quiet_A)["quiet"].startswith("speech at -54.")
    np.testing.assert_array_equal(load(quiet_A), quiet_A)
    lifted_A = load(quiet_A, quiet="mend", level_db=-30.0)
    assert 20 * np.log10(lifted_A[: len(X_A)].std()) == pytest.approx(-30, abs=0.1)
    spike_A = quiet_A.copy()
    spike_A[100] = 0.03
    assert 0.9 < np.abs(load(spike_A, quiet="mend", level_db=-6.0)).max() <= 1
    np.testing.assert_array_equal(load(X_A, quiet="mend"), X_A)
    with pytest.raises(audio.BadRecording, match="quiet: speech at -54"):
        load(quiet_A, quiet="skip")


def test_clipping_is_found_at_any_height():
    for top in (1.0, 0.5):
        clipped_A = np.clip(20 * X_A, -top, top)
        assert faults(clipped_A)["clipping"].endswith(" % of the samples")
        np.testing.assert_array_equal(load(clipped_A), clipped_A)
        with pytest.raises(audio.BadRecording, match="clipping: "):
            load(clipped_A, clipped="skip")
    assert "clipping" in faults(X_A, np.clip(20 * Y_A, -0.5, 0.5))  # of one channel


def test_numbers_that_are_not_finite_are_placed():
    x_A = X_A.copy()
    x_A[[4000, 9000]] = np.nan, -np.inf
    with pytest.raises(audio.BadRecording, match=r"clip: samples that are not finite numbers, the first at 0.250 s"):
        load(x_A, Y_A)


def test_rules_are_checked():
    for field, value in (("cut", "mend"), ("quiet", "lift"), ("channels", ""), ("level_db", 0.0)):
        with pytest.raises(UserError, match=f"sound.{field} must"):
            SoundConfig(**{field: value})


def test_the_end_of_the_spectrum():
    rng = np.random.default_rng(0)
    white_A = rng.standard_normal(48000).astype(np.float32) * 0.1
    assert sound.spectrum_end(white_A, 16000) == 8000
    for hz, new_hz in ((8000, 16000), (16000, 48000), (22050, 44100), (24000, 48000)):
        resampled_A = audio.resample(white_A, hz, new_hz)
        for noise in (0, 2**-15):  # of 16 bits
            end = sound.spectrum_end(resampled_A + np.float32(noise) * rng.standard_normal(len(resampled_A)), new_hz)
            assert end == pytest.approx(hz / 2, rel=0.05)
    falling_A = np.cumsum(white_A) - np.cumsum(white_A).mean()  # 6 dB an octave, as voices
    assert sound.spectrum_end(falling_A, 48000) == 24000
    for hz in (100, 440, 3000):  # a tone has no spectrum
        assert sound.spectrum_end(np.sin(2 * np.pi * hz * np.arange(48000) / 16000), 16000) == 8000
    assert sound.spectrum_end(white_A[:100], 16000) == 8000
