"""Images per second, measured here and kept."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from pathlib import Path

import pytest

from featx._files import seal
from featx.backbones import speed as speeds
from featx.backbones.speed import measure_speed, measured_speeds

SMALL = "squeezenet1_1"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_a_speed_is_kept_with_how_it_was_measured_for_this_machine(folder: Path) -> None:
    said: list[str] = []
    steps: list[tuple[int, int, str]] = []
    found = measure_speed(SMALL, seconds=0.2, progress=said.append, advance=lambda *step: steps.append(step))
    assert said == [f"building {SMALL} with random weights: its own are not here"]
    assert len(steps) >= 2 and {step[2] for step in steps} == {f"measuring {SMALL}, seconds"}
    assert found.images_per_second > 1
    assert (found.backbone, found.device, found.host) == (SMALL, "cpu", platform.node())
    assert measured_speeds() == {SMALL: found}
    assert not list((folder / "openvino").glob("*.ir"))  # of random weights, which nobody wants again
    (file,) = (folder / "speeds").iterdir()
    values = json.loads(file.read_text())
    del values["checksum"]
    for change in ({"host": "another"}, {"cpus": 4096}):
        file.write_bytes(seal({**values, **change}))
        assert measured_speeds() == {}
    file.write_bytes(seal(values))
    assert measured_speeds() == {SMALL: found}


@pytest.mark.slow
def test_weights_that_are_here_are_used_and_their_converted_copy_stays(folder: Path) -> None:
    said: list[str] = []
    found = measure_speed("efficientnet_lite0", seconds=0.1, progress=said.append)
    assert said == ["building efficientnet_lite0"]
    assert bool(list((folder / "openvino").glob("*.ir"))) == (found.engine == "openvino" and found.precision != "int8")


@pytest.mark.slow
def test_without_openvino_torch_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else real(name, *rest)
    )
    assert measure_speed(SMALL, seconds=0.1).engine == "torch"
    assert measured_speeds()[SMALL].precision == "fp32"


def test_the_rate_counts_images_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import TINY, TinyEngine

    now = iter(range(0, 1000, 1))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    engine = TinyEngine(batch_size=3)
    rate = speeds.rate(engine, (3, *TINY.crop, 3), seconds=4, name="tiny")
    batches = engine.batches[1:]  # the first warms up
    assert batches == [3] * len(batches) and len(batches) >= 2
    assert rate * (next(now) - 1) == pytest.approx(3 * len(batches))


@pytest.mark.slow
def test_damaged_files_are_not_shown_and_a_new_speed_takes_their_place(folder: Path) -> None:
    (folder / "speeds").mkdir(parents=True)
    for content in (b"", b"{", b"[]", seal({"backbone": "x"}), b"\xff" * 70_000):
        (folder / "speeds" / f"{SMALL}.json").write_bytes(content)
        assert measured_speeds() == {}
    found = measure_speed(SMALL, seconds=0.1)
    assert measured_speeds() == {SMALL: found}
