"""Normalisation of transcripts, the same for training, doctor and evaluation."""

import re
import unicodedata


def normal_text(text: str, sentence_case: bool = False) -> str:
    """The text that is tokenized: Unicode NFC, runs of white space replaced by one space, ends stripped.

    Args:
        sentence_case: a text in capitals becomes lower case, with a capital at the start of each sentence.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if sentence_case and text.isupper():
        text = re.sub(r"(^|[.!?…]\s+)(\w)", lambda match: match[1] + match[2].upper(), text.lower())
    return text
