"""The smallest set of labels that contains the true one as often as asked: conformal sets from images left out.

The score of a label is the probability of all labels that are more probable, and a penalty on its rank: adaptive
prediction sets (Romano, Sesia and Candes, "Classification with Valid and Adaptive Coverage", NeurIPS 2020) with the
rank regularised (Angelopoulos, Bates, Malik and Jordan, "Uncertainty Sets for Image Classifiers using Conformal
Prediction", ICLR 2021). Their random number is fixed at one, which leaves the label itself out of its own score: the
set of a photo is always the same, never empty, and a single label wherever the head alone is right often enough.

The images that scores are compared with are those of the fit, each scored by a head that had not seen it, and the head
that answers has seen them all: what holds exactly where a part is set aside holds here as cross-conformal prediction
does (Vovk 2015; Barber, Candes, Ramdas and Tibshirani 2021), and how often the sets of images left out hold the truth
is measured at every fit. Where the classes will be met in other shares, images are weighted (Tibshirani, Barber,
Candes and Ramdas, "Conformal Prediction Under Covariate Shift", NeurIPS 2019), a new one as much as the heaviest.

Pure: arrays in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.errors import UsageError
from featx.heads import Array
from featx.models.calibrate import clopper_pearson, weighted_interval

COVERAGE = 0.9
"""How often the sets that a fit reports on hold the truth."""

PENALTY, FREE_RANKS = 0.01, 2
"""What each further label adds to a score, and how many labels are free of it."""

_MOST_KEPT = 10_000
"""Scores that a model keeps: more would not make a limit finer than anybody asks for."""


@dataclass(frozen=True)
class Conformity:
    """Scores of the true labels of images left out.

    Parameters
    ----------
    scores : (n,) ascending.
    weights : (n,) how much each counts, where classes will be met in other shares; None: all the same.
    heaviest : the most that a new image may count.
    """

    scores: Array
    weights: Array | None = None
    heaviest: float = 1.0

    def limit(self, coverage: float) -> float:
        """Up to which score labels are in the sets; infinite where the images are too few to leave any label out."""
        weights = np.ones(len(self.scores)) if self.weights is None else self.weights
        reached = np.cumsum(weights)
        # A hair's breadth, so that 0.9 of 10 is 9, however it is rounded.
        wanted = coverage * (float(reached[-1]) + self.heaviest) * (1.0 - 1e-12)
        place = int(np.searchsorted(reached, wanted))
        return float(self.scores[place]) if place < len(self.scores) else math.inf

    def to_arrays(self) -> dict[str, Array]:
        """As a model file keeps them."""
        if self.weights is None:
            return {"conformity": self.scores}
        return {"conformity": self.scores, "conformity_weights": np.append(self.weights, self.heaviest)}

    @property
    def highest(self) -> float:
        """The coverage above which every set is all labels."""
        total = float(len(self.scores) if self.weights is None else self.weights.sum())
        return total / (total + self.heaviest)

    @classmethod
    def of(cls, scores: Array, weights: Array | None = None, heaviest: float = 1.0) -> Conformity:
        """Of scores in any order, of which a part is kept where they are very many."""
        kept = np.arange(len(scores))
        if len(kept) > _MOST_KEPT:
            kept = np.random.default_rng(0).permutation(kept)[:_MOST_KEPT]
        kept = kept[np.argsort(scores[kept], kind="stable")]
        return cls(scores[kept], None if weights is None else weights[kept], heaviest)


def check_coverage(coverage: float) -> None:
    """UsageError where it is not a share of the sets."""
    if not 0 < coverage < 1:
        expected = "more than 0 and less than 1"
        raise UsageError("not a share of the sets", where="--coverage", expected=expected, found=coverage)


def rank_scores(probabilities: Array) -> Array:
    """The score (n, c) of every label: what is more probable than it, and a penalty on its rank."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=1)
    above = np.cumsum(ranked, axis=1) - ranked
    above[:, 0] = 0.0
    ranks = np.arange(1, probabilities.shape[1] + 1)
    out = np.empty_like(above)
    np.put_along_axis(out, order, above + PENALTY * np.maximum(ranks - FREE_RANKS, 0), axis=1)
    return out


def label_sets(probabilities: Array, limit: float) -> NDArray[np.bool_]:
    """Which labels (n, c) are in the set of each image; the most probable one always is."""
    return np.asarray(rank_scores(probabilities) <= limit)


def true_scores(probabilities: Array, labels: NDArray[np.integer]) -> Array:
    """The score (n,) of each image's own label."""
    return np.asarray(rank_scores(probabilities)[np.arange(len(labels)), labels])


def among_known(coverage: float, max_unknown: float | None) -> float:
    """The coverage to ask for, so that it is kept among photos that are not called unknown, whichever these are."""
    return 1.0 - (1.0 - coverage) * (1.0 - (max_unknown or 0.0))


def cross_sets(
    probabilities: Array,
    labels: NDArray[np.integer],
    folds: Index,
    coverage: float,
    weights: Array | None = None,
    heaviest: float = 1.0,
) -> NDArray[np.bool_]:
    """Sets (n, c) of images, each with the limit that the images of the other folds give."""
    scores = true_scores(probabilities, labels)
    out = np.ones(probabilities.shape, dtype=bool)
    for fold in np.unique(folds):
        held = folds == fold
        if held.all():
            continue
        others = Conformity.of(scores[~held], None if weights is None else weights[~held], heaviest)
        out[held] = label_sets(probabilities[held], others.limit(coverage))
    return out


def measure_sets(
    sets: NDArray[np.bool_],
    labels: NDArray[np.integer],
    class_names: Sequence[str],
    *,
    coverage: float,
    weights: Array | None = None,
) -> dict[str, Any]:
    """How often sets (n, c) hold the truth, over all and of each class, with 95 % intervals, and how large they are."""
    inside = sets[np.arange(len(labels)), labels]
    images = np.bincount(labels, minlength=len(class_names)).tolist()
    held = np.bincount(labels[inside], minlength=len(class_names)).tolist()
    mean, low, high = weighted_interval(inside, weights)
    per_class = {}
    for name, n, right in zip(class_names, images, held, strict=True):
        if n:
            limits = clopper_pearson(right, n)
            per_class[name] = {"mean": right / n, "low": limits[0], "high": limits[1], "images": n}
    return {
        "asked": coverage,
        "coverage": {"mean": mean, "low": low, "high": high},
        "mean_size": float(np.average(sets.sum(axis=1), weights=weights)),
        "per_class": per_class,
    }
