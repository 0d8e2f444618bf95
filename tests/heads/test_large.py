"""Many rows: the same optimum as scikit-learn, in less memory than the embeddings themselves take."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from conftest import TESTS
from headkit import overlapping
from sklearn.linear_model import LogisticRegression

from featx.errors import UsageError
from featx.evaluation.sweep import sweep_heads
from featx.heads.catalogue import Logistic
from featx.heads.normalise import Normalise
from featx.heads.scorer import KINDS, Kind, softmax
from featx.heads.solvers.blocks import fit_blocks, moments
from featx.heads.solvers.device import check_device
from featx.models.fit import fit_head


@pytest.mark.parametrize("n_classes", [2, 6])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_fit_by_blocks_equals_logistic_regression(n_classes: int, scaled: bool) -> None:
    rows, labels = overlapping(4500, 24, n_classes)  # more than one block, and the last one short
    scale = 1.0 / np.linalg.norm(rows, axis=1) if scaled else None
    plain = rows.astype(np.float64) * (1.0 if scale is None else scale[:, None])
    for c in (1e-3, 1e-1, 10.0):
        coef, intercept, converged = fit_blocks(rows, labels, n_classes, c, row_scale=scale)
        exact = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(plain, labels)
        scores = plain @ coef.T + intercept
        ours = softmax(scores.reshape(-1) if n_classes == 2 else scores)
        assert converged
        assert coef.shape == exact.coef_.shape
        np.testing.assert_allclose(ours, exact.predict_proba(plain), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_large_fit_is_the_fit_of_the_head(kind: Kind, n_classes: int) -> None:
    rows, labels = overlapping(4300, 16, n_classes)
    normalise = Normalise(kind).fit(rows)
    whole = Logistic(C=50.0).fit(normalise.transform(rows), labels)
    large = Logistic(C=50.0).fit_large(rows, labels, normalise)
    expected = whole.predict_proba(normalise.transform(rows))
    np.testing.assert_allclose(large.predict_proba(normalise.transform(rows)), expected, atol=1e-4)
    np.testing.assert_array_equal(large.classes_, whole.classes_)


def test_equal_rows_and_empty_ones_have_a_fit() -> None:
    same, labels = np.ones((300, 24), dtype=np.float32), np.arange(300) % 3
    for kind in KINDS:
        model = Logistic().fit_large(same, labels, Normalise(kind).fit(same))
        np.testing.assert_allclose(model.predict_proba(same[:1]), 1 / 3, atol=2e-3)
    rows, labels = overlapping(500, 24, 3)
    rows[::50] = 0.0
    for kind in KINDS:
        model = Logistic().fit_large(rows, labels, Normalise(kind).fit(rows))
        assert model.converged_ and np.isfinite(model.coef_).all()


def test_mean_and_deviation_are_those_of_numpy() -> None:
    rows, _ = overlapping(9000, 12, 2)
    mean, deviation = moments(rows)
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(deviation, rows.astype(np.float64).std(axis=0), rtol=1e-12)


@pytest.mark.slow
def test_a_sweep_of_large_embeddings_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = overlapping(700, 24, 3)
    plan: dict[str, Any] = {"class_names": "abc", "heads": ["logreg", "ridge", "knn"], "shots": (5, "all")}
    plain = sweep_heads(rows, labels, **plan, episodes=2, n_jobs=1)
    monkeypatch.setattr("featx.heads.solvers.blocks.LARGE", 2000)
    calls = []

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return fit_blocks(*args, **more)

    monkeypatch.setattr("featx.heads.catalogue.fit_blocks", counted)
    large = sweep_heads(rows, labels, **plan, episodes=2, n_jobs=2)
    assert len(calls) == 2  # the two supports of "all"; those of 15 images are small
    for ours, theirs in zip(large.trials, plain.trials, strict=True):
        assert (ours.params, ours.accuracy, ours.converged) == (theirs.params, theirs.accuracy, True)
        np.testing.assert_array_equal(ours.predictions, theirs.predictions)
        if theirs.confidences is not None:
            assert ours.confidences is not None
            np.testing.assert_allclose(ours.confidences, theirs.confidences, atol=1e-4)


@pytest.mark.slow
def test_a_fit_on_large_embeddings_is_the_same_head(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = overlapping(600, 24, 3)
    plain = fit_head(rows, labels, class_names="abc", heads=["logreg"])
    monkeypatch.setattr("featx.heads.solvers.blocks.LARGE", 2000)
    large = fit_head(rows, labels, class_names="abc", heads=["logreg"])
    assert large.params == plain.params
    np.testing.assert_allclose(large.scorer.scores(rows), plain.scorer.scores(rows), atol=1e-2)
    assert large.sharpness == pytest.approx(plain.sharpness, rel=1e-3)
    assert large.metrics["out_of_fold"]["accuracy"] == plain.metrics["out_of_fold"]["accuracy"]


TENSORS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from headkit import overlapping
from featx.heads.catalogue import Logistic
from featx.heads.normalise import Normalise
from featx.heads.scorer import KINDS
from featx.evaluation.sweep import sweep_heads
import featx.heads.solvers.blocks
for n_classes in (2, 4):
    rows, labels = overlapping(1500, 16, n_classes)
    for kind in KINDS:
        normalise = Normalise(kind).fit(rows)
        plain = Logistic(C=50.0).fit_large(rows, labels, normalise)
        tensors = Logistic(C=50.0).fit_large(rows, labels, normalise, "cpu")
        seen = normalise.transform(rows)
        assert tensors.converged_
        np.testing.assert_allclose(tensors.predict_proba(seen), plain.predict_proba(seen), atol=2e-4)
featx.heads.solvers.blocks.LARGE = 2000
plan = {"class_names": "abcd", "heads": ["logreg"], "shots": ("all",), "episodes": 2, "n_jobs": 1}
found, plain = (sweep_heads(rows, labels, **plan, device=device) for device in ("cpu", None))
for ours, theirs in zip(found.trials, plain.trials, strict=True):
    assert abs(ours.accuracy - theirs.accuracy) < 0.005 and ours.converged
assert "2 logistic regressions solved on cpu, everything else on the CPU." in found.notes, found.notes
featx.heads.solvers.blocks.LARGE = 10**9
found = sweep_heads(rows, labels, **plan, device="cpu")
assert any(note.startswith("Nothing was solved on cpu") for note in found.notes), found.notes
"""


@pytest.mark.slow
def test_tensors_give_the_same_as_arrays() -> None:
    pytest.importorskip("torch")
    environment = {**os.environ, "SCIPY_ARRAY_API": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", TENSORS, str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_devices_that_are_not_there_are_usage_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.delenv("SCIPY_ARRAY_API", raising=False)
    with pytest.raises(UsageError, match="SciPy takes no tensors: expected SCIPY_ARRAY_API=1"):
        check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows, labels = overlapping(60, 8, 2)
    for work in (sweep_heads, fit_head):
        with pytest.raises(UsageError, match=r"no CUDA device.* Leave --device out"):
            work(rows, labels, class_names="ab", device="cuda")
    monkeypatch.setattr("sklearn.__version__", "1.6.1")
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    with pytest.raises(UsageError, match=r"expected 1\.9 or newer, found 1\.6\.1"):
        check_device("cpu")


def test_other_layouts_are_copied_and_agree() -> None:
    rows, labels = overlapping(600, 12, 3)
    fits = [
        fit_blocks(each, labels, 3, 1.0)[0]
        for each in (rows, np.asfortranarray(rows), rows.astype(np.float64), np.repeat(rows, 2, axis=1)[:, ::2])
    ]
    for fit in fits[1:]:
        np.testing.assert_allclose(fit, fits[0], atol=1e-6)


def test_stopping_early_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featx.heads.solvers.blocks._MAX_NEWTON", 1)
    rows, labels = overlapping(500, 10, 3)
    assert not fit_blocks(rows, labels, 3, 10.0)[2]


MEASURE = """
import resource
import numpy as np
from featx.heads.solvers.blocks import fit_blocks
rng = np.random.default_rng(0)
n, d, c = 16_000, 768, 20
labels = rng.integers(0, c, n)
centres = (0.1 * rng.standard_normal((c, d))).astype(np.float32)
rows = np.empty((n, d), dtype=np.float32)
for start in range(0, n, 1000):
    part = slice(start, start + 1000)
    rows[part] = centres[labels[part]] + rng.standard_normal((1000, d), dtype=np.float32)
fit_blocks(rows[:2000], labels[:2000], c, 1e-3)  # libraries and their buffers are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
converged = fit_blocks(rows, labels, c, 1e-4)[2]
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
assert converged
print(grown / rows.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
def test_memory_stays_below_the_size_of_the_embeddings() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.75
