"""timm's models: their names, the preprocessing of their weights, and where timm keeps the files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import timm.data
from timm.models import get_pretrained_cfg

from featx.backbones.hub import HUB_FILES, Advance, Progress, fetch, fetch_from_hub, hub_folder, in_hub_cache
from featx.backbones.provider import Provider
from featx.errors import UsageError, WeightsError, did_you_mean, in_words
from featx.images import Preprocess

if TYPE_CHECKING:
    from torch import nn

_data: Any = timm.data  # partly annotated


@dataclass(frozen=True, kw_only=True)
class TimmModel(Provider):
    """A model of timm with one of its weights: ``config`` is timm's own record of them.

    ``own`` says that the weights are timm's own for this name, in whatever layout timm stores them.
    """

    name: str
    preprocess: Preprocess
    config: Mapping[str, Any]
    own: bool = False

    def build(self) -> nn.Module:
        """The network as a torch module, with random weights."""
        return create(self._architecture)

    @property
    def published_name(self) -> str:
        """The name that timm has for its weights, with their tag, which ``timm:resnet10t`` leaves out."""
        return ".".join(filter(None, (self.config.get("architecture"), self.config.get("tag")))) or self._architecture

    @property
    def carried(self) -> Path:
        """Where weights lie that were carried to this machine: in torch hub's folder, under timm's name."""
        return hub_folder() / f"{self.published_name}.safetensors"

    def weights(self, progress: Progress | None = None) -> Path | None:
        """The file of weights, fetched if need be; None where there is none."""
        return self.local() or self.fetch(progress)

    def local(self) -> Path | None:
        """Its weights on this machine: carried here, or from a cache; None where they have to be fetched."""
        if self.carried.is_file():
            return self.carried
        if self._repository:
            return in_hub_cache(self._repository, self._files)
        path = hub_folder() / self._url.rpartition("/")[2]
        return path if self._url and path.is_file() else None

    def fetch(self, progress: Progress | None = None, advance: Advance | None = None) -> Path:
        """Download timm's own weights.

        Raises
        ------
        WeightsError
            If timm has none for this model, or they cannot be downloaded.
        """
        if self._repository:
            return fetch_from_hub(self.name, self._repository, self._files, progress, advance)
        if self._url:
            path = hub_folder() / self._url.rpartition("/")[2]
            fetch(self._url, path, "", progress, advance)
            return path
        raise WeightsError(
            "timm has no pretrained weights for this model",
            where=self.name,
            hint="Use --weights FILE, or --weights none for a random initialisation.",
        )

    def check_fits(self, file: Path) -> None:
        """WeightsError unless a safetensors file fills all of the network, with its classification layer."""
        # With its own number of classes: for another one timm leaves out the last layer, and then asks for no other.
        with _of_another_network(self.name, file):
            timm.create_model(self._architecture, pretrained=True, pretrained_cfg_overlay={"file": str(file)})

    def with_weights(self, file: Path, sha256: str, *, default: bool) -> Provider:
        """The same network with weights from a file; see :meth:`featx.backbones.provider.Provider.with_weights`."""
        return dataclasses.replace(self, own=default)

    def network(self, file: Path | None) -> nn.Module:
        """The torch module with the weights of ``file``, ready for inference."""
        if file is not None and self.own:
            with _of_another_network(self.name, file):
                return create(self._architecture, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
        body = self.build()
        if file is not None:
            from featx.backbones.checkpoint import load_checkpoint

            layers = getattr(body, "pretrained_cfg", {}).get("classifier") or ()
            layers = (layers,) if isinstance(layers, str) else tuple(layers)
            load_checkpoint(body, file, network=self.name, classifiers=layers)
        return body

    @property
    def _architecture(self) -> str:
        return self.name.removeprefix("timm:")

    @property
    def _repository(self) -> str:
        return str(self.config.get("hf_hub_id") or "")

    @property
    def _url(self) -> str:
        return str(self.config.get("url") or "")

    @property
    def _files(self) -> tuple[str, ...]:
        file = self.config.get("hf_hub_filename")
        return (str(file),) if file else HUB_FILES


@contextlib.contextmanager
def _of_another_network(name: str, file: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # whatever timm, torch and safetensors make of foreign weights
        found = in_words(error)
        raise WeightsError(f"these are not the weights of {name}", where=file, found=found[:200]) from error


def create(architecture: str, *, num_classes: int = 0, **options: Any) -> nn.Module:
    """The model of timm; without classes its output is the embedding."""
    body: nn.Module = timm.create_model(architecture, num_classes=num_classes, **options)
    return body


def find(name: str) -> TimmModel:
    """Look up ``timm:NAME`` (NAME may carry a tag, ``resnet18.a1_in1k``).

    Raises
    ------
    UsageError
        For a name or tag that timm does not know, or a preprocessing that featx does not have.
    """
    model = name.removeprefix("timm:")
    if not timm.is_model(model):
        hint = did_you_mean(model, timm.list_models()) or "timm.list_models() lists them."
        raise UsageError(f"timm has no model {model!r}", hint=hint)
    tags = [known.partition(".")[2] for known in timm.list_pretrained(model.partition(".")[0])]
    tag = model.partition(".")[2]
    if tag and tag not in tags:
        raise UsageError(f"timm has no weights {tag!r} for this model", where=name, expected=" or ".join(tags))
    found = get_pretrained_cfg(model)
    config = dataclasses.asdict(found) if found is not None else {}
    prepared = preprocess(_data.resolve_data_config(pretrained_cfg=config), name)
    return TimmModel(name=name, preprocess=prepared, config=config)


def preprocess(data: Mapping[str, Any], name: str) -> Preprocess:
    """What :func:`timm.data.create_transform` does in evaluation, as a :class:`~featx.images.pixels.Preprocess`."""
    _, height, width = data["input_size"]
    scaled = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
    mode, interpolation = data["crop_mode"], data["interpolation"]
    cropped = mode == "squash" or (mode == "center" and height == width)
    if not cropped or interpolation not in ("nearest", "bilinear", "bicubic", "lanczos"):
        raise UsageError(
            "the preprocessing of these weights is not supported",
            where=name,
            expected="crop mode center (square) or squash, and interpolation nearest, bilinear, bicubic or lanczos",
            found=f"{mode} {height}x{width}, {interpolation}",
        )
    resize = scaled[0] if mode == "center" else scaled
    return Preprocess(resize, (height, width), interpolation, tuple(data["mean"]), tuple(data["std"]))
