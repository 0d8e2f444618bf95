"""Many rows: the same optimum as scikit-learn, in less memory than the embeddings themselves take."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from featx.large import logistic_path
from featx.scoring import softmax


def clusters(n: int, d: int, n_classes: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Overlapping classes, features of falling variance around a common offset."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    spread = 1.0 / np.sqrt(1.0 + np.arange(d) / 10.0)
    rows = (0.4 * rng.normal(size=(n_classes, d))[labels] + rng.normal(size=(n, d))) * spread + 0.5
    return rows.astype(np.float32), labels


@pytest.mark.parametrize("n_classes", [2, 6])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_path_equals_logistic_regression(n_classes: int, scaled: bool) -> None:
    rows, labels = clusters(4500, 24, n_classes)  # more than one block, and the last one short
    scale = 1.0 / np.linalg.norm(rows, axis=1) if scaled else None
    plain = rows.astype(np.float64) * (1.0 if scale is None else scale[:, None])
    cs, products = [1e-3, 1e-1, 10.0], 0
    for c, fit in zip(cs, logistic_path(rows, labels, n_classes, cs, row_scale=scale), strict=True):
        exact = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(plain, labels)
        scores = plain @ fit.coef.T + fit.intercept
        ours = softmax(scores.reshape(-1) if n_classes == 2 else scores)
        assert fit.converged
        assert fit.c == c
        assert fit.products > products
        products = fit.products
        assert fit.coef.shape == exact.coef_.shape
        np.testing.assert_allclose(ours, exact.predict_proba(plain), atol=2e-5)


def test_other_layouts_are_copied_and_agree() -> None:
    rows, labels = clusters(600, 12, 3)
    fits = [
        next(logistic_path(each, labels, 3, [1.0]))
        for each in (rows, np.asfortranarray(rows), rows.astype(np.float64), np.repeat(rows, 2, axis=1)[:, ::2])
    ]
    for fit in fits[1:]:
        np.testing.assert_allclose(fit.coef, fits[0].coef, atol=1e-6)


def test_stopping_early_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featx.large._MAX_NEWTON", 1)
    rows, labels = clusters(500, 10, 3)
    assert not next(logistic_path(rows, labels, 3, [10.0])).converged


MEASURE = """
import resource
import numpy as np
from featx.large import logistic_path
rng = np.random.default_rng(0)
n, d, c = 16_000, 768, 20
labels = rng.integers(0, c, n)
centres = (0.1 * rng.standard_normal((c, d))).astype(np.float32)
rows = np.empty((n, d), dtype=np.float32)
for start in range(0, n, 1000):
    part = slice(start, start + 1000)
    rows[part] = centres[labels[part]] + rng.standard_normal((1000, d), dtype=np.float32)
next(logistic_path(rows[:2000], labels[:2000], c, [1e-3]))  # libraries and their buffers are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fits = list(logistic_path(rows, labels, c, [1e-5, 1e-4]))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
assert all(fit.converged for fit in fits)
print(grown / rows.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
def test_memory_stays_below_the_size_of_the_embeddings() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.75
