"""Emulators of S3 (moto) and Google's store (gcp-storage-emulator) on loopback, which can be made to hang or to refuse."""

import contextlib
import functools
import http.server
import logging
import os
import threading
from collections.abc import Callable, Iterator

# What points the libraries at the emulators; these are no credentials of anything.
_SETTINGS = {
    "s3": {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-4711", "AWS_DEFAULT_REGION": "us-east-1"},
    "gs": {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"},
}
_ADDRESS = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}


class Emulator:
    """One emulator, with an empty bucket "bucket".

    Attributes:
        scheme, url: "s3", "s3://bucket".   settings: environment variables that point the libraries at it.
        before_write: called with the name of every object before it is written.
    """

    def __init__(self, scheme: str, port: int):
        self.scheme, self.url = scheme, f"{scheme}://bucket"
        self.settings = _SETTINGS[scheme] | {_ADDRESS[scheme]: f"http://127.0.0.1:{port}"}
        self.before_write: Callable[[str], None] = lambda name: None


@contextlib.contextmanager
def emulator(scheme: str) -> Iterator[Emulator]:
    """Starts an emulator in a thread of this process."""
    server = _s3() if scheme == "s3" else _gs()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.emulator = Emulator(scheme, server.server_address[1])
    try:
        yield server.emulator
    finally:
        server.shutdown()
        server.server_close()


def _s3():
    import moto.server
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    app = moto.server.DomainDispatcherApplication(moto.server.create_backend_app)

    def gate(environ, respond):
        if environ["REQUEST_METHOD"] == "PUT":
            server.emulator.before_write(environ["PATH_INFO"].removeprefix("/bucket/"))
        return app(environ, respond)

    server = make_server("127.0.0.1", 0, gate, threaded=True, request_handler=moto.server.MotoRequestHandler)
    return server


def _gs():
    from gcp_storage_emulator import server as parts

    class Storage(parts.Storage):
        def create_file(self, bucket, name, *args, **kwargs):
            server.emulator.before_write(name)
            return super().create_file(bucket, name, *args, **kwargs)

    handler = functools.partial(parts.RequestHandler, Storage(use_memory_fs=True))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # the client was killed
    return server


@contextlib.contextmanager
def refusing() -> Iterator[dict[str, str]]:
    """A server that answers 403 to everything -> settings that point both libraries at it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b"<Error><Code>AccessDenied</Code><Message>secret-4711</Message></Error>"
            if "/storage/" in self.path:
                body = b'{"error": {"code": 403, "message": "secret-4711"}}'
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield _SETTINGS["s3"] | _SETTINGS["gs"] | dict.fromkeys(_ADDRESS.values(), address)
    finally:
        server.shutdown()
        server.server_close()


def apply(monkeypatch, settings: dict[str, str], cache: os.PathLike) -> None:
    """Points this process at an emulator, with an empty cache."""
    from voxcpm2_jax.buckets import store

    for name, value in (settings | {"VOXCPM2_JAX_CACHE": str(cache)}).items():
        monkeypatch.setenv(name, value)
    store._open.cache_clear()
