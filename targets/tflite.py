"""TFLite: one `.tflite` file per component, made by litert-torch and run by LiteRT's interpreter with XNNPACK.

Reading, counting and running need `ai-edge-litert` alone; torch and the converter are imported where a component
is lowered.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import DataError, GateError, RequestError
from edgesd.manifest import Downgrade, TensorSpec
from edgesd.targets import Capabilities, Coverage, Lowered, OpCount, _int8, _tflite_file, _tflite_gpu

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgesd.compress.quantplan import QuantPlan
    from edgesd.manifest import Axes, Manifest, Variant
    from edgesd.models.modules import Component
    from edgesd.runtime.session import Session
    from edgesd.targets._session import Call

name = "tflite"
extra = "litert"
lower_extra = "litert-export"
modules = ("ai_edge_litert",)
lower_modules = ("torch", "litert_torch", "ai_edge_quantizer")
capabilities = Capabilities(
    precisions=("fp32", "fp16", "int8", "hybrid", "w8"),
    max_file_bytes=(2 << 30) - 1,  # flatbuffer offsets are signed 32-bit numbers
    index_dtype="int32",
    layout="unfolded",
    forms=("", "gpu"),
    int8_outputs=("conv", "linear"),
)
form_status = {"gpu": "unverified"}  # measured on this processor; its own accelerator is in a phone

_WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "hybrid": 1, "w8": 1}


def check_plan(component_name: str, predicted_bytes: int, axes: Axes) -> None:
    """Refuses weights that one flatbuffer cannot hold, before any work.

    predicted_bytes: of the weights at `axes.precision`. Raises RequestError that names the precisions which would fit.
    """
    limit = capabilities.max_file_bytes
    if limit is None or predicted_bytes <= limit:
        return
    weights = predicted_bytes / _WEIGHT_BYTES[axes.precision]
    fits = [p for p in ("fp32", "fp16", "int8") if weights * _WEIGHT_BYTES[p] <= limit]
    raise RequestError(
        f"{component_name} in {axes.precision} needs {predicted_bytes / 2**30:.2f} GiB in one .tflite file",
        f"up to {limit / 2**30:.0f} GiB (the flatbuffer format)",
        f"Choose precision {' or '.join(fits)}" if fits else "Prune the model, or choose another target",
    )


def lower(
    component: Component, axes: Axes, directory: Path, *, plan: QuantPlan | None = None, **options: Any
) -> Lowered:
    """Writes `<component>.tflite` into `directory`. Takes no options.

    The file's signature carries the component's own input and output names; token ids are int32, everything else at
    the border is float32. fp16: weights are stored as float16 and dequantized by the runtime. int8, hybrid, w8: as
    `plan` says, but for int8 layers at the border (a downgrade: weight-only). Form "gpu": see docs/tflite.md. A failure
    leaves `directory` as it was.
    Raises RequestError (precision, form, size, plan), GateError (the converter, or the GPU delegate's rules, refuse an
    operation; less int8 than planned).
    """
    _check_request(axes, options)
    plan, lost = _int8.planned(component, axes, plan, capabilities)
    weights = sum(p.numel() for p in component.module.parameters())
    check_plan(component.name, weights * _WEIGHT_BYTES[axes.precision], axes)
    inputs = tuple(
        spec.model_copy(update={"dtype": "int32"}) if spec.dtype == "int64" else spec for spec in component.inputs
    )
    shaped = component
    if plan is not None:
        from edgesd.targets import _tflite_int8

        plan, border = _tflite_int8.without_border(component, plan)
        lost += border
        shaped = _tflite_int8.shaped(component, plan, capabilities.int8_outputs)
    file = Path(f"{component.name}.tflite")
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tflite-") as scratch:
        made = Path(scratch) / "float32.tflite"
        _convert(shaped, made, axes)
        if axes.precision == "fp16":
            made = _halve_weights(made, Path(scratch) / "float16.tflite", tables=axes.form != "gpu")
        _check_made(made, axes, inputs, component.outputs)
        if plan is not None:
            _int8.hold(component.name, _int8.expected(component, plan, 4), coverage(made))
        os.replace(made, directory / file)
    return Lowered((file,), inputs, tuple(component.outputs), (*lost, *_downgrades(component, axes)), plan=plan)


def _downgrades(component: Component, axes: Axes) -> tuple[Downgrade, ...]:
    if (axes.precision, axes.form) != ("fp16", "gpu") or not component.name.startswith("text_encoder"):
        return ()
    why = "the GPU delegate looks up in float32 tables only"
    return (Downgrade(component=component.name, what="embedding table kept in float32", why=why),)


def _check_request(axes: Axes, options: dict[str, Any]) -> None:
    wanted = (("precision", axes.precision, capabilities.precisions), ("form", axes.form, capabilities.forms))
    for what, value, allowed in wanted:
        if value not in allowed:
            raise RequestError(
                f"{what} {value!r} for target tflite", ", ".join(map(repr, allowed)), "Choose one of these"
            )
    if options:
        raise RequestError(f"option {min(options)!r} for target tflite", "no options", "Leave it out")


def _check_made(path: Path, axes: Axes, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Holds a finished file against what was asked for (GateError): a converter may fall back without a word."""
    operations = _tflite_file.read_operations(path)
    if axes.form == "gpu":
        _tflite_gpu.check(operations)
    if (wrong := _tflite_file.signature_fault(path, inputs, outputs)) is not None:
        raise GateError(
            f"the converter made a file with {wrong}",
            "the component's own names, shapes and types",
            "Report this as a bug",
        )


def _convert(component: Component, path: Path, axes: Axes) -> None:
    """Lowers as the module stands. Named arguments and a dictionary of results name the file's inputs and outputs."""
    import torch

    with contextlib.redirect_stdout(io.StringIO()):  # both packages print
        import litert_torch

        litert_torch.config.show_progress = False
        arguments = {
            spec.name: value.to(torch.int32) if spec.dtype == "int64" else value
            for spec, value in zip(component.inputs, component.example, strict=True)
        }
        try:
            with _layouts_kept(axes):
                made = litert_torch.convert(
                    _named(component, gpu=axes.form == "gpu"),
                    sample_kwargs=arguments,
                    quant_config=_integer_mode() if axes.precision in _int8.QUANTIZED else None,
                )
            made.export(str(path))
        except Exception as error:  # the converter raises whatever its passes raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise GateError(
                f"{component.name} does not lower to TFLite: {reason}",
                "operations litert-torch knows",
                "Choose another target for this model",
            ) from error


def _layouts_kept(axes: Axes) -> contextlib.AbstractContextManager[None]:
    if axes.precision not in _int8.QUANTIZED:
        return contextlib.nullcontext()
    from edgesd.targets import _tflite_int8

    return _tflite_int8.layouts_kept()


def _integer_mode() -> Any:
    """Switches the converter's integer pass on; without it, quantize/dequantize pairs silently stay float."""
    from litert_torch.quantize import pt2e_quantizer, quant_config

    static = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    return quant_config.QuantConfig(pt2e_quantizer=pt2e_quantizer.PT2EQuantizer().set_global(static))


def _named(component: Component, *, gpu: bool) -> torch.nn.Module:
    """The component's module with keyword inputs and a dictionary of outputs; the module itself is left as it is."""
    import torch

    input_names = [spec.name for spec in component.inputs]
    output_names = [spec.name for spec in component.outputs]

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.component = component.module

        def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            with _tflite_gpu.delegate_forms() if gpu else contextlib.nullcontext():
                made = self.component(*(inputs[key] for key in input_names))
            return dict(zip(output_names, made if isinstance(made, tuple) else (made,), strict=True))

    return Named().eval()


def _halve_weights(source: Path, target: Path, *, tables: bool) -> Path:
    """Stores convolution and linear weights as float16, a dequantize behind each; embedding tables too if `tables`."""
    with contextlib.redirect_stdout(io.StringIO()):
        from ai_edge_quantizer import qtyping, quantizer

        kinds = qtyping.TFLOperationName
        half = qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        )
        casting = quantizer.Quantizer(str(source))
        layers = (kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D, kinds.CONV_2D_TRANSPOSE, kinds.FULLY_CONNECTED)
        for kind in (*layers, kinds.EMBEDDING_LOOKUP) if tables else layers:
            casting.update_quantization_recipe(".*", kind, half, "float_casting")
        casting.quantize().export_model(str(target))
    return target


def open(directory: Path, manifest: Manifest, *, threads: int | None = None, **options: Any) -> Session:
    """The bundle in LiteRT's interpreter with XNNPACK. threads: per call, default all cores.

    Further options: `ComponentSession`. A component is mapped and its weights packed when it is first used.
    """
    from edgesd.targets._session import ComponentSession

    def open_variant(variant: Variant, files: tuple[Path, ...]) -> Call:
        return _interpret(files[0], variant, threads)

    return ComponentSession(directory, manifest, open_variant, **options)


def _interpret(path: Path, variant: Variant, threads: int | None) -> Call:
    from ai_edge_litert.interpreter import Interpreter

    count = os.cpu_count() if threads is None else threads
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=count)
        interpreter.allocate_tensors()  # packs weights and fails here, not in the first call
    except (ValueError, RuntimeError) as error:
        raise _tflite_file.broken(path, error) from None
    if (wrong := _tflite_file.signature_fault(path, variant.inputs, variant.outputs)) is not None:
        raise DataError(f"{path.name} has {wrong}", "what the manifest says of it", "Package the model again")
    signature = interpreter.get_signature_runner()

    def call(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return signature(**inputs)

    return call


def count_operations(path: Path) -> OpCount:
    """Operations by builtin name and dtype of their first output, read from the flatbuffer. Raises DataError."""
    operations = _tflite_file.read_operations(path)
    return OpCount(dict(Counter((op.name, op.outputs[0].dtype if op.outputs else "") for op in operations)))


def _itemsize(dtype: str) -> int:
    digits = "".join(filter(str.isdigit, dtype))
    return max(1, int(digits) // 8) if digits else 1


def coverage(path: Path) -> Coverage:
    """Integer layers by the types of their tensors. Raises DataError."""
    macs: Counter[str] = Counter()
    widened: dict[str, str] = {}  # what a DEQUANTIZE gives: the type it came from
    stored: dict[str, int] = {}
    for op in _tflite_file.read_operations(path):
        stored |= {x.name: math.prod(x.shape) * _itemsize(x.dtype) for x in op.inputs if x.constant}
        if op.name == "DEQUANTIZE" and op.inputs[0].constant:
            widened[op.outputs[0].name] = op.inputs[0].dtype
        if op.name in ("CONV_2D", "FULLY_CONNECTED"):
            x, weight = op.inputs[:2]
            if not weight.constant and weight.name not in widened:
                continue
            kept = widened.get(weight.name, weight.dtype)
            kind = "int8" if (x.dtype, weight.dtype) == ("int8", "int8") else "w8" if kept == "int8" else "floating"
            macs[kind] += math.prod(op.outputs[0].shape) * math.prod(weight.shape) // weight.shape[0]
    return Coverage(**macs, weight_bytes=sum(stored.values()))


def runtime_version() -> str:
    """What a manifest records, e.g. "ai-edge-litert 2.3.0"."""
    from importlib.metadata import version

    return f"ai-edge-litert {version('ai-edge-litert')}"
