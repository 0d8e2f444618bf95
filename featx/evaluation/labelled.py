"""Labelled rows, prepared once for whatever draws from them: sweep, fit, advice, fine-tuning and test sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featx._arrays import NEAR, Index
from featx.errors import UsageError, plural
from featx.evaluation.duplicates import Duplicates, find_duplicates
from featx.evaluation.splits import drawable, joined_sites
from featx.heads import distinct_counts, fold_numbers, site_folds, taken
from featx.store import Alike, FeatureSet, Pictures


@dataclass(frozen=True)
class LabelledRows:
    """The rows of a set of embeddings that have a label, and which of them are copies of each other.

    Attributes
    ----------
    embeddings : (n, d) array of floats, finite.
    labels : (n,) array of int64 in 0 .. c-1.
    rows : (n,) array of intp, ascending: which rows of the input these are.
    class_names : c names; every class has a row.
    duplicates : copies among the n rows.
    notes : sentences about what was left out.
    sites : (n,) dense numbers; rows with the same number belong together (a patient, a camera, a burst), copies among
        them; None where nothing says so.
    """

    embeddings: NDArray[np.floating]
    labels: NDArray[np.int64]
    rows: Index
    class_names: tuple[str, ...]
    duplicates: Duplicates
    notes: tuple[str, ...] = ()
    sites: Index | None = None

    @classmethod
    def of(
        cls,
        embeddings: NDArray[np.floating],
        labels: ArrayLike,
        class_names: Sequence[str],
        *,
        groups: ArrayLike | None = None,
        near_duplicates: Alike = NEAR,
        columns: tuple[int, int] | None = None,
        sites: ArrayLike | None = None,
    ) -> LabelledRows:
        """Take the rows with a label, number their classes anew, and look for copies.

        Parameters
        ----------
        embeddings : (n, d) array of floats.
        labels : (n,) in 0 .. c-1; rows with a negative label are left out.
        class_names : c names, of which those without any row are left out.
        groups : (n,) rows with the same value are exact copies; by default none are.
        near_duplicates : what makes two images copies: their pictures (of the n rows), or a cosine from which on;
            None looks for exact copies only.
        columns : start and stop of the columns that near copies are looked for in; by default all.
        sites : (n,) rows with the same value belong together; "" or a negative number is a row by itself.

        Raises
        ------
        UsageError
            The arrays do not fit, a label has no name, or embeddings are not finite.
        """
        every = np.asarray(labels, dtype=np.int64)
        if embeddings.ndim != 2 or every.shape != embeddings.shape[:1]:
            raise UsageError(
                "embeddings and labels do not fit", expected="(n, d) and (n,)",
                found=f"{embeddings.shape} and {every.shape}",
            )  # fmt: skip
        if every.size and every.max() >= len(class_names):
            raise UsageError("a label has no class name", expected=f"< {len(class_names)}", found=every.max())
        rows = np.flatnonzero(every >= 0)
        kept = taken(embeddings, rows)
        if not np.isfinite(kept).all():
            bad = int(rows[np.flatnonzero(~np.isfinite(kept).all(axis=1))[0]])
            raise UsageError("embeddings must be finite", where=f"row {bad}", hint="Extract them again.")
        present, dense = np.unique(every[rows], return_inverse=True)
        notes = []
        if len(rows) < len(every):
            notes.append(f"{plural(len(every) - len(rows), 'image')} without a label left out.")
        empty = [str(class_names[i]) for i in np.setdiff1d(np.arange(len(class_names)), present).tolist()]
        if empty:
            notes.append(f"Classes without any labelled image were left out: {', '.join(empty)}.")
        duplicates = find_duplicates(
            kept if columns is None else kept[:, slice(*columns)],
            None if groups is None else np.asarray(groups)[rows],
            by=near_duplicates.some(rows) if isinstance(near_duplicates, Pictures) else near_duplicates,
        )
        names = tuple(str(class_names[int(i)]) for i in present)
        kinds = None if sites is None else joined_sites(np.asarray(sites)[rows], duplicates.groups)
        return cls(kept, dense.astype(np.int64), rows, names, duplicates, tuple(notes), kinds)

    @classmethod
    def of_features(cls, features: FeatureSet, columns: tuple[int, int] | None = None) -> LabelledRows:
        """The labelled images of a store outside its split ``test``, which is for one judgement at the end."""
        use = np.flatnonzero((features.labels >= 0) & (features.splits != "test"))
        data = cls.of(
            taken(features.embeddings, use), features.labels[use], features.class_names, groups=features.copies[use],
            near_duplicates=features.near_copies_of(use), columns=columns, sites=sites_of(features, use),
        )  # fmt: skip
        return replace(data, rows=use)

    @property
    def groups(self) -> Index:
        """Dense numbers (n,); rows with the same number are copies of each other."""
        return self.duplicates.groups

    @property
    def counts(self) -> Index:
        """Different images (c,) that each class has for itself."""
        return distinct_counts(self.labels, self.groups, len(self.class_names))

    @property
    def drawable(self) -> Index:
        """Different images (c,) of each class that draws are made from: ``counts``, or what sites leave of them."""
        return drawable(self.labels, self.groups, self.sites, len(self.class_names))

    def folds(self, n_folds: int, random_state: int) -> tuple[Index, list[str]]:
        """Fold (n,) of each row, with whole sites where there are any, and a sentence where that cannot be."""
        across = None if self.sites is None else site_folds(self.labels, self.sites, n_folds, random_state)
        if across is not None:
            return across, []
        notes = []
        if self.sites is not None:
            notes.append(
                "A class has photos of one group only, so groups could not be kept apart: the accuracy is that of new "
                "photos of the same groups."
            )
        return fold_numbers(self.labels, self.groups, n_folds, random_state), notes

    def of_classes(self, wanted: NDArray[np.bool_]) -> LabelledRows:
        """The rows of some of the classes (c,) only."""
        kept = np.flatnonzero(wanted[self.labels])
        sites = None if self.sites is None else np.unique(self.sites[kept], return_inverse=True)[1]
        return replace(
            self, embeddings=taken(self.embeddings, kept), rows=self.rows[kept],
            labels=(np.cumsum(wanted) - 1)[self.labels[kept]],
            class_names=tuple(name for name, use in zip(self.class_names, wanted, strict=True) if use),
            duplicates=replace(
                self.duplicates, groups=np.unique(self.groups[kept], return_inverse=True)[1]
            ),
            sites=sites,
        )  # fmt: skip


def sites_of(features: FeatureSet, rows: Index) -> NDArray[np.str_] | None:
    """The groups (n,) of some images, as :meth:`LabelledRows.of` takes them; None where no image has one."""
    return features.groups[rows] if (features.groups != "").any() else None
