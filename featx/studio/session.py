"""What runs while the page is open: an open project, its embeddings, and the work that follows every label."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.errors import FeatxError, Interrupted, StoreBusy, UsageError, plural
from featx.evaluation import find_duplicates
from featx.extraction import extract_features
from featx.heads import Layers, open_layers, unit_rows
from featx.store import FeatureSet, read_manifest, read_quarantine
from featx.studio import layout, project as projects, quality
from featx.studio.background import Again
from featx.studio.events import Events
from featx.studio.journal import LEFT_OUT, NOTHING, Change, Journal
from featx.studio.pictures import Pictures
from featx.studio.project import Project
from featx.studio.suggest import Suggestions, suggest, unlike_labelled
from featx.studio.taking import Taking

TELL_SECONDS = 0.4
"""Between two events about the same progress."""

_SUGGEST_SECONDS = 0.03
"""Without another label: several that are sent one after the other are answered before any of it is computed."""

_WRITE_SECONDS = 1.0
_MEASURE_SECONDS = 3.0

log = logging.getLogger("featx.studio")


@dataclass(frozen=True)
class Embedded:
    """The embeddings of the photos that have one.

    Attributes
    ----------
    features : as the store has them.
    layers : the columns of the embeddings.
    photos : (m,) the photo of each row.
    unit : (m, d) rows of unit length, as the recommended head sees them.
    """

    features: FeatureSet
    layers: Layers
    photos: Index
    unit: NDArray[np.float32]


@dataclass(frozen=True)
class Setup:
    """What the studio was started with.

    Attributes
    ----------
    root : folders above it are not shown, and nothing above it is opened.
    how : the options of :func:`featx.extraction.extract_features` for a store.
    runtime : where ``featx export --format html`` finds what runs a model in a browser; None where it kept it.
    """

    root: Path
    how: Callable[[Path], dict[str, Any]]
    runtime: str | None = None


class Session:
    """An open project; methods are called from any thread.

    Parameters
    ----------
    source, folder : as of :class:`featx.studio.project.Project`.
    setup : what it was started with.
    events : where what happens is told.
    empty : whether there may be no photos yet.
    """

    def __init__(self, source: Path, folder: Path | None, setup: Setup, events: Events, *, empty: bool = False) -> None:
        self.project = Project(source, folder, root=setup.root, empty=empty)
        self.setup, self.events = setup, events
        self.pictures = Pictures(self.project.thumbnails)
        self.embedded: Embedded | None = None
        self.suggestions = Suggestions(np.full(0, -1), np.zeros(0, np.float32), (), reason="Photos are being read.")
        self.suggested = -1  # the action that suggestions were made after
        self.quality: dict[str, Any] = {"status": "waiting", "reason": quality.too_early(np.full(0, -1))}
        self.map: dict[str, Any] = {"status": "waiting", "message": "", "method": "", "places": None}
        self.embedding: dict[str, Any] = {
            "status": "waiting", "done": 0, "total": len(self.project.photos), "seconds_left": None, "message": "",
            "refused": 0,
        }  # fmt: skip
        self.versions = {"suggestions": 0, "map": 0, "quality": 0}
        self.taking = Taking(self)
        self._unlike = np.zeros(0, bool)
        self._drawn: list[int] = []
        self._stop = False
        self._lock = threading.RLock()
        self._embedder: threading.Thread | None = None
        self._writing = Again("write labels", self._write, self._failed("labels.csv"), _WRITE_SECONDS)
        self._suggesting = Again("suggest", self._suggest, self._failed("suggestions"), _SUGGEST_SECONDS)
        self._comparing = Again("unlike", self._compare, self._failed("suggestions"), 0.3)
        self.measuring = Again("measure", self._measure, self._failed("quality"), _MEASURE_SECONDS)
        self._mapping = Again("map", self._make_map, self._failed("map"))
        self._shrinking = Again("thumbnails", self._shrink, self._failed("thumbnails"))
        if (self.project.store / "index.h5").exists():
            try:
                self._read_store()
            except FeatxError:
                self.close()
                raise
        self.start_embedding()

    @property
    def journal(self) -> Journal:
        """What photos are called."""
        return self.project.journal

    def close(self) -> None:
        """End all work, write what is left to write, and let others open the project."""
        self.stop_embedding(wait=True)
        work = (self._suggesting, self._comparing, self.measuring, self._mapping, self._shrinking)
        for each in work:
            each.end()
        self._shrinking.finish(10.0)
        self._writing.finish(10.0)
        self._writing.end()
        self.taking.close()
        self.pictures.close()
        self.project.close()

    # --- labels ---------------------------------------------------------------------------------------------------

    def codes(self) -> Index:
        """What every photo is called (n,), by row."""
        with self._lock:
            rows = self.project.rows
            known = {rows[photo]: code for photo, code in self.journal.codes.items() if photo in rows}
            codes = np.full(len(self.project.photos), NOTHING, dtype=np.intp)
            codes[list(known)] = list(known.values())
            return codes

    def act(self, action: Callable[[Journal], Change | None]) -> dict[str, Any] | None:
        """Do something to the labels, tell all windows, and have everything worked out anew; None where nothing was."""
        with self._lock:
            before = self.journal.n
            change = action(self.journal)
            if change is None:
                return None
            rows = [self.project.rows[photo] for photo in change.photos if photo in self.project.rows]
            told = {
                **self.tell_labels(),
                "rows": rows,
                "labels": [self.journal.code(photo) for photo in change.photos if photo in self.project.rows],
                "done": change.say,
            }
            if self.journal.n != before:
                self.events.publish("labels", told)
                self.changed()
            return told

    def changed(self) -> None:
        """Have everything that follows from the labels worked out anew."""
        self._suggesting.ask()
        self._comparing.ask()
        self._writing.ask()
        self.measuring.ask()

    def tell_labels(self) -> dict[str, Any]:
        """The state of the labels, for a window."""
        journal = self.journal
        codes = self.codes()
        return {
            "seq": journal.n,
            "classes": list(journal.classes),
            "undo": journal.undo_says,
            "redo": journal.redo_says,
            "labelled": int((codes >= 0).sum()),
            "begun": journal.begun,
        }

    def add(self, name: str, data: bytes) -> int:
        """Keep a photo that came through the page; its row. It is embedded with the others that came."""
        with self._lock:
            row = self.project.add(name, data)
            self._drawn = []
            self.events.publish("photos", {"photos": len(self.project.photos)})
        self._writing.ask()
        self.start_embedding()
        return row

    # --- embeddings -----------------------------------------------------------------------------------------------

    def start_embedding(self) -> None:
        """Embed what has no embedding yet, in the background."""
        with self._lock:
            if self._embedder is not None or not self.project.photos:
                return
            self._stop = False
            self._embedder = threading.Thread(target=self._embed, name="embed", daemon=True)
            self._tell_embedding(status="listing", message="")
            self._embedder.start()

    def stop_embedding(self, *, wait: bool = False) -> None:
        """Stop it; what was embedded is kept, and the next start goes on."""
        self._stop = True
        thread = self._embedder
        if wait and thread is not None:
            thread.join()

    def _tell_embedding(self, **changes: Any) -> None:
        self.embedding = {**self.embedding, **changes}
        self.events.publish("embedding", self.embedding)

    def _embed(self) -> None:
        started, last, first = time.monotonic(), 0.0, -1

        def progress(done: int, total: int) -> None:
            nonlocal last, first
            if self._stop:
                raise KeyboardInterrupt  # as from the keyboard: what is done is published, and the run ends in order
            now = time.monotonic()
            first = done if first < 0 else first
            if now - last >= TELL_SECONDS or done == total:
                last = now
                pace = (done - first) / max(now - started, 1e-9)
                left = (total - done) / pace if done > first else None
                self._tell_embedding(status="running", done=done, total=total, seconds_left=left)

        ended: dict[str, Any] = {}
        try:
            while True:
                photos = len(self.project.photos)
                store = self.project.store
                summary = extract_features(
                    self.project.images(), store=store, progress=progress, max_bad=1.0, replace_images=True,
                    small=self.pictures.keep, **self.setup.how(store),
                )  # fmt: skip
                self._read_store()
                ended = {"status": "done", "done": photos, "total": photos, "refused": summary.quarantined}
                with self._lock:
                    if len(self.project.photos) == photos:  # else some came meanwhile
                        self._embedder = None
                        break
        except Interrupted:
            ended, self._embedder = {"status": "stopped"}, None
        except Exception as error:
            ended, self._embedder = {"status": "failed", "message": _said(error)}, None
            log.error("embedding failed: %s", error, exc_info=not isinstance(error, FeatxError))
        self._tell_embedding(seconds_left=None, **ended)
        self._writing.ask()

    def _read_store(self) -> None:
        """Take over what the store has now."""
        features, layers, _ = open_layers(self.project.store, None)
        with self._lock:
            rows = self.project.rows
            kept = np.array([place for place, id in enumerate(features.ids.tolist()) if id in rows], dtype=np.intp)
            photos = np.array([rows[id] for id in features.ids[kept].tolist()], dtype=np.intp)
        unit = unit_rows(features.embeddings[kept].astype(np.float64), layers.default_kind).astype(np.float32)
        whole = len(kept) == len(features)
        self.embedded = Embedded(features if whole else features.some(kept), layers, photos, unit)
        self.events.publish("photos", {"photos": len(self.project.photos)})
        self._suggesting.ask()
        self._comparing.ask()
        self._mapping.ask()
        self.measuring.ask()
        self._shrinking.ask()

    def refused(self) -> list[dict[str, str]]:
        """Photos that could not be read, and why."""
        store = self.project.store
        if not (store / "manifest.json").exists():
            return []
        found = read_quarantine(store, read_manifest(store))
        rows = self.project.rows
        return [
            {"id": self.project.photos[rows[each.id]].name, "reason": each.reason, "message": each.message}
            for each in found
            if each.id in rows
        ]

    def copies(self) -> list[dict[str, Any]]:
        """Photos that show the same: equal files, one that was scaled, cut or saved anew, or those of a burst."""
        embedded = self.embedded
        if embedded is None:
            return []
        features = embedded.features
        exact = features.copies
        near = find_duplicates(features.embeddings, exact, by=features.near_copies).groups
        has_group = np.flatnonzero(features.groups != "")
        numbers = np.unique(features.groups[has_group], return_inverse=True)[1].reshape(-1)
        bursts = [has_group[places] for places in _equal(numbers)]
        codes = self.codes()[embedded.photos]
        out = []
        for kind, places in [*(("near", places) for places in _equal(near)), *(("burst", places) for places in bursts)]:
            if (codes[places] != LEFT_OUT).sum() > 1 and (kind == "near" or len(set(near[places].tolist())) > 1):
                same = kind == "near" and len(set(exact[places].tolist())) == 1
                rows = sorted(embedded.photos[places].tolist())
                out.append({"rows": rows, "kind": "equal" if same else kind})
        return out

    def similar(self, row: int) -> list[int]:
        """Rows from the most to the least similar to one, itself first.

        Raises
        ------
        UsageError
            The photo has no embedding yet.
        """
        embedded = self.embedded
        place = np.flatnonzero(embedded.photos == row) if embedded is not None else np.empty(0, np.intp)
        if embedded is None or not len(place):
            raise UsageError("this photo has not been read yet", found=row)
        cosines = embedded.unit @ embedded.unit[place[0]]
        cosines[place[0]] = np.inf
        return [int(each) for each in embedded.photos[np.argsort(-cosines, kind="stable")]]

    def labelled(self, embedded: Embedded) -> quality.Labelled:
        """The embedded photos with the labels that they have now."""
        with self._lock:
            codes = self.codes()
            names = tuple(name or "" for name in self.journal.classes)
            if len(self._drawn) != len(self.project.photos):
                self._drawn = projects.order(self.project.photos)
        own = codes[embedded.photos]
        features = replace(embedded.features, labels=np.where(own >= 0, own, -1).astype(np.int64), class_names=names)
        return quality.Labelled(features, embedded.photos, codes, self._drawn, embedded.layers)

    # --- what follows from labels ---------------------------------------------------------------------------------

    def _failed(self, what: str) -> Callable[[Exception], None]:
        def told(error: Exception) -> None:
            message = _said(error)
            if what == "quality":
                self.quality = {"status": "failed", "reason": message}
            elif what == "map":
                self.map = {**self.map, "status": "failed", "message": message}
            if what in self.versions:
                self.events.publish(what, {"status": "failed", "version": self.versions[what], "message": message})
            else:
                self.events.publish("problem", {"what": what, "message": message})

        return told

    def _write(self) -> None:
        try:
            self.project.write_labels()
        except StoreBusy:
            if self._embedder is None:
                self._writing.ask()  # some other command is at work; an extraction of our own asks when it ends

    def _suggest(self) -> None:
        embedded = self.embedded
        if embedded is None:
            return
        seq, data = self.journal.n, self.labelled(embedded)
        self.suggestions = suggest(embedded.unit, embedded.photos, data.codes, self.unlike, data.drawn, data.sample)
        self.suggested = seq
        self._next("suggestions", seq=seq, ready=not self.suggestions.reason, reason=self.suggestions.reason)
        self._tell_early(seq, quality.too_early(data.codes[embedded.photos]))  # and measure it a little later

    def _tell_early(self, seq: int, reason: str) -> None:
        """Say what is missing until it can be measured, or that it will be, where it was not yet."""
        status = "waiting" if reason else "running"
        with self._lock:
            before = self.quality
            if before["status"] != "waiting" and not reason:
                return
            self.quality = {"status": status, "seq": seq, "reason": reason}
        if (before["status"], before.get("reason")) != (status, reason):
            self._next("quality", status=status, message=reason)

    def _compare(self) -> None:
        embedded = self.embedded
        if embedded is None:
            return
        data = self.labelled(embedded)
        before, self._unlike = self._unlike, unlike_labelled(embedded.unit, embedded.photos, data.codes, data.sample)
        if not np.array_equal(before, self._unlike):
            self._suggesting.ask()

    @property
    def unlike(self) -> NDArray[np.bool_]:
        """Photos (n,) that are unlike all labelled ones."""
        n = len(self.project.photos)
        return self._unlike if len(self._unlike) == n else np.zeros(n, bool)

    def _shrink(self) -> None:
        refs = [photo.ref for photo in list(self.project.photos)]
        self.pictures.make_ahead(refs, lambda: self._shrinking.asked_again)

    def _make_map(self) -> None:
        embedded = self.embedded
        if embedded is None:
            return
        if len(embedded.unit) < layout.LEAST:
            message = f"It takes at least {plural(layout.LEAST, 'photo')} that can be read."
            self.map = {**self.map, "status": "few", "message": message}
            self._next("map", status="few", message=message)
            return
        for method, places in layout.maps(embedded.unit, self.project.folder / "map.npz"):
            every = np.full((len(self.project.photos), 2), np.nan)
            every[embedded.photos] = places
            status = "running" if method == "pca" else "done"
            self.map = {"status": status, "message": "", "method": method, "places": every}
            self._next("map", status=self.map["status"], message="")
            if self._mapping.asked_again:
                return

    def _measure(self) -> None:
        embedded = self.embedded
        if embedded is None:
            return
        data = self.labelled(embedded)
        seq = self.journal.n
        reason = quality.too_early(data.codes[embedded.photos])
        if reason:
            self._tell_early(seq, reason)
            return

        def tell(what: str) -> None:
            self.events.publish("quality", {"status": "running", "version": self.versions["quality"], "message": what})

        try:
            found = quality.measure(data, lambda: self.measuring.asked_again, tell)
        except quality.OutOfDate:
            return  # it is measured again, with the labels that there are by then
        except UsageError as error:
            found = {"status": "waiting", "reason": f"Cannot tell yet: {error}"}
        with self._lock:
            self.quality = {"status": "done", "seq": seq, **found}
        self._next("quality", status=str(self.quality["status"]), message=str(self.quality.get("reason", "")))

    def _next(self, what: str, **data: Any) -> None:
        self.versions[what] += 1
        self.events.publish(what, {"version": self.versions[what], **data})


def _said(error: Exception) -> str:
    """What went wrong, for people."""
    return str(error) if isinstance(error, FeatxError) else f"{type(error).__name__}: {error}"


def _equal(numbers: Index) -> list[Index]:
    """The places of each number that is there."""
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(order) else []
