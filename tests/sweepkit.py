"""What the tests of sweeps share: embeddings of known classes, and a small sweep that a process of its own can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.evaluation.results import SweepResult
from featx.evaluation.sweep import sweep_heads

Rows = NDArray[np.float32]

PLAN: dict[str, Any] = {"heads": ["ridge", "knn"], "shots": (1, 2), "episodes": 3, "n_jobs": 1}


def blobs(sizes: list[int], d: int = 32, gap: float = 0.8, seed: int = 0) -> tuple[Rows, NDArray[np.int64], list[str]]:
    """Embeddings of classes of these sizes, named a, b, c, ..."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = gap * rng.normal(size=(len(sizes), d))[labels] + rng.normal(size=(len(labels), d))
    return np.maximum(rows + 0.5, 0).astype(np.float32), labels, list("abcdefgh"[: len(sizes)])


def sweep(journal: Path | None = None, progress: Any = None) -> SweepResult:
    """A sweep of six draws."""
    rows, labels, names = blobs([10, 10])
    return sweep_heads(rows, labels, class_names=names, journal=journal, progress=progress, **PLAN)
