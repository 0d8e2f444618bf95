"""Copies among images, which must not stand on both sides of a split: equal bytes, and pictures that look the same.

Copies belong to images and not to networks: :class:`featx.store.reader.Pictures` finds those that were saved anew,
scaled or mirrored with random weights, too. Stores without hashes fall back on nearly equal embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from featx._arrays import NEAR, Index
from featx.errors import plural
from featx.images import mirrored_hashes, mirrored_thumbnails
from featx.store import Alike, Pictures

ALIKE = 0.9
"""Cosine from which on pairs that do not count as copies are reported: copies saved anew often lie there."""

BITS, LOOSE_BITS = 40, 112
"""Bits of 256 in which hashes of copies differ at most, and those of copies whose thumbnails are next to equal.

The hash alone is not enough: fine textures have little in the low frequencies, so that saving them anew turns many
bits, and scans of one kind are alike in them. So thumbnails have to agree as well, to within a quarter (0.15 with more
bits) of their contrast, and a rounding error. Measured on five sets of photos and on digits, 397 to 1,200 images each:
99.2 to 100 % of the copies that were saved anew at JPEG quality 60, scaled to two thirds or mirrored are found, and of
10,000 pairs of other images none on photos and 0.4 on digits of 8 x 8 pixels are taken for copies.
"""

_TILE = 1024
"""Rows that are compared with 16 times as many at once: 64 MB of cosines, however large the gallery."""

_MAX_PAIRS = 10_000_000
"""Pairs of near duplicates that are kept before they become groups: n equal images make n * n / 2 of them."""


@dataclass(frozen=True)
class Duplicates:
    """Copies among the rows.

    Attributes
    ----------
    groups : (n,) dense numbers; rows with the same number are copies of each other.
    exact : rows that repeat the bytes of an earlier row.
    near : further rows that are nearly the same as an earlier one.
    n_groups : groups of two or more rows.
    alike : pairs of different images that have a cosine of :data:`ALIKE` or more all the same.
    by : what made near copies; None where none were looked for.
    """

    groups: Index
    exact: int
    near: int
    n_groups: int
    alike: int
    by: Alike

    @property
    def sentence(self) -> str:
        """What was found and what became of it, or ""; no more is claimed than was looked for."""
        if not self.n_groups:
            return ""
        groups = plural(self.n_groups, "group")
        if self.by is None:
            return (
                f"{plural(self.exact, 'exact duplicate')} in {groups}, each on one side; near ones were not looked for."
            )
        counted = f"{self.exact} exact and {plural(self.near, 'near duplicate')}"
        return f"{counted} in {groups}: no group is in support and query at once."

    @property
    def notes(self) -> list[str]:
        """A sentence on pairs that may be copies unknown as such, or none."""
        if not self.alike:
            return []
        return [
            f"{plural(self.alike, 'more pair')} of images with a cosine above {ALIKE:g}: if these are copies saved "
            f"anew, accuracy looks too high. featx duplicates --threshold {ALIKE:g} lists them."
        ]

    def to_json(self) -> dict[str, int]:
        """Counts as ``summary.json`` has them."""
        return {"exact": self.exact, "near": self.near, "groups": self.n_groups}


def find_duplicates(
    embeddings: NDArray[np.floating], groups: ArrayLike | None = None, *, by: Alike = NEAR
) -> Duplicates:
    """Group exact copies (given as ``groups``, e.g. of equal digests) and near ones.

    Parameters
    ----------
    embeddings : (n, d), finite.
    groups : (n,) rows with the same value are exact copies; by default none are.
    by : the pictures of the n images, or the cosine of embeddings from which on two are near duplicates; None looks
        for none. Being alike is taken as transitive.
    """
    n = len(embeddings)
    exact = dense(groups, n)
    n_exact = int(exact.max()) + 1 if n else 0
    joined, alike = exact, 0
    if by is not None and n:
        first = np.unique(exact, return_index=True)[1]
        if isinstance(by, Pictures):
            near = _same_pictures(by.some(first))
        else:
            near, alike = _near(embeddings if n_exact == n else embeddings[first], by)
        joined = near[exact]
    sizes = np.bincount(joined) if n else np.zeros(0, dtype=np.intp)
    return Duplicates(joined, n - n_exact, n_exact - len(sizes), int((sizes > 1).sum()), alike, by)


def _same_pictures(pictures: Pictures) -> Index:
    """Groups (n,) of images that look the same, or the same in a mirror."""
    bits, thumbnails = _signs(pictures.hashes), pictures.pixels.astype(np.float32)
    turned = _signs(mirrored_hashes(pictures.hashes)), mirrored_thumbnails(pictures.pixels).astype(np.float32)
    contrast = _contrast(thumbnails)
    near: list[NDArray[np.intp]] = []
    groups: Index = np.arange(len(bits))
    waiting = 0
    for start in range(0, len(bits), _TILE):
        here = slice(start, min(start + _TILE, len(bits)))
        for other in range(start, len(bits), 16 * _TILE):
            there = slice(other, min(other + 16 * _TILE, len(bits)))
            for other_bits, other_thumbnails in ((bits, thumbnails), turned):
                different = (bits.shape[1] - bits[here] @ other_bits[there].T) / 2
                left, right = np.nonzero(different <= LOOSE_BITS)
                once = left + start < right + other
                left, right = left[once], right[once]
                bits_apart = different[left, right]
                left, right = left + start, right + other
                least = np.minimum(contrast[left], contrast[right])
                close = np.zeros(len(left), dtype=np.bool_)
                for part in range(0, len(left), _TILE):
                    some = slice(part, part + _TILE)
                    apart = thumbnails[left[some]] - other_thumbnails[right[some]]
                    rms = np.sqrt(np.einsum("ij,ij->i", apart, apart) / apart.shape[1])
                    close[some] = (rms <= 0.15 * least[some] + 1.0) | (
                        (bits_apart[some] <= BITS) & (rms <= 0.25 * least[some] + 2.0)
                    )
                near.append(np.stack([left[close], right[close]]))
                waiting += near[-1].shape[1]
        if waiting > _MAX_PAIRS:
            groups, near, waiting = _join(groups, near), [], 0
    return _join(groups, near)


def _signs(hashes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The bits of hashes (n, 32) as -1 and 1 (n, 256): their products count the bits that differ."""
    return np.unpackbits(hashes, axis=1).astype(np.float32) * 2.0 - 1.0


def _contrast(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    """Root mean square (n,) of what the pixels of a thumbnail (n, p) differ from the mean colour, in grey levels."""
    pictures = thumbnails.reshape(len(thumbnails), -1, 3)
    return np.asarray(np.sqrt(pictures.var(axis=1).mean(axis=1)))


def _pairs(rows: NDArray[np.floating], threshold: float) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """Pairs (2, m) of rows with at least this cosine, and their cosines (m,), tile by tile."""
    length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    scale = 1.0 / np.where(length > 0, length, 1.0).astype(np.float32)
    for start in range(0, len(rows), _TILE):
        here = np.asarray(rows[start : start + _TILE], dtype=np.float32) * scale[start : start + _TILE, None]
        for other in range(start, len(rows), 16 * _TILE):
            # Scaled after the product: the embeddings may be large, and are not copied.
            scores = here @ np.asarray(rows[other : other + 16 * _TILE], dtype=np.float32).T
            scores *= scale[other : other + 16 * _TILE]
            left, right = np.nonzero(scores >= threshold)
            pairs = np.stack([left + start, right + other])
            once = pairs[0] < pairs[1]
            yield pairs[:, once], scores[left[once], right[once]]


def _near(rows: NDArray[np.floating], threshold: float) -> tuple[Index, int]:
    """Groups (n,) of near copies; and how many pairs of different groups, by their first rows, are alike.

    Of more than :data:`_MAX_PAIRS` pairs, those that become copies by way of later ones are counted among the alike.
    """
    groups: Index = np.arange(len(rows))
    near: list[NDArray[np.intp]] = []
    others: list[NDArray[np.intp]] = []
    alike = waiting = 0
    for pairs, scores in _pairs(rows, min(threshold, ALIKE)):
        close = scores >= threshold
        near.append(pairs[:, close])
        others.append(pairs[:, ~close & (scores >= ALIKE)])
        waiting += near[-1].shape[1] + others[-1].shape[1]
        if waiting > _MAX_PAIRS:
            groups = _join(groups, near)
            alike += _between(groups, others)
            near, others, waiting = [], [], 0
    groups = _join(groups, near)
    return groups, alike + _between(groups, others)


def _between(groups: Index, pairs: Sequence[NDArray[np.intp]]) -> int:
    """How many of the pairs are of the first rows of their groups."""
    first = np.zeros(len(groups), dtype=np.bool_)
    first[np.unique(groups, return_index=True)[1]] = True
    return sum(int(first[each].all(axis=0).sum()) for each in pairs)


def _join(groups: Index, pairs: Sequence[NDArray[np.intp]]) -> Index:
    """Groups (n,) after those with a pair of rows in common have become one; dense, in the order of their first row."""
    ends = groups[np.concatenate([np.empty((2, 0), dtype=np.intp), *pairs], axis=1)]
    graph = sparse.coo_array((np.ones(ends.shape[1], dtype=np.int8), (ends[0], ends[1])), shape=(len(groups),) * 2)
    return dense(connected_components(graph, directed=False)[1][groups], len(groups))


def dense(groups: ArrayLike | None, n: int) -> Index:
    """Groups (n,) numbered 0, 1, ... in the order of their first row; where nothing repeats, 0 .. n-1."""
    if groups is None:
        return np.arange(n)
    _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    return np.unique(first[inverse], return_inverse=True)[1]
