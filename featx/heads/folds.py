"""Folds inside a support: stratified, with whole groups of copies, and how many different images per class has."""

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


def fold_numbers(labels: NDArray[np.integer], groups: Index, n_folds: int, random_state: int | Sequence[int]) -> Index:
    """Fold (n,) of each row, stratified, with whole groups; 0 .. n_folds - 1.

    ``n_folds`` is lowered to the number of different images of the smallest class; with fewer than two
    of them there is nothing to validate on, and every row gets fold 0.
    """
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
