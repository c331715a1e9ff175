"""Notices that a run is stuck, and says where.

A thread looks at the clock a few times a minute; the loop tells it what it is about to do. A step, or a wait for data,
that lasts longer than `factor` median steps is a stall: the stacks of all threads go to standard error, once. With
action "exit" the process then ends with code 1, as after any failure, for a launcher to start it again a limited number of
times: no state is saved, for there is none to be had from a thread that does not answer.
"""

import collections
import os
import statistics
import sys
import threading
import time
import traceback

from voxcpm2_jax.config.run import WatchdogConfig

EXIT_CODE = 1

_REMEMBERED_STEPS = 101


class Watchdog:
    """A context manager; its thread lives as long as the context."""

    def __init__(self, config: WatchdogConfig):
        self._config = config
        self._sec = collections.deque(maxlen=_REMEMBERED_STEPS)  # of finished steps, their wait for data included
        self._wait_sec = 0.0
        self._now = ("starting", time.monotonic(), True)  # what, since when, whether it may take its time
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def waiting(self, batch: int) -> None:
        """The loop now waits for a batch."""
        self._turn(f"waiting for batch {batch}", is_slow=False)

    def stepping(self, step: int, *, is_compiling: bool) -> None:
        """The wait is over, a step begins."""
        begin = self._now[1]
        self._turn(f"{'compiling' if is_compiling else 'in'} step {step}", is_slow=is_compiling)
        self._wait_sec = self._now[1] - begin

    def stepped(self) -> None:
        """The step is over: it counts among those that the median is taken of, unless it compiled."""
        what, begin, is_slow = self._now
        if not is_slow:
            self._sec.append(self._wait_sec + time.monotonic() - begin)
        self._turn(f"after {what}", is_slow=True)

    def slow(self, what: str) -> None:
        """Something begins that is no step: it has `slow_sec`."""
        self._turn(what, is_slow=True)

    def _turn(self, what: str, *, is_slow: bool) -> None:
        self._now = (what, time.monotonic(), is_slow)

    @property
    def limit_sec(self) -> float:
        """Longest step that is no stall."""
        sec = tuple(self._sec)
        return max(self._config.min_sec, self._config.factor * statistics.median(sec)) if sec else self._config.slow_sec

    def _watch(self) -> None:
        reported = None
        while not self._done.wait(min(5.0, self._config.min_sec / 4)):
            now = what, begin, is_slow = self._now
            sec = time.monotonic() - begin
            if now is reported or sec < self._config.min_sec:
                continue
            limit = self._config.slow_sec if is_slow else self.limit_sec
            if sec > limit:
                reported = now
                self._report(f"stuck: {what} for {sec:.1f} s; expected at most {limit:.1f} s")

    def _report(self, line: str) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = [line]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                stack = "".join(traceback.format_stack(frame))
                parts.append(f"thread {names.get(ident, ident)}:\n{stack.rstrip()}")
        if self._config.action == "exit":
            parts.append(f"leaving with code {EXIT_CODE}: start the same command again to go on from the last checkpoint")
        print("\n".join(parts), file=sys.stderr, flush=True)
        if self._config.action == "exit":
            os._exit(EXIT_CODE)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
