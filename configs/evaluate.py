"""How `evaluate` scores a checkpoint: speech of held-out texts, or the loss on held-out clips.

voxcpm2-jax evaluate --config=configs/evaluate.py:words --checkpoint=CKPT --data=heldout.jsonl --output=DIR
voxcpm2-jax evaluate --config=configs/evaluate.py:loss --checkpoint=CKPT --data=SHARDS/heldout --output=DIR

variant   measures
words     word and character error rates, in the language that the manifest names for each recording
digits    share of English digits heard right (for the demo corpus)
tiny      digits, three Euler steps per patch: for tests
loss      the two training losses with standard errors, by flow time, dataset, language and mode; nothing is spoken

Speech is scored at its first try ("generated"); beside it stands the score with bad cases drawn again ("retried"), as
`generate` does. However many texts there are, the speech of `batch_texts` of them is in memory at once.

Hardware: any that the model runs on; the judge of speech, Whisper-base, runs on two CPU cores. Wall time: unmeasured.
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
    """A variant as a ConfigDict; `voxcpm2_jax.config.evaluate.EvaluateConfig` explains the fields."""
    if variant not in VARIANTS:
        raise UserError(f"configs/evaluate.py has {', '.join(VARIANTS)}; got {variant!r}")
    return ConfigDict(dataclasses.asdict(VARIANTS[variant]))
