import dataclasses
import gzip
import hashlib
import shutil
import subprocess

import av
import numpy as np
import pytest

from voxcpm2_jax.config.corpus import DataConfig, DebianConfig, DemoConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus import debian, demo, manifest, prepare
from voxcpm2_jax.data import audio

SMALL = DemoConfig(num_digit_clips=17, num_foreign_clips=3, max_digits=3, num_heldout=4)


def test_held_out_strings_are_never_in_training():
    for seed in range(5):
        config = dataclasses.replace(DemoConfig(), seed=seed)
        train, heldout, foreign = demo.demo_texts(config)
        assert len(train) == config.num_digit_clips and len(heldout) == len(set(heldout)) == 50
        assert not set(train) & set(heldout)
        assert {len(t.split()) for t in heldout} == {2, 3, 4} and {len(t.split()) for t in train} == {1, 2, 3, 4}
        assert set(" ".join(train).split()) == set(" ".join(heldout).split()) == set(demo.DIGITS)
        assert len(foreign) <= 0.15 * (len(train) + len(foreign)) and {voice for voice, _ in foreign} == set(demo.FOREIGN)
        assert demo.demo_texts(config) == (train, heldout, foreign)
    assert demo.demo_texts(DemoConfig())[1] != demo.demo_texts(DemoConfig(seed=1))[1]


def test_demo_config_refuses():
    for change in ({"num_foreign_clips": 3000}, {"max_digits": 1}, {"num_heldout": 151}, {"num_digit_clips": 0}):
        with pytest.raises(UserError, match="demo: "):
            DemoConfig(**change)


def test_demo_corpus_is_the_same_each_time(tmp_path):
    hashes = []
    for name, processes in (("a", 1), ("b", 2)):
        train, heldout = demo.make_demo(tmp_path / name, SMALL, num_processes=processes)
        files = sorted((tmp_path / name).rglob("*.*"))
        hashes.append({str(f.relative_to(tmp_path / name)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert hashes[0] == hashes[1] and len(hashes[0]) == 17 + 3 + 4 + 2

    recordings = manifest.read_manifest(train)
    texts, held, foreign = demo.demo_texts(SMALL)
    assert [r.text for r in recordings] == texts + [word for _, word in foreign]
    assert [r.text for r in manifest.read_manifest(heldout)] == held
    for r in recordings:
        x_A = audio.load(r.audio, demo.DEMO_HZ)
        assert abs(len(x_A) / demo.DEMO_HZ - r.duration) < 1e-3 and 0.15 < r.duration < 2
        for end_A in (x_A[:240], x_A[-240:]):  # short silent ends
            assert np.abs(end_A).max() < 0.1 * np.abs(x_A).max()
        assert (r.language == "en") == (r.description is None)
    robot = recordings[-1]
    assert robot.full_text == f"({demo.FOREIGN[robot.language][0]}){robot.text}"


def test_demo_corpus_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "hibari" else True)
    with pytest.raises(UserError, match=r"needs hibari: pip install 'voxcpm2-jax\[demo\]'"):
        demo.make_demo(tmp_path, SMALL)


def test_demo_without_held_out_clips(tmp_path):
    config = DataConfig(demo=DemoConfig(num_digit_clips=2, num_foreign_clips=0, num_heldout=0))
    result = prepare.prepare(config, tmp_path / "out", None)
    assert (result["clips"], result["heldout_clips"]) == (2, 0) and not (tmp_path / "out" / "heldout.jsonl").exists()


# ---- Debian's recordings ---------------------------------------------------------------------------------------------

LISTING = """; Core sounds

one: One   thing said.
two: Two things are said here.
letters/at: at [@]
digits/four: A fourth thing is said here.
six: Two things are said, here!
beep: a simple beep
silence/1: (1 second of silence)
note: IAX (note: does not say 2)
missing-recording: Nobody recorded this one.
twice: once
twice: or twice
lost: Sar? qui.
joined: first joined-next: next
quick: far more letters than anybody could ever say in a single second, however quick
empty:
"""
CLEAR = {"one": "One thing said.", "two": "Two things are said here.", "letters/at": "at",
         "digits/four": "A fourth thing is said here.", "six": "Two things are said, here!"}  # fmt: skip


def sound(i):
    """A quarter of a second of silence, 1.2 s of a tone, half a second of silence, at 16 kHz."""
    tone_A = 0.3 * np.sin(2 * np.pi * (200 + 37 * i) * np.arange(19200) / 16000)
    return np.concatenate([np.zeros(4000), tone_A, np.zeros(8000)])


def write_g722(path, audio_A):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.round(audio_A * 2**15).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def package(directory, name, fill):
    """A Debian package with what `fill` puts into its root."""
    root = directory / f"{name}.root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: test\n"
    )
    (root / "usr/share/doc" / name).mkdir(parents=True)
    fill(root)
    subprocess.run(["dpkg-deb", "--build", "-Znone", str(root), str(directory / f"{name}_1_all.deb")], check=True, stdout=-3)
    shutil.rmtree(root)


def write_packages(directory):
    """Packages of two languages as Debian's are laid out."""
    for language, voice in (("en", "en_US_f_Allison"), ("it", "it_IT_m_Carlo")):
        name = f"asterisk-core-sounds-{language}"

        def texts(root):
            text = LISTING if language == "en" else "\ufeff" + LISTING.replace("said", "detto").partition("\n\n")[2]  # noqa: B023
            path = root / "usr/share/doc" / name / f"core-sounds-{language}.txt.gz"  # noqa: B023
            path.write_bytes(gzip.compress(text.encode()))

        def sounds(root):
            (root / "usr/share/doc" / f"{name}-g722" / "copyright").write_text("License: CC-BY-SA-3.0\n")  # noqa: B023
            names = [line.partition(":")[0] for line in LISTING.splitlines() if line and not line.startswith(";")]
            for i, prompt in enumerate(sorted(set(names) - {"missing-recording"} | {"never-listed"})):
                write_g722(root / "usr/share/asterisk/sounds" / voice / f"{prompt}.g722", sound(i))  # noqa: B023

        package(directory, name, texts)
        package(directory, f"{name}-g722", sounds)
    return directory


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return write_packages(tmp_path_factory.mktemp("packages"))


def test_debian_keeps_usable_recordings(tmp_path, packages):
    config = DebianConfig(languages="en,it", num_heldout=1, packages=str(packages))
    result = prepare.prepare(DataConfig(source="debian", debian=config), tmp_path / "out", None)
    train, heldout = (manifest.read_manifest(tmp_path / "out" / name) for name in ("train.jsonl", "heldout.jsonl"))
    assert (result["clips"], result["heldout_clips"]) == (len(train), len(heldout))
    for language, speaker in (("en", "allison"), ("it", "carlo")):
        mine = [r for r in [*train, *heldout] if r.language == language]
        assert {r.audio for r in mine} == set((tmp_path / "out" / "flac" / language).rglob("*.flac"))
        found = {str(r.audio.relative_to(tmp_path / "out" / "flac" / language)).removesuffix(".flac"): r for r in mine}
        assert {name: r.text.replace("detto", "said") for name, r in found.items()} == CLEAR
        assert {r.speaker for r in mine} == {speaker} and {r.dataset for r in mine} == {"debian"}
        for r in mine:
            assert audio.properties(r.audio)[:2] == (16000, 1) and r.duration == pytest.approx(1.4, abs=0.03)
            assert audio.load(r.audio, 16000).max() == pytest.approx(0.3, abs=0.06)  # G.722 is not exact
        held = {debian._words(r.text) for r in heldout if r.language == language}
        assert len(held) == 1 and not held & {debian._words(r.text) for r in train}
        notice = (tmp_path / "out" / f"copyright-{language}.txt").read_text()
        assert f"asterisk-core-sounds-{language}-g722_1_all.deb" in notice and "CC-BY-SA-3.0" in notice
    assert found["two"].text != found["six"].text
    assert len({r in heldout for r in (found["two"], found["six"])}) == 1  # the same words stay together


def test_debian_draws_what_is_held_out_by_the_seed():
    texts = [f"text number {i} of some" for i in range(30)] + ["too short"]
    drawn = [debian._held_out(texts, DebianConfig(seed=seed, num_heldout=10), "en") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and {len(held) for held in drawn} == {10}
    assert drawn[0] != debian._held_out(texts, DebianConfig(num_heldout=10), "it")
    assert all("too short" not in held and held < set(texts) for held in drawn)


def test_debian_refuses(tmp_path, packages, monkeypatch):
    def refused(**changes):
        with pytest.raises(UserError) as caught:
            config = DebianConfig(**({"languages": "en", "packages": str(packages)} | changes))
            prepare.prepare(DataConfig(source="debian", debian=config), tmp_path / "out", None)
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    assert "num_heldout 20 is too many: en has 2 texts" in refused()
    assert "no package asterisk-core-sounds-ru_*.deb" in refused(languages="ru")
    assert "languages must be some of en,es,fr,it,ru" in refused(languages="en,de")
    for name in ("en", "en-g722"):  # packages of another kind
        package(packages / "other", f"asterisk-core-sounds-{name}", lambda root: None)
    assert "expected one voice in usr/share/asterisk/sounds, got 0" in refused(packages=str(packages / "other"))
    (packages / "other" / "asterisk-core-sounds-en_2_all.deb").write_bytes(b"torn")
    assert "dpkg-deb -x failed (" in refused(packages=str(packages / "other"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs dpkg-deb: use a Debian or Ubuntu system" in refused()
    assert "needs apt-get" in refused(packages="")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs av: pip install" in refused()


def test_debian_without_package_lists(tmp_path, monkeypatch):
    """What apt-get says of an unknown package reaches the user, with advice."""
    tool = tmp_path / "bin" / "apt-get"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'W: a warning' >&2\necho \"E: Unable to locate package $2\" >&2\nexit 100\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"E: Unable to locate package asterisk-core-sounds-en.*run apt-get update as root"):
        debian.make_debian(tmp_path / "out", DebianConfig())
