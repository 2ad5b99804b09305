"""Looking at things: what is in a bundle, which samplers there are, what edgesd keeps between runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd import files, pruning
from edgesd.benchmark import bench
from edgesd.caches import cache
from edgesd.diagnosis import doctor
from edgesd.errors import DataError, SetupError
from edgesd.parity import describe
from edgesd.sheet import Section, Sheet, decibels, duration, size

if TYPE_CHECKING:
    from edgesd.bundle import Bundle
    from edgesd.manifest import Manifest, Variant
    from edgesd.targets import Target

__all__ = ["bench", "cache", "doctor", "inspect", "samplers"]

MOST_SHOWN = 12  # operation types in the table, layers of a plan; the JSON has all
MAX_PLAN_BYTES = 64 << 20
_PLAIN = ("float32", "f32", "")


# ---- inspect ---------------------------------------------------------------------------------------------------


def inspect(folder: Path | str) -> Sheet:
    """Components, variants, sizes, operations in each artefact, parameters, MACs, tables, provenance, downgrades.

    Operations and int8 coverage are counted by the target; where its packages are missing the rest is shown and both
    are null.
    Raises DataError for a broken bundle.
    """
    from edgesd import bundle, targets

    opened = bundle.read(folder)
    manifest = opened.manifest
    try:
        target, missing = targets.load(manifest.target), ""
    except SetupError as error:
        target, missing = None, f"operations not counted: {error}"
    variants = [
        _variant(opened, component.name, variant, target)
        for component in manifest.components
        for variant in component.variants
    ]
    data = {
        "bundle": opened.folder.name,
        "format": manifest.format,
        "target": manifest.target,
        "model": manifest.model.model_dump(mode="json", exclude={"scheduler"}),
        "bytes": sum(entry.bytes for entry in manifest.files),
        "files": len(manifest.files),
        "variants": variants,
        "samplers": [
            {"name": s.name, "steps": [min(s.steps), max(s.steps)], "counts": len(s.steps)} for s in manifest.samplers
        ],
        "noise": manifest.noise.model_dump(mode="json"),
        "quality": manifest.quality,
        "downgrades": [d.model_dump(mode="json") for d in manifest.downgrades],
        "provenance": manifest.provenance.model_dump(mode="json"),
    }
    return Sheet(data, tuple(_inspected(manifest, data, missing)))


def _variant(opened: Bundle, component: str, variant: Variant, target: Target | None) -> dict[str, Any]:
    sizes = {entry.path: entry.bytes for entry in opened.manifest.files}
    operations: dict[str, dict[str, int]] | None = None
    covered: dict[str, int] | None = None
    if target is not None:
        count = getattr(target, "coverage", None)
        covered = asdict(count(opened.path(variant.files[0]))) if count is not None else None
        operations = {}
        for (kind, precision), count in sorted(target.count_operations(opened.path(variant.files[0])).counts.items()):
            operations.setdefault(kind, {})[precision] = count
    return {
        "component": component,
        "axes": variant.axes.model_dump(mode="json"),
        "variant": describe(variant.axes),
        "files": list(variant.files),
        "bytes": sum(sizes[path] for path in variant.files),
        "params": variant.params,
        "macs": variant.macs,
        "inputs": [t.model_dump(mode="json") for t in variant.inputs],
        "outputs": [t.model_dump(mode="json") for t in variant.outputs],
        "status": variant.status,
        "runtime": variant.runtime,
        "snr_db": variant.snr_db,
        "seconds": variant.seconds,
        "compute_units": variant.compute_units,
        "operations": operations,
        "coverage": covered,
        "quantization": _quantization(opened, variant),
    }


def _quantization(opened: Bundle, variant: Variant) -> dict[str, Any] | None:
    """What a variant's plan says: shares of MACs by mode, layers that are not int8 and why, the most sensitive ones."""
    if variant.plan is None:
        return None
    from edgesd.compress.quantplan import QuantPlan

    with files.open_regular(opened.path(variant.plan)) as file:
        plan = QuantPlan.parse(file.read(MAX_PLAN_BYTES))
    return {
        "precision": plan.precision,
        "calibration": plan.calibration,
        "macs": {mode: round(share, 4) for mode, share in plan.shares().items()},
        "layers": dict(Counter(layer.mode for layer in plan.layers)),
        "simulated_snr_db": plan.snr_db,
        "latents_snr_db": plan.latents_snr_db,
        "not_int8": {layer.name: f"{layer.mode}: {layer.why}" for layer in plan.layers if layer.mode != "int8"},
        "sensitivities": {one.name: one.snr_db for one in plan.sensitivities},
    }


def _inspected(manifest: Manifest, data: dict[str, Any], missing: str) -> list[Section]:
    rows = tuple(
        (v["component"], v["variant"], size(v["bytes"]), f"{v['params'] / 1e6:.1f} M", f"{v['macs'] / 1e9:.2f} G",
         decibels(v["snr_db"]), duration(v["seconds"]), v["status"])
        for v in data["variants"]
    )  # fmt: skip
    sections = [
        Section(
            f"{data['bundle']} · {manifest.model.name} for {manifest.target} · {size(data['bytes'])}",
            ("component", "variant", "size", "params", "MACs", "SNR dB", "a call", "status"),
            rows,
            missing,
        ),
        *_operations(data["variants"]),
        *_coverage(data["variants"]),
        *_quantized(data["variants"]),
        Section(
            "Sampler tables",
            ("sampler", "steps", "tables"),
            tuple((s["name"], "-".join(map(str, s["steps"])), str(s["counts"])) for s in data["samplers"]),
        ),
    ]
    if (told := manifest.quality.get("pruned")) is not None:
        sections.append(_pruned(told))
    origin = manifest.provenance
    facts = {
        "source": origin.source,
        "revision": origin.revision,
        "sha256": origin.sha256,
        "licence": origin.licence,
        "edgesd": origin.edgesd,
        "made": origin.made,
        "libraries": ", ".join(f"{name} {version}" for name, version in origin.libraries.items()),
    }
    sections.append(Section("Provenance", ("", ""), tuple((key, str(value)) for key, value in facts.items() if value)))
    if manifest.downgrades:
        lost = tuple((d.component, d.what, d.why) for d in manifest.downgrades)
        sections.append(Section("Downgrades", ("component", "what", "why"), lost))
    return sections


def _pruned(told: Any) -> Section:
    try:
        rows, note = pruning.describe(told)
        return Section(f"Pruned: {told['component']}", ("", "before", "after", "off"), rows, note)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise DataError("quality.pruned does not read", "what edgesd wrote", "Get the bundle again") from None


def _operations(variants: list[dict[str, Any]]) -> list[Section]:
    """Per variant: "Conv 31, MatMul 12 + 4 int8 …", the most frequent first; the precision where it is not float32."""
    rows = []
    for v in variants:
        if v["operations"] is not None:
            flat = {(k, p): n for k, by_precision in v["operations"].items() for p, n in by_precision.items()}
            ranked = Counter(flat).most_common()
            words = [f"{kind} {n}" if p in _PLAIN else f"{kind} {n} {p}" for (kind, p), n in ranked[:MOST_SHOWN]]
            more = f", and {len(ranked) - MOST_SHOWN} more kinds" if len(ranked) > MOST_SHOWN else ""
            rows.append((v["component"], v["variant"], str(sum(flat.values())), ", ".join(words) + more))
    return [Section("Operations", ("component", "variant", "all", "by type"), tuple(rows))] if rows else []


def _quantized(variants: list[dict[str, Any]]) -> list[Section]:
    """Per quantized variant: MACs by mode, what the plan reached, then its layers, the most sensitive first."""
    sections = []
    for v in variants:
        plan = v["quantization"]
        if plan is not None:
            shares = ", ".join(f"{share:.1%} of MACs {mode}" for mode, share in plan["macs"].items())
            reached = f"simulated {decibels(plan['simulated_snr_db'])} dB"
            worst = list(plan["sensitivities"].items())[:MOST_SHOWN]
            rows = tuple((name, f"{snr:.1f}", plan["not_int8"].get(name, "int8")) for name, snr in worst)
            more = len(plan["sensitivities"]) - len(worst)
            note = f"{shares}; {reached}; {plan['calibration']}" + (f"; {more} more layers in --json" if more else "")
            title = f"{v['component']} {v['variant']}: what quantizing each layer alone costs"
            sections.append(Section(title, ("layer", "SNR dB", "made"), rows, note))
    return sections


def _coverage(variants: list[dict[str, Any]]) -> list[Section]:
    """How convolutions and linears compute, in shares of their MACs; only where a variant has int8 at all."""
    rows = []
    for v in variants:
        found = v["coverage"]
        if found is not None and found["int8"] + found["w8"]:
            whole = found["int8"] + found["w8"] + found["floating"]
            shares = (f"{found[key] / whole:.1%}" for key in ("int8", "w8", "floating"))
            rows.append((v["component"], v["variant"], *shares, size(found["weight_bytes"])))
    titles = ("component", "variant", "integer kernels", "int8 weights only", "float", "weights")
    note = "Shares of the MACs of convolutions and linears, counted in the artefact as its runtime executes it."
    return [Section("Int8", titles, tuple(rows), note)] if rows else []


# ---- samplers --------------------------------------------------------------------------------------------------


def samplers(steps: int) -> Sheet:
    """The samplers that `package` can compile, and their UNet calls for `steps` steps.

    Raises SetupError where the packaging libraries are missing.
    """
    try:
        from edgesd.sampling.schedules import SAMPLERS, SIGMAS
        from edgesd.sampling.schedules import describe as describe_samplers

        found = [asdict(one) for one in describe_samplers(steps)]
    except ModuleNotFoundError as error:
        raise SetupError(
            f"listing samplers needs {error.name}, not installed here",
            "the packaging libraries",
            'Run pip install "edgesd[package]"; edgesd inspect lists what a bundle holds',
        ) from None
    names = {one["name"] for one in found}
    rows = tuple(
        (
            one["name"],
            one["scheduler"].removesuffix("Scheduler"),
            "stochastic" if one["stochastic"] else "",
            one["family"],
            ", ".join(form for form in SIGMAS if f"{one['name']}_{form}" in names),
            "too many steps" if one["calls"] is None else str(one["calls"]),
        )
        for one in found
        if one["name"] in SAMPLERS
    )
    titles = ("name", "diffusers scheduler", "", "family", "forms", "UNet calls")
    note = "A form is part of the name: euler_karras. Guidance doubles the calls of the rows it covers."
    return Sheet({"steps": steps, "samplers": found}, (Section(f"Samplers at {steps} steps", titles, rows, note),))
