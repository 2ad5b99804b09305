"""What a packaging request comes to before any work: components, variants, bytes, memory; and what cannot be.

Figures come from the checkpoint's safetensors headers alone; no weight is read. They are labelled predicted.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd import devices, memory, narrowing, pruning, targets
from edgesd.errors import RequestError
from edgesd.manifest import Axes, Downgrade
from edgesd.models.facts import safetensors_header
from edgesd.models.session import PART_OF
from edgesd.recipe import Recipe
from edgesd.runtime.bank import read_prompts
from edgesd.runtime.policy import width_cost

if TYPE_CHECKING:
    from edgesd.models.load import Checkpoint
    from edgesd.targets import Target

WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "hybrid": 1, "w8": 1}
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
        marks += [f"w{a.width:g}"] if a.width < 1 else []
        marks += [f"chunk{a.chunk[0] + 1}of{a.chunk[1]}"] if a.chunk[1] > 1 else []
        return f"{self.component}/{'-'.join(marks)}"


@dataclass(frozen=True)
class BuildPlan:
    """One bundle to make, whole: what, where, and the samplers whose tables go in.

    params: of the checkpoint's parts in memory before pruning, largest_params: of the largest, dense_unet_params: of
    the UNet; stored_bytes: of the largest's files.
    prompts: the only ones the bundle will know, () = any. What `edgesd.memory.fit` decided: one_at_a_time (a process a
    stage, one part of the model in it), downgrades, notes (what was decided, for people).
    """

    recipe: Recipe
    checkpoint: Checkpoint
    destination: Path
    artefacts: tuple[Planned, ...]
    samplers: tuple[str, ...]
    params: int = 0
    prompts: tuple[str, ...] = ()
    largest_params: int = 0
    stored_bytes: int = 0
    one_at_a_time: bool = False
    downgrades: tuple[Downgrade, ...] = ()
    notes: tuple[str, ...] = ()
    dense_unet_params: int = 0

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
        held = self.largest_params if self.one_at_a_time else self.params
        return memory.reference_peak(held, self.stored_bytes, math.prod(self.checkpoint.spec.defaults.size_px))

    @property
    def peak_bytes(self) -> int:
        """Of the largest process, predicted."""
        return memory.largest(self)[1]

    @property
    def pruning_peak_bytes(self) -> int:
        """Of the process that prunes the UNet, predicted."""
        spec = self.checkpoint.spec
        values = pruning.fitting_calls(self.dense_unet_params, spec) * pruning.latent_positions(spec)
        return memory.pruning_peak(self.params, self.dense_unet_params, values * self._first_channels)

    @property
    def planning_peak_bytes(self) -> int:
        """Of the process that plans the UNet's int8, predicted."""
        positions = pruning.latent_positions(self.checkpoint.spec)
        values = max(2 * positions, 8 * min(positions, 1024))  # rows: 8, of large pictures 2 (`compress.quantizing`)
        return memory.planning_peak(self.params, self.dense_unet_params, values * self._first_channels)

    @property
    def _first_channels(self) -> int:
        return _unet_config(self.checkpoint)["block_out_channels"][0]


def make_plan(recipe: Recipe, checkpoint: Checkpoint, output: Path) -> BuildPlan:
    """The plan of one bundle. Raises RequestError for what the target cannot hold or the model cannot be."""
    from edgesd.sampling.schedules import names

    target = targets.load(recipe.target, lowering=True)
    checkpoint = _sized(checkpoint, recipe)
    if recipe.prune is not None:
        pruning.check(checkpoint, recipe)
    dense = count_params(checkpoint)
    params = pruning.predicted_params(dense, recipe.prune)
    if recipe.chunks > 1 and not getattr(target, "chunked", False):
        raise RequestError(
            f"{recipe.chunks} chunks for {recipe.target}", "one: only coreml splits a UNet", "Drop --chunks"
        )
    narrowing.check(recipe, target)
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
    parts = {part: sum(n for name, n in dense.items() if PART_OF[name] == part) for part in checkpoint.parts}
    plan = BuildPlan(
        recipe, checkpoint, destination, tuple(artefacts), samplers, sum(parts.values()), prompts, max(parts.values()),
        max(sum(path.stat().st_size for path in _files(folder)) for folder in checkpoint.parts.values()),
        dense_unet_params=dense["unet"],
    )  # fmt: skip
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
    return len(_unet_config(checkpoint)["block_out_channels"])


def _unet_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return json.loads((checkpoint.parts["unet"] / "config.json").read_text(encoding="utf-8"))


def _axes(component: str, recipe: Recipe, target: Target, size_px: tuple[int, int]) -> list[Axes]:
    batches = (1, 2) if recipe.batch2 and component == "unet" else (1,)
    chunks = recipe.chunks if component == "unet" else 1
    return [
        Axes(size_px=size_px, precision=precision, form=form, batch=batch, width=width, chunk=(i, chunks))  # type: ignore[arg-type]
        for precision, form in flavours(recipe, target)
        if component in getattr(target, "form_components", {}).get(form, (component,))
        for width in (recipe.widths if component == "unet" else (1.0,))
        for batch in batches
        for i in range(chunks)
    ]


def flavours(recipe: Recipe, target: Target) -> list[tuple[str, str]]:
    """(precision, form) of the variants to make, the default one first. Raises RequestError for one it has not.

    Without --precision the profile chooses among the target's own: `default_variants` for quality, `int8_variants` for
    the others (its first precision or int8 where it names none); --form adds to them.
    """
    precisions: tuple[str, ...] = target.capabilities.precisions
    if recipe.precision is not None and recipe.precision not in precisions:
        raise RequestError(
            f"precision {recipe.precision} for {recipe.target}", ", ".join(precisions), "Change --precision"
        )
    if recipe.precision is not None:
        made: list[tuple[str, str]] = [(recipe.precision, _forms(target, recipe.precision)[0])]
    else:
        wanted, own = ("default_variants", precisions[0]) if recipe.profile == "quality" else ("int8_variants", "int8")
        if own not in precisions:
            raise RequestError(
                f"profile {recipe.profile} for {recipe.target}, which has no {own}", "--profile quality", "Choose it"
            )
        made = list(getattr(target, wanted, ((own, _forms(target, own)[0]),)))
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
    share = math.ceil(params * width_cost(axes.width) / axes.chunk[1])
    size = share * WEIGHT_BYTES[axes.precision] + GRAPH_BYTES
    pixels = math.prod(axes.size_px) if component.startswith("vae") else 0
    return Planned(component, axes, share, size, memory.lowering_peak(target, params, pixels))


def _refuse(plan: BuildPlan, target: Target) -> None:
    devices.find(plan.recipe.device_classes)
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
    """(name, elements) of every tensor in a part's weights."""
    return [
        (name, math.prod(entry["shape"])) for path in _files(folder) for name, entry in safetensors_header(path).items()
    ]


def _files(folder: Path) -> list[Path]:
    """A part's weights; one set of files where several precisions lie there."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [f for f in files if ".fp16." not in f.name and ".non_ema." not in f.name]
    return plain if plain else files
