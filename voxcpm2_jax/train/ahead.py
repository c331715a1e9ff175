"""Train steps that were compiled before the run has its machine: saved in a file, and loaded instead of compiled.

    train .. --compile-for=v5e:16x16     on any machine: compiles for the topology -> WORKDIR/compiled/train_step-HASH
    train ..                             on that TPU: the step's text has the same hash -> loads the file

HASH is of everything that the compiler is given: the program's text, the kind and order of the devices, the versions of JAX and
of the compiler. So a file is used for exactly the program that would be compiled; otherwise the step is compiled as usual.
Loading a program is running it: whoever can write to WORKDIR/compiled can run code as the training.
"""

import hashlib
import importlib.metadata
import pathlib
import pickle
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from voxcpm2_jax import chips, files
from voxcpm2_jax.processes import all_agree, say

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


def compile_step(step, state, batch, directory: pathlib.Path | None):
    """The train step for a state and a batch like these: loaded from `directory` if it was saved there, else compiled by JAX.

    Every process must call this. It returns `step` itself, which compiles when it is called, or the loaded program.

    Args:
        step: a jitted function.   directory: None: nothing is loaded.
    """
    if not all_agree(directory is not None and any(directory.glob("train_step-*"))):
        return step  # tracing the step for its hash takes seconds
    lowered = lower(step, state, batch)
    path = directory / _name(lowered, state)
    program = _load(path, lowered, state) if path.exists() else None
    if not all_agree(program is not None):
        say(f"no saved train step in {directory} fits this program and machine; it is compiled")
        return step
    say(f"train step loaded from {path}, not compiled")
    return program


def lower(step, state, batch):
    """The step's program for arrays like these (or ShapeDtypeStructs with shardings)."""
    return step.lower(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch)))


def save(directory: pathlib.Path, lowered, state) -> pathlib.Path:
    """Compiles a program, and saves it in the file, which is returned, for `compile_step` to load."""
    payload, _, _ = serialize_executable.serialize(_compile_afresh(lowered))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _name(lowered, state)
    with files.aside(path, sync=True) as temporary:
        temporary.write_bytes(payload)
    return path


def _compile_afresh(lowered):
    """Compiles without JAX's cache: a program from there, saved again, lacks its functions on CPUs (jax 0.10.2)."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX decides once whether it uses the cache
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _name(lowered, state) -> str:
    devices = _devices(state)
    versions = {}
    for package in _COMPILERS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    chip = chips.of_kind(devices[0].device_kind)
    options = chip.compiler_options if chip else {}
    digest = hashlib.sha256(lowered.as_text().encode())
    digest.update(repr((versions, options, [(device.device_kind, device.id) for device in devices])).encode())
    return f"train_step-{digest.hexdigest()[:32]}"


def _load(path: pathlib.Path, lowered, state) -> Any | None:
    in_tree = jax.tree.structure(lowered.args_info)
    try:
        return serialize_executable.deserialize_and_load(
            path.read_bytes(), in_tree, lowered.out_tree, execution_devices=_devices(state)
        )
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, jax.errors.JaxRuntimeError) as error:
        say(f"{path} cannot be loaded ({' '.join(str(error).split())[:200]})")
        return None


def _devices(state) -> list:
    """The devices of the state, in the order of its mesh."""
    return list(jax.tree.leaves(state)[0].sharding.mesh.devices.flat)
