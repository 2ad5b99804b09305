"""A build within --max-ram: what is given up for memory, in which order, and what cannot be made so.

Time first: every stage gets a process of its own (the libraries load anew each time), and the reference and the
validation hold one part of the model at once. Then flavours that a target would make of its own accord, as a downgrade
that the manifest records. What was asked for by name is never left out: such a plan is refused instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from edgesd.compress.quantplan import QUANTIZED
from edgesd.errors import RequestError
from edgesd.manifest import Downgrade

if TYPE_CHECKING:
    from edgesd.buildplan import BuildPlan, Planned

# Peak of a converter's process: units of the component's float32 bytes, and what its libraries take before any weight.
# Measured on the embedded model and on SD 1.5's architecture (docs/packaging.md); a new target starts at the largest.
PEAK_FACTOR = {"onnx-web": 2.8, "openvino": 2.4, "tflite": 3.4, "coreml": 4.5}
LIBRARIES_BYTES = {"onnx-web": 900 << 20, "openvino": 900 << 20, "tflite": 1600 << 20, "coreml": 1000 << 20}
REFERENCE_BYTES = 700 << 20  # torch, diffusers
PIXEL_BYTES = 4096  # what a full VAE's activations take for each pixel of the picture
# What pruning keeps side by side, for each recorded UNet row, latent position and channel of the first block: with 480
# rows of the embedded model it took 2.6 GiB in all.
LANE_BYTES = 245
# What a plan for int8 takes with its libraries, and for each row that sensitivities rest on, latent position and
# channel of the first block: the graph of a backward pass.
PLANNING_BYTES, GRAPH_LANE_BYTES = 1000 << 20, 1100
PLANNING = "planning the UNet's int8"
LARGE_PARAMS = 200_000_000  # of a UNet: a whole run takes minutes
OWN_BYTES = 500 << 20  # this process beside its children: configs read, shapes counted
GIB = 1 << 30


def lowering_peak(target: str, params: int, pixels: int) -> int:
    """Bytes that the process which lowers a component of so many parameters holds at most, predicted.

    pixels: of the picture for a VAE, 0 for what never sees one (the UNet's activations are in the factors).
    """
    factor = PEAK_FACTOR.get(target, max(PEAK_FACTOR.values()))
    libraries = LIBRARIES_BYTES.get(target, max(LIBRARIES_BYTES.values()))
    return libraries + int(factor * params * 4) + PIXEL_BYTES * pixels


def reference_peak(params: int, stored_bytes: int, pixels: int) -> int:
    """The same of the process that draws with the float32 reference. params: of what it holds at once; stored_bytes: of
    the largest part's files, mapped while they are read."""
    return REFERENCE_BYTES + params * 4 + stored_bytes + PIXEL_BYTES * pixels


def pruning_peak(params: int, unet_params: int, values: int) -> int:
    """The same of the process that prunes a UNet. params: of the whole model; values: recorded rows x latent positions
    x channels of the first block."""
    return REFERENCE_BYTES + 4 * (params + unet_params) + LANE_BYTES * values


def planning_peak(params: int, unet_params: int, values: int) -> int:
    """The same of the process that plans a UNet in int8: the model, the UNet once more on its grids, and one backward
    pass. values: rows that sensitivities rest on x latent positions x channels of the first block."""
    return PLANNING_BYTES + 4 * (params + unet_params) + GRAPH_LANE_BYTES * values


def fit(plan: BuildPlan) -> BuildPlan:
    """The plan as it is made within its recipe's max_ram_bytes; itself without one, or where it fits.

    Raises RequestError with the smallest limit that would do. All figures are predicted.
    """
    limit = plan.recipe.max_ram_bytes
    if limit is None or needed(plan) <= limit:
        return plan
    for smaller in _smaller(plan, limit):
        if needed(smaller) <= limit:
            return smaller
    least = min(map(needed, _smaller(plan, 0)))
    what, peak = largest(replace(plan, one_at_a_time=True))
    others = "--profile quality, " if what == PLANNING else ""
    raise RequestError(
        f"{what} takes about {(peak + OWN_BYTES) / GIB:.1f} GiB to package for {plan.recipe.target} (predicted)",
        f"--max-ram of {limit / GIB:.1f} GiB",
        f"Allow {math.ceil(least / GIB * 10) / 10:.1f} GiB, or choose {others}a smaller model or --vae tiny",
    )


def needed(plan: BuildPlan) -> int:
    """Bytes that a build holds at most, this process and the largest of its children together; predicted."""
    return OWN_BYTES + plan.peak_bytes


def processes(plan: BuildPlan) -> Iterator[tuple[str, int]]:
    """What each process of a build is for, and the bytes it holds at most, predicted."""
    if plan.recipe.prune is not None:
        yield "pruning the UNet", plan.pruning_peak_bytes
    if any(planned.axes.precision in QUANTIZED for planned in plan.artefacts):
        yield PLANNING, plan.planning_peak_bytes
    yield "the float32 reference", plan.reference_peak_bytes
    for planned in plan.artefacts:
        yield f"{planned.component} {planned.axes.precision}", planned.peak_bytes


def largest(plan: BuildPlan) -> tuple[str, int]:
    """Of `processes`, the one that holds most."""
    return max(processes(plan), key=lambda process: process[1])


def _smaller(plan: BuildPlan, limit: int) -> Iterator[BuildPlan]:
    """The same build in less memory, what it gives up growing."""
    shown = f"--max-ram of {limit / GIB:.1f} GiB"
    plan = replace(
        plan, one_at_a_time=True,
        notes=(*plan.notes, f"{shown}: a process for each stage, one part of the model in memory at a time"),
    )  # fmt: skip
    yield plan
    if plan.recipe.precision is not None or plan.recipe.forms:
        return
    peaks: dict[tuple[str, str], int] = {}
    for planned in plan.artefacts:
        planning = plan.planning_peak_bytes if planned.axes.precision in QUANTIZED else 0
        peaks[_flavour(planned)] = max(peaks.get(_flavour(planned), 0), planned.peak_bytes, planning)
    for flavour in sorted(peaks, key=lambda each: -peaks[each])[:-1]:  # one always stays
        kept = tuple(p for p in plan.artefacts if _flavour(p) != flavour)
        if {p.component for p in kept} != {p.component for p in plan.artefacts}:
            return  # only this flavour has the component
        name = " ".join(filter(None, flavour))
        why = f"it takes about {(peaks[flavour] + OWN_BYTES) / GIB:.1f} GiB to make, beyond {shown}"
        plan = replace(
            plan, artefacts=kept, downgrades=(*plan.downgrades, Downgrade(component="all", what=f"no {name}", why=why)),
            notes=(*plan.notes, f"left out: {name}, because {why}"),
        )  # fmt: skip
        yield plan


def _flavour(planned: Planned) -> tuple[str, str]:
    return planned.axes.precision, planned.axes.form
