"""The build, top to bottom: checkpoint → components lowered per target → bundle → measured → moved in.

Every converter runs in a child process: its memory is given back, and its crash is an error message. Finished stages
are cached by what they depend on, so a killed run continues and a changed flag redoes only what it touches.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgesd import bundle, golden, memory, narrowing, pruning, quantstages, targets
from edgesd.buildplan import BuildPlan, Planned, make_plan
from edgesd.errors import GateError, RequestError
from edgesd.files import copy_tree
from edgesd.governing import ship_policies
from edgesd.manifest import (
    Component,
    Downgrade,
    Manifest,
    ModelSpec,
    Provenance,
    SamplerFile,
    TensorSpec,
    Variant,
)
from edgesd.models.session import PART_OF
from edgesd.packaged import Made, Packaged
from edgesd.recipe import make_recipe
from edgesd.stages import key as stage_key
from edgesd.validate import Report, note, validate
from edgesd.workers import Workers

PROMPTS = "prompts/bank.safetensors"
LIBRARIES = (
    "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "litert-torch",
    "ai-edge-litert", "coremltools", "numpy",
)  # fmt: skip


def package_all(
    fields: dict[str, Any], names: list[str], output: Path, *, force: bool = False, dry_run: bool = False
) -> Packaged:
    """Makes a bundle for each target in `names` ("all" = every built-in one). Nothing starts before every plan holds.

    fields: of `Recipe`, the target apart. Raises RequestError, SetupError, DataError, or GateError when a bundle falls
    short of its gate (then it is not shipped; those made before it stay).
    """
    from edgesd.models.load import open_checkpoint

    wanted = list(dict.fromkeys(n for name in names for n in (targets.TARGETS if name == "all" else (name,))))
    recipes = [make_recipe(**fields, target=name) for name in wanted]
    for name in wanted:
        targets.load(name, lowering=True)
    checkpoint = open_checkpoint(**recipes[0].model())
    result = Packaged([memory.fit(make_plan(recipe, checkpoint, output)) for recipe in recipes])
    if dry_run:
        return result
    for plan in result.plans:
        if plan.destination.exists() and not force:
            raise RequestError(
                f"{plan.destination} exists", "a new folder, or --force", "Add --force, or choose another -o"
            )
    began = time.perf_counter()
    for plan in result.plans:
        result.made.append(build(plan, force=force))
    result.seconds = time.perf_counter() - began
    return result


def build(plan: BuildPlan, *, force: bool = False) -> Made:
    """Makes one bundle: lowers, records the truth, writes, measures, and ships it if it reaches its gate."""
    began = time.perf_counter()
    for line in plan.notes:
        print(f"{plan.recipe.target}: {line}", file=sys.stderr)
    with bundle.writing(plan.destination, force=force) as folder, Workers(plan) as workers:
        plan, smaller = pruning.pruned(plan, workers)
        narrow = narrowing.made(plan, workers)
        truth = workers.stage("reference", plan.fp32_bytes, _truth_key(plan), _record_truth, plan, narrow)
        copy_tree(truth / "files", folder)
        facts = json.loads((truth / "facts.json").read_text(encoding="utf-8"))
        variants: dict[str, list[Variant]] = {}
        downgrades = list(plan.downgrades)
        scales = quantstages.prepare(plan, workers, LIBRARIES, narrow)
        for planned in plan.artefacts:
            key, quant = scales.get(quantstages.part(planned), (None, None))
            made = workers.stage(
                planned.folder, planned.params * 4, _lower_key(plan, planned, key), _lower, plan, planned, quant, truth,
                narrow,
            )  # fmt: skip
            copy_tree(made / "files", folder / planned.folder)
            variant, lost = _variant(planned, json.loads((made / "lowered.json").read_text(encoding="utf-8")))
            variants.setdefault(planned.component, []).append(variant)
            downgrades += lost
        workers.close()
        variants = narrowing.shared(plan, folder, variants, quantstages.corrections(scales))
        manifest = _manifest(plan, facts, variants, downgrades, folder)
        bundle.seal(folder, manifest)
        manifest = _measured(plan, folder, manifest, workers)
        quality = manifest.quality | smaller | narrowing.told(narrow, folder)
        manifest = manifest.model_copy(update={"quality": quality})
        bundle.seal(folder, manifest)
    return Made(plan.destination, manifest, time.perf_counter() - began, workers.peak_bytes, _prompt(plan))


def _prompt(plan: BuildPlan) -> str:
    return plan.prompts[0] if plan.prompts else golden.prompt_for(plan.checkpoint.spec)


# ---- stages ----------------------------------------------------------------------------------------------------


def _truth_key(plan: BuildPlan) -> str:
    c = plan.checkpoint
    parts = (c.sha256, c.spec, plan.samplers, plan.recipe.steps, plan.prompts, *narrowing.truth_key(plan))
    return stage_key("reference", *parts, libraries=LIBRARIES)


def _lower_key(plan: BuildPlan, planned: Planned, scales: str | None) -> str:
    parts: tuple[Any, ...] = (plan.checkpoint.sha256, plan.checkpoint.spec, planned.axes, _options(plan))
    parts += narrowing.key(plan, planned)
    parts += (scales, _truth_key(plan)) if scales is not None else ()
    return stage_key(f"{plan.recipe.target}-{planned.component}", *parts, libraries=LIBRARIES)


def _options(plan: BuildPlan) -> dict[str, Any]:
    """The fields of the recipe that the target's `lower` takes as options."""
    wanted = getattr(targets.load(plan.recipe.target), "lower_options", ())
    return {name: getattr(plan.recipe, name) for name in wanted}


def _record_truth(plan: BuildPlan, narrow: Path | None, folder: Path) -> None:
    """In a child: tables, tokenizer, golden vectors and preview factors from the float32 reference."""
    from edgesd.models.ingredients import tokenizer_json
    from edgesd.models.load import load_parts, quiet
    from edgesd.models.preview import fit_rgb
    from edgesd.runtime.bank import prepare
    from edgesd.runtime.table import save_tables
    from edgesd.sampling.compile import compile_tables
    from edgesd.sources import torch_pipeline

    files, steps = folder / "files", range(plan.recipe.steps[0], plan.recipe.steps[1] + 1)
    (files / "samplers").mkdir(parents=True)
    with quiet():
        for name in plan.samplers:
            tables = compile_tables(name, plan.checkpoint.spec.scheduler, steps)
            save_tables(files / "samplers" / f"{name}.safetensors", tables)
        for index, spec in enumerate(() if plan.prompts else plan.checkpoint.spec.tokenizers):
            (files / spec.file).parent.mkdir(parents=True, exist_ok=True)
            (files / spec.file).write_text(tokenizer_json(plan.checkpoint, index), encoding="utf-8")
        model: Any = plan.checkpoint if plan.one_at_a_time else load_parts(plan.checkpoint)
        truth = torch_pipeline(model, **narrowing.narrower(plan, model, narrow))
        if plan.prompts:
            bank = prepare(truth, plan.prompts)
            truth = replace(truth, bank=bank, tokenizers=())
            (files / PROMPTS).parent.mkdir(exist_ok=True)
            (files / PROMPTS).write_bytes(bank.dump())
        settings = golden.settings_for(plan.checkpoint.spec, {name: steps for name in plan.samplers}, _prompt(plan))
        recorded = golden.record(truth, settings)
        recorded.save(files)
        factors, bias = fit_rgb(truth)
    facts = {"rgb_factors": factors, "rgb_bias": bias, "libraries": _versions()}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _lower(
    plan: BuildPlan, planned: Planned, scales: Path | None, truth: Path, narrow: Path | None, folder: Path
) -> None:
    """In a child: one component, one variant, into `folder/files`. scales: its finished quantization stage; narrow:
    the UNet's widths (edgesd/narrowing.py)."""
    from edgesd.compress.quantize import adjusted
    from edgesd.models.count import count
    from edgesd.models.load import load_parts, quiet
    from edgesd.models.modules import build as build_component

    target = targets.load(plan.recipe.target, lowering=True)
    with quiet():
        model = load_parts(plan.checkpoint, [PART_OF[planned.component]])
        modules = narrowing.with_width(model.modules, narrow, planned.axes.width)
        component = build_component(planned.component, modules, model.spec, planned.axes)
        options = _options(plan)
        if scales is not None:
            options["plan"], tensors = quantstages.read(scales)
            component = adjusted(component, tensors)
        (folder / "files").mkdir()
        lowered = target.lower(component, planned.axes, folder / "files", **options)
        whole = count(component.module, component.example)
        owed = None
        if lowered.plan is not None:
            (folder / "files" / quantstages.PLAN).write_text(lowered.plan.model_dump_json(), encoding="utf-8")
            quantized_outputs = target.capabilities.int8_outputs
            owed = quantstages.owed_db(component, lowered.plan, quantized_outputs, truth / "files", planned.axes)
    params, macs = (whole.params, whole.macs) if lowered.cost is None else lowered.cost
    record = {
        "files": [f.as_posix() for f in lowered.files],
        "inputs": [t.model_dump(mode="json") for t in lowered.inputs],
        "outputs": [t.model_dump(mode="json") for t in lowered.outputs],
        "downgrades": [d.model_dump(mode="json") for d in lowered.downgrades],
        "compute_units": lowered.compute_units,
        "params": params,
        "macs": macs,
        "plan": None if lowered.plan is None else quantstages.PLAN,
        "gate_db": owed,
    }
    (folder / "lowered.json").write_text(json.dumps(record), encoding="utf-8")


# ---- manifest --------------------------------------------------------------------------------------------------


def _variant(planned: Planned, record: dict[str, Any]) -> tuple[Variant, list[Downgrade]]:
    variant = Variant(
        axes=planned.axes,
        files=tuple(f"{planned.folder}/{f}" for f in record["files"]),
        inputs=tuple(TensorSpec(**t) for t in record["inputs"]),
        outputs=tuple(TensorSpec(**t) for t in record["outputs"]),
        params=record["params"],
        macs=record["macs"],
        compute_units=record["compute_units"],
        plan=None if record["plan"] is None else f"{planned.folder}/{record['plan']}",
        gate_db=record["gate_db"],
    )
    return variant, [Downgrade(**d) for d in record["downgrades"]]


def _manifest(
    plan: BuildPlan,
    facts: dict[str, Any],
    variants: dict[str, list[Variant]],
    downgrades: list[Downgrade],
    folder: Path,
) -> Manifest:
    from edgesd import __version__

    checkpoint, low = plan.checkpoint, plan.recipe.steps
    steps = tuple(range(low[0], low[1] + 1))
    manifest = Manifest(
        target=plan.recipe.target,
        critical=_critical(plan),
        model=_shipped_spec(plan, facts),
        components=tuple(Component(name=name, variants=tuple(v)) for name, v in variants.items()),  # type: ignore[arg-type]
        samplers=tuple(SamplerFile(name=n, file=f"samplers/{n}.safetensors", steps=steps) for n in plan.samplers),
        provenance=Provenance(
            source=checkpoint.source,
            revision=checkpoint.revision,
            sha256=checkpoint.sha256,
            licence=checkpoint.licence,
            edgesd=__version__,
            libraries=facts["libraries"],
            recipe=plan.recipe.echo(),
            ingredients=checkpoint.ingredients,
            made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        ),
        downgrades=tuple(downgrades),
        prompts=PROMPTS if plan.prompts else None,
        policies=ship_policies(folder),
        files=bundle.entries(folder),
    )
    return golden.attach(manifest)


def _critical(plan: BuildPlan) -> tuple[str, ...]:
    """What a reader must know of prompts to draw what was asked for."""
    if plan.prompts:
        return ("prompt-bank",)
    tokenizers = plan.checkpoint.spec.tokenizers
    used = {
        "chunked-prompts": any(t.chunks > 1 for t in tokenizers),
        "expanded-tokens": any(t.expand for t in tokenizers),
    }
    return tuple(name for name, needed in used.items() if needed)


def _shipped_spec(plan: BuildPlan, facts: dict[str, Any]) -> ModelSpec:
    """The checkpoint's facts as they hold in this bundle: its size, its samplers, its preview factors."""
    spec = plan.checkpoint.spec
    factors = {"rgb_factors": tuple(map(tuple, facts["rgb_factors"])), "rgb_bias": tuple(facts["rgb_bias"])}
    latent = spec.latent.model_copy(update=factors)
    sampler = spec.defaults.sampler if spec.defaults.sampler in plan.samplers else plan.samplers[0]
    steps = min(max(spec.defaults.steps, plan.recipe.steps[0]), plan.recipe.steps[1])
    defaults = spec.defaults.model_copy(update={"sampler": sampler, "steps": steps})
    tokenizers = () if plan.prompts else spec.tokenizers
    return spec.model_copy(update={"latent": latent, "defaults": defaults, "tokenizers": tokenizers})


def _measured(plan: BuildPlan, folder: Path, manifest: Manifest, workers: Workers) -> Manifest:
    """Runs the sealed bundle against its golden vectors in a child; the manifest with what came of it, or GateError."""
    report: Report = workers.alone("validate", _validate, folder, plan.one_at_a_time)
    if not report.passed:
        try:
            report.require()
        except GateError as error:
            raise GateError(error.came, error.allowed, f"Nothing was shipped. {error.do}") from None
    return note(manifest, report)


def _validate(folder: Path, one_at_a_time: bool) -> Report:
    """In a child: the bundle's report. one_at_a_time: opening a component lets go of the others."""
    return validate(folder, one_at_a_time=True) if one_at_a_time else validate(folder)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
