"""Services where people look at runs: Weights & Biases, trackio and MLflow. Each is an extra; `log.trackers` chooses.

    metrics.Writer -> queue -> thread -> pipe -> process of its own -> the service's package

A service must not slow down or stop a training, whatever its package does: raise, wait for a network, never end. So it runs in
another process; the training puts rows into a bounded queue and never waits. At its end it gives the process CLOSE_SEC to send
what is left. metrics.jsonl has every row in any case.

WORKDIR/trackers/NAME.json holds the run's id and the newest step that was sent. A run that starts again continues under its id,
first with the rows of metrics.jsonl that have not been sent: those of an outage, or of the time before the service was chosen.

Each package finds its server and its credentials by itself (`wandb login` or $WANDB_API_KEY, $WANDB_MODE=offline; $TRACKIO_DIR;
$MLFLOW_TRACKING_URI, else files in WORKDIR/mlruns).
"""

import base64
import contextlib
import importlib.util
import io
import itertools
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.files import write_json

CLOSE_SEC = 20.0  # a preempted machine may have 30 s
_MOST_ROWS = 1000  # in the queue


def check(names: Sequence[str]) -> None:
    """Raises UserError if the package of one of these services is not installed."""
    # The directory wandb/ that W&B leaves in a working directory has a spec too, without an origin.
    specs = {name: importlib.util.find_spec(name) for name in names}
    if missing := [name for name, spec in specs.items() if spec is None or spec.origin is None]:
        raise UserError(f"log.trackers: {', '.join(missing)}: not installed; pip install 'voxcpm2-jax[{','.join(missing)}]'")


# ---- the training's side ---------------------------------------------------------------------------------------------


class Tracker:
    """One service. After `__init__` no method raises, and only `close` waits.

    Args:
        name: of the service.   project: that the run belongs to.   record: the run's config.
        start_step: the run continues from here; later rows that were sent before will be sent again.
    Raises:
        OSError: the workdir cannot be written, or no process can be started.
    """

    def __init__(self, name: str, workdir: pathlib.Path, project: str, record: Mapping, start_step: int):
        self._name, self._path = name, workdir / "trackers" / f"{name}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._state = json.loads(self._path.read_text(encoding="utf-8"))
            self._state["sent"] = min(self._state["sent"], start_step)
        else:
            slug = re.sub(r"[^\w.-]+", "-", workdir.absolute().name)
            self._state = {"id": f"{slug}-{uuid.uuid4().hex[:8]}", "sent": -1}
            write_json(self._path, self._state)
        self._last = self._state["sent"]
        self._queue: queue.Queue[dict | None] = queue.Queue(_MOST_ROWS)
        self._is_behind = False
        settings = {"id": self._state["id"], "project": project, "directory": str(workdir.absolute()), "config": dict(record)}
        package = str(pathlib.Path(__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "voxcpm2_jax.trackers", name], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        rows = _rows_after(workdir / "metrics.jsonl", self._state["sent"])
        self._threads = [
            threading.Thread(target=self._feed, args=(settings, rows), daemon=True),
            threading.Thread(target=self._listen, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def send(self, row: Mapping, media: Mapping[str, tuple] | None = None) -> None:
        """Sends a row.

        Args:
            media: name -> (array, Hz of audio or None for a picture).
        """
        self._last = row["step"]
        self._put({"row": dict(row), "media": {name: (_packed(x), hz) for name, (x, hz) in (media or {}).items()}})

    def close(self) -> None:
        """Waits CLOSE_SEC at most for the service, and says if it did not get everything."""
        end = time.monotonic() + CLOSE_SEC
        self._put(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SEC)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join(max(0.0, end + 1.0 - time.monotonic()))
        if self._state["sent"] < self._last:
            left = "nothing was sent" if self._state["sent"] < 0 else f"steps after {self._state['sent']} were not sent"
            print(f"{self._name}: {left}; metrics.jsonl has all rows, and the next start sends them", file=sys.stderr)

    def _put(self, message: dict | None) -> None:
        if self._is_behind:  # no row after a gap, so that the next start knows where to go on
            return
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._is_behind = True
            print(f"{self._name} is {_MOST_ROWS} rows behind: it gets no more until the next start", file=sys.stderr)

    def _feed(self, settings: dict, rows: Iterator[dict]) -> None:
        messages = itertools.chain([settings], ({"row": row, "media": {}} for row in rows), iter(self._queue.get, None))
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # the process may have ended
            for message in messages:
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._state["sent"] = int(line)
            with contextlib.suppress(OSError):
                write_json(self._path, self._state)


def _rows_after(path: pathlib.Path, step: int) -> Iterator[dict]:
    """The rows that metrics.jsonl has now, after a step; they are read while they are taken."""
    size = path.stat().st_size if path.exists() else 0

    def rows():
        with path.open("rb") as file:
            while file.tell() < size:
                row = json.loads(file.readline())
                if row["step"] > step:
                    yield row

    return rows() if size else iter(())


def _packed(array) -> str:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return base64.b64encode(file.getvalue()).decode()


# ---- the services, in their processes --------------------------------------------------------------------------------


class _Wandb:
    def __init__(self, settings: dict):
        import wandb

        self._package = wandb
        self._run = wandb.init(
            project=settings["project"], id=settings["id"], name=settings["id"], resume="allow", dir=settings["directory"],
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._run.config.update(settings["config"], allow_val_change=True)
        # W&B's own step never goes back, as that of a run does which continues from its last checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.place = self._run.url or self._run.dir

    def log(self, step: int, figures: dict) -> None:
        self._run.log({"step": step} | figures)

    def log_media(self, step: int, name: str, array: np.ndarray, hz: int | None) -> None:
        kind = self._package.Audio(array, sample_rate=hz) if hz else self._package.Image(array)
        self._run.log({"step": step, name: kind})

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, settings: dict):
        import trackio

        self._package = trackio
        self._run = trackio.init(
            project=settings["project"], name=settings["id"], resume="allow", config=settings["config"], embed=False,
            auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip
        self.place = f"trackio show --project {settings['project']}"

    def log(self, step: int, figures: dict) -> None:
        self._package.log(figures, step=step)

    def log_media(self, step: int, name: str, array: np.ndarray, hz: int | None) -> None:
        if hz:
            media = self._package.Audio((32767 * np.clip(array, -1, 1)).astype(np.int16), sample_rate=hz)
        else:
            media = self._package.Image(np.broadcast_to(array, (*array.shape[:2], 3)))
        self._package.log({name: media}, step=step)

    def finish(self) -> None:
        self._package.finish()


class _MLflow:
    def __init__(self, settings: dict):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need more packages and seconds to make
        os.environ.setdefault("MLFLOW_TRACKING_URI", pathlib.Path(settings["directory"], "mlruns").as_uri())
        import mlflow

        self._package = mlflow
        self._client = client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(settings["project"])
        number = experiment.experiment_id if experiment else client.create_experiment(settings["project"])
        found = client.search_runs([number], f"attributes.run_name = '{settings['id']}'")
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(number, run_name=settings["id"]).info.run_id
            fields = [mlflow.entities.Param(name, str(value)[:500]) for name, value in _flat(settings["config"])]
            for start in range(0, len(fields), 100):  # as many as a request may have
                client.log_batch(self._id, params=fields[start : start + 100])
        self.place = f"{mlflow.get_tracking_uri()}, experiment {settings['project']}, run {settings['id']}"

    def log(self, step: int, figures: dict) -> None:
        now, Metric = int(1000 * time.time()), self._package.entities.Metric
        # MLflow refuses other characters, and its files cannot hold both "loss" and "loss/language".
        names = {name: re.sub(r"[^\w\-. :]", "_", name.replace("/", ".")) for name in figures}
        found = [Metric(names[name], value, now, step) for name, value in figures.items()]
        for start in range(0, len(found), 1000):  # as many as a request may have
            self._client.log_batch(self._id, metrics=found[start : start + 1000])

    def log_media(self, step: int, name: str, array: np.ndarray, hz: int | None) -> None:
        if hz is None:
            self._client.log_image(self._id, array, artifact_file=f"{name}/{step:08d}.png")
            return
        import tempfile

        import soundfile

        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / f"{step:08d}.wav"
            soundfile.write(path, array, hz)
            self._client.log_artifact(self._id, str(path), artifact_path=name)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


def _flat(tree: Mapping, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _log_media(service, name: str, step: int, media: Mapping[str, tuple]) -> bool:
    """Logs audio and pictures; False if that fails, which must not end the numbers."""
    try:
        for key, (data, hz) in media.items():
            service.log_media(step, key, np.load(io.BytesIO(base64.b64decode(data))), hz)
    except Exception as error:  # of any kind: the package's own
        print(f"{name} gets no audio and pictures: {_line(error)}", file=sys.stderr, flush=True)
        return False
    return True


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


SERVICES = {"wandb": _Wandb, "trackio": _Trackio, "mlflow": _MLflow}


def _child(name: str) -> None:
    """Logs what comes on standard input; answers each row with its step on standard output."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the training decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the packages print there
    settings, takes_media = json.loads(sys.stdin.readline()), True
    try:
        service = SERVICES[name](settings)
        print(f"{name}: {service.place}", file=sys.stderr, flush=True)
        for line in sys.stdin:
            message = json.loads(line)
            row = message["row"]
            step = row.pop("step")
            service.log(step, {key: value for key, value in row.items() if isinstance(value, int | float)})
            if takes_media:
                takes_media = _log_media(service, name, step, message["media"])
            print(step, file=answers, flush=True)
        service.finish()
    except Exception as error:  # of any kind: the package's own
        print(f"{name} is given up: {_line(error)}", file=sys.stderr, flush=True)
        os._exit(1)  # the package's own hooks may wait


if __name__ == "__main__":
    _child(sys.argv[1])
