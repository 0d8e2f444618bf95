"""What looks like this? Nearest rows of a gallery of embeddings, exactly, or by way of an index.

The exact search multiplies blocks of float32 and keeps what beats the worst of the best so far, so it costs little more
than the matrix product. The best are then scored again in float64 and rounded to float32. So scores do not depend on
block sizes, threads or the library that multiplied, equal embeddings get equal scores, and ties are broken by row
number (which is by id, as the rows of a store are sorted by id).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator

from featx.errors import UsageError
from featx.heads import unit_rows
from featx.retrieval import faiss as ann

Floats: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]
Method: TypeAlias = Literal["auto", "exact", "approximate"]

APPROXIMATE_ABOVE = 1_000_000
"""Rows above which ``auto`` takes the approximate index, where faiss is installed."""

RECALL = 0.98
"""Share of the true ten nearest that an approximate index must find to be used."""

_QUERY_BLOCK = 1024
_ROW_BLOCK = 8192
"""1,024 x 8,192 float32 scores are 32 MB: large enough for the matrix product, small enough for the cache's sake."""

_NORM_BLOCK = 128
"""128 rows of 1,280 in float64 are 1.3 MB, which stay in the cache."""

_GATHER = 2**22
"""Numbers of embeddings that are gathered at a time: 16 MB of float32."""

_MARGIN = 8
_CALIBRATION = 512
_MAX_DEPTH = 4096
_DEPTHS = (32, 64, 96, 128, 512)
"""How many candidates may be ranked exactly, for a k of ten."""


class GalleryIndex(BaseEstimator):  # type: ignore[misc]
    """Nearest rows of a gallery, in scikit-learn's manner: ``GalleryIndex().fit(X).search(Q, k)``.

    Parameters
    ----------
    metric : "cosine", or "dot" for the plain inner product. A row of zeros has cosine 0 with everything.
    method : "exact"; "approximate" (faiss; cosine only), which finds at least ``recall`` of the true ten nearest as
        measured on the gallery itself; "auto" is approximate above ``APPROXIMATE_ABOVE`` rows where faiss is installed.
        Scores are exact either way.
    recall : what an approximate index must reach.
    random_state : seed of its k-means and of the rows that it is measured on.

    Attributes
    ----------
    n_rows_ : rows of the gallery.
    n_features_in_ : their length.
    method_ : "exact" or "approximate", what ``method`` came to.
    recall_ : 1.0, or what the approximate index was measured to reach.
    """

    def __init__(
        self, metric: str = "cosine", *, method: Method = "auto", recall: float = RECALL, random_state: int = 0
    ) -> None:
        self.metric = metric
        self.method = method
        self.recall = recall
        self.random_state = random_state

    # --- building -------------------------------------------------------------------------------------------------

    def fit(self, X: ArrayLike, y: object = None) -> GalleryIndex:
        """Take the gallery: (n, d), finite. A float32 array (a memory map too) is kept as it is, not copied.

        Raises
        ------
        UsageError
            The array is not a finite matrix; or an approximate index is demanded that cannot be had.
        """
        self._check_parameters()
        self._parts: list[Floats] = []
        self._starts: list[int] = []
        self._norms: NDArray[np.float64] = np.empty(0)
        self.n_rows_ = 0
        self.n_features_in_ = 0
        self._ann: ann.ApproximateIndex | None = None
        self._ann_rows: Rows | None = None
        self.method_, self.recall_ = "exact", 1.0
        self._append(_matrix(X, "X"))
        if self._wants_approximate():
            self._build()
        return self

    def partial_fit(self, X: ArrayLike, y: object = None) -> GalleryIndex:
        """Add rows (m, d) after those that are there. An approximate index is added to, and measured again."""
        if not hasattr(self, "_parts"):
            return self.fit(X)
        before = self.n_rows_
        self._append(_matrix(X, "X"))
        if self._ann is not None:
            self._ann.add(self.unit_rows, np.arange(before, self.n_rows_))
            if self._ann_rows is not None:
                self._ann_rows = np.concatenate([self._ann_rows, np.arange(before, self.n_rows_)])
            self.calibrate()
        elif self._wants_approximate():
            self._build()
        return self

    def attach(self, index: ann.ApproximateIndex, rows: Rows | None = None) -> None:
        """Search by way of an index that was made elsewhere; ``rows[i]`` is the row of its number i, -1 for none."""
        self._ann, self._ann_rows = index, rows
        self.method_, self.recall_ = "approximate", index.recall

    @property
    def approximate_index(self) -> ann.ApproximateIndex | None:
        """The approximate index, if there is one."""
        return self._ann

    def _check_parameters(self) -> None:
        if self.metric not in ("cosine", "dot"):
            raise UsageError("no such metric", where="metric", expected="cosine or dot", found=self.metric)
        if self.method not in ("auto", "exact", "approximate"):
            raise UsageError("no such method", where="method", expected="auto, exact or approximate", found=self.method)
        if self.method == "approximate" and self.metric != "cosine":
            raise UsageError("approximate search is by cosine only", where="metric", found=self.metric)

    def _append(self, rows: Floats) -> None:
        if self._parts and rows.shape[1] != self.n_features_in_:
            raise UsageError(
                "rows of another length", where="X", expected=f"{self.n_features_in_} features", found=rows.shape[1]
            )
        self.n_features_in_ = rows.shape[1]
        norms = np.empty(len(rows))
        for start in range(0, len(rows), _NORM_BLOCK):
            block = rows[start : start + _NORM_BLOCK].astype(np.float64)
            block *= block
            norms[start : start + _NORM_BLOCK] = np.sqrt(block.sum(axis=1))
        if not np.isfinite(norms).all():
            raise UsageError("embeddings that are not finite", where="X", hint="Repair or drop these rows.")
        self._starts.append(self.n_rows_)
        self._parts.append(rows)
        self._norms = np.concatenate([self._norms, norms])
        self.n_rows_ += len(rows)

    def _wants_approximate(self) -> bool:
        if self.method != "auto":
            return self.method == "approximate"
        return self.n_rows_ > APPROXIMATE_ABOVE and self.metric == "cosine" and ann.available()

    def _build(self) -> None:
        index = ann.ApproximateIndex.train(
            self.unit_rows, self.n_rows_, self.n_features_in_, random_state=self.random_state
        )
        index.add(self.unit_rows, np.arange(self.n_rows_))
        self._ann, self._ann_rows = index, None
        self.calibrate()

    def calibrate(self) -> None:
        """Read the fewest lists, and rank the fewest candidates, that reach the recall on rows of the gallery.

        Each of the rows is left out of its own neighbours, so that it stands for an image that is not in the gallery.
        Where no setting reaches the recall, ``auto`` goes back to the exact search, and "approximate" is an error.
        """
        index = self._ann
        assert index is not None
        drawn = np.random.default_rng(self.random_state).permutation(self.n_rows_)[:_CALIBRATION]
        queries = self.unit_rows(drawn)
        truth = self._exact(queries, 10, drawn)[1]

        def measure(probes: int, depth: int) -> tuple[float, bool]:
            index.set_probes(probes)
            index.depth = depth
            found = self._approximate(queries, 10, drawn)[1]
            share = np.array([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / truth.shape[1]
            # Two standard errors of the mean: what is measured on a sample shall hold for other queries too.
            return float(share.mean()), bool(share.mean() - 2 * share.std() / math.sqrt(len(share)) >= self.recall)

        reached = 0.0
        # Ranking more candidates costs more than reading more lists, so it is the last resort.
        for deepest in (_DEPTHS[-2], _DEPTHS[-1]):
            for probes in _steps(index.n_lists // 2):
                reached, enough = measure(probes, deepest)
                if not enough:
                    continue
                for depth in (depth for depth in _DEPTHS if depth <= deepest):
                    index.recall, enough = measure(probes, depth)
                    if enough:
                        self.method_, self.recall_ = "approximate", index.recall
                        return
        self._ann, self._ann_rows, self.method_, self.recall_ = None, None, "exact", 1.0
        if self.method == "approximate":
            raise UsageError(
                "the approximate index does not find enough on these embeddings",
                expected=f"recall at 10 of at least {self.recall}",
                found=f"{reached:.3f}",
                hint="Search exactly.",
            )

    # --- searching ------------------------------------------------------------------------------------------------

    def search(
        self, Q: ArrayLike, k: int = 10, *, exclude: ArrayLike | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The ``k`` best rows of each query, best first, ties by row number.

        Parameters
        ----------
        Q : (q, d) queries.
        k : how many; all there are where the gallery has fewer.
        exclude : (q,) a row that is left out of each query's answer, -1 for none (the query itself, say).

        Returns
        -------
        scores, rows : (q, min(k, n)) float32 and int64. Where ``exclude`` leaves fewer, the rest is -inf and -1.

        Raises
        ------
        UsageError
            The queries are not a finite matrix of the gallery's width, or ``k`` is below 1.
        """
        if not hasattr(self, "_parts"):
            raise UsageError("the index has no gallery yet", hint="Call fit first.")
        queries = _matrix(Q, "Q")
        if queries.shape[1] != self.n_features_in_:
            raise UsageError(
                "queries of another length than the gallery",
                where="Q",
                expected=f"{self.n_features_in_} features",
                found=queries.shape[1],
            )
        if k < 1:
            raise UsageError("k must be at least 1", where="k", found=k)
        without = np.full(len(queries), -1) if exclude is None else np.asarray(exclude, dtype=np.int64)
        if without.shape != (len(queries),):
            raise UsageError("one row number for each query", where="exclude", found=f"shape {without.shape}")
        k = min(k, self.n_rows_)
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        one = self._exact if self._ann is None else self._approximate
        for start in range(0, len(queries), _QUERY_BLOCK):
            block = slice(start, start + _QUERY_BLOCK)
            scores[block], rows[block] = one(_finite(queries[block]), k, without[block])
        return scores, rows

    def _approximate(self, queries: Floats, k: int, exclude: Rows) -> tuple[Floats, Rows]:
        index = self._ann
        assert index is not None
        depth = index.depth * math.ceil(k / 10)
        if depth > min(_MAX_DEPTH, len(index)):
            return self._exact(queries, k, exclude)
        rows = index.candidates(_unit_rows(queries), depth)
        if self._ann_rows is not None:
            rows = np.where(rows >= 0, self._ann_rows[rows], -1)
        scores, rows = self._best(queries, rows, k, exclude)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):  # fewer than k in the lists that were read
            scores[short], rows[short] = self._exact(queries[short], k, exclude[short])
        return scores, rows

    def _exact(self, queries: Floats, k: int, exclude: Rows) -> tuple[Floats, Rows]:
        """The k best, proven: more candidates are taken until the last of them is clearly worse than the k-th."""
        unit = _unit_rows(queries) if self.metric == "cosine" else queries
        # The error of a float32 product of d terms grows as sqrt(d) (Higham and Mary, 2019); 4 is their lambda.
        slack = 4 * math.sqrt(self.n_features_in_) * 2.0**-24
        if self.metric == "dot":
            lengths = np.sqrt((queries.astype(np.float64) ** 2).sum(axis=1))
            slack = slack * lengths * float(self._norms.max(initial=0.0))
        limit = np.broadcast_to(slack, len(queries))
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        open_ = np.arange(len(queries))
        count = k + 1 + _MARGIN
        while len(open_):
            count = min(count, self.n_rows_)
            worst, found = self._scan(unit[open_], count)
            scores[open_], rows[open_] = self._best(queries[open_], found, k, exclude[open_])
            if count == self.n_rows_:
                break
            open_ = open_[worst >= scores[open_, -1] - 2 * limit[open_]]
            count *= 8
        return scores, rows

    def _scan(self, queries: Floats, count: int) -> tuple[Floats, Rows]:
        """The ``count`` best rows (q, count) in no order, by float32 products; and the score of the worst of them."""
        n = len(queries)
        best = np.full((n, count), -np.inf, np.float32)
        rows = np.full((n, count), -1, np.int64)
        floor = best[:, :1]
        buffer = np.empty((n, _ROW_BLOCK), np.float32)
        for start, block in self._blocks():
            scores = buffer[:, : len(block)] if len(block) == _ROW_BLOCK else np.empty((n, len(block)), np.float32)
            np.matmul(queries, block.T, out=scores)
            if self.metric == "cosine":
                scores *= _inverse(self._norms[start : start + len(block)])
            hits = np.flatnonzero((scores > floor).reshape(-1))
            if not len(hits):
                continue
            if len(hits) > 4 * best.size:
                numbers = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
                both, names = np.hstack([best, scores]), np.hstack([rows, numbers])
                pick = np.argpartition(both, both.shape[1] - count, axis=1)[:, -count:]
                best, rows = np.take_along_axis(both, pick, 1), np.take_along_axis(names, pick, 1)
            else:
                query, column = np.divmod(hits, len(block))
                owner = np.concatenate([np.repeat(np.arange(n), count), query])
                value = np.concatenate([best.reshape(-1), scores[query, column]])
                number = np.concatenate([rows.reshape(-1), column + start])
                order = np.lexsort((-value, owner))
                first = np.searchsorted(owner[order], np.arange(n))
                pick = order[first[:, None] + np.arange(count)]
                best, rows = value[pick], number[pick]
            floor = best.min(axis=1, keepdims=True)
        return floor[:, 0], rows

    def _best(self, queries: Floats, rows: Rows, k: int, exclude: Rows) -> tuple[Floats, Rows]:
        """The k best (q, k) of candidates (q, c) by their exact scores, -1 meaning no candidate."""
        rows = np.where(rows == exclude[:, None], -1, rows)
        if rows.shape[1] > 2 * (k + _MARGIN) and self._ann is not None:
            # Candidates of an index are many, and few of them matter: a float32 product sorts most of them out.
            rough = self._rough(queries, rows)
            keep = np.argpartition(-rough, k + _MARGIN, axis=1)[:, : k + _MARGIN]
            rows = np.take_along_axis(rows, keep, 1)
        scores = self._exact_scores(queries, rows)
        order = np.lexsort((rows, -scores), axis=-1)[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        missing = k - rows.shape[1]
        if missing > 0:
            scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
            rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        return scores, rows

    def _rough(self, queries: Floats, rows: Rows) -> Floats:
        """Cosines (q, c) of candidates by float32 products, -inf where there is none."""
        unit = _unit_rows(queries)
        out = np.empty(rows.shape, np.float32)
        step = max(1, _GATHER // rows[:1].size // self.n_features_in_)
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            there = self._take(np.maximum(block, 0).reshape(-1)).reshape(*block.shape, -1)
            out[start : start + step] = np.matmul(there, unit[start : start + step, :, None])[:, :, 0]
        out *= _inverse(self._norms[np.maximum(rows, 0)])
        out[rows < 0] = -np.inf
        return out

    def _exact_scores(self, queries: Floats, rows: Rows) -> Floats:
        """Scores (q, c) of candidates by float64 products, rounded; -inf where there is none."""
        wide = queries.astype(np.float64)
        lengths = np.sqrt((wide * wide).sum(axis=1))
        out = np.full(rows.size, -np.inf, np.float32)
        pairs = np.flatnonzero(rows.reshape(-1) >= 0)
        step = max(1, _GATHER // 4 // self.n_features_in_)
        for start in range(0, len(pairs), step):
            places = pairs[start : start + step]
            row, query = rows.reshape(-1)[places], places // rows.shape[1]
            value = (self._take(row).astype(np.float64) * wide[query]).sum(axis=1)
            if self.metric == "cosine":
                scale = self._norms[row] * lengths[query]
                value = np.divide(value, scale, out=np.zeros_like(value), where=scale > 0)
            out[places] = value
        return out.reshape(rows.shape)

    # --- rows -----------------------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[int, Floats]]:
        for start, part in zip(self._starts, self._parts, strict=True):
            for low in range(0, len(part), _ROW_BLOCK):
                yield start + low, part[low : low + _ROW_BLOCK]

    def _take(self, rows: Rows) -> Floats:
        """Embeddings (m, d) of row numbers."""
        if len(self._parts) == 1:
            taken: Floats = self._parts[0].take(rows, axis=0)  # five times faster than indexing, on a memory map
            return taken
        out = np.empty((len(rows), self.n_features_in_), np.float32)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(part_of).tolist():
            places = np.flatnonzero(part_of == number)
            out[places] = self._parts[number].take(rows[places] - self._starts[number], axis=0)
        return out

    def unit_rows(self, rows: Rows) -> Floats:
        """Embeddings (m, d) of row numbers, scaled to length 1."""
        return self._take(rows) * _inverse(self._norms[rows])[:, None]


def _steps(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to ``most``."""
    return sorted({step for i in range(most.bit_length()) for step in (2**i, 3 * 2**i // 2) if step <= most})


def _matrix(values: ArrayLike, name: str) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise UsageError("not a matrix of numbers", where=name, found=str(error)) from error
    if array.ndim != 2 or array.shape[1] == 0:
        raise UsageError("not a matrix", where=name, expected="shape (n, d)", found=f"shape {array.shape}")
    return array


def _finite(rows: Floats) -> Floats:
    if not np.isfinite(rows).all():
        raise UsageError("embeddings that are not finite", where="Q", hint="Repair or drop these rows.")
    return rows


def _inverse(lengths: NDArray[np.float64]) -> Floats:
    inverse: Floats = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0).astype(np.float32)
    return inverse


def _unit_rows(rows: Floats) -> Floats:
    return unit_rows(rows).astype(np.float32)
