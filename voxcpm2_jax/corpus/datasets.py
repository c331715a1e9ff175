"""TensorFlow data sets as corpora, without TensorFlow: tfds:NAME[/CONFIG][:VERSION][@SPLIT][?rate=HZ].

    tfds:librispeech@train_clean100+train_clean360    tfds:common_voice/de@train    tfds:xtreme_s/fleurs.en_us@validation
    tfds:ljspeech:1.1.1@train[:95%]                   tfds:voxcpm2_demo/tiny@heldout
    tfds:common_voice/de@train?rate=32000

The default SPLIT is train, the default VERSION the newest one present. Data sets are read from TFDS_DATA_DIR
(~/tensorflow_datasets). They have to be prepared there once, with TensorFlow, in a format with random access:

    tfds.builder("librispeech", file_format="array_record").download_and_prepare()

`rate` is the sample rate of a set that does not state one, such as Common Voice, whose clips have 48 kHz, in newer releases 32.
Only voxcpm2_demo, the demo corpus, is made here if it is missing. Examples are not kept in memory:
each is read once for its text and again when its audio is loaded.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from voxcpm2_jax.config.corpus import DEMOS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import demo
from voxcpm2_jax.corpus.manifest import TFDS, Recording, read_manifest
from voxcpm2_jax.data import audio
from voxcpm2_jax.data.records import Part, Records

_FORMAT = "array_record"


class Audio(tfds.features.Tensor):
    """Replaces tfds.features.Audio, which cannot be constructed without TensorFlow, when a prepared set is opened.

    It returns samples as they are stored; with lazy_decode these are the bytes of an audio file.
    """

    ALIASES: ClassVar = ["tensorflow_datasets.core.features.audio_feature.Audio"]

    def __init__(self, *, sample_rate: int | None, **kwargs):
        super().__init__(**kwargs)
        self.sample_rate = sample_rate

    @classmethod
    def from_json_content(cls, value) -> "Audio":
        """From the AudioFeature of a features.json (feature.proto)."""
        if value.lazy_decode:
            return cls(sample_rate=None, shape=(), dtype=np.object_)  # the file says its rate
        shape = tuple(None if size < 0 else size for size in value.shape.dimensions)
        encoding = value.encoding or "none"
        return cls(sample_rate=value.sample_rate or None, shape=shape, dtype=np.dtype(value.dtype), encoding=encoding)


# ---- the fields of known sets ----------------------------------------------------------------------------------------


class Fields(NamedTuple):
    """The names that a data set has for the fields of a Recording."""

    audio: str
    text: str
    speaker: str | None = None
    session: str | None = None
    description: str | None = None
    language: str | None = None
    id: str | None = None
    order: Callable[[str], float | None] | None = None  # place in the order of recording, from the field `id`
    code: Callable[[str], str] | None = None  # language code from the field `language`, or without one from the config's name
    rate: int | None = None  # Hz, for sets that do not state it
    one_speaker: str | None = None  # for sets of one speaker, who is not named in them


def _english(_: str) -> str:
    return "en"


def _base(tag: str) -> str:
    """zh-CN -> zh, fleurs.en_us -> en."""
    return {"cmn": "zh"}.get(code := re.split("[-_]", tag.rpartition(".")[2])[0], code)


def _last_numbers(count: int) -> Callable[[str], float | None]:
    """The last numbers of an id as one; they have leading zeros: 2 of "LJ001-0017" -> 10017."""

    def order(id_: str) -> float | None:
        numbers = re.findall(r"\d+", id_)[-count:]
        return float("".join(numbers)) if len(numbers) == count else None

    return order


def _begin_of_part(id_: str) -> float | None:
    """SPEAKER-BEGIN-END-LABEL, in seconds."""
    found = re.search(r"-(\d+(?:\.\d+)?)-\d+(?:\.\d+)?-", id_)
    return float(found[1]) if found else None


FIELDS = {
    "librispeech": Fields("speech", "text", "speaker_id", "chapter_id", id="id", order=_last_numbers(1), code=_english),
    "libritts": Fields("speech", "text_normalized", "speaker_id", "chapter_id", id="id", order=_last_numbers(2), code=_english),
    "ljspeech": Fields("speech", "text_normalized", id="id", order=_last_numbers(2), code=_english, one_speaker="linda"),
    "vctk": Fields("speech", "text", "speaker", id="id", order=_last_numbers(1), code=_english),
    "tedlium": Fields("speech", "text", "speaker_id", id="id", order=_begin_of_part, code=_english),
    "user_libri_audio": Fields("audio", "transcript", "speaker_id", "book_id", id="id", order=_last_numbers(2), code=_english),
    "common_voice": Fields("voice", "sentence", "client_id", code=_base, rate=48000),  # the rate of its mp3 files
    "xtreme_s": Fields("audio", "raw_transcription", language="lang_id", code=_base),  # FLEURS
    "voxcpm2_demo": Fields("audio", "text", "speaker", None, "description", "language"),
}


def _fields_of(dataset: str, features: tfds.features.FeaturesDict) -> Fields:
    fields = FIELDS.get(dataset, FIELDS["voxcpm2_demo"])
    if fields.audio not in features or fields.text not in features:
        raise UserError(
            f"tfds:{dataset}: its fields are {', '.join(sorted(features))}; known are those of {', '.join(FIELDS)}, "
            f"and any set that has {fields.audio} and {fields.text}"
        )
    others = ("speaker", "session", "description", "language", "id")
    return fields._replace(**{name: None for name in others if getattr(fields, name) not in features})


# ---- a set as a corpus -----------------------------------------------------------------------------------------------


class Dataset(Sequence):
    """The recordings of a split, in its order.

    Attributes:
        name: as given.   sha256: of the set's description (sizes, shards, versions) and of the split.
    Raises:
        UserError: a missing set, version or split, or one in another format or with other fields.
    """

    def __init__(self, name: str):
        self.name = f"{TFDS}{name}"
        name, rate = _rate_option(name)
        name, _, split = name.partition("@")
        builder = _builder(name)
        info = builder.info
        try:
            builder.as_data_source(split or "train", file_format=_FORMAT)  # for its checks; and chooses the format
        except ValueError as error:
            there = ", ".join(info.splits) or "none"
            raise UserError(f"{self.name}: no such split, or an empty one ({error}); its splits are {there}") from None
        self._dataset, self._config, self._set = info.name, info.config_name or "", info.full_name
        self._fields = _fields_of(info.name, info.features)
        self._sound = tfds.features.FeaturesDict({self._fields.audio: info.features[self._fields.audio]})
        self._words = tfds.features.FeaturesDict(
            {name: info.features[name] for name in self._fields[1:7] if name is not None and name in info.features}
        )
        self._rate, self._is_rate_guessed = self._rate_of(info, rate)
        digest = hashlib.sha256(info.as_json.encode())
        if rate:
            digest.update(f"rate {rate}".encode())
        files = tfds.core.data_sources.base.file_instructions(info, split or "train")
        for part in files:
            if not tfds.core.Path(part.filename).exists():
                raise UserError(f"{self.name}: a shard is missing, {part.filename}")
            digest.update(f"{part.basename()} {part.skip} {part.examples_in_shard} {part.take}".encode())
        self.sha256 = digest.hexdigest()
        parts = [Part(str(part.filename), part.skip, part.take) for part in files]
        self._records = Records(parts, "prepare the set again, with TensorFlow")

    def _rate_of(self, info, option: int | None) -> tuple[int | None, bool]:
        """The rate of the samples, None where each is the content of a file; and whether it is a guess."""
        feature = info.features[self._fields.audio]
        in_files = feature.np_dtype == np.object_
        stated = getattr(feature, "sample_rate", None) or (info.metadata or {}).get("sample_rate")
        if option and (in_files or (stated and int(stated) != option)):
            said = "each of its files states its rate" if in_files else f"the set states {int(stated)} Hz"
            raise UserError(f"{self.name}: {said}; expected no rate option, which is for sets that state none")
        if in_files:
            return None, False
        if not (rate := stated or option or self._fields.rate):
            raise UserError(
                f"{self.name}: neither its field {self._fields.audio} nor its metadata states a sample rate; "
                f"give it, as in {self.name}?rate=16000"
            )
        return int(rate), not (stated or option)

    num_faults = 0

    def faults(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        example = self._words.deserialize_example_np(self._record(index))
        fields = self._fields

        def text(name: str | None) -> str | None:
            if name is None:
                return None
            value = example[name]
            if isinstance(feature := self._words[name], tfds.features.ClassLabel):
                return feature.int2str(int(value))
            return (value.decode() if isinstance(value, bytes) else str(value)) or None

        return Recording(
            audio.Stored(f"{self.name}#{index}", partial(self._read, index), self._place(index), self._is_rate_guessed),
            text(fields.text) or "",
            dataset=self._dataset,
            language=fields.code(text(fields.language) or self._config) if fields.code else text(fields.language),
            speaker=text(fields.speaker) or fields.one_speaker,
            session=text(fields.session),
            description=text(fields.description),
            order=fields.order(text(fields.id) or "") if fields.order else None,
        )

    def __iter__(self) -> Iterator[Recording]:
        return (self[i] for i in range(len(self)))

    def _read(self, index: int) -> tuple[np.ndarray | bytes, int | None]:
        return self._sound.deserialize_example_np(self._record(index))[self._fields.audio], self._rate

    def _place(self, index: int) -> str:
        """The file of an example and its number there, whatever split it is read in."""
        part, number = self._records.find(index)
        return f"{self._set}/{os.path.basename(part.path)}#{number}"

    def _record(self, index: int) -> bytes:
        try:
            return self._records[index]
        except UserError as damage:
            raise UserError(f"{self.name}#{index}: {damage}") from None


def _rate_option(name: str) -> tuple[str, int | None]:
    """NAME?rate=HZ -> (NAME, HZ)."""
    name, _, options = name.partition("?")
    if not options:
        return name, None
    match = re.fullmatch(r"rate=(\d{4,6})", options)
    if not match:
        raise UserError(f"{TFDS}{name}?{options}: expected ?rate=HZ, such as ?rate=32000, as the only option")
    return name, int(match[1])


def _builder(name: str) -> tfds.core.DatasetBuilder:
    """The prepared set of NAME[/CONFIG][:VERSION]; prepares the demo set if it is missing."""
    match = re.fullmatch(r"(\w+)(?:/([\w.+-]+))?(?::([\d.]+))?", name)
    if not match:
        raise UserError(f"{TFDS}{name}: expected {TFDS}NAME[/CONFIG][:VERSION][@SPLIT][?rate=HZ]")
    if match[1] == Voxcpm2Demo.name:
        return _demo_builder(name, match[2], match[3])
    advice = f"prepare it once, with TensorFlow: tfds.builder('{name}', file_format='{_FORMAT}').download_and_prepare()"
    try:
        builder = read_only_builder.builder_from_files(name)
    except tfds.core.registered.DatasetNotFoundError:
        places = tfds.core.utils.file_utils.list_data_dirs()
        there = sorted(path.name for place in places for path in place.glob(f"{match[1]}/[!.]*"))
        found = f", which has {match[1]} in {', '.join(there)}" if there else ""
        raise UserError(f"{TFDS}{name}: not in {' or '.join(map(str, places))} (TFDS_DATA_DIR){found}; {advice}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{TFDS}{name}: its description is not valid JSON ({error}); {advice}") from None
    formats = [builder.info.file_format, *builder.info.alternative_file_formats]
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        there = " and ".join(form.value for form in formats)
        raise UserError(f"{TFDS}{name}: prepared as {there}, which has no random access; {advice}")
    return builder


def _demo_builder(name: str, config: str | None, version: str | None) -> tfds.core.DatasetBuilder:
    if config not in DEMOS or version not in (None, str(Voxcpm2Demo.VERSION)):
        known = ", ".join(f"{TFDS}{Voxcpm2Demo.name}/{config}" for config in DEMOS)
        raise UserError(f"{TFDS}{name}: expected one of {known}, in version {Voxcpm2Demo.VERSION} if any")
    builder = tfds.builder(f"{Voxcpm2Demo.name}/{config}", file_format=_FORMAT)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder.data_path.parent.mkdir(parents=True, exist_ok=True)  # before TFDS prints that it begins
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except OSError as error:
        raise UserError(f"{TFDS}{name}: cannot be made in {builder.data_dir} (TFDS_DATA_DIR): {error}") from None
    return builder


# ---- the demo corpus as a set ----------------------------------------------------------------------------------------


class Voxcpm2Demo(tfds.core.GeneratorBasedBuilder):
    """The demo corpus: digit strings in English, words of five more languages."""

    VERSION = tfds.core.Version("1.0.0")  # raise it when DEMOS or the voices change
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name, description=str(config)) for name, config in DEMOS.items()]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        sound = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="zlib")
        features = {"audio": sound, "text": text(), "language": text(), "speaker": text(), "description": text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(sample_rate=demo.DEMO_HZ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        self._scratch = tempfile.TemporaryDirectory()  # deleted with the builder
        train, heldout = demo.make_demo(self._scratch.name, DEMOS[self.builder_config.name])
        return {"train": self._generate_examples(train), "heldout": self._generate_examples(heldout)}

    def _generate_examples(self, manifest):
        for i, recording in enumerate(read_manifest(manifest)):
            audio_A = audio.load(recording.audio, demo.DEMO_HZ)
            example = {key: getattr(recording, key) or "" for key in ("text", "language", "speaker", "description")}
            yield i, example | {"audio": np.round(audio_A * 2**15).astype(np.int16)}
