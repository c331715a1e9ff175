"""A process's claim on its share of `prepare`, so that no two processes make the same shard at the same time.

    OUTPUT/.host-0-of-4.0f3a....claim    who holds it, and a number that grows every five seconds

Hosts share nothing but the disk, and their clocks may differ. So a process that finds a claim on the same shards watches it.
If the number grows, its holder works, and the newcomer is refused. If it stands for three minutes, its holder was killed, and
the claim is removed. Whether a holder on the same machine was killed is known at once. A holder that stood still for so long
that its claim was removed ends before it renames another file.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from voxcpm2_jax import files
from voxcpm2_jax.config.plain import UserError

_BEAT_SEC = 5.0
_EXPIRY_SEC = 180.0  # network disks and mounted buckets show what another host wrote up to a minute late
_NAME = re.compile(r"\.host-(\d+)-of-(\d+)\.\w+\.claim")


@contextlib.contextmanager
def claim(directory: pathlib.Path, host: int, num_hosts: int) -> Iterator[Callable[[], None]]:
    """Holds the claim of host `host` of `num_hosts` while the block runs; yields a check that it still does.

    Raises:
        UserError: another process works on some of the same shards; from the check: the claim was removed.
    """
    path = directory / f".host-{host}-of-{num_hosts}.{uuid.uuid4().hex}.claim"
    holder = {"machine": socket.gethostname(), "pid": os.getpid(), "place": _place(), "started": _started(os.getpid())}
    ended = threading.Event()

    def beat():
        count = 0
        while not ended.wait(_BEAT_SEC):
            count += 1
            with contextlib.suppress(OSError), path.open("r+") as file:  # a new one is never made
                file.write(_content(count, holder))

    def check():
        if not path.exists():
            raise UserError(
                f"{directory}: this process stood still for {_EXPIRY_SEC:.0f} s or more, and another one took over "
                f"host {host} of {num_hosts}; it can be left to that one"
            )

    try:
        files.replace_file(path, _content(0, holder))
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
    beats = threading.Thread(target=beat, name="claim", daemon=True)
    beats.start()
    try:
        # Its own claim is there by now: of two processes that start together, at least one sees the other.
        for other in directory.glob(".host-*.claim"):
            if other != path and _shares(other, host, num_hosts):
                _outlast(other)
        yield check
    finally:
        ended.set()
        beats.join()
        path.unlink(missing_ok=True)


def _content(count: int, holder: dict) -> str:
    return json.dumps({"count": f"{count:012d}"} | holder)  # always of the same length: written over in place


def _shares(other: pathlib.Path, host: int, num_hosts: int) -> bool:
    """Whether a claim covers a shard that host `host` of `num_hosts` makes: those with numbers host, host + num_hosts, ..."""
    if not (match := _NAME.fullmatch(other.name)):
        return False
    other_host, other_num_hosts = map(int, match.groups())
    return (host - other_host) % math.gcd(num_hosts, other_num_hosts) == 0


def _outlast(other: pathlib.Path) -> None:
    """Removes the claim of a process that was killed; raises UserError if the process works."""
    first = _read(other)
    if first is None:
        return
    holder = json.loads(first)
    host, num_hosts = _NAME.fullmatch(other.name).groups()
    who = f"{other.parent}: host {host} of {num_hosts}, process {holder['pid']} on {holder['machine']}"
    is_here = holder["place"] == _place()
    if not is_here:
        print(f"{who}: waiting up to {_EXPIRY_SEC:.0f} s to see whether it works", file=sys.stderr, flush=True)
    end, works = time.monotonic() + _EXPIRY_SEC, is_here and holder["started"] == _started(holder["pid"])
    while not (works or is_here) and time.monotonic() < end:
        time.sleep(min(1.0, _BEAT_SEC))
        if (now := _read(other)) is None:
            return
        works = now != first
    if works:
        raise UserError(
            f"{who}, works on the same shards; give every process its own --config.host of --config.num_hosts, or stop that one"
        )
    other.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _place() -> str:
    """Where process ids have a meaning: one start of one machine, and one container."""
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _started(pid: int) -> str | None:
    """When a process of this machine was started, which tells it from a later one with the same id; None: it has ended."""
    text = _read(pathlib.Path(f"/proc/{pid}/stat"))
    fields = [] if text is None else text.rpartition(")")[2].split()
    return None if not fields or fields[0] in "ZX" else fields[19]
