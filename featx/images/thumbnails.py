"""Small pictures of images, decoded in processes of their own; where it matters, of those that are still the same."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from featx.errors import ImageError, SourceError, UsageError
from featx.images.origin import Origin
from featx.images.pixels import Preprocess, encode, resized
from featx.images.pool import Decoded, DecoderPool
from featx.images.source import finder
from featx.images.views import Looks

SIDE = 160
"""Pixels of a thumbnail: the centre square, which is what a network with a centre crop sees of a picture."""

_HALF = (0.5, 0.5, 0.5)

THUMBNAIL = Looks(Preprocess(resize=SIDE, crop=(SIDE, SIDE), interpolation="bilinear", mean=_HALF, std=_HALF))
"""What a decoding process that has other work makes a thumbnail by."""


class Thumbnails:
    """Makes small pictures, in processes that are started when the first is wanted, and ended by :meth:`close`.

    Methods may be called from several threads.

    Parameters
    ----------
    side : pixels.
    workers : processes.
    whole : all of each picture, its longer side ``side``, and not the centre square.
    background : let the processes run only while others leave a processor idle.
    """

    def __init__(self, side: int = SIDE, workers: int = 1, *, whole: bool = False, background: bool = False) -> None:
        self.side, self.workers, self.whole, self.background = side, workers, whole, background
        self._lock = threading.Lock()
        self._pool: DecoderPool | None = None

    def __enter__(self) -> Thumbnails:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.__exit__(None, None, None)

    def pixels(self, images: Iterable[Origin]) -> Iterator[NDArray[np.uint8] | ImageError]:
        """RGB pixels (h, w, 3) of each image, upright, or why there are none.

        Raises
        ------
        NoDecoder
            The system lacks what a process needs.
        SourceError
            What has the images does not answer any more.
        """
        return (self._picture(found) for found in self._run(images, lambda digest: False))

    def jpegs(self, images: Iterable[Origin]) -> Iterator[bytes | ImageError]:
        """A JPEG of each image, or why there is none; errors as of :meth:`pixels`."""
        for found in self.pixels(images):
            yield found if isinstance(found, ImageError) else encode(found, form="JPEG")

    def make(self, images: Sequence[tuple[Origin, bytes | None]]) -> list[bytes | str]:
        """A JPEG of each image that is still the same, or why there is none; errors as of :meth:`pixels`.

        Parameters
        ----------
        images : each with the sha256 that its bytes must have, or None for any.
        """
        if not images:
            return []
        digests = {digest for _, digest in images}
        any_bytes = None in digests
        origins = list(dict.fromkeys(origin for origin, _ in images))
        # Bytes that nobody wants are not even decoded.
        runs = self._run(origins, lambda found: not (any_bytes or found in digests))
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

    def _picture(self, found: Decoded) -> NDArray[np.uint8] | ImageError:
        if found.pixels is None:
            return found.refusal or ImageError("corrupt", "it has no pixels")
        if not self.whole:
            return found.pixels
        width, height = (max(1, round(self.side * length / max(found.size))) for length in found.size)
        return resized(found.pixels, width, height)

    def _run(self, images: Iterable[Origin], known: Callable[[bytes], bool]) -> Iterator[Decoded]:
        with self._lock:
            if self._pool is None:
                square = (self.side, self.side)
                look = replace(THUMBNAIL.preprocess, resize=square if self.whole else self.side, crop=square)
                self._pool = DecoderPool(look, workers=self.workers, mode="scaled", background=self.background)
            pool = self._pool
        return pool.run(images, known, ahead=4 * self.workers)


def whole_pictures(images: Sequence[Origin], *, side: int, workers: int = 1) -> Iterator[NDArray[np.uint8] | str]:
    """RGB pixels (h, w, 3) of each image, whole and upright, the longer side ``side``, or why there are none."""
    with Thumbnails(side, workers, whole=True) as thumbnails:
        for found in thumbnails.pixels(images):
            yield found.what if isinstance(found, ImageError) else found


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
