"""VoxCPM with random weights: arguments, seeds, recordings, retries, given noise, and what it refuses."""

import types

import jax
import numpy as np
import pytest
import soundfile

from tests.config import test_request
from tests.data.containers import CUT, WHOLE, written
from tests.inference.speaking import PATCH_SAMPLES, QUICK, assert_same_audio
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.request import Request
from voxcpm2_jax.inference import decode
from voxcpm2_jax.inference.api import VoxCPM
from voxcpm2_jax.vae import autoencoder, streaming

# ---- arguments -------------------------------------------------------------------------------------------------------


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


def test_a_batch_takes_requests_and_mappings(voice):
    assert voice.generate_batch([]) == []
    arguments = {"text": "one two", "seed": 1} | QUICK
    first, second = voice.generate_batch([Request(**arguments), arguments])
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="unknown txt"):
        voice.generate_batch([{"txt": "one"}])


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


def test_a_recording_longer_than_the_model_is_refused_before_it_takes_memory(voice, tmp_path, monkeypatch):
    """Half an hour; a recording of any length that is no request's is encoded chunk by chunk (tests/vae/test_streaming.py)."""
    soundfile.write(tmp_path / "long.wav", np.zeros(30 * 60 * 1000, np.int16), 1000)
    monkeypatch.setattr(streaming, "encode", None)
    with pytest.raises(UserError, match=r"long.wav: 1800.0 s are too long; with this text, at most \d\d.\d s fit into"):
        voice.generate("one", reference_wav_path=tmp_path / "long.wav")


def test_containers_that_lie_are_read_and_cut_ones_refused(voice, tmp_path):
    expected = voice.encode_file(_written(tmp_path / "a.wav", written("WAV")), pad="right")
    for name in ("flac without a length", "wav of a pipe, 2^32 - 1"):
        np.testing.assert_allclose(voice.encode_file(_written(tmp_path / "b", WHOLE[name]()), pad="right"), expected, atol=1e-5)
    assert len(voice.encode_file(_written(tmp_path / "c", WHOLE["m4a"]()), pad="right")) in (13, 14)
    with pytest.raises(UserError, match=r"cut off: the header states 2.00 s, 0.60 s are there; copy it again"):
        voice.encode_file(_written(tmp_path / "d", CUT["wav"]()), pad="right")


def _written(path, content):
    path.write_bytes(content)
    return path


def test_each_mode_pads_its_recordings_its_own_way(voice, recordings, modes):
    job = voice._lay_out(Request(**modes["reference + continuation"]))
    reference_MPC = voice.encode_file(recordings / "reference.wav", pad="right")
    prompt_MPC = voice.encode_file(recordings / "prompt.wav", pad="left")
    np.testing.assert_array_equal(job.row.prefix.patches_MPC, np.concatenate([reference_MPC, prompt_MPC]))
    text_ids = voice.tokenizer.encode("three four")
    assert job.row.prefix.tokens_T.tolist() == [103, 0, 0, 0, 104, *text_ids, 101, 0, 0]


def test_a_continuation_is_decoded_after_the_last_three_patches_of_audio(voice, modes):
    """The prompt has two patches; the third is the reference clip's last."""
    for mode, num_context in (("reference", 0), ("continuation", 2), ("reference + continuation", 3)):
        request = modes[mode] | QUICK | {"seed": 6}
        prefix_MPC = voice._lay_out(Request(**request)).row.prefix.patches_MPC
        (speech,) = voice.speak([request])
        behind = np.concatenate([prefix_MPC[len(prefix_MPC) - num_context :], speech.patches_MPC])
        (expected,) = voice.decode([behind])
        assert_same_audio(speech.audio_A, expected[num_context * PATCH_SAMPLES :])


# ---- bad cases -------------------------------------------------------------------------------------------------------


def test_the_number_of_tokens_limits_the_speech(endless):
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
    assert [s.is_bad_case for s in (speech, twice, once, fine)] == [True, True, True, False]
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
    ("arguments", "message"), [*test_request.BAD, ({"reference_wav_path": "no.wav"}, "no.wav: no such audio file")]
)
def test_bad_requests_are_refused_however_they_come(voice, arguments, message):
    """At the call, not when the first chunk of a stream is asked for."""
    request = {"text": "one"} | arguments
    for speak in (voice.generate, voice.generate_streaming, lambda **kwargs: voice.generate_batch([{"text": "two"}, kwargs])):
        with pytest.raises(UserError) as error:
            speak(**request)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_embedding(tiny_parts):
    config, params, vae_config, vae_params, _ = tiny_parts
    for vocab_size, fits in ((384, True), (385, False)):
        tokenizer = types.SimpleNamespace(vocab_size=vocab_size)
        if fits:
            VoxCPM.from_parts(config, params, vae_config, vae_params, tokenizer)
        else:
            with pytest.raises(UserError, match="the tokenizer has 385 pieces, the model embeds 384"):
                VoxCPM.from_parts(config, params, vae_config, vae_params, tokenizer)
