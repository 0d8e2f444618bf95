"""Real photographs that come with a package: scikit-image's wheel has sixteen in it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from featx.errors import UsageError, not_installed
from featx.images.pixels import decode

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg",
    "rocket.jpg",
)  # fmt: skip
"""Files that lie in the wheel itself; ``skimage.data`` would download some of its others."""


def photographs(purpose: str, extra: str) -> dict[str, Image]:
    """Each photograph, upright and in RGB, by its name.

    Parameters
    ----------
    purpose, extra : what they are for, and featx's extra that brings them, for the error.

    Raises
    ------
    UsageError
        scikit-image is not installed, or this version has other photographs.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise not_installed("scikit-image for its photographs", extra, purpose)
    folder = Path(spec.submodule_search_locations[0]) / "data"
    found = {}
    for file in PHOTOGRAPHS:
        try:
            data = (folder / file).read_bytes()
        except OSError as error:
            hint = "Install the version that featx was tried with: pip install 'scikit-image==0.26.0'"
            raise UsageError(
                f"this scikit-image comes without a photograph that {purpose} needs", where=file, hint=hint
            ) from error
        found[Path(file).stem] = decode(data)
    return found
