"""Kept heads over HTTP: images in, labels with probabilities, abstention and the nearest labelled images out.

:func:`create_app` puts the parts together. :mod:`featx.service.work` keeps the models and does the work of a request,
:mod:`featx.service.batcher` computes for all of them, :mod:`featx.service.guard` limits, :mod:`featx.service.evidence`
searches the store, :mod:`featx.service.telemetry` tells what happens, :mod:`featx.service.server` runs it all.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Security
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import ClientDisconnect

from featx.reports import hash_source, render_template
from featx.service import schema
from featx.service.docs import docs_page
from featx.service.feedback import add_feedback
from featx.service.guard import Guard, Refusal, answer_errors
from featx.service.inference import add_inference, paths
from featx.service.label_studio import PATHS, LabelStudio, add_label_studio
from featx.service.schema import Named
from featx.service.telemetry import Metrics
from featx.service.work import Repository, do_work, explain as explained

ROUTES = frozenset(
    {"/", "/predict", "/embed", "/search", "/feedback", "/live", "/ready", "/info", "/metrics", "/openapi.json"}
)

_WORK = schema.errors(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)
_READ = schema.errors(401, 403)

_KEYS = (
    APIKeyHeader(name="X-API-Key", auto_error=False, description="The key that the service was started with."),
    HTTPBearer(auto_error=False, description="The same key as a bearer token."),
)


def create_app(
    repository: Repository,
    *,
    api_key: str = "",
    hosts: frozenset[str] | None = None,
    label_studio: LabelStudio | None = None,
) -> tuple[FastAPI, Guard]:
    """The application, and the guard around it, which is what a server runs.

    Parameters
    ----------
    repository : the models that answer.
    api_key, hosts : as of :class:`featx.service.guard.Guard`.
    label_studio : answers instead of the routes for everybody, if there is one.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await asyncio.to_thread(repository.start)
            following = [asyncio.create_task(repository.follow())]
            if label_studio is not None:
                following.append(asyncio.create_task(label_studio.follow()))
            yield
            for each in following:
                each.cancel()
        finally:
            await asyncio.to_thread(repository.stop)

    app = FastAPI(
        title="featx", version=version("featx"), lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        description="A classifier on frozen CNN features. Send an image as it is, or several in a form.",
    )  # fmt: skip
    _add_errors(app, repository.metrics)
    # For the OpenAPI document only: the guard checks the key before there is a route.
    keyed: list[Any] = [Security(scheme) for scheme in _KEYS] if api_key else []
    if label_studio is None:
        _add_work(app, repository, keyed)
        add_feedback(app, repository, keyed, trusted=bool(api_key))
        _add_page(app, repository, keyed)
        add_inference(app, repository, keyed)
    else:
        add_label_studio(app, label_studio, keyed, trusted=bool(api_key))
    _add_state(app, repository, keyed)
    guard = Guard(
        app, metrics=repository.metrics, routes=ROUTES.union(PATHS, *map(paths, repository.services)),
        limits=repository.limits, models=list(repository.services) if repository.several else (),
        api_key=api_key, hosts=hosts, basic=label_studio is not None,
    )  # fmt: skip
    return app, guard


# --- routes -------------------------------------------------------------------------------------------------------


def _add_work(app: FastAPI, repository: Repository, keyed: list[Any]) -> None:
    work_route = partial(app.post, openapi_extra=schema.image_body(), dependencies=keyed)

    @work_route("/predict", responses={200: {"model": schema.PredictReply}, **_WORK, **schema.errors(404)})
    async def predict(
        request: Request,
        model: Named = None,
        k: Annotated[int, Query(ge=0, le=100)] = 5,
        explain: bool = False,
        coverage: Annotated[float | None, Query(gt=0, lt=1)] = None,
    ) -> Response:
        """Label, probabilities and abstention; with a store, the ``k`` nearest labelled images as evidence.

        ``reason`` says why an answer abstains: the model is *unsure* of the label, or the photo is *unknown*, unlike
        those that the model was fitted on. ``familiarity`` is the share of these that look at least as strange to it.
        With ``explain`` each prediction has an ``explanation``: for the label and the runner-up, the evidence at each
        place, exact, and an ``overlay`` to lay over the upright photo; or the ``reason`` why there is none.
        ``version`` is that of the model that answers; ``answer``, where corrections are kept, is what ``/feedback``
        knows a photo by.
        With a ``coverage`` such as 0.9, ``set`` is the smallest set of labels that contains the true one this often, on
        photos like the model's; it is empty where the photo is unknown.
        """
        service = repository.named(model)
        if coverage is not None and not service.has_sets:
            raise Refusal(422, "no_sets", "This model gives no sets: it was made before featx 0.3.")
        work = await do_work(service, request, keep=explain)
        answers = service.answer(work.matrix(service.layer), coverage) if work.names else []
        predictions = [{"id": name, **each.to_json()} for name, each in zip(work.names, answers, strict=True)]
        if service.evidence is not None and k and work.names:
            near = await asyncio.to_thread(service.evidence.nearest, work.matrix(service.evidence.layer), k)
            for prediction, neighbours in zip(predictions, near, strict=True):
                prediction["neighbours"] = neighbours
        if explain and work.names:
            for prediction, explanation in zip(predictions, await explained(service, work), strict=True):
                prediction["explanation"] = explanation
        if service.feedback is not None:
            for prediction, image, answer in zip(predictions, work.files, answers, strict=True):
                prediction["answer"] = service.feedback.remember(image, answer, service.version)
        return work.reply({"predictions": predictions, "version": service.version})

    @work_route("/embed", responses={200: {"model": schema.EmbedReply}, **_WORK, **schema.errors(404)})
    async def embed(request: Request, model: Named = None) -> Response:
        """The embeddings themselves, the same as a store's."""
        service = repository.named(model)
        bundle = service.bundle
        work = await do_work(service, request)
        rows = work.matrix(service.layer).tolist() if work.names else []
        said = {
            "embeddings": [{"id": name, "embedding": row} for name, row in zip(work.names, rows, strict=True)],
            "embedding_dim": bundle.scorer.dims,
            "layer": bundle.layer,
            "fingerprint": str(bundle.provenance.get("fingerprint")),
        }
        return work.reply(said)

    @work_route("/search", responses={200: {"model": schema.SearchReply}, **_WORK, **schema.errors(404)})
    async def search(request: Request, model: Named = None, k: Annotated[int, Query(ge=1, le=1000)] = 10) -> Response:
        """The ``k`` most similar labelled images of the store, by cosine."""
        service = repository.named(model)
        if service.evidence is None:
            raise Refusal(404, "no_store", "Nothing to search: the service was started without --store.")
        work = await do_work(service, request)
        if work.names:
            near = await asyncio.to_thread(service.evidence.nearest, work.matrix(service.evidence.layer), k)
        else:
            near = []
        results = [{"query": name, "matches": each} for name, each in zip(work.names, near, strict=True)]
        return work.reply({"results": results})


def _add_page(app: FastAPI, repository: Repository, keyed: list[Any]) -> None:
    page, policy = load_page()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        headers = {"content-security-policy": policy, "cache-control": "no-cache"}
        return HTMLResponse(page, headers=headers)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        only_style = "default-src 'none'; style-src 'unsafe-inline'"
        text = docs_page(app.openapi(), str(request.base_url).rstrip("/"))
        return HTMLResponse(text, headers={"content-security-policy": only_style})

    pictures: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}

    @app.get(
        "/thumbnail/{row}",
        response_class=Response,
        responses={**pictures, **_READ, **schema.errors(404, 422)},
        dependencies=keyed,
    )
    async def thumbnail(row: int, model: Named = None) -> Response:
        """A small picture of an image of the store, by the ``row`` that neighbours carry."""
        service = repository.named(model)
        try:
            if service.evidence is None:
                raise FileNotFoundError
            found = await asyncio.to_thread(service.evidence.thumbnail, row)
        except FileNotFoundError as error:
            message = "There is no such image, or it is no longer where the store found it."
            raise Refusal(404, "no_image", message) from error
        return Response(found, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})


def _add_state(app: FastAPI, repository: Repository, keyed: list[Any]) -> None:
    @app.get("/live", responses={200: {"model": schema.Live}, **schema.errors(403)})
    async def live() -> Response:
        """The process answers."""
        return JSONResponse({"live": True})

    unable: dict[int | str, dict[str, Any]] = {
        200: {"model": schema.Ready},
        503: {"model": schema.Ready, "description": "Not able to compute now"},
    }

    @app.get("/ready", responses={**unable, **schema.errors(403, 404)})
    async def ready(model: Named = None) -> Response:
        """Requests will be answered: those for this model, or, where none is named, for each of them."""
        problem = repository.problem() if model is None else repository.named(model).problem()
        return JSONResponse({"ready": not problem, "reason": problem}, 503 if problem else 200)

    @app.get("/info", responses={**_READ, **schema.errors(404)}, dependencies=keyed)
    async def info(model: Named = None) -> Response:
        """What is served: classes, head, network, how good it was, limits.

        Where there are several models and none is named, ``models`` has all of this for each, with its ``name``.
        """
        if model is None and repository.several:
            models = [{"name": name, **each.info()} for name, each in repository.services.items()]
            return JSONResponse({"featx": version("featx"), "models": models})
        return JSONResponse(repository.named(model).info())

    exposition: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @app.get("/metrics", responses={**exposition, **_READ}, response_class=Response, dependencies=keyed)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(repository.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    def said(refusal: Refusal) -> Response:
        metrics.rejected(refusal.status, refusal.reason)
        return JSONResponse(refusal.to_json(), refusal.status, headers=refusal.headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody is there to read it; the log shows it

    answer_errors(app, said)
    app.add_exception_handler(ClientDisconnect, gone)


# --- the page -----------------------------------------------------------------------------------------------------


def load_page() -> tuple[str, str]:
    """The page, and the policy that lets a browser run this page's own script and nothing else."""
    page = render_template("service.html")
    script, style = (hash_source(*re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
