"""A kept head as part of an ONNX graph: from embeddings to scores, and to how familiar a photo is."""

from __future__ import annotations

from typing import Any

import numpy as np

from featx.heads import Scorer, blocks_of
from featx.models.novelty import N_NEAREST, Familiarity
from featx.models.onnx.builder import Builder

_LEAST = 1e-12
"""What a length is at least, to be divided by."""


def add_scores(graph: Builder, embedding: str, scorer: Scorer, sharpness: float = 1.0) -> str:
    """From embeddings (n, d) to scores (n, c), multiplied by ``sharpness``."""
    rows = _normalised(graph, embedding, scorer)
    if scorer.coef is not None and scorer.intercept is not None:
        product = graph.add("MatMul", rows, graph.constant(sharpness * scorer.coef.T))
        return graph.add("Add", product, graph.constant(sharpness * scorer.intercept))
    return _votes(graph, rows, scorer, sharpness)


def add_shares(graph: Builder, embedding: str, familiarity: Familiarity) -> str:
    """From embeddings (n, d) to their familiarity (n,)."""
    rows = _unit(graph, embedding, familiarity.kind)
    cosines = graph.add("MatMul", rows, graph.constant(familiarity.rows.T))
    nearest = graph.integers(min(N_NEAREST, len(familiarity.rows) - 1))
    top = graph.add("TopK", cosines, nearest, outputs=2, axis=1)
    similarity = graph.add("ReduceMean", top, graph.integers(1), keepdims=1)
    below = graph.add("LessOrEqual", graph.constant(familiarity.own), similarity)
    count = graph.add(
        "ReduceSum", graph.add("Cast", below, to=int(graph.onnx.TensorProto.FLOAT)), graph.integers(1), keepdims=0
    )
    return graph.add(
        "Div", graph.add("Add", count, graph.constant(1.0)), graph.constant(float(len(familiarity.own) + 1))
    )


def _normalised(graph: Builder, rows: str, scorer: Scorer) -> str:
    if scorer.kind in ("centre_l2", "standardise"):
        rows = graph.add("Sub", rows, graph.constant(scorer.mean))
    if scorer.kind == "standardise":
        return graph.add("Div", rows, graph.constant(scorer.scale))
    if scorer.kind == "power_l2":
        rows = graph.add("Mul", graph.add("Sqrt", graph.add("Abs", rows)), graph.add("Sign", rows))
    return _unit(graph, rows, scorer.kind) if scorer.kind.endswith("l2") or blocks_of(scorer.kind) else rows


def _unit(graph: Builder, rows: str, kind: str) -> str:
    """Rows of unit length; of several blocks each to unit length, and weighted."""
    squares = graph.add("Mul", rows, rows)
    blocks = blocks_of(kind)
    if not blocks:
        total = graph.add("ReduceSum", squares, graph.integers(1), keepdims=1)
        return graph.add("Div", rows, graph.add("Max", graph.add("Sqrt", total), graph.constant(_LEAST)))
    # Lengths of all blocks by one product, and back to a factor for each column by another.
    belongs = np.repeat(np.eye(len(blocks)), [size for size, _ in blocks], axis=0)
    lengths = graph.add("Sqrt", graph.add("MatMul", squares, graph.constant(belongs)))
    factors = graph.add("Reciprocal", graph.add("Max", lengths, graph.constant(_LEAST)))
    weights = graph.constant((belongs * [weight for _, weight in blocks]).T)
    return graph.add("Mul", rows, graph.add("MatMul", factors, weights))


def _votes(graph: Builder, rows: str, scorer: Scorer, sharpness: float) -> str:
    """The log of nearest neighbours' votes: see :meth:`featx.heads.scorer.Scorer.scores`."""
    own: Any = scorer.rows
    targets: Any = scorer.targets
    products = graph.add("MatMul", rows, graph.constant(2.0 * own.T))
    distance = graph.add("Sub", graph.constant(np.einsum("ij,ij->i", own, own)), products)
    count = graph.integers(scorer.n_neighbors)
    top = graph.add("TopK", distance, count, outputs=2, axis=1, largest=0)
    classes = graph.add("Gather", graph.constant(targets, np.int64), f"{top}_1")
    number = graph.constant(scorer.n_classes, np.int64)
    hits = graph.add("OneHot", classes, number, graph.constant([0.0, 1.0]), axis=-1)
    votes = graph.add("ReduceSum", hits, graph.integers(1), keepdims=0)
    shares = graph.add("Add", votes, graph.constant(1.0 / scorer.n_classes))
    logs = graph.add("Log", graph.add("Div", shares, graph.constant(scorer.n_neighbors + 1.0)))
    if scorer.intercept is not None:
        logs = graph.add("Add", logs, graph.constant(scorer.intercept))
    return graph.add("Mul", logs, graph.constant(sharpness))
