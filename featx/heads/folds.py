"""Folds inside a support: stratified, with whole groups of copies, and how many different images per class has.

*Sites* are what belongs together besides copies: images of one patient, camera, place or burst.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index


def of_one_class(labels: NDArray[np.integer], groups: Index) -> NDArray[np.bool_]:
    """Which rows (n,) show an image that no other class has."""
    return alone(labels, groups, int(labels.max(initial=0)) + 1)[0]


def alone(labels: NDArray[np.integer], groups: Index, n_classes: int) -> tuple[NDArray[np.bool_], Index]:
    """Which rows (n,) show an image that no other class has, and how many such images each class (n_classes,) has."""
    group, label = np.divmod(np.unique(groups * n_classes + labels), n_classes)  # each pair of them once
    single = np.bincount(group) == 1
    return single[groups], np.bincount(label[single[group]], minlength=n_classes)


def distinct_counts(labels: NDArray[np.integer], groups: Index, n_classes: int) -> Index:
    """Number of different images that each class (n_classes,) has alone, copies counted once."""
    return alone(labels, groups, n_classes)[1]


def site_pairs(labels: NDArray[np.integer], sites: Index) -> tuple[Index, Index, Index]:
    """Which classes each site has, and how many rows of each.

    Parameters
    ----------
    labels, sites : (n,) numbers from 0 on; of sites there is each.

    Returns
    -------
    starts (s + 1,), classes (p,), counts (p,) : those of site i are at ``starts[i]`` to ``starts[i + 1]``.
    """
    n_classes = int(labels.max(initial=0)) + 1
    pairs, counts = np.unique(sites * n_classes + labels, return_counts=True)
    site, classes = np.divmod(pairs, n_classes)
    starts = np.searchsorted(site, np.arange(int(sites.max(initial=-1)) + 2))
    return starts, classes, counts


def site_folds(
    labels: NDArray[np.integer], sites: Index, n_folds: int, random_state: int | Sequence[int]
) -> Index | None:
    """Fold (n,) of each row, with whole sites, each of which may hold images of several classes.

    Sites go, those of the rarest classes and large ones first, to the fold that has least of their classes.
    ``n_folds`` is lowered to the number of sites of the class that has fewest.

    Parameters
    ----------
    labels : (n,) in 0 .. c-1, each of them there.
    sites : (n,) rows with the same number stay in one fold.

    Returns
    -------
    None where a class would be in one fold alone, so that nothing could be learnt of it without that fold.
    """
    sites = np.unique(sites, return_inverse=True)[1]
    starts, classes, counts = site_pairs(labels, sites)
    n_sites, n_classes = len(starts) - 1, int(labels.max()) + 1
    with_class = np.bincount(classes, minlength=n_classes)
    n_folds = min(n_folds, int(with_class.min()))
    if n_folds < 2:
        return None
    shares = counts / np.bincount(classes, weights=counts, minlength=n_classes)[classes]
    rarest = np.minimum.reduceat(with_class[classes], starts[:-1])
    largest = np.maximum.reduceat(shares, starts[:-1])
    order = np.random.default_rng(random_state).permutation(n_sites)
    order = order[np.lexsort((-largest[order], rarest[order]))]
    load, fold_of = np.zeros((n_folds, n_classes)), np.zeros(n_sites, dtype=np.intp)
    total = np.zeros(n_folds)
    for site in order.tolist():
        there = slice(starts[site], starts[site + 1])
        # What the squares of the loads grow by; of equals, the fold that has least of all.
        costs = load[:, classes[there]] @ shares[there]
        least = np.flatnonzero(costs <= costs.min() + 1e-12)
        fold = fold_of[site] = least[total[least].argmin()]
        load[fold, classes[there]] += shares[there]
        total[fold] += shares[there].sum()
    if ((load > 0).sum(axis=0) < 2).any():
        return None
    return fold_of[sites]


def fold_numbers(
    labels: NDArray[np.integer],
    groups: Index,
    n_folds: int,
    random_state: int | Sequence[int],
    sites: Index | None = None,
) -> Index:
    """Fold (n,) of each row, stratified, with whole groups; 0 .. n_folds - 1.

    ``n_folds`` is lowered to the number of different images of the smallest class; with fewer than two
    of them there is nothing to validate on, and every row gets fold 0. Where ``sites`` (n,) are given, and enough of
    them, they are whole, too (:func:`site_folds`).
    """
    if sites is not None:
        across = site_folds(labels, sites, n_folds, random_state)
        if across is not None:
            return across
    n_folds = min(n_folds, int(distinct_counts(labels, groups, int(labels.max()) + 1).min()))
    if n_folds < 2:
        return np.zeros(len(labels), dtype=np.intp)
    order = np.argsort(np.random.default_rng(random_state).random(len(labels)), kind="stable")
    # Images that several classes have come last, so that every fold has some that a class has alone.
    order = order[np.argsort(~of_one_class(labels, groups)[order], kind="stable")]
    fold_of = np.full(int(groups.max()) + 1, -1, dtype=np.intp)
    for c in range(int(labels.max()) + 1):
        own = dict.fromkeys(groups[order[labels[order] == c]].tolist())
        fresh = [group for group in own if fold_of[group] < 0]
        fold_of[fresh] = np.arange(len(fresh)) % n_folds
    return fold_of[groups]
