"""Calibrate and prune from the command line: opens the model, shows progress, tells what was taken and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgesd.console import progress
from edgesd.errors import RequestError
from edgesd.pruning import PART, calls_for, fitting_calls
from edgesd.sheet import Section, Sheet

if TYPE_CHECKING:
    from edgesd.models.load import LoadedModel


def calibrate_model(
    model: str | None, out: Path, *, calls: int | None, prompts: str | None, sampler: str | None,
    steps: tuple[int, ...] | None, guidance: float | None, seed: int,
) -> Sheet:  # fmt: skip
    """Records a calibration set of a checkpoint into `out` (taken up again where an earlier run stopped)."""
    from edgesd.calibration.capture import calibrate
    from edgesd.models.load import load

    loaded = load(model)
    calls = calls if calls is not None else calls_for(_unet_params(loaded))
    with progress() as tick:
        made = calibrate(
            loaded, out, calls=calls, prompts=prompts, sampler=sampler, steps=steps,
            guidance=guidance, seed=seed, progress=lambda done, total: tick("sampling runs", done, total),
        )  # fmt: skip
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    data = {"folder": str(out), "runs": made.info.runs, "bytes": size, "model": made.info.sha256}
    row = (str(out), str(made.info.runs), f"{size / 1e6:.1f} MB")
    note = f"Next: edgesd prune{'' if model is None else f' {model}'} --ratio 0.25 --calibration {out} -o pruned"
    return Sheet(data, (Section("Calibration set", ("folder", "sampling runs", "size"), (row,), note),))


def prune_model(
    model: str | None, out: Path, *, ratio: float, calibration: Path | None, calls: int | None, component: str,
    importance: str, restoration: str, allocation: str, budget: str, target: str | None,
    protect: tuple[str, ...],
) -> Sheet:  # fmt: skip
    """Prunes one component of a checkpoint into a new folder; records a calibration set first if none is given."""
    import tempfile

    from edgesd.calibration.capture import calibrate
    from edgesd.calibration.sets import open_set
    from edgesd.compress.prune import prune
    from edgesd.models.load import load

    if out.exists():
        raise RequestError(f"{out} exists", "a new folder", "Choose another -o")
    loaded = load(model)
    calls = calls if calls is not None else fitting_calls(_unet_params(loaded), loaded.spec)
    with progress() as tick, tempfile.TemporaryDirectory() as scratch:
        if calibration is None:
            recorded = calibrate(
                loaded,
                Path(scratch) / "set",
                calls=calls,
                progress=lambda done, total: tick("calibration", done, total),
            )
        else:
            recorded = open_set(calibration)
        recorded.require(loaded)
        used = recorded.calls(component, rows=calls)
        made = prune(
            loaded, ratio, used, out, component=component, importance=importance,
            restoration=restoration, allocation=allocation, budget=budget, target=target,  # type: ignore[arg-type]
            protect=protect, progress=tick,
        )  # fmt: skip
    plan = made.plan
    off = plan.off()
    rows = tuple(
        (kind, str(whole), str(kept), f"{1 - kept / whole:.0%}") for kind, (kept, whole) in plan.by_kind().items()
    )
    note = (
        f"{out}: {off['macs']:.1%} of the MACs and {off['params']:.1%} of the parameters off "
        + (f"and {off['seconds']:.1%} of a call's time on {target} (measured) " if "seconds" in off else "")
        + f"by {len(used)} recorded calls (chart: {out / 'pruning.png'})\n"
        f"Next: edgesd evaluate -m {out} --against {loaded.source}; edgesd package {out} --target all"
    )
    data = {
        "folder": str(out),
        "component": component,
        "calls": len(used),
        "off": {name: round(share, 5) for name, share in off.items()},
        "kinds": {kind: {"kept": kept, "whole": whole} for kind, (kept, whole) in plan.by_kind().items()},
    }
    return Sheet(data, (Section("What stays", ("kind", "channels", "kept", "off"), rows, note),))


def _unet_params(model: LoadedModel) -> int:
    return sum(p.numel() for p in model.modules[PART].parameters())
