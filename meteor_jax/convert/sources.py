"""Tensors in files: safetensors and PyTorch's own, one file or many, read one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from meteor_jax.config import one_line
from meteor_jax.models.conversion import ConversionError

SAFETENSORS, TORCH = ".safetensors", (".bin", ".pth", ".pt")
CONFIG_FILE = "config.json"
# Where one folder holds several sets of weights, the first of these is taken.
WEIGHTS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin", "*.pth", "*.pt")
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError)
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor's file, shape and dtype; `order` is its place among all tensors."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    order: int


class Reader(Protocol):
    """An open file of tensors."""

    def describe(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]: ...

    def read(self, name: str) -> np.ndarray: ...

    def close(self) -> None: ...


class SafetensorsReader:
    """A safetensors file, mapped into memory."""

    def __init__(self, path: Path):
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(safe_open(path, framework="np"))

    def describe(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        described = {}
        for name in self._file.keys():  # noqa: SIM118 (it is no mapping)
            tensor = self._file.get_slice(name)
            if tensor.get_dtype() not in _DTYPES:
                raise ValueError(f"tensor {name} has the dtype {tensor.get_dtype()}")
            dtype = jnp.dtype(_DTYPES[tensor.get_dtype()])
            described[name] = tuple(tensor.get_shape()), dtype
        return described

    def read(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)

    def close(self) -> None:
        self._stack.close()


class TorchReader:
    """A file written by `torch.save`; nothing in it but tensors and plain containers is loaded."""

    def __init__(self, path: Path):
        try:
            import torch
        except ImportError as error:
            raise ConversionError(
                [
                    f"{path} needs PyTorch to be read: pip install 'meteor-jax[convert]', or "
                    "convert a safetensors file."
                ]
            ) from error
        self._torch = torch
        load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
        try:
            loaded = load(mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = load()  # the format of torch < 1.6 cannot be mapped
        self._tensors = dict(self._flatten(loaded))

    def _flatten(self, item: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(item, Mapping):
            for name, value in item.items():
                yield from self._flatten(value, f"{prefix}.{name}" if prefix else str(name))
        elif isinstance(item, self._torch.Tensor):
            yield prefix, item.detach()

    def describe(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {
            name: (tuple(tensor.shape), jnp.dtype(str(tensor.dtype).removeprefix("torch.")))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].contiguous()
        if tensor.dtype == self._torch.bfloat16:  # which numpy() refuses
            return tensor.view(self._torch.uint16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    def close(self) -> None:
        self._tensors = {}


@dataclasses.dataclass
class Source:
    """A checkpoint. At most one file is open at a time, so tensors are best read in order.

    Attributes:
        config: config.json, empty where there is none.
        entries: the tensors by name.
        problems: what makes it unfit to be read, though its tensors' names and shapes are known.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    problems: list[str]
    _open: tuple[Path, Reader] | None = None

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, in its own dtype."""
        path = self.entries[name].path
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = path, _open_file(path)
        return self._open[1].read(name)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
        self._open = None


def open_source(path: Path) -> Source:
    """Finds the tensors in a folder or a file, without reading them.

    Raises:
        ConversionError: no such path, no weights in it; all files that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ConversionError([f"--source {path} does not exist."])
    folder = path if path.is_dir() else path.parent
    config_path = folder / CONFIG_FILE
    config = _load_json(config_path) if config_path.is_file() else {}
    files, index = ([path], {}) if path.is_file() else _files(path)
    source = Source(folder, config, entries={}, problems=[])
    unreadable: list[str] = []
    for file in files:
        try:
            described = _describe(file, source.problems)
        except ConversionError as error:
            unreadable += error.problems
            continue
        for name, (shape, dtype) in described.items():
            if name in source.entries:
                first = source.entries[name].path.name
                source.problems.append(f"twice: {name}: in {first} and in {file.name}")
            source.entries[name] = Entry(file, shape, dtype, order=len(source.entries))
        source.problems += [
            f"missing: {name}: the index places it in {file.name}, which does not have it"
            for name in index.get(file.name, ())
            if name not in described
        ]
    if unreadable:
        raise ConversionError(unreadable + source.problems)
    return source


def _files(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """The weight files of a folder, and the tensors that its index, if any, places in each."""
    for index_path in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        index: dict[str, list[str]] = {}
        for name, file in _load_json(index_path)["weight_map"].items():
            index.setdefault(file, []).append(name)
        return [folder / file for file in sorted(index)], index
    for pattern in WEIGHTS:
        files = sorted(folder.glob(pattern))
        if files:
            return files, {}
    raise ConversionError([f"no weights in {folder}: expected one of {', '.join(WEIGHTS)}."])


def _load_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConversionError([f"{path.name}: not JSON ({error})."]) from error


def _describe(path: Path, problems: list[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What a file holds. Of a truncated one its header tells, and `problems` grows."""
    if not path.is_file():
        raise ConversionError([f"{path.name}: the index names it, but it is not there."])
    try:
        reader = _open_file(path)
        try:
            return reader.describe()
        finally:
            reader.close()
    except ConversionError:
        raise
    except _UNREADABLE as error:
        described = _describe_truncated(path) if path.suffix == SAFETENSORS else {}
        if described:
            problems.append(f"truncated: {path.name} ends before its tensors do; fetch it again")
            return described
        reason = one_line(error)[:200]
        raise ConversionError(
            [f"{path.name}: cannot be read ({reason}); truncated or corrupt? Fetch it again."]
        ) from error


def _describe_truncated(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What the header of a safetensors file says, where the file ends before its tensors do."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > path.stat().st_size:
            return {}
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return {}
    header.pop("__metadata__", None)
    return {
        name: (tuple(tensor["shape"]), jnp.dtype(_DTYPES.get(tensor["dtype"], "uint8")))
        for name, tensor in header.items()
    }


def _open_file(path: Path) -> Reader:
    if path.suffix == SAFETENSORS:
        return SafetensorsReader(path)
    if path.suffix in TORCH:
        return TorchReader(path)
    raise ConversionError(
        [f"{path.name}: expected a file that ends in {SAFETENSORS}, {', '.join(TORCH)}."]
    )
