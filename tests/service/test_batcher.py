"""The batcher by itself: whoever waits is told."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import TINY, TinyEngine
from numpy.typing import NDArray
from servicekit import plain

from featx.images.pool import Decoded, DecoderPool, NoDecoder
from featx.service.batcher import Batcher

Seen = tuple[NDArray[np.uint8], ...]


class Light:
    """What a batcher needs of an embedder: real decoding processes, and an engine of the smallest kind."""

    def __init__(self) -> None:
        self.engine = TinyEngine(batch_size=4)

    def decoders(self, *, workers: int, **options: Any) -> DecoderPool:
        return DecoderPool(TINY, workers=workers, **options)

    def seen(self, decoded: Decoded) -> Seen:
        assert decoded.pixels is not None
        return (decoded.pixels,)

    def embed_pixels(self, images: Sequence[Seen]) -> tuple[NDArray[np.float32], ...]:
        (rows,) = next(iter(self.engine.embed([np.stack([image for (image,) in images])])))
        return (rows,)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    known_good = (np.zeros((*TINY.crop, 3), np.uint8),)
    found = Batcher(Light(), known_good, workers=2, lanes=2)  # type: ignore[arg-type]
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
