"""Scores, calibration, intervals and paired comparisons. Pure: arrays in, numbers out.

Episodes are not independent: they share images. Treating them as independent finds winners among equals,
so every variance here is corrected for what is shared (:func:`resampled_variance`). ``weights`` (n,) say how much each
row counts, where classes will be met in other shares than they have; by default all count the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array: TypeAlias = NDArray[np.float64]
Labels: TypeAlias = NDArray[np.integer]
Verdict: TypeAlias = Literal["better", "worse", "cannot tell"]

_TAIL = 0.025
"""Part of all cases on each side of an interval."""


def accuracy(labels: Labels, predicted: Labels) -> float:
    """Share of rows (n,) that are predicted right."""
    return float((labels == predicted).mean())


def balanced_accuracy(labels: Labels, predicted: Labels) -> float:
    """Mean over the classes that occur of the share of their rows that are predicted right."""
    counts = np.bincount(labels)
    hits = np.bincount(labels, weights=labels == predicted, minlength=len(counts))
    return float((hits[counts > 0] / counts[counts > 0]).mean())


def macro_f1(labels: Labels, predicted: Labels, weights: Array | None = None) -> float:
    """Mean F1 (n,) of all classes that are there or are named: scikit-learn's ``f1_score(average="macro")``."""
    n = int(max(labels.max(), predicted.max())) + 1
    right = labels == predicted
    hits = np.bincount(labels[right], None if weights is None else weights[right], minlength=n)
    sizes = np.bincount(labels, weights, minlength=n) + np.bincount(predicted, weights, minlength=n)
    return float((2.0 * hits[sizes > 0] / sizes[sizes > 0]).mean())


def majority_baseline(labels: Labels, weights: Array | None = None) -> float:
    """Accuracy of always naming the most frequent class."""
    counts = np.bincount(labels, weights)
    return float(counts.max() / counts.sum())


def log_loss(labels: Labels, probabilities: Array, weights: Array | None = None) -> float:
    """Mean of minus the log of the probability (n, c) of the true class, in nats."""
    true = probabilities[np.arange(len(labels)), labels]
    return float(np.average(-np.log(np.maximum(true, np.finfo(np.float64).tiny)), weights=weights))


def brier(labels: Labels, probabilities: Array, weights: Array | None = None) -> float:
    """Mean squared distance of the probabilities (n, c) to the truth, summed over classes: 0 to 2."""
    distance = probabilities.copy()
    distance[np.arange(len(labels)), labels] -= 1.0
    return float(np.average((distance**2).sum(axis=1), weights=weights))


def expected_calibration_error(
    confidence: Array, correct: NDArray[np.bool_], *, bins: int = 15, weights: Array | None = None
) -> float:
    """Mean gap of confidence and accuracy over equally wide bins of the confidence (n,); 0 to 1."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.ones(len(confidence)) if weights is None else weights
    gap = np.bincount(which, weights=counts * (confidence - correct), minlength=bins)
    return float(np.abs(gap).sum() / counts.sum())


@dataclass(frozen=True)
class Interval:
    """A mean with the limits of its confidence interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The three numbers as ``summary.json`` has them."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


BRACKETS = "In brackets: 95 % intervals."
"""What explains :func:`percent` and :func:`points`, once to a page or a table."""


def limits(interval: Interval, *, scale: float = 100.0) -> str:
    """The limits of an interval as people read them, times ``scale``: ``89.4 to 94.0``."""
    return f"{scale * interval.low:z.1f} to {scale * interval.high:z.1f}"


def percent(interval: Interval) -> str:
    """A share with its interval as people read it: ``91.7 % (89.4 to 94.0)``."""
    return f"{100 * interval.mean:.1f} % ({limits(interval)})"


def points(interval: Interval, *, beside: tuple[float, float] | None = None) -> str:
    """A difference of shares with its interval as people read it: ``+0.6 points (-0.2 to 1.4)``.

    Parameters
    ----------
    beside : the two shares, where they are shown as well: then the difference is that of the numbers that people see,
        unless it is one over other draws.
    """
    mean = interval.mean
    if beside is not None and abs(shown_gap(*beside) - mean) <= 0.001 + 1e-9:
        mean = shown_gap(*beside)
    return f"{100 * mean:+z.1f} points ({limits(interval)})"


def shown_gap(a: float, b: float, *, digits: int = 1) -> float:
    """``a`` minus ``b`` after both were rounded to ``digits`` of a percent, so that a reader's sum comes out."""
    return (round(100 * a, digits) - round(100 * b, digits)) / 100


@dataclass(frozen=True)
class Difference:
    """Head a minus head b over the same draws; ``p`` is two-sided, ``adjusted`` by Holm over all pairs."""

    interval: Interval
    p: float
    adjusted: float = math.nan

    @property
    def verdict(self) -> Verdict:
        """What may be said about a at a 5 % error rate over all pairs together."""
        if not self.adjusted < 0.05:
            return "cannot tell"
        return "better" if self.interval.mean > 0 else "worse"

    def to_json(self) -> dict[str, float | str]:
        """Plain types, as ``summary.json`` has them."""
        interval = self.interval
        limits = {"difference": interval.mean, "low": interval.low, "high": interval.high}
        return {**limits, "p": self.adjusted, "verdict": self.verdict}


def lessons(images: Array, queries: Sequence[NDArray[np.intp]]) -> Array:
    """Sum (j,) for each episode, over the images that it does not query, of what they have above the mean of all.

    ``images`` (n,) are as in :func:`resampled_variance`, nan where never queried; ``queries`` are j arrays of rows.
    """
    above = np.nan_to_num(images - np.nanmean(images))
    return np.array([-above[query].sum() for query in queries])  # all together they are zero


def resampled_variance(
    scores: Array, images: Array, n_support: float, n_query: float, taught: Array | None = None
) -> float:
    """Variance of the mean of ``scores`` over new data, from episodes that share their images.

    Nadeau and Bengio (2003) multiply the variance between episodes by ``1/J + n_query/n_support``: what
    is shared counts as one observation. That is used where the query is the smaller part. At a few
    shots their ratio would be large and empty, because then supports hardly overlap and queries are
    nearly the same images in every episode; so there the overlap is that of the supports,
    ``n_support/n_query``, and the finite set of query images adds its own variance, that of a mean over
    images. It is the least there can be in either case: two episodes may agree by chance.

    These two are not independent, as the images that are queried are those that supports are drawn from: one
    that is often judged wrong (an unusual one) also teaches badly. With score = f(queried) + h(support) in
    Hoeffding's decomposition, the variance of a mean over n images has the term 2 cov(f, h) n_support/n**2, and
    n_support cov(f, h) is the covariance of ``scores`` and ``taught``. Without this term, equal heads were told
    apart in up to 7 % of the simulated cases at 1 to 5 shots, where 5 % are promised. It is never negative here,
    so that noise in it does not shrink an interval.

    Parameters
    ----------
    scores : (j,) one number for each episode.
    images : (m,) mean of the same number for each image over the episodes that queried it; nan is left out.
    n_support, n_query : mean sizes of the two parts.
    taught : (j,) of :func:`lessons`, where the support is what is not queried.
    """
    images = images[np.isfinite(images)]
    j, m = len(scores), len(images)
    between = float(scores.var(ddof=1)) if j > 1 else 0.0
    of_images = float(images.var(ddof=1)) / m if m > 1 else 0.0
    if j > 1 and n_query <= n_support:
        return max(between * (1.0 / j + n_query / n_support), of_images)
    both = 0.0 if taught is None or j < 2 else 2.0 * float(np.cov(scores, taught)[0, 1]) / m
    return between * (1.0 / j + min(n_support / n_query, 1.0)) + of_images + max(both, 0.0)


@dataclass(frozen=True)
class _Spread:
    """The variance of a mean over episodes, its degrees of freedom and half its interval; ``n`` images were queried."""

    variance: float
    freedom: int
    margin: float
    n: int

    @classmethod
    def of(
        cls, scores: Array, images: Array, n_support: float, n_query: float, taught: Array | None, few: bool
    ) -> _Spread:
        n = int(np.isfinite(images).sum())
        variance = resampled_variance(scores, images, n_support, n_query, taught)
        freedom = max(len(scores) - 1, 1) if len(scores) > 1 else max(n - 1, 1)
        freedom = max(min(freedom, n - 1), 1) if few else freedom
        return cls(variance, freedom, _student(freedom) * math.sqrt(variance), n)


def _student(freedom: int) -> float:
    """By how many standard errors a mean may be off."""
    return float(stats.t.isf(_TAIL, freedom))


def mean_interval(
    scores: Array,
    images: Array,
    n_support: float,
    n_query: float,
    taught: Array | None = None,
    *,
    few: bool = False,
) -> Interval:
    """Mean accuracy over episodes with its interval, within 0 and 1; arguments as in :func:`resampled_variance`.

    Where every image is always right (or wrong) the variance is zero and says nothing; then the limit is
    the share that could still give that many in a row (Clopper and Pearson). ``few``: there may be fewer of ``images``
    than of draws (they are sites), and then they decide how sure the variance itself is.
    """
    mean, spread = float(scores.mean()), _Spread.of(scores, images, n_support, n_query, taught, few)
    blind = unseen_share(spread.n)
    low = min(mean - spread.margin, 1.0 - blind) if mean >= 1.0 else mean - spread.margin
    high = max(mean + spread.margin, blind) if mean <= 0.0 else mean + spread.margin
    return Interval(mean, max(low, 0.0), min(high, 1.0))


def unseen_share(n: int) -> float:
    """The largest share that may well not occur among ``n`` images (Clopper and Pearson)."""
    return float(1.0 - _TAIL ** (1.0 / max(n, 1)))


def paired_difference(
    scores: Array,
    images: Array,
    n_support: float,
    n_query: float,
    taught: Array | None = None,
    *,
    few: bool = False,
) -> Difference:
    """Compare two heads on the same draws; the arguments are differences, as in :func:`resampled_variance`.

    Where all images differ alike (mostly: none does) the variance is zero and says nothing; then the limits are
    the share that could still differ otherwise and be seen in none of that many.
    """
    mean, spread = float(scores.mean()), _Spread.of(scores, images, n_support, n_query, taught, few)
    margin = spread.margin or unseen_share(spread.n)
    p = 1.0
    if spread.variance > 0:
        p = float(2 * stats.t.sf(abs(mean) / math.sqrt(spread.variance), spread.freedom))
    return Difference(Interval(mean, mean - margin, mean + margin), p)


def site_values(images: Array, sites: NDArray[np.integer]) -> tuple[NDArray[np.integer], Array]:
    """The sites (s,) of images (n,; nan is left out), and a number for each (s,) whose mean is that of all images.

    A site counts for the mean, and ``s / n`` times what its own images have above it in sum: the variance of a mean of
    these numbers is the linearised one of a mean over clusters of unequal size (Cochran, "Sampling Techniques", 1977,
    6.3).
    """
    seen = np.isfinite(images)
    places, inside = np.unique(sites[seen], return_inverse=True)
    mean = float(images[seen].mean())
    above = np.bincount(inside, weights=images[seen] - mean)
    return places, mean + len(places) / seen.sum() * above


def mean_over_sites(images: Array, sites: NDArray[np.integer]) -> Interval:
    """Mean of shares (n,), one for each image, with Student's interval over the sites (n,) that they are of.

    A single site says nothing about others: then the interval is 0 to 1.
    """
    values = site_values(images, sites)[1]
    if len(values) < 2:
        return Interval(float(images.mean()), 0.0, 1.0)
    return mean_interval(np.array([images.mean()]), values, 1.0, 1.0)


def mean_difference(values: Array) -> Difference:
    """The mean of independent differences (m,), one for each site, with Student's interval and p.

    Where all are equal the variance is zero and says nothing; then the limits are the share that could still be
    otherwise and be seen in none of that many.
    """
    m, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(m)
    margin = _student(m - 1) * error or unseen_share(m)
    p = float(2 * stats.t.sf(abs(mean) / error, m - 1)) if error > 0 else 1.0
    return Difference(Interval(mean, mean - margin, mean + margin), p)


def prediction_interval(values: Array) -> tuple[Interval, str]:
    """Mean of shares (m,), one for each site, and the limits between which one more lies, within 0 and 1; and how.

    Of few, Student's: mean -+ t(m - 1) s sqrt(1 + 1/m) (Hahn and Meeker, "Statistical Intervals", 1991, 4.7), which
    takes sites to be normal. Of 39 or more, order statistics, which take nothing but
    that the new site is one like these (Wilks 1941; the conformal interval of Vovk, Gammerman and Shafer, 2005).
    """
    m, mean = len(values), float(values.mean())
    rank = math.floor((m + 1) * _TAIL + 1e-9)
    if rank >= 1:
        ranked = np.sort(values)
        low, high = float(ranked[rank - 1]), float(ranked[m - rank])
        return Interval(mean, min(low, mean), max(high, mean)), "order statistics"
    # Sites that all agree may yet be unlike the next one.
    margin = _student(m - 1) * float(values.std(ddof=1)) * math.sqrt(1 + 1 / m) or unseen_share(m)
    return Interval(mean, max(mean - margin, 0.0), min(mean + margin, 1.0)), "Student's t"


def holm(ps: Sequence[float]) -> list[float]:
    """P-values adjusted for all of them together (Holm's step-down), in the given order."""
    order = np.argsort(ps, kind="stable")
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[int(i)]))
        adjusted[int(i)] = highest
    return adjusted
