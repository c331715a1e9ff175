"""The command line: what it refuses and how, configs and overrides, exit codes, what it hands on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile

import voxcpm2_jax
from voxcpm2_jax.cli import main
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError

CONFIG = """
from ml_collections import ConfigDict

from voxcpm2_jax.config import UserError


def get_config(variant):
    if variant not in ("tiny", "bad"):
        raise UserError(f"configs: no variant {variant!r}; there are tiny and bad")
    config = ConfigDict({
        "seed": 0, "num_steps": 7, "mesh": [1, -1, 1], "rate": 0.5, "is_on": True, "name": "x",
        "optim": {"schedule_steps": None, "clip_norm": 1.0, "betas": (0.9, 0.95)},
    })
    if variant == "bad":
        raise RuntimeError("a fault of the config file")
    return config.lock()
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(CONFIG)
    return f"{path}:tiny"


def run(*argv):
    return main.main([str(a) for a in argv])


def refusal(capsys, *argv):
    """The one line that a mistake gets."""
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_kind_of_field(config):
    got = main.load_config(
        config,
        ["--config.num_steps=3", "--config.num_steps=5", "--config.optim.clip_norm=None",
         "--config.optim.schedule_steps=20", "--config.mesh=1,8,1",
         "--config.rate=1", "--config.is_on=false", "--config.name=a/b", "--config.optim.betas=(0.8,0.9)"],
    )  # fmt: skip
    assert got == {
        "seed": 0, "num_steps": 5, "mesh": (1, 8, 1), "rate": 1.0, "is_on": False, "name": "a/b",
        "optim": {"schedule_steps": 20, "clip_norm": None, "betas": (0.8, 0.9)},
    }  # fmt: skip
    assert main.load_config(config)["mesh"] == (1, -1, 1) and main.load_config(config)["optim"]["schedule_steps"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optim.lr=1", "--config.optim.lr: unknown key; config.optim has betas, clip_norm, schedule_steps"),
        ("--config.nothing=1", "--config.nothing: unknown key; config has is_on"),
        ("--config.seed.x=1", "config.seed is a value and has no fields"),
        ("--config.num_steps=many", "--config.num_steps=many"),
        ("--config.num_steps=1.5", "--config.num_steps=1.5"),
        ("--config.rate=fast", "--config.rate=fast"),
        ("--config.is_on=maybe", "--config.is_on=maybe"),
        ("--config.optim=3", "--config.optim=3"),
        ("--config.num_steps", "expected --config.num_steps=VALUE"),
    ],
)
def test_bad_overrides_get_one_line(config, tmp_path, capsys, override, message):
    assert message in refusal(capsys, "train", f"--config={config}", f"--workdir={tmp_path}/w", override)


def test_bad_config_files_get_one_line(config, tmp_path, capsys):
    file = config.removesuffix(":tiny")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "plain.py").write_text("def get_config():\n    return {}\n")
    for argument, message in {
        "configs/no_such_file.py:tiny": "no file configs/no_such_file.py, nor",
        f"{file}:huge": "no variant 'huge'; there are tiny and bad",
        file: "needs a variant",
        f"{tmp_path}/empty.py:tiny": "has no get_config",
        f"{tmp_path}/plain.py:tiny": "takes no variant",
        str(tmp_path): "no file",
    }.items():
        assert message in refusal(capsys, "train", f"--config={argument}", f"--workdir={tmp_path}/w")
    with pytest.raises(RuntimeError, match="a fault of the config file"):  # not the user's mistake: a traceback
        main.load_config(f"{file}:bad")


def test_config_beside_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "voxcpm2_jax"
    (tmp_path / "checkout" / "configs").mkdir(parents=True)
    (tmp_path / "checkout" / "configs" / "own.py").write_text(CONFIG)
    monkeypatch.setattr(main, "__file__", str(package / "main.py"))
    monkeypatch.chdir(tmp_path)
    assert main.load_config("configs/own.py:tiny")["num_steps"] == 7


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_flag(capsys):
    flags = {
        "prepare": ["--config", "--output", "--vae"],
        "doctor": ["--manifest", "--heldout", "--tokenizer", "--output", "3"],
        "train": ["--config", "--workdir", "--data", "--heldout", "--config.num_steps=100", "75"],
        "train-vae": ["--config", "--workdir", "--data"],
        "generate": ["--checkpoint", "--text", "--control", "--reference-audio", "--prompt-audio", "--prompt-text",
                     "--cfg-value", "--inference-timesteps", "--seed", "--stream", "--output", "--input", "--output-dir"],
        "bench": ["data"],
        "chaos": ["--config", "--workdir", "--kills", "--quick", "3"],
        "import-torch": ["SRC_DIR", "DST_DIR"],
        "export-torch": ["CKPT", "DST_DIR"],
    }  # fmt: skip
    for command in [None, *flags]:
        with pytest.raises(SystemExit) as end:
            run(*filter(None, [command, "--help"]))
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in (flags[command] if command else flags))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "required: --config, --workdir"),
        (["train", "--conf=x", "--workdir=w"], "required: --config"),
        (["train", "--config=x", "--workdir=w", "--steps=3"], "unrecognized arguments: --steps=3"),
        (["export-torch", "a"], "required: DST_DIR"),
        (["export-torch", "a", "b", "--config.x=1"], "unrecognized arguments: --config.x=1"),
    ],
)
def test_bad_arguments_get_one_line(capsys, argv, message):
    assert message in refusal(capsys, *argv)


def test_import_is_light():
    """The command line answers at once, and works where an optional library is broken."""
    heavy = "jax", "flax", "orbax", "librosa", "numpy", "absl", "ml_collections", "soundfile", "torch"
    code = f"import sys, voxcpm2_jax.main; print([m for m in {heavy} if m in sys.modules])"
    root = pathlib.Path(voxcpm2_jax.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "[]\n", done.stderr


def test_module_runs_as_a_command():
    root = pathlib.Path(voxcpm2_jax.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "voxcpm2_jax", "fly"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and done.stderr.startswith("error: argument COMMAND")


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(monkeypatch):
    """Stands in for train/backbone.py: only what the command hands over and makes of the outcome is tested here."""
    from voxcpm2_jax.train import pretrain

    calls, starts = [], []

    def train(config, workdir, data, **start):
        calls.append((config, workdir, data))
        starts.append(start)
        if isinstance(outcome.value, Exception):
            raise outcome.value
        return outcome.value

    outcome = types.SimpleNamespace(value={"step": 5, "loss": 0.5, "mfu": None}, calls=calls, starts=starts)
    monkeypatch.setattr(pretrain, "train", train, raising=False)
    return outcome


@pytest.fixture
def run_config(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    model = {'dtype': 'float32', 'encoder_config': {'kv_channels': 128}, 'dit_config': {'kv_channels': 128}}\n"
        "    return ConfigDict({'model': model, 'num_steps': 7, 'optim': {'clip_norm': 1.0}})\n"
    )
    return path


def test_train_hands_over_dataclasses_and_ends_with_json(tmp_path, backbone, run_config, capsys):
    argv = ["train", f"--config={run_config}", f"--workdir={tmp_path}/w", "--data=shards", "--config.optim.clip_norm=None"]
    assert run(*argv, "--config.num_steps=5") == 0
    ((config, workdir, data),) = backbone.calls
    assert (config.num_steps, config.model.dtype, config.optim.clip_norm) == (5, "float32", None)
    assert (workdir, data) == (f"{tmp_path}/w", "shards")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"step": 5, "loss": 0.5, "mfu": None}


def test_a_run_starts_with_one_thing(tmp_path, backbone, run_config, capsys):
    argv = ["train", f"--config={run_config}", f"--workdir={tmp_path}/w", "--init-params=P"]
    assert run(*argv, "--init-tslm=T") == 2
    assert "--init-params and --init-tslm: each says what a new run starts with; give one" in capsys.readouterr().err
    assert run(*argv, "--resume-from=R") == 2 and not backbone.calls
    assert run(*argv) == 0 and backbone.starts[-1]["init_params"] == "P"


@pytest.fixture
def usual_signals():
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


def test_a_signal_on_the_way_out_does_not_change_the_exit_code(tmp_path, backbone, run_config, usual_signals):
    """What is preempted has saved; a launcher that signals it again must not see a failure."""
    from voxcpm2_jax.train.loop import Preempted

    backbone.value = Preempted("SIGTERM at step 3")
    assert run("train", f"--config={run_config}", f"--workdir={tmp_path}/w") == 75
    assert {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} == {signal.SIG_IGN}


def test_exit_codes_of_training(tmp_path, backbone, run_config, capsys, usual_signals):
    from voxcpm2_jax.checkpoint.manager import SaveFailed
    from voxcpm2_jax.train.loop import BrokenRun, Preempted

    argv = ["train", f"--config={run_config}", f"--workdir={tmp_path}/w"]
    for error, code, start in (
        (Preempted("SIGTERM at step 3"), 75, "SIGTERM at step 3"),
        (BrokenRun("step 4: not finite: loss"), 1, "error: step 4"),
        (SaveFailed("step 5 could not be saved"), 1, "error: step 5 could not be saved"),
        (UserError("shards: none"), 2, "error: shards: none"),
    ):
        backbone.value = error
        assert run(*argv) == code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(start) and err.count("\n") == 1
    backbone.value = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        run(*argv)


def test_a_value_the_dataclass_refuses_gets_one_line(tmp_path, run_config, capsys):
    argv = ["train", f"--config={run_config}", f"--workdir={tmp_path}/w"]
    assert "num_steps must be at least 1" in refusal(capsys, *argv, "--config.num_steps=0")
    assert "config.num_steps: expected int, got None" in refusal(capsys, *argv, "--config.num_steps=None")


def test_train_vae_hands_over_its_own_config(tmp_path, monkeypatch, capsys):
    from voxcpm2_jax.train import vae

    path = tmp_path / "vae.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'vae': {}, 'rows': 3})\n")
    calls = []
    monkeypatch.setattr(vae, "train", lambda *call, **start: calls.append(call) or {"step": 1}, raising=False)
    assert run("train-vae", f"--config={path}", f"--workdir={tmp_path}/w", "--config.rows=4") == 0
    ((config, workdir, data),) = calls
    assert config.rows == 4 and (workdir, data) == (f"{tmp_path}/w", None)
    assert json.loads(capsys.readouterr().out) == {"step": 1}


# ---- data and conversion ---------------------------------------------------------------------------------------------


def test_prepare_and_conversions_hand_over_and_answer_in_json(tmp_path, monkeypatch, capsys):
    from voxcpm2_jax import convert

    calls = []
    path = tmp_path / "data.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'vocab_size': 300})\n")
    fake = types.SimpleNamespace(
        prepare=lambda config, output, vae: calls.append((config.vocab_size, output, vae)) or {"clips": 2}
    )
    monkeypatch.setattr(voxcpm2_jax, "prepare", fake, raising=False)
    assert run("prepare", f"--config={path}", "--output=O", "--vae=V", "--config.vocab_size=400") == 0
    monkeypatch.setattr(convert, "import_torch", lambda *call: calls.append(call))
    assert run("import-torch", "S", "D") == 0
    monkeypatch.setattr(convert, "export_torch", lambda *call: calls.append(call))
    assert run("export-torch", "C", "E") == 0
    assert calls == [(400, "O", "V"), ("S", "D"), ("C", "E")]
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [{"clips": 2}, {"checkpoint": "D"}, {"directory": "E"}]


# ---- speech ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def voice(monkeypatch, tmp_path):
    """Stands in for a loaded model: says nothing but tells what it was asked."""
    from voxcpm2_jax import workdir
    from voxcpm2_jax.inference import api

    class Voice:
        sample_rate = 48000
        asked, loaded = [], []

        @classmethod
        def from_pretrained(cls, path):
            cls.loaded.append(path)
            return cls()

        config = MODELS["tiny"]

        def speak(self, requests):
            self.asked.append(requests)
            reasons = ["max_length" if "endless" in request["text"] else "stop head" for request in requests]
            return [api.Speech(np.full(480 * (1 + i), 0.5, np.float32), None, 7, why, 1) for i, why in enumerate(reasons)]

        def generate_streaming(self, **request):
            self.asked.append([request])
            yield from (np.full(480, x, np.float32) for x in (0.25, 0.5))

    monkeypatch.setattr(api, "VoxCPM", Voice)
    monkeypatch.setattr(workdir, "kind", lambda path: "released")
    return Voice


def test_generate_one_text(tmp_path, voice, capsys):
    (tmp_path / "voice.wav").write_bytes(b"")
    output = tmp_path / "a.wav"
    code = run("generate", "--checkpoint=C", "--text=Hello", "--control=deep voice", f"--reference-audio={tmp_path}/voice.wav",
               "--cfg-value=1.5", "--inference-timesteps=5", "--seed=3", f"--output={output}")  # fmt: skip
    assert code == 0 and voice.loaded == ["C"]
    assert voice.asked == [[{
        "text": "(deep voice)Hello", "reference_wav_path": f"{tmp_path}/voice.wav", "prompt_wav_path": None,
        "prompt_text": None, "cfg_value": 1.5, "inference_timesteps": 5, "min_len": 2, "max_len": 4096, "seed": 3,
    }]]  # fmt: skip
    audio, rate = soundfile.read(output)
    assert rate == 48000 and audio.shape == (480,)
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(output) and said["sec"] == 0.01 and said["stopped_by"] == "stop head"


def test_generate_lines(tmp_path, voice, capsys, monkeypatch):
    monkeypatch.setattr(main, "_LINES_AT_ONCE", 2)
    (tmp_path / "lines.txt").write_text("one\n\nthree\n  \n五\n", encoding="utf-8")
    assert run("generate", "--checkpoint=C", f"--input={tmp_path}/lines.txt", f"--output-dir={tmp_path}/out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["0001.wav", "0003.wav", "0005.wav"]
    assert [[request["text"] for request in batch] for batch in voice.asked] == [["one", "three"], ["五"]]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_line_without_end_does_not_cost_the_others_their_speech(tmp_path, voice, capsys):
    (tmp_path / "lines.txt").write_text("one\nendless\nthree\n", encoding="utf-8")
    assert run("generate", "--checkpoint=C", f"--input={tmp_path}/lines.txt", f"--output-dir={tmp_path}/out") == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["0001.wav", "0003.wav"]
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.count("\n") == 1 and "0002.wav is not written: the speech did not end within the model's 512 slots" in err


def test_generate_streams_into_a_file_that_is_whole_at_its_end(tmp_path, voice, capsys):
    output = tmp_path / "a.wav"
    assert run("generate", "--checkpoint=C", "--text=Hello", "--stream", f"--output={output}") == 0
    audio, _ = soundfile.read(output)
    np.testing.assert_allclose(audio[[0, -1]], [0.25, 0.5], atol=1e-4)
    assert len(audio) == 960 and os.listdir(tmp_path) == ["a.wav"]
    assert json.loads(capsys.readouterr().out)["sec"] == 0.02


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text=", "--output=a.wav"], "--text must not be empty"),
        (["--text=  ", "--output=a.wav"], "--text must not be empty"),
        (["--text=a"], "one of the arguments --output --output-dir is required"),
        (["--text=a", "--output-dir=d"], "--text goes with --output"),
        (["--text=a", "--input=x", "--output=a.wav"], "not allowed with"),
        (
            ["--text=a", "--output=a.wav", "--control=deep", "--prompt-audio=p.wav", "--prompt-text=b"],
            "--control does not go with",
        ),
        (["--text=a", "--output=a.wav", "--control= "], "--control must not be empty"),
        (["--text=a", "--output=a.wav", "--prompt-text=b"], "prompt text without prompt audio"),
        (["--text=a", "--output=a.wav", "--prompt-audio=b.wav"], "prompt audio without prompt text"),
        (["--text=a", "--output=a.wav", "--prompt-audio=no.wav", "--prompt-text=b"], "--prompt-audio=no.wav: no such file"),
        (["--text=a", "--output=a.wav", "--reference-audio=no.wav"], "--reference-audio=no.wav: no such file"),
        (["--text=a", "--output=no/a.wav"], "no/a.wav: cannot be written"),
        (["--text=a", "--output=a.xyz"], "ends in .wav"),
        (["--text=a", "--output=a.wav", "--cfg-value=11"], "cfg_value must lie between 0 and 10"),
        (["--text=a", "--output=a.wav", "--cfg-value=nan"], "cfg_value must lie"),
        (["--text=a", "--output=a.wav", "--cfg-value=x"], "invalid float value: 'x'"),
        (["--text=a", "--output=a.wav", "--inference-timesteps=0"], "inference_timesteps must lie between 1 and 1000"),
        (["--text=a", "--output=a.wav", "--min-len=9", "--max-len=3"], "min_len <= max_len"),
        (["--text=a", "--output=a.wav", "--seed=-1"], "--seed must lie"),
        (["--input=no.txt", "--output-dir=d"], "--input=no.txt"),
        (["--input=blank.txt", "--output-dir=d"], "no text in it"),
        (["--input=lines.txt", "--output-dir=d", "--stream"], "--stream goes with --text"),
        (["--input=lines.txt", "--output-dir=lines.txt"], "--output-dir=lines.txt"),
    ],
)
def test_generate_refuses_before_it_loads(tmp_path, voice, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "lines.txt").write_text("a\n")
    assert message in refusal(capsys, "generate", "--checkpoint=C", *argv)
    assert voice.loaded == []


def test_generate_refuses_a_directory_that_is_no_checkpoint(tmp_path, capsys):
    argv = ["generate", "--text=a", f"--output={tmp_path}/a.wav"]
    assert "no such directory" in refusal(capsys, *argv, f"--checkpoint={tmp_path}/nothing")
    assert "not a checkpoint" in refusal(capsys, *argv, f"--checkpoint={tmp_path}")


def test_training_keeps_its_programs_where_the_user_says_or_in_the_users_cache(tmp_path, monkeypatch):
    """Several processes keep them in the workdir, which they share."""
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    try:
        for there, processes in (("/somewhere", 1), (None, 2), (None, 1)):
            jax.config.update("jax_compilation_cache_dir", there)
            monkeypatch.setattr(jax, "process_count", lambda n=processes: n)
            main._keep_programs("/run")
            found.append(jax.config.jax_compilation_cache_dir)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found == ["/somewhere", "/run/compiled", str(tmp_path / "voxcpm2_jax" / "compiled")]
