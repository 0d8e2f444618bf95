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

_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
_GREY = 255.0


def add_pixels(graph: Builder, photo: str, looks: Looks) -> str:
    """From uint8 (h, w, 3) to float32 (v, 3, crop height, crop width) of each view, 0 to 255 and whole."""
    interpolation = looks.preprocess.interpolation
    if interpolation not in _SUPPORT:
        raise UsageError("the network's resize cannot be exported", expected=" or ".join(_SUPPORT), found=interpolation)
    size = [
        graph.add("Cast", graph.add("Gather", graph.add("Shape", photo), graph.integers(i)), to=_float(graph))
        for i in (0, 1)
    ]
    views = [VIEWS[name] for name in looks.views]
    seen = [_view(graph, photo, size, view, looks.preprocess) for view in views]
    return seen[0] if len(seen) == 1 else graph.add("Concat", *seen, axis=0)


def _float(graph: Builder) -> int:
    return int(graph.onnx.TensorProto.FLOAT)


def _view(graph: Builder, photo: str, size: list[str], view: View, preprocess: Preprocess) -> str:
    box = _box_of_weights(graph, size, preprocess) if view.frame is None else _box(graph, size, view, preprocess.crop)
    (top, bottom), (left, right) = box
    height, width = preprocess.crop
    rows, first_row, last_row = _weights(graph, size[0], top, bottom, height, preprocess.interpolation)
    columns, first, last = _weights(
        graph, size[1], left, right, width, preprocess.interpolation, mirrored=view.mirrored
    )
    part = graph.add(
        "Slice", photo, graph.add("Concat", first_row, first, axis=0), graph.add("Concat", last_row, last, axis=0),
        graph.integers(0, 1),
    )  # fmt: skip
    planes = graph.add("Transpose", graph.add("Cast", part, to=_float(graph)), perm=[2, 0, 1])
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
        new = [graph.constant([float(length)]) for length in preprocess.resize]
    else:
        # The product in whole numbers: a photo's own length times the network's, by the shorter one, cut off.
        shorter = graph.add("Min", *size)
        new = []
        for length in size:
            whole = [graph.add("Cast", each, to=int(graph.onnx.TensorProto.INT64)) for each in (length, shorter)]
            longer = graph.add("Mul", whole[0], graph.integers(preprocess.resize))
            new.append(graph.add("Cast", graph.add("Div", longer, whole[1]), to=_float(graph)))
    out = []
    for length, resized, crop in zip(size, new, preprocess.crop, strict=True):
        kept = graph.constant([float(crop)])
        start = graph.add("Round", graph.add("Mul", graph.add("Sub", resized, kept), graph.constant([0.5])))
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
            (graph.add("Mul", length, graph.constant([low])), graph.add("Mul", length, graph.constant([high])))
            for length, (low, high) in zip(size, shares, strict=True)
        ]
    fits = [graph.add("Div", length, graph.constant([float(side)])) for length, side in zip(size, crop, strict=True)]
    scale = graph.add("Mul", graph.add("Min", *fits), graph.constant([float(view.frame or 1.0)]))
    out = []
    for length, side in zip(size, crop, strict=True):
        inside = graph.add("Mul", scale, graph.constant([float(side)]))
        start = graph.add("Mul", graph.add("Sub", length, inside), graph.constant([0.5]))
        out.append((start, graph.add("Sub", length, start)))
    return out


def _weights(
    graph: Builder, length: str, start: str, end: str, n: int, interpolation: str, *, mirrored: bool = False
) -> tuple[str, str, str]:
    """What each pixel between two places is worth for each of ``n`` new ones (n, m); first and last of the m pixels."""
    support = _SUPPORT[interpolation]
    one = graph.constant([1.0])
    scale = graph.add("Div", graph.add("Sub", end, start), graph.constant([float(n)]))
    wide = graph.add("Max", scale, one)  # enlarging does not narrow the filter
    reach = graph.add("Add", graph.add("Mul", wide, graph.constant([support])), one)
    low = graph.add("Max", graph.add("Floor", graph.add("Sub", start, reach)), graph.constant([0.0]))
    high = graph.add("Min", graph.add("Ceil", graph.add("Add", end, reach)), length)
    first, last = (graph.add("Cast", each, to=int(graph.onnx.TensorProto.INT64)) for each in (low, high))
    numbers = np.arange(n, dtype=np.float64) + 0.5
    places = graph.constant((numbers[::-1] if mirrored else numbers)[:, None])
    # Counted from the first of the m pixels: single precision is then exact enough for large photos.
    centres = graph.add("Add", graph.add("Mul", places, scale), graph.add("Sub", start, low))
    scalar = [graph.add("Squeeze", each, graph.integers(0)) for each in (first, last)]
    count = graph.add("Sub", scalar[1], scalar[0])
    steps = graph.add("Range", graph.constant(0, np.int64), count, graph.constant(1, np.int64))
    middles = graph.add("Add", graph.add("Cast", steps, to=_float(graph)), graph.constant([0.5]))
    far = graph.add("Abs", graph.add("Div", graph.add("Sub", middles, centres), wide))
    values = _filter(graph, far, interpolation)
    total = graph.add("ReduceSum", values, graph.integers(1), keepdims=1)
    return graph.add("Div", values, total), first, last


def _filter(graph: Builder, far: str, interpolation: str) -> str:
    """Pillow's filters, of distances that are not negative."""

    def value(number: float) -> str:
        return graph.constant(number)

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
    angle = graph.add("Mul", graph.add("Max", x, graph.constant(1e-6)), graph.constant(np.pi))
    return graph.add("Div", graph.add("Sin", angle), angle)
