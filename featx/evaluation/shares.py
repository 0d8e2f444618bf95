"""How common something is in a pile of which a classifier has seen all and people have checked a random part.

The estimate is prediction-powered (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic, "Prediction-powered inference",
Science 2023), with the power of the predictions tuned (Angelopoulos, Duchi and Zrnic, "PPI++: Efficient
Prediction-Powered Inference", 2023). For a prediction that is yes or no, tuned by least squares, this is the share of
the checked photos that are of the class among those that the classifier calls so, and among the others, each weighted
by how many of the pile are called so (post-stratification).

Its normal interval is too narrow where classes or errors are rare. The one here is exact: of the two counts, those
pairs are kept under which so few (or so many) would not be too surprising in both together. The p-value of each, of
draws without replacement, becomes a normal deviate, and the squares of those above zero are added. For large numbers
this is a fifth wider than the normal one. How many of each kind were checked says nothing of the truth, so all this
holds for any such number.

Pure: arrays in, numbers out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gammaln, ndtr
from scipy.stats import chi2

from featx._arrays import Index
from featx.evaluation.stats import Array, Interval

EXPECTED = 10
"""Photos of each kind, called so and not, to be expected among the checked ones for the classifier to be of help.

With fewer, the checked photos alone tell more. It is a rule on what is known before anything is checked.
"""

_ANGLES = 48
"""Into how many parts the ways are divided to share surprise between two counts."""


def checked_share(
    named: NDArray[np.bool_], checked: Index, truth: NDArray[np.bool_], *, level: float = 0.95
) -> Interval:
    """The share of a pile that is of a class, with its interval.

    Parameters
    ----------
    named : (N,) whether the classifier calls each of the pile so.
    checked : (n,) which of the pile were drawn at random, without replacement, and checked.
    truth : (n,) whether these are of the class.
    level : how often, at least, the interval holds the true share of this pile.
    """
    if min(named.sum(), (~named).sum()) * len(checked) < EXPECTED * len(named):
        named = np.zeros(len(named), dtype=bool)
    low = high = 0
    mean = 0.0
    counts = []
    for called in (True, False):
        total = int((named == called).sum())
        inside = named[checked] == called
        n, right = int(inside.sum()), int(truth[inside].sum())
        if n:
            counts.append((right, n, total))
            mean += total * right / n
        elif total:  # nobody checked: the classifier's word is all there is, and any number is possible
            mean += total * called
            high += total
    low += _least(counts, level)
    # What is not of the class is as surprising as what is.
    high += sum(total for _, _, total in counts) - _least([(n - k, n, total) for k, n, total in counts], level)
    return Interval(mean / len(named), low / len(named), high / len(named))


def _least(counts: list[tuple[int, int, int]], level: float) -> int:
    """The smallest sum of what may be in one or two strata, of each of which ``right`` of ``n`` of ``total`` are seen.

    Of a single one it is the exact limit, as Clopper and Pearson's, of draws without replacement (Konijn 1973).
    """
    tail = (1.0 - level) / 2
    if len(counts) == 1:
        return int(_lower_limits(*counts[0], np.array([tail]))[0])
    most = float(brentq(lambda c: chi2.sf(c, 1) / 2 + chi2.sf(c, 2) / 4 - tail, 0.0, 200.0))
    angles = np.linspace(0.0, np.pi / 2, _ANGLES + 1)
    first, second = (
        _lower_limits(*each, 1.0 - ndtr(np.sqrt(most) * deviate))
        for each, deviate in zip(counts, (np.sin(angles), np.cos(angles)), strict=True)
    )
    # The outer corner of each part: no pair between two angles is below it.
    return int((first[1:] + second[:-1]).min())


def _lower_limits(right: int, n: int, total: int, tails: Array) -> Index:
    """The smallest numbers (m,) of a stratum under which ``right`` or more would be seen with more than a tail (m,)."""
    low = np.full(len(tails), right)
    high = np.full(len(tails), total - (n - right))
    while (low < high).any():
        middle = (low + high) // 2
        enough = _at_least(right, n, total, middle) > tails
        high, low = np.where(enough, middle, high), np.where(enough, low, np.minimum(middle + 1, high))
    return low


def _at_least(right: int, n: int, total: int, there: Index) -> Array:
    """How likely ``right`` or more of ``n`` draws without replacement are among ``there`` (m,) of all."""
    if right == 0:
        return np.ones(len(there))
    # The shorter of both tails.
    below = right <= n - right
    seen = np.arange(right) if below else np.arange(right, n + 1)

    def ways(of: NDArray[np.integer], some: NDArray[np.integer]) -> Array:
        fits = (some >= 0) & (some <= of)
        some = np.where(fits, some, 0)
        return np.asarray(np.where(fits, gammaln(of + 1.0) - gammaln(some + 1.0) - gammaln(of - some + 1.0), -np.inf))

    k = there[:, None]
    logs: Array = ways(k, seen + 0 * k) + ways(total - k, n - seen + 0 * k) - ways(np.array(total), np.array(n))
    chance = np.exp(logs).sum(axis=1)
    return np.asarray(np.clip(1.0 - chance if below else chance, 0.0, 1.0))


def adjusted_shares(
    named: NDArray[np.integer], confusion: Array, *, level: float = 0.95, draws: int = 300, random_state: int = 0
) -> list[Interval]:
    """The share of each class of a pile by what a classifier calls it and how it errs: adjusted counts.

    (Gart and Buck 1966; Forman, "Quantifying counts and costs via classification", 2008.) The most likely shares,
    by expectation and maximisation, so that none is negative. It holds only if photos of each class are recognised as
    those of ``confusion`` were. Intervals are percentiles over draws of both.

    Parameters
    ----------
    named : (N,) what each of the pile is called, in 0 .. c-1.
    confusion : (c, c) how many of each class (rows) were called what, on images that the classifier had not seen.
    level, draws, random_state : of the intervals.
    """
    n_classes = len(confusion)
    counts = np.bincount(named, minlength=n_classes)
    rng = np.random.default_rng(random_state)
    means = _most_likely(counts, confusion / confusion.sum(axis=1, keepdims=True))
    drawn = np.empty((draws, n_classes))
    for i in range(draws):
        # One more image, wrong or right: eight without an error do not show that there is none.
        rows = np.stack([rng.dirichlet(row + 1.0 / n_classes) for row in confusion])
        drawn[i] = _most_likely(rng.multinomial(counts.sum(), counts / counts.sum()), rows)
    tail = (1.0 - level) / 2
    low, high = np.quantile(drawn, [tail, 1.0 - tail], axis=0)
    return [
        Interval(float(mean), min(float(a), float(mean)), max(float(b), float(mean)))
        for mean, a, b in zip(means, low, high, strict=True)
    ]


def _most_likely(counts: NDArray[np.integer], errors: Array) -> Array:
    """Shares (c,) of the classes that make counts (c,) of what is named most likely; errors (c, c) of each class."""
    shares = np.full(len(errors), 1.0 / len(errors))
    share_named = counts / counts.sum()
    for _ in range(1000):
        expected = shares @ errors
        ratio = np.divide(share_named, expected, out=np.zeros_like(expected), where=expected > 0)
        new = shares * (errors @ ratio)
        new /= new.sum()
        if np.abs(new - shares).max() < 1e-9:
            return np.asarray(new)
        shares = new
    return shares
