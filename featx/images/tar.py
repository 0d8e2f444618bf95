"""Images inside tars: WebDataset shards, or class folders that someone has put into one file.

Nothing is unpacked. The headers are read once to learn where each image begins; a decoding process then reads that
part of the archive. In a WebDataset shard the files of one image share their name up to the first dot:
``0001.jpg``, ``0001.cls`` (the class, as a number or a name) or ``0001.json`` (an object with ``label``,
``class_name``, ``class`` or ``cls``). Where no image has either, folders inside the archive are classes, as on a disk.

An archive that is cut short, or whose names lead out of it, is refused whole; a link or a member that claims more bytes
than an image has is refused as one image.
"""

from __future__ import annotations

import functools
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from featx._files import signature
from featx.errors import SourceError
from featx.images.origin import (
    IMAGE_SUFFIXES,
    ImageRef,
    Origin,
    Part,
    Unreadable,
    file_ref,
    labels_from_folders,
    splits_from_names,
)

_MAX_HEADER = 2**20
_MAX_LABEL = 2**16
_LABEL_KEYS = ("label", "class_name", "class", "cls")
_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"(\xb5/\xfd")
"""How gzip, bzip2, xz and zstd begin."""

_AGAIN = "Fetch it again, or make it anew."


@dataclass(frozen=True)
class _Member:
    name: str
    origin: Origin
    size: int


def tar_refs(
    files: Sequence[tuple[str, Path]], progress: Callable[[int], None] | None = None
) -> tuple[list[ImageRef], list[str]]:
    """The images of all archives, and the names of the other files in them.

    Parameters
    ----------
    files : name and path of each archive.
    progress : called with the number of images so far.

    Raises
    ------
    SourceError
        An archive is damaged, compressed, or names what is outside it.
    """
    splits = splits_from_names([name for name, _ in files])
    found: list[tuple[str, os.stat_result, str, _Member]] = []
    labels: dict[tuple[str, str], str] = {}
    ignored: list[str] = []
    for (archive, path), split in zip(files, splits, strict=True):
        status = path.stat()
        seen: set[str] = set()
        for member in _members(path):
            key, extension = _key(member.name)
            if f".{extension.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES:
                if member.name in seen:
                    raise SourceError("two files have the same name", where=path, found=member.name)
                seen.add(member.name)
                found.append((archive, status, split, member))
                if progress is not None and len(found) % 1000 == 0:
                    progress(len(found))
            elif extension in ("cls", "json"):
                label = _label(path, member, extension)
                if label is not None:
                    labels[archive, key] = label
            else:
                ignored.append(f"{archive}/{member.name}")
    named: list[tuple[str | None, str]]
    if labels:
        named = [(labels.get((archive, _key(member.name)[0])), split) for archive, _, split, member in found]
    else:
        # A folder that holds all of them is how tar was called, and no class.
        names = [member.name.removeprefix("./") for *_, member in found]
        common = os.path.commonpath([name.rpartition("/")[0] for name in names]) if names else ""
        top = f"{common}/" if common and any("/" in name[len(common) + 1 :] for name in names) else ""
        inside = labels_from_folders([name.removeprefix(top) for name in names])
        named = [(label, own or split) for (label, own), (_, _, split, _) in zip(inside, found, strict=True)]
    refs = [
        file_ref(f"{archive}/{member.name}", member.origin, label, split, status, member.size)
        for (archive, status, _, member), (label, split) in zip(found, named, strict=True)
    ]
    return refs, ignored


def member_origin(archive: Path, name: str) -> Origin:
    """Where one member of an archive is."""
    return _places(archive, signature(archive)).get(name, Unreadable("no such member in the archive"))


@functools.lru_cache(maxsize=16)
def _places(archive: Path, state: tuple[int, ...]) -> dict[str, Origin]:
    return {member.name: member.origin for member in _members(archive)}


def _key(name: str) -> tuple[str, str]:
    """What the files of one image share, and the rest; as WebDataset divides names."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension


def _label(archive: Path, member: _Member, extension: str) -> str | None:
    where = f"{archive}, member {member.name}"
    if not isinstance(member.origin, Part) or member.size > _MAX_LABEL:
        raise SourceError("not a label", where=where, expected=f"a file of at most {_MAX_LABEL:,} bytes")
    try:
        text = member.origin.read_bytes().decode()
        value = json.loads(text) if extension == "json" else text.strip()
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not a label in UTF-8 ({error})", where=where) from error
    if isinstance(value, dict):
        value = next((value[key] for key in _LABEL_KEYS if value.get(key) is not None), None)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise SourceError("a label that is neither text nor a whole number", where=where, found=repr(value)[:40])
    return None if value is None or value == "" else str(value)


def _members(path: Path) -> Iterator[_Member]:
    """All regular members and links that are not hidden, in order; the archive is checked on the way."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
                yield from _checked(path, tar, size)
                file.seek(tar.offset)
                _check_end(path, file)
    except (tarfile.TarError, ValueError) as error:  # ValueError is what tarfile makes of numbers that are none
        with path.open("rb") as file:
            start = file.read(6)
        if start.startswith(_COMPRESSED):
            what = "a compressed archive, in which nothing can be found at random"
            raise SourceError(what, where=path, hint="Unpack it, or make a plain .tar of it.") from error
        raise SourceError(f"not a valid tar file ({error})", where=path, hint=_AGAIN) from error
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror or error})", where=path) from error


def _checked(path: Path, tar: tarfile.TarFile, size: int) -> Iterator[_Member]:
    regular: dict[str, Part] = {}
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined] # it would keep them all; a shard has many
        name = info.name.removeprefix("./")
        parts = name.split("/")
        if name.startswith("/") or ".." in parts:
            raise SourceError(
                "a name that leads out of the archive; refused",
                where=path,
                found=info.name[:200],
                hint="Make it anew.",
            )
        if info.isdir() or parts[-1].startswith(".") or parts[0] == "__MACOSX":
            continue
        if info.isreg() and not info.issparse():
            if info.offset_data + info.size > size:
                raise SourceError(
                    "the archive ends before its last file does",
                    where=path,
                    expected=f"{info.offset_data + info.size:,} bytes or more",
                    found=f"{size:,}",
                    hint=_AGAIN,
                )
            part = regular[name] = Part(path, info.offset_data, info.size)
            yield _Member(name, part, info.size)
        elif info.islnk() and info.linkname.removeprefix("./") in regular:
            part = regular[info.linkname.removeprefix("./")]  # the same file under a second name
            yield _Member(name, part, part.size)
        else:
            kind = f"a link to {info.linkname[:200]}" if info.issym() or info.islnk() else "a file of a special kind"
            yield _Member(name, Unreadable(f"{kind} inside an archive; not followed"), info.size)


def _check_end(path: Path, file: BinaryIO) -> None:
    """A tar ends with blocks of zeros; anything else means that it was cut, or that something is appended."""
    end = file.read(_BLOCK)
    if end == b"\0" * _BLOCK and not file.read(2**20).strip(b"\0"):
        return
    joined = end == b"\0" * _BLOCK
    what = "something follows its end, as when archives are joined with cat" if joined else "it has no end"
    raise SourceError(f"not a valid tar file ({what})", where=path, hint=_AGAIN)


class _Headers:
    """What tarfile may read of an archive: headers, of sensible size (one may claim to be of many gigabytes)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)
