"""A model for labels that are just being given: ridge without any choice, on the embeddings that a store has.

It is fitted in moments (:mod:`featx.heads.instant`), so that it can follow labels as they come. Nothing was held out to
promise anything, so every answer abstains; ``featx fit`` makes the model that is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.backbones import layer_place, of_layer
from featx.extraction import Embedder
from featx.heads import InstantRidge, Scorer, open_layers, unit_rows
from featx.images import encode
from featx.models.agreement import Voted
from featx.models.bundle import Bundle
from featx.models.fit import probe_pixels
from featx.store import layers_of


class InstantModels:
    """Models on the embeddings of a store, by labels that are kept elsewhere.

    Parameters
    ----------
    store : whose embeddings are used; its labels are not.
    options : as of :meth:`featx.extraction.Embedder.like`.

    Attributes
    ----------
    embedder : what made them.
    place : number of the layer among those of the embedder; None for all of them, combined.
    """

    def __init__(self, store: Path, **options: Any) -> None:
        features, layers, _ = open_layers(store, None)
        self.embedder = Embedder.like(features.provenance, where=store, **options)
        self._features = features
        self._kind = layers.default_kind
        self.place = layer_place(features.layer, layers_of(features.provenance))
        self._rows = {digest.tobytes(): row for digest, row in zip(features.digests, features.embeddings, strict=True)}
        self._probe = encode(probe_pixels())
        self._probe_embedding = of_layer(self.embedder.embed_bytes(self._probe), self.place)[0]

    def row(self, digest: bytes) -> NDArray[np.float32] | None:
        """The embedding (d,) of the photo whose file has this sha256, if it is known."""
        return self._rows.get(digest)

    def add(self, digest: bytes, row: NDArray[np.float32]) -> None:
        """Know the embedding of one photo more."""
        self._rows.setdefault(digest, row)

    def model(self, photos: Iterable[Voted]) -> Bundle:
        """A model by the labels of photos; without two classes, one that has none.

        Photos that people disagree on are left out, and those whose embeddings are not known.
        """
        # In an order of their own, so that the same labels make the same model.
        voted = sorted((bytes.fromhex(each.sha256), each.label) for each in photos if each.label is not None)
        known = [(self._rows[digest], label) for digest, label in voted if digest in self._rows]
        names = tuple(sorted({label for _, label in known}))
        width = self._features.embeddings.shape[1]
        coef, intercept, sharpness = np.zeros((0, width)), np.zeros(0), 1.0
        if len(names) > 1:
            rows = unit_rows(np.stack([row for row, _ in known]).astype(np.float64), self._kind)
            head = InstantRidge.fit(rows, np.array([names.index(label) for _, label in known]), len(names))
            both = np.hstack([-head.coef, head.coef]) if len(names) == 2 else head.coef
            coef, intercept, sharpness = both[:-1].T, both[-1], head.temperature
        else:
            names = ()
        scorer = Scorer(
            kind=self._kind, mean=np.zeros(width), scale=np.ones(width), n_classes=len(names), coef=coef,
            intercept=intercept,
        )  # fmt: skip
        content = hashlib.sha256("\0".join(names).encode())
        content.update(np.ascontiguousarray(np.column_stack([coef, intercept])).tobytes())
        return Bundle(
            scorer=scorer, class_names=names, head="ridge", params={"alpha": 1.0}, layer=self._features.layer,
            provenance={**self._features.provenance, "fingerprint": self._features.fingerprint}, sharpness=sharpness,
            threshold=None, max_error=0.0, golden=self._features.embeddings[:0], probe=self._probe,
            probe_embedding=self._probe_embedding, metrics={"images": len(known)}, sha256=content.hexdigest(),
        )  # fmt: skip
