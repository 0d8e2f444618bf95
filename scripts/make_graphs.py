#!/usr/bin/env python3
"""Quantise networks as they come with featx: those of the recipes, or of your choice.

    python scripts/make_graphs.py [NAME ...]

Writes featx/backbones/quantised/NAME.ir, unless it is there: what a store was made with must stay as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from featx._arrays import PENULTIMATE
from featx._files import publish_bytes
from featx.backbones.backbone import load_backbone
from featx.backbones.engines.graph import CARRIED, quantised, quantised_file
from featx.backbones.recipes import RECIPES


def main(names: Sequence[str]) -> None:
    layers = RECIPES["best"].backbones
    for name in names or layers:
        path = CARRIED / f"{name}.ir"
        if path.exists():
            print(f"{path.name} is there already")
            continue
        backbone = load_backbone(name, layers=layers.get(name, (PENULTIMATE,)))
        quantised_file(backbone).unlink(missing_ok=True)
        graph = quantised(backbone)
        publish_bytes(path, graph.content)
        print(f"{path.name}: {len(graph.content):,} bytes, sha256 {graph.sha256}")


if __name__ == "__main__":
    main(sys.argv[1:])
