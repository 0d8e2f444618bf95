"""The catalogue against torchvision's and timm's own records, names, and the default."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from PIL import Image
from torch import nn

from featx.backbones.backbone import list_backbones, load_backbone
from featx.backbones.catalogue import HUB, NETWORKS, TORCHVISION_URL, WEIGHTS
from featx.backbones.checkpoint import load_checkpoint
from featx.backbones.frozen import FrozenNetwork, catalogue_body, last_layer, seeded
from featx.backbones.hub import hub_folder
from featx.errors import UsageError
from featx.images.pixels import Preprocess

pytestmark = pytest.mark.usefixtures("one_thread")


TORCHVISION = [n.name for n in NETWORKS.values() if n.source == "torchvision"]
SMALL = "shufflenet_v2_x0_5"  # 1.4 million parameters, and every kind of layer that checkpoints disagree on


@pytest.fixture
def no_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers for 7,000 million parameters take minutes, and the catalogue's audit looks at none of them."""
    for name in vars(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


# The catalogue


def test_the_catalogue_has_every_classification_network_of_torchvision() -> None:
    assert set(TORCHVISION) == set(tv.list_models(module=tv))


@pytest.mark.parametrize("name", TORCHVISION)
def test_row_agrees_with_torchvision(name: str, no_initialisation: None) -> None:
    network = NETWORKS[name]
    enum = tv.get_model_weights(name)
    default: Any = enum.DEFAULT
    assert TORCHVISION_URL + network.default == default.url
    records: dict[str, Any] = {record.url: record for record in enum}
    rows = [weights for weights in WEIGHTS.values() if weights.network == name]
    assert {TORCHVISION_URL + weights.file for weights in rows} == set(records)
    for weights in rows:
        record = records[TORCHVISION_URL + weights.file]
        transform = record.transforms()
        assert weights.variant == record.name
        assert weights.preprocess == Preprocess(
            transform.resize_size[0],
            (transform.crop_size[0], transform.crop_size[0]),
            transform.interpolation.value,
            tuple(transform.mean),
            tuple(transform.std),
        )
        assert (weights.licence == "CC-BY-NC-4.0") == ("license" in record.meta)
        top1 = record.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        assert weights.top1 == (None if math.isnan(top1) else top1)
        assert len(weights.sha256_prefix) >= 8

    preprocess = WEIGHTS[network.default].preprocess
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # regnet looks at numbers while it is made
        body = catalogue_body(network, preprocess).to("meta")
    classifier = last_layer(body)
    assert sum(p.numel() for p in body.parameters()) == network.parameters
    if name != "inception_v3":  # whose published number counts the auxiliary classifier
        assert network.parameters == default.meta["num_params"]
    with torch.device("meta"):
        frozen = FrozenNetwork(body, ["penultimate"], classifier, preprocess.crop, name)
        (embedding,) = frozen(torch.zeros(2, 3, *preprocess.crop))
    assert embedding.shape == (2, network.embedding_dim)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "alexnet", "googlenet", "inception_v3", "resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
        "mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0", "regnet_x_400mf", "convnext_tiny", "vit_b_32",
        "swin_t", "swin_v2_t", "maxvit_t", "vgg11", "efficientnet_lite0",
    ],
)  # fmt: skip
def test_the_classification_layer_turns_the_embedding_into_the_networks_own_logits(name: str) -> None:
    network = NETWORKS[name]
    preprocess = WEIGHTS[network.default].preprocess
    # Small images where the network takes any size, for speed.
    size = preprocess.crop if name in ("vit_b_32", "maxvit_t") else (96, 96)
    with seeded(0):
        body = catalogue_body(network, preprocess).eval()
    classifier = body.get_submodule(last_layer(body))
    assert isinstance(classifier, nn.Linear)
    nn.init.normal_(classifier.weight)  # ViT's starts as zeros, which would hide everything
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = body(images)
        (embedding,) = FrozenNetwork(body, ["penultimate"], last_layer(body), size, name)(images)
        assert embedding.shape == (1, network.embedding_dim)
        torch.testing.assert_close(classifier(embedding), logits, rtol=1e-4, atol=1e-4)


def test_squeezenet_has_no_linear_layer_and_gives_its_pooled_features() -> None:
    backbone = load_backbone("squeezenet1_1", weights="none")
    images = torch.randn(2, 3, 224, 224)
    (embedding,) = backbone.network()(images)
    features = backbone.network().body.get_submodule("features")(images)
    torch.testing.assert_close(embedding, features.mean((2, 3)))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_lite_rows_agree_with_timm(name: str) -> None:
    from featx.backbones import timm as timm_models

    network = NETWORKS[name]
    weights = WEIGHTS[network.default]
    model = timm_models.find(f"timm:{network.architecture}")
    assert weights.preprocess == model.preprocess
    body = catalogue_body(network, weights.preprocess)
    assert sum(p.numel() for p in body.parameters()) == network.parameters
    assert body.get_submodule(last_layer(body)).in_features == network.embedding_dim
    assert weights.sha256.startswith(weights.file.rpartition("-")[2].removesuffix(".pth"))


def test_listing_and_choosing_need_no_torch() -> None:
    code = (
        "import sys, featx.backbones.backbone as b; rows = b.list_backbones(); r = b.load_backbone();"
        "assert rows[0].name == r.name == 'efficientnet_lite0' and rows[0].offline, rows[0];"
        "assert not {'torch', 'torchvision', 'timm', 'openvino'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_listed_rows() -> None:
    rows = {row.name: row for row in list_backbones()}
    assert len(rows) == len(NETWORKS) + len(HUB)
    assert (rows["resnet18"].embedding_dim, rows["resnet18"].source) == (512, "torchvision")
    assert rows["vit_h_14"].licence == "CC-BY-NC-4.0"
    assert rows["efficientnet_lite0"].licence == "Apache-2.0"


def test_offline_looks_into_torch_hubs_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert not next(row.offline for row in list_backbones() if row.name == "resnet18")
    hub_folder().mkdir(parents=True)
    (hub_folder() / NETWORKS["resnet18"].default).touch()
    assert next(row.offline for row in list_backbones() if row.name == "resnet18")


@pytest.mark.parametrize("variable", ["TORCH_HOME", "XDG_CACHE_HOME", None])
def test_hub_folder_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert hub_folder() == Path(torch.hub.get_dir()) / "checkpoints"


# Names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet1", "no backbone 'resnet1'. Did you mean .*resnet18"),
        ("torchvision:efficientnet_lite0", "no backbone"),
        ("qqqq", "timm:NAME"),
        ("timm:resnet188", "timm has no model 'resnet188'. Did you mean .*resnet18"),
        ("timm:resnet18.qq", "timm has no weights 'qq' .*a1_in1k"),
        ("timm:hf-hub:someone/something", "timm has no model"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_backbone(name)


def test_torchvision_prefix_is_stored_as_the_catalogue_name() -> None:
    backbone = load_backbone(f"torchvision:{SMALL}", weights="none")
    assert backbone.name == SMALL
    assert backbone == load_backbone(SMALL, weights="none")


# The default


def test_default_backbone() -> None:
    backbone = load_backbone()
    assert backbone.provenance() == {
        "backbone": "efficientnet_lite0",
        "weights": "default",
        "weights_sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "layers": ["penultimate"],
        "preprocess": {
            "resize": 256,
            "crop": [224, 224],
            "interpolation": "bicubic",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    }
    network = backbone.network()
    assert network is backbone.network()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    network.train()
    assert not any(module.training for module in network.modules())
    assert not network(torch.zeros(1, 3, 224, 224))[0].requires_grad


def test_default_weights_fill_the_network_in_the_right_places() -> None:
    # Renaming by hand could swap two layers of one shape; what the network says would then be noise.
    from sklearn.datasets import load_sample_images

    from featx.images.pixels import resize_crop

    backbone = load_backbone()
    assert backbone.file is not None
    body = catalogue_body(NETWORKS[backbone.name], backbone.preprocess).eval()
    load_checkpoint(body, backbone.file, network=backbone.name, classifiers=())
    scores = []
    for image in load_sample_images().images:
        pixels = resize_crop(Image.fromarray(image), backbone.preprocess)
        with torch.no_grad():
            batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
            scores.append(body(batch).softmax(1)[0])
    assert [score.argmax().item() for score in scores] == [698, 985]  # ImageNet's palace and daisy
