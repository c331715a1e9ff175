"""Configs of `prepare`: what shards are made from.

    voxcpm2-jax prepare --config=configs/data.py:demo --output=DIR --vae=CKPT

    variant     what                                                            size       making it, 2 CPU cores
    tiny        the demo corpus for tests: strings of one and two digits        1 min      seconds
    demo        digit strings in English, words of five more languages          3.0 h      80 s
    demo_long   the same, more of them                                          4.5 h      2 min
    debian      voice prompts of a telephone exchange in en, es, fr, it, ru     1.8 h      30 s, half of it downloading
    manifest    your own: --config.manifest=NAME[,NAME], each a list of recordings, or tfds:librispeech@train_clean100

The times are for the recordings; encoding them takes the codec's time on top.

Without --config.tokenizer, a vocabulary of --config.vocab_size pieces is learned from the transcripts. "debian" and
"manifest" balance the languages in it with a temperature of 3: a language with a thousandth of another's text counts a
tenth of it. "manifest" cuts the silence at both ends of its recordings; --config.trim=vad cuts noise as well (extra "eval").
--config.pairs.encoder=resemblyzer chooses reference clips of the same speaker, session and voice (extra "speaker").

The speech of the demo corpora is synthetic (hibari-tts, espeak-ng), and figures measured on it say so. That of "debian" is
real, one speaker per language, CC-BY-SA 3.0 (ru: CC-BY 3.0); apt-get downloads 54 MB, unless --config.debian.packages=DIR
names a directory that has the packages. Without --vae, these make only recordings and manifests.
"""

import dataclasses

from ml_collections import ConfigDict

from voxcpm2_jax.config.corpus import DEMOS, DataConfig
from voxcpm2_jax.config.plain import UserError

VARIANTS = (*DEMOS, "debian", "manifest")


def get_config(variant: str = "demo") -> ConfigDict:
    """A variant as a ConfigDict; config/corpus.py (DataConfig) describes the fields and their units."""
    if variant == "tiny":
        config = DataConfig(demo=DEMOS["tiny"], vocab_size=384, shard_clips=32, encode_sec=8.0)
    elif variant in DEMOS:
        config = DataConfig(demo=DEMOS[variant])
    elif variant == "debian":
        config = DataConfig(source="debian", vocab_size=2048, vocab_temperature=3.0)
    elif variant == "manifest":
        # Most recordings end in silence, and a model that is trained on more than half a second of it never learns to stop.
        return _plain(DataConfig(trim="silence", vocab_temperature=3.0), source="manifest")
    else:
        raise UserError(f"configs/data.py has {', '.join(VARIANTS)}; got {variant!r}")
    return _plain(config)


def _plain(config: DataConfig, **changes) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(config) | changes)
