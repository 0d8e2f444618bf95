"""Ridge fast enough to be fitted after every label: no choice of parameters, one factorisation, all rows held out.

It is the head ``ridge`` with its first parameters (rows of unit length, a penalty of one mean squared norm). What each
row is given by a fit without it follows from the same factorisation, for a linear smoother with hat matrix H: the
residual without row i is that of the whole fit divided by ``1 - H_ii``. With fewer rows than columns the products of
the rows are factorised, else those of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from featx.heads.catalogue import both_columns, signs
from featx.heads.scorer import Array, softmax
from featx.heads.solvers.rows import PRIOR, temperature


@dataclass(frozen=True)
class InstantRidge:
    """A fitted ridge, and what it says of each of its own rows when it has not seen it.

    Attributes
    ----------
    coef : (d + 1, c), or (d + 1, 1) for the second of two classes; the last is of the constant.
    temperature : what scores are multiplied by before the softmax.
    held_out : (n, c) probabilities of the rows it was fitted on, each by a fit without it.
    """

    coef: Array
    temperature: float
    held_out: Array

    @classmethod
    def fit(cls, rows: NDArray[np.floating], labels: NDArray[np.integer], n_classes: int) -> InstantRidge:
        """Fit rows (n, d) of unit length with labels (n,) in 0 .. c-1, of which at least two are there.

        Takes about 0.25 s for 2,000 rows of 1,280 numbers on two cores, and 10 ms for 200.
        """
        x = np.hstack([np.asarray(rows, dtype=np.float64), np.ones((len(rows), 1))])
        targets = signs(labels, n_classes)
        n, width = x.shape
        spread = 1.0 - float(np.square(x[:, :-1].mean(axis=0)).sum())
        alpha = spread if spread > 1e-12 else 1.0
        if n <= width:
            inverse = _inverse(x @ x.T, alpha)
            dual = inverse @ targets
            coef = x.T @ dual
            residual = dual / np.diagonal(inverse)[:, None]
        else:
            inverse = _inverse(x.T @ x, alpha)
            coef = inverse @ (x.T @ targets)
            leverage = np.einsum("ij,ij->i", x @ inverse, x)
            residual = (targets - x @ coef) / np.maximum(1.0 - leverage, 1e-12)[:, None]
        scores = both_columns(targets - residual)
        single = np.bincount(labels, minlength=n_classes).min() < 2  # from which nothing can be held out
        factor = PRIOR if single else temperature(scores, labels)
        return cls(coef, factor, softmax(scores, factor))

    def probabilities(self, rows: NDArray[np.floating]) -> Array:
        """Probabilities (m, c) of rows (m, d) of unit length."""
        scores = rows @ self.coef[:-1].astype(rows.dtype) + self.coef[-1].astype(rows.dtype)
        return softmax(both_columns(np.asarray(scores, dtype=np.float64)), self.temperature)


def _inverse(products: Array, alpha: float) -> Array:
    """The inverse (m, m) of a matrix of products, to whose diagonal ``alpha`` is added."""
    products.flat[:: len(products) + 1] += alpha
    half = linalg.lapack.dpotri(linalg.cholesky(products, lower=True, overwrite_a=True), lower=True)[0]
    return np.asarray(np.tril(half) + np.tril(half, -1).T)
