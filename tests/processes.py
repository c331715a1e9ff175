"""Real processes that join into one run over loopback, for what only several of them can show.

Each has one CPU device unless told otherwise: two devices of one process can wait for each other for ever in XLA's CPU
collectives where there are but two cores. A compilation cache that they share serves the first process alone, for the others
look for other keys in it; a second start still is quicker.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Result(NamedTuple):
    code: int  # exit code; the negative number of a signal that ended it
    stdout: str
    stderr: str


class Process:
    """One of them; `popen` takes signals while it runs."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        # Files, for a pipe that nobody reads would stop its writer.
        self._stdout, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.popen = subprocess.Popen(command, env=env, stdout=self._stdout, stderr=self._stderr, start_new_session=True)

    def wait(self, timeout_sec: float) -> Result:
        """The result, once it has ended; subprocess.TimeoutExpired if it does not within the time."""
        return Result(self.popen.wait(timeout_sec), self.stdout, self.stderr)

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._read(self._stdout)

    @property
    def stderr(self) -> str:
        return self._read(self._stderr)

    def _read(self, file) -> str:
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode(errors="replace")  # leaves the writer's place in the file alone

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._stdout.close()
        self._stderr.close()


@contextlib.contextmanager
def start_processes(
    argv: Sequence[str],
    num: int,
    *,
    program: Sequence[str] = ("-m", "voxcpm2_jax"),
    devices: int = 1,
    env: Mapping[str, str] | None = None,
) -> Iterator[list[Process]]:
    """Starts `num` times `voxcpm2-jax ARGV` as one run; what still runs at the end is killed.

    Args:
        program: what Python runs instead of `voxcpm2-jax`.
        devices: CPU devices of each.   env: variables beside those of this process, such as JAX_COMPILATION_CACHE_DIR.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        # Otherwise a process whose program comes out of the cache may start independent collectives in another order than one
        # that compiled it (jax 0.10.2, three times of three), and each waits for the other's first for ever.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
    shared = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": str(num)}
    command = [sys.executable, *program, *map(str, argv)]
    started: list[Process] = []
    try:
        for i in range(num):
            started.append(Process(command, os.environ | shared | {"JAX_PROCESS_ID": str(i)} | dict(env or {})))
        yield started
    finally:
        for process in started:
            process.kill()


def run_processes(argv: Sequence[str], num: int, *, timeout_sec: float = 120, **options) -> list[Result]:
    """`start_processes` with its options, and waits for all of them: at most `timeout_sec`, then fails with what they wrote."""
    end = time.monotonic() + timeout_sec
    with start_processes(argv, num, **options) as started:
        try:
            return [process.wait(max(end - time.monotonic(), 0.01)) for process in started]
        except subprocess.TimeoutExpired:
            written = "\n".join(f"process {i}: {process.stderr}" for i, process in enumerate(started))
            raise AssertionError(f"still running after {timeout_sec} s: {' '.join(map(str, argv))}\n{written}") from None
