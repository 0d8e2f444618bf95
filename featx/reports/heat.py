"""Evidence as colours over a photo: orange speaks for a class, blue against it, nothing is zero.

The two colours are told apart by people with any kind of colour blindness, and the photo below them is grey, so that no
colour of its own is taken for evidence. What the network does not see is veiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featx.images import encode, written
from featx.models import Explanation
from featx.reports.page import data_url

FOR, AGAINST = (230, 97, 1), (0, 90, 181)
"""Colours, of which neither is another's for people who see red, green or blue badly."""

UNSEEN = (128, 128, 128)

MOST = 0.8
"""Opacity of the strongest evidence."""

LEGEND = (
    "Orange places speak for the class, blue ones against it; the stronger the colour, the more. Places without colour "
    "say nothing. Both maps of a photo have one scale. The network does not see what is veiled in grey."
)

OVERLAY_SIDE = 192
"""Pixels of the longer side of an overlay for a page; a browser scales it up, as smooth as it is."""

_VEIL = 0.7
_CAPTION = 28


def heat(explanation: Explanation, place: int, width: int, height: int) -> NDArray[np.float64]:
    """Evidence for a class over the whole photo, (height, width); nan where no view looks.

    Between the centres of two places it changes linearly. Where views overlap it adds up, each weighted by how small
    the part of the photo is that it spreads over: so the mean over what is seen is what all maps add to the score.
    """
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    total, seen = np.zeros((height, width)), np.zeros((height, width), bool)
    for part in explanation.parts:
        left, top, right, bottom = part.box
        across, down = (x - left) / (right - left), (y - top) / (bottom - top)
        inside = np.outer((down >= 0) & (down <= 1), (across >= 0) & (across <= 1))
        grid = part.evidence[place]
        values = _weights(down, grid.shape[0]) @ grid @ _weights(across, grid.shape[1]).T
        total += np.where(inside, values / ((right - left) * (bottom - top)), 0.0)
        seen |= inside
    return np.where(seen, total * seen.mean(), np.nan)


def _weights(at: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """(m, n): how the values of n equal stretches of 0 .. 1 mix at each of m places."""
    position = np.clip(at * n - 0.5, 0, n - 1)
    return np.asarray(np.clip(1 - np.abs(position[:, None] - np.arange(n)), 0, None))


def overlays(explanation: Explanation, places: Sequence[int], width: int, height: int) -> list[NDArray[np.uint8]]:
    """Pixels (height, width, 4), red, green, blue and opacity, of the evidence for some classes, on one scale."""
    maps = [heat(explanation, place, width, height) for place in places]
    top = max((float(np.nanmax(np.abs(each))) for each in maps), default=0.0) or 1.0
    made = []
    for each in maps:
        unseen = np.isnan(each)
        value = np.nan_to_num(each) / top
        colour = np.where(value[..., None] > 0, FOR, AGAINST)
        colour = np.where(unseen[..., None], UNSEEN, colour)
        opacity = np.where(unseen, _VEIL, MOST * np.abs(value))
        made.append(np.dstack([colour, np.rint(255 * opacity)]).astype(np.uint8))
    return made


def overlay_urls(explanation: Explanation, places: Sequence[int], size: tuple[int, int]) -> list[str]:
    """Small PNGs of the overlays, for a page to lay over a photo of this (width, height), as addresses of images."""
    scale = OVERLAY_SIDE / max(size)
    width, height = (max(1, round(scale * length)) for length in size)
    return [data_url(encode(each)) for each in overlays(explanation, places, width, height)]


def painted(picture: NDArray[np.uint8], overlay: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A photo (h, w, 3) in grey below an overlay (h, w, 4)."""
    grey = (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    opacity = overlay[..., 3:] / 255.0
    return np.asarray(np.rint((1 - opacity) * grey + opacity * overlay[..., :3]), dtype=np.uint8)


def panels(picture: NDArray[np.uint8], explanation: Explanation) -> list[NDArray[np.uint8]]:
    """The photo (h, w, 3), then the evidence for the label and for the runner-up over it."""
    height, width = picture.shape[:2]
    return [picture, *(painted(picture, each) for each in overlays(explanation, explanation.ranked[:2], width, height))]


def pair_jpeg(picture: NDArray[np.uint8], explanation: Explanation, places: Sequence[int]) -> bytes:
    """The evidence for some classes over a photo (h, w, 3), one below the other as one JPEG."""
    height, width = picture.shape[:2]
    gap = np.full((6, width, 3), 255, np.uint8)
    rows = [painted(picture, each) for each in overlays(explanation, places, width, height)]
    return encode(np.vstack([part for each in rows for part in (each, gap)][:-1]), form="JPEG")


def figure_png(picture: NDArray[np.uint8], explanation: Explanation) -> bytes:
    """The three panels side by side as one PNG, each with a line of text above it."""
    label, other = (explanation.class_names[place] for place in explanation.ranked[:2])
    captions = ["photo", f"evidence for {label}", f"evidence for {other}"]
    columns = []
    for caption, panel in zip(captions, panels(picture, explanation), strict=True):
        gap = np.full((panel.shape[0] + _CAPTION, 8, 3), 255, np.uint8)
        columns += [np.vstack([written(caption, panel.shape[1], _CAPTION), panel]), gap]
    return encode(np.hstack(columns[:-1]))
