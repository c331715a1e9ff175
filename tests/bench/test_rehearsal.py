"""The arguments of `bench rehearsal`."""

import pytest

from voxcpm2_jax.cli import main


@pytest.mark.parametrize("sizes", ["--shards=15", "--clips=100", "--processes=3"])
def test_wrong_sizes_are_refused(sizes, capsys):
    assert main.main(["bench", "rehearsal", "--config=configs/backbone.py:2b", sizes]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
