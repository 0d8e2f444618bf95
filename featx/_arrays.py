"""Names and array types that all rooms share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Index: TypeAlias = NDArray[np.intp]
"""Row numbers, or dense numbers of groups: (n,)."""

SPLITS = ("train", "val", "test")
"""Splits that an image may be in."""

PENULTIMATE = "penultimate"
"""The layer before the classifier: what embeddings are taken from by default."""

COMBINED = "combined"
"""In the place of a layer's name: all of the network's layers, side by side in their order."""

JOINED = "joined"
"""Likewise: all layers of several backbones, side by side."""

PIXELS = "pixels"
"""Name of the backbone that is no network: a thumbnail of the image, the baseline of all the others."""

NEAR = 0.98
"""Cosine from which on two rows count as copies of each other."""
