"""How much goes from which group, under one budget for the whole model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Literal

from edgesd.compress.groups import Group
from edgesd.compress.importance import Curve
from edgesd.compress.latency import Latency
from edgesd.errors import RequestError
from edgesd.models.count import Cost

Budget = Literal["macs", "params", "bytes", "latency"]
ALLOCATIONS = ("global", "uniform")
CAREFUL = 0.5  # at most this share goes from a group of the first and the last block


def allocate(
    curves: Mapping[str, Curve],
    groups: Sequence[Group],
    cost: Cost,
    ratio: float,
    *,
    allocation: str = "global",
    budget: Budget = "macs",
    protect: Sequence[str] = (),
    careful: float = CAREFUL,
    latency: Latency | None = None,
) -> dict[str, tuple[int, ...]]:
    """Kept units per group (sorted), so that at least `ratio` of the whole model's budget goes.

    global: steps of all groups by error per unit of budget, on each curve's lower convex hull; uniform: the same share
    of every group. protect: globs of group names that stay whole. curves: in the order of execution, which tells the
    first and last block. latency: what was measured, for a budget of "latency".
    Raises RequestError: a glob that matches nothing, a ratio beyond what can go (says how far).
    """
    by_name = {group.name: group for group in groups}
    saved = _savings(curves, by_name, budget, latency)
    whole = latency.whole if latency is not None else cost.macs if budget == "macs" else cost.params
    room = _room(curves, by_name, protected(by_name, protect), careful)
    most = sum(saved[name][room[name]] for name in curves)
    if most < ratio * whole:
        raise RequestError(
            f"ratio {ratio:g} of {budget}",
            f"up to {most / whole:.3f} here: only inner widths go, and protected and outer blocks less",
            "Lower the ratio, or protect fewer layers",
        )
    steps = _global_steps(curves, saved, room) if allocation == "global" else _uniform_steps(by_name, room)
    taken = dict.fromkeys(curves, 0)
    for name in steps:
        if sum(saved[name][count] for name, count in taken.items()) >= ratio * whole:
            break
        taken[name] += 1
    return {name: tuple(sorted(curve.order[taken[name] * by_name[name].step :])) for name, curve in curves.items()}


def _savings(
    curves: Mapping[str, Curve], by_name: Mapping[str, Group], budget: Budget, latency: Latency | None
) -> dict[str, list[float]]:
    """What is saved once 0, 1, 2, … steps of a group are gone, in the budget's own unit; never less for more."""
    found = {}
    for name, curve in curves.items():
        group, steps = by_name[name], range(len(curve.errors) + 1)
        if budget == "latency":
            if latency is None:
                raise RequestError("a budget of latency", "a target that it is measured on", "Add --target")
            found[name] = list(accumulate((latency.saved(name, step * group.step) for step in steps), max))
        else:
            price = group.macs if budget == "macs" else group.params
            found[name] = [float(step * group.step * price) for step in steps]
    return found


def protected(names: Collection[str], protect: Sequence[str]) -> set[str]:
    """Names of the groups that the globs match. Raises RequestError for a glob that matches none."""
    found: set[str] = set()
    for pattern in protect:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise RequestError(
                f"protected name {pattern!r} matches no group",
                "globs of group names such as " + ", ".join(list(names)[:3]), "Change --protect",
            )  # fmt: skip
        found |= matched
    return found


def _room(curves: Mapping[str, Curve], by_name: Mapping[str, Group], whole: set[str], careful: float) -> dict[str, int]:
    """Steps that may go from each group: all of its curve, fewer in the first and last block, none if protected."""
    names = list(curves)
    outer = {_block(names[0]), _block(names[-1])}
    room = {}
    for name, curve in curves.items():
        share = careful if _block(name) in outer else 1.0
        limit = int(share * by_name[name].units) // by_name[name].step
        room[name] = 0 if name in whole else min(len(curve.errors), limit)
    return room


def _block(name: str) -> str:
    """The block a group lies in: `down_blocks.0` of `down_blocks.0.resnets.1`, `text_model.encoder.layers.3`, ..."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1) + 1])


def _global_steps(
    curves: Mapping[str, Curve], saved: Mapping[str, Sequence[float]], room: Mapping[str, int]
) -> list[str]:
    """Group names, one per step, the cheapest error per budget first; hull segments keep a group's steps in order."""
    segments: list[tuple[float, int, str, int]] = []
    for position, (name, curve) in enumerate(curves.items()):
        errors, gain, at = (0.0, *curve.errors), saved[name], 0

        def slope(end: int, at: int = at, errors: Sequence[float] = errors, gain: Sequence[float] = gain) -> float:
            return (errors[end] - errors[at]) / max(gain[end] - gain[at], 1e-30)

        while at < room[name]:
            ends = range(at + 1, room[name] + 1)
            end = min(ends, key=lambda j: (slope(j, at), j))
            segments.append((slope(end, at), position, name, end - at))
            at = end
    return [name for _, _, name, count in sorted(segments) for _ in range(count)]


def _uniform_steps(by_name: Mapping[str, Group], room: Mapping[str, int]) -> list[str]:
    """Steps in the order in which groups reach the same removed share."""
    shares = [
        (count * by_name[name].step / by_name[name].units, position, name)
        for position, name in enumerate(room)
        for count in range(1, room[name] + 1)
    ]
    return [name for _, _, name in sorted(shares)]
