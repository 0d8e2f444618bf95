"""What the service counts: one line an hour and model, nothing of the photos, and nothing twice after a crash."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")

from conftest import TESTS
from servicekit import form, plain, png, start_tiny
from tiny_server import tiny_bundle

import featx.service.counts
from featx._files import publish_bytes
from featx.errors import StoreError
from featx.models.bundle import Answer
from featx.models.drift import N_BINS, bins_of
from featx.service.counts import Counts, read_counts
from featx.service.telemetry import MOST_LABELS, Metrics


class Clock:
    """Seconds since 1970, as a test wants them."""

    def __init__(self, hour: float) -> None:
        self.hour = hour

    def __call__(self) -> float:
        return 3600 * self.hour


def answers(*familiarity: float, label: str = "ants") -> list[Answer]:
    return [
        Answer(label, 0.9, "probability", {}, "unknown" if each <= 0.05 else "unsure" if each > 0.9 else None, each)
        for each in familiarity
    ]


def bundle_of(letter: str) -> Any:
    return replace(tiny_bundle(), sha256=letter * 64)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_service_counts_what_it_answers_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "counts"
    with start_tiny(tmp_path, counts=str(folder)) as server:
        files = [("secret-name.png", png(1)), ("b.png", plain((0, 0, 0))), ("c.jpg", b"no image"), ("d.png", png(2))]
        body, headers = form(files)
        found = server.ask("/predict", body, headers).json["predictions"]
        data = [base64.b64encode(png(3)).decode()]
        asked = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": data}]}
        reply = server.ask("/v2/models/model/infer", json.dumps(asked).encode()).json["outputs"]
        tensors = {each["name"]: each["data"][0] for each in reply}
        server.send("/embed", png(4))
        said = [(each["label"], each["reason"], each["familiarity"]) for each in found]
        said.append((tensors["label"], tensors["reason"] or None, tensors["familiarity"]))
        metrics = server.get("/metrics").body.decode()
        by_label = Counter(label for label, reason, _ in said if reason is None)
        for label in ("ants", "bees"):
            assert server.metric(f'featx_labels_total{{label="{label}"}}') == by_label[label]
        assert server.metric('featx_familiarity_bucket{le="0.05"}') == sum(share <= 0.05 for *_, share in said)
        assert server.metric("featx_familiarity_count") == 4
        assert len(re.findall(r"^featx_familiarity_bucket", metrics, re.MULTILINE)) == N_BINS + 1
        assert server.end() == 0
    (counted,) = read_counts(folder)
    assert counted.about["class_names"] == ["ants", "bees"]
    assert (counted.about["own"], counted.about["max_unknown"]) == (40, 0.05)
    assert counted.photos.sum() == 4
    assert counted.labels.sum(axis=0).tolist() == [by_label["ants"], by_label["bees"]]
    assert counted.unknown.sum() == sum(reason == "unknown" for _, reason, _ in said) >= 1
    assert counted.familiarity.sum(axis=0).tolist() == bins_of([share for *_, share in said]).tolist()
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    for secret in (b"secret-name", b".png", b"127.0.0.1", b"localhost"):
        assert secret not in kept


@pytest.mark.slow
def test_a_kill_loses_what_was_not_written_yet_and_nothing_counts_twice(tmp_path: Path) -> None:
    folder = tmp_path / "counts"
    for times in (1, 2):
        with start_tiny(tmp_path, counts=str(folder), count_seconds=0.05) as server:
            for number in range(3):
                server.send("/predict", png(number))
            deadline = time.monotonic() + 20
            while sum(each.photos.sum() for each in read_counts(folder)) < 3 * times:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
    (counted,) = read_counts(folder)
    assert counted.photos.sum() == 6
    assert len(counted.hours) == len(set(counted.hours.tolist()))


@pytest.mark.slow
def test_a_folder_is_of_one_service(tmp_path: Path) -> None:
    folder = tmp_path / "counts"
    with start_tiny(tmp_path, counts=str(folder)) as server:
        command = [sys.executable, str(TESTS / "tiny_server.py"), "0", json.dumps({"counts": str(folder)})]
        env = {**os.environ, "PYTHONPATH": str(TESTS)}
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
        assert second.returncode == 2
        assert f"{folder}: another service keeps its counts here" in second.stderr
        assert f"process {server.process.pid}" in second.stderr
        assert server.send("/predict", png(1)).status == 200


def test_one_line_for_each_hour_and_model(tmp_path: Path) -> None:
    clock = Clock(500_000.5)
    counts = Counts(tmp_path, clock).open()
    a, b = bundle_of("a"), bundle_of("b")
    for bundle, name in ((a, "first"), (b, "second"), (a, "first")):
        counts.describe(bundle, name)
    for hour in (500_000.5, 500_000.9, 500_001.1, 500_003.0):
        clock.hour = hour
        counts.add(a, answers(0.05, 0.5, 0.95))
        counts.add(b, answers(0.3, label="bees"))
        counts.write()
    counts.stop()
    done, now = lines(tmp_path / "counts.jsonl"), lines(tmp_path / "counts-now.jsonl")
    assert [line["name"] for line in done if "name" in line] == ["first", "second"]
    assert [line["photos"] for line in done if "hour" in line] == [6, 2, 3, 1]
    assert [line["hour"] for line in now] == ["2027-01-15T11:00:00Z"] * 2
    first, second = read_counts(tmp_path)
    assert first.hours.astype(int).tolist() == [500_000, 500_001, 500_003]
    assert first.photos.tolist() == [6, 3, 3]
    assert (first.unknown.tolist(), first.unsure.tolist()) == ([2, 1, 1], [2, 1, 1])
    assert first.labels.tolist() == [[2, 0], [1, 0], [1, 0]]
    assert second.labels.tolist() == [[0, 2], [0, 1], [0, 1]]
    # The same hour goes on after a new start.
    counts = Counts(tmp_path, clock).open()
    counts.add(a, answers(0.4))
    counts.stop()
    assert read_counts(tmp_path)[0].photos.tolist() == [6, 3, 4]


def test_a_crash_between_the_two_files_counts_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(500_000.5)
    counts = Counts(tmp_path, clock).open()
    counts.describe(bundle_of("a"), "first")
    counts.add(bundle_of("a"), answers(0.5))
    counts.write()
    clock.hour += 1

    def stops(path: Path, data: bytes) -> Path:
        if path.name == "counts-now.jsonl":
            raise StoreError("the disk is full", where=path.parent)
        return publish_bytes(path, data)

    monkeypatch.setattr(featx.service.counts, "publish_bytes", stops)
    with pytest.raises(StoreError, match="full"):
        counts.write()
    assert (lines(tmp_path / "counts-now.jsonl")[0]["hour"]) == (lines(tmp_path / "counts.jsonl")[-1]["hour"])
    assert read_counts(tmp_path)[0].photos.tolist() == [1]
    counts._held.close()  # as a crash would
    monkeypatch.undo()
    again = Counts(tmp_path, clock).open()
    again.add(bundle_of("a"), answers(0.5, 0.5))
    again.stop()
    assert read_counts(tmp_path)[0].photos.tolist() == [1, 2]


def test_a_full_disk_stops_no_answer_and_loses_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counts = Counts(tmp_path, Clock(500_000.5)).open()
    counts.describe(bundle_of("a"), "first")

    def full(path: Path, data: bytes) -> Path:
        raise StoreError("the disk is full", where=path.parent)

    logger = logging.getLogger("featx.service")
    monkeypatch.setattr(logger, "propagate", True)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="featx.service"):
        patch.setattr(featx.service.counts, "publish_bytes", full)
        for _ in range(3):
            counts.add(bundle_of("a"), answers(0.5))
            counts._try()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "cannot write what was counted, and will try again"
    ]
    counts.stop()
    assert read_counts(tmp_path)[0].photos.tolist() == [3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"photos": 7}, "counts do not add up"),
        ({"unknown": -1}, "a count is not a whole number"),
        ({"familiarity": [1]}, "counts do not add up"),
        ({"labels": None}, "has no attribute"),
        ({"hour": "yesterday"}, "Invalid isoformat string"),
        ({"hour": "2026-11-01T00:00:00"}, "hour has no time zone"),
        ({"model": None}, "model is not text"),
        ({"photos": 0, "labels": {}, "familiarity": []}, "counts do not add up"),
    ],
)
def test_what_was_altered_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    clock = Clock(500_000.5)
    counts = Counts(tmp_path, clock).open()
    counts.describe(bundle_of("a"), "first")
    counts.add(bundle_of("a"), answers(0.5))
    clock.hour += 1
    counts.stop()
    path = tmp_path / "counts.jsonl"
    about, line = lines(path)
    path.write_text(json.dumps(about) + "\n" + json.dumps({**line, **change}) + "\n")
    with pytest.raises(StoreError, match=f"line 2: these are not the counts of a service, or were altered.*{text}"):
        read_counts(tmp_path)
    with pytest.raises(StoreError, match="line 2"):
        Counts(tmp_path, clock).open()
    path.write_text(json.dumps(about) + "\n" + json.dumps(line) + "\n")
    Counts(tmp_path, clock).open().stop()  # whoever failed to open it does not hold it


def test_a_folder_without_counts_says_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no counts in this folder.*featx serve MODEL --counts DIR"):
        read_counts(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file: no such folder of counts.*featx serve MODEL --counts DIR"):
        read_counts(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot write"):
        Counts(tmp_path / "file" / "counts").open()


def test_hours_of_a_model_that_nobody_described_are_refused(tmp_path: Path) -> None:
    counts = Counts(tmp_path, Clock(5.0)).open()
    counts.describe(bundle_of("a"), "first")
    counts.add(bundle_of("b"), answers(0.5))
    counts.stop()
    with pytest.raises(StoreError, match=r"counts of a model without the line about it.*sha256 bbbbbbbb"):
        read_counts(tmp_path)


def test_a_model_without_unknown_is_counted_too(tmp_path: Path) -> None:
    bundle = replace(bundle_of("a"), familiarity=None, max_unknown=None)
    counts = Counts(tmp_path, Clock(5.0)).open()
    counts.describe(bundle, "old")
    counts.add(bundle, [Answer("ants", 0.9, "probability", {}, None)])
    counts.stop()
    (counted,) = read_counts(tmp_path)
    assert (counted.about["own"], counted.photos.tolist()) == (0, [1])
    assert counted.familiarity.shape == (1, N_BINS) and not counted.familiarity.any()


def test_metrics_have_at_most_a_hundred_labels_of_a_model() -> None:
    metrics = Metrics()
    names = [f"class {number}" for number in range(250)]
    counted = metrics.of("model", names)
    for name in names:
        counted.answered([Answer(name, 0.9, "probability", {}, None, 0.5)])
    series = dict(re.findall(r'^featx_labels_total\{label="(.+)"\} (\S+)$', metrics.text().decode(), re.MULTILINE))
    assert len(series) == MOST_LABELS == 100
    assert float(series["other"]) == 151
    assert sum(map(float, series.values())) == 250
    assert np.isclose(
        float(re.findall(r"^featx_familiarity_sum (\S+)$", metrics.text().decode(), re.MULTILINE)[0]), 125
    )
