"""Where the wall time of a training goes."""

import contextlib
import time


class Clock:
    """Measures steps, waits for data, saves, and goodput.

    The time of a step includes waiting for data and devices, but not compiling, evaluating or saving. Goodput is the share
    of the time since the run's first start that was spent on updates which still count. The rest went into updates that a
    kill or a rollback has undone, into starting, compiling, waiting for data, saving, evaluating, and into pauses.

    Args:
        saved: `state` from the checkpoint that the run resumes from; None: the run starts.
    """

    def __init__(self, saved: dict | None):
        self.state = saved or {"first_start": time.time(), "counted_sec": 0.0}
        self._unsettled_sec = self._last_wait_sec = 0.0
        self.reset()

    def reset(self) -> None:
        self._busy_sec = self._wait_sec = self._save_sec = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def busy(self):
        """Wraps the host's part of a step, except the wait for its batch."""
        begin = time.perf_counter()
        yield
        sec = time.perf_counter() - begin
        self._busy_sec += sec
        self._unsettled_sec += sec

    @contextlib.contextmanager
    def waiting(self):
        """Wraps the wait for a batch."""
        begin = time.perf_counter()
        yield
        self._last_wait_sec = time.perf_counter() - begin
        self._wait_sec += self._last_wait_sec

    @contextlib.contextmanager
    def compiling(self):
        """Replaces `busy` for a step that compiles: neither this step nor the wait for data before it is timed."""
        self._wait_sec -= self._last_wait_sec
        yield

    @contextlib.contextmanager
    def saving(self):
        """Wraps the part of a save that blocks the loop."""
        begin = time.perf_counter()
        yield
        self._save_sec += time.perf_counter() - begin

    def settled(self, *, is_kept: bool) -> None:
        """A step is finished; its time counts for goodput if its update was kept."""
        self._steps += 1
        if is_kept:
            self.state["counted_sec"] += self._unsettled_sec
        self._unsettled_sec = 0.0

    @property
    def step_sec(self) -> float:
        return (self._busy_sec + self._wait_sec) / max(self._steps, 1)

    @property
    def row(self) -> dict:
        return {
            "step_sec": self.step_sec,
            "data_wait_sec": self._wait_sec / max(self._steps, 1),
            "checkpoint_sec": self._save_sec,
            "goodput": self.state["counted_sec"] / max(time.time() - self.state["first_start"], 1e-9),
        }
