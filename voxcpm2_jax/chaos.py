"""Faults, injected into real child processes of `voxcpm2-jax train`, on the CPU of this machine, whose results are compared
with those of a run left in peace.

    kills        SIGKILL during start-up, at a step, during a save; the run goes on each time, and ends as the other did
    signals      SIGTERM, SIGINT: saved, exit code 75;  a second one: out at once, nothing durable harmed
    processes    1 -> 2 -> 4 -> 1, each stopped by a signal to any one;  one of two killed: the other does not wait for ever
    files        the newest checkpoint truncated, thinned out, altered, mixed up;  a shard altered;  a disk that is full
    numbers      latents that are not finite: skipped;  two batches in a row: back to the last checkpoint, and past them

The run is made short and full of borders: gradient accumulation, averaged weights, a WSD schedule that begins to decay, a
second stage and an epoch's end all lie within its 40 updates, between saves every 5. "Equal" is every array of the last
checkpoint, bit for bit, and every row of metrics.jsonl but its clocks; across numbers of processes, losses to `_CLOSE`.

    lost steps   updates that were done and had to be done again: at most those since the last save, for each fault
    lost data    saves that were on disk and were not gone on from, rows missing or twice, clips that were not heard: 0

Faults come about from outside alone: signals, limits, files. Nothing in the training code knows of them.
"""

import contextlib
import copy
import dataclasses
import hashlib
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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from voxcpm2_jax import checkpoint, sharding, torch_io
from voxcpm2_jax.config import (
    AudioVAEConfig,
    BackboneRun,
    BatchConfig,
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    SampleConfig,
    StageConfig,
    ValidationConfig,
    WatchdogConfig,
    to_dict,
)
from voxcpm2_jax.data import packing, pipeline
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.tokenizer import train_tokenizer
from voxcpm2_jax.train import backbone, loop
from voxcpm2_jax.vae import autoencoder

_STEPS, _SAVE_EVERY = 40, 5
_CLOSE = 1e-6  # relative, of losses on another number of processes
_PATIENCE_SEC = 600.0  # for anything that a child is waited for
_MOST_AT_ONCE = 4  # faults under way at the same time, a core for each
_CLOCKS = re.compile(r".*_per_sec|step_sec|data_wait_sec|checkpoint_sec|goodput|mfu")
_DAMAGES = ("truncated", "missing", "bit flipped", "foreign")


class Fault(NamedTuple):
    """A line of the table."""

    fault: str
    injected: int
    survived: int
    lost_steps: int = 0
    lost_data: int = 0
    note: str = ""  # what went otherwise than it should, or how long it took


class _Outcome(NamedTuple):
    problems: Sequence[str]  # none: the fault was survived
    note: str = ""
    lost_steps: int = 0
    lost_data: int = 0


def chaos(run: BackboneRun, workdir=None, *, kills: int = 20, seed: int = 0, quick: bool = False) -> dict:
    """Runs everything -> {"ok", "faults": the table, ..}; a line on standard error for each fault as it is done.

    Args:
        run: gives the model.   workdir: absent or empty; None: a temporary one, removed if all went well.
        kills: SIGKILLs at random moments.   seed: of these moments, and of which bit is flipped.
        quick: three kills, and one of each kind of the rest.
    """
    directory = pathlib.Path(workdir or tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    lab = _Lab(_lively(run), directory.absolute())
    begin = time.monotonic()
    _say(f"a run left in peace, {_STEPS} updates, in {lab.directory}")
    lab.finish(lab.peace)
    trials: list[tuple[str, int, Callable]] = [
        *(
            (f"SIGKILL during {', '.join(kinds)}", n, partial(_kills, kinds=kinds, kills=n))
            for kinds, n in _shares(kills, quick)
        ),
        *((name, 1, partial(_signal, name=name)) for name in (("SIGTERM",) if quick else ("SIGTERM", "SIGINT"))),
        ("SIGTERM twice", 1, _second_signal),
        *(
            (f"{' -> '.join(map(str, n))} processes", len(n) - 1, partial(_processes, numbers=n))
            for n in ((1, 2, 1) if quick else (1, 2, 4, 1),)
        ),
        *(
            (f"newest checkpoint {how}", 1, partial(_damaged_checkpoint, how=how))
            for how in (_DAMAGES[2:3] if quick else _DAMAGES)
        ),
        ("bit flipped in a data shard", 1, _altered_shard),
        ("disk full during a save", 1, _full_disk),
        ("latents that are not finite, in 3 batches", 3, _bad_numbers),
        # After the others: by then the program of two processes is compiled.
        *(
            (f"SIGKILL of the {('first', 'second')[n]} of two processes", 1, partial(_killed_peer, victim=n))
            for n in ((0,) if quick else (0, 1))
        ),
    ]

    def attempt(number: int) -> Fault:
        name, injected, trial = trials[number]
        try:
            outcome = trial(lab.branch(np.random.default_rng((seed, number))))
        except _Fell as fell:
            outcome = _Outcome([str(fell)])
        text = "; ".join(" ".join(problem.split()) for problem in outcome.problems)[:500] or outcome.note
        survived = 0 if outcome.problems else injected
        fault = Fault(name, injected, survived, outcome.lost_steps, outcome.lost_data, text)
        _say(_line(fault))
        return fault

    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_AT_ONCE)) as pool:
        try:
            faults = list(pool.map(attempt, range(len(trials))))
        except BaseException:
            lab.stop()
            raise
    ok = all(fault.survived == fault.injected and not fault.lost_data for fault in faults)
    if ok and workdir is None:
        shutil.rmtree(directory)
    return {
        "ok": ok,
        "injected": sum(fault.injected for fault in faults),
        "survived": sum(fault.survived for fault in faults),
        "lost_steps": sum(fault.lost_steps for fault in faults),
        "lost_data": sum(fault.lost_data for fault in faults),
        "sec": round(time.monotonic() - begin, 1),
        "faults": [fault._asdict() for fault in faults],
    }


def show(result: dict) -> None:
    """The table, on standard error."""
    header = Fault("fault", "injected", "survived", "lost steps", "lost data", "")
    for line in (header, *(Fault(**fault) for fault in result["faults"])):
        _say(_line(line))
    _say(f"{result['survived']} of {result['injected']} survived in {result['sec']:.0f} s")


def _line(fault: Fault) -> str:
    return f"{fault.fault:44} {fault.injected:>8} {fault.survived:>8} {fault.lost_steps:>10} {fault.lost_data:>9}  {fault.note}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lively(run: BackboneRun) -> BackboneRun:
    """The same model in a run that has everything in it."""
    slots = min(64, run.batch.slots)
    return dataclasses.replace(
        run,
        num_steps=_STEPS,
        batch=BatchConfig(rows=8, slots=slots, patches=5 * slots // 8),
        accumulate=2,
        mesh=(1, -1, 1),
        optim=dataclasses.replace(
            run.optim, warmup_steps=5, schedule="wsd", schedule_steps=_STEPS, decay_fraction=0.5, ema_decay=0.9
        ),
        stages=(StageConfig(), StageConfig(first_step=22, min_sec=1.0)),
        checkpoint=CheckpointConfig(every_steps=_SAVE_EVERY, keep=3),
        log=LogConfig(every_steps=1),
        guard=GuardConfig(window=16, max_in_a_row=2),
        watchdog=WatchdogConfig(slow_sec=_PATIENCE_SEC, action="exit"),
        samples=SampleConfig(),
        validation=ValidationConfig(every_steps=0),
    )


def _shares(kills: int, quick: bool) -> list[tuple[tuple[str, ...], int]]:
    """How many kills, by the moments that they come at in turn."""
    if quick:
        return [(("start-up", "a step", "a save"), 3)]
    start, save = -(-kills // 4), -(-kills // 4)
    return [(("start-up",), start), (("a step",), kills - start - save), (("a save",), save)]


# ---- children --------------------------------------------------------------------------------------------------------


class _Child:
    """A process of `voxcpm2-jax train`."""

    def __init__(self, command: Sequence[str], env: dict, log: pathlib.Path):
        self._log = log
        with log.open("w") as file:
            self._popen = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    @property
    def start(self) -> int | None:
        """The step it went on from; None: it has not come so far."""
        found = re.search(r"starting from (?:step (\d+)|scratch)", self.said)
        return found and int(found[1] or 0)

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def limit(self, size: int) -> None:
        """No file of it may grow beyond that many bytes."""
        resource.prlimit(self._popen.pid, resource.RLIMIT_FSIZE, (size, size))

    def wait(self, timeout_sec: float = _PATIENCE_SEC) -> int:
        """Exit code; the negative number of a signal that ended it."""
        return self._popen.wait(timeout_sec)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


class _Lab:
    """Starts children and compares what they leave with what the run in peace left."""

    def __init__(self, run: BackboneRun, directory: pathlib.Path):
        self.run, self.directory = run, directory
        self.rng = np.random.default_rng(0)
        self.peace = directory / "peace"
        self.start_sec = 0.0  # from a child's start to its first step, with everything compiled
        (directory / "logs").mkdir()
        (directory / "run.json").write_text(json.dumps(to_dict(run)))
        (directory / "run.py").write_text(
            "import json, pathlib\nfrom ml_collections import ConfigDict\n\n"
            "def get_config():\n    return ConfigDict(json.loads(pathlib.Path(__file__).with_name('run.json').read_text()))\n"
        )
        self._count = 0
        self._running: set[_Child] = set()
        self._is_over = threading.Event()
        self._comparing = threading.Lock()  # one at a time, for memory

    def branch(self, rng: np.random.Generator) -> "_Lab":
        """The same lab for one of several faults that are under way at once, with random moments of its own."""
        lab = copy.copy(self)
        lab.rng = rng
        return lab

    def stop(self) -> None:
        """Ends what runs in it and in its branches, and lets nothing new begin."""
        self._is_over.set()
        for child in list(self._running):
            child.kill()

    @contextlib.contextmanager
    def children(self, workdir, *arguments: str, num: int = 1) -> Iterator[list[_Child]]:
        """Starts a run of `num` processes; what still runs at the end is killed."""
        command = [sys.executable, "-m", "voxcpm2_jax", "train", f"--config={self.directory / 'run.py'}"]
        command += [f"--workdir={workdir}", *arguments]
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1",
            "PYTHONPATH": f"{pathlib.Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
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
                if self._is_over.is_set():
                    raise _Fell("stopped")
                self._count += 1
                log = self.directory / "logs" / f"{self._count:03d}_{pathlib.Path(workdir).name}.txt"
                started.append(_Child(command, env | {"JAX_PROCESS_ID": str(i)}, log))
                self._running.add(started[-1])
            yield started
        finally:
            for child in started:
                child.kill()
                self._running.discard(child)

    def finish(self, workdir, *arguments: str, num: int = 1) -> str:
        """Lets a run come to its end -> what its first process said, or raises."""
        begin = time.monotonic()
        with self.children(workdir, *arguments, num=num) as children:
            codes = [child.wait() for child in children]
            if any(codes):
                raise _Fell(f"exit codes {codes}: {children[0].said[-2000:]}")
            self.start_sec = max(time.monotonic() - begin - 1.0, 1.0)
            return children[0].said

    def until(self, condition: Callable[[], object], children: Sequence[_Child]) -> bool:
        """Waits for something to happen -> whether it did before a child ended."""
        end = time.monotonic() + _PATIENCE_SEC
        while not condition():
            if not all(child.is_running for child in children):
                return bool(condition())
            if time.monotonic() > end:
                raise _Fell(f"nothing happened for {_PATIENCE_SEC:.0f} s: {children[0].said[-2000:]}")
            time.sleep(0.01)
        return True

    def differences(self, workdir, *, peace=None, arrays: bool = True, close: float = 0.0, steps: int = _STEPS) -> list[str]:
        """What is otherwise than in the run in peace."""
        peace = peace or self.peace
        rows, expected = rows_of(workdir), rows_of(peace)[:steps]
        found = [] if [row["step"] for row in rows] == list(range(1, steps + 1)) else ["steps missing or twice"]
        for row, other in zip(rows, expected):
            for name in (name for name in row.keys() | other.keys() if not _CLOCKS.fullmatch(name)):
                a, b = row.get(name), other.get(name)
                if close and name not in ("loss", "loss_diff", "loss_stop", "slots", "patches", "targets", "skipped"):
                    continue
                if a != b and not (a is not None and b is not None and abs(a - b) <= close * abs(b)):
                    found.append(f"{name} of step {row['step']}: {a} instead of {b}")
        if arrays:
            shapes = jax.eval_shape(partial(backbone.init_state, self.run))
            place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            layout = sharding.abstract(shapes, jax.tree.map(lambda _: place, shapes))
            with self._comparing:
                (state, meta), (other, expected_meta) = (
                    checkpoint.restore(checkpoint.step_directory(path), layout) for path in (workdir, peace)
                )
            found += [
                f"{jax.tree_util.keystr(path)} differs"
                for (path, x), y in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(other))
                if not np.array_equal(x, y)
            ]
            found += [] if meta["data"] == expected_meta["data"] else ["not the same clips were heard"]
        return found

    def copy(self, name: str) -> pathlib.Path:
        """The finished run in peace, in another directory."""
        shutil.copytree(self.peace, self.directory / name)
        return self.directory / name


class _Fell(RuntimeError):  # noqa: N818
    """A child did not do what it should; the fault is not survived."""


def rows_of(workdir, newest: int = 0) -> list[dict]:
    """The rows of metrics.jsonl that are whole; all of them, or some of the newest."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in [line for line in lines if line.endswith("\n")][-newest:]]


def _newest(workdir) -> int:
    """Step of the last row of metrics.jsonl; 0 without one."""
    rows = rows_of(workdir, newest=1)
    return rows[0]["step"] if rows else 0


def _saved(workdir) -> list[int]:
    """Steps that are whole on disk."""
    directory = pathlib.Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


# ---- the faults ------------------------------------------------------------------------------------------------------


def _kills(lab: _Lab, *, kinds: Sequence[str], kills: int) -> _Outcome:
    """Kills a run again and again, at each kind of moment in turn, and lets it come to its end."""
    problems, lost_steps, lost_data, done, lap = [], 0, 0, 0, 0
    while not problems and (done < kills or not lap):
        workdir = lab.directory / f"killed_{'_'.join(kinds).replace(' ', '_')}_{lap}"
        saved = last = 0  # newest save and newest row of the life before
        is_over = False
        while not is_over:
            with lab.children(workdir) as (child,):
                if done < kills:
                    _await(lab, kinds[done % len(kinds)], workdir, child)
                    is_over = not child.is_running
                    done += not is_over
                else:
                    child.wait()
                    is_over = True
            if child.start is not None:
                lost_steps += max(last - child.start, 0)
                lost_data += child.start < saved
            saved, last = max(_saved(workdir), default=0), _newest(workdir)
        problems = lab.differences(workdir)
        lap += 1
    return _Outcome(problems, lost_steps=lost_steps, lost_data=lost_data)


def _await(lab: _Lab, kind: str, workdir, child: _Child) -> None:
    """Waits for a random moment of that kind."""
    if kind == "start-up":
        time.sleep(lab.rng.uniform(0, lab.start_sec))
        return
    if not lab.until(lambda: child.start is not None, [child]):
        return
    start = child.start
    if kind == "a step":
        goal = start + int(lab.rng.integers(1, _SAVE_EVERY + 4))
        lab.until(lambda: _newest(workdir) >= goal, [child])
        time.sleep(lab.rng.uniform(0, 0.1))
        return
    directory = pathlib.Path(workdir) / "checkpoints"
    lab.until(lambda: any(not path.name.isdecimal() for path in directory.glob("*")) or max(_saved(workdir), default=0) > start,
              [child])  # fmt: skip
    time.sleep(lab.rng.uniform(0, 0.05))


def _signal(lab: _Lab, *, name: str) -> _Outcome:
    """At a random step; it has to be saved, and told by the exit code."""
    workdir = lab.directory / f"stopped_by_{name}"
    problems = []
    with lab.children(workdir) as (child,):
        goal = int(lab.rng.integers(2, _STEPS // 2))
        lab.until(lambda: _newest(workdir) >= goal, [child])
        begin = time.monotonic()
        child.send(signal.Signals[name])
        code, sec = child.wait(), time.monotonic() - begin
        last = _newest(workdir)
        if code != 75 or max(_saved(workdir), default=0) < last:
            problems.append(f"exit code {code}, step {last} done, saved {_saved(workdir)}: {child.said[-500:]}")
    lab.finish(workdir)
    return _Outcome(problems + lab.differences(workdir), f"saved and gone {sec:.1f} s after it")


def _second_signal(lab: _Lab) -> _Outcome:
    workdir = lab.directory / "stopped_twice"
    problems = []
    with lab.children(workdir) as (child,):
        lab.until(lambda: _newest(workdir) >= _SAVE_EVERY + 2 and _saved(workdir), [child])
        saved = max(_saved(workdir))
        child.send(signal.SIGTERM)
        lab.until(lambda: "stops at once" in child.said, [child])
        time.sleep(loop.ECHO_SEC)
        begin = time.monotonic()
        child.send(signal.SIGTERM)
        code, sec = child.wait(), time.monotonic() - begin
        last = _newest(workdir)
        if code not in (128 + signal.SIGTERM, 75):  # 75: it was saved before the second came
            problems.append(f"exit code {code}: {child.said[-500:]}")
    with lab.children(workdir) as (child,):
        if child.wait():
            problems.append(child.said[-1000:])
        lost_data = int(child.start is None or child.start < saved)
        lost_steps = max(last - (child.start or 0), 0)
    problems += lab.differences(workdir)
    note = "all was saved before the second came" if code == 75 else f"gone {sec:.1f} s after the second"
    return _Outcome(problems, note, lost_steps, lost_data)


def _processes(lab: _Lab, *, numbers: Sequence[int]) -> _Outcome:
    """Each number of processes for a while; a signal to any one of them stops all between the same two steps."""
    workdir, problems, steps = lab.directory / "processes", [], 4 * len(numbers)
    for turn, num in enumerate(numbers[:-1]):
        with lab.children(workdir, num=num) as children:
            lab.until(lambda goal=4 * (turn + 1) - 1: _newest(workdir) >= goal, children)
            children[int(lab.rng.integers(num))].send(signal.SIGTERM)
            codes = [child.wait() for child in children]
            if set(codes) != {75}:
                problems.append(f"{num} processes: exit codes {codes}: {children[0].said[-1000:]}")
    steps = max(steps, _newest(workdir) + 2)
    lab.finish(workdir, f"--config.num_steps={steps}", num=numbers[-1])
    problems += lab.differences(workdir, arrays=False, close=_CLOSE, steps=steps)
    return _Outcome(problems)


def _killed_peer(lab: _Lab, *, victim: int) -> _Outcome:
    """One of two; the other has to end by itself, for a launcher to start both again."""
    workdir, problems, steps = lab.directory / f"killed_peer_{victim}", [], 2 * _SAVE_EVERY
    with lab.children(workdir, num=2) as children:
        lab.until(lambda: _newest(workdir) > _SAVE_EVERY and _saved(workdir), children)
        children[victim].send(signal.SIGKILL)
        begin = time.monotonic()
        try:
            code = children[1 - victim].wait(sharding.LOST_SEC + 60)
        except subprocess.TimeoutExpired:
            problems.append(f"the other still runs after {sharding.LOST_SEC + 60:.0f} s: {children[1 - victim].said[-500:]}")
            code = 1
        sec = time.monotonic() - begin
        if not code:
            problems.append("the other ended as if all were well")
        last = _newest(workdir)
    said = lab.finish(workdir, f"--config.num_steps={steps}", num=2)
    start = int(re.search(r"starting from step (\d+)", said)[1])
    problems += lab.differences(workdir, arrays=False, close=_CLOSE, steps=steps)
    return _Outcome(problems, f"the other gone after {sec:.1f} s", lost_steps=last - start)


def _damaged_checkpoint(lab: _Lab, *, how: str) -> _Outcome:
    """It has to be named, and the one before it gone on from."""
    workdir = lab.copy(f"checkpoint_{how.replace(' ', '_')}")
    newest, older = (workdir / "checkpoints" / str(step) for step in (_STEPS, _STEPS - _SAVE_EVERY))
    file = max((path for path in (newest / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "missing":
        file.unlink()
    elif how == "bit flipped":
        place = int(lab.rng.integers(len(content)))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:  # the older step's parameters under the newer one's name
        shutil.rmtree(newest / "params")
        shutil.copytree(older / "params", newest / "params")
    said = lab.finish(workdir)
    problems = [] if f"DAMAGED CHECKPOINT {newest}" in said else [f"it was not named: {said[-1000:]}"]
    problems += [] if f"starting from step {_STEPS - _SAVE_EVERY} of" in said else ["the one before was not used"]
    return _Outcome(problems + lab.differences(workdir), lost_steps=_SAVE_EVERY)


def _full_disk(lab: _Lab) -> _Outcome:
    """A limit on the size of files, set while the run is under way: the next save fails. The older one has to be whole."""
    workdir, problems = lab.directory / "full_disk", []
    with lab.children(workdir) as (child,):
        lab.until(lambda: bool(_saved(workdir)), [child])
        limit = 4 * (workdir / "metrics.jsonl").stat().st_size  # rows still fit, and parameters do not
        child.limit(max(limit, 1 << 18))
        code = child.wait()
        saved, last = max(_saved(workdir)), _newest(workdir)
        if code != 1 or "could not be saved" not in child.said or f"step {saved} is whole" not in child.said:
            problems.append(f"exit code {code}: {child.said[-1000:]}")
    said = lab.finish(workdir)
    lost_data = int(f"starting from step {saved} of" not in said)
    problems += lab.differences(workdir)
    return _Outcome(problems, lost_steps=last - saved, lost_data=lost_data)


# ---- data ------------------------------------------------------------------------------------------------------------


def _write_shards(lab: _Lab, directory: pathlib.Path, clips: packing.Source, poisoned: Sequence[int] = ()) -> pathlib.Path:
    """Shards of these clips; the latents of poisoned ones are not finite."""
    model = lab.run.model
    vae = AudioVAEConfig(
        encoder_dim=2, encoder_rates=(20, 32), latent_dim=model.feat_dim, decoder_dim=16, decoder_rates=(48, 40)
    )
    shapes = jax.eval_shape(lambda key: autoencoder.init(key, vae), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)  # never heard
    torch_io.save_codec(directory, vae, params)
    train_tokenizer(["one two three"] * 9, 288).save(directory / "tokenizer")

    def poison(i: int) -> packing.Clip:
        return clips[i]._replace(patches_MPC=np.full_like(clips[i].patches_MPC, np.nan)) if i in poisoned else clips[i]

    pipeline.write_shard(directory / "all.array_record", map(poison, range(len(clips))), "float16")
    np.save(directory / pipeline.LENGTHS_FILE, clips.index.lengths)
    channels = model.feat_dim
    header = pipeline.Header(
        num_clips=len(clips), hours=1.0, patch_size=model.patch_size, latent_dim=channels, patch_sec=lab.run.patch_sec,
        encoder_hz=vae.sample_rate, decoder_hz=vae.out_sample_rate, codec_sha256=torch_io.codec_sha256(params, vae),
        tokenizer_sha256=hashlib.sha256((directory / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
        vocab_size=model.lm_config.vocab_size, groups=clips.index.groups, latent_dtype="float16",
        latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels, latent_min=(-4.0,) * channels,
        latent_max=(4.0,) * channels, shards=("all.array_record",), trim_db=-50.0, trim_keep_ms=200.0, sources=("chaos",),
        sources_sha256="", crc32={pipeline.LENGTHS_FILE: pipeline.crc32(directory / pipeline.LENGTHS_FILE)},
    )  # fmt: skip
    pipeline.write_header(directory, header)
    return directory


def _corpus(run: BackboneRun, num_clips: int) -> packing.Source:
    """Clips that a model of this shape can learn."""
    return packing.synthetic_corpus(
        run.seed, num_clips=num_clips, vocab_size=run.model.lm_config.vocab_size, patch_sec=run.patch_sec,
        patch_shape=(run.model.patch_size, run.model.feat_dim), max_patches=run.batch.slots // 2,
    )  # fmt: skip


def _altered_shard(lab: _Lab) -> _Outcome:
    """One bit of one clip: the run must not train on it, and has to name file and clip."""
    shards = _write_shards(lab, lab.directory / "shards_altered", _corpus(lab.run, 64))  # all are heard within a few updates
    file = shards / "all.array_record"
    content = file.read_bytes()
    place = int(lab.rng.integers(len(content) // 4, len(content) // 2))  # amid the records
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    workdir, problems = lab.directory / "altered_shard", []
    with lab.children(workdir, f"--data={shards}") as (child,):
        code = child.wait()
        if code != 2 or not re.search(rf"error: {re.escape(str(file))}: clip \d+ .* cannot be read", child.said):
            problems.append(f"exit code {code}: {child.said[-1000:]}")
    return _Outcome(problems)


def _bad_numbers(lab: _Lab) -> _Outcome:
    """Clips whose latents are not finite: one in a batch is skipped, two batches in a row are gone back from.

    The run in peace is one that comes to its end by itself; beside it stands one that is killed after it went back.
    """
    run, problems = lab.run, []
    corpus = _corpus(run, 4096)  # none is heard twice
    mix = Mix(run.seed, corpus.index, run.patch_sec, run.batch, run.stages)
    alone, pair = 7, (12, 13)  # batches; saves at 5 and 10 lie before them
    poisoned = {batch: mix.rows(batch)[0][0].clip for batch in (alone, *pair)}
    heard = [draw.clip for step in range(_STEPS) for row in mix.rows(step) for draw in row]
    assert all(heard.count(clip) == 1 for clip in poisoned.values()), "a poisoned clip comes once"
    shards = _write_shards(lab, lab.directory / "shards_poisoned", corpus, tuple(poisoned.values()))
    peace, workdir = lab.directory / "poisoned", lab.directory / "poisoned_and_killed"
    said = lab.finish(peace, f"--data={shards}")
    if f"step {alone + 1}: update skipped, 1 in a row: not finite" not in said or f":{poisoned[alone]}" not in said:
        problems.append("the skipped update or its clip was not named")
    over = [json.loads(line) for line in (peace / "stepped_over.jsonl").read_text().splitlines()]
    if [line["batch"] for line in over] != list(pair) or not all(
        any(clip.endswith(f":{poisoned[line['batch']]}") for clip in line["clips"]) for line in over
    ):
        problems.append(f"passed over: {[line['batch'] for line in over]} instead of {list(pair)}")
    if rows_of(peace)[-1]["skipped"] != 3 or rows_of(peace)[-1]["loss"] is None:
        problems.append(f"the last row counts {rows_of(peace)[-1]['skipped']} skipped updates instead of 3")
    with lab.children(workdir, f"--data={shards}") as (child,):
        lab.until(lambda: "passing over batches" in child.said, [child])
        child.kill()
    lab.finish(workdir, f"--data={shards}")
    problems += lab.differences(workdir, peace=peace)
    back = pair[-1] + 1 - _SAVE_EVERY * (pair[0] // _SAVE_EVERY)
    return _Outcome(problems, "2 passed over after a way back", lost_steps=back)
