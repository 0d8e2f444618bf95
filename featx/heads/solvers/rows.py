"""Exact shortcuts for L2-penalised linear heads: same optimum as scikit-learn, less work.

A penalised linear head depends on its ``n`` support rows only through the space they span, so ``d``
features shrink to at most ``n - 1`` directions without changing a single prediction
(:class:`RowSpace`). There, in the eigenbasis, a damped Newton method with a diagonal preconditioner
needs a handful of products a fit; folds share the design matrix as 0/1 weights and are solved side by
side; each penalty starts where the last one ended (:class:`NewtonPath`). One eigendecomposition serves
every ridge penalty and its held-out predictions (:func:`ridge_held_out`), and linear discriminants, whose scatter is
diagonal but for the class means and the rows held out (:func:`discriminant_held_out`).

Nothing here is approximate: every function states the plain scikit-learn estimator that it equals, and
``tests/heads/test_solvers.py`` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize

Array: TypeAlias = NDArray[np.float64]
Floats: TypeAlias = NDArray[np.floating[Any]]
Loss: TypeAlias = Literal["softmax", "squared_hinge"]

_MAX_NEWTON = 60
_MAX_CG = 250
#: Squared Newton decrement, per row, at which the last step is taken: twice the nats that are left before it.
TOLERANCE = 1e-9
#: Tolerance from which on penalties are only to be ranked.
_RANKING = 1e-6


class RowSpace:
    """The directions in which the support varies, strongest first; each part is worked out when it is first asked for.

    Parameters
    ----------
    rows : (n, d) the support, or what makes it: the rows themselves are needed for coefficients alone.
    products : (n, n) inner products of the rows, where they are known.
    """

    def __init__(self, rows: NDArray[np.floating] | Callable[[], Array], *, products: Array | None = None) -> None:
        self._made, self._products = rows, products

    @cached_property
    def rows(self) -> Array:
        """The support (n, d)."""
        return np.asarray(self._made() if callable(self._made) else self._made, dtype=np.float64)

    @cached_property
    def origin(self) -> Array:
        """The mean (d,) of the support."""
        return np.asarray(self.rows.mean(axis=0))

    @cached_property
    def products(self) -> Array | None:
        """Inner products (n, n) of the rows, or None where they are more than the rows are."""
        if self._products is None and len(self.rows) <= self.rows.shape[1]:
            return np.asarray(self.rows @ self.rows.T)
        return self._products

    @property
    def lifted_products(self) -> Array | None:
        """Inner products (n, n) of the rows with a last column of ``constant``, or None."""
        return None if self.products is None else self.products + self.constant**2

    @cached_property
    def constant(self) -> float:
        """The root mean squared length of the rows: a constant column in their own scale."""
        known = self.products
        squares = np.einsum("ij,ij->", self.rows, self.rows) if known is None else known.trace()
        return float(np.sqrt(squares / len(self.rows if known is None else known))) or 1.0

    @cached_property
    def coordinates(self) -> Array:
        """The support (n, r) about ``origin`` in an orthonormal basis of r <= min(n - 1, d) directions.

        ``coordinates.T @ coordinates`` is diagonal.
        """
        least = 1e-14
        if self._products is not None:
            to_mean = self._products.mean(axis=1)
            gram = self._products - to_mean - to_mean[:, None] + to_mean.mean()
            values, vectors = np.linalg.eigh(gram)
            # Centring leaves rounding of the size of what it cancels.
            floor = max(values[-1] * least, 1e-16 * float(self._products.trace())) * len(gram)
        else:
            centred = self.rows - self.origin
            tall = len(centred) > centred.shape[1]
            # By the smaller of the two Gram matrices; this eigh is several times faster than SciPy's on one thread.
            values, vectors = np.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
            floor = values[-1] * least * len(vectors)
            if tall:
                return np.asarray(centred @ vectors[:, values > max(floor, 0.0)][:, ::-1])
        # Rounding leaves eigenvalues of about eps * largest where the true one is zero.
        keep = np.flatnonzero(values > max(floor, 0.0))[::-1]
        return np.asarray(vectors[:, keep] * np.sqrt(values[keep]))

    @property
    def is_decomposed(self) -> bool:
        """Whether the coordinates are known already."""
        return "coordinates" in self.__dict__

    @cached_property
    def spread(self) -> Array:
        """Squared length (r,) of the support in each direction."""
        return np.asarray(np.einsum("ij,ij->j", self.coordinates, self.coordinates))

    @cached_property
    def _mean(self) -> tuple[Array, float]:
        """The mean of the support in the basis (r,), and its squared length."""
        known = self._products
        to_mean = self.rows @ self.origin if known is None else known.mean(axis=1)
        return (self.coordinates / self.spread).T @ to_mean, float(to_mean.mean())

    @property
    def lifted_mean(self) -> Array:
        """The mean (r + 1,) of ``lifted``."""
        shift, squared = self._mean
        return np.append(shift, np.sqrt(max(squared - float(shift @ shift), 0.0) + self.constant**2))

    @property
    def mean_squared_norm(self) -> float:
        """Mean squared distance of the rows to their mean; 1 where all rows are the same."""
        if self._products is None:
            total = float(((self.rows - self.origin) ** 2).sum()) / len(self.rows)
        else:
            total = float(self._products.trace()) / len(self._products) - float(self._products.mean())
        return total if total > 1e-12 else 1.0

    @cached_property
    def lifted(self) -> Array:
        """The rows as they are, with a last column of ``constant``, in coordinates (n, r + 1).

        The last direction is that of the constant and of the mean outside the basis: in it all rows are alike. So the
        penalised intercept needs no decomposition of its own.
        """
        return np.hstack([self.coordinates, np.zeros((len(self.coordinates), 1))]) + self.lifted_mean

    def coefficients(self, inner: Array, offset: Array) -> tuple[Array, Array]:
        """What coefficients (r, c) and offsets (c,) of ``coordinates`` are for rows: (c, d) and (c,)."""
        each = self.coordinates @ (inner / self.spread[:, None])
        coef = each.T @ self.rows - np.outer(each.sum(axis=0), self.origin)
        return coef, offset - coef @ self.origin

    def lifted_coefficients(self, inner: Array) -> tuple[Array, Array]:
        """What coefficients (r + 1, c) of ``lifted`` are for rows: (c, d), and intercepts (c,)."""
        *shift, last = self.lifted_mean
        along = inner[-1] / last
        coef, _ = self.coefficients(inner[:-1] - np.outer(shift, along), along)
        return coef + np.outer(along, self.origin), along * self.constant**2

    def dual_coefficients(self, duals: Array) -> tuple[Array, Array]:
        """What a sum of the rows with these weights (n, c), and a constant of ``constant``, is: (c, d) and (c,)."""
        return duals.T @ self.rows, duals.sum(axis=0) * self.constant**2


@dataclass(frozen=True)
class PathPoint:
    """The solutions of all weightings at one penalty.

    ``coef`` (f, r, c), ``intercept`` (f, c) and ``converged`` (f,): f weightings, r directions and c score
    columns (one for each class; a single one for two classes with the squared hinge).
    """

    coef: Array
    intercept: Array
    converged: NDArray[np.bool_]


class NewtonPath:
    """Minimises ``C * sum_i w_i loss_i + |W|^2 / 2`` for several weightings at once, C by C from the nearest before.

    Parameters
    ----------
    rows : (n, r) coordinates, best in the eigenbasis of :class:`RowSpace`, for which the
        preconditioner is made. Any basis gives the right answer, only later.
    labels : (n,) in ``0 .. n_classes - 1``.
    weights : (f, n) one row of 0/1 (or any non-negative) weights for each problem, e.g. each fold.
    loss : ``"softmax"`` equals ``LogisticRegression(C=C)``, two classes included, and its intercept is
        free. ``"squared_hinge"`` equals one-vs-rest ``LinearSVC(C=C)``; its penalised intercept is a
        constant column of the rows.
    tolerance : squared Newton decrement, per row, at which the last step is taken.
    """

    def __init__(
        self,
        rows: Array,
        labels: NDArray[np.integer],
        n_classes: int,
        weights: Array,
        *,
        loss: Loss,
        tolerance: float = TOLERANCE,
    ) -> None:
        # One against the rest is a problem for each class, with its own steps; the softmax ties its classes together.
        self._each = n_classes if loss == "squared_hinge" and n_classes > 2 else 1
        self._problem = _Problem(rows, labels, n_classes, np.repeat(weights, self._each, axis=0), loss)
        self._tolerance = tolerance / self._each
        self._known: list[tuple[Array, Array]] = []  # penalties and their solutions, the latest last

    def solve(self, c: Array, *, like: NewtonPath | None = None) -> PathPoint:
        """The solutions at one C (f,) of each problem.

        ``like`` is a path over other coordinates of the same images, whose weightings are this one's: the weights
        that its last solution gives to the images are where this one starts.
        """
        problem = self._problem
        c = np.repeat(np.asarray(c, dtype=np.float64), self._each)
        known = sorted(self._known, key=lambda each: float(np.abs(np.log(c / each[0])).sum()), reverse=True)[-2:]
        starts = [known[-1][1] if known else np.zeros(problem.shape)]
        if len(known) == 2 and problem.loss == "softmax":
            # Its path is smooth in log C: where it went last time it mostly goes on. That of the hinge has kinks.
            (one, before), (two, last) = known
            on = np.log(c / two) / np.log(two / one)
            starts.append(last + on[None, :, None] * (last - before))
        if like is not None:
            starts.append(self._like(like, c))
        solution, converged = _newton(problem, c, starts, self._tolerance)
        self._known.append((c, solution))
        if problem.loss == "softmax":
            # The same constant on every class changes nothing; scikit-learn's intercepts sum to zero.
            solution[-1] -= solution[-1].mean(axis=-1, keepdims=True)
        found = solution.reshape(len(solution), len(converged) // self._each, -1)
        inner, offset = (found[:-1], found[-1]) if problem.loss == "softmax" else (found, np.zeros(found.shape[1:]))
        fine = np.asarray(converged.reshape(found.shape[1], -1).all(axis=1))
        return PathPoint(np.moveaxis(inner, 1, 0).copy(), offset.copy(), fine)

    def _like(self, other: NewtonPath, c: Array) -> Array:
        """A solution is ``-C`` times the sum of the rows, weighted by the slopes of their losses."""
        last = other._known[-1][1]
        slope, _ = other._problem.slopes(np.asarray(other._problem.apply(last), dtype=np.float64))
        start = -self._problem.back(slope) * (c / self._problem.penalty_scale)[None, :, None]
        if self._problem.loss == "softmax":
            start[-1] = last[-1]
        return np.asarray(start, dtype=np.float64)


class _Problem:
    """Loss, gradient and curvature of ``f`` weightings over the same rows."""

    def __init__(
        self,
        rows: Array,
        labels: NDArray[np.integer],
        n_classes: int,
        weights: Array,
        loss: Loss,
    ) -> None:
        n = len(rows)
        self.design = np.hstack([rows, np.ones((n, 1))]) if loss == "softmax" else rows
        self.single = self.design.astype(np.float32)
        self.spread = np.einsum("ij,ij->j", self.design, self.design) / n
        # (n, f, c), as what is broadcast along a short last axis is several times slower.
        n_columns = n_classes if loss == "softmax" else 1
        self.weights = np.repeat(weights.T[:, :, None].astype(np.float64), n_columns, axis=2)
        self.total = weights.sum(axis=1)
        self.loss = loss
        hot = np.zeros((n, 1, n_classes))
        hot[np.arange(n), 0, labels] = 1.0
        if loss == "squared_hinge":  # each weighting comes once for each class
            signs = 2.0 * hot[:, 0, 1:] - 1.0 if n_classes == 2 else 2.0 * hot[:, 0, :] - 1.0
            hot = np.tile(signs, len(weights) // signs.shape[1])[:, :, None]
        self.target = hot
        # Two softmax columns w, -w carry half the penalty of the one vector 2w of a binomial model.
        self.penalty_scale = 2.0 if loss == "softmax" and n_classes == 2 else 1.0
        self.shape = (self.design.shape[1], len(weights), hot.shape[2])

    def apply(self, solution: Floats) -> Floats:
        """Scores (n, f, c) of a solution (r, f, c), in its precision."""
        design = self.design if solution.dtype == np.float64 else self.single
        flat: Floats = design @ solution.reshape(len(solution), -1)
        return flat.reshape(-1, *solution.shape[1:])

    def back(self, scores: Floats) -> Floats:
        """The transpose of ``apply``."""
        design = self.design if scores.dtype == np.float64 else self.single
        flat: Floats = design.T @ scores.reshape(len(scores), -1)
        return flat.reshape(-1, *scores.shape[1:])

    def value(self, scores: Array) -> Array:
        """Weighted loss (f,) of scores (n, f, c)."""
        if self.loss == "softmax":
            top = scores.max(axis=2, keepdims=True)
            each = np.log(_over_classes(np.exp(scores - top))[:, :, 0]) + top[:, :, 0]
            each -= np.einsum("nfc,nfc->nf", scores, np.broadcast_to(self.target, scores.shape))
        else:
            each = (np.maximum(1.0 - self.target * scores, 0.0) ** 2).sum(axis=2)
        total: Array = np.einsum("nf,nf->f", each, self.weights[:, :, 0])
        return total

    def slopes(self, scores: Array) -> tuple[Array, Array]:
        """Gradient with respect to the scores, and what ``bend`` needs: probabilities or active rows."""
        if self.loss == "softmax":
            state = np.exp(scores - scores.max(axis=2, keepdims=True))
            state /= _over_classes(state)
            return (state - self.target) * self.weights, state
        short = np.maximum(1.0 - self.target * scores, 0.0)
        return -2.0 * self.target * short * self.weights, (short > 0.0).astype(np.float64)

    def bend(self, state: Floats, weighted: Floats, scores: Floats) -> Floats:
        """The Hessian of the loss with respect to the scores, times ``scores``; ``weighted`` is the weighted state."""
        pulled = weighted * scores
        if self.loss == "softmax":
            pulled -= state * _over_classes(pulled)
        else:
            pulled *= 2.0
        return pulled

    def curvature(self, state: Array) -> Array:
        """Mean diagonal curvature (f, c): what the preconditioner takes for the Hessian's middle."""
        diagonal = state * (1.0 - state) if self.loss == "softmax" else 2.0 * state
        total: Array = np.einsum("nfc,nfc->fc", diagonal, self.weights)
        return total


def _over_classes(values: Floats) -> Floats:
    """``values.sum(axis=2, keepdims=True)`` of (n, f, c), by a product, which is ten times faster for a few classes."""
    n, f, c = values.shape
    return (values.reshape(-1, c) @ np.ones((c, 1), dtype=values.dtype)).reshape(n, f, 1)


def _newton(problem: _Problem, c: Array, starts: list[Array], tolerance: float) -> tuple[Array, NDArray[np.bool_]]:
    """One penalty, from the best of some starts: damped Newton steps, each by preconditioned conjugate gradients."""
    ridge = np.zeros(problem.shape)
    ridge += (problem.penalty_scale / c)[None, :, None]
    if problem.loss == "softmax":
        ridge[-1] = 0.0
    solution, scores, value = _standing(problem, ridge, starts[0])
    for start in starts[1:]:
        other, there, reached = _standing(problem, ridge, start)
        better = reached < value
        solution[:, better], scores[:, better] = other[:, better], there[:, better]
        value = np.where(better, reached, value)
    converged = np.zeros(problem.shape[1], dtype=np.bool_)
    # Where values are only to be ranked, steps need not be sharp: fewer products, a few more steps.
    sharpest, enough = (1e-3, tolerance ** (5 / 3)) if tolerance < _RANKING else (0.03, 1e-3 * tolerance)
    enough = enough * problem.total
    for _ in range(_MAX_NEWTON):
        slope, state = problem.slopes(scores)
        gradient = problem.back(slope) + ridge * solution
        gradient[:, converged] = 0.0
        middle = problem.curvature(state)
        preconditioner = ridge + np.maximum(problem.spread[:, None, None] * middle[None], 1e-12)
        step = _conjugate_gradients(problem, state, ridge, gradient, preconditioner, enough, sharpest)
        decrement = -_dots(gradient, step)
        along: Array = np.asarray(problem.apply(step), dtype=np.float64)
        size = np.ones(len(c))
        for _ in range(30):
            trial = solution + size[None, :, None] * step
            moved = scores + size[None, :, None] * along
            reached = problem.value(moved) + 0.5 * _dots(ridge * trial, trial)
            # The slack is what rounding makes of a sum of this size.
            worse = reached > value - 1e-4 * size * decrement + 1e-13 * (np.abs(value) + 1.0)
            if not worse.any():
                break
            size[worse] *= 0.5
        solution, scores, value = trial, moved, reached
        converged |= (decrement <= tolerance * problem.total) & (size == 1.0)
        if converged.all():
            break
    return solution, converged


def _standing(problem: _Problem, ridge: Array, start: Array) -> tuple[Array, Array, Array]:
    """A copy of a solution, its scores, and the penalised loss (f,) of each problem."""
    scores: Array = np.asarray(problem.apply(start), dtype=np.float64)
    return start.copy(), scores, problem.value(scores) + 0.5 * _dots(ridge * start, start)


def _conjugate_gradients(
    problem: _Problem,
    state: Array,
    ridge: Array,
    gradient: Array,
    preconditioner: Array,
    enough: Array,
    sharpest: float,
) -> Array:
    """Solve ``H step = -gradient`` for every problem side by side, to a third or better.

    In single precision: a Newton step need not be exact, because gradient, value and the end of the
    search are double, and single precision moves half the bytes. ``enough`` (f,) is a squared error of the step,
    in nats, below which the search would not notice; ``sharpest`` is the share of the error that is left near the
    optimum.
    """
    single, n_columns = np.float32, problem.shape[2]
    weighted = (state * problem.weights).astype(single)
    residual = (-gradient).astype(single)
    state, ridge, scale = state.astype(single), ridge.astype(single), (1.0 / preconditioner).astype(single)

    def wide(each: Array) -> Floats:
        """One number for each problem as (f, c): see the weights."""
        return np.repeat(each.astype(single), n_columns).reshape(-1, n_columns)

    out, left = np.zeros_like(residual), np.arange(problem.shape[1])
    step = np.zeros_like(residual)
    direction = residual * scale
    power = _dots(residual, direction)
    # Inexact far from the optimum, sharp near it: superlinear steps at the price of few products.
    forcing = np.clip(np.sqrt(power / (problem.total + 1e-300)), sharpest, 0.3)
    goal = np.maximum(power * forcing**2, enough)
    for _ in range(_MAX_CG):
        active = power > goal
        if not active.any():
            break
        if 2 * active.sum() <= len(active):  # the others are done, and cost as much as these
            out[:, left] = step
            every: list[Any] = [state, weighted, ridge, scale, step, residual, direction]
            state, weighted, ridge, scale, step, residual, direction = (each[:, active] for each in every)
            left, power, goal, active = left[active], power[active], goal[active], active[active]
        bent = problem.back(problem.bend(state, weighted, problem.apply(direction)))
        bent += ridge * direction
        curved = _dots(direction, bent)
        length = np.where(active & (curved > 0.0), power / np.where(curved > 0.0, curved, 1.0), 0.0)
        far = wide(length)
        step += far * direction
        residual -= far * bent
        scaled = residual * scale
        fresh = _dots(residual, scaled)
        ratio = np.where(active, fresh / np.where(power > 0.0, power, 1.0), 0.0)
        direction *= wide(ratio)
        direction += scaled
        power = np.where(active, fresh, power)
    out[:, left] = step
    return out.astype(np.float64)


def _dots(left: Floats, right: Floats) -> Array:
    """Inner product of each problem, (f,), of arrays (r, f, c)."""
    total: Array = np.einsum("rfc,rfc->f", left, right).astype(np.float64)
    return total


def hinge_duals(
    products: Array,
    targets: Array,
    weights: NDArray[np.bool_],
    c: Array,
    *,
    start: Array | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Array, NDArray[np.bool_]]:
    """One-vs-rest ``LinearSVC(C=C)`` of several weightings, by the inner products of the rows.

    Newton's method for a function that is quadratic between kinks: with the rows inside the margin known, the
    solution is one Cholesky factor of their inner products (Chapelle, 2007). Best where there are fewer rows than
    features.

    Parameters
    ----------
    products : (n, n) inner products of the rows; the penalised intercept is a constant added to all of them.
    targets : (n, k) of -1 and 1.
    weights : (f, n) which rows each problem has.
    c : (f,) penalty parameter of each.
    start : (n, f, k) duals near the solution.
    tolerance : as of :class:`NewtonPath`; from 1e-5 on, steps are solved for in single precision, whose error is far
        less.

    Returns
    -------
    The weights (n, f, k) that each solution gives to the rows, being their sum; and which problems (f,) converged.
    """
    n, k, n_weights = len(products), targets.shape[1], len(weights)
    sign = np.tile(targets, n_weights)
    inside = np.repeat(weights.T, k, axis=1)
    cs, total = np.repeat(c, k), np.repeat(weights.sum(axis=1), k)
    single = tolerance >= 1e-5
    some, solve = (products.astype(np.float32), linalg.lapack.sposv) if single else (products, linalg.lapack.dposv)
    slack = 0.01 * tolerance * total if single else np.zeros(len(cs))

    def standing(scores: Array, duals: Array) -> tuple[Array, Array]:
        """Penalised loss of each problem, and how far (n, p) its rows are inside the margin."""
        short = np.where(inside, np.maximum(1.0 - sign * scores, 0.0), 0.0)
        return 0.5 * np.einsum("ip,ip->p", duals, scores) / cs + np.einsum("ip,ip->p", short, short), short

    duals = np.zeros_like(sign) if start is None else start.reshape(n, -1)
    scores = products @ duals
    value, short = standing(scores, duals)
    if start is not None:
        none, all_short = standing(np.zeros_like(scores), np.zeros_like(duals))
        poor = value > none
        duals, scores = np.where(poor, 0.0, duals), np.where(poor, 0.0, scores)
        short = np.where(poor, all_short, short)
        value = np.minimum(value, none)
    left = np.arange(len(cs))
    for _ in range(_MAX_NEWTON):
        step = np.zeros((n, len(left)))
        for column, problem in enumerate(left):
            active = np.flatnonzero(short[:, problem])
            if not len(active):
                continue
            system = some.take(active, axis=0).take(active, axis=1)
            system.flat[:: len(active) + 1] += 0.5 / cs[problem]
            # Transposed, for LAPACK works on columns, and would copy what is the same.
            step[active, column] = solve(system.T, sign[active, problem], lower=True, overwrite_a=True)[1]
        step -= duals[:, left]
        along = products @ step
        size, before, was = np.ones(len(left)), value[left], short[:, left] > 0.0
        for _ in range(30):
            duals_there, scores_there = duals.copy(), scores.copy()
            duals_there[:, left] += size * step
            scores_there[:, left] += size * along
            reached, short = standing(scores_there, duals_there)
            worse = reached[left] > before + 1e-13 * (before + 1.0) + slack[left]
            if not worse.any():
                break
            size[worse] *= 0.5
        duals, scores, value = duals_there, scores_there, reached
        settled = (was == (short[:, left] > 0.0)).all(axis=0) | (before - value[left] <= 0.5 * tolerance * total[left])
        left = left[~(settled & (size == 1.0))]
        if not len(left):
            break
    converged = np.ones(len(cs), dtype=np.bool_)
    converged[left] = False
    return duals.reshape(n, n_weights, k), np.asarray(converged.reshape(n_weights, k).all(axis=1))


def ridge_with_held_out(
    space: RowSpace, targets: Array, alpha: float, folds: NDArray[np.integer]
) -> tuple[Array, Array, Array]:
    """``Ridge(alpha)``: coefficients (c, d), intercept (c,), and what :func:`ridge_held_out` gives, by one factor."""
    if _by_products(space):
        duals, held_out = _dual_ridge(space, targets, alpha, folds)
        return *space.dual_coefficients(duals), held_out
    inner, held_out = _ridge(space, targets, alpha, folds)
    return *space.lifted_coefficients(inner), held_out


def ridge_held_out(space: RowSpace, targets: Array, alpha: float, folds: NDArray[np.integer]) -> Array:
    """Predictions (n, c) of ``Ridge(alpha)`` for every row by the fit without its fold, and without refits.

    The intercept is the coefficient of a column of ``space.constant``, and penalised. For a linear smoother with hat
    matrix H the residuals of a held-out block are ``(1 - H_bb)^-1`` times those of the whole fit; exact as long as the
    rows themselves do not depend on the others.
    """
    return (_dual_ridge if _by_products(space) else _ridge)(space, targets, alpha, folds)[1]


def _by_products(space: RowSpace) -> bool:
    """Whether inner products are known, and coordinates are not."""
    return not space.is_decomposed and space.products is not None


def _dual_ridge(space: RowSpace, targets: Array, alpha: float, folds: NDArray[np.integer]) -> tuple[Array, Array]:
    """Weights (n, c) of the rows in the solution, and predictions (n, c) without each fold.

    With the inverse G of the products, they are G y, and the residuals of a held-out block are G_bb^-1 (G y)_b.
    """
    products = space.lifted_products
    assert products is not None
    products.flat[:: len(products) + 1] += alpha
    lower, failed = linalg.lapack.dpotrf(products.T, lower=True, overwrite_a=True, clean=False)
    if not failed:
        lower, failed = linalg.lapack.dpotri(lower, lower=True, overwrite_c=True)
    if failed:
        raise linalg.LinAlgError("inner products of rows are not positive definite")
    duals, out = linalg.blas.dsymm(1.0, lower, targets, lower=True), np.empty_like(targets)
    for fold in range(int(folds.max()) + 1):
        own = np.flatnonzero(folds == fold)
        block = lower[own[:, None], own]  # its lower triangle is of that of the whole, as the rows are ascending
        out[own] = targets[own] - linalg.lapack.dposv(block, duals[own], lower=True)[1]
    return duals, out


def _ridge(space: RowSpace, targets: Array, alpha: float, folds: NDArray[np.integer]) -> tuple[Array, Array]:
    """Coefficients (r + 1, c) of ``space.lifted``, and predictions (n, c) without each fold."""
    z, mean = space.lifted, space.lifted_mean
    # The products of the columns are diagonal but for the mean: the inverse is that of a diagonal, less a term of rank
    # one.
    diagonal = np.append(space.spread, 0.0) + alpha
    across, shrunk = mean / diagonal, z / diagonal
    shrunk -= np.outer(shrunk @ mean, across * (len(z) / (1.0 + len(z) * float(across @ mean))))
    inner = shrunk.T @ targets
    residual, out = targets - z @ inner, np.empty_like(targets)
    for fold in range(int(folds.max()) + 1):
        own = np.flatnonzero(folds == fold)
        some = z[own]
        if z.shape[1] < len(own):  # the same inverse, by Woodbury's identity
            others = z.T @ z - some.T @ some
            others.flat[:: len(others) + 1] += alpha
            out[own] = targets[own] - residual[own] - some @ np.linalg.solve(others, some.T @ residual[own])
        else:
            out[own] = targets[own] - np.linalg.solve(np.eye(len(own)) - shrunk[own] @ some.T, residual[own])
    return inner, out


PRIOR = 8.0
"""Of the temperature of ridge: what suits its scores at one and two shots, on average over image sets."""

_PRIOR_SPREAD = 0.2
"""Standard deviation of its logarithm."""


def temperature(scores: Array, labels: NDArray[np.integer], *, prior: float = PRIOR) -> float:
    """The factor t for which ``softmax(t * scores)`` of held-out scores (n, c) suits the labels best.

    Most probable value under a log-normal prior: few rows that all happen to be right would ask for an
    infinite factor. The prior is for ridge scores on targets -1 and 1 with a penalty of one mean squared norm.
    """

    def cost(log_t: float) -> float:
        z = np.exp(log_t) * scores
        top = z.max(axis=1)
        nats = np.log(np.exp(z - top[:, None]).sum(axis=1)) + top - z[np.arange(len(z)), labels]
        return float(nats.sum() + 0.5 * ((log_t - np.log(prior)) / _PRIOR_SPREAD) ** 2)

    middle = np.log(prior)
    found = optimize.minimize_scalar(cost, bounds=(middle - 3, middle + 3), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def discriminant(space: RowSpace, labels: NDArray[np.integer], n_classes: int, shrinkage: float) -> tuple[Array, Array]:
    """``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)``: coefficients (c, d) and intercepts (c,).

    Where no class has two distinct rows there is no spread within classes to shrink; then the spread of all rows, the
    same in every direction, takes its place, which is a nearest centroid with probabilities.
    """
    if _by_products(space):
        assert space.products is not None
        found = _dual_discriminant(space.products, labels, n_classes, shrinkage, space.rows.shape[1])
        if found is not None:
            return found[0].T @ space.rows, found[1]
    z = space.coordinates
    return space.coefficients(
        *next(_discriminants(z, labels, n_classes, [shrinkage], space.spread, z[:0], space.rows.shape[1]))
    )


def _dual_discriminant(
    products: Array, labels: NDArray[np.integer], n_classes: int, shrinkage: float, n_features: int
) -> tuple[Array, Array] | None:
    """Weights (n, c) of the rows in the coefficients, and intercepts (c,); None where classes have no spread.

    The covariance is ``a X'PX + b``, where P takes class means away, so its inverse is ``(1 - a X'P (b + a PKP)^-1 PX)
    / b`` with the inner products K of the rows (Woodbury): one Cholesky factor, and no decomposition.
    """
    n, counts = len(labels), np.bincount(labels, minlength=n_classes)
    share = (labels[:, None] == np.arange(n_classes)) / counts
    to_means = products @ share
    within = products - to_means[:, labels] - to_means.T[labels] + (share.T @ to_means)[labels[:, None], labels]
    total, everything = float(within.trace()) / n, float(products.trace()) - n * float(products.mean())
    if total <= 1e-12 * everything:
        return None
    about = share - 1.0 / n  # class means about the mean of all
    to_about = products @ about
    pulled = to_about - (share.T @ to_about)[labels]
    a, b = (1.0 - shrinkage) / n, shrinkage * total / n_features
    system = a * within
    system.flat[:: n + 1] += b
    solved = linalg.cho_solve(linalg.cho_factor(system.T, lower=True, overwrite_a=True), pulled)
    duals = (about - a * (solved - (share.T @ solved)[labels])) / b
    along = products @ duals
    return duals, np.log(counts / n) - 0.5 * np.einsum("ij,ij->j", about, along) - along.mean(axis=0)


def discriminant_held_out(
    space: RowSpace,
    labels: NDArray[np.integer],
    n_classes: int,
    shrinkages: Sequence[float],
    folds: NDArray[np.integer],
    n_features: int,
) -> Array:
    """Scores (s, n, c) of every row by the fits of :func:`discriminant` without its fold."""
    z = space.coordinates
    out = np.zeros((len(shrinkages), len(z), n_classes))
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        fits = _discriminants(z[~held], labels[~held], n_classes, shrinkages, space.spread, z[held], n_features)
        for i, (inner, offset) in enumerate(fits):
            out[i, held] = z[held] @ inner + offset
    return out


def _discriminants(
    z: Array,
    labels: NDArray[np.integer],
    n_classes: int,
    shrinkages: Sequence[float],
    spread: Array,
    without: Array,
    n_features: int,
) -> Iterator[tuple[Array, Array]]:
    """Coefficients (r, c) and offsets (c,) for rows (n, r), which with the rows ``without`` have diagonal products.

    Shrinkage spreads the variance over all ``n_features``, also those without any.
    """
    counts = np.bincount(labels, minlength=n_classes).astype(np.float64)
    sums = (labels == np.arange(n_classes)[:, None]).astype(np.float64) @ z
    means = sums / counts[:, None]
    log_prior = np.log(counts / counts.sum())
    within = z - means[labels]
    total = float(np.einsum("ij,ij->", within, within)) / len(z)
    about = z - z.mean(axis=0)
    everything = float(np.einsum("ij,ij->", about, about))
    # The scatter is diagonal, less that of the rows left out and of the means. Where next to nothing is left, the
    # difference of the two is rounding.
    low = total > 1e-4 * everything / len(z) and len(without) + n_classes < z.shape[1]
    removed = np.vstack([without, means * np.sqrt(counts)[:, None]]).T if low else np.zeros((z.shape[1], 0))
    scatter = np.zeros((0, 0)) if low else within.T @ within / len(z)
    for shrinkage in shrinkages:
        if total <= 1e-12 * everything:
            inner = means.T / (everything / len(z))
        elif low:
            diagonal = ((1.0 - shrinkage) / len(z) * spread + shrinkage * total / n_features)[:, None]
            across = removed / diagonal
            middle = np.eye(removed.shape[1]) * (len(z) / max(1.0 - shrinkage, 1e-300)) - removed.T @ across
            inner = means.T / diagonal
            inner += across @ np.linalg.solve(middle, removed.T @ inner)
        else:
            shrunk = (1.0 - shrinkage) * scatter
            shrunk[np.diag_indices_from(shrunk)] += shrinkage * total / n_features
            inner = linalg.cho_solve(linalg.cho_factor(shrunk, lower=True, overwrite_a=True), means.T)
        yield inner, log_prior - 0.5 * np.einsum("ij,ji->i", means, inner)
