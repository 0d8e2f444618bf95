"""The classic rule of thumb for transfer learning: how many images, and how similar to the pretraining's.

As taught in Stanford's CS231n ("Transfer learning": new data small or large, similar or different), with Yosinski et
al., 2014, "How transferable are features in deep neural networks?" behind it. It names no numbers; the limit between
small and large here is ours. It stands beside a measurement, and does not replace it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from featx.advice.domain import Nearness

Family: TypeAlias = Literal["head", "earlier layers", "fine-tuning"]
"""What a strategy is: a head on frozen embeddings of the last layer, one on earlier layers, or a trained tail."""

LARGE = 100
"""Labelled images per class from which data count as large."""


@dataclass(frozen=True)
class Rule:
    """What the rule says, and where it stands: ``families`` are what it would have one try."""

    size: Literal["small", "large"]
    nearness: Nearness
    families: tuple[Family, ...]
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "size": self.size,
            "large_from_images_a_class": LARGE,
            "nearness": self.nearness,
            "families": list(self.families),
            "sentence": self.sentence,
        }


def size_by_similarity(images_a_class: float, nearness: Nearness) -> Rule:
    """Look the rule up."""
    size: Literal["small", "large"] = "large" if images_a_class >= LARGE else "small"
    if size == "large" and nearness == "similar":
        return Rule(size, nearness, ("fine-tuning",), "fine-tune the network: there is enough to do so without harm")
    if size == "large":
        families: tuple[Family, ...] = ("fine-tuning",)
        return Rule(size, nearness, families, "fine-tune all of the network: there is enough, and it has to change")
    if nearness == "similar":
        return Rule(size, nearness, ("head",), "train a linear head on the frozen last layer: all else would overfit")
    if nearness == "different":
        sentence = "train a linear head on frozen earlier layers: the last ones are too specific"
        return Rule(size, nearness, ("earlier layers",), sentence)
    sentence = "train a linear head, on the last layer or an earlier one: the rule does not say which"
    return Rule(size, nearness, ("head", "earlier layers"), sentence)
