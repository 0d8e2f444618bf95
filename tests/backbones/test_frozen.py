"""Layers of a frozen network by name: how each kind of output becomes one vector, and which cannot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchvision.models as tv
from torch import nn

from featx.backbones.backbone import load_backbone
from featx.errors import UsageError, WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = "shufflenet_v2_x0_5"


def _layers(name: str, *layers: str) -> list[tuple[int, ...]]:
    backbone = load_backbone(name, weights="none", layers=layers)
    height, width = backbone.preprocess.crop
    return [tuple(output.shape) for output in backbone.network()(torch.zeros(2, 3, height, width))]


def test_layers_of_a_convolutional_network_are_averaged_over_the_image() -> None:
    backbone = load_backbone("mobilenet_v2", weights="none", layers=["features.10", "penultimate", "features.0.1"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tenth, last, normed = backbone.network()(images)
    features = backbone.network().body.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    torch.testing.assert_close(tenth, features[:11](images).mean((2, 3)))
    torch.testing.assert_close(last, features(images).mean((2, 3)))
    # Followed by a ReLU6 that works in place: what is wanted is the value before it.
    normalised = features.get_submodule("0.1")(features.get_submodule("0.0")(images))
    assert (normalised < 0).any()
    torch.testing.assert_close(normed, normalised.mean((2, 3)))


@pytest.mark.slow
def test_vgg_has_vectors_before_its_last_layer() -> None:
    assert _layers("vgg11", "classifier.0", "avgpool") == [(2, 4096), (2, 512)]


def test_swins_maps_have_their_channels_last() -> None:
    backbone = load_backbone("swin_t", weights="none", layers=["features.3", "features.0.0", "permute"])
    images = torch.randn(1, 3, 224, 224)
    late, first, permuted = backbone.network()(images)
    features = backbone.network().body.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    torch.testing.assert_close(late, features[:4](images).mean((1, 2)))
    assert (late.shape, first.shape, permuted.shape) == ((1, 192), (1, 96), (1, 768))


@pytest.mark.slow
def test_tokens_are_averaged_over_the_sequence() -> None:
    backbone = load_backbone("vit_b_32", weights="none", layers=["encoder.layers.encoder_layer_1"])
    seen: list[torch.Tensor] = []
    layer = backbone.network().body.get_submodule("encoder.layers.encoder_layer_1")
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    (pooled,) = backbone.network()(torch.randn(2, 3, 224, 224))
    assert seen[0].shape == (2, 50, 768)
    torch.testing.assert_close(pooled, seen[0].mean(1))


@pytest.mark.parametrize(
    ("name", "layer", "says"),
    [
        ("resnet18", "layer5", "no layer 'layer5'. Did you mean layer"),
        ("resnet18", "qqq", "no layer 'qqq'. Its parts are conv1, bn1"),
        ("resnet18", "fc", "'fc' is the classification layer"),
        ("vit_b_32", "encoder.layers.encoder_layer_1.self_attention", "cannot be pooled .*found a tuple"),
        ("swin_t", "features.1.0.attn.qkv", "is not run"),
        ("resnet18", "layer1.0.bn3", "no layer"),
    ],
)
def test_layers_that_cannot_be_taken(name: str, layer: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_backbone(name, weights="none", layers=[layer])


@pytest.mark.parametrize("layers", [[], ["penultimate", "penultimate"]])
def test_layers_are_named_once(layers: list[str]) -> None:
    with pytest.raises(UsageError, match="each once"):
        load_backbone(layers=layers)


def test_threads_that_share_a_network_get_their_own_embeddings() -> None:
    network = load_backbone(SMALL, weights="none").network()
    images = [torch.full((1, 3, 224, 224), float(value)) for value in range(8)]
    expected = [network(image)[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: network(image)[0], images * 3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 3, strict=True))


def test_weights_that_give_nan_are_refused(tmp_path: Path) -> None:
    state = tv.get_model(SMALL, weights=None).state_dict()
    state["conv5.0.weight"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(WeightsError, match="not finite"):
        load_backbone(SMALL, weights=tmp_path / "nan.pth").network()
