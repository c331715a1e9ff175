"""PyTorch directories both ways: one table of torch name <-> parameter path <-> transform.

    config.json   model.safetensors   audiovae.safetensors | audiovae.pth   tokenizer.json ...      what `voxcpm` reads

A `Row` of the table says where one torch tensor lives here: its dims are split (heads), permuted (kernels are stored
input dims first), and, in a transformer stack, laid at one index of the stacked layer axis. Nothing is computed, so a
round trip gives every byte back; tensors keep the dtype they came in. Import is strict: every missing, unexpected,
misshaped and mistyped tensor is named in one message.
"""

import itertools
import json
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open

from voxcpm2_jax.checkpoint.arrays import flatten
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.torch_io.tables import BOUNDARIES, Row, by_path

BACKBONE_FILE, VAE_FILE = "model.safetensors", "audiovae.safetensors"

DTYPES = {  # in the order in which a file lays them out
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """A tensor on disk."""

    dtype: np.dtype | str  # str: one that we have no use for
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


_HINTS = {
    "lora": "hint: merge the LoRA into the weights first, or keep it in a lora_weights.safetensors of its own",
    "audio_vae.": f"hint: move the audio_vae. tensors to {VAE_FILE}, without that prefix",
}


def refuse(directory: pathlib.Path, differences: list[str]) -> None:
    if differences:
        hints = [hint for mark, hint in _HINTS.items() if any(d.startswith("unexpected") and mark in d for d in differences)]
        what = "; ".join(differences + hints)
        raise UserError(f"{directory}: {len(differences)} tensors differ from what config.json describes: {what}")


def open_tensors(directory: pathlib.Path, *names: str) -> dict[str, Stored]:
    """The tensors of the first of these files that is there."""
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
    """A torch file; only tensors are unpickled, and mapped rather than read where the file allows it."""
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


def find_differences(tensors: Mapping[str, Stored], rows: list[Row]) -> list[str]:
    """Every tensor that is missing, unexpected, misshaped or mistyped, in words."""
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


def assemble(tensors: Mapping[str, Stored], rows: list[Row]) -> dict[str, np.ndarray]:
    return {path: stack_layers(tensors, group) for path, group in by_path(rows).items()}


def stack_layers(tensors, group, empty=np.empty) -> np.ndarray:
    """One parameter from its torch tensors, in memory that `empty` gives."""
    first = group[0]
    shape = first.shape if first.layer is None else (len(group), *first.shape)
    array = empty(shape, tensors[first.name].dtype)
    for row in group:
        array[... if row.layer is None else row.layer] = row.from_torch(tensors[row.name].read())
    return array


# ---- weights to start a training from --------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Parameters on disk, found to be whole; one is read at a time."""

    shapes: dict[str, tuple[int, ...]]  # by path
    read: Callable[[str], np.ndarray]  # path -> array, in the dtype of the file


def codec_constants(config: AudioVAEConfig) -> dict[str, np.ndarray]:
    boundaries = config.sr_bin_boundaries
    return {} if boundaries is None else {BOUNDARIES: np.array(boundaries, np.int32)}


def write_params(
    path: pathlib.Path, rows: list[Row], params: Mapping, constants: Mapping[str, np.ndarray] | None = None
) -> None:
    groups, leaves, constants = by_path(rows), flatten(params), constants or {}
    check_params(leaves, groups, path.name)
    header = tensor_header(groups, leaves) | {name: (array.dtype, array.shape) for name, array in constants.items()}
    write_safetensors(path, header, itertools.chain(constants.items(), torch_tensors(groups, leaves.__getitem__)))


def check_params(leaves: Mapping[str, Any], groups: Mapping[str, list[Row]], what: str) -> None:
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


def tensor_header(groups, leaves: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {row.name: (np.dtype(leaves[path].dtype), row.torch_shape) for path, group in groups.items() for row in group}


def torch_tensors(groups, read: Callable[[str], Any]) -> Iterator[tuple[str, np.ndarray]]:
    for path, group in progress(groups.items(), "writing tensors"):
        leaf = read(path)
        for row in group:
            yield row.name, row.to_torch(np.asarray(leaf if row.layer is None else leaf[row.layer]))
        del leaf  # before the next one is read


def write_safetensors(path, header: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, np.ndarray]]):
    """Writes tensors as they come, in any order; what each will be is known beforehand.

    The format: length of the header (8 bytes, little-endian), the header in JSON, then the tensors' bytes. Wider dtypes
    come first, so that all are aligned; the bytes are those that the safetensors library writes.
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
            del tensor  # before the next one is read: it may be a view of all layers
        file.flush()
        os.fsync(file.fileno())
    assert not missing, missing


def copy_tensors(tensors: Mapping[str, Stored], path: pathlib.Path) -> None:
    header = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    content = ((name, tensor.read()) for name, tensor in progress(tensors.items(), f"writing {path.name}"))
    write_safetensors(path, header, content)


def progress(items: Sized, what: str):
    """Goes through `items` with a bar on a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, disable=not console.is_terminal, transient=True)
