"""Which images belong together: photos of one patient, site, camera, day or burst.

A rule is one text, which the index of a store keeps, so that the next extraction groups by it again:

- ``column:NAME``: a column of the list or table; the column ``group`` of a list needs no rule;
- ``folder:N``: the N-th folder of the path, from the left: ``folder:2`` of ``cat/anna/1.jpg`` is ``anna``;
- ``regex:PATTERN``: what the first parentheses of the pattern match in the path;
- ``exif-day``: the day on which the photo was taken;
- ``exif-burst:SECONDS``: photos each taken within so many seconds of the one before;
- ``none``: no groups.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from featx._system import OutOfTime, limited_time
from featx.errors import UsageError, did_you_mean, plural

RULES = "folder:N, exif-day, exif-burst:SECONDS, regex:(...), column:NAME or none"

MAX_TEXT = 200
"""Characters that the name of a group, or a value of metadata, may have."""

TAKEN = "exif_taken"
"""The column of metadata that keeps when photos were taken, for stores that are grouped by it."""

_PATTERN_SECONDS = 5.0
"""Of a processor, for a pattern on all paths: some patterns take longer than anybody lives."""

_NAMES = {"exif-day": "day", "exif-burst": "burst", "folder": "folder"}


@dataclass(frozen=True)
class Grouping:
    """A rule that says which images belong together.

    Attributes
    ----------
    rule : the text.
    name : what one group is, such as "camera".
    """

    rule: str
    name: str = "group"

    @classmethod
    def parse(cls, text: str, name: str | None = None) -> Grouping:
        """A rule from its text; ``name`` by default as the rule says.

        Raises
        ------
        UsageError
            It cannot be read.
        """
        kind, colon, value = text.partition(":")
        sound = {
            "column": bool(value), "regex": bool(value), "folder": bool(re.fullmatch(r"[1-9]\d{0,2}", value, re.ASCII)),
            "exif-day": not colon, "none": not colon,
            "exif-burst": bool(re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value, re.ASCII)),
        }.get(kind, False)  # fmt: skip
        if not sound or len(text) > 1000:
            raise UsageError("--group-by cannot be read", expected=RULES, found=repr(text[:100]))
        if name is not None and not (0 < len(name) <= 50 and name.isprintable()):
            raise UsageError(
                "not a name for groups", where="--group-name", expected="a word such as camera", found=repr(name[:60])
            )
        if kind == "regex":
            _pattern(value)
        return cls(text, name or (value[:50] if kind == "column" else _NAMES.get(kind, "group")))

    @property
    def kind(self) -> str:
        """What the rule goes by."""
        return self.rule.partition(":")[0]

    @property
    def value(self) -> str:
        """What is behind the colon."""
        return self.rule.partition(":")[2]

    @property
    def dated(self) -> bool:
        """Whether it takes the dates of the photos."""
        return self.kind in ("exif-day", "exif-burst")

    def of_paths(self, ids: Sequence[str], *, some: bool = True) -> list[str]:
        """The group of each path by ``folder`` or ``regex``, "" for none; ``some`` are to have one.

        Raises
        ------
        UsageError
            No path has a group, or the pattern takes too long.
        """
        if self.kind == "folder":
            place = int(self.value)
            found = [parts[place - 1] if len(parts := id.split("/")) > place else "" for id in ids]
            what = f"no image lies {place} folders deep"
        else:
            pattern = _pattern(self.value)
            try:
                # Signals, which the limit is made of, reach the main thread only.
                here = threading.current_thread() is threading.main_thread()
                with limited_time(_PATTERN_SECONDS) if here else contextlib.nullcontext():
                    found = [(match[1] or "") if (match := pattern.search(id)) else "" for id in ids]
            except OutOfTime as error:
                hint = "Patterns with a repetition inside a repetition, such as (a+)+, do that."
                raise UsageError(
                    "the pattern takes too long", where="--group-by", found=self.value, hint=hint
                ) from error
            what = "the pattern matches no image"
        if some and not any(found):
            raise UsageError(what, where="--group-by", expected=self.rule, found=f"images such as {ids[0]}")
        return [name[:MAX_TEXT] for name in found]

    def of_dates(self, taken: Sequence[str]) -> list[str]:
        """The group of each photo by when it was taken, as :func:`featx.images.exif.taken_at` says; "" for none."""
        if self.kind == "exif-day":
            return [date[:10] for date in taken]
        gap, groups = float(self.value), [""] * len(taken)
        start, before = "", None
        for row in sorted(range(len(taken)), key=lambda row: taken[row]):
            if not taken[row]:
                continue
            now = datetime.fromisoformat(taken[row])
            if before is None or (now - before).total_seconds() > gap:
                start = taken[row]
            groups[row], before = start, now
        return groups

    def note(self, groups: Sequence[str]) -> str:
        """A clause on the groups that were made."""
        named = {name for name in groups if name}
        alone = sum(not name for name in groups)
        if not named:
            why = "has a date in its EXIF" if self.dated else f"has one by {self.rule}"
            return f"there are no groups: no image {why}"
        without = "no date in their EXIF" if self.dated else "no group"
        rest = f"; {plural(alone, 'image')} with {without} count as one each" if alone else ""
        return f"{plural(len(named), 'group')} by {self.rule}{rest}"


def column_of(name: str, columns: Mapping[str, object]) -> str:
    """The column that a rule names, without regard to case; UsageError where there is none."""
    known = {column.lower(): column for column in columns}
    if name.lower() not in known:
        raise UsageError(
            f"no column {name!r} to group by", where="--group-by", expected="a column of the list or table",
            found=", ".join(columns)[:500] or "none beside path, label and split",
            hint=did_you_mean(name, columns) or None,
        )  # fmt: skip
    return known[name.lower()]


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError("--group-by has a pattern that cannot be read", expected="regex:(...)", found=error) from error
    if not pattern.groups:
        raise UsageError("the pattern has no parentheses", where="--group-by", expected="regex:(...)", found=text)
    return pattern
