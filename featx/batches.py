"""What every engine has in common: the protocol, the shape of what goes in and out, and padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Batch = NDArray[np.uint8]
"""Pixels of shape (n, height, width, 3), as :func:`featx.images.pixels` gives them."""

Embeddings = tuple[NDArray[np.float32], ...]
"""One array (n, d) per layer."""

EXACT_START = 0.4
"""Share of the convolutions, from the input, that stay fp32 at bf16 in networks with depthwise convolutions.

bf16 keeps eight bits. Dense convolutions average that noise away; depthwise ones, which add up nine numbers, do not,
and what the first ones lose is amplified by all others. On 64 photos the least cosine to fp32 was 0.992 for
efficientnet_lite0 (mobilenet_v2 0.976) with all of it at bf16, and 0.9994 (0.9994) with 0.4 of it exact.
"""


class Engine(Protocol):
    """Runs one backbone on one device at one precision."""

    name: str
    device: str
    precision: str
    batch_size: int

    def embed(self, batches: Iterable[Batch]) -> Iterator[Embeddings]:
        """Embed each batch of 1 to ``batch_size`` images; results come in order.

        The engine may take a few batches more than it has given results for, and works on them meanwhile.
        """
        ...


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
