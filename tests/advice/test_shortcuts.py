"""Shortcuts: one that was planted in the corners is found, one that is not there is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from featx.advice.shortcuts import (
    CORNER,
    FRAME,
    Shortcuts,
    find_shortcuts,
    masked,
    middle_mask,
    region_mask,
    sample,
)
from featx.backbones import load_backbone, make_engine
from featx.errors import UsageError
from featx.evaluation import KShotSplit
from featx.extraction import Embedder
from featx.heads import HEADS, fit_chosen
from featx.models.explain import MIDDLE

EACH = 30
COLOURS = ((230, 40, 40), (40, 60, 230))


def photos(folder: Path, planted: str, *, each: int = EACH) -> tuple[list[Path], NDArray[np.int64]]:
    """Pictures of noise in the order of no class; what tells their classes is in the corner, the middle, or nowhere."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    labels = rng.permutation(np.repeat([0, 1], each))
    files = []
    for number, label in enumerate(labels):
        small = rng.integers(90, 170, (5, 5, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC)).copy()
        if planted == "corner":  # inside the crop of 224 of 256 pixels
            pixels[196:238, 18:60] = COLOURS[label]
        elif planted == "middle":
            pixels[104:146, 104:146] = COLOURS[label]
        files.append(folder / f"{number:03d}.png")
        Image.fromarray(pixels).save(files[-1])
    return files, labels.astype(np.int64)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    backbone = load_backbone()
    return Embedder(backbone, make_engine(backbone, threads=1))


@pytest.fixture(scope="module", params=["corner", "middle", "nowhere"])
def found(
    request: pytest.FixtureRequest, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Shortcuts]:
    files, labels = photos(tmp_path_factory.mktemp("shortcuts") / "in", request.param)
    result = find_shortcuts(embedder, 0, files, labels, episodes=12, random_state=0, tick=lambda what: None)
    return request.param, result


@pytest.mark.slow
def test_a_planted_shortcut_is_found_and_no_other(found: tuple[str, Shortcuts]) -> None:
    planted, result = found
    regions = {region.name: region for region in result.regions}
    assert set(regions) == {"borders", "corners"}
    assert result.images == 2 * EACH
    text = result.sentence()
    if planted == "corner":
        assert result.whole.mean > 0.9
        corners = regions["corners"]
        assert corners.used
        assert corners.verdict == "used"
        assert corners.without.mean < result.whole.mean - 0.25
        assert corners.alone.mean > 0.9
        assert text.startswith("The head uses the")
        assert "corners" in text.split(". ")[0]
        assert result.middle is not None
        assert result.middle.high < MIDDLE**2  # less than if it lay evenly
        assert corners.without_middle.mean > 0.75
        assert corners.alone_middle.mean < 0.8
        assert corners.gives_away
    else:
        assert not any(region.used or region.gives_away for region in result.regions)
        assert text.startswith("No shortcut ")
        for region in result.regions:
            assert region.gain.verdict == "cannot tell"
            assert region.verdict in ("not used", "cannot tell")
    if planted == "middle":
        assert result.whole.low > 0.6
        assert result.middle is not None
        assert result.middle.low > MIDDLE**2
    if planted == "nowhere":
        assert result.whole.low < 0.5 + 0.15
    for region in result.regions:
        assert f"Without {region.name}" in text
        assert f"{100 * region.without.mean:.1f} %" in text
        assert f"{100 * region.alone.mean:.1f} %" in text
    told = result.to_json()
    assert [each["region"] for each in told["regions"]] == ["borders", "corners"]
    assert told["whole"]["mean"] == result.whole.mean


@pytest.mark.slow
def test_accuracies_are_those_of_heads_on_pixels_masked_by_hand(embedder: Embedder, tmp_path: Path) -> None:
    files, labels = photos(tmp_path / "in", "corner", each=8)
    result = find_shortcuts(embedder, 0, files, labels, episodes=3, random_state=4, tick=lambda what: None)
    whole, grey = [], []
    for file in files:
        (pixels,) = embedder.pixels(file.read_bytes())
        altered = pixels.copy()
        side = pixels.shape[0]
        edge = round(FRAME * side)
        altered[:edge], altered[-edge:], altered[:, :edge], altered[:, -edge:] = 128, 128, 128, 128
        whole.append(embedder.embed_pixels([(pixels,)])[0][0])
        grey.append(embedder.embed_pixels([(altered,)])[0][0])
    accuracies = []
    for episode, (support, query) in enumerate(
        KShotSplit("all", n_episodes=3, random_state=4).split(None, labels, np.arange(16))
    ):
        rows = np.array(whole)[support]
        _, pipeline = fit_chosen(HEADS["auto"], rows, labels[support], support, random_state=[4, episode])
        accuracies.append((pipeline.predict(np.array(grey)[query]) == labels[query]).mean())
    assert result.regions[0].name == "borders"
    assert result.regions[0].without.mean == pytest.approx(np.mean(accuracies))


def test_masks() -> None:
    borders, corners = (region_mask(name, 200, 100) for name in ("borders", "corners"))
    assert borders.mean() == pytest.approx(1 - (1 - 2 * FRAME) ** 2)
    assert corners.mean() == pytest.approx(4 * CORNER**2)
    assert not borders[100, 50]
    assert not corners[100, 5]
    for of in (borders, corners):
        assert middle_mask(of.mean(), 200, 100).mean() == pytest.approx(of.mean(), abs=0.02)
    for mask in (borders, corners, middle_mask(0.3, 200, 100)):
        assert (mask == mask[::-1]).all()  # a mirrored view is masked alike
        assert (mask == mask[:, ::-1]).all()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 200, 100, 3), dtype=np.uint8)
    out = masked(pixels, corners, (1, 2, 3))
    assert (out[:, corners] == (1, 2, 3)).all()
    assert (out[:, ~corners] == pixels[:, ~corners]).all()


def test_a_sample_is_even_over_classes_and_has_no_copies() -> None:
    labels = np.repeat([0, 1, 2], [300, 20, 5])
    groups = np.arange(325)
    groups[310] = 309
    rows = sample(labels, groups, 60, 0)
    assert np.bincount(labels[rows]).tolist() == [36, 19, 5] or np.bincount(labels[rows]).tolist() == [35, 20, 5]
    assert len(np.unique(groups[rows])) == len(rows) == 60
    assert (rows == sample(labels, groups, 60, 0)).all()
    assert (rows != sample(labels, groups, 60, 1)).any()
    assert len(sample(labels, groups, 1000, 0)) == 324


def test_too_few_images_are_said(embedder: Embedder) -> None:
    with pytest.raises(UsageError, match="fewer than 5 different images"):
        find_shortcuts(embedder, 0, [], np.array([0] * 9 + [1] * 4), episodes=2, random_state=0, tick=lambda what: None)
