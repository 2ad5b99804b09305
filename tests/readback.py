"""Scales as each target's file has them, with the vendors' own readers: what a plan is compared with.

Each function yields (integers [out, ...] in torch's layout, weight scales [out], (input scale, zero point) or None)
of every layer with int8 weights. Zero points are those of int8.
"""

import numpy as np


def onnx_web(path):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {value: node for node in model.graph.node for value in node.output}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul"):
            continue
        source = made_by.get(node.input[1])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        integers, scales = stored[source.input[0]], stored[source.input[1]]
        x = made_by.get(node.input[0])
        given = None
        if x is not None and x.op_type == "DequantizeLinear":
            given = float(stored[x.input[1]]), int(stored[x.input[2]]) - 128
        yield (integers.T if node.op_type == "MatMul" else integers), scales, given


def openvino(path):
    import openvino as ov

    def constant(output):
        return output.get_node().get_data()

    for op in ov.Core().read_model(path).get_ops():
        if op.get_type_name() not in ("Convolution", "MatMul"):
            continue
        scale = op.input_value(1).get_node()
        if scale.get_type_name() != "Multiply":
            continue
        integers = scale.input_value(0).get_node()  # a Convert
        x, given = op.input_value(0).get_node(), None
        while x.get_type_name() in ("Reshape", "Transpose"):
            x = x.input_value(0).get_node()
        if x.get_type_name() == "FakeQuantize":
            low, high = (float(constant(x.input_value(i)).ravel()[0]) for i in (1, 2))
            step = (high - low) / (x.get_attributes()["levels"] - 1)
            given = step, round(-128 - low / step)
        yield constant(integers.input_value(0)), constant(scale.input_value(1)).ravel(), given


def tflite(path):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # Without a delegate and its copies; weights stay as they are in the file.
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    reader = Interpreter(model_path=str(path), experimental_op_resolver_type=resolver)
    reader.allocate_tensors()
    tensors = {each["index"]: each for each in reader.get_tensor_details()}
    made_by = {index: op for op in reader._get_ops_details() for index in op["outputs"]}
    for op in reader._get_ops_details():
        if op["op_name"] not in ("CONV_2D", "FULLY_CONNECTED"):
            continue
        x, weight = tensors[op["inputs"][0]], tensors[op["inputs"][1]]
        if weight["index"] in made_by:  # a DEQUANTIZE
            weight = tensors[made_by[weight["index"]]["inputs"][0]]
        if weight["dtype"] is not np.int8:
            continue
        integers = reader.get_tensor(weight["index"])
        integers = integers.transpose(0, 3, 1, 2) if integers.ndim == 4 else integers
        grid = x["quantization_parameters"]
        given = (float(grid["scales"][0]), int(grid["zero_points"][0])) if x["dtype"] is np.int8 else None
        yield integers, weight["quantization_parameters"]["scales"], given


def coreml(path):
    from edgesd.targets.coreml.package import Package, folder_of

    operations = list(Package(folder_of(path)).operations())
    made_by = {name: op for op in operations for name, _ in op.results}

    def value(given):
        return given[0] if not isinstance(given[0], str) else made_by[given[0]].inputs["val"][0]

    for op in operations:
        if op.type not in ("conv", "linear"):
            continue
        weight = made_by.get(op.inputs["weight"][0])
        if weight is None or weight.type != "constexpr_affine_dequantize":
            continue
        x, given = made_by.get(op.inputs["x"][0]), None
        if x is not None and x.type == "dequantize":
            given = float(value(x.inputs["scale"])), int(value(x.inputs.get("zero_point", [np.int8(0)])))
        yield value(weight.inputs["quantized_data"]), value(weight.inputs["scale"]), given


READERS = {"onnx-web": onnx_web, "openvino": openvino, "tflite": tflite, "coreml": coreml}
