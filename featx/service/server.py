"""Running the service: one process, one address, signals, and limits on what a connection may hold."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import uuid
from asyncio.events import TimerHandle
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from threadpoolctl import ThreadpoolController
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from featx._system import allow_descriptors, told_to_end
from featx.errors import FeatxError, UsageError
from featx.service.app import create_app
from featx.service.guard import LOOPBACK_NAMES, Guard
from featx.service.label_studio import LabelStudio
from featx.service.telemetry import Metrics, set_up_logging
from featx.service.work import Repository

HEADER_SECONDS = 10.0
"""A connection that has begun a request, or nothing at all, gets this long until its headers are complete."""

KEEP_ALIVE_SECONDS = 5
"""How long a connection may stay open between two requests."""

HEAD_BYTES = 64 * 2**10
"""Of a request line with its headers, and of the trailers after a chunked body."""

HEAD_LINES = 100
"""Headers and trailers of one request."""

CONNECTIONS = 1000
"""Open at a time; fewer where the system allows few open files."""

NOTICE_SECONDS = 1.0
"""After SIGTERM: how long the address still answers, so that whoever asks /ready learns of it."""

DRAIN_SECONDS = 24.0
"""After SIGTERM: how long requests in flight may take; with what follows, the process ends within 30 seconds."""

log = logging.getLogger("featx.service")


class ServiceLost(FeatxError):
    """The service ended by itself, for it could compute nothing any more; starting it anew may help."""

    exit_code = 1


class _HeadTooLarge(Exception):
    """Raised inside the parser, which ends with its own error then."""


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP with limits: on time, size and number of headers, and on connections.

    The parser keeps headers until they are complete, before anything can look at an API key, so they are counted as
    they come. httptools tells of a header only when the next one begins; ``_pending`` counts the bytes since it last
    told anything.

    uvicorn is pinned below its next major version for this class: it overrides callbacks of the parser.
    """

    connections_at_most = CONNECTIONS
    """At a time; the one that has waited longest without a request makes room for a new one."""

    metrics: Metrics
    """Where what is refused here is counted."""

    _timer: TimerHandle | None = None
    _waiting_since: float | None = None
    _pending = _head_bytes = _head_lines = 0
    _in_head = True
    _too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and begin to wait for its first request."""
        super().connection_made(transport)
        self._waiting_since = self.loop.time()
        self._set_timer(HEADER_SECONDS)
        if len(self.connections) > self.connections_at_most:
            self._make_room()

    def _make_room(self) -> None:
        others = (each for each in self.connections if isinstance(each, Protocol) and each is not self)
        idle = [each for each in others if each._waiting_since is not None and not each.transport.is_closing()]
        if idle:
            # Aborted, since what a client that reads nothing has not taken would keep its descriptor open.
            min(idle, key=lambda each: each._waiting_since or 0.0).transport.abort()
            return
        self._answer(503, "connections", "Too many connections; try again.", "retry-after: 1\r\n")

    def data_received(self, data: bytes) -> None:
        """Note that the client sends."""
        self._pending += len(data)
        super().data_received(data)
        if self._pending > HEAD_BYTES and not self._too_large and not self.transport.is_closing():
            self._refuse_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._unset_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_bytes = self._head_lines = 0
        self._in_head = True
        self._set_timer(HEADER_SECONDS)

    def on_url(self, url: bytes) -> None:
        """A part of its address has come."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers has come."""
        super().on_header(name, value)
        self._head_lines += 1
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Its headers have come."""
        self._unset_timer()
        self._pending, self._in_head, self._waiting_since = 0, False, None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of its body has come."""
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """It has come whole."""
        self._pending = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It has been answered."""
        super().on_response_complete()
        if not self.pipeline:
            self._waiting_since = self.loop.time()
        if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            self._cut()  # the guard waited for the rest of the body long enough

    def _count(self, size: int) -> None:
        """Count a part of the head, which the parser has told of."""
        self._pending = 0
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES or self._head_lines > HEAD_LINES:
            self._too_large = True
            raise _HeadTooLarge

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, with what all answers carry."""
        if self._too_large:
            self._refuse_head()
        else:
            self._answer(400, "http", msg)

    def _refuse_head(self) -> None:
        self._too_large = True
        before = self.cycle if self.cycle is not None and not self.cycle.response_complete else None
        if before is not None and (self._in_head or before.response_started):
            self._cut()  # an answer here would be taken for, or stand inside, that of an earlier request
            return
        self._answer(
            431, "headers", f"Request line, headers and trailers may have {HEAD_BYTES:,} bytes in {HEAD_LINES} lines."
        )

    def _answer(self, status: int, reason: str, message: str, headers: str = "") -> None:
        """Answer without an application, and close."""
        own = uuid.uuid4().hex
        self.metrics.rejected(status, reason)
        log.warning("refused a connection: %s", reason, extra={"status": status, "answered_id": own})
        body = f'{{"error": {{"reason": "{reason}", "message": "{message}"}}, "request_id": "{own}"}}'.encode()
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}"
            f"x-request-id: {own}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()

    def _set_timer(self, seconds: float) -> None:
        self._unset_timer()
        self._timer = self.loop.call_later(seconds, self._cut)

    def _unset_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which ends in steps: not ready, requests done, closed."""

    def __init__(
        self, config: uvicorn.Config, repository: Repository, guard: Guard, started: Callable[[], Any]
    ) -> None:
        super().__init__(config)
        self._repository, self._guard, self._started = repository, guard, started
        self._tasks: list[asyncio.Task[None]] = []
        self.lost = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the service in order; a second one at once. Both are how it is meant to end."""
        with told_to_end(asyncio.get_running_loop(), self._stop):
            yield

    def _stop(self) -> None:
        if self._repository.stopping:
            self.should_exit = True
            return
        self._repository.stopping = True
        log.info("stopping: requests in flight are finished, new ones are refused")
        self._tasks.append(asyncio.create_task(self._end()))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell when requests are answered, and watch whether they still can be."""
        await super().startup(sockets)
        if self.started:  # older versions of uvicorn return from a start that fails
            self._started()
            self._tasks.append(asyncio.create_task(self._watch()))

    async def _watch(self) -> None:
        """End in order when nothing will ever be answered again, so that whoever supervises it may start it anew."""
        while not (self.lost or self._repository.stopping):
            await asyncio.sleep(0.1)
            self.lost = self._repository.lost()
        if self.lost:
            log.error("ending, since nothing can be computed any more: %s", self.lost)
            self._stop()

    async def _end(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.sleep(NOTICE_SECONDS)
                while self._guard.in_flight:
                    await asyncio.sleep(0.05)
        self.should_exit = True


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
        return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
    except OSError as error:
        raise UsageError("no such address", where="--host", found=host) from error


def check_address(host: str, api_key: str, *, insecure: bool) -> None:
    """UsageError where others could reach the service without a key."""
    if not (api_key or insecure or is_loopback(host)):
        raise UsageError(
            "others could reach the service at this address",
            where="--host",
            found=host,
            hint="Set an API key (FEATX_API_KEY, or --api-key-file FILE), or use --insecure.",
        )


def serve(
    repository: Repository,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    insecure: bool = False,
    log_json: bool = False,
    started: Callable[[str], Any] = lambda url: None,
    label_studio: LabelStudio | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    repository : the models that answer.
    host, port : the address; port 0 takes a free one.
    api_key : what clients must show; needed for any address but the loopback, unless ``insecure``.
    log_json : log lines as JSON.
    started : called with the URL once requests are answered.
    label_studio : as of :func:`featx.service.app.create_app`.

    Raises
    ------
    UsageError
        The address cannot be had, or would be open to others without a key.
    ServiceLost
        The engine does not work any more. Requests in flight were answered.
    """
    check_address(host, api_key, insecure=insecure)
    local = is_loopback(host)
    listener = listen(host, port)
    set_up_logging(as_json=log_json)
    hosts = LOOPBACK_NAMES | {host} if local and not api_key and not insecure else None
    _, guard = create_app(repository, api_key=api_key, hosts=hosts, label_studio=label_studio)
    protocol = _limited_protocol(repository.metrics)
    config = uvicorn.Config(
        guard,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # As many are accepted in one go, before any is counted; those that make room are closed two steps later.
        backlog=max(1, protocol.connections_at_most // 8),
    )
    bound, number = listener.getsockname()[:2]
    url = f"http://[{bound}]:{number}" if ":" in bound else f"http://{bound}:{number}"
    server = Server(config, repository, guard, lambda: started(url))
    # Requests are what runs in parallel here: a search's threads that wait for each other would slow the engine.
    with listener, ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        asyncio.run(server.serve(sockets=[listener]))
    if server.lost:
        hint = "Start it again; its log says what happened."
        raise ServiceLost("the service ended: nothing can be computed any more", found=server.lost, hint=hint)


def _limited_protocol(metrics: Metrics) -> type[Protocol]:
    """The protocol with as many connections as leave half of the descriptors to the work; the soft limit is raised."""
    number = max(1, min(CONNECTIONS, allow_descriptors(4 * CONNECTIONS) // 2))
    return type("LimitedProtocol", (Protocol,), {"connections_at_most": number, "metrics": metrics})


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; said before any network is loaded that it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, since asyncio sets TCP_NODELAY for this protocol only; without it a second answer waits for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        hint = "Choose another with --port, or 0 for any that is free."
        raise UsageError(f"cannot listen there ({error.strerror})", where=f"{host}:{port}", hint=hint) from error
    return listener
