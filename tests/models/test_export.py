"""Exports: the same labels and probabilities in other formats, and pickles only where they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import Featx
from modelkit import clusters, make_bundle

from featx.errors import BundleError, UsageError
from featx.heads.catalogue import HEADS, make_head
from featx.models.bundle import Bundle, write_bundle
from featx.models.export import Pickled, export_bundle, to_pipeline

LAYERS = ("blocks_l2:7*0.8000,5*0.6000", "blocks_l2:7*0.0000,5*1.0000")  # two layers combined; the second one alone
KINDS = ("none", "l2", "centre_l2", "standardise", *LAYERS)
LINEAR = [name for name in HEADS if name != "knn"]


def fitted(name: str = "logreg", kind: str = "l2", n_classes: int = 3, **changes: Any) -> Bundle:
    rows, labels = clusters(n_classes)
    extra = {"n_neighbors": 5} if name == "knn" else {}
    return make_bundle(make_head(name, kind=kind, **extra).fit(rows, labels), rows, n_classes, sharpness=0.7, **changes)


QUERIES = np.random.default_rng(3).normal(size=(1000, 12)).astype(np.float32) * 2


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LINEAR)
def test_the_pipeline_gives_the_bundles_probabilities(name: str, kind: str, n_classes: int) -> None:
    bundle = fitted(name, kind, n_classes)
    pipeline = to_pipeline(bundle)
    assert np.abs(pipeline.predict_proba(QUERIES.astype(np.float64)) - bundle.probabilities(QUERIES)).max() < 1e-6
    assert pipeline.predict(QUERIES).tolist() == [answer.label for answer in bundle.answer(QUERIES)]


@pytest.mark.parametrize("kind", ["l2", *LAYERS])
def test_neighbours_keep_their_labels(kind: str) -> None:
    bundle = fitted("knn", kind)
    assert to_pipeline(bundle).predict(QUERIES).tolist() == [answer.label for answer in bundle.answer(QUERIES)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["l2", LAYERS[1]])
@pytest.mark.parametrize("form", ["joblib", "skops"])
def test_pipelines_load_without_featx(form: str, kind: str, tmp_path: Path) -> None:
    if form == "skops":
        pytest.importorskip("skops")
    bundle = fitted(kind=kind)
    path = export_bundle(bundle, tmp_path / f"a.{form}", form)
    np.save(tmp_path / "queries.npy", QUERIES)
    load = {"joblib": "joblib.load(path)", "skops": "skops.io.load(path, trusted=[])"}[form]
    module = {"joblib": "joblib", "skops": "skops.io"}[form]
    code = (
        f"import sys, numpy, {module}; sys.modules['featx'] = None; path = sys.argv[1]; p = {load}\n"
        "numpy.save(sys.argv[3], p.predict_proba(numpy.load(sys.argv[2]).astype(float)))"
    )
    files = [path, tmp_path / "queries.npy", tmp_path / "found.npy"]
    subprocess.run([sys.executable, "-c", code, *map(str, files)], check=True, timeout=120)
    assert np.abs(np.load(tmp_path / "found.npy") - bundle.probabilities(QUERIES)).max() < 1e-6


@pytest.mark.parametrize(("name", "kind"), [*(("logreg", kind) for kind in [*KINDS, "power_l2"]), ("knn", "l2")])
def test_onnx_in_another_runtime(name: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    from featx.backbones.engines.graph import import_openvino

    bundle = fitted(name, kind)
    path = export_bundle(bundle, tmp_path / "a.onnx", "onnx")
    compiled = import_openvino().Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({"embedding": QUERIES})["probabilities"]
    assert np.abs(found - bundle.probabilities(QUERIES)).max() < 1e-4  # float32 all the way


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    for form, bundle, message in [
        ("joblib", fitted(kind="power_l2"), "no counterpart in scikit-learn"),
        ("pmml", fitted(), "no such format"),
    ]:
        with pytest.raises(UsageError, match=message):
            export_bundle(bundle, tmp_path / "a", form)


def test_a_pickled_pipeline_answers_as_its_bundle(tmp_path: Path) -> None:
    bundle = fitted(threshold=0.6)
    pickled = Pickled.load(export_bundle(bundle, tmp_path / "a.joblib", "joblib"))
    for one, two in zip(pickled.answer(QUERIES), bundle.answer(QUERIES), strict=True):
        assert (one.label, one.abstain, one.score_kind) == (two.label, two.abstain, two.score_kind)
        assert one.score == pytest.approx(two.score, abs=1e-6)
    joblib.dump({"a": 1}, tmp_path / "b.joblib")
    with pytest.raises(BundleError, match="not a pipeline that featx exported"):
        Pickled.load(tmp_path / "b.joblib")


def test_the_command(tmp_path: Path, featx: Featx) -> None:
    model = write_bundle(fitted(), tmp_path / "a.model")
    done = featx("export", model, "--format", "joblib", "--out", tmp_path / "a.joblib")
    assert done.code == 0, done.err
    assert joblib.load(tmp_path / "a.joblib").classes_.tolist() == ["class 0", "class 1", "class 2"]
    (tmp_path / "a.jpg").write_bytes(b"")
    refused = featx("predict", tmp_path / "a.joblib", tmp_path / "a.jpg")
    assert (refused.code, "--allow-pickle" in refused.err) == (2, True)
