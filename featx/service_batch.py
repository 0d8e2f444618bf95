"""From single images to full batches: a bounded queue, decoding processes, and the engine's own threads.

Many requests bring an image each, and the engine wants sixteen at a time. Images wait in one queue of fixed length;
decoding processes (the same that extraction uses) take them from there; each of the engine's threads gathers what is
decoded into a batch. A batch starts when it is full, or when nothing more is about to join it. Whoever stops waiting
for an answer says so, and the work is skipped wherever it has got to.

Threads only; nothing here knows of HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featx.embed import Embedder
from featx.engines import available_cpus
from featx.errors import ImageError

Embedded = tuple[NDArray[np.float32], ...]
"""The embedding (d,) of one image, one array a layer."""

BATCH_SIZES = {"cpu": 8, "cuda": 32}
"""Smaller than for extraction: a lone request pays for a whole batch, since short ones are padded."""

DECODE_TIMEOUT = 8.0
"""Seconds for one image; the slowest honest one of 50 megapixels takes about three."""

STUCK = 30.0
"""Seconds after which a batch counts as hanging: nothing is accepted any more."""

LOST = 120.0
"""Seconds after which it will not come back either."""

_JOIN = 2.0
"""Seconds for all threads to end; after that the process ends without waiting for them."""

log = logging.getLogger("featx.service")


class QueueFull(Exception):
    """No room for more images now; ``retry_after`` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class WorkerDied(Exception):
    """The engine does not work any more, so nothing can be computed."""


class Job:
    """One image on its way; ``future`` gets its embeddings, an ImageError, or WorkerDied."""

    def __init__(self, data: bytes, deadline: float) -> None:
        self.data = data
        self.deadline = deadline
        self.future: Future[Embedded] = Future()
        self.dropped = False
        self.pixels: NDArray[np.uint8] | None = None
        self.ready_at = 0.0

    def drop(self) -> None:
        """Nobody waits for it any more."""
        self.dropped = True

    @property
    def wanted(self) -> bool:
        return not self.dropped and time.monotonic() < self.deadline

    def answer(self, found: Embedded | Exception) -> None:
        """Give the result, once; whoever cancelled the future meanwhile does not want it."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(found, Exception):
                self.future.set_exception(found)
            else:
                self.future.set_result(found)


class Batcher:
    """Embeds images for many callers at once.

    Parameters
    ----------
    embedder : what embeds them.
    known_good : pixels of an image that the engine must be able to embed: it tells a poisoned image from a dead engine.
    queue_size : images that may wait at a time.
    max_pixels : a larger image is refused by its header.
    workers : decoding processes; by default one a core.
    lanes : batches in the engine at once.
    on_batch : called with the number of images of every batch that is computed.
    """

    def __init__(
        self,
        embedder: Embedder,
        known_good: NDArray[np.uint8],
        *,
        queue_size: int = 64,
        max_pixels: int = 50_000_000,
        workers: int | None = None,
        lanes: int | None = None,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.embedder, self.known_good = embedder, known_good
        self.queue_size, self.max_pixels = queue_size, max_pixels
        self._on_batch = on_batch
        self._workers = workers or available_cpus()
        # Torch on a CPU computes one batch with all cores; OpenVINO and CUDA overlap two.
        self._lanes = lanes or (1 if (embedder.engine.name, embedder.engine.device) == ("torch", "cpu") else 2)
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._ready: deque[Job] = deque()
        self._decoding = 0
        self._running: dict[int, float] = {}
        self._batch_seconds = 0.1
        self._dead = ""
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._active: set[Job] = set()

    # --- from outside ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the processes and threads, and embed one batch, so that the first request finds all warm."""
        self._folder = tempfile.TemporaryDirectory(prefix="featx-serve-", dir=_memory_folder())
        self._pool = self.embedder.decoders(workers=self._workers, timeout=DECODE_TIMEOUT, max_pixels=self.max_pixels)
        self._pool.__enter__()
        self.embedder.embed_pixels([self.known_good])
        tasks = [(self._decode, number) for number in range(self._workers)]
        tasks += [(self._compute, number) for number in range(self._lanes)]
        for task, number in tasks:
            thread = threading.Thread(target=self._guarded, args=(task, number), daemon=True, name=task.__name__)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End everything; what still waits is answered with WorkerDied."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._pool.__exit__(None, None, None)
        until = time.monotonic() + _JOIN
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))
        self._fail_all("the service stops")
        self._folder.cleanup()

    def problem(self) -> str:
        """Why nothing can be computed, or "" when all is well."""
        if self._dead:
            return self._dead
        if self._stopping:
            return "the service stops"
        if any(not thread.is_alive() for thread in self._threads):
            return "a worker has ended"
        if self._longest() > STUCK:
            return f"a batch has been running for more than {STUCK:g} s"
        return ""

    def lost(self) -> str:
        """Why nothing will ever be computed again, or ""; whoever runs the process should end it."""
        return self.problem() if self._dead or self._longest() > LOST else ""

    def _longest(self) -> float:
        """Seconds for which the oldest batch has been running."""
        return max((time.monotonic() - since for since in list(self._running.values())), default=0.0)

    @property
    def waiting(self) -> int:
        """Images that are accepted and not yet in a batch."""
        return len(self._queue) + self._decoding + len(self._ready)

    def retry_after(self) -> int:
        """Seconds until there should be room again."""
        batches = self.waiting / self.embedder.engine.batch_size / self._lanes
        return max(1, round(batches * self._batch_seconds))

    def submit(self, images: Sequence[bytes], deadline: float) -> list[Job]:
        """Accept images, all or none.

        Parameters
        ----------
        images : bytes of image files.
        deadline : of ``time.monotonic()``; what has not begun by then is not computed.

        Raises
        ------
        QueueFull
            There is no room for all of them.
        WorkerDied
            Nothing can be computed at all.
        """
        jobs = [Job(data, deadline) for data in images]
        with self._changed:
            problem = self.problem()
            if problem:
                raise WorkerDied(problem)
            if self.waiting + len(jobs) > self.queue_size:
                raise QueueFull(self.retry_after())
            self._queue.extend(jobs)
            self._active.update(jobs)
            self._changed.notify_all()
        return jobs

    # --- threads --------------------------------------------------------------------------------------------------

    def _guarded(self, task: Callable[[int], None], number: int) -> None:
        """Run a thread; if it ends before its time, nobody may wait for it in vain."""
        try:
            task(number)
        except BaseException as error:
            if not self._stopping:
                self._dead = f"{task.__name__.strip('_')} failed: {type(error).__name__}: {error}"
                log.error(self._dead, exc_info=error)
        finally:
            if not self._stopping:
                self._dead = self._dead or f"{task.__name__.strip('_')} ended"
                self._fail_all(self._dead)

    def _fail_all(self, why: str) -> None:
        with self._changed:
            jobs = list(self._active)
            self._active.clear()
            self._queue.clear()
            self._ready.clear()
        for job in jobs:
            job.answer(WorkerDied(why))

    def _finish(self, job: Job, found: Embedded | Exception) -> None:
        with self._changed:
            self._active.discard(job)
        job.pixels, job.data = None, b""
        job.answer(found)

    def _decode(self, number: int) -> None:
        path = Path(self._folder.name) / str(number)
        while True:
            with self._changed:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                job = self._queue.popleft()
                self._decoding += 1
            refusal: Exception | None = None
            try:
                if job.wanted:
                    path.write_bytes(job.data)
                    (decoded,) = self._pool.run([path], _never, ahead=1)
                    job.pixels, refusal = decoded.pixels, decoded.refusal
            finally:
                with self._changed:
                    self._decoding -= 1
                    job.data = b""
                    if job.pixels is not None and refusal is None:
                        job.ready_at = time.monotonic()
                        self._ready.append(job)
                    self._changed.notify_all()
            if refusal is not None or job.pixels is None:
                self._finish(job, refusal or TimeoutError())

    def _gather(self) -> list[Job]:
        """The next batch: full, or all there is when nothing is about to join it."""
        size = self.embedder.engine.batch_size
        with self._changed:
            while True:
                if self._stopping:
                    return []
                while self._ready and not self._ready[0].wanted:
                    job = self._ready.popleft()
                    self._active.discard(job)
                    job.answer(TimeoutError())
                wait = self._patience() if self._ready else None
                if len(self._ready) >= size or (wait is not None and wait <= 0):
                    some = [self._ready.popleft() for _ in range(min(size, len(self._ready)))]
                    return [job for job in some if job.wanted or self._skip(job)]
                self._changed.wait(wait)

    def _skip(self, job: Job) -> bool:
        self._active.discard(job)
        job.answer(TimeoutError())
        return False

    def _patience(self) -> float:
        """Seconds for which the oldest image should wait for company."""
        if not self._running and not self._queue and not self._decoding:
            return 0.0
        # Another batch is running, or images are being decoded: half a batch's time costs nobody much.
        return self._ready[0].ready_at + self._batch_seconds / 2 - time.monotonic()

    def _compute(self, number: int) -> None:
        while not self._stopping:
            jobs = self._gather()
            if not jobs:
                continue
            started = time.monotonic()
            self._running[number] = started
            try:
                found = self._embed(jobs)
            finally:
                del self._running[number]
            took = time.monotonic() - started
            self._batch_seconds += 0.2 * (took - self._batch_seconds)
            self._on_batch(len(jobs))
            for job, result in zip(jobs, found, strict=True):
                self._finish(job, result)
            with self._changed:
                self._changed.notify_all()

    def _embed(self, jobs: Sequence[Job]) -> list[Embedded | Exception]:
        """The embeddings of a batch; where it fails, of each image by itself."""
        images = [job.pixels for job in jobs if job.pixels is not None]
        try:
            layers = self.embedder.embed_pixels(images)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises, other images must not suffer
            log.warning("a batch of %d failed (%s: %s); one by one now", len(jobs), type(error).__name__, error)
            if len(jobs) > 1:
                return [self._embed([job])[0] for job in jobs]
            self.embedder.embed_pixels([self.known_good])  # if this fails too, it is not the image: the worker dies
            return [ImageError("engine", f"the network fails on this image: {type(error).__name__}")]
        rows = [tuple(layer[row] for layer in layers) for row in range(len(jobs))]
        return [row if all(np.isfinite(part).all() for part in row) else _not_finite() for row in rows]


def _not_finite() -> ImageError:
    return ImageError("engine", "the network gives no finite numbers for this image")


def _never(digest: bytes) -> bool:
    return False


def _memory_folder() -> str | None:
    """Where a file is memory, if there is such a place."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
