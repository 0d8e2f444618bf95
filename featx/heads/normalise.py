"""The normalisers: what happens to an embedding before a head sees it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from featx.heads.scorer import KINDS, Array, Kind, is_kind, normalised
from featx.heads.solvers.blocks import moments


class Normalise(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What happens to an embedding before a head sees it.

    Parameters
    ----------
    kind : ``"none"``; ``"l2"`` to unit length; ``"centre_l2"`` minus the mean, then unit length;
        ``"standardise"`` minus the mean, by the standard deviation; ``"power_l2"`` signed square root,
        then unit length; or one of :func:`featx.heads.scorer.blocks_kind`, several layers to unit length and weighted.
    mean : (d,) a mean from elsewhere for ``"centre_l2"`` (:mod:`featx.heads.unlabelled`); by default the support's.
        The other kinds do not look at it.
    """

    def __init__(self, kind: Kind = "l2", mean: ArrayLike | None = None) -> None:
        self.kind = kind
        self.mean = mean

    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Normalise:
        """Learn the mean and the standard deviation (d,), for the kinds that need them."""
        rows = validate_data(self, X, dtype=[np.float64, np.float32])
        if not is_kind(self.kind, rows.shape[1]):
            known = f"one of {', '.join(KINDS)}, or blocks of {rows.shape[1]} columns"
            raise ValueError(f"kind of Normalise must be {known}, got {self.kind!r}")
        own = self.mean is None or self.kind != "centre_l2"
        mean, deviation = moments(rows)
        self.mean_ = mean if own else np.asarray(self.mean, dtype=np.float64)
        if self.mean_.shape != rows.shape[1:]:
            raise ValueError(f"mean of Normalise must have shape {rows.shape[1:]}, got {self.mean_.shape}")
        self.scale_ = np.where(deviation > 0.0, deviation, 1.0)
        return self

    def by_block(self, rows: NDArray[np.floating]) -> dict[str, Any]:
        """How ``fit_blocks`` of :mod:`featx.heads.solvers.blocks` is to normalise rows (n, d) as it reads."""
        check_is_fitted(self)
        if self.kind == "l2":
            length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
            return {"row_scale": 1.0 / np.where(length > 0.0, length, 1.0)}
        if self.kind == "none":
            return {}
        mean, scale = (each.astype(rows.dtype) for each in (self.mean_, self.scale_))
        return {"prepare": partial(normalised, kind=self.kind, mean=mean, scale=scale)}

    def transform(self, X: ArrayLike) -> Array:
        """Normalised rows (n, d), float64."""
        check_is_fitted(self)
        rows: Array = validate_data(self, X, dtype=np.float64, reset=False)
        return normalised(rows, self.kind, self.mean_, self.scale_)
