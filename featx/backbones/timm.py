"""timm's models: their names, the preprocessing of their weights, and where timm keeps the files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import timm.data
from timm.models import get_pretrained_cfg

from featx.backbones.hub import Progress, fetch, hub_folder
from featx.backbones.provider import Provider
from featx.errors import UsageError, WeightsError, did_you_mean, in_words
from featx.images import Preprocess

if TYPE_CHECKING:
    from torch import nn

_data: Any = timm.data  # partly annotated

HUB_SECONDS = 5.0
"""How long the Hugging Face hub may take to answer at all."""

_SAFE, _TORCH = "model.safetensors", "pytorch_model.bin"  # timm's names on the Hugging Face hub, in its order


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

    def weights(self, progress: Progress | None = None) -> Path | None:
        """The file of weights, fetched if need be; None where there is none."""
        return weights_file(self, hub_folder(), fetch, progress)

    def with_weights(self, file: Path, sha256: str, *, default: bool) -> Provider:
        """The same network with weights from a file; see :meth:`featx.backbones.provider.Provider.with_weights`."""
        return dataclasses.replace(self, own=default)

    def network(self, file: Path | None) -> nn.Module:
        """The torch module with the weights of ``file``, ready for inference."""
        if file is not None and self.own:
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
    mode = data["crop_mode"]
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise UsageError(
            "the preprocessing of these weights is not supported",
            where=name,
            expected="crop mode center (square) or squash",
            found=f"{mode} {height}x{width}",
        )
    if data["interpolation"] not in ("nearest", "bilinear", "bicubic", "lanczos"):
        raise UsageError(
            "the preprocessing of these weights is not supported",
            where=name,
            expected="interpolation nearest, bilinear, bicubic or lanczos",
            found=data["interpolation"],
        )
    resize = scaled[0] if mode == "center" else scaled
    return Preprocess(resize, (height, width), data["interpolation"], tuple(data["mean"]), tuple(data["std"]))


def weights_file(
    model: TimmModel,
    hub_folder: Path,
    fetch: Callable[[str, Path, str, Callable[[str], None] | None], None],
    progress: Callable[[str], None] | None,
) -> Path:
    """The file with timm's own weights: from a cache, or downloaded.

    Raises
    ------
    WeightsError
        If timm has none for this model, or they cannot be downloaded.
    """
    repository, url = model.config.get("hf_hub_id"), model.config.get("url")
    if repository:
        return _from_hugging_face(model.name, repository, model.config.get("hf_hub_filename"), progress)
    if url:
        path = hub_folder / str(url).rpartition("/")[2]
        if not path.is_file():
            fetch(url, path, "", progress)
        return path
    raise WeightsError(
        "timm has no pretrained weights for this model",
        where=model.name,
        hint="Use --weights FILE, or --weights none for a random initialisation.",
    )


def _from_hugging_face(
    name: str, repository: str, filename: str | None, progress: Callable[[str], None] | None
) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    names = [filename] if filename else [_SAFE, _TORCH]
    for file in names:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    if progress is not None:
        progress(f"downloading {repository} from the Hugging Face hub")
    try:
        for file in names:
            # One question first: the download itself would try for half a minute to reach a hub that is not there.
            try:
                get_hf_file_metadata(hf_hub_url(repository, file), timeout=HUB_SECONDS)
            except EntryNotFoundError:
                continue
            return Path(hf_hub_download(repository, file))
    except Exception as error:  # which HTTP library's errors these are depends on the hub's version
        raise _unreachable(name, repository, in_words(error)) from error
    raise _unreachable(name, repository, f"the hub has no {' or '.join(names)} of it")


def _unreachable(name: str, repository: str, reason: str) -> WeightsError:
    return WeightsError(
        f"the weights are not on this machine and cannot be downloaded ({' '.join(reason.split())})",
        where=name,
        hint=f"Fetch {repository} on a machine that is online (huggingface-cli download {repository}) and name "
        f"the file with --weights FILE.",
    )
