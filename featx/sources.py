"""Which images exist, what they are called, and how they are labelled.

A source is a folder of class folders (``train/ val/ test/`` above them are splits), a folder of images
without labels, or a CSV or JSONL manifest with the columns ``path, label[, split]``. Nothing is decoded here.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from featx.errors import SourceError

SPLITS = ("train", "val", "test")

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm"}
    | {".pbm", ".pnm", ".avif", ".mpo", ".heic", ".heif"}
)
"""Names that promise an image. What does not keep the promise is quarantined with a reason; HEIC is among
them so that an iPhone's photos are refused by name instead of being passed over."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a source.

    Parameters
    ----------
    id : the path relative to the source, with ``/``; what results are reported under.
    path : where the file is.
    label : the class name, or None.
    split : "train", "val", "test", or "" where the source has no splits.
    size : bytes, or -1 when the file is missing.
    mtime_ns : modification time in nanoseconds.
    """

    id: str
    path: Path
    label: str | None
    split: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class ImageSet:
    """The images of a source, sorted by id.

    Parameters
    ----------
    refs : the images.
    root : the folder or the manifest they come from.
    ignored : number of files that are no images by their names (``notes.txt``) and were passed over.
    """

    refs: tuple[ImageRef, ...]
    root: Path
    ignored: int = 0

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, sorted."""
        return tuple(sorted({ref.label for ref in self.refs if ref.label is not None}))

    @classmethod
    def from_source(cls, source: str | Path) -> ImageSet:
        """A folder or a manifest, whichever ``source`` is."""
        path = Path(source)
        if path.is_dir():
            return cls.from_folder(path)
        if path.is_file():
            return cls.from_manifest(path)
        raise SourceError(
            "no such folder or manifest", where=path, expected="a folder of class folders, a .csv or a .jsonl file"
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageSet:
        """Images of a folder: the name of the first folder below it (or below its split) is the label.

        Raises
        ------
        SourceError
            No such folder, no images in it, or a single class folder.
        """
        root = Path(folder)
        if not root.is_dir():
            raise SourceError("no such folder", where=root)
        found: list[tuple[str, os.stat_result]] = []
        ignored = 0
        for relative, stat in _walk(root):
            if os.path.splitext(relative)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122 - pathlib is 5 times slower here
                found.append((relative, stat))
            else:
                ignored += 1
        if not found:
            raise SourceError(
                "no images in this folder",
                where=root,
                expected="class folders with files such as .jpg or .png",
                found=f"{ignored} other files" if ignored else "nothing",
            )
        has_splits = _has_splits([relative for relative, _ in found])
        refs = []
        for relative, stat in found:
            parts = relative.split("/")
            split = parts.pop(0) if has_splits else ""
            label = parts[0] if len(parts) > 1 else None
            refs.append(ImageRef(relative, root / relative, label, split, stat.st_size, stat.st_mtime_ns))
        images = cls(tuple(sorted(refs, key=lambda ref: ref.id)), root, ignored)
        if len(images.class_names) == 1:
            raise SourceError(
                "only one class folder",
                where=root,
                expected="at least two folders, one a class",
                found=images.class_names[0],
                hint=f"For images without labels, give the folder that holds them: {root / images.class_names[0]}",
            )
        return images

    @classmethod
    def from_manifest(cls, manifest: str | Path) -> ImageSet:
        """Images named by a CSV file with a header, or by a JSONL file: ``path``, ``label`` and perhaps ``split``.

        Paths are relative to the manifest's folder. An empty label means unlabelled.
        """
        path = Path(manifest)
        rows = _READERS.get(path.suffix.lower())
        if rows is None:
            raise SourceError("not a manifest", where=path, expected=".csv or .jsonl", found=path.suffix or "no suffix")
        refs: dict[str, ImageRef] = {}
        for number, row in rows(path):
            ref = _manifest_ref(path, number, row)
            earlier = refs.setdefault(ref.id, ref)
            if earlier is not ref:
                raise SourceError("the same path twice", where=f"{path}, line {number}", found=ref.id)
        if not refs:
            raise SourceError("no images in this manifest", where=path)
        images = cls(tuple(refs[name] for name in sorted(refs)), path)
        if len(images.class_names) == 1:
            raise SourceError(
                "only one class in this manifest",
                where=path,
                expected="at least two labels, or none",
                found=images.class_names[0],
            )
        return images


def count_labels(labels: Sequence[str | None]) -> dict[str, int]:
    """Number of images of each class, sorted by name; unlabelled ones are left out."""
    return dict(sorted(Counter(label for label in labels if label is not None).items()))


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Relative paths and stats of all files below a folder, hidden ones left out, links followed once."""
    seen: set[tuple[int, int]] = set()
    pending = [("", root.stat())]
    while pending:
        prefix, stat = pending.pop()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "__MACOSX")):
                        continue
                    relative = prefix + entry.name
                    try:
                        if entry.is_dir():
                            pending.append((relative + "/", entry.stat()))
                        elif entry.is_file():
                            yield relative, entry.stat()
                        elif entry.is_symlink():
                            raise SourceError("a link that leads nowhere", where=root / relative, hint="Remove it.")
                    except OSError as error:
                        raise SourceError(f"cannot be looked at ({error.strerror})", where=root / relative) from error
        except PermissionError as error:
            raise SourceError("no permission to read this folder", where=root / prefix) from error


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


def _manifest_ref(manifest: Path, number: int, row: dict[str, Any]) -> ImageRef:
    where = f"{manifest}, line {number}"
    name = row.get("path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise SourceError("no path in this line", where=where, expected="path, label[, split]", found=list(row))
    label, split = row.get("label"), row.get("split") or ""
    if isinstance(label, int | float) and not isinstance(label, bool):
        label = str(label)
    if not (label is None or isinstance(label, str)):
        raise SourceError("a label that is no text", where=where, found=repr(label))
    if split not in ("", *SPLITS):
        raise SourceError("unknown split", where=where, expected="train, val or test", found=split)
    path = manifest.parent / name
    try:
        stat = path.stat()
        size, mtime = stat.st_size, stat.st_mtime_ns
    except OSError:
        size, mtime = -1, 0  # the extraction quarantines it as missing, with its id
    return ImageRef(str(PurePosixPath(name)), path, label or None, split, size, mtime)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if "path" not in (rows.fieldnames or ()):
                raise SourceError(
                    "no column named path",
                    where=path,
                    expected="path,label[,split]",
                    found=",".join(rows.fieldnames or ()),
                )
            for row in rows:
                if None in row:
                    raise SourceError("more fields than the header has", where=f"{path}, line {rows.line_num}")
                yield rows.line_num, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"not a CSV file in UTF-8 ({error})", where=path) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise SourceError("not a JSON object", where=f"{path}, line {number}", found=line.strip()[:40])
                yield number, row
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"not JSON lines in UTF-8 ({error})", where=path) from error


_READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows}
