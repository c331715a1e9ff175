"""Tensors in safetensors and .pth files: opened without reading them, checked against the tables, written one by one.

Nothing is computed, so a round trip returns the same bytes; tensors keep the dtype they came in. Reading is strict: one
message names every missing, unexpected, misshaped and mistyped tensor. Of a .pth file only tensors are unpickled.
"""

import itertools
import json
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open

from voxcpm2_jax.checkpoint.arrays import flatten
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.torch_io.tables import BOUNDARIES, Row, by_path, vae_table

BACKBONE_FILE, VAE_FILE = "model.safetensors", "audiovae.safetensors"

DTYPES = {  # in the order in which safetensors writes them into a file
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---- reading ---------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor on disk."""

    dtype: np.dtype | str  # str: a dtype that no parameter may have
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def open_tensors(directory: pathlib.Path, *names: str) -> dict[str, Stored]:
    """The tensors of the first of these files that exists; one of the names may be an index of several files."""
    for name in names:
        path = directory / name
        if not path.exists():
            continue
        if name.endswith(".index.json"):
            try:
                shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{path}: not an index of shards ({error!r})") from None
            return {k: v for shard in shards for k, v in open_safetensors(directory / pathlib.Path(shard).name).items()}
        return open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    raise UserError(f"{directory}: expected one of {', '.join(names)}, found none")


def open_safetensors(path: pathlib.Path) -> dict[str, Stored]:
    """Opens a file; only its header is read."""
    try:
        file = safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though the index names it") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    return {
        name: Stored(DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape()), lambda name=name: file.get_tensor(name))
        for name, s in slices.items()
    }


def _open_pickle(path: pathlib.Path) -> dict[str, Stored]:
    """Opens a .pth file. Only tensors are unpickled; a zip file (the newer format) is mapped, an older one is read."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading it needs PyTorch (pip install torch), or convert it to .safetensors") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: not a plain torch file of tensors ({str(error).splitlines()[0]})") from None
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path}: expected a dict of tensors, plain or under 'state_dict'")
    dtypes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32"}

    def read(tensor):
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {
        name: Stored(
            DTYPES[dtypes[t.dtype]] if t.dtype in dtypes else str(t.dtype), tuple(t.shape), lambda t=t: read(t.detach())
        )
        for name, t in tensors.items()
    }


# ---- checks ----------------------------------------------------------------------------------------------------------

_HINTS = {
    "lora": "hint: merge the LoRA into the weights first, or keep it in a lora_weights.safetensors of its own",
    "audio_vae.": f"hint: move the audio_vae. tensors to {VAE_FILE}, without that prefix",
}


def check_tensors(directory: pathlib.Path, *pairs: tuple[Mapping[str, Stored], list[Row]]) -> None:
    """Raises one UserError that names every difference between tensors and their table, for all pairs."""
    differences = [difference for tensors, rows in pairs for difference in find_differences(tensors, rows)]
    if differences:
        hints = [hint for mark, hint in _HINTS.items() if any(d.startswith("unexpected") and mark in d for d in differences)]
        what = "; ".join(differences + hints)
        raise UserError(f"{directory}: {len(differences)} tensors differ from what config.json describes: {what}")


def find_differences(tensors: Mapping[str, Stored], rows: list[Row]) -> list[str]:
    """One line for every tensor that is missing, unexpected, misshaped or mistyped."""
    wanted = {row.name: row for row in rows}
    problems = [f"missing {row.name} [{','.join(map(str, row.torch_shape))}]" for row in rows if row.name not in tensors]
    problems += [f"unexpected {name} {tensor}" for name, tensor in tensors.items() if name not in wanted]
    dtypes: dict[str, np.dtype] = {}
    for name, row in wanted.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != row.torch_shape:
            problems.append(f"{name} is {tensor}, expected shape [{','.join(map(str, row.torch_shape))}]")
        allowed = {DTYPES["I32"]} if row.path is None else {DTYPES[k] for k in ("BF16", "F16", "F32")}
        if tensor.dtype not in allowed:
            problems.append(f"{name} is {tensor}, expected {' or '.join(sorted(d.name for d in allowed))}")
        elif dtypes.setdefault(row.path, tensor.dtype) != tensor.dtype:
            problems.append(f"{name} is {tensor}, other layers are {dtypes[row.path]}")
    return problems


def check_params(leaves: Mapping[str, Any], groups: Mapping[str, list[Row]], what: str) -> None:
    """Raises one UserError that names every parameter that is missing, unexpected, misshaped or mistyped.

    Args:
        leaves: by path, anything with shape and dtype.   groups: the rows of each parameter.
        what: names the place of the parameters in the message.
    """
    problems = [f"missing {path}" for path in groups.keys() - leaves.keys()]
    problems += [f"unexpected {path}" for path in leaves.keys() - groups.keys()]
    for path in groups.keys() & leaves.keys():
        first = groups[path][0]
        shape = first.shape if first.layer is None else (len(groups[path]), *first.shape)
        if tuple(leaves[path].shape) != shape:
            problems.append(f"{path} is {list(leaves[path].shape)}, expected {list(shape)}")
        if np.dtype(leaves[path].dtype) not in _NAMES:
            problems.append(f"{path} is {leaves[path].dtype}, expected one of {', '.join(d.name for d in _NAMES)}")
    if problems:
        raise UserError(f"{what}: {len(problems)} parameters do not fit the config: " + "; ".join(sorted(problems)))


# ---- parameters from tensors -----------------------------------------------------------------------------------------


def assemble(tensors: Mapping[str, Stored], rows: list[Row]) -> dict[str, np.ndarray]:
    """Reads all parameters of a table, by path."""
    return {path: stack_layers(tensors, group) for path, group in by_path(rows).items()}


def stack_layers(tensors: Mapping[str, Stored], group: list[Row], empty=np.empty) -> np.ndarray:
    """Reads one parameter from the tensors of its layers, into the array that `empty(shape, dtype)` makes."""
    first = group[0]
    shape = first.shape if first.layer is None else (len(group), *first.shape)
    array = empty(shape, tensors[first.name].dtype)
    for row in group:
        array[... if row.layer is None else row.layer] = row.from_torch(tensors[row.name].read())
    return array


# ---- tensors from parameters -----------------------------------------------------------------------------------------


def write_params(
    path: pathlib.Path, rows: list[Row], params: Mapping, constants: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes the tensors of nested parameters (arrays of numpy or jax), and of `constants`, which are no parameters."""
    groups, leaves, constants = by_path(rows), flatten(params), constants or {}
    check_params(leaves, groups, path.name)
    header = tensor_header(groups, leaves) | {name: (array.dtype, array.shape) for name, array in constants.items()}
    write_safetensors(path, header, itertools.chain(constants.items(), torch_tensors(groups, leaves.__getitem__)))


def write_codec(path: pathlib.Path, config: AudioVAEConfig, vae_params: Mapping) -> None:
    """Writes audiovae.safetensors. Its rate boundaries are config here, but the PyTorch package expects a tensor."""
    boundaries = config.sr_bin_boundaries
    constants = {} if boundaries is None else {BOUNDARIES: np.array(boundaries, np.int32)}
    write_params(path, vae_table(config), vae_params, constants)


def tensor_header(groups, leaves: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """What `write_safetensors` must know beforehand: dtype and shape of every tensor of some parameters."""
    return {row.name: (np.dtype(leaves[path].dtype), row.torch_shape) for path, group in groups.items() for row in group}


def torch_tensors(groups, read: Callable[[str], Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and content of every tensor; `read(path)` reads one parameter, and only one is in memory at a time."""
    for path, group in progress(groups.items(), "writing tensors"):
        leaf = read(path)
        for row in group:
            yield row.name, row.to_torch(np.asarray(leaf if row.layer is None else leaf[row.layer]))
        del leaf  # frees it before the next one is read


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_safetensors(path, header: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, np.ndarray]]):
    """Writes tensors as they come, in any order; `header` gives dtype and shape of each.

    The format: length of the header (8 bytes, little-endian), the header in JSON, then the bytes of the tensors. Wider dtypes
    come first, so that all are aligned. The file is byte for byte the one that the safetensors library writes.
    """
    order = sorted(header, key=lambda name: (list(_NAMES).index(header[name][0]), name))
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = header[name]
        end = offset + dtype.itemsize * math.prod(shape)
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    missing = set(header)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            assert (tensor.dtype, tensor.shape) == header[name], name
            file.seek(8 + len(encoded) + content[name]["data_offsets"][0])
            file.write(np.ascontiguousarray(tensor).view(np.uint8).data if tensor.size else b"")
            missing.remove(name)
            del tensor  # frees it before the next one is read: it may be a view of all layers
        file.flush()
        os.fsync(file.fileno())
    assert not missing, missing


def cast(leaves: Mapping[str, Stored], choose: Callable[[np.dtype], np.dtype]) -> dict[str, Stored]:
    """The same tensors or parameters in another dtype, cast when they are read; `choose(dtype)` says in which.

    Reading one raises UserError if a number of it becomes infinite.
    """

    def read(name: str, leaf: Stored, dtype: np.dtype) -> np.ndarray:
        array = np.asarray(leaf.read())
        with np.errstate(over="ignore", invalid="ignore"):
            narrowed, lost = array.astype(dtype), 0
            if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(array.dtype).max:
                lost = np.count_nonzero(np.isinf(narrowed)) - np.count_nonzero(np.isinf(array))
        if lost:
            most = np.abs(array[np.isfinite(array)]).max()
            raise UserError(f"{name}: {lost} numbers are too large for {dtype.name} (up to {most:.3g}); choose another --dtype")
        return narrowed

    found = {}
    for name, leaf in leaves.items():
        dtype = leaf.dtype if leaf.dtype == DTYPES["I32"] else choose(leaf.dtype)
        found[name] = leaf if dtype == leaf.dtype else Stored(dtype, leaf.shape, partial(read, name, leaf, dtype))
    return found


def copy_tensors(tensors: Mapping[str, Stored], path: pathlib.Path) -> None:
    """Copies tensors into one safetensors file, one at a time."""
    header = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    content = ((name, tensor.read()) for name, tensor in progress(tensors.items(), f"writing {path.name}"))
    write_safetensors(path, header, content)


def progress(items: Sized, what: str):
    """Iterates over `items`, with a progress bar if stderr is a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, disable=not console.is_terminal, transient=True)
