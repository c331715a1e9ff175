"""One form of every text, and what in a text nobody says."""

import hypothesis
import pytest
from hypothesis import strategies

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.text import TextRule, check_speakable, markup, normal_text, says_something, split_description

pytestmark = pytest.mark.fast

CLEAN = "Caf\u00e9 na\u00efve, two words"
MESSY = [
    "Cafe\u0301 nai\u0308ve, two words",  # decomposed
    f"  {CLEAN} \n",
    f"\ufeff{CLEAN}",
    "Caf\u00e9 na\u00efve,\u2028two\u00a0words\u2029",
    "Ca\u00adf\u00e9 na\u200b\u00efve, two\u3000\u3000words\u200f",
    "C\u200da\u200cf\u2060e\u034f\u0301 na\u00efve, two\x00 words\ufe0f\u3164",
    "\u2581Caf\u00e9 na\u00efve, two\u2581words",
]


@pytest.mark.parametrize("text", MESSY)
def test_what_cannot_be_seen_changes_nothing(text):
    assert normal_text(text) == CLEAN
    assert TextRule().write(text) == TextRule().write(text[3:], text[:3]) == CLEAN


@hypothesis.given(strategies.text(alphabet=strategies.sampled_from("aB \u0130(（)）\u200b\u0301\u00df.!"), max_size=12))
def test_a_text_has_one_form(text):
    for sentence_case in (False, True):
        once = normal_text(text, sentence_case)
        assert normal_text(once, sentence_case) == once


@pytest.mark.parametrize(
    "text", ["(calm)Go on", "((calm))Go on", "（calm）Go on", "（(calm)） Go on", " ( calm ) Go on", "()(calm)Go on"]
)
def test_brackets_of_a_description_have_one_form(text):
    assert normal_text(text) == "(calm)Go on" and split_description(text) == ("calm", "Go on")


def test_brackets_that_are_no_description():
    for text in ("Go (on)", "(Go on", "Go) on", ":) (on)"):
        assert normal_text(text) == text and split_description(text) == ("", text)


def test_sentence_case_is_not_hidden():
    rule = TextRule(sentence_case=True)
    assert rule.write("(a calm woman)HELLO THERE. GO ON") == "(a calm woman)Hello there. Go on"
    assert rule.write("(A CALM WOMAN)Hello NASA") == "(A calm woman)Hello NASA"
    assert rule.write("GO ON", "He said: ") == "He said: Go on" and rule.write("GO ON", "HE SAID ") == "He said go on"
    assert TextRule().write("(calm)GO ON") == "(calm)GO ON"


MARKS = {
    "so <noise> it </i> goes": ["<noise>", "</i>"],
    "［笑い］そう 【笑】": ["［笑い］", "【笑】"],
    "[laughter] tom &amp; jerry &#39;s": ["[laughter]", "&amp;", "&#39;"],
    "ignore_time_segment_in_scoring": ["ignore_time_segment_in_scoring"],
    "the(2) {NOISE} a T_V_ %uh ((what now))": ["(2)", "{NOISE}", "T_V_", "%uh", "((what now))"],
    "(a [b] voice)one\\ntwo \ufffd": ["[b]", "\\ntwo", "\ufffd"],
    "<b\u200br>": ["<br>"],
}


@pytest.mark.parametrize("text", MARKS)
def test_marks_of_corpora_are_found(text):
    assert sorted(markup(text)) == sorted(MARKS[text])


def test_plain_text_has_no_marks():
    for text in (
        "R&D; 100 % of it",
        "3 < 4 and 5 > 2",
        "(calm)He (the other) said: 'no'",
        "a*b = c/d - e",
        "¿Qué? «Ja»",
        "（平静）你好《书》",
    ):
        assert not markup(text)


@pytest.mark.parametrize(
    "text", ["", " ", "...", "?!", "\U0001f600\u200d\ufe0f", "\u200b\u00ad", "\u3164", "(calm)", "(calm) !", "—"]
)
def test_nothing_to_say(text):
    assert not says_something(text)
    with pytest.raises(UserError, match="text must have a letter or a digit to say, got"):
        check_speakable(text, None)


def test_something_to_say():
    for text in ("a", "7", "你", "(calm)é", "ខ្មែរ", "\U0001f600 ok"):
        check_speakable(text, None)


@pytest.mark.parametrize("text", ["go</s>", "<unk> go", "<s>go", "go <|im_end|>", "<0x0A>go", "g<\u200b/s>o"])
def test_control_pieces_are_refused(text):
    with pytest.raises(UserError, match="control pieces and not as words; leave them out"):
        check_speakable(text, None)
    with pytest.raises(UserError, match="control pieces"):
        check_speakable("on", text)


def test_a_description_does_not_go_with_a_prompt():
    for text, prompt_text in (("(calm)on", "Go "), ("（calm） on", ""), ("on", "(calm)Go ")):
        with pytest.raises(UserError, match=r"a description, \(calm\), does not go with a prompt"):
            check_speakable(text, prompt_text)
    check_speakable("on (calm)", "Go (now) ")


def test_a_rule_of_a_newer_version():
    with pytest.raises(UserError, match="form 2 is of a newer version"):
        TextRule(form=2)
