"""Resizing and cropping a photo inside an ONNX graph, with the pixels that Pillow gives.

A resize is two products with matrices, columns first and then rows, rounded to whole grey levels after each: so does
Pillow. The matrices depend on the photo's size and are made in the graph. Of the photo only the part that the filter
reaches is looked at. (Of the view "full" Pillow does the rows first for some sizes; a few pixels then differ by a level
or two.) All of it is operators that every runtime has; their own ``Resize`` differs between runtimes.
"""

from __future__ import annotations

import numpy as np

from featx.errors import UsageError
from featx.images import VIEWS, Looks, Preprocess, View
from featx.models.onnx.builder import Builder

_FILTERS = ("bilinear", "bicubic", "lanczos")
_REACH = 3.0
"""Of the widest filter, in pixels of the smaller of the two pictures; see :func:`featx.images.pixels.resize_box`."""

_STEPS = 2.0**22
"""Of Pillow's weights between 0 and 1."""

_GREY = 255.0
_SINGLE, _INTEGER, _DOUBLE = 1, 7, 11
"""ONNX's numbers for float32, int64 and float64."""


def add_pixels(graph: Builder, photo: str, looks: Looks) -> str:
    """From uint8 (h, w, 3) to float32 (v, 3, crop height, crop width) of each view, 0 to 255 and whole."""
    interpolation = looks.preprocess.interpolation
    if interpolation not in _FILTERS:
        raise UsageError("the network's resize cannot be exported", expected=" or ".join(_FILTERS), found=interpolation)
    shape = graph.add("Shape", photo)
    size = [graph.add("Cast", graph.add("Gather", shape, graph.integers(i)), to=_DOUBLE) for i in (0, 1)]
    views = [VIEWS[name] for name in looks.views]
    seen = [_view(graph, photo, size, view, looks.preprocess) for view in views]
    return seen[0] if len(seen) == 1 else graph.add("Concat", *seen, axis=0)


def _view(graph: Builder, photo: str, size: list[str], view: View, preprocess: Preprocess) -> str:
    box = _box_of_weights(graph, size, preprocess) if view.frame is None else _box(graph, size, view, preprocess.crop)
    (top, bottom), (left, right) = box
    height, width = preprocess.crop
    rows, first_row, last_row = _weights(graph, size[0], top, bottom, height, preprocess.interpolation, rows=True)
    columns, first, last = _weights(
        graph, size[1], left, right, width, preprocess.interpolation, rows=False, mirrored=view.mirrored
    )
    part = graph.add(
        "Slice", photo, graph.add("Concat", first_row, first, axis=0), graph.add("Concat", last_row, last, axis=0),
        graph.integers(0, 1),
    )  # fmt: skip
    planes = graph.add("Transpose", graph.add("Cast", part, to=_SINGLE), perm=[2, 0, 1])
    columns = graph.add("Transpose", columns, perm=[1, 0])
    small = _whole(graph, graph.add("MatMul", rows, _whole(graph, graph.add("MatMul", planes, columns))))
    return graph.add("Unsqueeze", small, graph.integers(0))


def _whole(graph: Builder, values: str) -> str:
    """Rounded to grey levels, half up, as Pillow rounds."""
    rounded = graph.add("Floor", graph.add("Add", values, graph.constant(0.5)))
    return graph.add("Clip", rounded, graph.constant(0.0), graph.constant(_GREY))


def _box_of_weights(graph: Builder, size: list[str], preprocess: Preprocess) -> list[tuple[str, str]]:
    """Top and bottom, left and right of the centre crop after the resize, in pixels of the photo."""
    if isinstance(preprocess.resize, tuple):
        new = [_number(graph, float(length)) for length in preprocess.resize]
    else:
        # The product in whole numbers: a photo's own length times the network's, by the shorter one, cut off.
        shorter = graph.add("Min", *size)
        new = []
        for length in size:
            whole = [graph.add("Cast", each, to=_INTEGER) for each in (length, shorter)]
            longer = graph.add("Mul", whole[0], graph.integers(preprocess.resize))
            new.append(graph.add("Cast", graph.add("Div", longer, whole[1]), to=_DOUBLE))
    out = []
    for length, resized, crop in zip(size, new, preprocess.crop, strict=True):
        kept = _number(graph, float(crop))
        start = graph.add("Round", graph.add("Mul", graph.add("Sub", resized, kept), _number(graph, 0.5)))
        scale = graph.add("Div", length, resized)
        end = graph.add("Min", graph.add("Mul", graph.add("Add", start, kept), scale), length)
        out.append((graph.add("Mul", start, scale), end))
    return out


def _box(graph: Builder, size: list[str], view: View, crop: tuple[int, int]) -> list[tuple[str, str]]:
    """The same of a view's frame: see :meth:`featx.images.views.View.box`."""
    if isinstance(view.frame, tuple):
        left, top, right, bottom = view.frame
        shares = [(top, bottom), (left, right)]
        return [
            (graph.add("Mul", length, _number(graph, low)), graph.add("Mul", length, _number(graph, high)))
            for length, (low, high) in zip(size, shares, strict=True)
        ]
    fits = [graph.add("Div", length, _number(graph, float(side))) for length, side in zip(size, crop, strict=True)]
    scale = graph.add("Mul", graph.add("Min", *fits), _number(graph, float(view.frame or 1.0)))
    out = []
    for length, side in zip(size, crop, strict=True):
        inside = graph.add("Mul", scale, _number(graph, float(side)))
        start = graph.add("Mul", graph.add("Sub", length, inside), _number(graph, 0.5))
        out.append((start, graph.add("Sub", length, start)))
    return out


def _weights(
    graph: Builder, length: str, start: str, end: str, n: int, interpolation: str, *, rows: bool, mirrored: bool = False
) -> tuple[str, str, str]:
    """What each pixel between two places is worth for each of ``n`` new ones (n, m); first and last of the m pixels.

    In double precision with the box in single, and the result in 22 bits: so does Pillow, and sums that end near a half
    go the same way.
    """
    one = _number(graph, 1.0)
    scale = graph.add("Max", _over(graph, graph.add("Sub", end, start), float(n)), one)
    reach = graph.add("Add", graph.add("Mul", scale, _number(graph, _REACH)), one)
    low = graph.add("Max", graph.add("Floor", graph.add("Sub", start, reach)), _number(graph, 0.0))
    high = graph.add("Min", graph.add("Ceil", graph.add("Add", end, reach)), length)
    first, last = (graph.add("Cast", each, to=_INTEGER) for each in (low, high))
    # Rows are counted from the first that is looked at, columns from the photo's edge.
    origin = low if rows else _number(graph, 0.0)
    box = [graph.add("Cast", graph.add("Sub", each, origin), to=_SINGLE) for each in (start, end)]
    near = graph.add("Cast", box[0], to=_DOUBLE)
    scale = _over(graph, graph.add("Cast", graph.add("Sub", box[1], box[0]), to=_DOUBLE), float(n))
    wide = graph.add("Max", scale, one)  # enlarging does not narrow the filter
    numbers = np.arange(n, dtype=np.float64) + 0.5
    places = graph.constant((numbers[::-1] if mirrored else numbers)[:, None], np.float64)
    centres = graph.add("Add", graph.add("Mul", places, scale), near)
    scalar = [graph.add("Squeeze", each, graph.integers(0)) for each in (first, last)]
    steps = graph.add("Range", *scalar, graph.constant(1, np.int64))
    middles = graph.add("Add", graph.add("Cast", steps, to=_DOUBLE), _number(graph, 0.5))
    middles = graph.add("Sub", middles, origin)
    far = graph.add("Abs", graph.add("Div", graph.add("Sub", middles, centres), wide))
    values = _filter(graph, far, interpolation)
    shares = graph.add("Div", values, graph.add("ReduceSum", values, graph.integers(1), keepdims=1))
    steps = graph.add("Round", graph.add("Mul", shares, _number(graph, _STEPS)))
    return graph.add("Cast", _over(graph, steps, _STEPS), to=_SINGLE), first, last


def _number(graph: Builder, value: float) -> str:
    return graph.constant([value], np.float64)


def _over(graph: Builder, values: str, divisor: float) -> str:
    return graph.add("Div", values, _number(graph, divisor))


def _filter(graph: Builder, far: str, interpolation: str) -> str:
    """Pillow's filters, of distances that are not negative."""

    def value(number: float) -> str:
        return _number(graph, number)

    def polynomial(*coefficients: float) -> str:
        found = value(coefficients[0])
        for coefficient in coefficients[1:]:
            found = graph.add("Add", graph.add("Mul", found, far), value(coefficient))
        return found

    if interpolation == "bilinear":
        return graph.add("Max", graph.add("Sub", value(1.0), far), value(0.0))
    if interpolation == "bicubic":  # a = -0.5
        outer = graph.add("Where", graph.add("Less", far, value(2.0)), polynomial(-0.5, 2.5, -4.0, 2.0), value(0.0))
        return graph.add("Where", graph.add("Less", far, value(1.0)), polynomial(1.5, -2.5, 0.0, 1.0), outer)
    inner = graph.add("Mul", _sinc(graph, far), _sinc(graph, graph.add("Mul", far, value(1.0 / 3.0))))
    return graph.add("Where", graph.add("Less", far, value(3.0)), inner, value(0.0))


def _sinc(graph: Builder, x: str) -> str:
    angle = graph.add("Mul", graph.add("Max", x, _number(graph, 1e-9)), _number(graph, np.pi))
    return graph.add("Div", graph.add("Sin", angle), angle)
