"""TODO config.evaluate."""

from dataclasses import dataclass

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BatchConfig, ValidationConfig

# ---- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluateConfig:
    """What `evaluate` measures, and how; configs/evaluate.py has the variants."""

    # "words" (1 - WER) or "digits": what a judge's transcripts of the model's speech are scored by. "loss": of held-out
    # shards; the fields from `validation` on are for it, the others for speech.
    measure: str = "words"
    seed: int = 0  # of the first text's noise; text i takes seed + i
    cfg_value: float = 2.0  # guidance
    inference_timesteps: int = 10  # Euler steps a patch
    batch_texts: int = 16  # spoken together
    num_pictures: int = 4  # spectrograms of recording and speech side by side
    validation: ValidationConfig = ValidationConfig(max_clips=4096)
    batch: BatchConfig = BatchConfig(rows=4, slots=1024, patches=768)  # clips are heard in such batches

    def __post_init__(self):
        if self.measure not in ("words", "digits", "loss"):
            raise UserError(f"measure must be words, digits or loss, got {self.measure!r}")
        if self.batch_texts < 1 or self.num_pictures < 0:
            raise UserError(f"batch_texts must be at least 1 and num_pictures 0 or more; got {self}")
