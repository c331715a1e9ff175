import numpy as np

from tests.data.test_audio import tone
from voxcpm2_jax.corpus.trim import trim_silence


def test_trim_keeps_the_sound_and_what_was_asked_for():
    rate = 16000
    sound_A = tone(rate, 0.3)[:, 0]
    x_A = np.concatenate([np.zeros(4800, np.float32), sound_A, np.zeros(8000, np.float32)])
    got_A = trim_silence(x_A, rate, keep_ms=40)
    start = 4800 - 640
    np.testing.assert_array_equal(got_A, x_A[start : start + len(sound_A) + 1280])
    np.testing.assert_array_equal(trim_silence(sound_A, rate), sound_A)
    assert len(trim_silence(np.zeros(500, np.float32), rate)) == 500
