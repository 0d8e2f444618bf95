"""featx drift: what it says of counts that a service has kept, in words and in JSON."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from conftest import Featx
from tiny_server import tiny_bundle

from featx.models import is_unknown, write_bundle
from featx.models.bundle import Answer, read_bundle
from featx.service.counts import Counts

NOW = int(datetime.now(UTC).timestamp() // 3600)


class Kept:
    """Folders of counts, made up hour by hour."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundle = folder, replace(tiny_bundle(), sha256="a" * 64)
        self._now = NOW

    def fill(self, hours: range, unknown: float, *, name: str = "photos", bundle: Any = None, each: int = 20) -> None:
        """Count photos in hours before now, of which a part is unknown."""
        bundle = bundle or self.bundle
        counts = Counts(self.folder, lambda: 3600.0 * self._now).open()
        counts.describe(bundle, name)
        rng = np.random.default_rng(hours.start)
        for ago in hours:
            self._now = NOW - ago
            shares = np.where(rng.random(each) < unknown, 1, rng.integers(1, 42, size=each)) / 41
            strange = is_unknown(shares, 0.05)
            labels = np.where(rng.random(each) < 0.75, "ants", "bees")
            counts.add(
                bundle,
                [
                    Answer(str(label), 0.9, "probability", {}, "unknown" if far else None, float(share))
                    for label, share, far in zip(labels, shares, strange, strict=True)
                ],
            )
        self._now = NOW
        counts.stop()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Two days without change, a day of two unknown photos in five, and a photo of just now."""
    kept = Kept(tmp_path_factory.mktemp("drift") / "counts")
    kept.fill(range(72, 24, -1), 0.0)
    kept.fill(range(24, 0, -1), 0.4)
    kept.fill(range(1), 0.0, each=1)
    return kept


def test_what_it_says(featx: Featx, kept: Kept) -> None:
    ran = featx("drift", kept.folder)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("photos (aaaaaaaa): changed, perhaps since 20")
    assert "More photos are unlike those that it was fitted on than can be by chance." in ran.out
    assert "1,441 photos from " in ran.out
    assert "The model was set to call at most 5 % of photos like its own unknown." in ran.out
    for title in ("ants", "bees", "unsure", "unknown", "familiarity"):
        assert title in ran.out
    periods = featx("drift", kept.folder, "--json").json["models"][0]["periods"]
    for each in periods:
        assert f"{100 * each['unknown'] / each['photos']:.1f} %" in ran.out


def test_the_same_for_programs(featx: Featx, kept: Kept) -> None:
    (found,) = featx("drift", kept.folder, "--json").json["models"]
    assert (found["verdict"], found["side"], found["photos"]) == ("changed", "unlike", 1441)
    assert found["units"] - 72 in (0, 1)  # an hour may have ended since
    began = datetime.fromisoformat(found["since"].replace("Z", "+00:00")).timestamp() / 3600
    seen = datetime.fromisoformat(found["seen"].replace("Z", "+00:00")).timestamp() / 3600
    assert NOW - 50 < began < seen < NOW
    assert NOW - 24 < seen < NOW - 4
    assert sum(found["familiarity"]) == sum(each["photos"] for each in found["periods"]) == 1441
    assert sum(found["labels"].values()) + found["unknown"] + found["unsure"] == 1441
    share = found["unknown_share"]
    assert share["mean"] == pytest.approx(found["unknown"] / 1441)
    assert share["low"] < share["mean"] < share["high"]


def test_what_was_before_a_date_can_be_left_out(featx: Featx, kept: Kept, tmp_path: Path) -> None:
    long_ago = featx("drift", kept.folder, "--since", "2020-01-01", "--json").json["models"][0]
    assert long_ago["photos"] == 1441
    hour = datetime.fromtimestamp(3600 * (NOW - 6), UTC).strftime("%Y-%m-%dT%H:00")
    late = featx("drift", kept.folder, "--since", hour, "--json").json["models"][0]
    assert late["photos"] == 121
    assert late["units"] - 6 in (0, 1)
    none = featx("drift", kept.folder, "--since", "2200-01-01")
    assert (none.code, none.out.count("cannot tell yet")) == (0, 1)
    quiet = Kept(tmp_path / "quiet")
    quiet.fill(range(72, 0, -1), 0.0)
    ran = featx("drift", quiet.folder)
    assert "photos (aaaaaaaa): no sign of change. In 72 hours that are over, unknown photos in the place of" in ran.out


def test_days_as_the_unit(featx: Featx, kept: Kept) -> None:
    (found,) = featx("drift", kept.folder, "--unit", "day", "--json").json["models"]
    assert found["units"] - 3 in (0, 1)  # the last is not over, unless it is midnight
    assert found["verdict"] == "cannot tell yet"
    assert " days that are over, " in featx("drift", kept.folder, "--unit", "day").out


def test_one_model_of_several(featx: Featx, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "counts")
    kept.fill(range(30, 0, -1), 0.0)
    old = replace(tiny_bundle(), familiarity=None, max_unknown=None)
    file = write_bundle(old, tmp_path / "old.model")
    kept.fill(range(3, 0, -1), 0.0, name="old", bundle=read_bundle(file))
    assert [each["name"] for each in featx("drift", kept.folder, "--json").json["models"]] == ["photos", "old"]
    ran = featx("drift", kept.folder, "--model", file)
    assert ran.code == 0 and "photos (" not in ran.out
    assert "cannot tell yet. This model cannot call photos unknown, so nothing can be compared." in ran.out
    other = write_bundle(replace(tiny_bundle(), head="ridge"), tmp_path / "other.model")
    ran = featx("drift", kept.folder, "--model", other)
    assert ran.code == 2
    assert "other.model: this model answered nothing that was counted" in ran.err


def test_what_is_wrong_is_said(featx: Featx, tmp_path: Path) -> None:
    ran = featx("drift", tmp_path, "--json")
    assert (ran.code, ran.json["exit_code"]) == (2, 2)
    assert (
        "no counts in this folder: expected counts.jsonl. Keep them with: featx serve MODEL --counts DIR"
        in ran.json["error"]
    )
    (tmp_path / "counts.jsonl").write_bytes(b"\xff\x00\n")
    ran = featx("drift", tmp_path)
    assert ran.code == 2 and "counts.jsonl, line 1: these are not the counts of a service" in ran.err
    assert featx("drift", tmp_path, "--since", "yesterday").code == 2
