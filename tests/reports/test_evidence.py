"""A report that shows what speaks for the two classes on confused and suspicious photos."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx
from PIL import Image

COLOURS = {"blue": (30, 60, 235), "red": (230, 40, 40)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    rng = np.random.default_rng(0)
    for name, other in (("blue", "red"), ("red", "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(12):
            noise = rng.integers(60, 200, (6, 8, 3), dtype=np.uint8)
            pixels = np.asarray(Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC)).copy()
            y, x = rng.integers(0, 40), rng.integers(15, 55)
            pixels[y : y + 50, x : x + 50] = COLOURS[other if number == 5 else name]  # one of each is mislabelled
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number:02d}.png")
    assert featx("extract", "photos", "--out", "photos.featx", cwd=folder).code == 0
    return folder


SWEEP = ("sweep", "photos.featx", "--shots", "2,5", "--episodes", "6", "--heads", "auto,knn", "--n-jobs", "1")


@pytest.mark.slow
def test_confused_photos_and_their_evidence_are_shown_on_demand(store: Path, featx: Featx) -> None:
    plain = featx(*SWEEP, "--out", "plain", cwd=store)
    assert plain.code == 0, plain.err
    page = (store / "plain/report.html").read_text()
    assert "most often gets wrong" not in page
    assert "evidence for" not in page
    done = featx(*SWEEP, "--out", "explained", "--explain", "--json", cwd=store)
    assert done.code == 0, done.err
    page = (store / "explained/report.html").read_text()
    section = page[page.index("Photos that it most often gets wrong") :]
    assert "Orange places speak for the class" in section
    pictures = re.findall(r'alt="evidence for (\w+) and for (\w+)" src="data:image/jpeg;base64,([^"]+)"', section)
    assert 2 <= len(pictures) <= 12
    for one, other, data in pictures:
        assert {one, other} == set(COLOURS)
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (224, 2 * 168 + 6)
    shown = re.findall(r"<code>(\w+)/<wbr>(\d+)\.<wbr>png</code>", section.split("<h3>")[0])
    assert {("blue", "05"), ("red", "05")} & set(shown[:4])  # what is mislabelled comes first
    # All but the pictures is the same.
    for name in ("trials.csv",):
        assert (store / "plain" / name).read_bytes() == (store / "explained" / name).read_bytes()


@pytest.mark.slow
def test_what_cannot_be_shown_is_said(store: Path, featx: Featx, tmp_path: Path) -> None:
    shutil.copytree(store / "photos.featx", tmp_path / "photos.featx")
    shutil.move(store / "photos", store / "elsewhere")
    try:
        done = featx(*SWEEP, "--explain", "--out", "gone", cwd=tmp_path)
    finally:
        shutil.move(store / "elsewhere", store / "photos")
    assert done.code == 0, done.err
    assert "No evidence is shown: the photos are not at hand" in (tmp_path / "gone/report.html").read_text()
    two = featx("sweep", "photos.featx", "photos.featx", "--explain", cwd=tmp_path)
    assert two.code == 2
    assert "--explain takes one store" in two.err
