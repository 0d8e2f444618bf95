"""OpenVINO on the CPU: the network with its normalisation in one graph, uint8 pixels in, two requests at a time."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from featx.backbones.backbone import Backbone
from featx.backbones.engines.base import EXACT_START, Batch, Embeddings, Engine, fill, laid_out, sizes_of
from featx.backbones.engines.graph import Graph, add_maps, carried, converted, import_openvino, quantised

REQUESTS = 2
"""Batches in work at once: while one ends and the next is filled, the other keeps the cores busy."""

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""What OpenVINO is to compute what is not quantised in."""


class OpenVINOEngine(Engine):
    """The fast engine on a CPU.

    Parameters
    ----------
    backbone : the network to run.
    precision : "fp32", "bf16" or "int8"; a CPU without instructions for it emulates them, slowly.
    batch_size, threads, pad, network : as in :func:`featx.backbones.engines.choice.make_engine`.
    """

    name = "openvino"
    device = "cpu"

    def __init__(
        self,
        backbone: Backbone,
        *,
        precision: str,
        batch_size: int,
        threads: int,
        pad: bool = True,
        network: bytes | None = None,
    ) -> None:
        self.precision = precision
        self.batch_size = batch_size
        self._layers, self._threads = backbone.layers, threads
        if precision == "int8":
            self._graph = quantised(backbone, network)
            self.quantised_sha256 = self._graph.sha256
        else:
            self._graph = (Graph.parse(network) if network else None) or converted(backbone, batch_size)
        own = carried(backbone) if precision == "int8" else None
        self.graph_sha256 = self._graph.sha256
        self.network_to_keep = b"" if own and own.sha256 == self._graph.sha256 else self._graph.content
        if precision == "bf16":
            self._graph = Graph.of(exact_start(self._graph.description), self._graph.constants)
        self._sizes = sizes_of(batch_size, pad=pad or not self._graph.takes_any_number)
        self._compiled: dict[int, Any] = {}
        self._with_maps: tuple[Any, list[str]] | None = None
        self._adding_maps = threading.Lock()
        self._compiling = threading.Lock()
        if pad:
            self._network(1)

    def embed(self, batches: Iterable[Batch]) -> Iterator[Embeddings]:
        """See :meth:`featx.backbones.engines.base.Engine.embed`."""
        # Requests of this call's own: two threads can share an engine.
        free: dict[int, deque[Any]] = {}
        busy: deque[tuple[Any, int, int]] = deque()
        try:
            for batch in batches:
                if len(busy) == REQUESTS:
                    yield _result(busy, free)
                size, network = self._network(len(batch))
                idle = free.setdefault(size, deque())
                request = idle.popleft() if idle else network.create_infer_request()
                n = fill(request.get_input_tensor().data, batch)
                request.start_async()
                busy.append((request, n, size))
            while busy:
                yield _result(busy, free)
        finally:
            for request, _, _ in busy:  # the caller stopped early: leave nothing running on freed memory
                request.wait()

    def maps(self, batch: Batch) -> list[tuple[NDArray[np.float32], list[NDArray[np.float32]]]]:
        """See :func:`featx.backbones.engines.base.feature_maps`: each layer's embeddings, and the map they are from."""
        with self._adding_maps:  # another lock: whoever embeds does not wait for it
            if self._with_maps is None:
                model = self._graph.model(self._layers)
                places = add_maps(model)
                self._with_maps = self._compile(1, model), places
        network, places = self._with_maps
        request, runs = network.create_infer_request(), []
        for picture in batch:
            fill(request.get_input_tensor().data, picture[None])
            request.infer()
            runs.append([np.array(output.data, dtype=np.float32) for output in request.output_tensors])
        outputs = [np.concatenate(each) for each in zip(*runs, strict=True)]
        further = iter(outputs[len(places) :])
        return [
            (embedding, [laid_out(next(further), place)] if place else [])
            for embedding, place in zip(outputs, places, strict=False)
        ]

    def _network(self, n: int) -> tuple[int, Any]:
        """The smallest size of batches that ``n`` images fit into, and the network compiled for it."""
        size = next((size for size in self._sizes if size >= n), self.batch_size)
        with self._compiling:
            if size not in self._compiled:
                self._compiled[size] = self._compile(size)
            return size, self._compiled[size]

    def _compile(self, size: int, model: Any = None) -> Any:
        model = model or self._graph.model(self._layers)
        model.reshape([size, *list(model.inputs[0].partial_shape)[1:]])
        if self.precision != "bf16":
            _without_amx()
        core = import_openvino().Core()
        return core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
                "INFERENCE_NUM_THREADS": self._threads,
                # A batch that is alone gets all threads; two full ones get half of them each, which wastes less.
                "NUM_STREAMS": min(REQUESTS, self._threads) if size == self.batch_size else 1,
            },
        )


@cache
def _without_amx() -> None:
    """Keep this process from AMX instructions, if nothing has been compiled in it yet.

    The kernels that use them round eight-bit networks differently (cosine 0.9992 at worst over 600 photos; without them
    all x86 CPUs give the same numbers), and were slower: 340 photos per second of CPU time against 470. bf16 is faster
    with them. oneDNN reads the variable once for each process, when it is first used.
    """
    name = "ONEDNN_MAX_CPU_ISA"
    if name in os.environ:  # the user's choice
        return
    openvino = import_openvino()
    pixel = openvino.opset13.parameter([1, 1], openvino.Type.f32)
    os.environ[name] = "AVX512_CORE_FP16"
    try:
        openvino.Core().compile_model(openvino.Model([openvino.opset13.relu(pixel)], [pixel]), "CPU")
    finally:
        os.environ.pop(name, None)  # not for the processes that this one starts


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


def _result(busy: deque[tuple[Any, int, int]], free: dict[int, deque[Any]]) -> Embeddings:
    """The embeddings of the oldest batch, whose request is free then."""
    request, n, size = busy.popleft()
    request.wait()
    embeddings = tuple(np.array(output.data[:n], dtype=np.float32) for output in request.output_tensors)
    free[size].append(request)
    return embeddings
