"""What the catalogue says for people who choose: top-1 figures, timm's networks with short names, advice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from conftest import ROOT

from featx.backbones import timm as timm_models
from featx.backbones.backbone import find, list_backbones, load_backbone
from featx.backbones.catalogue import ADVICE, HUB, NETWORKS, WEIGHTS, HubNetwork
from featx.backbones.frozen import FrozenNetwork, describe_layers
from featx.backbones.hub import hub_folder
from featx.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(HUB)
LICENCES = {"apache-2.0": "Apache-2.0", "dinov3-license": "DINOv3"}


def frozen(row: HubNetwork) -> FrozenNetwork:
    """The network without values: its shapes are those of any weights."""
    with torch.device("meta"):
        body = timm_models.create(row.model)
        return FrozenNetwork(body, ["penultimate"], None, row.preprocess.crop, row.name)


# timm's networks with short names


@pytest.mark.parametrize("name", NAMES)
def test_row_agrees_with_timm(name: str) -> None:
    row = HUB[name]
    model = timm_models.find(f"timm:{row.model}")
    assert model.preprocess == row.preprocess
    assert model.config["hf_hub_id"] == row.repository
    assert model.published_name == row.model  # a tag is part of it, so that no other weights can become the default
    assert LICENCES[model.config["license"]] == row.licence
    with torch.device("meta"):
        whole: Any = timm.create_model(row.model)
    assert sum(p.numel() for p in whole.parameters()) == row.parameters
    with torch.device("meta"):
        (embedding,) = frozen(row)(torch.zeros(2, 3, *row.preprocess.crop))
    assert embedding.shape == (2, row.embedding_dim)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_suggested(name: str) -> None:
    with torch.device("meta"):
        infos = describe_layers(frozen(HUB[name]))
    suggested = [info for info in infos if info.suggested]
    assert len(suggested) == 4 and suggested[-1].name == "penultimate"
    assert all(re.search(r"(blocks|stages)\.\d", info.name) for info in suggested[:3])
    assert {info.pooling for info in suggested[:3]} in ({"tokens"}, {"channels_first"})


@pytest.mark.parametrize("name", NAMES)
def test_a_short_name_means_timms(name: str) -> None:
    row = HUB[name]
    for spelling in (name, row.model, f"timm:{row.model}"):
        provider = find(spelling)
        assert provider.name == f"timm:{row.model}"  # what stores of 0.2.0 already call it
        assert provider.preprocess == row.preprocess


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnetv2_b0", "dinov3_small", "convnext_tiny_in12k"])
def test_it_embeds_with_random_weights(name: str) -> None:
    row = HUB[name]
    backbone = load_backbone(name, weights="none")
    assert backbone == load_backbone(f"timm:{row.model}", weights="none")
    images = torch.randn(2, 3, *row.preprocess.crop, generator=torch.Generator().manual_seed(0))
    (embedding,) = backbone.network()(images)
    assert embedding.shape == (2, row.embedding_dim) and embedding.isfinite().all()
    assert not torch.equal(embedding[0], embedding[1])


def test_names_do_not_collide() -> None:
    assert not set(HUB) & set(NETWORKS)
    assert not {row.model for row in HUB.values()} & (set(HUB) | set(NETWORKS))
    assert len({row.model for row in HUB.values()}) == len(HUB)
    with pytest.raises(UsageError, match="Did you mean dinov2_small"):
        load_backbone("dinov2_smal")


def test_offline_looks_where_weights_are_carried_and_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def offline() -> set[str]:
        return {row.name for row in list_backbones() if row.offline and row.source == "timm"}

    assert offline() == set()
    hub_folder().mkdir(parents=True)
    (hub_folder() / f"{HUB['clip_base'].model}.safetensors").touch()
    assert offline() == {"clip_base"}
    cached = tmp_path / "hub" / f"models--timm--{HUB['dinov2_small'].model}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("a" * 40) / "model.safetensors").touch()
    assert offline() == {"clip_base", "dinov2_small"}


# top-1


def test_top1_is_known_for_every_network_of_torchvision_and_says_whose_it_is() -> None:
    rows = {row.name: row for row in list_backbones()}
    for row in rows.values():
        assert (row.top1 is None) == (row.top1_source == "")
        assert row.top1 is None or 50 < row.top1 < 91
        assert row.top1 is not None or row.source == "timm"
    assert rows["efficientnet_lite0"].top1 == 75.1  # Google's README; a test compares torchvision's with its records
    assert rows["efficientnet_lite0"].top1_source == "Google's README of EfficientNet-Lite"
    assert rows["resnet50"].top1_source == "torchvision's record of these weights"
    assert "linear classifier" in rows["dinov2_small"].top1_source
    assert rows["convnext_tiny_in12k"].top1_source.startswith("timm's table")
    assert rows["dinov3_small"].top1 is None and rows["clip_base"].top1 is None
    assert WEIGHTS["vgg16_features-amdegroot-88682ab5.pth"].top1 is None


# Advice


def test_advice_names_networks_and_layers_that_exist() -> None:
    known = {row.name for row in list_backbones()}
    for advice in ADVICE:
        assert set(advice.take) <= known
        assert re.search("Measured|Published", advice.basis)
        assert set(re.findall(r"\b(?:efficientnet|dinov|mobilenet)\w+", advice.basis)) <= known
    body = timm_models.create("tf_efficientnet_lite0")
    names = {name for name, _ in body.named_modules()}
    layers = {layer for advice in ADVICE for layer in re.findall(r"--layer (\S+)", advice.basis)}
    assert layers and layers <= names


def test_what_the_advice_says_is_measured_is_in_the_guide() -> None:
    page = (ROOT / "featx" / "guide" / "features.md").read_text()
    _, _, section = page.partition("## Which network")
    numbers = set(re.findall(r"\d+\.\d", section.partition("\n## ")[0]))
    bench = set(re.findall(r"(?<=\| )\d+(?= \|)", (ROOT / "featx" / "guide" / "benchmarks.md").read_text()))
    for advice in ADVICE:
        measured = re.search(r"Measured: (.*?)(?:Published|$)", advice.basis)
        for number in re.findall(r"\d+\.\d", measured[1] if measured else ""):
            assert number in numbers, f"{advice.images}: {number}"
        for number in re.findall(r"\b(\d{3}) (?:and|images)", measured[1] if measured else ""):
            assert number in bench, f"{advice.images}: {number}"
