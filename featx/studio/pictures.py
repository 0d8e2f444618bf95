"""Small and whole pictures of photos, decoded in processes of their own; small ones are kept in the project."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from featx._files import publish_bytes
from featx.errors import ImageError
from featx.images import DecoderPool, ImageRef, Preprocess, encode, resized

SIDE = 160
"""Pixels of a small picture: the centre square, which is what a network sees of a photo."""

WHOLE = 1200
"""Pixels of the longer side of a whole picture."""

_WORKERS = 2
_HALF = (0.5, 0.5, 0.5)
_SMALL = Preprocess(resize=SIDE, crop=(SIDE, SIDE), interpolation="bilinear", mean=_HALF, std=_HALF)
_LARGE = Preprocess(resize=(WHOLE, WHOLE), crop=(WHOLE, WHOLE), interpolation="bilinear", mean=_HALF, std=_HALF)


class _Picture(NamedTuple):
    pixels: NDArray[np.uint8]
    size: tuple[int, int]


class Pictures:
    """JPEGs of photos; every method may be called from several threads.

    Parameters
    ----------
    folder : where small ones are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._pools: dict[int, DecoderPool] = {}

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for pool in self._pools.values():
                pool.__exit__(None, None, None)
            self._pools.clear()

    def small(self, ref: ImageRef) -> bytes:
        """The centre square, :data:`SIDE` pixels wide.

        Raises
        ------
        ImageError
            The photo cannot be read.
        """
        path = self._kept(ref)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            pass
        picture = encode(self._decoded(ref, SIDE).pixels, form="JPEG")
        if ref.stamp >= 0:
            publish_bytes(path, picture)
        return picture

    def make_ahead(self, refs: Sequence[ImageRef], stop: Callable[[], bool]) -> None:
        """Make the small pictures that are not there yet, while nothing else wants the processors, until ``stop()``."""
        missing = [ref for ref in refs if ref.stamp >= 0 and not self._kept(ref).exists()]
        if not missing:
            return
        with DecoderPool(_SMALL, workers=1, mode="scaled", background=True) as pool:
            stream = pool.run((ref.path for ref in missing), lambda digest: False, ahead=4)
            for ref, found in zip(missing, stream, strict=False):
                if found.pixels is not None:
                    publish_bytes(self._kept(ref), encode(found.pixels, form="JPEG"))
                if stop():
                    return

    def _kept(self, ref: ImageRef) -> Path:
        named = f"{ref.id} {ref.size} {ref.stamp}".encode("utf-8", "surrogatepass")
        return self.folder / f"{hashlib.sha256(named).hexdigest()[:32]}.jpg"

    def whole(self, ref: ImageRef) -> bytes:
        """All of it, the longer side :data:`WHOLE` pixels; errors as of :meth:`small`."""
        found = self._decoded(ref, WHOLE)
        width, height = (max(1, round(WHOLE * length / max(found.size))) for length in found.size)
        return encode(resized(found.pixels, width, height), form="JPEG")

    def _decoded(self, ref: ImageRef, side: int) -> _Picture:
        (found,) = self._pool(side).run([ref.path], lambda digest: False, ahead=1)
        if found.refusal is not None or found.pixels is None:
            raise found.refusal or ImageError("corrupt", "it has no pixels")
        return _Picture(found.pixels, found.size)

    def _pool(self, side: int) -> DecoderPool:
        with self._lock:
            if side not in self._pools:
                look, workers = (_SMALL, _WORKERS) if side == SIDE else (_LARGE, 1)
                self._pools[side] = DecoderPool(look, workers=workers, mode="scaled")
            return self._pools[side]
