"""TODO processes."""

import json
import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from voxcpm2_jax.config.plain import UserError

# ---- the processes of a run ------------------------------------------------------------------------------------------

# A process that is not heard of for so long, or stays behind when others end, is lost; they then end without it, for a
# launcher to start all again.
LOST_SEC = 100


def say(line: str) -> None:
    """Prints a line on standard error, once for all processes of a run."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def connect() -> None:
    """Joins this process to the others of its run; to be called before anything asks JAX for a device.

    Cloud TPU (GKE too), Slurm and Open MPI tell JAX all it needs. Elsewhere each process gets JAX_COORDINATOR_ADDRESS
    (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; JAX_NUM_PROCESSES=1 keeps a process by itself whatever
    surrounds it. A process that nothing is told stays by itself.

    Raises:
        UserError: the variables are incomplete or no numbers, or the others do not come within JAX's five minutes.
    """
    from jax._src.clusters import ClusterEnv  # no public function tells whether JAX finds a cluster

    address, *numbers = (os.environ.get(name, "") for name in _PROCESS_VARIABLES)
    if numbers[0] == "1" or jax.distributed.is_initialized():
        return
    told = {}
    if any(numbers):
        if not address or not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
            raise UserError(
                f"{', '.join(_PROCESS_VARIABLES)}: expected HOST:PORT, the number of processes and which of them this is, "
                f"counted from 0; got {', '.join(repr(value) for value in (address, *numbers))}"
            )
        told = {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}
    try:
        clusters = [cluster for cluster in ClusterEnv._cluster_types if not cluster.opt_in_only_method]
        if not told and not any(cluster.is_env_present() for cluster in clusters):
            if address:
                raise ValueError(f"of {', '.join(_PROCESS_VARIABLES)} only the first is set")
            return
        # Its own notice of SIGTERM would take the signal away from train/loop.py, which tells the others itself.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(**told, heartbeat_timeout_seconds=LOST_SEC, shutdown_timeout_seconds=LOST_SEC)
    except _refusals() as error:
        raise UserError(
            f"the processes of this run do not come together: {error}; JAX_NUM_PROCESSES=1 keeps one by itself"
        ) from None


def _refusals() -> tuple[type[Exception], ...]:
    """What JAX raises, and the package by which it looks for other pods, in a pod that may not ask for them."""
    kubernetes = sys.modules.get("kubernetes")
    return (RuntimeError, ValueError, OSError) + ((kubernetes.config.ConfigException,) if kubernetes else ())


_PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")  # JAX itself reads the first only


def all_agree(is_fine: bool) -> bool:
    """Whether it is fine on every process of the run; all of them ask."""
    if jax.process_count() == 1:
        return is_fine
    return bool(np.all(multihost_utils.process_allgather(np.array(is_fine))))


def from_first(value):
    """The first process's value, plain data, on every process of the run; all of them ask.

    For what is read from a disk that they share and decides what they do next: a network file system may show one of them
    what was there a minute ago.
    """
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(data).tobytes())


# ---- for people ------------------------------------------------------------------------------------------------------


# ---- words -----------------------------------------------------------------------------------------------------------
