"""A stand-in for Label Studio: what version 1.23.2 sends, less what featx does not read, and what it answers."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from servicekit import Reply, Running

CONFIG = (
    '<View><Image name="image" value="$image"/><Choices name="choice" toName="image" choice="single">'
    '<Choice value="ants"/><Choice value="bees"/></Choices></View>'
)
UID = "1.1795791631"
TOKEN = "0123456789abcdef"


def jwt(**claims: Any) -> str:
    """A token of three parts, which nobody has signed."""
    parts = [base64.urlsafe_b64encode(json.dumps(each).encode()).decode().rstrip("=") for each in ({}, claims)]
    return ".".join([*parts, "unsigned"])


PERSONAL = jwt(token_type="refresh", exp=8102991622)


def task(number: int, url: object) -> dict[str, Any]:
    """As in /predict and in webhooks."""
    return {"id": number, "data": {"image": url}, "meta": {}, "is_labeled": False, "overlap": 1, "project": 1}


def annotation(number: int, of: int, label: str | None, by: int = 1, **changes: Any) -> dict[str, Any]:
    """As in webhooks and in an export."""
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [label]}}
    fields = {"id": number, "result": [region] if label else [], "was_cancelled": False, "ground_truth": False}
    return {**fields, "task": of, "project": 1, "completed_by": by, "updated_by": by, **changes}


def hook(action: str, config: str = CONFIG, **payload: Any) -> dict[str, Any]:
    """The body of a webhook."""
    project = {"id": 1, "title": "tests", "label_config": config, "created_at": "2026-11-27T15:00:31.128871Z"}
    return {"action": action, **payload, "project": project}


def post(server: Running, path: str, body: Any, **headers: str) -> Reply:
    """What Label Studio asks of a backend."""
    return server.ask(path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})


def setup(server: Running, config: str = CONFIG, **headers: str) -> Reply:
    """The question before all others."""
    body = {"project": UID, "schema": config, "hostname": "http://localhost:8080", "access_token": "x"}
    return post(server, "/setup", {**body, "extra_params": None}, **headers)


def predict(server: Running, *tasks: dict[str, Any], config: str = CONFIG) -> Reply:
    """Ask for predictions."""
    params = {"login": None, "password": None, "context": None}
    return post(server, "/predict", {"tasks": tasks, "project": UID, "label_config": config, "params": params})


@dataclass
class Studio:
    """What the stand-in has, and what it was asked."""

    url: str = ""
    images: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    export: list[dict[str, Any]] = field(default_factory=list)
    backends: list[dict[str, Any]] = field(default_factory=list)
    model_version: str = ""
    tasks: list[int] = field(default_factory=list)
    retrieved: list[list[int]] = field(default_factory=list)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    slow: float = 0.0
    access: str = jwt(token_type="access", exp=8102991622)

    def paths(self) -> list[str]:
        """Of all that was asked, but for what the backend asks by itself: where it is entered, and all annotations."""
        return [path for _, path, _ in self.asked if not path.startswith(("/api/ml/", "/api/projects/1/export"))]

    def put(self, number: int, image: bytes) -> dict[str, Any]:
        """Upload an image; the task that it becomes."""
        path = f"/data/upload/1/{number:08x}-{number}.png"
        self.images[path] = image
        return task(number, path)

    def answer(self, method: str, path: str, shown: str, body: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = urlsplit(path)
        if parts.path == "/api/token/refresh/":
            accepted = body == {"refresh": PERSONAL}
            return (200, {}, json.dumps({"access": self.access}).encode()) if accepted else (401, {}, b"{}")
        if shown not in (f"Token {TOKEN}", f"Bearer {self.access}"):
            return 401, {}, b'{"detail": "Authentication credentials were not provided."}'
        if path in self.redirects:
            return 302, {"Location": self.redirects[path]}, b""
        if parts.path in self.images:
            time.sleep(self.slow)
            return 200, {"Content-Type": "image/png"}, self.images[parts.path]
        return self._api(method, parts.path, parse_qs(parts.query), body)

    def _api(
        self, method: str, path: str, query: dict[str, list[str]], body: Any
    ) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
        found: Any = None
        if path == "/api/projects/1":
            self.model_version = body["model_version"] if method == "PATCH" else self.model_version
            found = {"id": 1, "model_version": self.model_version}
        elif path == "/api/projects/1/export":
            found = self.export
        elif path == "/api/ml/":
            found = self.backends
        elif path == "/api/tasks":
            start = (int(query["page"][0]) - 1) * int(query["page_size"][0])
            page = self.tasks[start : start + int(query["page_size"][0])]
            found = {"tasks": [{"id": each} for each in page], "total": len(self.tasks)}
        elif path == "/api/dm/actions":
            self.retrieved.append(body["selectedItems"]["included"])
            found = {"processed_items": len(self.retrieved[-1])}
        return (404, {}, b"") if found is None else (200, {}, json.dumps(found).encode())


@contextmanager
def studio() -> Iterator[Studio]:
    """A stand-in that runs."""
    made = Studio()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            shown = self.headers.get("authorization") or ""
            made.asked.append((self.command, self.path, shown))
            status, headers, body = made.answer(self.command, self.path, shown, json.loads(raw) if raw else None)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            with contextlib.suppress(OSError):  # of one that was killed meanwhile
                self.end_headers()
                self.wfile.write(body)

        do_GET = do_POST = do_PATCH = _do

        def log_message(self, *_: Any) -> None:
            """Be quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def until(ready: Any, seconds: float = 20.0) -> Any:
    """What ``ready`` gives, once it gives anything."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = ready()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come")
