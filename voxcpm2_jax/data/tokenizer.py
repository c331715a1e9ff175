"""Text to token ids: released `tokenizer.json`, SentencePiece `tokenizer.model` and newly learned vocabularies.

    text -> (added tokens are cut out) -> spaces become U+2581, one is put in front -> byte-fallback BPE -> Chinese rule -> ids

The ids equal those of the PyTorch package, which uses `LlamaTokenizerFast.from_pretrained(directory)` of transformers 5 and
adds the Chinese rule. That class reads only vocabulary, merges, added tokens and a few flags from the directory. It ignores
the normalizer and pre-tokenizer of tokenizer.json and installs its own: spaces to U+2581, and one in front of the first
section of the text unless there is one already. This module does the same, whatever file the vocabulary came from, so it
encodes with the package `tokenizers`; SentencePiece puts its prefix even in front of a leading space, and has no added tokens.

The Chinese rule splits a piece into its characters if, without its U+2581, it consists of two or more Chinese characters
(U+4E00 to U+9FFF) and is in the vocabulary in that form too. A character that is not in the vocabulary becomes <unk>, not
bytes.
"""

import hashlib
import io
import json
import math
import os
import pathlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from voxcpm2_jax import files
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict
from voxcpm2_jax.config.text import TextRule, control_marks
from voxcpm2_jax.sequence import AUDIO_END_ID, AUDIO_START_ID, BOS_ID, EOS_ID, REFERENCE_END_ID, REFERENCE_START_ID, UNK_ID

SPACE = "\u2581"
RULE_FILE = "text.json"  # beside tokenizer.json: the TextRule
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FRAME = {UNK_ID: "<unk>", BOS_ID: "<s>", EOS_ID: "</s>"}
_MARKERS = {  # their names in learned vocabularies; no text is ever tokenized to them
    AUDIO_START_ID: "<|audio_start|>",
    AUDIO_END_ID: "<|audio_end|>",
    REFERENCE_START_ID: "<|reference_start|>",
    REFERENCE_END_ID: "<|reference_end|>",
}


class Tokenizer:
    """Text to ids, exactly as the PyTorch package encodes it with the tokenizer of the same directory.

    Args:
        backend: byte-fallback BPE with added tokens and pre-tokenizer in place.
        settings: content of tokenizer_config.json.   special_map: content of special_tokens_map.json.
        model: bytes of tokenizer.model, if there is one; kept for saving.
    Attributes:
        rule: how the texts of the shards are written that this vocabulary was used for; None: released, or unused so far.
    Raises:
        UserError: the vocabulary lacks the special ids (sequence.py), or has other pieces there.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, settings: dict, special_map: dict, model: bytes | None = None,
        rule: TextRule | None = None,
    ):  # fmt: skip
        self._backend = backend
        self.rule = rule
        self._settings = settings
        self._special_map = special_map
        self._model = model
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if self.vocab_size <= REFERENCE_END_ID:
            raise UserError(f"tokenizer: {self.vocab_size} pieces; expected over {REFERENCE_END_ID}, the last special id")
        wrong = [f"{i} is {backend.id_to_token(i)!r}, not {piece!r}" for i, piece in _FRAME.items() if vocab.get(piece) != i]
        missing = [str(i) for i in _MARKERS if backend.id_to_token(i) is None]
        if wrong or missing:
            what = "; ".join(wrong + [f"no piece has id {i} (an audio or reference mark)" for i in missing])
            raise UserError(f"tokenizer: the special ids are not where the model expects them: {what}")
        unk = vocab.get(_content(settings.get("unk_token") or special_map.get("unk_token") or "<unk>"), UNK_ID)
        added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        markers = {piece for piece in map(backend.id_to_token, _MARKERS) if re.fullmatch("<.+>", piece)}
        self._control = sorted(added | markers)
        chinese = {piece for piece in vocab if len(piece) >= 2 and all("\u4e00" <= c <= "\u9fff" for c in piece)}
        self._characters = {
            i: [vocab.get(c, unk) for c in piece.replace(SPACE, "")]
            for piece, i in vocab.items()
            if piece.replace(SPACE, "") in chinese
        }

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without <s> in front."""
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # `tokenizers` raises it for half a surrogate pair
            raise UserError(f"text is not valid Unicode: {text!r:.80}") from None
        if self._characters.keys().isdisjoint(ids):
            return ids
        return [j for i in ids for j in self._characters.get(i, (i,))]

    def control_pieces(self, text: str) -> list[str]:
        """What a text spells out that would become a control piece, such as </s>, instead of words."""
        found = [piece for piece in self._control if piece in text]
        return found + [piece for piece in control_marks(text) if piece not in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. With a vocabulary of `train_tokenizer`, decode(encode(text)) == text for normalised text."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def uncovered(self, text: str) -> tuple[list[str], list[str]]:
        """The characters of the text that become <unk>, and those that become bytes; each once, sorted."""
        unknown, spelt = set(), set()
        for character in {c for c in text if not c.isspace()}:
            pieces = [self._backend.id_to_token(i) for i in self.encode(character)]
            if any(piece == "<unk>" for piece in pieces):
                unknown.add(character)
            elif any(re.fullmatch(r"<0x[0-9A-F]{2}>", piece) for piece in pieces):
                spelt.add(character)
        return sorted(unknown), sorted(spelt)

    @property
    def sha256(self) -> str:
        """The hash of the tokenizer.json that `save` writes."""
        return hashlib.sha256(self._backend.to_str(pretty=True).encode()).hexdigest()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json; tokenizer.model, text.json if there are any.

        tokenizer.json names the pre-tokenizer that is really used, so plain `tokenizers` gives the same ids with it.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings, special_map = dict(self._settings), dict(self._special_map)
        for name, piece in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
            settings.setdefault(name, _content(special_map.get(name, piece)))
            special_map.setdefault(name, settings[name])
        added = self._backend.get_added_tokens_decoder()
        settings.setdefault("added_tokens_decoder", {str(i): added[i].__getstate__() for i in sorted(added)})
        settings.setdefault("tokenizer_class", "LlamaTokenizerFast")
        contents = {
            "tokenizer.json": self._backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": _dump(settings),
            "special_tokens_map.json": _dump(special_map),
        }
        if self._model is not None:
            contents["tokenizer.model"] = self._model
        if self.rule is not None:
            contents[RULE_FILE] = _dump(to_dict(self.rule))
        for name, content in contents.items():
            with files.aside(directory / name) as temporary:
                temporary.write_bytes(content)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a directory with tokenizer.json (preferred) or tokenizer.model, or one such file and the files beside it.

    Raises:
        UserError: no such file, not a byte-fallback BPE vocabulary, special ids missing.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "tokenizer.json" if (file / "tokenizer.json").exists() else file / "tokenizer.model"
    if not file.exists():
        raise UserError(f"{path}: no tokenizer; expected tokenizer.json or tokenizer.model")
    settings = _read(file.with_name("tokenizer_config.json"), missing={})
    special_map = _read(file.with_name("special_tokens_map.json"), missing={})
    is_json = file.suffix == ".json"
    model_file = file.with_name("tokenizer.model") if is_json else file
    model = model_file.read_bytes() if model_file.exists() else None
    content = _read(file) if is_json else _from_sentencepiece(model, file)
    rule = _read(file.with_name(RULE_FILE), missing={})
    rule = from_dict(TextRule, rule, where=str(file.with_name(RULE_FILE))) if rule else None
    return Tokenizer(_backend(content, settings, special_map, file), settings, special_map, model, rule)


def balanced(
    corpus: Callable[[], Iterable[tuple[str, str]]], *, temperature: float = 1.0, max_chars: int = 1 << 62
) -> Iterator[str]:
    """The texts to learn a vocabulary from. A language with c characters gets a share proportional to c ** (1 / temperature).

    Each text of a language is repeated floor(w) or ceil(w) times. w is the same for all its texts, and the draws between
    the two are always the same. The largest language has w = 1; if the result would exceed `max_chars`, every w shrinks by
    the same factor.

    Args:
        corpus: returns an iterable of all (language, text). It is called twice, and no text is kept in memory.
        max_chars: characters of the result, up to the randomness of the draws.
    """
    sizes: Counter[str] = Counter()
    for language, text in corpus():
        sizes[language] += len(text)
    largest = max(sizes.values(), default=0)
    times = {language: (size / largest) ** (1 / temperature - 1) for language, size in sizes.items() if size}
    excess = sum(x * sizes[language] for language, x in times.items()) / max_chars
    draw = random.Random(0)
    for language, text in corpus():
        if text:
            wanted = times[language] / max(excess, 1.0)
            yield from [text] * (math.floor(wanted) + (draw.random() < wanted % 1))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, character_coverage: float = 0.9995, num_threads: int = 1
) -> Tokenizer:
    """Learns a byte-fallback BPE vocabulary; characters without a piece of their own are encoded as bytes.

    No piece holds two Chinese characters, because the Chinese rule would split it again.

    Args:
        texts: transcripts.   vocab_size: V, at least 7 special pieces + 256 bytes + the characters covered.
        character_coverage: share of the corpus's characters that get a piece.
    Raises:
        UserError: the vocabulary is too small for its characters, or larger than the texts can fill.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    delimiter = "\x1f"  # between Chinese characters: no piece crosses it

    def lines():
        for text in texts:
            for line in text.splitlines():
                yield "".join(f"{c}{delimiter}" if "\u4e00" <= c <= "\u9fff" else c for c in line)

    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=writer, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
            unk_id=UNK_ID, bos_id=BOS_ID, eos_id=EOS_ID, pad_id=-1, control_symbols=list(_MARKERS.values()),
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
            pretokenization_delimiter=delimiter, max_sentence_length=1 << 24, split_digits=True,
            character_coverage=character_coverage, num_threads=num_threads, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        what = str(error).rsplit("] ", 1)[-1] or "no text to learn it from"
        raise UserError(f"a vocabulary of {vocab_size} pieces (vocab_size): {what}") from None
    # SentencePiece orders <unk> <s> </s>, markers, bytes, learned pieces; the markers are moved to their ids. Their type
    # becomes "unused" instead of "control", so that they do not count as added tokens.
    proto = sentencepiece_model_pb2.ModelProto.FromString(writer.getvalue())
    pieces = list(proto.pieces)
    first = len(_FRAME)
    frame, markers, rest = pieces[:first], pieces[first : first + len(_MARKERS)], pieces[first + len(_MARKERS) :]
    for piece in markers:
        piece.type = piece.UNUSED
    cut = AUDIO_START_ID - first
    del proto.pieces[:]
    proto.pieces.extend(frame + rest[:cut] + markers + rest[cut:])
    model = proto.SerializeToString()
    content, settings = _from_sentencepiece(model, "new tokenizer"), {"legacy": False, "model_max_length": 1 << 30}
    return Tokenizer(_backend(content, settings, {}, "new tokenizer"), settings, {}, model)


# ---- reading -------------------------------------------------------------------------------------------------------


def _backend(content: dict, settings: dict, special_map: dict, where) -> tokenizers.Tokenizer:
    """The PyTorch package's pipeline; of tokenizer.json's content only model, added tokens and post-processor are used."""
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UserError(f"{where}: expected a BPE vocabulary with its merges")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    vocab = model["vocab"]
    wrong = [m for m in merges if len(m) != 2 or not {m[0], m[1], "".join(m)} <= vocab.keys()]
    if wrong:
        raise UserError(f"{where}: {len(wrong)} merges of pieces that are not in the vocabulary, the first {wrong[0]}")
    bpe = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, dropout=None)
    backend = tokenizers.Tokenizer(bpe)
    has_prefix = settings.get("add_prefix_space")
    has_prefix = True if has_prefix is None else has_prefix
    scheme = ("always" if settings.get("legacy", False) else "first") if has_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * bool(has_prefix))
    if content.get("post_processor"):  # adds <s> on request; `encode` never asks for it
        shell = {
            "version": "1.0",
            "model": {"type": "BPE", "vocab": {}, "merges": []},
            "post_processor": content["post_processor"],
        }
        backend.post_processor = tokenizers.Tokenizer.from_str(json.dumps(shell)).post_processor
    backend.add_tokens(_added_tokens(content, settings, special_map))
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    return backend


def _added_tokens(content, settings, special_map) -> list[AddedToken]:
    """Tokens cut out of the text before BPE, in the PyTorch package's order: by id, then named ones, then extra ones."""
    if "added_tokens_decoder" in settings:  # then the PyTorch package reads nothing else
        listed = {int(i): token for i, token in settings["added_tokens_decoder"].items()}
        special_map = {}
    else:
        listed = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in content.get("added_tokens", [])}
    tokens = {token["content"]: AddedToken(**token) for _, token in sorted(listed.items())}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings | special_map
    named = {k: v for k, v in named.items() if k.endswith("_token") and isinstance(v, str | dict)}
    order = [k for k in _NAMED if k in named] + [k for k in named if k not in _NAMED]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or content.get("symbols") or []
    extra = list(extra.values()) if isinstance(extra, dict) else list(extra)
    extra += special_map.get("extra_special_tokens") or special_map.get("additional_special_tokens") or []
    for token in [named[k] for k in order] + extra:
        if _content(token) not in tokens:
            fields = {k: v for k, v in token.items() if k != "__type"} if isinstance(token, dict) else {"content": token}
            tokens[_content(token)] = AddedToken(**({"special": True} | fields))
    return list(tokens.values())


def _from_sentencepiece(model: bytes, where) -> dict:
    """A SentencePiece BPE model as the content of a tokenizer.json; the order of the pieces determines the merges."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError:
        raise UserError(f"{where}: not a SentencePiece model") from None
    if proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise UserError(f"{where}: expected a SentencePiece model of type BPE")
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    merges = [
        (piece[:i], piece[i:])
        for piece in vocab  # in the order of ids, which is the order of merging
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    symbols = [
        {"content": p.piece, "normalized": False, "special": p.type == kinds.CONTROL}
        for p in proto.pieces
        if p.type in (kinds.CONTROL, kinds.USER_DEFINED)
    ]
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "symbols": symbols}


def _read(path: pathlib.Path, missing: dict | None = None) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object")
    return content


def _content(token) -> str:
    return token["content"] if isinstance(token, dict) else token


def _dump(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
