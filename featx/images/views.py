"""Views: an image seen a few ways, the embeddings averaged.

One crop is one look at a photo; the mean over several looks is a steadier embedding, at that many times the network's
time (the file is read and decoded once). A store's provenance, and so its fingerprint, says which views it is made of,
and whoever embeds an image for it later (search, predict, serve) takes the same ones.

The mean is of the embeddings as the network gives them, in the order of :data:`VIEWS` whatever the order they were
asked for in, so ``flip,center`` is ``center,flip``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featx.errors import UsageError, did_you_mean
from featx.images.pixels import Preprocess, crop_box, resize_box, resize_crop

if TYPE_CHECKING:
    from PIL.Image import Image

CENTER = ("center",)
"""One look, as the weights were trained to be looked with: what a store is made of unless asked otherwise."""


@dataclass(frozen=True)
class View:
    """One way to see an image.

    Parameters
    ----------
    frame : (left, top, right, bottom) as shares of the whole picture, squashed to the crop's shape; a number is the
        share of the largest part of the crop's shape, from the centre; None is the weights' own resize and crop.
    mirrored : left and right swapped.
    summary : for people.
    """

    frame: tuple[float, float, float, float] | float | None
    mirrored: bool
    summary: str

    def box(self, width: float, height: float, crop: tuple[int, int]) -> tuple[float, float, float, float] | None:
        """(left, top, right, bottom) in pixels of a picture of this size; None where the weights say it."""
        if self.frame is None:
            return None
        if isinstance(self.frame, tuple):
            left, top, right, bottom = self.frame
            return left * width, top * height, right * width, bottom * height
        scale = self.frame * min(height / crop[0], width / crop[1])
        x, y = (width - scale * crop[1]) / 2, (height - scale * crop[0]) / 2
        return x, y, width - x, height - y


VIEWS: Mapping[str, View] = MappingProxyType(
    {
        "center": View(None, False, "the weights' own centre crop"),
        "flip": View(None, True, "the same, mirrored"),
        "full": View((0.0, 0.0, 1.0, 1.0), False, "the whole frame, squashed to the crop's shape (nothing is padded)"),
        "full-flip": View((0.0, 0.0, 1.0, 1.0), True, "the same, mirrored"),
        "zoom": View(0.6, False, "the middle: six tenths of the shorter side"),
        "zoom-flip": View(0.6, True, "the same, mirrored"),
        "top-left": View((0.0, 0.0, 0.6, 0.6), False, "six tenths of width and height, from that corner"),
        "top-right": View((0.4, 0.0, 1.0, 0.6), False, "likewise"),
        "bottom-left": View((0.0, 0.4, 0.6, 1.0), False, "likewise"),
        "bottom-right": View((0.4, 0.4, 1.0, 1.0), False, "likewise"),
    }
)


def parse_views(text: str) -> tuple[str, ...]:
    """Names of views separated by commas, in the order of :data:`VIEWS`.

    Raises
    ------
    UsageError
        There are none, one is not known, or one is named twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("no view is named", where="--views", expected=f"some of {', '.join(VIEWS)}")
    for name in names:
        if name not in VIEWS:
            raise UsageError(
                f"no view {name!r}",
                where="--views",
                expected=f"some of {', '.join(VIEWS)}",
                hint=did_you_mean(name, VIEWS) or None,
            )
        if names.count(name) > 1:
            raise UsageError(f"the view {name!r} is named twice", where="--views", found=text)
    return tuple(name for name in VIEWS if name in names)


class Looks:
    """How an image is looked at for one network: the preprocessing of its weights, in one or several views.

    Parameters
    ----------
    preprocess : of the weights.
    views : names of :data:`VIEWS`.
    """

    def __init__(self, preprocess: Preprocess, views: Sequence[str] = CENTER) -> None:
        self.preprocess, self.views = preprocess, parse_views(",".join(views))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image's pixels: (h, w, 3), or (v, h, w, 3) for v > 1 views."""
        one = (*self.preprocess.crop, 3)
        return one if len(self.views) == 1 else (len(self.views), *one)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` that an image of this size must not be decoded smaller than."""
        sizes = [self._size(VIEWS[name], width, height) for name in self.views]
        return max(w for w, _ in sizes), max(h for _, h in sizes)

    def _size(self, view: View, width: int, height: int) -> tuple[int, int]:
        box = view.box(width, height, self.preprocess.crop)
        if box is None:
            return self.preprocess.resized(width, height)
        left, top, right, bottom = box
        crop_height, crop_width = self.preprocess.crop
        return math.ceil(crop_width * width / (right - left)), math.ceil(crop_height * height / (bottom - top))

    def boxes(self, width: int, height: int) -> list[tuple[float, float, float, float]]:
        """(left, top, right, bottom) of what each view shows of an image of this size, as shares of it."""
        found = []
        for view in (VIEWS[name] for name in self.views):
            left, top, right, bottom = view.box(width, height, self.preprocess.crop) or crop_box(
                self.preprocess, width, height
            )
            found.append((left / width, top / height, right / width, bottom / height))
        return found

    @property
    def mirrored(self) -> list[bool]:
        """Whether each view swaps left and right."""
        return [VIEWS[name].mirrored for name in self.views]

    def cut(self, image: Image) -> NDArray[np.uint8]:
        """Pixels uint8 of ``shape``, not normalised, of a decoded image."""
        cuts: dict[object, NDArray[np.uint8]] = {}
        seen = []
        for view in (VIEWS[name] for name in self.views):
            if view.frame not in cuts:
                cuts[view.frame] = self._cut(image, view)
            pixels = cuts[view.frame]
            seen.append(pixels[:, ::-1] if view.mirrored else pixels)
        return np.ascontiguousarray(seen[0]) if len(seen) == 1 else np.stack(seen)

    def _cut(self, image: Image, view: View) -> NDArray[np.uint8]:
        box = view.box(*image.size, self.preprocess.crop)
        return resize_crop(image, self.preprocess) if box is None else resize_box(image, self.preprocess, box)
