"""An exported ONNX graph's quantize/dequantize pairs, put as onnxruntime's integer kernels want them.

Activations become uint8: the same numbers, zero point and integers moved up by 128. That pairing (uint8 x int8) is the
one that every kernel library has; given int8 activations onnxruntime moves them itself on x86, and trips over the
exporter's `output_dtype` while it does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SHIFT = 128  # from int8 to uint8


def make_uint8(graph: Any) -> None:
    """Moves every quantized activation of an onnx_ir model from int8 to uint8, in place; weights stay int8.

    A zero point that the exporter left out, being 0, is put back.
    """
    import onnx_ir

    moved: dict[int, Any] = {}
    for node in list(graph.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.op_type == "QuantizeLinear":
            node.attributes.pop("output_dtype", None)  # the zero point says it
            node.outputs[0].dtype = onnx_ir.DataType.UINT8
        elif node.inputs[0].const_value is not None:
            continue  # a weight
        scale = node.inputs[1]
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        level = 0 if zero is None else int(zero.const_value.numpy())
        if level not in moved:
            value = onnx_ir.Value(name=f"zero_point_{level + SHIFT}", shape=onnx_ir.Shape(scale.shape))
            value.const_value = onnx_ir.tensor(np.full(tuple(scale.shape), level + SHIFT, np.uint8), name=value.name)
            value.dtype = onnx_ir.DataType.UINT8
            graph.graph.register_initializer(value)
            moved[level] = value
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, moved[level])
    for name, value in list(graph.graph.initializers.items()):
        if not value.uses():
            del graph.graph.initializers[name]


def make_integer_biases(graph: Any) -> None:
    """Stores the bias of every int8 linear as int32 in units of input scale times weight scale, in place.

    onnxruntime joins a product and a sum to one Gemm, and has an integer Gemm only where all three inputs are integers.
    """
    import onnx_ir

    for node in list(graph.graph):
        if node.op_type != "Add":
            continue
        product, bias = node.inputs[0].producer(), node.inputs[1]
        if product is None or product.op_type != "MatMul" or bias.const_value is None:
            continue
        sides = [value.producer() for value in product.inputs]
        if any(side is None or side.op_type != "DequantizeLinear" for side in sides):
            continue
        scales = (sides[0].inputs[1].const_value.numpy() * sides[1].inputs[1].const_value.numpy()).astype(np.float32)
        integers = np.rint(bias.const_value.numpy() / scales.astype(np.float64)).astype(np.int32)
        scale = onnx_ir.Value(name=f"{bias.name}_scale", shape=onnx_ir.Shape(scales.shape))
        scale.const_value, scale.dtype = onnx_ir.tensor(scales, name=scale.name), onnx_ir.DataType.FLOAT
        stored = onnx_ir.Value(name=f"{bias.name}_int32", shape=onnx_ir.Shape(integers.shape))
        stored.const_value, stored.dtype = onnx_ir.tensor(integers, name=stored.name), onnx_ir.DataType.INT32
        graph.graph.register_initializer(scale)
        graph.graph.register_initializer(stored)
        widened = onnx_ir.node("DequantizeLinear", [stored, scale], attributes={"axis": 0})
        widened.outputs[0].name = f"{bias.name}_dequantized"
        widened.outputs[0].shape, widened.outputs[0].dtype = bias.shape, onnx_ir.DataType.FLOAT
        graph.graph.insert_before(node, widened)
        node.replace_input_with(1, widened.outputs[0])
        if not bias.uses():
            del graph.graph.initializers[bias.name]
