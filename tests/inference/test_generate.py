"""Properties of the decode loop: streaming, batches, prefixes, and where speech ends."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.inference.speaking import PATCH_SAMPLES, QUICK, assert_same_audio, with_stop_head
from voxcpm2_jax import sequence
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.inference import decode
from voxcpm2_jax.models import generation, voxcpm2


def row(text_ids, **changes) -> decode.Row:
    """A row of at most 6 patches; `changes` are of the row or of its prefix."""
    parts = {name: changes.pop(name) for name in ("reference_MPC", "prompt_MPC") if name in changes}
    prefix = sequence.lay_out(np.array(text_ids), **parts)
    return decode.Row(prefix, **{"seed": 0, "noise_MPC": None, "min_len": 2, "max_len": 6, "cfg_value": 2.0} | changes)


def draw(voice, *rows) -> list[decode.Drawn]:
    return decode.generate(voice._params, voice.config, rows, num_steps=2)


def patches(num_patches, seed=0):
    return np.random.default_rng(seed).normal(size=(num_patches, 4, 16)).astype(np.float32)


# ---- the same speech, however it is drawn ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zero-shot", "reference", "continuation", "reference + continuation"])
def test_streaming_equals_offline(voice, modes, mode):
    request = modes[mode] | QUICK | {"seed": 5, "min_len": 4}
    chunks = list(voice.generate_streaming(**request))
    assert {chunk.shape for chunk in chunks} == {(PATCH_SAMPLES,)}
    assert_same_audio(np.concatenate(chunks), voice.generate(**request))


def test_batched_equals_single(voice, modes):
    """Four modes and settings in one batch."""
    settings = [
        {"seed": 1},
        {"seed": 2, "cfg_value": 1.0, "max_len": 4},
        {"seed": 3, "cfg_value": 3.0, "min_len": 5},
        {"seed": 4, "inference_timesteps": 3, "min_len": 0},
    ]
    requests = [mode | QUICK | setting for mode, setting in zip(modes.values(), settings)]
    together = voice.speak(requests)
    assert [len(s.audio_A) // PATCH_SAMPLES for s in together] == [len(s.patches_MPC) for s in together]
    for speech, request in zip(together, requests):
        (alone,) = voice.speak([request])
        assert_same_audio(speech.audio_A, alone.audio_A)
        np.testing.assert_allclose(speech.patches_MPC, alone.patches_MPC, rtol=1e-5, atol=1e-5)
        assert (speech.seed, speech.stopped_by) == (alone.seed, alone.stopped_by) and speech.seed == request["seed"]
        assert np.abs(speech.audio_A).max() > 1e-3
    batch = voice.generate_batch(requests)
    for speech, audio_A in zip(together, batch):
        np.testing.assert_array_equal(speech.audio_A, audio_A)


def test_many_rows_are_drawn_in_batches_of_bounded_memory(voice, monkeypatch):
    rows = [row([110 + i] * (3 + i), seed=i) for i in range(4)]
    together = draw(voice, *rows)
    prefilled = []

    def prefill(params, config, batch, *, cache_slots):
        prefilled.append((len(batch.tokens_BT), cache_slots))
        return whole(params, config, batch, cache_slots=cache_slots)

    whole = decode.prefill
    monkeypatch.setattr(decode, "prefill", prefill)
    monkeypatch.setattr(decode, "BATCH_SLOTS", 128)
    for a, b in zip(together, draw(voice, *rows), strict=True):
        np.testing.assert_allclose(a.patches_MPC, b.patches_MPC, rtol=1e-5, atol=1e-5)
    assert prefilled == [(2, 64)] * 2


def test_the_number_of_rows_is_rounded_up(voice, monkeypatch):
    """One program serves three rows and four; the additional row changes nothing and is not returned."""
    rows = [row([110 + i] * (3 + i), seed=i) for i in range(4)]
    together, sizes = draw(voice, *rows), []
    prefill = decode.prefill
    monkeypatch.setattr(decode, "prefill", lambda *a, **k: sizes.append(len(a[2].tokens_BT)) or prefill(*a, **k))
    for some in (slice(3), slice(1, 4)):
        for mine, whole in zip(draw(voice, *rows[some]), together[some], strict=True):
            np.testing.assert_array_equal(mine.patches_MPC, whole.patches_MPC)
            assert mine.stopped_by == whole.stopped_by
    assert sizes == [4, 4]


@pytest.mark.parametrize(
    ("slots", "batches"),
    [(32, [[0], [2], [1], [3]]), (128, [[0, 2], [1], [3]]), (256, [[0, 2], [1, 3]]), (512, [[0, 1, 2, 3]])],
)
def test_rows_of_about_the_same_length_share_a_batch(voice, monkeypatch, slots, batches):
    """A row alone may exceed the budget."""
    monkeypatch.setattr(decode, "BATCH_SLOTS", slots)
    assert decode._batches(voice.config, [row([110] * n) for n in (2, 40, 3, 50)]) == batches


def test_a_row_does_not_depend_on_its_neighbours(voice):
    """Bit for bit, and whether the neighbour ends before or after it."""
    mine = row([110, 120, 130], seed=1, min_len=3)
    short = row([111], seed=2, max_len=1, cfg_value=0.5)
    long = row([140] * 9, seed=3, min_len=5, reference_MPC=patches(2), prompt_MPC=patches(3, seed=1))
    (first, other), (second, another) = (draw(voice, mine, neighbour) for neighbour in (short, long))
    np.testing.assert_array_equal(first.patches_MPC, second.patches_MPC)
    assert first.stopped_by == second.stopped_by
    assert len(other.patches_MPC) == 1 < len(first.patches_MPC) <= len(another.patches_MPC) == 6


def test_a_prompt_is_continued_as_if_it_had_been_drawn(endless):
    """Patches read at once, as the end of a prefix, leave the loop where drawing them one by one leaves it."""
    text_ids, noise_MPC = [110, 120, 130], patches(5)
    (whole,) = draw(endless, row(text_ids, noise_MPC=noise_MPC))
    for start in (1, 3):
        (rest,) = draw(endless, row(text_ids, prompt_MPC=whole.patches_MPC[:start], noise_MPC=noise_MPC[start:]))
        np.testing.assert_allclose(rest.patches_MPC, whole.patches_MPC[start:], rtol=1e-4, atol=1e-5)


def test_decode_equals_prefill(tiny_parts):
    """Reading patches one by one leaves the same state as reading them at once, in rows of different lengths."""
    config, params = tiny_parts[:2]
    params = jax.jit(voxcpm2.unrolled_params)(params)
    rng = np.random.default_rng(0)
    audio_BMPC = rng.normal(size=(2, 5, 4, 16)).astype(np.float32)
    texts = [rng.integers(110, 380, n) for n in (3, 6)]
    reference_MPC = rng.normal(size=(2, 4, 16)).astype(np.float32)

    def read(num_patches):
        """Both rows with the first patches of their prompts; the second has a reference too."""
        prompts = [x[:num_patches] if num_patches else None for x in audio_BMPC]
        first = sequence.lay_out(texts[0], prompt_MPC=prompts[0])
        second = sequence.lay_out(texts[1], prompt_MPC=prompts[1], reference_MPC=reference_MPC)
        batch = sequence.pack([[first], [second]], num_slots=20, num_patches=8, patch_shape=(4, 16))
        return prefill(params, batch), [first.num_slots, second.num_slots]

    prefill = jax.jit(lambda params, batch: generation.prefill(params, config, batch, cache_slots=24))
    read_patch = jax.jit(lambda params, step, patch_BPC: generation.read_patch(params, config, step, patch_BPC))
    at_once, lengths = read(5)
    assert at_once.length_B.tolist() == lengths
    for start in (0, 1, 4):
        step, _ = read(start)
        assert (np.asarray(step.cond_BPC) == (audio_BMPC[:, start - 1] if start else 0)).all()
        for m in range(start, 5):
            step = read_patch(params, step, audio_BMPC[:, m])
        assert step.length_B.tolist() == lengths
        np.testing.assert_array_equal(step.cond_BPC, at_once.cond_BPC)
        for name in ("semantic_BD", "acoustic_BD"):
            np.testing.assert_allclose(getattr(step, name), getattr(at_once, name), rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(jax.tree.leaves(step.cache), jax.tree.leaves(at_once.cache), strict=True):
            for b, n in enumerate(lengths):
                np.testing.assert_allclose(mine[b, :n], theirs[b, :n], rtol=1e-5, atol=1e-5)


# ---- where speech ends -----------------------------------------------------------------------------------------------


def test_why_each_row_stopped(brief, endless):
    """The stop head is ignored up to patch min_len, counted from 0; a stream ends where the row of a batch ends."""
    limits = [(0, 6, 2, "stop head"), (2, 6, 4, "stop head"), (3, 3, 3, "max_len"), (1, 3, 3, "stop head")]
    requests = [{"text": "one", "seed": i} | QUICK | {"min_len": a, "max_len": b} for i, (a, b, _, _) in enumerate(limits)]
    for speech, (_, _, num_patches, stopped_by) in zip(brief.speak(requests), limits):
        assert (len(speech.patches_MPC), speech.stopped_by) == (num_patches, stopped_by)
        assert len(speech.audio_A) == num_patches * PATCH_SAMPLES
    for request, (_, _, num_patches, _) in zip(requests, limits):
        assert len(list(brief.generate_streaming(**request))) == num_patches
    for speech, request in zip(endless.speak(requests), requests):
        assert (len(speech.patches_MPC), speech.stopped_by) == (request["max_len"], "max_len")


def test_max_len_shortens_and_changes_nothing_before_it(endless):
    request = {"text": "one", "seed": 1} | QUICK
    long, short = (endless.speak([request | {"max_len": n}])[0] for n in (6, 3))
    np.testing.assert_allclose(short.patches_MPC, long.patches_MPC[:3], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def short_of_room(tiny_parts):
    """An endless and a brief voice with a max_length of 20 slots."""
    config, *rest = tiny_parts
    parts = dataclasses.replace(config, max_length=20), *rest
    return with_stop_head(parts, stops=False), with_stop_head(parts, stops=True)


def test_speech_past_max_length(short_of_room):
    endless, brief = short_of_room
    request = {"text": "one", "seed": 1, "inference_timesteps": 2, "retry_badcase_ratio_threshold": 50.0}
    with pytest.raises(UserError, match=r"did not end within the model's 20 slots \(max_length\)") as error:
        endless.generate(**request)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did not end within the model's 20 slots"):
        for chunk in endless.generate_streaming(**request):
            assert len(chunk) == PATCH_SAMPLES
    assert len(brief.generate(**request)) == 4 * PATCH_SAMPLES  # it ends in time
    cut, limited = endless.speak([request, request | {"max_len": 5}])
    assert (cut.stopped_by, limited.stopped_by) == (decode.NO_ROOM, decode.MAX_LEN)
    assert len(endless.generate_batch([request])[0]) == len(cut.audio_A) > len(limited.audio_A) == 5 * PATCH_SAMPLES
    room = 20 - len(endless.tokenizer.encode("one")) - 1
    assert len(endless.generate(**request, max_len=room)) == room * PATCH_SAMPLES  # asked for no more than there is


def test_a_prefix_that_fills_the_model(short_of_room):
    long = "one two three four five " * 5
    for speak in (short_of_room[0].generate, lambda **kwargs: list(short_of_room[0].generate_streaming(**kwargs))):
        with pytest.raises(UserError, match=r"text and prompt audio take \d+ slots of the model's 20 \(max_length\); shorten"):
            speak(text=long)
