"""The inside of the process that reads tables: pyarrow's only door for reading.

pyarrow is native code that trusts what a file says of itself: a flipped bit takes the process down now and then. So a
table is opened here, every batch that is used is validated in full, and plain JSON and bytes go to the parent, which is
:mod:`featx.images.table`.

Which column is the image is asked of the metadata, then of the types; which is the label, of the metadata, then of the
names in :data:`LABEL_COLUMNS`. Where that leaves more than one, the columns are named and nothing is guessed.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from featx._files import signature
from featx._system import confine, limited_memory
from featx.errors import FeatxError, ImageError, SourceError, in_words
from featx.images.child import READY, speak_to_nobody
from featx.images.grouping import MAX_TEXT, column_of
from featx.images.origin import MAX_FETCHED, too_many_bytes

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "bytes", "image_bytes")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "class_name", "target")
IMAGE, NONE, ERROR = b"I", b"N", b"E"
"""How an answer begins: an image's bytes, no image, or why there is no answer. All others are JSON."""

_IDLE = 60.0
"""Seconds without a question after which the process ends; the parent starts another when it has one."""

_SPARE = 2**31
"""Bytes of memory for one question beside the file's own, which may be mapped."""

_ROWS_AT_A_TIME = 16
_LABELS_AT_A_TIME = 4096
_BUFFER = 2**20
_MAX_METADATA = 2**24


def serve(handle: int) -> None:
    """Answer questions until the parent is gone, or has none."""
    with contextlib.suppress(EOFError, ConnectionError), Connection(handle) as parent:
        confine()
        parent.recv_bytes()
        import pyarrow

        # jemalloc gives memory back soonest. Not every pyarrow is built with it, and its usual allocator does as well.
        if "jemalloc" in pyarrow.supported_memory_backends():
            pyarrow.set_memory_pool(pyarrow.jemalloc_memory_pool())
        pyarrow.set_cpu_count(1)
        pyarrow.set_io_thread_count(1)
        speak_to_nobody()
        parent.send_bytes(READY)
        while parent.poll(_IDLE):
            _answer(parent, **json.loads(parent.recv_bytes()))


def _answer(parent: Connection, path: str, row: int | None, column: str | None = None) -> None:
    """The image of one row, or what is in a table: something about it, the number of values that follow, and those.

    Without a ``column`` these are the number of rows and their labels, where there are any; of a column, its name and
    its values; of the column "", the names of all, and no values.
    """
    state = signature(Path(path))
    try:
        with limited_memory((state[1] if state else 0) + _SPARE):
            table = _opened(Path(path), state)
            if row is not None:
                data = table.image(row)
                if data is not None and len(data) > MAX_FETCHED:
                    raise too_many_bytes(len(data), MAX_FETCHED)
                parent.send_bytes(NONE if data is None else IMAGE + data)
                return
            about: Any = table.rows
            values: Iterator[list[Any]] | None = table.labels()
            if column == "":
                about, values = table.columns, None
            elif column is not None:
                about = column_of(column, dict.fromkeys(table.columns))
                values = table.texts(about)
            parent.send_bytes(json.dumps([about, 0 if values is None else table.rows]).encode())
            for some in values or ():
                parent.send_bytes(json.dumps(some).encode())
    except FeatxError as error:
        slots = {name: getattr(error, name) for name in ("what", "where", "expected", "found", "hint")}
        told = {name: None if value is None else str(value)[:2000] for name, value in slots.items()}
        parent.send_bytes(ERROR + json.dumps([getattr(error, "reason", None), told]).encode())


@functools.lru_cache(maxsize=8)
def _opened(path: Path, state: tuple[int, ...]) -> Table:
    return Table(path)


class Table:
    """One file of rows.

    Rows are meant to be asked for in rising order, which reads each block of the file once; any other order works, and
    begins again at the row group that the row is in.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path = path
        self._errors: tuple[type[Exception], ...] = (pyarrow.ArrowException, OSError, ValueError)
        self._errors += (LookupError, OverflowError, MemoryError)
        self._stream: Iterator[pyarrow.RecordBatch] = iter(())
        self._first, self._next, self._group = 0, 0, -1
        self._images: list[bytes | None] = []
        try:
            self._file = _Parquet(path) if path.suffix.lower() == ".parquet" else _Arrow(path)
            self.rows = self._file.starts[-1]
            # An image has more than one byte, even where all are one.
            if sorted(self._file.starts) != self._file.starts or self.rows > path.stat().st_size:
                raise ValueError(f"{self.rows:,} rows declared")
            self._features = _features(path, self._file.schema)
            self._image = self._image_column()
            self._label = self._label_column()
        except self._errors as error:
            raise SourceError(f"not a table that pyarrow reads ({in_words(error)})", where=path) from error

    def labels(self) -> Iterator[list[str | None]] | None:
        """The class name of each row, some at a time; None where there is no such column."""
        return None if self._label is None else self._values(self._label, self._class_of)

    @property
    def columns(self) -> list[str]:
        """The names of those beside the image and the label."""
        return [name for name in self._file.schema.names if name not in (self._image, self._label)]

    def texts(self, column: str) -> Iterator[list[str]]:
        """The value of each row in a column, some at a time, "" where there is none.

        Raises
        ------
        SourceError
            One is no short text, number or date.
        """
        return self._values(column, partial(self._text_of, column))

    def _values(self, column: str, read: Callable[[int, Any, list[str] | None], T]) -> Iterator[list[T]]:
        """What ``read`` makes of each row's number, value, and the names that the table has for the column's values."""
        names = self._features.get(column, {}).get("names")
        row = 0
        try:
            for group in range(len(self._file.starts) - 1):
                for batch in self._file.batches(group, column, _LABELS_AT_A_TIME):
                    values: list[Any] = _sound(batch).column(0).to_pylist()
                    yield [read(row + i, value, names) for i, value in enumerate(values)]
                    row += len(values)
        except self._errors as error:
            raise self._damaged(in_words(error)) from error
        if row != self.rows:
            raise self._damaged(f"{row:,} values for {self.rows:,} rows")

    def _text_of(self, column: str, row: int, value: Any, names: list[str] | None) -> str:
        if value is None:
            return ""
        if names and type(value) is int and 0 <= value < len(names):
            value = names[value]
        text = str(value) if isinstance(value, str | int | float | datetime.date) else None
        if text is None or len(text) > MAX_TEXT or "\0" in text:
            raise SourceError(
                "a value that is not a short text, a number or a date",
                where=f"{self.path}, row {row}, column {column}",
                expected=f"at most {MAX_TEXT} characters", found=f"{type(value).__name__} {str(value)[:40]!r}",
            )  # fmt: skip
        return text

    def _class_of(self, row: int, value: Any, names: list[str] | None) -> str | None:
        if value is None or value == "" or (names and value == -1):  # -1: how datasets marks unlabelled rows
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise SourceError("a label that is neither text nor a whole number", where=self._at(row), found=repr(value))
        if names and isinstance(value, int) and not 0 <= value < len(names):
            raise SourceError("a class number without a name", where=self._at(row), found=value)
        return str(names[value] if names and isinstance(value, int) else value)

    def image(self, row: int) -> bytes | None:
        """The bytes of one row's image, or None where it has none."""
        if not 0 <= row < self.rows:
            raise ImageError("missing", "the table has no such row")
        try:
            return self._seek(row)
        except self._errors as error:
            self._group = -1
            raise ImageError("corrupt", f"the table cannot be read here: {in_words(error)}") from error

    def _seek(self, row: int) -> bytes | None:
        group = next(i for i, stop in enumerate(self._file.starts[1:]) if row < stop)
        if group != self._group or row < self._first:
            self._group = group
            self._stream = self._file.batches(group, self._image, _ROWS_AT_A_TIME)
            self._first = self._next = self._file.starts[group]
            self._images = []
        while row >= self._next:
            batch = next(self._stream, None)
            if batch is None:
                raise OSError("it ends before its last row")
            column = _sound(batch).column(0)
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

    def _damaged(self, how: str) -> SourceError:
        return SourceError(
            f"the table cannot be read ({how})", where=self.path, hint="Fetch it again, or make it anew."
        )


class _Parquet:
    """A Parquet file. Column chunks are streamed, so a row group may be of any size."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
        self.schema = self._file.schema_arrow
        self.starts = [0]
        for group in range(self._file.num_row_groups):
            self.starts.append(self.starts[-1] + self._file.metadata.row_group(group).num_rows)

    def batches(self, group: int, column: str, rows: int) -> Iterator[pyarrow.RecordBatch]:
        """The rows of one group, a few at a time, with the one column."""
        yield from self._file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False)


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

    def batches(self, group: int, column: str, rows: int) -> Iterator[pyarrow.RecordBatch]:
        """The rows, a few at a time, with the one column."""
        yield from self._table.select([column]).to_batches(rows)


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
                raise ValueError("class names that are not text")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"metadata that datasets would not write ({in_words(error)})", where=path) from error
    return checked


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _sound(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """A batch whose offsets, numbers and texts have all been looked at; ArrowInvalid for another."""
    batch.validate(full=True)
    return batch


def _bytes_of(value: Any) -> bytes | None:
    found = value.get("bytes") if isinstance(value, dict) else value
    return found if isinstance(found, bytes) else None
