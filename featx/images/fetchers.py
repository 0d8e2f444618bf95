"""Threads that fetch images ahead of the decoders, and are left behind when nobody waits for them any more.

A network may keep a thread for minutes. The executors of the standard library wait for their threads, at the end of the
program at the latest; these do not, so Ctrl-C ends a run at once.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from concurrent.futures import Future, InvalidStateError

from featx.images.decoder import unreadable
from featx.images.origin import MAX_FETCHED, Fetched, too_many_bytes

Fetching = Future[tuple[bytes, float]]
"""The bytes of an image, and the seconds that it took to get them."""


class Fetchers:
    """``count`` threads that fetch in the order of the requests."""

    def __init__(self, count: int) -> None:
        self._requests: queue.SimpleQueue[tuple[Fetched, Fetching] | None] = queue.SimpleQueue()
        self._open: set[Fetching] = set()
        self._count = count
        for _ in range(count):
            threading.Thread(target=self._work, name="featx-fetch", daemon=True).start()

    def submit(self, origin: Fetched) -> Fetching:
        """Begin to fetch, when those before it have been begun."""
        fetching: Fetching = Future()
        self._open.add(fetching)
        fetching.add_done_callback(self._open.discard)
        self._requests.put((origin, fetching))
        return fetching

    def stop(self) -> None:
        """Whoever waits gets CancelledError; what a thread is fetching just now, it throws away."""
        for fetching in tuple(self._open):
            fetching.cancel()
        for _ in range(self._count):
            self._requests.put(None)

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            origin, fetching = request
            if fetching.cancelled():
                continue
            try:
                done, error = _fetch(origin), None
            except BaseException as problem:  # noqa: BLE001 - it is for whoever waits
                done, error = (b"", 0.0), problem
            with contextlib.suppress(InvalidStateError):  # it was cancelled meanwhile
                if error is None:
                    fetching.set_result(done)
                else:
                    fetching.set_exception(error)
            del request, fetching, done  # or the bytes would stay until the next request


def _fetch(origin: Fetched) -> tuple[bytes, float]:
    started = time.perf_counter()
    try:
        data = origin.read_bytes()
    except OSError as error:
        raise unreadable(error) from error
    if len(data) > MAX_FETCHED:
        raise too_many_bytes(len(data), MAX_FETCHED)
    return data, time.perf_counter() - started
