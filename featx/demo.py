"""The images of ``featx demo``: scikit-learn's bundled digits, as a folder of class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from featx.errors import StoreError
from featx.images import save_png

SCALE = 4
"""The digits are 8x8; enlarged without smoothing they can be looked at."""


def write_digits(folder: Path) -> int:
    """Write 1,797 grey PNG files as ``folder/<digit>/<number>.png``; returns how many there are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    if folder.exists() and not folder.is_dir():
        raise StoreError("a file is in the way of the folder of digits", where=folder)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        if not path.exists():
            grey = np.round(255 - image * (255 / 16)).astype(np.uint8)
            save_png(np.kron(grey, np.ones((SCALE, SCALE), np.uint8)), path)
    return len(digits.target)
