"""How much goes from which group, under one budget for the whole model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from edgesd.compress.groups import Group
from edgesd.compress.importance import Curve
from edgesd.errors import RequestError
from edgesd.models.count import Cost

Budget = Literal["macs", "params", "bytes"]
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
) -> dict[str, tuple[int, ...]]:
    """Kept units per group (sorted), so that at least `ratio` of the whole model's MACs, parameters or bytes goes.

    global: steps of all groups by error per unit of budget, on each curve's lower convex hull; uniform: the same share
    of every group. protect: globs of group names that stay whole. curves: in the order of execution, which tells the
    first and last block. Raises RequestError: a glob that matches nothing, a ratio beyond what can go (says how far).
    """
    by_name = {group.name: group for group in groups}
    price = {name: by_name[name].macs if budget == "macs" else by_name[name].params for name in curves}
    whole = cost.macs if budget == "macs" else cost.params
    room = _room(curves, by_name, protected(by_name, protect), careful)
    most = sum(room[name] * by_name[name].step * price[name] for name in curves)
    if most < ratio * whole:
        raise RequestError(
            f"ratio {ratio:g} of {budget}",
            f"up to {most / whole:.3f} here: only inner widths go, and protected and outer blocks less",
            "Lower the ratio, or protect fewer layers",
        )
    steps = _global_steps(curves, by_name, price, room) if allocation == "global" else _uniform_steps(by_name, room)
    taken = dict.fromkeys(curves, 0)
    gone = 0
    for name in steps:
        if gone >= ratio * whole:
            break
        taken[name] += 1
        gone += by_name[name].step * price[name]
    return {name: tuple(sorted(curve.order[taken[name] * by_name[name].step :])) for name, curve in curves.items()}


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
    curves: Mapping[str, Curve], by_name: Mapping[str, Group], price: Mapping[str, int], room: Mapping[str, int]
) -> list[str]:
    """Group names, one per step, the cheapest error per budget first; hull segments keep a group's steps in order."""
    segments: list[tuple[float, int, str, int]] = []
    for position, (name, curve) in enumerate(curves.items()):
        errors, at = (0.0, *curve.errors), 0
        while at < room[name]:
            end = min(range(at + 1, room[name] + 1), key=lambda j: ((errors[j] - errors[at]) / (j - at), j))
            slope = (errors[end] - errors[at]) / ((end - at) * by_name[name].step * max(price[name], 1))
            segments.append((slope, position, name, end - at))
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
