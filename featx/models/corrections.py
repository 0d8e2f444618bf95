"""What people say that a model got wrong: photos with the right labels, in a folder, from which it is fitted again.

The feedback folder of a model, of which this module has the first two::

    images/<sha256>.jpg   each photo once, named by its content, with the ending of its kind
    journal.jsonl         one JSON object a line: who said of which photo that it shows what
    store.featx           embeddings of the photos (:mod:`featx.models.refit`)
    models/<sha8>.model   versions of the model, current, audit.jsonl (:mod:`featx.models.versions`)
    held/                 batches that wait for somebody to look at them

A correction is written before it is answered: its photo first, then its line, each with fsync. A crash in between
leaves a photo without a line, which harms nobody. Who was not answered sends the correction again: the same label by
the same person for the same photo is written once. A person who says something else later is taken at the last word;
what several people say of one photo is all kept (:mod:`featx.models.agreement`).

A record has ``n`` (1, 2, ...), ``when`` (UTC), ``by`` ("" if nobody said), ``sha256`` and ``file`` of the photo,
``label``, and what the model had ``said``, with its ``score`` and ``version`` (null where it was not asked). What was
said elsewhere, in an annotation of Label Studio, also has its ``source`` there; where it was deleted there, a record
with ``withdrawn`` takes it back, and what the person says in another source stands.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from featx._files import LineFile, canonical_json, fsync_path, make_folder, publish_bytes, writer_lock
from featx.errors import StoreError, UsageError

MAX_NAME = 200
"""Characters of the name of a class, or of a person."""

_KINDS = (
    (0, b"\xff\xd8\xff", ".jpg"), (0, b"\x89PNG", ".png"), (0, b"GIF8", ".gif"), (8, b"WEBP", ".webp"),
    (0, b"BM", ".bmp"), (0, b"II*\0", ".tif"), (0, b"MM\0*", ".tif"), (128, b"DICM", ".dcm"),
    (8, b"avif", ".avif"), (4, b"ftyp", ".heic"),
)  # fmt: skip
"""Place, bytes and ending of the kinds of files; what is none of them is found by its content as well."""

_OURS = frozenset({"images", "models", "current", "audit.jsonl", "held", "store.featx", ".lock", ".versions.lock"})
"""What a feedback folder may have before its first correction."""

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Said:
    """What a model said of a photo: its label, how sure it was, and which version it was."""

    label: str
    score: float
    version: str


@dataclass(frozen=True)
class Correction:
    """A line of the journal; fields as above."""

    n: int
    when: str
    by: str
    sha256: str
    file: str
    label: str
    said: str | None = None
    score: float | None = None
    version: str | None = None
    source: str | None = None
    withdrawn: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ``source`` and ``withdrawn`` only where they say something."""
        found = asdict(self)
        return {name: each for name, each in found.items() if each or name not in ("source", "withdrawn")}


class Corrections:
    """The corrections of a feedback folder; every method is safe to call from any thread.

    Parameters
    ----------
    folder : the feedback folder.

    Raises
    ------
    StoreError
        The journal was altered.

    Attributes
    ----------
    all : every correction, in the order in which they came.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self._lock = threading.Lock()
        self._held = ExitStack()
        self._file = LineFile(self.path)
        self._words: _Words = {}
        self._of_source: dict[str, Correction] = {}
        self.all: list[Correction] = []
        hint = "Put back a copy of it, or move the folder away and begin with another."
        for made in self._file.read(_checked, what="the journal of corrections", hint=hint):
            self._take(made)

    def open(self) -> None:
        """Be the one that adds, and make the folder where there is none.

        Raises
        ------
        StoreBusy
            Another service adds to it.
        UsageError
            The folder is of something else: photos, or a store.
        StoreError
            It cannot be written.
        """
        if self.folder.is_dir() and not self.path.exists():
            strange = sorted(path.name for path in self.folder.iterdir() if path.name not in _OURS)
            if strange:
                raise UsageError(
                    "not a feedback folder, and not empty", where=self.folder, found=strange[0],
                    hint="Name a new one; it is made.",
                )  # fmt: skip
        make_folder(self.folder / "images")
        self._held.enter_context(writer_lock(self.folder / ".lock"))
        before = len(self._file.lines)
        self._file = LineFile(self.path)
        if len(self._file.lines) != before:  # another service has added since it was read
            raise StoreError("the journal of corrections has just changed", where=self.path, hint="Start again.")
        self._file.open()

    def close(self) -> None:
        """Add no more."""
        with self._lock:
            self._file.close()
            self._held.close()

    @property
    def latest(self) -> list[Correction]:
        """The last word of each person on each photo, in the order of the journal."""
        with self._lock:
            return _last(self._words)

    def since(self, n: int, limit: int) -> list[Correction]:
        """The next ``limit`` corrections behind number ``n``."""
        with self._lock:
            return self.all[n : n + limit]

    def __len__(self) -> int:
        return len(self.all)

    def add(
        self, image: bytes, label: str, by: str = "", said: Said | None = None, source: str | None = None
    ) -> tuple[Correction, bool]:
        """Write a correction; when this returns it is on the disk.

        Parameters
        ----------
        image : the photo's file.
        label : what it shows.
        by : who says so.
        said : what the model had said.
        source : where it was said, if elsewhere; it says one thing of one photo, and this is it from now on.

        Returns
        -------
        The correction, and whether it is new: nobody can say the same of a photo twice.

        Raises
        ------
        UsageError
            The label or the name is none.
        StoreError
            It cannot be written.
        """
        label, by = checked_name(label), checked_name(by, "a person") if by else ""
        digest = hashlib.sha256(image).hexdigest()
        with self._lock:
            words = self._words.get((digest, by), {})
            known = words.get(source) if source else next(reversed(words.values()), None)
            if known is not None and known.label == label:
                return known, False
            file = self.folder / "images" / f"{digest}{_ending(image)}"
            if not file.exists():
                publish_bytes(file, image)
            fsync_path(file.parent)  # of one that a crash left behind
            before = self._of_source.get(source or "")
            if before is not None and (before.sha256, before.by) != (digest, by):
                self._withdraw(before)
            fields = {} if said is None else {"said": said.label, "score": said.score, "version": said.version}
            return self._write(sha256=digest, by=by, file=file.name, label=label, source=source, **fields), True

    def withdraw(self, source: str) -> Correction | None:
        """Take back what was said in a source, if anything was; when this returns that is on the disk.

        Raises
        ------
        StoreError
            It cannot be written.
        """
        with self._lock:
            known = self._of_source.get(source)
            return None if known is None else self._withdraw(known)

    def standing(self, beginning: str) -> dict[str, Correction]:
        """What was said in each source of this beginning, and not taken back."""
        with self._lock:
            return {source: each for source, each in self._of_source.items() if source.startswith(beginning)}

    def _withdraw(self, known: Correction) -> Correction:
        fields = {name: getattr(known, name) for name in ("by", "sha256", "file", "label", "source")}
        return self._write(**fields, withdrawn=True)

    def _write(self, **fields: Any) -> Correction:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        made = Correction(n=len(self.all) + 1, when=now, **fields)
        self._file.append(canonical_json(made.to_json()))
        self._take(made)
        return made

    def _take(self, made: Correction) -> None:
        self.all.append(made)
        _say(self._words, made)
        if made.source and not made.withdrawn:
            self._of_source[made.source] = made
        elif made.source:
            self._of_source.pop(made.source, None)


_Words: TypeAlias = dict[tuple[str, str], dict[str | None, Correction]]
"""Of each photo and person, what stands of what was said in each source, in order."""


def _say(words: _Words, each: Correction) -> None:
    own = words.setdefault((each.sha256, each.by), {})
    own.pop(each.source, None)
    if not each.withdrawn:
        own[each.source] = each


def _last(words: _Words) -> list[Correction]:
    return sorted((next(reversed(own.values())) for own in words.values() if own), key=lambda each: each.n)


def last_words(corrections: Iterable[Correction]) -> list[Correction]:
    """The last word of each person on each photo, in order, without what was taken back."""
    words: _Words = {}
    for each in corrections:
        _say(words, each)
    return _last(words)


def _checked(fields: Any, number: int) -> Correction:
    made = Correction(**fields)
    if made.n != number:
        raise ValueError("its number is not the next")
    if not _SHA256.fullmatch(made.sha256) or not re.fullmatch(rf"{made.sha256}\.[a-z]{{3,4}}", made.file):
        raise ValueError("its photo has no name that featx gives")
    if not all(isinstance(each, str) and each.isprintable() for each in (made.when, made.by, made.label)):
        raise ValueError("a field is not text")
    if not isinstance(made.score, float | int | None) or not math.isfinite(made.score or 0.0):
        raise ValueError("its score is no number")
    if not isinstance(made.source, str | None) or not isinstance(made.withdrawn, bool):
        raise ValueError("a source is not text")
    checked_name(made.label)
    return made


def _ending(image: bytes) -> str:
    return next((end for place, mark, end in _KINDS if image[place : place + len(mark)] == mark), ".img")


def checked_name(name: str, what: str = "a class") -> str:
    """The name of a class, or of ``what`` else, without spaces around it.

    Raises
    ------
    UsageError
        It is empty, too long, or has characters that cannot be kept.
    """
    name = name.strip()
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise UsageError(
            f"not a name for {what}", expected=f"1 to {MAX_NAME} printable characters", found=repr(name[:40])
        )
    return name
