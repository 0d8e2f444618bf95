"""Recipes: backbones, layers and views that were measured to go well together (``scripts/bench_features.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from featx._arrays import PENULTIMATE


@dataclass(frozen=True)
class Recipe:
    """What an extraction takes.

    Attributes
    ----------
    backbones : the layers of each backbone.
    views : over which embeddings are averaged.
    cost : time of the networks, in those of the recipe "fast".
    summary : for people.
    """

    backbones: Mapping[str, tuple[str, ...]]
    views: tuple[str, ...]
    cost: float
    summary: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        backbones = {name: list(layers) for name, layers in self.backbones.items()}
        return {"backbones": backbones, "views": list(self.views), "cost": self.cost, "summary": self.summary}


_LAST = (PENULTIMATE,)
_SMALL = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
_LAYERS = ("blocks.4", "blocks.5", PENULTIMATE)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "fast": Recipe({_SMALL[0]: _LAST}, ("center",), 1.0, "one small network, one view"),
        "balanced": Recipe(dict.fromkeys(_SMALL, _LAST), ("center",), 4.6, "three small networks joined, one view"),
        "best": Recipe(
            dict.fromkeys(_SMALL, _LAYERS), ("center", "flip", "full", "full-flip", "zoom"), 23.0,
            "the same networks, five views, and earlier layers",
        ),
    }
)  # fmt: skip
