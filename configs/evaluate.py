"""How `evaluate` speaks held-out texts and has them judged, or computes the loss of held-out clips.

voxcpm2-jax evaluate --config=configs/evaluate.py:digits --checkpoint=CKPT --data=heldout.jsonl --output=DIR
voxcpm2-jax evaluate --config=configs/evaluate.py:loss --checkpoint=CKPT --data=SHARDS/heldout --output=DIR

variant   scored by
words     word and character error rate
digits    share of digits heard right (the demo corpus)
tiny      digits, three steps a patch: for tests
loss      the two training losses with standard errors, by flow time, dataset, language and mode; nothing is spoken
"""

import dataclasses

from ml_collections import ConfigDict

from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.plain import UserError

VARIANTS = {
    "words": EvaluateConfig(),
    "digits": EvaluateConfig(measure="digits"),
    "loss": EvaluateConfig(measure="loss"),
    "tiny": EvaluateConfig(measure="digits", inference_timesteps=3, num_pictures=1),
}


def get_config(variant: str = "words") -> ConfigDict:
    """A variant as a ConfigDict; the fields and their units stand in config.EvaluateConfig."""
    if variant not in VARIANTS:
        raise UserError(f"configs/evaluate.py has {', '.join(VARIANTS)}; got {variant!r}")
    return ConfigDict(dataclasses.asdict(VARIANTS[variant]))
