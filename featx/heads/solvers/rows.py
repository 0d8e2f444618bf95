"""Exact shortcuts for L2-penalised linear heads: same optimum as scikit-learn, less work.

A penalised linear head depends on its ``n`` support rows only through the space they span, so ``d``
features shrink to at most ``n - 1`` directions without changing a single prediction
(:class:`RowSpace`). There, in the eigenbasis, a damped Newton method with a diagonal preconditioner
needs a handful of products a fit; folds share the design matrix as 0/1 weights and are solved side by
side; each penalty starts where the last one ended (:func:`newton_path`). One eigendecomposition serves
every ridge penalty and its held-out predictions (:func:`ridge_held_out`); linear discriminants take a
Cholesky factor for each shrinkage (:func:`discriminant_path`).

Nothing here is approximate: every function states the plain scikit-learn estimator that it equals, and
``tests/heads/test_solvers.py`` holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RowSpace:
    """The directions in which the support varies, strongest first.

    Attributes
    ----------
    origin : (d,) the support's mean, or zeros where it was not centred.
    basis : (d, r) orthonormal columns, r <= min(n - 1, d) when centred, else r <= min(n, d).
    coordinates : (n, r) the support in this basis; ``coordinates.T @ coordinates`` is diagonal.
    """

    origin: Array
    basis: Array
    coordinates: Array

    @classmethod
    def of(cls, rows: NDArray[np.floating], *, centre: bool = True) -> RowSpace:
        """Span ``rows`` (n, d) by the eigenvectors of the smaller of the two Gram matrices."""
        dense = np.asarray(rows, dtype=np.float64)
        origin = dense.mean(axis=0) if centre else np.zeros(dense.shape[1])
        centred = dense - origin if centre else dense
        tall = len(dense) > dense.shape[1]
        gram = centred.T @ centred if tall else centred @ centred.T
        values, vectors = np.linalg.eigh(gram)  # several times faster than SciPy's on one thread
        # Rounding leaves eigenvalues of about eps * largest where the true one is zero.
        keep = np.flatnonzero(values > max(values[-1], 0.0) * len(gram) * 1e-14)[::-1]
        vectors = vectors[:, keep]
        if tall:
            return cls(origin, vectors, centred @ vectors)
        singular = np.sqrt(values[keep])
        return cls(origin, (centred.T @ vectors) / singular, vectors * singular)

    def project(self, rows: NDArray[np.floating]) -> Array:
        """Coordinates (m, r) of other rows (m, d); what lies outside the span cannot matter."""
        return (np.asarray(rows, dtype=np.float64) - self.origin) @ self.basis


@dataclass(frozen=True)
class PathPoint:
    """The solutions of all weightings at one penalty.

    ``coef`` (f, r, c), ``intercept`` (f, c) and ``converged`` (f,): f weightings, r directions and c score
    columns (one for each class; a single one for two classes with the squared hinge).
    """

    coef: Array
    intercept: Array
    converged: NDArray[np.bool_]


def newton_path(
    rows: Array,
    labels: NDArray[np.integer],
    n_classes: int,
    weights: Array,
    cs: Sequence[Array],
    *,
    loss: Loss,
    fit_intercept: bool = True,
    tolerance: float = TOLERANCE,
) -> Iterator[PathPoint]:
    """Minimise ``C * sum_i w_i loss_i + |W|^2 / 2`` for several weightings at once, C by C.

    Parameters
    ----------
    rows : (n, r) coordinates, best in the eigenbasis of :class:`RowSpace`, for which the
        preconditioner is made. Any basis gives the right answer, only later.
    labels : (n,) in ``0 .. n_classes - 1``.
    weights : (f, n) one row of 0/1 (or any non-negative) weights for each problem, e.g. each fold.
    cs : for each point of the path the penalty parameter C of each problem, (f,); ascending is fastest.
    loss : ``"softmax"`` equals ``LogisticRegression(C=C)``, two classes included, and its intercept is
        free. ``"squared_hinge"`` equals one-vs-rest ``LinearSVC(C=C)``; its penalised intercept is a
        constant column that the caller appends, with ``fit_intercept=False``.

    Yields
    ------
    PathPoint
        One for each entry of ``cs``; generated, so that a long path need not be held in memory.
    """
    # One against the rest is a problem for each class, with steps of its own; the softmax ties its classes together.
    each_class = n_classes if loss == "squared_hinge" and n_classes > 2 else 1
    problem = _Problem(rows, labels, n_classes, np.repeat(weights, each_class, axis=0), loss, fit_intercept)
    tolerance /= each_class
    known: list[tuple[Array, Array]] = []  # the last two penalties and their solutions
    for each in cs:
        c = np.repeat(np.asarray(each, dtype=np.float64), each_class)
        starts = [known[-1][1] if known else np.zeros(problem.shape)]
        if len(known) == 2 and loss == "softmax":
            # Its path is smooth in log C: where it went last time it mostly goes on. That of the hinge has kinks.
            (first, before), (second, last) = known
            on = np.log(c / second) / np.log(second / first)
            starts.append(last + on[None, :, None] * (last - before))
        solution, converged = _newton(problem, c, starts, tolerance)
        known = [*known[-1:], (c, solution)]
        if fit_intercept and loss == "softmax":
            # The same constant on every class changes nothing; scikit-learn's intercepts sum to zero.
            solution[-1] -= solution[-1].mean(axis=-1, keepdims=True)
        found = solution.reshape(len(solution), len(weights), -1)
        inner = found[:-1] if fit_intercept else found
        offset = found[-1] if fit_intercept else np.zeros(found.shape[1:])
        fine = np.asarray(converged.reshape(len(weights), -1).all(axis=1))
        yield PathPoint(np.moveaxis(inner, 1, 0).copy(), offset.copy(), fine)


class _Problem:
    """Loss, gradient and curvature of ``f`` weightings over the same rows."""

    def __init__(
        self,
        rows: Array,
        labels: NDArray[np.integer],
        n_classes: int,
        weights: Array,
        loss: Loss,
        fit_intercept: bool,
    ) -> None:
        n = len(rows)
        self.design = np.hstack([rows, np.ones((n, 1))]) if fit_intercept else rows
        self.single = self.design.astype(np.float32)
        self.spread = np.einsum("ij,ij->j", self.design, self.design) / n
        # (n, f, c), as what is broadcast along a short last axis is several times slower.
        n_columns = n_classes if loss == "softmax" else 1
        self.weights = np.repeat(weights.T[:, :, None].astype(np.float64), n_columns, axis=2)
        self.total = weights.sum(axis=1)
        self.loss, self.fit_intercept = loss, fit_intercept
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
    if problem.fit_intercept:
        ridge[-1] = 0.0
    solution, scores, value = _standing(problem, ridge, starts[0])
    for start in starts[1:]:
        other, there, reached = _standing(problem, ridge, start)
        better = reached < value
        solution[:, better], scores[:, better] = other[:, better], there[:, better]
        value = np.where(better, reached, value)
    converged = np.zeros(problem.shape[1], dtype=np.bool_)
    enough = tolerance ** (5 / 3) * problem.total
    for _ in range(_MAX_NEWTON):
        slope, state = problem.slopes(scores)
        gradient = problem.back(slope) + ridge * solution
        gradient[:, converged] = 0.0
        middle = problem.curvature(state)
        preconditioner = ridge + np.maximum(problem.spread[:, None, None] * middle[None], 1e-12)
        step = _conjugate_gradients(problem, state, ridge, gradient, preconditioner, enough)
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
    problem: _Problem, state: Array, ridge: Array, gradient: Array, preconditioner: Array, enough: Array
) -> Array:
    """Solve ``H step = -gradient`` for every problem side by side, to a tenth or better.

    In single precision: a Newton step need not be exact, because gradient, value and the end of the
    search are double, and single precision moves half the bytes. ``enough`` (f,) is a squared error of the step,
    in nats, below which the search would not notice.
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
    forcing = np.clip(np.sqrt(power / (problem.total + 1e-300)), 1e-3, 0.1)
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


def ridge_coefficients(
    space: RowSpace, targets: Array, alpha: float, *, fit_intercept: bool = True
) -> tuple[Array, Array]:
    """``Ridge(alpha).fit``: coefficients (c, d) and intercept (c,) for targets (n, c).

    Without ``fit_intercept`` the space has to be one that was not centred.
    """
    z = space.coordinates
    offset = targets.mean(axis=0) if fit_intercept else np.zeros(targets.shape[1])
    inner = (z.T @ (targets - offset)) / (np.einsum("ij,ij->j", z, z) + alpha)[:, None]
    coef = (space.basis @ inner).T
    return coef, offset - coef @ space.origin


def ridge_held_out(
    space: RowSpace,
    targets: Array,
    alpha: float,
    folds: NDArray[np.integer] | None = None,
    *,
    fit_intercept: bool = True,
) -> Array:
    """Predictions (n, c) of ``Ridge(alpha)`` for every row by the fit without its fold, and without refits.

    For a linear smoother with hat matrix H the residuals of a held-out block are ``(1 - H_bb)^-1`` times
    those of the whole fit; exact as long as the rows themselves do not depend on the others. By default each
    row is a fold of its own (leave-one-out).
    """
    z = space.coordinates
    offset = targets.mean(axis=0) if fit_intercept else np.zeros(targets.shape[1])
    constant = 1.0 / len(z) if fit_intercept else 0.0  # the intercept's share of the hat matrix
    shrunk = z / (np.einsum("ij,ij->j", z, z) + alpha)
    residual = targets - offset - shrunk @ (z.T @ (targets - offset))
    if folds is None:
        leverage = constant + np.einsum("ij,ij->i", shrunk, z)
        return np.asarray(targets - residual / np.maximum(1.0 - leverage, 1e-12)[:, None])
    out = np.empty_like(targets)
    for fold in range(int(folds.max()) + 1):
        own = np.flatnonzero(folds == fold)
        if z.shape[1] + 1 < len(own) < len(z):  # the same inverse, by Woodbury's identity
            some = np.column_stack([z[own], np.full(len(own), constant**0.5)])
            inner = np.diag(np.append(np.einsum("ij,ij->j", z, z) + alpha, 1.0)) - some.T @ some
            out[own] = targets[own] - residual[own] - some @ np.linalg.solve(inner, some.T @ residual[own])
            continue
        left = np.eye(len(own)) - constant - shrunk[own] @ z[own].T
        if len(own) == len(z):  # nothing is left to fit, and the block is singular
            out[own] = targets[own] - np.linalg.lstsq(left, residual[own], rcond=None)[0]
        else:
            out[own] = targets[own] - np.linalg.solve(left, residual[own])
    return out


def temperature(scores: Array, labels: NDArray[np.integer], *, prior: float = 8.0, spread: float = 0.2) -> float:
    """The factor t for which ``softmax(t * scores)`` of held-out scores (n, c) suits the labels best.

    Most probable value under a log-normal prior: few rows that all happen to be right would ask for an
    infinite factor. The prior is what suits ridge scores on targets -1 and 1 with a penalty of one mean squared
    norm at one and two shots: 8 on average over image sets, with a standard deviation of its logarithm of 0.2.
    """

    def cost(log_t: float) -> float:
        z = np.exp(log_t) * scores
        top = z.max(axis=1)
        nats = np.log(np.exp(z - top[:, None]).sum(axis=1)) + top - z[np.arange(len(z)), labels]
        return float(nats.sum() + 0.5 * ((log_t - np.log(prior)) / spread) ** 2)

    middle = np.log(prior)
    found = optimize.minimize_scalar(cost, bounds=(middle - 3, middle + 3), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def discriminant_path(
    space: RowSpace,
    labels: NDArray[np.integer],
    n_classes: int,
    shrinkages: Sequence[float],
    *,
    n_features: int | None = None,
) -> Iterator[tuple[Array, Array]]:
    """``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`` for every s, in the row space.

    Yields coefficients (c, d) and intercepts (c,). Where no class has two distinct rows there is no
    spread within classes to shrink; then the spread of all rows, the same in every direction, takes its
    place, which is a nearest centroid with probabilities. ``n_features`` is d where the rows of ``space`` are
    projections already: shrinkage spreads the variance over all features, also those without any.
    """
    z, d = space.coordinates, n_features or len(space.origin)
    counts = np.bincount(labels, minlength=n_classes).astype(np.float64)
    means = np.zeros((n_classes, z.shape[1]))
    np.add.at(means, labels, z)
    means /= counts[:, None]
    within = z - means[labels]
    scatter = within.T @ within / len(z)
    total = float(np.trace(scatter))
    log_prior = np.log(counts / counts.sum())
    everything = float(np.einsum("ij,ij->", z, z))
    for shrinkage in shrinkages:
        if total <= 1e-12 * everything:
            inner = means / (everything / len(z))
        else:
            shrunk = (1.0 - shrinkage) * scatter
            shrunk[np.diag_indices_from(shrunk)] += shrinkage * total / d
            inner = linalg.cho_solve(linalg.cho_factor(shrunk, lower=True, overwrite_a=True), means.T).T
        coef = inner @ space.basis.T
        half = 0.5 * np.einsum("ij,ij->i", means, inner)
        yield coef, log_prior - half - coef @ space.origin
