"""A network small enough to be trained in a test, and pictures whose classes it can learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.provider import Provider
from featx.errors import WeightsError
from featx.images.pixels import Preprocess

SMALL = Preprocess(resize=24, crop=(24, 24), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


class Block(nn.Module):
    """Two convolutions with batch normalisation, and what came in added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.conv2(torch.relu(self.bn(self.conv1(maps))))
        return maps + change


class Small(Provider):
    """A stem, three blocks, pooling and a classification layer."""

    name = "tests:Small"
    preprocess = SMALL
    classifier = "head"

    def weights(self, progress: Callable[[str], None] | None = None) -> Path | None:
        raise WeightsError("it has none", where=self.name)

    def build(self) -> nn.Module:
        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = nn.Conv2d(3, 8, 3, 2, 1)
                self.stages = nn.Sequential(Block(8), nn.Sequential(Block(8), Block(8)))
                self.head = nn.Linear(8, 5)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                maps = self.stages(self.stem(images))
                return self.head(maps.mean((2, 3)))  # type: ignore[no-any-return]

        return Body()


def small() -> Backbone:
    """:class:`Small` with random weights."""
    return load_backbone(Small(), weights="none")


def stripes(number: int, *, upright: bool, size: int = 24) -> NDArray[np.uint8]:
    """Stripes of random phase, colours and width on noise, (size, size, 3); what is upright is one class."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:size, 0:size]
    wave = np.sin((x if upright else y) * rng.uniform(0.9, 1.6) + rng.uniform(0, 6.3))
    colour = rng.uniform(20, 60, 3)
    picture = rng.uniform(20, 235, 3) + wave[..., None] * colour + rng.normal(0, 12, (size, size, 3))
    return np.asarray(np.clip(picture, 0, 255), dtype=np.uint8)


def striped_folders(root: Path, each: int = 12) -> Path:
    """Class folders ``across`` and ``upright`` of PNG pictures."""
    for label, upright in (("across", False), ("upright", True)):
        (root / label).mkdir(parents=True)
        for number in range(each):
            pixels = stripes(2 * number + upright, upright=upright)
            Image.fromarray(pixels).save(root / label / f"{number:03d}.png")
    return root
