"""The image files behind the rows of a store, where they are still at hand: for thumbnails in reports and pages."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from featx.errors import ImageError, SourceError, UsageError
from featx.images.origin import Origin
from featx.images.pixels import thumbnail
from featx.images.source import finder


class Originals:
    """Finds a row's image by its id, and believes it only if its bytes have the row's digest.

    Parameters
    ----------
    source : what the store was made from; "" when that is not known.
    ids : (n,) as the store has them.
    digests : uint8 (n, 32).
    """

    def __init__(self, source: str, ids: Sequence[str], digests: NDArray[np.uint8]) -> None:
        self.source = source
        self.ids, self.digests = ids, digests

    @functools.cached_property
    def _find(self) -> Callable[[str], Origin]:
        return finder(self.source)

    def read(self, row: int) -> bytes | None:
        """The file's bytes, or None when it has gone or is another one now."""
        if not self.source:
            return None
        try:
            data = self._find(str(self.ids[row])).read_bytes()
        except (OSError, ValueError, ImageError):
            return None
        except (SourceError, UsageError):
            self.source = ""  # the source itself is gone or out of reach: it is not asked for every picture
            return None
        return data if hashlib.sha256(data).digest() == self.digests[row].tobytes() else None

    def thumbnail(self, row: int, side: int = 160) -> bytes | None:
        """A JPEG of at most ``side`` pixels a side, or None."""
        data = self.read(row)
        try:
            return None if data is None else thumbnail(data, side)
        except ImageError:
            return None
