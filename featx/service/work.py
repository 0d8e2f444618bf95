"""The models of the service, and the work of one request: its images read, waited for, and brought into one answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from featx._system import available_cpus
from featx.backbones import of_layer
from featx.errors import FeatxError, ImageError, MismatchError, UsageError, plural
from featx.extraction import Embedder, Seen
from featx.images import REASONS
from featx.models import Answer, Bundle, Explainer, Versions, layer_number, read_current, version_of
from featx.reports import overlay_urls
from featx.service.batcher import Batcher, Embedded, Job, Line, OutOfResources, QueueFull, WorkerDied
from featx.service.counts import Counts
from featx.service.evidence import Evidence
from featx.service.guard import Limits, Refusal
from featx.service.telemetry import Metrics, ModelMetrics, request_id
from featx.store import title_of

if TYPE_CHECKING:
    from featx.service.feedback import Feedback

ReadImages = Callable[[Request, Limits], Awaitable[list[tuple[str, bytes]]]]
"""What takes images out of a request: a name and a file each."""

FOLLOW_SECONDS = 0.5
"""Between two looks at which version of a model is current."""

log = logging.getLogger("featx.service")


@dataclass(frozen=True)
class Model:
    """A model that is to be served.

    Parameters
    ----------
    bundle, embedder : the model and its network. Models with the very same embedder share its engine and decoders.
    evidence : the store beside it, if there is one.
    name : for clients that ask for one by its name.
    feedback : where corrections of its answers are kept, if they are.
    """

    bundle: Bundle
    embedder: Embedder
    evidence: Evidence | None = None
    name: str = "model"
    feedback: Feedback | None = None


class Repository:
    """All models of a process, by name, each with a line of its own for its images.

    Parameters
    ----------
    models : with different names.
    limits : what may be asked for, of each model.
    counts : where answers are counted, open; None where they are counted for the metrics only.
    """

    def __init__(self, models: Sequence[Model], limits: Limits | None = None, counts: Counts | None = None) -> None:
        self.limits, self.counts = limits or Limits(), counts
        self.stopping = False
        self.metrics = Metrics(several=len(models) > 1)
        embedders = list({id(model.embedder): model.embedder for model in models}.values())
        # Of several networks each has a part of the cores to decode with, and two at least.
        cores = available_cpus()
        workers = max(min(2, cores), math.ceil(cores / len(embedders)))
        probes = {id(model.embedder): model.bundle.probe for model in models}
        batchers = {
            id(each): Batcher(each, each.pixels(probes[id(each)]), max_pixels=self.limits.pixels, workers=workers)
            for each in embedders
        }
        self.batchers = list(batchers.values())
        self.services: dict[str, Service] = {}
        for model in models:
            counted = self.metrics.of(model.name, model.bundle.class_names)
            if counts is not None:
                counts.describe(model.bundle, model.name)
            line = batchers[id(model.embedder)].line(queue_size=self.limits.queue, on_batch=counted.batch)
            self.services[model.name] = Service(self, model, line, counted)

    @property
    def several(self) -> bool:
        """Whether a request has to say which model it is for."""
        return len(self.services) > 1

    def named(self, name: str | None) -> Service:
        """The model of this name; without one, the only model there is.

        Raises
        ------
        Refusal
            There are several, or none of this name.
        """
        if name is None and not self.several:
            return next(iter(self.services.values()))
        names = ", ".join(self.services)
        if name is None:
            message = f"There are several models: {names}. Say which one, as in ?model={next(iter(self.services))}."
            raise Refusal(422, "which_model", message)
        if name not in self.services:
            raise Refusal(404, "no_model", f"There is no model {name[:40]!r}; there is {names}.")
        return self.services[name]

    async def follow(self) -> None:
        """Switch to the current version of each model that has a feedback folder, as long as this runs.

        A request that has begun is answered by the version that it began with: none waits, and none is lost. A version
        that cannot be read, or is of another network, is logged once, and what is served stays.
        """
        failed: dict[str, str] = {}
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            for name, service in list(self.services.items()):
                if service.feedback is None:
                    continue
                wanted = ""
                try:
                    current = await asyncio.to_thread(read_current, service.feedback.folder)
                    wanted = current or ""
                    if wanted in ("", service.version, failed.get(name)):
                        continue
                    bundle = await asyncio.to_thread(Versions(service.feedback.folder).read, wanted)
                    self.switch(name, bundle)
                except FeatxError as error:
                    failed[name] = wanted
                    log.error("version %s of %s is not served: %s", wanted, name, error)
                else:
                    log.info("%s: version %s is served now", name, wanted)

    def switch(self, name: str, bundle: Bundle) -> None:
        """Answer with another version of a model from now on.

        Raises
        ------
        MismatchError
            It is of another network than the one that runs.
        """
        before = self.services[name]
        if before.fingerprint != bundle.provenance.get("fingerprint") or bundle.tail != before.bundle.tail:
            raise MismatchError(
                "the new version is of another network", where=name, expected=before.fingerprint,
                found=bundle.provenance.get("fingerprint"), hint="Start the service again to serve it.",
            )  # fmt: skip
        model = Model(bundle, before.embedder, before.evidence, name, before.feedback)
        if self.counts is not None:
            self.counts.describe(bundle, name)
        self.services[name] = Service(self, model, before.line, before.metrics)

    def start(self) -> None:
        """Start what computes; when this returns, all networks are warm."""
        if self.counts is not None:
            self.counts.start()
        for batcher in self.batchers:
            batcher.start()

    def stop(self) -> None:
        """End everything."""
        for batcher in self.batchers:
            batcher.stop()
        if self.counts is not None:
            self.counts.stop()
        for service in self.services.values():
            if service.evidence is not None:
                service.evidence.close()
            if service.feedback is not None:
                service.feedback.close()

    def problem(self) -> str:
        """Why requests for some model cannot be answered just now, or ""."""
        problems = {name: service.problem() for name, service in self.services.items()}
        return next((f"{name}: {each}" if self.several else each for name, each in problems.items() if each), "")

    def lost(self) -> str:
        """Why nothing will ever be computed again by some network, or ""."""
        return next(filter(None, (batcher.lost() for batcher in self.batchers)), "")


class Service:
    """One model, as the application's routes see it.

    Parameters
    ----------
    model : which one.
    line : where its images wait.
    limits : what may be asked for.
    metrics, counts : where it is counted what is done.
    """

    def __init__(self, repository: Repository, model: Model, line: Line, metrics: ModelMetrics) -> None:
        self.bundle, self.embedder, self.evidence, self.name = model.bundle, model.embedder, model.evidence, model.name
        self.feedback = model.feedback
        self.repository, self.limits, self.line, self.metrics = repository, repository.limits, line, metrics
        metrics.watch(lambda: line.waiting, lambda: not self.problem())
        self.layer = layer_number(self.bundle)
        self.explainer = Explainer(self.bundle.scorer, self.bundle.class_names, self.embedder, self.layer)
        self.explaining = asyncio.Lock()

    @property
    def fingerprint(self) -> Any:
        """Of the network and of how it is run."""
        return self.bundle.provenance.get("fingerprint")

    @property
    def version(self) -> str:
        """What every answer carries: the beginning of the model's sha256."""
        return version_of(self.bundle)

    @property
    def has_sets(self) -> bool:
        """Whether the model can answer with sets of labels."""
        return self.bundle.conformity is not None or self.bundle.sharpness is None

    def answer(self, embeddings: NDArray[np.floating], coverage: float | None = None) -> list[Answer]:
        """What the model says of embeddings (n, d), as of :meth:`featx.models.Bundle.answer`; it is counted."""
        answers = self.bundle.answer(embeddings, coverage)
        self.metrics.answered(answers)
        if self.repository.counts is not None:
            self.repository.counts.add(self.bundle, answers)
        return answers

    def problem(self) -> str:
        """Why requests cannot be answered just now, or ""."""
        return self.line.batcher.problem() or self.refusing()

    def refusing(self) -> str:
        """Why no request is accepted, or ""."""
        return self.line.batcher.refusing() or ("the service stops" if self.repository.stopping else "")

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
            "fingerprint": self.fingerprint,
            "model_sha256": self.bundle.sha256,
            "version": self.version,
            "embedding_dim": self.bundle.scorer.dims,
            "engine": self.embedder.engine.name,
            "device": self.embedder.engine.device,
            "precision": self.embedder.engine.precision,
            "metrics": told["metrics"],
            "store": None if evidence is None else {"images": len(evidence), "thumbnails": evidence.has_images},
            "explains": self.bundle.scorer.coef is not None,
            "feedback": None
            if self.feedback is None
            else {"corrections": len(self.feedback.corrections), "new_classes": self.feedback.new_classes},
            "limits": vars(self.limits),
        }


@dataclass
class Work:
    """The images of one request, after the network has seen them.

    ``files`` are those of ``names``; ``kept`` their pixels and sizes, if wanted.
    """

    names: list[str]
    files: list[bytes]
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
    _check_able(service)
    # Before anything is read: who cannot be served should not have to send it all.
    if service.line.waiting >= service.limits.queue:
        raise _busy(service.line.retry_after())
    async with arriving(service.limits.deadline):
        images = await (read or _read_images)(request, service.limits)
    return await work_on(service, images, deadline, request, keep=keep)


@contextlib.asynccontextmanager
async def arriving(seconds: float) -> AsyncIterator[None]:
    """Give a request's body so much time; Refusal when it is over."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        message = f"The body did not arrive within {seconds:g} s."
        raise Refusal(408, "slow", message, {"Connection": "close"}) from None


async def work_on(
    service: Service, images: list[tuple[str, bytes]], deadline: float, request: Request | None, *, keep: bool = False
) -> Work:
    """Embed images, each a name and a file, for as long as the client of the request is there; without one, anyway.

    Raises
    ------
    Refusal, ClientDisconnect
        As of :func:`do_work`.
    """
    names, files, found, refused = [], [], [], []
    kept: list[tuple[Seen, tuple[int, int]]] = []
    results, jobs = await _embed(service, request, images, deadline, keep)
    for (name, data), result, job in zip(images, results, jobs, strict=True):
        if isinstance(result, ImageError):
            refused.append({"id": name, "reason": result.reason, "message": _sentence(result)})
        else:
            names.append(name)
            files.append(data)
            found.append(result)
            if job.pixels is not None:
                kept.append((job.pixels, job.size))
    service.metrics.images["embedded"].inc(len(names))
    service.metrics.images["refused"].inc(len(refused))
    return Work(names, files, found, refused, deadline, kept)


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
    pair = found.ranked[:2]
    both = zip(pair, overlay_urls(found, pair, size), strict=True)
    return {"reason": found.note or None, "classes": [{**found.to_json(each), "overlay": url} for each, url in both]}


def _sentence(error: ImageError) -> str:
    """Why an image is refused, for people: what a decoder says of a damaged file means little to them."""
    damaged = error.reason in ("truncated", "corrupt")
    text = f"{REASONS[error.reason]} ({error.what})" if damaged else error.what
    return f"{text[:1].upper()}{text[1:]}."


def _check_able(service: Service) -> None:
    problem = service.refusing()
    if problem:
        closing = {"Connection": "close"} if service.repository.stopping else {}
        raise Refusal(503, "not_ready", f"Not able to compute: {problem}.", {"Retry-After": "5", **closing})


def _busy(seconds: int) -> Refusal:
    return Refusal(429, "busy", "Too many images wait already; try again later.", {"Retry-After": str(seconds)})


async def _read_images(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, limits)
    if kind not in ("application/octet-stream", "application/dicom") and not kind.startswith("image/"):
        message = "Send an image as it is (Content-Type: image/jpeg), or a form (multipart/form-data) with images."
        raise Refusal(415, "content_type", message)
    return [("image", await request.body())]


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
    service: Service, request: Request | None, images: list[tuple[str, bytes]], deadline: float, keep: bool
) -> tuple[list[Embedded | ImageError], list[Job]]:
    """What became of each image, and its job; whoever goes away or runs out of time leaves no work behind."""
    _check_able(service)
    try:
        jobs = service.line.submit([data for _, data in images], deadline, keep=keep)
    except (QueueFull, WorkerDied) as error:
        raise _refusal(service, error) from None
    everything: asyncio.Future[Any] = asyncio.gather(
        *(asyncio.wrap_future(job.future) for job in jobs), return_exceptions=True
    )
    # One that is cancelled says so as an exception, and asyncio would log that nobody has asked for it.
    everything.add_done_callback(lambda done: done.cancelled() or done.exception())
    gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({everything, gone}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            if gone.done():
                raise ClientDisconnect
            raise _late(service)
        results: list[Embedded | ImageError] = everything.result()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, ImageError):
                raise _refusal(service, result)
        return results, jobs
    finally:
        gone.cancel()
        everything.cancel()
        service.line.drop(jobs)


def _refusal(service: Service, error: BaseException) -> BaseException:
    """What to raise where an image was not computed."""
    if isinstance(error, QueueFull):
        return _busy(error.retry_after)
    if isinstance(error, WorkerDied):
        return Refusal(503, "not_ready", f"Not able to compute: {error}.")
    if isinstance(error, OutOfResources):
        message = f"The system lacks what an image needs just now: {error}. Try again later."
        return Refusal(503, "resources", message, {"Retry-After": "1"})
    return _late(service) if isinstance(error, TimeoutError) else error


def _late(service: Service) -> Refusal:
    return Refusal(504, "deadline", f"Not done within {service.limits.deadline:g} s; the work was dropped.")


async def _disconnected(request: Request | None) -> None:
    if request is None:
        await asyncio.Event().wait()
        return
    while (await request.receive())["type"] != "http.disconnect":
        pass
