"""Which places of a photo speak for a class: exact, where an embedding is a mean over places and a head is linear.

A network that ends with a mean over the image gives the embedding ``x = mean of f(p)`` over the places p of its last
map, and a linear head the scores ``W (x - s) + b`` (:meth:`featx.heads.scorer.Scorer.linear_form`; by what x is divided
is a number once the photo is known). So ``W (f(p) - s)`` is the evidence at p, and its mean over all places plus b is
the score: nothing is estimated, and no gradient is taken.

A head that takes the root of each number of an embedding (``power_l2``) has a sum over places as well: each root is
shared out among them in proportion to what they gave to the number, as long as none gave less than nothing. The page
says so.

Scores count from the mean of all classes' scores. What all classes gain alike changes no probability; and a head of two
classes has one score, of which each class gets half.

Of several layers, networks or views each adds its own map. What is no mean over places (a token for the whole image,
layers behind the mean) has no map: it is named, with what it adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._system import available_cpus
from featx.backbones import feature_maps, of_layer
from featx.errors import ImageError, MismatchError, UsageError
from featx.extraction import Embedder, Seen
from featx.heads import Array, NotLinear, Scorer
from featx.images import Origin

EXACT = 1e-4
"""Most that maps may differ from the score of ``featx predict``."""

ROUNDED = 0.05
"""The same at half precision (bf16, fp16), where the network rounds the mean itself."""

SHARED_ROOTS = (
    "This head takes the root of each number of an embedding; a root is shared out among the places in proportion to "
    "what each gave to the number."
)

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as shares of the upright photo's width and height."""


@dataclass(frozen=True)
class Part:
    """The evidence of one layer in one view.

    Attributes
    ----------
    layer : its name, with that of its network where there are several.
    view : its name.
    box : the part of the photo that the map lies on.
    evidence : (c, h, w) for each class; its mean over h and w is what the part adds to the score.
    """

    layer: str
    view: str
    box: Box
    evidence: Array

    @property
    def adds(self) -> Array:
        """(c,) to the scores."""
        return np.asarray(self.evidence.mean(axis=(1, 2)))


@dataclass(frozen=True)
class LeftOut:
    """A layer that has no map: why, as a clause, and what it adds to the scores (c,)."""

    layer: str
    reason: str
    adds: Array


@dataclass(frozen=True)
class Explanation:
    """Where the evidence for each class lies on a photo.

    Attributes
    ----------
    class_names : c names.
    scores : (c,) above the mean of all classes; the differences are those of the head's own scores.
    intercepts : (c,) what the head adds whatever the photo.
    parts, left_out : what adds up to the rest of the scores.
    size : (width, height) of the upright photo in pixels.
    rounding : the largest difference between the scores and what adds up.
    embedding : (d,) of the photo, which the scores are of.
    note : what to know of how the maps were made, a sentence or "".
    """

    class_names: tuple[str, ...]
    scores: Array
    intercepts: Array
    parts: tuple[Part, ...]
    left_out: tuple[LeftOut, ...]
    size: tuple[int, int]
    rounding: float
    embedding: NDArray[np.float32]
    note: str = ""

    @property
    def ranked(self) -> list[int]:
        """Classes by falling score: the label, the runner-up, ..."""
        return [int(place) for place in np.argsort(-self.scores, kind="stable")]

    def to_json(self, place: int) -> dict[str, Any]:
        """The evidence for one class in plain JSON types."""
        return {
            "class": self.class_names[place],
            "score": float(self.scores[place]),
            "intercept": float(self.intercepts[place]),
            "maps": [
                {
                    "layer": part.layer,
                    "view": part.view,
                    "box": list(part.box),
                    "adds": float(part.adds[place]),
                    "evidence": part.evidence[place].tolist(),
                }
                for part in self.parts
            ],
            "left_out": [
                {"layer": each.layer, "reason": each.reason, "adds": float(each.adds[place])} for each in self.left_out
            ],
        }

    def shares(self, place: int) -> Array:
        """Evidence for a class by where it lies: (2,), inside and outside the photo's middle, as parts of the score.

        The middle is the half of width and height around the centre of what is seen.
        """
        inside = outside = 0.0
        for part in self.parts:
            rows, columns = (in_middle(n) for n in part.evidence.shape[1:])
            cells = part.evidence[place] / part.evidence[place].size
            middle = float((cells * np.outer(rows, columns)).sum())
            inside, outside = inside + middle, outside + float(cells.sum()) - middle
        return np.asarray([inside, outside], dtype=np.float64)


MIDDLE = 0.5
"""Of width and height: the part around the centre that counts as the middle; a quarter of the area."""


def in_middle(n: int) -> Array:
    """Of n equal stretches, which part of each lies in the middle."""
    edges = np.linspace(0, 1, n + 1)
    low, high = (1 - MIDDLE) / 2, (1 + MIDDLE) / 2
    return np.asarray(np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0.0, None) * n)


class Explainer:
    """Explains the scores of a head.

    Parameters
    ----------
    scorer : the head.
    class_names : of its classes.
    embedder : the network, or networks, that its embeddings are from.
    layer : which of the embedder's layers the head is on; None for all of them, side by side.
    """

    def __init__(self, scorer: Scorer, class_names: Sequence[str], embedder: Embedder, layer: int | None) -> None:
        self.scorer, self.class_names = scorer, tuple(class_names)
        self.embedder, self.layer = embedder, layer

    def explain(self, seen: Seen, size: tuple[int, int]) -> Explanation:
        """Where the evidence on one photo lies.

        Parameters
        ----------
        seen : what the networks see of it.
        size : (width, height) of the upright photo.

        Raises
        ------
        UsageError
            The head, or all of the network, has no exact map; the message says why.
        MismatchError
            The maps do not add up to the score.
        """
        layers = self.embedder.embed_pixels([seen])
        row = of_layer(layers, self.layer)[0]
        try:
            weights, shift, intercept = self.scorer.linear_form(row)
        except NotLinear as error:
            raise UsageError("no exact map", where="explain", found=self.scorer.kind, hint=str(error)) from error
        weights, intercept = weights - weights.mean(axis=0), intercept - intercept.mean()
        scores = self.scorer.scores(row[None])[0]
        scores -= scores.mean()
        parts: list[Part] = []
        left_out: list[LeftOut] = []
        start, number = 0, -1
        several = len(self.embedder.members) > 1
        for network, pictures in zip(self.embedder.members, seen, strict=True):
            views = network.looks.views
            maps = feature_maps(network.engine, pictures if len(views) > 1 else pictures[None])
            for layer, found in zip(network.backbone.layers, maps, strict=True):
                number += 1
                if self.layer not in (None, number):
                    continue
                name = f"{network.backbone.name}/{layer}" if several else layer
                columns = slice(start, start + layers[number].shape[1])
                start = columns.stop
                own, away = weights[:, columns], shift[columns]
                reason = self._why_not(found)
                if reason or isinstance(found, str):
                    left_out.append(LeftOut(name, reason, own @ (row[columns] - away)))
                    continue
                boxes = network.looks.boxes(*size)
                for view, box, mirrored, each in zip(views, boxes, network.looks.mirrored, found, strict=True):
                    upright = each[:, ::-1] if mirrored else each
                    evidence = np.moveaxis((upright.astype(np.float64) - away) @ own.T, -1, 0) / len(views)
                    parts.append(Part(name, view, box, evidence))
        if not parts:
            reasons = "; ".join(f"{each.layer}: {each.reason}" for each in left_out)
            raise UsageError("no exact map", where="explain", found=reasons, hint=_NO_MAP)
        added = intercept + sum(part.adds for part in parts) + sum((each.adds for each in left_out), 0.0)
        rounding = float(np.abs(scores - added).max())
        if rounding > self.tolerance:
            raise MismatchError(
                "the maps do not add up to the score", where="explain", expected=f"a difference up to {self.tolerance}",
                found=f"{rounding:.2g}",
            )  # fmt: skip
        return Explanation(
            self.class_names,
            scores,
            np.asarray(intercept),
            tuple(parts),
            tuple(left_out),
            size,
            rounding,
            row,
            SHARED_ROOTS if self.scorer.takes_roots else "",
        )

    def _why_not(self, found: NDArray[np.float32] | str) -> str:
        """Why there is no exact map, as a clause; "" where there is one."""
        if isinstance(found, str):
            return found
        if 1 in found.shape[1:3]:
            return "what it averages has no rows and columns"
        return _ROOTS if self.scorer.takes_roots and found.min() < 0 else ""

    def explain_files(self, paths: Iterable[Origin]) -> Iterator[Explanation | ImageError]:
        """The explanation of each file, or why it was refused, in order; decoded in processes of their own."""
        given = list(paths)
        workers = min(available_cpus(), len(given))
        if not given:
            return
        with self.embedder.decoders(workers=workers) as pool:
            for decoded in pool.run(given, lambda digest: False, ahead=2 * workers):
                seen = self.embedder.seen(decoded)
                if decoded.refusal is not None:
                    yield decoded.refusal
                elif seen is not None:
                    yield self.explain(seen, decoded.size)

    @property
    def tolerance(self) -> float:
        """Most that maps may differ from scores at the networks' precisions."""
        precisions = {network.engine.precision for network in self.embedder.members}
        return EXACT if precisions <= {"fp32", "int8"} else ROUNDED


_ROOTS = "the head takes roots, and a root of what is partly less than nothing is not shared out"

_NO_MAP = "Networks that average over the image have one: efficientnet, mobilenet_v2, resnet, densenet, regnet."
