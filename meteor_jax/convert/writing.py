"""A checkpoint written piece by piece: no array is ever whole in memory.

Orbax saves trees of arrays that exist. Here a leaf is a `StreamedArray`, which knows how to make
its pieces; Orbax lays out the checkpoint and its metadata, and the pieces are made and written one
after the other while it saves.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from meteor_jax.checkpoint import FOLDER

CHUNK_BYTES = 32 << 20  # of a stored chunk: what a reader of a part of an array must fetch
IN_FLIGHT_BYTES = 256 << 20  # pieces that wait to be written


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an array: `read` makes it; pieces are read by `order`.

    Attributes:
        row: where it goes along the first axis; None for the whole array.
    """

    read: Callable[[], np.ndarray]
    order: int
    row: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedArray:
    """An array that is written from pieces; together they must cover it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Sequence[Piece]


class StreamedArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes `StreamedArray`s as the zarr arrays that Orbax reads back."""

    def __init__(self, on_piece: Callable[[], None]):
        super().__init__()
        self._on_piece = on_piece

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        ordered = []
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            store = await _create(info.path, value)
            ordered += [(piece.order, piece, store) for piece in value.pieces]
        waiting: collections.deque[tuple[ts.WriteFutures, int]] = collections.deque()
        in_flight = 0
        try:
            for _, piece, store in sorted(ordered, key=lambda item: item[0]):
                array = piece.read()
                target = store if piece.row is None else store[piece.row]
                waiting.append((target.write(array), array.nbytes))
                in_flight += array.nbytes
                while in_flight > IN_FLIGHT_BYTES:
                    written, size = waiting.popleft()
                    written.result()
                    in_flight -= size
                self._on_piece()
        finally:  # after an error too: nothing may appear in a folder that is being removed
            for written, _ in waiting:
                written.result()
        return []


async def _create(path: Any, value: StreamedArray) -> ts.TensorStore:
    is_stacked = any(piece.row is not None for piece in value.pieces)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "chunks": _chunks(value.shape, value.dtype.itemsize, is_stacked=is_stacked),
            "compressor": {"id": "zstd", "level": 1},
        },
    }
    dtype = ts.dtype(value.dtype.name)
    return await ts.open(spec, dtype=dtype, shape=value.shape, create=True)


def _chunks(shape: tuple[int, ...], itemsize: int, *, is_stacked: bool) -> list[int]:
    """One row of a stacked array a chunk, halved along its longest axis until it is small."""
    chunks = [max(size, 1) for size in shape]
    if is_stacked:
        chunks[0] = 1
    while np.prod(chunks, dtype=np.int64) * itemsize > CHUNK_BYTES:
        axis = int(np.argmax(chunks))
        chunks[axis] = -(-chunks[axis] // 2)
    return chunks


def write_checkpoint(
    workdir: Path,
    items: Mapping[str, Mapping[str, Any]],
    *,
    documents: Mapping[str, Mapping[str, Any]],
    on_piece: Callable[[], None] = lambda: None,
) -> None:
    """Writes step 0 of a workdir.

    Args:
        items: nested dicts of `StreamedArray`s by the item's name; an empty one is left out.
        documents: items that are JSON.
        on_piece: called after each piece.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, StreamedArrayHandler(on_piece))
    )
    handlers = {
        name: ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        for name in items
    }
    arguments: dict[str, ocp.args.CheckpointArgs] = {
        name: ocp.args.PyTreeSave(tree) for name, tree in items.items() if tree
    }
    arguments |= {name: ocp.args.JsonSave(dict(value)) for name, value in documents.items()}
    with ocp.CheckpointManager(
        Path(workdir).absolute() / FOLDER,
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers=handlers | {name: ocp.JsonCheckpointHandler() for name in documents},
    ) as checkpoints:
        checkpoints.save(0, args=ocp.args.Composite(**arguments))


@contextlib.contextmanager
def whole_or_nothing(folder: Path) -> Generator[Path]:
    """A new folder beside `folder`, which takes its name at the end; after an error it is gone.

    Raises:
        FileExistsError: if `folder` exists and is not empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; remove it, or choose another --output.")
    created = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
