"""The point that heads measure embeddings from: a mean of images other than the labelled ones.

Pooled CNN features are non-negative, so all embeddings share one large direction that says nothing about the class.
With one or two images a class its estimate is poor; the mean of *other* images through the same backbone is a better
one. Two sources are known: a mean that ships with featx for one backbone (:data:`MEANS`), and the mean of the user's
own images without labels. The class of an image takes no part in either.

A shipped mean belongs to exactly one way of embedding: another backbone, weights file, layer, preprocessing or choice
of views gets none, and the heads then do without.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.errors import FeatxError, UsageError


@dataclass(frozen=True)
class Centre:
    """A mean from elsewhere, and a sentence on where it is from.

    ``mean`` (d,) is None where there is none; ``unlabelled`` counts the user's own images in it.
    """

    mean: NDArray[np.float64] | None
    told: str
    unlabelled: int = 0


@dataclass(frozen=True)
class ShippedMean:
    """One entry of :data:`MEANS`: what the embeddings must have been made with, and the file with its sha256."""

    backbone: str
    weights_sha256: str
    layer: str
    preprocess: Mapping[str, Any]
    views: str
    file: str
    sha256: str
    images: str

    def suits(self, provenance: Mapping[str, Any], layer: str) -> bool:
        """Whether embeddings of this provenance (a store's) and layer are of the very kind that was averaged."""
        wanted = {
            "backbone": self.backbone,
            "weights_sha256": self.weights_sha256,
            "preprocess": self.preprocess,
            "views": self.views,
        }
        return layer == self.layer and all(provenance.get(name) == value for name, value in wanted.items())

    def load(self) -> NDArray[np.float64]:
        """The mean (d,).

        Raises
        ------
        FeatxError
            The file is not the one that was released.
        """
        data = resources.files("featx").joinpath("means", self.file).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise FeatxError("a file of featx itself is damaged", where=self.file, hint="Install featx again.")
        mean: NDArray[np.float64] = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float64)
        return mean


MEANS: tuple[ShippedMean, ...] = (
    ShippedMean(
        backbone="efficientnet_lite0",
        weights_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        layer="penultimate",
        preprocess={
            "resize": 256, "crop": [224, 224], "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
        },
        views="center",
        file="efficientnet_lite0.npy",
        sha256="dfe269f9a5c399c2daa6f3c37ca1b1cef2cae93cf1c7dbc276c946c79502bf77",
        images="4,097 photos, textures and satellite images of five public data sets",
    ),
)  # fmt: skip


def shipped_centre(provenance: Mapping[str, Any], layer: str) -> Centre:
    """The mean that ships for embeddings of this provenance and layer; without one the centre says so."""
    for each in MEANS:
        if each.suits(provenance, layer):
            told = f"Heads may measure from a mean that ships with featx for {each.backbone} (of {each.images})."
            return Centre(each.load(), told)
    backbone = provenance.get("backbone", "these embeddings")
    return Centre(None, f"No mean ships with featx for {backbone} ({layer}) as it was used here; heads do without.")


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
    told = f"Heads may use the mean of {len(pool)} unlabelled images; without these images they may be less accurate."
    return Centre(np.asarray(pool, dtype=np.float64).mean(axis=0), told, len(pool))
