"""Tokenizer without the PyTorch package: special ids, new vocabularies, files, refusals."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.text import normal_text
from voxcpm2_jax.data.tokenizer import SPACE, balanced, load_tokenizer, train_tokenizer

LANGUAGES = {
    "Arabic": "مرحبا، كيف حالك اليوم؟",
    "Burmese": "မင်္ဂလာပါ၊ နေကောင်းလား။",
    "Chinese": "你好，世界。今天天气很好，我们去公园散步吧！",
    "Danish": "Rødgrød med fløde på en sommerdag.",
    "Dutch": "Het is vandaag een mooie dag, niet?",
    "English": "The quick brown fox can't jump 13 dogs.",
    "Finnish": "Hyvää huomenta, mitä kuuluu tänään?",
    "French": "Où est la bibliothèque, s'il vous plaît ?",
    "German": "Die Straße ist heute schön überfüllt.",
    "Greek": "Καλημέρα, τι κάνεις σήμερα;",
    "Hebrew": "שלום, מה שלומך היום?",
    "Hindi": "नमस्ते, आज आप कैसे हैं?",
    "Indonesian": "Selamat pagi, apa kabar hari ini?",
    "Italian": "Perché no? È una bella giornata.",
    "Japanese": "こんにちは、世界。今日は良い天気ですね。",
    "Khmer": "សួស្តី តើអ្នកសុខសប្បាយទេ?",
    "Korean": "안녕하세요, 오늘 날씨가 좋네요.",
    "Lao": "ສະບາຍດີ ເຈົ້າສະບາຍດີບໍ?",
    "Malay": "Apa khabar? Saya suka membaca buku.",
    "Norwegian": "Ærlig talt, været er bra i dag.",
    "Polish": "Zażółć gęślą jaźń, dzień dobry.",
    "Portuguese": "Não há amanhã sem coração.",
    "Russian": "Съешь ещё этих мягких булок.",
    "Spanish": "¿Dónde está el niño? ¡Allí!",
    "Swahili": "Habari ya asubuhi, rafiki yangu?",
    "Swedish": "Åska över ängen är en vårdag.",
    "Tagalog": "Magandang umaga po sa inyong lahat.",
    "Thai": "สวัสดีครับ วันนี้อากาศดีมาก",
    "Turkish": "Günaydın, ışığı söndürür müsün?",
    "Vietnamese": "Xin chào, hôm nay trời đẹp quá!",
}

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
    with pytest.raises(UserError, match=r"a vocabulary of 280 pieces .*: .*smaller than required_chars"):
        train_tokenizer(TEXTS, 280)
    with pytest.raises(UserError, match=r"a vocabulary of 9000 pieces .*: .*too high"):
        train_tokenizer(TEXTS, 9000)
    with pytest.raises(UserError, match=r"a vocabulary of 300 pieces \(vocab_size\): no text to learn it from"):
        train_tokenizer(["", ""], 300)


# ---- thirty languages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """A vocabulary learned from all languages, with little text of most of them."""
    lines = [(name, text) for name, text in LANGUAGES.items() for _ in range(40 if name in ("Chinese", "English") else 2)]
    return train_tokenizer(balanced(lambda: lines, temperature=5.0), 1300)


def test_text_in_all_languages_comes_back(world, tmp_path):
    assert len(LANGUAGES) == 30
    world.save(tmp_path)
    again, from_model = (load_tokenizer(tmp_path / name) for name in ("tokenizer.json", "tokenizer.model"))
    for text in [*LANGUAGES.values(), " ".join(LANGUAGES.values())]:
        ids = world.encode(text)
        assert again.encode(text) == ids and from_model.encode(text) == ids
        assert world.decode(ids) == again.decode(ids) == from_model.decode(ids) == normal_text(text) == text
        assert not set(ids) & {0, 1, 2, 101, 102, 103, 104}
        assert not world.uncovered(text)[0] and len(world.uncovered(text)[1]) < 4, "its letters are pieces"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*LANGUAGES.values()]) | st.text(max_size=8)).map("".join))
def test_any_normalised_text_comes_back(world, text):
    text = normal_text(text.replace(SPACE, "").replace("<", ""))  # U+2581 stands for a space; <s> in a text is an added token
    assert world.decode(world.encode(text)) == text


def test_a_small_language_gets_pieces_by_temperature():
    stems = ("walk", "play", "sing", "jump", "look", "turn", "help", "cook", "paint", "climb", "dance", "shout", "point")
    lines = [("en", f"{stem}ing {stem}ed {stem}er {stem}s") for stem in stems * 20] + [("fi", "hyvää huomenta päivää")] * 2
    pieces = {}
    for temperature in (1.0, 100.0):
        vocabulary = train_tokenizer(balanced(lambda: lines, temperature=temperature), 330)
        pieces[temperature] = {text: len(vocabulary.encode(text)) for text in ("huomenta päivää", "walking sings")}
    assert pieces[1.0]["huomenta päivää"] >= 13, "almost its letters alone"
    assert pieces[100.0]["huomenta päivää"] <= 4 and pieces[1.0]["walking sings"] < pieces[100.0]["walking sings"]


def chars_of(texts, language):
    return sum(len(text) for text in texts if text.startswith(language))


def test_shares_of_languages():
    sizes = {"a": 4000, "b": 400, "c": 37}
    lines = [(name, f"{name}{i}" + "x" * (i % 19)) for name, n in sizes.items() for i in range(n)]
    total = {name: chars_of([text for _, text in lines], name) for name in sizes}
    assert list(balanced(lambda: lines)) == [text for _, text in lines], "as it is"
    for temperature, max_chars in ((2.0, 10**9), (1e6, 10**9), (1.0, 20_000), (2.0, 20_000), (5.0, 1000), (0.5, 10**9)):
        chosen = list(balanced(lambda: iter(lines), temperature=temperature, max_chars=max_chars))
        assert chosen == list(balanced(lambda: iter(lines), temperature=temperature, max_chars=max_chars))
        share = {name: n ** (1 / temperature) for name, n in total.items()}
        wanted = {name: share[name] * total["a"] / share["a"] for name in sizes}
        scale = min(1.0, max_chars / sum(wanted.values()))
        for name in sizes:
            n = wanted[name] * scale
            assert abs(chars_of(chosen, name) - n) < 5 * (10 * n) ** 0.5, (temperature, max_chars, name)
            times = Counter(chosen)
            few, many = math.floor(n / total[name]), math.ceil(n / total[name])
            assert {times[text] for language, text in lines if language == name} <= {few, many}


def test_balance_of_little():
    assert list(balanced(lambda: [])) == [] and list(balanced(lambda: [("a", "")], temperature=3.0)) == []
    for temperature in (1e-3, 1e300):
        assert set(balanced(lambda: [("a", "xx"), ("b", "y")], temperature=temperature)) >= {"xx"}


# ---- refusals ----------------------------------------------------------------------------------------------------------


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


def test_transcripts_are_normalised():
    assert normal_text("  e\u0301t\u00e9 \n two ") == "\u00e9t\u00e9 two"
    shout = "HELLO THERE. HOW ARE YOU? I AM FINE"
    assert normal_text(shout) == shout
    assert normal_text(shout, True) == "Hello there. How are you? I am fine"
    for text in ("NASA is near", "\u4f60\u597d", "123"):
        assert normal_text(text, True) == text
