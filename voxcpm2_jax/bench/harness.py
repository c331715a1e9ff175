"""Starts training processes for `chaos`, waits for them, and compares what they leave behind with a control run."""

import contextlib
import copy
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from voxcpm2_jax import sharding
from voxcpm2_jax.checkpoint.arrays import restore
from voxcpm2_jax.checkpoint.steps import step_directory
from voxcpm2_jax.config.plain import to_dict
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.train import backbone

STEPS, SAVE_EVERY = 40, 5
LOSS_TOLERANCE = 1e-6  # relative, between runs on different numbers of processes
TIMEOUT_SEC = 600.0  # for everything that is waited for

_CLOCKS = re.compile(r".*_per_sec|step_sec|data_wait_sec|checkpoint_sec|goodput|mfu|slowest.*|spread_sec/.*")


class Outcome(NamedTuple):
    problems: Sequence[str]  # empty if the fault was survived
    note: str = ""
    lost_steps: int = 0
    lost_data: int = 0


# ---- children --------------------------------------------------------------------------------------------------------


class RunFailed(RuntimeError):  # noqa: N818
    """A training process did not do what it should; the fault counts as not survived."""


class Child:
    """A process of `voxcpm2-jax train`; its output goes to a log file."""

    def __init__(self, command: Sequence[str], env: dict, log: pathlib.Path):
        self._log = log
        with log.open("w") as file:
            self._popen = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    @property
    def start_step(self) -> int | None:
        """The step that it started from; None until it says so."""
        found = re.search(r"starting from (?:step (\d+)|scratch)", self.output)
        return found and int(found[1] or 0)

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def limit_file_size(self, num_bytes: int) -> None:
        """Makes every write beyond this size of a file fail."""
        resource.prlimit(self._popen.pid, resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    def limit_open_files(self, num_files: int) -> None:
        resource.prlimit(self._popen.pid, resource.RLIMIT_NOFILE, (num_files, num_files))

    def usage(self) -> dict[str, int]:
        """Peak memory so far and open files, as Linux counts them; empty when the process has ended."""
        try:
            files = len(os.listdir(f"/proc/{self._popen.pid}/fd"))
            peak = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{self._popen.pid}/status").read_text())
        except OSError:
            return {}
        return {"peak_mb": round(int(peak[1]) * 1024 / 1e6), "open_files": files} if peak else {}

    def wait(self, timeout_sec: float = TIMEOUT_SEC) -> int:
        """Waits for the end -> exit code, or the negative number of the signal that ended the process."""
        return self._popen.wait(timeout_sec)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=1",
    "--xla_backend_optimization_level=0",  # a child compiles for longer than it trains
    # Otherwise a process whose program comes out of the cache may start independent collectives in another order than one
    # that compiled it (jax 0.10.2), and each waits for the other's first for ever.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)


class Harness:
    """Starts runs of one config below one directory, and compares their results with the control run.

    Attributes:
        control: workdir of the control run.   start_sec: from the start of a process to its first step, once compiled.
    """

    def __init__(self, run: BackboneRun, directory: pathlib.Path):
        self.run, self.directory = run, directory
        self.rng = np.random.default_rng(0)
        self.control = directory / "control"
        self.start_sec = 0.0
        (directory / "logs").mkdir()
        (directory / "run.json").write_text(json.dumps(to_dict(run)))
        (directory / "run.py").write_text(
            "import json, pathlib\nfrom ml_collections import ConfigDict\n\n"
            "def get_config():\n    return ConfigDict(json.loads(pathlib.Path(__file__).with_name('run.json').read_text()))\n"
        )
        self._count = 0
        self._running: set[Child] = set()
        self._is_stopped = threading.Event()
        self._comparing = threading.Lock()  # one comparison at a time, for memory

    def with_rng(self, rng: np.random.Generator) -> "Harness":
        """The same harness with random numbers of its own, for one of several faults that are injected at the same time."""
        harness = copy.copy(self)
        harness.rng = rng
        return harness

    def stop(self) -> None:
        """Kills everything that runs, also for copies made by `with_rng`; nothing new can be started."""
        self._is_stopped.set()
        for child in list(self._running):
            child.kill()

    @contextlib.contextmanager
    def children(self, workdir, *arguments: str, num: int = 1) -> Iterator[list[Child]]:
        """Starts a run of `num` processes; those that still run at the end of the block are killed."""
        command = [sys.executable, "-m", "voxcpm2_jax", "train", f"--config={self.directory / 'run.py'}"]
        command += [f"--workdir={workdir}", *arguments]
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {' '.join(_XLA_FLAGS)}",
            "PYTHONPATH": f"{pathlib.Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_PROCESSES": str(num),
        }
        if num > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
        started = []
        try:
            for i in range(num):
                if self._is_stopped.is_set():
                    raise RunFailed("stopped")
                self._count += 1
                log = self.directory / "logs" / f"{self._count:03d}_{pathlib.Path(workdir).name}.txt"
                started.append(Child(command, env | {"JAX_PROCESS_ID": str(i)}, log))
                self._running.add(started[-1])
            yield started
        finally:
            for child in started:
                child.kill()
                self._running.discard(child)

    def run_to_end(self, workdir, *arguments: str, num: int = 1) -> str:
        """Runs `num` processes until they end -> output of the first; raises RunFailed unless all exit with 0."""
        begin = time.monotonic()
        with self.children(workdir, *arguments, num=num) as children:
            codes = [child.wait() for child in children]
            if any(codes):
                raise RunFailed(f"exit codes {codes}: {children[0].output[-2000:]}")
            self.start_sec = max(time.monotonic() - begin - 1.0, 1.0)
            return children[0].output

    def wait_until(self, condition: Callable[[], object], children: Sequence[Child]) -> bool:
        """Waits for a condition -> whether it came true before one of the children ended."""
        end = time.monotonic() + TIMEOUT_SEC
        while not condition():
            if not all(child.is_running for child in children):
                return bool(condition())
            if time.monotonic() > end:
                raise RunFailed(f"nothing happened for {TIMEOUT_SEC:.0f} s: {children[0].output[-2000:]}")
            time.sleep(0.01)
        return True

    def differences(
        self, workdir, *, control=None, arrays: bool = True, tolerance: float = 0.0, steps: int = STEPS
    ) -> list[str]:
        """Differences between a run and the control run: rows of metrics.jsonl, and arrays of the last checkpoint.

        Args:
            control: workdir to compare with; None: that of the control run.   arrays: also compare checkpoints, bit for bit.
            tolerance: relative, of losses; over 0 only losses and counts are compared.   steps: of the run.
        """
        control = control or self.control
        rows, expected = metric_rows(workdir), metric_rows(control)[:steps]
        found = [] if [row["step"] for row in rows] == list(range(1, steps + 1)) else ["steps missing or twice"]
        for row, other in zip(rows, expected):
            for name in (name for name in row.keys() | other.keys() if not _CLOCKS.fullmatch(name)):
                a, b = row.get(name), other.get(name)
                if tolerance and name not in ("loss", "loss_diff", "loss_stop", "slots", "patches", "targets", "skipped"):
                    continue
                if a != b and not (a is not None and b is not None and abs(a - b) <= tolerance * abs(b)):
                    found.append(f"{name} of step {row['step']}: {a} instead of {b}")
        if arrays:
            shapes = jax.eval_shape(backbone.initialiser(self.run))
            place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            layout = sharding.abstract(shapes, jax.tree.map(lambda _: place, shapes))
            with self._comparing:
                (state, meta), (other, expected_meta) = (restore(step_directory(path), layout) for path in (workdir, control))
            found += [
                f"{jax.tree_util.keystr(path)} differs"
                for (path, x), y in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(other))
                if not np.array_equal(x, y)
            ]
            found += [] if meta["data"] == expected_meta["data"] else ["other clips were used"]
        return found

    def copy_control(self, name: str) -> pathlib.Path:
        """A copy of the finished control run."""
        shutil.copytree(self.control, self.directory / name)
        return self.directory / name


# ---- results ---------------------------------------------------------------------------------------------------------


def metric_rows(workdir, newest: int = 0) -> list[dict]:
    """The complete rows of metrics.jsonl: all of them, or so many of the newest."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in [line for line in lines if line.endswith("\n")][-newest:]]


def last_step(workdir) -> int:
    """Step of the last row of metrics.jsonl; 0 without one."""
    rows = metric_rows(workdir, newest=1)
    return rows[0]["step"] if rows else 0


def saved_steps(workdir) -> list[int]:
    """Steps of the complete checkpoints."""
    directory = pathlib.Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())
