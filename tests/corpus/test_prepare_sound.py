"""What `prepare` does with recordings whose sound or container is at fault: the rules of DataConfig.sound."""

import numpy as np
import soundfile

from tests.corpus.codecs import VAE
from tests.data.containers import HZ, SPEECH_A, encoded, flac, wav, written
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.sound import SoundConfig
from voxcpm2_jax.corpus.encode import ClipEncoder
from voxcpm2_jax.corpus.manifest import Recording


def loaded(path, **rules):
    config = DataConfig("manifest", manifest="m", patch_size=2, trim="silence", trim_db=-40.0, sound=SoundConfig(**rules))
    return ClipEncoder(config, {}, VAE, None, None).load(Recording(path, "some words"))


def test_containers_that_lie(tmp_path):
    for name, content in {"pipe.wav": wav(0), "pipe.flac": flac(0), "a.m4a": encoded("ipod", "aac")}.items():
        (tmp_path / name).write_bytes(content)
        assert len(loaded(tmp_path / name).audio_A) / VAE.sample_rate > 1.9
    (tmp_path / "cut.wav").write_bytes(written("WAV")[:20000])
    bad = loaded(tmp_path / "cut.wav")
    assert bad.reason == "cut off" and "the header states 2.00 s, 0.62 s are there" in str(bad)
    assert len(loaded(tmp_path / "cut.wav", cut="keep").audio_A) / VAE.sample_rate < 0.7


def test_an_offset_does_not_switch_trimming_off(tmp_path):
    silence_A = np.zeros(HZ, np.float32)
    soundfile.write(tmp_path / "a.wav", np.concatenate([silence_A, SPEECH_A, silence_A]) + 0.1, HZ)
    assert 2.0 < len(loaded(tmp_path / "a.wav").audio_A) / VAE.sample_rate < 2.5
    assert loaded(tmp_path / "a.wav", offset="skip").reason == "offset"


def test_quiet_recordings_are_lifted_where_the_config_asks(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.01 * SPEECH_A, HZ)
    as_it_is, lifted = (loaded(tmp_path / "a.wav", quiet=rule).audio_A for rule in ("keep", "mend"))
    assert as_it_is.std() < 0.003 and 0.03 < lifted.std() < 0.06
    assert loaded(tmp_path / "a.wav", quiet="skip").reason == "quiet"
