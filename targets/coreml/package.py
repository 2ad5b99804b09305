"""Reading a saved .mlpackage without Apple's runtime: its program, its types and its weights, all checked.

A package is hostile input: paths stay inside it, sizes are compared with the files before anything is allocated, and
what this reader does not know (a newer version, a loop, another number type) is a DataError.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesd.errors import DataError

MAX_SPEC_BYTES = 1 << 30
MAX_OPERATIONS = 200_000
MAX_ELEMENTS = 1 << 31
NEWEST_SPECIFICATION = 10  # iOS 26; edgesd writes 8 (iOS 17) and 9 (iOS 18)
PROGRAM_VERSION = 1
REDO = "Package the model again, or get the bundle again from where it came"

# MIL's number types by name: (code in programs, numpy type, code in weight files or None).
NUMBERS: dict[str, tuple[int, Any, int | None]] = {
    "bool": (1, np.bool_, None),
    "float16": (10, np.float16, 1),
    "float32": (11, np.float32, 2),
    "int8": (21, np.int8, 4),
    "int16": (22, np.int16, 6),
    "int32": (23, np.int32, 14),
    "uint8": (31, np.uint8, 3),
    "uint16": (32, np.uint16, 7),
    "uint32": (33, np.uint32, 15),
}
_NAMES = {code: name for name, (code, _, _) in NUMBERS.items()} | {2: "string"}
_SENTINEL = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQ")  # sentinel, type code, bytes, where the bytes start


@dataclass(frozen=True)
class TensorType:
    """dtype: a name of NUMBERS, or "string". shape: static."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Operation:
    """One operation as saved. inputs: by parameter, names of earlier values or constants met in place.

    results: name and type of each. where: number and name, for messages.
    """

    type: str
    inputs: dict[str, list[str | np.ndarray]]
    results: tuple[tuple[str, TensorType], ...]
    where: str


class Package:
    """The program `main` of one saved package. inputs: name -> type. outputs: names. opset: e.g. CoreML7 (iOS 17)."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError: a file is missing, truncated, malformed, too large or from the future."""
        self.folder = folder
        self._model = _model_path(folder)
        self._spec = _read_spec(self._model)
        self._weights: dict[str, np.memmap] = {}
        program = self._spec.mlProgram
        if program.version != PROGRAM_VERSION:
            raise DataError(f"{folder.name}: program version {program.version}", f"{PROGRAM_VERSION}", "Update edgesd")
        if "main" not in program.functions:
            raise DataError(f"{folder.name}: no function main", "one function main", REDO)
        function = program.functions["main"]
        if function.opset not in function.block_specializations:
            raise DataError(f"{folder.name}: no block for {function.opset[:40]!r}", "the block its opset names", REDO)
        self.opset = function.opset
        self._block = function.block_specializations[function.opset]
        if len(self._block.operations) > MAX_OPERATIONS:
            raise DataError(f"{folder.name}: {len(self._block.operations)} operations", f"up to {MAX_OPERATIONS}", REDO)
        self.inputs = {given.name: _tensor_type(given.type, given.name) for given in function.inputs}
        self.outputs = tuple(self._block.outputs)

    def operations(self) -> Iterator[Operation]:
        """The operations in order, constants among them (type "const", their value the input "val")."""
        for index, saved in enumerate(self._block.operations):
            where = _where(index, saved)
            if saved.blocks:
                raise DataError(f"{self.folder.name}: {where} holds blocks", "programs without loops or branches", REDO)
            results = tuple((made.name, _tensor_type(made.type, where)) for made in saved.outputs)
            inputs: dict[str, list[str | np.ndarray]] = {}
            for parameter, argument in saved.inputs.items():
                inputs[parameter] = [
                    given.name if given.WhichOneof("binding") == "name" else self._value(given.value, where)
                    for given in argument.arguments
                ]
            for parameter, value in saved.attributes.items():
                if parameter != "name":
                    inputs[parameter] = [self._value(value, where)]
            yield Operation(saved.type, inputs, results, where)

    def _value(self, value: Any, where: str) -> np.ndarray:
        kind = _tensor_type(value.type, where)
        if value.WhichOneof("value") == "blobFileValue":
            return self._stored(value.blobFileValue.fileName, value.blobFileValue.offset, kind, where)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        saved = getattr(tensor, field).values if field is not None else ()
        numbers = np.str_ if kind.dtype == "string" else NUMBERS[kind.dtype][1]
        try:
            made = np.frombuffer(saved, numbers) if isinstance(saved, bytes) else np.array(list(saved), dtype=numbers)
            return made.reshape(kind.shape)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{self.folder.name}: the value of {where} is malformed ({error})",
                            f"{kind.elements} elements of {kind.dtype}", REDO) from None  # fmt: skip

    def _stored(self, name: str, offset: int, kind: TensorType, where: str) -> np.ndarray:
        """A view of the weight file. Raises DataError when the record is not what the program says."""
        stored = self._weight_file(name)
        _, numbers, code = NUMBERS.get(kind.dtype, (0, np.uint8, None))
        wanted = kind.elements * np.dtype(numbers).itemsize
        if offset + _RECORD.size <= stored.size:
            sentinel, found, size, start = _RECORD.unpack(stored[offset : offset + _RECORD.size].tobytes())
            if (sentinel, found, size) == (_SENTINEL, code, wanted) and start + size <= stored.size:
                return np.frombuffer(stored, numbers, kind.elements, start).reshape(kind.shape)
        raise DataError(f"{self.folder.name}: the weights of {where} are damaged or cut off",
                        f"{wanted} bytes of {kind.dtype}", REDO)  # fmt: skip

    def _weight_file(self, name: str) -> np.memmap:
        if name not in self._weights:
            parts = name.split("/")
            if parts[0] != "@model_path" or any(part in ("", ".", "..") for part in parts[1:]) or len(parts) < 2:
                raise DataError(f"{self.folder.name}: weights in {name[:80]!r}", "a file inside the package", REDO)
            path = _inside(self.folder, self._model.parent.joinpath(*parts[1:]))
            self._weights[name] = np.memmap(path, np.uint8, "r")
        return self._weights[name]


def folder_of(path: Path) -> Path:
    """The package folder of a path in a bundle: the folder itself, or any file directly inside it."""
    return path if path.suffix == ".mlpackage" else path.parent


def _inside(folder: Path, path: Path) -> Path:
    """A plain, non-empty file inside the package, symbolic links followed."""
    try:
        found = path.resolve().is_relative_to(folder.resolve()) and path.is_file() and path.stat().st_size > 0
    except (OSError, ValueError):
        found = False
    if not found:
        raise DataError(f"{folder.name}: {path.name[:80]!r} is missing or empty", "a whole package", REDO)
    return path


def _model_path(folder: Path) -> Path:
    """The model file that the package's own Manifest.json names as its root."""
    index = _inside(folder, folder / "Manifest.json")
    try:
        if index.stat().st_size > 1 << 20:
            raise ValueError("too long")
        manifest = json.loads(index.read_bytes())
        relative = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        path = folder / "Data" / relative
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder.name}: Manifest.json is malformed ({error})"[:300], "Core ML's package index", REDO
        ) from None
    return _inside(folder, path)


def _read_spec(path: Path) -> Any:
    with quiet():
        from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    name = path.parents[2].name
    if path.stat().st_size > MAX_SPEC_BYTES:
        raise DataError(f"{name}: a model description of {path.stat().st_size} bytes", f"up to {MAX_SPEC_BYTES}", REDO)
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(path.read_bytes())
    except DecodeError:
        raise DataError(f"{name}: {path.name} does not parse", "a Core ML model description", REDO) from None
    if spec.specificationVersion > NEWEST_SPECIFICATION:
        version = f"specification version {spec.specificationVersion}"
        raise DataError(f"{name}: {version}", f"up to {NEWEST_SPECIFICATION}", "Update edgesd and coremltools")
    if spec.WhichOneof("Type") != "mlProgram":
        raise DataError(f"{name}: a {spec.WhichOneof('Type')} model", "an ML program", REDO)
    return spec


def _tensor_type(kind: Any, where: str) -> TensorType:
    """A static tensor type. Raises DataError: lists, states, dynamic dimensions, number types not in NUMBERS."""
    if kind.WhichOneof("type") != "tensorType":
        raise DataError(f"{where}: a value that is no tensor", "tensors of static shape", REDO)
    tensor = kind.tensorType
    if tensor.dataType not in _NAMES:
        raise DataError(f"{where}: number type {tensor.dataType}", ", ".join(NUMBERS), REDO)
    if any(side.WhichOneof("dimension") != "constant" for side in tensor.dimensions) or len(tensor.dimensions) > 8:
        raise DataError(f"{where}: a dynamic or overlong shape", "static shapes of up to 8 dimensions", REDO)
    made = TensorType(_NAMES[tensor.dataType], tuple(side.constant.size for side in tensor.dimensions))
    if made.elements > MAX_ELEMENTS:
        raise DataError(f"{where}: {made.elements} elements", f"up to {MAX_ELEMENTS}", REDO)
    return made


def _where(index: int, saved: Any) -> str:
    name = saved.outputs[0].name if saved.outputs else "?"
    return f"operation {index} ({saved.type[:64]} {name[:80]!r})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps coremltools' notices and progress bars off the terminal (and torch's, which it provokes); errors come."""
    loggers = [logging.getLogger(name) for name in ("coremltools", "torch", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
