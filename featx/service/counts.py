"""What the service answered, by the hour: numbers alone, no photo, no name of one, no address.

A folder has two files. ``counts.jsonl`` has a line for each hour that is over and each model that answered in it, and a
line about each model before its first; it is replaced once an hour, whole or not at all. ``counts-now.jsonl`` has the
lines of the hour that is not over yet, and is replaced once a minute where something was counted, and at the end: a
process that is killed loses a minute at most. A line of an hour that ``counts.jsonl`` has already counts there only.

A line of an hour has ``hour`` (its begin, UTC), ``model`` (the sha256 of its file), ``photos``, ``labels`` (how many
were answered with each label), ``unsure`` and ``unknown`` (with the labels they add up to ``photos``), and
``familiarity`` (photos in each of twenty equal bins; empty where the model cannot call photos unknown). A line about a
model has ``model``, ``name``, ``class_names``, ``own`` (photos among which familiarity is a rank), ``max_unknown``,
``own_refused`` (the share of its own that it called unknown, with its interval, or null) and ``groups`` (whether these
were judged by those of other groups only).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featx._files import make_folder, publish_bytes, read_regular, writer_lock
from featx.errors import FeatxError, StoreBusy, StoreError, UsageError
from featx.models import N_BINS, bins_of

if TYPE_CHECKING:
    from featx.models import Answer, Bundle

SECONDS = 60.0
"""Between two times that what was counted is written."""

_DONE, _NOW, _LOCK = "counts.jsonl", "counts-now.jsonl", ".counts-lock"
_MOST_BYTES = 2**30

log = logging.getLogger("featx.service")


@dataclass(frozen=True)
class Counted:
    """What one model answered, in the hours (u,) in which it was asked.

    Attributes
    ----------
    about : the line about it.
    hours : (u,) of type datetime64[h], UTC, ascending.
    photos, unsure, unknown : (u,).
    labels : (u, c) answers by label, in the order of ``about["class_names"]``.
    familiarity : (u, 20).
    """

    about: dict[str, Any]
    hours: NDArray[np.datetime64]
    photos: NDArray[np.int64]
    unsure: NDArray[np.int64]
    unknown: NDArray[np.int64]
    labels: NDArray[np.int64]
    familiarity: NDArray[np.int64]


@dataclass
class _Tally:
    """One hour of one model."""

    labels: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    familiarity: NDArray[np.integer] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, answers: Sequence[Answer]) -> None:
        self.labels.update(each.label for each in answers if each.reason is None)
        self.reasons.update(each.reason for each in answers if each.reason is not None)
        known = [each.familiarity for each in answers if each.familiarity is not None]
        if known:
            new = bins_of(known)
            self.familiarity = self.familiarity + new if len(self.familiarity) else new

    def line(self, hour: int, model: str) -> dict[str, Any]:
        return {
            "hour": datetime.fromtimestamp(3600 * hour, UTC).strftime("%Y-%m-%dT%H:00:00Z"),
            "model": model,
            "photos": self.labels.total() + self.reasons.total(),
            "labels": dict(sorted(self.labels.items())),
            "unsure": self.reasons["unsure"],
            "unknown": self.reasons["unknown"],
            "familiarity": self.familiarity.tolist(),
        }

    @classmethod
    def of(cls, line: dict[str, Any]) -> _Tally:
        reasons = Counter({word: line[word] for word in ("unsure", "unknown")})
        return cls(Counter(line["labels"]), reasons, np.array(line["familiarity"], dtype=np.int64))


class Counts:
    """Counts answers in a folder; every method is safe to call from any thread.

    Parameters
    ----------
    folder : is made where there is none.
    clock : seconds since 1970.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self._clock = folder, clock
        self._tallies: dict[tuple[int, str], _Tally] = {}
        self._changed = self._failed = False
        self._lock, self._writing, self._ended = threading.Lock(), threading.Lock(), threading.Event()
        self._held = contextlib.ExitStack()
        self._thread: threading.Thread | None = None

    def open(self) -> Counts:
        """Take the folder, for this process alone, and go on with what it has.

        Raises
        ------
        FeatxError
            It cannot be written to, another service counts in it, or its files were altered.
        """
        make_folder(self.folder)
        try:
            self._held.enter_context(writer_lock(self.folder / _LOCK))
        except StoreBusy as error:
            raise UsageError(
                "another service keeps its counts here", where=self.folder, found=error.found,
                hint="Give each service a folder of its own.",
            ) from error  # fmt: skip
        with contextlib.ExitStack() as failing:
            failing.callback(self._held.close)
            done = {_key(line) for line in _lines(self.folder / _DONE) if "hour" in line}
            for line in _lines(self.folder / _NOW):
                if _key(line) not in done:
                    self._tallies[_key(line)] = _Tally.of(line)
            self._changed = bool(self._tallies)
            self.write()
            failing.pop_all()
        return self

    def describe(self, bundle: Bundle, name: str) -> None:
        """Write the line about a model, if there is none yet."""
        with self._writing:
            path = self.folder / _DONE
            if any(line["model"] == bundle.sha256 for line in _lines(path) if "hour" not in line):
                return
            unknown = bundle.metrics.get("unknown") or {}
            line = {
                "model": bundle.sha256,
                "name": name,
                "class_names": list(bundle.class_names),
                "own": 0 if bundle.familiarity is None else len(bundle.familiarity.own),
                "max_unknown": bundle.max_unknown or 0.0,
                "own_refused": unknown.get("own_refused"),
                "groups": "groups" in bundle.metrics,
            }
            _append(path, [line])

    def start(self) -> None:
        """Write once a minute from now on."""
        self._thread = threading.Thread(target=self._run, name="featx-counts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what was counted, and give the folder back."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._try()
        self._held.close()

    def add(self, bundle: Bundle, answers: Sequence[Answer]) -> None:
        """Count answers of a model."""
        if not answers:
            return
        with self._lock:
            self._tallies.setdefault((int(self._clock() // 3600), bundle.sha256), _Tally()).add(answers)
            self._changed = True

    def write(self) -> None:
        """Write what has been counted since the last time.

        Raises
        ------
        FeatxError
            It cannot be written; nothing is lost then, and the next time it is all written.
        """
        with self._writing:
            with self._lock:
                now = int(self._clock() // 3600)
                over = {key: tally.line(*key) for key, tally in self._tallies.items() if key[0] < now}
                current = [tally.line(*key) for key, tally in self._tallies.items() if key[0] >= now]
                changed, self._changed = self._changed, False
            if not (changed or over):
                return
            try:
                if over:
                    _append(self.folder / _DONE, over.values())
                    with self._lock:
                        for key in over:
                            del self._tallies[key]
                publish_bytes(self.folder / _NOW, _encoded(current))
            except BaseException:
                self._changed = True
                raise

    def _run(self) -> None:
        while not self._ended.wait(SECONDS):
            self._try()

    def _try(self) -> None:
        try:
            self.write()
            self._failed = False
        except FeatxError as error:  # answering goes on: counts are not worth an outage
            if not self._failed:
                log.error("cannot write what was counted, and will try again: %s", error)
            self._failed = True


def _encoded(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n" for line in lines)


def _append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    before = path.read_bytes() if path.exists() else b""
    publish_bytes(path, before + _encoded(lines))


def _key(line: dict[str, Any]) -> tuple[int, str]:
    return int(datetime.fromisoformat(line["hour"]).timestamp() // 3600), str(line["model"])


# --- reading ------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        raw = read_regular(path, _MOST_BYTES)
    except FileNotFoundError:
        return
    for number, text in enumerate(raw.splitlines(), start=1):
        try:
            line = json.loads(text)
            _check(line)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            missing = isinstance(error, KeyError)
            raise StoreError(
                "these are not the counts of a service, or were altered", where=f"{path}, line {number}",
                found=f"{error} is missing" if missing else str(error), hint="Delete the line, or the file.",
            ) from error  # fmt: skip
        yield line


def _check(line: Any) -> None:
    if not isinstance(line["model"], str):
        raise ValueError("model is not text")
    if "hour" not in line:
        names, own, refused = line["class_names"], line["own"], line["own_refused"]
        if not isinstance(line["name"], str) or not all(isinstance(name, str) for name in names):
            raise ValueError("a name is not text")
        if type(own) is not int or not 0 <= own < 2**53 or not 0 <= float(line["max_unknown"]) < 1:
            raise ValueError(f"own is {own!r:.40}, max_unknown {line['max_unknown']!r:.40}")
        if refused is not None:
            if not 0 <= refused["low"] <= refused["mean"] <= refused["high"] <= 1:
                raise ValueError("own_refused is not a share")
            line["own_refused"] = {name: float(refused[name]) for name in ("mean", "low", "high")}
        line["groups"], line["max_unknown"] = bool(line["groups"]), float(line["max_unknown"])
        return
    if datetime.fromisoformat(line["hour"]).utcoffset() is None:
        raise ValueError("hour has no time zone")
    bins, answered = line["familiarity"], [*line["labels"].values(), line["unsure"], line["unknown"]]
    counts = [line["photos"], *answered, *bins]
    if not all(type(n) is int and 0 <= n < 2**53 for n in counts):
        raise ValueError("a count is not a whole number")
    if (
        not line["photos"]
        or sum(answered) != line["photos"]
        or len(bins) not in (0, N_BINS)
        or (bins and sum(bins) != line["photos"])
    ):
        raise ValueError("counts do not add up")


def read_counts(folder: Path) -> list[Counted]:
    """What was counted in a folder, of each model that answered, in the order in which they were put up.

    Raises
    ------
    StoreError
        There are no counts, or they were altered.
    """
    if not (folder / _DONE).exists():
        raise StoreError(
            "no counts in this folder" if folder.is_dir() else "no such folder of counts",
            where=folder,
            expected=_DONE,
            hint="Keep them with: featx serve MODEL --counts DIR",
        )
    now = list(_lines(folder / _NOW))  # first: an hour that ends meanwhile is in both then, not in neither
    done = list(_lines(folder / _DONE))
    about = {line["model"]: line for line in done if "hour" not in line}
    hours = {_key(line): line for line in [*now, *(line for line in done if "hour" in line)]}
    strange = {model for _, model in hours} - set(about)
    if strange:
        raise StoreError(
            "counts of a model without the line about it", where=folder / _DONE, found=f"sha256 {min(strange)[:8]}",
            hint="Put back a copy of the file.",
        )  # fmt: skip
    return [_counted(each, [hours[key] for key in sorted(hours) if key[1] == model]) for model, each in about.items()]


def _counted(about: dict[str, Any], lines: list[dict[str, Any]]) -> Counted:
    def column(name: str) -> NDArray[np.int64]:
        return np.array([line[name] for line in lines], dtype=np.int64)

    # What it calls its classes does not change; but a line that was written by hand may have others.
    names = [*dict.fromkeys([*about["class_names"], *(label for line in lines for label in line["labels"])])]
    bins = [line["familiarity"] or [0] * N_BINS for line in lines]
    return Counted(
        about={**about, "class_names": names},
        hours=np.array([_key(line)[0] for line in lines], dtype="datetime64[h]"),
        photos=column("photos"),
        unsure=column("unsure"),
        unknown=column("unknown"),
        labels=np.array(
            [[line["labels"].get(name, 0) for name in names] for line in lines], dtype=np.int64
        ).reshape(-1, len(names)),
        familiarity=np.array(bins, dtype=np.int64).reshape(-1, N_BINS),
    )  # fmt: skip
