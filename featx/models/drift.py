"""Whether photos have changed from those a model was fitted on: a test that may be looked at whenever one likes.

What is compared is the familiarity of new photos (:mod:`featx.models.novelty`) with what it is for photos like the
model's own: uniform, but for two things that a plain test of uniformity gets wrong.

- *The model's own photos are few.* All new photos are ranked among the same m own ones. Given these, the share of new
  photos with a familiarity up to a is not a but follows a Beta(k, m + 1 - k), where k of the m + 1 ranks are up to a
  (Bates, Candes, Lei, Romano and Sesia, "Testing for outliers with conformal p-values", Annals of Statistics 2023). So
  each share is compared with an upper limit of that distribution; all limits hold together at 97.5 % (Bonferroni).
- *Photos come in bursts.* Those of one hour may show one thing, so an hour counts once however many photos it has, by
  the share x of them. All that is needed is that its expectation, given earlier hours, is what it is in the long run:
  then a bet that multiplies its stake by ``1 - c + c x / limit`` is fair at best (Waudby-Smith and Ramdas, "Estimating
  means of bounded random variables by betting", Journal of the Royal Statistical Society B, 2024). Where nights differ
  from days, that holds of days only: then the unit must be a day.

The stakes are spread over several shares, several c, and a new bet every six hours, of which the n-th gets
``n ** -0.5 - (n + 1) ** -0.5``: a change may begin late (Vovk, "Testing randomness online", Statistical Science 2021).
Their sum is a martingale, or falls, while nothing has changed: that it ever reaches 40 times the first stake has a
probability of at most 1/40 (Ville's inequality), however often one looks. With the limits, that of a false alarm in all
the life of a model is at most 5 %.

Pure, NumPy and SciPy alone: arrays in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from featx.evaluation import Interval, stats
from featx.heads import Array

N_BINS = 20
"""Bins of familiarity, of equal width; each has its upper end, and not its lower one."""

BET_HOURS = 6
"""A new bet begins every so many hours; with days as the unit, every day."""

FALSE_ALARM = 0.05
"""The most that the probability of ever calling photos changed may be while they have not."""

SEEN = 0.3
"""Of a change of fewer photos than these it is not said that there is no sign, but that one cannot tell yet."""

_UNLIKE, _ALIKE = (0.25, 0.5), (0.5, 0.75)
"""Shares beside that of unknown photos: too many photos up to these are unlike the own ones, too few are too alike."""

_STAKES = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
_CHANGES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
_DRAWS = 20
_RICH = 1e100
"""Stakes are cut here: far beyond any limit, and no overflow."""

Counts = NDArray[np.integer]
Side = Literal["unlike", "alike"]
Verdict = Literal["changed", "no sign of change", "cannot tell yet"]


@dataclass(frozen=True)
class Drift:
    """What is to be said of the photos of some hours (or days).

    Attributes
    ----------
    verdict : the answer.
    evidence : how many times the first stake was held at most; photos have changed from ``needed`` on.
    side : whether they have become unlike the model's own photos, or more alike than these are among each other.
    seen, since : the numbers of the unit at which the evidence sufficed, and of the one where the change may have
        begun.
    least_seen : the smallest of some shares of unknown photos in every unit that would have been seen by now; None
        where none would.
    """

    verdict: Verdict
    evidence: float
    needed: float
    side: Side | None = None
    seen: int | None = None
    since: int | None = None
    least_seen: float | None = None


def bins_of(familiarity: Sequence[float] | Array) -> Counts:
    """How many photos are in each of the bins (:data:`N_BINS`,), by their familiarity (n,)."""
    # What is a bin's end but for rounding, as 3/20 is, is in that bin.
    places = np.ceil(np.asarray(familiarity, dtype=np.float64) * N_BINS - 1e-9).astype(np.intp) - 1
    return np.bincount(np.clip(places, 0, N_BINS - 1), minlength=N_BINS)


def find_drift(
    familiarity: Counts,
    unknown: Counts,
    periods: Counts,
    *,
    own: int,
    max_unknown: float,
    both_sides: bool = True,
    random_state: int = 0,
) -> Drift:
    """Test whether photos have changed, by what was counted in units of time that are over.

    Parameters
    ----------
    familiarity : (u, 20) photos of each unit by their familiarity, as of :func:`bins_of`; in the order of time.
    unknown : (u,) photos of each that were called unknown.
    periods : (u,) the number of the six hours (or of the day) that each is of, with which a new bet begins; ascending.
    own : own photos among which familiarity is a rank.
    max_unknown : up to which familiarity a photo is unknown.
    both_sides : whether photos that are too alike count as changed. Not where a model's own photos were judged by those
        of other groups only: new ones of the same groups are more alike, as they should be.
    random_state : seed of the changes that are made up to know which would have been seen.
    """
    used = familiarity.sum(axis=1) > 0
    numbers = np.flatnonzero(used)
    photos = familiarity[used].sum(axis=1)
    questions = list(_questions(own, max_unknown, both_sides))
    needed = 2 / FALSE_ALARM
    if not questions:
        return Drift("cannot tell yet", 1.0, needed)
    limits, sides = np.array([limit for _, _, limit in questions]), [side for side, _, _ in questions]
    counts = np.stack([_inside(familiarity[used], unknown[used], side, end) for side, end, _ in questions], axis=-1)
    begins = np.diff(periods[used], prepend=-1) != 0
    wealth, richest = _bet(counts[None] / photos[:, None], limits, begins)
    highest = float(wealth.max(initial=1.0))
    if highest >= needed:
        seen = int(np.argmax(wealth[0] >= needed))
        side = sides[int(richest[0, seen])]
        since = _began(counts[: seen + 1] / photos[: seen + 1, None], limits, begins[: seen + 1], side, sides)
        return Drift("changed", highest, needed, side, int(numbers[seen]), int(numbers[since]))
    least = _least_seen(counts, photos, limits, sides, begins, needed, random_state)
    verdict: Verdict = "no sign of change" if least is not None and least <= SEEN else "cannot tell yet"
    return Drift(verdict, highest, needed, least_seen=least)


def _questions(own: int, max_unknown: float, both_sides: bool) -> Iterator[tuple[Side, float | None, float]]:
    """What is asked of each unit: a side, up to (from) which familiarity (None: unknown), and the share's limit."""
    asked: list[tuple[Side, float | None]] = [("unlike", None), *(("unlike", end) for end in _UNLIKE)]
    asked += [("alike", end) for end in _ALIKE] if both_sides else []
    level = FALSE_ALARM / 2 / len(asked)
    for side, end in asked:
        ranks = math.floor((max_unknown if end is None else end) * (own + 1) + 1e-9)
        if 0 < ranks <= own:  # else no photo like the own ones can have such a rank, or all have
            share = beta(ranks, own + 1 - ranks)
            yield side, end, float(share.ppf(1 - level) if side == "unlike" else 1 - share.ppf(level))


def _inside(familiarity: Counts, unknown: Counts, side: Side, end: float | None) -> Counts:
    if end is None:
        return unknown
    place = round(end * N_BINS)
    return np.asarray((familiarity[:, :place] if side == "unlike" else familiarity[:, place:]).sum(axis=1))


def _bet(shares: Array, limits: Array, begins: NDArray[np.bool_]) -> tuple[Array, NDArray[np.intp]]:
    """What is held after each unit, (r, u), and the question that holds the most of it, (r, u).

    Parameters
    ----------
    shares : (r, u, q) of the photos of each unit, in r repetitions.
    limits : (q,) what they are at most in the long run, while nothing has changed.
    begins : (u,) whether a new bet begins.
    """
    repetitions, units, questions = shares.shape
    wealth, richest = np.ones((repetitions, units)), np.zeros((repetitions, units), dtype=np.intp)
    now, bet, waiting = np.zeros((repetitions, questions, len(_STAKES))), 0, 1.0
    for unit in range(units):
        if begins[unit]:
            bet += 1
            stake = bet**-0.5 - (bet + 1) ** -0.5
            now, waiting = now + stake / now[0].size, waiting - stake
        now = np.minimum(now * (1 - _STAKES + _STAKES * (shares[:, unit] / limits)[..., None]), _RICH)
        wealth[:, unit] = now.sum(axis=(1, 2)) + max(waiting, 0.0)
        richest[:, unit] = now.sum(axis=2).argmax(axis=1)
    return wealth, richest


def _began(shares: Array, limits: Array, begins: NDArray[np.bool_], side: Side, sides: Sequence[Side]) -> int:
    """The unit whose bet has grown most by the last one, of the questions of one side."""
    which = [place for place, each in enumerate(sides) if each == side]
    growth = np.log(1 - _STAKES + _STAKES * (shares[:, which] / limits[which])[..., None])
    won = growth[::-1].cumsum(axis=0)[::-1].reshape(len(shares), -1).max(axis=1)
    starts = np.flatnonzero(begins)
    return int(starts[won[starts].argmax()])


def _least_seen(
    counts: Counts,
    photos: Counts,
    limits: Array,
    sides: Sequence[Side],
    begins: NDArray[np.bool_],
    needed: float,
    random_state: int,
) -> float | None:
    """The smallest share of the photos of every unit that would mostly have been seen, had they been unknown."""
    if not len(photos):
        return None
    rng = np.random.default_rng(random_state)
    unlike = np.array([side == "unlike" for side in sides])
    for change in _CHANGES:
        others = np.where(unlike, photos[:, None] - counts, counts)
        moved = rng.binomial(others, change, size=(_DRAWS, *counts.shape))
        wealth, _ = _bet(np.where(unlike, counts + moved, counts - moved) / photos[:, None], limits, begins)
        if (wealth.max(axis=1) >= needed).mean() >= 0.8:
            return change
    return None


def share_over_units(counted: Counts, photos: Counts) -> Interval:
    """The share of photos that were counted, with its 95 % interval over units (u,), which may each be one burst.

    Student's, by the linearised variance of a ratio (Cochran, "Sampling Techniques", 1977, 6.3); 0 to 1 where there are
    fewer than two units. Where all agree, the limit is the share that could be missed in so many.
    """
    used = photos > 0
    counted, photos = counted[used], photos[used]
    units, total = len(photos), int(photos.sum())
    if units < 2:
        return Interval(float(counted.sum() / total) if total else 0.0, 0.0, 1.0)
    mean = float(counted.sum() / total)
    values = mean + units / total * (counted - mean * photos)
    return stats.mean_interval(np.array([mean]), values, 1.0, 1.0)


def median_of(familiarity: Counts) -> float | None:
    """The upper end of the bin (20,) in which the median of the photos is; None where there are none."""
    total: Any = familiarity.sum()
    if not total:
        return None
    return float((np.searchsorted(familiarity.cumsum(), 0.5 * total) + 1) / N_BINS)
