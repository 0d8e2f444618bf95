"""Servers in processes of their own, and clients of every temper."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from conftest import TESTS, picture
from warm import Started, shared

from featx.images.pixels import encode


@dataclass
class Reply:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A server under test."""

    process: subprocess.Popen[bytes] | Started
    url: str
    log_path: Path
    ended: bool = field(default=False)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        """GET a path."""
        return self.ask(path, None, headers)

    def ask(self, path: str, data: Any, headers: Mapping[str, str] | None = None) -> Reply:
        """POST data (GET without any), whatever the status."""
        request = urllib.request.Request(self.url + path, data=data, headers=dict(headers or {}))
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                reply = Reply(answer.status, dict(answer.headers.items()), answer.read())
        except urllib.error.HTTPError as error:
            reply = Reply(error.code, dict(error.headers.items()), error.read())
            error.close()
        reply.headers = {name.lower(): value for name, value in reply.headers.items()}
        reply.seconds = time.perf_counter() - started
        return reply

    def send(self, path: str, image: bytes, **headers: str) -> Reply:
        """POST an image."""
        return self.ask(path, image, {"Content-Type": "image/png", **headers})

    def log(self) -> list[dict[str, Any]]:
        """The lines of a JSON log."""
        lines = self.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def said(self) -> str:
        """All that it wrote to stderr."""
        return self.log_path.read_text()

    def metric(self, name: str) -> float:
        """A sample of /metrics."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").body.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def memory(self) -> int:
        """Bytes of resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return 1024 * int(found[1])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop it, with its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=40)


def _started(command: list[str], out: int, err: int) -> subprocess.Popen[bytes] | Started:
    """A command of featx, or a script, in a process that is forked; whatever else in a new one."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if command[:2] == ["-m", "featx"]:
        return shared().start(command[2:], out, err, env=env)
    if command[0].endswith(".py"):
        return shared().start(command[1:], out, err, env=env, script=command[0])
    return subprocess.Popen([sys.executable, "-W", "error", *command], stdout=out, stderr=err, env=env)


@contextmanager
def start(folder: Path, *command: object) -> Iterator[Running]:
    """Run a command that prints "... at http://ADDRESS ..." or "Open http://ADDRESS ..." once it serves."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    with log.open("wb") as sink, contextlib.ExitStack() as stack:
        reading, writing = os.pipe()
        out = stack.enter_context(os.fdopen(reading))
        try:
            process = _started([*map(str, command)], writing, sink.fileno())
        finally:
            os.close(writing)
        stack.enter_context(process)
        stack.callback(process.kill)
        line = out.readline()
        found = re.search(r"(?:at|Open) (http://\S+)", line)
        assert found, f"{line}\n{log.read_text()}"
        yield Running(process, found[1], log)
    assert "Traceback" not in log.read_text() or "traceback" in log.read_text(), log.read_text()


def start_tiny(folder: Path, **settings: Any) -> AbstractContextManager[Running]:
    """The service with the engine of tiny_server.py."""
    return start(folder, TESTS / "tiny_server.py", 0, json.dumps(settings))


def start_through(folder: Path, *wrapper: str) -> AbstractContextManager[Running]:
    """The tiny service, started by another command that becomes it."""
    code = f"import os, sys; os.execvp({wrapper[0]!r}, [*{list(wrapper)!r}, sys.executable, *sys.argv[1:]])"
    return start(folder, "-c", code, TESTS / "tiny_server.py", 0, "{}")


@contextmanager
def asking(server: Running) -> Iterator[list[int]]:
    """An honest client that asks on new connections for as long as this lasts; the statuses of all answers."""
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.append(server.send("/predict", png(len(statuses))).status)

    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(ask)
        try:
            yield statuses
        finally:
            done.set()
            client.result()


def png(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture as a file."""
    return encode(np.asarray(picture(seed, size)))


def plain(colour: tuple[int, int, int]) -> bytes:
    """A file of one colour."""
    return encode(np.full((30, 30, 3), colour, dtype=np.uint8))


def form(files: list[tuple[str, bytes]], boundary: str = "bOuNdArY") -> tuple[bytes, dict[str, str]]:
    """A multipart body with its header."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n".encode() + data + b"\r\n"
        for name, data in files
    ]  # fmt: skip
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


# --- many at once -------------------------------------------------------------------------------------------------


class Connection:
    """A keep-alive connection of an asyncio client; nothing between it and the wire."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, if not done yet."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        return self._streams

    async def post(self, path: str, body: bytes, kind: str = "image/png") -> Reply:
        """One request."""
        reader, writer = await self.open()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        started = time.perf_counter()
        writer.write(head.encode() + body)
        await writer.drain()
        reply = await read_reply(reader)
        reply.seconds = time.perf_counter() - started
        if reply.headers.get("connection") == "close":
            await self.close()
        return reply

    async def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            with contextlib.suppress(ConnectionError):
                await self._streams[1].wait_closed()
            self._streams = None


async def post_once(port: int, path: str, body: bytes) -> Reply:
    """One request on a connection of its own."""
    connection = Connection(port)
    try:
        return await connection.post(path, body)
    finally:
        await connection.close()


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """Status, headers and body of an answer with a Content-Length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Reply(int(head[0].split()[1]), headers, body)
