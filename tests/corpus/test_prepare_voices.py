"""`prepare`: pairs of clips of one voice, and trimming of recordings by silence and by speech."""

import hashlib
import json

import numpy as np
import pytest
import soundfile

from voxcpm2_jax.config.corpus import DataConfig, PairsConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BatchConfig
from voxcpm2_jax.corpus import shard
from voxcpm2_jax.corpus.manifest import Recording, write_manifest
from voxcpm2_jax.corpus.prepare import make_shards
from voxcpm2_jax.corpus.trim import trim_silence
from voxcpm2_jax.data import pipeline
from voxcpm2_jax.data import shards as data_shards
from voxcpm2_jax.data.clips import NO_REFERENCE
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.shards import HEADER_FILE, LENGTHS_FILE, PAIRS_FILE, Shards, read_header
from voxcpm2_jax.sequence import REFERENCE_END_ID, REFERENCE_START_ID

RATE = 16000
PATCH = 4 * 640  # samples


class Bands:
    """A speaker encoder for tones: where in the spectrum their energy is."""

    hz, sha256 = 8000, hashlib.sha256(b"bands").hexdigest()

    def __call__(self, clips):
        spectra = [np.abs(np.fft.rfft(audio_A, 8000)[:4000]) ** 2 for audio_A in clips]
        return np.sqrt(np.stack([spectrum.reshape(8, 500).sum(axis=1) for spectrum in spectra]))


class OtherBands(Bands):
    sha256 = hashlib.sha256(b"other").hexdigest()


def tone(path, hz, sec, seed):
    rng = np.random.default_rng(seed)
    time_A = np.arange(round(sec * RATE)) / RATE
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * time_A) + 0.003 * rng.standard_normal(len(time_A)), RATE)
    return path


LOW, HIGH = 300, 2200
CLIPS = [  # speaker, session, Hz
    ("ann", "mon", LOW), ("ann", "mon", LOW), ("ann", "mon", HIGH), ("bob", "mon", LOW), ("ann", "mon", LOW),
    ("ann", "tue", LOW), ("ann", "tue", LOW), ("ann", "tue", LOW), (None, None, LOW), ("bob", "mon", LOW),
    ("ann", "mon", HIGH), ("ann", "mon", HIGH), ("bob", "mon", LOW),
]  # fmt: skip
PROMPT, SHORT = 9, 12
# A bad recording comes before clip 4; clip 9 is a prompt clip, clip 12 too short for a reference.
EXPECTED = [
    {1, 4}, {4}, {10, 11}, set(), {0, 1}, {6, 7}, {7}, {5}, set(), set(), {2, 11}, {2}, set(),
]  # fmt: skip


@pytest.fixture
def manifest(tmp_path):
    found = []
    for i, (speaker, session, hz) in enumerate(CLIPS):
        path = tone(tmp_path / f"{i}.wav", hz, 0.6 if i == SHORT else 1.0 + 0.16 * (i % 4), i)
        found.append(Recording(path, f"clip {i}", speaker=speaker, session=session, is_prompt=i == PROMPT))
    found.insert(4, Recording(tmp_path / "missing.wav", "missing", speaker="ann", session="mon"))
    write_manifest(tmp_path / "m.jsonl", found)
    return tmp_path / "m.jsonl"


@pytest.fixture
def make(tiny_parts, tmp_path, monkeypatch):
    """`make_shards` of the manifest with the tiny codec, into tmp_path/NAME."""
    monkeypatch.setattr(data_shards, "STD_RANGE", (0.0, np.inf))  # the codec is random
    monkeypatch.setattr(data_shards, "MAX_CHANNEL_STD", np.inf)
    _, _, vae, vae_params, tokenizer = tiny_parts
    tokenizer.save(tmp_path / "tokenizer")

    def made(name, pairs=None, **changes):
        fields = {
            "source": "manifest", "manifest": str(tmp_path / "m.jsonl"), "tokenizer": str(tmp_path / "tokenizer"),
            "shard_clips": 4, "encode_sec": 4.0, "latent_dtype": "float32",
            "pairs": PairsConfig(**({"encoder": f"{__name__}:Bands"} | pairs)) if pairs is not None else PairsConfig(),
        }  # fmt: skip
        return make_shards(DataConfig(**(fields | changes)), tmp_path / name, vae_params, vae)

    return made


def references(directory):
    return [set(row[row >= 0].tolist()) for row in np.load(directory / PAIRS_FILE)]


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_references_are_of_the_voice_and_session_and_sound_alike(make, manifest, tmp_path):
    header = make("out", {})
    assert references(tmp_path / "out") == EXPECTED
    assert header.models == {"speaker": {"name": f"{__name__}:Bands", "sha256": Bands.sha256}}
    settings = {"encoder": f"{__name__}:Bands", "min_cosine": 0.7, "references": 4, "min_sec": 1.0, "max_sec": 30.0}
    assert header.pairs == settings | {"need_session": False, "seed": 0, "clips": 9, "compared": 11, "order_unknown": 11}
    assert header == read_header(tmp_path / "out")
    # Audio is not stored twice: the records are those of a run without pairs.
    make("without")
    assert not (tmp_path / "without" / PAIRS_FILE).exists()
    for name in header.shards:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_batch_has_the_reference_in_front(make, manifest, tmp_path, monkeypatch):
    make("out", {})
    shards = Shards(tmp_path / "out")
    mix = Mix(0, shards.index, shards.patch_sec, BatchConfig(rows=2, slots=128, patches=64))
    with_reference = set()
    for step in range(4):
        batch = pipeline.host_rows(shards, mix, step)
        for row, draws in enumerate(mix.rows(step)):
            for segment, draw in enumerate(draws, 1):
                if draw.clip == PROMPT:
                    continue
                slots = np.flatnonzero(batch.segment_BT[row] == segment)
                tokens = batch.tokens_BT[row][slots]
                assert (draw.reference in EXPECTED[draw.clip]) == (REFERENCE_START_ID in tokens)
                if draw.reference == NO_REFERENCE:
                    continue
                first, last = (
                    slots[np.flatnonzero(tokens == special)[0]] for special in (REFERENCE_START_ID, REFERENCE_END_ID)
                )
                is_reference_M = (batch.slot_BM[row] > first) & (batch.slot_BM[row] < last)
                order = np.argsort(batch.slot_BM[row][is_reference_M])
                patches_MPC = batch.patches_BMPC[row][is_reference_M][order]
                np.testing.assert_array_equal(patches_MPC, shards[draw.reference].patches_MPC)
                assert not batch.target_BM[row][is_reference_M].any() and first == slots[0]
                with_reference.add(draw.clip)
    assert with_reference == {i for i, found in enumerate(EXPECTED) if found}


def test_stopped_and_shared_runs_choose_the_same(make, manifest, tmp_path, monkeypatch):
    expected = make("straight", {"references": 1})
    table = (tmp_path / "straight" / PAIRS_FILE).read_bytes()
    shared = [make("shared", {"references": 1}, host=i, num_hosts=3) for i in (1, 2, 0)]
    assert shared == [None, None, expected] and (tmp_path / "shared" / PAIRS_FILE).read_bytes() == table

    really, made = shard.make_shard, []

    def stops(directory, name, *args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(name)
        really(directory, name, *args)

    monkeypatch.setattr(shard, "make_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        make("stopped", {"references": 1})
    assert not (tmp_path / "stopped" / PAIRS_FILE).exists()
    monkeypatch.setattr(shard, "make_shard", lambda *args: (made.append(args[1]), really(*args)))
    assert make("stopped", {"references": 1}) == expected and len(made) == len(set(made)) == 4
    assert (tmp_path / "stopped" / PAIRS_FILE).read_bytes() == table


def test_pairs_may_be_chosen_anew_without_making_a_shard(make, manifest, tmp_path, monkeypatch):
    make("out", {})
    monkeypatch.setattr(shard, "make_shard", None)
    header = make("out", {"min_cosine": -1.0, "min_sec": 0.0})
    assert header.pairs["clips"] == 10 and header.pairs["min_cosine"] == -1.0
    assert references(tmp_path / "out")[3] == {12} and references(tmp_path / "out")[0] <= {1, 2, 4, 10, 11}
    for pairs in ({"encoder": f"{__name__}:OtherBands"}, None):
        with pytest.raises(UserError, match=r"holds shards made from something else .models: .*Bands.*, now"):
            make("out", pairs)


def test_an_encoder_that_is_none_leaves_nothing_behind(make, manifest, tmp_path):
    with pytest.raises(UserError, match=r"pairs\.encoder nothing:here: No module named 'nothing'"):
        make("out", {"encoder": "nothing:here"})
    assert not (tmp_path / "out").exists()


def test_shards_refuse_a_table_that_is_missing_or_of_other_clips(make, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(data_shards, "STD_RANGE", (0.0, np.inf))
    monkeypatch.setattr(data_shards, "MAX_CHANNEL_STD", np.inf)
    make("out", {})
    file, header_file = (tmp_path / "out" / name for name in (PAIRS_FILE, HEADER_FILE))
    pairs, header = np.load(file), header_file.read_text()
    without_checksums = json.dumps(json.loads(header) | {"crc32": {}})  # of shards made before there were checksums
    for wrong in (pairs[:-1], pairs + 13):
        np.save(file, wrong)
        for text, message in ((header, r"pairs\.npy: altered"), (without_checksums, r"pairs\.npy belongs to other clips")):
            header_file.write_text(text)
            with pytest.raises(UserError, match=message):
                Shards(tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"pairs\.npy missing"):
        Shards(tmp_path / "out")


# ---- ends ------------------------------------------------------------------------------------------------------------


def stored_patches(directory):
    return np.load(directory / LENGTHS_FILE)["patches"].tolist()


def test_silence_and_noise_at_the_ends(make, tmp_path):
    """Both ways of trimming cut silence; only the detector cuts noise and skips recordings without speech."""
    from hibari import Hibari

    from voxcpm2_jax.data import audio

    speech_A = audio.resample(Hibari(voice="heart", threads=1)("Good morning to you all.", seed=1), 24000, RATE)
    speech_A = trim_silence(speech_A, RATE)
    rng = np.random.default_rng(0)
    wide = (round(0.8 * RATE), 2 * RATE)
    noise_A = 0.01 * rng.standard_normal(sum(wide) + len(speech_A)).astype(np.float32)
    sounds = {"silence": np.pad(speech_A, wide), "noise": np.pad(speech_A, wide) + noise_A, "no": noise_A[: 2 * RATE]}
    for name, audio_A in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", audio_A, RATE)
    write_manifest(tmp_path / "m.jsonl", [Recording(tmp_path / f"{name}.wav", name) for name in sounds])

    def patches(*sec):
        return [-int(-(len(speech_A) / RATE + more) * RATE // PATCH) for more in sec]

    left, silence, vad = (make(trim, trim=trim) for trim in ("none", "silence", "vad"))
    assert stored_patches(tmp_path / "none") == [*patches(2.8, 2.8), 13]
    got = stored_patches(tmp_path / "silence")
    assert abs(got[0] - patches(0.4)[0]) <= 1 and got[1:] == [*patches(2.8), 13]
    got = stored_patches(tmp_path / "vad")
    assert len(got) == 2 and max(abs(n - patches(0.4)[0]) for n in got) <= 2
    assert vad.skipped == {"no speech": 1} and not silence.skipped and not left.skipped
    (line,) = (tmp_path / "vad" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "no speech" and "no.wav: no speech is detected" in json.loads(line)["message"]
    assert [(h.trim, h.trim_keep_ms) for h in (left, silence, vad)] == [("none", 200), ("silence", 200), ("vad", 200)]
    assert vad.models["vad"]["name"].startswith("silero_vad") and len(vad.models["vad"]["sha256"]) == 64
    assert left.models == silence.models == {}
    make("tight", trim="silence", trim_keep_ms=0.0)
    assert abs(stored_patches(tmp_path / "tight")[0] - patches(0.0)[0]) <= 1


def test_the_detector_must_be_installed(make, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    with pytest.raises(UserError, match=r"trim 'vad' needs faster-whisper.*pip install 'voxcpm2-jax\[eval\]'"):
        make("out", trim="vad")
    assert not (tmp_path / "out").exists()
