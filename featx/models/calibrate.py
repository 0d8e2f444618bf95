"""From out-of-fold scores to probabilities that mean something, and to a threshold below which a head abstains.

Pure: arrays in, numbers out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import beta

from featx.heads import Array

_MIN_SHARPNESS, _MAX_SHARPNESS = 1e-4, 1e6


def fit_sharpness(scores: Array, labels: NDArray[np.integer]) -> float:
    """What scores (n, c) are multiplied by so that their softmax is calibrated (one over the temperature).

    It minimises the log-loss of out-of-fold scores, as if one image more had been seen and were wrong: where every
    image is right the likelihood alone would ask for certainty. (Platt's remedy, for any number of classes.)
    """
    n, n_classes = scores.shape
    wrong = 2.0 / (n + 4.0)
    target = np.full(scores.shape, wrong / (n_classes - 1))
    target[np.arange(n), labels] = 1.0 - wrong
    centred = scores - scores.max(axis=1, keepdims=True)

    def loss(log_sharpness: float) -> float:
        scaled = math.exp(log_sharpness) * centred
        normaliser = np.log(np.exp(scaled).sum(axis=1))
        return float((normaliser - (target * scaled).sum(axis=1)).mean())

    # In units of the scores' own spread: a margin of 1e-3 and one of 1e3 are the same problem.
    unit = float(np.abs(centred).max(axis=1).mean()) or 1.0
    low, high = math.log(_MIN_SHARPNESS / unit), math.log(_MAX_SHARPNESS / unit)
    best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(best.x))


def fit_threshold(
    scores: Array, correct: NDArray[np.bool_], max_error: float, weights: Array | None = None, heaviest: float = 1.0
) -> float | None:
    """The lowest score from which on answers are wrong no more often than ``max_error``.

    Counted with one more answer, a wrong one: k answers without an error show an error rate of 1/(k+1), not of 0.
    Equal scores are on one side.

    Parameters
    ----------
    scores : (n,) of the label of each image, out of fold.
    correct : (n,) whether that label is right.
    max_error : share of the answers, 0 to 1.
    weights : (n,) how much each image counts, where classes will be met in other shares; the one more, wrong, counts
        ``heaviest``, as it may be of any class.

    Returns
    -------
    The threshold, or None where the images are too few (fewer than ``1 / max_error - 1`` right ones) or too hard to
    show it for any.
    """
    ranked, errors = _error_rates(scores, correct, weights, heaviest)
    fine = errors <= max_error
    if not fine.any():
        return None
    last = int(np.flatnonzero(fine)[-1])
    if last == len(scores) - 1:
        return float(ranked[-1])
    # Half way to the next lower score: the same answers here, and no knife's edge for others.
    return float((ranked[last] + ranked[last + 1]) / 2)


def smallest_error(
    scores: Array, correct: NDArray[np.bool_], weights: Array | None = None, heaviest: float = 1.0
) -> float:
    """The smallest ``max_error`` that :func:`fit_threshold` has a threshold for; arguments as there."""
    return float(_error_rates(scores, correct, weights, heaviest)[1].min())


def _error_rates(
    scores: Array, correct: NDArray[np.bool_], weights: Array | None, heaviest: float
) -> tuple[Array, Array]:
    """Scores (n,) from the highest on, and the error rate of all answers down to each; inf between equal scores."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    counted = np.ones(len(scores)) if weights is None else weights[order]
    rates = (np.cumsum(counted * ~correct[order]) + heaviest) / (np.cumsum(counted) + heaviest)
    last_of_ties = np.append(ranked[1:] != ranked[:-1], True)
    return ranked, np.where(last_of_ties, rates, np.inf)


def clopper_pearson(right: float, n: float) -> tuple[float, float]:
    """The exact 95 % interval of a share, of which ``right`` of ``n`` were seen."""
    low = float(beta.ppf(0.025, right, n - right + 1)) if right else 0.0
    high = float(beta.ppf(0.975, right + 1, n - right)) if right < n else 1.0
    return low, high


def weighted_interval(right: NDArray[np.bool_], weights: Array | None = None) -> tuple[float, float, float]:
    """A share (n,) with its 95 % interval, where images count differently.

    Clopper and Pearson's interval of as many equal images as tell as much (Korn and Graubard 1998); without weights,
    plainly theirs.
    """
    n = float(len(right)) if weights is None else float(weights.sum() ** 2 / (weights**2).sum())
    mean = float(np.average(right, weights=weights))
    # Sums of weights are rounded; a share of all is all.
    seen = n if right.all() else 0.0 if not right.any() else mean * n
    return mean, *clopper_pearson(seen, n)
