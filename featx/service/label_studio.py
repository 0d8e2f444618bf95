"""The protocol of Label Studio's machine-learning backends, for the classification of images.

Label Studio asks ``/health`` and ``/setup`` before it asks anything else, sends tasks to ``/predict``, and tells of
annotations at ``/webhook``, once, for a second, without trying again. So a label is on the disk before that is
answered; what did not arrive is fetched when a project is first heard of, when something could not be kept, and when
somebody presses *Start training*.

Of the answers, ``score`` is what Label Studio orders tasks by, the lowest first. ``model_version`` names the version
that answered; Label Studio asks again for tasks that have no prediction of the version that ``/setup`` names.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from featx.backbones import of_layer
from featx.errors import StoreError, UsageError, plural
from featx.models import Answer, InstantModels, Said, vote
from featx.service import schema
from featx.service.feedback import Feedback, check_origin
from featx.service.guard import Refusal, whole_text
from featx.service.label_studio_host import LabelStudioHost, NotFetched
from featx.service.work import Repository, Service, arriving, work_on

PATHS = ("/health", "/setup", "/predict", "/webhook")

VERSION = re.compile("featx-[0-9a-f]{8}")
"""What versions are called in Label Studio, so that they can be told from those of others."""

PREDICT_SECONDS = 90.0
"""For a request of tasks; Label Studio waits for 100 seconds."""

REMEMBERED_ROWS = 20_000
"""Embeddings of images that were fetched last: an image is asked for again whenever there is a new version."""

FOLLOW_SECONDS, RETRY_SECONDS, LONGEST_RETRY = 0.5, 20.0, 640.0
"""Between two looks at what a project lacks, and after one that failed: twice as long each time, up to the last."""

MOST_PROJECTS = 1000
"""That are known at a time; the one that was heard of first is forgotten for another."""

_REQUESTS, _CHUNK = 4, 8
"""Requests of tasks at a time, and images that are fetched and embedded at a time of each."""

_TRIES = 3
"""To keep labels that could not be kept, until Start training asks for them again."""

_THREADS = 32
"""Questions to Label Studio at a time."""

_MAX_CONFIG = 2**20
_PROJECT = re.compile(r"(\d{1,18})\.\d{1,18}")

log = logging.getLogger("featx.service")

T = TypeVar("T")
Row: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Choices:
    """How a project labels images: by one of several choices.

    Attributes
    ----------
    control, image : names of the two tags.
    field : of a task's data, where the image is.
    names : of the choices, as annotations have them.
    """

    control: str
    image: str
    field: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, config: object) -> Choices:
        """Read a labelling configuration: the first Choices for whole images, of which one is to be chosen.

        Raises
        ------
        Refusal
            It has none.
        """
        tree = _parse(config)
        images = {each.get("name"): each.get("value", "") for each in tree.iter("Image")}
        why = "it has no Choices whose toName is an Image"
        for each in tree.iter("Choices"):
            image = each.get("toName")
            if image not in images or not each.get("name"):
                continue
            names = tuple(name for one in each.iter("Choice") if (name := one.get("alias") or one.get("value")))
            of = re.fullmatch(r"\$([^\s.\[\]]+)", images[image])
            if each.get("choice", "single") == "multiple" or each.get("perRegion") == "true":
                why = f"the Choices {each.get('name')} are not one for each image"
            elif not names:
                why = f"the Choices {each.get('name')} have no Choice of their own"
            elif of is None:
                why = f"the value of the Image {image} is not a $field of the task"
            else:
                return cls(str(each.get("name")), str(image), of[1], names)
        raise Refusal(422, "config", f"The project does not classify images: {why}.")

    def label(self, result: object) -> str | None:
        """The choice in an annotation's result; None where there is none, or more than one."""
        for each in result if isinstance(result, list) else ():
            if isinstance(each, dict) and each.get("type") == "choices" and each.get("from_name") == self.control:
                value = each.get("value")
                chosen = value.get("choices") if isinstance(value, dict) else None
                if isinstance(chosen, list) and len(chosen) == 1 and isinstance(chosen[0], str):
                    return chosen[0]
        return None

    def suggestion(self, answer: Answer) -> tuple[str, float] | None:
        """The label to suggest, and its score: of the classes that are choices, the most probable; if there is any."""
        label, score = answer.label, answer.score
        if label not in self.names:
            offered = {name: share for name, share in answer.probabilities.items() if name in self.names}
            if not offered:
                return None
            label, score = max(offered.items(), key=lambda item: item[1])
        if answer.reason == "unknown" and answer.familiarity is not None:
            score = min(score, answer.familiarity)  # however sure the head is, somebody should look
        return label, score


def _parse(config: object) -> ElementTree.Element:
    if not isinstance(config, str) or len(config) > _MAX_CONFIG or "<!" in config.replace("<!--", ""):
        raise Refusal(
            422, "config", "The labelling configuration must be XML of at most 1 MiB, without declarations (<!)."
        )
    try:
        return ElementTree.fromstring(config)
    except (ElementTree.ParseError, ValueError) as error:
        raise Refusal(422, "config", f"The labelling configuration cannot be read: {error}.") from error


@dataclass
class Again:
    """When to try something again that has failed."""

    at: float = 0.0
    failed: int = 0

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self.at

    def later(self) -> float:
        """It has failed; the seconds until the next try."""
        seconds = min(RETRY_SECONDS * 2.0**self.failed, LONGEST_RETRY)
        self.at, self.failed = time.monotonic() + seconds, self.failed + 1
        return seconds


@dataclass
class Project:
    """A project of Label Studio, as far as a backend knows it.

    Attributes
    ----------
    number : its id there.
    uid : its id with the time at which it was made, so that no other Label Studio has the same.
    complete : whether all labels that it has are here.
    ordered : the version by which it orders its tasks.
    fetching, ordering : when to try to change that.
    """

    number: int
    uid: str
    choices: Choices
    complete: bool = False
    ordered: str = ""
    fetching: Again = field(default_factory=Again)
    ordering: Again = field(default_factory=Again)


@dataclass(frozen=True)
class Photo:
    """An image of a task: its sha256, its embedding, and its file where that has just been fetched."""

    digest: bytes
    row: Row
    file: bytes | None = None


class LabelStudio:
    """A backend: one model, or the labels so far, for the projects of one Label Studio.

    Parameters
    ----------
    repository : of the one model; its feedback folder keeps the labels.
    host : where images and labels come from.
    instant : what makes a model of the labels, where there is none yet.
    every : labels after which that is done again.
    order : whether projects are to order their tasks by uncertainty.
    """

    def __init__(
        self,
        repository: Repository,
        host: LabelStudioHost,
        *,
        instant: InstantModels | None = None,
        every: int = 1,
        order: bool = True,
    ) -> None:
        self.repository, self.host, self.instant, self.every = repository, host, instant, every
        self.order = order and host.has_token
        self.projects: dict[str, Project] = {}
        self._rows: OrderedDict[tuple[str, int | None], Photo] = OrderedDict()
        self._learnt = len(self.feedback.corrections)
        self._writing, self._fitting = asyncio.Lock(), asyncio.Lock()
        self._asking, self._answering = asyncio.Semaphore(_THREADS), asyncio.Semaphore(_REQUESTS)

    @property
    def service(self) -> Service:
        """The model that answers now."""
        return self.repository.named(None)

    @property
    def feedback(self) -> Feedback:
        """Where labels are kept."""
        found = self.service.feedback
        assert found is not None, "a backend keeps labels"
        return found

    def project(self, uid: object, config: object) -> Project:
        """The project of this id and labelling configuration.

        Raises
        ------
        Refusal
            It does not classify images, or this is not an id.
        """
        match = _PROJECT.fullmatch(uid) if isinstance(uid, str) else None
        if match is None:
            raise Refusal(422, "project", "The id of the project is not of the form that Label Studio uses.")
        choices = Choices.of(config)
        known = self.projects.get(match[0])
        if known is None or known.choices != choices:
            names = self.service.bundle.class_names
            for what, some, others in (
                ("choices that the model does not know", choices.names, names),
                ("no choice for what the model knows", names, choices.names),
            ):
                differing = [each for each in some if each not in others]
                if names and differing:
                    log.warning("project %s has %s: %s", match[1], what, ", ".join(differing[:20]))
        if known is None:
            if len(self.projects) >= MOST_PROJECTS:
                del self.projects[next(iter(self.projects))]
            known = self.projects[match[0]] = Project(int(match[1]), match[0], choices)
        known.choices = choices
        return known

    # --- suggestions ------------------------------------------------------------------------------------------------

    async def predict(self, request: Request, project: Project, tasks: Sequence[object]) -> dict[str, Any]:
        """The answer to ``/predict``: for each task a prediction, or none where its image cannot be had."""
        until = time.monotonic() + PREDICT_SECONDS
        service = self.service  # what answers is one version, whatever is switched meanwhile
        version, known = version_name(service), bool(service.bundle.class_names)
        urls = [_field(task, project.choices.field) for task in tasks]
        wanted = list(dict.fromkeys(filter(None, urls))) if known else []
        answers: dict[str, Answer | str] = {}
        async with self._answering:
            for start in range(0, len(wanted), _CHUNK):
                photos = await self._photos(request, service, wanted[start : start + _CHUNK], until)
                answers |= self._answers(service, photos)
        results: list[Any] = []
        for task, url in zip(tasks, urls, strict=True):
            answer = answers.get(url, f"it has no {project.choices.field}")
            suggested = None if isinstance(answer, str) else project.choices.suggestion(answer)
            results.append([] if suggested is None else _prediction(project.choices, *suggested, version))
            if isinstance(answer, str) and known:
                log.warning("no suggestion for task %s: %s", _mapping(task).get("id"), answer)
        return {"results": results, "model_version": version}

    def _answers(self, service: Service, photos: Mapping[str, Photo | str]) -> dict[str, Answer | str]:
        """What is said of each photo, which is remembered for a while, or why nothing is."""
        able = {url: each for url, each in photos.items() if isinstance(each, Photo)}
        given = service.answer(np.stack([each.row for each in able.values()])) if able else []
        answers = dict(zip(able, given, strict=True))
        for url, photo in able.items():
            if photo.file is not None:
                self.feedback.remember(photo.file, answers[url], service.version)
        return {url: answers[url] if isinstance(each, Photo) else each for url, each in photos.items()}

    async def _photos(
        self, request: Request | None, service: Service, urls: Sequence[str], until: float
    ) -> dict[str, Photo | str]:
        """The photo at each address, or why there is none. Without a request, nobody can go away meanwhile."""
        found: dict[str, Photo | str] = {}
        for url in urls:
            if (url, service.layer) in self._rows:
                self._rows.move_to_end((url, service.layer))
                found[url] = self._rows[url, service.layer]
        missing = [url for url in urls if url not in found]
        left = max(0.0, until - time.monotonic())
        fetched = dict(zip(missing, await asyncio.gather(*(self._fetch(url, left) for url in missing)), strict=True))
        files = {url: each for url, each in fetched.items() if isinstance(each, bytes)}
        digests = {url: hashlib.sha256(file).digest() for url, file in files.items()}
        known = {url: self.instant.row(digest) for url, digest in digests.items()} if self.instant else {}
        rows: dict[str, Row | str] = {url: row for url, row in known.items() if row is not None}
        rows |= await self._embed(request, service, {url: files[url] for url in files if url not in rows}, until)
        for url in missing:
            row = rows.get(url) if url in files else str(fetched[url])
            if isinstance(row, str) or row is None:
                found[url] = row or "it was not embedded"
                continue
            self._rows[url, service.layer] = Photo(digests[url], row)
            found[url] = Photo(digests[url], row, files[url])
        while len(self._rows) > REMEMBERED_ROWS:
            self._rows.popitem(last=False)
        return found

    async def _ask(self, question: Callable[..., T], *about: Any) -> T:
        """Ask Label Studio, in a thread that nobody waits for when the service ends: it may take minutes."""
        async with self._asking:
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[T] = loop.create_future()

            def give(found: T | None, error: Exception | None) -> None:
                if answer.done():  # nobody waits any more
                    return
                if error is None:
                    answer.set_result(cast("T", found))
                else:
                    answer.set_exception(error)

            def run() -> None:
                found, problem = None, None
                try:
                    found = question(*about)
                except Exception as error:  # noqa: BLE001 - it is for whoever asked
                    problem = error
                with contextlib.suppress(RuntimeError):  # the service has ended
                    loop.call_soon_threadsafe(give, found, problem)

            threading.Thread(target=run, name="label-studio", daemon=True).start()
            return await answer

    async def _fetch(self, url: str, seconds: float) -> bytes | str:
        try:
            async with asyncio.timeout(seconds):
                return await self._ask(self.host.image, url)
        except NotFetched as error:
            return str(error)
        except TimeoutError:
            return "it takes too long"

    async def _embed(
        self, request: Request | None, service: Service, files: Mapping[str, bytes], until: float
    ) -> dict[str, Row | str]:
        if not files:
            return {}

        while True:
            try:
                deadline = time.monotonic() + service.limits.deadline
                work = await work_on(service, list(files.items()), deadline, request)
                break
            except Refusal as refusal:
                if refusal.status != 429 or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.2)  # others' images are before these
        rows: dict[str, Row | str] = {each["id"]: each["message"] for each in work.refused}
        return rows | {name: of_layer(each, service.layer) for name, each in zip(work.names, work.found, strict=True)}

    # --- labels -----------------------------------------------------------------------------------------------------

    async def hear(self, action: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to ``/webhook``: labels that were given, changed or taken back are on the disk.

        Raises
        ------
        Refusal
            Some could not be kept. They are fetched later, where there is a token.
        """
        if action not in _ACTIONS:
            return {"ignored": action}
        about = _mapping(body.get("project"))
        project = self.project(_uid(about), about.get("label_config"))
        if action == "START_TRAINING":
            before = len(self.feedback.corrections)
            try:
                await self.catch_up(project)
            except NotFetched as error:
                raise Refusal(502, "label_studio", f"The labels of the project cannot be had: {error}.") from error
            await self._learn(0, now=True)
            return {"kept": len(self.feedback.corrections) - before, "model_version": version_name(self.service)}
        async with self._writing:
            if action == "ANNOTATIONS_DELETED":
                gone = [_number(each) for each in _list(body.get("annotations"))]
                kept = [await self._withdraw(f"{project.uid}/{number}") for number in gone]
            else:
                tasks = {_id(each.get("id")): each for each in map(_mapping, _list(body.get("task")))}
                given = [_mapping(each) for each in _list(body.get("annotation"))]
                pairs = [(each, _mapping(tasks.get(_id(each.get("task"))))) for each in given]
                kept = [await self._keep(project, *pair) for pair in pairs]
        await self._learn(sum(each is True for each in kept))
        problems = [each for each in kept if isinstance(each, str)]
        if problems:
            project.complete = False
            raise Refusal(502, "not_kept", f"Not kept: {problems[0]}.")
        return {"kept": sum(each is True for each in kept), "model_version": version_name(self.service)}

    async def _keep(
        self, project: Project, annotation: Mapping[str, Any], task: Mapping[str, Any], known: str | None = None
    ) -> bool | str:
        """Keep what an annotation says; whether that is new, or why it could not be kept."""
        source = f"{project.uid}/{_number(annotation)}"
        chosen = None if annotation.get("was_cancelled") else project.choices.label(annotation.get("result"))
        if chosen is None or chosen not in project.choices.names:
            return await self._withdraw(source)
        url = _field(task, project.choices.field)
        if known == chosen:
            return False
        photo: Photo | str = "it has no image"
        corrections = self.feedback.corrections
        try:
            if url:
                photo = (await self._photos(None, self.service, [url], time.monotonic() + PREDICT_SECONDS))[url]
            if isinstance(photo, Photo):
                image, said = await self._file(photo, url)
                if self.instant is not None:
                    self.instant.add(photo.digest, photo.row)
                kept = await asyncio.to_thread(corrections.add, image, chosen, _person(annotation), said, source)
                return kept[1]
        except (NotFetched, Refusal, StoreError, UsageError) as error:
            photo = str(error)
        log.warning("annotation %s of project %d is not kept: %s", source, project.number, photo)
        return photo

    async def _file(self, photo: Photo, url: str) -> tuple[bytes, Said | None]:
        """The file of a photo, and what was said of it."""
        service = self.service
        if photo.file is None:
            try:
                return self.feedback.answered(photo.digest.hex())
            except Refusal:  # longer ago than photos are remembered
                image = await self._ask(self.host.image, url)
                if hashlib.sha256(image).digest() != photo.digest:
                    self._rows.pop((url, service.layer), None)
                    raise NotFetched("there is another image at its address now") from None
        else:
            image = photo.file
        if not service.bundle.class_names:
            return image, None
        (answer,) = service.bundle.answer(photo.row[None])
        return image, Said(answer.label, answer.score, service.version)

    async def _withdraw(self, source: str) -> bool | str:
        try:
            return await asyncio.to_thread(self.feedback.corrections.withdraw, source) is not None
        except StoreError as error:
            return str(error)

    async def catch_up(self, project: Project) -> None:
        """Fetch the labels that a project has, and take back those that it has no more.

        Raises
        ------
        NotFetched
            They cannot be had, or not all of them kept.
        """
        corrections, beginning = self.feedback.corrections, f"{project.uid}/"
        before = corrections.standing(beginning)
        tasks = await self._ask(self.host.annotated, project.number)
        kept: list[bool | str] = []
        async with self._writing:
            now = corrections.standing(beginning)
            seen = set()
            for task in tasks:
                for each in map(_mapping, _list(task.get("annotations"))):
                    source = f"{beginning}{_number(each)}"
                    seen.add(source)
                    known = now.get(source)
                    if known == before.get(source):  # else Label Studio has told of it since, and knows better
                        kept.append(await self._keep(project, each, task, None if known is None else known.label))
            gone = [source for source in before if source not in seen and now.get(source) == before[source]]
            kept += [await self._withdraw(source) for source in gone]
        count, problems = sum(each is True for each in kept), [each for each in kept if isinstance(each, str)]
        project.complete = not problems or project.fetching.failed >= _TRIES
        if count:
            log.info("project %d: %s fetched", project.number, plural(count, "label"))
        await self._learn(count)
        if problems:
            raise NotFetched(f"{plural(len(problems), 'label')} could not be kept, one since {problems[0]}")

    async def _learn(self, new: int, *, now: bool = False) -> None:
        """Fit again, if enough labels have come."""
        refitter = self.feedback.refitter
        if refitter is not None:
            for _ in range(new):
                refitter.added()
            if now:
                refitter.begin()
        if self.instant is None:
            return
        async with self._fitting:
            count = len(self.feedback.corrections)
            if now or count - self._learnt >= self.every or (new and not self.service.bundle.class_names):
                self._learnt = count
                bundle = await asyncio.to_thread(self.instant.model, vote(self.feedback.corrections.latest))
                if bundle.sha256 != self.service.bundle.sha256:
                    self.repository.switch(self.service.name, bundle)
                    log.info("by %s, version %s answers", plural(count, "record"), self.service.version)

    # --- what projects lack -----------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Fetch labels that did not arrive, and have projects order tasks by the current version, while this runs."""
        while self.host.has_token:
            await asyncio.sleep(FOLLOW_SECONDS)
            for project in list(self.projects.values()):
                if not project.complete and project.fetching.due and not self.repository.stopping:
                    await self._try(project, project.fetching, self.catch_up)
                wanted = version_name(self.service) if self.order and self.service.bundle.class_names else ""
                if wanted not in ("", project.ordered) and project.ordering.due and not self.repository.stopping:
                    await self._try(project, project.ordering, self._order)

    async def _try(self, project: Project, again: Again, task: Callable[[Project], Awaitable[None]]) -> None:
        try:
            await task(project)
            again.failed = 0
        except (NotFetched, Refusal) as error:
            log.warning("project %d: %s; again in %g s", project.number, error, again.later())

    async def _order(self, project: Project) -> None:
        version = version_name(self.service)
        if await self._ask(self.host.order, project.number, version, VERSION):
            project.ordered = version
            log.info("project %d: its tasks are ordered by version %s", project.number, version)
        else:
            project.ordering.at = time.monotonic() + 4 * FOLLOW_SECONDS  # it is just being connected


_ACTIONS = frozenset(
    {"ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED", "START_TRAINING"}
)


def version_name(service: Service) -> str:
    """What a version is called in Label Studio."""
    return f"featx-{service.version}"


def _prediction(choices: Choices, label: str, score: float, version: str) -> dict[str, Any]:
    region = {
        "from_name": choices.control, "to_name": choices.image, "type": "choices", "value": {"choices": [label]},
        "score": score,
    }  # fmt: skip
    return {"result": [region], "score": score, "model_version": version}


# --- what comes from Label Studio, or from anybody -----------------------------------------------------------------


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    """Of one or several things, a list."""
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else []


def _id(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(thing: object) -> int:
    number = _id(_mapping(thing).get("id"))
    if number is None:
        raise Refusal(422, "annotation", "An annotation has no id.")
    return number


def _field(task: object, name: str) -> str:
    """The address of a task's image, or ""."""
    found = _mapping(_mapping(task).get("data")).get(name)
    return found if isinstance(found, str) else ""


def _person(annotation: Mapping[str, Any]) -> str:
    by = annotation.get("completed_by")
    number = by.get("id") if isinstance(by, dict) else by
    return f"user {number}" if isinstance(number, int) else ""


def _uid(project: Mapping[str, Any]) -> str:
    """A project's id as ``/setup`` has it, from what a webhook tells of the project."""
    try:
        made = int(datetime.fromisoformat(str(project.get("created_at"))).timestamp())
    except (ValueError, OverflowError):
        return ""
    return f"{project.get('id')}.{made}"


async def _body(request: Request, seconds: float) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "content_type", "Label Studio sends application/json.")
    try:
        async with arriving(seconds):
            body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "json", "The body is not JSON.") from error
    if not isinstance(body, dict):
        raise Refusal(422, "request", "The body is not a JSON object.")
    return body


def add_label_studio(app: FastAPI, backend: LabelStudio, keyed: list[Any], *, trusted: bool) -> None:
    """Add the routes of the protocol.

    Parameters
    ----------
    trusted : whether a key shows who asks; without one, pages of other sites are refused.
    """
    refused = schema.errors(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)

    async def asked(request: Request) -> dict[str, Any]:
        if not trusted:
            check_origin(request)
        problem = backend.service.problem()
        if problem:
            raise Refusal(503, "not_ready", f"Not able to answer: {problem}.", {"Retry-After": "5"})
        return await _body(request, backend.service.limits.deadline)

    @app.get("/health", responses=refused, dependencies=keyed)
    async def health() -> Response:
        """Whether requests will be answered."""
        problem = backend.repository.problem()
        body = {"status": "DOWN" if problem else "UP", "model_class": "featx", "reason": problem}
        return JSONResponse(body, 503 if problem else 200)

    @app.post("/setup", responses=refused, dependencies=keyed)
    async def setup(request: Request) -> Response:
        """Take note of a project, and name the version that answers."""
        body = await asked(request)
        backend.project(body.get("project"), body.get("schema"))
        return JSONResponse({"model_version": version_name(backend.service)})

    @app.post("/predict", responses=refused, dependencies=keyed)
    async def predict(request: Request) -> Response:
        """A prediction for each task, or an empty list where there is none."""
        body = await asked(request)
        tasks = body.get("tasks")
        if not isinstance(tasks, list):
            raise Refusal(422, "tasks", "There are no tasks.")
        project = backend.project(body.get("project"), body.get("label_config"))
        return JSONResponse(await backend.predict(request, project, tasks))

    @app.post("/webhook", responses=refused, dependencies=keyed)
    async def webhook(request: Request) -> Response:
        """Keep what annotations say; it is on the disk when this is answered."""
        body = await asked(request)
        return JSONResponse(await backend.hear(whole_text(body.get("action")), body))
