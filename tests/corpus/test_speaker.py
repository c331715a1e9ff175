import itertools
import sys
import types

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from voxcpm2_jax.config.corpus import PairsConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import speaker
from voxcpm2_jax.data import audio

# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech():
    """Some speech of the English voice and of another one, at 16 kHz."""
    from hibari import Hibari

    from voxcpm2_jax.corpus import demo

    english, say = Hibari(voice="heart", threads=1), demo._espeak()
    clips = [english("Hello there, this is a sentence that lasts for some seconds.", seed=1), english("Three, seven.", seed=2)]
    clips += [say("de", "Guten Morgen, die Sonne scheint in den Garten.")]
    return [audio.resample(audio_A, 24000, speaker.Resemblyzer.hz) for audio_A in clips]


def test_embeddings_equal_those_of_resemblyzer_itself(speech, monkeypatch):
    # resemblyzer imports these two for its `preprocess_wav`, which drops pauses: a C extension, and a removed SciPy module.
    monkeypatch.setitem(sys.modules, "webrtcvad", types.ModuleType("webrtcvad"))
    monkeypatch.setitem(sys.modules, "scipy.ndimage.morphology", scipy.ndimage)
    from resemblyzer import VoiceEncoder
    from resemblyzer.audio import normalize_volume

    # Long and short, loud and quiet, lengths at which the last window is kept and dropped.
    clips = [*speech, speech[0][:5000], 1e-3 * speech[2], 2 * speech[0][: 16000 * 2], speech[0][:35000], speech[0][:40000]]
    original = VoiceEncoder("cpu", verbose=False)
    expected = [original.embed_utterance(normalize_volume(audio_A, -30, increase_only=True)) for audio_A in clips]
    got = speaker.embed(speaker.load_encoder("resemblyzer"), clips, 16000)
    np.testing.assert_allclose(got, np.stack(expected), atol=1e-5)
    cosine = got[:3] @ got[:3].T
    assert cosine[0, 1] > PairsConfig.min_cosine > cosine[:2, 2].max()  # one voice, and another


class Constant:
    hz, sha256 = 8000, "0" * 64

    def __call__(self, clips):
        return np.stack([[len(audio_A), 0.0] for audio_A in clips])


class Broken(Constant):
    def __call__(self, clips):
        return np.full((len(clips), 2), np.nan)


def test_any_encoder_may_be_named():
    encoder = speaker.load_encoder(f"{__name__}:Constant")
    np.testing.assert_array_equal(encoder([np.zeros(5)]), [[5.0, 0.0]])
    # Audio is resampled to the rate of the encoder, and its embeddings are scaled to unit length.
    np.testing.assert_allclose(speaker.embed(encoder, [np.ones(1600, np.float32)] * 2, 16000), [[1, 0]] * 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [("no.such:thing", "No module named 'no'"), (f"{__name__}:Missing", "Missing"), ("builtins:dict", "returns {}")],
)
def test_what_is_no_encoder_is_refused(name, message):
    with pytest.raises(UserError, match=rf"pairs\.encoder {name}: .*{message}.*; expected"):
        speaker.load_encoder(name)


def test_embeddings_must_be_numbers_one_row_a_clip():
    with pytest.raises(UserError, match=r"the speaker encoder returns \(1, 2\) for 1 clips; expected a row of finite numbers"):
        speaker.embed(Broken(), [np.ones(10, np.float32)], 8000)


def test_resemblyzer_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr(speaker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs resemblyzer: pip install 'voxcpm2-jax\[speaker\]'"):
        speaker.load_encoder("resemblyzer")


# ---- pairs -----------------------------------------------------------------------------------------------------------


def choose(origins, embeddings, sec=2.0, sizes=None, **config):
    """`speaker.choose` on tuples (file, start, end, voice) and an embedding for each."""
    origins_of_all = np.array([speaker.origin(*one) for one in origins], speaker.ORIGIN)
    stored = np.asarray(embeddings, np.float16)[origins_of_all["voice"] != 0]
    sizes = sizes or [len(stored)]
    ends = np.cumsum([0, *sizes])
    clip_sec = np.broadcast_to(sec, len(origins))
    return speaker.choose(
        origins_of_all, clip_sec, sizes, lambda shard: stored[ends[shard] : ends[shard + 1]], PairsConfig(**config)
    )


def references(pairs):
    return [set(row[row >= 0].tolist()) for row in pairs]


VOICE = ("d", "ann", "monday")
ALIKE = [1.0, 0.0]


def test_never_itself_nor_the_clip_directly_before():
    pairs = choose([(f"{i}.wav", None, None, VOICE) for i in range(5)], [ALIKE] * 5, references=5)
    assert references(pairs) == [{1, 2, 3, 4}, {2, 3, 4}, {0, 3, 4}, {0, 1, 4}, {0, 1, 2}]


def test_directly_before_is_by_time_within_a_file_and_the_same_part_is_one():
    parts = [("a", 2.0, 3.0), ("b", 0.0, 1.0), ("a", 0.0, 1.0), ("a", 1.0, 2.0), ("a", 1.0, 2.0), ("b", 1.0, 2.0)]
    pairs = choose([(*part, VOICE) for part in parts], [ALIKE] * 6, references=6)
    # In time: a 0..1 (2), a 1..2 (3 and 4), a 2..3 (0), b 0..1 (1), b 1..2 (5).
    assert references(pairs) == [{1, 2, 5}, {2, 3, 4, 5}, {0, 1, 3, 4, 5}, {0, 1, 5}, {0, 1, 5}, {0, 2, 3, 4}]


@pytest.mark.parametrize("is_known", [True, False])
def test_directly_before_in_a_shuffled_set_is_by_order(is_known):
    """Eight sessions of 25 clips, listed in any order, as TensorFlow's data sets are."""
    recorded = np.random.default_rng(0).permutation(200)
    origins = [
        (f"set#{i}", None, None, ("d", "ann", str(n // 25)), float(n) if is_known else None) for i, n in enumerate(recorded)
    ]
    pairs = choose(origins, [ALIKE] * 200)
    assert (pairs >= 0).all()
    before = recorded[:, None] - recorded[pairs] == 1
    assert not before.any() if is_known else before.mean() > 0.02
    table = np.array([speaker.origin(*one) for one in origins], speaker.ORIGIN)
    assert speaker.count_unordered(table) == (0 if is_known else 200)


def test_the_order_counts_before_the_place_in_the_list():
    """Parts of two files that were recorded in turn; a clip without an order comes first; parts of a file need none."""
    parts = [("a", 0.0, 1.0, 1), ("a", 1.0, 2.0, 3), ("b", 0.0, 1.0, 2), ("b", 1.0, 2.0, 4), ("c", None, None, None)]
    origins = [(*part[:3], VOICE, part[3]) for part in parts]
    assert references(choose(origins, [ALIKE] * 5, references=5)) == [{1, 2, 3}, {0, 3, 4}, {1, 3, 4}, {0, 2, 4}, {0, 1, 2, 3}]
    without = [(*part[:3], VOICE) for part in (*parts, ("d", 0.5, None), ("d", None, 0.5))]
    assert speaker.count_unordered(np.array([speaker.origin(*one) for one in without], speaker.ORIGIN)) == 1


def test_origins_of_earlier_versions_have_no_order():
    origins = np.array([speaker.origin("a", 1.0, None, VOICE, 7.0), speaker.origin("b", None, None, None)], speaker.ORIGIN)
    assert speaker.as_origins(origins) is origins
    earlier = np.zeros(2, speaker.ORIGIN.descr[:-1])
    for name in earlier.dtype.names:
        earlier[name] = origins[name]
    found = speaker.as_origins(earlier)
    assert np.isnan(found["order"]).all() and found.dtype == speaker.ORIGIN
    assert all((found[name] == origins[name]).all() for name in earlier.dtype.names)


def test_parts_that_overlap_are_no_pair():
    parts = [("a", None, None), ("b", None, None), ("a", 5.0, 6.0), ("c", None, None)]
    assert references(choose([(*part, VOICE) for part in parts], [ALIKE] * 4)) == [{1, 3}, {0, 3}, {1, 3}, {0, 2}]


def test_voices_stay_apart_and_who_has_none_has_no_pairs():
    voices = [("d", "ann", "mon"), ("d", "bob", "mon"), ("e", "ann", "mon"), ("d", "ann", "tue"), ("d", "ann", None), None]
    origins = [(f"{i}.wav", None, None, voice) for i, voice in enumerate(voices * 3)]
    expected = [set() if i % 6 == 5 else {i % 6, i % 6 + 6, i % 6 + 12} - {i, i - 6} for i in range(18)]
    assert references(choose(origins, [ALIKE] * 18)) == expected
    without = [set() if i % 6 == 4 else found for i, found in enumerate(expected)]
    assert references(choose(origins, [ALIKE] * 18, need_session=True)) == without


def test_only_what_sounds_alike_and_is_long_enough():
    embeddings = [[np.cos(x), np.sin(x)] for x in (0.0, 0.0, 0.5, 1.0, 1.5)]  # cos 0.5 = 0.88, cos 1 = 0.54
    origins = [(f"{i}.wav", None, None, VOICE) for i in range(5)]
    assert references(choose(origins, embeddings)) == [{1, 2}, {2}, {0, 3}, {4}, set()]
    assert references(choose(origins, embeddings, min_cosine=0.5)) == [{1, 2, 3}, {2, 3}, {0, 3, 4}, {0, 1, 4}, {2}]
    sec = np.array([1.0, 0.5, 2.0, 9.0, 1.0])
    assert references(choose(origins, embeddings, sec, min_sec=1.0, max_sec=5.0)) == [{2}, {2}, {0}, {4}, set()]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(1, 5))
def test_pairs_are_what_a_search_through_all_clips_finds(seed, count, k):
    rng = np.random.default_rng(seed)
    voices = [None, *[("d", name, session) for name in "ab" for session in ("x", "y", None)]]
    origins = []
    for _ in range(count):
        start = float(rng.integers(0, 5)) if rng.random() < 0.5 else None
        end = None if start is None or rng.random() < 0.3 else start + float(rng.integers(1, 3))
        origins.append((f"{rng.integers(0, 40)}.wav", start, end, voices[rng.integers(len(voices))]))
    embeddings = rng.normal(size=(count, 4))
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float16)
    sec = rng.uniform(0.5, 4.0, count)
    total = sum(voice is not None for *_, voice in origins)
    sizes = np.diff([0, *np.sort(rng.integers(0, total + 1, 3)), total]).tolist()
    pairs = choose(origins, embeddings, sec, sizes, references=k, min_cosine=0.2, max_sec=3.0, seed=seed)

    names = list(dict.fromkeys(file for file, *_, voice in origins if voice))
    for i, (file, start, end, voice) in enumerate(origins):
        if voice is None:
            assert (pairs[i] == -1).all()
            continue
        mine = sorted({(names.index(f), s or 0.0) for f, s, _, v in origins if v == voice})
        place = mine.index((names.index(file), start or 0.0))
        fits = set()
        for j, (f, s, e, v) in enumerate(origins):
            overlaps = f == file and (start or 0) < (e or 99) and (s or 0) < (end or 99)
            cosine = float(embeddings[i].astype(np.float32) @ embeddings[j].astype(np.float32))
            ok = 1.0 <= sec[j] <= 3.0 and cosine > 0.2 and v == voice
            if ok and not overlaps and place - mine.index((names.index(f), s or 0.0)) not in (0, 1):
                fits.add(j)
        found = pairs[i][pairs[i] >= 0].tolist()
        assert len(found) == len(set(found)) == min(k, len(fits)) and set(found) <= fits
        assert (pairs[i][len(found) :] == -1).all()


def crowd(count, seed=0):
    """One voice of many clips in two halves that sound different; every third clip of another voice."""
    rng = np.random.default_rng(seed)
    embeddings = np.eye(8)[rng.integers(0, 2, count)] + 0.05 * rng.normal(size=(count, 8))
    origins = [(f"{i}.wav", None, None, ("d", "other" if i % 3 == 0 else "ann", None)) for i in range(count)]
    return origins, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def test_a_large_voice_is_not_compared_with_all_of_itself(monkeypatch):
    origins, embeddings = crowd(3000)
    pairs = choose(origins, embeddings)
    assert (pairs >= 0).all()  # half of 256 candidates sound alike
    cosine = np.einsum("nd,nkd->nk", embeddings, embeddings[pairs])
    voice = np.arange(3000) % 3 == 0
    assert cosine.min() > 0.7 and (voice[pairs] == voice[:, None]).all() and (pairs != np.arange(3000)[:, None]).all()
    assert len(np.unique(pairs)) > 2500 and np.median(np.abs(pairs - np.arange(3000)[:, None])) > 500  # all, from anywhere
    assert not np.array_equal(pairs, choose(origins, embeddings, seed=1))
    sizes = []
    monkeypatch.setattr(speaker, "_choose_in_voice", _spy(speaker._choose_in_voice, sizes))
    np.testing.assert_array_equal(choose(origins, embeddings), pairs)
    assert sorted(sizes) == [1000, 2000]  # each voice once


def _spy(function, sizes):
    def called(origins, *args):
        sizes.append(len(origins))
        return function(origins, *args)

    return called


def test_memory_bounds_what_is_read_at_once_and_changes_no_pair(monkeypatch):
    rng = np.random.default_rng(3)
    origins = [(f"{i}.wav", None, None, ("d", f"{rng.integers(30)}", None)) for i in range(600)]
    embeddings = crowd(600)[1]
    expected = choose(origins, embeddings, sizes=[200, 0, 300, 100])
    monkeypatch.setattr(speaker, "_MAX_EMBEDDINGS", 64)
    np.testing.assert_array_equal(choose(origins, embeddings, sizes=[200, 0, 300, 100]), expected)
    # A larger voice is split into stretches, each compared with itself only.
    pairs = choose([(f"{i}.wav", None, None, VOICE) for i in range(150)], [ALIKE] * 150)
    assert (pairs >= 0).all() and all(set(row // 64) == {i // 64} for i, row in enumerate(pairs))
    for i, j in itertools.product(range(150), range(4)):
        assert i - pairs[i, j] not in (0, 1)
