"""Many processes for one extraction: each does parts of it (:mod:`featx.extraction.parts`), on a device of its own.

:func:`run_local` is for one machine with several GPUs, or a CPU that one process does not fill;
:mod:`featx.extraction.runners.ray` does the same on a Ray cluster. Both only start parts, start again what died, and
finish: all that must be safe is safe without them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from featx._arrays import PIXELS
from featx._system import available_cpus
from featx.backbones import Backbone, Engine, cuda_devices, make_engine
from featx.errors import FeatxError, Interrupted, UsageError, plural
from featx.extraction.parts import Part, extract_part, finish_parts, parts_of, unfinished
from featx.extraction.run import ExtractSummary, Progress, Start, recorded_precision
from featx.images import ImageSet, start_process
from featx.store import stored_backbones

RESTARTS = 2
"""How often the process of a part is started again after it died."""

PATIENCE = 30.0
"""Seconds that processes get to publish what they have when all is stopped."""

_REPORT_SECONDS = 0.2
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """What whoever does a part has to know; it is pickled, and sent to other processes and hosts.

    Parameters
    ----------
    store : the store that the parts are for.
    total : number of images of all parts.
    load : makes the backbones, there and then: code of the user's own does not travel well.
    start : makes the engine, given the backbone and perhaps ``device=``, ``precision=`` and ``threads=``.
    precision : of the backbones that are given; the store's others keep theirs, and so do all with "auto".
    options : of :func:`featx.extraction.run.extract_features`, such as ``workers``, ``decode``, ``views`` and
    ``max_bad``.
    """

    store: Path
    total: int
    load: Callable[[], Backbone | Sequence[Backbone]]
    start: Callable[..., Engine] = make_engine
    precision: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def backbones(self) -> Backbone | Sequence[Backbone]:
        """The networks, made at the first call."""
        return self.load()

    @property
    def named(self) -> set[str]:
        """The names of the backbones that were given."""
        given = (self.backbones,) if isinstance(self.backbones, Backbone) else self.backbones
        return {each.name for each in given}

    @property
    def wanted(self) -> set[str]:
        """The names of the backbones that every image is to have: those given, the store's, and the baseline."""
        return {PIXELS, *stored_backbones(self.store), *self.named}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "backbones"}

    def starter(self, **where: Any) -> Start:
        """What makes the engine of a backbone in this process, once; ``where`` are arguments of ``start``."""
        stored, named = stored_backbones(self.store), self.named

        @cache
        def start(backbone: Backbone) -> Engine:
            asked = self.precision != "auto" and (backbone.name in named or not named)
            precision = self.precision if asked else recorded_precision(backbone, stored.get(backbone.name, {}))
            return self.start(backbone, precision=precision, **where)

        return start

    def do(self, part: Part, cut: ImageSet, start: Start, progress: Progress | None = None) -> ExtractSummary:
        """Extract one part, whose images are ``cut``."""
        return extract_part(
            cut, self.total, self.backbones, self.store, part, start, progress=progress, **dict(self.options)
        )


def seldom(tell: Callable[[int], object], seconds: float) -> Progress:
    """A progress callback that tells how many images are done, so many seconds apart at the least."""
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= seconds:
            told = time.monotonic()
            tell(done)

    return progress


def pack(*values: Any) -> bytes:
    """Pickled, for other processes; UsageError for images that cannot be sent."""
    try:
        return pickle.dumps(values)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UsageError(
            "images of this source cannot be sent to other processes", where="--runner", found=error,
            hint="Start the parts yourself: featx extract ... --part i/n",
        ) from error  # fmt: skip


def parse_devices(text: str) -> tuple[str, ...]:
    """Devices by name: "all" is every GPU; "0,1" are GPUs by their numbers; "cpu,cpu" are two processes on the CPU.

    Raises
    ------
    UsageError
        The text cannot be read, or there is no such GPU.
    """
    expected = "all, or GPU numbers such as 0,1, or cpu,cpu"
    names = tuple(name.strip() for name in text.split(","))
    if not all(name == "cpu" or (name.isascii() and name.isdigit()) for name in names) and names != ("all",):
        raise UsageError("--devices cannot be read", expected=expected, found=repr(text))
    if set(names) == {"cpu"}:
        return names
    count = cuda_devices()
    if not count:
        raise UsageError(
            "torch finds no GPU here", where="--devices", hint="For processes on the CPU: --devices cpu,cpu"
        )
    if names == ("all",):
        return tuple(map(str, range(count)))
    absent = [name for name in names if name != "cpu" and int(name) >= count]
    if absent:
        raise UsageError("no such GPU", where="--devices", expected=f"0 to {count - 1}", found=", ".join(absent))
    return names


def parts_to_do(images: ImageSet, job: Job, count: int) -> dict[Part, ImageSet]:
    """The parts that are left to do, with their images: of the cut that was begun in the store, else of ``count``."""
    cuts = sorted({part.of for part in parts_of(job.store)})
    of = cuts[0] if len(cuts) == 1 else count
    # Where none is left, one is done again: it computes nothing, but refuses other settings.
    left = unfinished(images, job.store, of, job.wanted) or [Part(number=1, of=of)]
    return {part: part.cut(images) for part in left}


class Tally:
    """How many images of all parts are done, told to ``progress(done, total)``."""

    def __init__(self, total: int, left: Mapping[Part, ImageSet], progress: Progress | None) -> None:
        self.total, self._progress = total, progress
        self._finished = total - sum(map(len, left.values()))
        self._of: dict[Part, int] = {}
        if progress is not None:
            progress(self.done, total)

    @property
    def done(self) -> int:
        """Images that are embedded so far."""
        return self._finished + sum(self._of.values())

    def update(self, part: Part, done: int) -> None:
        """``done`` images of a part are done."""
        self._of[part] = done
        if self._progress is not None:
            self._progress(self.done, self.total)


def finish(images: ImageSet, job: Job, started: float, *, prune: bool) -> ExtractSummary:
    """Put the parts together; the summary's times are those since ``started``."""
    chosen = {name: job.options[name] for name in ("max_bad", "replace_images") if name in job.options}
    summary = finish_parts(images, job.store, prune=prune, **chosen)
    seconds = time.perf_counter() - started
    return replace(summary, seconds=seconds, images_per_second=summary.embedded / seconds)


def run_local(
    images: ImageSet,
    job: Job,
    devices: Sequence[str],
    *,
    prune: bool = False,
    progress: Progress | None = None,
) -> ExtractSummary:
    """Extract with one process for each device, and finish.

    A process that dies is started again, at most :data:`RESTARTS` times for each part. Each sees one GPU only
    (``CUDA_VISIBLE_DEVICES``); those on the CPU share its cores.

    Parameters
    ----------
    images : all images of the source.
    job : how they are embedded.
    devices : names as :func:`parse_devices` gives them, one for each process.
    prune, progress : as for :func:`featx.extraction.run.extract_features`.

    Raises
    ------
    Interrupted
        KeyboardInterrupt came; the processes published what they had, and the same call goes on from there.
    FeatxError
        What a part failed with, or that its process died too often. The others are stopped, and what they have is kept.
    """
    started = time.perf_counter()
    left = parts_to_do(images, job, len(devices))
    waiting, tally = deque(left), Tally(len(images), left, progress)
    free = deque(_places(devices, job))
    deaths = dict.fromkeys(left, 0)
    with _Stage() as stage:
        try:
            while waiting or stage.busy:
                while waiting and free:
                    part = waiting.popleft()
                    stage.start(job, part, left[part], free.popleft())
                for worker in stage.look():
                    if isinstance(worker.said, int):
                        tally.update(worker.part, worker.said)
                        continue
                    stage.end(worker)
                    free.append(worker.place)
                    if isinstance(worker.said, FeatxError):
                        raise worker.said
                    if isinstance(worker.said, ExtractSummary):
                        tally.update(worker.part, len(left[worker.part]))
                        continue
                    deaths[worker.part] += 1
                    if deaths[worker.part] > RESTARTS:
                        raise died(worker.part, job.store, worker.how_it_ended())
                    waiting.appendleft(worker.part)
        except KeyboardInterrupt as error:
            raise stopped(job.store, tally) from error
    return finish(images, job, started, prune=prune)


def died(part: Part, store: Path, how: str) -> FeatxError:
    """The error for a part that cannot be brought to an end."""
    return FeatxError(
        f"part {part} was tried {RESTARTS + 1} times, and its process died each time",
        where=store,
        found=how,
        hint="What is published is kept; run the same command again to go on.",
    )


def stopped(store: Path, tally: Tally) -> Interrupted:
    """The error for an interrupt."""
    what = f"stopped after {tally.done} of {plural(tally.total, 'image')}"
    return Interrupted(what, where=store, hint="Run the same command again to go on.")


@dataclass(frozen=True)
class _Place:
    """Where a process runs: its environment, and the arguments of its engine."""

    environment: Mapping[str, str]
    engine: Mapping[str, Any]
    decoders: int


def _places(devices: Sequence[str], job: Job) -> Iterator[_Place]:
    cpus = available_cpus()
    share = max(1, cpus // len(devices))
    on_cpu = max(1, cpus // max(1, devices.count("cpu")))
    # A parent that may use some GPUs only counts them from 0, as torch does.
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    for device in devices:
        if device == "cpu":
            yield _Place({}, {"device": "cpu", "threads": on_cpu}, job.options.get("workers") or on_cpu)
        else:
            gpu = visible[int(device)] if visible else device
            yield _Place({"CUDA_VISIBLE_DEVICES": gpu}, {"device": "cuda"}, job.options.get("workers") or share)


class _Worker:
    """A process that does one part; ``said`` is the last that it said: images done, its summary, or an error."""

    def __init__(self, job: Job, part: Part, cut: ImageSet, place: _Place) -> None:
        self.part, self.place = part, place
        self.said: int | ExtractSummary | FeatxError | str | None = None
        job = replace(job, options={**job.options, "workers": place.decoders})
        packed = pack(job, part, cut, place.engine)
        try:
            self._process, self.connection = start_process(
                __name__, stdout=subprocess.DEVNULL, env={**os.environ, **place.environment}
            )
        except OSError as error:
            hint = "Try fewer of them: --devices."
            raise FeatxError(
                f"a process cannot be started ({error.strerror})", where=sys.executable, hint=hint
            ) from error
        with contextlib.suppress(OSError):  # it has ended already: that is found out by listening
            self.connection.send_bytes(packed)

    def listen(self) -> None:
        """Take what it said; None is that it has ended without a word."""
        try:
            self.said = self.connection.recv()
        except (EOFError, OSError):
            if isinstance(self.said, int):
                self.said = None

    def how_it_ended(self) -> str:
        code = self._process.wait()
        if isinstance(self.said, str):
            return self.said
        return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"

    def terminate(self) -> None:
        self._process.terminate()

    def close(self, seconds: float) -> None:
        """Wait until it has ended, or make it end."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self.connection.close()


class _Stage:
    """The processes at work; when it is left they are all gone."""

    def __init__(self) -> None:
        self.busy: list[_Worker] = []

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.busy:
            worker.terminate()
        until = time.monotonic() + PATIENCE
        try:
            for worker in self.busy:
                worker.close(max(0.0, until - time.monotonic()))
        except BaseException:  # a second Ctrl-C: no more patience
            for worker in self.busy:
                worker.close(0.0)
            raise

    def start(self, job: Job, part: Part, cut: ImageSet, place: _Place) -> None:
        self.busy.append(_Worker(job, part, cut, place))

    def look(self) -> list[_Worker]:
        """The workers that said something, or ended."""
        ready = wait([worker.connection for worker in self.busy], timeout=_LOOK_SECONDS)
        heard = [worker for worker in self.busy if worker.connection in ready]
        for worker in heard:
            worker.listen()
        return heard

    def end(self, worker: _Worker) -> None:
        self.busy.remove(worker)
        worker.close(PATIENCE)


def serve(handle: int) -> None:
    """What a process of :func:`run_local` does: one part, and then it ends."""
    connection = Connection(handle)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        job, part, cut, where = pickle.loads(connection.recv_bytes())  # noqa: S301 - from the parent, by socket pair
        threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
        connection.send(_do(connection, job, part, cut, where))
    except (KeyboardInterrupt, Interrupted, BrokenPipeError, EOFError):
        raise SystemExit(130) from None


def _do(connection: Connection, job: Job, part: Part, cut: ImageSet, where: Mapping[str, Any]) -> Any:
    def tell(done: int) -> None:
        with contextlib.suppress(OSError):  # the parent is gone: the other thread is about to say so
            connection.send(done)

    try:
        return job.do(part, cut, job.starter(**where), seldom(tell, _REPORT_SECONDS))
    except Interrupted:
        raise
    except FeatxError as error:
        return error
    except Exception as error:  # noqa: BLE001 - a device that fails may work the next time; the parent counts
        return f"{type(error).__name__}: {error}"[:2000]


def _end_with_parent(connection: Connection) -> None:
    # The parent says nothing more; that it can be read from means that the parent is gone.
    wait([connection])
    os.kill(os.getpid(), signal.SIGTERM)


def _terminated(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the second must not interrupt the first
    raise KeyboardInterrupt
