"""Versions of a model: files that never change, which of them is current, and who changed what.

In the feedback folder (:mod:`featx.models.corrections`)::

    models/<sha8>.model   a version, by the first eight digits of its sha256; never written to again
    current               the name of the version that answers
    audit.jsonl           one JSON object a line: began, added, promoted, refused, waits, held, released, discarded,
                          rolled back

A line of the audit log is on the disk before ``current`` is switched, by a rename; who finds the two at odds after a
crash carries out what the log says. What a version has learnt from, and which corrections are held, follows from the
log alone. Going back holds what the abandoned version had learnt beyond the one that is current again, so that the next
refit does not bring the same back.

A record has ``n``, ``when`` (UTC), ``who``, ``what``, and as it applies ``version``, ``before``, ``corrections`` (their
numbers), ``batch`` and ``evidence``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from featx._files import LineFile, canonical_json, make_folder, publish_bytes, read_regular, writer_lock
from featx.errors import BundleError, StoreBusy, StoreError, UsageError, plural
from featx.models.bundle import Bundle, bundle_bytes, bundle_content, parse_bundle, read_bundle

VERSION_DIGITS = 8
"""Of a model's sha256, which its version is called by."""

_NAME = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS}}}")
_SWITCHES = ("began", "added", "promoted", "rolled back")


def version_of(bundle: Bundle) -> str:
    """What the version of a model is called that was read from a file."""
    return bundle.sha256[:VERSION_DIGITS]


@dataclass(frozen=True)
class Version:
    """A version with how it came to be.

    Attributes
    ----------
    corrections : numbers of the corrections that it has learnt from.
    evidence : how it compared with the one before, where it was compared.
    """

    name: str
    path: Path
    when: str
    who: str
    what: str
    before: str | None
    corrections: frozenset[int]
    evidence: dict[str, Any] | None
    current: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; of the corrections, how many."""
        return {**vars(self), "path": str(self.path), "corrections": len(self.corrections)}


def _checked(record: Any, number: int) -> dict[str, Any]:
    """A record of the audit log; ValueError where it is not what featx writes."""
    if record["n"] != number:
        raise ValueError("its number is not the next")
    if record["what"] in _SWITCHES and not _NAME.fullmatch(record["version"]):
        raise ValueError("it names no version")
    if not all(isinstance(record[name], str) for name in ("when", "who", "what")):
        raise ValueError("it does not say when who did what")
    for name in ("corrections", "held"):
        if not isinstance(record.get(name, []), list) or not all(type(n) is int for n in record.get(name, [])):
            raise ValueError("a correction has no number")
    of_batch = record["what"] in ("held", "released", "discarded") or "batch" in record
    if of_batch and not (isinstance(record["batch"], str) and "held" in record):
        raise ValueError("it names no batch")
    if not isinstance(record.get("before"), str | None):
        raise ValueError("it does not name the version before")
    evidence = record.get("evidence") or {}
    compared = evidence.get("all") or {"mean": 0.0, "low": 0.0, "high": 0.0}
    if not all(isinstance(compared[name], int | float) for name in ("mean", "low", "high")):
        raise ValueError("its evidence has no numbers")
    canonical_json(record)  # 1e999 could not be shown to anybody
    return dict(record)


class Versions:
    """The versions in a feedback folder.

    Parameters
    ----------
    folder : the feedback folder.

    Raises
    ------
    StoreError
        The audit log was altered.

    Attributes
    ----------
    records : the audit log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self._file: LineFile | None = None
        self._read()

    def _read(self) -> LineFile:
        file = LineFile(self.folder / "audit.jsonl")
        self.records = file.read(_checked, what="the audit log", hint="Put back a copy of it.")
        return file

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Be the only one that changes anything, for as long as the block lasts.

        Raises
        ------
        StoreBusy
            Somebody else is at it: another refit, say.
        """
        make_folder(self.folder / "models")
        with writer_lock(self.folder / ".versions.lock"):
            self._file = self._read()
            self._file.open()
            try:
                self._settle()
                yield
            finally:
                self._file.close()
                self._file = None

    # --- what follows from the log ----------------------------------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The version that answers; None where there is none yet."""
        return next((str(each["version"]) for each in reversed(self.records) if each["what"] in _SWITCHES), None)

    def path(self, name: str) -> Path:
        """The file of a version."""
        return self.folder / "models" / f"{name}.model"

    def read(self, name: str) -> Bundle:
        """A version.

        Raises
        ------
        BundleError
            It is not there, or is not what it was.
        """
        bundle = read_bundle(self.path(name))
        if version_of(bundle) != name:
            raise BundleError("a version was altered", where=self.path(name), found=version_of(bundle))
        return bundle

    def all(self) -> list[Version]:
        """All versions, in the order in which they came."""
        made = {each["version"]: each for each in reversed(self.records) if each["what"] in _SWITCHES[:3]}
        return [
            Version(
                name, self.path(name), str(each["when"]), str(each["who"]), str(each["what"]), each.get("before"),
                frozenset(each.get("corrections", ())), each.get("evidence"), name == self.current,
            )
            for name, each in sorted(made.items(), key=lambda item: int(item[1]["n"]))
        ]  # fmt: skip

    def learnt(self, name: str) -> frozenset[int]:
        """Numbers of the corrections that a version has learnt from."""
        return next((each.corrections for each in self.all() if each.name == name), frozenset())

    @property
    def held(self) -> dict[str, list[int]]:
        """Batches that wait for somebody to look at them, with the numbers of their corrections."""
        waiting: dict[str, list[int]] = {}
        for each in self.records:
            if each["what"] in ("held", "rolled back") and "batch" in each:
                waiting[each["batch"]] = list(each["held"])
            elif each["what"] in ("released", "discarded"):
                waiting.pop(each["batch"], None)
        return waiting

    def settled(self, what: Literal["released", "discarded"]) -> set[int]:
        """Numbers of the corrections that somebody has looked at and found right, or wrong."""
        return {n for each in self.records if each["what"] == what for n in each["held"]}

    @property
    def considered(self) -> int:
        """The last correction that any refit has looked at, by its number."""
        numbers = (n for each in self.records for n in (*each.get("corrections", ()), *each.get("held", ())))
        return max(numbers, default=0)

    # --- changing ---------------------------------------------------------------------------------------------------

    def begin(self, model: Path, who: str) -> str:
        """Make a file the first version, where there is none; the name of the current version, which the file has then.

        Raises
        ------
        BundleError
            It is no model.
        UsageError
            The folder has versions, and this is none of them.
        """
        raw = bundle_content(model)
        name = version_of(parse_bundle(raw, model))
        if self.current is None:
            with self.changing():
                if self.current is None:
                    self._keep(raw, name)
                    self._switch("began", name, who)
        if name not in {each.name for each in self.all()}:
            raise UsageError(
                "the feedback folder belongs to another model", where=self.folder, expected=f"a version of {model}",
                found=", ".join(each.name for each in self.all()[:5]),
                hint=f"Choose another folder, or make it a version: featx models {self.folder} --add {model}",
            )  # fmt: skip
        if read_current(self.folder) != self.current:
            with suppress(StoreBusy), self.changing():  # a crash left the two at odds, unless somebody is just at it
                pass
        assert self.current is not None
        return self.current

    def add(self, model: Path, who: str) -> str:
        """Make a model of somebody's own the current version; it is taken to have learnt from no correction."""
        raw = bundle_content(model)
        name = version_of(parse_bundle(raw, model))
        with self.changing():
            self._keep(raw, name)
            self._switch("added", name, who)
        return name

    def promote(
        self, bundle: Bundle, corrections: Iterable[int], evidence: dict[str, Any], who: str, *, forced: bool = False
    ) -> str:
        """Make a new model the current version; call it inside :meth:`changing`."""
        raw = bundle_bytes(bundle)
        name = version_of(parse_bundle(raw, self.folder / "models"))
        self._keep(raw, name)
        extra = {"forced": True} if forced else {}
        self._switch("promoted", name, who, corrections=sorted(corrections), evidence=evidence, **extra)
        return name

    def hold(self, corrections: Sequence[int], evidence: dict[str, Any], who: str) -> str:
        """Hold corrections until somebody has looked at them; the name of the batch."""
        batch = f"batch-{len(self.records) + 1}"
        self.log("held", who, batch=batch, held=list(corrections), evidence=evidence)
        return batch

    def settle_batch(self, batch: str, what: str, who: str) -> int:
        """Release a batch that is held, or discard it (``what``: "released" or "discarded"); how many corrections.

        Raises
        ------
        UsageError
            No such batch is held.
        """
        with self.changing():
            waiting = self.held
            if batch not in waiting:
                known = ", ".join(waiting) or "none"
                raise UsageError("no such batch is held", where=self.folder, expected=known, found=batch)
            self.log(what, who, batch=batch, held=waiting[batch])
            return len(waiting[batch])

    def roll_back(self, who: str, to: str | None = None) -> tuple[str, str | None]:
        """Go back to a version, by default the one before; its name, and the batch that is held from now on, if any.

        Raises
        ------
        UsageError
            There is no such version, or none before.
        """
        with self.changing():
            now = self.current
            known = [each.name for each in self.all()]
            if to is None:
                to = next((each.before for each in self.all() if each.name == now), None)
                if to is None:
                    raise UsageError("there is no version before the current one", where=self.folder, found=now)
            if to not in known or to == now:
                raise UsageError(
                    "it is the current version" if to == now and now else "no such version", where=self.folder,
                    expected=", ".join(known), found=to,
                )  # fmt: skip
            self.read(to)  # it is sound
            gone = sorted(self.learnt(str(now)) - self.learnt(to))
            fields: dict[str, Any] = {"batch": f"batch-{len(self.records) + 1}", "held": gone} if gone else {}
            self._switch("rolled back", to, who, **fields)
            return to, fields.get("batch")

    def _keep(self, raw: bytes, name: str) -> None:
        path = self.path(name)
        if path.exists():
            if read_regular(path) != raw:
                raise StoreError("another model has this name", where=path)
            return
        publish_bytes(path, raw)
        path.chmod(0o444)

    def _switch(self, what: str, name: str, who: str, **fields: Any) -> None:
        self.log(what, who, version=name, before=self.current, **fields)
        self._settle()

    def _settle(self) -> None:
        """Let the file ``current`` say what the log says."""
        if self.current is not None and read_current(self.folder) != self.current:
            publish_bytes(self.folder / "current", f"{self.current}\n".encode())

    def log(self, what: str, who: str, **fields: Any) -> None:
        """Add to the audit log; call it inside :meth:`changing`."""
        assert self._file is not None, "only inside changing()"
        when = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"n": len(self.records) + 1, "when": when, "who": who, "what": what, **fields}
        self._file.append(canonical_json(record))
        self.records.append(record)


def read_current(folder: Path) -> str | None:
    """The name in the file ``current``; None where there is none, or it names nothing."""
    try:
        name = read_regular(folder / "current", 100).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    return name if _NAME.fullmatch(name) else None


def held_words(batches: dict[str, list[int]]) -> str:
    """What is held, as a clause: "40 corrections (batch-3)"."""
    return ", ".join(f"{plural(len(numbers), 'correction')} ({name})" for name, numbers in batches.items())
