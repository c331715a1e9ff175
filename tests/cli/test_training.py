"""`train` and `train-vae`: what they pass on, and the exit codes."""

import json
import signal
import types

import pytest

from voxcpm2_jax.cli import main
from voxcpm2_jax.config.plain import UserError


def run(*argv):
    return main.main([str(a) for a in argv])


@pytest.fixture
def backbone(monkeypatch):
    """Replaces train/pretrain.py: these tests are about the arguments it gets and about what becomes of its outcome."""
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
    assert "--init-params and --init-tslm: each says what a new run starts from; give only one" in capsys.readouterr().err
    assert run(*argv, "--resume-from=R") == 2 and not backbone.calls
    assert run(*argv) == 0 and backbone.starts[-1]["init_params"] == "P"


@pytest.fixture
def usual_signals():
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


def test_a_signal_on_the_way_out_does_not_change_the_exit_code(tmp_path, backbone, run_config, usual_signals):
    """A preempted run has saved; a launcher that signals it again must not see a failure."""
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


def test_a_value_the_dataclass_refuses_gets_one_line(refusal, run_config):
    argv = ["train", f"--config={run_config}", "--workdir=w"]
    assert "num_steps must be at least 1" in refusal(*argv, "--config.num_steps=0")
    assert "config.num_steps: expected int, got None" in refusal(*argv, "--config.num_steps=None")


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
