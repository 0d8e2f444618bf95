"""What the tests of engines share: a small network, batches, and the fixtures for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.engines import choice as engines
from featx.backbones.engines.base import Engine
from featx.backbones.engines.choice import make_engine

SMALL = "squeezenet1_1"
OPENVINO = pytest.param("openvino", marks=pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino"))
ON_CPU = ["torch", OPENVINO]

Array = NDArray[Any]


@pytest.fixture(scope="session")
def small() -> Backbone:
    return load_backbone(SMALL, weights="none")


def on_cpu(backbone: Backbone, engine: str, precision: str = "fp32", batch_size: int = 4) -> Engine:
    return make_engine(backbone, engine=engine, device="cpu", precision=precision, batch_size=batch_size, threads=1)


def random_batches(backbone: Backbone, *sizes: int) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (n, *backbone.preprocess.crop, 3), dtype=np.uint8) for n in sizes]


def cosines(a: Array, b: Array) -> Array:
    cosines: Array = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosines
