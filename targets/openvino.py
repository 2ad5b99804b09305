"""openvino: IR files (`.xml`, `.bin`) for OpenVINO on Intel processors, GPUs and NPUs. Static shapes: NPUs ask it.

fp16 halves the weights on disk; what the arithmetic is done in is the device's choice at run time, unless told. int8:
each planned layer has a FakeQuantize in front and an int8 weight, which the plugin turns into integer kernels; what
stays float is stored as float16.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import GateError, RequestError, SetupError
from edgesd.targets import Capabilities, Coverage, Lowered, OpCount, _int8
from edgesd.targets._memory import give_back
from edgesd.targets._openvino_graph import stored_weight
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

name = "openvino"
extra = "openvino"
modules = ("openvino",)
lower_modules = ("torch", "openvino")
capabilities = Capabilities(precisions=("fp16", "fp32", "int8", "hybrid", "w8"), layout="unfolded")

HINTS = ("f32", "native")


def lower(
    component: Component, axes: Axes, directory: Path, *, plan: QuantPlan | None = None, **options: Any
) -> Lowered:
    """Writes `<component>.xml` and `<component>.bin`. Takes no options.

    fp16: the weights are stored in float16 and widened at load where the device computes in float32. int8, hybrid, w8:
    as `plan` says; floats beside it in float16, scales in float32.
    Raises RequestError (precision, form, plan), GateError (the converter refuses an operation; less int8 than planned).
    """
    if options:
        raise RequestError(f"option {min(options)!r} for target {name}", "no options", "Leave it out")
    if axes.precision not in capabilities.precisions or axes.form:
        allowed = f"{', '.join(capabilities.precisions)}, no form"
        raise RequestError(f"{axes.precision} {axes.form} for target {name}", allowed, "Choose one of these")
    import openvino as ov

    plan, lost = _int8.planned(component, axes, plan, capabilities)
    graph, weights = Path(f"{component.name}.xml"), Path(f"{component.name}.bin")
    if plan is None:
        model = _convert(component)
    else:
        from edgesd.compress.quantize import quantized

        model = _convert(quantized(component, plan, "unfolded", capabilities.int8_outputs))
        _halve(model)
    ov.save_model(model, directory / graph, compress_to_fp16=axes.precision != "fp32")
    if plan is not None:
        del model  # a float copy of the weights
        _int8.hold(component.name, _int8.expected(component, plan, 2), coverage(directory / graph))
    return Lowered((graph, weights), component.inputs, component.outputs, lost, plan=plan)


def _halve(model: Any) -> None:
    """Weights that stay float to float16, widened at load: in a model with FakeQuantize, `save_model` leaves them."""
    import numpy as np
    import openvino as ov
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_output_element_type(0) != ov.Type.f32:
            continue
        readers = list(node.output(0).get_target_inputs())
        if not all(reader.get_node().get_type_name() in ("Gather", "Convolution", "MatMul") for reader in readers):
            continue
        if np.abs(node.data).max(initial=0.0) <= np.finfo(np.float16).max:
            half = opset13.convert(opset13.constant(node.data.astype(np.float16)), "f32")
            for reader in readers:
                reader.replace_source_output(half.output(0))


def open(
    directory: Path,
    manifest: Manifest,
    *,
    device: str = "CPU",
    hint: str | None = None,
    threads: int | None = None,
    cache_dir: Path | str | None = None,
    **options: Any,
) -> Session:
    """The bundle in OpenVINO.

    device: CPU, GPU, NPU (or GPU.1, …); SetupError where it is absent. hint: "f32" computes in float32 on every
    processor, so that pictures match the reference (default on the CPU); "native" is what the device is fastest in
    (bf16 or fp16, about 40 to 50 dB from float32; default elsewhere). threads: on the CPU. cache_dir: where compiled
    models are kept between runs. Further options: `ComponentSession`.
    """
    import openvino as ov

    from edgesd.targets._session import ComponentSession

    core = ov.Core()
    _check_device(core, device)
    hint = ("f32" if device == "CPU" else "native") if hint is None else hint
    if hint not in HINTS:
        raise RequestError(f"hint {hint!r}", ", ".join(HINTS), "Choose one of these")
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if hint == "f32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None and device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = threads
    if cache_dir is not None:
        settings["CACHE_DIR"] = str(cache_dir)

    def open_variant(variant: Variant, files: tuple[Path, ...]) -> Call:
        narrow = variant.axes.width < 1
        # A mapped file stays in memory as far as it was read, and a narrow graph may read the widest one's.
        core.set_property({"ENABLE_MMAP": not narrow})
        call = _run_in_openvino(core, files, device, settings, [spec.name for spec in variant.outputs])
        if narrow:
            give_back()
        return call

    return ComponentSession(directory, manifest, open_variant, **options)


def share_widths(wide: Path, narrow: Path, made: Path, corrections: Sequence[Correction] = ()) -> tuple[Path, ...]:
    """Writes `made` (beside `wide`) as the graph `narrow` on the weights of `wide`; the files it needs, it first.

    corrections: of the narrow width's int8 layers. Raises GateError where the two graphs differ in more than their
    widths, or the shared one computes less in integers.
    """
    from edgesd.targets._openvino_widths import share

    files = share(wide, narrow, made, corrections)
    if corrections:
        _int8.same(made.name, coverage(narrow), coverage(*files))
    return files


def count_operations(path: Path) -> OpCount:
    """Layers as the CPU plugin runs them with native precision, by type and run-time precision (f32, bf16, i8, …)."""
    import openvino as ov

    core = ov.Core()
    layers = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_NUM_THREADS": 1}).get_runtime_model()
    counts: Counter[tuple[str, str]] = Counter()
    for layer in layers.get_ops():
        facts = layer.get_rt_info()
        counts[facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)] += 1
    return OpCount({key: count for key, count in counts.items() if key[0] not in ("Input", "Output", "Const")})


def coverage(path: Path, weights: Path | None = None) -> Coverage:
    """Integer layers as the CPU plugin runs them with native precision; int8 weights as the file has them.

    weights: the .bin, where its name is not the .xml's.
    """
    import openvino as ov

    core, weights = ov.Core(), path.with_suffix(".bin") if weights is None else weights
    model = core.read_model(path, weights)
    layers = [found for op in model.get_ops() if (found := _layer(op)) is not None]
    whole, stored = sum(macs for macs, _ in layers), sum(macs for macs, is_int8 in layers if is_int8)
    integers = 0
    for ran in core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1}).get_runtime_model().get_ops():
        facts = ran.get_rt_info()
        kernel, precision = facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)
        if kernel in ("Convolution", "FullyConnected") and precision in ("i8", "u8"):
            weight = list(ran.input_value(1).get_shape())
            integers += math.prod(ran.get_output_shape(0)) * math.prod(weight) // weight[0]
    return Coverage(integers, stored - integers, whole - stored, weights.stat().st_size)


def _layer(op: Any) -> tuple[int, bool] | None:
    """(MACs, whether its weight is stored in int8) of a convolution or linear; None for anything else."""
    weight = stored_weight(op)
    if weight is None:
        return None
    shape, out = list(op.input_value(1).get_shape()), list(op.get_output_shape(0))
    channels = shape[0] if op.get_type_name() == "Convolution" else out[-1]
    return math.prod(out) * math.prod(shape) // channels, weight[1]


def runtime_version() -> str:
    import openvino as ov

    return f"openvino {ov.__version__}"


def devices() -> tuple[str, ...]:
    """The devices OpenVINO finds here, e.g. ("CPU", "GPU")."""
    import openvino as ov

    return tuple(ov.Core().available_devices)


def _check_device(core: Any, device: str) -> None:
    here = core.available_devices
    if device not in here and not any(found.startswith(f"{device}.") for found in here):
        do = f"Choose --device {here[0]}, or install the driver for {device}" if here else "Install openvino again"
        raise SetupError(f"device {device!r} is not here", ", ".join(here) or "no device found", do)


def _convert(component: Component) -> Any:
    """The component as an OpenVINO model with static shapes and edgesd's names. Raises GateError."""
    import openvino as ov
    import torch

    from edgesd.targets._session import reason

    try:
        with quiet("openvino"):
            model = ov.convert_model(torch.export.export(component.module, component.example, strict=False))
    except Exception as error:  # the converter raises whatever its passes raise
        came = f"OpenVINO cannot convert {component.name}: {reason(error)}"
        raise GateError(
            came, "operations of OpenVINO's PyTorch front end", "Choose another target, or report this"
        ) from error
    # The front end forgets the static shapes of an ExportedProgram; with them, its shape arithmetic folds away.
    pairs = list(zip(model.inputs, component.inputs, strict=True))
    model.reshape({port: list(spec.shape) for port, spec in pairs})
    for port, spec in (*pairs, *zip(model.outputs, component.outputs, strict=True)):
        port.set_names({spec.name})
        port.get_node().set_friendly_name(spec.name)
    model.validate_nodes_and_infer_types()
    return model


def _run_in_openvino(core: Any, files: tuple[Path, ...], device: str, settings: dict, outputs: list[str]) -> Call:
    model = core.read_model(files[0], files[1])
    request = core.compile_model(model, device, settings).create_infer_request()

    def call(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        request.infer(inputs, share_inputs=True)
        return {output: request.get_tensor(output).data for output in outputs}

    return call
