"""Nested widths: one model that also runs with the leading share of every inner group, narrow inside wide.

Each group's units are put in order of importance once, the most important first; outputs stay what they were, since a
group's units are summed over. Width w then keeps the leading share of each group: whole norm groups, whole heads. What
the narrow model lost is taken back per width, in one of two modes:

separate: the layers behind a cut get weights of their own by least squares (edgesd/compress/restore.py).
shared: weights are leading slices of the widest model's, stored once, plus what least squares changed about them,
    rounded to 4 bits an element with a scale an output channel, and biases. Universally slimmable networks (Yu & Huang
    2019, 1903.05134) train their weights so that plain slices work; in a model not trained so they do not (figures:
    docs/widths.md), and the correction wins back nearly all that separate weights do for an eighth of their bytes.

Only inner widths go, so a width takes off less of the cost than its number says: `WidthPlan.off` tells the share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from edgesd.compress.calls import PARTS, Batch, Recorded, batches
from edgesd.compress.evidence import collect
from edgesd.compress.frozen import Frozen
from edgesd.compress.groups import Group, cut, find_groups
from edgesd.compress.importance import IMPORTANCE, curve
from edgesd.compress.plan import GroupPlan, Size
from edgesd.compress.prune import MIN_CALLS, component_cost
from edgesd.compress.restore import restore
from edgesd.errors import DataError, RequestError
from edgesd.models.load import LoadedModel
from edgesd.models.modules import share
from edgesd.models.saving import NESTED
from edgesd.models.weights import read_sidecar

Mode = Literal["separate", "shared"]
MODES: tuple[Mode, ...] = ("separate", "shared")
LEVELS = 7  # a correction's steps on each side of zero: 4 bits
CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)  # of a channel's largest correction, the one with the least squared error is taken
MIN_WIDTH, MAX_WIDTHS = 0.125, 8
PLAN = "widths.json"
TRAINED = "trained"  # stands for the criterion where training ordered the units
Width = Annotated[float, Field(gt=0, le=1)]
Progress = Callable[[str, int, int], None]


class Cost(Frozen):
    """One width's size, counted on the module, and the share of the widest's MACs it takes off."""

    width: Width
    size: Size
    off: float


class WidthPlan(Frozen):
    """Which units come first and what each width costs. order of a group: the most important unit in front."""

    component: str
    mode: Mode
    importance: str
    source_sha256: str
    groups: tuple[GroupPlan, ...]
    widths: tuple[Cost, ...]

    def off(self) -> dict[float, float]:
        """Width -> share of the MACs of the widest that it takes off."""
        return {cost.width: cost.off for cost in self.widths}


@dataclass(frozen=True, eq=False)
class Nested:
    """modules: width -> the part at that width, restored, ready to run; the widest computes what the original does."""

    plan: WidthPlan
    modules: Mapping[float, nn.Module]


def check_widths(widths: Sequence[float], mode: str = "separate") -> tuple[float, ...]:
    """The widths, widest first. Raises RequestError: none or too many, out of range, twice, or without width 1."""
    if mode not in MODES:
        raise RequestError(f"width mode {mode!r}", ", ".join(MODES), "Change --width-mode")
    good = 0 < len(widths) <= MAX_WIDTHS and all(MIN_WIDTH <= w <= 1 for w in widths) and 1.0 in widths
    if not good or len(set(widths)) < len(widths):
        shown = ",".join(f"{w:g}" for w in widths) or "none"
        allowed = f"1 and up to {MAX_WIDTHS - 1} others from {MIN_WIDTH} on, each once"
        raise RequestError(f"widths {shown}", allowed, "Change --widths, for example 1,0.75,0.5")
    return tuple(sorted(widths, reverse=True))


def leading(group: Group, width: float) -> int:
    """Units of a group that a width keeps: its share, rounded to whole steps of the group, at least one step."""
    steps = round(width * group.units / group.step)
    return min(group.units, max(1, steps) * group.step)


def ordered(module: nn.Module, groups: Sequence[Group], orders: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy whose groups have their units in the given order; it computes the same up to rounding."""
    copy = share(module)
    for group in groups:
        cut(copy, group, orders[group.name])
    return copy


def narrowed(module: nn.Module, groups: Sequence[Group], width: float) -> nn.Module:
    """A copy of an ordered module with the leading share of each group; nothing is restored."""
    copy = share(module)
    for group in groups:
        if (count := leading(group, width)) < group.units:
            cut(copy, group, range(count))
    return copy


def nest(
    model: LoadedModel,
    widths: Sequence[float],
    mode: str,
    calls: Sequence[Recorded],
    *,
    importance: str = "obs",
    progress: Progress = lambda stage, done, total: None,
) -> Nested:
    """A UNet at several widths. calls: recorded calls of the UNet from this very model (`CalibrationSet.calls`).

    importance: a criterion of edgesd/compress/importance.py. The model given is not changed. A model that was trained
    at these very widths keeps its order and its weights: its narrow forms are plain slices.
    Raises RequestError (`check_widths`, an unknown criterion, too few calls, nothing to narrow), DataError (activations
    that are not finite).
    """
    widths = check_widths(widths, mode)
    _check_calls(calls, importance)
    part = PARTS["unet"][0]
    dense, lots = model.modules[part], batches("unet", calls, model.spec)
    before = component_cost(dense, lots[0])
    groups = find_groups(dense, before)
    trained = set(widths) <= set(trained_widths(model))
    orders = (
        {group.name: tuple(range(group.units)) for group in groups} if trained
        else _orders(dense, groups, lots, importance, progress)
    )  # fmt: skip
    whole = ordered(dense, groups, orders)
    modules = {1.0: whole} | {width: narrowed(whole, groups, width) for width in widths[1:]}
    for width in () if trained else widths[1:]:
        plain, modules[width] = modules[width], share(whole)
        kept = {group.name: range(leading(group, width)) for group in groups}
        restore(whole, modules[width], groups, kept, lots, progress=partial(progress, f"width {width:g}"))
        if mode == "shared":
            round_corrections(modules[width], plain)
    costs = {width: component_cost(module, lots[0]) for width, module in modules.items()}
    plan = WidthPlan(
        component="unet", mode=mode, importance=TRAINED if trained else importance, source_sha256=model.sha256,  # type: ignore[arg-type]
        groups=tuple(
            GroupPlan(name=g.name, kind=g.kind, units=g.units, unit_size=g.unit_size, kept=tuple(range(g.units)),
                      order=orders[g.name])
            for g in groups
        ),
        widths=tuple(
            Cost(width=w, size=Size(params=c.params, bytes=c.bytes, macs=c.macs), off=1 - c.macs / before.macs)
            for w, c in costs.items()
        ),
    )  # fmt: skip
    return Nested(plan, modules)


def trained_widths(model: LoadedModel) -> tuple[float, ...]:
    """The widths that a checkpoint's UNet was trained at, leading units first (`nested_widths` of its sidecar).

    A LoRA was trained at none of them but the widest.
    """
    if model.loras:
        return ()
    return tuple(read_sidecar(model.parts["unet"].parent).get(NESTED, ()))


def trained_forms(model: LoadedModel) -> dict[float, Callable[[], nn.Module]]:
    """What makes the narrow UNets of a checkpoint trained at its widths, plain slices; nothing for any other."""

    def made(width: float) -> nn.Module:
        return narrowed(model.modules["unet"], find_groups(model.modules["unet"]), width)

    return {width: partial(made, width) for width in trained_widths(model) if width < 1}


def important_first(
    model: LoadedModel, calls: Sequence[Recorded], importance: str = "obs",
    progress: Progress = lambda stage, done, total: None,
) -> nn.Module:  # fmt: skip
    """A copy of the UNet that computes the same and has the most important units of every group in front, for a
    training of nested widths to start from. calls and errors: as in `nest`."""
    _check_calls(calls, importance)
    dense, lots = model.modules[PARTS["unet"][0]], batches("unet", calls, model.spec)
    groups = find_groups(dense)
    return ordered(dense, groups, _orders(dense, groups, lots, importance, progress))


def _check_calls(calls: Sequence[Recorded], importance: str) -> None:
    if importance not in IMPORTANCE:
        raise RequestError(f"importance {importance!r}", ", ".join(IMPORTANCE), "Choose one of these")
    if len(calls) < MIN_CALLS:
        raise RequestError(f"{len(calls)} recorded calls", f"at least {MIN_CALLS}", "Record more with edgesd calibrate")


def _orders(
    dense: nn.Module, groups: Sequence[Group], lots: Sequence[Batch], importance: str, progress: Progress
) -> dict[str, tuple[int, ...]]:
    """Group -> its units, the one that would be missed most in front."""
    evidence = collect(dense, groups, lots, importance)
    orders = {}
    for done, name in enumerate(list(evidence)):
        orders[name] = tuple(reversed(curve(evidence.pop(name), importance, "ls").order))
        progress("importance", done + 1, len(groups))
    return orders


def round_corrections(module: nn.Module, plain: nn.Module) -> None:
    """Rounds, in place, how the weights of a restored module differ from the plain slices; biases stay as they are."""
    slices = dict(plain.named_parameters())
    for name, weight in module.named_parameters():
        if weight.ndim > 1 and not torch.equal(weight, slices[name]):
            weight.data = slices[name].data + rounded(weight.data - slices[name].data)


def rounded(delta: torch.Tensor) -> torch.Tensor:
    """[out, ...] in steps of a scale an output channel, LEVELS on each side, the scale of the least squared error."""
    flat = delta.flatten(1)
    largest = flat.abs().amax(1, keepdim=True).clamp_min(1e-30)
    best, least = torch.zeros_like(flat), flat.square().sum(1, keepdim=True)
    for clip in CLIPS:
        scale = largest * clip / LEVELS
        made = (flat / scale).round().clamp(-LEVELS, LEVELS) * scale
        error = (made - flat).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, made, best), torch.minimum(error, least)
    return best.view_as(delta)


# ---- on disk, between the stages of a build ---------------------------------------------------------------------


def save(nested: Nested, folder: Path) -> None:
    """The plan, and per narrower width the tensors that are no leading slices of the widest's."""
    whole = nested.modules[1.0]
    groups = find_groups(whole)
    for width, module in nested.modules.items():
        plain = narrowed(whole, groups, width).state_dict() if width < 1 else {}
        own = {k: v.contiguous() for k, v in module.state_dict().items() if not _same(plain.get(k), v)}
        if width < 1:
            save_file(own, folder / f"{width:g}.safetensors")
    (folder / PLAN).write_text(nested.plan.model_dump_json(indent=1), encoding="utf-8")


def load(module: nn.Module, folder: Path, width: float) -> nn.Module:
    """The part at a width from what `save` wrote and the part it was made from. Raises DataError where they differ."""
    plan = read_plan(folder)
    found = {g.name: g for g in find_groups(module)}
    if {g.name: (g.units, g.unit_size) for g in plan.groups} != {n: (g.units, g.unit_size) for n, g in found.items()}:
        raise _unfit("its groups differ from the model's")
    if width not in plan.off():
        raise RequestError(f"width {width:g}", ", ".join(f"{w:g}" for w in plan.off()), "Choose one of these")
    whole = ordered(module, tuple(found.values()), {g.name: g.order for g in plan.groups})
    if width == 1:
        return whole
    made = narrowed(whole, tuple(found.values()), width)
    try:
        own = load_file(folder / f"{width:g}.safetensors")
    except (OSError, SafetensorError) as error:
        raise _unfit(str(error)[:100]) from None
    for name, tensor in own.items():
        layer, _, parameter = name.rpartition(".")
        setattr(made.get_submodule(layer), parameter, nn.Parameter(tensor, requires_grad=False))
    return made


def read_plan(folder: Path) -> WidthPlan:
    """The plan that `save` wrote. Raises DataError."""
    try:
        return WidthPlan.model_validate_json((folder / PLAN).read_bytes())
    except (OSError, ValidationError) as error:
        raise _unfit(str(error).splitlines()[0][:100]) from None


def _same(a: Any, b: torch.Tensor) -> bool:
    return a is not None and a.shape == b.shape and bool(torch.equal(a, b))


def _unfit(why: str) -> DataError:
    return DataError(f"the plan of widths does not fit ({why})", "what the same build made", "Package the model again")
