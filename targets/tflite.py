"""TFLite: one `.tflite` file per component, made by litert-torch and run by LiteRT's interpreter with XNNPACK.

Reading, counting and running need `ai-edge-litert` alone; torch and the converter are imported where a component
is lowered.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import DataError, GateError, RequestError
from edgesd.manifest import Downgrade, TensorSpec
from edgesd.targets import Capabilities, Lowered, OpCount, _tflite_file, _tflite_gpu

if TYPE_CHECKING:
    import numpy as np
    import torch

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
    precisions=("fp32", "fp16", "int8"),
    max_file_bytes=(2 << 30) - 1,  # flatbuffer offsets are signed 32-bit numbers
    index_dtype="int32",
    layout="unfolded",
    forms=("", "gpu"),
)
form_status = {"gpu": "unverified"}  # measured on this processor; its own accelerator is in a phone

_WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def check_plan(component_name: str, predicted_bytes: int, axes: Axes) -> None:
    """Refuses weights that one flatbuffer cannot hold, before any work.

    predicted_bytes: of the weights at `axes.precision`. Raises RequestError that names the precisions which would fit.
    """
    limit = capabilities.max_file_bytes
    if limit is None or predicted_bytes <= limit:
        return
    weights = predicted_bytes / _WEIGHT_BYTES[axes.precision]
    fits = [precision for precision, each in _WEIGHT_BYTES.items() if weights * each <= limit]
    raise RequestError(
        f"{component_name} in {axes.precision} needs {predicted_bytes / 2**30:.2f} GiB in one .tflite file",
        f"up to {limit / 2**30:.0f} GiB (the flatbuffer format)",
        f"Choose precision {' or '.join(fits)}" if fits else "Prune the model, or choose another target",
    )


def lower(component: Component, axes: Axes, directory: Path, **options: Any) -> Lowered:
    """Writes `<component>.tflite` into `directory`. Takes no options.

    The file's signature carries the component's own input and output names; token ids are int32, everything else at
    the border is float32. fp16: weights are stored as float16 and dequantized by the runtime. int8: the module holds
    quantize/dequantize pairs around input, weight (not folded) and output of each int8 layer, and they become integer
    operations. Form "gpu": see docs/tflite.md. A failure leaves `directory` as it was.
    Raises RequestError (precision, form, size), GateError (the converter, or the GPU delegate's rules, refuse an
    operation).
    """
    _check_request(axes, options)
    weights = sum(p.numel() for p in component.module.parameters())
    check_plan(component.name, weights * _WEIGHT_BYTES[axes.precision], axes)
    inputs = tuple(
        spec.model_copy(update={"dtype": "int32"}) if spec.dtype == "int64" else spec for spec in component.inputs
    )
    file = Path(f"{component.name}.tflite")
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tflite-") as scratch:
        made = Path(scratch) / "float32.tflite"
        _convert(component, made, axes)
        if axes.precision == "fp16":
            made = _halve_weights(made, Path(scratch) / "float16.tflite", tables=axes.form != "gpu")
        _check_made(made, axes, inputs, component.outputs)
        os.replace(made, directory / file)
    return Lowered((file,), inputs, tuple(component.outputs), _downgrades(component, axes))


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
    integer = any(op.name in ("CONV_2D", "FULLY_CONNECTED") and op.outputs[0].dtype == "int8" for op in operations)
    if axes.precision == "int8" and not integer:
        raise GateError(
            f"{path.stem} has no int8 convolution or linear operation",
            "quantize/dequantize pairs on input, weight and output of a layer",
            "Quantize the component in the unfolded layout before lowering it",
        )
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
            made = litert_torch.convert(
                _named(component, gpu=axes.form == "gpu"),
                sample_kwargs=arguments,
                quant_config=_integer_mode() if axes.precision == "int8" else None,
            )
            made.export(str(path))
        except Exception as error:  # the converter raises whatever its passes raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise GateError(
                f"{component.name} does not lower to TFLite: {reason}",
                "operations litert-torch knows",
                "Choose another target for this model",
            ) from error


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


def runtime_version() -> str:
    """What a manifest records, e.g. "ai-edge-litert 2.3.0"."""
    from importlib.metadata import version

    return f"ai-edge-litert {version('ai-edge-litert')}"
