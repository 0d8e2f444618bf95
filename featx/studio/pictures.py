"""Small and whole pictures of photos; small ones are kept in the project."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featx._files import temporary
from featx.errors import ImageError
from featx.images import Held, ImageRef, Thumbnails, encode

WHOLE = 1200
"""Pixels of the longer side of a whole picture."""

_WORKERS = 2
_END = b"\xff\xd9"  # of every JPEG


class Pictures:
    """JPEGs of photos; every method may be called from several threads.

    Parameters
    ----------
    folder : where small ones are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._small = Thumbnails(workers=_WORKERS)
        self._large = Thumbnails(WHOLE, whole=True)

    def close(self) -> None:
        """End the processes."""
        self._small.close()
        self._large.close()

    def kept(self, ref: ImageRef) -> bytes | None:
        """The small picture of a photo, the centre square, where it was made before."""
        try:
            found = self._path(ref).read_bytes()
        except FileNotFoundError:
            return None
        return found if found.endswith(_END) else None  # a power cut may have left half of it

    def make(self, refs: Sequence[ImageRef]) -> Iterator[bytes | ImageError]:
        """Make small pictures, and keep them."""
        yield from self._made(self._small, refs)

    def keep(self, ref: ImageRef, pixels: NDArray[np.uint8]) -> None:
        """Keep a small picture that somebody else has made, as pixels (h, w, 3)."""
        if ref.stamp >= 0 and not self._path(ref).exists():
            self._keep(ref, encode(pixels, form="JPEG"))

    def make_ahead(self, refs: Sequence[ImageRef], stop: Callable[[], bool]) -> None:
        """Make the small pictures that are not there yet, while nothing else wants the processors, until ``stop()``."""
        missing = [ref for ref in refs if ref.stamp >= 0 and not self._path(ref).exists()]
        with Thumbnails(background=True) as thumbnails:
            for _ in self._made(thumbnails, missing):
                if stop():
                    return

    def whole(self, ref: ImageRef) -> bytes | ImageError:
        """All of a photo, the longer side :data:`WHOLE` pixels."""
        return next(self._large.jpegs([ref.path]))

    def sent(self, data: bytes) -> bytes | ImageError:
        """The same of a photo that is in no file, for browsers that cannot show what it is (HEIC, TIFF)."""
        return next(self._large.jpegs([Held(data)]))

    def _made(self, thumbnails: Thumbnails, refs: Sequence[ImageRef]) -> Iterator[bytes | ImageError]:
        for ref, made in zip(refs, thumbnails.jpegs(ref.path for ref in refs), strict=True):
            if ref.stamp >= 0 and not isinstance(made, ImageError):
                self._keep(ref, made)
            yield made

    def _keep(self, ref: ImageRef, picture: bytes) -> None:
        """Not synced: it can be made anew. On a full disk pictures are seen all the same."""
        path = self._path(ref)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary(path) as temp:
                temp.write_bytes(picture)
                temp.replace(path)

    def _path(self, ref: ImageRef) -> Path:
        named = hashlib.sha256(f"{ref.id} {ref.size} {ref.stamp}".encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / named[:2] / f"{named[2:32]}.jpg"  # a folder with all of them is slow to write to
