"""Perceptual hashes: copies of an image that were saved anew, scaled or mirrored have nearly the same one.

The hash of Zauner (Implementation and Benchmarking of Perceptual Image Hash Functions, 2010), with signs instead of
comparisons with the median: the 16 x 16 lowest frequencies of the discrete cosine transform of the grey image at
64 x 64 pixels, one bit each. Mirroring an image turns the sign of every odd horizontal frequency, so the hash of the
mirror image follows from that of the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

HASH_BYTES = 32
"""Bytes of a hash: 256 bits."""

THUMBNAIL_SIDE = 16
"""Height and width, in pixels, of the thumbnails that the pixels baseline is made of."""

_SIDE, _WAVES = 64, 16

_GREY = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue (ITU-R BT.601)."""

_NONE = 1e-6
"""A wave that is no stronger is none: what is left of zero after rounding must not decide about a bit."""

_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(_WAVES), np.arange(_SIDE) + 0.5))

_MIRROR = np.packbits(np.tile(np.arange(_WAVES) % 2 == 1, (_WAVES, 1)).reshape(-1))
_MIRROR.flags.writeable = False


def perceptual_hash(image: Image) -> bytes:
    """The hash of an upright RGB image, 32 bytes."""
    # Imported here: who compares hashes needs no decoder.
    from featx.images.pixels import shrink

    small = np.asarray(shrink(image, _SIDE, _SIDE), dtype=np.float64)
    waves = _COSINES @ (small @ _GREY) @ _COSINES.T
    waves[0, 0] = 0.0  # the brightness, which is positive always
    return np.packbits((waves > _NONE).reshape(-1)).tobytes()


def mirrored_hashes(hashes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The hashes (n, 32) that mirror images of the images of these hashes have."""
    return hashes ^ _MIRROR


def mirrored_thumbnails(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Thumbnails (n, p), of which each has its left and right swapped."""
    pictures = pixels.reshape(len(pixels), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
    return np.ascontiguousarray(pictures[:, :, ::-1]).reshape(pixels.shape)
