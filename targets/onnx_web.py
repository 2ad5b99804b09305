"""onnx-web: ONNX files for ONNX Runtime in a browser (WASM, WebGPU); the same files run in onnxruntime on a desktop.

fp32 (form "wasm" or "webgpu") and fp16 (form "webgpu"): float16 weights and arithmetic between float32 borders. The
half is made in torch before export, not by rewriting the graph afterwards: the exporter then types every constant
itself, norms keep float32 sums, the timestep's sinusoids stay float32, and no pair of casts is left behind. On a
desktop processor onnxruntime computes most float16 operations in float32, so what is measured there says that the
float16 weights and the graph are right, not how a browser's adapter rounds.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import GateError, RequestError
from edgesd.targets import Capabilities, Lowered, OpCount
from edgesd.targets._quiet import quiet

if TYPE_CHECKING:
    import numpy as np

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
    precisions=("fp32", "fp16"),
    max_file_bytes=(1 << 31) - (1 << 20),  # protobuf's limit, and the largest buffer of a browser
    forms=("wasm", "webgpu"),
)

default_variants = (("fp32", "wasm"), ("fp16", "webgpu"))
form_status = {"webgpu": "unverified"}  # measured on this processor; its own adapter is in a browser

# A browser's 32-bit WebAssembly memory ends at 4 GiB. There the weights stand twice while a session is made (file and
# prepacked), so half is for them; with WebGPU they move on to the adapter's memory shard by shard.
MEMORY_BYTES = {"wasm": 2 << 30, "webgpu": 4 << 30}

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


def lower(component: Component, axes: Axes, directory: Path, **options: Any) -> Lowered:
    """Writes `<component>.onnx` and its weights beside it: `<component>.data`, or shards below the file limit.

    Takes no options. Raises RequestError for a precision or form it does not make ("" is the precision's usual form).
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
    component = replace(component, module=instance_norms(component.module))
    graph = _export(half(component) if axes.precision == "fp16" else component)
    _strip(graph)
    files = _save(graph, component.name, directory)
    return Lowered(files=files, inputs=component.inputs, outputs=component.outputs)


def forms(precision: str) -> tuple[str, ...]:
    """The forms a precision comes in, its usual one first. WASM processors have no float16 arithmetic."""
    return ("webgpu",) if precision == "fp16" else ("wasm", "webgpu")


def open(directory: Path, manifest: Manifest, *, threads: int | None = None, **options: Any) -> Session:
    """The bundle in desktop onnxruntime. threads: per call, default all cores. Further options: `ComponentSession`."""
    from edgesd.targets._session import ComponentSession

    def open_variant(variant: Variant, files: tuple[Path, ...]) -> Call:
        return _run_in_onnxruntime(files[0], [spec.name for spec in variant.outputs], threads)

    return ComponentSession(directory, manifest, open_variant, **options)


def count_operations(path: Path) -> OpCount:
    """Operations as onnxruntime runs them here, after its own fusions, by type and the precision of what they give.

    Needs the package onnx to read the optimised graph.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        settings = _settings(threads=1)
        settings.optimized_model_filepath = str(Path(scratch) / "optimised.onnx")
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        optimised = onnx.load(settings.optimized_model_filepath, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(optimised).graph  # names the types that onnxruntime left out
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output, *graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    counts: Counter[tuple[str, str]] = Counter()
    for node in graph.node:
        kind = next((types[value] for value in (*node.output, *node.input) if types.get(value)), onnx.TensorProto.FLOAT)
        counts[node.op_type, onnx.helper.tensor_dtype_to_np_dtype(kind).name] += 1
    return OpCount(dict(counts))


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
