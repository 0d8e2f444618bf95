"""featx: frozen CNN features, cached once; scikit-learn heads compared, chosen and served.

    images = ImageSet.from_folder("photos")
    extract_features(images, load_backbone("efficientnet_lite0"), "photos.featx")
    features = read_features("photos.featx")
    cross_val_score(make_head("logreg"), features.embeddings, features.labels, cv=KShotSplit(5))

Names are imported when they are first used, so ``import featx`` costs nothing and never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featx.backbones.backbone import list_backbones, load_backbone
    from featx.backbones.engines.torch import make_engine
    from featx.errors import FeatxError
    from featx.extraction.transformer import FeatureExtractor
    from featx.extraction.run import extract_features
    from featx.adaptation.finetune import finetune_episodes
    from featx.heads.catalogue import make_head
    from featx.images.pixels import Preprocess
    from featx.evaluation.pixels import PixelExtractor, make_pixels_baseline
    from featx.backbones.provider import Provider
    from featx.retrieval.neighbours import GalleryIndex
    from featx.images.source import ImageSet
    from featx.evaluation.splits import KShotSplit
    from featx.store.reader import FeatureSet, iter_features, read_features
    from featx.evaluation.sweep import sweep_heads

_HOME = {
    "FeatureExtractor": "estimator",
    "FeatureSet": "store",
    "FeatxError": "errors",
    "GalleryIndex": "retrieval",
    "ImageSet": "sources",
    "KShotSplit": "splits",
    "PixelExtractor": "pixels",
    "Preprocess": "images",
    "Provider": "providers",
    "extract_features": "extract",
    "finetune_episodes": "finetune",
    "iter_features": "store",
    "list_backbones": "backbones",
    "load_backbone": "backbones",
    "make_engine": "engines",
    "make_head": "heads",
    "make_pixels_baseline": "pixels",
    "read_features": "store",
    "sweep_heads": "sweep",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "ImageSet",
    "load_backbone",
    "list_backbones",
    "Provider",
    "Preprocess",
    "make_engine",
    "extract_features",
    "read_features",
    "iter_features",
    "FeatureSet",
    "FeatureExtractor",
    "make_head",
    "PixelExtractor",
    "make_pixels_baseline",
    "KShotSplit",
    "sweep_heads",
    "finetune_episodes",
    "GalleryIndex",
    "FeatxError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'featx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"featx.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
