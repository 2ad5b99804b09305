"""`edgesd prune`: from a checkpoint and recorded calls to a smaller checkpoint that edgesd loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from edgesd.compress.allocate import ALLOCATIONS, CAREFUL, Budget, allocate, protected
from edgesd.compress.calls import PARTS, Batch, Recorded, batches
from edgesd.compress.evidence import collect
from edgesd.compress.groups import Group, find_groups
from edgesd.compress.importance import IMPORTANCE, curve
from edgesd.compress.latency import TARGETS, Latency, observe, whole
from edgesd.compress.moments import RIDGE
from edgesd.compress.plan import PrunePlan, Size, group_plans
from edgesd.compress.restore import RESTORE, restore
from edgesd.errors import RequestError
from edgesd.manifest import ModelSpec
from edgesd.models.count import Cost, count
from edgesd.models.load import Checkpoint, LoadedModel
from edgesd.models.modules import share
from edgesd.models.saving import NESTED, ORDERED, save_checkpoint, sidecar_of
from edgesd.models.weights import read_sidecar

MAX_RATIO = 0.9
MIN_CALLS = 8
CHART = "pruning.png"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Pruned:
    """plan: what stays. module: the dense part's smaller copy, restored, ready to run. folder: where it was written."""

    plan: PrunePlan
    module: nn.Module
    folder: Path | None = None


def prune(
    model: LoadedModel,
    ratio: float,
    calls: Sequence[Recorded],
    out: Path | None = None,
    *,
    component: str = "unet",
    importance: str = "obs",
    restoration: str = "ls",
    allocation: str = "global",
    budget: Budget = "macs",
    protect: Sequence[str] = (),
    careful: float = CAREFUL,
    ridge: float = RIDGE,
    target: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Pruned:
    """Takes `ratio` of a component's MACs (parameters, bytes, latency) off and gives back what least squares can.

    calls: recorded calls of that component from this very model (`CalibrationSet.calls`). out: a checkpoint folder to
    write, with the plan in its sidecar and a chart; None writes nothing. protect: globs of group names to leave whole;
    careful: the largest share that goes from a group of the first and last block. target: whose runtime a budget of
    latency is measured on, here and now (`latency`). The model given is not changed.
    Raises RequestError (ratio outside (0, 0.9) or out of reach, a name that is none, nothing to prune, too few calls)
    and DataError (activations that are not finite, with layer and step); nothing is written then.
    """
    _check(ratio, len(calls), component, importance, restoration, allocation, budget, target)
    part, prefix = PARTS[component]
    refuse_twice(model, part)
    dense, lots = model.modules[part], batches(component, calls, model.spec)
    before = component_cost(dense, lots[0])
    groups = [g for g in find_groups(dense, before) if g.name.startswith(prefix)]
    if not groups:
        raise RequestError(
            f"nothing to prune in {component}", "a component with inner widths", "Choose another component"
        )
    protected([g.name for g in groups], protect)  # a wrong name is told before the work, not after
    progress("importance", 0, len(groups))
    evidence = collect(dense, groups, lots, importance)
    groups = [g for g in groups if g.name in evidence]
    curves = {}
    for done, name in enumerate(list(evidence)):
        curves[name] = curve(evidence.pop(name), importance, restoration, ridge)
        progress("importance", done + 1, len(groups))
    latency = None if target is None else observe(dense, groups, lots[0], model.spec, target)
    kept = allocate(
        curves, groups, before, ratio, allocation=allocation, budget=budget, protect=protect, careful=careful,
        latency=latency,
    )  # fmt: skip
    smaller = share(dense)
    restore(
        dense, smaller, groups, kept, lots, method=restoration, ridge=ridge,
        progress=lambda done, total: progress("restore", done, total),
    )  # fmt: skip
    plan = PrunePlan(
        component=component, ratio=ratio, budget=budget, importance=importance, restore=restoration,
        allocation=allocation, source_sha256=model.sha256, target=target,
        groups=group_plans({g.name: g for g in groups}, kept, curves),
        before=_size(before, latency), after=_after(smaller, lots[0], latency, model.spec),
    )  # fmt: skip
    if out is not None:
        write_checkpoint(model, plan, smaller, out, groups)
    return Pruned(plan, smaller, out)


def _check(
    ratio: float, calls: int, component: str, importance: str, restoration: str, allocation: str, budget: str,
    target: str | None,
) -> None:  # fmt: skip
    choices = (
        (component, PARTS, "component"), (importance, IMPORTANCE, "importance"), (restoration, RESTORE, "restore"),
        (allocation, ALLOCATIONS, "allocation"), (budget, get_args(Budget), "budget"),
    )  # fmt: skip
    for value, allowed, flag in choices:
        if value not in allowed:
            raise RequestError(f"{flag} {value!r}", ", ".join(allowed), f"Change --{flag}")
    if (budget == "latency") != (target is not None) or target not in (None, *TARGETS):
        fitting = f"latency with one of {', '.join(TARGETS)}; other budgets without"
        raise RequestError(f"budget {budget} with target {target}", fitting, "Change --budget or --target")
    if target is not None and component != "unet":
        raise RequestError(f"latency of {component}", "of the UNet", "Choose another --budget")
    if not 0 < ratio < MAX_RATIO:
        raise RequestError(
            f"ratio {ratio}", f"above 0, below {MAX_RATIO}: the share of {budget} taken off", "Change --ratio"
        )
    if calls < MIN_CALLS:
        raise RequestError(f"{calls} recorded calls", f"at least {MIN_CALLS}", "Record more with edgesd calibrate")


def refuse_twice(model: Checkpoint, part: str) -> None:
    """A part pruned before is no base for more: its lost units cannot be weighed against those left."""
    if part in read_sidecar(model.parts[part].parent).get("pruned", {}):
        raise RequestError(
            f"{part} of {model.spec.name} is pruned already",
            "an unpruned model",
            "Prune the original, by a larger ratio",
        )


def component_cost(module: nn.Module, batch: Batch) -> Cost:
    """The cost of one call's one row: a batch of one, as the exported graph has it."""

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = module

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return batch.with_inputs(dict(zip(batch.inputs, tensors, strict=True))).forward(self.part)

    cost = count(Call(), [x[:1] for x in batch.inputs.values()])
    return Cost(
        cost.params,
        cost.bytes,
        cost.macs,
        {name.removeprefix("part").removeprefix("."): n for name, n in cost.by_module.items()},
    )


def _size(cost: Cost, latency: Latency | None = None) -> Size:
    return Size(
        params=cost.params, bytes=cost.bytes, macs=cost.macs, seconds=None if latency is None else latency.whole
    )


def _after(smaller: nn.Module, batch: Batch, latency: Latency | None, spec: ModelSpec) -> Size:
    again = None if latency is None else replace(latency, whole=whole(smaller, spec, latency.target))
    return _size(component_cost(smaller, batch), again)


def write_checkpoint(
    model: LoadedModel, plan: PrunePlan, module: nn.Module, out: Path, groups: Sequence[Group]
) -> None:
    """The whole checkpoint with one part replaced: configs and other parts copied, plan in the sidecar, a chart."""
    part, told = PARTS[plan.component][0], sidecar_of(model)
    for gone in (NESTED, ORDERED):  # what training gave narrow widths, restoration has changed
        told.pop(gone, None)
    told.setdefault("pruned", {})[part] = plan.model_dump(mode="json")
    save_checkpoint(model, {part: module}, out, told, lambda new: draw_chart(plan, groups, new / CHART))


def draw_chart(plan: PrunePlan, groups: Sequence[Group], path: Path) -> None:
    """A PNG of what went where: one bar per group in order of execution, as wide as its MACs, the removed part red."""
    from matplotlib.figure import Figure

    macs = {group.name: group.macs for group in groups}
    bars = [(g, macs[g.name] * g.units / 1e6, macs[g.name] * len(g.kept) / 1e6) for g in plan.groups]
    figure = Figure(figsize=(9, 1 + 0.22 * len(bars)), layout="constrained")
    axes = figure.subplots()
    position = list(range(len(bars)))
    axes.barh(position, [whole for _, whole, _ in bars], color="#d9825b", label="removed")
    axes.barh(position, [left for _, _, left in bars], color="#4a7fb0", label="kept")
    axes.set_yticks(position, [f"{g.name}  {len(g.kept)}/{g.units}" for g, _, _ in bars], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("million MACs a call")
    off = plan.off()
    axes.set_title(
        f"{plan.component}: {off['macs']:.1%} of MACs, {off['params']:.1%} of parameters off "
        f"({plan.importance}, {plan.restore})"
    )
    axes.legend()
    figure.savefig(path, dpi=120)
