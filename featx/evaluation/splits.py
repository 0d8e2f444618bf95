"""Who is in the support and who is in the query: nested k-shot draws.

Every draw depends on ``(random_state, episode)`` alone, so that all heads see the same rows and every
comparison is paired. Draws are nested: the 1-shot support of an episode lies inside its 5-shot support.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featx._arrays import Index
from featx.errors import UsageError, plural
from featx.evaluation.duplicates import dense
from featx.heads import alone, distinct_counts, of_one_class

Shots: TypeAlias = int | Literal["all"]

#: Part of each class that is held out when ``n_shots`` is "all".
HOLD_OUT = 0.2

_NAMED = 5
"""Classes that a sentence names at most."""


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
        grouping = dense(_equal_rows(X) if groups is None else groups, len(labels))
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
