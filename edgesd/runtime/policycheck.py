"""What a policy's table must fulfil, found out by going through every cell that its rows' bounds cut the axes into.

Refused: a gap, a row that is never first, rows of one level that differ, and any step towards hotter, emptier, later
or fuller that costs more. Within a cell all rows answer alike, so the bounds and the midpoints between them (and the
ends of an axis) are every case there is; each neighbour on each axis in turn is then every step there is.
"""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

from edgesd.errors import DataError
from edgesd.runtime.policy import SETS, UNBOUNDED, Policy, Row, cost

MAX_CELLS = 200_000
# Values of the sets, best first, and the numeric axes where more is worse.
ORDER: dict[str, tuple[Any, ...]] = {
    "thermal": ("nominal", "fair", "serious", "critical"),
    "charging": (True, False),
    "saver": (False, True),
}
MORE_IS_WORSE = ("headroom", "seconds_per_call")


def check(policy: Policy) -> None:
    """Raises DataError that names the rows and the place, or returns."""
    names = [row.name for row in policy.rows]
    if len(set(names)) < len(names):
        raise _refused(policy, "two rows of one name", "names that tell rows apart")
    _check_levels(policy)
    axes = policy.axes()
    values = [_cuts(policy, axis) for axis in axes]
    if math.prod(map(len, values)) > MAX_CELLS:
        raise _refused(policy, f"more than {MAX_CELLS} cells", "fewer bounds or axes")
    found: dict[tuple[int, ...], Row] = {}
    for place in product(*(range(len(v)) for v in values)):
        at = {axis: values[i][place[i]] for i, axis in enumerate(axes)}
        row = policy.match(at)
        if row is None:
            raise _refused(policy, f"a gap: no row holds at {_shown(at)}", "a row for every state")
        found[place] = row
    if unreached := [row.name for row in policy.rows if row not in found.values()]:
        raise _refused(policy, f"row {unreached[0]} is never reached: rows before it take all it would", "rows in use")
    for place, row in found.items():
        for i, axis in enumerate(axes):
            worse = found.get((*place[:i], place[i] + 1, *place[i + 1 :]))
            if worse is not None and worse.level < row.level:
                at = {name: values[j][place[j]] for j, name in enumerate(axes)}
                raise _refused(
                    policy,
                    f"row {worse.name} (level {worse.level}, cost {cost(worse.then):g}) follows row {row.name} (level "
                    f"{row.level}, cost {cost(row.then):g}) as {axis} gets worse from {_shown(at)}",
                    "a level that never falls, and so a cost that never rises, as it gets hotter or emptier",
                )


def _check_levels(policy: Policy) -> None:
    """Rows of one level give the same; a higher level costs no more, in MACs and in each part."""
    ranked = sorted(policy.rows, key=lambda row: row.level)
    for row, worse in pairwise(ranked):
        if row.level == worse.level and row.then != worse.then:
            raise _refused(policy, f"rows {row.name} and {worse.name} of level {row.level} give different things",
                           "one outcome a level")  # fmt: skip
        if cost(worse.then) > cost(row.then):
            raise _refused(
                policy,
                f"row {worse.name} of level {worse.level} costs {cost(worse.then):g}, more than row {row.name} of "
                f"level {row.level} with {cost(row.then):g} (calls at full width)",
                "a cost that never rises with the level",
            )
        # Each part by itself too: a bundle without narrow widths, or a user's floor, takes one part's saving away.
        for part in ("steps", "width", "guidance_until", "upscaler", "refiner"):
            if getattr(worse.then, part) > getattr(row.then, part):
                raise _refused(
                    policy,
                    f"row {worse.name} of level {worse.level} raises {part} over row {row.name} of level {row.level}, "
                    "so it is dearer where limits cap the rest",
                    f"{part} {getattr(row.then, part)} or less",
                )


def _cuts(policy: Policy, axis: str) -> list[Any]:
    """Values to test on an axis, best first."""
    if axis in SETS:
        return list(ORDER[axis])
    end = 1.0 if axis == "battery" else UNBOUNDED
    used = [getattr(row.when, axis) for row in policy.rows if getattr(row.when, axis) is not None]
    bounds = {min(x, end) for allowed in used for x in allowed if x is not None}
    between = {(a + b) / 2 for a, b in pairwise(sorted({0.0, end} | bounds))}
    # An end of the axis answers like the stretch beside it, unless a condition holds there alone.
    alone = {min(low, end) for low, high in used if low >= end or high == 0}
    cuts = sorted(between | (bounds - {0.0, end}) | alone)
    return cuts if axis in MORE_IS_WORSE else cuts[::-1]


def _shown(at: dict[str, Any]) -> str:
    return ", ".join(f"{axis} {value:g}" if isinstance(value, float) else f"{axis} {value}".lower()
                     for axis, value in at.items()) or "any state"  # fmt: skip


def _refused(policy: Policy, came: str, allowed: str) -> DataError:
    return DataError(f"policy {policy.name}: {came}", allowed, "Correct the table as docs/policies.md describes")
