"""Executes a saved ML program operation by operation with torch: what stands behind the verdict `interpreted`.

Semantics: coremltools' MIL. Float16 results are computed in float32 and then rounded, so a float16 program shows the
rounding of every value it stores, not the order in which a device adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from edgesd.errors import RequestError
from edgesd.targets.coreml.compiler import FAULTS, Compiler, fault, torch_type
from edgesd.targets.coreml.package import Package


class Program:
    """A saved .mlpackage, ready to run. inputs: name -> TensorType. outputs: names.

    fp16: round every float result to float16, as an accelerator without float32 does, and not only those that the
    program itself declares float16.
    Raises DataError: whatever `Package` refuses; an operation that is not in `OPERATIONS` (names it and where it
    stands); types or shapes that contradict the program's own. Raises SetupError: weights and intermediate values need
    more than `max_live_bytes` (None: the memory that is free now).
    """

    def __init__(self, folder: Path, *, fp16: bool = False, max_live_bytes: int | None = None) -> None:
        package = Package(folder)
        compiled = Compiler(package, fp16=fp16, max_live_bytes=max_live_bytes)
        self.inputs, self.outputs = package.inputs, package.outputs
        self._name, self._steps, self._constants = folder.name, compiled.steps, compiled.constants

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, floats as float32. Raises RequestError (names, shapes), DataError (a faulty operation)."""
        wanted = {name: kind.shape for name, kind in self.inputs.items()}
        if (came := {name: array.shape for name, array in inputs.items()}) != wanted:
            raise RequestError(f"{self._name} with inputs {came}", f"{wanted}", "Pass exactly these")
        values = dict(self._constants)
        for name, kind in self.inputs.items():
            values[name] = torch.from_numpy(np.ascontiguousarray(inputs[name])).to(torch_type(kind))
        with torch.inference_mode():
            for step in self._steps:
                try:
                    made = step.run(values)
                except FAULTS as error:
                    raise fault(self._name, step.where, error) from None
                for (name, _), x in zip(step.results, made, strict=True):
                    values[name] = x
                for name in step.frees:
                    del values[name]
            return {name: values[name].numpy(force=True).copy() for name in self.outputs}
