"""Recipes: backbones, layers and views that were measured to go well together (``scripts/bench_features.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

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


_LAST = (PENULTIMATE,)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "fast": Recipe({"efficientnet_lite0": _LAST}, ("center",), 1.0, "one small network, one view"),
        "balanced": Recipe(
            {"efficientnet_lite0": _LAST, "efficientnet_lite1": _LAST, "efficientnet_lite2": _LAST},
            ("center",),
            5.0,
            "three small networks joined, one view",
        ),
        "best": Recipe(
            {"efficientnet_lite0": _LAST, "efficientnet_lite1": _LAST, "efficientnet_lite2": _LAST},
            ("center", "flip", "full", "full-flip"),
            20.0,
            "the same with four views",
        ),
    }
)
