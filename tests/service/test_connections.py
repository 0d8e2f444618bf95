"""What connections may hold before anything is known of who has made them: heads, uploads, and the connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from servicekit import Running, asking, png, start_through, start_tiny

from featx.service.server import HEAD_BYTES, HEAD_LINES, HEADER_SECONDS, KEEP_ALIVE_SECONDS, listen

pytestmark = pytest.mark.slow

GET = b"GET /live HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"
FLOOD = 100 * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with start_tiny(tmp_path_factory.mktemp("service"), log_json=False) as running:
        yield running


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def send_all(server: Running, head: bytes, block: bytes) -> tuple[int, bytes]:
    """Send ``head``, then ``block`` again and again; how many bytes went out before the end, and the answer."""
    sent = 0
    with connect(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(head)
            while sent < FLOOD:
                client.sendall(block)
                sent += len(block)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := client.recv(65536):
                answer += part
    return sent, answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "block"),
    [
        (b"GET /", b"x" * 65536),
        (GET + b"X-Long: ", b"x" * 65536),
        (GET, b"a: b\r\n" * 10_000),
        (GET, b"".join(b"X-%d: %s\r\n" % (number, b"x" * 8000) for number in range(8))),
        (CHUNKED, b"a: b\r\n" * 10_000),
        (CHUNKED + b"X-Long: ", b"x" * 65536),
    ],
    ids=["url", "one header", "tiny headers", "long headers", "trailers", "one trailer"],
)
def test_a_head_without_end_is_cut_before_it_is_kept(server: Running, head: bytes, block: bytes) -> None:
    before = server.memory()
    with asking(server) as statuses:
        for _ in range(5):
            sent, _ = send_all(server, head, block)
    assert statuses and set(statuses) == {200}
    assert sent < FLOOD / 5  # what the sockets' buffers take before the connection ends
    assert server.memory() - before < 64 * 2**20
    assert server.get("/live").status == 200


@pytest.mark.parametrize(
    ("lines", "value", "status"),
    [
        (HEAD_LINES - 1, b"b", 200),
        (HEAD_LINES, b"b", 431),
        (1, b"x" * (HEAD_BYTES - 100), 200),
        (1, b"x" * HEAD_BYTES, 431),
    ],
)
def test_the_limits_of_a_head_are_exact_and_answered(server: Running, lines: int, value: bytes, status: int) -> None:
    # With the line Host, there is one line more.
    with connect(server) as client:
        client.sendall(GET + b"".join(b"X-%d: %s\r\n" % (number, value) for number in range(lines)) + b"\r\n")
        answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if status == 431:
            while part := client.recv(65536):
                answer += part
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error["reason"] == "headers"
            assert f"{HEAD_BYTES:,}" in error["message"]


@pytest.mark.slow
def test_silent_connections_make_room_for_honest_ones(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with start_tiny(tmp_path) as server, contextlib.ExitStack() as stack:
            before = server.memory()
            for number in range(1500):
                stack.enter_context(connect(server))
                if number % 250 == 0:
                    assert server.send("/predict", png(number)).status == 200
            assert server.send("/predict", png(1)).status == 200
            assert server.get("/ready").status == 200
            descriptors = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
            assert descriptors < 1100
            assert server.memory() - before < 64 * 2**20
            assert server.process.poll() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_a_hard_limit_on_descriptors_bounds_the_connections(tmp_path: Path) -> None:
    """1,024 descriptors that the service cannot raise, 1,500 silent connections, and honest requests throughout."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with start_through(tmp_path, "prlimit", "--nofile=1024:1024") as server, contextlib.ExitStack() as stack:
            limits = Path(f"/proc/{server.process.pid}/limits").read_text()
            assert re.search(r"Max open files\s+1024\s+1024", limits)
            before = server.memory()
            with asking(server) as statuses:
                for _ in range(1500):
                    stack.enter_context(connect(server))
                asked = len(statuses)
                while len(statuses) < asked + 5:
                    time.sleep(0.01)
            assert set(statuses) == {200}
            assert server.get("/ready").status == 200
            assert server.memory() - before < 64 * 2**20
            assert server.process.poll() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_connections_that_say_nothing_are_closed(server: Running) -> None:
    """Before a request or in the middle of its head after HEADER_SECONDS, between two after KEEP_ALIVE_SECONDS."""
    with connect(server) as silent, connect(server) as slow, connect(server) as kept:
        slow.sendall(GET)
        kept.sendall(GET + b"\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += kept.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        ended = {}
        for name, client in (("kept", kept), ("silent", silent), ("slow", slow)):
            client.settimeout(30)
            with contextlib.suppress(ConnectionError):
                assert client.recv(65536) == b""
            ended[name] = time.monotonic() - begun
    assert KEEP_ALIVE_SECONDS - 1 < ended["kept"] < ended["silent"]
    assert HEADER_SECONDS - 1 < ended["silent"] <= ended["slow"]


@pytest.mark.slow
def test_half_sent_uploads_are_counted_as_they_come_and_probes_answer(tmp_path: Path) -> None:
    half = 600_000
    with (
        start_tiny(tmp_path, limits={"body": 2 * half, "buffered": 4 * half}) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(connect(server)) for _ in range(20)]
        for client in clients:
            client.sendall(POST + b"Content-Length: %d\r\n\r\n" % (2 * half))
        for client in clients:  # all are let in before the first byte of a body comes
            client.sendall(b"x" * half)
        refused = 0
        for client in clients:
            client.settimeout(2)
            with contextlib.suppress(TimeoutError):
                refused += client.recv(65536).startswith(b"HTTP/1.1 429")
                if refused >= 16:
                    break
        assert refused >= 16  # four fit
        for path in ("/live", "/ready", "/metrics"):
            assert server.get(path).status == 200
        for client in clients:
            client.close()
        assert server.process.poll() is None


def test_paths_cannot_forge_lines_of_the_log(server: Running) -> None:
    assert server.get("/x%0a12:00:00%20info%20forged%1b[31m%c2%85").status == 404
    assert server.get("/after").status == 404  # an answer may be there before its line
    until = time.monotonic() + 20
    while "/after" not in server.said():
        assert time.monotonic() < until
    lines = [line for line in server.said().splitlines() if "forged" in line]
    assert len(lines) == 1
    assert "\\n12:00:00 info forged\\x1b[31m\\x85" in lines[0]


def test_answers_do_not_wait_for_acknowledgements() -> None:
    async def option() -> int:
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = writer.get_extra_info("socket")
            seen.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accepted, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                answer = await seen
                writer.close()
                await writer.wait_closed()
                return answer

    assert asyncio.run(option()) != 0
