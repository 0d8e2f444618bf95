"""HDF5 files that can be trusted: h5py's only door.

HDF5 is a format in which a small file can name other files of the host, declare petabytes, or carry
filters that run native code. So nothing is read here before the file has been compared with what
featx itself would have written: plain groups and datasets behind hard links, little-endian numbers
or fixed-length UTF-8, no external or virtual storage, no filter but fletcher32, and no more bytes
declared than the file has.

Two files guard themselves: the index and a packed store start with a 512-byte HDF5 user block that
holds the sha256 of all bytes after it. Shards are guarded by the manifest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featx._files import LatchedFile
from featx.errors import StoreError, in_words

USER_BLOCK = 512
MAX_STRING = 4_096
"""Bytes that an id or the name of a class may have: the longest path that Linux knows."""

_SHORT = 5
_SEAL = b"featx sha256 "
_MAX_ATTRIBUTE = 65_000  # HDF5 keeps an attribute with its name in a message of less than 64 kB
RESTORE = "Restore it from a copy, or delete the store and extract again."


@dataclass(frozen=True)
class Column:
    """One dataset to be written: blocks of rows whose lengths add up to ``rows``."""

    name: str
    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]
    rows: int
    blocks: Iterable[NDArray[Any]]

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> Column:
        """A column from one array."""
        return cls(name, array.dtype, array.shape[1:], len(array), [array])


def strings(values: Sequence[str]) -> NDArray[np.bytes_]:
    """Text as fixed-length UTF-8, which reads four times faster than variable length."""
    encoded = [value.encode() for value in values]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def write(path: Path, columns: Iterable[Column], attributes: Mapping[str, str], *, seal: bool = False) -> None:
    """Write a new file of equally long columns; with ``seal`` it carries its own sha256.

    Raises
    ------
    OSError
        The disk is full, or fails otherwise.
    """
    with LatchedFile(path) as raw:
        with h5py.File(raw, "w", userblock_size=USER_BLOCK if seal else 0) as file:
            for name, value in attributes.items():
                text = value.encode()
                if len(text) > _MAX_ATTRIBUTE:
                    raise StoreError(f"the {name} is longer than {_MAX_ATTRIBUTE:,} bytes", where=path.parent)
                file.attrs.create(name, text, dtype=h5py.string_dtype("utf-8", max(len(text), 1)))
            for column in columns:
                _write_column(file, column, raw)
        raw.check()
    if seal:
        with path.open("r+b") as raw:
            raw.seek(USER_BLOCK)
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
            raw.seek(0)
            raw.write((_SEAL + digest.encode() + b"\n").ljust(USER_BLOCK, b"\0"))


def _write_column(file: h5py.File, column: Column, raw: LatchedFile) -> None:
    dtype = column.dtype
    if dtype.kind == "S":
        if dtype.itemsize > MAX_STRING:
            raise StoreError(f"a text is longer than {MAX_STRING:,} bytes", where=f"column {column.name}")
        dtype = h5py.string_dtype("utf-8", dtype.itemsize)
    # Whole-row chunks of about 256 kB: one read a row, and a checksum over little.
    width = int(np.prod(column.row_shape, dtype=np.int64)) * dtype.itemsize
    chunk = max(64, min(256, 2**18 // max(width, 1)))
    dataset = file.create_dataset(
        column.name,
        shape=(column.rows, *column.row_shape),
        dtype=dtype,
        chunks=(max(1, min(chunk, column.rows)), *column.row_shape) if column.rows and width else None,
        fletcher32=True if column.rows and width else None,
        track_times=False,
    )
    at = 0
    for block in column.blocks:
        dataset[at : at + len(block)] = block.view(dtype) if dtype.kind == "S" else block
        at += len(block)
        raw.check()
    if at != column.rows:
        raise ValueError(f"column {column.name}: {at} rows were given, {column.rows} were announced")


def _foreign(path: Path, start: bytes) -> StoreError:
    make = "To make a store: featx extract FOLDER --out STORE"
    if b"bundle.json" in start:
        return StoreError("this is a model, not a store", where=path, hint=f"featx predict and serve take it. {make}")
    if not start.startswith((_SEAL[:4], b"\x89HDF")):
        return StoreError("this file was not made by featx", where=path, hint=make)
    return StoreError("this file was not made by featx, or its first bytes have changed", where=path)


def is_sealed(path: Path) -> bool:
    """Whether a path is a file that begins as one of featx's; whether it is sound, :func:`check_seal` says."""
    if not path.is_file():
        return False
    with path.open("rb") as raw:
        return raw.read(len(_SEAL)) == _SEAL


def check_seal(path: Path) -> str:
    """Compare a sealed file with its own sha256, and return that; StoreError when they differ."""
    _must_be_regular(path)
    with _reading(path), path.open("rb") as raw:
        block = raw.read(USER_BLOCK)
        found = hashlib.file_digest(raw, "sha256").hexdigest()
    if not block.startswith(_SEAL):
        raise _foreign(path, block)
    if block != (_SEAL + found.encode() + b"\n").ljust(USER_BLOCK, b"\0"):
        raise StoreError("the file was altered: its checksum does not match", where=path, hint=RESTORE)
    return found


class CheckedFile:
    """An open HDF5 file whose structure has been checked; every read is checked as well."""

    def __init__(self, path: Path, columns: Mapping[str, h5py.Dataset], rows: int) -> None:
        self.path, self.columns, self.rows = path, columns, rows

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of one column; embeddings are checked to be finite."""
        with _reading(self.path):
            data: NDArray[Any] = self.columns[name][start:stop]
        if data.dtype.kind == "f" and not np.isfinite(data).all():
            raise StoreError(f"NaN or infinity in {name}", where=self.path, hint=RESTORE)
        return data

    def text(self, name: str) -> list[str]:
        """A column of strings."""
        values = self.read(name)
        try:
            if values.dtype.itemsize <= _SHORT and len(values):
                # Few different ones, such as splits: one string for each, however many rows there are.
                known = {value: value.decode() for value in np.unique(values).tolist()}
                return [known[value] for value in values.tolist()]
            return [value.decode() for value in values.tolist()]
        except UnicodeDecodeError as error:
            raise StoreError(f"{name} is not UTF-8", where=self.path) from error


def read_attributes(path: Path) -> dict[str, str]:
    """The attributes of a file, before anything else in it is looked at: what it is decides what it must hold."""
    with _reading(path), _open(path) as file:
        return {name: _attribute(path, file, name) for name in file.attrs}


def _attribute(path: Path, file: h5py.File, name: str) -> str:
    described = file.attrs.get_id(name)
    kind = described.get_type()
    if not _is_text(kind) or described.shape != ():
        raise StoreError(f"attribute {name!r} is not fixed-length text; refused", where=path)
    if kind.get_size() > _MAX_ATTRIBUTE:
        raise StoreError(f"attribute {name!r} is larger than {_MAX_ATTRIBUTE:,} bytes; refused", where=path)
    value = np.empty((), dtype=f"S{kind.get_size()}")
    described.read(value, mtype=kind)
    return bytes(value.item()).decode()


def _is_text(kind: h5py.h5t.TypeID) -> bool:
    return (
        isinstance(kind, h5py.h5t.TypeStringID)
        and not kind.is_variable_str()
        and kind.get_cset() == h5py.h5t.CSET_UTF8
        and kind.get_strpad() == h5py.h5t.STR_NULLPAD
    )


def _open(path: Path) -> h5py.File:
    _must_be_regular(path)
    return h5py.File(path, "r", locking=False)


def _must_be_regular(path: Path) -> None:
    # A pipe would be waited for, and a device may never end.
    if path.exists() and not path.is_file():
        raise StoreError("not a regular file; refused", where=path)


@contextmanager
def open_checked(path: Path, expected: Mapping[str, str]) -> Iterator[CheckedFile]:
    """Open a file for reading after comparing its structure with what is expected of it.

    Parameters
    ----------
    expected : column name -> kind: "float32 matrix", "uint8 matrix", "int64", or "text". Names with slashes are in
        groups; there is to be nothing else.
    """
    with _reading(path):
        size = path.stat().st_size
        file = _open(path)
    try:
        with _reading(path):
            columns = _check_structure(path, file, expected, size)
        lengths = {int(column.shape[0]) for name, column in columns.items() if name != "class_names"}
        if len(lengths) > 1:
            raise StoreError("the datasets have different numbers of rows", where=path, found=sorted(lengths))
        yield CheckedFile(path, columns, lengths.pop() if lengths else 0)
    finally:
        file.close()


def _check_structure(path: Path, file: h5py.File, expected: Mapping[str, str], size: int) -> dict[str, h5py.Dataset]:
    columns: dict[str, h5py.Dataset] = {}
    groups: dict[str, tuple[h5py.Group, set[str]]] = {"": (file, set())}
    for name, kind in expected.items():
        *folders, last = name.split("/")
        here = ""
        for folder in folders:
            inside, members = groups[here]
            members.add(folder)
            here = f"{here}{folder}/"
            if here not in groups:
                group = _hard_linked(path, inside, folder)
                if not isinstance(group, h5py.Group):
                    raise StoreError(f"{here[:-1]} is not a group of datasets", where=path)
                groups[here] = group, set()
        inside, members = groups[here]
        members.add(last)
        columns[name] = _check_dataset(path, name, _hard_linked(path, inside, last), kind, size)
    for group, members in groups.values():
        if len(group) > len(members):
            raise StoreError("more objects than the format has", where=path, expected=sorted(members), found=len(group))
    return columns


def _hard_linked(path: Path, group: h5py.Group, name: str) -> Any:
    link = group.get(name, getlink=True)
    if link is None:
        raise StoreError(
            f"no {name} in the file", where=path, hint="It is not a file that featx wrote, or it is damaged."
        )
    if not isinstance(link, h5py.HardLink):
        raise StoreError(f"{name} is a link to somewhere else; refused", where=path, found=type(link).__name__)
    return group[name]


def _check_dataset(path: Path, name: str, item: Any, kind: str, size: int) -> h5py.Dataset:
    def refuse(what: str, found: object = None) -> StoreError:
        return StoreError(f"{name} {what}; refused", where=path, found=found)

    if not isinstance(item, h5py.Dataset):
        raise refuse("is not a dataset")
    creation = item.id.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        raise refuse("is a virtual dataset")
    if creation.get_external_count():
        raise refuse("keeps its data in another file")
    for index in range(creation.get_nfilters()):
        code = creation.get_filter(index)[0]
        if code != h5py.h5z.FILTER_FLETCHER32:
            raise refuse("uses a filter other than fletcher32", f"filter {code}")
    stored, shape = item.id.get_type(), item.shape
    exact, dimensions = _KINDS[kind]
    right = _is_text(stored) and stored.get_size() <= MAX_STRING if exact is None else stored.equal(exact)
    if not right or shape is None or len(shape) != dimensions:
        raise refuse(f"is not {kind}", f"{type(stored).__name__} of {stored.get_size()} bytes, shape {shape}")
    # Nothing is compressed, so a dataset cannot hold more than the file: this is what stops a shape bomb.
    declared = math.prod(map(int, shape)) * stored.get_size()
    allocated = item.id.get_storage_size()
    if declared > size or allocated > size:
        raise refuse("declares more data than the file holds", f"{max(declared, allocated):,} bytes in {size:,}")
    if shape[0] and not declared:
        raise refuse("has rows of no width")
    # What was never written would read as zeros: every chunk must be there, or the one block.
    chunks = item.chunks
    if chunks is not None:
        if chunks[1:] != shape[1:] or math.prod(map(int, chunks)) * stored.get_size() > size:
            raise refuse("is not cut into whole rows", f"chunks {chunks}")
        there = item.id.get_num_chunks() == -(-int(shape[0]) // int(chunks[0]))
    else:
        there = not declared or allocated >= declared
    if not there:
        raise refuse("has parts that were never written")
    return item


_KINDS: dict[str, tuple[h5py.h5t.TypeID | None, int]] = {
    "float32 matrix": (h5py.h5t.IEEE_F32LE, 2),
    "uint8 matrix": (h5py.h5t.STD_U8LE, 2),
    "int64": (h5py.h5t.STD_I64LE, 1),
    "text": (None, 1),
}
"""The exact type that is stored (None: fixed-length UTF-8 padded with zeros), and the number of dimensions."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """HDF5 reports damage as OSError, RuntimeError, KeyError or ValueError: all of them mean this file."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError("the file is missing", where=path, hint=RESTORE) from error
    except PermissionError as error:
        raise StoreError("no permission to read", where=path) from error
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise StoreError(f"damaged, or not HDF5 ({in_words(error)})", where=path, hint=RESTORE) from error
