"""Learning curves against scipy's own least squares, and what their intervals promise, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from featx.advice.curves import MIN_POINTS, fit_curve, fit_power_law
from featx.errors import UsageError

SHOTS = (1, 2, 5, 10, 20)


def simulated(
    rng: np.random.Generator,
    shots: tuple[int, ...] = SHOTS,
    parameters: tuple[float, float, float] = (0.05, 0.5, 0.5),
    images: int = 400,
    draws: int = 20,
) -> NDArray[np.float64]:
    """Hits of a head whose error is a power law; images differ in difficulty, draws in luck; a tenth is not judged."""
    c, a, b = parameters
    hard, luck = rng.uniform(0, 2, images), rng.normal(0, 0.01, (draws, len(shots), 1))
    error = (c + a * np.asarray(shots, float) ** -b)[None, :, None] * hard + luck
    hits = (rng.random((draws, len(shots), images)) > error).astype(float)
    hits[np.broadcast_to(rng.random((draws, 1, images)) < 0.1, hits.shape)] = np.nan
    return hits


@pytest.mark.parametrize("parameters", [(0.05, 0.5, 0.5), (0.0, 0.4, 0.2), (0.2, 0.3, 1.2)])
def test_the_fit_is_as_good_as_scipys(parameters: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(0)
    n, weights = np.array(SHOTS), rng.uniform(0.5, 2.0, len(SHOTS))
    c, a, b = parameters
    errors = c + a * n.astype(float) ** -b + rng.normal(0, 0.004, (3, len(n)))
    for row, found in zip(errors, fit_power_law(n, errors, weights), strict=True):
        (c, a, b), _ = curve_fit(
            lambda x, c, a, b: c + a * x**-b, n.astype(float), row, p0=(0.1, 0.4, 0.5), sigma=weights**-0.5,
            bounds=([0, -2, 0.05], [1, 2, 2.0]),
        )  # fmt: skip
        theirs = (weights * (row - (c + a * n.astype(float) ** -b)) ** 2).sum()
        ours = (weights * (row - (found[0] + found[1] * n.astype(float) ** -found[2])) ** 2).sum()
        assert (max(ours - theirs, 0.0) / weights.sum()) ** 0.5 < 1e-3  # a tenth of a point


def test_exact_points_are_fitted_exactly_and_carried_on() -> None:
    n = np.array([1, 2, 5, 10, 20, 50])
    truth = 0.1 + 0.6 * n.astype(float) ** -0.5
    (found,) = fit_power_law(n, truth[None], np.ones(6))
    assert found[0] + found[1] * 100 ** -found[2] == pytest.approx(0.1 + 0.06, abs=2e-3)


def test_measured_points_are_the_means_over_draws_and_images() -> None:
    hits = simulated(np.random.default_rng(1))
    curve = fit_curve(SHOTS, hits, resamples=200)
    for i, each in enumerate(curve.measured):
        assert each.mean == pytest.approx(np.nanmean(hits[:, i]))
        assert each.low < each.mean < each.high
    assert curve.accuracy(20).mean == pytest.approx(curve.measured[-1].mean, abs=0.02)


@pytest.mark.slow
def test_the_interval_of_a_gain_covers_the_truth() -> None:
    _, a, b = 0.05, 0.5, 0.5
    truth = a * (20.0**-b - 30.0**-b)
    covered = told = 0
    for seed in range(60):
        hits = simulated(np.random.default_rng([7, seed]), images=300, draws=10)
        gain = fit_curve(SHOTS, hits, resamples=200, random_state=seed).gain(20, 30)
        covered += gain.interval.low <= truth <= gain.interval.high
        told += gain.verdict == "worth"
    assert covered >= 54  # 95 % is promised; 90 % of sixty is two and a half standard errors below
    assert told >= 40


def test_no_gain_is_claimed_where_there_is_none() -> None:
    claims = 0
    for seed in range(40):
        hits = simulated(np.random.default_rng([8, seed]), parameters=(0.3, 0.0, 1.0), images=200, draws=8)
        claims += fit_curve(SHOTS, hits, resamples=200, random_state=seed).gain(20, 30).verdict == "worth"
    assert claims <= 4


@pytest.mark.slow
def test_where_hardly_anything_is_left_to_gain_that_is_known() -> None:
    rng = np.random.default_rng(1)
    curve = fit_curve(SHOTS, simulated(rng, parameters=(0.1, 0.3, 2.0), images=20_000, draws=20))
    gain = curve.gain(20, 30)
    assert gain.verdict == "little", gain
    assert max(abs(gain.interval.low), abs(gain.interval.high)) < 0.005
    assert curve.gain(1, 2).verdict == "worth"


def test_always_right_is_not_surely_always_right() -> None:
    curve = fit_curve((1, 2, 5, 10), np.ones((5, 4, 30)))
    assert [point.low for point in curve.measured] == pytest.approx([0.025 ** (1 / 30)] * 4)


def test_too_few_points_too_few_images_and_a_bent_curve_cannot_tell() -> None:
    rng = np.random.default_rng(2)
    few = fit_curve(SHOTS[: MIN_POINTS - 1], simulated(rng, SHOTS[: MIN_POINTS - 1]), resamples=100)
    assert few.gain(5, 15).verdict == "cannot tell"
    assert "only 3 could be measured" in few.gain(5, 15).reason
    small = fit_curve(SHOTS, simulated(rng, images=8, draws=2), resamples=200)
    assert small.gain(20, 200).verdict == "cannot tell"
    # A curve that rises by a power law and then falls at its last point is no power law: its miss widens what it says.
    hits = simulated(rng)
    hits[:, -1] = np.where(np.isnan(hits[:, -1]), np.nan, rng.random(hits[:, -1].shape) < 0.5)
    bent = fit_curve(SHOTS, hits, resamples=200)
    assert bent.miss > 0.2
    assert bent.gain(20, 40).verdict == "cannot tell"


def test_the_same_seed_gives_the_same_curve_and_another_nearly_so() -> None:
    hits = simulated(np.random.default_rng(3))
    first, again, other = (fit_curve(SHOTS, hits, resamples=300, random_state=seed) for seed in (0, 0, 1))
    assert first.gain(20, 30) == again.gain(20, 30)
    assert other.gain(20, 30).interval.low == pytest.approx(first.gain(20, 30).interval.low, abs=0.01)


@pytest.mark.parametrize("shots", [(5,), (5, 5), (5, 2)])
def test_numbers_that_make_no_curve_are_refused(shots: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="two or more ascending"):
        fit_curve(shots, np.ones((3, len(shots), 4)))
    with pytest.raises(UsageError, match="no image was judged"):
        fit_curve((1, 2), np.full((3, 2, 4), np.nan))
