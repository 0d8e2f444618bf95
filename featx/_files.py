"""Files that are there whole or not at all: publishing by rename, hashes, and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from featx.errors import FeatxError, StoreError

TEMP_PREFIX = ".tmp-"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that hashes are taken of; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def publish(
    path: Path,
    write: Callable[[Path], None],
    verify: Callable[[Path], str | None] | None = None,
) -> Path:
    """Make ``path`` appear with its whole content, or not at all, whatever happens meanwhile.

    The order is what makes it safe against a kill and against a power cut: ``write`` a temporary file in the
    same folder, fsync it, ``verify`` it (which may return the final name), rename, fsync the folder.

    Returns
    -------
    The path that was published.
    """
    temp = path.parent / f"{TEMP_PREFIX}{os.getpid()}-{time.monotonic_ns():x}-{path.name}"
    try:
        write(temp)
        _fsync(temp)
        name = verify(temp) if verify is not None else None
        final = path.parent / name if name else path
        temp.replace(final)
        _fsync(path.parent)
        return final
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def publish_bytes(path: Path, data: bytes) -> Path:
    """:func:`publish` for content that is at hand."""

    def write(temp: Path) -> None:
        temp.write_bytes(data)

    return publish(path, write)


def cannot_write(path: Path, error: OSError) -> FeatxError:
    """The sentence for a full disk, a read-only folder and their like."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            "the disk is full",
            where=path.parent,
            hint="What was published is intact; free some space and run the same command again.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError("no permission to write", where=path.parent, hint="Choose another folder for the output.")
    return StoreError(f"cannot write ({error.strerror or error})", where=path)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writers that died; call it with the writer's lock held."""
    for temp in folder.glob(f"{TEMP_PREFIX}*"):
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold ``path`` as the one writer; a second one gets a StoreError that names the first.

    The lock is the kernel's (flock): it goes with the process, however that ends, so a stale one cannot be.
    The file's text only says whom to blame.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                "another process is writing to this store",
                where=path.parent,
                found=_holder(path),
                hint="Wait for it, or stop it; reading is possible meanwhile.",
            ) from error
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        os.truncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
        yield
        os.truncate(handle, 0)
    finally:
        os.close(handle)


def _holder(path: Path) -> str:
    # Read without the lock: the holder may be between taking it and writing its name, so look again for a while.
    for _ in range(20):
        try:
            owner = json.loads(path.read_text())
            return f"process {owner['pid']} on host {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.02)
    return "a process that has not written its name"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
