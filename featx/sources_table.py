"""Images in the rows of Parquet or Arrow files: pyarrow's only door for reading.

This is how Hugging Face keeps image data sets: a column of ``{bytes, path}``, a column of class numbers, and what they
mean as JSON in the schema's metadata. A plain column of bytes is taken too, and labels may be text. Rows are read a
few at a time as they are embedded, so a table may be larger than memory; the table's size and time tell that it has
not changed.

Which column is the image is asked of the metadata, then of the types; which is the label, of the metadata, then of the
names in :data:`LABEL_COLUMNS`. Where that leaves more than one, the columns are named and nothing is guessed.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featx.errors import ImageError, SourceError
from featx.origins import MAX_FETCHED, Fetched, ImageRef, file_ref, not_installed, splits_from_names, too_many_bytes

if TYPE_CHECKING:
    import pyarrow

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "bytes", "image_bytes")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "class_name", "target")
_ROWS_AT_A_TIME = 16
_BUFFER = 2**20
_MAX_METADATA = 2**24


def table_refs(files: Sequence[tuple[str, Path]]) -> list[ImageRef]:
    """The images of all tables.

    Parameters
    ----------
    files : name and path of each table.

    Raises
    ------
    SourceError
        A file is no table, or has no column that can be the image.
    """
    splits = splits_from_names([name for name, _ in files])
    refs = []
    for (name, path), split in zip(files, splits, strict=True):
        table = open_table(path)
        status = path.stat()
        labels = table.labels()
        for row in range(table.rows):
            origin = Row(path, status.st_mtime_ns, row)
            label = labels[row] if labels else None
            refs.append(file_ref(f"{name}/{row:06d}", origin, label, split, status))
    return refs


def row_origin(path: Path, row: str) -> Row:
    """Where the image of one row is."""
    return Row(path, path.stat().st_mtime_ns, int(row) if row.isascii() and row.isdigit() else -1)


@dataclass(frozen=True, slots=True)
class Row(Fetched):
    """The image of one row of a table, as the file was at ``mtime_ns``."""

    path: Path
    mtime_ns: int
    row: int

    def read_bytes(self) -> bytes:
        data = _opened(self.path, self.mtime_ns).image(self.row)
        if data is None:
            raise ImageError("empty", "the row has no bytes (the image may be a file elsewhere, which is not followed)")
        if len(data) > MAX_FETCHED:
            raise too_many_bytes(len(data), MAX_FETCHED)
        return data


def open_table(path: Path) -> Table:
    """A table with its schema understood; SourceError where that is not possible."""
    return _opened(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _opened(path: Path, mtime_ns: int) -> Table:
    return Table(path)


class Table:
    """One file of rows.

    Rows are meant to be asked for in rising order, which reads each block of the file once; any other order works, and
    begins again at the row group that the row is in.
    """

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
        except ModuleNotFoundError as error:
            raise not_installed("pyarrow", "parquet", f"{path}: a {path.suffix} file") from error
        self.path = path
        self._errors: tuple[type[Exception], ...] = (pyarrow.ArrowException, OSError, ValueError)
        self._lock = threading.Lock()
        self._stream: Iterator[pyarrow.RecordBatch] = iter(())
        self._first, self._next, self._group = 0, 0, -1
        self._images: list[bytes | None] = []
        try:
            self._file = _Parquet(path) if path.suffix.lower() == ".parquet" else _Arrow(path)
        except self._errors as error:
            raise SourceError(f"not a table that pyarrow reads ({_short(error)})", where=path) from error
        self.rows = self._file.starts[-1]
        self._features = _features(path, self._file.schema)
        self._image = self._image_column()
        self._label = self._label_column()

    def labels(self) -> list[str | None] | None:
        """The class name of each row; None where there is no such column."""
        if self._label is None:
            return None
        try:
            values: list[Any] = self._file.column(self._label)
        except self._errors as error:
            raise self._damaged(error) from error
        names = self._features.get(self._label, {}).get("names")
        found: list[str | None] = []
        for row, value in enumerate(values):
            if value is None or value == "" or (names and value == -1):  # -1: how datasets marks unlabelled rows
                found.append(None)
            elif isinstance(value, bool) or not isinstance(value, str | int):
                raise SourceError("a label that is no text and no whole number", where=self._at(row), found=repr(value))
            elif names and isinstance(value, int) and not 0 <= value < len(names):
                raise SourceError("a class number without a name", where=self._at(row), found=value)
            else:
                found.append(str(names[value] if names and isinstance(value, int) else value))
        return found

    def image(self, row: int) -> bytes | None:
        """The bytes of one row's image, or None where it has none."""
        if not 0 <= row < self.rows:
            raise ImageError("missing", "the table has no such row")
        with self._lock:
            try:
                return self._seek(row)
            except self._errors as error:
                self._group = -1
                raise ImageError("corrupt", f"the table cannot be read here: {_short(error)}") from error

    def _seek(self, row: int) -> bytes | None:
        group = next(i for i, stop in enumerate(self._file.starts[1:]) if row < stop)
        if group != self._group or row < self._first:
            self._group = group
            self._stream = self._file.batches(group, self._image)
            self._first = self._next = self._file.starts[group]
            self._images = []
        while row >= self._next:
            batch = next(self._stream, None)
            if batch is None:
                raise OSError("it ends before its last row")
            column = batch.column(0)
            self._images = [_bytes_of(column[i].as_py()) for i in range(len(column))]
            self._first, self._next = self._next, self._next + len(column)
        return self._images[row - self._first]

    def _image_column(self) -> str:
        schema = self._file.schema
        marked = [name for name, feature in self._features.items() if feature.get("_type") == "Image"]
        able = [field.name for field in schema if _holds_bytes(field.type)]
        found = [name for name in marked if name in able]
        found = found or [n for n in able if n in IMAGE_COLUMNS] or able
        best = [name for name in found if name == IMAGE_COLUMNS[0]] or found
        if len(best) == 1:
            return best[0]
        raise SourceError(
            f"{'more than one column' if best else 'no column'} with images",
            where=self.path,
            expected="one column of bytes, or of {bytes, path}; of several, one called image",
            found=", ".join(f"{field.name} ({field.type})" for field in schema)[:500] or "no columns",
        )

    def _label_column(self) -> str | None:
        names = [field.name for field in self._file.schema if field.name != self._image]
        marked = [name for name in names if self._features.get(name, {}).get("_type") == "ClassLabel"]
        found = [n for n in LABEL_COLUMNS if n in (marked or names)][:1] or marked
        if len(found) > 1:
            raise SourceError(
                "more than one column of classes",
                where=self.path,
                expected="one, or one called label",
                found=", ".join(found),
                hint="Rename the one that you mean to label.",
            )
        return found[0] if found else None

    def _at(self, row: int) -> str:
        return f"{self.path}, row {row}, column {self._label}"

    def _damaged(self, error: Exception) -> SourceError:
        return SourceError(
            f"the table cannot be read ({_short(error)})", where=self.path, hint="Fetch or make it again."
        )


class _Parquet:
    """A Parquet file. Column chunks are streamed, so a row group may be of any size."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.starts = [0]
        for group in range(self._file.num_row_groups):
            self.starts.append(self.starts[-1] + self._file.metadata.row_group(group).num_rows)

    def batches(self, group: int, column: str) -> Iterator[pyarrow.RecordBatch]:
        """The rows of one group, a few at a time, with the one column."""
        yield from self._file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[column], use_threads=False)

    def column(self, name: str) -> list[Any]:
        """All values of a small column."""
        values: list[Any] = self._file.read(columns=[name], use_threads=False).column(name).to_pylist()
        return values


class _Arrow:
    """An Arrow stream (what ``Dataset.save_to_disk`` writes) or file, mapped into memory: nothing is read twice."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import ipc

        mapped = pyarrow.memory_map(str(path))
        try:
            table = ipc.open_stream(mapped).read_all()
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            table = ipc.open_file(mapped).read_all()
        self._table = table
        self.schema = table.schema
        self.starts = [0, table.num_rows]

    def batches(self, group: int, column: str) -> Iterator[pyarrow.RecordBatch]:
        """The rows, a few at a time, with the one column."""
        yield from self._table.select([column]).to_batches(_ROWS_AT_A_TIME)

    def column(self, name: str) -> list[Any]:
        """All values of a small column."""
        values: list[Any] = self._table.column(name).to_pylist()
        return values


def _features(path: Path, schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """What ``datasets`` says of the columns, or nothing."""
    raw = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        if len(raw) > _MAX_METADATA:
            raise ValueError(f"{len(raw):,} bytes")
        features = json.loads(raw).get("info", {}).get("features", {})
        checked: dict[str, dict[str, Any]] = {n: found for n, found in features.items() if isinstance(found, dict)}
        for feature in checked.values():
            if not all(isinstance(name, str) for name in feature.get("names") or ()):
                raise ValueError("class names that are no text")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"metadata that datasets would not write ({_short(error)})", where=path) from error
    return checked


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _bytes_of(value: Any) -> bytes | None:
    found = value.get("bytes") if isinstance(value, dict) else value
    return found if isinstance(found, bytes) else None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
