"""Who is in the support and who is in the query: nested k-shot draws, folds, duplicates.

Every draw depends on ``(random_state, episode)`` alone, so that all heads see the same rows and every
comparison is paired. Draws are nested: the 1-shot support of an episode lies inside its 5-shot support.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from featx._arrays import NEAR, Index
from featx.errors import UsageError, plural
from featx.heads import alone, distinct_counts, of_one_class

Shots: TypeAlias = int | Literal["all"]

#: Part of each class that is held out when ``n_shots`` is "all".
HOLD_OUT = 0.2

ALIKE = 0.9
"""Cosine from which on pairs that do not count as copies are reported: copies saved anew often lie there."""

_TILE = 1024
"""Rows that are compared with 16 times as many at once: 64 MB of cosines, however large the gallery."""

_NAMED = 5
"""Classes that a sentence names at most."""

_MAX_PAIRS = 10_000_000
"""Pairs of near duplicates that are kept before they become groups: n equal images make n * n / 2 of them."""


def shots_label(n_shots: Shots) -> str:
    """The words for an n_shots: "1 shot", "5 shots", "all but a fifth"."""
    return "all but a fifth" if n_shots == "all" else plural(n_shots, "shot")


def _listed(shots: Sequence[Shots]) -> str:
    return ", ".join(map(str, shots))


class KShotSplit:
    """Scikit-learn splitter: ``n_shots`` rows of each class are the support, all the others the query.

    Parameters
    ----------
    n_shots : rows of each class in the support, or ``"all"``: then a fifth of each class is the query.
    n_episodes : how many draws.
    random_state : seed; episode ``e`` depends on ``(random_state, e)`` only.

    Notes
    -----
    Rows that share a group (duplicates) are drawn once: one of them goes to the support, the others are
    left out of the query. ``"all"`` keeps whole groups on one side. An image that several classes have is in
    no draw: which of its labels is right is not known.
    """

    def __init__(self, n_shots: Shots, *, n_episodes: int = 20, random_state: int = 0) -> None:
        self.n_shots = n_shots
        self.n_episodes = n_episodes
        self.random_state = random_state

    def __repr__(self) -> str:
        return f"KShotSplit({self.n_shots!r}, n_episodes={self.n_episodes}, random_state={self.random_state})"

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Number of episodes."""
        return self.n_episodes

    def split(self, X: Any, y: ArrayLike, groups: ArrayLike | None = None) -> Iterator[tuple[Index, Index]]:
        """Yield (support, query) row numbers of each episode.

        Parameters
        ----------
        X : (n, d) rows, or None; looked at for copies only, and only without ``groups``.
        y : (n,) labels.
        groups : (n,) rows with the same value are copies of each other; by default equal rows of X are.

        Raises
        ------
        UsageError
            There are fewer than two classes, or a class has too few rows.
        """
        names, labels = np.unique(np.asarray(y), return_inverse=True)
        grouping = _dense(_equal_rows(X) if groups is None else groups, len(labels))
        check_shots(labels, grouping, self.n_shots, [str(name) for name in names])
        for episode in range(self.n_episodes):
            yield self.episode(labels, grouping, episode)

    def episode(self, labels: NDArray[np.integer], groups: Index, episode: int) -> tuple[Index, Index]:
        """The draw number ``episode`` of labels (n,) in 0 .. c-1 and dense groups (n,); too small classes stay out."""
        keys = np.random.default_rng([self.random_state, episode]).random(len(labels))
        order = np.argsort(keys, kind="stable")
        own, counts = alone(labels, groups, int(labels.max()) + 1)
        large = counts >= least_images(self.n_shots)
        own &= large[labels]
        queues = [order[own[order] & (labels[order] == c)] for c in np.flatnonzero(large)]
        support, query = _hold_out(queues, groups) if self.n_shots == "all" else _take(queues, groups, self.n_shots)
        return support[own[support]], query[own[query]]


def _take(queues: Sequence[Index], groups: Index, n_shots: int) -> tuple[Index, Index]:
    taken = np.zeros(int(groups.max()) + 1, dtype=np.bool_)
    support: list[int] = []
    heads = [iter(queue) for queue in queues]
    # Round by round, so that what a smaller n_shots draws is a prefix even where classes share a group.
    for _ in range(n_shots):
        for head in heads:
            row = next((int(row) for row in head if not taken[groups[row]]), None)
            if row is None:
                raise UsageError(
                    "a class runs out of distinct images because copies of them carry another label",
                    hint="Remove the duplicates with conflicting labels, or ask for fewer shots.",
                )
            taken[groups[row]] = True
            support.append(row)
    query = np.flatnonzero(~taken[groups])
    return np.sort(np.array(support, dtype=np.intp)), query


def _hold_out(queues: Sequence[Index], groups: Index) -> tuple[Index, Index]:
    held = np.zeros(int(groups.max()) + 1, dtype=np.bool_)
    kept = np.zeros_like(held)
    # From the end of the queue: few-shot supports are drawn from its start, and stay inside "all".
    for queue in queues:
        own = list(dict.fromkeys(groups[queue].tolist()))
        n_query = max(1, round(HOLD_OUT * len(own)))
        held[own[-n_query:]] = True
        kept[own[:-n_query]] = True
    query = np.flatnonzero(held[groups] & ~kept[groups])
    return np.flatnonzero(kept[groups]), query


def _dense(groups: ArrayLike | None, n: int) -> Index:
    """Groups (n,) numbered 0, 1, ... in the order of their first row; where nothing repeats, 0 .. n-1."""
    if groups is None:
        return np.arange(n)
    _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    return np.unique(first[inverse.reshape(-1)], return_inverse=True)[1].reshape(-1)


def _equal_rows(X: Any) -> NDArray[np.void] | None:
    """A hash (n,) of each row of an array; None for what is no array of rows."""
    if not (isinstance(X, np.ndarray) and X.ndim > 1):
        return None
    return np.array([hashlib.sha256(row.tobytes()).digest() for row in X], dtype="V32")


def check_shots(labels: NDArray[np.integer], groups: Index, n_shots: Shots, class_names: Sequence[str]) -> None:
    """Refuse a draw that cannot be made, naming the class and both numbers."""
    if len(class_names) < 2:
        found = f"only {class_names[0]!r}" if class_names else "no labelled image"
        raise UsageError("comparing heads takes at least two classes", expected="2 classes", found=found)
    if n_shots != "all" and n_shots < 1:
        raise UsageError("n_shots must be at least 1", found=n_shots)
    counts = distinct_counts(labels, groups, len(class_names))
    smallest = int(counts.argmin())
    needed = least_images(n_shots)
    if counts[smallest] < needed:
        copies = " once copies are counted once" if (labels == smallest).sum() > counts[smallest] else ""
        shared = ((labels == smallest) & ~of_one_class(labels, groups)).sum()
        copies = f", as {shared} are in other classes too (featx duplicates lists them)" if shared else copies
        shots = "a support and a query" if n_shots == "all" else f"{plural(n_shots, 'shot')} and one query image"
        raise UsageError(
            f"class {class_names[smallest]!r} has too few images",
            expected=f"at least {needed} for {shots}",
            found=f"{counts[smallest]}{copies}",
            hint="Add images, or extract the others without this class."
            if counts[smallest] < 2
            else "Ask for fewer shots, add images, or extract the others without this class.",
        )


def least_images(n_shots: Shots) -> int:
    """Different images that a class needs for a draw that leaves one for the query."""
    return 2 if n_shots == "all" else n_shots + 1


def reached(counts: NDArray[np.integer]) -> int:
    """Number of different images that half of the classes (c,) have, and two of them at the least."""
    return int(np.sort(counts)[::-1][max(2, (len(counts) + 1) // 2) - 1])


def plan_shots(
    labels: NDArray[np.integer],
    groups: Index,
    class_names: Sequence[str],
    *,
    shots: Sequence[Shots] | None,
    default: Sequence[Shots],
) -> tuple[list[Shots], list[str]]:
    """Which n_shots to compare at, and sentences that name the classes that are too small for some of them.

    A class takes part where one of its images is left for the query. What is asked for needs two such classes; a size
    of the ``default``, which people take for the whole set, half of them.

    Raises
    ------
    UsageError
        Fewer than two classes have the images that it takes.
    """
    counts = distinct_counts(labels, groups, len(class_names))
    if len(class_names) < 2:
        check_shots(labels, groups, 1, class_names)
    wanted = list(dict.fromkeys(shots or [n for n in default if reached(counts) >= least_images(n)]))
    for n_shots in wanted or [1]:
        if (counts >= least_images(n_shots)).sum() < 2:
            check_shots(labels, groups, n_shots, class_names)
    notes = []
    missing = [n for n in default if n not in wanted] if shots is None else []
    if missing:
        name = class_names[int(np.flatnonzero(counts == reached(counts))[0])]
        least = plural(reached(counts), "different image")
        notes.append(f"n_shots {_listed(missing)} left out: class {name!r} has only {least}.")
    lacking = [n for n in wanted if counts.min() < least_images(n)]
    if lacking:
        small = [i for i in np.argsort(counts, kind="stable") if counts[i] < max(map(least_images, lacking))]
        named = [f"{class_names[i]!r} has only {plural(int(counts[i]), 'different image')}" for i in small[:_NAMED]]
        more = [plural(len(small) - _NAMED, "more class")] if len(small) > _NAMED else []
        notes.append(
            f"At n_shots {_listed(lacking)} only the classes with enough images are compared: "
            f"{', '.join([*named, *more])}. Add photos there first."
        )
    return wanted, notes


@dataclass(frozen=True)
class Duplicates:
    """Copies among the rows.

    Attributes
    ----------
    groups : (n,) dense numbers; rows with the same number are copies of each other.
    exact : rows that repeat the bytes of an earlier row.
    near : further rows that are nearly the same as an earlier one.
    n_groups : groups of two or more rows.
    alike : pairs of different images that have a cosine of :data:`ALIKE` or more all the same.
    threshold : cosine from which on rows counted as near copies; None where none were looked for.
    """

    groups: Index
    exact: int
    near: int
    n_groups: int
    alike: int
    threshold: float | None

    @property
    def sentence(self) -> str:
        """What was found and what became of it, or ""; no more is claimed than was looked for."""
        if not self.n_groups:
            return ""
        groups = plural(self.n_groups, "group")
        if self.threshold is None:
            return (
                f"{plural(self.exact, 'exact duplicate')} in {groups}, each on one side; near ones were not looked for."
            )
        counted = f"{self.exact} exact and {plural(self.near, 'near duplicate')}"
        return f"{counted} in {groups}: no group is in support and query at once."

    @property
    def notes(self) -> list[str]:
        """A sentence on pairs that may be copies unknown as such, or none."""
        if not self.alike:
            return []
        return [
            f"{plural(self.alike, 'more pair')} of images with a cosine above {ALIKE:g}: if these are copies saved "
            f"anew, accuracy looks too high. featx duplicates --threshold {ALIKE:g} lists them."
        ]

    def to_json(self) -> dict[str, int]:
        """Counts as ``summary.json`` has them."""
        return {"exact": self.exact, "near": self.near, "groups": self.n_groups}


def find_duplicates(
    embeddings: NDArray[np.floating], groups: ArrayLike | None = None, *, threshold: float | None = NEAR
) -> Duplicates:
    """Group exact copies (given as ``groups``, e.g. of equal digests) and near ones by their embeddings.

    Parameters
    ----------
    embeddings : (n, d), finite.
    groups : (n,) rows with the same value are exact copies; by default none are.
    threshold : rows with at least this cosine are near duplicates; None looks for none. Similarity is
        taken as transitive.
    """
    n = len(embeddings)
    exact = _dense(groups, n)
    n_exact = int(exact.max()) + 1 if n else 0
    joined, alike = exact, 0
    if threshold is not None and n:
        first = np.unique(exact, return_index=True)[1]
        near, alike = _near(embeddings if n_exact == n else embeddings[first], threshold)
        joined = near[exact]
    sizes = np.bincount(joined) if n else np.zeros(0, dtype=np.intp)
    return Duplicates(joined, n - n_exact, n_exact - len(sizes), int((sizes > 1).sum()), alike, threshold)


def _pairs(rows: NDArray[np.floating], threshold: float) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """Pairs (2, m) of rows with at least this cosine, and their cosines (m,), tile by tile."""
    length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    scale = 1.0 / np.where(length > 0, length, 1.0).astype(np.float32)
    for start in range(0, len(rows), _TILE):
        here = np.asarray(rows[start : start + _TILE], dtype=np.float32) * scale[start : start + _TILE, None]
        for other in range(start, len(rows), 16 * _TILE):
            # Scaled after the product: the embeddings may be large, and are not copied.
            scores = here @ np.asarray(rows[other : other + 16 * _TILE], dtype=np.float32).T
            scores *= scale[other : other + 16 * _TILE]
            left, right = np.nonzero(scores >= threshold)
            pairs = np.stack([left + start, right + other])
            once = pairs[0] < pairs[1]
            yield pairs[:, once], scores[left[once], right[once]]


def _near(rows: NDArray[np.floating], threshold: float) -> tuple[Index, int]:
    """Groups (n,) of near copies; and how many pairs of different groups, by their first rows, are alike.

    Of more than :data:`_MAX_PAIRS` pairs, those that become copies by way of later ones are counted among the alike.
    """
    groups: Index = np.arange(len(rows))
    near: list[NDArray[np.intp]] = []
    others: list[NDArray[np.intp]] = []
    alike = waiting = 0
    for pairs, scores in _pairs(rows, min(threshold, ALIKE)):
        close = scores >= threshold
        near.append(pairs[:, close])
        others.append(pairs[:, ~close & (scores >= ALIKE)])
        waiting += near[-1].shape[1] + others[-1].shape[1]
        if waiting > _MAX_PAIRS:
            groups = _join(groups, near)
            alike += _between(groups, others)
            near, others, waiting = [], [], 0
    groups = _join(groups, near)
    return groups, alike + _between(groups, others)


def _between(groups: Index, pairs: Sequence[NDArray[np.intp]]) -> int:
    """How many of the pairs are of the first rows of their groups."""
    first = np.zeros(len(groups), dtype=np.bool_)
    first[np.unique(groups, return_index=True)[1]] = True
    return sum(int(first[each].all(axis=0).sum()) for each in pairs)


def _join(groups: Index, pairs: Sequence[NDArray[np.intp]]) -> Index:
    """Groups (n,) after those with a pair of rows in common have become one; dense, in the order of their first row."""
    ends = groups[np.concatenate([np.empty((2, 0), dtype=np.intp), *pairs], axis=1)]
    graph = sparse.coo_array((np.ones(ends.shape[1], dtype=np.int8), (ends[0], ends[1])), shape=(len(groups),) * 2)
    return _dense(connected_components(graph, directed=False)[1][groups], len(groups))
