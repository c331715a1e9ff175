"""Fixtures of the command line's tests."""

import pytest

from voxcpm2_jax.cli import main


def content_of(directory):
    return {path.relative_to(directory): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs a command that is a mistake, in an empty directory; checks the exit code and returns the one line."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        before = content_of(tmp_path)
        capsys.readouterr()
        code = main.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), (out, err)
        assert content_of(tmp_path) == before
        return err

    return run
