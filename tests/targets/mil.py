"""Helper of the Core ML tests: programs written with coremltools' MIL builder, saved as packages, and run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder, Function, Program, types

from edgesd.targets.coreml import interpreter
from edgesd.targets.coreml.package import quiet

_TYPES = {"f": types.fp32, "i": types.int32, "b": types.bool}


def save(
    folder: Path, build: Callable, arrays: Sequence[np.ndarray], *, opset=ct.target.iOS17, fp16: bool = False
) -> Path:
    """A package whose program is `build(mb, *inputs)` for inputs x0, x1, ... like `arrays`; no pass changes it.

    fp16: its arithmetic in float16, with casts at the border. Boolean results are cast to int32 (Core ML has no
    boolean outputs).
    """
    inputs = {
        f"x{i}": Builder.placeholder(shape=x.shape, dtype=_TYPES["i" if x.dtype.kind == "b" else x.dtype.kind])
        for i, x in enumerate(arrays)
    }
    program = Program()
    with Function(inputs, opset_version=opset) as function:
        given = []
        for variable, x in zip(function.inputs.values(), arrays, strict=True):
            if fp16 and x.dtype.kind == "f":
                variable = Builder.cast(x=variable, dtype="fp16")
            given.append(Builder.cast(x=variable, dtype="bool") if x.dtype.kind == "b" else variable)
        made = build(Builder, *given)
        made = list(made) if isinstance(made, list | tuple) else [made]
        wanted = {types.fp16: "fp32", types.bool: "int32", types.int8: "int32", types.uint8: "int32"}
        made = [Builder.cast(x=y, dtype=wanted[y.dtype]) if y.dtype in wanted else Builder.identity(x=y) for y in made]
        function.set_outputs([Builder.identity(x=y, name=f"y{i}") for i, y in enumerate(made)])
        program.add_function("main", function)
    with quiet():
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=opset,
            pass_pipeline=ct.PassPipeline.EMPTY,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
    path = folder / "toy.mlpackage"
    model.save(str(path))
    return path


def run(path: Path, arrays: Sequence[np.ndarray], **options) -> list[np.ndarray]:
    program = interpreter.Program(path, **options)
    made = program.run({f"x{i}": x.astype(np.int32) if x.dtype.kind == "b" else x for i, x in enumerate(arrays)})
    return [made[name] for name in program.outputs]
