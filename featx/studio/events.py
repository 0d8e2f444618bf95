"""What happens, told to every window that listens (server-sent events)."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

_WAITING = 1000
"""Events that a window may be behind; one that takes none is dropped, and asks for everything when it is back."""

_PING_SECONDS = 15.0


class Events:
    """Publishes from any thread to the windows of one event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: set[asyncio.Queue[bytes | None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def publish(self, event: str, data: Any) -> None:
        """Tell all windows."""
        line = f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
        self._send(line)

    def close(self) -> None:
        """Let all windows go."""
        self._send(None)

    def _send(self, line: bytes | None) -> None:
        with self._lock:
            loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._put, line)

    def _put(self, line: bytes | None) -> None:
        for queue in list(self._windows):
            if queue.qsize() >= _WAITING:
                self._windows.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(line)

    async def listen(self) -> AsyncIterator[bytes]:
        """What one window is sent, until it goes or :meth:`close` is called."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        with self._lock:
            self._loop = asyncio.get_running_loop()
        self._windows.add(queue)
        try:
            yield b"retry: 1000\n\n"
            while True:
                try:
                    line = await asyncio.wait_for(queue.get(), _PING_SECONDS)
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                if line is None:
                    yield b"event: closed\ndata: {}\n\n"
                    return
                yield line
        finally:
            self._windows.discard(queue)
