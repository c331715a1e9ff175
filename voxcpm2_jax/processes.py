"""The processes of a run: how they find each other, which one prints, and how they agree on what to do."""

import json
import os
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from voxcpm2_jax.config.plain import UserError

# A process counts as lost if its heartbeat is missing for so long, or if it still runs so long after the others have ended.
# The others then end too, so that a launcher can start all processes again.
LOST_SEC = 100


def say(line: str) -> None:
    """Prints a line on standard error, from one process of a run only."""
    # Asking for the index initialises the devices, which the parent of a benchmark leaves to its children.
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def connect() -> None:
    """Connects this process to the others of its run. Call it before anything asks JAX for a device.

    On Cloud TPU (with GKE or without), Slurm and Open MPI, JAX finds the other processes by itself. Elsewhere each process
    needs JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. With JAX_NUM_PROCESSES=1,
    or without any of this, the process runs alone.

    Raises:
        UserError: the variables are incomplete or not numbers, or the others do not connect within JAX's five minutes.
    """
    from jax._src.clusters import ClusterEnv  # no public function tells whether JAX finds a cluster

    address, *numbers = (os.environ.get(name, "") for name in _PROCESS_VARIABLES)
    if numbers[0] == "1" or jax.distributed.is_initialized():
        return
    settings = {}
    if any(numbers):
        if not address or not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
            raise UserError(
                f"{', '.join(_PROCESS_VARIABLES)}: expected HOST:PORT, the number of processes and which of them this is, "
                f"counted from 0; got {', '.join(repr(value) for value in (address, *numbers))}"
            )
        settings = {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}
    try:
        clusters = [cluster for cluster in ClusterEnv._cluster_types if not cluster.opt_in_only_method]
        if not settings and not any(cluster.is_env_present() for cluster in clusters):
            if address:
                raise ValueError(f"of {', '.join(_PROCESS_VARIABLES)} only the first is set")
            return
        # JAX's preemption service would catch SIGTERM, which train/signals.py handles.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=LOST_SEC, shutdown_timeout_seconds=LOST_SEC)
    except _refusals() as error:
        raise UserError(
            f"the processes of this run cannot connect: {error}; with JAX_NUM_PROCESSES=1 a process runs alone"
        ) from None


def _refusals() -> tuple[type[Exception], ...]:
    """What JAX raises, and the kubernetes package that it uses, in a pod that may not list the other pods."""
    kubernetes = sys.modules.get("kubernetes")
    return (RuntimeError, ValueError, OSError) + ((kubernetes.config.ConfigException,) if kubernetes else ())


_PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")  # JAX itself reads only the first


def all_agree(is_fine: bool) -> bool:
    """Whether `is_fine` holds on every process. Every process must call this."""
    if jax.process_count() == 1:
        return is_fine
    return bool(np.all(multihost_utils.process_allgather(np.array(is_fine))))


def from_first(value):
    """The value (plain data) of the first process, on every process. Every process must call this.

    Used for what is read from a shared disk and decides what all processes do next: a network file system may show
    different contents to different hosts.
    """
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(data).tobytes())


def from_each(value) -> list:
    """The values (plain data) of all processes in their order, on every process. Every process must call this."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    data_PX = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
    return [json.loads(x[:size].tobytes()) for x, size in zip(data_PX, sizes, strict=True)]


def exchange(combine: Callable) -> Callable:
    """A function from a small array [X] of each process to combine(x_PX), on the devices of all; it waits for nothing.

    Every process must call it between the same two programs.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
    split = NamedSharding(mesh, PartitionSpec("process"))
    combined = jax.jit(combine, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def send(x_X: np.ndarray) -> jax.Array:
        return combined(jax.make_array_from_process_local_data(split, x_X[None], (jax.process_count(), *x_X.shape)))

    return send
