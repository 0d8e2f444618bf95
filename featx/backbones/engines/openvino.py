"""OpenVINO on the CPU: the network with its normalisation in one graph, uint8 pixels in, two requests at a time.

Converting a network from torch takes seconds, so the result is kept in the user's cache folder. A start that finds
it there imports no torch. The file's name is a hash of everything that decides its content; the file starts with the
hash of all the rest, and one that does not match is made again.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from featx._files import canonical_json, publish_bytes
from featx.backbones.backbone import Backbone
from featx.backbones.engines.base import EXACT_START, Batch, Embeddings, fill
from featx.backbones.hub import cache_folder
from featx.errors import FeatxError, UsageError

CACHE_VERSION = 2
_MAGIC = b"featx-ir"
_SEAL = struct.Struct("<8s32s")  # magic, sha256 of all that follows it
_LENGTH = struct.Struct("<Q")  # of the graph; then the graph, then the constants

REQUESTS = 2
"""Batches in work at once: while one ends and the next is filled, the other keeps the cores busy."""


class OpenVINOEngine:
    """The fast engine on a CPU.

    Parameters
    ----------
    backbone : the network to run.
    precision : "fp32" or "bf16"; a CPU without bf16 instructions emulates it, slowly.
    batch_size, threads : as in :func:`featx.backbones.engines.torch.make_engine`.
    """

    name = "openvino"
    device = "cpu"

    def __init__(self, backbone: Backbone, *, precision: str, batch_size: int, threads: int) -> None:
        core = import_openvino().Core()
        self.precision = precision
        self.batch_size = batch_size
        graph, constants = _cached_graph(backbone, batch_size)
        if precision == "bf16":
            graph = exact_start(graph)
        self._compiled: Any = core.compile_model(
            core.read_model(graph, constants),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": min(REQUESTS, threads),
            },
        )

    def embed(self, batches: Iterable[Batch]) -> Iterator[Embeddings]:
        """See :meth:`featx.backbones.engines.torch.Engine.embed`."""
        # Requests of this call's own: two threads can share an engine.
        requests = [self._compiled.create_infer_request() for _ in range(REQUESTS)]
        busy: deque[tuple[Any, int]] = deque()
        try:
            for number, batch in enumerate(batches):
                if len(busy) == REQUESTS:  # the oldest is the one that is reused next
                    yield _result(*busy.popleft())
                request = requests[number % REQUESTS]
                n = fill(request.get_input_tensor().data, batch)
                request.start_async()
                busy.append((request, n))
            while busy:
                yield _result(*busy.popleft())
        finally:
            for request, _ in busy:  # the caller stopped early: leave nothing running on freed memory
                request.wait()


def import_openvino() -> Any:
    """Import openvino without its telemetry.

    Importing it sends an event to a server unless its telemetry package is missing or a consent file says no. With
    the package hidden during the import, openvino takes its own empty replacement: nothing is sent or written.
    """
    if "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            del sys.modules["openvino_telemetry"]
        return openvino
    import openvino

    return openvino


def cache_file(backbone: Backbone, batch_size: int) -> Path:
    """The file that a converted network is kept in."""
    decides = {
        "cache_version": CACHE_VERSION,
        "batch_size": batch_size,
        "provenance": {**backbone.provenance(), "weights": None},  # the hash says which, wherever it came from
        "versions": {package: version(package) for package in ("openvino", "torch", "torchvision", "timm")},
    }
    key = hashlib.sha256(canonical_json(decides)).hexdigest()[:24]
    return cache_folder() / "openvino" / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', backbone.name)}-{key}.ir"


def exact_start(graph: bytes) -> bytes:
    """Mark the start of a network with depthwise convolutions to stay fp32 when the rest runs at bf16.

    See :data:`featx.backbones.engines.base.EXACT_START`. The mark is the one by which OpenVINO itself keeps layers
    precise; its CPU plugin honours it for bf16 too.
    """
    root = ElementTree.fromstring(graph)
    layers = root.findall("./layers/layer")
    convolutions = [i for i, layer in enumerate(layers) if layer.get("type") in ("Convolution", "GroupConvolution")]
    if not any(layer.get("type") == "GroupConvolution" for layer in layers):
        return graph
    for layer in layers[: convolutions[math.ceil(EXACT_START * len(convolutions))]]:
        if layer.get("type") in ("Parameter", "Const"):
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, info)
        ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    return bytes(ElementTree.tostring(root))


def _result(request: Any, n: int) -> Embeddings:
    request.wait()
    return tuple(np.array(output.data[:n], dtype=np.float32) for output in request.output_tensors)


def _cached_graph(backbone: Backbone, batch_size: int) -> tuple[bytes, bytes]:
    """The network as OpenVINO's graph (XML) and constants, from the cache or converted."""
    path = cache_file(backbone, batch_size)
    found = _read(path)
    if found is not None:
        return found
    graph, constants = _convert(backbone, batch_size)
    payload = _LENGTH.pack(len(graph)) + graph + constants
    seal = _SEAL.pack(_MAGIC, hashlib.sha256(payload).digest())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(path, seal + payload)
    except (OSError, FeatxError) as error:
        warnings.warn(
            f"cannot write to the cache folder {path.parent} ({error}); the network is converted anew at every "
            f"start. Set FEATX_CACHE to a folder that can be written to.",
            RuntimeWarning,
            stacklevel=4,
        )
    return graph, constants


def _read(path: Path) -> tuple[bytes, bytes] | None:
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    if len(content) < _SEAL.size + _LENGTH.size:
        return None
    magic, sha256 = _SEAL.unpack_from(content)
    payload = content[_SEAL.size :]
    if magic != _MAGIC or hashlib.sha256(payload).digest() != sha256:
        return None
    (length,) = _LENGTH.unpack_from(payload)
    graph = payload[_LENGTH.size :]
    return bytes(graph[:length]), bytes(graph[length:])


def _convert(backbone: Backbone, batch_size: int) -> tuple[bytes, bytes]:
    import torch

    openvino = import_openvino()
    height, width = backbone.preprocess.crop
    example = torch.zeros(batch_size, 3, height, width)
    # Exported rather than traced: torch deprecates tracing, and warns of every shape that Python looks at.
    network = backbone.network()
    try:
        with torch.no_grad():
            exported = torch.export.export(network, (example,))
        model = openvino.convert_model(exported)
    except Exception as error:  # whatever the two say of a network whose steps depend on its input
        raise UsageError(
            "the network cannot be converted for OpenVINO",
            where=backbone.name,
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if str(error)
            else type(error).__name__,
            hint="Use --engine torch.",
        ) from error
    model.reshape(list(example.shape))  # the input comes out without a shape
    step = openvino.preprocess.PrePostProcessor(model)
    step.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    step.input().model().set_layout(openvino.Layout("NCHW"))
    step.input().preprocess().convert_element_type(openvino.Type.f32).mean(
        [255 * value for value in backbone.preprocess.mean]
    ).scale([255 * value for value in backbone.preprocess.std])
    model = step.build()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()
