"""The work of one request: its images read, waited for, and brought into one answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from featx.backbones import of_layer
from featx.errors import ImageError, MismatchError, UsageError, plural
from featx.extraction import Embedder, Seen
from featx.images import REASONS, encode
from featx.models import Bundle, Explainer, layer_number
from featx.reports import overlays
from featx.service.batcher import Batcher, Embedded, Job, OutOfResources, QueueFull, WorkerDied
from featx.service.evidence import Evidence
from featx.service.guard import Limits, Refusal
from featx.service.telemetry import Metrics, request_id
from featx.store import title_of

ReadImages = Callable[[Request, Limits], Awaitable[list[tuple[str, bytes]]]]
"""What takes images out of a request: a name and a file each."""

OVERLAY_SIDE = 192
"""Pixels of an overlay's longer side; a browser scales it up, as smooth as it is."""


@dataclass
class Service:
    """What the application's routes share.

    Parameters
    ----------
    bundle, embedder : the model and its network.
    name : of the model, for clients that ask for one by its name.
    evidence : the store beside it, if there is one.
    limits : what may be asked for.
    """

    bundle: Bundle
    embedder: Embedder
    evidence: Evidence | None = None
    limits: Limits = field(default_factory=Limits)
    name: str = "model"
    stopping: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: self.batcher.waiting, lambda: not self.problem())
        self.batcher = Batcher(
            self.embedder,
            self.embedder.pixels(self.bundle.probe),
            queue_size=self.limits.queue,
            max_pixels=self.limits.pixels,
            on_batch=self.metrics.batch,
        )
        self.layer = layer_number(self.bundle)
        self.explainer = Explainer(self.bundle.scorer, self.bundle.class_names, self.embedder, self.layer)
        self.explaining = asyncio.Lock()

    @property
    def has_sets(self) -> bool:
        """Whether the model can answer with sets of labels."""
        return self.bundle.conformity is not None or self.bundle.sharpness is None

    def problem(self) -> str:
        """Why requests cannot be answered just now, or ""."""
        return self.batcher.problem() or self.refusing()

    def refusing(self) -> str:
        """Why no request is accepted, or ""."""
        return self.batcher.refusing() or ("the service stops" if self.stopping else "")

    def info(self) -> dict[str, Any]:
        """What is served."""
        told = self.bundle.describe()
        evidence = self.evidence
        return {
            "featx": version("featx"),
            **{name: told[name] for name in ("head", "params", "class_names", "layer", "threshold", "max_error")},
            "max_unknown": told["max_unknown"],
            "prior": told["prior"],
            "sets": self.has_sets,
            "score_kind": self.bundle.score_kind,
            "backbone": title_of(self.bundle.provenance),
            "fingerprint": self.bundle.provenance.get("fingerprint"),
            "model_sha256": self.bundle.sha256,
            "embedding_dim": self.bundle.scorer.dims,
            "engine": self.embedder.engine.name,
            "device": self.embedder.engine.device,
            "precision": self.embedder.engine.precision,
            "metrics": told["metrics"],
            "store": None if evidence is None else {"images": len(evidence), "thumbnails": evidence.has_images},
            "explains": self.bundle.scorer.coef is not None,
            "limits": vars(self.limits),
        }


@dataclass
class Work:
    """The images of one request, after the network has seen them; ``kept``: their pixels and sizes, if wanted."""

    names: list[str]
    found: list[Embedded]
    refused: list[dict[str, str]]
    deadline: float = 0.0
    kept: list[tuple[Seen, tuple[int, int]]] = field(default_factory=list)

    def matrix(self, layer: int | None) -> NDArray[np.float32]:
        """Embeddings (n, d) of one layer, or of all combined."""
        return np.stack([of_layer(each, layer) for each in self.found])

    def reply(self, said: dict[str, Any]) -> Response:
        """The answer; where no image could be used, an error with the first one's reason."""
        if self.names:
            return JSONResponse({**said, "refused": self.refused, "request_id": request_id.get()})
        first = Refusal(422, self.refused[0]["reason"], self.refused[0]["message"])
        return JSONResponse({**first.to_json(), "refused": self.refused}, 422)


async def do_work(service: Service, request: Request, *, keep: bool = False, read: ReadImages | None = None) -> Work:
    """Read the images of a request and embed them; with ``keep``, what the networks saw is kept.

    ``read`` takes the images out of the request; by default they are its body, or the files of a form.

    Raises
    ------
    Refusal
        What the client is to be told instead.
    ClientDisconnect
        There is no client any more; its work is dropped.
    """
    deadline = time.monotonic() + service.limits.deadline
    batcher = service.batcher
    _check_able(service)
    # Before anything is read: who cannot be served should not have to send it all.
    if batcher.waiting >= service.limits.queue:
        raise _busy(batcher.retry_after())
    try:
        async with asyncio.timeout(service.limits.deadline):
            images = await (read or _read_images)(request, service.limits)
    except TimeoutError:
        message = f"The body did not arrive within {service.limits.deadline:g} s."
        raise Refusal(408, "slow", message, {"Connection": "close"}) from None
    names, found, refused = [], [], []
    kept: list[tuple[Seen, tuple[int, int]]] = []
    results, jobs = await _embed(service, request, images, deadline, keep)
    for (name, _), result, job in zip(images, results, jobs, strict=True):
        if isinstance(result, ImageError):
            refused.append({"id": name, "reason": result.reason, "message": _sentence(result)})
        else:
            names.append(name)
            found.append(result)
            if job.pixels is not None:
                kept.append((job.pixels, job.size))
    service.metrics.images.labels("embedded").inc(len(names))
    service.metrics.images.labels("refused").inc(len(refused))
    return Work(names, found, refused, deadline, kept)


async def explain(service: Service, work: Work) -> list[dict[str, Any]]:
    """Where the evidence on each image of a request lies, one request at a time; Refusal when it takes too long."""

    def run() -> list[dict[str, Any]]:
        return [_explanation(service, seen, size) for seen, size in work.kept]

    try:
        async with asyncio.timeout(max(0.0, work.deadline - time.monotonic())), service.explaining:
            return await asyncio.to_thread(run)
    except TimeoutError:
        raise _late(service) from None


def _explanation(service: Service, seen: Seen, size: tuple[int, int]) -> dict[str, Any]:
    try:
        found = service.explainer.explain(seen, size)
    except (UsageError, MismatchError) as error:
        return {"reason": error.hint or f"{error.what[:1].upper()}{error.what[1:]}.", "classes": []}
    scale = OVERLAY_SIDE / max(size)
    width, height = (max(1, round(scale * length)) for length in size)
    pair = found.ranked[:2]
    shown = [
        {
            **found.to_json(place),
            "overlay": f"data:image/png;base64,{base64.b64encode(encode(overlay)).decode()}",
        }
        for place, overlay in zip(pair, overlays(found, pair, width, height), strict=True)
    ]
    return {"reason": found.note or None, "classes": shown}


def _sentence(error: ImageError) -> str:
    """Why an image is refused, for people: what a decoder says of a damaged file means little to them."""
    damaged = error.reason in ("truncated", "corrupt")
    text = f"{REASONS[error.reason]} ({error.what})" if damaged else error.what
    return f"{text[:1].upper()}{text[1:]}."


def _check_able(service: Service) -> None:
    problem = service.refusing()
    if problem:
        closing = {"Connection": "close"} if service.stopping else {}
        raise Refusal(503, "not_ready", f"Not able to compute: {problem}.", {"Retry-After": "5", **closing})


def _busy(seconds: int) -> Refusal:
    return Refusal(429, "busy", "Too many images wait already; try again later.", {"Retry-After": str(seconds)})


async def _read_images(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, limits)
    if kind != "application/octet-stream" and not kind.startswith("image/"):
        message = "Send an image as it is (Content-Type: image/jpeg), or a form (multipart/form-data) with images."
        raise Refusal(415, "content_type", message)
    return [("image", b"".join([chunk async for chunk in request.stream()]))]


async def _read_form(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    most = min(limits.images, limits.queue)
    try:
        async with contextlib.aclosing(request.stream()) as stream:
            parser = MultiPartParser(request.headers, stream, max_files=most, max_fields=most)
            parser.spool_max_size = limits.body  # in memory, all of it: a full disk is no matter, and nothing is left
            form = await parser.parse()
        try:
            uploads = [(name, each) for name, each in form.multi_items() if isinstance(each, UploadFile)]
            images = [(each.filename or name, await each.read()) for name, each in uploads]
        finally:
            await form.close()
    except MultiPartException as error:
        said = error.message
        if said.startswith("Too many"):
            message = f"A request may have at most {plural(most, 'image')} (serve --max-images). Send them in batches."
            raise Refusal(413, "images", message) from error
        raise Refusal(400, "form", f"The form cannot be read: {said}") from error
    if not images:
        raise Refusal(422, "empty", "The form has no file. With curl: -F images=@photo.jpg")
    return images


async def _embed(
    service: Service, request: Request, images: list[tuple[str, bytes]], deadline: float, keep: bool
) -> tuple[list[Embedded | ImageError], list[Job]]:
    """What became of each image, and its job; whoever goes away or runs out of time leaves no work behind."""
    _check_able(service)
    try:
        jobs = service.batcher.submit([data for _, data in images], deadline, keep=keep)
    except QueueFull as full:
        raise _busy(full.retry_after) from None
    except WorkerDied as died:
        raise Refusal(503, "not_ready", f"Not able to compute: {died}.") from None
    everything: asyncio.Future[Any] = asyncio.gather(
        *(asyncio.wrap_future(job.future) for job in jobs), return_exceptions=True
    )
    gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({everything, gone}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            if gone.done():
                raise ClientDisconnect
            raise _late(service)
        results: list[Embedded | ImageError] = []
        for result in everything.result():
            if isinstance(result, WorkerDied):
                raise Refusal(503, "not_ready", f"Not able to compute: {result}.")
            if isinstance(result, OutOfResources):
                message = f"The system lacks what an image needs just now: {result}. Try again later."
                raise Refusal(503, "resources", message, {"Retry-After": "1"})
            if isinstance(result, QueueFull):
                raise _busy(result.retry_after)
            if isinstance(result, TimeoutError):
                raise _late(service)
            if isinstance(result, BaseException) and not isinstance(result, ImageError):
                raise result
            results.append(result)
        return results, jobs
    finally:
        gone.cancel()
        everything.cancel()
        service.batcher.drop(jobs)


def _late(service: Service) -> Refusal:
    return Refusal(504, "deadline", f"Not done within {service.limits.deadline:g} s; the work was dropped.")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
