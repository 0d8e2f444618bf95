"""Who is in the support and who is in the query: nested k-shot draws.

Every draw depends on ``(random_state, episode)`` alone, so that all heads see the same rows and every
comparison is paired. Draws are nested: the 1-shot support of an episode lies inside its 5-shot support.

*Sites* are what belongs together besides copies: images of one patient, camera, place or burst.
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

from featx._arrays import Index
from featx.errors import UsageError, listed, plural
from featx.evaluation.duplicates import dense
from featx.heads import alone, distinct_counts, of_one_class, site_pairs

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
        """The draw number ``episode`` of labels (n,) in 0 .. c-1 and copies (n,); too small classes stay out."""
        keys = np.random.default_rng([self.random_state, episode]).random(len(labels))
        order = np.argsort(keys, kind="stable")
        own, counts = alone(labels, groups, int(labels.max()) + 1)
        large = counts >= least_images(self.n_shots)
        own &= large[labels]
        queues = [order[own[order] & (labels[order] == c)] for c in np.flatnonzero(large)]
        support, query = _hold_out(queues, groups) if self.n_shots == "all" else _take(queues, groups, self.n_shots)
        return support[own[support]], query[own[query]]


class GroupKShotSplit(KShotSplit):
    """Scikit-learn splitter: as :class:`KShotSplit`, and no group has rows in support and query.

    Groups may hold rows of several classes. Of each episode, groups with a fifth of each class are held out. The
    support takes its rows from as many of the other groups as there are; the query is every group that the support has
    no row of. ``"all"`` takes all rows of the groups that are not held out.

    Parameters
    ----------
    n_shots, n_episodes, random_state : as of :class:`KShotSplit`.

    Notes
    -----
    A group with more than half of a class is never held out. A class that has rows in one group only is in no draw.
    """

    def __repr__(self) -> str:
        return f"Group{super().__repr__()}"

    def split(self, X: Any, y: ArrayLike, groups: ArrayLike | None = None) -> Iterator[tuple[Index, Index]]:
        """Yield (support, query) row numbers of each episode.

        Parameters
        ----------
        X : (n, d) rows, or None; equal rows are copies, which are drawn once.
        y : (n,) labels.
        groups : (n,) rows with the same value belong together; "" is a row by itself.

        Raises
        ------
        UsageError
            There are no groups, or they are too few or too unequal to hold any out.
        """
        if groups is None:
            raise UsageError("GroupKShotSplit takes groups", where="groups", expected="(n,) values")
        names, labels = np.unique(np.asarray(y), return_inverse=True)
        copies = dense(_equal_rows(X), len(labels))
        sites = joined_sites(np.asarray(groups), copies)
        class_names = [str(name) for name in names]
        plan_shots(labels, copies, class_names, shots=[self.n_shots], default=(), sites=sites)
        for episode in range(self.n_episodes):
            yield self.across(labels, copies, sites, episode)

    def across(self, labels: NDArray[np.integer], copies: Index, sites: Index, episode: int) -> tuple[Index, Index]:
        """The draw number ``episode`` of labels (n,) in 0 .. c-1, dense copies (n,) and sites (n,) that join them."""
        rng = np.random.default_rng([self.random_state, episode])
        keys = rng.random(len(labels))
        table, n_sites = _Sites.of(labels, copies, sites), int(sites.max()) + 1
        held = table.held_out(rng.permutation(n_sites))
        least = table.always_left
        own = table.own & ((least > 0) & (least >= (1 if self.n_shots == "all" else self.n_shots)))[labels]
        if self.n_shots == "all":
            return np.flatnonzero(own & ~held[sites]), np.flatnonzero(own & held[sites])
        order = np.argsort(keys, kind="stable")
        order = order[own[order] & ~held[sites[order]]]
        order = order[np.sort(np.unique(copies[order], return_index=True)[1])]  # of copies the first
        # First one of each site, then a second of each: as many sites as there are.
        pair = labels[order] * n_sites + sites[order]
        by_pair = np.argsort(pair, kind="stable")
        starts = np.flatnonzero(np.diff(pair[by_pair], prepend=-1))
        place = np.empty(len(order), dtype=np.intp)
        place[by_pair] = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
        order = order[np.argsort(place, kind="stable")]
        support = np.concatenate([order[labels[order] == c][: self.n_shots] for c in np.unique(labels[own])])
        touched = np.zeros(n_sites, dtype=np.bool_)
        touched[sites[support]] = True
        return np.sort(support), np.flatnonzero(own & ~touched[sites])


def draw(
    n_shots: Shots, labels: NDArray[np.integer], groups: Index, sites: Index | None, *, seeds: tuple[int, int]
) -> tuple[Index, Index]:
    """Support and query of a draw, which share no site where ``sites`` (n,) are given; others as of ``episode``.

    ``seeds`` are the ``random_state`` and the episode.
    """
    random_state, episode = seeds
    if sites is None:
        return KShotSplit(n_shots, random_state=random_state).episode(labels, groups, episode)
    return GroupKShotSplit(n_shots, random_state=random_state).across(labels, groups, sites, episode)


def joined_sites(values: ArrayLike, copies: Index) -> Index:
    """Dense numbers (n,) of what belongs together: rows with the same value, and copies, however they are connected.

    Parameters
    ----------
    values : (n,) texts, of which "" is none, or numbers, of which negative ones are none.
    copies : (n,) dense numbers of copies.
    """
    given = np.asarray(values)
    if given.shape != copies.shape:
        raise UsageError("groups and labels do not fit", expected=copies.shape, found=given.shape)
    some = given >= 0 if given.dtype.kind in "iuf" else given.astype(np.str_) != ""
    numbers = np.unique(given[some], return_inverse=True)[1]
    n, rows = len(copies), np.flatnonzero(some)
    # Rows, copies and values are the points; each row is joined to its own.
    ends = np.concatenate([n + copies, n + int(copies.max(initial=-1)) + 1 + numbers])
    starts = np.concatenate([np.arange(n), rows])
    size = int(max(ends.max(initial=0), n)) + 1
    graph = sparse.coo_matrix((np.ones(len(ends), np.int8), (starts, ends)), shape=(size, size))
    found = connected_components(graph, directed=False)[1][:n]
    return np.unique(found, return_inverse=True)[1]


@dataclass(frozen=True)
class _Sites:
    """How many different images each site has of each class: pairs of both, those of one site together.

    Attributes
    ----------
    own : (n,) which rows show an image of one class; the others are in no draw.
    site, classes, counts : (p,) of each pair.
    totals : (c,) different images of each class.
    """

    own: NDArray[np.bool_]
    site: Index
    classes: Index
    counts: Index
    totals: Index

    @classmethod
    def of(cls, labels: NDArray[np.integer], copies: Index, sites: Index, n_classes: int | None = None) -> _Sites:
        """Those of labels (n,), dense copies (n,) and dense sites (n,)."""
        own = of_one_class(labels, copies)
        first = np.unique(copies[own], return_index=True)[1]
        rows = np.flatnonzero(own)[first]
        starts, classes, counts = site_pairs(labels[rows], sites[rows])
        site = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        n = int(labels.max()) + 1 if n_classes is None else n_classes
        totals = np.bincount(classes, weights=counts, minlength=n).astype(np.intp)
        return cls(own, site, classes, counts, totals)

    @property
    def of_class(self) -> Index:
        """How many sites (c,) have each class."""
        return np.bincount(self.classes, minlength=len(self.totals))

    @property
    def always_left(self) -> Index:
        """Images (c,) of each class that are never held out; 0 where none can be."""
        usual = np.zeros(len(self.totals), dtype=np.intp)  # the largest site that has not the greater half
        fits = 2 * self.counts <= self.totals[self.classes]
        np.maximum.at(usual, self.classes[fits], self.counts[fits])
        return np.where(usual > 0, np.minimum((_LEAST_LEFT * self.totals).astype(np.intp), self.totals - usual), 0)

    def held_out(self, order: Index) -> NDArray[np.bool_]:
        """Which sites (s,) are held out: in this order, until they have a fifth of each class."""
        least, of_class = self.always_left, self.of_class
        held = np.zeros(len(order), dtype=np.bool_)
        # Sites of the rarest classes first: others can be had elsewhere.
        rarest = np.full(len(order), len(order) + 1)
        np.minimum.at(rarest, self.site, of_class[self.classes])
        order = order[np.argsort(rarest[order], kind="stable")]
        starts = np.searchsorted(self.site, np.arange(len(held) + 1))
        left, wanted = self.totals.copy(), (1 - HOLD_OUT) * self.totals
        lacking = (least > 0) & (left > wanted)
        for site in order.tolist():
            there = slice(starts[site], starts[site + 1])
            classes = self.classes[there]
            judged = least[classes] > 0
            after = left[classes] - self.counts[there]
            if lacking[classes].any() and (after >= least[classes])[judged].all():
                held[site] = True
                left[classes] = after
                lacking[classes] &= after > wanted[classes]
                if not lacking.any():
                    break
        return held


_LEAST_LEFT = 0.7
"""Part of each class that is left to draw the support from, at the least."""


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


def drawable(labels: NDArray[np.integer], groups: Index, sites: Index | None, n_classes: int) -> Index:
    """Different images (n_classes,) of each class that draws are made from, with the one that the query needs.

    With ``sites`` (n,), one more than are left in the worst case when sites are held out; 0 where none can be.
    """
    if sites is None:
        return distinct_counts(labels, groups, n_classes)
    least = _Sites.of(labels, groups, sites, n_classes).always_left
    return np.where(least > 0, least + 1, 0)


def _check_sites(
    labels: NDArray[np.integer], copies: Index, sites: Index, class_names: Sequence[str], group_name: str
) -> None:
    """UsageError where no group can be held out of two classes, with the reason."""
    table = _Sites.of(labels, copies, sites, len(class_names))
    if (table.always_left > 0).sum() >= 2:
        return
    many, n_sites = plural(2, group_name).partition(" ")[2], len(np.unique(table.site))
    if n_sites < 2:
        raise UsageError(
            f"too few {many} to hold any out", expected=f"photos of each class from two {many} or more",
            found=plural(n_sites, group_name), hint="Compare without --across groups.",
        )  # fmt: skip
    alone = [name for name, n in zip(class_names, table.of_class.tolist(), strict=True) if n == 1]
    raise UsageError(
        f"{many} coincide with classes, so what a new {group_name} would give cannot be told",
        expected=f"photos of each class from two {many} or more",
        found=f"one {group_name} of {', '.join(map(repr, alone[:_NAMED]))}",
        hint="Group by something else, or compare without --across groups.",
    )


def _site_notes(
    labels: NDArray[np.integer], copies: Index, sites: Index, class_names: Sequence[str], group_name: str
) -> list[str]:
    """Sentences on classes that cannot be judged on other sites, and on sites that are never held out."""
    table = _Sites.of(labels, copies, sites, len(class_names))
    least, counts = table.always_left, table.totals
    many = plural(2, group_name).partition(" ")[2]
    notes = []
    out = [name for name, n in zip(class_names, least.tolist(), strict=True) if n == 0]
    if out:
        named = listed([repr(name) for name in out], _NAMED)
        notes.append(f"Left out, as no {group_name} can be held out of them: {named}.")
    giants = np.flatnonzero((2 * table.counts > counts[table.classes]) & (least[table.classes] > 0))
    if len(giants):
        size, c = int(table.counts[giants[0]]), int(table.classes[giants[0]])
        notes.append(
            f"One {group_name} has {size} of the {plural(int(counts[c]), 'image')} of {class_names[c]!r}: "
            f"it is always learnt from, and only the other {many} are judged."
        )
    return notes


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
    sites: Index | None = None,
    group_name: str = "group",
) -> tuple[list[Shots], list[str]]:
    """Which n_shots to compare at, and sentences that name the classes that are too small for some of them.

    A class takes part where one of its images is left for the query. What is asked for needs two such classes; a size
    of the ``default``, which people take for the whole set, half of them. With ``sites`` (n,), of which one is called
    ``group_name``, draws are those of :class:`GroupKShotSplit`.

    Raises
    ------
    UsageError
        Fewer than two classes have the images that it takes.
    """
    if len(class_names) < 2:
        check_shots(labels, groups, 1, class_names)
    if sites is not None:
        _check_sites(labels, groups, sites, class_names, group_name)
    counts = drawable(labels, groups, sites, len(class_names))
    wanted = list(dict.fromkeys(shots or [n for n in default if reached(counts) >= least_images(n)]))
    for n_shots in wanted or [1]:
        if (counts >= least_images(n_shots)).sum() < 2:
            check_shots(labels, groups, n_shots, class_names)
            raise UsageError(
                f"too few images to draw {shots_label(n_shots)} and hold a {group_name} out",
                found=f"{int(np.sort(counts)[-2]) - 1} of the second largest class", hint="Ask for fewer shots.",
            )  # fmt: skip
    notes = [] if sites is None else _site_notes(labels, groups, sites, class_names, group_name)
    missing = [n for n in default if n not in wanted] if shots is None else []
    if missing:
        name = class_names[int(np.flatnonzero(counts == reached(counts))[0])]
        least = plural(reached(counts), "different image")
        needed = least_images(missing[0])
        notes.append(
            f"n_shots {_listed(missing)} left out: class {name!r} has {least}, and n_shots {missing[0]} takes {needed}."
        )
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
