"""A model as something else: its head as a scikit-learn pipeline (joblib, skops), or all of it as a graph (ONNX).

The pipeline consists of scikit-learn's own classes, so it loads where featx is not installed, and its
``predict_proba`` gives the bundle's calibrated probabilities. What it does not have is a network: it takes embeddings.
Nor does it know which photos are unknown to it: no class of scikit-learn says so beside its probabilities.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

from featx._files import publish_bytes
from featx.backbones import layer_place
from featx.errors import BundleError, UsageError, not_installed
from featx.heads import blocks_of
from featx.models.bundle import Answer, Bundle, silence
from featx.models.onnx.builder import Builder
from featx.models.onnx.head import add_scores

FORMATS = ("joblib", "skops", "onnx")
_ATTRIBUTE = "featx_bundle_"


def export_bundle(bundle: Bundle, path: Path, form: str) -> Path:
    """Write a bundle's head in another format.

    Raises
    ------
    UsageError
        The format is unknown, cannot hold this head, or needs a package that is not installed.
    """
    if bundle.tail is not None:
        raise UsageError(
            "the head of a fine-tuned model is of no use without its network, which cannot be exported",
            where=path,
            hint="Use the model itself: featx predict MODEL IMAGE, or featx serve MODEL.",
        )
    if form == "joblib":
        import joblib

        out = io.BytesIO()
        joblib.dump(to_pipeline(bundle), out)
        return publish_bytes(path, out.getvalue())
    if form == "skops":
        try:
            import skops.io
        except ModuleNotFoundError as error:
            raise not_installed("skops", "export") from error
        data: bytes = skops.io.dumps(to_pipeline(bundle))
        return publish_bytes(path, data)
    if form == "onnx":
        return publish_bytes(path, _onnx(bundle))
    raise UsageError("no such format", where="--format", expected=" or ".join(FORMATS), found=form)


# --- scikit-learn -------------------------------------------------------------------------------------------------


def to_pipeline(bundle: Bundle) -> Pipeline:
    """A fitted scikit-learn pipeline of float64 embeddings (n, d) with the bundle's labels and probabilities.

    Of nearest neighbours ``predict_proba`` is the share of the votes, which is not calibrated.
    """
    pipeline = Pipeline([*_normaliser(bundle), ("classify", _classifier(bundle))])
    setattr(pipeline, _ATTRIBUTE, {**bundle.describe(), "sha256": bundle.sha256})
    return pipeline


def _normaliser(bundle: Bundle) -> list[tuple[str, Any]]:
    scorer, d = bundle.scorer, bundle.scorer.dims
    shifted: list[tuple[str, Any]] = []
    if scorer.kind in ("centre_l2", "standardise"):
        shift = StandardScaler(with_std=scorer.kind == "standardise")
        shift.mean_, shift.n_features_in_, shift.n_samples_seen_ = np.array(scorer.mean), d, 1
        shift.scale_ = np.array(scorer.scale) if scorer.kind == "standardise" else None
        shift.var_ = None if shift.scale_ is None else shift.scale_**2
        shifted = [("shift", shift)]
    if scorer.kind == "power_l2":
        # Two of NumPy's own functions, as a function of featx could not be loaded without featx.
        raise UsageError(
            "a head on signed square roots has no counterpart in scikit-learn",
            where="kind power_l2",
            hint="Fit a head with another normaliser, or use the bundle itself.",
        )
    if blocks := blocks_of(scorer.kind):
        return _blocks(blocks)
    unit = [("unit", Normalizer().fit(np.ones((1, d))))] if scorer.kind.endswith("l2") else []
    return [*shifted, *unit] or [("as_it_is", FunctionTransformer().fit(np.ones((1, d))))]


def _blocks(blocks: list[tuple[int, float]]) -> list[tuple[str, Any]]:
    """Each layer to unit length, and times its weight."""
    ends = np.cumsum([size for size, _ in blocks]).tolist()
    layers = [(f"layer_{i}", Normalizer(), np.arange(end - blocks[i][0], end)) for i, end in enumerate(ends)]
    example = np.ones((1, ends[-1]))
    unit = ColumnTransformer(layers).fit(example)
    weigh = StandardScaler(with_mean=False).fit(example)
    # It divides: a layer that the head does not look at is divided by infinity.
    weigh.scale_ = np.repeat([1.0 / weight if weight else np.inf for _, weight in blocks], [size for size, _ in blocks])
    return [("unit", unit), ("weigh", weigh)]


def _classifier(bundle: Bundle) -> Any:
    scorer = bundle.scorer
    names = np.array(bundle.class_names)
    if scorer.coef is None and scorer.intercept is not None:
        raise UsageError(
            "votes of neighbours cannot be shifted to other shares of the classes in scikit-learn", where="--prior",
            hint="Fit a linear head, such as ridge, or use the model itself.",
        )  # fmt: skip
    if scorer.coef is None or scorer.intercept is None:
        assert scorer.rows is not None
        assert scorer.targets is not None
        nearest = KNeighborsClassifier(scorer.n_neighbors).fit(scorer.rows, names[scorer.targets])
        if list(nearest.classes_) != list(names):
            raise UsageError("class names that are not in alphabetical order cannot be exported")
        return nearest
    sharpness = 1.0 if bundle.sharpness is None else bundle.sharpness
    coef, intercept = sharpness * scorer.coef, sharpness * scorer.intercept
    if scorer.n_classes == 2:  # one score, the log of the odds of the second
        coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
    linear = LogisticRegression()
    linear.classes_, linear.coef_, linear.intercept_ = names, coef, intercept
    linear.n_features_in_, linear.n_iter_ = scorer.dims, np.array([0], dtype=np.int32)
    return linear


class Pickled:
    """A pipeline that :func:`export_bundle` wrote with joblib, answering as its bundle does.

    Parameters
    ----------
    pipeline : what was loaded.
    told : what the bundle said of itself.
    """

    def __init__(self, pipeline: Any, told: Mapping[str, Any]) -> None:
        self.pipeline, self.told = pipeline, told
        self.provenance: Mapping[str, Any] = told["provenance"]
        self.layer = layer_place(told["layer"], told["provenance"]["layers"])
        self.class_names: Sequence[str] = told["class_names"]
        self.threshold: float | None = told["threshold"]
        # Votes of neighbours are not calibrated: they are no probabilities that a threshold is for.
        self.score_kind = "margin" if told["sharpness"] is None or told["n_neighbors"] else "probability"

    @classmethod
    def load(cls, path: Path) -> Pickled:
        """Unpickle. This runs whatever code the file asks for: only for files whose source is trusted.

        Raises
        ------
        BundleError
            It is no pipeline that featx exported.
        """
        import joblib

        try:
            pipeline = joblib.load(path)
            return cls(pipeline, getattr(pipeline, _ATTRIBUTE))
        except Exception as error:
            raise BundleError(
                f"not a pipeline that featx exported: {type(error).__name__}: {error}",
                where=path,
                hint="Make one with: featx export MODEL --format joblib --out FILE",
            ) from error

    @property
    def cautions(self) -> list[str]:
        """As of :attr:`featx.models.bundle.Bundle.cautions`."""
        return [
            *silence(self.threshold, self.told["metrics"]),
            "An exported head calls no photo unknown: it names a class for photos of anything. Use the model itself.",
        ]

    def cautions_of_sets(self, coverage: float) -> list[str]:
        """As of :meth:`featx.models.bundle.Bundle.cautions_of_sets`, but an exported head has no sets."""
        raise UsageError("an exported head gives no sets", where="--coverage", hint="Use the model itself.")

    def answer(self, embeddings: NDArray[np.floating], coverage: float | None = None) -> list[Answer]:
        """As of :meth:`featx.models.bundle.Bundle.answer`; there is no ``coverage``."""
        if coverage is not None:
            self.cautions_of_sets(coverage)
        rows = np.asarray(embeddings, dtype=np.float64)
        shares = self.pipeline.predict_proba(rows)
        calibrated = self.score_kind == "probability"
        sure = shares.max(axis=1) >= (np.inf if self.threshold is None or not calibrated else self.threshold)
        return [
            Answer(
                label=str(label),
                score=float(share.max() if calibrated else np.diff(np.sort(share)[-2:])[0]),
                score_kind=self.score_kind,
                probabilities=dict(zip(self.told["class_names"], share.tolist(), strict=True)) if calibrated else {},
                reason=None if known else "unsure",
            )
            for label, share, known in zip(self.pipeline.predict(rows), shares, sure, strict=True)
        ]


# --- ONNX ---------------------------------------------------------------------------------------------------------


def _onnx(bundle: Bundle) -> bytes:
    """A graph from ``embedding`` float32 (n, d) to ``probabilities`` float32 (n, c); names are in its metadata."""
    graph = Builder()
    sharpness = 1.0 if bundle.sharpness is None else bundle.sharpness
    graph.add("Softmax", add_scores(graph, "embedding", bundle.scorer, sharpness), axis=1, name="probabilities")
    told = {"class_names": "\n".join(bundle.class_names), "threshold": repr(bundle.threshold), "layer": bundle.layer}
    return graph.model(
        {"embedding": (np.float32, ("n", bundle.scorer.dims))},
        {"probabilities": (np.float32, ("n", bundle.scorer.n_classes))},
        {**told, "backbone": str(bundle.provenance.get("backbone"))},
        opset=13,  # understood everywhere
        ir_version=8,
    )
