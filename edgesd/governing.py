"""A policy for `edgesd generate`: which sensors it reads, what it may choose from, and what it says for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgesd.errors import RequestError
from edgesd.manifest import PolicyFile
from edgesd.runtime.device import DeviceState, Sensors, constant, default_sensors, from_file
from edgesd.runtime.governed import PolicyRun
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.policy import FOLDER, Decision, Limits, When, cost, load_policy, policy_names
from edgesd.runtime.settings import Settings
from edgesd.runtime.widths import Widths
from edgesd.sheet import Section, Sheet


@dataclass(frozen=True)
class Governing:
    """What was asked for. policy: a shipped name or a JSON file. battery (0..1), thermal: said in place of sensors.

    sensors: JSON file that another program keeps up to date. deadline_s: for a whole picture. min_steps: the floor.
    """

    policy: str
    battery: float | None = None
    thermal: str | None = None
    sensors: Path | None = None
    deadline_s: float | None = None
    min_steps: int = 1

    def sense(self) -> Callable[[], DeviceState]:
        """The real sensors, or exactly what was said: a battery that is said runs down."""
        if self.battery is None and self.thermal is None:
            return default_sensors(*([] if self.sensors is None else [from_file(self.sensors)]))
        if self.sensors is not None:
            raise RequestError("--sensors beside --battery or --thermal", "one or the other", "Leave one out")
        thermal: Any = "unknown" if self.thermal is None else self.thermal
        said = DeviceState(self.battery, None if self.battery is None else False, thermal=thermal)
        return Sensors(constant(said))

    def run(self, pipeline: Pipeline, settings: Settings, ceiling: int | None) -> PolicyRun:
        """The policy in charge, between the user's floor and ceiling of steps and within what the model offers."""
        offered = None if pipeline.steps is None else pipeline.steps(settings.sampler)
        most = 1000 if ceiling is None else ceiling
        widths = pipeline.session.widths("unet")
        limits = Limits(
            steps=tuple(range(1, 1001)) if offered is None else tuple(sorted(offered)),
            widths=tuple(sorted(widths)), min_steps=self.min_steps, max_steps=most, max_width=settings.width,
            max_guidance_until=settings.guidance_until,
        )  # fmt: skip
        share = None if pipeline.widths is None else pipeline.widths.share
        return PolicyRun(pipeline.policy(self.policy), self.sense(), limits, self.deadline_s, share=share)


def governed(settings: Settings, decision: Decision, run: PolicyRun, pipeline: Pipeline) -> Settings:
    """The settings of a picture that a decision stands over; with a switch of width where that was measured to win."""
    chosen = replace(
        settings, num_inference_steps=decision.steps, guidance_until=decision.guidance_until, width=decision.width
    )
    switch = None if pipeline.widths is None else switched(decision, run, pipeline.widths)
    return chosen if switch is None else replace(chosen, width=switch[0], switch=switch[1:])


def switched(decision: Decision, run: PolicyRun, widths: Widths) -> tuple[float, float, float] | None:
    """(first width, share of the run, second width) where a switch was measured to win; the run is told of it."""
    if decision.width == 1:
        return None
    calls = decision.steps * (1 + decision.guidance_until)
    switch = widths.switch(decision.width, run.limits, calls, run.state.free_memory_bytes)
    if switch is not None:
        run.plan_switch()
    return switch


def describe(run: PolicyRun, decision: Decision) -> tuple[str, ...]:
    """Why the picture is as it is, in notes: the reason, what the model could not give, what was not known."""
    wanted = next(row.then for row in run.policy.rows if row.name == decision.row)
    given = [f"{name} {getattr(wanted, name)} wanted, {getattr(decision, name)} given" for name in decision.capped]
    lines = [f"policy {run.policy.name}: {decision.reason}"]
    lines += [f"policy {run.policy.name}: {'; '.join(given)} (your limits, or what this model has)"] if given else []
    lines += [f"not known here, taken as well: {', '.join(decision.assumed)}"] if decision.assumed else []
    return tuple(lines)


def ship_policies(folder: Path) -> tuple[PolicyFile, ...]:
    """Writes every shipped policy into a bundle's folder, for apps without edgesd; gives what the manifest says."""
    (folder / "policies").mkdir(exist_ok=True)
    files = tuple(PolicyFile(name=name, file=f"policies/{name}.json") for name in policy_names())
    for entry in files:
        (folder / entry.file).write_bytes((FOLDER / f"{entry.name}.json").read_bytes())
    return files


def policies() -> Sheet:
    """`edgesd policy list`: what ships, and how little each can give."""
    shipped = [load_policy(name) for name in policy_names()]
    rows = tuple(
        (p.name, str(len(p.rows)), f"{max(costs):g} to {min(costs):.3g}", p.about)
        for p in shipped
        for costs in [[cost(row.then) for row in p.rows]]
    )
    data = {"policies": [{"name": p.name, "about": p.about, "rows": len(p.rows)} for p in shipped]}
    return Sheet(data, (Section("policies", ("name", "rows", "calls a picture", "about"), rows),))


def show(source: str, chart: Path | None = None) -> Sheet:
    """`edgesd policy show`: a table row by row, first match first; chart: PNG of the same."""
    policy = load_policy(source)
    if chart is not None:
        from edgesd.charts import draw_policy

        draw_policy(policy, chart)
    rows = tuple(
        (row.name, str(row.level), _conditions(row.when), str(row.then.steps), f"{row.then.width:g}",
         f"{row.then.guidance_until:g}", f"{row.then.cool_down_s:g}", f"{cost(row.then):.1f}")
        for row in policy.rows
    )  # fmt: skip
    columns = ("row", "level", "when", "steps", "width", "guidance until", "rest s", "calls")
    note = f"The first row that holds is taken; better counts after {policy.dwell_s:g} s. calls: at full width."
    return Sheet(policy.model_dump(mode="json"), (Section(f"{policy.name}: {policy.about}", columns, rows, note),))


def _conditions(when: When) -> str:
    """Conditions for people: battery 0 to 0.2, charging false."""
    told = []
    for axis, allowed in when.conditions():
        if isinstance(allowed[0], float):
            told.append(f"{axis} {allowed[0]:g} " + ("up" if allowed[1] is None else f"to {allowed[1]:g}"))
        else:
            told.append(f"{axis} " + " or ".join(str(value).lower() for value in allowed))
    return ", ".join(told) if told else "otherwise"
