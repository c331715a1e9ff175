"""Tokenizer without the reference: special ids, new vocabularies, files, refusals."""

import json

import pytest

from voxcpm2_jax.config import UserError
from voxcpm2_jax.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [
    "zero one two three four five six seven eight nine ten",
    "zéro un deux trois quatre cinq six sept huit neuf dix",
    "null eins zwei drei vier fünf sechs sieben acht neun zehn",
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez",
    "ноль один два три четыре пять шесть семь восемь девять",
    "零一二三四五六七八九十 你好世界 你好世界",
] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 440)


@pytest.fixture
def content(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text())


def pieces(content):
    return {i: piece for piece, i in content["model"]["vocab"].items()}


def test_special_ids(tokenizer, content):
    names = pieces(content)
    assert tokenizer.vocab_size == len(names) == 440
    assert [names[i] for i in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert [names[i] for i in (101, 102, 103, 104)] == [
        "<|audio_start|>", "<|audio_end|>", "<|reference_start|>", "<|reference_end|>",
    ]  # fmt: skip
    assert sum(piece.startswith("<0x") for piece in names.values()) == 256


def test_no_text_spells_an_audio_mark(tokenizer):
    for mark in ("<|audio_start|>", " <|audio_end|>", "x<|reference_start|><|reference_end|>"):
        assert not {101, 102, 103, 104} & set(tokenizer.encode(mark))


def test_known_words_are_short_and_unknown_characters_are_bytes(tokenizer, content):
    names = pieces(content)
    assert [names[i] for i in tokenizer.encode("one six")] == ["▁one", "▁six"]
    assert [names[i] for i in tokenizer.encode("ж")] == ["▁", "<0xD0>", "<0xB6>"]
    assert tokenizer.encode("") == []


def test_a_new_vocabulary_has_no_chinese_words(content):
    words = [p for p in content["model"]["vocab"] if sum("\u4e00" <= c <= "\u9fff" for c in p) > 1]
    assert words == []
    assert {"你", "好", "十"} <= content["model"]["vocab"].keys()


def test_training_is_repeatable(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    train_tokenizer(iter(TEXTS), 440).save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_way_to_load_gives_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    texts = ["one two", " один<s>два", "你好, <|audio_start|>", "▁x  y"]
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "tokenizer.model"):
        assert [load_tokenizer(path).encode(t) for t in texts] == [tokenizer.encode(t) for t in texts], path
    (tmp_path / "tokenizer.json").unlink()
    assert [load_tokenizer(tmp_path).encode(t) for t in texts] == [tokenizer.encode(t) for t in texts]


def test_saving_again_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


def test_vocabularies_that_cannot_be_trained(tokenizer):
    with pytest.raises(UserError, match=r"tokenizer of 280 pieces: .*smaller than required_chars"):
        train_tokenizer(TEXTS, 280)
    with pytest.raises(UserError, match=r"tokenizer of 9000 pieces: .*too high"):
        train_tokenizer(TEXTS, 9000)


def _rewrite(directory, content):
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def test_a_vocabulary_without_the_special_ids_is_refused(content, tmp_path):
    vocab = content["model"]["vocab"]
    small = {piece: i for piece, i in vocab.items() if i < 104}
    model = content["model"] | {"merges": []}
    with pytest.raises(UserError, match="104 pieces; expected over 104"):
        load_tokenizer(_rewrite(tmp_path, content | {"model": model | {"vocab": small}}))
    hole = {piece: i for piece, i in vocab.items() if i != 102}
    with pytest.raises(UserError, match="no piece has id 102"):
        load_tokenizer(_rewrite(tmp_path, content | {"model": model | {"vocab": hole}}))
    moved = vocab | {"<s>": 2, "</s>": 1}
    with pytest.raises(UserError, match="1 is '</s>', not '<s>'"):
        load_tokenizer(_rewrite(tmp_path, content | {"model": model | {"vocab": moved}}))


def test_files_that_are_no_tokenizers_are_refused(content, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer; expected tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected a BPE vocabulary"):
        load_tokenizer(_rewrite(tmp_path, content | {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}))
    with pytest.raises(UserError, match="1 merges of pieces that are not in the vocabulary"):
        load_tokenizer(_rewrite(tmp_path, content | {"model": content["model"] | {"merges": [["a", "qqq"]]}}))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")
