"""Networks as parts of an ONNX graph: from torch, or from the quantised graph that made the embeddings."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from featx.backbones import Backbone, Graph
from featx.errors import UsageError, not_installed
from featx.models.onnx.builder import OPSET, Builder

_ALIGNED = 1e-3
"""Of a step: how far from a step's end zero may lie for a range to be one of ONNX's, where it is exactly there."""

_TYPES: Mapping[str, Any] = {
    "f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32, "i8": np.int8, "u8": np.uint8,
}  # fmt: skip
_SAME = {
    "Add": "Add", "Subtract": "Sub", "Multiply": "Mul", "Divide": "Div", "Relu": "Relu", "ReLU": "Relu",
    "Sigmoid": "Sigmoid", "HSwish": "HardSwish", "Tanh": "Tanh", "Maximum": "Max", "Minimum": "Min",
}  # fmt: skip
"""Operators of OpenVINO that ONNX has under the same meaning, without attributes."""


def add_network(graph: Builder, pixels: str, views: int, backbone: Backbone, quantised: Graph | None) -> list[str]:
    """From pixels float32 (v, 3, h, w), 0 to 255, to embeddings (v, d) of each layer.

    Parameters
    ----------
    graph : to add to.
    pixels : name of the pixels.
    views : v.
    backbone : the network.
    quantised : its graph at eight bits, where that made the embeddings.

    Raises
    ------
    UsageError
        The network does not go into ONNX.
    """
    if quantised is not None:
        return _Converted(graph, quantised, pixels).outputs(backbone.layers)
    return graph.take(_from_torch(backbone, views), {"pixels": pixels}, "network/")


# --- from torch ---------------------------------------------------------------------------------------------------


def _from_torch(backbone: Backbone, views: int) -> Any:
    try:
        import onnxscript  # noqa: F401 - what torch exports with
    except ModuleNotFoundError as error:
        raise not_installed("onnxscript", "export") from error
    import torch

    network = backbone.network()
    mean, std = (
        torch.tensor(values).reshape(1, 3, 1, 1) for values in (backbone.preprocess.mean, backbone.preprocess.std)
    )

    class FromPixels(torch.nn.Module):
        """The network with its normalisation inside."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.network((pixels / 255.0 - mean) / std))

    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                FromPixels().eval(), (torch.zeros(views, 3, *backbone.preprocess.crop),), dynamo=True,
                opset_version=OPSET, input_names=["pixels"],
                output_names=[f"layer_{i}" for i in range(len(backbone.layers))], verbose=False, external_data=False,
            )  # fmt: skip
    except Exception as error:  # whatever torch says of a network that it cannot export
        raise UsageError(
            "the network does not go into ONNX",
            where=backbone.name,
            found=f"{type(error).__name__}: {error}".splitlines()[0][:200],
        ) from error
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints, and warns of about itself."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # That parts of it are deprecated, in words that change with its version: nothing that a user could do
            # about. All else is shown, and what comes out is compared with featx's answers.
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


# --- from a quantised graph of OpenVINO's -------------------------------------------------------------------------


class _Converted:
    """A graph of OpenVINO's, operator by operator, eight-bit numbers staying what they are.

    Only operators that networks for images at eight bits are made of are known; another one is an error that names it.
    """

    def __init__(self, graph: Builder, network: Graph, pixels: str) -> None:
        self.graph, self.network = graph, network
        root = ElementTree.fromstring(network.description)
        self.layers = {layer.get("id", ""): layer for layer in root.iter("layer")}
        self.sources: dict[str, list[str]] = {}
        self.uses: dict[str, int] = {}
        edges = sorted(root.iter("edge"), key=lambda edge: int(edge.get("to-port", "0")))
        for edge in edges:
            source = edge.get("from-layer", "")
            self.sources.setdefault(edge.get("to-layer", ""), []).append(source)
            self.uses[source] = self.uses.get(source, 0) + 1
        self.names: dict[str, str] = {}
        self.arrays: dict[str, NDArray[Any]] = {}
        self.pixels = graph.add("Transpose", pixels, perm=[0, 2, 3, 1])  # OpenVINO's input has the colours last
        for number in self.layers:
            self._convert(number)

    def outputs(self, layers: Sequence[str]) -> list[str]:
        """The names of what is computed for some layers."""
        by_layer = {
            name: number
            for number, layer in self.layers.items()
            for port in layer.iterfind("./output/port")
            for name in (port.get("names") or "").split(",")
        }
        return [self.names[by_layer[layer]] for layer in layers]

    def _data(self, layer: ElementTree.Element, name: str, default: str = "") -> str:
        data = layer.find("data")
        return default if data is None else data.get(name, default)

    def _integers(self, layer: ElementTree.Element, name: str) -> list[int]:
        return [int(value) for value in self._data(layer, name).split(",")]

    def _name(self, number: str) -> str:
        """What an operator computes; constants become part of the graph when they are first used."""
        if number not in self.names:
            array = self.arrays[number]
            self.names[number] = self.graph.constant(array, np.float32 if array.dtype == np.int8 else array.dtype)
        return self.names[number]

    def _convert(self, number: str) -> None:
        layer, sources = self.layers[number], self.sources.get(number, [])
        kind = layer.get("type", "")
        if kind in _SAME:
            self.names[number] = self._same(kind, sources)
            return
        make = getattr(self, f"_of_{kind.lower()}", None)
        if make is None:
            raise UsageError(
                "the quantised network does not go into ONNX",
                where=f"operator {kind}",
                hint="Fit a model on a store at --precision fp32.",
            )
        found = make(layer, number, sources)
        if found is not None:
            self.names[number] = found

    def _of_const(self, layer: ElementTree.Element, number: str, sources: list[str]) -> None:
        dtype = np.dtype(_TYPES[self._data(layer, "element_type")])
        start, size = int(self._data(layer, "offset")), int(self._data(layer, "size"))
        shape = [int(n) for n in self._data(layer, "shape").split(",") if n.strip()]
        content = self.network.constants[start : start + size]
        self.arrays[number] = np.frombuffer(content, dtype).reshape(shape)

    def _of_parameter(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        return self.pixels

    def _of_convert(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str | None:
        if sources[0] in self.arrays:  # for _weights, and for whoever else takes it
            array = self.arrays[sources[0]]
            self.arrays[number] = (
                array if array.dtype == np.int8 else array.astype(_TYPES[self._data(layer, "destination_type")])
            )
            return None
        return self._name(sources[0])  # pixels are floats already

    def _of_result(self, layer: ElementTree.Element, number: str, sources: list[str]) -> None:
        return None

    def _same(self, kind: str, sources: list[str]) -> str:
        if kind == "Multiply" and (weights := self._weights(sources)):
            return weights
        if kind == "Add" and (with_bias := self._bias(sources)):
            return with_bias
        return self.graph.add(_SAME[kind], *map(self._name, sources))

    def _weights(self, sources: list[str]) -> str | None:
        """Eight-bit weights, and what they are multiplied by: one number for each filter."""
        of = self.layers[sources[0]]
        if of.get("type") != "Convert" or self.arrays.get(sources[0], np.zeros(0)).dtype != np.int8:
            return None
        weights, scale = self.arrays[sources[0]], self.arrays[sources[1]]
        if weights.ndim == 5:  # of a group: (groups, filters of each, ...)
            scale = np.broadcast_to(scale, (*weights.shape[:2], 1, 1, 1))
            weights = weights.reshape(-1, *weights.shape[2:])
        steps = np.broadcast_to(scale.reshape(-1), (len(weights),)) if scale.size in (1, len(weights)) else None
        if steps is None:
            return None
        return self.graph.add(
            "DequantizeLinear", self.graph.constant(weights, np.int8), self.graph.constant(steps),
            self.graph.constant(np.zeros(len(weights)), np.int8), axis=0,
        )  # fmt: skip

    def _bias(self, sources: list[str]) -> str | None:
        """A convolution and the constant for each of its filters in one: runtimes join them only then."""
        convolution, bias = sources
        node = self.graph.nodes[-1]
        if node.op_type != "Conv" or len(node.input) != 2 or self.names.get(convolution) != node.output[0]:
            return None
        if (
            self.uses[convolution] != 1
            or bias not in self.arrays
            or self.arrays[bias].size != self._filters(convolution)
        ):
            return None
        node.input.append(self.graph.constant(self.arrays[bias].reshape(-1)))
        return str(node.output[0])

    def _filters(self, number: str) -> int:
        return int(self.layers[number].findtext("./output/port/dim[2]", "0"))

    def _of_convolution(self, layer: ElementTree.Element, number: str, sources: list[str], groups: int = 1) -> str:
        if self._data(layer, "auto_pad", "explicit") != "explicit":
            raise UsageError("the quantised network does not go into ONNX", where="padding of a convolution")
        pads = self._integers(layer, "pads_begin") + self._integers(layer, "pads_end")
        return self.graph.add(
            "Conv", *map(self._name, sources), group=groups, pads=pads, strides=self._integers(layer, "strides"),
            dilations=self._integers(layer, "dilations"),
        )  # fmt: skip

    def _of_groupconvolution(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        groups = int(self.layers[sources[1]].findtext("./output/port/dim[1]", "0"))
        return self._of_convolution(layer, number, sources, groups)

    def _of_clamp(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        low, high = (self.graph.constant(float(self._data(layer, name))) for name in ("min", "max"))
        return self.graph.add("Clip", self._name(sources[0]), low, high)

    def _of_fakequantize(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        values = self._name(sources[0])
        low, high, *out = (self.arrays[source].astype(np.float64) for source in sources[1:])
        if self._data(layer, "levels") != "256" or not all(map(np.array_equal, out, (low, high))):
            raise UsageError("the quantised network does not go into ONNX", where="a range of activations")
        step = (high - low) / 255
        zero = np.round(-low / step)
        if np.abs(-low / step - zero).max() > _ALIGNED or zero.min() < 0 or zero.max() > 255:
            raise UsageError("the quantised network does not go into ONNX", where="a range without a zero")
        shape = () if step.size == 1 else (-1,)
        steps = self.graph.constant(step.reshape(shape))
        zeros = self.graph.constant(zero.reshape(shape), np.uint8)
        axis = 1 if step.size == 1 else int(np.argmax(step.shape))
        levels = self.graph.add("QuantizeLinear", values, steps, zeros, axis=axis)
        return self.graph.add("DequantizeLinear", levels, steps, zeros, axis=axis)

    def _of_transpose(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        return self.graph.add("Transpose", self._name(sources[0]), perm=self.arrays[sources[1]].tolist())

    def _of_reshape(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        keeps = self._data(layer, "special_zero") == "true"
        return self.graph.add("Reshape", *map(self._name, sources), allowzero=int(not keeps))

    def _of_reducemean(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        keep = self._data(layer, "keep_dims") == "true"
        return self.graph.add("ReduceMean", *map(self._name, sources), keepdims=int(keep))

    def _of_concat(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        return self.graph.add("Concat", *map(self._name, sources), axis=int(self._data(layer, "axis")))

    def _of_matmul(self, layer: ElementTree.Element, number: str, sources: list[str]) -> str:
        turned = [self._data(layer, f"transpose_{side}") == "true" for side in "ab"]
        if turned[0]:
            raise UsageError("the quantised network does not go into ONNX", where="a product with a turned matrix")
        left, right = map(self._name, sources)
        return self.graph.add("MatMul", left, self.graph.add("Transpose", right, perm=[1, 0]) if turned[1] else right)
