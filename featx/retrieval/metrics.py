"""How good is the search? Every labelled image queries all the others, and finds its own class, or does not.

recall@k is the share of queries with at least one image of their class among the first k; precision@k the share of the
first k that is of the query's class (of as many as there are, in a smaller gallery); average precision the mean, over
all images of the class, of the precision at their rank, over the complete ranking (Manning, Raghavan and Schütze,
2008, "Introduction to information retrieval", chapter 8), and mAP its mean over queries.

The query itself and its copies are left out of its ranking: neither right nor wrong. Equal scores are ranked by row
number (by id). Unlabelled images never count as right; they do take ranks. Images whose class has no other image are no
queries, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featx.errors import UsageError
from featx.evaluation import Interval, unseen_share
from featx.heads import unit_rows
from featx.retrieval.postprocess import Postprocess, expand_queries

KS = (1, 5, 10)
N_BOOT = 2000
_BLOCK_SCORES = 2**22
_ROW_BLOCK = 8192

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scores:
    """Means over queries with 95 % intervals.

    Parameters
    ----------
    queries : how many.
    recall_at_k, precision_at_k : for each k.
    mean_average_precision : over complete rankings.
    """

    queries: int
    recall_at_k: dict[int, Interval]
    precision_at_k: dict[int, Interval]
    mean_average_precision: Interval

    def to_json(self) -> dict[str, Any]:
        """Numbers under the names of the metrics, and their limits under ``intervals``."""
        named = {
            **{f"recall_at_{k}": value for k, value in self.recall_at_k.items()},
            **{f"precision_at_{k}": value for k, value in self.precision_at_k.items()},
            "map": self.mean_average_precision,
        }
        return {
            "queries": self.queries,
            "recall_at_k": {str(k): value.mean for k, value in self.recall_at_k.items()},
            "precision_at_k": {str(k): value.mean for k, value in self.precision_at_k.items()},
            "map": self.mean_average_precision.mean,
            "intervals": {name: {"low": value.low, "high": value.high} for name, value in named.items()},
        }


@dataclass(frozen=True)
class RetrievalResult:
    """What :func:`evaluate_retrieval` found.

    Parameters
    ----------
    overall, per_class : metrics over all queries, and over those of each class.
    images : rows of the gallery.
    unlabelled : rows without a label, which are no queries.
    lonely : labelled rows whose class has no other image than copies of them, which are no queries either.
    sampled_from : how many queries there would have been without ``max_queries``.
    exact_duplicates : rows that repeat the content of an earlier row.
    queries_with_copies : queries that had copies left out of their ranking.
    """

    overall: Scores
    per_class: dict[str, Scores]
    images: int
    unlabelled: int
    lonely: int
    sampled_from: int
    exact_duplicates: int
    queries_with_copies: int
    options: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **self.overall.to_json(),
            "interval": "95 %, bootstrap over queries (copies drawn together), for this gallery",
            "per_class": {name: scores.to_json() for name, scores in self.per_class.items()},
            "images": self.images,
            "unlabelled": self.unlabelled,
            "queries_without_relevant": self.lonely,
            "queries_sampled_from": self.sampled_from,
            "exact_duplicates": self.exact_duplicates,
            "queries_with_copies": self.queries_with_copies,
            "options": self.options,
        }


def evaluate_retrieval(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    class_names: Sequence[str],
    groups: ArrayLike | None = None,
    ks: Sequence[int] = KS,
    center: bool = False,
    whiten: int | None = None,
    expand: int = 0,
    max_queries: int | None = None,
    random_state: int = 0,
    progress: Progress | None = None,
) -> RetrievalResult:
    """Let every labelled row query all the others.

    Parameters
    ----------
    embeddings : (n, d), finite.
    labels : (n,) rows of ``class_names``, -1 for unlabelled.
    groups : (n,) rows with the same value are copies of each other; by default there are none.
    ks : the k of recall@k and precision@k.
    center, whiten : see :class:`featx.retrieval.postprocess.Postprocess`; learnt on all rows, without labels.
    expand : neighbours that each query is expanded by; 0 for none.
    max_queries : draw so many queries at most, where more would take too long.
    random_state : seed of that draw and of the bootstrap.

    Raises
    ------
    UsageError
        No image has another one of its class.
    """
    rows = Postprocess(center=center, whiten=whiten).fit(embeddings).transform(embeddings)
    target = np.asarray(labels, dtype=np.int64)
    given = np.arange(len(rows)) if groups is None else np.asarray(groups)
    copies = np.unique(given, return_inverse=True)[1]
    labelled = np.flatnonzero(target >= 0)
    relevant = _relevant(target, copies, labelled)
    queries, lonely = labelled[relevant > 0], int((relevant == 0).sum())
    if not len(queries):
        raise UsageError(
            "nothing to evaluate",
            expected="at least one class with two different images",
            found=f"{len(labelled)} labelled images",
        )
    total = len(queries)
    if max_queries is not None and total > max_queries:
        queries = np.sort(np.random.default_rng(random_state).permutation(queries)[:max_queries])
    table = _measure(rows, target, copies, queries, ks=ks, expand=expand, progress=progress)
    sizes = np.bincount(copies)
    group = copies[queries]
    per_class = {
        name: _scores(table[chosen], group[chosen], ks, random_state)
        for number, name in enumerate(class_names)
        if (chosen := target[queries] == number).any()
    }
    return RetrievalResult(
        overall=_scores(table, group, ks, random_state),
        per_class=per_class,
        images=len(rows),
        unlabelled=int((target < 0).sum()),
        lonely=lonely,
        sampled_from=total,
        exact_duplicates=len(rows) - len(sizes),
        queries_with_copies=int((sizes[group] > 1).sum()),
        options={"center": center, "whiten": whiten, "expand": expand},
    )


def _relevant(labels: NDArray[np.int64], copies: NDArray[np.intp], queries: NDArray[np.intp]) -> NDArray[np.intp]:
    """How many rows are of each query's class, and no copies of it."""
    pairs = np.column_stack([labels, copies])
    _, number, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    of_class = np.bincount(labels[labels >= 0], minlength=1)
    relevant: NDArray[np.intp] = of_class[labels[queries]] - counts[number.reshape(-1)[queries]]
    return relevant


def _measure(
    rows: NDArray[np.float32],
    labels: NDArray[np.int64],
    copies: NDArray[np.intp],
    queries: NDArray[np.intp],
    *,
    ks: Sequence[int],
    expand: int,
    progress: Progress | None,
) -> Floats:
    """Table (q, 2 len(ks) + 1) of recall@k, precision@k and average precision of each query."""
    relevant = _relevant(labels, copies, queries)
    table = np.empty((len(queries), 2 * len(ks) + 1))
    step = max(1, _BLOCK_SCORES // len(rows))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        left_out = copies[None, :] == copies[block][:, None]
        wanted = rows[block].astype(np.float64)
        if expand:
            order, scores = _ranking(wanted, rows, left_out)
            near = order[:, :expand]
            value = np.where(np.take_along_axis(left_out, near, 1), -np.inf, np.take_along_axis(scores, near, 1))
            wanted = unit_rows(expand_queries(wanted, value, rows[near]))
        order = _ranking(wanted, rows, left_out)[0]
        right = (labels[order] == labels[block][:, None]) & ~np.take_along_axis(left_out, order, 1)
        there = len(rows) - left_out.sum(axis=1)
        hits = np.cumsum(right, axis=1)
        for column, k in enumerate(ks):
            at = hits[:, min(k, len(rows)) - 1]
            table[start : start + step, column] = at > 0
            table[start : start + step, len(ks) + column] = at / np.minimum(k, there)
        precision = np.where(right, hits / np.arange(1, len(rows) + 1), 0.0).sum(axis=1)
        table[start : start + step, -1] = precision / relevant[start : start + step]
        if progress is not None:
            progress(min(start + step, len(queries)), len(queries))
    return table


def _ranking(
    queries: Floats, rows: NDArray[np.float32], left_out: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Row numbers (q, n) best first, ties by row number, those left out at the end; and the scores (q, n).

    Scores are float64 products rounded to float32, as those of :class:`featx.retrieval.neighbours.GalleryIndex`.
    """
    scores = np.empty((len(queries), len(rows)), np.float32)
    for start in range(0, len(rows), _ROW_BLOCK):
        scores[:, start : start + _ROW_BLOCK] = queries @ rows[start : start + _ROW_BLOCK].astype(np.float64).T
    # One integer a score: its bits in an order that sorts, best first, above the row number. Sorting these is several
    # times faster than a stable argsort of the scores. Adding 0 makes -0 a 0.
    bits = (scores + np.float32(0)).view(np.uint32)
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    keys = (~ascending).astype(np.uint64) << np.uint64(32)
    keys[left_out] = np.uint64(0xFFFFFFFF) << np.uint64(32)
    keys |= np.arange(len(rows), dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.intp), scores


def _scores(table: Floats, groups: NDArray[np.intp], ks: Sequence[int], random_state: int) -> Scores:
    means = table.mean(axis=0)
    low, high = _bootstrap(table, groups, random_state)
    # Where every query is right (or wrong) the bootstrap sees no spread, which says nothing.
    blind = unseen_share(len(np.unique(groups)))
    low, high = np.where(means >= 1, 1 - blind, low), np.where(means <= 0, blind, high)
    each = [Interval(float(m), float(a), float(b)) for m, a, b in zip(means, low, high, strict=True)]
    return Scores(
        queries=len(table),
        recall_at_k=dict(zip(ks, each[: len(ks)], strict=True)),
        precision_at_k=dict(zip(ks, each[len(ks) : -1], strict=True)),
        mean_average_precision=each[-1],
    )


def _bootstrap(table: Floats, groups: NDArray[np.intp], random_state: int) -> tuple[Floats, Floats]:
    """95 % limits of the column means by the percentile bootstrap (Efron, 1979); copies are drawn together."""
    dense = np.unique(groups, return_inverse=True)[1]
    counts = np.bincount(dense).astype(np.float64)
    sums = np.stack([np.bincount(dense, weights=column) for column in table.T], axis=1)
    random = np.random.default_rng(random_state)
    draws = np.empty((N_BOOT, table.shape[1]))
    step = max(1, _BLOCK_SCORES // len(counts))
    for start in range(0, N_BOOT, step):
        size = min(step, N_BOOT - start)
        times = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=size)
        draws[start : start + size] = (times @ sums) / (times @ counts)[:, None]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return low, high
