"""What `prepare` makes shards from.

    voxcpm2-jax prepare --config=configs/data.py:demo --output=DIR --vae=CKPT

    variant     what                                                            size       speaking, 2 CPU cores
    tiny        the demo corpus for tests: strings of one and two digits        1 min      seconds
    demo        digit strings in English, words of five more languages          3.0 h      80 s
    demo_long   the same, more of them                                          4.5 h      2 min
    manifest    recordings of one's own, --config.manifest=FILE[,FILE]; silence at their ends is cut

--config.trim=vad cuts noise at the ends as well (extra "eval"); --config.pairs.encoder=resemblyzer chooses reference
clips of the same speaker, session and sound (extra "speaker").

Speech of the demo corpus is synthetic (hibari-tts, espeak-ng): figures made on it say so. Encoding comes on top, at the
codec's speed.
"""

import dataclasses

from ml_collections import ConfigDict

from voxcpm2_jax.config import DataConfig, DemoConfig, UserError

VARIANTS = ("tiny", "demo", "demo_long", "manifest")


def get_config(variant: str = "demo") -> ConfigDict:
    """A variant as a ConfigDict; the fields and their units stand in config.DataConfig."""
    if variant == "tiny":
        demo = DemoConfig(num_digit_clips=60, num_foreign_clips=10, max_digits=2, num_heldout=8)
        config = DataConfig(demo=demo, vocab_size=384, shard_clips=32, encode_sec=8.0)
    elif variant == "demo":
        config = DataConfig()
    elif variant == "demo_long":
        config = DataConfig(demo=DemoConfig(num_digit_clips=12_000, num_foreign_clips=400))
    elif variant == "manifest":
        # Recordings end in silence as they come, and who hears over half a second of it never learns to stop.
        return _plain(DataConfig(trim="silence"), source="manifest")
    else:
        raise UserError(f"configs/data.py has {', '.join(VARIANTS)}; got {variant!r}")
    return _plain(config)


def _plain(config: DataConfig, **changes) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(config) | changes)
