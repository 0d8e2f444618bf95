"""Search in a store: embeddings in, named matches out. What the command line and the service share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featx._arrays import NEAR
from featx.errors import UsageError, did_you_mean, plural
from featx.evaluation import find_duplicates
from featx.retrieval.gallery import Say, open_gallery
from featx.retrieval.neighbours import GalleryIndex, Method
from featx.retrieval.postprocess import Postprocess, expand_queries
from featx.store import Alike, FeatureSet, digest_keys, read_features

_SUGGEST_BELOW = 50_000


@dataclass(frozen=True)
class Match:
    """One image that was found: its row in the store, id, class name (None for unlabelled) and cosine."""

    row: int
    id: str
    label: str | None
    score: float

    def to_json(self) -> dict[str, Any]:
        """As ``featx search --json`` has it."""
        return {"id": self.id, "label": self.label, "score": self.score}


class ImageSearch:
    """The images of a store, ready to be asked.

    Parameters
    ----------
    features : all rows of the store, of one layer.
    index : the fitted gallery of the (post-processed) embeddings.
    postprocess : what queries go through, as the gallery did; None for nothing.
    expand : neighbours that each query is expanded by; 0 for none.
    """

    def __init__(
        self, features: FeatureSet, index: GalleryIndex, *, postprocess: Postprocess | None = None, expand: int = 0
    ) -> None:
        self.features, self.index, self.postprocess, self.expand = features, index, postprocess, expand

    @classmethod
    def open(
        cls,
        store: str | Path,
        *,
        layer: str = "penultimate",
        method: Method = "auto",
        center: bool = False,
        whiten: int | None = None,
        expand: int = 0,
        say: Say | None = None,
    ) -> ImageSearch:
        """Read a store and make its gallery.

        Parameters
        ----------
        method : see :func:`featx.retrieval.gallery.open_gallery`. A centred or whitened gallery is searched exactly.
        center, whiten : see :class:`featx.retrieval.postprocess.Postprocess`.
        say : gets a sentence before something slow begins.

        Raises
        ------
        StoreError, UsageError
            The store cannot be read, has no images, or an option does not fit it.
        """
        features = read_features(store, layer=layer)
        if not len(features):
            raise UsageError("the store has no images", where=store)
        if not (center or whiten is not None):
            return cls(features, open_gallery(store, features, method=method, say=say), expand=expand)
        if method == "approximate":
            raise UsageError("a centred or whitened gallery is searched exactly", where="method", found=method)
        postprocess = Postprocess(center=center, whiten=whiten).fit(features.embeddings)
        index = GalleryIndex(method="exact").fit(postprocess.transform(features.embeddings))
        return cls(features, index, postprocess=postprocess, expand=expand)

    def query(self, embeddings: ArrayLike, k: int = 10, *, exclude: ArrayLike | None = None) -> list[list[Match]]:
        """The ``k`` most similar images to each of the embeddings (q, d), best first, ties by id.

        ``exclude`` (q,) is a row to leave out of each answer, -1 for none.
        """
        queries = np.asarray(embeddings, dtype=np.float32)
        if self.postprocess is not None:
            queries = self.postprocess.transform(queries)
        if self.expand:
            scores, rows = self.index.search(queries, self.expand, exclude=exclude)
            near = self.features.embeddings[rows]
            if self.postprocess is not None:
                near = self.postprocess.transform(near.reshape(-1, near.shape[-1])).reshape(*rows.shape, -1)
            queries = expand_queries(queries, scores, near)
        scores, rows = self.index.search(queries, k, exclude=exclude)
        return [
            [self._match(row, score) for row, score in zip(*pair, strict=True) if row >= 0]
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _match(self, row: int, score: float) -> Match:
        return Match(row, str(self.features.ids[row]), label_of(self.features, row), score)

    def row_of(self, name: str) -> int | None:
        """The row of an id, or None if the store has no such image."""
        found = np.flatnonzero(self.features.ids == name)
        return int(found[0]) if len(found) else None

    def row_of_content(self, digest: bytes) -> int | None:
        """The first row whose image file has this sha256, or None."""
        found = np.flatnonzero((self.features.digests == np.frombuffer(digest, np.uint8)).all(axis=1))
        return int(found[0]) if len(found) else None

    def no_such_image(self, name: str) -> UsageError:
        """The error for a query that is neither a file nor an id."""
        ids = self.features.ids.tolist() if len(self.features) < _SUGGEST_BELOW else []
        return UsageError("no such file, and no such id in the store", where=name, hint=did_you_mean(name, ids))


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are copies of each other, or nearly.

    Parameters
    ----------
    rows : of the store, the first by id being what the others are compared with.
    similarity : cosine of each with the first.
    exact : each has the bytes of the first.
    across_splits : they lie in more than one split.
    conflicting : they carry more than one label.
    """

    rows: tuple[int, ...]
    similarity: tuple[float, ...]
    exact: tuple[bool, ...]
    across_splits: bool
    conflicting: bool

    def likeness(self, place: int) -> str:
        """How a member is like the first one, for people."""
        if place == 0:
            return "the first"
        return "same bytes" if self.exact[place] else f"cosine {self.similarity[place]:.4f}"

    def title(self, number: int) -> str:
        """A heading for it."""
        remarks = ["across splits"] if self.across_splits else []
        remarks += ["different labels"] if self.conflicting else []
        return f"Group {number}: {plural(len(self.rows), 'image')}" + (f", {', '.join(remarks)}" if remarks else "")


def duplicate_groups(features: FeatureSet, *, by: Alike = NEAR) -> list[DuplicateGroup]:
    """Exact and near duplicates of a store as groups: those across splits first, then those whose labels differ.

    Parameters
    ----------
    by : what makes near duplicates: ``features.near_copies``, a cosine from which on, or None for exact ones only.
    """
    contents = np.unique(digest_keys(features.digests), return_inverse=True)[1]
    found = find_duplicates(features.embeddings, contents, by=by)
    sizes = np.bincount(found.groups, minlength=1)
    order = np.argsort(found.groups, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    groups = [
        _group(features, contents, order[starts[number] : starts[number + 1]])
        for number in np.flatnonzero(sizes > 1).tolist()
    ]
    return sorted(groups, key=lambda each: (not each.across_splits, not each.conflicting, -len(each.rows), each.rows))


def _group(features: FeatureSet, contents: NDArray[np.intp], rows: NDArray[np.intp]) -> DuplicateGroup:
    index = GalleryIndex(method="exact").fit(features.embeddings[rows])
    scores, places = index.search(features.embeddings[rows[:1]], len(rows))
    similarity = dict(zip(places[0].tolist(), scores[0].tolist(), strict=True))
    return DuplicateGroup(
        rows=tuple(rows.tolist()),
        similarity=tuple(similarity[i] for i in range(len(rows))),
        exact=tuple((contents[rows] == contents[rows[0]]).tolist()),
        across_splits=len(set(features.splits[rows].tolist())) > 1,
        conflicting=len(set(features.labels[rows].tolist()) - {-1}) > 1,
    )


def count_duplicates(features: FeatureSet, groups: Sequence[DuplicateGroup]) -> dict[str, int]:
    """How many rows repeat another one exactly or nearly, and how many groups cross splits or labels."""
    contents = len(np.unique(digest_keys(features.digests)))
    exact = len(features) - contents
    return {
        "exact": exact,
        "near": sum(len(group.rows) - 1 for group in groups) - exact,
        "n_groups": len(groups),
        "across_splits": sum(group.across_splits for group in groups),
        "conflicting_labels": sum(group.conflicting for group in groups),
    }


def label_of(features: FeatureSet, row: int) -> str | None:
    """The class name of a row, None where it has none."""
    label = int(features.labels[row])
    return features.class_names[label] if label >= 0 else None
