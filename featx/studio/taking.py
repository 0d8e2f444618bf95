"""A model of the labels, fitted as ``featx fit`` does: tried on new photos in the page, and taken along as files."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featx._files import make_folder, publish_bytes
from featx.backbones import of_layer
from featx.errors import FeatxError, ImageError, MismatchError, UsageError
from featx.extraction import Embedder
from featx.heads import unit_rows
from featx.images import DecoderPool
from featx.models import Bundle, Explainer, fit_bundle, layer_number, web_runtime, write_bundle
from featx.reports import overlay_urls

if TYPE_CHECKING:
    from featx.studio.session import Embedded, Session

SUFFIXES = {"model": ".model", "onnx": ".onnx", "html": ".html", "card": ".md", "labels": ".csv"}
"""Of the files that can be taken along."""

_KEPT = 50
"""Tried photos that can still be added."""

_NEAR = 6

log = logging.getLogger("featx.studio")


SILENT = (
    "This classifier is unsure of every photo: its labels cannot promise yet that at most 5 % of its answers are "
    "wrong. More labels change that, and so does a second look at those that may be wrong (How good?)."
)


@dataclass
class Job:
    """A file that is being made, or was; ``made`` is when, in seconds since 1970."""

    what: str
    file: str
    status: str = "running"
    message: str = ""
    bytes: int | None = None
    made: float | None = None

    def done(self, path: Path) -> None:
        """It is there."""
        found = path.stat()
        self.bytes, self.made, self.status = found.st_size, found.st_mtime, "done"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"id": self.what, **vars(self)}


class Taking:
    """The model of an open project; methods are called from any thread.

    Parameters
    ----------
    session : whose labels it is fitted on.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.folder = session.project.folder / "models"
        self.jobs: dict[str, Job] = {}
        for what, suffix in SUFFIXES.items():
            path = self.folder / f"{self.name}{suffix}"
            if path.is_file():  # made when the project was open before
                self.jobs[what] = Job(what, path.name)
                self.jobs[what].done(path)
        self._fitting = threading.Lock()
        self._fitted: tuple[int, int, Bundle] | None = None
        self._embedder: Embedder | None = None
        self._decoders: DecoderPool | None = None
        self._tried: OrderedDict[str, bytes] = OrderedDict()
        self._number = 0
        self._child: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End what is running."""
        child = self._child
        if child is not None:
            child.terminate()
        with self._fitting:
            if self._decoders is not None:
                self._decoders.__exit__(None, None, None)
                self._decoders = None

    @property
    def name(self) -> str:
        """What the files are called."""
        return self.session.project.name or "photos"

    def model(self) -> tuple[Bundle, Embedder, Embedded]:
        """The model of the labels as they are now.

        Raises
        ------
        UsageError
            There are too few labels, or no embeddings yet.
        """
        with self._fitting:
            embedded = self.session.embedded
            if embedded is None:
                raise UsageError("the photos have not been read yet", hint="Wait until they are.")
            data = self.session.labelled(embedded)
            counts = np.bincount(data.features.labels[data.features.labels >= 0])
            if (counts >= 1).sum() < 2:
                raise UsageError("a model needs labelled photos of at least two classes", hint="Label some first.")
            if self._embedder is None:
                self._embedder = Embedder.like(embedded.features.provenance, where=self.session.project.store)
            key = (self.session.journal.n, len(embedded.photos))
            if self._fitted is None or self._fitted[:2] != key:
                layers = data.layers if len(data.layers.names) > 1 else None
                self._fitted = (*key, fit_bundle(data.features, self._embedder, layers=layers))
            return self._fitted[2], self._embedder, embedded

    # --- trying ---------------------------------------------------------------------------------------------------

    def try_photo(self, data: bytes) -> dict[str, Any]:
        """What the model says of a photo.

        Raises
        ------
        UsageError
            There is no model yet.
        ImageError
            The photo cannot be read.
        """
        bundle, embedder, embedded = self.model()
        with self._fitting:
            if self._decoders is None:
                self._decoders = embedder.decoders(workers=1)
            decoders = self._decoders
        decoded = decoders.decode(data, wanted=lambda: True)
        assert decoded is not None
        seen = embedder.seen(decoded)
        if decoded.refusal is not None or seen is None:
            raise decoded.refusal or ImageError("corrupt", "it has no pixels")
        row = of_layer(embedder.embed_pixels([seen]), layer_number(bundle))
        answer = bundle.answer(row)[0]
        overlay, why_not = None, ""
        try:
            explainer = Explainer(bundle.scorer, bundle.class_names, embedder, layer_number(bundle))
            explanation = explainer.explain(seen, decoded.size)
            (overlay,) = overlay_urls(explanation, explanation.ranked[:1], decoded.size)
        except (UsageError, MismatchError) as error:
            why_not = error.hint or str(error)
        self._number += 1
        name = f"t{self._number}"
        self._tried[name] = data
        while len(self._tried) > _KEPT:
            self._tried.popitem(last=False)
        return {
            "id": name, **answer.to_json(), "overlay": overlay, "overlay_reason": why_not,
            "caution": SILENT if bundle.threshold is None else "",
            "neighbours": self._near(embedded, row[0]),
        }  # fmt: skip

    def _near(self, embedded: Embedded, row: Any) -> list[dict[str, Any]]:
        """The labelled photos that are most like one, whose embedding is given."""
        own = unit_rows(np.asarray(row, dtype=np.float64)[None], embedded.layers.default_kind)[0].astype(np.float32)
        codes = self.session.codes()
        places = np.flatnonzero(codes[embedded.photos] >= 0)
        cosines = embedded.unit[places] @ own
        best = np.argsort(-cosines, kind="stable")[:_NEAR]
        return [
            {"row": photo, "label": self.session.journal.classes[codes[photo]], "score": round(float(cosine), 4)}
            for photo, cosine in zip(embedded.photos[places[best]].tolist(), cosines[best], strict=True)
        ]

    def tried(self, name: str) -> bytes:
        """The bytes of a photo that was tried.

        Raises
        ------
        UsageError
            It is too long ago, or there was none.
        """
        if name not in self._tried:
            raise UsageError("this photo is not kept any more", hint="Try it again.")
        return self._tried[name]

    # --- taking along ---------------------------------------------------------------------------------------------

    def commands(self) -> list[list[str]]:
        """What does the same on the command line."""
        project = self.session.project
        store, model = str(project.store), str(self.folder / f"{self.name}.model")
        return [
            ["featx", "extract", str(project.labels), "--out", store],
            ["featx", "sweep", store],
            ["featx", "fit", store, "--out", model],
        ]

    def take(self, what: str) -> Job:
        """Begin to make a file.

        Raises
        ------
        UsageError
            There is no such kind of file.
        """
        if what not in SUFFIXES:
            raise UsageError("there is no such file to take along", expected=", ".join(SUFFIXES), found=what)
        running = self.jobs.get(what)
        if running is not None and running.status == "running":
            return running
        job = self.jobs[what] = Job(what, f"{self.name}{SUFFIXES[what]}")
        threading.Thread(target=self._make, args=(job,), name=f"take {what}", daemon=True).start()
        return job

    def path(self, file: str) -> Path:
        """Where a file is that was made.

        Raises
        ------
        UsageError
            None of this name was.
        """
        if not any(job.file == file and job.status == "done" for job in self.jobs.values()):
            raise UsageError("there is no such file", found=file)
        return self.folder / file

    def _make(self, job: Job) -> None:
        self.session.events.publish("job", job.to_json())
        out = self.folder / job.file
        try:
            make_folder(self.folder)
            if job.what == "labels":
                project = self.session.project
                publish_bytes(out, project.journal.csv(photo.ref.id for photo in project.photos))
            else:
                bundle, _, _ = self.model()
                model = self.folder / f"{self.name}.model"
                write_bundle(bundle, model)
                if bundle.threshold is None:
                    job.message = SILENT
                if job.what == "card":
                    self._run("card", model, "--out", out)
                elif job.what == "onnx":
                    self._run("export", model, "--format", "onnx", "--out", out)
                elif job.what == "html":
                    runtime = self.session.setup.runtime
                    if runtime is None:
                        _check_runtime()
                    given = [] if runtime is None else ["--runtime", runtime]
                    store = self.session.project.store
                    self._run("export", model, "--format", "html", "--out", out, "--store", store, *given)
            job.done(out)
        except FeatxError as error:
            job.status, job.message = "failed", str(error)
        except Exception as error:
            job.status, job.message = "failed", f"{type(error).__name__}: {error}"
            log.exception("%s failed", job.what)
        self.session.events.publish("job", job.to_json())

    def _run(self, *arguments: str | Path) -> None:
        """Run a command of featx, in a process of its own: what it loads is gone with it.

        Raises
        ------
        UsageError
            It failed; with what it said.
        """
        command = [sys.executable, "-m", "featx", *arguments]
        none = subprocess.DEVNULL
        with subprocess.Popen(command, stdin=none, stdout=none, stderr=subprocess.PIPE) as child:
            self._child = child
            try:
                _, said = child.communicate()
            finally:
                self._child = None
        if child.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            raise UsageError(
                " ".join(lines[-3:]).removeprefix("Error: ") or f"featx {arguments[0]} ended with {child.returncode}"
            )


def _check_runtime() -> None:
    """UsageError where nothing on this machine runs a model in a browser, with what to do in the studio."""
    try:
        web_runtime(None)
    except UsageError as error:
        raise UsageError(
            error.what,
            hint="End featx studio and start it once with --runtime npm, which fetches it from the internet.",
        ) from error
