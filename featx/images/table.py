"""Images in the rows of Parquet or Arrow files.

This is how Hugging Face keeps image data sets: a column of ``{bytes, path}``, a column of class numbers, and what they
mean as JSON in the schema's metadata. A plain column of bytes is taken too, and labels may be text. Rows are read a
few at a time as they are embedded, so a table may be larger than memory; the table's size and times tell that it has
not changed.

A process of its own reads them (:mod:`featx.images.table_reader`), since pyarrow does not survive every damaged file.
One is enough for all tables, as rows are asked for in order.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from featx.errors import FeatxError, ImageError, SourceError, not_installed
from featx.images.child import ATTEMPTS, Child
from featx.images.origin import MAX_FETCHED, Fetched, ImageRef, file_ref, splits_from_names
from featx.images.table_reader import ERROR, IMAGE, NONE

_PATIENCE = 300.0
"""Seconds that one answer may take: a slow disk has to be waited for, a reader that hangs has not."""

T = TypeVar("T")


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
        status = path.stat()
        for row, label in enumerate(_reader(path).labels(path)):
            refs.append(file_ref(f"{name}/{row:06d}", Row(path, row), label, split, status))
    return refs


def table_columns(refs: Sequence[ImageRef]) -> list[str]:
    """The names of the columns beside image and label of the tables that hold these images; those that all have."""
    names = [_reader(path).columns(path) for path in _tables(refs)]
    return [name for name in (names[0] if names else []) if all(name in others for others in names)]


def with_column(refs: Sequence[ImageRef], column: str) -> list[ImageRef]:
    """The images, which are rows of tables, with a column of these as metadata.

    Raises
    ------
    SourceError
        A table has no such column, or one whose values are no short texts, numbers or dates.
    """
    found = {path: _reader(path).texts(path, column) for path in _tables(refs)}
    name = next((name for name, _ in found.values()), column)
    return [
        replace(ref, metadata=((name, found[ref.path.path][1][ref.path.row]),)) if isinstance(ref.path, Row) else ref
        for ref in refs
    ]


def _tables(refs: Sequence[ImageRef]) -> list[Path]:
    return list(dict.fromkeys(ref.path.path for ref in refs if isinstance(ref.path, Row)))


def row_origin(path: Path, row: str) -> Row:
    """Where the image of one row is."""
    return Row(path, int(row) if row.isascii() and row.isdigit() else -1)


@dataclass(frozen=True, slots=True)
class Row(Fetched):
    """The image of one row of a table."""

    path: Path
    row: int

    def read_bytes(self) -> bytes:
        """The bytes of the image's file."""
        data = _reader(self.path).image(self.path, self.row)
        if data is None:
            raise ImageError("empty", "the row has no bytes (the image may be a file elsewhere, which is not followed)")
        return data


class _Reader(Child):
    """The process that reads tables; threads take turns."""

    module, what, missing = "featx.images.table_reader", "a process that reads tables", FeatxError

    def __init__(self) -> None:
        self._turn = threading.Lock()
        super().__init__({})
        atexit.register(self._leave)

    def _leave(self) -> None:
        self.stop()
        self.close()

    def labels(self, path: Path) -> list[str | None]:
        """The class name of each row, None for those without."""
        rows, found = self._list(path)
        return found or [None] * rows

    def columns(self, path: Path) -> list[str]:
        """The names of the columns beside image and label."""
        return list(self._list(path, "")[0])

    def texts(self, path: Path, column: str) -> tuple[str, list[str]]:
        """The name of a column, as the table spells it, and its value in each row."""
        return self._list(path, column)

    def image(self, path: Path, row: int) -> bytes | None:
        """The bytes of one row's image, or None where it has none."""

        def take() -> bytes | None:
            answer = self._answer(path)
            return None if answer == NONE else answer.removeprefix(IMAGE)

        return self._ask(take, path, row=row)

    def _list(self, path: Path, column: str | None = None) -> tuple[Any, list[Any]]:
        """What the reader says of a table, and then of each row, if anything."""

        def take() -> tuple[Any, list[Any]]:
            about, count = json.loads(self._answer(path))
            known: dict[Any, Any] = {}  # one string for each value, however many rows have it
            found: list[Any] = []
            while len(found) < count:
                found += [known.setdefault(value, value) for value in json.loads(self._answer(path))]
            return about, found

        return self._ask(take, path, column=column)

    def _ask(self, take: Callable[[], T], path: Path, row: int | None = None, column: str | None = None) -> T:
        with self._turn:
            for _ in range(ATTEMPTS):
                self.wait_until_ready()
                try:
                    question = {"path": str(path.absolute()), "row": row, "column": column}
                    self._socket.send_bytes(json.dumps(question).encode())
                    return take()
                except FeatxError:
                    raise
                except (EOFError, OSError):
                    code = self.end()
                except BaseException:  # Ctrl-C: what it would say now is an answer to another question
                    self.end()
                    raise
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise _damaged(f"reading it took the process down ({how}), {ATTEMPTS} times", path)

    def _answer(self, path: Path) -> bytes:
        if not self._socket.poll(_PATIENCE):
            self.end()
            raise _damaged(f"reading it did not end within {_PATIENCE:g} s", path)
        answer = self._socket.recv_bytes(MAX_FETCHED + 1)
        if not answer.startswith(ERROR):
            return answer
        reason, told = json.loads(answer.removeprefix(ERROR))
        raise SourceError(**told) if reason is None else ImageError(reason, told["what"])


def _damaged(what: str, path: Path) -> SourceError:
    return SourceError(what, where=path, hint="The file may be damaged: fetch it again, or make it anew.")


def _reader(path: Path) -> _Reader:
    """The reader of this process; UsageError where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise not_installed("pyarrow", "parquet", f"{path}: a {path.suffix} file")
    with _starting:
        return _reader_of(os.getpid())


_starting = threading.Lock()


@functools.cache
def _reader_of(process: int) -> _Reader:
    # A process that was forked must not speak through its parent's socket.
    return _Reader()
