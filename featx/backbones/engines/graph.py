"""Networks as OpenVINO's graphs: converted from torch once, or quantised, and kept as one file each.

A graph takes uint8 pixels (n, h, w, 3) of any n and has an output named after each layer; normalisation is inside.
Converting a network from torch takes seconds, so the result is kept in the user's cache folder. A start that finds it
there imports no torch.

A quantised graph (int8) is more than a copy that can be made again: its scales depend on the machine that measured
them. Its sha256 is therefore part of what embeddings depend on. Those of the recipes' networks come with featx
(``quantised/``, made by ``scripts/make_graphs.py``), so that they are the same everywhere; others are made here once.
"""

from __future__ import annotations

import hashlib
import re
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from featx._files import canonical_json, publish_bytes, sha256_json
from featx.backbones.backbone import Backbone
from featx.backbones.engines.base import without_telemetry
from featx.backbones.hub import cache_folder
from featx.errors import FeatxError, UsageError, WeightsError, in_words

CARRIED = Path(__file__).parent.parent / "quantised"
"""Folder of the graphs that come with featx."""

_CONVERTING = threading.Lock()
"""torch.export is for one thread at a time: several that convert a network get wrong graphs, or errors."""

_CACHE_VERSION = 3
_MAGIC = b"featx-ir"
_SEAL = struct.Struct("<8s32s")  # magic, sha256 of all that follows it
_LENGTH = struct.Struct("<Q")  # of the compressed description; then that, then the constants
_MAX_DESCRIPTION = 1 << 28


@dataclass(frozen=True)
class Graph:
    """A network for OpenVINO.

    Attributes
    ----------
    description : its operations, as OpenVINO's XML.
    constants : its numbers.
    content : both as the bytes of a file, which start with the sha256 of the rest.
    """

    description: bytes
    constants: bytes
    content: bytes

    @classmethod
    def of(cls, description: bytes, constants: bytes) -> Graph:
        """A graph of its parts."""
        packed = zlib.compress(description, 9)
        payload = _LENGTH.pack(len(packed)) + packed + constants
        return cls(description, constants, _SEAL.pack(_MAGIC, hashlib.sha256(payload).digest()) + payload)

    @classmethod
    def read(cls, path: Path) -> Graph | None:
        """The graph in a file; None where there is none, or one that is damaged."""
        try:
            return cls.parse(path.read_bytes())
        except OSError:
            return None

    @classmethod
    def parse(cls, content: bytes) -> Graph | None:
        """The graph in a file's content; None where it is damaged."""
        if len(content) < _SEAL.size + _LENGTH.size:
            return None
        magic, sha256 = _SEAL.unpack_from(content)
        payload = memoryview(content)[_SEAL.size :]
        if magic != _MAGIC or hashlib.sha256(payload).digest() != sha256:
            return None
        (length,) = _LENGTH.unpack_from(payload)
        rest = payload[_LENGTH.size :]
        try:
            description = zlib.decompressobj().decompress(rest[:length], _MAX_DESCRIPTION)
        except zlib.error:
            return None
        return cls(description, bytes(rest[length:]), content)

    @property
    def sha256(self) -> str:
        """Hex digest that stands at the start of its file."""
        return self.content[len(_MAGIC) : _SEAL.size].hex()

    @property
    def about(self) -> dict[str, str]:
        """What :func:`featx.backbones.engines.quantise.quantise` wrote into it: which network it is of, and by whom.

        Raises
        ------
        ValueError
            The description is not XML.
        """
        try:
            root = ElementTree.fromstring(self.description)
        except ElementTree.ParseError as error:
            raise ValueError(f"the network cannot be read ({error})") from error
        return {item.tag: item.get("value", "") for item in root.iterfind("./rt_info/featx/*")}

    @property
    def takes_any_number(self) -> bool:
        """Whether batches of any size can be computed."""
        return bool(self.model().inputs[0].partial_shape[0].is_dynamic)

    def model(self, layers: Sequence[str] = ()) -> Any:
        """The graph as OpenVINO's model, with the outputs of ``layers`` in their order (all where none are named)."""
        openvino = import_openvino()
        try:
            model = openvino.Core().read_model(self.description, self.constants)
        except RuntimeError as error:  # OpenVINO's only one
            raise WeightsError(
                "the graph of a network cannot be read",
                found=str(error).strip().splitlines()[-1][:200],
                hint="Copy the file that it came in again, or make it again.",
            ) from error
        if not layers:
            return model
        results = [model.output(layer).get_node() for layer in layers]
        return openvino.Model(results, model.get_parameters())


def add_maps(model: Any) -> list[str]:
    """Give a model of OpenVINO's further outputs, behind those that it has: what these may be the means of.

    That is the input of the last average before each output. Whether what lies between changes more than the shape
    (permutations become gathers and much else), the numbers show, which the caller compares.

    Returns
    -------
    where the channels of each output's map are, "first" (n, d, h, w), "last" (n, h, w, d) or "tokens" (n, h * w, d);
    "" where there is no average near, and so no further output.
    """
    places, results = [], []
    for output in list(model.outputs):
        node = output.get_node()
        for _ in range(_BEHIND):
            node = node.input_value(0).get_node()
            place = _averaged(node)
            if place or not node.get_input_size():
                break
        places.append(place)
        if place:
            results.append(import_openvino().opset13.result(node.input_value(0)))
    model.add_results(results)
    model.validate_nodes_and_infer_types()
    return places


_BEHIND = 6
"""So many operations at most are between a mean over the image and an embedding that it is."""


def _averaged(node: Any) -> str:
    """Where the channels are of what an operation averages over the image; "" where it does something else."""
    kind = node.get_type_name()
    if kind not in ("ReduceMean", "AvgPool", "AdaptiveAvgPool"):
        return ""
    shape = node.input(0).get_partial_shape()
    rank = len(shape)
    if kind != "ReduceMean":
        out = node.output(0).get_partial_shape()
        whole = rank == 4 and all(size.is_static and size.get_length() == 1 for size in list(out)[2:])
        return "first" if whole else ""
    axes = {int(axis) % rank for axis in node.input_value(1).get_node().get_vector()}
    return {(4, (2, 3)): "first", (4, (1, 2)): "last", (3, (1,)): "tokens"}.get((rank, tuple(sorted(axes))), "")


def import_openvino() -> Any:
    """Import openvino without its telemetry.

    Importing it sends an event to a server unless its telemetry package is missing or a consent file says no. With
    the package hidden during the import, openvino takes its own empty replacement: nothing is sent or written.
    """
    with without_telemetry():
        import openvino

    return openvino


def converted(backbone: Backbone, batch_size: int) -> Graph:
    """The network in single precision, from the cache or converted.

    Most networks are converted for batches of any size. One whose own code depends on the number of images is
    converted for batches of ``batch_size`` only.
    """
    with _CONVERTING:
        for size in (None, batch_size):
            found = Graph.read(cache_file(backbone, size))
            if found is not None:
                return found
        size, graph = _convert(backbone, batch_size)
        keep(graph, cache_file(backbone, size))
        return graph


def cache_file(backbone: Backbone, batch_size: int | None = None) -> Path:
    """The file that a converted network is kept in; ``batch_size`` where it was converted for one size only."""
    decides = {
        "cache_version": _CACHE_VERSION,
        "batch_size": batch_size,
        "provenance": {**backbone.provenance(), "weights": None},  # the hash says which, wherever it came from
        "versions": {package: version(package) for package in ("openvino", "torch", "torchvision", "timm")},
    }
    return _cached("openvino", backbone, decides)


def quantised_file(backbone: Backbone) -> Path:
    """The file that a network is kept in once it was quantised here.

    Its name does not depend on versions: a network keeps its numbers when a library is updated.
    """
    return _cached("int8", backbone, {"provenance": {**backbone.provenance(), "weights": None}})


QUANTISED_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,150}-[0-9a-f]{24}\.ir")
"""What a file of the folder of quantised networks is called."""


def quantised_folder() -> Path:
    """Where networks are kept once they were quantised on this machine."""
    return cache_folder() / "int8"


def quantised_here(weights_sha256: str) -> Iterator[tuple[Path, Graph]]:
    """The networks of these weights that were quantised on this machine, for whatever layers, by name."""
    for path in sorted(quantised_folder().glob("*.ir")):
        graph = Graph.read(path) if QUANTISED_NAME.fullmatch(path.name) else None
        if graph is not None and graph.about.get("weights_sha256") == weights_sha256:
            yield path, graph


def _cached(kind: str, backbone: Backbone, decides: dict[str, Any]) -> Path:
    key = sha256_json(decides)[:24]
    return cache_folder() / kind / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', backbone.name)}-{key}.ir"


def quantised(backbone: Backbone, content: bytes | None = None) -> Graph:
    """The network with eight-bit weights and activations: as it comes with featx, from the cache, or quantised now.

    Parameters
    ----------
    backbone : the network.
    content : its file, where a model brought one that :func:`check_network` has seen.

    Raises
    ------
    UsageError
        It has to be quantised, and NNCF is not installed.
    """
    with _CONVERTING:
        found = Graph.parse(content) if content else carried(backbone) or Graph.read(quantised_file(backbone))
        if found is not None:
            return found
        from featx.backbones.engines.quantise import quantise

        graph = saved(quantise(backbone, _convert(backbone, 1)[1].model()))
        keep(graph, quantised_file(backbone))
        return graph


@cache
def carried(backbone: Backbone) -> Graph | None:
    """The quantised graph that comes with featx for these very weights and layers, if there is one."""
    graph = Graph.read(CARRIED / f"{backbone.name}.ir") if backbone.name.isidentifier() else None
    if graph is None:
        return None
    about = graph.about
    same = about["weights_sha256"] == backbone.weights_sha256
    prepared = about["preprocess"] == canonical_json(backbone.preprocess.to_json()).decode()
    layers = about["layers"].split(",")
    return graph if same and prepared and set(backbone.layers) <= set(layers) else None


def check_network(content: bytes, sha256: str | None = None) -> Graph:
    """A stranger's quantised network, of that hash if one is given; ValueError unless OpenVINO may be given it.

    OpenVINO's reader is not asked before every number of it lies inside the file, and every operation is one of its
    own published sets, so that none of them loads a library.
    """
    graph = Graph.parse(content)
    if graph is None or graph.sha256 != (sha256 or graph.sha256):
        raise ValueError("the quantised network is damaged")
    try:
        root = ElementTree.fromstring(graph.description)
    except ElementTree.ParseError as error:
        raise ValueError(f"the quantised network cannot be read ({error})") from error
    for layer in root.iter("layer"):
        if not re.fullmatch(r"opset\d{1,2}", layer.get("version", "")):
            raise ValueError(f"the quantised network has a foreign operation, {layer.get('type')!r:.40}")
        data = layer.find("data")
        if data is None or layer.get("type") != "Const":
            continue
        offset, size = (data.get(name, "") for name in ("offset", "size"))
        if not (re.fullmatch(r"\d{1,12}", offset) and re.fullmatch(r"\d{1,12}", size)):
            raise ValueError("a constant of the quantised network has no place")
        if int(offset) + int(size) > len(graph.constants):
            raise ValueError("a constant of the quantised network lies outside of it")
    return graph


def keep(graph: Graph, path: Path) -> None:
    """Write a graph to the cache; where that is impossible, warn."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(path, graph.content)
    except (OSError, FeatxError) as error:
        warnings.warn(
            f"cannot write to the cache folder {path.parent} ({error}); the network is converted anew at every "
            f"start. Set FEATX_CACHE to a folder that can be written to.",
            RuntimeWarning,
            stacklevel=4,
        )


def saved(model: Any) -> Graph:
    """A model of OpenVINO's as a graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.xml"
        import_openvino().save_model(model, path, compress_to_fp16=False)
        return Graph.of(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def _convert(backbone: Backbone, batch_size: int) -> tuple[int | None, Graph]:
    """The network's graph, and the size of its batches (None: any)."""
    for size in (None, batch_size):
        try:
            return size, _exported(backbone, size)
        except ModuleNotFoundError:  # torch is not installed
            raise
        except Exception as error:  # noqa: BLE001 - whatever torch and OpenVINO say of a network that looks at its input
            problem = error
    raise UsageError(
        "the network cannot be converted for OpenVINO",
        where=backbone.name,
        found=f"{type(problem).__name__}: {in_words(problem)}",
        hint="Use --engine torch.",
    ) from problem


def _exported(backbone: Backbone, batch_size: int | None) -> Graph:
    import torch

    openvino = import_openvino()
    height, width = backbone.preprocess.crop
    example = torch.zeros(batch_size or 2, 3, height, width)
    any_size = None if batch_size else ({0: torch.export.Dim("n", min=1, max=1 << 16)},)
    # Exported rather than traced: torch deprecates tracing, and warns of every shape that Python looks at.
    network = backbone.network()
    with torch.no_grad(), _not_in_place(network, example):
        model = openvino.convert_model(torch.export.export(network, (example,), dynamic_shapes=any_size))
    model.reshape([batch_size or -1, *example.shape[1:]])  # the input comes out without a shape
    if any(len(output.partial_shape) == 0 for output in model.outputs):
        raise ValueError("an output has no shape")
    step = openvino.preprocess.PrePostProcessor(model)
    step.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    step.input().model().set_layout(openvino.Layout("NCHW"))
    step.input().preprocess().convert_element_type(openvino.Type.f32).mean(
        [255 * value for value in backbone.preprocess.mean]
    ).scale([255 * value for value in backbone.preprocess.std])
    model = step.build()
    for output, layer in zip(model.outputs, backbone.layers, strict=True):
        output.get_tensor().set_names({layer})
    return saved(model)


@contextmanager
def _not_in_place(network: Any, example: Any) -> Iterator[None]:
    """Let activations make new tensors, if the network then computes the same.

    What writes into its input is taken apart into a dozen operations each, which takes half of the time of a
    conversion. A network may count on it, though: a sum may add what an activation has written over.
    """
    import torch

    modules = [module for module in network.modules() if getattr(module, "inplace", None) is True]
    images = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    before = network(images)
    try:
        for module in modules:
            module.inplace = False
        if not all(map(torch.equal, before, network(images))):
            for module in modules:
                module.inplace = True
        yield
    finally:
        for module in modules:
            module.inplace = True
