"""How a text is written before it is tokenized, and what in a text is not speech.

    TextRule      one form of every text. `prepare` applies it and stores it as tokenizer/text.json; from there it goes with the
                  tokenizer into shards, workdirs and exported directories, and generation applies it to what a user writes
    description   "(a calm voice)Hello": a description of voice or style in parentheses in front of the words

Released weights have no rule: they get the ids of the PyTorch package, which only collapses white space.
"""

import itertools
import re
import unicodedata
from dataclasses import dataclass

from voxcpm2_jax.config.plain import UserError

# ---- one form --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRule:
    """How the texts of some shards are written."""

    form: int = 1  # of `normal_text`; a change of it gets the next number
    sentence_case: bool = False

    def __post_init__(self):
        if self.form != 1:
            raise UserError(f"text: form {self.form} is of a newer version of this package, which has form 1")

    def write(self, text: str, prompt_text: str = "") -> str:
        """The text that is tokenized; after a prompt's transcript, both as one string."""
        if self.sentence_case and not (prompt_text + text).isupper():
            prompt_text, text = _sentence_case(prompt_text), _sentence_case(text)
        return normal_text(prompt_text + text, self.sentence_case)


def written(rule: TextRule | None, text: str, prompt_text: str | None) -> tuple[str, str]:
    """A text as it is tokenized, alone and after its prompt's; without a rule as the PyTorch package does it."""
    if rule is None:
        text = re.sub(r"\s+", " ", text)
        return text, (prompt_text or "") + text
    return rule.write(text), rule.write(text, prompt_text or "")


def normal_text(text: str, sentence_case: bool = False) -> str:
    """One form of a text: Unicode NFC, no invisible characters, white space as single spaces inside, "(description)words".

    Args:
        sentence_case: words in capitals become lower case, with a capital at the start of each sentence; so does a
            description in capitals.
    """
    description, words = split_description(visible(text))
    if sentence_case:
        description, words = _sentence_case(description), _sentence_case(words)
    return with_description(description, words)


def visible(text: str) -> str:
    """The text in NFC, without characters that have no width, and with single spaces for white space of any kind.

    Removed are format characters (Cf: soft hyphens, byte-order marks, joiners), controls, variation selectors and fillers.
    They change how a word looks, never how it sounds. U+2581 is how vocabularies spell a space.
    """
    if not text.isascii() or not text.isprintable():
        text = "".join(c for c in text if not _is_invisible(c)).replace("\u2581", " ")
    return " ".join(unicodedata.normalize("NFC", text).split())


def _is_invisible(c: str) -> bool:
    kind = unicodedata.category(c)
    return kind == "Cf" or (kind == "Cc" and not c.isspace()) or c in _FILLERS or "\ufe00" <= c <= "\ufe0f"


# Grapheme joiner, Hangul fillers, Khmer inherent vowels, Mongolian selectors.
_FILLERS = frozenset("\u034f\u115f\u1160\u3164\uffa0\u17b4\u17b5\u180b\u180c\u180d")


def _sentence_case(text: str) -> str:
    if not text.isupper():
        return text
    text = re.sub(r"(^|[.!?…]\s+)(\w)", lambda match: match[1] + match[2].upper(), text.lower())
    return unicodedata.normalize("NFC", text)


# ---- descriptions ----------------------------------------------------------------------------------------------------

_OPEN, _CLOSE = "(（﹙", ")）﹚"


def split_description(text: str) -> tuple[str, str]:
    """Description and words of "(description)words"; the first is empty without a description.

    The brackets may be full-width or doubled, and a space may follow.
    """
    text = text.strip()
    depths = list(itertools.accumulate((c in _OPEN) - (c in _CLOSE) for c in text))
    if depths[:1] != [1] or 0 not in depths:  # no bracket in front, or one that is never closed
        return "", text
    end = depths.index(0) + 1
    description, words = _without_brackets(text[:end]), text[end:].lstrip()
    return (description, words) if description else split_description(words)


def with_description(description: str | None, text: str) -> str:
    """ "(description)text", with one pair of parentheses whatever brackets the description came with."""
    description = _without_brackets(description or "")
    return f"({description}){text.lstrip()}" if description else text


def _without_brackets(description: str) -> str:
    return " ".join(re.sub(f"[{_OPEN}{_CLOSE}]", " ", description).split())


# ---- what is not speech ----------------------------------------------------------------------------------------------

# Pieces that vocabularies reserve, as far as they are known without one.
_CONTROL = re.compile(r"</?s>|<(?:unk|pad|bos|eos|mask)>|<0x[0-9a-f]{2}>|<\|[^<>|]*\|>", re.IGNORECASE)

_MARKUP = re.compile(
    r"""
      <[^\s<>][^<>]*>                  # <noise>, </i>, <SPK/>, <|en|>
    | \[[^\[\]]*\] | ［[^［］]*］ | 【[^【】]*】   # [laughter], [UNK]
    | \{[^{}]*\}                       # TED-LIUM: {NOISE}
    | \(\( .*? \)\)                    # Fisher: ((unintelligible))
    | (?<=\w)\(\d+\)                   # TED-LIUM: the(2), a pronunciation
    | &(?:\#\d+|\#x[\da-f]+|[a-z]\w+); # HTML: &amp;
    | \w*[^\W_]_\w*                    # TED-LIUM: ignore_time_segment_in_scoring; AMI: T_V_
    | (?<!\S)%[^\W\d]\w*               # %hesitation
    | \\\S*                            # escapes: \n, \u00e9
    | \ufffd                           # what a wrong encoding leaves
    """,
    re.IGNORECASE | re.VERBOSE,
)


def control_marks(text: str) -> list[str]:
    """The control pieces of vocabularies that a text spells out, such as </s>; a Tokenizer knows those of its own."""
    return _CONTROL.findall(visible(text))


def check_control(pieces: list[str]) -> None:
    if pieces:
        what = ", ".join(dict.fromkeys(pieces))
        raise UserError(f"text spells {what}, which a model reads as control pieces and not as words; leave them out")


def markup(text: str) -> list[str]:
    """The marks of corpora in a text, such as <noise>, [laughter] and &amp;: annotations, which nobody says."""
    description, words = split_description(visible(text))
    return [match[0] for part in (description, words) for match in _MARKUP.finditer(part)]


def says_something(text: str) -> bool:
    """Whether a text has a letter or a digit behind its description."""
    return any(c.isalnum() for c in split_description(visible(text))[1])


def check_speakable(text: str, prompt_text: str | None) -> None:
    """Refuses texts that no model can speak.

    Raises:
        UserError: nothing to say, control pieces spelled out, or a description together with a prompt.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"text is not valid Unicode: {text!r:.80}")
    if not says_something(text):
        raise UserError(f"text must have a letter or a digit to say, got {text!r:.80}")
    check_control(control_marks((prompt_text or "") + text))
    if prompt_text is not None:
        description = split_description(visible(prompt_text + text))[0] or split_description(visible(text))[0]
        if description:
            raise UserError(
                f"a description, ({description:.60}), does not go with a prompt, which sets voice and style; "
                "leave out the parentheses in front, or the prompt"
            )
