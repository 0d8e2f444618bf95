"""What speaks for two classes on photos of a store: what a report shows beside confused and suspicious photos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featx.cli.terminal import say
from featx.errors import FeatxError

if TYPE_CHECKING:
    from featx._arrays import Index
    from featx.heads import Layers
    from featx.images import Originals
    from featx.store import FeatureSet

_SIDE = 224


def evidence_of(
    store: Path,
    features: FeatureSet,
    columns: Layers,
    rows: Index,
    originals: Originals,
    *,
    random_state: int,
    progress: Callable[[int, int, str], None],
) -> Callable[[Sequence[tuple[int, str, str]]], Mapping[int, bytes]]:
    """Pictures of evidence, made of the recommended head on the reference layer, which has not seen these photos.

    Parameters
    ----------
    store : what was swept, for messages.
    features, columns : of it.
    rows : of the features, those that a report counts.
    originals : the photos of these rows.
    random_state : seed of the head's choice.
    progress : as of a sweep.
    """

    def make(wanted: Sequence[tuple[int, str, str]]) -> Mapping[int, bytes]:
        try:
            return _make(wanted)
        except FeatxError as error:  # a network that cannot be had, or one without maps: the report stands without
            say(f"Note: no evidence is shown. {error}", err=True)
            return {}

    def _make(wanted: Sequence[tuple[int, str, str]]) -> Mapping[int, bytes]:
        import numpy as np

        from featx.extraction import Embedder
        from featx.heads import HEADS, Scorer, fit_chosen
        from featx.images import whole_pictures
        from featx.models import Explainer
        from featx.reports import pair_jpeg

        origins = {row: origin for row, *_ in wanted if (origin := originals.origin(row)) is not None}
        if not origins:
            return {}
        groups, labels = features.copies[rows], features.labels[rows]
        kept = np.flatnonzero((labels >= 0) & ~np.isin(groups, groups[list(origins)]))
        names, known = np.unique(labels[kept], return_inverse=True)
        own = features.embeddings[rows[kept]][:, slice(*columns.columns(columns.reference))]
        _, local = np.unique(groups[kept], return_inverse=True)
        _, pipeline = fit_chosen(HEADS["auto"], own, known, local, random_state=[random_state, 0])
        embedder = Embedder.like(features.provenance, where=store)
        place = columns.names.index(columns.reference)
        classes = [features.class_names[name] for name in names]
        explainer = Explainer(Scorer.of(pipeline), classes, embedder, place)
        pictures = list(whole_pictures(list(origins.values()), side=_SIDE))
        explained = explainer.explain_files(origins.values())
        made: dict[int, bytes] = {}
        pairs = {row: pair for row, *pair in wanted}
        for number, (row, picture, found) in enumerate(zip(origins, pictures, explained, strict=True), 1):
            progress(number, len(origins), "photos explained")
            if isinstance(picture, str) or isinstance(found, Exception) or not set(pairs[row]) <= set(classes):
                continue
            made[row] = pair_jpeg(picture, found, [classes.index(name) for name in pairs[row]])
        return made

    return make
