"""The store beside a model: the nearest labelled images as evidence, and small pictures of them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.errors import UsageError
from featx.images import NoDecoder, Thumbnails
from featx.models import Bundle, labelled_images
from featx.retrieval import GalleryIndex
from featx.service.guard import Refusal
from featx.store import is_packed, read_manifest

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
        found = labelled_images(store, bundle)
        self.layer, self.notes = found.place, found.notes
        self.ids, self.labels, self._digests = found.ids, found.labels, found.digests
        self._index = GalleryIndex().fit(found.embeddings)
        self._folder = images or _said_folder(store)
        if images is not None and not images.is_dir():
            raise UsageError("no such folder of images", where=images)
        self._thumbnails = Thumbnails()
        self.thumbnail = lru_cache(_KEPT)(self._thumbnail)  # of those that are there: it keeps no exception

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

    def _thumbnail(self, row: int) -> bytes:
        """A small JPEG of an image of the store; FileNotFoundError where it is not there, or is another one by now."""
        if self._folder is None or not 0 <= row < len(self.ids):
            raise FileNotFoundError
        try:
            # Only the very bytes that were embedded: an id may not reach any other file.
            (made,) = self._thumbnails.make([(self._folder / str(self.ids[row]), self._digests[row].tobytes())])
        except NoDecoder as error:
            message = f"The system lacks what an image needs just now: {error.what}. Try again later."
            raise Refusal(503, "resources", message, {"Retry-After": "1"}) from error
        if not isinstance(made, bytes):
            raise FileNotFoundError
        return made

    def close(self) -> None:
        """End the decoding process."""
        self._thumbnails.close()


def _said_folder(store: Path) -> Path | None:
    if is_packed(store):
        return None
    said = Path(read_manifest(store).source)
    folder = said.parent if said.is_file() else said
    return folder if folder.is_dir() else None
