"""Who called which photo what: a journal of every action, from which labels, undo and redo follow.

One JSON object a line, appended and synced before an action is answered, so that a crash costs at most the action
that was not answered. A line that a crash cut short is the last one, has no line break, and is dropped.
``labels.csv`` beside it is the same state for people and other programs: it is written after the journal, whole or not
at all.

A record has ``n`` (1, 2, ...), ``when`` (UTC), ``by`` (whose action), ``how`` (such as "key" or "batch"), ``say`` (in
words), ``set`` (photo, code before, code after) and ``classes`` (number, name before, name after); or, instead of the
last three, ``undo`` or ``redo`` with the ``n`` of what it takes back or does again.

A code is the number of a class, or one of :data:`NOTHING`, :data:`NONE_OF_THESE`, :data:`UNSURE`, :data:`LEFT_OUT`.
Numbers of classes are never used twice; a class that was removed has the name None.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featx._files import LineFile, csv_line
from featx.errors import UsageError, plural
from featx.models import checked_name

NOTHING, NONE_OF_THESE, UNSURE, LEFT_OUT = -1, -2, -3, -4

MARKS: Mapping[int, str] = {NOTHING: "", NONE_OF_THESE: "none of these", UNSURE: "unsure", LEFT_OUT: "left out"}
"""What the codes below zero are called, in ``labels.csv`` too."""

COLUMNS = ("path", "label", "mark", "by", "when")

MAX_CLASSES = 1000
_LISTED = 3


@dataclass(frozen=True)
class Change:
    """What an action did.

    Attributes
    ----------
    n : the number of its record.
    photos : the photos whose labels it changed.
    say : what it was, in words.
    """

    n: int
    photos: tuple[str, ...]
    say: str


class Journal:
    """The labels of photos, by the photos' ids; every method is safe to call from any thread.

    Parameters
    ----------
    path : of the journal; it is made where there is none.
    by : whose actions these are.

    Raises
    ------
    StoreError
        The journal was altered.
    """

    def __init__(self, path: Path, by: str) -> None:
        self.path, self.by = path, by
        self.codes: dict[str, int] = {}
        self.who: dict[str, tuple[str, str]] = {}
        self.classes: list[str | None] = []
        self.n = 0
        self._lock = threading.RLock()
        self._done: list[dict[str, Any]] = []
        self._undone: list[dict[str, Any]] = []
        self._file = LineFile(path)
        hint = (
            "Put back a copy of it. Or move it away: labels.csv beside it has the labels, and can be opened as a list."
        )
        self._file.read(self._replay, what="the journal of labels", hint=hint)
        self._file.open()

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            self._file.close()

    def _replay(self, record: dict[str, Any], number: int) -> None:
        if record["n"] != number:
            raise ValueError("its number is not the next")
        self._take(record)

    # --- reading --------------------------------------------------------------------------------------------------

    def code(self, photo: str) -> int:
        """The class of a photo, or what else is said of it."""
        return self.codes.get(photo, NOTHING)

    def number(self, name: str) -> int | None:
        """The number of the class of this name, or None."""
        return self.classes.index(name) if name in self.classes else None

    @property
    def begun(self) -> bool:
        """Whether anything has been said, and not taken back, but that copies are left out."""
        with self._lock:
            return any(record.get("how") != "copies" for record in self._done)

    @property
    def undo_says(self) -> str | None:
        """What :meth:`undo` would take back, in words."""
        return str(self._done[-1]["say"]) if self._done else None

    @property
    def redo_says(self) -> str | None:
        """What :meth:`redo` would do again, in words."""
        return str(self._undone[-1]["say"]) if self._undone else None

    def csv(self, photos: Iterable[str]) -> bytes:
        """The labels of these photos as a list that ``featx extract`` takes."""
        lines = [csv_line(COLUMNS)]
        with self._lock:
            for photo in photos:
                code = self.code(photo)
                label = (self.classes[code] or "") if code >= 0 else ""
                lines.append(csv_line((photo, label, MARKS.get(code, ""), *self.who.get(photo, ("", "")))))
        return "".join(lines).encode("utf-8", errors="surrogateescape")

    # --- acting ---------------------------------------------------------------------------------------------------

    def label(self, photos: Sequence[str], code: int | str, *, how: str, by: str = "") -> Change:
        """Call photos something: the number of a class, its name (made if it is new), or a mark.

        Raises
        ------
        UsageError
            There is no such class, or it cannot be called that.
        """
        with self._lock:
            made = []
            if isinstance(code, str):
                name = checked_name(code)
                known = self.number(name)
                if known is None:
                    made = [[len(self.classes), None, name]]
                number = len(self.classes) if known is None else known
            else:
                number = code
                if number not in MARKS and not (0 <= number < len(self.classes) and self.classes[number] is not None):
                    raise UsageError("there is no such class", found=number)
                name = MARKS[number] if number in MARKS else str(self.classes[number])
            changed = [[photo, self.code(photo), number] for photo in photos if self.code(photo) != number]
            said = f"{plural(len(photos), 'photo')}: {name or 'no label'}"
            return self._act(changed, made, said, how, by)

    def label_each(self, labels: Mapping[str, str | int], *, how: str, by: str = "") -> Change:
        """Call each photo what ``labels`` says (a name or a mark), as one action: names of folders, or a list's."""
        with self._lock:
            wanted = {photo: checked_name(name) if isinstance(name, str) else name for photo, name in labels.items()}
            new = [
                name for name in dict.fromkeys(wanted.values()) if isinstance(name, str) and name not in self.classes
            ]
            made = [[len(self.classes) + place, None, name] for place, name in enumerate(new)]
            number = {name: place for place, name in enumerate([*self.classes, *new]) if name is not None}
            codes = {photo: number[name] if isinstance(name, str) else name for photo, name in wanted.items()}
            changed = [[photo, self.code(photo), code] for photo, code in codes.items() if self.code(photo) != code]
            return self._act(changed, made, f"{plural(len(changed), 'photo')}: labels of {how}", how, by)

    def decline(self, how: str) -> Change:
        """Say that the labels of the folders, or of a list, are not to be taken."""
        with self._lock:
            self._append({"by": self.by, "how": how, "say": f"labels of {how} not taken", "set": []})
            return Change(self.n, (), self._done[-1]["say"])

    def add_class(self, name: str) -> Change:
        """Make a class without photos.

        Raises
        ------
        UsageError
            There is one of this name, or it is no name.
        """
        with self._lock:
            name = self._free_name(name)
            return self._act([], [[len(self.classes), None, name]], f"class {name}", "key", "")

    def rename_class(self, number: int, name: str) -> Change:
        """Call a class something else; errors as of :meth:`add_class`."""
        with self._lock:
            before = self._class(number)
            name = self._free_name(name)
            return self._act([], [[number, before, name]], f"class {before}: now {name}", "key", "")

    def remove_class(self, number: int, into: int | None = None) -> Change:
        """Remove a class; its photos have no label then, or are of the class ``into``."""
        with self._lock:
            name = self._class(number)
            if into == number:
                raise UsageError("a class cannot be joined with itself", found=name)
            after = NOTHING if into is None else into
            joined = "removed" if into is None else f"joined with {self._class(into)}"
            changed = [[photo, number, after] for photo, code in self.codes.items() if code == number]
            return self._act(changed, [[number, name, None]], f"class {name}: {joined}", "key", "")

    def undo(self) -> Change | None:
        """Take back the last action that was not taken back; None where there is none."""
        with self._lock:
            return self._again("undo", self._done)

    def redo(self) -> Change | None:
        """Do again what was taken back last; None where there is nothing, or something else was done since."""
        with self._lock:
            return self._again("redo", self._undone)

    def _again(self, kind: str, stack: list[dict[str, Any]]) -> Change | None:
        if not stack:
            return None
        record = stack[-1]
        self._append({kind: record["n"]})
        return Change(self.n, tuple(photo for photo, _, _ in record["set"]), str(record["say"]))

    def _act(self, changed: list[Any], classes: list[Any], say: str, how: str, by: str) -> Change:
        if len(self.classes) + len(classes) > MAX_CLASSES:
            raise UsageError("too many classes", expected=f"at most {MAX_CLASSES:,}", found=len(self.classes))
        if changed or classes:
            record = {"by": by or self.by, "how": how, "say": say, "set": changed}
            self._append({**record, "classes": classes} if classes else record)
        return Change(self.n, tuple(photo for photo, _, _ in changed), say)

    def _append(self, fields: dict[str, Any]) -> None:
        """Write a record, and only then do what it says."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"n": self.n + 1, "when": when, **fields}
        self._file.append(json.dumps(record, separators=(",", ":")).encode())
        self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        """Change the state by a record."""
        if "undo" in record:
            self._check_top(self._done, record["undo"])
            taken = self._done.pop()
            self._undone.append(taken)
            self._set([(photo, after, before) for photo, before, after in taken["set"]], record, taken)
            self._name([(number, after, before) for number, before, after in taken.get("classes", ())])
        elif "redo" in record:
            self._check_top(self._undone, record["redo"])
            taken = self._undone.pop()
            self._done.append(taken)
            self._name(taken.get("classes", ()))
            self._set(taken["set"], record, taken)
        else:
            self._name(record.get("classes", ()))
            self._set(record["set"], record, record)
            self._done.append(record)
            self._undone.clear()
        self.n = int(record["n"])

    @staticmethod
    def _check_top(stack: list[dict[str, Any]], n: int) -> None:
        if not stack or stack[-1]["n"] != n:
            raise ValueError("it takes back what was not done")

    def _set(self, changes: Iterable[Sequence[Any]], record: dict[str, Any], of: dict[str, Any]) -> None:
        for photo, _, after in changes:
            if after == NOTHING:
                self.codes.pop(photo, None)
                self.who.pop(photo, None)
            else:
                self.codes[str(photo)] = int(after)
                self.who[str(photo)] = (str(of.get("by", self.by)), str(record["when"]))

    def _name(self, changes: Iterable[Sequence[Any]]) -> None:
        for number, _, after in changes:
            while len(self.classes) <= int(number):
                self.classes.append(None)
            self.classes[int(number)] = after

    def _class(self, number: int) -> str:
        name = self.classes[number] if 0 <= number < len(self.classes) else None
        if name is None:
            raise UsageError("there is no such class", found=number)
        return name

    def _free_name(self, name: str) -> str:
        name = checked_name(name)
        if name in self.classes:
            raise UsageError("there is a class of this name", found=name)
        return name
