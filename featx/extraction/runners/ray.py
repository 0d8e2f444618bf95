"""An extraction, or a sweep, on a Ray cluster. Ray's only door.

Ray schedules, watches and retries; featx has no scheduler of its own. A task is one part of an extraction
(:mod:`featx.extraction.parts`), of about as many images as a shard has rows, and may be run again at any time. All
hosts see the images and the folder of the store under the same paths, and have featx installed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from featx.errors import FeatxError, StoreBusy, UsageError, not_installed
from featx.extraction.parts import Part
from featx.extraction.run import ExtractSummary, Progress
from featx.extraction.runners.local import (
    PATIENCE,
    RESTARTS,
    Job,
    Tally,
    died,
    finish,
    pack,
    parts_to_do,
    seldom,
    stopped,
)
from featx.images import ImageSet
from featx.store import SHARD_ROWS

_REPORT_SECONDS = 1.0
_BUSY_SECONDS = 5.0
_STDERR = 2


def run_ray(
    images: ImageSet, job: Job, *, device: str = "auto", prune: bool = False, progress: Progress | None = None
) -> ExtractSummary:
    """Extract on a Ray cluster that is running, and finish.

    A task gets one GPU, where the cluster has any and ``device`` is not "cpu", else one CPU core (``workers`` of
    ``job.options`` says another number). A task whose process or host dies, or that fails with anything but an error
    of featx, is run again by Ray, at most :data:`featx.extraction.runners.local.RESTARTS` times.

    Parameters
    ----------
    images : all images of the source.
    job : how they are embedded.
    device : "auto", "cpu" or "cuda".
    prune, progress : as for :func:`featx.extraction.run.extract_features`.

    Raises
    ------
    UsageError
        Ray is not installed, no cluster is running, or it has no GPU where one was asked for.
    Interrupted
        KeyboardInterrupt came; running tasks published what they had, and the same call goes on from there.
    FeatxError
        What a part failed with; what the others have is kept.
    """
    started = time.perf_counter()
    _check_paths(images, job)
    with connected() as ray:
        _run_parts(ray, images, job, device, progress)
    return finish(images, job, started, prune=prune)


def _run_parts(ray: Any, images: ImageSet, job: Job, device: str, progress: Progress | None) -> None:
    has = ray.cluster_resources()
    if device == "cuda" and not has.get("GPU"):
        raise UsageError("the Ray cluster has no GPU", where="device", hint="Use --device cpu.")
    cores = job.options.get("workers") or 1
    on_gpu = device != "cpu" and has.get("GPU", 0) >= 1
    needs = {"num_gpus": 1, "num_cpus": cores} if on_gpu else {"num_cpus": cores}
    where = {"device": "cuda"} if on_gpu else {"device": "cpu", "threads": cores}
    slots = int(has["GPU"] if on_gpu else max(1, has.get("CPU", 1) // cores))
    left = parts_to_do(images, job, max(-(-len(images) // SHARD_ROWS), min(slots, len(images))))
    tally = Tally(len(images), left, progress)
    job = replace(job, options={**job.options, "workers": cores})
    counter = ray.remote(_Counter).options(num_cpus=0, max_restarts=-1).remote()
    task = ray.remote(_do_part).options(**needs, max_retries=RESTARTS, retry_exceptions=True)
    shared = ray.put(pack(job))
    waiting = {task.remote(shared, part, pack(cut), where, counter): part for part, cut in left.items()}
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=_REPORT_SECONDS)
            for ref in ready:
                part = waiting.pop(ref)
                outcome = _outcome(ray, ref, part, job.store)
                if isinstance(outcome, FeatxError):
                    raise outcome
                tally.update(part, len(left[part]))
            running = set(waiting.values())
            for part, done in _counts(ray, counter).items():
                if part in running:
                    tally.update(part, done)
    except KeyboardInterrupt as error:
        raise stopped(job.store, tally) from error
    finally:
        _stop(ray, list(waiting))
        ray.kill(counter)


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """The module ray, connected to the cluster that RAY_ADDRESS names, or that runs on this host.

    Ray's threads print what they notice (a worker that died, say) as long as the connection lasts: to stderr here, for
    stdout is the command's answer. A connection that was there before is used as it is, and stays.
    """
    try:
        import ray
    except ImportError as error:
        raise not_installed("Ray", "ray") from error
    if ray.is_initialized():
        yield ray
        return
    with contextlib.redirect_stdout(sys.stderr):
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                "no Ray cluster to work on", where=os.environ.get("RAY_ADDRESS"), found=str(error).partition("\n")[0],
                hint="Start one (ray start --head), or name another in RAY_ADDRESS.",
            ) from error  # fmt: skip
        finally:
            with contextlib.suppress(ValueError):  # not the main thread: Ray has not touched it
                signal.signal(signal.SIGTERM, handler)  # Ray would end the process; here it is another Ctrl-C
        try:
            yield ray
        finally:
            ray.shutdown()
            if faulthandler.is_enabled():  # in name only: Ray took its handler away together with Ray's own
                faulthandler.disable()
                faulthandler.enable(_STDERR)


@contextlib.contextmanager
def joblib_on_ray() -> Iterator[None]:
    """Let joblib run on the Ray cluster, all its cores by default."""
    with connected():
        import joblib
        import ray.util.joblib

        register: Any = ray.util.joblib.register_ray  # without annotations
        register()
        with joblib.parallel_config(backend="ray", n_jobs=-1):
            yield


def _check_paths(images: ImageSet, job: Job) -> None:
    """UsageError for a path that means something else where a task runs."""
    for path in (job.store, *(ref.path for ref in images.refs)):
        if isinstance(path, Path) and not path.is_absolute():
            raise UsageError("a relative path, which other hosts cannot know", where=path, expected="an absolute one")


class _Counter:
    """An actor that knows how many images of each part are done."""

    def __init__(self) -> None:
        self.done: dict[Part, int] = {}

    def report(self, part: Part, done: int) -> None:
        self.done[part] = done

    def counts(self) -> dict[Part, int]:
        return self.done


def _counts(ray: Any, counter: Any) -> dict[Part, int]:
    """What the tasks reported; nothing where the actor's host is lost, for it only informs."""
    try:
        counts: dict[Part, int] = ray.get(counter.counts.remote(), timeout=_REPORT_SECONDS)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return {}
    return counts


def _do_part(packed: bytes, part: Part, images: bytes, where: dict[str, Any], counter: Any) -> Any:
    """The task. An error of featx is an outcome, so that it is not tried again; all else is."""
    try:
        job, start = _job(packed, tuple(where.items()))
        (cut,) = pickle.loads(images)  # noqa: S301 - from the driver, by way of Ray, which unpickles all it moves
        return job.do(part, cut, start, seldom(functools.partial(counter.report.remote, part), _REPORT_SECONDS))
    except StoreBusy:
        time.sleep(_BUSY_SECONDS)  # an earlier attempt that Ray lost sight of may still be ending
        raise
    except FeatxError as error:
        return error


@functools.lru_cache(maxsize=1)
def _job(packed: bytes, where: tuple[tuple[str, Any], ...]) -> tuple[Job, Any]:
    """The job with what starts its engines, kept for the next task of this process."""
    (job,) = pickle.loads(packed)  # noqa: S301 - as above
    return job, job.starter(**dict(where))


def _outcome(ray: Any, ref: Any, part: Part, store: Path) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, StoreBusy):
            return cause
        lines = str(cause or error).strip().splitlines()
        return died(part, store, lines[0] if lines else type(error).__name__)


def _stop(ray: Any, tasks: list[Any]) -> None:
    """Interrupt what is running, and give it time to publish what it has."""
    for task in tasks:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(task)
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=PATIENCE)
