"""Published folders of parquet files, read where they lie: rows in their order, images at random.

Nothing is fetched and nothing is unpacked; a row group at a time is in memory.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteor_jax.config import ConfigError, one_line
from meteor_jax.evaluation.tasks.benchmarks.datasets import Folder

BATCH_ROWS = 64  # read at once, since a row may have megabytes of image
KEPT_ROW_GROUPS = 4

Row = dict[str, Any]


class ParquetTable:
    """The rows of several files as one sequence.

    Raises:
        ConfigError: naming the file that is no parquet, or that lacks a column.
    """

    def __init__(self, files: Sequence[Path]):
        self._files = [_open(path) for path in files]
        self._paths = tuple(files)
        self._names = [tuple(file.schema_arrow.names) for file in self._files]
        groups = [
            (file, group) for file in self._files for group in range(file.metadata.num_row_groups)
        ]
        self._groups = groups
        sizes = [file.metadata.row_group(group).num_rows for file, group in groups]
        self._ends = list(itertools.accumulate(sizes))
        self._kept: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def has(self, columns: Iterable[str]) -> bool:
        """Whether every file has all of `columns`."""
        return all(set(columns) <= set(names) for names in self._names)

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows in their order, with `columns` only."""
        self._check(columns)
        for path, file in zip(self._paths, self._files, strict=True):
            try:
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
                    yield from batch.to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise _broken(path, error) from error

    def row(self, index: int, columns: Sequence[str]) -> Row:
        """One row. The last few row groups that were read stay in memory."""
        self._check(columns)
        place = bisect.bisect_right(self._ends, index)
        begin = self._ends[place - 1] if place else 0
        table = self._read_group(place, tuple(columns))
        return {name: table[name][index - begin].as_py() for name in columns}

    def _read_group(self, place: int, columns: tuple[str, ...]) -> pa.Table:
        with self._lock:
            key = place, columns
            if key not in self._kept:
                file, group = self._groups[place]
                try:
                    self._kept[key] = file.read_row_group(group, columns=list(columns))
                except (pa.ArrowException, OSError) as error:
                    raise _broken(self._paths[self._files.index(file)], error) from error
                if len(self._kept) > KEPT_ROW_GROUPS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _check(self, columns: Sequence[str]) -> None:
        for path, names in zip(self._paths, self._names, strict=True):
            for column in columns:
                if column not in names:
                    raise ConfigError(
                        f"{path}: no column '{column}'; it has {', '.join(names)}. Download the "
                        "folder anew, or give yours the published schema."
                    )


class ParquetSource:
    """One split of a published data set; see `Folder`.

    A record holds the images that a question is asked about: `images`, encoded, and `image_id`.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        rows: ParquetTable,
        images: ParquetTable,
        num_images: int | None = None,
    ):
        self.name, self.split = folder.name, folder.split
        self._folder, self._rows, self._images = folder, rows, images
        self._size = min(len(images), num_images or len(images))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`images`: a list of bytes, b"" where there is none; `image_id`: the index itself."""
        index = range(len(self))[index]
        folder = self._folder
        columns = folder.images
        if folder.order is not None:
            row = self._images.row(index, folder.order_columns)
            columns = folder.order(row)
        row = self._images.row(index, columns) if columns else {}
        encoded = [data for column in columns for data in _bytes_of(row[column])]
        return {"images": encoded, "image_id": index}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def questions(self, columns: Sequence[str]) -> Iterator[tuple[int, int, Row]]:
        """Of every row, the index of the record with its images, its own, and its `columns`."""
        keys = self._folder.same_image
        if not self._rows.has(keys):
            keys = ()  # a folder of one's own may lack what only tells images apart
        wanted = tuple(dict.fromkeys((*columns, *keys)))
        first: dict[Any, int] = self._image_ids()
        for number, row in enumerate(self._rows.rows(wanted)):
            record = number
            if keys:
                key = tuple(_comparable(row[name]) for name in keys)
                record = first.setdefault(key, number)
            if record < len(self):
                yield record, number, row

    def _image_ids(self) -> dict[Any, int]:
        """Where each image lies, in a data set whose images have rows of their own."""
        column = self._folder.image_id
        if not column:
            return {}
        return {(row[column],): place for place, row in enumerate(self._images.rows((column,)))}


def open_folder(
    folder: Folder, *, data_dir: str | Path, num_images: int | None = None
) -> ParquetSource:
    """Opens DATA_DIR/<directory of the folder>, at any depth below which the files may lie.

    Args:
        num_images: the first so many images; all where None.

    Raises:
        ConfigError: if there are none, with the command that downloads them.
    """
    rows = ParquetTable(_find_files(folder, folder.config, data_dir=data_dir))
    images = rows
    if folder.image_config:
        images = ParquetTable(_find_files(folder, folder.image_config, data_dir=data_dir))
    return ParquetSource(folder, rows=rows, images=images, num_images=num_images)


def _find_files(folder: Folder, config: str, *, data_dir: str | Path) -> list[Path]:
    """`config/split-*.parquet`, or files without such a folder where there is none."""
    data_dir = Path(data_dir).expanduser()
    base = data_dir / folder.directory
    found = [
        path
        for path in sorted(base.rglob("*.parquet"))
        if path.stem == folder.split or path.name.startswith(f"{folder.split}-")
    ]
    if config:
        of_config = [path for path in found if config in path.relative_to(base).parts[:-1]]
        found = of_config or [path for path in found if path.parent == base]
    if not found:
        raise ConfigError(
            f"{folder.name}: no {folder.split}-*.parquet in {base / config}. Get it with: "
            f"{folder.download_command(data_dir)}"
        )
    return found


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({one_line(error)}); download it anew.")


def _bytes_of(value: Any) -> list[bytes]:
    """The encoded images of a cell."""
    if isinstance(value, Mapping):
        return [value["bytes"] or b""]
    if isinstance(value, list):
        return [data for item in value for data in _bytes_of(item)]
    return [value or b""]


def _comparable(value: Any) -> Any:
    """Images by a digest of their bytes, anything else as it is."""
    if isinstance(value, (Mapping, list)):
        return b"".join(hashlib.sha256(data).digest() for data in _bytes_of(value))
    return value
