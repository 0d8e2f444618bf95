"""What a frozen trunk makes of every image, kept in a file beside the store for as long as a tail is trained on it.

The file's name is a hash of everything that decides its content: the trunk's provenance, the precision, how images are
decoded, and the digests of the images, row by row. Rows are appended as they are computed, and a record beside it says
how many there are and the sha256 of their bytes; whoever continues or uses the file compares that first. So an
interrupted run loses no more than seconds of work, and altered or foreign activations are never trained on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._files import cannot_write, make_folder, publish_bytes, sha256_json, uninterrupted, writer_lock
from featx._system import available_cpus
from featx.backbones import Engine
from featx.errors import MismatchError, SourceError, UsageError
from featx.images import DecoderPool, Origin, Preprocess

MAX_GIB = 8.0
"""Without another bound, activations may take so much of the disk."""

_RECORD_SECONDS = 5.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """The activations that are wanted, one row an image.

    Parameters
    ----------
    ids : (n,) of the images, for messages.
    origins : (n,) where their bytes are.
    digests : uint8 (n, 32), which their bytes must have.
    preprocess, decode : how they become pixels.
    shape : of one row; without an engine, (h, w, 3) of the pixels themselves.
    provenance : of the trunk and how it is run; plain JSON types.
    engine : runs the trunk; None for the pixels themselves.
    """

    ids: Sequence[str]
    origins: Sequence[Origin]
    digests: NDArray[np.uint8]
    preprocess: Preprocess
    decode: str
    shape: tuple[int, ...]
    provenance: Mapping[str, Any]
    engine: Engine | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 activations, or uint8 pixels."""
        return np.dtype(np.uint8 if self.engine is None else np.float32)

    @property
    def row_bytes(self) -> int:
        """Of one image."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """What the file will have."""
        return len(self.ids) * self.row_bytes

    @property
    def key(self) -> str:
        """Hash of all that decides the content."""
        engine = self.engine
        decides = {
            "provenance": self.provenance,
            "preprocess": self.preprocess.to_json(),
            "decode": self.decode,
            "shape": self.shape,
            "dtype": str(self.dtype),
            "engine": None if engine is None else [engine.name, engine.device, engine.precision],
            "digests": hashlib.sha256(np.ascontiguousarray(self.digests).data).hexdigest(),
        }
        return sha256_json(decides)[:24]


def _check_room(folder: Path, nbytes: int, max_gib: float) -> None:
    """Refuse, before anything is computed, what is larger than the bound or than the disk."""
    hint = "Unfreeze fewer blocks (later activations are smaller), or use fewer images."
    if nbytes > max_gib * 2**30:
        raise UsageError(
            "the activations would take too much of the disk", where=folder, expected=f"at most {max_gib:g} GiB",
            found=f"{nbytes / 2**30:.3g} GiB", hint=f"{hint} --max-cache allows more.",
        )  # fmt: skip
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if nbytes > free:
        raise UsageError(
            "the disk has no room for the activations", where=folder, expected=f"{nbytes / 2**30:.3g} GiB",
            found=f"{free / 2**30:.3g} GiB", hint=hint,
        )  # fmt: skip


@contextmanager
def activations(
    folder: Path, wanted: Wanted, *, max_gib: float = MAX_GIB, progress: Progress | None = None
) -> Iterator[NDArray[Any]]:
    """The activations (n, *shape) of all images, memory-mapped; computed where they are not there yet.

    The file stays until the block is left without an exception, so that what is run again goes on.

    Parameters
    ----------
    folder : where the file goes; made, and removed again when nothing is left in it.
    wanted : which.
    max_gib : bound of the file's size.
    progress : called as ``progress(done, total)`` of images.

    Raises
    ------
    UsageError
        Larger than the bound or the disk.
    MismatchError, SourceError
        An image is another one than in the store, or cannot be read.
    """
    _check_room(folder, wanted.nbytes, max_gib)
    make_folder(folder)
    with writer_lock(folder / ".lock"):
        path = folder / f"{wanted.key}.act"
        try:
            _complete(path, wanted, progress)
        except OSError as error:
            raise cannot_write(path, error) from error
        yield np.memmap(path, dtype=wanted.dtype, mode="r", shape=(len(wanted.ids), *wanted.shape))
        path.unlink(missing_ok=True)
        _record_of(path).unlink(missing_ok=True)
        (folder / ".lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others' activations may be in it
        folder.rmdir()


def _record_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _complete(path: Path, wanted: Wanted, progress: Progress | None) -> None:
    """Append the rows that the file does not have."""
    total = len(wanted.ids)
    with path.open("r+b" if path.exists() else "x+b") as file:
        done, digest = _sound_rows(path, file, wanted.row_bytes)
        file.seek(done * wanted.row_bytes)
        file.truncate()
        if progress:
            progress(done, total)
        recorded = time.monotonic()

        def record() -> None:
            file.flush()
            os.fsync(file.fileno())
            publish_bytes(_record_of(path), json.dumps({"rows": done, "sha256": digest.hexdigest()}).encode())

        try:
            for rows in _rows(wanted, done):
                data = rows.tobytes()
                with uninterrupted():
                    file.write(data)
                    digest.update(data)
                    done += len(rows)
                if progress:
                    progress(done, total)
                if time.monotonic() - recorded > _RECORD_SECONDS:
                    record()
                    recorded = time.monotonic()
        finally:
            record()


def _sound_rows(path: Path, file: Any, row_bytes: int) -> tuple[int, Any]:
    """How many rows the file has for sure, and the running hash of their bytes."""
    try:
        said = json.loads(_record_of(path).read_bytes())
        rows, sha256 = int(said["rows"]), str(said["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, hashlib.sha256()
    digest, left = hashlib.sha256(), rows * row_bytes
    file.seek(0)
    while part := file.read(min(left, 2**22)):
        digest.update(part)
        left -= len(part)
    return (rows, digest) if left == 0 and digest.hexdigest() == sha256 else (0, hashlib.sha256())


def _rows(wanted: Wanted, start: int) -> Iterator[NDArray[Any]]:
    """Rows from ``start`` on, some at a time."""
    if start == len(wanted.ids):
        return
    if wanted.engine is None:
        yield from _pixels(wanted, start, 16)
    else:
        for (rows,) in wanted.engine.embed(_pixels(wanted, start, wanted.engine.batch_size)):
            if rows.shape[1:] != wanted.shape:
                raise ValueError(f"expected activations {wanted.shape}, got {rows.shape[1:]}")
            yield np.ascontiguousarray(rows, dtype=np.float32)


def _pixels(wanted: Wanted, start: int, size: int) -> Iterator[NDArray[np.uint8]]:
    images: list[NDArray[np.uint8]] = []
    todo = range(start, len(wanted.ids))
    workers = available_cpus()
    with DecoderPool(wanted.preprocess, workers=min(workers, len(todo)), mode=wanted.decode) as pool:
        stream = pool.run((wanted.origins[row] for row in todo), lambda digest: False, ahead=2 * size + workers)
        for row, decoded in zip(todo, stream, strict=True):
            if decoded.digest is not None and decoded.digest != wanted.digests[row].tobytes():
                raise MismatchError(
                    "the image is another one than in the store", where=wanted.ids[row],
                    hint="Bring the store up to date first: featx extract SOURCE --out STORE",
                )  # fmt: skip
            if decoded.refusal is not None:
                raise SourceError(
                    f"the image cannot be read ({decoded.refusal.reason}: {decoded.refusal.what})",
                    where=wanted.ids[row], hint="The store has it: is SOURCE what the store was made from?",
                )  # fmt: skip
            assert decoded.pixels is not None
            images.append(decoded.pixels)
            if len(images) == size:
                yield np.stack(images)
                images = []
    if images:
        yield np.stack(images)
