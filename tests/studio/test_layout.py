"""The map: neighbours stay neighbours, and it is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.manifold import trustworthiness

from featx.studio.layout import maps


@pytest.fixture(scope="module")
def unit() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 40))[np.arange(150) % 6] + 0.4 * rng.normal(size=(150, 40))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def test_principal_components_come_first_and_then_a_map_of_neighbours(unit: np.ndarray, tmp_path: Path) -> None:
    (first, components), (second, places) = maps(unit, tmp_path / "map.npz")
    assert (first, second) == ("pca", "tsne")
    for each in (components, places):
        assert each.shape == (150, 2)
        assert np.abs(each).max() == pytest.approx(1.0)
    assert trustworthiness(unit, places, n_neighbors=10) > 0.9
    assert trustworthiness(unit, places, n_neighbors=10) > trustworthiness(unit, components, n_neighbors=10)


def test_it_is_kept_for_the_same_photos_and_made_anew_for_others(unit: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    made = list(maps(unit, path))
    ((name, again),) = maps(unit, path)
    assert name == "tsne"
    assert np.array_equal(again, made[-1][1])
    assert [name for name, _ in maps(unit[:100], path)] == ["pca", "tsne"]
    for damage in (b"", b"PK no archive", path.read_bytes()[:200]):
        path.write_bytes(damage)
        assert [name for name, _ in maps(unit[:100], path)] == ["pca", "tsne"]


@pytest.mark.parametrize("n", [5, 6, 12])
def test_few_photos_have_a_map_too(unit: np.ndarray, tmp_path: Path, n: int) -> None:
    assert all(np.isfinite(places).all() for _, places in maps(unit[:n], tmp_path / "map.npz"))
