"""Compiled programs: where they are kept, and by whom."""

import jax
import pytest

from voxcpm2_jax import compiled
from voxcpm2_jax.inference.api import VoxCPM

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX as it starts, with a cache of the user in `tmp_path`."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in zip(NAMES, (None, 1.0)):
        jax.config.update(name, value)
    yield tmp_path / "voxcpm2_jax/compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def kept() -> tuple:
    return tuple(getattr(jax.config, name) for name in NAMES)


@pytest.mark.parametrize(
    ("there", "processes", "platform", "directory"),
    [
        ("/somewhere", 1, "cpu", "/somewhere"),
        ("/somewhere", 2, "cpu", "/somewhere"),
        (None, 2, "tpu", "{run}/compiled"),
        (None, 2, "tpu gs://bucket/run/", "gs://bucket/run/compiled"),
        (None, 2, "cpu", None),
    ],
)
def test_programs_go_where_the_user_says_or_where_all_processes_find_them(
    fresh, tmp_path, monkeypatch, there, processes, platform, directory
):
    jax.config.update("jax_compilation_cache_dir", there)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    platform, *url = platform.split()
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    compiled.keep(*url or [tmp_path / "run"])
    assert kept()[0] == (directory and directory.format(run=tmp_path / "run"))


def test_a_voice_keeps_its_programs_in_the_users_cache(fresh, released_dir):
    VoxCPM.from_pretrained(released_dir)
    assert kept() == (str(fresh), compiled.LEAST_SEC) and fresh.is_dir()


def test_a_home_that_cannot_be_written_is_reported_once_and_stops_nothing(fresh, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiled.keep()
    err = capsys.readouterr().err
    assert kept()[0] is None and err.startswith("compiled programs are not kept: ") and err.count("\n") == 1


def test_a_users_threshold_stays(fresh):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    compiled.keep()
    assert kept() == (str(fresh), 5.0)
