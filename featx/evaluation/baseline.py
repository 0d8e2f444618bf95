"""The pixels baseline: what a head makes of small pictures without any network.

An embedding that is not clearly better than this is not worth its time; on images unlike any that the network was
trained on, such as small scanned digits, it can be worse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from joblib import effective_n_jobs
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline, make_pipeline

from featx.backbones import thumbnail_preprocess
from featx.errors import UsageError
from featx.extraction import ImageTransformer, items_of, pixels_of
from featx.heads import make_head
from featx.images import DecoderPool, resize_crop

_AHEAD = 64
"""Images that are decoded ahead of the one that is wanted."""


class PixelExtractor(ImageTransformer):
    """Images as small RGB pictures: the rows that a network's embeddings have to beat.

    Nothing is learnt. The whole image is squeezed into a square, and its pixels are divided by 255.

    Parameters
    ----------
    side : height and width of the picture in pixels; a row has ``3 * side ** 2`` numbers.
    n_jobs : decoding processes; None is one (joblib's rule), -1 all cores.
    """

    def __init__(self, *, side: int = 16, n_jobs: int | None = None) -> None:
        self.side = side
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> PixelExtractor:
        """Check the parameters; no image is looked at.

        Raises
        ------
        UsageError
            X holds no images, or a parameter is out of range.
        """
        self._check()
        items_of(X)
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Shrink images.

        Parameters
        ----------
        X : n images, as of :meth:`featx.FeatureExtractor.transform`.

        Returns
        -------
        float32 (n, 3 * side ** 2) in 0..1.

        Raises
        ------
        SourceError
            An image is refused; it and the reason are named.
        UsageError
            X holds no images, or a parameter is out of range.
        """
        self._check()
        items = items_of(X)
        small = thumbnail_preprocess(self.side)
        rows = [
            pixels.reshape(-1)
            for _, pixels in pixels_of(
                items,
                lambda workers: DecoderPool(small, workers=workers),
                lambda image: resize_crop(image, small),
                jobs=effective_n_jobs(self.n_jobs),
                ahead=_AHEAD,
            )
        ]
        return np.stack(rows).astype(np.float32) / np.float32(255)

    def _check(self) -> None:
        if not isinstance(self.side, int | np.integer) or self.side < 1:
            raise UsageError("not a number of pixels", where="side", expected="1 or more", found=repr(self.side))
        if self.n_jobs == 0:
            raise UsageError("must not be 0", where="n_jobs")

    @property
    def _n_features_out(self) -> int:
        return 3 * int(self.side) ** 2


def make_pixels_baseline(head: str = "auto", *, side: int = 16, n_jobs: int | None = None, **params: Any) -> Pipeline:
    """Build the pixels baseline: an unfitted scikit-learn pipeline from images to classes, without a network.

    Compare it with the same head on embeddings before you trust that a network helps.

    Parameters
    ----------
    head : a name of :data:`featx.heads.catalogue.HEADS`, or "auto" for the recommended one.
    side, n_jobs : as of :class:`PixelExtractor`.
    **params : of the head, as of :func:`featx.make_head`.

    Raises
    ------
    UsageError
        There is no such head, or it does not take such a parameter.

    Examples
    --------
    >>> make_pixels_baseline().fit(paths, labels).score(new_paths, new_labels)  # doctest: +SKIP
    """
    return make_pipeline(PixelExtractor(side=side, n_jobs=n_jobs), *make_head(head, **params).named_steps.values())
