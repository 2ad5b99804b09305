"""`package --widths`: one UNet at several widths, made once for all targets, and on disk once where a target shares.

narrow = made(plan, workers)            None for width 1 alone; else the folder of a finished stage
modules = with_width(modules, narrow, axes.width)
variants = shared(plan, folder, variants, corrections)     mode "shared": weights stored once
quality = told(narrow, …)               what a width saves and loses, for the manifest
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd import targets
from edgesd.child import in_child
from edgesd.errors import RequestError
from edgesd.manifest import Variant
from edgesd.memory import LARGE_PARAMS
from edgesd.recording import recorded
from edgesd.stages import LIBRARIES
from edgesd.stages import key as stage_key

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgesd.buildplan import BuildPlan, Planned
    from edgesd.compress.calls import Batch
    from edgesd.compress.widths import Nested
    from edgesd.models.load import LoadedModel
    from edgesd.recipe import Recipe
    from edgesd.targets import Target
    from edgesd.workers import Workers

CALLS, CALLS_OF_LARGE = 480, 80
FACTS = "facts.json"


def mode(recipe: Recipe, target: Target) -> str:
    """How the widths of a request are stored: as asked for, else shared where the target can."""
    if recipe.width_mode is not None:
        return recipe.width_mode
    return "shared" if hasattr(target, "share_widths") else "separate"


def check(recipe: Recipe, target: Target) -> None:
    """RequestError for widths that cannot be, or that the target cannot share. Before any work."""
    from edgesd.compress.widths import check_widths

    if recipe.width_mode is not None and recipe.widths == (1.0,):
        raise RequestError("--width-mode without --widths", "several widths", "Add --widths 1,0.75,0.5")
    check_widths(recipe.widths, mode(recipe, target))
    if recipe.widths == (1.0,):
        return
    if recipe.max_ram_bytes is not None:
        raise RequestError("--widths with --max-ram", "one or the other: widths need the whole model", "Drop one")
    if recipe.chunks > 1:
        raise RequestError("--widths with --chunks", "one or the other", "Drop --chunks")
    if mode(recipe, target) == "shared" and not hasattr(target, "share_widths"):
        raise RequestError(f"shared widths for {recipe.target}", "separate: its runtime folds no slices at load",
                           "Choose --width-mode separate")  # fmt: skip


def made(plan: BuildPlan, workers: Workers) -> Path | None:
    """The stage that holds the UNet at every width; made now where it is not cached. None for width 1 alone."""
    if plan.recipe.widths == (1.0,):
        return None
    rows = CALLS_OF_LARGE if plan.dense_unet_params > LARGE_PARAMS else CALLS
    calls_key, calls = recorded(plan, workers, rows)
    key = stage_key("widths", calls_key, stored_mode(plan), plan.recipe.widths, libraries=LIBRARIES)
    return workers.stage("widths", plan.fp32_bytes, key, _make, plan, calls)


def stored_mode(plan: BuildPlan) -> str:
    return mode(plan.recipe, targets.load(plan.recipe.target))


def truth_key(plan: BuildPlan) -> tuple[Any, ...]:
    """What the recorded truth depends on besides the checkpoint: nothing for width 1 alone."""
    return () if plan.recipe.widths == (1.0,) else (stored_mode(plan), plan.recipe.widths)


def key(plan: BuildPlan, planned: Planned) -> tuple[Any, ...]:
    """What an artefact depends on besides its axes."""
    return truth_key(plan) if planned.component == "unet" else ()


def _make(plan: BuildPlan, recorded_calls: Path, folder: Path) -> None:
    """In a child: units ordered, widths restored, what each loses measured."""
    from edgesd.calibration.sets import open_set
    from edgesd.compress.calls import batches
    from edgesd.compress.widths import nest, save
    from edgesd.models.load import load_parts, quiet

    with quiet():
        model = load_parts(plan.checkpoint)
        found = open_set(recorded_calls)
        calls = found.calls("unet")
        nested = nest(model, plan.recipe.widths, stored_mode(plan), calls)
        save(nested, folder)
        losses = sensitivity(model, nested, batches("unet", calls, model.spec), found.info)
    facts = {
        "mode": nested.plan.mode,
        "macs_off": {f"{w:g}": round(off, 4) for w, off in nested.plan.off().items()},
        "params": {f"{c.width:g}": c.size.params for c in nested.plan.widths},
        "sensitivity": {f"{w:g}": [float(f"{x:.4g}") for x in row] for w, row in losses.items()},
    }
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def sensitivity(model: LoadedModel, nested: Nested, lots: Sequence[Batch], info: Any) -> dict[float, tuple[float, ...]]:
    """Width -> by tenths of the run, the error that narrow rows there put into the finished picture.

    Error of the guided output on recorded calls, times what the sampler makes of that row's output in the finished
    latents (the dense table's coefficient), squared, mean over the latents; rows taken as independent, and the
    model's answers to changed inputs left out: it ranks parts of a run and predicts no picture.
    """
    import numpy as np
    import torch

    from edgesd.runtime.widths import BINS
    from edgesd.sampling.compile import output_gains

    sums = {w: np.zeros(BINS) for w in nested.modules if w < 1}
    counts = np.zeros(BINS)
    steps = info.steps[0]
    gains = output_gains(info.sampler, model.spec.scheduler, steps)
    tenth = [min(BINS - 1, row * BINS // len(gains)) for row in range(len(gains))]
    per_bin = np.bincount(tenth, minlength=BINS)
    with torch.no_grad():
        for batch in lots:
            rows = [row for row in batch.steps]
            truth = guided(batch, nested.modules[1.0])
            for row in rows:
                counts[tenth[row]] += 1
            for width, total in sums.items():
                wrong = (guided(batch, nested.modules[width]) - truth).square().flatten(1).mean(1)
                for row, error in zip(rows, wrong.tolist(), strict=True):
                    total[tenth[row]] += error * gains[row] ** 2
    return {w: tuple((total / np.maximum(counts, 1) * per_bin).tolist()) for w, total in sums.items()}


def guided(batch: Batch, module: torch.nn.Module) -> torch.Tensor:
    """A batch's outputs [calls, C, h, w], both halves combined as guidance combines them."""
    output = batch.forward(module)
    if not batch.pairs:
        return output
    uncond, cond = output.chunk(2)
    return uncond + batch.guidance.view(-1, 1, 1, 1) * (cond - uncond)


def with_width(modules: Mapping[str, Any], narrow: Path | None, width: float) -> dict[str, Any]:
    """A checkpoint's modules with the UNet at a width of a finished stage; as they are where there is none."""
    if narrow is None or "unet" not in modules:
        return dict(modules)
    from edgesd.compress.widths import load

    return {**modules, "unet": load(modules["unet"], narrow, width)}


def narrower(plan: BuildPlan, model: Any, narrow: Path | None) -> dict[str, Any]:
    """Options of `torch_pipeline` for the recorded truth: width -> what makes its UNet, of the widths below 1."""
    if narrow is None:
        return {}

    def made(width: float) -> Any:
        return with_width(model.modules, narrow, width)["unet"]

    return {"narrow": {width: partial(made, width) for width in plan.recipe.widths if width < 1}}


def shared(
    plan: BuildPlan, folder: Path, variants: dict[str, list[Variant]], corrections: Mapping[tuple[str, float], Path]
) -> dict[str, list[Variant]]:
    """The variants once each narrow artefact in the bundle's folder is rewritten onto the widest one's weights.

    corrections: of the int8 layers, by precision and width.
    """
    if plan.recipe.widths == (1.0,) or stored_mode(plan) != "shared":
        return variants
    unet = variants["unet"]
    wide = {v.axes.model_copy(update={"width": 1.0}): v for v in unet if v.axes.width == 1}
    rewritten = []
    for variant in unet:
        source = wide[variant.axes.model_copy(update={"width": 1.0})]
        if variant is not source:
            old = Path(variant.files[0])
            new = Path(source.files[0]).with_name(f"{old.stem}-w{variant.axes.width:g}{old.suffix}")
            paths = [folder / f for f in (source.files[0], variant.files[0])]
            ran = in_child(
                _share, plan.recipe.target, corrections.get((variant.axes.precision, variant.axes.width)), *paths,
                folder / new, label=f"{plan.recipe.target}: share",
            )  # fmt: skip
            files = tuple(Path(f).relative_to(folder).as_posix() for f in ran.value)
            changed: dict[str, Any] = {"files": files}
            if variant.plan is not None:
                changed["plan"] = new.with_name(f"plan-w{variant.axes.width:g}.json").as_posix()
                (folder / variant.plan).rename(folder / changed["plan"])
            shutil.rmtree((folder / old).parent)
            variant = variant.model_copy(update=changed)
        rewritten.append(variant)
    return {**variants, "unet": rewritten}


def _share(name: str, corrections: Path | None, wide: Path, narrow: Path, new: Path) -> list[str]:
    """In a child: converters are large."""
    from edgesd.compress.inherit import load_corrections

    target: Any = targets.load(name, lowering=True)
    given = [] if corrections is None else load_corrections(corrections)
    return [str(path) for path in target.share_widths(wide, narrow, new, given)]


def told(narrow: Path | None, folder: Path, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the manifest's quality says of widths: `mode`, `macs_off`, `params`, `sensitivity`, `load_calls`."""
    if narrow is None:
        return {}
    facts = json.loads((narrow / FACTS).read_text(encoding="utf-8"))
    ran = in_child(partial(_loads, folder), label="widths: loading")
    return {"widths": facts | {"load_calls": ran.value}}


def _loads(folder: Path) -> dict[str, float]:
    """In a child: the median time that a change to each width takes, in calls of the widest."""
    import statistics
    import time

    from edgesd.sources import open_bundle

    session = open_bundle(folder).session
    inputs = _inputs(folder)
    opened: dict[float, list[float]] = {}
    session.run("unet", inputs)
    calls = []
    for _ in range(5):
        began = time.perf_counter()
        session.run("unet", inputs)
        calls.append(time.perf_counter() - began)
    for _ in range(3):
        for width in session.widths("unet"):
            session.use_width("unet", width)
            session.unload("unet")
            began = time.perf_counter()
            session.load("unet")
            opened.setdefault(width, []).append(time.perf_counter() - began)
    return {f"{w:g}": round(statistics.median(seconds) / statistics.median(calls), 2) for w, seconds in opened.items()}


def _inputs(folder: Path) -> dict[str, np.ndarray]:
    from edgesd import bundle, golden

    return dict(golden.read(bundle.read(folder)).calls("unet")[0].inputs)
