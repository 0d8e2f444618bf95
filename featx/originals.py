"""The image files behind the rows of a store, where they are still at hand: for thumbnails in reports and pages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featx.errors import ImageError
from featx.images import thumbnail


class Originals:
    """Finds a row's file by its id, and believes it only if its bytes have the row's digest.

    Parameters
    ----------
    source : folder or manifest that the store was made from; "" when that is not known.
    ids : (n,) as the store has them.
    digests : uint8 (n, 32).
    """

    def __init__(self, source: str, ids: Sequence[str], digests: NDArray[np.uint8]) -> None:
        root = Path(source) if source else None
        self.root = root.parent if root is not None and root.is_file() else root
        self.ids, self.digests = ids, digests

    def read(self, row: int) -> bytes | None:
        """The file's bytes, or None when it has gone or is another one now."""
        if self.root is None:
            return None
        try:
            data = (self.root / str(self.ids[row])).read_bytes()
        except (OSError, ValueError):
            return None
        return data if hashlib.sha256(data).digest() == self.digests[row].tobytes() else None

    def thumbnail(self, row: int, side: int = 160) -> bytes | None:
        """A JPEG of at most ``side`` pixels a side, or None."""
        data = self.read(row)
        try:
            return None if data is None else thumbnail(data, side)
        except ImageError:
            return None
