"""--config and its overrides."""

import pytest

from voxcpm2_jax.cli import configs
from voxcpm2_jax.cli.configs import load_config

pytestmark = pytest.mark.fast

CONFIG = """
from ml_collections import ConfigDict

from voxcpm2_jax.config.plain import UserError


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


def test_overrides_reach_every_kind_of_field(config):
    got = load_config(
        config,
        ["--config.num_steps=3", "--config.num_steps=5", "--config.optim.clip_norm=None",
         "--config.optim.schedule_steps=20", "--config.mesh=1,8,1",
         "--config.rate=1", "--config.is_on=false", "--config.name=a/b", "--config.optim.betas=(0.8,0.9)"],
    )  # fmt: skip
    assert got == {
        "seed": 0, "num_steps": 5, "mesh": (1, 8, 1), "rate": 1.0, "is_on": False, "name": "a/b",
        "optim": {"schedule_steps": 20, "clip_norm": None, "betas": (0.8, 0.9)},
    }  # fmt: skip
    assert load_config(config)["mesh"] == (1, -1, 1) and load_config(config)["optim"]["schedule_steps"] is None


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
def test_bad_overrides_get_one_line(refusal, config, tmp_path, override, message):
    assert message in refusal("train", f"--config={config}", f"--workdir={tmp_path}/w", override)


def test_bad_config_files_get_one_line(refusal, config, tmp_path):
    file = config.removesuffix(":tiny")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "plain.py").write_text("def get_config():\n    return {}\n")
    for argument, message in {
        "configs/no_such_file.py:tiny": "no such file; looked for configs/no_such_file.py and",
        f"{file}:huge": "no variant 'huge'; there are tiny and bad",
        file: "needs a variant",
        f"{tmp_path}/empty.py:tiny": "has no get_config",
        f"{tmp_path}/plain.py:tiny": "takes no variant",
        str(tmp_path): "no such file",
    }.items():
        assert message in refusal("train", f"--config={argument}", f"--workdir={tmp_path}/w")
    with pytest.raises(RuntimeError, match="a fault of the config file"):  # not a mistake of the user: a traceback
        load_config(f"{file}:bad")


def test_config_beside_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "voxcpm2_jax"
    (tmp_path / "checkout" / "configs").mkdir(parents=True)
    (tmp_path / "checkout" / "configs" / "own.py").write_text(CONFIG)
    monkeypatch.setattr(configs, "__file__", str(package / "cli" / "configs.py"))
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/own.py:tiny")["num_steps"] == 7


@pytest.mark.parametrize(
    "content, message",
    [
        ("def get_config(variant='')\n", "not valid Python"),
        ("def get_config(variant=''):\n    return {}\n", "get_config returns dict; expected an ml_collections.ConfigDict"),
        ("x = 1\n", "has no get_config(variant)"),
    ],
)
def test_files_that_are_not_configs(refusal, tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    assert message in refusal("train", "--config=mine.py", "--workdir=run")
