"""What a packaging request comes to before any work: components, variants, bytes, memory; and what cannot be.

Figures come from the checkpoint's safetensors headers alone; no weight is read. They are labelled predicted.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgesd import devices, targets
from edgesd.errors import RequestError
from edgesd.manifest import Axes
from edgesd.models.facts import safetensors_header
from edgesd.recipe import Recipe
from edgesd.runtime.bank import read_prompts

if TYPE_CHECKING:
    from edgesd.models.load import Checkpoint
    from edgesd.targets import Target

# Component -> the part of a checkpoint that it is made from, in the order of a run.
PART_OF = {
    "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2", "unet": "unet", "vae_decoder": "vae",
    "vae_encoder": "vae",
}  # fmt: skip
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "hybrid": 1, "w8": 1}
# Peak of a converter's process: units of the component's float32 bytes, and what its libraries take before any weight.
# Measured on the embedded model and on SD 1.5's architecture (docs/packaging.md); a new target starts at the largest.
PEAK_FACTOR = {"onnx-web": 2.8, "openvino": 2.4, "tflite": 3.4, "coreml": 4.5}
LIBRARIES_BYTES = {"onnx-web": 900 << 20, "openvino": 900 << 20, "tflite": 1600 << 20, "coreml": 1000 << 20}
# The reference holds every part in float32 beside torch, diffusers and a picture's activations.
REFERENCE_BYTES, REFERENCE_FACTOR = 1100 << 20, 1.15
GRAPH_BYTES = 1 << 20  # what a file holds beside weights, about


@dataclass(frozen=True)
class Planned:
    """One artefact to make. bytes and peak_bytes are predictions."""

    component: str
    axes: Axes
    params: int
    bytes: int
    peak_bytes: int

    @property
    def folder(self) -> str:
        """Where its files lie in the bundle. For people: readers go by the manifest."""
        a = self.axes
        marks = [a.precision, *([a.form] if a.form else []), *([f"batch{a.batch}"] if a.batch > 1 else [])]
        marks += [f"chunk{a.chunk[0] + 1}of{a.chunk[1]}"] if a.chunk[1] > 1 else []
        return f"{self.component}/{'-'.join(marks)}"


@dataclass(frozen=True)
class BuildPlan:
    """One bundle to make, whole: what, where, and the samplers whose tables go in.

    params: of the checkpoint's parts in memory. prompts: the only ones the bundle will know, () = any.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    destination: Path
    artefacts: tuple[Planned, ...]
    samplers: tuple[str, ...]
    params: int = 0
    prompts: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.artefacts)

    @property
    def fp32_bytes(self) -> int:
        """Of the whole checkpoint in memory."""
        return 4 * self.params

    @property
    def reference_peak_bytes(self) -> int:
        """Of the process that draws with the float32 reference, predicted."""
        return REFERENCE_BYTES + int(REFERENCE_FACTOR * self.fp32_bytes)

    @property
    def peak_bytes(self) -> int:
        return max(self.reference_peak_bytes, *(p.peak_bytes for p in self.artefacts))


def make_plan(recipe: Recipe, checkpoint: Checkpoint, output: Path) -> BuildPlan:
    """The plan of one bundle. Raises RequestError for what the target cannot hold or the model cannot be."""
    from edgesd.sampling.schedules import names

    target = targets.load(recipe.target, lowering=True)
    checkpoint = _sized(checkpoint, recipe)
    params = count_params(checkpoint)
    if recipe.chunks > 1 and not getattr(target, "chunked", False):
        raise RequestError(
            f"{recipe.chunks} chunks for {recipe.target}", "one: only coreml splits a UNet", "Drop --chunks"
        )
    artefacts = []
    prompts = () if recipe.prompt_bank is None else read_prompts(Path(recipe.prompt_bank))
    for component in params:
        if prompts and component.startswith("text_encoder"):
            continue
        for axes in _axes(component, recipe, target, checkpoint.spec.defaults.size_px):
            artefacts.append(_predict(recipe.target, component, axes, params[component]))
    samplers = recipe.samplers if recipe.samplers else default_samplers(checkpoint.spec.defaults.sampler)
    if unknown := [name for name in samplers if name not in (*names(), "default")]:
        raise RequestError(f"sampler {unknown[0]!r}", ", ".join(names()), "edgesd samplers lists them")
    destination = output / f"{checkpoint.spec.name}-{recipe.target}.edgesd"
    whole = sum(params.values())
    plan = BuildPlan(recipe, checkpoint, destination, tuple(artefacts), samplers, whole, prompts)
    _refuse(plan, target)
    return plan


def default_samplers(own: str) -> tuple[str, ...]:
    """The checkpoint's own sampler first, a plain and an ancestral one beside it."""
    return tuple(dict.fromkeys((own, "ddim", "euler_a")))


def _sized(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    if recipe.size_px is None:
        return checkpoint
    grid = checkpoint.spec.latent.downscale * 2 ** (_downs(checkpoint) - 1)
    if any(side % grid for side in recipe.size_px):
        height, width = recipe.size_px
        near = (
            f"multiples of {grid}, such as {round(width / grid) * grid or grid}x{round(height / grid) * grid or grid}"
        )
        raise RequestError(f"size {width}x{height} px", near, "Change --size-px")
    defaults = checkpoint.spec.defaults.model_copy(update={"size_px": recipe.size_px})
    return replace(checkpoint, spec=checkpoint.spec.model_copy(update={"defaults": defaults}))


def _downs(checkpoint: Checkpoint) -> int:
    config = json.loads((checkpoint.parts["unet"] / "config.json").read_text(encoding="utf-8"))
    return len(config["block_out_channels"])


def _axes(component: str, recipe: Recipe, target: Target, size_px: tuple[int, int]) -> list[Axes]:
    batches = (1, 2) if recipe.batch2 and component == "unet" else (1,)
    chunks = recipe.chunks if component == "unet" else 1
    return [
        Axes(size_px=size_px, precision=precision, form=form, batch=batch, chunk=(i, chunks))  # type: ignore[arg-type]
        for precision, form in flavours(recipe, target)
        if component in getattr(target, "form_components", {}).get(form, (component,))
        for batch in batches
        for i in range(chunks)
    ]


def flavours(recipe: Recipe, target: Target) -> list[tuple[str, str]]:
    """(precision, form) of the variants to make, the default one first. Raises RequestError for one it has not.

    Without --precision a target makes its own choice (`default_variants`); --form adds to it.
    """
    precisions = target.capabilities.precisions
    if recipe.precision is not None and recipe.precision not in precisions:
        raise RequestError(
            f"precision {recipe.precision} for {recipe.target}", ", ".join(precisions), "Change --precision"
        )
    if recipe.precision is None:
        own = ((precisions[0], _forms(target, precisions[0])[0]),)
        made = list(getattr(target, "default_variants", own))
    else:
        made = [(recipe.precision, _forms(target, recipe.precision)[0])]
    for form in recipe.forms:
        allowed = _forms(target, made[0][0])
        if form not in allowed:
            shown = ", ".join(f for f in allowed if f) or "none beside its own"
            raise RequestError(
                f"form {form!r} of {made[0][0]} for {recipe.target}", shown, "Change --form or --precision"
            )
        made.append((made[0][0], form))
    return list(dict.fromkeys(made))


def _forms(target: Target, precision: str) -> tuple[str, ...]:
    forms = getattr(target, "forms", None)
    return target.capabilities.forms if forms is None else forms(precision)


def _predict(target: str, component: str, axes: Axes, params: int) -> Planned:
    share = math.ceil(params / axes.chunk[1])
    peak = LIBRARIES_BYTES.get(target, max(LIBRARIES_BYTES.values())) + int(
        PEAK_FACTOR.get(target, max(PEAK_FACTOR.values())) * params * 4
    )
    return Planned(component, axes, share, share * WEIGHT_BYTES[axes.precision] + GRAPH_BYTES, peak)


def check_memory(plan: BuildPlan, limit_bytes: int) -> None:
    """Raises RequestError when a process of the plan is predicted to need more than this."""
    needed = {"the float32 reference": plan.reference_peak_bytes}
    needed |= {f"{p.component} {p.axes.precision}": p.peak_bytes for p in plan.artefacts}
    what, peak = max(needed.items(), key=lambda item: item[1])
    if peak > limit_bytes:
        gib = 1 << 30
        raise RequestError(
            f"{what} takes about {peak / gib:.1f} GiB to package for {plan.recipe.target} (predicted)",
            f"--max-ram of {limit_bytes / gib:.1f} GiB",
            f"Allow {math.ceil(peak / gib * 10) / 10:.1f} GiB, or choose a smaller model or --vae tiny",
        )


def _refuse(plan: BuildPlan, target: Target) -> None:
    devices.find(plan.recipe.device_classes)
    if plan.recipe.max_ram_bytes is not None:
        check_memory(plan, plan.recipe.max_ram_bytes)
    limit = target.capabilities.max_component_bytes
    for planned in plan.artefacts:
        check = getattr(target, "check_plan", None)
        if check is not None:
            wanted = inspect.signature(check).parameters
            options = {n: getattr(plan.recipe, n) for n in getattr(target, "lower_options", ()) if n in wanted}
            check(planned.component, planned.bytes, planned.axes, **options)
        elif limit is not None and planned.bytes > limit:
            raise RequestError(
                f"{planned.component} in {planned.axes.precision} takes {planned.bytes >> 20} MiB (predicted)",
                f"{limit >> 20} MiB a component on {plan.recipe.target}",
                "Choose --precision fp16, or a smaller model",
            )


def count_params(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters by component, from safetensors headers. Raises DataError for a broken file."""
    counts = {component: 0 for component, part in PART_OF.items() if part in checkpoint.parts}
    for part, folder in checkpoint.parts.items():
        for name, elements in _tensors(folder):
            for component in counts:
                if PART_OF[component] == part and _belongs(component, name):
                    counts[component] += elements
    return counts


def _belongs(component: str, tensor: str) -> bool:
    if component == "vae_decoder":
        return not tensor.startswith(("encoder.", "quant_conv."))
    if component == "vae_encoder":
        return not tensor.startswith(("decoder.", "post_quant_conv."))
    return True


def _tensors(folder: Path) -> list[tuple[str, int]]:
    """(name, elements) of every tensor in a part's weights; one set of files where several precisions lie there."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [f for f in files if ".fp16." not in f.name and ".non_ema." not in f.name]
    found: list[tuple[str, int]] = []
    for path in plain if plain else files:
        found += [(name, math.prod(entry["shape"])) for name, entry in safetensors_header(path).items()]
    return found
