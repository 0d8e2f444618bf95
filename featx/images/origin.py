"""One image of a source: what it is called, and where its bytes are.

Most images are files. Some are a part of a file (a tar), and some have to be asked for (object storage, a row of a
table). All of them answer ``read_bytes``, as a path does. A decoding process reads files and parts of files by itself;
everything else is fetched by the parent, one at a time as it is needed, so that no credentials, network code or table
readers are in the process that meets hostile images. Nothing that is fetched is kept anywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from featx._arrays import SPLITS
from featx.errors import ImageError, SourceError, plural

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm"}
    | {".pbm", ".pnm", ".avif", ".mpo", ".heic", ".heif", ".hif", ".dcm", ".dicom"}
)
"""Names that promise an image. What does not keep the promise is quarantined with a reason; HEIC and DICOM are always
among them so that where they are not read, photos and scans are refused by name instead of being passed over."""

MAX_BYTES = 2**30
"""A larger file is refused unread: no honest image has that many bytes, and a decoding process would keep them."""

MAX_FETCHED = 2**28
"""As :data:`MAX_BYTES`, for what the parent fetches, which has several of them in memory at a time."""


class Origin(Protocol):
    """Where the bytes of one image can be had; a ``Path`` is one."""

    def read_bytes(self) -> bytes:
        """All of them; OSError or ImageError when they cannot be had."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """``size`` bytes of a file, from ``offset`` on: a member of a tar."""

    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """The bytes of the image's file."""
        if self.size > MAX_BYTES:
            raise too_many_bytes(self.size, MAX_BYTES)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ImageError("truncated", f"{self.path.name} ends before the image does")
        return data


class Fetched(ABC):
    """An origin that the parent of the decoding processes has to read."""

    parallel: ClassVar[int] = 1
    """How many may be fetched at a time; they are begun in order."""

    @abstractmethod
    def read_bytes(self) -> bytes:
        """All bytes; ImageError where they cannot be had, SourceError where that says nothing about this image."""


@dataclass(frozen=True, slots=True)
class Held(Fetched):
    """The bytes of an image's file, which are in memory."""

    data: bytes

    def read_bytes(self) -> bytes:
        """The bytes of the image's file."""
        return self.data


@dataclass(frozen=True, slots=True)
class Unreadable(Fetched):
    """What has a name of an image and is none that is read, such as a link inside an archive."""

    message: str

    def read_bytes(self) -> bytes:
        """The bytes of the image's file."""
        raise ImageError("unreadable", self.message)


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a source.

    Parameters
    ----------
    id : the path relative to the source, with ``/``; what results are reported under.
    path : where the bytes are: a path, or another :class:`Origin`.
    label : the class name, or None.
    split : "train", "val", "test", or "" where the source has no splits.
    size : bytes (for a row of a table, those of the whole file), or -1 when the file is missing.
    mtime_ns : modification time in nanoseconds of the file or of the file that holds it; -1 where there is none, so
        that the image is read again each time.
    ctime_ns, inode : of the same file, where it is one of this machine. A program that sets the modification time back
        (``rsync --times``, ``cp -p``) cannot set the first, and a file that takes another's place has another inode.
    group : images with the same one belong together (a patient, a site, a burst); "" where nothing is said.
    metadata : further columns of a list, or the one of a table that images are grouped by, name and value.
    """

    id: str
    path: Origin
    label: str | None
    split: str
    size: int
    mtime_ns: int
    ctime_ns: int = -1
    inode: int = -1
    group: str = ""
    metadata: tuple[tuple[str, str], ...] = ()

    @property
    def stamp(self) -> int:
        """A number of 63 bits that changes with the times and the inode; -1 where there is no time."""
        if self.mtime_ns < 0:
            return -1
        decides = f"{self.mtime_ns} {self.ctime_ns} {self.inode}".encode()
        return int.from_bytes(hashlib.blake2b(decides, digest_size=8).digest()) >> 1

    @property
    def changed_ns(self) -> int:
        """When the file was changed or put there, whichever came last."""
        return max(self.mtime_ns, self.ctime_ns)


def file_ref(
    id: str, path: Origin, label: str | None, split: str, stat: os.stat_result | None, size: int | None = None
) -> ImageRef:
    """An image that is a file, or ``size`` bytes of one.

    ``stat`` is None where the system has none for it, which the extraction quarantines.
    """
    if stat is None:
        return ImageRef(id, path, label, split, -1, 0)
    size = stat.st_size if size is None else size
    return ImageRef(id, path, label, split, size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def too_many_bytes(found: int, most: int) -> ImageError:
    """The refusal of an image that is too large a file."""
    return ImageError("too_large", f"{found:,} bytes; at most {most:,} are read")


def no_images(place: str, where: Path | str, ignored: Sequence[str]) -> SourceError:
    """The error for a place without images; ``ignored`` are the other files in it."""
    return SourceError(
        f"no images {place}",
        where=where,
        expected="class folders with files such as .jpg or .png",
        found=plural(len(ignored), "other file") if ignored else "nothing",
    )


def labels_from_folders(paths: Sequence[str]) -> list[tuple[str | None, str]]:
    """Label and split of each path, by the folders in it: ``[split/]label/.../name``.

    Raises
    ------
    SourceError
        Folders called train or test stand beside others.
    """
    has_splits = _has_splits(paths)
    found: list[tuple[str | None, str]] = []
    for path in paths:
        parts = path.split("/")
        split = parts.pop(0) if has_splits else ""
        found.append((parts[0] if len(parts) > 1 else None, split))
    return found


def _has_splits(paths: Sequence[str]) -> bool:
    """Whether every image lies two folders deep below train, val or test."""
    tops = {path.split("/", 1)[0] for path in paths}
    if tops <= set(SPLITS) and all(path.count("/") >= 2 for path in paths):
        return True
    stray = tops - set(SPLITS)
    if len(tops & {"train", "test", "val"}) >= 2 and stray:
        raise SourceError(
            "split folders and other folders side by side",
            expected="either train/ val/ test/ with class folders in each, or class folders alone",
            found=", ".join(sorted(stray)[:5]),
        )
    return False


_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def splits_from_names(names: Sequence[str]) -> list[str]:
    """The split that each file of images is of, by a word in its path (``train-00000-of-00002.parquet``).

    As Hugging Face reads names. A word that all files share, or none of them has, divides nothing: then it is "" for
    all.
    """
    found = []
    for name in names:
        words = re.split(r"[^a-z0-9]+", re.sub(r"\.[a-z]+$", "", name.lower()))
        found.append(next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), ""))
    return found if len(set(found)) > 1 else [""] * len(found)
