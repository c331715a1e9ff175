"""What `prepare` makes shards from: the embedded corpora, the choice of reference clips, and all other options."""

import re
from dataclasses import dataclass

from voxcpm2_jax.config.plain import UserError, check_at_least
from voxcpm2_jax.config.sound import SoundConfig
from voxcpm2_jax.config.text import TextRule


@dataclass(frozen=True)
class DemoConfig:
    """The corpus that is synthesised on the spot: digit strings in English, words of five other languages."""

    seed: int = 0
    num_digit_clips: int = 8000  # English training clips
    num_foreign_clips: int = 300  # at most 15 % of the training clips
    max_digits: int = 4  # of a string
    num_heldout: int = 50  # strings of 2 digits and more that are never trained on

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"demo: {message}")

        check(self.num_digit_clips >= 1, f"num_digit_clips must be at least 1, got {self.num_digit_clips}")
        check(
            0 <= self.num_foreign_clips <= 0.15 * (self.num_digit_clips + self.num_foreign_clips),
            f"num_foreign_clips must be at most 15 % of all clips, got {self.num_foreign_clips} beside {self.num_digit_clips}",
        )
        check(2 <= self.max_digits <= 20, f"max_digits must lie in 2..20, got {self.max_digits}")
        check(
            0 <= self.num_heldout <= 50 * (self.max_digits - 1),
            f"num_heldout must lie in 0..{50 * (self.max_digits - 1)} (half of the 2-digit strings), got {self.num_heldout}",
        )


# The demo corpora by name, in order of size.
DEMOS = {
    "tiny": DemoConfig(num_digit_clips=60, num_foreign_clips=10, max_digits=2, num_heldout=8),
    "demo": DemoConfig(),
    "demo_long": DemoConfig(num_digit_clips=12_000, num_foreign_clips=400),
}


@dataclass(frozen=True)
class DebianConfig:
    """Real recordings from Debian's packages: the voice prompts of the Asterisk telephone exchange."""

    seed: int = 0  # of the choice of held-out texts
    languages: str = "en,es,fr,it,ru"  # some of these
    num_heldout: int = 20  # texts of each language that are never trained on
    packages: str = ""  # directory with the .deb files; empty: apt-get downloads them

    def __post_init__(self):
        known = type(self).languages.split(",")
        chosen = self.languages.split(",")
        if len(set(chosen) & set(known)) < len(chosen):
            raise UserError(f"debian: languages must be some of {','.join(known)} with commas between, got {self.languages!r}")
        check_at_least(0, self, "debian", "num_heldout")


@dataclass(frozen=True)
class PairsConfig:
    """Which clips may be a clip's reference clip: those of its speaker and session with a similar voice (corpus/speaker.py).

    All fields but the encoder may change from one run of `prepare` to the next, which then only chooses the pairs again.
    """

    encoder: str = ""  # speaker encoder: "resemblyzer", or "module:name" of another one; empty: no pairs
    min_cosine: float = 0.7  # two clips are a pair if the cosine of their embeddings is above it
    references: int = 4  # k, how many are kept for each clip, to draw its reference clip from
    min_sec: float = 1.0  # shorter clips are never reference clips
    max_sec: float = 30.0  # longer clips are never reference clips
    need_session: bool = False  # True: clips without a session have no pairs; False: those of a speaker form one session
    seed: int = 0  # of the choice

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"pairs: {message}")

        known = self.encoder in ("", "resemblyzer") or re.fullmatch(r"[\w.]+:\w+", self.encoder)
        check(known, f"encoder must be resemblyzer, MODULE:NAME or empty, got {self.encoder!r}")
        check(-1 <= self.min_cosine < 1, f"min_cosine must lie in [-1, 1), got {self.min_cosine}")
        check(self.references >= 1, f"references must be at least 1, got {self.references}")
        check(0 <= self.min_sec < self.max_sec, f"expected 0 <= min_sec < max_sec, got {self.min_sec} and {self.max_sec}")
        check(self.seed >= 0, f"seed must be 0 or more, got {self.seed}")


_SOUND = SoundConfig()


@dataclass(frozen=True)
class DataConfig:
    """The options of `prepare`; configs/data.py has the variants."""

    source: str = "demo"  # "demo": synthesised on the spot; "debian": from Debian's packages; "manifest": your own
    demo: DemoConfig = DemoConfig()
    debian: DebianConfig = DebianConfig()
    manifest: str = ""  # JSON lines, another list or tfds:NAME (corpus/sources.py), or several separated by commas
    heldout: str = ""  # the same, for clips that are not trained on; their shards are OUTPUT/heldout
    tokenizer: str = ""  # directory or file; empty: a new vocabulary from the transcripts
    vocab_size: int = 512  # V of a new vocabulary
    vocab_temperature: float = 1.0  # a language's share in it is characters ** (1 / temperature): over 1 is more even
    vocab_chars: int = 100_000_000  # it is learned from at most this many characters: bounds memory
    patch_size: int = 4  # P, latent frames in a patch
    trim: str = "none"  # cut at both ends: "silence", "vad" (everything that is not speech), "none"
    trim_db: float = -50.0  # silence is this far below the loudest 10 ms
    trim_keep_ms: float = 200.0  # kept at each end, if it is there; "vad" detects soft consonants up to 120 ms late
    min_sec: float = 0.16  # shorter clips are skipped
    max_sec: float = 60.0  # longer clips are skipped
    latent_dtype: str = "float16"  # in the shards: "float16", "bfloat16", "float32"
    sentence_case: bool = False  # transcripts in capitals become lower case, with capitals where sentences start
    markup: str = "skip"  # clips whose transcript has annotations such as [laughter], <noise>, &amp;: "skip" or "keep" them
    shard_clips: int = 4096  # recordings of one shard
    host: int = 0  # this machine makes shards host, host + num_hosts, ..
    num_hosts: int = 1
    encode_sec: float = 60.0  # seconds of audio in one batch of the codec
    sound: SoundConfig = _SOUND  # what to do about recordings that are cut off, quiet, clipped ...
    pairs: PairsConfig = PairsConfig()

    def __post_init__(self):
        def check(ok, message):
            if not ok:
                raise UserError(f"data config: {message}")

        sources = ("demo", "debian", "manifest")
        check(self.source in sources, f"source must be one of {', '.join(sources)}, got {self.source!r}")
        check(self.source != "manifest" or self.manifest.strip(","), "source 'manifest' needs --config.manifest=FILE[,FILE]")
        check(self.source == "manifest" or not (self.manifest or self.heldout), "manifest and heldout need source 'manifest'")
        dtypes = ("float16", "bfloat16", "float32")
        check(self.latent_dtype in dtypes, f"latent_dtype must be one of {', '.join(dtypes)}, got {self.latent_dtype!r}")
        check(self.vocab_size > 104, f"vocab_size must be over 104 (the special ids), got {self.vocab_size}")
        check(self.vocab_temperature > 0, f"vocab_temperature must be over 0, got {self.vocab_temperature}")
        check(self.vocab_chars >= 1, f"vocab_chars must be at least 1, got {self.vocab_chars}")
        check(self.patch_size >= 1, f"patch_size must be at least 1, got {self.patch_size}")
        check(0 < self.min_sec < self.max_sec, f"expected 0 < min_sec < max_sec, got {self.min_sec} and {self.max_sec}")
        check(self.trim in ("none", "silence", "vad"), f"trim must be none, silence or vad, got {self.trim!r}")
        check(self.markup in ("skip", "keep"), f"markup must be skip or keep, got {self.markup!r}")
        check(self.trim_db < 0, f"trim_db must be negative, got {self.trim_db}; to keep silence, set trim to none")
        check(self.trim_keep_ms >= 0, f"trim_keep_ms must be 0 or more, got {self.trim_keep_ms}")
        check(self.shard_clips >= 1, f"shard_clips must be at least 1, got {self.shard_clips}")
        check(0 <= self.host < self.num_hosts, f"host must lie in 0..num_hosts - 1, got {self.host} of {self.num_hosts}")
        check(self.encode_sec > 0, f"encode_sec must be over 0, got {self.encode_sec}")

    @property
    def text_rule(self) -> TextRule:
        """How transcripts are written before they are tokenized."""
        return TextRule(sentence_case=self.sentence_case)
