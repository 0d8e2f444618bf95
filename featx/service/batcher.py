"""From single images to full batches: a bounded queue, decoding processes, and the engine's own threads.

Many requests bring an image each, and the engine wants sixteen at a time. Images wait in a line of fixed length;
decoding processes (the same that extraction uses) take them from there; each of the engine's threads gathers what is
decoded into a batch. A batch starts when it is full, or when nothing more is about to join it. Whoever stops waiting
for an answer says so, and the work is skipped, or ended, wherever it has got to.

Models that share a network share its batcher, and have a line each. Lines take turns: at the decoding processes image
by image, at the engine batch by batch. A batch is of one line, so that whoever asks for little does not wait until the
images of those who ask for much are computed beside his.

Some files are small and cost much: 34 bytes of WebP may declare fifty megapixels, and to read a header may take
seconds. What is that heavy waits for a process of its own, which stands back for all others, so that it slows nobody
but its like.

Threads only; nothing here knows of HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

import numpy as np
from numpy.typing import NDArray

from featx._system import available_cpus
from featx.errors import ImageError, in_words
from featx.extraction import Embedder, Seen
from featx.images import DecoderPool, NoDecoder, TooHeavy

Embedded = tuple[NDArray[np.float32], ...]
"""The embedding (d,) of one image, one array a layer."""

BATCH_SIZES = {"cpu": 16, "cuda": 32}
"""At most; fewer images are computed at the next power of two."""

DECODE_TIMEOUT = 8.0
"""Seconds for one image; the slowest honest one of 50 megapixels takes about three."""

STUCK = 1.5
"""Seconds after which a batch counts as hanging, unless batches are slow here: nothing is accepted any more."""

_SLOW = 5.0
"""So many times longer than usual a batch may take before it counts as hanging."""

LOST = 120.0
"""Seconds after which it will not come back either."""

HEAVY_PIXELS = 24_000_000
"""What weighs more (as of :func:`featx.images.pixels.weigh`) is decoded apart."""

_LIGHT_PIXELS, _PIXELS_A_BYTE = 4_000_000, 64
"""So is what weighs more than this and has so little in it; photos have fewer than 20 pixels a byte."""

HEAVY_QUEUE = 4
"""Heavy images that may wait; more are refused as when the queue is full."""

_RETRY = 1.0
"""Seconds between two attempts to start a decoding process, while nobody asks for one."""

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


class OutOfResources(Exception):
    """The system does not give what an image needs just now; the next one may have more luck."""


class Job:
    """One image on its way; ``future`` gets its embeddings, or an exception that says why there are none.

    With ``keep``, ``pixels`` stay what the networks saw; ``size`` is (width, height) of the upright image.
    """

    def __init__(self, line: Line, data: bytes, deadline: float, keep: bool = False) -> None:
        self.line, self.data, self.keep = line, data, keep
        self.size = (0, 0)
        self.deadline = deadline
        self.accepted_at = time.monotonic()
        self.future: Future[Embedded] = Future()
        self.dropped = False
        self.pixels: Seen | None = None
        self.ready_at = 0.0
        self.tries = 0

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for the answer."""
        return not self.dropped and time.monotonic() < self.deadline

    def answer(self, found: Embedded | Exception) -> None:
        """Give the result, once; whoever cancelled the future meanwhile does not want it."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(found, Exception):
                self.future.set_exception(found)
            else:
                self.future.set_result(found)


class Line:
    """Where the images of one model wait, and what is told of them; made by :meth:`Batcher.line`."""

    def __init__(self, batcher: Batcher, queue_size: int, on_batch: Callable[[Sequence[float]], None]) -> None:
        self.batcher, self.queue_size, self.on_batch = batcher, queue_size, on_batch
        self.queue: deque[Job] = deque()
        self.heavy: deque[Job] = deque()
        self.ready: deque[Job] = deque()

    @property
    def queues(self) -> tuple[deque[Job], ...]:
        """All that images wait in: for decoding, for decoding apart, and for a batch."""
        return self.queue, self.heavy, self.ready

    @property
    def waiting(self) -> int:
        """Images that are accepted and not yet in a batch."""
        return sum(map(len, self.queues)) + self.batcher.decoding(self)

    def retry_after(self) -> int:
        """Seconds until there should be room again."""
        return self.batcher.seconds_for(self)

    def submit(self, images: Sequence[bytes], deadline: float, *, keep: bool = False) -> list[Job]:
        """Accept images, all or none.

        Parameters
        ----------
        images : bytes of image files.
        deadline : of ``time.monotonic()``; what has not begun by then is not computed.
        keep : whether the jobs keep their pixels.

        Raises
        ------
        QueueFull
            There is no room for all of them.
        WorkerDied
            Nothing can be computed at all.
        """
        jobs = [Job(self, data, deadline, keep) for data in images]
        self.batcher.accept(self, jobs)
        return jobs

    def drop(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their places are free, and what has begun is ended."""
        self.batcher.drop(self, jobs)


class Batcher:
    """Embeds images for many callers at once.

    Parameters
    ----------
    embedder : what embeds them.
    known_good : pixels of an image that the engine must be able to embed: it tells a poisoned image from a dead engine.
    max_pixels : a larger image is refused by its header.
    workers : decoding processes beside the one for heavy images; by default one a core.
    lanes : batches in the engine at once.
    """

    def __init__(
        self,
        embedder: Embedder,
        known_good: Seen,
        *,
        max_pixels: int,
        workers: int | None = None,
        lanes: int | None = None,
    ) -> None:
        self.embedder, self.known_good = embedder, known_good
        self.max_pixels = max_pixels
        self._workers = workers or available_cpus()
        # Torch on a CPU computes one batch with all cores; OpenVINO and CUDA overlap two.
        self._lanes = lanes or (1 if (embedder.engine.name, embedder.engine.device) == ("torch", "cpu") else 2)
        # A condition for each kind of thread: waking all of them for every image costs a lone request a tenth. Threads
        # without a process have their own, for an image of which only they were told would wait for nobody.
        self._lock = threading.RLock()
        self._to_compute = threading.Condition(self._lock)
        self._to_decode = {name: threading.Condition(self._lock) for name in ("queue", "heavy")}
        self._to_try_again = threading.Condition(self._lock)
        self._lines: list[Line] = []
        self._turns = dict.fromkeys(("queue", "heavy", "ready"), 0)
        self._decoding: dict[int, Line] = {}  # by numbers of threads
        self._shortage: dict[int, str] = {}
        self._running: dict[int, tuple[Line, float]] = {}
        self._batch_seconds = 0.1
        self._dead = ""
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._active: set[Job] = set()
        self._pools: list[DecoderPool] = []
        self._stack = contextlib.ExitStack()

    # --- from outside ---------------------------------------------------------------------------------------------

    def line(self, *, queue_size: int = 64, on_batch: Callable[[Sequence[float]], None] = lambda waits: None) -> Line:
        """A line for one model's images; all are made before the start.

        Parameters
        ----------
        queue_size : images that may wait in it.
        on_batch : called for every batch that begins, with the seconds for which each of its images has waited.
        """
        self._lines.append(Line(self, queue_size, on_batch))
        return self._lines[-1]

    def start(self) -> None:
        """Start the processes and threads, and embed one batch, so that the first request finds all warm."""
        with contextlib.ExitStack() as started:
            # A pool for each thread, so that a process that cannot be started concerns one thread.
            for number in range(self._workers + 1):
                pool = self.embedder.decoders(
                    workers=1,
                    timeout=DECODE_TIMEOUT,
                    max_pixels=self.max_pixels,
                    background=number == self._workers,
                )
                self._pools.append(started.enter_context(pool))
            self._stack = started.pop_all()
        size = self.embedder.engine.batch_size
        while size:  # each size of batches is another program, which is made when it is first needed
            self.embedder.embed_pixels([self.known_good] * size)
            size //= 2
        before = time.monotonic()
        self.embedder.embed_pixels([self.known_good])
        self._batch_seconds = time.monotonic() - before
        tasks = [(self._decode, number) for number in range(self._workers + 1)]
        tasks += [(self._compute, number) for number in range(self._lanes)]
        for task, number in tasks:
            thread = threading.Thread(target=self._guarded, args=(task, number), daemon=True, name=task.__name__)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End everything; what still waits is answered with WorkerDied."""
        with self._lock:
            self._stopping = True
            for each in (self._to_compute, *self._to_decode.values(), self._to_try_again):
                each.notify_all()
        self._stack.close()
        until = time.monotonic() + _JOIN
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))
        self._fail_all("the service stops")

    def problem(self) -> str:
        """Why nothing can be computed just now, or "" when all is well."""
        return self.refusing() or self._short()

    def refusing(self) -> str:
        """Why no image is accepted, or "". A lack of resources is no reason: the next image is the next attempt."""
        if self._dead:
            return self._dead
        if self._stopping:
            return "the service stops"
        most = max(STUCK, _SLOW * self._batch_seconds)
        if self._longest() > most:
            return f"a batch has been running for more than {most:.3g} s"
        return ""

    def _short(self) -> str:
        """What all decoding processes lack (that for heavy images does not count), or ""."""
        lacking = [self._shortage.get(number, "") for number in range(self._workers)]
        return lacking[0] if all(lacking) else ""

    def lost(self) -> str:
        """Why nothing will ever be computed again, or ""; whoever runs the process should end it."""
        return self.refusing() if self._dead or self._longest() > LOST else ""

    def _longest(self) -> float:
        """Seconds for which the oldest batch has been running."""
        return max((time.monotonic() - since for _, since in list(self._running.values())), default=0.0)

    def accept(self, line: Line, jobs: Sequence[Job]) -> None:
        """Let jobs wait in their line, all or none; see :meth:`Line.submit`."""
        with self._lock:
            refusing = self.refusing()
            if refusing:
                raise WorkerDied(refusing)
            if line.waiting + len(jobs) > line.queue_size:
                raise QueueFull(self.seconds_for(line))
            line.queue.extend(jobs)
            self._active.update(jobs)
            self._to_decode["queue"].notify(len(jobs))
            self._to_try_again.notify_all()

    def drop(self, line: Line, jobs: Sequence[Job]) -> None:
        """See :meth:`Line.drop`."""
        with self._lock:
            for job in jobs:
                job.dropped = True
            if self._active.isdisjoint(jobs):  # all are answered
                return
            for queue in line.queues:
                unwanted = [job for job in queue if job.dropped]
                for job in unwanted:
                    queue.remove(job)
                    self._skip(job)
            self._to_compute.notify()

    def decoding(self, line: Line, *, heavy: bool = True) -> int:
        """Images of a line that are being decoded; without ``heavy``, those that a batch waits for."""
        return sum(each is line and (heavy or number < self._workers) for number, each in [*self._decoding.items()])

    def seconds_for(self, line: Line) -> int:
        """Seconds until there should be room in a line; all that have something waiting take turns."""
        batches = line.waiting / self.embedder.engine.batch_size / self._lanes
        busy = sum(each is line or bool(each.waiting) for each in self._lines)
        return max(1, round(busy * batches * self._batch_seconds))

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
        with self._lock:
            jobs = list(self._active)
            self._active.clear()
            for line in self._lines:
                for queue in line.queues:
                    queue.clear()
        for job in jobs:
            job.answer(WorkerDied(why))

    def _finish(self, job: Job, found: Embedded | Exception) -> None:
        with self._lock:
            self._active.discard(job)
        job.data = b""
        if not job.keep:
            job.pixels = None
        job.answer(found)

    def _decode(self, number: int) -> None:
        heavy = number == self._workers
        pool, name = self._pools[number], "heavy" if heavy else "queue"
        while not self._stopping:
            self._prepare(number, name)
            with self._lock:
                lacking = self._shortage[number]
                if lacking and not self._stopping:
                    self._to_try_again.wait(_RETRY)
                elif not self._any(name) and not self._stopping:
                    self._to_decode[name].wait()
                line = None if lacking or self._stopping else self._next(name)
                if line is None:
                    continue
                job = getattr(line, name).popleft()
                job.tries += 1
                self._decoding[number] = line
            found = self._decode_one(pool, job, heavy)
            # Another process may be able. If none is, every thread notes what it lacks, and then the image is
            # refused: so /ready never calls a service able that has just refused one.
            again = isinstance(found, OutOfResources) and not heavy and job.tries <= self._workers
            with self._lock:
                del self._decoding[number]
                if found is None:
                    job.data = b""
                    job.ready_at = time.monotonic()
                    line.ready.append(job)
                elif again:
                    line.queue.appendleft(job)
                    self._to_decode[name].notify_all()
                self._to_compute.notify()  # there is an image more, or none that it has to wait for
            if found is not None and not again and not isinstance(found, TooHeavy):
                self._finish(job, found)

    def _any(self, name: str) -> bool:
        """Whether any line has images in its queue of this name."""
        return any(getattr(line, name) for line in self._lines)

    def _next(self, name: str, able: Callable[[Line], bool] = lambda line: True) -> Line | None:
        """The line whose turn it is, of those that have images in their queue of this name and are able."""
        for step in range(len(self._lines)):
            place = (self._turns[name] + step) % len(self._lines)
            if getattr(self._lines[place], name) and able(self._lines[place]):
                self._turns[name] = place + 1
                return self._lines[place]
        return None

    def _prepare(self, number: int, name: str) -> None:
        """Have a process ready; where that fails and no other thread has one, whoever waits is told."""
        try:
            self._pools[number].prepare()
            lacking = ""
        except (NoDecoder, OSError, MemoryError) as error:
            lacking = error.what if isinstance(error, NoDecoder) else in_words(error)
            if not self._shortage.get(number):
                log.warning("short of resources: %s", lacking)
        with self._lock:
            self._shortage[number] = lacking
            jobs: list[Job] = []
            if lacking and (name == "heavy" or self._short()):
                for line in self._lines:
                    jobs += getattr(line, name)
                    getattr(line, name).clear()
        for job in jobs:
            self._finish(job, OutOfResources(lacking))

    def _decode_one(self, pool: DecoderPool, job: Job, heavy: bool) -> Exception | None:
        """Why there are no pixels, if there are none."""
        if not job.wanted:
            return TimeoutError()
        heaviest = min(HEAVY_PIXELS, max(_LIGHT_PIXELS, _PIXELS_A_BYTE * len(job.data)))
        try:
            decoded = pool.decode(job.data, wanted=lambda: job.wanted, heaviest=np.inf if heavy else heaviest)
        except TooHeavy as error:
            with self._lock:
                if len(job.line.heavy) >= HEAVY_QUEUE:
                    return QueueFull(self.seconds_for(job.line))
                job.line.heavy.append(job)
                self._to_decode["heavy"].notify()
                self._to_try_again.notify_all()
            return error
        except NoDecoder as error:
            return OutOfResources(error.what)
        except (OSError, MemoryError) as error:
            return OutOfResources(in_words(error))
        except Exception as error:  # noqa: BLE001 - a bug: the request that met it answers for it, and no other
            return error
        if self._stopping:
            return WorkerDied("the service stops")
        if decoded is None:
            return TimeoutError()
        job.pixels, job.size = self.embedder.seen(decoded), decoded.size
        return decoded.refusal

    def _gather(self) -> list[Job]:
        """The next batch, of the line whose turn it is: full, or all there is when nothing is about to join it."""
        size = self.embedder.engine.batch_size
        with self._lock:
            while True:
                if self._stopping:
                    return []
                for line in self._lines:
                    while line.ready and not line.ready[0].wanted:
                        self._skip(line.ready.popleft())
                waits = {line: self._patience(line) for line in self._lines if line.ready}
                due = {line for line, wait in waits.items() if wait <= 0 or len(line.ready) >= size}
                chosen = self._next("ready", due.__contains__)
                if chosen is not None:
                    some = [chosen.ready.popleft() for _ in range(min(size, len(chosen.ready)))]
                    if any(line.ready for line in self._lines):
                        self._to_compute.notify()  # another thread has to know how long those may wait
                    return [job for job in some if job.wanted or self._skip(job)]
                self._to_compute.wait(min(waits.values(), default=None))

    def _skip(self, job: Job) -> bool:
        self._active.discard(job)
        job.answer(TimeoutError())
        return False

    def _patience(self, line: Line) -> float:
        """Seconds for which the oldest image of a line should wait for company."""
        running = any(each is line for each, _ in list(self._running.values()))
        # A heavy image may take seconds: nobody waits for it.
        if not running and not line.queue and not self.decoding(line, heavy=False):
            return 0.0
        # Another batch is running, or images are being decoded: half a batch's time costs nobody much.
        return line.ready[0].ready_at + self._batch_seconds / 2 - time.monotonic()

    def _compute(self, number: int) -> None:
        while not self._stopping:
            jobs = self._gather()
            if not jobs:
                continue
            started, line = time.monotonic(), jobs[0].line
            line.on_batch([started - job.accepted_at for job in jobs])
            self._running[number] = line, started
            try:
                found = self._embed(jobs)
            finally:
                del self._running[number]
            took = time.monotonic() - started
            self._batch_seconds += 0.2 * (took - self._batch_seconds)
            for job, result in zip(jobs, found, strict=True):
                self._finish(job, result)

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
