"""The index: exact against a float64 oracle, ties, many rows, adding, and the approximate index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from retrievalkit import Rows, clustered, needs_faiss, same
from sklearn.base import clone
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from featx.errors import UsageError
from featx.heads.scorer import unit_rows
from featx.retrieval import neighbours as retrieval
from featx.retrieval.neighbours import GalleryIndex
from featx.retrieval.postprocess import Postprocess, expand_queries


def oracle(rows: Rows, queries: Rows, k: int, *, metric: str = "cosine") -> tuple[Rows, NDArray[np.intp]]:
    """Scores by scikit-learn in float64, rounded to float32; ties by row number."""
    left, right = queries.astype(np.float64), rows.astype(np.float64)
    scores = (cosine_similarity(left, right) if metric == "cosine" else left @ right.T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize(("block", "k"), [(64, 10), (64, 1), (1000, 100), (8192, 10)])
def test_exact_is_exact(metric: str, block: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_ROW_BLOCK", block)
    rows, queries = clustered(1500), clustered(50, seed=1)
    scores, found = GalleryIndex(metric).fit(rows).search(queries, k)
    assert scores.dtype == np.float32
    assert found.dtype == np.int64
    expected, order = oracle(rows, queries, k, metric=metric)
    assert np.array_equal(found, order)
    assert np.allclose(scores, expected, rtol=0, atol=1e-6 if metric == "cosine" else 1e-4)


def test_it_is_nearest_neighbors_of_scikit_learn() -> None:
    rows, queries = clustered(800), clustered(30, seed=1)
    distance, order = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(rows).kneighbors(queries)
    scores, found = GalleryIndex().fit(rows).search(queries, 7)
    assert np.array_equal(found, order)
    assert np.allclose(1 - scores, distance, atol=1e-5)


@pytest.mark.parametrize("block", [16, 50, 8192])
def test_ties_are_broken_by_row(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Vectors of three values in four dimensions: most scores occur many times, and runs are longer than any margin.
    monkeypatch.setattr(retrieval, "_ROW_BLOCK", block)
    random = np.random.default_rng(3)
    rows = random.integers(-1, 2, (700, 4)).astype(np.float32)
    queries = random.integers(-1, 2, (40, 4)).astype(np.float32)
    for k in (1, 5, 30):
        scores, found = GalleryIndex().fit(rows).search(queries, k)
        expected, order = oracle(rows, queries, k)
        assert np.array_equal(scores, expected)
        assert np.array_equal(found, order)


def test_equal_rows_have_equal_scores_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    # BLAS computes the edges of a matrix by other code, whose last bit may differ.
    monkeypatch.setattr(retrieval, "_ROW_BLOCK", 37)
    row = np.random.default_rng(0).normal(size=(1, 333)).astype(np.float32)
    rows = np.repeat(row, 500, axis=0)
    query = np.random.default_rng(1).normal(size=(3, 333)).astype(np.float32)
    scores, found = GalleryIndex().fit(rows).search(query, 500)
    assert np.array_equal(found, np.tile(np.arange(500), (3, 1)))
    assert (scores == scores[:, :1]).all()
    assert np.array_equal(GalleryIndex().fit(rows).search(query, 3)[1], [[0, 1, 2]] * 3)


def test_rows_that_differ_in_the_last_bits_are_ranked_by_their_true_scores() -> None:
    # Closer together than the error of a float32 product of 1,280 terms.
    random = np.random.default_rng(0)
    base = random.normal(size=1280)
    rows = np.stack([base + 1e-5 * i * random.normal(size=1280) for i in range(200)]).astype(np.float32)
    rows = rows[random.permutation(200)]
    scores, found = GalleryIndex().fit(rows).search(base[None].astype(np.float32), 20)
    expected, order = oracle(rows, base[None].astype(np.float32), 20)
    assert np.array_equal(scores, expected)
    assert np.array_equal(found, order)


def test_k_may_be_larger_than_the_gallery() -> None:
    rows = clustered(5)
    scores, found = GalleryIndex().fit(rows).search(rows, 100)
    assert found.shape == scores.shape == (5, 5)
    assert np.array_equal(found[:, 0], np.arange(5))
    scores, found = GalleryIndex().fit(rows).search(rows, 100, exclude=np.arange(5))
    assert (found[:, -1] == -1).all()
    assert (scores[:, -1] == -np.inf).all()
    assert all(i not in row for i, row in enumerate(found))
    scores, found = GalleryIndex().fit(rows[:1]).search(rows[:1], 3, exclude=[0])
    assert found.tolist() == [[-1]]


def test_excluded_rows_are_left_out_and_no_others() -> None:
    rows = clustered(300)
    _, full = GalleryIndex().fit(rows).search(rows, 6)
    _, found = GalleryIndex().fit(rows).search(rows, 5, exclude=np.arange(300))
    assert np.array_equal(full[:, 0], np.arange(300))
    assert np.array_equal(found, full[:, 1:])
    mixed = np.where(np.arange(300) % 2, np.arange(300), -1)
    _, found = GalleryIndex().fit(rows).search(rows, 5, exclude=mixed)
    assert np.array_equal(found, np.where((mixed >= 0)[:, None], full[:, 1:], full[:, :5]))


def test_a_row_of_zeros_is_like_nothing() -> None:
    rows = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    scores, found = GalleryIndex().fit(rows).search(np.array([[2, 0], [0, 0]], np.float32), 3)
    assert scores.tolist() == [[1, 0, -1], [0, 0, 0]]
    assert found.tolist() == [[1, 0, 2], [0, 1, 2]]


def test_rows_are_added_without_copying_what_is_there() -> None:
    rows, queries = clustered(900), clustered(20, seed=2)
    index = GalleryIndex().fit(rows[:400])
    index.partial_fit(rows[400:401]).partial_fit(rows[401:])
    assert index.n_rows_ == 900
    assert index._parts[0].base is rows
    once = GalleryIndex().fit(rows)
    assert same(index.search(queries, 9), once.search(queries, 9))
    assert np.array_equal(GalleryIndex().partial_fit(rows).search(queries, 9)[1], once.search(queries, 9)[1])


def test_a_memory_map_is_searched_in_place(tmp_path: Path) -> None:
    rows = clustered(300)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert np.array_equal(GalleryIndex().fit(mapped).search(rows, 4)[1], GalleryIndex().fit(rows).search(rows, 4)[1])


def test_manner_of_scikit_learn() -> None:
    index = clone(GalleryIndex("dot", recall=0.9))
    assert index.get_params() == {"metric": "dot", "method": "auto", "recall": 0.9, "random_state": 0}
    assert index.fit(clustered(20)) is index
    assert (index.method_, index.recall_, index.n_features_in_) == ("exact", 1.0, 32)


def test_mistakes() -> None:
    rows = clustered(20)
    index = GalleryIndex().fit(rows)
    bad = rows.copy()
    bad[3, 3] = np.nan
    for call, message in (
        (lambda: GalleryIndex("euclid").fit(rows), "metric: no such metric: expected cosine or dot, found euclid"),
        (lambda: GalleryIndex(method="fast").fit(rows), "method: no such method"),  # type: ignore[arg-type]
        (lambda: GalleryIndex("dot", method="approximate").fit(rows), "by cosine only"),
        (lambda: GalleryIndex().fit(rows[0]), r"X: not a matrix: expected shape \(n, d\), found shape \(32,\)"),
        (lambda: GalleryIndex().fit([["a"]]), "X: not a matrix of numbers"),
        (lambda: GalleryIndex().fit(bad), "X: embeddings that are not finite"),
        (lambda: index.search(bad, 3), "Q: embeddings that are not finite"),
        (lambda: index.search(rows[:, :5], 3), "Q: queries of another length.*: expected 32 features, found 5"),
        (lambda: index.partial_fit(rows[:, :5]), "X: rows of another length"),
        (lambda: index.search(rows, 0), "k: k must be at least 1: found 0"),
        (lambda: index.search(rows, 3, exclude=[1]), "one row number for each query"),
        (lambda: GalleryIndex().search(rows), "no gallery yet. Call fit first"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


# --- postprocessing -----------------------------------------------------------------------------------------------


def test_centring_and_whitening() -> None:
    rows = clustered(300, 16) * np.linspace(3, 0.5, 16, dtype=np.float32)
    unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    assert np.allclose(Postprocess(center=True).fit(rows).transform(rows), unit_rows(centred), atol=1e-6)
    assert np.allclose(Postprocess().fit(rows).transform(rows), unit, atol=1e-6)

    from sklearn.decomposition import PCA

    whitened = Postprocess(whiten=8).fit(rows).transform(rows)
    expected = unit_rows(PCA(8, whiten=True, svd_solver="full").fit_transform(unit))
    assert whitened.shape == (300, 8)
    assert np.allclose(whitened @ whitened.T, expected @ expected.T, atol=1e-4)  # axes have no sign
    with pytest.raises(UsageError, match="expected 1 to 16 axes for 300 images, found 17"):
        Postprocess(whiten=17).fit(rows)
    flat = rows.copy()
    flat[:, 8:] = 0
    with pytest.raises(UsageError, match="fewer axes"):
        Postprocess(whiten=12).fit(flat)


def test_query_expansion_by_hand() -> None:
    query = np.array([[1.0, 0.0]])
    near = np.array([[[0.6, 0.8], [0.0, -5.0]]])
    # 0.5 cubed is 1/8; a cosine below zero, and a missing neighbour, add nothing.
    expected = np.array([1 + 0.6 / 8, 0.8 / 8])
    for second in (-0.3, -np.inf):
        found = expand_queries(query, [[0.5, second]], near)
        assert np.allclose(found[0], expected / np.linalg.norm(expected))


# --- the approximate index ----------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_faiss
@pytest.mark.parametrize("d", [32, 300])
def test_the_approximate_index_reaches_the_recall_that_it_states(d: int) -> None:
    rows, queries = clustered(3000, d), clustered(200, d, seed=1)
    index = GalleryIndex(method="approximate").fit(rows)
    assert index.method_ == "approximate"
    assert index.recall_ >= 0.98
    assert index.approximate_index is not None
    assert index.approximate_index.probes < index.approximate_index.n_lists / 2
    expected, order = GalleryIndex(method="exact").fit(rows).search(queries, 10)
    scores, found = index.search(queries, 10)
    recall = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, order, strict=True)]) / 10
    assert recall >= 0.98
    hit = found == order
    assert np.array_equal(scores[hit], expected[hit])  # what it finds has the exact score
    again = GalleryIndex(method="approximate").fit(rows)
    assert np.array_equal(again.search(queries, 10)[1], found)  # the same seed finds the same


@needs_faiss
def test_the_approximate_index_at_its_edges() -> None:
    rows = clustered(2000)
    index = GalleryIndex(method="approximate").fit(rows)
    _, found = index.search(rows[:50], 5, exclude=np.arange(50))
    assert all(i not in row for i, row in enumerate(found))
    exact = GalleryIndex().fit(rows)
    assert np.array_equal(index.search(rows[:5], 5000)[1], exact.search(rows[:5], 5000)[1])
    assert (index.search(rows[:20], 600)[1] >= 0).all()
    with pytest.raises(UsageError, match="too few images for an approximate index: expected at least 1,000, found 50"):
        GalleryIndex(method="approximate").fit(rows[:50])


@needs_faiss
def test_rows_are_added_to_an_approximate_index() -> None:
    rows = clustered(3000)
    index = GalleryIndex(method="approximate").fit(rows[:2500])
    trained = index.approximate_index
    index.partial_fit(rows[2500:])
    assert index.approximate_index is trained
    assert index.recall_ >= 0.98
    found = index.search(rows[2500:], 1)[1][:, 0]
    assert (found == np.arange(2500, 3000)).mean() >= 0.98


@pytest.mark.slow
@needs_faiss
def test_auto_stays_exact_where_the_recall_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "APPROXIMATE_ABOVE", 1050)
    # Noise of many dimensions has no near neighbours, and two lists in ten are no short cut to them.
    noise = np.random.default_rng(0).normal(size=(1100, 200)).astype(np.float32)
    index = GalleryIndex(recall=1.0).fit(noise)
    assert (index.method_, index.recall_, index.approximate_index) == ("exact", 1.0, None)
    with pytest.raises(UsageError, match=r"does not find enough .* expected recall at 10 of at least 1\.0, found 0\."):
        GalleryIndex(method="approximate", recall=1.0).fit(noise)
    assert GalleryIndex().fit(clustered(1100)).method_ == "approximate"
    assert GalleryIndex().fit(clustered(1050)).method_ == "exact"


def test_without_faiss_everything_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = clustered(1200), clustered(20, seed=1)
    before = GalleryIndex(method="exact").fit(rows).search(queries, 10)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(retrieval, "APPROXIMATE_ABOVE", 1000)
    index = GalleryIndex().fit(rows)
    assert index.method_ == "exact"
    assert same(before, index.search(queries, 10))
    with pytest.raises(UsageError, match=r"needs faiss, which is not installed. Install it \(pip install 'featx"):
        GalleryIndex(method="approximate").fit(rows)


@pytest.mark.slow
def test_faiss_is_imported_by_nobody_who_does_not_need_it() -> None:
    code = (
        "import featx, featx.cli.main, featx.retrieval.gallery, featx.retrieval.search, numpy as np, sys\n"
        "featx.retrieval.neighbours.GalleryIndex().fit(np.eye(3)).search(np.eye(3))\n"
        "print([name for name in ('faiss', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
