"""VoxCPM2 in JAX: pre-training, generation, and conversion to and from PyTorch checkpoints.

The names of the Python API are imported when they are first used, so that `import voxcpm2_jax` does not import JAX.
"""

__version__ = "0.1.0"

_LAZY = {"VoxCPM": "voxcpm2_jax.inference.api", "UserError": "voxcpm2_jax.config.plain"}


def __getattr__(name):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
