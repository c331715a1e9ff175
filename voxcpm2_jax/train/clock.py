"""TODO train.clock."""

import contextlib
import time


class Clock:
    """Where wall time goes.

    A step's time is what it costs the host, waiting for data and devices included; compiling, evaluating and saving are
    none of it. Goodput is the share of the time since the run's first start that went into updates which still count:
    what a kill or a way back undoes, starting, compiling, data, saves, evaluations and standing still are the rest.

    Args:
        saved: `state` of the checkpoint that the run goes on from; None: it starts.
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
        """Around what a step costs the host beside the wait for its batch."""
        begin = time.perf_counter()
        yield
        sec = time.perf_counter() - begin
        self._busy_sec += sec
        self._unsettled_sec += sec

    @contextlib.contextmanager
    def waiting(self):
        """Around the wait for a batch."""
        begin = time.perf_counter()
        yield
        self._last_wait_sec = time.perf_counter() - begin
        self._wait_sec += self._last_wait_sec

    @contextlib.contextmanager
    def compiling(self):
        """In place of `busy` where the step meets a new shape: the feed started as well, so that this wait counts neither."""
        self._wait_sec -= self._last_wait_sec
        yield

    @contextlib.contextmanager
    def saving(self):
        """Around what a save holds the loop up."""
        begin = time.perf_counter()
        yield
        self._save_sec += time.perf_counter() - begin

    def settled(self, *, is_kept: bool) -> None:
        """A step is over; its time counts if its update does."""
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
