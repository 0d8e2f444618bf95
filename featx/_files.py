"""Files that are there whole or not at all: publishing by rename, hashes, one writer at a time, late signals."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from featx._system import lock
from featx.errors import FeatxError, StoreBusy, StoreError

T = TypeVar("T")

TEMP_PREFIX = ".tmp-"
_TEMPORARY = re.compile(r"\.tmp-[0-9]+-[0-9a-f]+-.+", re.DOTALL)
"""A name that :func:`temporary` gave."""

_NO_HARD_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signature(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced; () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that hashes are taken of; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def seal(fields: Mapping[str, Any]) -> bytes:
    """JSON of the fields with a checksum of them, in the one spelling that :func:`unseal` takes."""
    checksum = sha256_json(fields)
    return (json.dumps({**fields, "checksum": checksum}, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def unseal(raw: bytes) -> dict[str, Any]:
    """The fields that :func:`seal` was given; ValueError says what is wrong with bytes that it did not make."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    claimed = fields.pop("checksum", None)
    if claimed != sha256_json(fields):
        raise ValueError("its checksum does not match")
    if raw != seal(fields):
        raise ValueError("bytes were changed")
    return fields


def publish(
    path: Path,
    write: Callable[[Path], object],
    verify: Callable[[Path], str | None] | None = None,
) -> Path:
    """Make ``path`` appear with its whole content, or not at all, whatever happens meanwhile.

    The order is what makes it safe against a kill and against a power cut: ``write`` a temporary file in the
    same folder, fsync it, ``verify`` it (which may return the final name), rename, fsync the folder.

    Returns
    -------
    The path that was published.
    """
    try:
        with temporary(path) as temp:
            write(temp)
            fsync_path(temp)
            name = verify(temp) if verify is not None else None
            final = path.parent / name if name else path
            temp.replace(final)
            fsync_path(path.parent)
            return final
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a file or a folder that is not done yet; what is there at the end is removed.

    Who has such a name holds a shared lock (flock) of the folder that it is in. The kernel's locks go with their
    processes, however these end: whoever gets the lock for himself knows that nobody is at work, and removes
    what dead processes left. Where a file system has no such locks, nothing is removed.
    """
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            lock(handle)
        except OSError:
            pass  # others are at work, or there are no locks here
        else:
            for left in list(path.parent.glob(f"{TEMP_PREFIX}*")):
                if _TEMPORARY.fullmatch(left.name) and left.lstat().st_uid == os.geteuid():
                    _remove(left)
        for _ in range(50):
            try:
                lock(handle, shared=True)
            except BlockingIOError:
                # Whoever clears up is done in a moment. Another program's lock of the folder (flock FOLDER featx ...)
                # may last as long as this process, and keeps out those who clear up just as well.
                time.sleep(0.02)
            except OSError:
                break  # no locks here: then nobody gets one for himself, either
            else:
                break
        temp = path.parent / f"{TEMP_PREFIX}{os.getpid()}-{time.monotonic_ns():x}-{path.name}"
        try:
            yield temp
        finally:
            with contextlib.suppress(OSError):
                _remove(temp)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def without_replacing(path: Path, new: Path) -> None:
    """Rename a file to a name that is free; FileExistsError where it is not, also where that has just changed."""
    try:
        new.hardlink_to(path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        new.touch(exist_ok=False)
        path.replace(new)
    else:
        path.unlink()


def publish_bytes(path: Path, data: bytes) -> Path:
    """:func:`publish` for content that is at hand."""
    return publish(path, lambda temp: temp.write_bytes(data))


def publish_text(path: Path, text: str) -> Path:
    """:func:`publish` in UTF-8; what of file names is no Unicode text is spelt with backslashes."""
    return publish_bytes(path, text.encode(errors="backslashreplace"))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table as CSV with a header; cells are empty where a row has no such column."""
    return "".join([csv_line(columns), *(csv_line([row.get(name, "") for name in columns]) for row in rows)])


def csv_line(cells: Iterable[Any]) -> str:
    """One line of a table as CSV, with its end; names of files and labels may have ends of lines within."""
    out = io.StringIO()
    # Before Python 3.13 a cell is quoted for those ends of lines only that the writer itself makes.
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue()[: -len("\r\n")] + "\n"


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """A file's bytes; StoreError for a pipe or a device, which may never end, and for more than ``limit`` bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise StoreError("not a regular file; refused", where=path)
        if limit is not None and status.st_size > limit:
            raise StoreError(f"larger than {limit:,} bytes; refused", where=path)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"cannot be read ({error.strerror})", where=path) from error


class LineFile:
    """A file of lines that only grows: what was appended is on the disk before it counts, whatever happens then.

    A line that a crash cut short is the last one, has no line break, and is dropped. Who appends must be the only one.

    Parameters
    ----------
    path : of the file; it is made by the first :meth:`open`.

    Attributes
    ----------
    lines : those that were there, whole, when this was made.

    Raises
    ------
    StoreError
        It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1
        try:
            raw = read_regular(path)
        except FileNotFoundError:
            raw = b""
        whole, _, _ = raw.rpartition(b"\n")
        self.lines: Sequence[bytes] = whole.split(b"\n") if whole else []
        self._size = len(whole) + 1 if whole else 0

    def read(self, take: Callable[[Any, int], T], *, what: str, hint: str) -> list[T]:
        """What ``take`` makes of each line, given its JSON and its number; it refuses one by a ValueError or the like.

        Raises
        ------
        StoreError
            A line was refused: ``what`` was altered.
        """
        found = []
        for number, line in enumerate(self.lines, start=1):
            try:
                found.append(take(json.loads(line, parse_constant=_no_number), number))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                where = f"{self.path}, line {number}"
                raise StoreError(f"{what} was altered", where=where, found=str(error), hint=hint) from error
        return found

    def open(self) -> None:
        """Take away what a crash cut short, and be ready to append."""
        try:
            # Never through a link: another file would be cut.
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if os.fstat(self._handle).st_size > self._size:  # else its time stays that of the last line
                os.truncate(self._handle, self._size)
            fsync_path(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, line: bytes) -> None:
        """Add a line, given without its break; when this returns it is on the disk, and when it raises it is not there.

        Raises
        ------
        StoreError
            It cannot be written.
        """
        data = line + b"\n"
        try:
            view, at = memoryview(data), self._size
            while view:
                written = os.pwrite(self._handle, view, at)
                view, at = view[written:], at + written
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):  # what is left of it is dropped when the file is next opened
                os.truncate(self._handle, self._size)
            raise cannot_write(self.path, error) from error
        self._size += len(data)

    def close(self) -> None:
        """Append no more."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


class LatchedFile:
    """A new file for a library that cannot bear a failing write (HDF5 crashes the process at exit after a full disk).

    The first error is kept for :meth:`check`. From then on all writes succeed as far as the library can tell: they
    are kept in memory, and reads see them.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._late: list[tuple[int, bytes]] = []
        self._at = 0
        self._file = path.open("x+b", buffering=0)

    def __enter__(self) -> LatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of a file; the end is that of the file with what is kept in memory."""
        if whence == os.SEEK_END:
            offset += max([os.fstat(self._file.fileno()).st_size, *(at + len(data) for at, data in self._late)])
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        """``size`` bytes; h5py takes an object for a file by this method, and uses :meth:`readinto`."""
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; what was never written reads as zeros."""
        view = memoryview(buffer).cast("B")
        start, stop = self._at, self._at + len(view)
        data = os.pread(self._file.fileno(), len(view), start)
        view[:] = data.ljust(len(view), b"\0")
        for at, late in self._late:
            low, high = max(at, start), min(at + len(late), stop)
            if low < high:
                view[low - start : high - start] = late[low - at : high - at]
        self._at = stop
        return len(view)

    def write(self, data: Any) -> int:
        """Take all of it, whatever the disk says."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and self.error is None:
            try:
                count = os.pwrite(self._file.fileno(), rest, self._at)
            except OSError as error:
                self.error = error
            else:
                self._at, rest = self._at + count, rest[count:]
        if rest:
            self._late.append((self._at, bytes(rest)))
            self._at += len(rest)
        return size

    def truncate(self, size: int) -> int:
        """Set the length."""
        try:
            self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""


def cannot_write(path: Path, error: OSError) -> FeatxError:
    """The sentence for a full disk, a read-only folder and their like."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            "the disk is full",
            where=path.parent,
            hint="What was published is intact; free some space and run the same command again.",
        )
    if error.errno == errno.EFBIG:
        return StoreError(
            "a file may not become that large here",
            where=path.parent,
            hint="Raise the limit (ulimit -f), or choose another file system; what was published is intact.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError("no permission to write", where=path.parent, hint="Choose another folder for the output.")
    return StoreError(f"cannot write ({error.strerror or error})", where=path)


def link_or_copy(path: Path, new: Path) -> None:
    """Give an immutable file a second name; where the file system has no hard links, a second copy."""
    if not path.is_symlink():
        try:
            new.hardlink_to(path)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
        else:
            return
    shutil.copyfile(path, new)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writers that died; call it with the writer's lock held."""
    for temp in folder.glob(f"{TEMP_PREFIX}*"):
        try:
            temp.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(temp, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they are still there after a power cut."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in new:
            fsync_path(folder.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold ``path`` as the one writer; a second one gets a StoreError that names the first.

    The lock is the kernel's (flock): it goes with the process, however that ends, so a stale one cannot be.
    The file's text only says whom to blame.
    """
    try:
        # Never through a link: the file is truncated, and a foreign store may have it point anywhere.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        # A file object: where a Ctrl-C comes just before the close, the collector closes it, and the lock goes with it.
        file = open(path, "r+b", buffering=0, opener=lambda name, _: os.open(name, flags, 0o644))  # noqa: SIM115
        handle = file.fileno()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise StoreError("not the lock of a store; refused", where=path, hint="Delete it.") from error
        raise cannot_write(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise StoreError("not the lock of a store; refused", where=path, hint="Delete it.")
        try:
            lock(handle)
        except BlockingIOError as error:
            raise StoreBusy(
                "another process is writing to this store",
                where=path.parent,
                found=_holder(path),
                hint="Wait for it, or stop it; reading is possible meanwhile.",
            ) from error
        except OSError as error:
            raise StoreError(
                f"this file system has no locks ({error.strerror}), so a second writer could not be kept out",
                where=path.parent,
                hint="Choose a local disk for the output.",
            ) from error
        try:
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        except OSError as error:
            raise cannot_write(path, error) from error
        yield
        with contextlib.suppress(OSError):  # the text is a courtesy; what counts goes with the handle
            os.truncate(handle, 0)
    finally:
        file.close()


def refuse_second_writer(store: Path) -> None:
    """StoreError if some process is writing to a store just now: to say so before work begins, not after."""
    lock = store / ".lock"
    if lock.exists():
        with writer_lock(lock):
            pass


def _holder(path: Path) -> str:
    # Read without the lock: the holder may be between taking it and writing its name, so look again for a while.
    for _ in range(20):
        try:
            owner = json.loads(path.read_text())
            return f"process {owner['pid']} on host {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.02)
    return "a process that has not written its name"


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is done, so that no Ctrl-C, nor a second one, cuts it in two.

    Only where Python handles the signal (a default action still ends the process, as kill -9 would), and only in
    the main thread, which is the one that gets them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    held: list[int] = []
    passing = False

    def hold(number: int, frame: FrameType | None) -> None:
        if passing:
            before[number](number, frame)
        else:
            held.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, hold)
        yield
    finally:
        # First let signals pass: if one interrupts the lines below, the handler that is left behind does no harm.
        passing = True
        for held_back, previous in before.items():
            signal.signal(held_back, previous)
        if held:
            signal.raise_signal(held[0])
