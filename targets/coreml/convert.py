"""A component to a .mlpackage with coremltools: works on Linux and macOS alike."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgesd.compress.quantize import quantized
from edgesd.compress.quantplan import QuantPlan
from edgesd.errors import GateError, RequestError
from edgesd.manifest import Axes, Downgrade, TensorSpec
from edgesd.models.modules import Component
from edgesd.targets import Lowered, _int8
from edgesd.targets.coreml import coverage
from edgesd.targets.coreml.attention import split_einsum
from edgesd.targets.coreml.chunks import passed_on, unet_chunks
from edgesd.targets.coreml.package import Package, quiet
from edgesd.targets.coreml.palette import table_of

MODEL = "com.apple.CoreML/model.mlmodel"
_PARTS = (
    (MODEL, "model.mlmodel", "CoreML Model Specification"),
    ("com.apple.CoreML/weights", "weights", "CoreML Model Weights"),
)
MAX_RANK = 5


def shaped(component: Component, axes: Axes, plan: QuantPlan | None = None) -> Component:
    """The component on its int8 grids, in the form and the piece that `axes` name.

    Raises RequestError (no such form, no such piece), DataError (a plan of another model).
    """
    if plan is not None:
        component = quantized(component, plan, "folded")
    if axes.form == "split_einsum" and component.name == "unet":
        component = split_einsum(component)
    index, count = axes.chunk
    return component if count == 1 else unet_chunks(component, count)[index]


def weight_bytes(component: Component, axes: Axes) -> int:
    """What the package's weights take: integers as they are, floats as the precision stores them."""
    each = 4 if axes.precision == "fp32" else 2
    tensors = (*component.module.parameters(), *component.module.buffers())
    return sum(x.numel() * (each if x.is_floating_point() else x.element_size()) for x in tensors)


def write(
    component: Component, axes: Axes, directory: Path, plan: QuantPlan | None = None, *, minimum_target: str,
    compute_units: str, compiled: bool, palette: int | None = None,
) -> Lowered:  # fmt: skip
    """Writes a `shaped` component as a package; `edgesd.targets.coreml.lower` says how and what it raises."""
    index, count = axes.chunk
    package = Path(f"{component.name}{f'_{index + 1}of{count}' if count > 1 else ''}.mlpackage")
    if (directory / package).exists():
        raise RequestError(f"{package} is there already", "a folder without it", "Choose another folder")
    downgrades = []
    if axes.form == "split_einsum" and component.name != "unet":
        downgrades.append(("form split_einsum", "only the UNet has it; this part stays in the original form"))
    inputs, outputs = _border(component, axes)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".coreml-") as scratch:
        made = Path(scratch) / package
        _convert(component, inputs, outputs, axes, minimum_target, made)
        if palette is not None:
            _palettize(made, palette)
        _tidy(made, component, axes)
        _check_made(made, inputs, outputs)
        if plan is not None:
            _int8.hold(made.stem, _int8.expected(component, plan, 2), coverage(made))
        if compiled and not _compile(made):
            why = "Xcode's coremlcompiler is on macOS alone; the app compiles the package when it first loads it"
            downgrades.append(("compiled model (.mlmodelc)", why))
        files = sorted(path.relative_to(scratch) for path in Path(scratch).rglob("*") if path.is_file())
        files.sort(key=lambda path: path != package / "Manifest.json")
        for folder in list(Path(scratch).iterdir()):
            os.replace(folder, directory / folder.name)
    lost = tuple(Downgrade(component=component.name, what=what, why=why) for what, why in downgrades)
    return Lowered(tuple(files), inputs, outputs, lost, compute_units, _piece_cost(component) if count > 1 else None)


def _piece_cost(piece: Component) -> tuple[int, int]:
    from edgesd.models.count import count

    cost = count(piece.module, piece.example)
    return cost.params, cost.macs


def _border(component: Component, axes: Axes) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs as the package has them: int32 ids, float32 values, and what passes between chunks as stored.

    Raises RequestError for a tensor of more dimensions than Core ML takes.
    """
    between = "float32" if axes.precision == "fp32" else "float16"

    def seen(spec: TensorSpec) -> TensorSpec:
        if len(spec.shape) > MAX_RANK:
            came = f"{spec.name} has {len(spec.shape)} dimensions"
            raise RequestError(came, f"up to {MAX_RANK} in Core ML", "Choose another target")
        dtype = "int32" if spec.dtype == "int64" else between if passed_on(spec.name) else spec.dtype
        return spec.model_copy(update={"dtype": dtype})

    return tuple(map(seen, component.inputs)), tuple(map(seen, component.outputs))


def _convert(
    component: Component,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    axes: Axes,
    minimum_target: str,
    path: Path,
) -> None:
    """Writes the package. Raises GateError for an operation that coremltools cannot express."""
    with quiet():
        import coremltools as ct
        import numpy as np

        example = tuple(x.int() if x.dtype == torch.int64 else x for x in component.example)
        exact = axes.precision == "fp32"
        try:
            with torch.no_grad():
                program = torch.export.export(component.module, example, strict=False).run_decompositions({})
            model = ct.convert(
                program,
                inputs=[ct.TensorType(s.name, shape=s.shape, dtype=np.dtype(s.dtype).type) for s in inputs],
                outputs=[ct.TensorType(s.name, dtype=np.dtype(s.dtype).type) for s in outputs],
                minimum_deployment_target=getattr(ct.target, minimum_target),
                compute_precision=ct.precision.FLOAT32 if exact else ct.transform.FP16ComputePrecision(_in_float16),
                skip_model_load=True,
            )
            model.save(str(path))
        except Exception as error:  # coremltools raises whatever its passes raise
            lines = str(error).strip().splitlines()
            raise GateError(f"Core ML cannot express {component.name}: {(lines or [type(error).__name__])[0][:300]}",
                            "operations of coremltools' PyTorch front end",
                            "Choose another target or form, or report this") from error  # fmt: skip


def _palettize(package: Path, bits: int) -> None:
    """Replaces the weights of convolutions and linears by indices into tables of 2^bits values, one table a weight."""
    with quiet():
        import coremltools as ct
        from coremltools.optimize.coreml import OpPalettizerConfig, OptimizationConfig, palettize_weights

        model = ct.models.MLModel(str(package), skip_model_load=True)
        each = OpPalettizerConfig(mode="custom", lut_function=partial(table_of, bits=bits), weight_threshold=1 << bits)
        made = palettize_weights(model, OptimizationConfig(op_type_configs={"conv": each, "linear": each}))
        shutil.rmtree(package)
        made.save(str(package))


def _in_float16(operation: Any) -> bool:
    """All but the sines of the timestep and what feeds them: float16 holds no phase above a few hundred exactly."""
    return not _feeds_sines(operation, depth=8)


def _feeds_sines(operation: Any, depth: int) -> bool:
    if operation.op_type in ("sin", "cos"):
        return True
    users = [user for made in operation.outputs for user in made.child_ops] if depth else []
    return bool(users) and all(_feeds_sines(user, depth - 1) for user in users)


def _tidy(package: Path, component: Component, axes: Axes) -> None:
    """Leaves the model alone in the package, and nothing in it that differs from one run to the next."""
    from coremltools.proto import Model_pb2

    for extra in set(package.iterdir()) - {package / "Data", package / "Manifest.json"}:
        shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    path = package / "Data" / MODEL
    spec = Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    about = spec.description.metadata
    about.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    about.shortDescription = f"{component.name} ({axes.precision}{', ' * bool(axes.form)}{axes.form}), made by edgesd"
    meanings = {tensor.name: tensor.meaning for tensor in (*component.inputs, *component.outputs)}
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = meanings[feature.name]
    path.write_bytes(spec.SerializeToString(deterministic=True))
    path.chmod(0o644)
    entries = {}
    for place, name, text in _PARTS:
        if (package / "Data" / place).exists():
            entry = {"author": "com.apple.CoreML", "description": text, "name": name, "path": place}
            entries[str(uuid.uuid5(uuid.NAMESPACE_URL, place))] = entry
    root = next(key for key, entry in entries.items() if entry["path"] == MODEL)
    index = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _check_made(folder: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Holds the saved package against what was asked for (GateError): names, shapes, types."""
    package = Package(folder)
    types = {name: kind for operation in package.operations() for name, kind in operation.results} | package.inputs
    wanted = [(s.name, s.dtype, s.shape) for s in (*inputs, *outputs)]
    made = [(name, types[name].dtype, types[name].shape) for name in (*package.inputs, *package.outputs)]
    if made != wanted:
        wrong = next((pair for pair in zip(made, wanted, strict=False) if pair[0] != pair[1]), (made, wanted))
        raise GateError(f"{folder.stem} came out with {wrong[0]}", f"{wrong[1]}", "Report this as a bug")


def _compile(package: Path) -> bool:
    """Compiles beside the package with Xcode's coremlcompiler. False where there is none. Raises GateError."""
    if sys.platform != "darwin" or shutil.which("xcrun") is None:
        return False
    command = ["xcrun", "coremlcompiler", "compile", str(package), str(package.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GateError(f"coremlcompiler refuses {package.name}: {done.stderr.strip()[:300]}", "a package it compiles",
                        "Report this as a bug")  # fmt: skip
    return True
