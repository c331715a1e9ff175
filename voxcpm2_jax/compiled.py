"""Compiled programs, kept on disk so that a process that starts again does not compile them again.

    $JAX_COMPILATION_CACHE_DIR         if it is set
    WORKDIR/compiled                   of a training with several processes, which share it; also in a bucket
    ~/.cache/voxcpm2_jax/compiled      else ($XDG_CACHE_HOME in place of ~/.cache)

JAX finds a program by its text, the compiler's version and flags, and the devices. The directory may be removed at any time.
"""

import os
import pathlib

from voxcpm2_jax.processes import say

# Programs that compile faster than this are not kept. JAX's default leaves out dozens of small ones, whose sum is seconds.
LEAST_SEC, _DEFAULT_SEC = 0.1, 1.0


def keep(workdir: str | os.PathLike | None = None) -> None:
    """Keeps the programs that this process compiles; a directory that was chosen before stays.

    Only the first of several processes writes programs. So they use the workdir, which they share: with a directory on each
    host only the first host would find them, and the others would compile, which waits for all processes.

    Several processes on CPUs keep nothing, unless the variable is set. There a program from the cache, which only the first
    process finds, waits for ever for the same program just compiled: with jax 0.10.2 their collectives ran in another order.

    Args:
        workdir: of a training, or its URL.
    """
    import jax

    if jax.config.jax_persistent_cache_min_compile_time_secs == _DEFAULT_SEC:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SEC)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    if jax.distributed.is_initialized() and jax.process_count() > 1:  # the number alone would start the devices
        if workdir is None or jax.default_backend() == "cpu":
            return
        if "://" in str(workdir):  # JAX reads and writes it through etils.epath
            jax.config.update("jax_compilation_cache_dir", f"{str(workdir).rstrip('/')}/compiled")
            return
        directory = pathlib.Path(workdir).absolute()
    else:
        directory = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "voxcpm2_jax"
    try:
        (directory / "compiled").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"compiled programs are not kept: {error}; $JAX_COMPILATION_CACHE_DIR names another directory")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
