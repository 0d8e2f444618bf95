"""What a fitted head does to an embedding, in plain NumPy: normalise, score, turn scores into probabilities.

A head is five arrays at most. Written out like this it can be kept without pickle, and predicts without
scikit-learn; that it is the same head is tested against the pipeline it was read off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NewType, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]

BlocksKind = NewType("BlocksKind", str)
"""A normaliser of several layers side by side, written out: see :func:`blocks_kind`."""

Kind: TypeAlias = Literal["none", "l2", "centre_l2", "standardise", "power_l2"] | BlocksKind
KINDS: tuple[Kind, ...] = ("none", "l2", "centre_l2", "standardise", "power_l2")
"""Normalisers: see :class:`featx.heads.normalise.Normalise`."""

_BLOCKS = re.compile(r"blocks_l2:[1-9]\d{0,6}\*[01]\.\d{4}(,[1-9]\d{0,6}\*[01]\.\d{4}){0,255}")

_BLOCK = 1024
"""Query rows at a time against the rows of a nearest-neighbour head."""


class NotLinear(Exception):
    """A head's scores are no sum over the numbers of an embedding."""


@dataclass(frozen=True)
class Scorer:
    """A fitted head.

    Parameters
    ----------
    kind : of the normaliser, one of :data:`KINDS` or of :func:`blocks_kind`.
    mean, scale : (d,) of the normaliser.
    coef, intercept : (c, d) and (c,) of a linear head; of nearest neighbours, ``intercept`` is added to the votes' log.
    rows, targets : (m, d) normalised and (m,) in 0 .. c-1, of a nearest-neighbour head.
    n_neighbors : of a nearest-neighbour head; 0 for a linear one.
    n_classes : c.
    """

    kind: str
    mean: Array
    scale: Array
    n_classes: int
    coef: Array | None = None
    intercept: Array | None = None
    rows: Array | None = None
    targets: NDArray[np.int64] | None = None
    n_neighbors: int = 0

    @classmethod
    def of(cls, pipeline: Any) -> Scorer:
        """Read the arrays off a fitted pipeline of :func:`featx.heads.catalogue.make_head`, whose classes are 0 .. c-1.

        Raises
        ------
        TypeError
            The classifier is neither linear nor nearest neighbours.
        """
        normalise, classify = pipeline.named_steps["normalise"], pipeline.named_steps["classify"]
        if not np.array_equal(classify.classes_, np.arange(len(classify.classes_))):
            raise ValueError(f"labels must be 0 .. c-1, got {classify.classes_!r}")
        common = {"kind": normalise.kind, "mean": normalise.mean_, "scale": normalise.scale_}
        n_classes = len(classify.classes_)
        if hasattr(classify, "coef_"):
            coef, intercept = np.atleast_2d(classify.coef_), np.atleast_1d(classify.intercept_)
            if n_classes == 2 and len(coef) == 1:  # the score of the second class; the first one's is zero
                coef = np.vstack([np.zeros_like(coef), coef])
                intercept = np.concatenate([[0.0], intercept])
            return cls(**common, n_classes=n_classes, coef=coef, intercept=intercept)
        if hasattr(classify, "kneighbors"):
            targets = np.asarray(classify._y, dtype=np.int64).reshape(-1)
            rows = np.asarray(classify._fit_X, dtype=np.float64)
            return cls(**common, n_classes=n_classes, rows=rows, targets=targets, n_neighbors=classify.n_neighbors)
        raise TypeError(f"{type(classify).__name__} is neither linear nor nearest neighbours")

    @property
    def dims(self) -> int:
        """Length d of an embedding."""
        return len(self.mean)

    @property
    def takes_roots(self) -> bool:
        """Whether it takes the root of each number of an embedding."""
        return self.kind == "power_l2"

    def normalised(self, embeddings: NDArray[np.floating]) -> Array:
        """Rows (n, d) as the head sees them."""
        return normalised(np.asarray(embeddings, dtype=np.float64), self.kind, self.mean, self.scale)

    def scores(self, embeddings: NDArray[np.floating]) -> Array:
        """Scores (n, c) of embeddings (n, d); the label is the class with the highest, the first among equals.

        Of nearest neighbours: the log of the votes, with one more vote shared by all classes, as no vote is no proof.
        """
        rows = self.normalised(embeddings)
        if self.coef is not None and self.intercept is not None:
            return np.asarray(rows @ self.coef.T + self.intercept)
        parts = [self._votes(rows[start : start + _BLOCK]) for start in range(0, len(rows), _BLOCK)]
        votes = np.concatenate(parts) if parts else np.zeros((0, self.n_classes))
        scores = np.log((votes + 1.0 / self.n_classes) / (self.n_neighbors + 1.0))
        return np.asarray(scores if self.intercept is None else scores + self.intercept)

    def shifted(self, offsets: Array) -> Scorer:
        """The same head with ``offsets`` (c,) added to its scores."""
        return replace(self, intercept=offsets if self.intercept is None else self.intercept + offsets)

    def linear_form(self, embedding: NDArray[np.floating]) -> tuple[Array, Array, Array]:
        """Weights W (c, d), shift s (d,) and intercept b (c,) with ``scores == W @ (x - s) + b`` for this embedding x.

        What divides x, such as its length, is a number once x is known; so the scores are a sum over the columns of x,
        and over all that x itself is a sum of. A root is such a quotient, too, ``x / sqrt(x)``; as each column has its
        own, the sum holds, but weighs columns by how small they are (:attr:`takes_roots`).

        Raises
        ------
        NotLinear
            The scores are no such sum; the message is a sentence that says why.
        """
        if self.coef is None or self.intercept is None:
            raise NotLinear("Nearest neighbours count votes of whole photos, which no part of a photo has a share in.")
        x, none = np.asarray(embedding, dtype=np.float64), np.zeros(self.dims)
        if self.takes_roots:
            roots = np.sqrt(np.abs(x))
            quotients = np.divide(1.0, roots, out=np.zeros(self.dims), where=roots > 0)
            return self.coef * quotients / _length(roots), none, self.intercept
        if self.kind == "standardise":
            return self.coef / self.scale, self.mean, self.intercept
        if blocks := blocks_of(self.kind):
            sizes = [size for size, _ in blocks]
            parts = np.split(x, np.cumsum(sizes)[:-1])
            factors = [weight / _length(part) for (_, weight), part in zip(blocks, parts, strict=True)]
            return self.coef * np.repeat(factors, sizes), none, self.intercept
        shift = self.mean if self.kind == "centre_l2" else none
        return (self.coef if self.kind == "none" else self.coef / _length(x - shift)), shift, self.intercept

    def _votes(self, rows: Array) -> Array:
        assert self.rows is not None
        assert self.targets is not None
        distance = np.einsum("ij,ij->i", self.rows, self.rows) - 2.0 * rows @ self.rows.T
        nearest = np.argsort(distance, axis=1, kind="stable")[:, : self.n_neighbors]
        hits = self.targets[nearest][:, :, None] == np.arange(self.n_classes)
        return np.asarray(hits.sum(axis=1), dtype=np.float64)


def blocks_kind(blocks: Sequence[tuple[int, float]]) -> BlocksKind:
    """The normaliser that brings each block of columns to unit length, and multiplies it by a weight.

    Parameters
    ----------
    blocks : number of columns and weight (0 .. 1, kept to four decimals) of each, in the order of the columns.
    """
    return BlocksKind("blocks_l2:" + ",".join(f"{size}*{weight:.4f}" for size, weight in blocks))


def blocks_of(kind: str) -> list[tuple[int, float]]:
    """The inverse of :func:`blocks_kind`; empty for any other kind."""
    if not _BLOCKS.fullmatch(kind):
        return []
    pairs = (block.split("*") for block in kind.removeprefix("blocks_l2:").split(","))
    return [(int(size), float(weight)) for size, weight in pairs]


def is_kind(kind: object, dims: int) -> bool:
    """Whether this is the name of a normaliser for rows of so many columns."""
    return kind in KINDS or (isinstance(kind, str) and sum(size for size, _ in blocks_of(kind)) == dims)


def normalised(rows: Array, kind: str, mean: Array, scale: Array) -> Array:
    """Rows (n, d) after the normaliser ``kind`` with its mean and standard deviation (d,)."""
    if kind == "none":
        return rows
    if blocks := blocks_of(kind):
        out, start = np.empty_like(rows), 0
        for size, weight in blocks:
            part = rows[:, start : start + size]
            length = np.sqrt(np.einsum("ij,ij->i", part, part))[:, None]
            np.multiply(part, weight / np.where(length > 0.0, length, 1.0), out=out[:, start : start + size])
            start += size
        return out
    if kind == "standardise":
        return (rows - mean) / scale
    if kind == "centre_l2":
        rows = rows - mean
    elif kind == "power_l2":
        rows = np.sign(rows) * np.sqrt(np.abs(rows))
    return _unit(rows)


def unit_rows(rows: ArrayLike, kind: str = "l2") -> Array:
    """Rows (n, d) of unit length, and those of zeros as they are.

    Of several layers, each by itself and weighted as by the normaliser ``kind``.
    """
    wide = np.asarray(rows, dtype=np.float64)
    return normalised(wide, kind, wide, wide) if blocks_of(kind) else _unit(wide)


def _unit(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0.0, length, 1.0))


def _length(row: Array) -> float:
    """By which :func:`_unit` divides."""
    return float(np.linalg.norm(row)) or 1.0


def softmax(scores: Array, sharpness: float = 1.0) -> Array:
    """Probabilities (n, c) of scores (n, c), or of (n,) log-odds for the second of two classes, times ``sharpness``."""
    both = np.column_stack([np.zeros(len(scores)), scores]) if scores.ndim == 1 else scores
    power: Array = np.exp(sharpness * (both - both.max(axis=1, keepdims=True)))
    power /= power.sum(axis=1, keepdims=True)
    return power


def margins(scores: Array) -> Array:
    """How far the highest score of each row of (n, c) is above the second, (n,)."""
    top = np.sort(scores, axis=1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0])
