"""Detects that a run is stuck, and reports where.

The loop tells the watchdog what it is about to do; a thread compares the clock a few times a minute. A step or a wait for
data that takes longer than `factor` median steps is a stall: the stacks of all threads are printed to standard error, once.
With action "exit" the process then ends with code 1, so that a launcher can start it again. This is the default in a run of
several processes, whose others wait for the stuck one and cost money; in one process the default is to report and go on. No
state is saved, since the stuck thread cannot hand it over.
"""

import collections
import os
import statistics
import sys
import threading
import time
import traceback

import jax

from voxcpm2_jax.config.run import WatchdogConfig

EXIT_CODE = 1

_REMEMBERED_STEPS = 101


class Watchdog:
    """A context manager; its thread lives as long as the context."""

    def __init__(self, config: WatchdogConfig):
        self._config = config
        self._num_processes = jax.process_count()
        self._is_leaving = config.action == "exit" or (config.action is None and self._num_processes > 1)
        self._sec = collections.deque(maxlen=_REMEMBERED_STEPS)  # of finished steps, including their wait for data
        self._wait_sec = 0.0
        self._now = ("starting", time.monotonic(), True)  # what, since when, whether `slow_sec` is its limit
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def waiting(self, batch: int) -> None:
        """The loop waits for a batch from now on."""
        self._turn(f"waiting for batch {batch}", is_slow=False)

    def stepping(self, step: int, *, is_compiling: bool) -> None:
        """The batch is there; the step begins."""
        begin = self._now[1]
        self._turn(f"{'compiling' if is_compiling else 'in'} step {step}", is_slow=is_compiling)
        self._wait_sec = self._now[1] - begin

    def stepped(self) -> None:
        """The step is finished; its time enters the median unless it compiled."""
        what, begin, is_slow = self._now
        if not is_slow:
            self._sec.append(self._wait_sec + time.monotonic() - begin)
        self._turn(f"after {what}", is_slow=True)

    def slow(self, what: str) -> None:
        """Something other than a step begins; its limit is `slow_sec`."""
        self._turn(what, is_slow=True)

    def _turn(self, what: str, *, is_slow: bool) -> None:
        self._now = (what, time.monotonic(), is_slow)

    @property
    def limit_sec(self) -> float:
        """A step that takes longer is a stall."""
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
        whose = "" if self._num_processes == 1 else f"one of {self._num_processes} processes: "
        limits = "if this is no stall, raise watchdog.min_sec and watchdog.slow_sec"
        if self._is_leaving:
            parts.append(
                f"{whose}leaving with code {EXIT_CODE} so that a launcher starts the run again from its last "
                f"checkpoint; {limits}, or set watchdog.action=report"
            )
        else:
            parts.append(f"{whose}still waiting; watchdog.action=exit would end the process with code {EXIT_CODE}; {limits}")
        print("\n".join(parts), file=sys.stderr, flush=True)
        if self._is_leaving:
            os._exit(EXIT_CODE)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
