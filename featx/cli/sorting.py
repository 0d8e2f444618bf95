"""Photos into a folder for each label: copies under safe names, which never replace a file."""

from __future__ import annotations

import filecmp
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from featx._files import cannot_write, make_folder, temporary, without_replacing
from featx.errors import SourceError, UsageError

ASIDE = {"unsure": "_unsure", "unknown": "_unknown"}
"""The folders of photos that a model does not answer about, by its reason."""

_MAX_NAME = 255
"""Bytes of a file's name on common file systems; a folder's is kept to half of it."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sorted:
    """How many photos were copied into each folder (by its name), and how many were there already."""

    copied: dict[str, int]
    there: int


def sort_into(
    folder: Path,
    photos: Iterable[tuple[Path, str, str | None]],
    class_names: Sequence[str],
    *,
    progress: Progress | None = None,
) -> Sorted:
    """Copy photos into ``folder/label``, those that are not to be relied on into the folders of :data:`ASIDE`.

    A photo that is there already, with the same bytes under the same name, is not copied again; where a name is taken
    by another one, the copy is called ``name (2).jpg`` and so on.

    Parameters
    ----------
    folder : made where it is not there.
    photos : file, label and reason to abstain (or None) of each.
    class_names : all labels that there may be; they decide the names of the folders.
    progress : called with the number of photos done.

    Raises
    ------
    SourceError
        A photo cannot be read any more.
    StoreError, UsageError
        A copy cannot be written, or a link or a file stands where a folder is to be.
    """
    photos, target = list(photos), folder.resolve()
    if any(path.resolve().is_relative_to(target) for path, *_ in photos):
        raise UsageError(
            "the photos lie in the folder that they are to be sorted into", where=folder, hint="Choose another folder."
        )
    names = folder_names(class_names)
    by_folder: dict[str, list[Path]] = {}
    for path, label, reason in photos:
        by_folder.setdefault(names[label] if reason is None else ASIDE[reason], []).append(path)
    copied: dict[str, int] = {}
    done = 0
    for name, paths in by_folder.items():
        into = folder / name
        if into.is_symlink() or (into.exists() and not into.is_dir()):
            raise UsageError("a link or a file is in the way of a folder", where=into, hint="Move it away.")
        make_folder(into)
        with temporary(into / "photo") as temp:
            for path in paths:
                copied[into.name] = copied.get(into.name, 0) + _copy(path, temp, into)
                done += 1
                if progress:
                    progress(done)
    return Sorted({name: count for name, count in sorted(copied.items()) if count}, done - sum(copied.values()))


def folder_names(labels: Sequence[str]) -> dict[str, str]:
    """A name for the folder of each label: one folder's, on any file system, and of no other label."""
    names: dict[str, str] = {}
    taken = {name.casefold() for name in ASIDE.values()}
    for label in labels:
        plain = safe_name(label)
        names[label] = next(name for name in _numbered(plain, "", _MAX_NAME // 2) if name.casefold() not in taken)
        taken.add(names[label].casefold())
    return names


def safe_name(text: str) -> str:
    """Text as the name of one visible file or folder: no separators, no control characters, no dots at its ends."""
    bad = {"Cc", "Cs", "Zl", "Zp"}
    plain = "".join("_" if char in '/\\:*?"<>|' or unicodedata.category(char) in bad else char for char in text)
    return plain.strip(". ") or "_"


def _numbered(stem: str, suffix: str, limit: int) -> Iterator[str]:
    """``stem.suffix``, ``stem (2).suffix``, ... of at most ``limit`` bytes each."""
    number = 1
    while True:
        tail = (f" ({number})" if number > 1 else "") + suffix
        head = stem
        while len(os.fsencode(head + tail)) > limit and head:
            head = head[:-1]
        yield head + tail
        number += 1


def _copy(path: Path, temp: Path, into: Path) -> bool:
    """Copy one photo; False where it is there already."""
    for name in _numbered(path.stem, path.suffix, _MAX_NAME):
        new = into / name
        if not os.path.lexists(new):
            try:
                shutil.copyfile(path, temp)
                status = path.stat()
                os.utime(temp, ns=(status.st_atime_ns, status.st_mtime_ns))
            except OSError as error:
                if error.filename == os.fspath(path):
                    raise SourceError(f"cannot be read ({error.strerror})", where=path) from error
                raise cannot_write(new, error) from error
            try:
                without_replacing(temp, new)
            except FileExistsError:
                continue  # taken just now
            except OSError as error:
                raise cannot_write(new, error) from error
            return True
        if new.is_file() and not new.is_symlink() and filecmp.cmp(path, new, shallow=False):
            return False
    raise AssertionError("names do not end")
