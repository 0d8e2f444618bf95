"""What the tests of images share: files in memory, and what their bytes are to a network, one step after the other."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from conftest import picture
from numpy.typing import NDArray
from PIL import Image

from featx.errors import ImageError
from featx.images.pixels import REASONS, Preprocess, decode
from featx.images.views import Looks


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


def png(seed: int) -> bytes:
    """A picture as a file."""
    return encoded(picture(seed))


def refused(data: bytes) -> ImageError:
    """Why a file is refused."""
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason in REASONS
    return caught.value


def pixels(data: bytes, looks: Preprocess | Looks, *, mode: str = "full") -> NDArray[np.uint8]:
    """Decode and cut one file's bytes: uint8 (height, width, 3), or (v, height, width, 3) of several views."""
    looks = looks if isinstance(looks, Looks) else Looks(looks)
    return looks.cut(decode(data, enough_for=[looks] if mode == "scaled" else ()))
