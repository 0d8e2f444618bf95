"""A network cut in two: a trunk that stays frozen and runs once, and a tail whose parameters are trained.

Where can a network be cut? Where all it knows of an image goes through one tensor, from one module to the next. The
tail is then the network itself with everything before the cut replaced by the identity, and the trunk is what was
replaced, in order. That this is so is not assumed: both halves are run on noise, one after the other, and must give
what the whole network gives. Stages of blocks can be cut so (ResNet, MobileNet, EfficientNet, ConvNeXt, DenseNet,
RegNet, VGG, ...); a network that adds something between its modules (a transformer's positions) cannot, and says so.

A trained tail is kept as safetensors, which cannot run code; :class:`Tuned` puts it back into its network.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, TypeAlias

import safetensors.torch
import torch
from torch import Tensor, nn

from featx._arrays import PENULTIMATE
from featx._files import sha256_json
from featx.backbones.backbone import Backbone, find
from featx.backbones.frozen import FrozenNetwork, Pooling
from featx.backbones.provider import Provider
from featx.errors import BundleError, UsageError, made_by_newer, plural
from featx.images import Preprocess

Unfreeze: TypeAlias = int | Literal["all"]

FORMAT, FORMAT_VERSION = "featx-tail", 1

#: Largest difference of the two halves to the whole, in units of its largest value.
_SAME = 1e-4
_MAX_HEADER = 2**24


@dataclass(frozen=True)
class Halves:
    """A network in two.

    Attributes
    ----------
    trunk : maps normalised images (n, 3, h, w) to activations (n, *shape); None for a cut at the input.
    tail : maps activations to penultimate embeddings (n, d); in eval mode. At the input, activations are uint8
        pixels (n, h, w, 3).
    cut : name of the first trained module; "" for a cut at the input.
    """

    trunk: nn.Module | None
    tail: Tail
    cut: str

    @property
    def parameters(self) -> int:
        """How many numbers of the network are trained."""
        return sum(p.numel() for p in self.tail.parameters())


class Tail(nn.Module):
    """The trained half: activations in, embeddings (n, d) out.

    Parameters
    ----------
    body : a network without its classification layer, its first part replaced by the identity.
    shape : of one image's activations.
    preprocess : for a cut at the input: pixels are normalised with its mean and std. None for any other cut.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, shape: tuple[int, ...], preprocess: Preprocess | None = None) -> None:
        super().__init__()
        self.body, self.shape = body, shape
        self.takes_pixels = preprocess is not None
        if preprocess is not None:
            self.register_buffer("mean", torch.tensor(preprocess.mean).mul(255).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(preprocess.std).mul(255).view(1, 3, 1, 1), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of its input."""
        return torch.uint8 if self.takes_pixels else torch.float32

    def forward(self, activations: Tensor) -> Tensor:
        """Embeddings (n, d) of activations, or of uint8 pixels (n, h, w, 3)."""
        if self.takes_pixels:
            activations = ((activations.permute(0, 3, 1, 2).float() - self.mean) / self.std).contiguous()
        embeddings: Tensor = self.body(activations)
        return embeddings


def blocks(body: nn.Module, classifier: str | None) -> tuple[list[str], list[str]]:
    """Names of the modules that a network runs one after the other, and of those among them that count as blocks.

    A block is a module with two or more weight matrices (a residual block, an inverted residual); in a network that
    has none (VGG), one with a weight matrix.
    """
    names: list[str] = []

    def walk(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if prefix + name == classifier:
                continue
            if type(child).forward is nn.Sequential.forward:
                walk(f"{prefix}{name}.", child)
            else:
                names.append(prefix + name)

    walk("", body)
    matrices = {name: sum(p.dim() > 1 for p in body.get_submodule(name).parameters()) for name in names}
    least = 2 if max(matrices.values(), default=0) >= 2 else 1
    return names, [name for name in names if matrices[name] >= least]


def cut_network(backbone: Backbone, unfreeze: Unfreeze) -> Halves:
    """Cut a backbone's network before the last ``unfreeze`` blocks, or ("all") at its input.

    Parameters
    ----------
    backbone : whose layer "penultimate" the tail will end in.
    unfreeze : number of blocks, as of :func:`blocks`; what follows the last block is trained, too.

    Raises
    ------
    UsageError
        There are fewer blocks, or the network cannot be cut.
    """
    layers = ("penultimate",)
    network = (backbone if backbone.layers == layers else replace(backbone, layers=layers)).network()
    if unfreeze == "all":
        tail = Tail(copy.deepcopy(network.body), (*backbone.preprocess.crop, 3), backbone.preprocess)
        tail.requires_grad_(True).eval()
        return Halves(None, tail, "")
    names, numbered = blocks(network.body, network.classifier)
    if not 1 <= unfreeze <= len(numbered):
        raise UsageError(
            f"{backbone.name} has no {plural(unfreeze, 'block')} to unfreeze",
            where="unfreeze",
            expected=f"1 to {len(numbered)}, or all" if numbered else "all",
            found=unfreeze,
        )
    cut = numbered[-unfreeze]
    before = names[: names.index(cut)]
    trunk = nn.Sequential(*(copy.deepcopy(network.body.get_submodule(name)) for name in before))
    body = copy.deepcopy(network.body)
    for name in before:
        body.set_submodule(name, nn.Identity())
    body.requires_grad_(True).eval()
    trunk.requires_grad_(False).eval()
    images = torch.randn(2, 3, *backbone.preprocess.crop, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (whole,) = network(images)
        try:
            activations = trunk(images)
            found = body(activations)
            same = found.shape == whole.shape and bool((found - whole).abs().max() <= _SAME * whole.abs().max())
        except Exception as error:  # whatever a network raises that is given another's place
            raise _uncuttable(backbone.name, cut) from error
    if not same or not isinstance(activations, Tensor):
        raise _uncuttable(backbone.name, cut)
    return Halves(trunk, Tail(body, tuple(activations.shape[1:])), cut)


def _uncuttable(name: str, cut: str) -> UsageError:
    return UsageError(
        f"{name} is not a chain of modules, so it cannot be cut before {cut}",
        where="unfreeze",
        hint="Use --unfreeze all, or a network made of stages, such as efficientnet_lite0, mobilenet_v2 or a resnet.",
    )


@dataclass(frozen=True, kw_only=True)
class Trunk(Backbone):
    """The frozen half as an engine runs it: its one layer is the activations at the cut, not pooled."""

    half: nn.Module = field(compare=False, repr=False)

    @classmethod
    def of(cls, backbone: Backbone, halves: Halves) -> Trunk:
        """The trunk of a backbone that :func:`cut_network` has cut."""
        if halves.trunk is None:
            raise ValueError("a cut at the input has no trunk")
        same = {each.name: getattr(backbone, each.name) for each in fields(Backbone) if each.init}
        return cls(**{**same, "layers": (f"before {halves.cut}",), "half": halves.trunk})

    def _build(self) -> FrozenNetwork:
        return _Unpooled(self.half, (PENULTIMATE,), None, self.preprocess.crop, self.name)


class _Unpooled(FrozenNetwork):
    def _probe(self, where: str) -> dict[str, Pooling]:
        return dict.fromkeys(self.layers, "none")


# --- keeping ------------------------------------------------------------------------------------------------------


def tail_bytes(tail: Tail, cut: str) -> bytes:
    """A trained tail as safetensors; names are those of the whole network. Equal tails give equal bytes."""
    state = {name: value.detach().cpu().contiguous() for name, value in tail.body.state_dict().items()}
    # One key: the library does not promise an order among several.
    said = {"format": FORMAT, "format_version": FORMAT_VERSION, "cut": cut}
    return safetensors.torch.save(state, {"featx": json.dumps(said, sort_keys=True)})


class Tuned(Provider):
    """A network with a trained tail in place of its own.

    Parameters
    ----------
    base : the network, which loads the base weights.
    tail : of :func:`tail_bytes`.
    """

    def __init__(self, base: Provider, tail: bytes) -> None:
        self.base, self.tail = base, tail
        self.name, self.preprocess, self.classifier = base.name, base.preprocess, base.classifier

    def network(self, file: Path | None) -> nn.Module:
        """The torch module with the weights of ``file``, ready for inference."""
        body = self.base.network(file)
        own = body.state_dict()
        state = _state(self.tail, self.name)
        for name, value in state.items():
            if name not in own or own[name].shape != value.shape:
                raise BundleError(
                    "the trained part belongs to another network",
                    where=self.name,
                    expected=tuple(own[name].shape) if name in own else f"no {name}",
                    found=f"{name} {tuple(value.shape)}",
                )
        body.load_state_dict(state, strict=False)
        return body

    def classification_layer(self, body: nn.Module) -> str | None:
        """Name of the layer that gives the classes, in ``body``; None where there is none."""
        return self.base.classification_layer(body)


def tuned(backbone: Backbone, tail: bytes) -> Backbone:
    """A backbone with a trained tail.

    Its ``weights_sha256`` is of the tail and of the weights below it (of the tail alone, where that is all of it).
    """
    below = backbone.weights_sha256 if tail_cut(tail) else None
    sha256 = sha256_json({"below": below, "tail": hashlib.sha256(tail).hexdigest()})
    return replace(backbone, weights_sha256=sha256, provider=Tuned(backbone.provider or find(backbone.name), tail))


def tail_cut(tail: bytes) -> str:
    """Name of the first trained module, "" for all of the network; BundleError if these are no tail's bytes."""
    try:
        (size,) = struct.unpack_from("<Q", tail)
        if size > _MAX_HEADER:
            raise ValueError("its header is too long")
        said = json.loads(json.loads(tail[8 : 8 + size])["__metadata__"]["featx"])
        cut, version = said["cut"], said["format_version"]
        if said["format"] != FORMAT or not isinstance(cut, str) or not isinstance(version, int):
            raise ValueError("it is not featx's")
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise BundleError(f"the trained part cannot be read ({error})") from error
    if version > FORMAT_VERSION:
        raise made_by_newer(BundleError, "the trained part", FORMAT_VERSION, version)
    return cut


def _state(tail: bytes, where: str) -> dict[str, Tensor]:
    tail_cut(tail)
    try:
        return safetensors.torch.load(tail)
    except Exception as error:  # the reader's own kind, and what foreign bytes provoke
        raise BundleError(f"the trained part cannot be read ({error})", where=where) from error
