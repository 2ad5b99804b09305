"""onnx-web: ONNX files for ONNX Runtime in a browser (WASM, WebGPU); the same files run in onnxruntime on a desktop.

fp32 (form "wasm" or "webgpu") and fp16 (form "webgpu"): float16 weights and arithmetic between float32 borders. The
half is made in torch before export, not by rewriting the graph afterwards: the exporter then types every constant
itself, norms keep float32 sums, the timestep's sinusoids stay float32, and no pair of casts is left behind. On a
desktop processor onnxruntime computes most float16 operations in float32, so what is measured there says that the
float16 weights and the graph are right, not how a browser's adapter rounds.

int8, hybrid and w8 (form "wasm"): int8 weights behind DequantizeLinear, uint8 activations between QuantizeLinear and
DequantizeLinear, which onnxruntime fuses with the layer behind them into one integer kernel. A convolution has such a
kernel only where its output is quantized too; a linear keeps its float output.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import GateError, RequestError
from edgesd.targets import Capabilities, Coverage, Lowered, OpCount, _int8, _qdq
from edgesd.targets._memory import give_back
from edgesd.targets._quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from edgesd.compress.inherit import Correction
    from edgesd.compress.quantplan import QuantPlan
    from edgesd.manifest import Axes, Manifest, Variant
    from edgesd.models.modules import Component
    from edgesd.runtime.session import Session
    from edgesd.targets._session import Call

name = "onnx-web"
extra = "onnx"
lower_extra = "onnx-export"
modules = ("onnxruntime",)
lower_modules = ("torch", "onnx", "onnxscript")
capabilities = Capabilities(
    precisions=("fp32", "fp16", "int8", "hybrid", "w8"),
    max_file_bytes=(1 << 31) - (1 << 20),  # protobuf's limit, and the largest buffer of a browser
    forms=("wasm", "webgpu"),
    int8_outputs=("conv",),
)

default_variants = (("fp32", "wasm"), ("fp16", "webgpu"))
int8_variants = (("int8", "wasm"), ("fp16", "webgpu"))  # a page loads one of them; WebGPU has no integer convolutions
form_status = {"webgpu": "unverified"}  # measured on this processor; its own adapter is in a browser

# A browser's 32-bit WebAssembly memory ends at 4 GiB. There the weights stand twice while a session is made (file and
# prepacked), so half is for them; with WebGPU they move on to the adapter's memory shard by shard.
MEMORY_BYTES = {"wasm": 2 << 30, "webgpu": 4 << 30}

# onnxruntime's integer kernels; a weight among the inputs of one is computed with as it is stored.
_INTEGER = ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm")
_WIDENING = ("DequantizeLinear", "Transpose", "Cast")  # between a stored weight and the product that takes it

OPSET = 21
IR_VERSION = 10  # of opset 21; runtimes refuse versions newer than themselves


def check_plan(component_name: str, predicted_bytes: int, axes: Axes) -> None:
    """Refuses what no browser can load, before any work. Raises RequestError that says what would fit."""
    form = axes.form if axes.form else forms(axes.precision)[0]
    if predicted_bytes > MEMORY_BYTES[form]:
        halved = predicted_bytes // (2 if axes.precision == "fp32" else 1)
        fits = "--precision fp16 (WebGPU)" if halved <= MEMORY_BYTES["webgpu"] else "a smaller model"
        came = f"{component_name} in {axes.precision} for {form} has {predicted_bytes / 2**30:.1f} GiB of weights"
        raise RequestError(came, f"up to {MEMORY_BYTES[form] >> 30} GiB in a browser's 32-bit memory", f"Choose {fits}")


def lower(
    component: Component, axes: Axes, directory: Path, *, plan: QuantPlan | None = None, **options: Any
) -> Lowered:
    """Writes `<component>.onnx` and its weights beside it: `<component>.data`, or shards below the file limit.

    Takes no options. Raises RequestError for a precision or form it does not make ("" is the precision's usual form) or
    one without its plan, GateError (the exporter refuses an operation; less int8 than planned).
    """
    if options:
        raise RequestError(f"option {min(options)!r} for target {name}", "no options", "Leave it out")
    if axes.precision not in capabilities.precisions or axes.form not in ("", *forms(axes.precision)):
        allowed = "; ".join(f"{p} for {' or '.join(forms(p))}" for p in capabilities.precisions)
        raise RequestError(f"{axes.precision} for {axes.form!r} with target {name}", allowed, "Choose one of these")
    from edgesd.models.modules import half
    from edgesd.models.plain import instance_norms

    # ONNX Runtime has no GroupNormalization kernel for browsers: it expands each into 25 operations, shape arithmetic
    # and all. Its InstanceNormalization is one kernel on WASM and on WebGPU.
    plan, lost = _int8.planned(component, axes, plan, capabilities)
    shaped = component
    if plan is not None:
        from edgesd.compress.quantize import quantized

        shaped = quantized(component, plan, "folded", capabilities.int8_outputs, linear_form="matmul")
    elif axes.precision == "fp16":
        shaped = half(component)
    graph = _export(replace(shaped, module=instance_norms(shaped.module)))
    if plan is not None:
        _qdq.make_uint8(graph)
        _qdq.make_integer_biases(graph)
    _strip(graph)
    files = _save(graph, component.name, directory)
    if plan is not None:
        _int8.hold(component.name, _int8.expected(component, plan, 4), coverage(directory / files[0]))
    return Lowered(files, component.inputs, component.outputs, lost, plan=plan)


def share_widths(wide: Path, narrow: Path, made: Path, corrections: Sequence[Correction] = ()) -> tuple[Path, ...]:
    """Writes `made` (beside `wide`) as the graph `narrow` on the weights of `wide`; the files it needs, it first.

    corrections: of the narrow width's int8 layers. Raises GateError where the two graphs differ in more than their
    widths, or the shared one computes less in integers.
    """
    from edgesd.targets._onnx_widths import share

    files = share(wide, narrow, made, corrections)
    if corrections:
        _int8.same(made.name, coverage(narrow), coverage(made))
    return files


def forms(precision: str) -> tuple[str, ...]:
    """The forms a precision comes in, its usual one first. WASM processors have no float16 arithmetic."""
    if precision in _int8.QUANTIZED:
        return ("wasm",)  # WebGPU has no integer convolutions
    return ("webgpu",) if precision == "fp16" else ("wasm", "webgpu")


def open(directory: Path, manifest: Manifest, *, threads: int | None = None, **options: Any) -> Session:
    """The bundle in desktop onnxruntime. threads: per call, default all cores. Further options: `ComponentSession`."""
    from edgesd.targets._session import ComponentSession

    def open_variant(variant: Variant, files: tuple[Path, ...]) -> Call:
        call = _run_in_onnxruntime(files[0], [spec.name for spec in variant.outputs], threads)
        if variant.axes.width < 1:
            give_back()
        return call

    return ComponentSession(directory, manifest, open_variant, **options)


def count_operations(path: Path) -> OpCount:
    """Operations as onnxruntime runs them here, after its own fusions, by type and the precision of what they give.

    Needs the package onnx to read the optimised graph.
    """
    import onnx

    graph = onnx.shape_inference.infer_shapes(_optimised(path)).graph  # names the types that onnxruntime left out
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output, *graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    counts: Counter[tuple[str, str]] = Counter()
    for node in graph.node:
        kind = next((types[value] for value in (*node.output, *node.input) if types.get(value)), onnx.TensorProto.FLOAT)
        counts[node.op_type, onnx.helper.tensor_dtype_to_np_dtype(kind).name] += 1
    return OpCount(dict(counts))


def coverage(path: Path) -> Coverage:
    """Integer kernels as onnxruntime's optimised graph has them, weights and MACs as the file has them."""
    import onnx

    int8 = onnx.TensorProto.INT8
    integers = {name for node in _optimised(path).graph.node if node.op_type in _INTEGER for name in node.input}
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    values = (*graph.value_info, *graph.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    constant: set[str] = set()  # stored, or made of what is: a narrow width's weights are cut as a graph loads
    for tensor in graph.initializer:
        shapes[tensor.name], types[tensor.name] = list(tensor.dims), tensor.data_type
        constant.add(tensor.name)
    made_by: dict[str, Any] = {}
    macs: Counter[str] = Counter()
    for node in graph.node:
        made_by |= dict.fromkeys(node.output, node)
        if constant.issuperset(node.input):
            constant.update(node.output)
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.input[1] not in constant:
            continue
        source = node.input[1]
        while types[source] != int8 and getattr(made_by.get(source), "op_type", "") in _WIDENING:
            source = made_by[source].input[0]
        shape, out = shapes[source], shapes[node.output[0]]
        channels = shape[0] if node.op_type == "Conv" else out[-1]
        kind = "int8" if source in integers else "w8" if types[source] == int8 else "floating"
        macs[kind] += math.prod(out) * math.prod(shape) // channels
    sizes = (math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in graph.initializer)
    return Coverage(**macs, weight_bytes=sum(sizes))


def _optimised(path: Path) -> Any:
    """The graph as onnxruntime runs it here; its weights are left aside."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        settings = _settings(threads=1)
        settings.optimized_model_filepath = str(Path(scratch) / "optimised.onnx")
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        return onnx.load(settings.optimized_model_filepath, load_external_data=False)


def runtime_version() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def _export(component: Component) -> Any:
    """The component as an onnx_ir model with static shapes. Raises GateError where ONNX lacks an operation."""
    import torch

    from edgesd.targets._session import reason

    try:
        with quiet("torch.onnx"):
            return torch.onnx.export(
                component.module,
                component.example,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in component.inputs],
                output_names=[spec.name for spec in component.outputs],
                verbose=False,
            ).model
    except torch.onnx.OnnxExporterError as error:
        came = f"torch.onnx cannot export {component.name}: {reason(error)}"
        raise GateError(came, f"operations of opset {OPSET}", "Choose another target, or report this") from error


def _strip(graph: Any) -> None:
    """Takes out what the exporter notes about itself: source paths and stack traces, which would ship in the bundle."""
    graph.ir_version = IR_VERSION
    graph.doc_string = graph.graph.doc_string = None
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()


def _save(graph: Any, stem: str, directory: Path) -> tuple[Path, ...]:
    """Writes graph and weights; returns their names, the graph first."""
    import onnx_ir

    limit = capabilities.max_file_bytes
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    shard = limit if weights > limit else None  # one plain file name where one file will do
    for stale in (directory / f"{stem}.data", *directory.glob(f"{stem}-*-of-*.data")):
        stale.unlink(missing_ok=True)
    onnx_ir.save(graph, directory / f"{stem}.onnx", external_data=f"{stem}.data", max_shard_size_bytes=shard)
    written = (Path(f"{stem}.data"), *(Path(p.name) for p in sorted(directory.glob(f"{stem}-*-of-*.data"))))
    return (Path(f"{stem}.onnx"), *(file for file in written if (directory / file).exists()))


def _settings(threads: int | None) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.inter_op_num_threads = 1
    if threads is not None:
        settings.intra_op_num_threads = threads
    return settings


def _run_in_onnxruntime(path: Path, outputs: list[str], threads: int | None) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), _settings(threads), providers=["CPUExecutionProvider"])

    def call(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(outputs, inputs), strict=True))

    return call
