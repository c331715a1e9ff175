"""The ids that a request's text becomes, in a model trained here and in released weights."""

import copy

import pytest

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.request import Request
from voxcpm2_jax.config.text import TextRule
from voxcpm2_jax.data.tokenizer import load_tokenizer

CLEAN = "fünf (eins) zwei"
MESSY = ["fu\u0308nf (eins) zwei ", "\ufefffünf\u2028(eins) zwei", "fü\u00adnf (ei\u200bns) zwei\u2060"]


@pytest.fixture(scope="module")
def trained(voice):
    """The voice, as if trained on shards whose transcripts were written by a rule."""

    def with_rule(**rule):
        model = copy.copy(voice)
        model.tokenizer = copy.copy(voice.tokenizer)
        model.tokenizer.rule = TextRule(**rule)
        return model

    return with_rule


def ids(model, text, **arguments):
    """What the model reads, as text again."""
    job = model._lay_out(Request(text, **arguments))
    return model.tokenizer.decode(job.row.prefix.tokens_T[:-1])


@pytest.mark.parametrize("text", MESSY)
def test_a_model_trained_here_reads_the_form_of_its_shards(trained, voice, text):
    assert ids(trained(), text) == ids(trained(), CLEAN) == CLEAN
    assert ids(voice, text) != CLEAN  # released weights: as in the PyTorch package, which only collapses white space


def test_sentence_case_and_descriptions(trained, voice):
    model = trained(sentence_case=True)
    assert ids(model, "（softly） HELLO ONE. TWO") == "(softly)Hello one. Two"
    assert ids(trained(), "((softly)) HELLO") == "(softly)HELLO" and ids(voice, "（softly） HELLO") == "（softly） HELLO"


def test_the_text_of_a_prompt_is_joined_before_it_is_written(trained, voice, recordings):
    prompt = {"prompt_wav_path": recordings / "prompt.wav", "prompt_text": " fu\u0308nf\u200b "}
    assert "fünf vier" in ids(trained(), " vier ", **prompt)
    assert "fu\u0308nf\u200b  vier " in ids(voice, " vier ", **prompt)


@pytest.mark.parametrize("speak", ["generate", "generate_streaming", "speak"])
def test_what_no_model_speaks_is_refused_before_anything_is_drawn(voice, recordings, speak):
    prompt = {"prompt_wav_path": recordings / "prompt.wav", "prompt_text": "three "}
    for request, message in (
        ({"text": "\U0001f600 ..."}, "text must have a letter or a digit to say"),
        ({"text": "one</s>"}, "text spells </s>, which a model reads as control pieces"),
        ({"text": "one <|audio_start|>"}, "text spells <|audio_start|>"),
        ({"text": "(softly)two"} | prompt, "a description, (softly), does not go with a prompt"),
    ):
        with pytest.raises(UserError) as error:
            voice.speak([request]) if speak == "speak" else list(getattr(voice, speak)(**request))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_control_piece_of_the_vocabulary_alone_is_refused(trained):
    model = trained()
    model.tokenizer._control = ["@pause"]
    with pytest.raises(UserError, match="text spells @pause"):
        ids(model, "one @pause two")


def test_marks_are_spoken_with_a_line(voice, capfd):
    assert ids(voice, "one [laughing] two") == "one [laughing] two"
    assert capfd.readouterr().err.splitlines() == [
        "text has [laughing]: the model reads it as words, unless it was trained on such marks"
    ]


def test_the_rule_goes_with_the_tokenizer(tmp_path, voice):
    tokenizer = copy.copy(voice.tokenizer)
    tokenizer.save(tmp_path / "released")
    assert load_tokenizer(tmp_path / "released").rule is None and not (tmp_path / "released" / "text.json").exists()
    tokenizer.rule = TextRule(sentence_case=True)
    tokenizer.save(tmp_path / "trained")
    assert load_tokenizer(tmp_path / "trained").rule == tokenizer.rule
    assert tokenizer.sha256 == voice.tokenizer.sha256
    (tmp_path / "trained" / "text.json").write_text('{"sentence": true}')
    with pytest.raises(UserError, match=r"text\.json"):
        load_tokenizer(tmp_path / "trained")
