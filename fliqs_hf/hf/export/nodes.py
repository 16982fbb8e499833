"""Writing nodes and constants into an ONNX graph, in front of a node that they are to replace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

#: ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"


class Writer:
    """Nodes are named after the layer that they are of, constants are shared by name."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.before: Any = None
        self.layer = ""
        self._count = 0
        self._constants: dict[tuple[str, bytes], Any] = {}

    def op(self, kind: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """The output of a new node, or a tuple of them. Numbers among the inputs become float32 scalars."""
        values = [self.constant(np.float32(x)) if isinstance(x, (int, float)) else x for x in inputs]
        node = onnx_ir.node(kind, values, attributes, domain=domain, num_outputs=outputs, name=self._name(kind))
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}_{index}"
        self.graph.insert_before(self.before, node)
        if domain == MICROSOFT:
            self.model.opset_imports[MICROSOFT] = 1
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, value: Any, name: str = "constant") -> Any:
        """A NumPy value as an initializer; small ones are written once."""
        array = np.asarray(value)
        key = (f"{array.dtype}{array.shape}", array.tobytes() if array.size <= 8 else f"{name}{id(value)}".encode())
        if key not in self._constants:
            self._constants[key] = self.tensor(onnx_ir.tensor(array), name)
        return self._constants[key]

    def tensor(self, tensor: Any, name: str) -> Any:
        """An `onnx_ir` tensor as an initializer."""
        base, count = name, 0
        while name in self.graph.initializers:
            count += 1
            name = f"{base}_{count}"
        tensor.name = name
        value = onnx_ir.val(name, const_value=tensor, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape)
        self.graph.register_initializer(value)
        return value

    def integers(self, *values: int) -> Any:
        return self.constant(np.array(values, dtype=np.int64))

    def replace(self, outputs: Sequence[Any], new: Any) -> None:
        """Let `new` be read wherever `outputs[0]` is."""
        old = outputs[0]
        new.type, new.shape = old.type, old.shape
        name, is_result = old.name, old.is_graph_output()
        onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if is_result:
            old.name, new.name = f"{name}_before", name

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self.layer}/{kind}_{self._count}"
