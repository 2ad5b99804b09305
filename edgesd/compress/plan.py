"""A pruning decision as data: what stays, in which order the rest went, and what it bought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator
from torch import nn

from edgesd.compress.frozen import Frozen, unreadable
from edgesd.compress.groups import Group, cut, find_groups
from edgesd.errors import DataError

MAX_UNITS = 1 << 20
Unit = Annotated[int, Field(ge=0, lt=MAX_UNITS)]


class GroupPlan(Frozen):
    """One group. kept: units that stay, ascending. order: all units, the first to go in front.

    errors: the squared output error per call foreseen after each step of `order`.
    """

    name: str
    kind: str
    units: Annotated[int, Field(ge=1, le=MAX_UNITS)]
    unit_size: Annotated[int, Field(ge=1, le=MAX_UNITS)]
    kept: tuple[Unit, ...]
    order: tuple[Unit, ...] = ()
    errors: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> GroupPlan:
        if not self.kept or list(self.kept) != sorted(set(self.kept)) or self.kept[-1] >= self.units:
            raise ValueError(f"{self.name}: kept units must ascend within 0..{self.units - 1}, at least one")
        return self


class Size(Frozen):
    """Parameters, bytes in float32 and MACs per call of a component at its default size; seconds, where measured."""

    params: int
    bytes: int
    macs: int
    seconds: float | None = None


class PrunePlan(Frozen):
    """What stays of a component and how that was decided; `before` and `after` are counted, not estimated."""

    component: str
    ratio: float
    budget: str
    importance: str
    restore: str
    allocation: str
    source_sha256: str
    target: str | None = None
    groups: tuple[GroupPlan, ...]
    before: Size
    after: Size

    @classmethod
    def parse(cls, data: Any) -> PrunePlan:
        """From JSON data, which may come from anywhere. Raises DataError."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise unreadable(error, "pruning plan", "prune", "Prune the model again") from None

    def off(self) -> dict[str, float]:
        """Share taken off of params, bytes and macs, and of seconds where they were measured."""
        before, after = (size.model_dump(exclude_none=True) for size in (self.before, self.after))
        return {name: 1 - after[name] / before[name] for name in before}

    def summary(self) -> dict[str, Any]:
        """The plan without its indices, for people and manifests."""
        told = self.model_dump(mode="json", exclude={"groups"})
        kinds = {kind: {"kept": kept, "whole": whole} for kind, (kept, whole) in self.by_kind().items()}
        return told | {"kinds": kinds}

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """kind -> (channels kept, channels there were)."""
        sums: dict[str, tuple[int, int]] = {}
        for group in self.groups:
            kept, whole = sums.get(group.kind, (0, 0))
            sums[group.kind] = kept + len(group.kept) * group.unit_size, whole + group.units * group.unit_size
        return sums


def resize(module: nn.Module, plan: PrunePlan) -> None:
    """Cuts a dense module, in place, to the plan. Raises DataError when the plan is not of this module."""
    groups = {group.name: group for group in find_groups(module)}
    for planned in plan.groups:
        group = groups.get(planned.name)
        if group is None or (group.units, group.unit_size) != (planned.units, planned.unit_size):
            raise DataError(
                f"the pruning plan's group {planned.name} does not fit the model", "the plan this model was pruned by",
                "Prune the model again",
            )  # fmt: skip
        if len(planned.kept) < planned.units:
            cut(module, group, planned.kept)


def apply(plan: PrunePlan, module: nn.Module) -> nn.Module:
    """A copy of the dense module cut to the plan, nothing restored; uncut tensors are shared."""
    from edgesd.models.modules import share

    copy = share(module)
    resize(copy, plan)
    return copy


def group_plans(
    groups: Mapping[str, Group], kept: Mapping[str, tuple[int, ...]], curves: Mapping[str, Any]
) -> tuple[GroupPlan, ...]:
    """The plan's rows, in the order of execution."""
    return tuple(
        GroupPlan(
            name=name, kind=groups[name].kind, units=groups[name].units, unit_size=groups[name].unit_size,
            kept=kept[name], order=curve.order, errors=curve.errors,
        )
        for name, curve in curves.items()
    )  # fmt: skip
