"""SIGTERM and SIGINT: the run saves after the step that is running, then stops; a second signal ends the process at once.

Every process of a run has to stop after the same step. So with each step the devices compute the maximum of the signals that
the processes have received (`Stop.ask`), and every process fetches it together with the step's metrics (`Stop.settle`).
"""

import contextlib
import os
import signal
import sys
import threading
import time

import jax
import numpy as np

from voxcpm2_jax.processes import exchange


class Stop:
    """Whether a signal has reached any of the processes.

    Attributes:
        number: the signal's number, once every process knows it; 0: none.
    """

    def __init__(self):
        self._received = 0  # by this process
        self._agreed = 0
        if jax.process_count() > 1:
            self._highest = exchange(lambda received_P1: received_P1.max())

    @property
    def number(self) -> int:
        return self._received if jax.process_count() == 1 else self._agreed

    def ask(self):
        """Called with every step: the highest signal that any process has received so far, still on the devices."""
        if jax.process_count() == 1:
            return None
        return self._highest(np.array([self._received], np.int32))

    def settle(self, asked) -> None:
        """Called when that step is settled, with what `ask` gave for it."""
        if asked is not None:
            self._agreed = int(asked)

    def receive(self, number: int, _frame=None) -> None:
        self._received = self._received or number

    def listen(self, pipe: int) -> None:
        """Counts signals in a thread of its own, since the main thread may be in a call that does not return."""
        first_sec = None
        for (number,) in (n for n in iter(lambda: os.read(pipe, 1), b"") if n[0] in _SIGNALS):
            now_sec = time.monotonic()
            if first_sec is not None:
                if now_sec - first_sec < ECHO_SEC:
                    continue
                os._exit(128 + number)  # files on disk are whole at any time
            first_sec = now_sec
            self.receive(number)
            name = signal.Signals(number).name
            what = f"saving after this step, then stopping; a second signal, {ECHO_SEC:.0f} s later or more, stops at once"
            print(f"{name}: {what}", file=sys.stderr, flush=True)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_SEC = 1.0  # `timeout`, Slurm and others signal a process and then its group; within this time both are one signal


@contextlib.contextmanager
def listening():
    """Catches SIGTERM and SIGINT while the block runs -> Stop; a second signal ends the process at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
    out, into = os.pipe()
    os.set_blocking(into, False)
    thread = threading.Thread(target=stop.listen, args=(out,), name="signals", daemon=True)
    thread.start()
    usual_pipe = signal.set_wakeup_fd(into)
    for number in _SIGNALS:
        signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(usual_pipe)
        os.close(into)
        thread.join()
        os.close(out)
