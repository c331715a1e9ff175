"""What is done about recordings whose sound is not as it should be."""

from dataclasses import dataclass

from voxcpm2_jax.config.plain import UserError

KEEP, MEND, SKIP = "keep", "mend", "skip"
_CHOICES = {
    "cut": (SKIP, KEEP),
    "channels": (MEND, SKIP, KEEP),
    "scale": (SKIP, MEND),
    "offset": (MEND, SKIP, KEEP),
    "clipped": (KEEP, SKIP),
    "quiet": (KEEP, MEND, SKIP),
}


@dataclass(frozen=True)
class SoundConfig:
    """Rules for recordings with a fault: "mend" it, "skip" the recording, or "keep" it. data/sound.py has the limits."""

    cut: str = SKIP  # the file ends before the length that its header states; "keep": what is there
    channels: str = MEND  # dead, or cancelling each other: only those that sound, or the loudest one; "keep": the mean of all
    scale: str = SKIP  # floating-point samples far beyond full scale; "mend": 16-, 24- or 32-bit numbers, divided
    offset: str = MEND  # a mean that is not zero: subtracted
    clipped: str = KEEP  # too many samples at full scale or in flat tops
    quiet: str = KEEP  # "mend": lifted to level_db, as far as peaks allow
    level_db: float = -26.0  # RMS of the speech relative to full scale

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"sound.{name} must be one of {', '.join(choices)}, got {value!r}")
        if not -60 <= self.level_db <= -6:
            raise UserError(f"sound.level_db must lie in -60..-6 (dB), got {self.level_db}")


# A recording that speech is cloned from or continues is not altered, as in the PyTorch package, except for its channels.
AS_RECORDED = SoundConfig(offset=KEEP)
EVERYTHING = SoundConfig(cut=KEEP, scale=MEND, offset=KEEP)  # nothing is left out for its sound
