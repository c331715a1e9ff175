"""VoxCPM2 in JAX: pre-training, generation, and checkpoints that PyTorch speaks with."""

__version__ = "0.1.0"

_LAZY = {"VoxCPM": "voxcpm2_jax.inference.api", "UserError": "voxcpm2_jax.config.plain"}


def __getattr__(name):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
