"""Logistic regression over many rows: the embeddings are read block by block, in single precision, and never copied.

:func:`is_large` says from where on :func:`featx.heads.selection.fit_chosen` takes this path.

50,000 rows of 1,280 features are 256 MB, and a solver that converts them to double, centres them or appends a column
holds a gigabyte. Here centring and normalising are folded into the products, sums over rows are double, and
what is kept for each row is a few numbers of each class. The method is Newton's, each step by conjugate
gradients preconditioned in the eigenbasis of the features' covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from featx.heads.solvers.rows import TOLERANCE, Array

Single: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.floating]

LARGE = 2**24
"""Numbers (rows times dimensions) from which rows are large: 128 MB in double precision, of which a plain fit holds
several copies."""

_BLOCK = 4096
_CACHED = 2**16
"""Numbers that stay in the processor's cache while they are worked on."""
_MAX_NEWTON = 40
_MAX_CG = 250


def is_large(rows: Rows) -> bool:
    """Whether rows (n, d) are worked on block by block, by one worker with all threads."""
    return rows.size >= LARGE


def taken(rows: NDArray[np.floating], index: NDArray[np.intp]) -> NDArray[np.floating]:
    """``rows[index]`` for an ascending index, but no copy where that is all of them."""
    return rows if len(index) == len(rows) else rows[index]


def row_blocks(n: int) -> Iterator[slice]:
    """Slices of a few thousand rows each, over n."""
    return (slice(start, start + _BLOCK) for start in range(0, n, _BLOCK))


def moments(rows: Rows) -> tuple[Array, Array]:
    """Mean and standard deviation (d,) of rows (n, d), in double precision and without a copy of them."""
    mean = rows.mean(axis=0, dtype=np.float64)
    squares, step = np.zeros_like(mean), max(1, _CACHED // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        apart = rows[start : start + step] - mean
        squares += np.einsum("ij,ij->j", apart, apart)
    return mean, np.sqrt(squares / len(rows))


def fit_blocks(
    rows: Rows,
    labels: NDArray[np.integer],
    n_classes: int,
    c: float,
    *,
    row_scale: Rows | None = None,
    prepare: Callable[[Rows], Rows] | None = None,
    scale_free: bool = False,
) -> tuple[Array, Array, bool]:
    """``LogisticRegression(C=c)`` by blocks of rows.

    Parameters
    ----------
    rows : (n, d), finite; float32 and contiguous is best.
    labels : (n,) in 0 .. n_classes - 1.
    row_scale : (n,) factor of each row: one over its length stands for rows of unit length, and costs nothing.
    prepare : any other normaliser, as what happens to a block of rows (b, d) every time that it is used.
    scale_free : whether C is in units of the spread of the rows, as of :class:`featx.heads.catalogue.Logistic`.

    Returns
    -------
    Coefficients (c, d) and intercepts (c,), a single row for two classes; and whether it converged.
    """
    problem = _Blocks(rows, labels, n_classes, row_scale, prepare)
    unit = problem.mean_squared_norm if scale_free else 1.0
    # Two softmax columns w, -w carry half the penalty of the one vector 2w of a binomial model.
    converged, solution = _newton(problem, (2.0 if n_classes == 2 else 1.0) * unit / c)
    inner, offset = solution[:-1].T, solution[-1] - solution[-1].mean()
    offset = offset - inner @ problem.mean
    if n_classes == 2:
        inner, offset = np.diff(inner, axis=0), np.diff(offset)
    return inner.copy(), offset, converged


class _Blocks:
    """The centred and scaled rows as an operator; solutions are (d + 1, c), the last row the intercept."""

    def __init__(
        self,
        rows: Rows,
        labels: NDArray[np.integer],
        n_classes: int,
        scale: Rows | None,
        prepare: Callable[[Rows], Rows] | None,
    ) -> None:
        self.rows, self.prepare = rows, prepare
        self.scale = None if scale is None else np.asarray(scale, dtype=np.float32)[:, None]
        self.labels, self.n_classes = labels, n_classes
        self.n, self.d = self.rows.shape
        total, gram, squares = np.zeros(self.d), np.zeros((self.d, self.d)), 0.0
        for part in self.parts():
            block = self.block(part)
            if self.scale is not None:
                block = block * self.scale[part]
            total += block.sum(axis=0, dtype=np.float64)
            gram += block.T @ block
            squares += float(np.einsum("ij,ij->", block, block, dtype=np.float64))
        self.mean = total / self.n
        spread = squares / self.n - float(self.mean @ self.mean)
        self.mean_squared_norm = spread if spread > 1e-12 * squares / self.n else 1.0  # equal rows, but for rounding
        values, self.basis = np.linalg.eigh(gram / self.n - np.outer(self.mean, self.mean))
        self.spread = np.append(np.maximum(values, 0.0), 1.0)

    def parts(self) -> Iterator[slice]:
        return row_blocks(self.n)

    def block(self, part: slice) -> Single:
        """Prepared rows (b, d), not yet scaled."""
        some = self.rows[part] if self.prepare is None else self.prepare(self.rows[part])
        return np.ascontiguousarray(some, dtype=np.float32)

    def apply(self, part: slice, block: Single, solution: Single, shift: Single) -> Single:
        """Scores (b, c) of a block of rows; ``shift`` is what :meth:`shift` makes of the solution."""
        scores: Single = block @ solution
        if self.scale is not None:
            scores *= self.scale[part]
        scores += shift
        return scores

    def shift(self, solution: Array) -> Single:
        """What centring and the intercept add to every score (c,)."""
        return np.asarray(solution[-1] - self.mean @ solution[:-1], dtype=np.float32)

    def back(self, part: slice, block: Single, slopes: Single, out: Array) -> None:
        """Add the transpose of ``apply`` to ``out`` (d + 1, c)."""
        total = slopes.sum(axis=0, dtype=np.float64)
        out[:-1] += block.T @ (slopes if self.scale is None else slopes * self.scale[part])
        out[:-1] -= np.outer(self.mean, total)
        out[-1] += total

    def scores(self, solution: Array) -> Single:
        """Scores (n, c) of all rows."""
        single, shift = solution[:-1].astype(np.float32), self.shift(solution)
        out = np.empty((self.n, self.n_classes), dtype=np.float32)
        for part in self.parts():
            out[part] = self.apply(part, self.block(part), single, shift)
        return out

    def value(self, scores: Single, along: Single | None = None, size: float = 0.0) -> float:
        """Loss of ``scores + size * along``, summed in double."""
        total = 0.0
        for part in self.parts():
            z = scores[part].astype(np.float64)
            if along is not None:
                z += size * along[part]
            own = z[np.arange(len(z)), self.labels[part]].copy()
            top = z.max(axis=1, keepdims=True)
            z -= top
            total += float((np.log(np.exp(z, out=z).sum(axis=1)) + top[:, 0] - own).sum())
        return total

    def slopes(self, scores: Single) -> tuple[Single, Array, Array]:
        """Probabilities (n, c), gradient (d + 1, c) and total curvature (c,) of the loss."""
        state, gradient = np.empty_like(scores), np.zeros((self.d + 1, self.n_classes))
        curvature = np.zeros(self.n_classes)
        for part in self.parts():
            z = np.exp(scores[part] - scores[part].max(axis=1, keepdims=True))
            z /= z.sum(axis=1, keepdims=True)
            state[part] = z
            curvature += (z * (1.0 - z)).sum(axis=0, dtype=np.float64)
            z[np.arange(len(z)), self.labels[part]] -= 1.0
            self.back(part, self.block(part), z, gradient)
        return state, gradient, curvature

    def bend(self, state: Single, direction: Array) -> Array:
        """The Hessian of the loss times ``direction`` (d + 1, c)."""
        out = np.zeros_like(direction)
        single, shift = direction[:-1].astype(np.float32), self.shift(direction)
        for part in self.parts():
            block = self.block(part)
            z = self.apply(part, block, single, shift)
            z *= state[part]
            z -= state[part] * z.sum(axis=1, keepdims=True)
            self.back(part, block, z, out)
        return out

    def precondition(self, residual: Array, diagonal: Array) -> Array:
        """Divide by ``diagonal`` (d + 1, c) in the eigenbasis of the features."""
        turned = np.vstack([self.basis.T @ residual[:-1], residual[-1:]]) / diagonal
        return np.vstack([self.basis @ turned[:-1], turned[-1:]])


def _newton(problem: _Blocks, penalty: float) -> tuple[bool, Array]:
    ridge = np.full((problem.d + 1, 1), penalty)
    ridge[-1] = 0.0
    solution = np.zeros((problem.d + 1, problem.n_classes))
    scores = problem.scores(solution)
    value = problem.value(scores) + 0.5 * float((ridge * solution**2).sum())
    for _ in range(_MAX_NEWTON):
        state, gradient, curvature = problem.slopes(scores)
        gradient += ridge * solution
        diagonal = ridge + np.maximum(problem.spread[:, None] * curvature, 1e-12 * problem.n)
        step = _conjugate_gradients(problem, state, ridge, gradient, diagonal)
        decrement = -float((gradient * step).sum())
        along = problem.scores(step)
        size = 1.0
        for _ in range(30):
            trial = solution + size * step
            reached = problem.value(scores, along, size) + 0.5 * float((ridge * trial**2).sum())
            # Scores are single: their rounding is the slack, and it averages out over rows.
            if reached <= value - 1e-4 * size * decrement + 1e-8 * abs(value):
                break
            size *= 0.5
        # Afresh rather than added up, so that rounding does not gather.
        solution, value, scores = trial, reached, problem.scores(trial)
        if decrement <= TOLERANCE * problem.n and size == 1.0:
            return True, solution
    return False, solution


def _conjugate_gradients(problem: _Blocks, state: Single, ridge: Array, gradient: Array, diagonal: Array) -> Array:
    step, residual = np.zeros_like(gradient), -gradient
    direction = problem.precondition(residual, diagonal)
    power = float((residual * direction).sum())
    forcing = float(np.clip(np.sqrt(power / problem.n), 1e-3, 0.1))
    goal = max(power * forcing**2, 1e-4 * TOLERANCE * problem.n)
    for _ in range(_MAX_CG):
        if power <= goal:
            break
        bent = problem.bend(state, direction) + ridge * direction
        length = power / float((direction * bent).sum())
        step += length * direction
        residual -= length * bent
        scaled = problem.precondition(residual, diagonal)
        fresh = float((residual * scaled).sum())
        direction = scaled + (fresh / power) * direction
        power = fresh
    return step
