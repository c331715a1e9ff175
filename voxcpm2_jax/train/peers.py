"""Which process of a run is slow, and at what.

All processes of a run have the same step time, since each step waits for all of them. What differs is what a process does
by itself, and whether its devices wait for that. Each process measures, as means over the steps since the last row,

    data      seconds of a step in which it waits for its batch        } 0 in a step that the devices have not finished
    host      seconds of a step that are the loop's own work           } when the process comes back to ask for it
    pause     seconds of a step in which the process should run and does not: it is stopped or throttled, its machine swaps,
              or one of its threads holds Python's lock
    device    seconds that its devices take for a product without any communication; measured before each save, when the run
              waits for the devices anyway; not on CPUs, where the device is the host

The loop runs one step ahead of the devices (loop.py). A process that finds its last step unfinished has kept its devices
busy, whatever it did meanwhile. One that finds it finished has let them run dry, and through them those of all others. Only
durations are compared, because the clocks of hosts differ.

The figures of the processes are exchanged by a small program behind each step that is logged; no step waits for it. How far
the slowest process is above the median of all (of two: above the other) is at most what it costs in each step.
"""

import functools
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from voxcpm2_jax.processes import exchange, from_each, say

PARTS = {
    "data": "waiting for its batch while its devices are idle",
    "host": "in the loop's own work while its devices are idle",
    "pause": "not running: stopped, throttled, swapping, or a thread that keeps Python's lock",
    "device": "for a product that its devices compute alone",
}
PATIENCE = 3  # rows in a row in which a process has to be slow at the same thing
SILENCE = 20  # rows between two warnings
LEAST_SEC = 0.01  # of a step; less is never slow

_BEAT_SEC, _LATE_SEC = 0.1, 0.05  # between two beats of the pulse; how late a beat may be


class Peers:
    """Measures this process and compares it with the others; a context manager. Does nothing in a run of one process.

    Args:
        slow_share: share of a step above the median from which on a process is slow; None: nothing is measured.
    """

    def __init__(self, slow_share: float | None):
        self.is_on = slow_share is not None and jax.process_count() > 1
        self._share = slow_share
        self._part, self._since = None, 0.0
        self._step = {"data": 0.0, "host": 0.0}  # seconds of the step that is not settled yet
        self._device_sec = np.nan  # NaN: not measured since the last row
        self._pulse = _Pulse()
        self._reset()
        self._values_PX: np.ndarray | None = None
        if self.is_on:
            self._hosts = from_each(socket.gethostname())
            self._exchange = exchange(lambda values_PX: values_PX)
            jax.block_until_ready(self._exchange(np.zeros(len(PARTS), np.float32)))  # compiled here, not in a step
            self._in_a_row_PX = np.zeros((jax.process_count(), len(PARTS)), int)
            self._quiet_rows = 0

    def _reset(self) -> None:
        self._sum, self._steps = dict.fromkeys(self._step, 0.0), 0
        self._paused_before_sec = self._pulse.late_sec

    # ---- this process

    def turn(self, part: str | None) -> None:
        """From now on time counts as "data" or "host"; None: as neither."""
        now = time.perf_counter()
        if self._part is not None:
            self._step[self._part] += now - self._since
        self._part, self._since = part, now

    def drop(self) -> None:
        """The time since the last settled step does not count, because the step compiled or the devices were idle anyway."""
        self._step = dict.fromkeys(self._step, 0.0)

    def settling(self, figures: dict) -> None:
        """Called before the process waits for a step with these figures; its time until `turn` does not count."""
        self.turn(None)
        is_dry = any(x.is_ready() for x in jax.tree.leaves(figures)[:1])  # all outputs of a program are ready at once
        for part, sec in self._step.items():
            self._sum[part] += sec * is_dry
        self._steps += 1
        self.drop()

    def time_devices(self) -> None:
        """Times the product. Called when no step is running on the devices."""
        if self.is_on and jax.default_backend() != "cpu":
            self._device_sec = min(_product_sec() for _ in range(3))

    # ---- all processes

    def ask(self):
        """Called by every process behind a step that is logged: what each has measured so far, still on the devices."""
        if not self.is_on:
            return None
        steps = max(self._steps, 1)
        own = {part: sec / steps for part, sec in self._sum.items()}
        own |= {"pause": (self._pulse.late_sec - self._paused_before_sec) / steps, "device": self._device_sec}
        self._reset()
        self._device_sec = np.nan
        return self._exchange(np.array([own[part] for part in PARTS], np.float32))

    def settle(self, asked) -> None:
        """Called when that step is settled, with what `ask` gave for it; None: it is not logged."""
        self._values_PX = None if asked is None else np.asarray(asked)

    def row(self, step_sec: float) -> dict:
        """Figures of the slowest process, for the row of the step that was settled last; {} if it was not exchanged.

        Prints a line if a process is slow and stays so.

        Returns:
            slowest, slowest_host: its index and the name of its host.   slowest_at: a name in PARTS.
            slowest_sec: what it measured there.   spread_sec/PART: by how much the highest is above the median.
        """
        if self._values_PX is None:
            return {}
        values_PX, self._values_PX = self._values_PX, None
        typical_X = np.sort(values_PX, axis=0)[(len(values_PX) - 1) // 2]
        spread_PX = values_PX - typical_X
        cost_PX = spread_PX.copy()  # seconds of a step
        device = list(PARTS).index("device")
        cost_PX[:, device] *= step_sec / typical_X[device]
        self._warn(values_PX, typical_X, cost_PX, step_sec)
        process, part = np.unravel_index(np.argmax(np.nan_to_num(cost_PX, nan=-1.0)), cost_PX.shape)
        figures = {"slowest": int(process), "slowest_host": self._hosts[process], "slowest_at": list(PARTS)[part]}
        figures |= {"slowest_sec": float(values_PX[process, part])}
        return figures | {f"spread_sec/{name}": float(spread_PX[:, i].max()) for i, name in enumerate(PARTS)}

    def _warn(self, values_PX, typical_X, cost_PX, step_sec: float) -> None:
        is_slow_PX = cost_PX > max(self._share * step_sec, LEAST_SEC)
        rows_PX = np.where(is_slow_PX, self._in_a_row_PX + 1, 0)
        self._in_a_row_PX = np.where(np.isnan(cost_PX), self._in_a_row_PX, rows_PX)
        self._quiet_rows -= 1
        lasting_PX = np.where(is_slow_PX & (self._in_a_row_PX >= PATIENCE), cost_PX, 0.0)
        process, part = np.unravel_index(np.argmax(lasting_PX), lasting_PX.shape)
        if lasting_PX[process, part] and self._quiet_rows <= 0:
            self._quiet_rows = SILENCE
            say(
                f"process {process} of {len(values_PX)} on {self._hosts[process]} slows the run down by at most "
                f"{min(lasting_PX[process, part] / step_sec, 1.0):.0%} of a step: {values_PX[process, part]:.3g} s "
                f"{list(PARTS.values())[part]}; the median is {typical_X[part]:.3g} s, a step takes {step_sec:.3g} s; so for "
                f"{self._in_a_row_PX[process, part]} rows"
            )

    def __enter__(self):
        if self.is_on:
            self._pulse.start()
        return self

    def __exit__(self, *_):
        self._pulse.stop()


class _Pulse:
    """A thread that sleeps for a short time again and again, and sums how late it wakes up.

    Attributes:
        late_sec: the sum so far.
    """

    def __init__(self):
        self.late_sec = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._done.wait(_BEAT_SEC):
            now = time.monotonic()
            late = now - last - _BEAT_SEC
            self.late_sec += late if late > _LATE_SEC else 0.0
            last = now

    def stop(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()


def _product_sec() -> float:
    """Seconds that the devices of this process take for the product, each alone: those of the slowest one."""
    seeds = [jax.device_put(np.float32(1), device) for device in jax.local_devices()]
    _product(seeds[0]).block_until_ready()
    begin = time.perf_counter()
    jax.block_until_ready([_product(seed) for seed in seeds])
    return time.perf_counter() - begin


@functools.partial(jax.jit, static_argnames=("width", "times"))
def _product(seed, width: int = 2048, times: int = 64):
    """1.1 TFLOP in bfloat16, with 25 MB of memory."""
    x_DD = jnp.full((width, width), seed / width, jnp.bfloat16)
    return jax.lax.fori_loop(0, times, lambda _, y_DD: y_DD @ x_DD, x_DD)[0, 0]
