"""Copies of photos do not make a sweep look better, and are found whatever network the store has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Featx
from PIL import Image


def some(photos: Path, name: str, classes: int, each: int) -> list[tuple[str, Path]]:
    """The first photos of the first classes of a set, with the names of their classes."""
    folders = sorted(path for path in (photos / name).iterdir() if path.is_dir())[:classes]
    return [(folder.name, path) for folder in folders for path in sorted(folder.iterdir())[:each]]


def swept(featx: Featx, source: Path, *options: object) -> dict[str, Any]:
    store = source.with_suffix(".featx")
    made = featx("extract", source, "--out", store, *options)
    assert made.code == 0, made.err
    ran = featx("sweep", store, "--heads", "ridge", "--episodes", 6, "--json")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = ran.json
    return found


@pytest.mark.slow
def test_copies_that_were_saved_anew_do_not_raise_accuracy(photos: Path, featx: Featx, tmp_path: Path) -> None:
    for name, path in some(photos, "dtd10", 4, 12):
        for kind in ("plain", "copied"):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
        with Image.open(path) as image:
            image.convert("RGB").save(tmp_path / "copied" / name / f"copy of {path.stem}.jpg", quality=60)
    plain, copied = (swept(featx, tmp_path / kind) for kind in ("plain", "copied"))
    assert plain["duplicates"]["near"] == 0 and copied["duplicates"]["near"] >= 46
    assert copied["images"] == 96
    for a, b in zip(plain["results"], copied["results"], strict=True):
        assert a["n_shots"] == b["n_shots"]
        # Without grouping a copy of nearly every photo would be in the support at 10 shots: 0.95 and more.
        assert b["accuracy"]["mean"] < a["accuracy"]["mean"] + 0.08


@pytest.mark.slow
def test_random_weights_sweep_grey_images_at_every_number_of_shots(photos: Path, featx: Featx, tmp_path: Path) -> None:
    for name, path in some(photos, "rsscn7", 3, 12):
        folder = tmp_path / "grey" / name
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("L").resize((100, 100)).save(folder / f"{path.stem}.png")
    found = swept(featx, tmp_path / "grey", "--weights", "none")
    assert {each["n_shots"] for each in found["results"]} == {1, 2, 5, 10, "all"}
    assert found["duplicates"] == {"exact": 0, "near": 0, "groups": 0}
