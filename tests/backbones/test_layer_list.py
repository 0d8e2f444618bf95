"""``featx layers``: every name it lists can be extracted, with the dimensions it says."""

from __future__ import annotations

import pytest
import torch
from conftest import Featx

from featx.backbones.backbone import load_backbone
from featx.backbones.frozen import LayerInfo, describe_layers


def listed(name: str) -> list[LayerInfo]:
    return describe_layers(load_backbone(name, weights="none").network())


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("efficientnet_lite0", {"blocks.4", "blocks.5", "blocks.6"}),
        ("mobilenet_v2", {"features.11", "features.14", "features.17"}),
        ("resnet18", {"layer3.0", "layer4.0", "layer4.1"}),
    ],
)
def test_three_layers_after_the_middle_are_suggested(name: str, suggested: set[str]) -> None:
    assert {info.name for info in listed(name) if info.suggested} == {*suggested, "penultimate"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "vit_b_16", "squeezenet1_0", "swin_t", "googlenet", "timm:resnet10t"])
def test_each_suggestion_is_a_layer_that_can_be_taken(name: str) -> None:
    found = [info for info in listed(name) if info.suggested]
    assert len(found) == 4
    backbone = load_backbone(name, weights="none", layers=[info.name for info in found])
    outputs = backbone.network()(torch.zeros(1, 3, *backbone.preprocess.crop))
    assert [output.shape[1] for output in outputs] == [info.embedding_dim for info in found]


def test_all_layers_of_the_default_can_be_taken_at_once() -> None:
    infos = listed("efficientnet_lite0")
    assert len({info.name for info in infos}) == len(infos) > 100
    backbone = load_backbone("efficientnet_lite0", weights="none", layers=[info.name for info in infos])
    outputs = backbone.network()(torch.zeros(1, 3, 224, 224))
    for info, output in zip(infos, outputs, strict=True):
        assert output.shape == (1, info.embedding_dim), info
    by_name = {info.name: info for info in infos}
    assert by_name["blocks.4"].shape == (112, 14, 14)
    assert by_name["penultimate"].shape == (1280,)


@pytest.mark.slow
def test_the_command_lists_names_and_what_to_do_next(featx: Featx) -> None:
    told = featx("layers", "efficientnet_lite0", "--json").json
    assert told["input_size"] == [224, 224]
    (row,) = (row for row in told["layers"] if row["name"] == "blocks.4")
    assert (row["shape"], row["embedding_dim"], row["pooling"]) == ([112, 14, 14], 112, "channels_first")
    shown = featx("layers", "efficientnet_lite0")
    assert "112 x 14 x 14" in shown.out
    assert "blocks.4.0" not in shown.out.replace("blocks.4.0.", "")
    assert "--layer blocks.4 --layer blocks.5 --layer blocks.6 --layer penultimate" in shown.out
    wrong = featx("layers", "efficientnet_lite9")
    assert wrong.code == 2
    assert "efficientnet_lite0" in wrong.err
