"""Whether photos have changed: bets that are fair, few false alarms however often one looks, and real changes seen."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta, chi2, t as student

from featx.models.drift import (
    _STAKES,
    BET_HOURS,
    N_BINS,
    _bet,
    _questions,
    bins_of,
    find_drift,
    median_of,
    share_over_units,
)
from featx.models.novelty import is_unknown, shares_among

ASKED = 0.05


def traffic(
    own: int, hours: int, rng: Any, *, changed: float = 0.0, begin: int = 0, alike: float = 0.5
) -> tuple[Any, Any]:
    """Bins (h, 20) and unknown photos (h,) of hours of some ten photos, which are alike within an hour."""
    kept = np.sort(rng.normal(size=own))
    bins, unknown = [], []
    for hour in range(hours):
        n = int(rng.geometric(0.1))
        similar = np.sqrt(alike) * rng.normal() + np.sqrt(1 - alike) * rng.normal(size=n)
        if hour >= begin:
            similar[rng.random(n) < changed] = -100
        shares = shares_among(kept, similar)
        bins.append(bins_of(shares))
        unknown.append(int(is_unknown(shares, ASKED).sum()))
    return np.array(bins), np.array(unknown)


def verdict_of(bins: Any, unknown: Any, own: int, **changes: Any) -> Any:
    return find_drift(bins, unknown, np.arange(len(bins)) // BET_HOURS, own=own, max_unknown=ASKED, **changes)


@pytest.mark.parametrize("own", [3, 19, 20, 39, 77, 299, 600])
def test_a_bin_has_its_upper_end(own: int) -> None:
    shares = shares_among(np.arange(own, dtype=float), np.arange(own + 1, dtype=np.float64) - 0.5)
    exact = [Fraction(1 + rank, own + 1) for rank in range(own + 1)]
    expected = [sum(Fraction(b, N_BINS) < p <= Fraction(b + 1, N_BINS) for p in exact) for b in range(N_BINS)]
    assert bins_of(shares).tolist() == expected
    assert bins_of(shares)[0] == is_unknown(shares, 1 / N_BINS).sum()


def test_a_bet_is_fair() -> None:
    """The mean of what is held over all courses of ten hours, each by its probability, is what was there first."""
    limits, begins = np.array([0.3]), np.arange(10) % 3 == 0
    courses = np.array(list(product([0.0, 1.0], repeat=10)))
    chance = np.prod(np.where(courses == 1, 0.3, 0.7), axis=1)
    wealth, _ = _bet(courses[:, :, None], limits, begins)
    assert wealth.shape == (1024, 10)
    np.testing.assert_allclose(chance @ wealth, np.ones(10), rtol=1e-12)
    lower = np.prod(np.where(courses == 1, 0.2, 0.8), axis=1)
    assert (np.diff(lower @ wealth) < 0).all()
    # The first bet alone, by hand, on five stakes.
    by_hand = 0.5**0.5 + (1 - 0.5**0.5) * np.mean([(1 - c + c / 0.3) ** 2 for c in _STAKES])
    assert wealth[-1, 1] == pytest.approx(by_hand)


def test_the_limits_hold_together_for_as_few_own_photos_as_there_are() -> None:
    rng, own, missed = np.random.default_rng(0), 80, 0
    questions = list(_questions(own, ASKED, True))
    for _ in range(1000):
        kept = np.sort(rng.uniform(size=own))
        for side, end, limit in questions:
            rank = int((end or ASKED) * (own + 1))
            # Uniform photos are up to own photo number `rank` with this probability.
            below = kept[rank - 1]
            if (below if side == "unlike" else 1 - below) > limit:
                missed += 1
                break
    assert 0 < missed <= 40  # 25 are promised at most, and the error of counting is 5
    assert questions[0][2] == pytest.approx(beta(4, 77).ppf(0.995))


@pytest.mark.slow
def test_photos_that_have_not_changed_are_hardly_ever_called_so() -> None:
    """Looked at every hour, of models with few own photos; where a plain test of uniformity is mostly wrong."""
    alarms, plain = 0, 0
    for run in range(200):
        bins, unknown = traffic(60, 30, np.random.default_rng([run, 7]))
        found = verdict_of(bins, unknown, 60)
        alarms += found.verdict == "changed"
        total = bins.sum(axis=0)
        plain += chi2.sf(((total - total.mean()) ** 2 / total.mean()).sum(), N_BINS - 1) < 0.05
    assert alarms <= 18  # 5 %, and two and a half errors of counting
    assert plain > 100


@pytest.mark.parametrize("own", [40, 300])
def test_a_change_is_seen_and_when(own: int) -> None:
    off = []
    for run in range(10):
        bins, unknown = traffic(own, 96, np.random.default_rng([run, 8]), changed=0.4, begin=48)
        found = verdict_of(bins, unknown, own)
        assert (found.verdict, found.side) == ("changed", "unlike")
        assert found.evidence >= found.needed == 40
        assert 48 <= found.seen < 96
        off.append(abs(found.since - 48))
    assert np.median(off) <= 12


def test_photos_that_are_sent_again_are_too_alike_but_not_those_of_known_groups() -> None:
    bins = np.zeros((48, N_BINS), dtype=np.int64)
    bins[:, -1] = 5
    found = verdict_of(bins, np.zeros(48, dtype=int), 200)
    assert (found.verdict, found.side, found.since) == ("changed", "alike", 0)
    assert verdict_of(bins, np.zeros(48, dtype=int), 200, both_sides=False).verdict == "no sign of change"


def test_what_cannot_be_told_yet() -> None:
    none = verdict_of(np.zeros((0, N_BINS), dtype=int), np.zeros(0, dtype=int), 200)
    assert (none.verdict, none.evidence, none.least_seen) == ("cannot tell yet", 1.0, None)
    burst = np.zeros((1, N_BINS), dtype=np.int64)
    burst[0, 0] = 100_000
    found = verdict_of(burst, burst[:, 0], 200)
    assert found.verdict == "cannot tell yet", "one hour is one burst, however many photos it has"
    even = np.full((3, N_BINS), 1)
    assert verdict_of(even, np.ones(3, dtype=int), 0).verdict == "cannot tell yet"
    assert verdict_of(even, np.ones(3, dtype=int), 200).verdict == "cannot tell yet"
    empty = np.zeros((40, N_BINS), dtype=int)
    assert verdict_of(empty, np.zeros(40, dtype=int), 200).least_seen is None


def test_what_would_have_been_seen_shrinks_with_time() -> None:
    found = []
    for hours in (4, 12, 480):
        bins, unknown = np.full((hours, N_BINS), 1), np.ones(hours, dtype=int)
        found.append(verdict_of(bins, unknown, 300).least_seen)
    assert found[0] > found[1] > found[2]
    changed = np.full((480, N_BINS), 1)
    changed[:, 0] += round(20 * found[2] / (1 - found[2])) + 1
    assert verdict_of(changed, changed[:, 0], 300).verdict == "changed"


def test_a_share_over_hours_is_students_over_a_ratio() -> None:
    counted, photos = np.array([3, 0, 8, 1]), np.array([10, 5, 20, 15])
    share = share_over_units(counted, photos)
    left = counted - 12 / 50 * photos
    error = np.sqrt(4 / 3 * (left**2).sum()) / 50
    half = student.ppf(0.975, 3) * error
    assert share.mean == pytest.approx(0.24)
    assert (share.low, share.high) == pytest.approx((max(0, 0.24 - half), 0.24 + half))
    assert share_over_units(np.array([0, 4, 0]), np.array([0, 10, 0])).to_json() == {"mean": 0.4, "low": 0, "high": 1}
    assert share_over_units(np.array([0]), np.array([0])).to_json() == {"mean": 0, "low": 0, "high": 1}
    assert share_over_units(np.zeros(9, dtype=int), np.ones(9, dtype=int)).high == pytest.approx(1 - 0.025 ** (1 / 9))


def test_a_median_is_the_end_of_its_bin() -> None:
    assert median_of(np.eye(N_BINS, dtype=int)[3]) == 0.2
    assert median_of(np.ones(N_BINS, dtype=int)) == 0.5
    assert median_of(np.zeros(N_BINS, dtype=int)) is None
