"""A whole model as one ONNX graph, from an upright photo to the answer, which proves its own numbers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featx.backbones import list_backbones, of_layer, quantised
from featx.errors import UsageError, not_installed
from featx.extraction import Embedder
from featx.images import decode
from featx.models.bundle import Bundle
from featx.models.onnx.builder import Builder
from featx.models.onnx.head import add_scores, add_shares
from featx.models.onnx.network import add_network
from featx.models.onnx.pixels import add_pixels
from featx.models.predictor import layer_number
from featx.store import backbones_of, fingerprint

Photo: TypeAlias = Any
"""An upright RGB image, as :func:`featx.images.decode` gives it."""

MOST_APART = {"fp32": 0.02, "int8": 0.1}
"""How far a probability may be from featx's own. At eight bits two programs that compute the same network round
differently, and each rounding is passed on: embeddings of OpenVINO and onnxruntime, and of either with and without its
integer instructions, have cosines of 0.998 to 0.9999."""

LEAST_SAME = {"fp32": 0.995, "int8": 0.99}
"""Share of the photos that have the same answer as with featx."""


@dataclass(frozen=True)
class Compared:
    """What a graph answered in onnxruntime, beside what featx answers.

    Parameters
    ----------
    photos : how many.
    same_labels : share of them with the same label, or of which neither is sure.
    same_unknown : share of them that both call unknown, or neither.
    probability_gap : largest difference of a probability, or of a share of own photos for familiarity (``share_gap``).
    cosine : smallest of an embedding to featx's own.
    """

    photos: int
    same_labels: float
    same_unknown: float
    probability_gap: float
    share_gap: float
    cosine: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Exported:
    """A graph with what is known of it.

    Parameters
    ----------
    content : the file's.
    compared : with featx, in onnxruntime.
    most_apart : how far a probability may be from featx's own, in any runtime.
    """

    content: bytes
    compared: Compared
    most_apart: float


def model_onnx(bundle: Bundle, embedder: Embedder, photos: Iterable[Photo]) -> Exported:
    """A whole model as one ONNX graph, from photo to answer, and how it compares with featx.

    Inputs and outputs are in ``featx/guide/shipping.md``.

    Parameters
    ----------
    bundle : the model.
    embedder : its network, opened.
    photos : upright RGB images, beside the model's own probe image, that both are to agree on.

    Raises
    ------
    UsageError
        A package is missing, the network does not go into ONNX, or the graph does not answer as featx does.
    """
    probe = decode(bundle.probe)
    content = _graph(bundle, embedder, probe)
    compared = compare(content, bundle, embedder, chain([probe], photos))
    precisions = {str(each.get("precision")) for each in backbones_of(bundle.provenance)}
    kind = "int8" if "int8" in precisions else "fp32"
    most, least = MOST_APART[kind], LEAST_SAME[kind]
    if compared.probability_gap > most or compared.same_labels < least:
        raise UsageError(
            "the exported graph does not answer as the model does, so it is not written",
            expected=f"probabilities within {most}, and {100 * least:g} % of the answers the same",
            found=f"{compared.probability_gap:.3f} at most, and {100 * compared.same_labels:.1f} % of "
            f"{compared.photos} photos",
            hint="Fit a model on a store at --precision fp32, or export the head alone: --part head",
        )
    return Exported(content, compared, most)


def _graph(bundle: Bundle, embedder: Embedder, probe: Photo) -> bytes:
    graph = Builder()
    embedding = _add_embedding(graph, bundle, embedder)
    scores = add_scores(graph, embedding, bundle.scorer, 1.0 if bundle.sharpness is None else bundle.sharpness)
    first = graph.integers(0)
    flat = graph.add("Squeeze", scores, first)
    graph.add("Softmax", flat, axis=0, name="probabilities")
    graph.add("ArgMax", flat, axis=0, keepdims=0, name="label")
    graph.add("Squeeze", embedding, first, name="embedding")
    if bundle.threshold is None:
        unsure = graph.constant(True, np.bool_)
    else:
        best = graph.add("ReduceMax", "probabilities", keepdims=0)
        unsure = graph.add("Less", best, graph.constant(bundle.threshold))
    outputs: dict[str, tuple[Any, Sequence[int | str]]] = {
        "label": (np.int64, ()),
        "probabilities": (np.float32, (bundle.scorer.n_classes,)),
        "embedding": (np.float32, (bundle.scorer.dims,)),
        "abstain": (np.bool_, ()),
    }
    if bundle.familiarity is not None and bundle.max_unknown is not None:
        shares = add_shares(graph, embedding, bundle.familiarity)
        familiarity = graph.add("Squeeze", shares, first, name="familiarity")
        # Familiarity comes in steps: half a step above the last one that is unknown, rounding decides nothing.
        steps = len(bundle.familiarity.own) + 1
        limit = (np.floor(bundle.max_unknown * steps + 1e-9) + 0.5) / steps
        strange = graph.add("Less", familiarity, graph.constant(limit))
        graph.add("Identity", strange, name="unknown")
        outputs |= {"familiarity": (np.float32, ()), "unknown": (np.bool_, ())}
        graph.add("Or", strange, unsure, name="abstain")
    else:
        graph.add("Identity", unsure, name="abstain")
    about = {**_about(bundle), "proof": json.dumps(_proof(bundle, embedder, probe))}
    return graph.model({"photo": (np.uint8, ("height", "width", 3))}, outputs, about)


def _add_embedding(graph: Builder, bundle: Bundle, embedder: Embedder) -> str:
    """From the photo to the embedding (1, d) that the head takes."""
    found = []
    for each, made in zip(embedder.members, backbones_of(bundle.provenance), strict=True):
        pixels = add_pixels(graph, "photo", each.looks)
        brought = bundle.networks.get(str(made.get("quantised_sha256")))
        at_eight_bits = quantised(each.backbone, brought) if made.get("precision") == "int8" else None
        layers = add_network(graph, pixels, len(each.looks.views), each.backbone, at_eight_bits)
        if len(each.looks.views) > 1:
            layers = [graph.add("ReduceMean", layer, graph.integers(0), keepdims=1) for layer in layers]
        found += layers
    place = layer_number(bundle)
    if place is not None:
        return found[place]
    return found[0] if len(found) == 1 else graph.add("Concat", *found, axis=1)


def _about(bundle: Bundle) -> dict[str, str]:
    known = {row.stored_as: row.licence for row in list_backbones()}
    names = [str(each.get("backbone")) for each in backbones_of(bundle.provenance)]
    told = {
        "class_names": list(bundle.class_names),
        "threshold": bundle.threshold,
        "max_error": bundle.max_error,
        "max_unknown": bundle.max_unknown,
        "calibrated": bundle.sharpness is not None,
        "prior": None if bundle.prior is None else dict(bundle.prior),
        "head": bundle.head,
        "layer": bundle.layer,
        "licences": {name: known.get(name, "unknown") for name in names},
        "fingerprint": fingerprint(bundle.provenance),
        "provenance": dict(bundle.provenance),
        "versions": {**bundle.versions, "exported_by": version("featx")},
        "model_sha256": bundle.sha256,
    }
    return {name: json.dumps(value) for name, value in told.items()}


def _proof(bundle: Bundle, embedder: Embedder, probe: Photo) -> dict[str, Any]:
    """The probe photo, and what must come out of it."""
    (answer,) = bundle.answer(_embed(bundle, embedder, [probe]))
    return {"photo_png": base64.b64encode(bundle.probe).decode(), **answer.to_json()}


def _embed(bundle: Bundle, embedder: Embedder, photos: Sequence[Photo]) -> NDArray[np.float32]:
    return of_layer(embedder.embed_pixels([embedder.cut(photo) for photo in photos]), layer_number(bundle))


def session(content: bytes) -> Any:
    """The graph, ready to run in onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise not_installed("onnxruntime", "export") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def compare(content: bytes, bundle: Bundle, embedder: Embedder, photos: Iterable[Photo]) -> Compared:
    """What a graph answers in onnxruntime, beside what featx answers, about some photos."""
    running = session(content)
    names = [output.name for output in running.get_outputs()]
    gaps, shares, cosines, same, both = [], [], [], [], []
    for photo in photos:
        found = dict(zip(names, running.run(None, {"photo": np.asarray(photo)}), strict=True))
        expected = _embed(bundle, embedder, [photo])
        (answer,) = bundle.answer(expected)
        judged = bundle.probabilities(expected)[0]
        if bundle.sharpness is None:
            judged = np.exp(judged) / np.exp(judged).sum()
        gaps.append(float(np.abs(found["probabilities"] - judged).max()))
        alike = bundle.class_names[int(found["label"])] == answer.label
        same.append(alike or (answer.abstain and bool(found["abstain"]) and bundle.threshold is not None))
        both.append(bool(found.get("unknown", False)) == (answer.reason == "unknown"))
        shares.append(abs(float(found["familiarity"]) - answer.familiarity) if answer.familiarity is not None else 0.0)
        lengths = float(np.linalg.norm(found["embedding"]) * np.linalg.norm(expected))
        cosines.append(float(found["embedding"] @ expected[0]) / lengths if lengths else 1.0)
    return Compared(
        photos=len(gaps),
        same_labels=float(np.mean(same)),
        same_unknown=float(np.mean(both)),
        probability_gap=max(gaps),
        share_gap=max(shares),
        cosine=min(cosines),
    )
