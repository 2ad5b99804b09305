"""What `package` made, or would make: for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.buildplan import BuildPlan
from edgesd.devices import Fit, find, predict
from edgesd.manifest import Manifest
from edgesd.memory import largest
from edgesd.parity import describe
from edgesd.sheet import Section, decibels, duration, render, size

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Made:
    """One finished bundle: its row group in the closing table. prompt: one that it can draw."""

    path: Path
    manifest: Manifest
    seconds: float
    peak_bytes: int
    prompt: str


@dataclass
class Packaged:
    """What `package` did, or would do (dry run)."""

    plans: list[BuildPlan]
    made: list[Made] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        planned = [
            {
                "target": plan.recipe.target,
                "path": str(plan.destination),
                "predicted_bytes": plan.bytes,
                "predicted_peak_bytes": plan.peak_bytes,
                "notes": list(plan.notes),
                "samplers": list(plan.samplers),
                "artefacts": [
                    {"component": p.component, "folder": p.folder, "params": p.params, "predicted_bytes": p.bytes,
                     "predicted_peak_bytes": p.peak_bytes}
                    for p in plan.artefacts
                ],
                "device_classes": [fit.to_json() for fit in _fits(plan)],
            }
            for plan in self.plans
        ]  # fmt: skip
        made = [
            {
                "target": m.manifest.target,
                "path": str(m.path),
                "bytes": sum(entry.bytes for entry in m.manifest.files),
                "seconds": round(m.seconds, 1),
                "peak_bytes": m.peak_bytes,
                "components": [c.model_dump(mode="json") for c in m.manifest.components],
                "quality": m.manifest.quality,
                "downgrades": [d.model_dump(mode="json") for d in m.manifest.downgrades],
            }
            for m in self.made
        ]
        return {"bundles": made, "plans": planned, "seconds": round(self.seconds, 1), "dry_run": not self.made}

    def table(self) -> Group:
        return render(self._made_sections() if self.made else self._plan_sections())

    def _made_sections(self) -> list[Section]:
        sections = []
        for m in self.made:
            sizes = {entry.path: entry.bytes for entry in m.manifest.files}
            rows = tuple(
                (c.name, describe(v.axes), size(sum(sizes[f] for f in v.files)), decibels(v.snr_db), v.status,
                 duration(v.seconds))
                for c in m.manifest.components
                for v in c.variants
            )  # fmt: skip
            total = f"{m.path}: {size(sum(sizes.values()))} in {m.seconds:.0f} s, peak memory {size(m.peak_bytes)}"
            total += "".join(
                f"\nwidth {width} takes {off:.0%} off the MACs of a UNet call"
                for width, off in m.manifest.quality.get("widths", {}).get("macs_off", {}).items()
                if off > 0
            )
            lost = "".join(f"\ndowngrade: {d.component}: {d.what} ({d.why})" for d in m.manifest.downgrades)
            columns = ("component", "variant", "size", "SNR dB", "status", "a call")
            sections.append(Section(m.manifest.target, columns, rows, total + lost))
        told = [fit.describe() for plan in self.plans for fit in _fits(plan)]
        draw = f'Draw with it: edgesd generate "{m.prompt}" -m {m.path} -o picture.png'
        return [*sections, Section("", (), (), "\n".join([*told, draw]))]

    def _plan_sections(self) -> list[Section]:
        sections = []
        for plan in self.plans:
            rows = tuple((p.component, describe(p.axes), size(p.bytes), size(p.peak_bytes)) for p in plan.artefacts)
            note = f"{plan.destination}: about {size(plan.bytes)}; tables: {', '.join(plan.samplers)}"
            what, peak = largest(plan)
            note += f"\nmost memory: {size(peak)}, {what} (predicted)"
            note = "\n".join([note, *plan.notes, *(fit.describe() for fit in _fits(plan))])
            columns = ("component", "variant", "size (predicted)", "peak memory (predicted)")
            sections.append(Section(f"{plan.recipe.target}, dry run: nothing was made", columns, rows, note))
        return sections


def _fits(plan: BuildPlan) -> list[Fit]:
    return [predict(device, plan) for device in find(plan.recipe.device_classes)]
