"""Fixtures: a bucket in an emulator, for S3 and for Google's store."""

import contextlib

import pytest

from tests.buckets import emulators
from tests.cli.conftest import refusal  # noqa: F401


@pytest.fixture(scope="session", params=["s3", "gs"])
def server(request):
    import fsspec

    with emulators.emulator(request.param) as server:
        with pytest.MonkeyPatch.context() as patch:
            emulators.apply(patch, server.settings, "unused")
            # moto keeps its buckets when its server stops, for the next server in this process.
            with contextlib.suppress(FileExistsError):
                fsspec.filesystem(server.scheme, skip_instance_cache=True).mkdir("bucket")
        yield server


@pytest.fixture
def bucket(server, tmp_path_factory, monkeypatch):
    """An emulator whose bucket is empty; `bucket.url` names it."""
    import fsspec

    emulators.apply(monkeypatch, server.settings, tmp_path_factory.mktemp("cache"))
    system = fsspec.filesystem(server.scheme, skip_instance_cache=True, use_listings_cache=False)
    yield server
    server.before_write = lambda name: None
    for path in system.find("bucket"):
        system.rm_file(path)
