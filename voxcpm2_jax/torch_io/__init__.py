"""PyTorch directories: `torch_io.load(DIR)` reads a released directory, `torch_io.save(DIR, ...)` writes one.

Both are imported on first use, so that the tables can be imported without safetensors and tokenizers.
"""

import importlib

__all__ = ["load", "save"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(importlib.import_module("voxcpm2_jax.torch_io.released"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
