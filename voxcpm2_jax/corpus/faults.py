"""The faults that `doctor` looks for, and the list of those that it found.

A finding is one kind of fault and the recordings that have it. Its level says whether it spoils a run (the model learns
something wrong, or a reported figure is wrong) or is worth a look. `Limits` holds the thresholds with their reasons.
"""

import collections
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

SPOILS, LOOK = "spoils a run", "worth a look"
EXAMPLES = 5  # of a kind, in the report; of faulty lines all


@dataclass(frozen=True)
class Limits:
    """The values beyond which a recording is at fault; those for its sound are in data/sound.py."""

    min_sec: float = 0.16  # one patch
    max_sec: float = 60.0  # the default of `prepare`
    silence_sec: float = 0.5  # at an end: a model trained on more never learns to stop
    silence_share: float = 0.01  # of the clips: up to this share, silence at the end does little harm
    silence_db: float = -50.0  # relative to the loudest 10 ms
    min_hz: int = 16000  # the codec's input rate: a lower one lacks high frequencies
    outlier: float = 6.0  # robust standard deviations of log(characters per second) within a language
    duration_sec: float = 0.1  # difference between the manifest and the file


FAULTY = "faulty line"
KINDS = {  # name: (level, meaning)
    FAULTY: (SPOILS, "an entry that is no recording; prepare leaves it out"),
    "missing": (SPOILS, "the audio file does not exist"),
    "unreadable": (SPOILS, "not a readable audio file"),
    "empty": (SPOILS, "no samples"),
    "not finite": (SPOILS, "samples that are not finite numbers"),
    "cut off": (SPOILS, "the file ends before the length that it states; prepare skips it"),
    "wrong scale": (SPOILS, "samples far beyond full scale, such as 16-bit numbers in a float file; prepare skips it"),
    "silent": (SPOILS, "nothing but silence"),
    "bad part": (SPOILS, "start_sec and end_sec are not inside the recording"),
    "too short": (SPOILS, "shorter than one patch; prepare skips it"),
    "too long": (SPOILS, "longer than max_sec; prepare skips it"),
    "no words": (SPOILS, "a transcript without a letter or digit"),
    "control pieces": (SPOILS, "a transcript spells out control pieces such as </s>; prepare skips the clip"),
    "markup": (SPOILS, "annotations in a transcript, which nobody says; prepare skips the clip, unless --config.markup=keep"),
    "unusable reference": (SPOILS, "the reference clip is missing, unreadable or silent; prepare skips the clip"),
    "reference is itself": (SPOILS, "the reference clip is or contains the clip itself, which teaches copying"),
    "trailing silence": (SPOILS, "too many clips end in silence: the model never learns to stop, unless prepare cuts it"),
    "audio in validation": (SPOILS, "the same audio is in training and validation"),
    "speaker in validation": (SPOILS, "the same speaker is in training and validation"),
    "unknown characters": (SPOILS, "characters that the vocabulary cannot encode"),
    "low rate": (SPOILS, "a sample rate below the codec's input rate"),
    "leading silence": (LOOK, "silence before the speech"),
    "wrong length": (LOOK, "the header states no length or a shorter one; the recording is read to its end"),
    "clipping": (LOOK, "samples at full scale or in flat tops"),
    "quiet": (LOOK, "speech below -45 dB of full scale; prepare lifts it with --config.sound.quiet=mend"),
    "offset": (LOOK, "a mean that is not zero; prepare subtracts it"),
    "several channels": (LOOK, "more than one channel; they are averaged"),
    "dead channel": (LOOK, "one of several channels is silent; only the others are averaged"),
    "channels cancel": (LOOK, "channels in antiphase; only the loudest one is used"),
    "narrow spectrum": (LOOK, "the spectrum ends where a lower sample rate would: resampled, or encoded at a low bit rate"),
    "doubtful rate": (LOOK, "the set states no sample rate, and the spectrum does not suit the one that is taken"),
    "mixed rates": (LOOK, "a dataset with more than one sample rate"),
    "wrong duration": (LOOK, "the manifest's duration differs from the recording's"),
    "text or duration outlier": (LOOK, "far more or less text per second than is usual in the language"),
    "duplicate text": (LOOK, "the same speaker says the same words more than once"),
    "duplicate audio": (LOOK, "the same audio more than once"),
    "upper case": (LOOK, "a transcript in capitals; prepare has the option sentence_case"),
    "bytes": (LOOK, "characters without a piece of their own in the vocabulary, encoded as bytes"),
    "no partner": (LOOK, "the only clip of its speaker and session: prepare can choose no reference clip for it"),
}


class Findings:
    """Faults by kind: how many recordings have them, and the first few of these. All of them go to a file as they come.

    Args:
        file: takes a line of JSON for each.   say: is told the first of each kind, as a kind and a line.
    """

    def __init__(self, file: BinaryIO, say: Callable[[str, str], None] = lambda kind, line: None):
        self._file, self._say = file, say
        self.count: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, kind: str, where: str, note: str = "") -> None:
        assert kind in KINDS, kind
        line = f"{where}: {note}" if note else where
        if not self.count[kind]:
            self._say(kind, f"{kind}: {line}")
        self.count[kind] += 1
        if len(self.examples[kind]) < EXAMPLES or kind == FAULTY:
            self.examples[kind].append(line)
        self._file.write(json.dumps({"kind": kind, "where": where, "note": note}, ensure_ascii=False).encode() + b"\n")

    def merge(self, count: dict[str, int], examples: dict[str, list[str]], lines: Iterable[bytes]) -> None:
        """Adds the faults of a later part of the corpus; `lines` are those of its file."""
        self.count.update(count)
        for kind, more in examples.items():
            self.examples[kind] += more[: EXAMPLES - len(self.examples[kind])]
        self._file.writelines(lines)
