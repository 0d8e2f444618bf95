"""How accuracy grows with images per class, and what more of them are worth. Pure: arrays in, numbers out.

The error is taken to fall to an asymptote as an inverse power of the number of images per class, ``c + a * n ** -b``
(Cortes et al., 1994, "Learning curves: asymptotic values and rate of convergence"; used to predict sample sizes by
Figueroa et al., 2012, "Predicting sample size required for classification performance"). Its limits are those of every
extrapolation: it supposes that the next images are like the last ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featx.errors import UsageError
from featx.evaluation import Interval, unseen_share

Array: TypeAlias = NDArray[np.float64]

MIN_POINTS = 4
"""Three parameters go through any three points: a fourth is the first that could contradict them."""

TOO_WIDE = 0.10
"""An interval wider than ten points says nothing that one could act on."""

LITTLE = 0.005
"""A gain below half a point is not worth ten photos of each class, whichever its sign."""

_POWERS = np.geomspace(0.05, 2.0, 120)
_BLOCK = 100
"""Resamples at a time: bounds the memory to 100 times the number of images."""


@dataclass(frozen=True)
class Gain:
    """What going from ``n_from`` to ``n_to`` images per class is worth, as a difference of accuracies.

    ``reason`` is empty where it can be told, or says why it cannot.
    """

    n_from: float
    n_to: float
    interval: Interval
    reason: str

    @property
    def verdict(self) -> Literal["worth", "little", "cannot tell"]:
        """Whether one can act on it; "little" is less than half a point, up or down, for sure."""
        if self.reason:
            return "cannot tell"
        return "little" if self.interval.low > -LITTLE and self.interval.high < LITTLE else "worth"


@dataclass(frozen=True)
class Curve:
    """A fitted learning curve.

    Attributes
    ----------
    shots : (s,) numbers of images per class that were measured.
    measured : (s,) accuracies with 95 % intervals over draws and images together.
    parameters : (3,) of the error ``c + a * n ** -b``: c, a, b. With a below 0 the accuracy falls.
    resampled : (r, 3) the same for resampled draws and images.
    miss : by how much the curve through all points but the last misses the last one, as an accuracy; nan below
        :data:`MIN_POINTS` points.
    """

    shots: NDArray[np.int64]
    measured: tuple[Interval, ...]
    parameters: Array
    resampled: Array = field(repr=False)
    miss: float

    def accuracy(self, n: float) -> Interval:
        """Accuracy at ``n`` images per class with its 95 % interval, within 0 and 1."""
        low, high = np.quantile(1 - _error(self.resampled, n), [0.025, 0.975])
        mean = float(1 - _error(self.parameters, n))
        wide = _widened(mean, low, high, self._doubt(n))
        return Interval(*(min(max(value, 0.0), 1.0) for value in (wide.mean, wide.low, wide.high)))

    def gain(self, n_from: float, n_to: float) -> Gain:
        """What more images per class are worth, with a 95 % interval that doubts the form of the curve, too.

        The interval is that of the resampled curves, widened by the miss at the last point in proportion to how much
        further (in the logarithm of n) the curve is carried than it was there.
        """
        gains = _error(self.resampled, n_from) - _error(self.resampled, n_to)
        mean = float(_error(self.parameters, n_from) - _error(self.parameters, n_to))
        low, high = np.quantile(gains, [0.025, 0.975])
        interval = _widened(mean, low, high, self._doubt(n_to))
        return Gain(n_from, n_to, interval, self._reason(interval))

    def _doubt(self, n: float) -> float:
        if n <= self.shots[-1] or len(self.shots) < MIN_POINTS:
            return 0.0  # of too few points nothing is claimed: see _reason
        step = np.log(self.shots[-1] / self.shots[-2])
        return float(self.miss * np.log(n / self.shots[-1]) / step)

    def _reason(self, interval: Interval) -> str:
        if len(self.shots) < MIN_POINTS:
            return (
                f"a curve needs {MIN_POINTS} numbers of images per class, and only {len(self.shots)} could be measured"
            )
        if interval.high - interval.low > TOO_WIDE:
            return f"the interval is wider than {100 * TOO_WIDE:.0f} points"
        if interval.low <= 0.0 <= interval.high and max(-interval.low, interval.high) >= LITTLE:
            return "the interval includes zero"
        return ""


def fit_curve(
    shots: Sequence[int],
    hits: NDArray[np.floating],
    *,
    resamples: int = 1000,
    random_state: int = 0,
    sites: NDArray[np.integer] | None = None,
) -> Curve:
    """Fit a learning curve to one head's hits on nested draws.

    Parameters
    ----------
    shots : (s,) ascending numbers of images per class, at least two.
    hits : (e, s, m): 1 where image m was right in draw e at this number, 0 where wrong, nan where it was not judged.
        To compare like with like, a draw should judge the same images at every number.
    resamples : draws and images are both resampled so often (the pigeonhole bootstrap of Owen, 2007, "The pigeonhole
        bootstrap": for crossed rows and columns it errs to the safe side).
    sites : (m,) dense numbers of what images belong to: these are then resampled in the place of images.

    Raises
    ------
    UsageError
        Fewer than two numbers, or one without any hit or miss.
    """
    n = np.asarray(shots, dtype=np.int64)
    if hits.ndim != 3 or hits.shape[1] != len(n) or len(n) < 2 or (np.diff(n) <= 0).any():
        raise UsageError(
            "a learning curve needs hits (draws, shots, images) of two or more ascending numbers of shots",
            found=f"{hits.shape} and {n.tolist()}",
        )
    seen = np.isfinite(hits)
    if not seen.any(axis=(0, 2)).all():
        raise UsageError("no image was judged at one of the numbers of shots", found=n.tolist())
    known = np.where(seen, hits, 0.0)
    rng = np.random.default_rng(random_state)
    draws = len(hits)
    units = np.arange(hits.shape[2]) if sites is None else np.unique(sites, return_inverse=True)[1]
    images = int(units.max()) + 1
    parts = []
    for start in range(0, resamples, _BLOCK):
        some = min(_BLOCK, resamples - start)
        of_draws = rng.multinomial(draws, np.full(draws, 1 / draws), size=some).astype(float)
        of_images = rng.multinomial(images, np.full(images, 1 / images), size=some).astype(float)[:, units]
        parts.append(np.stack([_mean(known[:, i], seen[:, i], of_draws, of_images) for i in range(len(n))], axis=1))
    resampled = np.concatenate(parts)
    resampled = resampled[np.isfinite(resampled).all(axis=1)]
    means = np.array([known[:, i].sum() / seen[:, i].sum() for i in range(len(n))])
    spread = resampled.var(axis=0)
    # A point without any spread (all right, always) is not infinitely sure: as if one image in all had been wrong.
    weights = 1.0 / np.maximum(spread, 1.0 / images**2)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    blind = unseen_share(images)
    low, high = np.where(means >= 1, 1 - blind, low), np.where(means <= 0, blind, high)
    measured = tuple(
        Interval(float(a), float(min(b, a)), float(max(c, a))) for a, b, c in zip(means, low, high, strict=True)
    )
    miss = float("nan")
    if len(n) >= MIN_POINTS:
        without = fit_power_law(n[:-1], 1 - means[None, :-1], weights[:-1])[0]
        miss = float(abs((1 - means[-1]) - _error(without, float(n[-1]))))
    return Curve(
        n, measured, fit_power_law(n, 1 - means[None], weights)[0], fit_power_law(n, 1 - resampled, weights), miss
    )


def _mean(known: Array, seen: NDArray[np.bool_], of_draws: Array, of_images: Array) -> Array:
    """Mean (r,) of hits (e, m) under weights (r, e) of draws times weights (r, m) of images."""
    right = np.einsum("rm,rm->r", of_draws @ known, of_images)
    asked = np.einsum("rm,rm->r", of_draws @ seen.astype(float), of_images)
    return np.asarray(np.divide(right, asked, out=np.full(len(right), np.nan), where=asked > 0))


def fit_power_law(shots: NDArray[np.integer], errors: Array, weights: Array) -> Array:
    """Weighted least squares of errors (r, s) by ``c + a * n ** -b`` with 0 <= c <= 1 and b in [0.05, 2].

    For a given b the problem is linear; b is searched on a fine grid, so that there is nothing that may not converge.

    Returns
    -------
    (r, 3) : c, a, b of each row.
    """
    w = weights / weights.sum()
    best, out = np.full(len(errors), np.inf), np.zeros((len(errors), 3))
    for b in _POWERS:
        x = np.asarray(shots, dtype=float) ** -b
        centre, mean = float(w @ x), errors @ w
        a = (errors - mean[:, None]) @ (w * (x - centre)) / (w @ (x - centre) ** 2)
        c = mean - a * centre
        bound = np.clip(c, 0.0, 1.0)
        a = np.where(bound == c, a, (errors - bound[:, None]) @ (w * x) / (w @ x**2))
        loss = (errors - bound[:, None] - a[:, None] * x) ** 2 @ w
        better = loss < best
        best = np.where(better, loss, best)
        out[better] = np.column_stack([bound, a, np.full(len(a), b)])[better]
    return out


def _error(parameters: Array, n: float) -> Array:
    c, a, b = parameters[..., 0], parameters[..., 1], parameters[..., 2]
    return np.asarray(c + a * n**-b)


def _widened(mean: float, low: float, high: float, doubt: float) -> Interval:
    """The interval with an independent doubt added to both sides."""
    below, above = float(np.hypot(max(mean - low, 0.0), doubt)), float(np.hypot(max(high - mean, 0.0), doubt))
    return Interval(mean, mean - below, mean + above)
