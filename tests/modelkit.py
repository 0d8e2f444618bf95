"""What the tests of kept heads share: clusters to fit a head on, and a bundle around it."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline

from featx.heads.scorer import Scorer
from featx.models.bundle import Bundle

PROVENANCE = {"backbone": "tiny", "weights": "none", "weights_sha256": "0" * 64, "layers": ["penultimate"]}


def clusters(n_classes: int = 3, each: int = 30, dims: int = 12, seed: int = 0) -> tuple[Any, Any]:
    """Overlapping clusters of embeddings (n, d), with their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), each)
    centres = rng.normal(size=(n_classes, dims)) * 1.2
    return (centres[labels] + rng.normal(size=(len(labels), dims))).astype(np.float32), labels


def make_bundle(model: Pipeline, rows: Any, n_classes: int = 3, **changes: Any) -> Bundle:
    """A bundle of this head; the probe in it is no picture."""
    fields: dict[str, Any] = {
        "scorer": Scorer.of(model),
        "class_names": tuple(f"class {i}" for i in range(n_classes)),
        "head": "logreg",
        "params": {"C": 316.0},
        "layer": "penultimate",
        "provenance": PROVENANCE,
        "sharpness": 1.0,
        "threshold": 0.5,
        "max_error": 0.05,
        "golden": rows[:8],
        "probe": b"not looked at here",
        "probe_embedding": rows[0],
    }
    return Bundle(**{**fields, **changes})
