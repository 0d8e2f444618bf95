"""What the service tells about itself: log lines, one a request, and metrics for Prometheus. Never a header's value."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from featx.errors import one_line
from featx.models import N_BINS

if TYPE_CHECKING:
    from featx.models import Answer

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""Of the request that the current task answers."""

model_name: contextvars.ContextVar[str] = contextvars.ContextVar("model_name", default="")
"""Of the model that the current task's request is for, where there are several; "" where it is for none."""

MOST_LABELS = 100
"""Labels that are counted for each model; from there on the rest count as "other": each is a time series to keep."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_PLAIN = frozenset(vars(logging.makeLogRecord({})))


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with everything that was passed as ``extra``."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "request_id": request_id.get(),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN and name != "color_message"}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, request, message; details of a request behind it."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock} {record.levelname.lower()} [{request_id.get()}] {record.getMessage()}"
        extra = {name: value for name, value in vars(record).items() if name not in _PLAIN and name != "color_message"}
        text += "".join(f" {name}={value}" for name, value in extra.items())
        text = one_line(text)  # paths come from clients, who must not write lines of their own
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def set_up_logging(*, as_json: bool) -> None:
    """Send the log lines of the service and of its server to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else TextLines())
    for name in ("featx.service", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Metrics:
    """Counters of one service, in a registry of their own; of several models, each has a label.

    Parameters
    ----------
    several : whether there are several models.
    """

    def __init__(self, *, several: bool = False) -> None:
        self.several = several
        self.registry = CollectorRegistry()
        own = ("model",) if several else ()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self._requests = counter("featx_requests", "Requests by route and status", [*own, "route", "status"])
        self._seconds = histogram("featx_request_seconds", "Time to answer", [*own, "route"], buckets=_SECONDS)
        self._rejected = counter(
            "featx_rejected", "Requests that were answered with no result", [*own, "status", "reason"]
        )
        self.in_flight = gauge("featx_requests_in_flight", "Requests being answered")
        self._images = counter("featx_images", "Images by what became of them", [*own, "outcome"])
        self._answers = counter("featx_predictions", "Images by answer: answered, unsure or unknown", [*own, "answer"])
        self._labels = counter(
            "featx_labels",
            f"Images that were answered, by label; of many, {MOST_LABELS - 1} and other",
            [*own, "label"],
        )
        self._familiarity = histogram(
            "featx_familiarity", "Images by familiarity: even where they are like the model's own", own,
            buckets=[place / N_BINS for place in range(1, N_BINS + 1)],
        )  # fmt: skip
        self._batches = histogram(
            "featx_batch_images", "Images in a batch", own, buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
        )
        self._waits = histogram(
            "featx_queue_wait_seconds", "Time from the acceptance of an image to the start of its batch", own,
            buckets=_SECONDS,
        )  # fmt: skip
        self._queue = gauge("featx_queue_images", "Images that wait", own)
        self._ready = gauge("featx_ready", "1 where images can be computed", own)

    def _own(self) -> tuple[str, ...]:
        return (model_name.get(),) if self.several else ()

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered, and the time it took."""
        self._requests.labels(*self._own(), route, str(status)).inc()
        self._seconds.labels(*self._own(), route).observe(seconds)

    def rejected(self, status: int, reason: str) -> None:
        """Count a request that is refused; ``reason`` is the word that its client reads."""
        self._rejected.labels(*self._own(), str(status), reason).inc()

    def of(self, name: str, class_names: Sequence[str] = ()) -> ModelMetrics:
        """The counters of one model."""
        return ModelMetrics(self, name, class_names)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)


class ModelMetrics:
    """What is counted of one model; as of :meth:`Metrics.of`."""

    def __init__(self, metrics: Metrics, name: str, class_names: Sequence[str]) -> None:
        own = (name,) if metrics.several else ()

        def of(metric: Any) -> Any:
            return metric.labels(*own) if own else metric

        self.images = {word: metrics._images.labels(*own, word) for word in ("embedded", "refused")}
        self.answers = {word: metrics._answers.labels(*own, word) for word in ("answered", "unsure", "unknown")}
        self._batches, self._waits = of(metrics._batches), of(metrics._waits)
        self._queue, self._ready = of(metrics._queue), of(metrics._ready)
        self._familiarity = of(metrics._familiarity)
        self._labels: dict[str, Counter] = {}
        self._all_labels, self._own = metrics._labels, own
        for label in class_names:
            self._counter(label)

    def watch(self, waiting: Callable[[], int], ready: Callable[[], bool]) -> None:
        """Ask these whenever the metrics are read: how many images wait, and whether they can be computed."""
        self._queue.set_function(waiting)
        self._ready.set_function(ready)

    def answered(self, answers: Sequence[Answer]) -> None:
        """Count what images were answered with: a label, or why none."""
        for each in answers:
            self.answers[each.reason or "answered"].inc()
            if each.reason is None:
                self._counter(each.label).inc()
            if each.familiarity is not None:
                self._familiarity.observe(each.familiarity)

    def _counter(self, label: str) -> Counter:
        if label not in self._labels:
            if len(self._labels) >= MOST_LABELS - 1:
                return self._all_labels.labels(*self._own, "other")
            self._labels[label] = self._all_labels.labels(*self._own, label)
        return self._labels[label]

    def batch(self, waits: Sequence[float]) -> None:
        """Count a batch that begins, by the seconds that each of its images has waited."""
        self._batches.observe(len(waits))
        for seconds in waits:
            self._waits.observe(seconds)
