"""What the tests of heads share with processes that they start: classes that are hard to solve for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def overlapping(n: int, d: int, n_classes: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Overlapping classes, features of falling variance around a common offset."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    spread = 1.0 / np.sqrt(1.0 + np.arange(d) / 10.0)
    rows = (0.4 * rng.normal(size=(n_classes, d))[labels] + rng.normal(size=(n, d))) * spread + 0.5
    return rows.astype(np.float32), labels
