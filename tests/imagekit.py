"""What an image's bytes are to a network, one step after the other: for comparison with what decoders give."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featx.images.pixels import Preprocess, decode
from featx.images.views import Looks


def pixels(data: bytes, looks: Preprocess | Looks, *, mode: str = "full") -> NDArray[np.uint8]:
    """Decode and cut one file's bytes: uint8 (height, width, 3), or (v, height, width, 3) of several views."""
    looks = looks if isinstance(looks, Looks) else Looks(looks)
    return looks.cut(decode(data, enough_for=[looks] if mode == "scaled" else ()))
