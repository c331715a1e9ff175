"""The workdir of a training run in a bucket: written to the local disk, and uploaded while training continues.

    run -> CACHE/workdirs/PROCESS/gs/BUCKET/RUN -> gs://BUCKET/RUN

The bucket is the truth. A run that starts makes the local directory equal to it: what was not uploaded is lost, as if it had
not been written. Of older checkpoints only the JSON part is copied; a step is copied when the run starts from it.

A step is uploaded by the thread that writes it, before it gets its number, so "saved" means saved in the bucket. Its
checksums.json is the mark of a complete step: uploaded last, deleted first. What a killed upload leaves has no mark, is never
read, and is deleted at the next start. All other files are uploaded before each mark, and whenever they have changed.

Several processes need no disk in common. Each has a directory of its own, writes what its devices hold in files that no other
process writes, and uploads these and then their checksums. The first process waits until the checksums of all others are in the
bucket, then writes the mark. It alone uploads the files beside the checkpoints. Every process copies the whole step that a run
starts from.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time

import jax

from voxcpm2_jax.buckets import cache, store
from voxcpm2_jax.buckets.stage import fetch
from voxcpm2_jax.checkpoint import staged
from voxcpm2_jax.checkpoint.integrity import CHECKSUMS_FILE, Sealed
from voxcpm2_jax.checkpoint.steps import META
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.files import replace_file

SYNC_SEC = 30.0  # between two looks at what has changed
PARTS_SEC = 3600.0  # how long the first process waits for the others' part of a step

_NOT_UPLOADED = ("checkpoints", "compiled")
_TEMPORARY = re.compile(r"(^|/)\.[^/]*[0-9a-f]{32}")  # files.aside
_OF_FIRST = re.compile(r"meta/.*|[^/]+|[^/]+/(_METADATA|_sharding|commit_success.txt)")  # every process writes the same


class Mirror(os.PathLike):
    """A workdir in a bucket; a context manager. As a path it is the local directory.

    Raises:
        UserError: no access to the bucket.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.process, self.num_processes = jax.process_index(), jax.process_count()
        self.path = cache.directory(f"workdirs/{self.process}", self.url)
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and time of the files as they were uploaded
        self._seen: set[int] = set()  # steps that were whole in the local directory
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_in_sync, name="bucket", daemon=True)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return self.url

    @property
    def _checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    def __enter__(self):
        found = store.objects(self.url)
        steps = staged.complete_steps(found)
        if self.process == 0:
            probe = ".may_be_written"  # found out before hours of training
            store.write(store.join(self.url, probe), b"")
            dead = [name for name in found if (number := staged.step_of(name)) is not None and number not in steps]
            store.delete(self.url, [probe, *dead])
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path != self._checkpoints:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self._checkpoints.iterdir() if self._checkpoints.is_dir() else ():
            if path.name not in map(str, steps):
                shutil.rmtree(path)
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        wanted = staged.wanted(dict.fromkeys(steps, (META,)))
        fetch(self.url, self.path, {name: x for name, x in found.items() if wanted(name)})
        self._uploaded = {name: _stamp(path) for name, path in self._beside().items()}
        self._seen = set(steps)
        if self.process == 0:
            self._thread.start()
        return self

    def __exit__(self, kind, error, _):
        self._is_closing.set()
        if self.process != 0:
            return
        self._thread.join()
        try:
            self.sync()
            self._prune()
        except UserError as failure:
            if kind is None:
                raise
            print(f"not uploaded: {failure}", file=sys.stderr, flush=True)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def fetch(self, step: int, *, again: bool = False) -> None:
        """Copies a step from the bucket; files of the right size are taken for copies, unless `again`."""
        url, target = f"{self.url}/checkpoints/{step}", self._checkpoints / str(step)
        found = store.objects(url)
        for path in target.rglob("*") if target.is_dir() else ():
            if not path.is_dir() and path.relative_to(target).as_posix() not in found:
                path.unlink()
        new = {name: x for name, x in found.items() if again or name == CHECKSUMS_FILE or _size(target / name) != x.size}
        size = sum(x.size for x in new.values())
        if size > 1 << 20:
            print(f"copying {url}: {len(new)} files, {size / 1e6:,.1f} MB", file=sys.stderr, flush=True)
        fetch(url, target, new)

    def commit(self, step: int, directory: pathlib.Path, sealed: Sealed) -> Sealed:
        """Uploads this process's part of a step, whose checksums are in `directory`; on the first process it returns when
        the step is complete in the bucket -> `sealed`, with the bytes of all processes."""
        url = f"{self.url}/checkpoints/{step}"
        paths = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
        mark = paths.pop(CHECKSUMS_FILE)
        if self.process != 0:
            paths = {name: path for name, path in paths.items() if not _OF_FIRST.fullmatch(name)}
            store.upload(url, paths)
            sums = json.loads(mark.read_text(encoding="utf-8"))
            sums["files"] = {name: x for name, x in sums["files"].items() if name in paths}
            store.write(f"{url}/{_part(self.process)}", json.dumps(sums).encode())
            return sealed
        store.upload(url, paths)
        if self.num_processes > 1:
            sums = json.loads(mark.read_text(encoding="utf-8"))
            for part in self._parts(url):
                sums["files"] |= part["files"]
            replace_file(mark, json.dumps(sums, indent=0))
            sealed = sealed._replace(num_bytes=sum(size for size, _ in sums["files"].values()))
            store.delete(url, map(_part, range(1, self.num_processes)))
        self.sync()
        store.upload(url, {CHECKSUMS_FILE: mark})
        self._prune()
        return sealed

    def _parts(self, url: str) -> list[dict]:
        """Waits for the checksums of the other processes."""
        names, end = set(map(_part, range(1, self.num_processes))), time.monotonic() + PARTS_SEC
        while names - store.objects(url).keys():
            if time.monotonic() > end:
                raise UserError(f"{url}: another process has not uploaded its part of this step within {PARTS_SEC:.0f} s")
            time.sleep(1.0)
        return [json.loads(store.read(f"{url}/{name}")) for name in sorted(names)]

    def discard(self, step: int) -> None:
        """Deletes a step from the bucket; it may be saved again."""
        self._seen = self._seen - {step}
        if self.process == 0:
            url = f"{self.url}/checkpoints/{step}"
            store.delete(url, [CHECKSUMS_FILE])
            store.delete(url, store.objects(url))

    def _prune(self) -> None:
        """Deletes the steps that were whole here and were deleted here."""
        with self._lock:
            here = {int(path.name) for path in self._checkpoints.iterdir() if path.name.isdigit()}
            for step in self._seen - here:
                self.discard(step)
            self._seen = here

    # ---- files beside the checkpoints --------------------------------------------------------------------------------

    def sync(self) -> None:
        """Uploads the files that have changed since they were uploaded."""
        with self._lock, tempfile.TemporaryDirectory() as scratch:
            copies, stamps = {}, {}
            for number, (name, path) in enumerate(self._beside().items()):
                with contextlib.suppress(FileNotFoundError):  # replaced just now
                    stamp = _stamp(path)
                    if self._uploaded.get(name) != stamp:
                        # A copy, since files grow while they are read.
                        copies[name] = pathlib.Path(shutil.copyfile(path, pathlib.Path(scratch) / str(number)))
                        stamps[name] = stamp
            store.upload(self.url, copies)
            self._uploaded |= stamps

    def _beside(self) -> dict[str, pathlib.Path]:
        tops = [path for path in sorted(self.path.iterdir()) if path.name not in _NOT_UPLOADED]
        paths = [p for top in tops for p in ([top] if top.is_file() else sorted(top.rglob("*"))) if p.is_file()]
        names = {p.relative_to(self.path).as_posix(): p for p in paths}
        return {name: p for name, p in names.items() if not _TEMPORARY.search(name)}

    def _keep_in_sync(self) -> None:
        while not self._is_closing.wait(SYNC_SEC):
            try:
                self.sync()
                self._prune()
            except UserError as error:
                print(f"not uploaded, tried again in {SYNC_SEC:.0f} s: {error}", file=sys.stderr, flush=True)


def _part(process: int) -> str:
    return f".checksums.process_{process}.json"


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _size(path: pathlib.Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
