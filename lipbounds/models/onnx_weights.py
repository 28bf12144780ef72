"""The weights in an ONNX file under the names they had in PyTorch. The file is data: nothing in it is run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lipbounds.errors import InvalidInput, LipboundsError


def read_onnx_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The initializers of an ONNX graph: those with names of parameters, and the constants that are left.

    An exporter keeps the names of biases, and renames the matrices of linear layers, transposed, to numbers. A matrix
    gets its name back from the bias that is added to its product: `encoder.query.bias` makes it `encoder.query.weight`,
    transposed back.

    Args:
        path: of the file.

    Returns:
        The parameters by name, and the constants by the name of the only operation that reads them.

    Raises:
        LipboundsError: the package `onnx` is not installed.
        InvalidInput: the file is no ONNX model.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise LipboundsError(
            "an ONNX file needs the package onnx, which is not installed; run `pip install onnx`."
        ) from error
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf has errors of its own
        raise InvalidInput(f"'{path}' must be an ONNX model, but it cannot be read.") from error
    values = {one.name: torch.from_numpy(np.array(numpy_helper.to_array(one))) for one in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    named = dict[str, Tensor]()
    taken = set[str]()
    for node in graph.node:
        for bias, product in (node.input, node.input[::-1]) if node.op_type == "Add" and len(node.input) == 2 else ():
            matrix = products.get(product, "")
            if bias.endswith(".bias") and bias in values and matrix in values:
                named[bias.removesuffix("bias") + "weight"] = values[matrix].mT.contiguous()
                taken.add(matrix)
    left = {name: value for name, value in values.items() if name not in taken}
    constants = {name: value for name, value in left.items() if "::" in name}
    named |= {name: value for name, value in left.items() if "::" not in name}
    readers: dict[str, list[str]] = {name: [] for name in constants}
    for node in graph.node:
        for name in node.input:
            if name in readers:
                readers[name].append(node.name)
    return named, {read[0]: constants[name] for name, read in readers.items() if len(read) == 1}
