"""What the service tells about itself: log lines, one a request, and metrics for Prometheus. Never a header's value."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from featx.errors import one_line

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""Of the request that the current task answers."""

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
    """Counters of one service, in a registry of their own.

    Parameters
    ----------
    waiting : images in the queue now.
    ready : whether the service can compute.
    """

    def __init__(self, waiting: Callable[[], int], ready: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "featx_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "featx_request_seconds", "Time to answer", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.images = Counter("featx_images", "Images by what became of them", ["outcome"], registry=self.registry)
        self.answers = Counter(
            "featx_predictions", "Images by answer: answered, unsure or unknown", ["answer"], registry=self.registry
        )
        self.batches = Histogram(
            "featx_batch_images",
            "Images in a batch",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self.waits = Histogram(
            "featx_queue_wait_seconds",
            "Time from the acceptance of an image to the start of its batch",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._rejected = Counter(
            "featx_rejected", "Requests that were answered with no result", ["status", "reason"], registry=self.registry
        )
        self.in_flight = Gauge("featx_requests_in_flight", "Requests being answered", registry=self.registry)
        Gauge("featx_queue_images", "Images that wait", registry=self.registry).set_function(waiting)
        Gauge("featx_ready", "1 where images can be computed", registry=self.registry).set_function(ready)

    def batch(self, waits: Sequence[float]) -> None:
        """Count a batch that begins, by the seconds that each of its images has waited."""
        self.batches.observe(len(waits))
        for seconds in waits:
            self.waits.observe(seconds)

    def rejected(self, status: int, reason: str) -> None:
        """Count a request that is refused; ``reason`` is the word that its client reads."""
        self._rejected.labels(str(status), reason).inc()

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
