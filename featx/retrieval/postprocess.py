"""What is known to help retrieval, as options: centring, PCA whitening, query expansion. All without labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin

from featx.errors import UsageError
from featx.heads import unit_rows

EXPANSION_POWER = 3.0
"""Neighbours enter an expanded query by the third power of their cosine (Radenović et al., 2018)."""


class Postprocess(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Length 1, then centred or whitened by the gallery, then length 1 again. Learns no labels.

    Parameters
    ----------
    center : subtract the gallery's mean: what all its images have in common says nothing about any of them.
    whiten : number of principal axes to keep, each divided by its standard deviation (Jégou and Chum, 2012, "Negative
        evidences and co-occurrences in image retrieval: the benefit of PCA and whitening"). It centres too.

    Attributes
    ----------
    mean_ : (d,) of the gallery's rows of length 1.
    axes_ : (d, whiten), or None.
    """

    def __init__(self, *, center: bool = False, whiten: int | None = None) -> None:
        self.center = center
        self.whiten = whiten

    def fit(self, X: ArrayLike, y: object = None) -> Postprocess:
        """Learn mean and axes of the gallery (n, d).

        Raises
        ------
        UsageError
            More axes are asked for than the gallery has.
        """
        rows = unit_rows(X)
        n, d = rows.shape
        self.mean_ = rows.mean(axis=0) if (self.center or self.whiten is not None) and n else np.zeros(d)
        self.axes_: NDArray[np.float64] | None = None
        if self.whiten is not None:
            most = min(n - 1, d)
            if not 1 <= self.whiten <= most:
                raise UsageError(
                    "this gallery cannot be whitened so",
                    where="whiten",
                    expected=f"1 to {most} axes for {n} images",
                    found=self.whiten,
                )
            centred = rows - self.mean_
            values, vectors = np.linalg.eigh(centred.T @ centred / (n - 1))
            values, vectors = values[::-1][: self.whiten], vectors[:, ::-1][:, : self.whiten]
            if values[-1] <= 1e-10 * values[0]:
                rank = int((values > 1e-10 * values[0]).sum())
                raise UsageError(
                    "the gallery has fewer axes than that",
                    where="whiten",
                    expected=f"at most {rank}",
                    found=self.whiten,
                )
            self.axes_ = vectors / np.sqrt(values)
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:
        """Rows (m, d) as float32 (m, d) or (m, whiten), of length 1."""
        rows = unit_rows(X) - self.mean_
        if self.axes_ is not None:
            rows = rows @ self.axes_
        return unit_rows(rows).astype(np.float32)


def expand_queries(queries: ArrayLike, scores: ArrayLike, neighbours: ArrayLike) -> NDArray[np.float32]:
    """Add to each query its nearest neighbours, so that what they share weighs more.

    Average query expansion (Chum et al., 2007) with weights cosine ** 3 (Radenović, Tolias and Chum, 2018,
    "Fine-tuning CNN image retrieval with no human annotation").

    Parameters
    ----------
    queries : (q, d).
    scores : (q, m) cosines of the neighbours; those at or below 0, and -inf, add nothing.
    neighbours : (q, m, d).

    Returns
    -------
    float32 (q, d), of length 1.
    """
    weights = np.maximum(np.asarray(scores, dtype=np.float64), 0.0) ** EXPANSION_POWER
    rows = np.asarray(neighbours, dtype=np.float64)
    flat = unit_rows(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
    return unit_rows(unit_rows(queries) + np.einsum("qm,qmd->qd", weights, flat)).astype(np.float32)
