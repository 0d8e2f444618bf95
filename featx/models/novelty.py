"""How familiar an image is to a model, so that photos of something else are called unknown.

The score is the mean cosine of a unit embedding to the five most similar of the model's own images: distance to the
nearest neighbours of Sun, Ming, Zhu and Li, "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022
(here the mean of k, which hangs less on one image than the k-th). It was chosen by measurement
(``featx guide benchmarks``) among it, class-wise and common Mahalanobis distance with a shrunken covariance (Lee, Lee,
Lee and Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS
2018; Ledoit and Wolf 2004 for the shrinkage) and the residual to the principal subspace (Wang, Li, Feng and Zhang,
"ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022). All find nearly the same photos. This one needs no
fit, so an image can be left out of its own score exactly and at no cost, and it keeps closest to its promise at ten
images a class.

A score becomes a share by comparison with those of own images, each judged by the others: a conformal p-value with the
+1 correction (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005; of outliers: Bates, Candes,
Lei, Romano and Sesia, "Testing for outliers with conformal p-values", Annals of Statistics 2023): of new photos like
the model's own about a share a has a familiarity of a or less. Each own image is left out by itself instead of a part
being set aside, which few images could not bear; so this holds as the jackknife's intervals do (Barber, Candes, Ramdas
and Tibshirani 2021), and what share is refused is measured at every fit and printed.

:mod:`featx.models.unknown` learns one. Pure, and NumPy alone: arrays in, numbers out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.heads import Array, unit_rows

N_NEAREST = 5
"""Own images whose mean cosine is the score; fewer where there are fewer."""

_BLOCK = 1024
"""Rows at a time: against own images, and in double precision."""

Single: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Familiarity:
    """A model's own images, and how similar each is to the others.

    Parameters
    ----------
    rows : (m, d) of unit length as :func:`featx.heads.unit_rows` makes them, in numbers that half precision holds.
    own : (n,) similarity of own images, each to the others; ascending.
    kind : of the head's normaliser: how several blocks of columns are weighted.
    """

    rows: Single
    own: Array
    kind: str

    def similarity(self, embeddings: NDArray[np.floating]) -> Array:
        """Mean cosine (n,) of embeddings (n, d) to the most similar own images; -1 to 1."""
        parts = [
            # One less than there are: so many others each of them has.
            nearest_mean(_unit(embeddings[part], self.kind) @ self.rows.T, min(N_NEAREST, len(self.rows) - 1))
            for part in _blocks(len(embeddings))
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def shares(self, embeddings: NDArray[np.floating]) -> Array:
        """Familiarity (n,) of embeddings (n, d): the share of own images that look at least as strange; 0 to 1."""
        return shares_among(self.own, self.similarity(embeddings))


def shares_among(own: Array, similarity: Array) -> Array:
    """Conformal p-values (n,) of similarities (n,), among those of own images (m,), which are ascending."""
    return np.asarray((1.0 + np.searchsorted(own, similarity, side="right")) / (len(own) + 1.0))


def is_unknown(familiarity: Array, max_unknown: float) -> NDArray[np.bool_]:
    """Whether images are called unknown, by their familiarity (n,)."""
    return familiarity <= max_unknown * (1.0 + 1e-12)  # 1/20 of 19 images is 0.05, however it is rounded


def kept_rows(embeddings: NDArray[np.floating], which: Index, kind: str) -> Single:
    """Unit rows (m, d) of some embeddings, rounded to half precision: what is kept is what was measured with."""
    parts = [_unit(embeddings[which[part]], kind).astype(np.float16) for part in _blocks(len(which))]
    return np.concatenate(parts).astype(np.float32)


def _unit(embeddings: NDArray[np.floating], kind: str) -> Single:
    return unit_rows(np.asarray(embeddings, dtype=np.float64), kind).astype(np.float32)


def nearest_mean(cosines: Single, k: int) -> Array:
    """The mean (n,) of the ``k`` highest of each row of (n, m)."""
    top = np.partition(cosines, cosines.shape[1] - k, axis=1)[:, -k:]
    # In an order of their own: sums must not depend on how they were sorted out.
    return np.asarray(np.sort(top, axis=1).mean(axis=1, dtype=np.float64))


def _blocks(n: int) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, n, _BLOCK)]
