"""Heads that use images without labels: their mean, and for one head the groups they fall into.

``ridge_pool`` names the unlabelled images softly by the nearest class mean, lets them move these means, and after a few
rounds fits a ridge to both: to the labels, and with a bounded weight to what it made of the rest. With one or two
labelled images per class that is worth several points, as a class mean over many images is a better one; with very many
labels it is worth little. The result is a linear head like any other.

The other heads may measure embeddings from the mean of the unlabelled images. Pooled CNN features are non-negative, so
all embeddings share one large direction that says nothing about the class. With one or two images per class its
estimate is poor; the mean of the user's own images without labels is a better one. A mean of other people's images is
not used: with efficientnet_lite0, centring by the mean over four image sets and judging on the fifth was within 0.2
points of not centring at all, and lost half a point on one of the five.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.errors import MismatchError, UsageError
from featx.heads.catalogue import HEADS, Catalogue, Head, Ridge, both_columns, round_robin
from featx.heads.normalise import Normalise
from featx.heads.scorer import softmax, unit_rows
from featx.heads.solvers.rows import Array, RowSpace, temperature
from featx.store import FeatureSet, digest_keys, read_features

MAX_POOL = 1000
"""More unlabelled images than this are thinned evenly: they are solved with the support in every fit."""

_ROUNDS = 5


@dataclass(frozen=True)
class Centre:
    """A mean (d,) from elsewhere, and a sentence on where it is from."""

    mean: NDArray[np.float64]
    told: str


def unlabelled_centre(pool: NDArray[np.floating]) -> Centre:
    """The mean of embeddings (n, d) of images whose labels are not known.

    Raises
    ------
    UsageError
        There are none, or they are not finite.
    """
    if not len(pool):
        raise UsageError("no images without a label", hint="Add some to the store, or name another store.")
    if not np.isfinite(pool).all():
        raise UsageError("embeddings must be finite", where="unlabelled images", hint="Extract them again.")
    told = (
        f"Uses {len(pool)} unlabelled images: heads may measure from their mean, and ridge_pool also learns from the "
        "groups they form. They should show what the labelled images show: others were measured to cost accuracy."
    )
    return Centre(np.asarray(pool, dtype=np.float64).mean(axis=0), told)


class PoolRidge(Ridge):
    """Least squares on the labels and on soft labels of a pool.

    Parameters
    ----------
    pool : (m, d) unlabelled rows, normalised as the rows of ``fit`` are.
    alpha : penalty in units of the mean squared norm of all rows, about their mean.
    sharpness : what cosines to class means are multiplied by before the softmax.
    weight : of the whole pool, in units of the support; a row of the pool never weighs more than a labelled one.
    """

    def __init__(
        self, pool: Array | None = None, alpha: float = 1.0, *, sharpness: float = 10.0, weight: float = 2.0
    ) -> None:
        super().__init__(alpha)
        self.pool = pool
        self.sharpness = sharpness
        self.weight = weight

    def _fit(self, rows: Array, labels: NDArray[np.intp], space: RowSpace | None) -> None:
        if self.pool is None or self.pool.shape[1:] != rows.shape[1:]:
            found = None if self.pool is None else self.pool.shape
            raise ValueError(f"pool of PoolRidge must have shape (m, {rows.shape[1]}), got {found}")
        hot = np.eye(len(self.classes_))[labels]
        coef, self.intercept_ = self._solve(rows, hot, self.pool)
        self.coef_ = coef
        counts = np.bincount(labels)
        n_folds = min(int(counts.min()), 3)
        self.temperature_ = PRIOR
        if n_folds < 2:
            return
        folds = round_robin(labels, n_folds)
        held_out = np.zeros((len(rows), self.coef_.shape[0]))
        for fold in range(n_folds):
            held = folds == fold
            coef, intercept = self._solve(rows[~held], hot[~held], self.pool)
            held_out[held] = rows[held] @ coef.T + intercept
        self.temperature_ = temperature(both_columns(held_out), labels, prior=PRIOR)

    def _solve(self, rows: Array, hot: Array, pool: Array) -> tuple[Array, Array]:
        """Coefficients and intercept for a support (n, d) with targets (n, c) of 0 and 1."""
        soft = soft_labels(rows, hot, pool, sharpness=self.sharpness, weight=self.weight)
        targets = 2.0 * np.vstack([hot, soft]) - 1.0
        targets = targets[:, 1:] if hot.shape[1] == 2 else targets
        each = min(1.0, self.weight * len(rows) / len(pool))
        weights = np.repeat([1.0, each], [len(rows), len(pool)])
        share = weights / weights.sum()
        every = np.vstack([rows, pool])
        origin, offset = share @ every, share @ targets
        root = np.sqrt(weights)[:, None]
        design, wanted = root * (every - origin), root * (targets - offset)
        alpha = self.alpha * max(float((design**2).sum() / weights.sum()), 1e-12)
        wide = len(design) <= design.shape[1]
        gram = design @ design.T if wide else design.T @ design
        gram.flat[:: len(gram) + 1] += alpha
        solved = design.T @ np.linalg.solve(gram, wanted) if wide else np.linalg.solve(gram, design.T @ wanted)
        return solved.T, offset - solved.T @ origin


PRIOR = 5.0
"""Of the temperature: lower than that of :class:`featx.heads.catalogue.Ridge`, because who takes part of the labels
from its own guesses agrees with itself. Five was best for every four of five image sets, at one shot and at two."""


def soft_labels(rows: Array, hot: Array, pool: Array, *, sharpness: float, weight: float) -> Array:
    """Shares (m, c) of the classes in each row of a pool (unit length), by class means that the pool has a say in.

    Soft k-means from the means of the support (Ren et al., 2018), whose rows keep their labels; the whole pool counts
    as ``weight`` supports. By the cosine, not the distance: a mean over many rows is shorter than one row, and by
    distance the class whose mean is shortest would take all.
    """
    own = hot.T @ rows
    each = min(1.0, weight * len(rows) / len(pool))
    sums = own
    for _ in range(_ROUNDS):
        shares = softmax(sharpness * (pool @ unit_rows(sums).T))
        sums = own + each * shares.T @ pool
    return shares


def heads_for(centre: Centre | None, pool: NDArray[np.floating] | None = None) -> Catalogue:
    """The catalogue of heads that measure from ``centre``; with a pool (m, d) of unlabelled embeddings, one more.

    Without a centre these are :data:`featx.heads.catalogue.HEADS` as they are. With a pool the recommended head is
    ``ridge_pool``.
    """
    if centre is None:
        return HEADS
    heads = [head.centred(centre.mean) for head in HEADS.values()]
    if pool is None:
        return Catalogue(*heads)
    some = np.unique(np.linspace(0, len(pool) - 1, min(MAX_POOL, len(pool))).round().astype(int))
    normalised = Normalise("centre_l2", centre.mean).fit_transform(pool[some])
    extra = Head(
        "ridge_pool", PoolRidge, ("centre_l2",), "", (), "log_loss",
        f"ridge that learns from {len(pool)} unlabelled images too", (("pool", normalised),), mean=centre.mean,
    )  # fmt: skip
    return Catalogue(*heads, extra, recommended="ridge_pool")


def unlabelled_rows(features: FeatureSet, rows: Index, other: Path | None = None) -> NDArray[np.float32]:
    """Embeddings (m, d) of those ``rows`` that have no label and of another store, less copies of labelled images.

    Without the copies, no image that a head is judged on is in the pool. Labels of the other store are not read.

    Raises
    ------
    MismatchError
        The other store was made in another way.
    """
    rows = rows[features.labels[rows] < 0]
    embeddings, digests = features.embeddings[rows], features.digests[rows]
    if other:
        more = read_features(other, layer=features.layer)
        if more.fingerprint != features.fingerprint:
            raise MismatchError(
                "the two stores were not made in the same way", where=other,
                expected=f"fingerprint {features.fingerprint[:12]}", found=more.fingerprint[:12],
                hint="Extract both with the same backbone and options.",
            )  # fmt: skip
        embeddings, digests = np.vstack([embeddings, more.embeddings]), np.vstack([digests, more.digests])
    first = np.sort(np.unique(digest_keys(digests), return_index=True)[1])
    labelled = digest_keys(features.digests[features.labels >= 0])
    fresh = first[~np.isin(digest_keys(digests)[first], labelled)]
    return np.asarray(embeddings[fresh], dtype=np.float32)
