"""An ONNX graph under construction: operators are added one by one, each gives the name of what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featx.errors import not_installed

OPSET, IR_VERSION = 18, 9
"""What onnxruntime reads since its version 1.16."""


def import_onnx() -> Any:
    """The package, or UsageError where it is not installed."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise not_installed("onnx", "export") from error
    return onnx


class Builder:
    """Nodes and constants of a graph, each constant once.

    Floats are in single precision unless a constant says otherwise.
    """

    def __init__(self) -> None:
        self.onnx = import_onnx()
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def constant(self, value: ArrayLike, dtype: Any = np.float32) -> str:
        """The name of a constant."""
        array: NDArray[Any] = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = self.onnx.numpy_helper.from_array(
                np.ascontiguousarray(array).reshape(array.shape), name
            )
            self._known[key] = name
        return self._known[key]

    def integers(self, *values: int) -> str:
        """The name of a constant (n,) of int64."""
        return self.constant(values, np.int64)

    def add(self, operator: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Add a node; the name of what it computes, or of the first of several ``outputs``."""
        name = name or f"{operator.lower()}_{len(self.nodes)}"
        names = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), names, **attributes))
        return name

    def take(self, model: Any, inputs: Mapping[str, str], prefix: str) -> list[str]:
        """Add another model's graph, whose inputs are what ``inputs`` names; the names of its outputs."""
        model = self.onnx.compose.add_prefix(model, prefix)
        renamed = {prefix + theirs: ours for theirs, ours in inputs.items()}
        for tensor in model.graph.initializer:
            self.constants[tensor.name] = tensor
        for node in model.graph.node:
            for i, given in enumerate(node.input):
                node.input[i] = renamed.get(given, given)
            self.nodes.append(node)
        return [output.name for output in model.graph.output]

    def model(
        self,
        inputs: Mapping[str, tuple[Any, Sequence[int | str]]],
        outputs: Mapping[str, tuple[Any, Sequence[int | str]]],
        about: Mapping[str, str],
        *,
        opset: int = OPSET,
        ir_version: int = IR_VERSION,
    ) -> bytes:
        """The file's content: of inputs and outputs NumPy's type and shape, and what ``about`` says in its metadata."""
        helper = self.onnx.helper

        def values(named: Mapping[str, tuple[Any, Sequence[int | str]]]) -> list[Any]:
            return [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
                for name, (dtype, shape) in named.items()
            ]

        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes, "featx", values(inputs), values(outputs),
            [tensor for name, tensor in self.constants.items() if name in used],
        )  # fmt: skip
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version, producer_name="featx"
        )
        helper.set_model_props(model, dict(about))
        self.onnx.checker.check_model(model)
        data: bytes = model.SerializeToString()
        return data
