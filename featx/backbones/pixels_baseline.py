"""The pixels baseline as a backbone: a small RGB picture of the whole image, without any network.

An embedding that is not clearly better than this is not worth its time; on images unlike any that the network was
trained on, such as small scanned digits, it can be worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NoReturn

import numpy as np

from featx._arrays import PIXELS
from featx.backbones.engines.base import Batch, Embeddings, Engine
from featx.backbones.provider import Provider
from featx.errors import UsageError
from featx.images import THUMBNAIL_SIDE, Preprocess


def thumbnail_preprocess(side: int = THUMBNAIL_SIDE) -> Preprocess:
    """The whole image squeezed into a square of ``side`` pixels; 0 is black and 1 is white."""
    return Preprocess((side, side), (side, side), "area", (0.0,) * 3, (1.0,) * 3)


class Thumbnail(Provider):
    """Where the pixels baseline comes from: nowhere."""

    name = PIXELS
    preprocess = thumbnail_preprocess()

    def build(self) -> NoReturn:
        """There is no network to build; always UsageError."""
        raise UsageError("pixels is a baseline without a network", where="backbone", hint="Name another backbone.")


class ThumbnailEngine(Engine):
    """Runs the pixels baseline: a row is the picture's numbers from 0 to 1, by rows, pixels and channels."""

    name, device, precision, batch_size = "numpy", "cpu", "fp32", 64

    def embed(self, batches: Iterable[Batch]) -> Iterator[Embeddings]:
        """See :meth:`featx.backbones.engines.base.Engine.embed`."""
        for batch in batches:
            yield (batch.reshape(len(batch), -1).astype(np.float32) / np.float32(255),)
