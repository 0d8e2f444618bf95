"""A frozen network as a torch module: built, loaded, and cut where an embedding is taken.

Everything here imports torch. :mod:`featx.backbones.backbone` decides which weights, and calls this module only when
the network itself is needed (an engine with a converted copy on disk never does).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featx._arrays import PENULTIMATE
from featx.backbones.catalogue import Network
from featx.backbones.provider import Provider
from featx.errors import UsageError, WeightsError, did_you_mean
from featx.images import Preprocess

Pooling = Literal["none", "tokens", "channels_first", "channels_last"]

_drawing = threading.RLock()

# What the hooks of one call of one network have taken so far. A context variable and not an attribute, so that
# two threads that share a network cannot get each other's embeddings.
_taken: ContextVar[dict[str, Any] | None] = ContextVar("featx_taken", default=None)


class FrozenNetwork(nn.Module):
    """A network without its classification layer that returns one embedding per layer.

    Parameters
    ----------
    body : the network; it is put in eval mode, its gradients are switched off, and its classification layer is
        replaced by the identity.
    layers : "penultimate" (what the classification layer would be given) or names of the module tree of
        ``body``. Spatial maps are averaged over the image, tokens over the sequence.
    classifier : the name of the classification layer; None for a network that has none.
    input_size : (height, width) of its input in pixels.
    where : what to call the network in errors.

    Raises
    ------
    UsageError
        For a layer that does not exist, is not run, or has an output that is no map, sequence or vector.
    """

    def __init__(
        self,
        body: nn.Module,
        layers: Sequence[str],
        classifier: str | None,
        input_size: tuple[int, int],
        where: str,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.classifier = classifier
        self.input_size = input_size
        _check_names(body, self.layers, classifier, where)
        if classifier is not None:
            body.set_submodule(classifier, nn.Identity())
        self.body = body.eval().requires_grad_(False)  # eval before the probe, which would move running statistics
        self._poolings: dict[str, Pooling] = {}
        for name in self.layers:
            self._hook(name)
        self._poolings = self._probe(where)
        self.eval()

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Frozen: asking for training mode changes nothing."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map normalised float images (n, 3, h, w) to a tuple of embeddings (n, d), one per layer."""
        taken: dict[str, Any] = {}
        token = _taken.set(taken)
        try:
            output = self.body(images)
        finally:
            _taken.reset(token)
        if self.classifier is None and PENULTIMATE in self.layers:
            taken[PENULTIMATE] = self._reduce(PENULTIMATE, output)
        return tuple(taken[name] for name in self.layers)

    def _hook(self, name: str) -> None:
        # Outputs are reduced at once, inside the hook: the next layer may overwrite them in place.
        if name != PENULTIMATE:
            layer = self.body.get_submodule(name)
            layer.register_forward_hook(lambda module, args, output: self._take(name, output))
        elif self.classifier is not None:
            layer = self.body.get_submodule(self.classifier)
            layer.register_forward_pre_hook(lambda module, args: self._take(name, args[0]))

    def _take(self, name: str, output: Any) -> None:
        taken = _taken.get()
        if taken is not None:
            taken[name] = self._reduce(name, output)

    def _reduce(self, name: str, output: Any) -> Any:
        if not self._poolings:  # the probe
            return _look(output)
        match self._poolings[name]:
            case "tokens":
                return output.mean(1)
            case "channels_first":
                return output.mean((2, 3))
            case "channels_last":
                return output.mean((1, 2))
            case "none":
                return output.clone()

    def _probe(self, where: str) -> dict[str, Pooling]:
        """Run one black image, and decide by the shape at each layer how it becomes a vector."""
        # By hand rather than through forward, which takes it for granted that every layer is run.
        seen: dict[str, Any] = {}
        token = _taken.set(seen)
        try:
            with torch.no_grad():
                output = self.body(torch.zeros(1, 3, *self.input_size))
        finally:
            _taken.reset(token)
        if self.classifier is None:
            seen[PENULTIMATE] = _look(output)
        for name in self.layers:
            if name not in seen:
                raise UsageError(
                    f"layer {name!r} is not run when an image goes through the network",
                    where=where,
                    hint="Choose another layer.",
                )
            if not seen[name][1]:
                raise WeightsError(f"with these weights, layer {name!r} gives values that are not finite", where=where)
        return {name: _pooling(seen[name][0], name, where) for name in self.layers}


def build(
    provider: Provider, *, layers: Sequence[str], preprocess: Preprocess, weights: Path | None, random_state: int
) -> FrozenNetwork:
    """Build a provider's network, from a weights file or (``weights=None``) from a seed."""
    with seeded(random_state):
        body = provider.network(weights)
    return FrozenNetwork(body, layers, provider.classification_layer(body), preprocess.crop, provider.name)


def last_layer(body: nn.Module) -> str:
    """The name of the classification layer: the last Linear, or where there is none the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in body.named_modules() if isinstance(module, kind)]
        if names:
            return str(names[-1])
    raise TypeError(f"{type(body).__name__} has no classification layer")


def state_sha256(body: nn.Module) -> str:
    """Hex sha256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in body.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def seeded(random_state: int, *, device: str = "cpu") -> Iterator[None]:
    """Let torch draw from a seed, and then go on as if nothing had been drawn.

    One thread at a time: torch's generators belong to the process, so of two threads that draw from them at once,
    neither gets the numbers of its seed.
    """
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with _drawing, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(random_state)
        if devices:
            torch.cuda.manual_seed(random_state)
        yield


def catalogue_body(network: Network, preprocess: Preprocess) -> nn.Module:
    """A catalogue network whole, with its 1,000-class layer."""
    if network.source == "featx":
        from featx.backbones.timm import create

        return create(network.architecture, num_classes=1000)
    import torchvision.models

    options: dict[str, Any] = {}
    if network.name in ("googlenet", "inception_v3"):
        # init_weights unset warns; transform_input is what the published weights were trained with, and is not
        # in a state dict.
        options = {"aux_logits": False, "init_weights": True, "transform_input": True}
    elif network.name.startswith("vit_"):
        options = {"image_size": preprocess.crop[0]}  # the position embedding has the size of the weights
    body: nn.Module = torchvision.models.get_model(network.name, weights=None, **options)
    return body


def _check_names(body: nn.Module, layers: tuple[str, ...], classifier: str | None, where: str) -> None:
    known = [PENULTIMATE, *(name for name, _ in body.named_modules() if name)]
    for name in layers:
        if name == classifier:
            raise UsageError(
                f"layer {name!r} is the classification layer, which a frozen network does not have",
                where=where,
                hint="What goes into it is the layer 'penultimate'.",
            )
        if name not in known:
            top = ", ".join(child for child, _ in body.named_children())
            hint = did_you_mean(name, known) or f"Its parts are {top}, and what they contain (as in 'features.10')."
            raise UsageError(f"no layer {name!r}", where=where, hint=hint)


def _look(output: Any) -> tuple[tuple[int, ...] | str, bool]:
    """The shape of a layer's output (or what it is instead of a tensor), and whether it is finite."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}", True
    return tuple(output.shape), output.is_meta or bool(output.isfinite().all())


def _pooling(shape: tuple[int, ...] | str, name: str, where: str) -> Pooling:
    """How an output of this shape becomes one vector for the one image that went in."""
    if isinstance(shape, tuple) and shape[0] == 1:
        if len(shape) == 2:
            return "none"
        if len(shape) == 3:
            return "tokens"
        # Maps of square images are square; the odd axis out is the channels.
        if len(shape) == 4 and shape[2] == shape[3] != shape[1]:
            return "channels_first"
        if len(shape) == 4 and shape[1] == shape[2] != shape[3]:
            return "channels_last"
        if shape[1:] == (1, 1, 1):
            return "channels_first"
    raise UsageError(
        f"the output of layer {name!r} cannot be pooled to one vector an image",
        where=where,
        expected="(1, d), (1, tokens, d), or a square map (1, d, h, h) or (1, h, h, d)",
        found=shape,
        hint="Choose another layer, such as the one around it.",
    )


@dataclass(frozen=True)
class LayerInfo:
    """A layer that embeddings can be taken from.

    Parameters
    ----------
    name : what ``--layer`` takes.
    kind : the class of its module.
    shape : of its output for one image: (d,), (tokens, d), (d, h, w) or (h, w, d).
    pooling : how that becomes one vector: "none", "tokens" (their mean), or the mean over the image of
        "channels_first" or "channels_last" maps.
    embedding_dim : d.
    suggested : whether it is one to compare with the penultimate one; see :func:`describe_layers`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pooling: Pooling
    embedding_dim: int
    suggested: bool


def describe_layers(network: FrozenNetwork) -> list[LayerInfo]:
    """Every layer of a network that embeddings can be taken from, in the order in which they are run.

    Suggested are the penultimate layer and three blocks after the middle of the network, at 0.6, 0.75 and 0.9 of its
    blocks: early enough to see texture, late enough to see more than edges.
    """
    outputs: dict[str, tuple[int, ...] | str] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: _look(output)[0]}))
        for name, module in network.body.named_modules()
        if name and name != network.classifier
    ]
    with torch.no_grad():
        penultimate = network(torch.zeros(1, 3, *network.input_size))[network.layers.index(PENULTIMATE)]
    for handle in handles:
        handle.remove()
    usable: dict[str, tuple[tuple[int, ...], Pooling]] = {}
    for name, shape in outputs.items():
        with contextlib.suppress(UsageError):  # a layer without a vector for one image is not listed
            pooling = _pooling(shape, name, "")
            usable[name] = (tuple(shape[1:]), pooling)  # type: ignore[arg-type]
    suggested = _suggested(network.body, list(usable))
    infos = []
    for name, (shape, pooling) in usable.items():
        dim = shape[0] if pooling == "channels_first" else shape[-1]
        kind = type(network.body.get_submodule(name)).__name__
        infos.append(LayerInfo(name, kind, shape, pooling, dim, name in suggested))
    dim = penultimate.shape[1]
    return [*infos, LayerInfo(PENULTIMATE, "input of the classifier", (dim,), "none", dim, True)]


def _suggested(body: nn.Module, usable: list[str]) -> set[str]:
    """Three of the network's blocks; without blocks, of its parts; without parts, of its layers."""
    modules = dict(body.named_modules())
    parts = [name for name in usable if any(True for _ in modules[name].children())]
    rows = [name for name in parts if isinstance(modules[name.rpartition(".")[0]], nn.Sequential | nn.ModuleList)]
    blocks = [name for name in rows if not any(name.startswith(f"{other}.") for other in rows)]
    top = [name for name in parts if "." not in name]
    some = next((names for names in (blocks, top) if len(names) >= 4), usable)
    if len(some) < 3:
        return set(some)
    last = int(0.9 * len(some))
    middle = min(int(0.75 * len(some)), last - 1)
    return {some[min(int(0.6 * len(some)), middle - 1)], some[middle], some[last]}
