"""The real studio in a process of its own, and a window of it without a browser."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from servicekit import Reply, Running, start


class Window:
    """What a window asks for, signed in."""

    def __init__(self, server: Running) -> None:
        self.server = server
        parts = urlsplit(server.url)
        self.token = parts.query.removeprefix("token=")
        server.url = f"{parts.scheme}://{parts.netloc}"
        self.headers = {"Cookie": f"featx-studio={self.token}"}

    def raw(self, path: str) -> Reply:
        return self.server.get(path, self.headers)

    def get(self, path: str) -> Any:
        reply = self.raw(path)
        assert reply.status == 200, reply.body
        return reply.json

    def ask(self, path: str, /, **data: Any) -> Reply:
        """What a POST of JSON is answered; ``from_`` is sent as "from", ``class_`` as "class"."""
        body = json.dumps({name.rstrip("_"): value for name, value in data.items()}).encode()
        return self.server.ask(path, body, {**self.headers, "Content-Type": "application/json"})

    def post(self, path: str, /, **data: Any) -> Any:
        reply = self.ask(path, **data)
        assert reply.status == 200, reply.body
        return reply.json

    def upload(self, path: str, image: bytes) -> Reply:
        return self.server.ask(path, image, {**self.headers, "Content-Type": "image/jpeg"})

    def wait(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Until it holds; what it gave."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.get("/api/state")
            time.sleep(0.02)
        return found

    def wait_until_embedded(self) -> None:
        embedding = self.wait(
            lambda: (found := self.get("/api/state")["embedding"])["status"] in ("done", "failed") and found
        )
        assert embedding["status"] == "done", embedding

    def label(self, names: dict[int, str]) -> None:
        """Give rows names, and wait for the suggestions that follow."""
        for row, name in names.items():
            self.post("/api/label", rows=[row], name=name, from_="key")
        seq = self.get("/api/state")["seq"]
        self.wait(lambda: self.get("/api/suggestions")["seq"] >= seq)


@contextmanager
def open_studio(folder: Path, *command: object) -> Iterator[Window]:
    """``featx studio`` with a window of it; logs go into ``folder``."""
    with start(folder, "-m", "featx", "studio", "--no-browser", *command) as server:
        yield Window(server)


@contextmanager
def listening(window: Window) -> Iterator[list[tuple[str, Any]]]:
    """The events that a window is sent meanwhile: their names and data."""
    import http.client

    found: list[tuple[str, Any]] = []
    connection = http.client.HTTPConnection("127.0.0.1", window.server.port, timeout=60)
    connection.request("GET", "/api/events", headers=window.headers)
    reply = connection.getresponse()
    assert reply.status == 200
    reply.readline()

    def read() -> None:
        name = ""
        while line := reply.readline():
            text = line.decode().strip()
            if text.startswith("event: "):
                name = text.removeprefix("event: ")
            elif text.startswith("data: "):
                found.append((name, json.loads(text.removeprefix("data: "))))
                if name == "closed":
                    return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        connection.sock.shutdown(2) if connection.sock is not None else None
        thread.join(10)
        connection.close()
