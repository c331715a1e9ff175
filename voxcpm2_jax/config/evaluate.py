"""Configuration of `evaluate`: what is measured, and how the speech to measure is generated."""

from dataclasses import dataclass

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.request import Request
from voxcpm2_jax.config.run import BatchConfig, ValidationConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """What `evaluate` measures, and how; configs/evaluate.py has the variants."""

    # "words": word and character error rates of the speech. "digits": share of English digits heard right. "loss": the
    # training losses on held-out shards, which uses the last two fields; the others are for speech.
    measure: str = "words"
    seed: int = 0  # of the noise: text i is spoken with seed + i
    cfg_value: float = Request.cfg_value  # guidance
    inference_timesteps: int = Request.inference_timesteps  # Euler steps per patch
    batch_texts: int = 16  # texts that are spoken in one batch
    num_pictures: int = 4  # spectrograms that show a recording and the generated speech side by side
    validation: ValidationConfig = ValidationConfig(max_clips=4096)
    batch: BatchConfig = BatchConfig(rows=4, slots=1024, patches=768)  # size of the batches of clips

    def __post_init__(self):
        if self.measure not in ("words", "digits", "loss"):
            raise UserError(f"measure must be words, digits or loss, got {self.measure!r}")
        if self.batch_texts < 1 or self.num_pictures < 0:
            raise UserError(f"batch_texts must be at least 1 and num_pictures 0 or more; got {self}")
