"""Counting errors in transcripts: word and character error rates, and digits heard right.

Before they are compared, texts are normalised: Unicode NFKC, case folded, punctuation, symbols and invisible format
characters removed. Letters, digits and combining marks (the vowel signs of Hindi and Thai) stay.

WER counts words. Languages that are written without spaces between words (UNSPACED) have no words to split, so their WER
counts characters and equals CER. A character is a Unicode code point. Spelling is not normalised further: "3" and "three",
and traditional and simplified Chinese characters, are different.
"""

import re
import unicodedata
from collections.abc import Sequence

UNSPACED = frozenset({"ja", "km", "lo", "my", "th", "yue", "zh"})

# ---- words and characters --------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The normalised words of a text; apostrophes inside words stay."""
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).casefold()
    text = unicodedata.normalize("NFKC", text).replace("i\u0307", "i")  # the Turkish capital I with dot, case folded
    return re.findall(r"[^\s']+(?:'[^\s']+)*", "".join(map(_keep, text)))


def characters(text: str) -> list[str]:
    """The normalised characters of a text, without spaces."""
    return list("".join(words(text)))


def unit(language: str) -> str:
    """What WER counts in a language, given by its code: "word" or "character"."""
    return "character" if language in UNSPACED else "word"


_APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u02bc\u00b4", "'"))


def _keep(c: str) -> str:
    category = unicodedata.category(c)
    if category == "Cf":  # joiners, soft hyphens, zero-width spaces: a word goes on across them
        return ""
    return c if category[0] in "LMN" or c == "'" else " "


# ---- error rates -----------------------------------------------------------------------------------------------------


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str]) -> float:
    """WER: edits / words of the references (characters where `unit` says so), over all texts; may exceed 1."""
    split = {"word": words, "character": characters}
    splits = [split[unit(language)] for language in languages]
    return _error_rate([(f(r), f(h)) for f, r, h in zip(splits, references, hypotheses, strict=True)])


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """CER: edits / characters of the references, over all texts; may exceed 1."""
    return _error_rate([(characters(r), characters(h)) for r, h in zip(references, hypotheses, strict=True)])


def edit_distance(reference: Sequence, hypothesis: Sequence) -> int:
    """The least number of insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
    return row[-1]


def _error_rate(pairs: list[tuple[list[str], list[str]]]) -> float:
    return sum(edit_distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs)


# ---- English digits --------------------------------------------------------------------------------------------------

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMERALS = dict(zip("0123456789", _DIGITS))
# Spellings of a digit in a transcript: words that sound exactly alike, and "oh" for zero.
_SPELLINGS = {word: word for word in _DIGITS} | {
    "oh": "zero", "o": "zero", "won": "one", "to": "two", "too": "two", "for": "four", "fore": "four", "ate": "eight"
}  # fmt: skip


def digits(text: str) -> list[str]:
    """The digits said in an English text, as words.

    "372", "3 7 2", "3-7-2", "three, seven, two" and "Three seven too." all give three, seven, two: numerals are read digit
    by digit, punctuation and case are ignored, and won, to, too, for, fore, ate, oh and o count as the digits they sound
    like. Every other word counts as a wrong digit ("?"), so that extra words cost something; "twelve" and "three hundred"
    are such words, because digit strings are not said that way.
    """
    found = []
    for word in re.findall(r"\d|[^\W\d_]+", text.lower().replace("'", "")):
        found.append(_NUMERALS.get(word) or _SPELLINGS.get(word, "?"))
    return found


def digit_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Share of the digits that were heard: 1 - edits / digits; no string counts below zero.

    Args:
        references: digit strings as said.   hypotheses: transcripts, in any spelling (see `digits`).
    """
    right = total = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        wanted = digits(reference)
        right += max(0, len(wanted) - edit_distance(wanted, digits(hypothesis)))
        total += len(wanted)
    return right / total
