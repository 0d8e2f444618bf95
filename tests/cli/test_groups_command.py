"""Groups on the command line: grouped, compared, forecast, fitted and advised on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx
from pagekit import Page
from PIL import Image


@pytest.fixture(scope="module")
def store(featx: Featx, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cameras that saw two classes of pictures, each with a tint of its own, in no order."""
    here = tmp_path_factory.mktemp("groups")
    rng = np.random.default_rng(0)
    tints = rng.uniform(0.4, 1.0, (8, 3))
    rows = []
    for i in range(96):
        label, camera = int(rng.integers(2)), int(rng.integers(8))
        wave = np.sin(np.arange(64) / (3 + 5 * label) + rng.uniform(0, 6))
        pixels = 127 + 60 * wave[:, None, None] * np.ones((64, 64, 3)) + rng.normal(0, 30, (64, 64, 3))
        name = f"{i:03d}.png"
        Image.fromarray(np.clip(pixels * tints[camera], 0, 255).astype(np.uint8)).save(here / name)
        rows.append((name, ("coarse", "fine")[label], f"camera {camera}" if i else "", "none"))
    with (here / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "group", "remark"), *rows])
    made = featx("extract", here / "list.csv", "--out", here / "s.featx", "--group-name", "camera", "--json")
    assert made.code == 0
    assert "8 groups by column:group; 1 image with no group count as one each" in made.json["notes"]
    return here / "s.featx"


def test_info_shows_groups(featx: Featx, store: Path) -> None:
    said = featx("info", store, "--json").json
    assert sum(said["groups"].values()) == 95
    assert (said["group_count"], said["group_name"], said["metadata"]) == (8, "camera", ["remark"])
    assert "camera 1" in featx("info", store).out


@pytest.mark.slow
def test_a_sweep_across_groups_stands_beside_the_ordinary_one(featx: Featx, store: Path, tmp_path: Path) -> None:
    options = ("--heads", "auto,nearest_centroid", "--episodes", "4")
    both = featx("sweep", store, "--across", "groups", *options, "--out", tmp_path / "both", "--json")
    assert both.code == 0
    plain = featx("sweep", store, *options, "--out", tmp_path / "plain", "--json").json
    found = both.json
    across = found["across"]
    assert [{**row, "fit_seconds": 0} for row in found["results"]] == [
        {**row, "fit_seconds": 0} for row in plain["results"]
    ]
    assert set(plain) == set(found) - {"across"}
    assert {*plain} - {"unlabelled", "test", "report"} <= {*across}
    assert [set(row) for row in across["results"]] == [set(found["results"][0])] * len(across["results"])
    forecast = across["forecast"]
    assert forecast["groups"] == len(forecast["left_out"]) == 8
    assert forecast["accuracy"]["low"] < forecast["accuracy"]["mean"] <= forecast["accuracy"]["high"]
    assert [each["labels"] for each in forecast["added"]] == [1, 2, 5]
    words = " ".join(Page((tmp_path / "both" / "report.html").read_text()).words)
    assert "Photos of a new camera" in words
    assert "photos of a new camera:" in words
    assert forecast["sentence"] in words
    assert "new camera" not in (tmp_path / "plain" / "report.html").read_text()
    shown = featx("sweep", store, "--across", "groups", "--group-name", "tower", *options, "--out", tmp_path / "shown")
    words = " ".join(shown.out.split())
    assert "new photos, and photos of a new tower" in words
    assert "At a new tower expect" in words
    assert "1 image without a tower count as one each" in shown.err


@pytest.mark.slow
def test_a_sweep_across_groups_goes_on_where_it_stopped(featx: Featx, store: Path, tmp_path: Path) -> None:
    options = ("--across", "groups", "--heads", "auto", "--shots", "1,5", "--episodes", "200", "--out", tmp_path / "o")
    first = featx("sweep", store, *options, "--seconds", "2", "--json").json
    assert first["across"]["missing"]
    assert {path.name for path in (tmp_path / "o").glob("journal*")} == {"journal.jsonl", "journal.across.jsonl"}
    second = featx("sweep", store, *options, "--json").json
    assert not second["missing"]
    assert not second["across"]["missing"]
    assert list((tmp_path / "o").glob("journal*")) == []


@pytest.mark.slow
def test_what_cannot_be_compared_across_is_said_first(featx: Featx, store: Path, tmp_path: Path) -> None:
    none = tmp_path / "none.featx"
    source = store.parent / "list.csv"
    assert featx("extract", source, "--out", none, "--group-by", "none").code == 0
    refused = featx("sweep", none, "--across", "groups")
    assert refused.code == 2
    assert "the store has no groups" in refused.err
    assert "--group-by RULE" in refused.err
    rows = list(csv.reader(source.read_text().splitlines()))
    with (store.parent / "same.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([path, label, label, ""] for path, label, *_ in rows[1:])])
    regrouped = featx("extract", store.parent / "same.csv", "--out", none, "--json")
    assert regrouped.json["embedded"] == 0
    refused = featx("sweep", none, "--across", "groups", "--group-name", "site")
    assert refused.code == 2
    assert "sites coincide with classes, so what a new site would give cannot be told" in refused.err
    assert featx("sweep", none, "--group-name", "site").code == 2


@pytest.mark.slow
def test_fit_and_advice_keep_groups_whole(featx: Featx, store: Path, tmp_path: Path) -> None:
    fitted = featx("fit", store, "--out", tmp_path / "m.model", "--json").json
    assert fitted["metrics"]["groups"] == 9
    text = featx("fit", store, "--out", tmp_path / "n.model").out
    assert "On images it had not seen (9 groups, whole): accuracy" in " ".join(text.split())
    advised = featx("advise", store, "--minutes", "0.5", "--out", tmp_path / "a.html", "--json")
    assert advised.code == 0
    found = advised.json
    assert found["sentences"]["new group"] == found["forecast"]["sentence"]
    assert found["notes"][0] == (
        "All accuracies are those on photos of a new camera: none that was learnt from is judged."
    )
    assert "What to expect of a group never seen" in (tmp_path / "a.html").read_text()
