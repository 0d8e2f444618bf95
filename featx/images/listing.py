"""Images named by a list: a CSV file with a header, or JSON lines, with the columns ``path, label[, split][, group]``.

Spreadsheets write lists in their own ways: columns are matched without case, separated by commas, semicolons or tabs,
in UTF-8 or in cp1252. Further columns are kept as metadata, and a note names them; one that looks like a misspelt
``label`` or ``split`` is asked about, since without it images would silently have none.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from featx._arrays import SPLITS
from featx.errors import SourceError, listed
from featx.images.grouping import MAX_TEXT, TAKEN
from featx.images.origin import ImageRef, file_ref

SUFFIXES = (".csv", ".jsonl", ".ndjson")

_EXPECTED = "path,label[,split]"
_OTHER_NAMES = {
    "path": ("file", "file_name", "filename", "file_path", "filepath", "image", "image_path", "img", "name"),
    "label": ("labels", "class", "classes", "class_name", "classname", "cls", "target", "category"),
    "split": ("splits", "set", "subset", "partition"),
}
"""What others call the columns; near enough to ask, too far to guess."""

GROUP = "group"
"""The column that says which images belong together."""

MAX_COLUMNS = 64
"""Columns of metadata that are kept."""

MAX_NAME = 60
"""Characters that the name of such a column may have."""

_SEPARATORS = ",;\t"
_CHUNK = 2**20


def list_refs(path: Path) -> tuple[list[ImageRef], tuple[str, ...]]:
    """The images of a list, and notes on how it was read. Paths are relative to the list's folder.

    Raises
    ------
    SourceError
        It cannot be read, and in which line; or a column looks like a misspelt one.
    """
    notes: list[str] = []
    rows = _csv_rows(path, notes) if path.suffix.lower() == ".csv" else _jsonl_rows(path)
    refs: dict[str, ImageRef] = {}
    columns: dict[str, str] = {}
    further: dict[str, dict[str, Any]] = {}
    for number, row in rows:
        where = f"{path}, line {number}"
        named: dict[str, Any] = {}
        for name, value in row.items():
            key = columns.get(name)
            if key is None:
                key = columns[name] = name.strip().lower()
            if key in named and key in _OTHER_NAMES:
                raise SourceError(f"two columns are called {key}", where=where, found=",".join(row))
            named[key] = value
        ref = _ref(path, where, named)
        earlier = refs.setdefault(ref.id, ref)
        if earlier is not ref:
            raise SourceError("the path is listed twice", where=where, found=ref.id)
        for name, value in named.items():
            if name and name not in _OTHER_NAMES and value not in (None, ""):
                further.setdefault(name, {})[ref.id] = value
    if refs:
        _check_columns(path, columns)
    shown = {key: name.strip() for name, key in columns.items() if key and key not in _OTHER_NAMES}
    return list(_with_columns(path, refs, shown, further, notes)), tuple(notes)


def _with_columns(
    path: Path, refs: dict[str, ImageRef], shown: dict[str, str], further: dict[str, dict[str, Any]], notes: list[str]
) -> Iterator[ImageRef]:
    """The images with their groups and metadata; which columns are kept is noted."""
    kept: dict[str, dict[str, str]] = {}
    left: list[str] = []
    for key, name in shown.items():
        texts = {id: _text(value) for id, value in further.get(key, {}).items()}
        sound = all(text is not None for text in texts.values())
        if key == GROUP and not sound:
            id = next(id for id, text in texts.items() if text is None)
            raise SourceError(
                "a group that is not a short text", where=path, expected=f"at most {MAX_TEXT} characters", found=id
            )
        if key == TAKEN:
            continue  # featx reads it from the photos
        if key == GROUP or (sound and len(name) <= MAX_NAME and len(kept) - (GROUP in kept) < MAX_COLUMNS):
            kept[key] = {id: text for id, text in texts.items() if text is not None}
        else:
            left.append(name)
    named = [shown[key] for key in kept if key != GROUP]
    if named:
        notes.append(f"{_columns(named)} of {path.name} {'is' if len(named) == 1 else 'are'} kept as metadata")
    if left:
        notes.append(
            f"{_columns(left)} of {path.name} {'is' if len(left) == 1 else 'are'} ignored: of each list {MAX_COLUMNS} "
            f"columns of texts with at most {MAX_TEXT} characters are kept"
        )
    groups = kept.pop(GROUP, {})
    for ref in refs.values():
        metadata = tuple((shown[key], texts.get(ref.id, "")) for key, texts in kept.items())
        yield replace(ref, group=groups.get(ref.id, ""), metadata=metadata) if metadata or groups else ref


def _columns(names: list[str]) -> str:
    """Columns by name, as the beginning of a clause."""
    return f"the {'column' if len(names) == 1 else 'columns'} {listed([name[:50] for name in names])}"


def _text(value: Any) -> str | None:
    """A value of metadata as text; None for what cannot be kept as such."""
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value.strip()


def _check_columns(path: Path, names: Iterable[str]) -> None:
    """SourceError where a column looks like a missing one."""
    others = {name.strip().lower(): name.strip() for name in names}
    missing = [known for known in _OTHER_NAMES if others.pop(known, None) is None]
    for known in missing:
        near = [name for name in others if name in _OTHER_NAMES[known]]
        near = near or difflib.get_close_matches(known, others, n=1, cutoff=0.75)
        if known == "path" or near:
            raise SourceError(
                f"no column named {known}",
                where=path,
                expected=_EXPECTED,
                found=",".join(name.strip() for name in names),
                hint=f"If {others[near[0]]} is the {known}, rename it to {known}; if not, give it another name."
                if near
                else None,
            )


def _ref(manifest: Path, where: str, row: dict[str, Any]) -> ImageRef:
    name = row.get("path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise SourceError("no path in this line", where=where, expected="path, label[, split]", found=list(row))
    label, split = row.get("label"), row.get("split") or ""
    if isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label):
        label = str(label)
    if not (label is None or isinstance(label, str)):
        raise SourceError("a label that is not text", where=where, found=repr(label))
    if split not in ("", *SPLITS):
        raise SourceError("unknown split", where=where, expected="train, val or test", found=split)
    path = manifest.parent / name
    try:
        stat = path.stat()
    except (OSError, UnicodeEncodeError):
        stat = None  # the extraction quarantines it, with its id
    return file_ref(str(PurePosixPath(name)), path, label or None, split, stat)


def _csv_rows(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    charset = _charset(path)
    if charset != "utf-8-sig":
        notes.append(f"{path.name} is not UTF-8 and was read as {charset}; look at the names if they have accents")
    try:
        with path.open(newline="", encoding=charset) as file:
            header = file.readline()
            if "\0" in header:
                raise csv.Error("it has zero bytes")
            file.seek(0)
            rows = csv.DictReader(file, delimiter=_separator(header), skipinitialspace=True)
            names = [name.strip().lower() for name in rows.fieldnames or ()]
            for name in _OTHER_NAMES:
                if names.count(name) > 1:
                    raise SourceError(f"two columns are called {name}", where=path, found=header.strip())
            _check_columns(path, rows.fieldnames or ())
            for row in rows:
                if None in row:
                    raise SourceError("more fields than the header has", where=f"{path}, line {rows.line_num}")
                yield rows.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"not a CSV file in UTF-8 or cp1252 ({error})", where=path) from error


def _charset(path: Path) -> str:
    """UTF-8 where the whole file is; else what spreadsheets on Windows write."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while file.read(_CHUNK):
                pass
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _separator(header: str) -> str:
    # Of the header alone: it has no free text, in which anything may look like a separator.
    try:
        return csv.Sniffer().sniff(header, delimiters=_SEPARATORS).delimiter
    except csv.Error:
        return ","  # a single column


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
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
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise SourceError("a number with too many digits", where=f"{path}, line {number}") from error
