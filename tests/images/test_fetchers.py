"""What has to be fetched: in order, bounded in memory, and left behind when a run ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
from conftest import TINY
from imagekit import pixels, png

from featx.errors import SourceError
from featx.images.origin import Fetched
from featx.images.pool import FETCH_AHEAD, DecoderPool


@dataclass
class Log:
    begun: list[int] = field(default_factory=list)
    at_once: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, eq=False)
class Slow(Fetched):
    parallel: ClassVar[int] = 5

    number: int
    log: Log

    def read_bytes(self) -> bytes:
        with self.log.lock:
            self.log.begun.append(self.number)
            self.log.at_once += 1
            self.log.most = max(self.log.most, self.log.at_once)
        time.sleep(0.01)
        with self.log.lock:
            self.log.at_once -= 1
        return png(self.number)


def test_images_come_in_order_several_at_a_time_and_not_too_far_ahead() -> None:
    log = Log()
    behind = []
    with DecoderPool(TINY, workers=2) as pool:
        stream = pool.run([Slow(number, log) for number in range(100)], lambda digest: False, ahead=1000)
        for number, decoded in enumerate(stream):
            behind.append(len(log.begun) - number)
            assert decoded.pixels is not None
            assert np.array_equal(decoded.pixels, pixels(png(number), TINY))
            assert decoded.seconds[0] >= 0.01
    assert max(behind) <= FETCH_AHEAD
    assert 2 <= log.most <= Slow.parallel
    assert np.abs(np.argsort(log.begun) - np.arange(100)).max() <= Slow.parallel


@dataclass(frozen=True)
class Never(Fetched):
    def read_bytes(self) -> bytes:
        time.sleep(1000)
        return b""


def test_a_run_that_ends_waits_for_no_network() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), DecoderPool(TINY, workers=1) as pool:
        stream = pool.run([Slow(0, Log()), Never(), Never()], lambda digest: False, ahead=2)
        next(stream)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 20


def test_nor_does_the_end_of_the_program() -> None:
    code = """
import time
from featx.images.fetchers import Fetchers
from featx.images.origin import Fetched

class Never(Fetched):
    def read_bytes(self):
        time.sleep(1000)

Fetchers(2).submit(Never())
time.sleep(0.2)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=30, check=True)


@dataclass(frozen=True)
class Failing(Fetched):
    error: Exception

    def read_bytes(self) -> bytes:
        raise self.error


def test_errors_are_of_the_image_or_of_the_source() -> None:
    with DecoderPool(TINY, workers=1) as pool:
        failing = [Failing(FileNotFoundError(2, "gone")), Failing(PermissionError(13, "no"))]
        done = list(pool.run(failing, lambda digest: False, ahead=2))
        assert [item.refusal.reason for item in done if item.refusal] == ["missing", "unreadable"]
        with pytest.raises(SourceError, match="the network is down"):
            list(pool.run([Failing(SourceError("the network is down"))], lambda digest: False, ahead=2))
        with pytest.raises(TypeError, match="must be a Path, a Part or Fetched, got str"):
            list(pool.run(["x.png"], lambda digest: False, ahead=2))  # type: ignore[list-item]
