"""What a .tflite file holds (operations, tensors, signature), read from its flatbuffer with the schema LiteRT ships.

Files may be hostile: whatever is wrong with their structure is a DataError. Weights are never loaded.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesd.errors import DataError
from edgesd.manifest import TensorSpec

MAX_RANK = 8  # of any tensor LiteRT runs; bounds what a broken length makes the reader do


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its name there, dtype as numpy spells it, static shape, whether its values are stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    constant: bool


@dataclass(frozen=True)
class Operation:
    """One operation of a file: its builtin name, or CUSTOM:<name>."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def where(self) -> str:
        """Path of the torch modules it came from, as the converter wrote it into the output's name."""
        return self.outputs[0].name if self.outputs else ""


def read_operations(path: Path) -> list[Operation]:
    """All operations of a .tflite file in order, subgraph after subgraph. Raises DataError for a broken file."""
    return _read(path, _operations)


def _read(path: Path, parse: Callable[[Any], Any]) -> Any:
    """Applies `parse` to the root table of a mapped file. Any fault in its structure is a DataError."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[4:8] != b"TFL3":
                raise ValueError("no TFL3 mark")
            return parse(schema.Model.GetRootAs(data, 0))
    except (OSError, ValueError, TypeError, AttributeError, IndexError, KeyError, struct.error, OverflowError) as error:
        raise broken(path, error) from None


def broken(path: Path, error: Exception) -> DataError:
    """The error for a file that LiteRT or this reader cannot take in."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return DataError(
        f"{path.name} is not a whole .tflite file ({reason})", "a file that edgesd wrote", "Package the model again"
    )


def _operations(model: Any) -> list[Operation]:
    from ai_edge_litert import schema_py_generated as schema

    builtin = _spelled(schema.BuiltinOperator)
    names = []
    for code in map(model.OperatorCodes, range(model.OperatorCodesLength())):
        kind = builtin[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        names.append(f"CUSTOM:{code.CustomCode().decode()}" if kind == "CUSTOM" else kind)
    found = []
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for op in map(graph.Operators, range(graph.OperatorsLength())):
            inputs, outputs = (
                tuple(_tensor(model, graph, at(i)) for i in range(length) if at(i) >= 0)
                for at, length in ((op.Inputs, op.InputsLength()), (op.Outputs, op.OutputsLength()))
            )
            found.append(Operation(names[op.OpcodeIndex()], inputs, outputs))
    return found


def _tensor(model: Any, graph: Any, index: int) -> Tensor:
    from ai_edge_litert import schema_py_generated as schema

    tensor = graph.Tensors(index)
    if tensor.ShapeLength() > MAX_RANK:
        raise ValueError(f"a tensor of {tensor.ShapeLength()} dimensions")
    shape = tuple(tensor.Shape(axis) for axis in range(tensor.ShapeLength()))
    values = model.Buffers(tensor.Buffer())
    constant = values.DataLength() > 0 or values.Size() > 0  # inside the flatbuffer or behind it
    return Tensor(tensor.Name().decode(), _spelled(schema.TensorType)[tensor.Type()].lower(), shape, constant)


@functools.cache
def _spelled(enumeration: type) -> dict[int, str]:
    """Code -> name of one of the schema's enumerations."""
    return {code: key for key, code in vars(enumeration).items() if isinstance(code, int)}


def _signature(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, outputs) of the file's one signature, by name."""
    signature = model.SignatureDefs(0)
    graph = model.Subgraphs(signature.SubgraphIndex())
    sides = ((signature.Inputs, signature.InputsLength()), (signature.Outputs, signature.OutputsLength()))
    inputs, outputs = (
        {at(i).Name().decode(): _tensor(model, graph, at(i).TensorIndex()) for i in range(n)} for at, n in sides
    )
    return inputs, outputs


def signature_fault(path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> str | None:
    """What differs between a file's signature and the specs, or None. Raises DataError for a broken file."""
    for side, have, want in zip(("input", "output"), _read(path, _signature), (inputs, outputs), strict=True):
        if set(have) != {spec.name for spec in want}:
            return f"{side}s {', '.join(sorted(have))}"
        for spec in want:
            got = have[spec.name]
            if (got.dtype, got.shape) != (spec.dtype, spec.shape):
                return f"{side} {spec.name} {got.dtype}{list(got.shape)} instead of {spec.dtype}{list(spec.shape)}"
    return None
