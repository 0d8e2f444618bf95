"""The batcher by itself: whoever waits is told."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import TINY, TinyEngine, picture
from imagekit import pixels
from numpy.typing import NDArray
from servicekit import plain

from featx.images.pixels import encode
from featx.images.pool import Decoded, DecoderPool, NoDecoder
from featx.service.batcher import Batcher, QueueFull

Seen = tuple[NDArray[np.uint8], ...]


class Light:
    """What a batcher needs of an embedder: real decoding processes, and an engine of the smallest kind."""

    def __init__(self) -> None:
        self.engine = TinyEngine(batch_size=4)

    def decoders(self, *, workers: int, **options: Any) -> DecoderPool:
        return DecoderPool(TINY, workers=workers, **options)

    def seen(self, decoded: Decoded) -> tuple[NDArray[np.uint8] | None, ...]:
        return (decoded.pixels,)

    def embed_pixels(self, images: Sequence[Seen]) -> tuple[NDArray[np.float32], ...]:
        (rows,) = next(iter(self.engine.embed([np.stack([image for (image,) in images])])))
        return (rows,)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    known_good = (np.zeros((*TINY.crop, 3), np.uint8),)
    found = Batcher(Light(), known_good, max_pixels=10**6, workers=2, lanes=2)  # type: ignore[arg-type]
    yield found
    found.stop()


def test_no_image_is_left_to_a_thread_that_has_no_process(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    line = batcher.line()
    batcher.start()

    def none() -> None:
        raise NoDecoder("a decoding process cannot be started")

    monkeypatch.setattr(batcher._pools[0], "prepare", none)
    for number in range(12):
        image = plain((number, 0, 0))
        (job,) = line.submit([image], time.monotonic() + 20.0)
        (row,) = job.future.result(timeout=5.0)
        assert row.shape == (8,)
    assert not batcher.problem()
    assert line.waiting == 0


@pytest.mark.slow
def test_clients_that_come_and_go_are_answered_rightly_while_decoders_are_killed(batcher: Batcher) -> None:
    lines = [batcher.line(queue_size=16), batcher.line(queue_size=32)]
    batcher.start()
    images = [encode(np.asarray(picture(number))) for number in range(12)]
    network = TinyEngine()
    expected = [next(iter(network.embed([pixels(image, TINY)[None]])))[0][0] for image in images]
    told: Counter[str] = Counter()

    def client(number: int) -> None:
        dice = random.Random(number)
        for _ in range(60):
            line, some = dice.choice(lines), [dice.randrange(-2, 12) for _ in range(dice.choice((1, 1, 2, 5)))]
            files = [images[each] if each >= 0 else b"no image" for each in some]
            try:
                jobs = line.submit(files, time.monotonic() + dice.choice((0.002, 0.05, 20.0, 20.0)))
            except QueueFull:
                told["full"] += 1
                time.sleep(0.005)
                continue
            if dice.random() < 0.2:
                time.sleep(0.01 * dice.random())
                line.drop(jobs)
            for job, each in zip(jobs, some, strict=True):
                error = job.future.exception(timeout=15.0)
                told["row" if error is None else type(error).__name__] += 1
                if error is None:
                    np.testing.assert_allclose(job.future.result()[0], expected[each], rtol=1e-6)
                    assert each >= 0
            line.drop(jobs)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        while not all(each.done() for each in clients):
            time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(batcher._pools[len(told) % 2]._children[0]._process.pid, signal.SIGKILL)
        for each in clients:
            each.result()
    assert told["row"] > 100 and told["ImageError"] > 10 and told["TimeoutError"] > 10, told
    assert sum(line.waiting for line in lines) == 0
    assert not batcher._active
    assert not batcher.refusing()
