"""Targets: each lowers a component to its runtime's file and opens what it made. Loaded by name, never imported.

A target is a module (or package) with the attributes of `Target`. Third parties register theirs in the
entry-point group `edgesd.targets`. See targets/README.md, "how to add a target".
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgesd.errors import RequestError, SetupError

if TYPE_CHECKING:
    from edgesd.compress.quantplan import QuantPlan
    from edgesd.manifest import Axes, Downgrade, Manifest, TensorSpec
    from edgesd.runtime.session import Session

TARGETS = {
    "onnx-web": "edgesd.targets.onnx_web",
    "openvino": "edgesd.targets.openvino",
    "tflite": "edgesd.targets.tflite",
    "coreml": "edgesd.targets.coreml",
}


@dataclass(frozen=True)
class Capabilities:
    """What a target can hold and do. Sizes in bytes; None = no limit known.

    precisions: what `lower` accepts. max_file_bytes: one file. max_component_bytes: weights of one component.
    index_dtype: what token ids are at its border. layout: how int8 weights reach its converter (folded, unfolded).
    forms: its flavours beyond the default "". int8_kinds: layers it has integer kernels for (conv, linear).
    int8_outputs: those among them that exist only where the output is quantized too. w8: it can hold int8 weights that
    are widened for float arithmetic.
    """

    precisions: tuple[str, ...]
    max_file_bytes: int | None = None
    max_component_bytes: int | None = None
    index_dtype: str = "int64"
    layout: str = "folded"
    forms: tuple[str, ...] = ("",)
    int8_kinds: tuple[str, ...] = ("conv", "linear")
    int8_outputs: tuple[str, ...] = ()
    w8: bool = True


@dataclass(frozen=True)
class Lowered:
    """What `lower` made. files are relative to the directory it was given, the one to open first.

    inputs and outputs as they stand in the artefact (dtype and shape may differ from the torch module's).
    compute_units: the target's own hint for this component, "" for none. cost: (params, macs) where the artefact is a
    piece of the component; None = the whole of it. plan: the quantization as the artefact has it, None = float.
    """

    files: tuple[Path, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    downgrades: tuple[Downgrade, ...] = ()
    compute_units: str = ""
    cost: tuple[int, int] | None = None
    plan: QuantPlan | None = None


@dataclass(frozen=True)
class OpCount:
    """Operations of one artefact by type and precision, e.g. {("Conv", "float32"): 31}."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Coverage:
    """Convolutions and linears of one artefact by how it computes them, in MACs of one call; what its weights take.

    int8: integer kernels; w8: int8 weights widened for float arithmetic (or a palette); floating: the rest.
    """

    int8: int = 0
    w8: int = 0
    floating: int = 0
    weight_bytes: int = 0


class Target(Protocol):
    """What a target module offers. Vendor SDKs are imported inside the functions.

    name: as on the command line. extra: the pip extra that brings its SDK. modules: what must import to `open`;
    lower_modules: what must import to `lower`.

    A module may also have: status, "executed" (what is assumed) or "interpreted" when opened on this platform;
    lower_extra, the pip extra of its converter where `extra` does not bring it;
    form_status, the same by form where it differs ("unverified": meant for a runtime that is not here);
    default_variants and int8_variants, (precision, form) of what a bundle holds by profile where nothing else is asked;
    form_components, the components that have a form where not all do; lower_options, fields of
    the recipe that `lower` takes; chunked, that a UNet may come in pieces; speed_is_meaningful() -> bool;
    check_plan(component, bytes, axes), which refuses what it cannot hold; coverage(path) -> Coverage, counted in the
    artefact as its runtime executes it;
    share_widths(wide, narrow, made, corrections), which rewrites a narrow artefact to cut the widest one's weights, its
    int8 layers corrected as given (without it every width is stored whole).

    `lower` takes the float component, its weights those the plan was made for (`compress.quantize.adjusted`), and for
    the precisions int8, hybrid and w8 the plan: it writes the integers in the layout its converter takes, counts them
    in what it wrote, and raises GateError where they fall short of the plan. `Lowered.plan` is what it honoured.
    """

    name: str
    extra: str
    modules: tuple[str, ...]
    lower_modules: tuple[str, ...]
    capabilities: Capabilities

    def lower(
        self, component: Any, axes: Axes, directory: Path, *, plan: QuantPlan | None = None, **options: Any
    ) -> Lowered: ...

    def open(self, directory: Path, manifest: Manifest, **options: Any) -> Session: ...

    def count_operations(self, path: Path) -> OpCount: ...

    def runtime_version(self) -> str: ...


def names() -> tuple[str, ...]:
    """All target names: the built-in ones, then those of installed plug-ins."""
    return (*TARGETS, *sorted(e.name for e in entry_points(group="edgesd.targets") if e.name not in TARGETS))


def load(name: str, *, lowering: bool = False) -> Target:
    """The target module `name`. Raises RequestError (unknown), SetupError (says which pip install)."""
    if name in TARGETS:
        module = importlib.import_module(TARGETS[name])
    else:
        found = [e for e in entry_points(group="edgesd.targets") if e.name == name]
        if not found:
            raise RequestError(f"target {name!r}", ", ".join(names()), "Choose one of these with --target")
        module = found[0].load()
    target = cast(Target, module)
    missing = missing_modules(target, lowering=lowering)
    if missing:
        extras = target.extra
        if lowering:
            extras = ",".join(filter(None, ["package", target.extra, getattr(target, "lower_extra", "")]))
        raise SetupError(
            f"target {name} needs {', '.join(missing)}, not installed here",
            f'pip install "edgesd[{extras}]"',
            "Install that and run the same command again",
        )
    return target


def missing_modules(target: Target, *, lowering: bool = False) -> list[str]:
    """Names of the packages that `target` needs (to open, or to lower) and that do not import here."""
    wanted = (*target.modules, *target.lower_modules) if lowering else target.modules
    return [name for name in dict.fromkeys(wanted) if importlib.util.find_spec(name.split(".")[0]) is None]
