"""The packager's stages for int8: real calls recorded once, a plan for each component, what an artefact of it owes.

Both run in children of the build and are cached like every stage, so that four targets share one calibration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesd import narrowing
from edgesd.buildplan import BuildPlan, Planned
from edgesd.compress.quantplan import QUANTIZED
from edgesd.memory import LARGE_PARAMS
from edgesd.models.session import PART_OF
from edgesd.recording import recorded
from edgesd.runtime.session import Arrays, Session, Watched
from edgesd.stages import key as stage_key

if TYPE_CHECKING:
    import torch

    from edgesd.compress.quantplan import QuantPlan
    from edgesd.manifest import Axes, ModelSpec
    from edgesd.models.load import LoadedModel
    from edgesd.models.modules import Component
    from edgesd.workers import Workers

Part = tuple[str, str, float]  # component, precision, width
CALLS, CALLS_OF_LARGE = 240, 80  # UNet rows recorded; the second where a whole run of a model takes minutes
PASS_MACS = 1.2e13  # what one pass over the calls of a component may cost: 30 rows of SD 1.5's UNet
# One step's output against float, at every noise level. Few-step models have no later step that mends an error.
GATES_DB = {"unet": 32.0}
OTHER_GATE_DB, FEW_STEP_EXTRA_DB, FEW_STEPS = 35.0, 4.0, 8
VERIFIED_RUNS = 2
# An artefact may be this much further from the truth than the simulation of its own plan: 1.25 times the error. Not
# less: one rounding that falls the other way draws the whole quantization noise anew.
PARITY_DB = 1.94
PLAN, TENSORS, CORRECTIONS = "plan.json", "tensors.safetensors", "corrections.safetensors"


def is_quantized(axes: Axes) -> bool:
    return axes.precision in QUANTIZED


def prepare(
    plan: BuildPlan, workers: Workers, libraries: tuple[str, ...], narrow: Path | None = None
) -> dict[Part, tuple[str, Path]]:
    """Part -> (key, folder) of the finished quantization stages that the build's artefacts need.

    narrow: the UNet's widths (edgesd/narrowing.py); each has a plan of its own.
    """
    wanted = {part(p): p for p in plan.artefacts if is_quantized(p.axes)}
    if not wanted:
        return {}
    given, parts = plan.recipe.calibration, (plan.checkpoint.sha256, plan.checkpoint.spec, plan.recipe.seed)
    if given is None:
        rows = CALLS_OF_LARGE if plan.params > LARGE_PARAMS else CALLS
        calls_key, calls = recorded(plan, workers, rows, plan.recipe.seed)
    else:
        calls = _given(plan, Path(given))
        calls_key = stage_key("calibration", json.loads((calls / "calibration.json").read_text(encoding="utf-8")))
    made: dict[Part, tuple[str, Path]] = {}
    for (component, precision, width), planned in wanted.items():
        gate = gate_db(plan.recipe.gate_db, component, plan.checkpoint.spec)
        # Stored once, a narrow width's integers are the widest one's, which comes first.
        widest = made[component, precision, 1.0] if width < 1 and narrowing.stored_mode(plan) == "shared" else None
        nested = narrowing.key(plan, planned)
        which = (*nested, width, *([widest[0]] if widest is not None else [])) if nested else ()
        key = stage_key(f"quantize-{component}", *parts, calls_key, precision, gate, *which, libraries=libraries)
        name = f"{component} {precision}{f' width {width:g}' if width < 1 else ''}: scales and sensitivities"
        work = (plan_component, plan, planned, gate, calls, narrow, None if widest is None else widest[1])
        made[component, precision, width] = key, workers.stage(name, planned.params * 4, key, *work)
    return made


def corrections(made: Mapping[Part, tuple[str, Path]]) -> dict[tuple[str, float], Path]:
    """(precision, width) -> what makes a narrow UNet's integers out of the widest one's, where it shares them."""
    files = {
        (precision, width): folder / CORRECTIONS for (_, precision, width), (_, folder) in made.items() if width < 1
    }
    return {which: path for which, path in files.items() if path.exists()}


def part(planned: Planned) -> Part:
    """What an artefact shares its scales with."""
    return planned.component, planned.axes.precision, planned.axes.width


def gate_db(asked: float | None, component: str, spec: ModelSpec) -> float:
    """What one call of a component's simulated plan must reach against float."""
    if asked is not None:
        return asked
    few = component == "unet" and (spec.guidance_embedding_dim > 0 or spec.defaults.steps <= FEW_STEPS)
    return GATES_DB.get(component, OTHER_GATE_DB) + (FEW_STEP_EXTRA_DB if few else 0.0)


def _given(plan: BuildPlan, folder: Path) -> Path:
    """The user's own calibration set. Raises RequestError where it is another model's, DataError where broken."""
    from edgesd.calibration.sets import open_set

    open_set(folder).require(plan.checkpoint)
    return folder.absolute()


# ---- in children ------------------------------------------------------------------------------------------------


def plan_component(
    plan: BuildPlan, planned: Planned, gate: float, calls: Path, narrow: Path | None, widest: Path | None, folder: Path
) -> None:
    """Writes the plan and the weights that go with it. Raises GateError, DataError as `quantizing.quantize`.

    A narrow width is held against itself in float, on what the widest one was asked. widest: the finished stage of the
    width whose integers this one shares.
    """
    from safetensors.torch import save_file

    from edgesd.calibration.sets import open_set
    from edgesd.compress.calls import batches
    from edgesd.compress.inherit import behind_cuts, from_widest, own_integers, save_corrections
    from edgesd.compress.quantize import adjusted, quantized
    from edgesd.compress.quantizing import quantize
    from edgesd.models.count import count
    from edgesd.models.load import load_parts, quiet
    from edgesd.models.modules import build

    name, found = planned.component, open_set(calls)
    with quiet():
        original = load_parts(plan.checkpoint, None if name == "unet" else [PART_OF[name]])
        axes = planned.axes.model_copy(update={"batch": 1})
        at = partial(narrowing.with_width, original.modules, narrow)
        model = replace(original, modules=at(axes.width))
        component = build(name, model.modules, model.spec, axes)
        macs = max(count(component.module, component.example).macs, 1)
        rows = 2 if name == "unet" else 1
        chosen = found.calls(name, limit=max(8, min(CALLS, int(PASS_MACS / macs)) // rows))
        shared: dict[str, Any] = {}
        if narrow is not None and name == "unet" and narrowing.stored_mode(plan) == "shared":
            shared["kept"] = behind_cuts(component)
        if widest is not None:
            wide = build(name, at(1.0), model.spec, axes)
            shared["start"] = start = from_widest(component, wide, axes.width, *read(widest))
            save_corrections(start.corrections, folder / CORRECTIONS)
        made = quantize(
            component, batches(name, chosen, model.spec), planned.axes.precision,  # type: ignore[arg-type]
            source_sha256=plan.checkpoint.sha256, gate_db=gate,
            calibration=f"{len(chosen) * rows} rows of {found.info.runs} runs, {found.info.sampler}", **shared,
        )  # fmt: skip
        final, tensors = made.plan, made.tensors
        if shared:
            tensors |= own_integers(adjusted(component, tensors), final)
        if name == "unet":
            simulated = quantized(adjusted(component, tensors), final, "simulated")
            final = final.model_copy(update={"latents_snr_db": round(_latents_db(plan, model, simulated), 2)})
    (folder / PLAN).write_text(final.model_dump_json(indent=1), encoding="utf-8")
    save_file({path: tensor.contiguous() for path, tensor in tensors.items()}, folder / TENSORS)


def _latents_db(plan: BuildPlan, model: LoadedModel, simulated: Component) -> float:
    """Finished latents of a few runs with a simulated UNet, against float's: the mean SNR."""
    from edgesd.parity import snr_db
    from edgesd.runtime.generate import Picture, Settings, sample
    from edgesd.sources import torch_pipeline

    pipeline = torch_pipeline(model)
    spec, found = plan.checkpoint.spec, []
    for seed in range(VERIFIED_RUNS):
        settings = Settings(
            prompt=plan.prompts[0] if plan.prompts else _prompt(plan), seed=seed, sampler=spec.defaults.sampler,
            num_inference_steps=spec.defaults.steps, guidance_scale=spec.defaults.guidance,
        )  # fmt: skip
        both = []
        for one in (pipeline, replace(pipeline, session=Simulated(pipeline.session, {"unet": simulated}))):
            *_, last = (event.latents for event in sample(one, settings) if not isinstance(event, Picture))
            both.append(np.array(last))
        found.append(snr_db(*both))
    return float(np.mean(found))


def _prompt(plan: BuildPlan) -> str:
    from edgesd.golden import prompt_for

    return prompt_for(plan.checkpoint.spec)


class Simulated(Watched):
    """A session whose listed components are torch modules, such as simulated int8 ones; the rest as it was."""

    def __init__(self, session: Session, components: Mapping[str, Component]) -> None:
        super().__init__(session)
        self._components = dict(components)

    def run(self, component: str, inputs: Arrays) -> dict[str, np.ndarray]:
        if component not in self._components:
            return self._session.run(component, inputs)
        return run_component(self._components[component], inputs)


def run_component(component: Component, inputs: Arrays) -> dict[str, np.ndarray]:
    """A component's outputs by name, as a session gives them; any number of rows."""
    import torch

    with torch.inference_mode():
        made = component.module(*(torch.from_numpy(np.ascontiguousarray(inputs[i.name])) for i in component.inputs))
    each = made if isinstance(made, tuple) else (made,)
    return {spec.name: tensor.numpy() for spec, tensor in zip(component.outputs, each, strict=True)}


def read(folder: Path) -> tuple[QuantPlan, dict[str, torch.Tensor]]:
    """A finished stage: the plan and the weights that go with it."""
    from safetensors.torch import load_file

    from edgesd.compress.quantplan import QuantPlan

    return QuantPlan.parse((folder / PLAN).read_bytes()), load_file(folder / TENSORS)


def owed_db(component: Component, plan: QuantPlan, outputs: tuple[str, ...], truth: Path, axes: Axes) -> float | None:
    """The SNR that an artefact of this plan must reach on the golden calls: its own simulation's, less the margin.

    component: with the plan's weights. outputs: kinds of layers whose outputs the target quantizes. truth: a bundle's
    folder with golden vectors. None where they hold no call at these axes.
    """
    from edgesd import golden
    from edgesd.compress.quantize import quantized
    from edgesd.parity import snr_db

    stored = golden.load(truth / golden.FACTS, truth / golden.TENSORS)
    calls = stored.calls(component.name, axes.batch, axes.width) if stored.fits(axes) else []
    if not calls:
        return None
    simulated = quantized(component, plan, "simulated", outputs)  # type: ignore[arg-type]
    worst = 200.0
    for call in calls:
        got = run_component(simulated, call.inputs)
        worst = min(worst, *(snr_db(call.outputs[name], got[name]) for name in call.outputs))
    return round(worst - PARITY_DB, 3)
