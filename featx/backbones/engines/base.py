"""What every engine has in common: the protocol, the shape of what goes in and out, and padding."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from featx._arrays import COMBINED, JOINED

Batch = NDArray[np.uint8]
"""Pixels of shape (n, height, width, 3), as :class:`featx.images.views.Looks` cuts them."""

Embeddings = tuple[NDArray[np.float32], ...]
"""One array (n, d) per layer."""

EXACT_START = 0.4
"""Share of the convolutions, from the input, that stay fp32 at bf16 in networks with depthwise convolutions.

bf16 keeps eight bits. Dense convolutions average that noise away; depthwise ones, which add up nine numbers, do not,
and what the first ones lose is amplified by all others. On 64 photos the least cosine to fp32 was 0.992 for
efficientnet_lite0 (mobilenet_v2 0.976) with all of it at bf16, and 0.9994 (0.9994) with 0.4 of it exact.
"""


class Engine(Protocol):
    """Runs one backbone on one device at one precision; engines are made of this class.

    Attributes
    ----------
    name, device, precision, batch_size : as :func:`featx.backbones.engines.choice.make_engine` was asked for them.
    graph_sha256 : hex sha256 of the graph that it runs; empty where it has none, as with torch.
    quantised_sha256 : the same, where the graph is a quantised one.
    network_to_keep : the file of the graph; empty where there is none, or every featx has it.
    """

    name: str
    device: str
    precision: str
    batch_size: int
    graph_sha256: str = ""
    quantised_sha256: str = ""
    network_to_keep: bytes = b""

    def embed(self, batches: Iterable[Batch]) -> Iterator[Embeddings]:
        """Embed each batch of 1 to ``batch_size`` images; results come in order.

        The engine may take a few batches more than it has given results for, and works on them meanwhile.
        """
        ...


def layer_place(layer: str, layers: Sequence[str]) -> int | None:
    """Which of ``layers`` this one is; None for :data:`COMBINED` or :data:`JOINED`, all of them."""
    return None if layer in (COMBINED, JOINED) and layer not in layers else list(layers).index(layer)


def of_layer(found: Sequence[NDArray[np.float32]], place: int | None) -> NDArray[np.float32]:
    """Of embeddings (..., d), one array a layer, those of one layer, or of all (..., sum of d) where it is None."""
    return np.concatenate(found, axis=-1) if place is None else found[place]


def sizes_of(batch_size: int, *, pad: bool) -> tuple[int, ...]:
    """Sizes of batches that an engine computes: the one, or that and the powers of two below it, ascending."""
    if pad:
        return (batch_size,)
    return (*(1 << power for power in range(batch_size.bit_length()) if 1 << power < batch_size), batch_size)


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Hide the package by which OpenVINO and NNCF send events, while one of them is imported."""
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]


def fill(padded: Batch, batch: Batch) -> int:
    """Copy ``batch`` to the front of ``padded``, zero the rest, and return how many images it has."""
    n = len(batch)
    if batch.dtype != np.uint8 or batch.shape[1:] != padded.shape[1:] or not 1 <= n <= len(padded):
        raise ValueError(
            f"expected uint8 (1..{len(padded)}, {', '.join(map(str, padded.shape[1:]))}), "
            f"got {batch.dtype} {batch.shape}"
        )
    padded[:n] = batch
    padded[n:] = 0
    return n


FeatureMap = NDArray[np.float32] | str
"""What a network saw at each place of images, (n, h, w, d), whose mean over h and w is the embedding; or why it has no
such map, as a clause."""

NOT_AVERAGED = "the network does not end this layer with a mean over the image"
"""Why there is no map: tokens of which one stands for the whole image, or more that is computed after the mean."""


def feature_maps(engine: Engine, batch: Batch) -> tuple[FeatureMap, ...]:
    """The map behind each layer's embedding of one batch (n, h, w, 3) of single views, by the same network.

    Every map that is returned was compared with the embedding that came out of the same run.
    """
    run = getattr(engine.engine if isinstance(engine, ViewsEngine) else engine, "maps", None)
    if run is None:
        return ("it is not a network",)
    tolerance = MAP_TOLERANCE["half" if engine.precision in ("bf16", "fp16") else "exact"]
    found: list[FeatureMap] = []
    for embedding, tried in run(batch):
        fits = [each for each in tried if averages_to(each, embedding, tolerance)]
        found.append(fits[-1] if fits else NOT_AVERAGED)
    return tuple(found)


def averages_to(found: NDArray[np.float32], embedding: NDArray[np.float32], tolerance: float) -> bool:
    """Whether maps (n, h, w, d) have embeddings (n, d) as their means, to a share of the largest number."""
    mean = found.mean(axis=(1, 2), dtype=np.float64)
    return mean.shape == embedding.shape and bool(
        np.abs(mean - embedding).max() <= tolerance * np.abs(embedding).max(initial=1e-12)
    )


def laid_out(found: NDArray[np.float32], place: str) -> NDArray[np.float32]:
    """A map as (n, h, w, d), whose channels are "first" or "last", or which has "tokens"; those of no square in a row.

    Tokens stand by rows of a square image; where their number is no square, one of them is no place, and a mean over
    a row of them is shown as such.
    """
    if place == "first":
        return np.moveaxis(found, 1, -1)
    if place == "tokens":
        side = math.isqrt(found.shape[1])
        rows = side if side * side == found.shape[1] else 1
        return found.reshape(len(found), rows, -1, found.shape[2])
    return found


MAP_TOLERANCE = {"exact": 1e-4, "half": 0.01}
"""How far a map's mean may be from an embedding that was rounded to single or to half precision; bf16 rounds to 0.004.
What maps add up to is judged on scores (:mod:`featx.models.explain`)."""


def for_views(engine: Engine, views: int) -> Engine:
    """The engine for images of so many views each: one that averages, if it is not one already; itself for one view."""
    averages = isinstance(engine, ViewsEngine) and engine.views == views
    return engine if views == 1 or averages else ViewsEngine(engine, views)


class ViewsEngine(Engine):
    """Embeds batches (n, v, h, w, 3) of images in ``v`` views: the mean of an image's embeddings, one row for each.

    Parameters
    ----------
    engine : embeds the views, in batches of its own size; a batch of this engine is ``v`` of those.
    views : v.
    """

    def __init__(self, engine: Engine, views: int) -> None:
        self.engine, self.views = engine, views
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.batch_size = engine.batch_size
        self.graph_sha256, self.quantised_sha256 = engine.graph_sha256, engine.quantised_sha256
        self.network_to_keep = engine.network_to_keep

    def embed(self, batches: Iterable[Batch]) -> Iterator[Embeddings]:
        """See :meth:`Engine.embed`."""
        sizes: deque[int] = deque()

        def views() -> Iterator[Batch]:
            for batch in batches:
                if batch.ndim != 5 or batch.shape[1] != self.views:
                    raise ValueError(f"expected images (n, {self.views}, h, w, 3), got {batch.shape}")
                sizes.append(len(batch))
                rows = batch.reshape(-1, *batch.shape[2:])
                for start in range(0, len(rows), self.engine.batch_size):
                    yield rows[start : start + self.engine.batch_size]

        parts: list[Embeddings] = []
        for part in self.engine.embed(views()):
            parts.append(part)
            if sum(len(each[0]) for each in parts) == sizes[0] * self.views:
                n = sizes.popleft()
                yield tuple(_mean(np.concatenate(layer), n) for layer in zip(*parts, strict=True))
                parts.clear()


def _mean(rows: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Rows (n * v, d), image by image, as (n, d)."""
    return np.asarray(rows.reshape(n, -1, rows.shape[1]).mean(axis=1, dtype=np.float64), dtype=np.float32)
