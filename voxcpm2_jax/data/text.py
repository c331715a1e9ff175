"""TODO data.text."""

import re
import unicodedata


def normal_text(text: str, sentence_case: bool = False) -> str:
    """A transcript as it is tokenized: Unicode NFC, runs of white space as one space, none at the ends.

    Args:
        sentence_case: a transcript in capitals alone becomes small letters, capitals at the start of its sentences.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if sentence_case and text.isupper():
        text = re.sub(r"(^|[.!?…]\s+)(\w)", lambda match: match[1] + match[2].upper(), text.lower())
    return text
