"""Data sets in the format that TensorFlow writes. The tests write them without TensorFlow, which is not installed."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import constants
from tensorflow_datasets.proto import tf_example_pb2

from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import datasets, demo, doctor, sources
from voxcpm2_jax.corpus.encode import text_fault
from voxcpm2_jax.corpus.manifest import read_manifest
from voxcpm2_jax.corpus.sources import in_threads
from voxcpm2_jax.data import audio


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


# ---- writing a set -----------------------------------------------------------------------------------------------------

_CLASSES = "tensorflow_datasets.core.features."
TEXT = {"pythonClassName": f"{_CLASSES}text_feature.Text", "text": {}}


def tensor(dtype):
    return {
        "pythonClassName": f"{_CLASSES}tensor_feature.Tensor", "tensor": {"dtype": dtype, "encoding": "none", "shape": {}}
    }  # fmt: skip


def sound(rate=None, dtype="int16", shape=(-1,), **others):
    """tfds.features.Audio as TensorFlow writes it down."""
    content = {"dtype": dtype, "encoding": "NONE", "shape": {"dimensions": [str(size) for size in shape]}} | others
    if rate:
        content["sampleRate"] = str(rate)
    return {"audio": content, "pythonClassName": f"{_CLASSES}audio_feature.Audio"}


def labels(directory, feature, names):
    """A ClassLabel; its names lie in a file of their own."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{feature}.labels.txt").write_text("".join(f"{name}\n" for name in names))
    return {
        "classLabel": {"numClasses": str(len(names))}, "pythonClassName": f"{_CLASSES}class_label_feature.ClassLabel"
    }  # fmt: skip


def write_set(directory, name, features, examples, split="train", **info):
    """NAME/[CONFIG/]VERSION with one split; values of examples are numbers, texts, bytes or int arrays."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "features.json").write_text(
        json.dumps({"featuresDict": {"features": features}, "pythonClassName": f"{_CLASSES}features_dict.FeaturesDict"})
    )
    described = {
        "name": name, "version": directory.name, "fileFormat": "array_record", "moduleName": "somewhere.else",
        "splits": [{"name": split, "numBytes": "1", "shardLengths": [str(len(examples))],
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}],
    }  # fmt: skip
    (directory / "dataset_info.json").write_text(json.dumps(described | info))
    writer = ArrayRecordWriter(str(directory / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
    for values in examples:
        example = tf_example_pb2.Example()
        for key, value in values.items():
            feature = example.features.feature[key]
            if isinstance(value, (str, bytes)):
                feature.bytes_list.value.append(value.encode() if isinstance(value, str) else value)
            else:
                feature.int64_list.value.extend(np.ravel(value).tolist())
        writer.write(example.SerializeToString())
    writer.close()


def wave(i, rate, channels=1):
    """A quarter of a second, int16."""
    time_A = np.arange(rate // 4) / rate
    tones = [np.round(8000 * np.sin(2 * np.pi * (200 + 50 * i + 7 * c) * time_A)) for c in range(channels)]
    return np.stack(tones, axis=1).squeeze().astype(np.int16)


def check(recording, samples, rate):
    """The recording sounds like these int16 samples."""
    expected_A = samples.reshape(len(samples), -1).mean(axis=1) / 2**15
    assert audio.properties(recording.audio)[:2] == (rate, samples.ndim)
    np.testing.assert_allclose(audio.load(recording.audio, rate), expected_A, atol=1e-6)


# ---- known sets --------------------------------------------------------------------------------------------------------


def librispeech(root):
    features = {"speech": sound(16000, fileFormat="flac"), "text": TEXT, "speaker_id": tensor("int64"),
                "chapter_id": tensor("int64"), "id": tensor("string")}  # fmt: skip
    examples = [
        {
            "speech": wave(i, 16000),
            "text": f"HELLO {i}",
            "speaker_id": 7,
            "chapter_id": 100 + i,
            "id": f"7-{100 + i}-00{20 - i}",
        }
        for i in range(3)
    ]
    write_set(root / "librispeech/default/2.1.2", "librispeech", features, examples, "train_clean100", configName="default")
    return (
        "librispeech@train_clean100",
        16000,
        {"text": "HELLO 1", "speaker": "7", "session": "101", "language": "en", "order": 19},
    )


def librispeech_as_files(root):
    features = {"speech": sound(16000, fileFormat="flac", lazyDecode=True), "text": TEXT, "speaker_id": tensor("int64")}
    examples = []
    for i in range(3):
        file = io.BytesIO()
        soundfile.write(file, wave(i, 16000), 16000, format="FLAC")
        examples.append({"speech": file.getvalue(), "text": f"HELLO {i}", "speaker_id": 7})
    path = root / "librispeech/lazy_decode/2.1.2"
    write_set(path, "librispeech", features, examples, configName="lazy_decode")
    return "librispeech/lazy_decode", 16000, {"text": "HELLO 1", "speaker": "7", "session": None, "language": "en",
                                             "order": None}  # fmt: skip


def libritts(root):
    features = {"speech": sound(24000, "int64", fileFormat="wav"), "text_original": TEXT, "text_normalized": TEXT,
                "speaker_id": tensor("int64"), "chapter_id": tensor("int64"), "id": tensor("string")}  # fmt: skip
    examples = [
        {"speech": wave(i, 24000), "text_original": "1", "text_normalized": f"one {i}", "speaker_id": 5, "chapter_id": 6,
         "id": f"5_6_00000{8 - i}_000002"}
        for i in range(3)
    ]  # fmt: skip
    write_set(root / "libritts/1.0.1", "libritts", features, examples)
    return "libritts:1.0.1", 24000, {"text": "one 1", "speaker": "5", "session": "6", "language": "en", "order": 7000002}


def ljspeech(root):
    features = {"id": tensor("string"), "speech": sound(22050), "text": TEXT, "text_normalized": TEXT}
    examples = [
        {"id": f"LJ00{3 - i}-0017", "speech": wave(i, 22050), "text": "1", "text_normalized": f"one {i}"} for i in range(3)
    ]
    write_set(root / "ljspeech/1.1.1", "ljspeech", features, examples)
    return "ljspeech", 22050, {"text": "one 1", "speaker": "linda", "language": "en", "order": 20017}


def vctk(root):
    path = root / "vctk/mic1/1.0.1"
    speakers = labels(path, "speaker", ["p225", "p226"])
    features = {"id": tensor("string"), "text": TEXT, "speech": sound(48000), "speaker": speakers}
    examples = [{"id": f"p225_00{i}", "text": f"please {i}", "speech": wave(i, 48000), "speaker": i % 2} for i in range(3)]
    write_set(path, "vctk", features, examples, configName="mic1")
    return "vctk/mic1", 48000, {"text": "please 1", "speaker": "p226", "language": "en", "order": 1}


def tedlium(root):
    features = {"speech": sound(16000, "int64"), "text": TEXT, "speaker_id": tensor("string"), "id": tensor("string")}
    examples = [
        {"speech": wave(i, 16000), "text": f"so {i}", "speaker_id": "Al", "id": f"Al_2006-{9 - i}.5-12.75-<o,f0,male>"}
        for i in range(3)
    ]
    write_set(root / "tedlium/release3/1.0.1", "tedlium", features, examples, configName="release3")
    return "tedlium/release3", 16000, {"text": "so 1", "speaker": "Al", "language": "en", "order": 8.5}


def user_libri_audio(root):
    features = {"audio": sound(16000, "int64"), "transcript": TEXT, "speaker_id": TEXT, "book_id": TEXT}
    examples = [{"audio": wave(i, 16000), "transcript": f"a {i}", "speaker_id": "s", "book_id": "b"} for i in range(3)]
    write_set(root / "user_libri_audio/1.0.0", "user_libri_audio", features, examples)
    return "user_libri_audio", 16000, {"text": "a 1", "speaker": "s", "session": "b", "language": "en"}


def common_voice(root):
    features = {"client_id": TEXT, "sentence": TEXT, "voice": sound(None, "int64"), "age": TEXT}
    examples = [{"client_id": "c", "sentence": f"你好 {i}", "voice": wave(i, 48000), "age": ""} for i in range(3)]
    write_set(root / "common_voice/zh-CN/2.0.0", "common_voice", features, examples, configName="zh-CN")
    return "common_voice/zh-CN", 48000, {"text": "你好 1", "speaker": "c", "language": "zh", "order": None}


def fleurs(root):
    path = root / "xtreme_s/fleurs.all/2.0.0"
    tongues = labels(path, "lang_id", ["cmn_hans_cn", "en_us"])
    features = {"audio": sound(16000, "int64"), "transcription": TEXT, "raw_transcription": TEXT, "lang_id": tongues,
                "language": TEXT}  # fmt: skip
    # 32-bit recordings: TensorFlow stores the integers as they are
    examples = [{"audio": wave(i, 16000).astype(np.int64) << 16, "transcription": "a", "raw_transcription": f"A {i}.",
                 "lang_id": i % 2, "language": "English"} for i in range(3)]  # fmt: skip
    write_set(path, "xtreme_s", features, examples, configName="fleurs.all")
    return "xtreme_s/fleurs.all", 16000, {"text": "A 1.", "speaker": None, "language": "en"}


def unknown_set_with_our_names(root):
    features = {"audio": sound(8000, shape=(-1, 2)), "text": TEXT, "description": TEXT}
    examples = [{"audio": wave(i, 8000, 2), "text": f"hm {i}", "description": ["soft", ""][i % 2]} for i in range(3)]
    write_set(root / "mine/v2/1.0.0", "mine", features, examples, configName="v2")
    return "mine/v2@train[1:]+train[:1]", 8000, {"text": "hm 2", "language": None, "description": "soft"}


SETS = [librispeech, librispeech_as_files, libritts, ljspeech, vctk, tedlium, user_libri_audio, common_voice, fleurs,
        unknown_set_with_our_names]  # fmt: skip


@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
def test_a_set_reads_without_tensorflow(data_dir, make):
    name, rate, expected = make(data_dir)
    found = sources.open_corpus(f"tfds:{name}")
    assert len(found) == 3 and found.name == f"tfds:{name}" and len(found.sha256) == 64
    recording = found[1]
    assert {key: getattr(recording, key) for key in expected} == expected
    assert recording.dataset == name.split("/")[0].split("@")[0].split(":")[0]
    i = int("".join(filter(str.isdigit, recording.text)))
    check(recording, wave(i, rate, 2 if make is unknown_set_with_our_names else 1), rate)
    assert str(recording.audio) == f"tfds:{name}#1" and found[-2] == recording == list(found)[1] == found[1:][0]
    assert recording.audio.place.endswith(f"00000-of-00001#{i}")
    assert len(audio.load(recording.audio, rate, 0.1, 0.2)) == pytest.approx(0.1 * rate, abs=1)
    with pytest.raises(IndexError):
        found[3]
    assert "tensorflow" not in sys.modules


def test_language_codes(data_dir):
    name, _, _ = fleurs(data_dir)
    assert [r.language for r in sources.open_corpus(f"tfds:{name}")] == ["zh", "en", "zh"]
    tags = {"de": "de", "sv-SE": "sv", "fleurs.yue_hant_hk": "yue", "cmn_hans_cn": "zh", "pa-IN": "pa"}
    assert {tag: datasets._base(tag) for tag in tags} == tags


def test_an_id_without_numbers_says_nothing_of_the_order(data_dir):
    features = {"id": TEXT, "speech": sound(22050), "text_normalized": TEXT}
    examples = [{"id": id_, "speech": wave(0, 22050), "text_normalized": "one"} for id_ in ("LJ001-0002", "LJ3", "", "a")]
    write_set(data_dir / "ljspeech/1.1.1", "ljspeech", features, examples)
    assert [r.order for r in sources.open_corpus("tfds:ljspeech")] == [10002, None, None, None]


def test_every_known_set_is_tried():
    tried = {"fleurs": "xtreme_s"}
    assert {tried.get(make.__name__, make.__name__) for make in SETS} >= datasets.FIELDS.keys() - {"voxcpm2_demo"}


def test_the_hash_tells_sets_and_splits_apart(data_dir):
    name, _, _ = ljspeech(data_dir)
    names = [name, f"{name}@train", f"{name}@train[:2]", f"{name}@train[1:]"]
    hashes = [sources.open_corpus(f"tfds:{name}").sha256 for name in names]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_recordings_of_a_set_hold_no_samples_and_load_in_threads(data_dir):
    name, rate, _ = libritts(data_dir)
    found = sources.open_corpus(f"tfds:{name}")
    recordings = list(found) * 50
    assert max(sys.getsizeof(x) for x in vars(recordings[0]).values()) < 1000
    with ThreadPoolExecutor(4) as pool:
        for recording, audio_A in in_threads(pool, lambda r: audio.load(r.audio, rate), recordings):
            np.testing.assert_allclose(audio_A, wave(int(recording.text[-1]), rate) / 2**15, atol=1e-6)


def test_what_cannot_be_opened_is_one_line(data_dir):
    def refusal(name):
        with pytest.raises(UserError) as caught:
            list(sources.open_corpus(f"tfds:{name}"))
        return str(caught.value)

    assert refusal("librispeech").startswith(f"tfds:librispeech: not in {data_dir} (TFDS_DATA_DIR); prepare it once, with")
    ljspeech(data_dir)
    fleurs(data_dir)
    assert ", which has xtreme_s in fleurs.all;" in refusal("xtreme_s/fleurs.en_us")
    assert ", which has ljspeech in 1.1.1;" in refusal("ljspeech:9.9.9")
    assert "its splits are train" in refusal("ljspeech@test") and "its splits are train" in refusal("ljspeech@train[:0]")
    for name in ("", "a b", "ljspeech:", "/ljspeech", "ljspeech/a/b"):
        assert f"tfds:{name}: expected tfds:NAME[/CONFIG][:VERSION][@SPLIT][?rate=HZ]" in refusal(name)
    for name in ("ljspeech?rate=0", "ljspeech?rate=fast", "ljspeech@train?hz=16000"):
        assert f"tfds:{name}: expected ?rate=HZ, such as ?rate=32000, as the only option" in refusal(name)
    assert "expected one of tfds:voxcpm2_demo/tiny," in refusal("voxcpm2_demo/huge")
    assert "expected one of tfds:voxcpm2_demo/tiny," in refusal("voxcpm2_demo/tiny:2.0.0")

    write_set(data_dir / "strange/1.0.0", "strange", {"wave": sound(8000), "label": tensor("int64")}, [])
    write_set(data_dir / "silent/1.0.0", "silent", {"audio": sound(), "text": TEXT}, [{"audio": wave(0, 8000), "text": "a"}])
    write_set(data_dir / "old/1.0.0", "old", {"audio": sound(8000), "text": TEXT}, [], fileFormat="tfrecord")
    assert "or an empty one" in refusal("strange")
    write_set(data_dir / "strange/1.0.0", "strange", {"wave": sound(8000), "label": tensor("int64")}, [{"label": 1}])
    assert "its fields are label, wave; known are those of librispeech, " in refusal("strange")
    assert "neither its field audio nor its metadata states a sample rate; give it, as in tfds:silent?rate" in refusal("silent")
    assert "prepared as tfrecord, which has no random access; prepare it once" in refusal("old")

    shard = data_dir / "ljspeech/1.1.1/ljspeech-train.array_record-00000-of-00001"
    shard.write_bytes(b"torn")
    assert f"tfds:ljspeech#0: {shard}: clip 0 (number 0 of the corpus) cannot be read (" in refusal("ljspeech")
    shard.unlink()
    assert "a shard is missing" in refusal("ljspeech")
    (data_dir / "ljspeech/1.1.1/features.json").write_text("{")
    assert "its description is not valid JSON" in refusal("ljspeech")


def test_doctor_hears_a_set(data_dir):
    common_voice(data_dir)
    report = doctor.examine(["tfds:common_voice/zh-CN@train[:2]"], ["tfds:common_voice/zh-CN@train[2:]"])
    assert report["clips"] == 2 and report["by_language"].keys() == {"zh"} and report["rates"] == {"48000": 2}
    findings = {finding["kind"]: finding["examples"][0] for finding in report["findings"]}
    assert findings.keys() == {"speaker in validation", "doubtful rate"}  # the clips are white noise
    assert "@train[2:]#0: speaker c" in findings["speaker in validation"]


def test_a_rate_that_the_set_does_not_state_is_an_option(data_dir):
    name, hz, _ = common_voice(data_dir)
    guessed, told = sources.open_corpus(f"tfds:{name}"), sources.open_corpus(f"tfds:{name}@train?rate=32000")
    assert audio.properties(guessed[1].audio).rate == hz == 48000 and audio.properties(told[1].audio).rate == 32000
    assert guessed[1].audio.is_rate_guessed and not told[1].audio.is_rate_guessed
    assert (
        told.sha256 != guessed.sha256 == sources.open_corpus(f"tfds:{name}@train").sha256
    )  # shards of the one are not the other's
    assert str(told[1].audio) == f"tfds:{name}@train?rate=32000#1"
    vctk(data_dir)
    sources.open_corpus("tfds:vctk/mic1?rate=48000")
    with pytest.raises(UserError, match="the set states 48000 Hz; expected no rate option"):
        sources.open_corpus("tfds:vctk/mic1?rate=32000")
    write_set(data_dir / "mine/1.0.0", "mine", {"audio": sound(), "text": TEXT}, [{"audio": wave(0, 8000), "text": "a"}])
    assert audio.properties(sources.open_corpus("tfds:mine?rate=8000")[0].audio).rate == 8000
    name, _, _ = librispeech_as_files(data_dir)
    with pytest.raises(UserError, match="each of its files states its rate; expected no rate option"):
        sources.open_corpus(f"tfds:{name}?rate=16000")


def test_doctor_hints_at_the_rate_by_the_end_of_the_spectrum(data_dir):
    """Clips of 32 kHz in a set that states no rate, taken for 48 kHz: as MP3 they end at 15.3 kHz, not at 20.4."""
    features = {"client_id": TEXT, "sentence": TEXT, "voice": sound(None, "int64")}
    rng = np.random.default_rng(0)
    for hz, end_hz in ((32000, 15300), (48000, 20400)):
        spectrum = np.fft.rfft(rng.standard_normal(2 * hz))
        spectrum[2 * end_hz :] = 0
        voice = np.round(3000 * np.fft.irfft(spectrum)).astype(np.int64)
        examples = [{"client_id": "c", "sentence": "good day", "voice": voice}]
        write_set(data_dir / f"common_voice/x{hz}/2.0.0", "common_voice", features, examples, configName=f"x{hz}")

    def kinds(name):
        report = doctor.examine([f"tfds:common_voice/{name}"])
        return {finding["kind"]: finding["examples"][0] for finding in report["findings"]}

    found = kinds("x32000")
    assert "taken for 48000 Hz, the spectrum goes on to 23.0 kHz" in found["doubtful rate"]
    assert "tfds:...?rate=32000" in found["doubtful rate"]
    assert "doubtful rate" not in kinds("x32000?rate=32000") and "doubtful rate" not in kinds("x48000")


def test_a_clip_without_words_is_left_out_by_name(data_dir, tmp_path):
    """VCTK has clips without a transcript."""
    features = {"audio": sound(8000), "text": TEXT}
    write_set(data_dir / "mine/1.0.0", "mine", features, [{"audio": wave(0, 8000), "text": text} for text in ("a b", " ")])
    words, wordless = sources.open_corpus("tfds:mine")
    refused = text_fault(wordless, DataConfig(), None)
    assert refused.reason == "no words" and str(refused) == "tfds:mine#1: a transcript without a letter or digit: ' '"
    assert text_fault(words, DataConfig(), None) is None


# ---- the demo corpus ---------------------------------------------------------------------------------------------------


def test_the_demo_set_is_made_on_the_spot_and_is_the_demo_corpus(data_dir, tmp_path, capfd):
    train, heldout = demo.make_demo(tmp_path / "demo", datasets.DEMOS["tiny"])
    for split, manifest in (("train", train), ("heldout", heldout)):
        found = sources.open_corpus(f"tfds:voxcpm2_demo/tiny@{split}")
        recordings = read_manifest(manifest)
        assert len(found) == len(recordings)
        for ours, theirs in zip(found, recordings):
            for key in ("text", "language", "speaker", "description"):
                assert getattr(ours, key) == getattr(theirs, key)
            np.testing.assert_array_equal(audio.load(ours.audio, 24000), audio.load(theirs.audio, 24000))
    assert capfd.readouterr().out == "" and (data_dir / "voxcpm2_demo/tiny/1.0.0/dataset_info.json").is_file()
    assert not list((data_dir / "voxcpm2_demo/tiny").glob("incomplete*")) and "tensorflow" not in sys.modules


def test_the_demo_set_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "file" / "tfds"))
    with pytest.raises(UserError, match=r"voxcpm2_demo/tiny: cannot be made in .*TFDS_DATA_DIR"):
        sources.open_corpus("tfds:voxcpm2_demo/tiny")
