"""Lanes: each backbone of an extraction takes its own batches through its own engine, in a thread of its own.

Engines differ in their batches and in how long they take, so rows come back at different times; they are put together
again by image, in the order in which the images came.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import PIXELS
from featx.backbones import Backbone, Engine, for_views, provenance_of
from featx.images import Looks

_AHEAD = 2
"""Batches that wait for an engine, beside those that it works on."""

_STEP = 0.05
"""Seconds between two looks at what an engine has done, while the next batch waits for room."""


@dataclass(frozen=True)
class Lane:
    """One backbone of an extraction: what runs it, and how it looks at an image.

    Attributes
    ----------
    engine : takes images as ``looks`` cuts them, all views of an image at once.
    decode : of :data:`featx.images.pixels.DECODE_MODES`.
    """

    backbone: Backbone
    engine: Engine
    looks: Looks
    decode: str
    provenance: dict[str, Any]

    @classmethod
    def of(cls, backbone: Backbone, engine: Engine, views: Sequence[str], decode: str) -> Lane:
        """A lane with its provenance."""
        looks = Looks(backbone.preprocess, views)
        made = provenance_of(backbone, engine, views=looks.views, decode=decode)
        return cls(backbone, for_views(engine, len(looks.views)), looks, decode, made)


@dataclass(frozen=True)
class Embedded:
    """Images with their embeddings by the same backbones, in order.

    Attributes
    ----------
    digests : n of 32 bytes.
    embeddings : float32 (n, d) of each layer, by backbone.
    hashes : perceptual hashes, uint8 (n, 32).
    """

    digests: list[bytes]
    embeddings: dict[str, list[NDArray[np.float32]]]
    hashes: NDArray[np.uint8]


@dataclass
class _Image:
    """An image under way: the lanes that it waits for, and the rows that have come, one array a layer."""

    digest: bytes
    phash: bytes
    waiting: set[int]
    rows: dict[int, tuple[NDArray[np.float32], ...]] = field(default_factory=dict)


class Lanes:
    """Several lanes at work; a context manager, whose end stops them.

    Parameters
    ----------
    lanes : one or more.
    deliver : called, by the thread that adds images, with those whose rows have all come.
    """

    def __init__(self, lanes: Sequence[Lane], deliver: Callable[[Embedded], None]) -> None:
        self._lanes, self._deliver = lanes, deliver
        # The pixels baseline is computed at once: it is no work, and an image waits for nothing that it need not.
        self._instant = [number for number, lane in enumerate(lanes) if lane.backbone.name == PIXELS]
        self._running = {
            number: _Thread(lane.engine, f"featx-{lane.backbone.name}")
            for number, lane in enumerate(lanes)
            if number not in self._instant
        }
        self._filling: list[list[tuple[_Image, NDArray[np.uint8]]]] = [[] for _ in lanes]
        self._images: deque[_Image] = deque()

    def __enter__(self) -> Lanes:
        for each in self._running.values():
            each.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._running.values():
            each.stop()
        for each in self._running.values():
            each.join()
        if error is None:
            return
        # Kept is what is complete, even behind an image that never will be.
        for number, each in self._running.items():
            self._note(number, each.left())
        self._images = deque(image for image in self._images if not image.waiting)
        for ready in self._ready():
            self._deliver(ready)

    def add(self, digest: bytes, phash: bytes, pixels: Sequence[NDArray[np.uint8] | None]) -> None:
        """Take one image.

        Parameters
        ----------
        pixels : for each lane, or None for those that need not embed this image.
        """
        wanted = {number for number, each in enumerate(pixels) if each is not None}
        image = _Image(digest, phash, wanted)
        self._images.append(image)
        for number in sorted(wanted):
            given = pixels[number]
            assert given is not None
            if number in self._instant:
                (outputs,) = self._lanes[number].engine.embed([given[None]])
                self._take(number, iter([([image], outputs)]))
                continue
            self._filling[number].append((image, given))
            if len(self._filling[number]) == self._lanes[number].engine.batch_size:
                self._send(number)
        self._collect()

    def finish(self) -> None:
        """Wait for all that is under way."""
        for number, filling in enumerate(self._filling):
            if filling:
                self._send(number)
        for number, each in self._running.items():
            each.end()
            self._take(number, each.rest())
        if self._images:
            raise RuntimeError(f"an engine gave no embeddings of {len(self._images)} images")

    def _send(self, number: int) -> None:
        batch = self._filling[number]
        self._filling[number] = []
        images, pixels = [image for image, _ in batch], np.stack([each for _, each in batch])
        while not self._running[number].send(images, pixels):
            self._collect()
            if not self._running[number].is_alive():
                self._collect()  # its error, if it has one
                raise RuntimeError("an engine ended before the images did")

    def _collect(self) -> None:
        for number, each in self._running.items():
            self._take(number, each.done())

    def _take(self, number: int, results: Iterator[_Result]) -> None:
        try:
            self._note(number, results)
        finally:  # what came before an engine failed is kept
            for ready in self._ready():
                self._deliver(ready)

    def _note(self, number: int, results: Iterator[_Result]) -> None:
        for images, outputs in results:
            for row, image in enumerate(images):
                image.rows[number] = tuple(layer[row] for layer in outputs)
                image.waiting.discard(number)

    def _ready(self) -> list[Embedded]:
        """The first images, as far as they are complete, those in a row that have the same lanes together."""
        together: list[list[_Image]] = []
        while self._images and not self._images[0].waiting:
            image = self._images.popleft()
            if not together or together[-1][0].rows.keys() != image.rows.keys():
                together.append([])
            together[-1].append(image)
        return [self._embedded(images) for images in together]

    def _embedded(self, images: Sequence[_Image]) -> Embedded:
        embeddings = {
            self._lanes[number].backbone.name: [
                np.stack(layer) for layer in zip(*(image.rows[number] for image in images), strict=True)
            ]
            for number in sorted(images[0].rows)
        }
        hashes = np.frombuffer(b"".join(image.phash for image in images), np.uint8).reshape(len(images), -1)
        return Embedded([image.digest for image in images], embeddings, hashes)


_Result = tuple[list[_Image], Sequence[NDArray[np.float32]]]


class _Thread(threading.Thread):
    """The thread of one lane: batches in, results out, in order; an error of the engine comes out as itself."""

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._engine = engine
        self._inbox: queue.Queue[tuple[list[_Image], NDArray[np.uint8]] | None] = queue.Queue(_AHEAD)
        self._outbox: queue.SimpleQueue[_Result | BaseException | None] = queue.SimpleQueue()
        self._given_up = self._over = False

    def send(self, images: list[_Image], pixels: NDArray[np.uint8]) -> bool:
        """Whether there was room for the batch within a moment."""
        try:
            self._inbox.put((images, pixels), timeout=_STEP)
        except queue.Full:
            return False
        return True

    def end(self) -> None:
        """No more batches will come."""
        while True:
            with contextlib.suppress(queue.Full):
                self._inbox.put(None, timeout=_STEP)
                return
            if not self.is_alive():
                return

    def stop(self) -> None:
        """Give up what waits."""
        self._given_up = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait(None)

    def done(self) -> Iterator[_Result]:
        """The results that have come, without waiting."""
        with contextlib.suppress(queue.Empty):
            yield from self._results(wait=False)

    def rest(self) -> Iterator[_Result]:
        """All further results, to the last."""
        yield from self._results(wait=True)

    def _results(self, *, wait: bool) -> Iterator[_Result]:
        while not self._over:
            result = self._outbox.get(block=wait)
            if result is None:
                self._over = True  # remembered: nothing comes after it, and nobody may wait for it again
            else:
                yield _sound(result)

    def left(self) -> Iterator[_Result]:
        """The results that have come and were not asked for, of a thread that has ended."""
        while not self._outbox.empty():
            result = self._outbox.get()
            if isinstance(result, tuple):
                yield result

    def run(self) -> None:
        under_way: deque[list[_Image]] = deque()

        def batches() -> Iterator[NDArray[np.uint8]]:
            while (item := self._inbox.get()) is not None and not self._given_up:
                under_way.append(item[0])
                yield item[1]

        try:
            for outputs in self._engine.embed(batches()):
                self._outbox.put((under_way.popleft(), outputs))
        except BaseException as error:  # noqa: BLE001 (it is raised again, in the thread that asks for results)
            self._outbox.put(error)
        self._outbox.put(None)


def _sound(result: _Result | BaseException) -> _Result:
    if isinstance(result, BaseException):
        raise result
    return result
