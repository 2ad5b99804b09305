"""Policies played against fixed settings on a simulated phone (edgesd/thermal.py), in the time the baseline takes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgesd.errors import RequestError
from edgesd.manifest import Manifest
from edgesd.playing import Drawn, Ran, play, work_of
from edgesd.runtime.policy import Limits, Outcome, Policy, Row, load_policy, policy_names
from edgesd.sheet import Section, Sheet
from edgesd.thermal import CLASSES, DeviceClass, Trace, World, load_trace

FEW = 10  # pictures over which the rise of temperature is told
MAX_PICTURES = 1000
FIXED = {"fixed 20": (20, 1.0), "fixed 15": (15, 1.0), "fixed 10": (10, 1.0), "fixed 20 w0.75": (20, 0.75)}
BASELINE = "fixed 20"
KEPT_ALIGNMENT = 0.97
Drawable = tuple[int, float, float, tuple[float, float] | None]  # steps, width, guidance_until, Settings.switch


@dataclass(frozen=True)
class Outcomes:
    """One policy over a session. life: pictures per charge over the baseline's. rise_k: largest in FEW pictures.

    alignment: mean over the pictures whose settings were measured, None where none was; measured: their share.
    """

    name: str
    pictures: int
    worst_s: float
    throttled: float
    battery_used: float
    joules_per_picture: float
    rise_k: float
    alignment: float | None
    measured: float
    life: float = 1.0
    loses: tuple[str, ...] = ()
    drawn: tuple[Drawn, ...] = ()


def fixed(name: str, steps: int, width: float) -> Policy:
    """A policy of one row, whatever happens."""
    row = Row(name="always", level=0, then=Outcome(steps=steps, width=width), reason="Always the same.")
    return Policy(name="fixed", about=name, rows=(row,))


def measured_alignment() -> dict[Drawable, float]:
    """What fixed settings draw -> alignment 0..1 of the embedded model, calibration/alignment.json."""
    data = json.loads((Path(str(files("edgesd.calibration"))) / "alignment.json").read_text())
    return {
        (e["steps"], e["width"], e["guidance_until"], tuple(e["switch"]) if "switch" in e else None): e["all"]
        for e in data["measured"]
    }  # fmt: skip


def drawable(ran: Ran) -> Drawable | None:
    """The settings that draw what a picture came to, a switch to the tenth of the run; None where no settings do."""
    switch = None if ran.switch is None else (round(ran.switch[0], 1), ran.switch[1])
    return (ran.steps, ran.width, ran.guidance_until, switch) if ran.plain else None


def offered(manifest: Manifest, widths: tuple[float, ...] = ()) -> Limits:
    """What a bundle offers a policy: its UNet's widths (or those it is made to have), its default sampler's steps."""
    widths = tuple(sorted({*widths, *(v.axes.width for v in manifest.component("unet").variants)}))
    steps = next((s.steps for s in manifest.samplers if s.name == manifest.model.defaults.sampler),
                 manifest.samplers[0].steps)  # fmt: skip
    return Limits(steps=tuple(sorted(steps)), widths=widths)


def simulate(
    manifest: Manifest, trace: Trace, device: DeviceClass, *, pictures: int = 20, policies: tuple[str, ...] = (),
    widths: tuple[float, ...] = (),
) -> list[Outcomes]:  # fmt: skip
    """Every fixed setting and policy (all that ship where none is named) in the time the baseline takes for `pictures`.

    widths: that the bundle is taken to have besides its own; their cost is then an estimate.
    """
    if not 1 <= pictures <= MAX_PICTURES:
        raise RequestError(f"{pictures} pictures", f"1 to {MAX_PICTURES}", "Change --pictures")
    limits, work = offered(manifest, widths), work_of(manifest, trace.macs_per_call)
    known = measured_alignment() if manifest.model.name == "shapes" else {}
    runs: dict[str, tuple[Policy, Limits]] = {
        name: (fixed(name, steps, width), Limits((steps,), (width,), min_width=width, max_width=width))
        for name, (steps, width) in FIXED.items()
    }
    runs |= {name: (load_policy(name), limits) for name in (policies if policies else policy_names())}
    first = play(*runs[BASELINE], device, trace, work, pictures=pictures)
    session = first[1].time_s
    found: list[Outcomes] = []
    for name, (policy, allowed) in runs.items():
        drawn, world = play(policy, allowed, device, trace, work, pictures=50 * pictures, seconds=session + 1e-6)
        found.append(_outcomes(name, drawn, world, known, found[0] if found else None))
    return found


def _outcomes(
    name: str, drawn: list[Drawn], world: World, known: dict[Drawable, float], base: Outcomes | None
) -> Outcomes:
    start = world.trace.start
    told = [known[key] for d in drawn if (key := drawable(d.ran)) is not None and key in known]
    made = Outcomes(
        name=name,
        pictures=len(drawn),
        worst_s=max((d.seconds for d in drawn), default=0.0),
        throttled=world.throttled_s / world.time_s,
        battery_used=start.battery - world.battery,
        joules_per_picture=sum(d.energy_j for d in drawn) / max(len(drawn), 1),
        rise_k=max((d.skin_c - start.skin_c for d in drawn[:FEW]), default=0.0),
        alignment=sum(told) / len(told) if told else None,
        measured=len(told) / max(len(drawn), 1),
        drawn=tuple(drawn),
    )
    if base is None:
        return made
    life = base.joules_per_picture / made.joules_per_picture if drawn else 0.0
    return Outcomes(**{**vars(made), "life": life, "loses": _loses(made, base, life)})


def _loses(made: Outcomes, base: Outcomes, life: float) -> tuple[str, ...]:
    """Where a policy is behind the baseline."""
    worse = {
        "pictures": made.pictures < base.pictures,
        "latency": made.worst_s > base.worst_s * 1.01,
        "throttled": made.throttled > base.throttled + 0.01,
        "battery": life < 0.99,
        "rise": made.rise_k > base.rise_k + 0.1,
        "alignment": made.alignment is not None and base.alignment is not None
        and made.alignment < KEPT_ALIGNMENT * base.alignment,
    }  # fmt: skip
    return tuple(name for name, true in worse.items() if true)


def to_json(outcomes: list[Outcomes]) -> list[dict[str, Any]]:
    """Plain values, rounded; pictures one by one under `drawn`."""
    return [
        _rounded({k: v for k, v in vars(o).items() if k != "drawn"}, 4)
        | {"drawn": [_rounded({**vars(d), **vars(d.ran)}, 3) for d in o.drawn]}
        for o in outcomes
    ]


def _rounded(values: dict[str, Any], digits: int) -> dict[str, Any]:
    """For JSON; a picture's `ran` is told field by field."""
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in values.items() if k != "ran"}


def run(
    bundle: Path, trace: str, *, pictures: int = 20, policies: tuple[str, ...] = (), widths: tuple[float, ...] = (),
    plot: Path | None = None,
) -> Sheet:  # fmt: skip
    """`edgesd simulate`: every device class on one trace, as a sheet; plot: PNG of the same."""
    from edgesd.bundle import read

    played, manifest = load_trace(trace), read(bundle).manifest
    results = {
        name: simulate(manifest, played, device, pictures=pictures, policies=policies, widths=widths)
        for name, device in CLASSES.items()
    }
    if plot is not None:
        from edgesd.charts import draw_simulation

        draw_simulation(results, played.name, plot)
    data = {
        "trace": played.model_dump(mode="json"), "bundle": bundle.name, "baseline": BASELINE,
        "devices": [
            {"class": asdict(CLASSES[name]), "results": to_json(found)} for name, found in results.items()
        ],
    }  # fmt: skip
    return Sheet(data, tuple(_section(name, found, played) for name, found in results.items()))


def _section(device: str, found: list[Outcomes], trace: Trace) -> Section:
    columns = ("setting", "made", "worst s", "slow", "used", "life", "rise K", "aligned", "loses in")
    rows = tuple(
        (o.name, str(o.pictures), f"{o.worst_s:.1f}", f"{o.throttled:.0%}", f"{o.battery_used:.1%}", f"{o.life:.2f}",
         f"{o.rise_k:.1f}", _alignment(o), ", ".join(o.loses))
        for o in found
    )  # fmt: skip
    note = (
        f"Against {BASELINE} in its time. slow: time throttled; used: of the battery; life: pictures per charge over "
        f"its; rise: over {FEW} pictures; aligned: measured on the embedded model, over the share of pictures in "
        "brackets. Device figures are partly assumed; --json names each source."
    )
    return Section(f"{trace.name}, {device}", columns, rows, note)


def _alignment(o: Outcomes) -> str:
    if o.alignment is None:
        return "unknown"
    return f"{o.alignment:.3f}" + (f" ({o.measured:.0%})" if o.measured < 1 else "")
