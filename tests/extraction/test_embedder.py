"""Images embedded one by one equal the cached ones, and what cannot be repeated is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import class_folders

from featx.backbones.backbone import load_backbone
from featx.errors import ImageError, MismatchError, WeightsError
from featx.extraction.embedder import Embedder
from featx.extraction.run import extract_features
from featx.images.source import ImageSet
from featx.store.reader import FeatureSet, read_features


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("embed") / "photos", each=10)


@pytest.fixture(scope="module")
def features(source: Path) -> FeatureSet:
    store = source.parent / "photos.featx"
    extract_features(ImageSet.from_folder(source), load_backbone("efficientnet_lite0"), store)
    return read_features(store)


@pytest.mark.slow
def test_files_are_embedded_as_the_store_was(source: Path, features: FeatureSet, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no picture")
    embedder = Embedder.like(features.provenance, where=source)
    paths = [source / name for name in features.ids]
    found = list(embedder.embed_files([*paths[:3], tmp_path / "bad.jpg", *paths[3:]]))
    assert [path for path, _ in found] == [*paths[:3], tmp_path / "bad.jpg", *paths[3:]]
    refusal = found.pop(3)[1]
    assert isinstance(refusal, ImageError)
    assert refusal.reason == "not_an_image"
    for row, (_, layers) in enumerate(found):
        assert not isinstance(layers, ImageError)
        assert np.array_equal(layers[0], features.embeddings[row])


def test_bytes_are_embedded_as_files_are(source: Path, features: FeatureSet) -> None:
    embedder = Embedder.like(features.provenance, where=source)
    (layer,) = embedder.embed_bytes((source / features.ids[4]).read_bytes())
    assert np.array_equal(layer[0], features.embeddings[4])


def test_what_cannot_be_repeated_is_refused(source: Path, features: FeatureSet) -> None:
    changed = {**features.provenance, "weights_sha256": "0" * 64}
    with pytest.raises(MismatchError, match="another weights_sha256"):
        Embedder.like(changed, where=source)
    preprocess = {**features.provenance["preprocess"], "resize": 232}
    with pytest.raises(MismatchError, match=r"another preprocess\.resize: expected 232 \(the store's\), found 256"):
        Embedder.like({**features.provenance, "preprocess": preprocess}, where=source)
    exact = {name: value for name, value in features.provenance.items() if name != "quantised_sha256"}
    with pytest.raises(WeightsError, match=r"expected mine\.pth\. Name the file with --weights"):
        Embedder.like({**exact, "precision": "fp32", "weights": "mine.pth"}, where=source)
