"""What the tests of the index share: clustered rows, and whether two answers are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featx.retrieval import faiss as ann

Rows = NDArray[np.float32]
needs_faiss = pytest.mark.skipif(not ann.available(), reason="faiss is not installed")


def clustered(n: int, d: int = 32, *, clusters: int = 40, seed: int = 0) -> Rows:
    """Embeddings (n, d) around centres that are the same for every seed."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(clusters, d))
    return (centres[random.integers(0, clusters, n)] + 0.4 * random.normal(size=(n, d))).astype(np.float32)


def same(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Whether two answers have the same scores and rows."""
    return np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
