"""The index that is kept beside the store: mapped, added to, made anew, and refused where it was altered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from retrievalkit import Rows, clustered, needs_faiss, same

from featx.errors import StoreError
from featx.retrieval import neighbours as retrieval
from featx.retrieval.gallery import match_rows, open_gallery, search_folder
from featx.retrieval.neighbours import GalleryIndex
from featx.store.reader import FeatureSet


def features(rows: Rows, *, first: int = 0, **changes: Any) -> FeatureSet:
    """A FeatureSet whose digests are counted from ``first``."""
    n = len(rows)
    digests = np.zeros((n, 32), np.uint8)
    digests[:, :8] = np.arange(first, first + n, dtype=np.uint64)[:, None].view(np.uint8).reshape(n, 8)
    fields: dict[str, Any] = {
        "embeddings": rows,
        "ids": np.array([f"{i:06d}.jpg" for i in range(n)]),
        "labels": np.full(n, -1),
        "class_names": (),
        "splits": np.full(n, ""),
        "digests": digests,
        "layer": "penultimate",
        "provenance": {},
        "fingerprint": "ab" * 32,
    }
    return FeatureSet(**{**fields, **changes})


class Said(list[str]):
    def __call__(self, sentence: str) -> None:
        self.append(sentence)


@needs_faiss
def test_the_index_is_kept_mapped_added_to_and_made_anew(tmp_path: Path) -> None:
    store = tmp_path / "photos.featx"
    rows = clustered(4000)
    first, said = features(rows[:3000]), Said()
    made = open_gallery(store, first, method="approximate", say=said)
    assert said == ["making a search index of 3,000 images, once"]
    folder = search_folder(store)
    assert folder == tmp_path / "photos.search"
    assert sorted(path.suffix for path in folder.iterdir()) == [".digests", ".faiss", ".json"]
    record = json.loads((folder / f"{'ab' * 8}-penultimate.json").read_text())
    assert record["recall"] >= 0.98
    answers = made.search(rows[:100], 10)

    said.clear()
    opened = open_gallery(store, first, method="approximate", say=said)
    assert said == []
    assert opened.recall_ == made.recall_
    assert same(opened.search(rows[:100], 10), answers)
    if Path("/proc/self/maps").exists():  # it is not read, but mapped
        assert str(next(folder.glob("*.faiss"))) in Path("/proc/self/maps").read_text()

    # New rows, in another order, and some that went: added, not made anew.
    order = np.random.default_rng(0).permutation(3400)[:3300]
    more = features(rows[:3400])
    shuffled = features(rows[order], digests=more.digests[order])
    grown = open_gallery(store, shuffled, method="approximate", say=said)
    assert said == [f"adding {int((order >= 3000).sum())} images to the search index"]
    assert len(list(folder.iterdir())) == 3
    exact = GalleryIndex().fit(rows[order])
    found, truth = grown.search(rows[3400:3600], 10)[1], exact.search(rows[3400:3600], 10)[1]
    assert np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) >= 9.8
    said.clear()
    assert open_gallery(store, shuffled, method="approximate", say=said).method_ == "approximate"
    assert said == []

    # Half of it gone, or other settings: made anew.
    open_gallery(store, features(rows[:1500]), method="approximate", say=said)
    open_gallery(store, features(rows[:1500], fingerprint="cd" * 32), method="approximate", say=said)
    assert said == ["making a search index of 1,500 images, once"] * 2
    assert len(list(folder.glob("*.json"))) == 2


@needs_faiss
def test_an_altered_index_is_refused_before_faiss_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "photos.featx"
    found = features(clustered(1500))
    open_gallery(store, found, method="approximate")
    folder = search_folder(store)
    import faiss

    def never(*arguments: object) -> None:
        raise AssertionError("faiss was given an altered file")

    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        monkeypatch.setattr(faiss, "read_index", never)
        for damage in (whole[:-1], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], b""):
            path.write_bytes(damage)
            with pytest.raises(StoreError, match="the search index is missing or was altered"):
                open_gallery(store, found, method="approximate")
        monkeypatch.undo()
        path.write_bytes(whole)
    assert open_gallery(store, found, method="approximate").method_ == "approximate"


@needs_faiss
def test_auto_takes_the_kept_index_above_the_bound_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featx.retrieval import gallery

    found = features(clustered(1500))
    assert open_gallery(tmp_path / "s.featx", found).method_ == "exact"
    monkeypatch.setattr(gallery, "APPROXIMATE_ABOVE", 1000)
    monkeypatch.setattr(retrieval, "APPROXIMATE_ABOVE", 1000)
    assert open_gallery(tmp_path / "s.featx", found, method="exact").method_ == "exact"
    assert not search_folder(tmp_path / "s.featx").exists()
    assert open_gallery(tmp_path / "s.featx", found).method_ == "approximate"
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert open_gallery(tmp_path / "s.featx", found).method_ == "exact"


def test_rows_are_matched_by_content() -> None:
    def digests(values: list[int]) -> NDArray[np.uint8]:
        out = np.zeros((len(values), 32), np.uint8)
        out[:, 0] = values
        return out

    rows, new = match_rows(digests([5, 7, 7, 9]), digests([7, 1, 5, 7, 7]))
    assert rows.tolist() == [2, 0, 3, -1]
    assert new.tolist() == [1, 4]
    rows, new = match_rows(digests([]), digests([3]))
    assert (rows.tolist(), new.tolist()) == ([], [0])


def test_near_duplicates_are_the_same_groups_however_they_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.cluster import DBSCAN

    from featx.evaluation import duplicates

    rows = np.repeat(clustered(60), 9, axis=0)[np.random.default_rng(0).permutation(540)]
    rows = rows + 0.02 * clustered(540, seed=4)
    expected = DBSCAN(eps=0.01, min_samples=1, metric="cosine").fit_predict(rows)  # chains of cosines of 0.99
    for tile, most in ((1024, 10_000_000), (8, 100), (33, 5)):
        monkeypatch.setattr(duplicates, "_TILE", tile)
        monkeypatch.setattr(duplicates, "_MAX_PAIRS", most)
        found = duplicates.find_duplicates(rows, by=0.99)
        assert np.array_equal(found.groups, expected)
        assert found.n_groups >= 50
