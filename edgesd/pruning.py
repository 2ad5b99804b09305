"""`package --prune`: the UNet made smaller once, in stages of their own, before any target lowers it.

    plan, told = pruned(plan, workers)

Afterwards the plan's checkpoint is the pruned one, so all that follows (calibration for int8, lowering, the recorded
truth) sees that model and no other. What pruning cost is measured here, against the model it began with.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import RequestError
from edgesd.recording import recorded
from edgesd.stages import LIBRARIES
from edgesd.stages import key as stage_key

if TYPE_CHECKING:
    from edgesd.buildplan import BuildPlan
    from edgesd.manifest import ModelSpec
    from edgesd.models.load import Checkpoint, LoadedModel
    from edgesd.recipe import Recipe
    from edgesd.runtime.settings import Settings
    from edgesd.workers import Workers

PART = "unet"
FACTS = "pruning.json"
# Recorded UNet rows: what the embedded model's figures rest on, what a UNet of SD 1.5's size has time for, and the
# latent positions that fit in memory side by side (64 rows of 256 px pictures, 16 of 512 px).
CALLS, FEWER_CALLS, BIG_PARAMS = 480, 64, 100_000_000
LATENTS, LEAST_CALLS = 64 * 32 * 32, 16


def calls_for(unet_params: int) -> int:
    """UNet rows to record of a model of this size."""
    return CALLS if unet_params < BIG_PARAMS else FEWER_CALLS


def fitting_calls(unet_params: int, spec: ModelSpec) -> int:
    """Of them, those to prune with: as many as memory holds side by side."""
    return min(calls_for(unet_params), max(LEAST_CALLS, LATENTS // latent_positions(spec)))


def latent_positions(spec: ModelSpec) -> int:
    """Of one picture of the default size."""
    return math.prod(side // spec.latent.downscale for side in spec.defaults.size_px)


def check(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises RequestError for a model that cannot be pruned (again), and for a set of its calls, before any work."""
    from edgesd.compress.prune import refuse_twice

    if recipe.calibration is not None:
        came, allowed = "--prune with --calibration", "one of them: int8 needs calls of the pruned model, which is new"
        raise RequestError(came, allowed, "Drop --calibration, or prune first with edgesd prune")
    if len(recipe.widths) > 1:
        came = "--prune with --widths"
        raise RequestError(came, "one of them: each narrow width is pruned already", "Drop --prune, or choose widths")
    refuse_twice(checkpoint, PART)


def predicted_params(params: dict[str, int], ratio: float | None) -> dict[str, int]:
    """Parameters by component once `ratio` of the UNet's MACs is off: parameters fall about as MACs do."""
    return params if ratio is None else {**params, PART: round(params[PART] * (1 - ratio))}


def pruned(plan: BuildPlan, workers: Workers) -> tuple[BuildPlan, dict[str, Any]]:
    """The plan with its pruned checkpoint, and what the manifest's quality says of it: `pruned`.

    As it is, and nothing to say, where nothing is to be pruned. Two cached stages: the recorded calls, which serve
    every ratio, and the pruned part.
    """
    ratio, checkpoint = plan.recipe.prune, plan.checkpoint
    if ratio is None:
        return plan, {}
    calls_key, calls = recorded(plan, workers, fitting_calls(plan.dense_unet_params, checkpoint.spec))
    made_key = stage_key("prune", calls_key, ratio, libraries=LIBRARIES)
    made = workers.stage(f"prune {ratio:g}", plan.fp32_bytes, made_key, _prune, checkpoint, ratio, calls)
    told = json.loads((made / FACTS).read_text(encoding="utf-8"))
    return replace(plan, checkpoint=_smaller(checkpoint, made)), {"pruned": told}


def _smaller(checkpoint: Checkpoint, made: Path) -> Checkpoint:
    from edgesd.models.facts import source_hash

    identity = hashlib.sha256(f"{checkpoint.sha256} {source_hash(made / PART)}".encode()).hexdigest()
    parts = {**checkpoint.parts, PART: made / PART}
    return replace(checkpoint, parts=parts, finished=(*checkpoint.finished, PART), sha256=identity)


def _prune(checkpoint: Checkpoint, ratio: float, calls: Path, folder: Path) -> None:
    """In a child: the pruned part with its plan, and its cost in quality."""
    from edgesd.calibration.sets import open_set
    from edgesd.compress.prune import prune
    from edgesd.models.load import load_parts, quiet
    from edgesd.models.saving import save_part
    from edgesd.models.weights import SIDECAR

    with quiet():
        model = load_parts(checkpoint)
        made = prune(model, ratio, open_set(calls).calls(PART))
        save_part(PART, checkpoint.parts[PART], made.module, folder)
        noted = {"pruned": {PART: made.plan.model_dump(mode="json")}}
        (folder / SIDECAR).write_text(json.dumps(noted), encoding="utf-8")
        told = made.plan.summary() | {"against_original": measure(model, made.module)}
    (folder / FACTS).write_text(json.dumps(told, indent=1), encoding="utf-8")


def measure(model: LoadedModel, smaller: Any) -> dict[str, float]:
    """SNR of the pruned UNet's outputs along one run of the original, and PSNR of the picture each draws alone."""
    from edgesd import golden
    from edgesd.parity import run_calls
    from edgesd.runtime.generate import generate
    from edgesd.runtime.image import psnr_db
    from edgesd.sources import torch_pipeline

    original = torch_pipeline(model)
    settings: Settings = golden.settings_for(model.spec, {model.spec.defaults.sampler: (golden.STEPS,)})
    stored = golden.record(original, settings)
    other = torch_pipeline(replace(model, modules={**model.modules, PART: smaller}))
    same: dict[str, Any] = {
        "sampler": settings.sampler,
        "num_inference_steps": settings.num_inference_steps,
        "seed": settings.seed,
    }
    drawn = generate(other, settings.prompt, guidance_scale=settings.guidance_scale, **same)[0].image
    stride = stored.facts.picture_stride
    return {
        "unet_snr_db": round(run_calls(other.session, stored, PART, 1)[0], 2),
        "picture_psnr_db": round(psnr_db(stored.tensors["picture"], drawn[::stride, ::stride]), 2),
    }


def describe(told: dict[str, Any]) -> tuple[tuple[tuple[str, str, str, str], ...], str]:
    """Rows for a table (what, before, after, off) by kind of channel, MACs and parameters; and what it cost."""
    rows = [(kind, str(k["whole"]), str(k["kept"]), f"{1 - k['kept'] / k['whole']:.0%}")
            for kind, k in told["kinds"].items()]  # fmt: skip
    for name, unit, scale in (("macs", "G", 1e9), ("params", "M", 1e6)):
        before, after = told["before"][name], told["after"][name]
        rows.append((name, f"{before / scale:.2f} {unit}", f"{after / scale:.2f} {unit}", f"{1 - after / before:.1%}"))
    cost = told["against_original"]
    return tuple(rows), (
        f"against the unpruned model: UNet {cost['unet_snr_db']:.1f} dB SNR, picture {cost['picture_psnr_db']:.1f} dB "
        f"PSNR ({told['importance']}, {told['restore']}, {told['allocation']} by {told['budget']})"
    )
