"""The encoder half of an autoencoder as a backbone: its shape, its checkpoint, and how its images are prepared.

The checkpoint (a torch file of plain tensors and numbers, format "featx-autoencoder") has the encoder under
``state_dict``, the decoder under ``decoder``, and ``config`` says how images are prepared and what was reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from featx.backbones.checkpoint import read_file
from featx.backbones.hub import Progress
from featx.backbones.provider import Provider
from featx.errors import UsageError, WeightsError, made_by_newer
from featx.images import Preprocess

NAME = "autoencoder"
FORMAT, FORMAT_VERSION = "featx-autoencoder", 1

CHANNELS = (32, 64, 128, 256)
"""Of the encoder's four halvings of the image, and of the decoder's backwards."""

SIDE = 2 ** len(CHANNELS)
MAX_SIZE, MAX_DIM = 512, 4096


def preprocess_of(size: int) -> Preprocess:
    """The whole centre square of an image at ``size`` pixels a side, values from -1 to 1."""
    return Preprocess(size, (size, size), "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Encoder(nn.Sequential):
    """Normalised images (n, 3, size, size) to codes (n, dim), each number of mean 0 and variance 1 in training.

    Without that the mean image leads the code, and the cosine of any two images is near 1.
    """

    def __init__(self, dim: int, size: int) -> None:
        layers: list[nn.Module] = []
        before = 3
        for channels in CHANNELS:
            layers += [nn.Conv2d(before, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        super().__init__(
            *layers, nn.Flatten(), nn.Linear(before * (size // SIDE) ** 2, dim), nn.BatchNorm1d(dim, affine=False)
        )


def check_shape(dim: int, size: int) -> None:
    """UsageError for a code or an image that cannot be."""
    if not 1 <= dim <= MAX_DIM:
        raise UsageError("no such length of the code", where="dim", expected=f"1 to {MAX_DIM}", found=dim)
    if size % SIDE or not SIDE <= size <= MAX_SIZE:
        raise UsageError(
            "no such size of images", where="size", expected=f"a multiple of {SIDE} up to {MAX_SIZE}", found=size
        )


class AutoencoderNetwork(Provider):
    """The encoder as a backbone; its checkpoint says how long its codes are and how images are prepared."""

    name = NAME

    def __init__(self, dim: int = 64, size: int = 64) -> None:
        self.dim, self.size = dim, size
        self.preprocess = preprocess_of(size)

    def build(self) -> nn.Module:
        """The network as a torch module, with random weights."""
        return Encoder(self.dim, self.size)

    def weights(self, progress: Progress | None = None) -> Path | None:
        """The file of weights, fetched if need be; None where there is none."""
        raise WeightsError(
            "an autoencoder comes without weights: it learns them from your images",
            where=NAME,
            hint="Train one with featx autoencoder SOURCE --out ae.pt, and name it: --weights ae.pt",
        )

    def with_weights(self, file: Path, sha256: str, *, default: bool) -> Provider:
        """The same network with weights from a file; see :meth:`featx.backbones.provider.Provider.with_weights`."""
        content = read_file(file)
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise WeightsError(
                "not the checkpoint of an autoencoder", where=file, hint="Make one: featx autoencoder SOURCE --out FILE"
            )
        if not isinstance(content.get("format_version"), int) or content["format_version"] > FORMAT_VERSION:
            raise made_by_newer(WeightsError, file, FORMAT_VERSION, content.get("format_version"))
        try:
            dim, size = int(content["config"]["dim"]), int(content["config"]["size"])
            check_shape(dim, size)
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise WeightsError(f"its config is not valid ({error})", where=file) from error
        return AutoencoderNetwork(dim, size)
