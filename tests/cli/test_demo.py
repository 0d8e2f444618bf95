"""The demo: tiles that do not touch, the whole job in one run, and what it says about its own numbers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import featx as package
from featx import PixelExtractor, make_head, make_pixels_baseline
from featx.cli.demo_images import NEW, TILE, Job, cut_tiles, verdict, write_digits, write_photographs
from featx.errors import SourceError, UsageError
from featx.images import PHOTOGRAPHS


@pytest.mark.parametrize("size", [(191, 384), (300, 451), (512, 512), (1411, 1411), (660, 550)])
def test_tiles_of_a_photograph_do_not_touch(size: tuple[int, int]) -> None:
    """Each pixel holds its own place in twelve bits a coordinate, so that a tile says where it was cut."""
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([y & 255, x & 255, (y >> 8) << 4 | x >> 8], axis=-1).astype(np.uint8)
    corners = []
    for tile in cut_tiles(pixels).values():
        assert tile.shape == (TILE, TILE, 3)
        low, left, high = tile[0, 0].astype(int)
        top = np.array([low | high >> 4 << 8, left | (high & 15) << 8])
        assert np.array_equal(tile, pixels[top[0] : top[0] + TILE, top[1] : top[1] + TILE])
        corners.append(top)
    assert len(corners) >= 8
    for a, b in combinations(corners, 2):
        assert np.abs(a - b).max() > TILE + 1


def test_the_images_of_the_demo(tmp_path: Path) -> None:
    count = write_photographs(tmp_path / "photographs", tmp_path / "new")
    files = sorted((tmp_path / "photographs").rglob("*.png"))
    assert len(files) == count
    assert sorted({path.parent.name for path in files}) == sorted(Path(name).stem for name in PHOTOGRAPHS)
    assert sorted(path.stem for path in (tmp_path / "new").iterdir()) == sorted(NEW)
    shown = {path.read_bytes() for path in files}
    assert not shown & {path.read_bytes() for path in (tmp_path / "new").iterdir()}
    times = {path: path.stat().st_mtime_ns for path in files}
    assert write_photographs(tmp_path / "photographs", tmp_path / "new") == count
    assert {path: path.stat().st_mtime_ns for path in files} == times
    assert write_digits(tmp_path / "digits") == 500
    assert [len(list((tmp_path / "digits" / str(label)).iterdir())) for label in range(10)] == [50] * 10
    digits = load_digits()
    with Image.open(tmp_path / "digits" / "7" / "0007.png") as picture:
        small = 255 - np.asarray(picture)[::4, ::4] * 1.0
    assert np.corrcoef(small.ravel(), digits.images[7].ravel())[0, 1] > 0.999


@pytest.mark.slow
def test_without_scikit_image_the_demo_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['skimage'] = None\n"
        "from pathlib import Path\nfrom featx.cli.demo_images import write_photographs\n"
        "from featx.errors import UsageError\n"
        "try:\n    write_photographs(Path('a'), Path('b'))\nexcept UsageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "pip install 'featx[demo]'" in done.stdout


@pytest.mark.slow
def test_the_demo(tmp_path: Path, featx: Featx) -> None:
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\nprintf %s "$1" > opened\n')
    browser.chmod(0o755)
    ran = featx("demo", "--json", "--open", cwd=tmp_path, env={"BROWSER": f"{browser} %s"})
    assert ran.code == 0, ran.err
    assert "\\n" not in ran.err + ran.out  # a line end inside a line would be spelt
    found = ran.json
    rows: dict[tuple[str, str, Any], float] = {
        (job, row["features"], row["n_shots"]): row["accuracy"]
        for job in ("photographs", "digits")
        for row in found[job]["results"]
    }
    assert rows["photographs", "embeddings", 5] > rows["photographs", "pixels", 5] + 0.5
    assert rows["digits", "pixels", 5] > rows["digits", "embeddings", 5] + 0.15
    summary = json.loads((tmp_path / "data/demo/photographs.report/summary.json").read_text())
    for row in summary["results"]:
        if row["head"] == found["photographs"]["head"]:
            assert rows["photographs", "embeddings", row["n_shots"]] == row["accuracy"]["mean"]
    assert [answer["label"] for answer in found["predictions"]] == list(NEW)
    assert {match["label"] for match in found["search"][0]["matches"]} == {NEW[0]}
    for job, word in (("photographs", "is worth"), ("digits", "costs")):
        points, five, pixels = (
            float(number)
            for number in re.search(
                rf"On {job} the frozen network {word} (\d+) points \((\d+) % right, raw pixels (\d+) %", ran.err
            ).groups()  # type: ignore[union-attr]
        )
        assert five == round(100 * rows[job, "embeddings", 5])
        assert pixels == round(100 * rows[job, "pixels", 5])
        assert points == abs(five - pixels)
    assert (tmp_path / "opened").read_text() == (tmp_path / found["report"]).resolve().as_uri()
    for line in found["commands"]:
        assert f"$ {line}" in ran.err
    assert [shlex.split(line)[1] for line in found["commands"]] == [
        "extract", "sweep", "extract", "sweep", "fit", "predict", "search",
    ]  # fmt: skip
    line = next(line for line in found["commands"] if line.startswith("featx search"))
    again = featx(*shlex.split(line)[1:], "--json", cwd=tmp_path).json
    assert again["results"] == found["search"]


def test_the_verdict_follows_the_numbers() -> None:
    better = Job("photographs", "ridge", {5: 0.91}, {5: 0.27})
    worse = Job("digits", "ridge", {5: 0.6}, {5: 0.9})
    same = Job("noise", "ridge", {5: 0.5}, {5: 0.5})
    lines = verdict([better, worse, same])
    assert "is worth 64 points (91 % right, raw pixels 27 %" in lines[0]
    assert "costs 30 points" in lines[1]
    assert "is worth nothing" in lines[2]
    (rounded,) = verdict([Job("x", "ridge", {5: 0.834}, {5: 0.766})])[:1]
    assert "is worth 6 points (83 % right, raw pixels 77 %" in rounded  # not 7, which 83 and 77 would belie


def test_pixels_are_the_same_from_files_images_and_arrays(tmp_path: Path) -> None:
    arrays = [np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8) for i in range(3)]
    images = [Image.fromarray(array) for array in arrays]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    rows = PixelExtractor().fit_transform(paths)
    assert rows.shape == (3, 768) and rows.dtype == np.float32
    for other in (images, arrays, np.stack(arrays), np.array([str(path) for path in paths])):
        assert np.array_equal(PixelExtractor().transform(other), rows)
    fine = np.kron(arrays[0], np.ones((16, 16, 1)))  # each pixel 16 x 16 times: means over areas are exact
    oracle = fine.reshape(16, 40, 16, 60, 3).mean(axis=(1, 3)) / 255
    error = rows[0].reshape(16, 16, 3) - oracle
    assert np.abs(error).max() < 0.12 and abs(error.mean()) < 0.005  # of noise, which has no smooth edges
    assert np.corrcoef(rows[0], oracle.reshape(-1))[0, 1] > 0.95
    assert PixelExtractor(side=4).transform(images).shape == (3, 48)
    assert list(PixelExtractor(side=1).get_feature_names_out()) == [f"pixelextractor{i}" for i in range(3)]
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"bad\.jpg"):
        PixelExtractor().transform([tmp_path / "bad.jpg"])
    for wrong in ({"side": 0}, {"side": 1.5}, {"n_jobs": 0}):
        with pytest.raises(UsageError):
            PixelExtractor(**wrong).fit(images)


def test_the_pixels_baseline_is_a_head_on_pixels() -> None:
    digits = load_digits()
    images = [np.kron(255 - image * 15, np.ones((4, 4))).astype(np.uint8) for image in digits.images[:300]]
    labels = digits.target[:300]
    baseline = clone(make_pixels_baseline("ridge", alpha=0.1)).fit(images[:200], labels[:200])
    assert list(baseline.named_steps) == ["pixelextractor", "normalise", "ridge"]
    head = make_head("ridge", alpha=0.1).fit(PixelExtractor().transform(images[:200]), labels[:200])
    assert np.array_equal(baseline.predict(images[200:]), head.predict(PixelExtractor().transform(images[200:])))
    plain = make_pipeline(PixelExtractor(), LogisticRegression(max_iter=1000)).fit(images[:200], labels[:200])
    score = baseline.score(images[200:], labels[200:])
    assert score > 0.85
    assert abs(score - plain.score(images[200:], labels[200:])) < 0.1
    assert {"PixelExtractor", "make_pixels_baseline"} <= set(dir(package))
    with pytest.raises(UsageError, match="no such head"):
        make_pixels_baseline("nothing")
