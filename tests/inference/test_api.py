"""A model that babbles, asked in every way: modes, batches, streams, seeds, retries, limits, and what it refuses."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import soundfile

from voxcpm2_jax import sequence
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.inference import decode
from voxcpm2_jax.inference.api import VoxCPM
from voxcpm2_jax.inference.request import check_settings
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.vae import autoencoder

PATCH_SAMPLES = 7680  # at 48 kHz
QUICK = {
    "inference_timesteps": 2,
    "max_len": 6,
    "retry_badcase": False,
}  # every test that can speaks like this: few compilations


@pytest.fixture(scope="module")
def voice(tiny_parts):
    return VoxCPM(*tiny_parts)


def with_stop_head(tiny_parts, bias, kernel):
    """The same voice; what its stop head says depends on nothing."""
    config, params, *rest = tiny_parts
    width = config.tslm.width
    stop = {
        "stop_proj": {"kernel": np.zeros((width, width), np.float32), "bias": np.full(width, bias, np.float32)},
        "stop_head": {"kernel": np.tile(np.array(kernel, np.float32), (width, 1))},
    }
    return VoxCPM(config, params | stop, *rest)


@pytest.fixture(scope="module")
def brief(tiny_parts):
    """Wants to stop after every patch."""
    return with_stop_head(tiny_parts, 5.0, (0, 1))


@pytest.fixture(scope="module")
def endless(tiny_parts):
    return with_stop_head(tiny_parts, 5.0, (1, 0))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    soundfile.write(directory / "reference.wav", 0.2 * rng.normal(size=(8820, 2)), 22050)  # 0.4 s: 3 patches
    soundfile.write(directory / "prompt.wav", 0.2 * rng.normal(size=4000), 16000)  # 0.25 s: 2 patches
    return directory


@pytest.fixture(scope="module")
def modes(recordings):
    reference = {"reference_wav_path": recordings / "reference.wav"}
    prompt = {"prompt_wav_path": recordings / "prompt.wav", "prompt_text": "three "}
    return {
        "zero-shot": {"text": "one two"},
        "reference": {"text": "(softly)two"} | reference,
        "continuation": {"text": "two one"} | prompt,
        "reference + continuation": {"text": "four"} | prompt | reference,
    }


def assert_same_audio(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---- the same speech, however it is asked for ------------------------------------------------------------------------


def test_batched_equals_single(voice, modes):
    """Four modes and settings in one batch: no row depends on its neighbours."""
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


@pytest.mark.parametrize("mode", ["zero-shot", "reference", "continuation", "reference + continuation"])
def test_streaming_equals_offline(voice, modes, mode):
    request = modes[mode] | QUICK | {"seed": 5, "min_len": 4}
    chunks = list(voice.generate_streaming(**request))
    assert {chunk.shape for chunk in chunks} == {(PATCH_SAMPLES,)}
    assert_same_audio(np.concatenate(chunks), voice.generate(**request))


def test_streaming_takes_arguments_in_the_same_order(voice):
    request = ("one two", None, None, None, 1.5, 2, 3, 4)
    first = np.concatenate(list(voice.generate_streaming(*request, seed=3)))
    assert_same_audio(first, voice.generate(*request, seed=3, retry_badcase=False))


def test_the_seed_decides(voice):
    request = {"text": "one two"} | QUICK
    first = voice.generate(**request, seed=7)
    np.testing.assert_array_equal(first, voice.generate(**request, seed=7))
    assert np.abs(first - voice.generate(**request, seed=8))[:PATCH_SAMPLES].max() > 1e-3
    by_chance = voice.speak([request, request])
    assert by_chance[0].seed != by_chance[1].seed and all(0 <= s.seed < 2**31 for s in by_chance)


def test_guidance_and_steps_change_the_speech(voice):
    request = {"text": "one two", "seed": 1} | QUICK
    first = voice.generate(**request)[:PATCH_SAMPLES]
    assert np.abs(first - voice.generate(**request, cfg_value=1.0)[:PATCH_SAMPLES]).max() > 1e-4
    assert np.abs(first - voice.generate(**request | {"inference_timesteps": 3})[:PATCH_SAMPLES]).max() > 1e-4


def test_white_space_of_the_text_is_collapsed(voice):
    spoken = [voice.generate(text=text, seed=1, **QUICK) for text in ("one two", "one \n\t two")]
    np.testing.assert_array_equal(*spoken)


def test_a_directory_speaks_as_the_model_it_was_saved_from(voice, released_dir):
    loaded = VoxCPM.from_pretrained(released_dir)
    assert loaded.sample_rate == 48000
    request = {"text": "one two", "seed": 1} | QUICK
    np.testing.assert_array_equal(loaded.generate(**request), voice.generate(**request))


def test_no_requests_no_speech(voice):
    assert voice.generate_batch([]) == []


# ---- recordings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["left", "right"])
def test_trap_9_reference_pads_right_and_prompt_pads_left(voice, recordings, pad):
    got = voice.encode_file(recordings / "prompt.wav", pad=pad)
    audio_A, _ = soundfile.read(recordings / "prompt.wav", dtype="float32")
    missing = 2 * 2560 - len(audio_A)
    padded_A = np.pad(audio_A, (missing, 0) if pad == "left" else (0, missing))
    latents_BTC = autoencoder.encode(voice._vae_params, voice.vae_config, padded_A[None])
    assert got.shape == (2, 4, 16)
    np.testing.assert_allclose(got.reshape(8, 16), latents_BTC[0], rtol=1e-4, atol=1e-5)


def test_each_mode_pads_its_recordings_its_own_way(voice, recordings, modes):
    job = voice._prepare(**modes["reference + continuation"])
    reference_MPC = voice.encode_file(recordings / "reference.wav", pad="right")
    prompt_MPC = voice.encode_file(recordings / "prompt.wav", pad="left")
    np.testing.assert_array_equal(job.row.prefix.patches_MPC, np.concatenate([reference_MPC, prompt_MPC]))
    text_ids = voice.tokenizer.encode("three four")
    assert job.row.prefix.tokens_T.tolist() == [103, 0, 0, 0, 104, *text_ids, 101, 0, 0]


def test_a_continuation_is_decoded_behind_the_last_three_patches_of_audio(voice, modes):
    """The prompt has two patches; the third is the reference's last."""
    for mode, num_context in (("reference", 0), ("continuation", 2), ("reference + continuation", 3)):
        request = modes[mode] | QUICK | {"seed": 6}
        prefix_MPC = voice._prepare(**request).row.prefix.patches_MPC
        (speech,) = voice.speak([request])
        behind = np.concatenate([prefix_MPC[len(prefix_MPC) - num_context :], speech.patches_MPC])
        (expected,) = voice.decode([behind])
        assert_same_audio(speech.audio_A, expected[num_context * PATCH_SAMPLES :])


# ---- where speech ends -----------------------------------------------------------------------------------------------


def test_why_each_row_stopped(brief, endless):
    """The stop head is heeded after patch i > min_len, counted from 0."""
    limits = [(0, 6, 2, "stop head"), (2, 6, 4, "stop head"), (3, 3, 3, "max_len"), (1, 3, 3, "stop head")]
    requests = [{"text": "one", "seed": i} | QUICK | {"min_len": a, "max_len": b} for i, (a, b, _, _) in enumerate(limits)]
    for speech, (_, _, num_patches, stopped_by) in zip(brief.speak(requests), limits):
        assert (len(speech.patches_MPC), speech.stopped_by) == (num_patches, stopped_by)
        assert len(speech.audio_A) == num_patches * PATCH_SAMPLES
    for speech, request in zip(endless.speak(requests), requests):
        assert (len(speech.patches_MPC), speech.stopped_by) == (request["max_len"], "max_len")


def test_max_len_shortens_and_changes_nothing_before_it(endless):
    request = {"text": "one", "seed": 1} | QUICK
    long, short = (endless.speak([request | {"max_len": n}])[0] for n in (6, 3))
    np.testing.assert_allclose(short.patches_MPC, long.patches_MPC[:3], rtol=1e-5, atol=1e-6)


def test_the_number_of_tokens_bounds_the_speech(endless):
    num_tokens = len(endless.tokenizer.encode("one two"))
    request = {"text": "one two", "seed": 1, "inference_timesteps": 2, "retry_badcase": False}
    (speech,) = endless.speak([request | {"retry_badcase_ratio_threshold": 0.5}])
    assert len(speech.patches_MPC) == int(0.5 * num_tokens + 10)


def test_a_bad_case_is_tried_again_with_the_next_seed(endless):
    bad = {"text": "one two", "seed": 7} | QUICK | {"retry_badcase": True, "retry_badcase_ratio_threshold": 0.5}
    speech, twice, once, fine = endless.speak(
        [
            bad,
            bad | {"retry_badcase_max_times": 2},
            bad | {"retry_badcase": False},
            bad | {"retry_badcase_ratio_threshold": 6.0},
        ]
    )
    assert [(s.num_tries, s.seed) for s in (speech, twice, once, fine)] == [(3, 9), (2, 8), (1, 7), (1, 7)]
    assert_same_audio(speech.audio_A, endless.generate(**bad | {"seed": 9, "retry_badcase": False}))
    assert_same_audio(once.audio_A, fine.audio_A)


def test_only_bad_cases_are_tried_again_and_only_until_they_are_good(voice, monkeypatch):
    """Patches by seed: the limit is two a token."""
    num_tokens = len(voice.tokenizer.encode("one two"))
    asked = []

    def draw(params, config, rows, *, num_steps):
        asked.append([row.seed for row in rows])
        lengths = [2 * num_tokens if row.seed in (10, 20, 21) else 2 * num_tokens - 1 for row in rows]
        return [decode.Drawn(np.zeros((n, 4, 16), np.float32), decode.STOP) for n in lengths]

    monkeypatch.setattr(decode, "generate", draw)
    request = {"text": "one two", "retry_badcase_ratio_threshold": 2.0}
    speeches = voice.speak([request | {"seed": seed} for seed in (10, 20, 30)])
    assert asked == [[10, 20, 30], [11, 21], [22]]
    assert [(s.seed, s.num_tries) for s in speeches] == [(11, 2), (22, 3), (30, 1)]


@pytest.fixture(scope="module")
def short_of_room(tiny_parts):
    """An endless and a brief voice whose sequences have 20 slots."""
    config, *rest = tiny_parts
    parts = dataclasses.replace(config, max_length=20), *rest
    return with_stop_head(parts, 5.0, (1, 0)), with_stop_head(parts, 5.0, (0, 1))


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


@pytest.mark.parametrize("name", ["retry_badcase_max_times", "retry_badcase_ratio_threshold"])
def test_retries_need_a_number_over_0(voice, name):
    with pytest.raises(UserError, match=f"{name} must be over 0, got 0"):
        voice.generate("one", **{name: 0})


def test_a_prefix_that_fills_the_model(short_of_room):
    long = "one two three four five " * 5
    for speak in (short_of_room[0].generate, lambda **kwargs: list(short_of_room[0].generate_streaming(**kwargs))):
        with pytest.raises(UserError, match=r"text and prompt audio take \d+ slots of the model's 20 \(max_length\); shorten"):
            speak(text=long)


# ---- given noise -----------------------------------------------------------------------------------------------------


def test_given_noise_replaces_the_draws(endless):
    noise = np.random.default_rng(0).normal(size=(4, 4, 16)).astype(np.float32)
    request = {"text": "one two", "noise": noise} | QUICK
    first, second, drawn = endless.speak([request | {"seed": 1}, request | {"seed": 2}, {"text": "one two", "seed": 1} | QUICK])
    assert len(first.patches_MPC) == 4  # nothing is drawn beyond its end
    assert_same_audio(first.audio_A, second.audio_A)
    assert not np.allclose(first.patches_MPC, drawn.patches_MPC[:4])
    # the sampler's own draws, handed in
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(4)]
    own = np.stack([jax.random.normal(key, (4, 16)) for key in keys])
    (again,) = endless.speak([request | {"noise": own}])
    np.testing.assert_allclose(again.patches_MPC, drawn.patches_MPC[:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 16), (3, 4, 15), (3, 2, 16), (0, 4, 16), (1, 3, 4, 16)])
def test_noise_of_another_shape(voice, shape):
    with pytest.raises(UserError) as error:
        voice.generate("one", noise=np.zeros(shape))
    assert str(error.value) == f"noise must have shape [patches, 4, 16], got {list(shape)}"


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"text": ""}, "text must not be empty or only spaces, got ''"),
        ({"text": " \n"}, "text must not be empty or only spaces"),
        ({"text": None}, "text must not be empty or only spaces, got None"),
        ({"normalize": True}, "normalize=True is not available"),
        ({"denoise": True}, "denoise=True is not available"),
        ({"prompt_text": "a"}, "got prompt text without prompt audio"),
        ({"prompt_wav_path": "a.wav"}, "got prompt audio without prompt text"),
        ({"reference_wav_path": "no.wav"}, "no.wav: no such audio file"),
        ({"cfg_value": -0.1}, "cfg_value must lie between 0 and 10"),
        ({"cfg_value": 10.1}, "cfg_value must lie between 0 and 10"),
        ({"cfg_value": float("nan")}, "cfg_value must lie between 0 and 10"),
        ({"inference_timesteps": 0}, "inference_timesteps must lie between 1 and 1000, got 0"),
        ({"inference_timesteps": 1001}, "inference_timesteps must lie between 1 and 1000"),
        ({"min_len": -1}, "min_len and max_len must satisfy"),
        ({"max_len": 0}, "min_len and max_len must satisfy"),
        ({"min_len": 5, "max_len": 4}, "got 5 and 4"),
    ],
)
def test_bad_requests(voice, request_, message):
    request = {"text": "one"} | request_
    for speak in (voice.generate, voice.generate_streaming, lambda **kwargs: voice.generate_batch([{"text": "two"}, kwargs])):
        with pytest.raises(UserError) as error:  # a ValueError, as in the reference
            speak(**request)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_embedding(tiny_parts):
    config, params, vae_config, vae_params, _ = tiny_parts
    for vocab_size, fits in ((384, True), (385, False)):
        tokenizer = types.SimpleNamespace(vocab_size=vocab_size)
        if fits:
            VoxCPM(config, params, vae_config, vae_params, tokenizer)
        else:
            with pytest.raises(UserError, match="the tokenizer has 385 pieces, the model embeds 384"):
                VoxCPM(config, params, vae_config, vae_params, tokenizer)


def test_settings_are_checked_without_a_model():
    check_settings(text="one", cfg_value=0.0, inference_timesteps=1000, min_len=0, max_len=1)
    with pytest.raises(UserError, match="cfg_value"):
        check_settings(text="one", cfg_value=11.0)


# ---- one patch at a time ---------------------------------------------------------------------------------------------


def test_decode_equals_prefill(tiny_parts):
    """Reading patches one by one leaves the state that reading them at once leaves, in rows of different lengths."""
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

    prefill = jax.jit(lambda params, batch: voxcpm2.prefill(params, config, batch, cache_slots=24))
    read_patch = jax.jit(lambda params, step, patch_BPC: voxcpm2.read_patch(params, config, step, patch_BPC))
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
