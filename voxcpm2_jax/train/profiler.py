"""Traces of some updates for XProf: `--profile-steps=A:B`."""

import re
from typing import Any

import jax

from voxcpm2_jax.config.plain import UserError


class Profiler:
    """Traces some updates; a context manager. View with `xprof WORKDIR/profile` or TensorBoard's profile plugin.

    Args:
        steps: (a, b): updates a, a + 1 .. b - 1; None: no trace.   directory: where the trace is written.
    """

    def __init__(self, steps: tuple[int, int] | None, directory):
        self._steps, self._directory = steps, str(directory)
        self._is_on = False

    def at(self, step: int, running: Any = None) -> None:
        """Starts or ends the trace if it is time; called before update number `step` is dispatched.

        Args:
            running: results of the previous update, still on the devices. They are waited for when the trace starts and
                ends, so that it contains whole updates.
        """
        is_wanted = self._steps is not None and self._steps[0] <= step < self._steps[1]
        if is_wanted == self._is_on:
            return
        jax.block_until_ready(running)
        if is_wanted:
            jax.profiler.start_trace(self._directory)
            self._is_on = True
        else:
            self._stop()

    def _stop(self) -> None:
        self._is_on = False
        jax.profiler.stop_trace()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._is_on:
            self._stop()


def profile_steps(text: str) -> tuple[int, int]:
    """ "100:103" -> (100, 103).

    Raises:
        UserError: not two step numbers, the first below the second.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--profile-steps={text}: expected A:B, two step numbers with A < B; updates A .. B - 1 are traced")
    return int(match[1]), int(match[2])
