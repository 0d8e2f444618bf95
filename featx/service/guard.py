"""What every request passes before the service sees it: who asks, how much is sent, and what is written down.

Plain ASGI around the application, so that its answers carry what all answers carry, whatever goes wrong inside.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from featx.service.telemetry import Metrics, model_name, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/", "/live", "/ready", "/v2/health/live", "/v2/health/ready"})
"""What needs no API key: the page holds no data, and probes hold no secrets."""

PROBES = frozenset({"/live", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready"})
"""What is answered whatever the load."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})

SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""What all answers carry."""

LINGER_SECONDS = 30.0
"""How long a body may go on arriving after its request was refused; it is thrown away. A client that writes everything
before it reads would otherwise see a broken pipe instead of the reason."""

SHORT_LINGER_SECONDS = 1.0
"""The same where the connection is to be closed."""

_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger("featx.service")


@dataclass(frozen=True)
class Limits:
    """What one client, and all of them together, may ask for.

    Parameters
    ----------
    body : bytes of a request.
    buffered : bytes of all requests' bodies at a time; several models have equal shares of it.
    pixels : of an image.
    images : of a request, and no more than the queue takes.
    queue : images that wait, for each model.
    deadline : seconds for a request, from its headers to its answer.
    """

    body: int = 10 * 2**20
    buffered: int = 256 * 2**20
    pixels: int = 50_000_000
    images: int = 64
    queue: int = 64
    deadline: float = 10.0


def whole_text(value: Any) -> str:
    """What came in JSON, as text that can be sent back: JSON may spell halves of characters, UTF-8 cannot."""
    return str(value).encode(errors="replace").decode()


class Refusal(Exception):
    """A request that is not answered with a result.

    Parameters
    ----------
    status : of HTTP.
    reason : a word for programs.
    message : a sentence for people.
    headers : to be sent along.
    """

    def __init__(self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"reason": self.reason, "message": self.message}, "request_id": request_id.get()}


class Guard:
    """ASGI middleware.

    Parameters
    ----------
    app : the application.
    metrics : where requests are counted.
    routes : paths that are counted by name; all others are "other".
    limits : sizes.
    models : names of the models, where there are several: each has a share of what may be buffered.
    api_key : what a client must show, or "" for none.
    hosts : names that may be in the header Host, or None for any. For a service without a key on the loopback
        address, this keeps web pages out that resolve their own name to it.
    basic : whether the key may also come as the password of HTTP's Basic. Browsers would send it along from any page,
        so this is for services that no browser asks.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        routes: frozenset[str],
        limits: Limits,
        models: Collection[str] = (),
        api_key: str = "",
        hosts: frozenset[str] | None = None,
        basic: bool = False,
    ) -> None:
        self.app, self.metrics, self.routes, self.limits = app, metrics, routes, limits
        self._key = api_key.encode()
        self._hosts, self._basic = hosts, basic
        self.in_flight = 0
        self._models = frozenset(models)
        self._share = limits.buffered // max(1, len(self._models))
        self._buffered: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on what is not HTTP."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        own = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()
        token = request_id.set(own.decode())
        model_token = model_name.set(self._model_of(scope))
        request = _Counted(self, receive)
        status, patience, seconds = 0, LINGER_SECONDS, 0.0

        async def stamped(message: Message) -> None:
            nonlocal status, patience, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - started
                message["headers"] = [*message.get("headers", []), (b"x-request-id", own), *SAFE_HEADERS]
                if (b"connection", b"close") in message["headers"]:
                    patience = SHORT_LINGER_SECONDS
            elif not request.complete and not message.get("more_body"):
                # The client is still sending: it must see the answer, not a connection that breaks under it.
                await send({**message, "more_body": True})
                await request.throw_away(patience)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        async def refuse(refusal: Refusal) -> None:
            if not status:
                self.metrics.rejected(refusal.status, refusal.reason)
                await answer(refusal, stamped)

        self.in_flight += 1
        self.metrics.in_flight.inc()
        try:
            self._check(scope, headers)
            await self.app(scope, request.receive, stamped)
        except Refusal as refusal:
            await refuse(refusal)
        except Exception:  # outermost: the traceback is logged, and the client is told under which id
            log.exception("a bug")
            await refuse(Refusal(500, "bug", "featx failed; the log has this request's id."))
        finally:
            request.free()
            self.in_flight -= 1
            self.metrics.in_flight.dec()
            self._note(scope, status, seconds or time.perf_counter() - started, request.size)
            request_id.reset(token)
            model_name.reset(model_token)

    def _model_of(self, scope: Scope) -> str:
        """The model that a request is for, or "": of several, one that its query or its path names."""
        if not self._models:
            return ""
        _, _, name = scope["path"].partition("/v2/models/")
        asked = name.partition("/")[0] or parse_qs(scope["query_string"].decode("latin-1")).get("model", [""])[-1]
        return asked if asked in self._models else ""

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        given = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"] or [""]
        if self._hosts is not None and not all(re.sub(r":\d+$", "", host) in self._hosts for host in given):
            names = ", ".join(sorted(self._hosts))
            message = f"This service answers to {names} only; give it an API key to reach it under other names."
            raise Refusal(403, "host", message)
        if self._key and scope["path"] not in OPEN_PATHS:
            shown = headers.get(b"x-api-key", b"")
            kind, _, bearer = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() == b"bearer":
                shown = bearer.strip()
            elif kind.lower() == b"basic" and self._basic:
                shown = _password(bearer)
            if not hmac.compare_digest(shown, self._key):
                message = "An API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY."
                raise Refusal(401, "api_key", message, {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.limits.body:
            raise self._too_large()
        if self._buffered[model_name.get()] > self._share and scope["path"] not in PROBES:
            raise self._too_many()

    def _too_many(self) -> Refusal:
        return Refusal(429, "busy", "Too many uploads at once; try again.", {"Retry-After": "1"})

    def _too_large(self) -> Refusal:
        return Refusal(413, "body", f"The request is larger than {self.limits.body:,} bytes.")

    def took(self, size: int) -> bool:
        """Count bytes that a request now holds (or, below 0, no longer); whether all of its model are not too many."""
        self._buffered[model_name.get()] += size
        return self._buffered[model_name.get()] <= self._share

    def _note(self, scope: Scope, status: int, seconds: float, size: int) -> None:
        path = scope["path"]
        route = path if path in self.routes else "/thumbnail" if path.startswith("/thumbnail/") else "other"
        self.metrics.request(route, status, seconds)
        # A probe every second would drown the rest.
        level = logging.DEBUG if path in PROBES else logging.INFO
        extra = {
            "method": scope["method"],
            "path": path[:200],
            "status": status,
            "ms": round(1000 * seconds, 1),
            "bytes": size,
        }
        if self._models:
            extra["model"] = model_name.get()
        log.log(level, "request" if status else "disconnected", extra=extra)


def _password(credentials: bytes) -> bytes:
    """The password in what follows ``Basic``, whoever the user is."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def answer_errors(app: FastAPI, answer: Callable[[Refusal], Response]) -> None:
    """Have an application answer refusals, FastAPI's own among them, by ``answer``."""

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            error = Refusal(422, "parameter", f"{'.'.join(map(str, first['loc']))}: {first['msg']}.")
        elif isinstance(error, HTTPException):
            reason = {404: "no_route", 405: "method"}.get(error.status_code, "request")
            error = Refusal(error.status_code, reason, f"{error.detail}.", error.headers)
        assert isinstance(error, Refusal)
        return answer(error)

    for kind in (Refusal, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, refused)


class _Counted:
    """The body of one request, which ends with a Refusal where it gets too large."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard, self._receive = guard, receive
        self.size = 0
        self._held = 0
        self.complete = False

    def free(self) -> None:
        """Hold nothing any more."""
        self._guard.took(-self._held)
        self._held = 0

    async def throw_away(self, seconds: float) -> None:
        """Receive what is left, keeping nothing, for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.complete:
                    await self._next()

    async def receive(self) -> Message:
        message = await self._next()
        size = len(message.get("body", b""))
        self.size += size
        self._held += size
        enough = self._guard.took(size)
        too_large = self.size > self._guard.limits.body
        if too_large or not enough:
            self.free()
            raise self._guard._too_large() if too_large else self._guard._too_many()
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        self.complete = not message.get("more_body")  # that the client has gone is the last that comes, too
        return message


async def answer(refusal: Refusal, send: Send) -> None:
    """Send a refusal, without an application."""
    body = json.dumps(refusal.to_json()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
