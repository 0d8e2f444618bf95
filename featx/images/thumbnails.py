"""Small pictures of images, decoded in processes of their own, and of those images only that are still the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from featx.errors import ImageError, SourceError, UsageError
from featx.images.origin import Origin
from featx.images.pixels import Preprocess, encode, resized
from featx.images.pool import DecoderPool
from featx.images.source import finder

SIDE = 160
"""Pixels of a thumbnail: the centre square, which is what a network with a centre crop sees of a picture."""


class Thumbnails:
    """Makes thumbnails; the processes are started when the first is wanted, and ended by :meth:`close`.

    Parameters
    ----------
    side : pixels.
    workers : processes.
    """

    def __init__(self, side: int = SIDE, workers: int = 1) -> None:
        self.side, self.workers = side, workers
        self._pool: DecoderPool | None = None

    def __enter__(self) -> Thumbnails:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.__exit__(None, None, None)
            self._pool = None

    def make(self, images: Sequence[tuple[Origin, bytes | None]]) -> list[bytes | str]:
        """A JPEG of each image, or why there is none.

        Parameters
        ----------
        images : each with the sha256 that its bytes must have, or None for any.

        Raises
        ------
        NoDecoder
            The system lacks what a process needs.
        SourceError
            What has the images does not answer any more.
        """
        if not images:
            return []
        if self._pool is None:
            half = (0.5, 0.5, 0.5)
            small = Preprocess(
                resize=self.side, crop=(self.side, self.side), interpolation="bilinear", mean=half, std=half
            )
            self._pool = DecoderPool(small, workers=self.workers, mode="scaled")
        digests = {digest for _, digest in images}
        any_bytes = None in digests
        origins = list(dict.fromkeys(origin for origin, _ in images))
        # Bytes that nobody wants are not even decoded.
        runs = self._pool.run(origins, lambda found: not (any_bytes or found in digests), ahead=4 * self.workers)
        decoded = dict(zip(origins, runs, strict=True))
        pictures: list[bytes | str] = []
        for origin, digest in images:
            found = decoded[origin]
            if found.refusal is not None:
                pictures.append(found.refusal.what)
            elif found.pixels is None or (digest is not None and found.digest != digest):
                pictures.append("the file has changed since it was embedded")
            else:
                pictures.append(encode(found.pixels, form="JPEG"))
        return pictures


def whole_pictures(images: Sequence[Origin], *, side: int, workers: int = 1) -> Iterator[NDArray[np.uint8] | str]:
    """RGB pixels (h, w, 3) of each image, whole and upright, the longer side ``side``, or why there are none."""
    half = (0.5, 0.5, 0.5)
    square = Preprocess(resize=(side, side), crop=(side, side), interpolation="bilinear", mean=half, std=half)
    with DecoderPool(square, workers=workers, mode="scaled") as pool:
        for found in pool.run(images, lambda digest: False, ahead=4 * workers):
            if found.refusal is not None:
                yield found.refusal.what
            elif found.pixels is not None:
                width, height = (max(1, round(side * length / max(found.size))) for length in found.size)
                yield resized(found.pixels, width, height)


class Originals:
    """The image files behind the rows of a store, where they are still at hand.

    Parameters
    ----------
    source : what the store was made from; "" when that is not known.
    ids : (n,) as the store has them.
    digests : uint8 (n, 32); a file with other bytes is not shown.
    """

    def __init__(self, source: str, ids: Sequence[str], digests: NDArray[np.uint8]) -> None:
        self.source = source
        self.ids, self.digests = ids, digests
        self._thumbnails = Thumbnails()

    def __enter__(self) -> Originals:
        return self

    def __exit__(self, *_: object) -> None:
        self._thumbnails.close()

    @functools.cached_property
    def _find(self) -> Callable[[str], Origin]:
        return finder(self.source)

    def origin(self, row: int) -> Origin | None:
        """Where the row's image is, or None when it has gone or is another one now."""
        return None if self.thumbnail(row) is None else self._find(str(self.ids[row]))

    def thumbnail(self, row: int) -> bytes | None:
        """A JPEG of the row's image, or None when it has gone or is another one now."""
        if not self.source:
            return None
        try:
            (found,) = self._thumbnails.make([(self._find(str(self.ids[row])), self.digests[row].tobytes())])
        except (OSError, ValueError, ImageError):
            return None
        except (SourceError, UsageError):
            self.source = ""  # the source itself is gone or out of reach: it is not asked for every picture
            return None
        return found if isinstance(found, bytes) else None
