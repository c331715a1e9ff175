"""Counting of errors: digits, words, and characters in several scripts."""

import difflib
import random
import unicodedata

import pytest

from voxcpm2_jax.evaluate import scores

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "text",
    ["372", "3 7 2", "3-7-2.", "Three, seven, two.", "three seven too!", " 3, seven to", "37 2", "THREE SEVEN TWO", "3.72"],
)
def test_digits_reads_every_spelling(text):
    assert scores.digits(text) == ["three", "seven", "two"]


def test_digits_of_other_words():
    assert scores.digits("Oh, one for eight") == ["zero", "one", "four", "eight"]
    assert scores.digits("twelve o'clock") == ["?", "?"]
    assert scores.digits("") == scores.digits(" ... ") == []


def test_edit_distance():
    assert scores.edit_distance("kitten", "sitting") == 3
    assert scores.edit_distance("", "abc") == scores.edit_distance("abc", "") == 3
    rng = random.Random(0)
    for _ in range(50):
        a, b = ("".join(rng.choices("ab", k=rng.randrange(7))) for _ in range(2))
        assert scores.edit_distance(a, b) == scores.edit_distance(b, a) >= abs(len(a) - len(b))
        assert (scores.edit_distance(a, b) == 0) == (a == b)
        longest = sum(block.size for block in difflib.SequenceMatcher(None, a, b).get_matching_blocks())
        assert scores.edit_distance(a, b) <= len(a) + len(b) - 2 * longest


def test_digit_accuracy():
    assert scores.digit_accuracy(["three seven two", "one one"], ["372", "1 1."]) == 1.0
    assert scores.digit_accuracy(["three seven two", "one one"], ["3 7", "1 one"]) == 4 / 5
    assert scores.digit_accuracy(["one two"], [""]) == 0.0
    # Extra words cost something, and no string counts below zero.
    assert scores.digit_accuracy(["one two"], ["one two and so on"]) == 0.0
    assert scores.digit_accuracy(["one two", "one two"], ["blah " * 50, "12"]) == 0.5
    with pytest.raises(ValueError):
        scores.digit_accuracy(["one"], [])


def test_word_and_character_error_rates():
    assert scores.word_error_rate(["The cat sat.", "Don't"], ["the CAT sat on", "don’t"], ["en", "en"]) == 1 / 4
    assert scores.character_error_rate(["ab cd"], ["abcx"]) == 1 / 4
    with pytest.raises(ValueError):
        scores.word_error_rate(["one"], ["one"], [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's 'hat' -- it isn’t snake_case.", ["the", "cat's", "hat", "it", "isn't", "snake", "case"]),
        ("Über die Straße, größer!", ["über", "die", "strasse", "grösser"]),
        ("L’été à Noël…", ["l'été", "à", "noël"]),
        ("İstanbul'da", ["istanbul'da"]),
        ("हिन्दी में नमस्ते।", ["हिन्दी", "में", "नमस्ते"]),
        ("می\u200cخواهم", ["میخواهم"]),  # a zero-width non-joiner inside the word
        ("co\u00adoperate", ["cooperate"]),  # a soft hyphen
        ("１２３ ＡＢＣ", ["123", "abc"]),
        ("!? ... _ ''", []),
    ],
)
def test_words(text, words):
    assert scores.words(text) == words


@pytest.mark.parametrize("text", ["Über größer", "हिन्दी में क़लम", "ได้ยินน้ำ", "データを聞く", "Tiếng Việt"])
def test_composed_and_decomposed_texts_are_alike(text):
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert scores.words(composed) == scores.words(decomposed) and scores.words(text)


def test_vowel_signs_and_tone_marks_count():
    """Without its marks each pair would be the same letters."""
    for right, wrong, total in (("किताब", "कुताब", 5), ("ที่", "ที", 3), ("größer", "grosser", 7)):
        assert scores.character_error_rate([right], [right]) == 0
        assert scores.character_error_rate([right], [wrong]) == 1 / total


@pytest.mark.parametrize(
    ("language", "reference", "heard", "edits", "total"),
    [
        ("zh", "今天天气很好。", "今天天汽很好", 1, 6),
        ("ja", "東京は、晴れです。", "東京 は 雨 です", 2, 7),
        ("th", "สวัสดีครับ", "สวัสดีค่ะ", 3, 10),
        ("hi", "मेरा नाम राम है।", "मेरा नाम रमा है", 1, 4),
        ("de", "Die Übung war schön.", "Die Ubung war schon", 2, 4),
        ("ko", "오늘 날씨가 좋다.", "오늘 날씨는 좋다", 1, 3),
    ],
)
def test_wer_counts_characters_where_words_have_no_spaces(language, reference, heard, edits, total):
    """A wrong character is one error, not a wrong sentence; spaces that a judge puts in cost nothing."""
    assert scores.word_error_rate([reference], [heard], [language]) == edits / total
    assert scores.unit(language) == ("character" if language in ("zh", "ja", "th") else "word")
    if scores.unit(language) == "character":
        assert scores.character_error_rate([reference], [heard]) == edits / total


def test_languages_are_counted_together_each_in_its_own_unit():
    assert scores.word_error_rate(["你好吗", "good day"], ["你好", "good dog"], ["zh", "en"]) == 2 / 5
