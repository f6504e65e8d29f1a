"""An ONNX graph while it is written: nodes one behind the other, and the constants they read.

Rules: a node stands under the place of the layer it is of (`2.dense/MatMul`) and a parameter under its name in
model.safetensors (`2.dense.weight`), so that viewers show both under the names people know. Other constants are held
once, however many layers read them. onnx is an extra: the module is handed in, never imported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Graph:
    """`current` names the newest output, which the next node takes; a layer with branches sets it by hand."""

    def __init__(self, onnx: Any, first: str) -> None:
        self.onnx = onnx
        self.current = first
        self.place = "input"  # of the layer being written, "2.dense"; inside another "3.residual.0.linear"
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.constant_bytes = 0
        self._names: set[str] = set()
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, operator: str, *operands: np.ndarray | str, **attributes: Any) -> str:
        """A node that takes the newest output, then `operands`: arrays become constants, texts name outputs."""
        names = [operand if isinstance(operand, str) else self._constant(operand) for operand in operands]
        output = self._name(operator)
        node = self.onnx.helper.make_node(operator, [self.current, *names], [output], name=output, **attributes)
        self.nodes.append(node)
        self.current = output
        return output

    def parameter(self, name: str, values: np.ndarray) -> str:
        """A parameter of the layer being written, as an operand."""
        return self._store(f"{self.place}.{name}", values)

    def _constant(self, values: np.ndarray) -> str:
        """What a layer needs and nobody trains: shapes, axes, masks."""
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._shared:
            self._shared[key] = self._store(f"constant_{len(self._shared)}", values)
        return self._shared[key]

    def _store(self, name: str, values: np.ndarray) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.array(values, order="C"), name))
        self.constant_bytes += values.nbytes
        return name

    def _name(self, operator: str) -> str:
        """`2.gelu/Mul`, and `2.gelu/Mul_1` for the second of them."""
        name, count = f"{self.place}/{operator}", 0
        while name in self._names:
            count += 1
            name = f"{self.place}/{operator}_{count}"
        self._names.add(name)
        return name
