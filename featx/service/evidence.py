"""The store beside a model: the nearest labelled images as evidence, and small pictures of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.errors import MismatchError, UsageError
from featx.images import NoDecoder, Thumbnails
from featx.models import Bundle
from featx.retrieval import GalleryIndex
from featx.service.guard import Refusal
from featx.store import check_same, is_packed, layers_of, read_features, read_manifest

SIDE = 160
"""Pixels of a thumbnail's side: twice what the page shows, for fine screens."""

_KEPT = 512


class Evidence:
    """The labelled images of a store, to be searched by embedding.

    Parameters
    ----------
    store : whose embeddings are searched; it must be made as the bundle's was.
    bundle : the model that is served.
    images : the folder that ids are relative to; by default where the store says its images are.

    Raises
    ------
    MismatchError
        Store and bundle are of different networks, weights or preprocessing, or have no class in common.

    Attributes
    ----------
    notes : sentences about classes that only one of the two has.
    """

    def __init__(self, store: Path, bundle: Bundle, images: Path | None = None) -> None:
        layers = layers_of(bundle.provenance)
        of, *others = bundle.provenance.get("backbones", [bundle.provenance])
        # Of a head on several layers, the one that search is best on; of several networks, the first one's.
        name = bundle.layer if bundle.layer in layers else layers[0]
        if name != bundle.layer and not others and "penultimate" in layers:
            name = "penultimate"
        self.layer = layers.index(name)
        features = read_features(store, layer=name if others else f"{of.get('backbone')}/{name}")
        try:
            check_same(features.provenance, of, store)
        except MismatchError as error:
            raise MismatchError(
                f"store and model do not belong together: {error.what}",
                where=store,
                expected=str(error.expected),
                found=str(error.found).replace("this run's", "the model's"),
                hint="Serve the model with the store that it was fitted on, or fit it again.",
            ) from error
        rows = np.flatnonzero(features.labels >= 0)
        if not len(rows):
            raise UsageError("the store has no labelled image", where=store)
        self.path = store
        self.ids = features.ids[rows]
        self.labels = [features.class_names[int(label)] for label in features.labels[rows]]
        self.notes = _class_differences(store, set(self.labels), bundle.class_names)
        self._digests = features.digests[rows]
        self._index = GalleryIndex().fit(features.embeddings[rows])
        self._folder = images or _said_folder(store)
        if images is not None and not images.is_dir():
            raise UsageError("no such folder of images", where=images)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._thumbnails = Thumbnails(SIDE)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_images(self) -> bool:
        """Whether the images themselves can be found, for thumbnails."""
        return self._folder is not None

    def nearest(self, embeddings: NDArray[np.float32], k: int) -> list[list[dict[str, Any]]]:
        """The ``k`` most similar images of each embedding (n, d): row, id, label and cosine, best first."""
        scores, rows = self._index.search(embeddings, k)
        return [
            [
                {"id": str(self.ids[row]), "label": self.labels[row], "score": float(score), "row": int(row)}
                for score, row in zip(each_score, each_row, strict=True)
            ]
            for each_score, each_row in zip(scores, rows, strict=True)
        ]

    def thumbnail(self, row: int) -> bytes | None:
        """A small JPEG of an image of the store; None where it is not there, or is another one by now."""
        if self._folder is None or not 0 <= row < len(self.ids):
            return None
        with self._lock:
            if row in self._kept:
                self._kept.move_to_end(row)
                return self._kept[row]
            made = self._make(self._folder / str(self.ids[row]), self._digests[row].tobytes())
            if made is not None:
                self._kept[row] = made
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return made

    def _make(self, path: Path, digest: bytes) -> bytes | None:
        try:
            # Only the very bytes that were embedded: an id may not reach any other file.
            (made,) = self._thumbnails.make([(path, digest)])
        except NoDecoder as error:
            message = f"The system lacks what an image needs just now: {error.what}. Try again later."
            raise Refusal(503, "resources", message, {"Retry-After": "1"}) from error
        return made if isinstance(made, bytes) else None

    def close(self) -> None:
        """End the decoding process."""
        self._thumbnails.close()


def _class_differences(store: Path, stored: set[str], known: tuple[str, ...]) -> list[str]:
    strange, gone = sorted(stored - set(known)), [name for name in known if name not in stored]
    if len(gone) == len(known):
        raise MismatchError(
            "store and model have no class in common",
            where=store,
            expected=_some(known),
            found=_some(strange),
            hint="Serve the model with the store that it was fitted on, or without --store.",
        )
    notes = [f"{store} has classes that the model can never answer: {_some(strange)}. Fit it again."] if strange else []
    return [*notes, f"{store} has no images of classes that the model can answer: {_some(gone)}."] if gone else notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _said_folder(store: Path) -> Path | None:
    if is_packed(store):
        return None
    said = Path(read_manifest(store).source)
    folder = said.parent if said.is_file() else said
    return folder if folder.is_dir() else None
