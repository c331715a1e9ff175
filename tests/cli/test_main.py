"""The command line itself: help, wrong arguments, what it imports; and the commands that only pass arguments on."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import pytest

import voxcpm2_jax
from voxcpm2_jax.cli import doctor, flags, main


def run(*argv):
    return main.main([str(a) for a in argv])


def test_help_names_every_command_and_flag(capsys):
    flags = {
        "prepare": ["--config", "--output", "--vae"],
        "doctor": ["--manifest", "--heldout", "--tokenizer", "--output", "3"],
        "train": ["--config", "--workdir", "--data", "--heldout", "--compile-for", "--config.num_steps=100", "75"],
        "train-vae": ["--config", "--workdir", "--data"],
        "generate": ["--checkpoint", "--text", "--control", "--reference-audio", "--prompt-audio", "--prompt-text",
                     "--cfg-value", "--inference-timesteps", "--seed", "--stream", "--output", "--input", "--output-dir"],
        "evaluate": ["--config", "--checkpoint", "--data", "--output"],
        "plan": ["--config", "--topology", "--search", "--output", "3"],
        "bench": ["data", "train"],
        "chaos": ["--config", "--workdir", "--kills", "--quick", "3"],
        "import-torch": ["SRC_DIR", "DST_DIR"],
        "export-torch": ["CKPT", "DST_DIR", "--dtype"],
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
        (["export-torch", "a", "b", "--dtype=float64"], "invalid choice: 'float64' (choose from"),
        (["export-torch", "a", "b", "--config.x=1"], "unrecognized arguments: --config.x=1"),
    ],
)
def test_bad_arguments_get_one_line(refusal, argv, message):
    assert message in refusal(*argv)


def test_every_flag_for_a_path_takes_buckets_or_refuses_them():
    def actions(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    yield from actions(child)
            else:
                yield action

    metavars = "CKPT", "DATA", "DIR", "DST_DIR", "F", "F.json", "F.wav", "F[,F]", "LINES.txt", "MINICPM", "SHARDS", "SRC_DIR"
    paths = [action for action in actions(main.make_parser()) if action.metavar in (*metavars, "SHARDS[,SHARDS]")]
    assert len(paths) >= 28 and all(action.type in (flags.place, flags.local_path) for action in paths)


def test_import_is_light():
    """The command line answers at once, and works where an optional library is broken."""
    argv = ["import-torch", "S", "D"]
    heavy = "jax", "flax", "orbax", "librosa", "numpy", "absl", "ml_collections", "soundfile", "torch"
    code = f"import sys; from voxcpm2_jax.cli import main; main.parse({argv}); print([m for m in {heavy} if m in sys.modules])"
    root = pathlib.Path(voxcpm2_jax.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "[]\n", done.stderr


def test_module_runs_as_a_command():
    root = pathlib.Path(voxcpm2_jax.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "voxcpm2_jax", "fly"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and done.stderr.startswith("error: argument COMMAND")


def test_a_platform_that_does_not_exist(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "npu", "PYTHONPATH": str(pathlib.Path(voxcpm2_jax.__file__).parents[1])}
    command = [sys.executable, "-m", "voxcpm2_jax", "train", "--config=configs/backbone.py:tiny", "--workdir=run"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "'npu'" in done.stderr and not list(tmp_path.iterdir())


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert main.main(["doctor", "--manifest=m.jsonl"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_prepare_and_conversions_hand_over_and_answer_in_json(tmp_path, monkeypatch, capsys):
    from voxcpm2_jax import convert
    from voxcpm2_jax.corpus import prepare

    calls = []
    path = tmp_path / "data.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'vocab_size': 300})\n")
    fake = lambda config, output, vae, strict: calls.append((config.vocab_size, output, vae)) or {"clips": 2}  # noqa: E731
    monkeypatch.setattr(prepare, "prepare", fake)
    assert run("prepare", f"--config={path}", "--output=O", "--vae=V", "--config.vocab_size=400") == 0
    monkeypatch.setattr(convert, "import_torch", lambda *call: calls.append(call))
    assert run("import-torch", "S", "D") == 0
    part = {"dtype": "float16", "bytes": 4, "checkpoint_dtype": "float32", "checkpoint_bytes": 8}
    monkeypatch.setattr(convert, "export_torch", lambda *call, dtype: calls.append((*call, dtype)) or {"backbone": part})
    assert run("export-torch", "C", "E", "--dtype=float16") == 0
    assert calls == [(400, "O", "V"), ("S", "D"), ("C", "E", "float16")]
    out, err = capsys.readouterr()
    said = [json.loads(line) for line in out.splitlines()]
    assert said == [{"clips": 2, "output": "O"}, {"checkpoint": "D"}, {"directory": "E", "backbone": part}]
    assert "backbone: float16, 4 bytes (checkpoint: float32, 8 bytes)" in err
