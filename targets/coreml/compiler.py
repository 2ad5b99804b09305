"""Turns a saved program into a list of torch calls, checking it on the way without computing.

Every operation first runs on torch's meta device, where tensors have shapes and no memory: declared types are checked
there, and a program that would not fit in memory is refused before anything is allocated. What depends on constants
alone (int8 weights) is computed here, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from edgesd.errors import DataError, SetupError
from edgesd.targets.coreml.operations import MOVES, OPERATIONS
from edgesd.targets.coreml.package import REDO, Operation, Package, TensorType

KINDS = {"float16": torch.float32, "float32": torch.float32, "bool": torch.bool}  # integers: int32
FAULTS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError, MemoryError)
Values = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One call. parameters: the names of the values it takes (several for `values`). frees: values it is last to use.

    rounds: results go through float16.
    """

    call: Callable[..., Any]
    parameters: tuple[tuple[str, str | tuple[str, ...]], ...]
    results: tuple[tuple[str, TensorType], ...]
    rounds: bool
    where: str
    frees: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        named = [(source,) if isinstance(source, str) else source for _, source in self.parameters]
        return tuple(name for names in named for name in names)

    def run(self, values: Values) -> tuple[torch.Tensor, ...]:
        given = {
            name: values[source] if isinstance(source, str) else [values[part] for part in source]
            for name, source in self.parameters
        }
        made = self.call(**given)
        made = tuple(made) if isinstance(made, tuple | list) else (made,)
        return tuple(map(_round, made)) if self.rounds else made


class Compiler:
    """Compiles one package; `steps`, `constants` and `shapes` hold the result. Arguments and errors: `Program`."""

    def __init__(self, package: Package, *, fp16: bool, max_live_bytes: int | None) -> None:
        self._package, self._name, self._fp16 = package, package.folder.name, fp16
        self._limit = psutil.virtual_memory().available if max_live_bytes is None else max_live_bytes
        self._held_bytes = 0
        self.steps: list[Step] = []
        self.constants: Values = {}
        self.shapes: Values = {
            name: torch.empty(kind.shape, dtype=torch_type(kind), device="meta")
            for name, kind in package.inputs.items()
        }
        with torch.inference_mode():
            for operation in package.operations():
                self._add(operation)
        outputs = package.outputs
        lost = [name for name in outputs if not isinstance(self.shapes.get(name), torch.Tensor)]
        if lost or not outputs:
            raise self._refusal("the program", f"has no value for its output {lost[:1]}", "every output computed")
        self.steps = _with_frees(self.steps, set(outputs))
        used = {name for step in self.steps for name in step.sources} | set(outputs)
        self.constants = {name: value for name, value in self.constants.items() if name in used}
        self._check_memory()

    def _add(self, operation: Operation) -> None:
        if operation.type == "const":
            given = operation.inputs.get("val", [])
            if len(operation.results) != 1 or len(given) != 1 or isinstance(given[0], str):
                raise self._refusal(operation.where, "has no value", "one value")
            self._keep(operation.where, operation.results[0][0], given[0])
            return
        step = self._bind(operation)
        try:
            with torch.device("meta"):
                made = step.run(self.shapes)
            for x, (_, kind) in zip(made, step.results, strict=True):
                if tuple(x.shape) != kind.shape or x.dtype != torch_type(kind):
                    raise ValueError(f"makes {x.dtype} {tuple(x.shape)} where {kind.dtype} {kind.shape} is declared")
        except FAULTS as error:
            raise fault(self._name, operation.where, error) from None
        for x, (name, _) in zip(made, step.results, strict=True):
            self._define(operation.where, name, x)
        if not all(name in self.constants for name in step.sources):
            self.steps.append(step)
            return
        self._hold(sum(map(_bytes, made)))
        for (name, _), x in zip(step.results, step.run(self.constants), strict=True):
            self.constants[name] = x

    def _bind(self, operation: Operation) -> Step:
        """Settings become plain values inside the call, tensors stay names."""
        function = OPERATIONS.get(operation.type)
        if function is None:
            known = f"the {len(OPERATIONS)} operation types that docs/coreml.md lists"
            raise DataError(f"{self._name}: {operation.where} is no operation that edgesd interprets", known,
                            "Run the package on a Mac, or lower the component without it")  # fmt: skip
        signature = inspect.signature(function).parameters
        parameters: list[tuple[str, str | tuple[str, ...]]] = []
        settings: dict[str, Any] = {}
        for name, given in operation.inputs.items():
            if name not in signature or not given:
                raise self._refusal(operation.where, f"has a parameter {name[:64]!r}", ", ".join(signature))
            sources = [self._source(operation.where, f"{name} {i}", x) for i, x in enumerate(given)]
            if signature[name].kind is inspect.Parameter.KEYWORD_ONLY:
                settings[name] = self._setting(operation.where, name, sources[0])
            else:
                parameters.append((name, tuple(sources) if name == "values" else sources[0]))
        for name, parameter in signature.items():
            if parameter.default is parameter.empty and name not in operation.inputs:
                raise self._refusal(operation.where, f"lacks its parameter {name}", ", ".join(signature))
        rounded = {"float16", "float32"} if self._fp16 else {"float16"}
        rounds = operation.type not in MOVES and any(kind.dtype in rounded for _, kind in operation.results)
        return Step(partial(function, **settings), tuple(parameters), operation.results, rounds, operation.where)

    def _source(self, where: str, label: str, given: str | np.ndarray) -> str:
        """The name of a value made before; a constant that stands in place gets a name."""
        if not isinstance(given, str):
            name = f"{where} {label}"
            self._keep(where, name, given)
            return name
        if given not in self.shapes:
            raise self._refusal(where, f"uses {given[:80]!r}", "values made before it")
        return given

    def _setting(self, where: str, name: str, source: str) -> Any:
        if source not in self.constants:
            raise self._refusal(where, f"computes its {name}", "a constant")
        value = self.constants[source]
        return value.tolist() if isinstance(value, torch.Tensor) else value

    def _keep(self, where: str, name: str, value: np.ndarray) -> None:
        if value.dtype.kind == "U":
            self.constants[name] = value.tolist()
            self._define(where, name, value.tolist())
            return
        numbers = {"f": np.float32, "b": np.bool_}.get(value.dtype.kind, np.int32)
        self._hold(value.size * np.dtype(numbers).itemsize)
        self.constants[name] = torch.from_numpy(value.astype(numbers))
        self._define(where, name, self.constants[name].to("meta"))

    def _define(self, where: str, name: str, value: Any) -> None:
        if name in self.shapes:
            raise self._refusal(where, f"makes {name[:80]!r} again", "each value made once")
        self.shapes[name] = value

    def _hold(self, more: int) -> None:
        """Counts constants before they are made. Raises SetupError."""
        self._held_bytes += more
        self._refuse_above(self._held_bytes)

    def _check_memory(self) -> None:
        """The most that is alive at once; views count as if they were copies. Raises SetupError."""
        live = most = sum(map(_bytes, self.constants.values()))
        for step in self.steps:
            live += sum(_bytes(self.shapes[name]) for name, _ in step.results)
            most = max(most, live)
            live -= sum(_bytes(self.shapes[name]) for name in step.frees)
        self._refuse_above(most)

    def _refuse_above(self, needed: int) -> None:
        if needed > self._limit:
            raise SetupError(f"{self._name} needs {needed} bytes of memory or more", f"{self._limit} bytes",
                             "Free memory, use smaller pictures or chunks, or run it on a Mac")  # fmt: skip

    def _refusal(self, where: str, came: str, allowed: str) -> DataError:
        return DataError(f"{self._name}: {where} {came}", allowed, REDO)


def torch_type(kind: TensorType) -> torch.dtype:
    return KINDS.get(kind.dtype, torch.int32)


def fault(package: str, where: str, error: Exception) -> DataError:
    """An operation that torch refuses to compute, as the package's fault."""
    return DataError(f"{package}: {where} fails ({' '.join(str(error).split())[:300]})", "a well-formed program", REDO)


def _with_frees(steps: list[Step], kept: set[str]) -> list[Step]:
    """The same steps, knowing which values each is the last to use (or makes in vain), so that memory comes back."""
    last: dict[str, int] = {}
    for i, step in enumerate(steps):
        last |= dict.fromkeys((name for name, _ in step.results), i) | dict.fromkeys(step.sources, i)
    made = {name for step in steps for name, _ in step.results} - kept
    frees: dict[int, list[str]] = {}
    for name in made:
        frees.setdefault(last[name], []).append(name)
    return [replace(step, frees=tuple(frees.get(i, ()))) for i, step in enumerate(steps)]


def _round(x: torch.Tensor) -> torch.Tensor:
    """To the nearest float16, held in float32; what float16 cannot hold becomes infinite, as on the device."""
    return x.to(torch.float16).to(torch.float32) if x.dtype == torch.float32 else x


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0
