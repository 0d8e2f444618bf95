"""Corrections over HTTP: what people say that an answer should have been, kept for a model to learn from."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import subprocess
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from featx.errors import StoreError, UsageError
from featx.models import MAX_NAME, Answer, Corrections, Said, agreements, export_csv, vote
from featx.service import schema
from featx.service.guard import Refusal
from featx.service.schema import Named
from featx.service.telemetry import request_id
from featx.service.work import Repository, Service, do_work

REMEMBERED = 64 * 2**20
"""Bytes of the photos that were answered last, which can be corrected by the ids of their answers."""

log = logging.getLogger("featx.service")

# Of the module, where FastAPI finds what annotations name.
_Text = Annotated[str, Query(max_length=MAX_NAME)]


class Refitter:
    """Runs a command whenever so many corrections have come since it last began; one run at a time.

    Parameters
    ----------
    command : what fits the model again, in a process of its own: it takes cores and memory, and may fail.
    every : corrections.
    waiting : corrections that no run has considered yet.
    """

    def __init__(self, command: Sequence[str], every: int, waiting: int = 0) -> None:
        self.command, self.every, self.waiting = command, every, waiting
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._busy = self._closed = False

    def added(self) -> None:
        """A correction has come."""
        with self._lock:
            self.waiting += 1
        self._begin()

    def begin(self) -> None:
        """Run now, or again when the run has ended that is at it, for as few corrections as there are."""
        with self._lock:
            self.waiting = max(self.waiting, self.every)
        self._begin()

    def _begin(self) -> None:
        with self._lock:
            if self._closed or self._busy or self.waiting < self.every:
                return
            self._busy = True
        threading.Thread(target=self._run, name="refit", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed or self.waiting < self.every:
                    self._busy = False
                    return
                self.waiting = 0
                pipe = subprocess.PIPE
                try:
                    self._process = subprocess.Popen(self.command, stdout=pipe, stderr=pipe, text=True)
                except OSError as error:  # no memory for a process, say
                    log.error("a refit could not begin: %s", error)
                    self._busy = False
                    return
            out, err = self._process.communicate()
            log.info("refit ended with %d: %s", self._process.returncode, (out + err).strip()[-2000:])

    def close(self) -> None:
        """Begin no other, and end the one that runs; what it has not promoted stays as it was."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()


class Feedback:
    """The corrections of one model, and the photos that it answered last.

    Parameters
    ----------
    corrections : of its feedback folder, open.
    new_classes : whether a label may be one that the model does not know.
    refitter : what fits the model again after so many corrections, if something is to.
    """

    def __init__(
        self, corrections: Corrections, *, new_classes: bool = False, refitter: Refitter | None = None
    ) -> None:
        self.corrections, self.new_classes, self.refitter = corrections, new_classes, refitter
        self._answered: OrderedDict[str, tuple[bytes, Said]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """The feedback folder."""
        return self.corrections.folder

    def close(self) -> None:
        """Keep no more."""
        self.corrections.close()
        if self.refitter is not None:
            self.refitter.close()

    def remember(self, image: bytes, answer: Answer, version: str) -> str:
        """Keep a photo that was answered for a while; the id that a correction may name is its sha256."""
        digest = hashlib.sha256(image).hexdigest()
        with self._lock:
            known = self._answered.pop(digest, None)
            self._size += len(image) * (known is None)
            self._answered[digest] = image, Said(answer.label, answer.score, version)
            while self._size > REMEMBERED:
                _, (forgotten, _) = self._answered.popitem(last=False)
                self._size -= len(forgotten)
        return digest

    def answered(self, digest: str) -> tuple[bytes, Said]:
        """The photo of an answer, and what was said of it.

        Raises
        ------
        Refusal
            It is not remembered, or any more.
        """
        with self._lock:
            found = self._answered.get(digest)
        if found is None:
            message = "This answer is not remembered; the last photos are, of 64 MiB. Send the photo itself."
            raise Refusal(404, "no_answer", message)
        return found

    def check(self, label: str, class_names: tuple[str, ...]) -> None:
        """Refusal where the label is of no class, and may not be new."""
        if self.new_classes or label.strip() in class_names:
            return
        some = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
        message = f"There is no class {label.strip()[:40]!r}; there is {some}. New ones need serve --new-classes."
        raise Refusal(422, "label", message)


def add_feedback(app: FastAPI, repository: Repository, keyed: list[Any], *, trusted: bool) -> None:
    """Add the routes of corrections.

    Parameters
    ----------
    trusted : whether a key shows who asks. Without one, a page of another site that somebody has open could send
        corrections from his browser, which says where they come from.
    """
    refused = schema.errors(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504)

    @app.post(
        "/feedback",
        responses={200: {"model": schema.Corrected}, **refused},
        openapi_extra=schema.image_body(required=False),
        dependencies=keyed,
    )
    async def correct(
        request: Request,
        label: _Text,
        by: _Text = "",
        answer: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$")] = None,
        model: Named = None,
    ) -> Response:
        """Say what a photo shows: the photo is the body, or that of an earlier ``answer``, by its id.

        It is on the disk when this is answered. The same again, by the same person, changes nothing (``new`` is false);
        another label by the same person takes the place of the one before.
        """
        if not trusted:
            check_origin(request)
        service = repository.named(model)
        feedback = _feedback(service)
        feedback.check(label, service.bundle.class_names)
        if repository.stopping:
            raise Refusal(503, "not_ready", "The service stops.", {"Retry-After": "5", "Connection": "close"})
        if answer is not None:
            image, said = feedback.answered(answer)
        else:
            work = await do_work(service, request)
            if len(work.names) + len(work.refused) > 1:
                raise Refusal(422, "images", "A correction is of one photo.")
            if work.refused:
                raise Refusal(422, work.refused[0]["reason"], work.refused[0]["message"])
            (image,) = work.files
            (found,) = service.bundle.answer(work.matrix(service.layer))
            said = Said(found.label, found.score, service.version)
        try:
            # Not cancelled with its request: a thread goes on anyway, and what is written is written.
            kept, new = await asyncio.to_thread(feedback.corrections.add, image, label, by, said)
        except UsageError as error:
            raise Refusal(422, "label", f"{error}") from error
        except StoreError as error:
            raise Refusal(503, "resources", f"The correction was not kept: {error}", {"Retry-After": "5"}) from error
        if new and feedback.refitter is not None:
            feedback.refitter.added()
        body = {"correction": kept.to_json(), "new": new, "request_id": request_id.get()}
        return JSONResponse(body)

    @app.get(
        "/feedback",
        responses={200: {"model": schema.FeedbackReply, "content": {"text/csv": {}}}, **schema.errors(401, 403, 404)},
        dependencies=keyed,
    )
    async def feedback(
        model: Named = None,
        after: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        form: Annotated[Literal["json", "csv"], Query(alias="format")] = "json",
    ) -> Response:
        """The corrections behind number ``after``, in order, and how far people agree.

        ``format=csv`` is a list of all photos that ``featx extract`` takes in the feedback folder, with the label that
        most people give.
        """
        service = repository.named(model)
        corrections = _feedback(service).corrections
        voted = await asyncio.to_thread(lambda: vote(corrections.latest))
        if form == "csv":
            text = await asyncio.to_thread(export_csv, voted)
            headers = {"content-disposition": 'attachment; filename="feedback.csv"'}
            return Response(text, media_type="text/csv; charset=utf-8", headers=headers)
        found = corrections.since(after, limit)
        body = {
            "corrections": [each.to_json() for each in found],
            "total": len(corrections),
            "next": found[-1].n if found and found[-1].n < len(corrections) else None,
            "images": len(voted),
            "disagreements": [each.to_json() for each in voted if each.disputed],
            "agreement": [each.to_json() for each in agreements(voted)],
        }
        return JSONResponse(body)


def _feedback(service: Service) -> Feedback:
    if service.feedback is None:
        message = "Corrections are not kept: the service was started without --feedback."
        raise Refusal(404, "no_feedback", message)
    return service.feedback


def check_origin(request: Request) -> None:
    """Refusal where the page of another site asks."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    own = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if not own or site in ("cross-site", "same-site"):
        raise Refusal(403, "origin", "Another page asked; without an API key, only the service's own may correct.")
