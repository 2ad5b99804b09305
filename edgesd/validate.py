"""A bundle against its float32 truth: hashes, golden vectors, every variant of every component, a whole picture.

The truth is what `golden.record` kept of one run of the torch reference, so nothing here needs torch. `selftest` is
what an app does at first start; `validate` also computes every hash and runs every variant, not only the default ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd import golden as vectors
from edgesd.errors import GateError
from edgesd.files import disk_errors
from edgesd.manifest import Manifest
from edgesd.parity import (
    Check,
    Measured,
    artefact_key,
    artefacts,
    check_noise,
    check_picture,
    check_text,
    describe,
    gate_db,
    measure_variants,
    other_flavours,
    run_calls,
    run_status,
    weakest,
    with_measurements,
)
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.session import Session
from edgesd.sheet import Section, decibels, duration, render

if TYPE_CHECKING:
    from rich.console import Group

    from edgesd.bundle import Bundle


@dataclass(frozen=True)
class Report:
    """What was checked. components, picture: figures of what opens by default. status: how this machine ran it.

    unmeasured: variants that the recorded run is no truth for (another picture size or width).
    """

    target: str
    status: str
    runtime: str
    checks: tuple[Check, ...]
    components: dict[str, dict[str, float]]
    picture: dict[str, float]
    variants: tuple[Measured, ...] = ()
    unmeasured: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def require(self) -> None:
        """Raises GateError naming what fell short, the figure and the gate."""
        if not self.passed:
            first, *others = self.failures
            more = f" (and {len(others)} more: {', '.join(check.what for check in others[:8])})" if others else ""
            raise GateError(
                f"{first.what} of target {self.target} reached {first.measured}{more}",
                first.wanted,
                "Package again with --precision fp32, or another --target; where fp32 falls short, report it as a bug",
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "components": {
                name: {key: round(value, 3) for key, value in figures.items()}
                for name, figures in self.components.items()
            },
            "picture": {key: round(value, 9) for key, value in self.picture.items()},
            "status": self.status,
            "target": self.target,
            "runtime": self.runtime,
            "variants": [measured.to_json() for measured in self.variants],
            "unmeasured": list(self.unmeasured),
            "failures": [
                {"what": c.what, "figure": round(c.figure, 6), "gate": c.gate, "unit": c.unit} for c in self.failures
            ],
            "checks": len(self.checks),
            "seconds": round(self.seconds, 3),
        }

    def table(self) -> Group:
        verdict = "passed" if self.passed else f"{len(self.failures)} of {len(self.checks)} checks FAILED"
        checks = tuple((c.what, c.measured, c.wanted, "ok" if c.passed else "FAILED") for c in self.checks)
        note = f"{verdict} · {self.status} · {duration(self.seconds)}"
        if self.unmeasured:
            note += f"\nno truth recorded for: {', '.join(self.unmeasured)}"
        shown = [
            Section(f"{self.target} against the float32 truth", ("what", "reached", "gate", "verdict"), checks, note)
        ]
        if self.variants:
            rows = tuple(
                (
                    m.component,
                    describe(m.axes),
                    decibels(m.snr_db),
                    decibels(m.psnr_db),
                    duration(m.seconds.median if m.status == "executed" else None),
                )
                for m in self.variants
            )
            shown.insert(0, Section("Variants", ("component", "variant", "SNR dB", "PSNR dB", "a call"), rows))
        return render(shown)


# ---- the two verbs ---------------------------------------------------------------------------------------------


def selftest(folder: Path | str, **options: Any) -> Report:
    """Golden vectors through what the bundle opens by default: ids, noise, every component, latents by row, picture.

    options go to the target's `open`. Raises DataError for a broken bundle, SetupError where its runtime is missing.
    """
    from edgesd import bundle, sources, targets

    started = time.perf_counter()
    opened = bundle.read(folder)
    target = targets.load(opened.manifest.target)
    stored = vectors.read(opened)
    pipeline = sources.open_bundle(opened.folder, **options)
    session, first = pipeline.session, {c.name: c.variants[0] for c in opened.manifest.components}
    checks = [*check_text(pipeline, stored), check_noise(stored)]
    components: dict[str, dict[str, float]] = {}
    for component, variant in first.items():
        snr, psnr, _ = run_calls(session, stored, component, min(session.batches(component) or (1,)))
        components[component] = {"snr_db": snr, "psnr_db": psnr}
        checks.append(Check(component, snr, gate_db(variant), "dB SNR"))
    whole, picture = check_picture(pipeline, stored, weakest(v.axes.precision for v in first.values()), every_row=True)
    return Report(
        target=opened.manifest.target, status=run_status(target), runtime=target.runtime_version(),
        checks=(*checks, *whole), components=components, picture=picture, seconds=time.perf_counter() - started,
    )  # fmt: skip


def validate(folder: Path | str, truth: Pipeline | None = None, **options: Any) -> Report:
    """Everything: all hashes, the golden vectors, every variant on the recorded calls, a picture by every flavour.

    truth: a float32 reference to record anew instead of trusting the bundle's own golden vectors. A bundle that passes
    where its runtime executes it, and whose manifest says `interpreted`, has its manifest rewritten to `executed`.
    Raises DataError for a broken bundle, SetupError where its runtime is missing.
    """
    from edgesd import bundle, sources, targets

    started = time.perf_counter()
    opened = bundle.read(folder, verify=True)
    manifest, target = opened.manifest, targets.load(opened.manifest.target)
    stored = vectors.read(opened)
    if truth is not None:
        stored = vectors.record(truth, stored.facts.settings())

    def open_part(part: Manifest) -> Session:
        return target.open(opened.folder, part, **options)

    measured = measure_variants(manifest, stored, open_part, partial(run_status, target))
    pipeline = sources.open_bundle(opened.folder, **options)
    checks = [*check_text(pipeline, stored), check_noise(stored)]
    checks += [Check(f"{m.component} {describe(m.axes)}", m.snr_db, m.gate_db, "dB SNR") for m in measured]
    first = {m.component: m for m in reversed(measured)}
    whole, picture = check_picture(pipeline, stored, weakest(m.axes.precision for m in first.values()))
    for name, part in other_flavours(manifest):
        other = replace(pipeline, session=open_part(part))
        precisions = [component.variants[0].axes.precision for component in part.components]
        whole += check_picture(other, stored, weakest(precisions), f"picture {name}")[0]
    report = Report(
        target=manifest.target, status=run_status(target), runtime=target.runtime_version(),
        checks=(*checks, *whole), picture=picture, variants=measured,
        components={name: {"snr_db": m.snr_db, "psnr_db": m.psnr_db} for name, m in reversed(first.items())},
        unmeasured=tuple(f"{name} {describe(axes)}" for name, axes, _ in artefacts(manifest) if not stored.fits(axes)),
        seconds=time.perf_counter() - started,
    )  # fmt: skip
    if report.passed and report.status == "executed":
        _upgrade(opened, measured, report.runtime)
    return report


def note(manifest: Manifest, report: Report) -> Manifest:
    """The manifest with what a report of `validate` measured: every variant's figures, and the whole in `quality`."""
    found = report.to_json()
    quality = {key: found[key] for key in ("passed", "components", "picture", "status", "runtime")}
    return with_measurements(manifest, report.variants, report.runtime).model_copy(update={"quality": quality})


def _upgrade(opened: Bundle, measured: Iterable[Measured], runtime: str) -> None:
    """Rewrites `interpreted` as `executed` now that the runtime itself has run it."""
    from edgesd.bundle import seal

    interpreted = {
        (c.name, artefact_key(v.axes))
        for c in opened.manifest.components
        for v in c.variants
        if v.status == "interpreted"
    }
    newly = [m for m in measured if (m.component, artefact_key(m.axes)) in interpreted]
    if newly:
        with disk_errors(opened.folder, "Check who may write it"):
            seal(opened.folder, with_measurements(opened.manifest, newly, runtime))
