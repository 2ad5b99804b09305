"""Core ML: a .mlpackage (ML program) per component for iOS 17 and macOS 14 or later.

Made anywhere. Opened by Core ML itself on macOS ("executed"), elsewhere by an interpreter that runs the saved program
operation by operation ("interpreted"): docs/coreml.md. The modules beside this one import torch; this one does not.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import DataError, RequestError
from edgesd.targets import Capabilities, Coverage, Lowered, OpCount, _int8

if TYPE_CHECKING:
    import numpy as np

    from edgesd.compress.quantplan import QuantPlan
    from edgesd.manifest import Axes, Manifest, Variant
    from edgesd.models.modules import Component
    from edgesd.runtime.session import Session
    from edgesd.targets._session import Call
    from edgesd.targets.coreml.package import Operation

name = "coreml"
extra = "coreml"
modules = ("coremltools",) if sys.platform == "darwin" else ("coremltools", "torch")
lower_modules = ("torch", "coremltools")
capabilities = Capabilities(
    precisions=("fp16", "fp32", "int8", "hybrid", "w8"),
    index_dtype="int32",
    layout="folded",
    forms=("", "split_einsum"),
)
lower_options = ("minimum_target", "compiled", "palette")  # fields of a recipe that `lower` takes
form_components = {"split_einsum": ("unet",)}
chunked = True  # a UNet may come in pieces
status = "executed" if sys.platform == "darwin" else "interpreted"

MINIMUM_TARGETS = ("iOS17", "iOS18", "macOS14", "macOS15")
PALETTE_TARGETS = ("iOS17", "macOS14")
COMPUTE_UNITS = ("all", "cpuOnly", "cpuAndGPU", "cpuAndNeuralEngine")
IOS_WEIGHT_BYTES = 10**9  # of one package: above it, phones fail to load or to compile it
MOST_CHUNKS = 8
_WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "hybrid": 1, "w8": 1}


def check_plan(
    component_name: str, predicted_bytes: int, axes: Axes, minimum_target: str = "iOS17", palette: int | None = None
) -> None:
    """Refuses a package too large for an iPhone, or a palette that cannot be, before any work.

    predicted_bytes: weights of the one package that `axes` describes (of the chunk, for a chunk). Raises RequestError
    that says what would fit.
    """
    if palette is not None and (axes.precision, palette) not in (("w8", 6), ("w8", 8)):
        came = f"a palette of {palette} bits in {axes.precision}"
        raise RequestError(came, "6 or 8 bits, in w8", "Change --palette, or add --precision w8")
    if palette is not None and minimum_target not in PALETTE_TARGETS:
        raise RequestError(f"a palette for {minimum_target}", ", ".join(PALETTE_TARGETS), "Change --minimum-target")
    if predicted_bytes <= IOS_WEIGHT_BYTES or not minimum_target.startswith("iOS"):
        return
    weights = predicted_bytes * axes.chunk[1] / _WEIGHT_BYTES[axes.precision]
    fits = []
    for precision in ("fp32", "fp16", "int8"):
        pieces = math.ceil(weights * _WEIGHT_BYTES[precision] / IOS_WEIGHT_BYTES)
        if _WEIGHT_BYTES[precision] <= _WEIGHT_BYTES[axes.precision] and pieces <= MOST_CHUNKS:
            if pieces == 1:
                fits.append(f"precision {precision}")
            elif component_name == "unet":
                fits.append(f"{precision} in {pieces} chunks")
    raise RequestError(
        f"{component_name} in {axes.precision}, cut in {axes.chunk[1]}, has {predicted_bytes / 1e9:.2f} GB a package",
        f"up to {IOS_WEIGHT_BYTES / 1e9:.0f} GB on iOS",
        f"Choose {' or '.join(fits)}" if fits else "Choose a smaller model",
    )


def lower(
    component: Component,
    axes: Axes,
    directory: Path,
    *,
    minimum_target: str = "iOS17",
    compute_units: str | None = None,
    compiled: bool = False,
    palette: int | None = None,
    plan: QuantPlan | None = None,
    **options: Any,
) -> Lowered:
    """Writes `<component>.mlpackage` (a folder; `<component>_1of2.mlpackage` for a chunk) into `directory`.

    Token ids are int32 and everything else at the border is float32, except what passes between fp16 chunks. fp16 and
    int8: all is computed in float16 but the sines of the timestep. int8, hybrid, w8: as `plan` says, int8 weights as
    constexpr_affine_dequantize and quantize/dequantize pairs around the inputs of int8 layers.
    palette: 6 or 8: in w8, the weights of convolutions and linears are indices of so many bits into a table of their
    own (k-means) in place of scaled integers.
    axes.form: "" or "split_einsum" (docs/coreml.md). axes.chunk (i, n): piece i of the UNet cut into n.
    compute_units: one of COMPUTE_UNITS for the manifest, by default the one that suits component and form.
    compiled: also compile with Xcode (macOS; elsewhere a recorded downgrade). The same input gives the same bytes.
    A failure leaves `directory` as it was.
    Raises RequestError (precision, form, target, size, plan), GateError (Core ML cannot express an operation; less
    int8 than planned).
    """
    if options:
        allowed = "minimum_target, compute_units, compiled, palette"
        raise RequestError(f"option {min(options)!r} for target {name}", allowed, "Leave it out")
    units = _compute_units(component.name, axes) if compute_units is None else compute_units
    for what, value, known in (
        ("precision", axes.precision, capabilities.precisions),
        ("form", axes.form, capabilities.forms),
        ("minimum_target", minimum_target, MINIMUM_TARGETS),
        ("compute_units", units, COMPUTE_UNITS),
    ):
        if value not in known:
            allowed = ", ".join(map(repr, known))
            raise RequestError(f"{what} {value!r} for target {name}", allowed, "Choose one of these")
    from edgesd.targets.coreml import convert

    plan, lost = _int8.planned(component, axes, plan, capabilities)
    piece = convert.shaped(component, axes, plan if palette is None else None)
    check_plan(component.name, convert.weight_bytes(piece, axes), axes, minimum_target, palette)
    made = convert.write(
        piece, axes, directory, plan, minimum_target=minimum_target, compute_units=units, compiled=compiled,
        palette=palette,
    )  # fmt: skip
    return replace(made, downgrades=(*lost, *made.downgrades), plan=plan if palette is None else None)


def _compute_units(component: str, axes: Axes) -> str:
    """The original attention suits the GPU, the split one and the small parts the Neural Engine (it has no float32)."""
    if axes.precision == "fp32" or (component == "unet" and axes.form == ""):
        return "cpuAndGPU"
    return "cpuAndNeuralEngine"


def open(
    directory: Path, manifest: Manifest, *, device: str | None = None, fp16: bool = False, **options: Any
) -> Session:
    """The bundle in Core ML on macOS, in the interpreter elsewhere (on torch's threads).

    device: one of COMPUTE_UNITS in place of the manifest's hint (macOS). fp16: the interpreter rounds every value to
    float16, whatever the package says. Further options: `ComponentSession`.
    """
    from edgesd.targets._session import ComponentSession

    if device is not None and (device not in COMPUTE_UNITS or sys.platform != "darwin"):
        allowed = (
            ", ".join(COMPUTE_UNITS) if sys.platform == "darwin" else "none off a Mac: the interpreter has no devices"
        )
        raise RequestError(f"device {device!r} for target {name}", allowed, "Choose one of these, or leave it out")

    def open_variant(variant: Variant, files: tuple[Path, ...]) -> Call:
        if sys.platform == "darwin":
            return _run_in_core_ml(files[0].parent, variant.compute_units if device is None else device)
        from edgesd.targets.coreml.interpreter import Program

        return Program(files[0].parent, fp16=fp16).run

    return ComponentSession(directory, manifest, open_variant, **options)


def _run_in_core_ml(package: Path, units: str) -> Call:
    import coremltools as ct

    from edgesd.targets.coreml.package import Package

    Package(package)  # says in clear words what is missing or too new
    known = {"all": ct.ComputeUnit.ALL, "cpuOnly": ct.ComputeUnit.CPU_ONLY, "cpuAndGPU": ct.ComputeUnit.CPU_AND_GPU,
             "cpuAndNeuralEngine": ct.ComputeUnit.CPU_AND_NE}  # fmt: skip
    if units not in known:
        raise DataError(f"compute units {units!r} in the manifest", ", ".join(COMPUTE_UNITS), "Package the model again")
    model = ct.models.MLModel(str(package), compute_units=known[units])

    def call(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return model.predict(inputs)

    return call


def count_operations(path: Path) -> OpCount:
    """Operations of a package (its folder, or its Manifest.json) by type and dtype of their first result.

    A convolution or linear layer counts as "int8" when its weights are int8 and its input is quantized, as "w8" when
    the weights alone are. Constants are left out. Raises DataError.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for operation, mode, _ in _classified(path):
        if operation.type != "const":
            precision = operation.results[0][1].dtype if operation.results else ""
            counts[operation.type, precision if mode in ("", "floating") else mode] += 1
    return OpCount(dict(counts))


def coverage(path: Path) -> Coverage:
    """MACs by the patterns of the saved program: int8 weights (constexpr), inputs between quantize and dequantize."""
    from edgesd.targets.coreml.package import folder_of

    macs: Counter[str] = Counter()
    for _, mode, cost in _classified(path):
        if mode:
            macs[mode] += cost
    weights = folder_of(path) / "Data/com.apple.CoreML/weights"
    return Coverage(**macs, weight_bytes=sum(file.stat().st_size for file in weights.glob("*")))


def _classified(path: Path) -> Iterator[tuple[Operation, str, int]]:
    """Each operation; of convolutions and linears also how they compute (int8, w8, floating), and their MACs."""
    from edgesd.targets.coreml.package import Package, folder_of

    made_by: dict[str, Operation] = {}
    for operation in Package(folder_of(path)).operations():
        made_by |= dict.fromkeys((result for result, _ in operation.results), operation)
        sources = {name: made_by.get(str(given[0])) for name, given in operation.inputs.items() if given}
        weight, x = sources.get("weight"), sources.get("x")
        if operation.type not in ("conv", "linear") or weight is None:
            yield operation, "", 0
            continue
        mode = "floating"
        if weight.type.startswith("constexpr_"):
            mode = "int8" if x is not None and x.type == "dequantize" else "w8"
        shape = weight.results[0][1].shape
        yield operation, mode, operation.results[0][1].elements * math.prod(shape) // shape[0]


def runtime_version() -> str:
    """What a manifest records: coremltools, and what runs the package here."""
    import platform
    from importlib.metadata import version

    if sys.platform == "darwin":
        return f"Core ML of macOS {platform.mac_ver()[0]}, coremltools {version('coremltools')}"
    return f"edgesd's MIL interpreter, torch {version('torch')}, coremltools {version('coremltools')}"


def speed_is_meaningful() -> bool:
    """False where packages are interpreted: seconds then say nothing about a phone."""
    return sys.platform == "darwin"
