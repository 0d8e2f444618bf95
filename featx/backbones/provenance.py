"""What embeddings depend on: the record that a store keeps of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from featx.backbones.backbone import Backbone
from featx.backbones.engines.base import Engine
from featx.images import CENTER, decode_settings, decoder_version, parse_views


def provenance_of(
    backbone: Backbone, engine: Engine, *, views: Sequence[str] = CENTER, decode: str = "full"
) -> dict[str, Any]:
    """All that the embeddings depend on, or that one would want to know of them."""
    return {
        **backbone.provenance(),
        "views": ",".join(parse_views(",".join(views))),
        "decode": decode_settings(decode),
        "precision": engine.precision,
        **({"quantised_sha256": engine.quantised_sha256} if engine.quantised_sha256 else {}),
        "decoder": decoder_version(),
        "engine": engine.name,
        "device": engine.device,
        "versions": {name: _version(name) for name in ("featx", "torch", "torchvision", "timm", "openvino", "h5py")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
