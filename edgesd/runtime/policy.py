"""A policy is a table: what the device feels like -> how much work a picture gets. Data in, a pure look-up, data out.

The schema and the algorithm, step by step for every language: docs/policies.md. Golden cases: tests/golden/policy.json.
Public: Policy, Limits, Decision, parse_policy, load_policy, policy_names, decide, cost. What a table must fulfil is
checked when it is read (edgesd/runtime/policycheck.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from edgesd.errors import DataError, RequestError
from edgesd.files import open_regular
from edgesd.runtime.device import DeviceState

FORMAT = "edgesd-policy-1"
FOLDER = Path(__file__).parent / "policies"
MAX_BYTES, MAX_ROWS = 1 << 18, 64
UNBOUNDED = float(2**53 - 1)  # stands for "as much as one could want" where nothing is known; safe in JavaScript
# What an axis counts as where the device does not tell. charging has its own rule, see `point`.
NOMINAL: dict[str, Any] = {
    "thermal": "nominal", "charging": True, "saver": False, "headroom": 0.0, "battery": 1.0,
    "free_memory_bytes": UNBOUNDED, "deadline_s": UNBOUNDED, "seconds_per_call": 0.0, "affordable_calls": UNBOUNDED,
}  # fmt: skip
SETS = ("thermal", "charging", "saver")
# Share of an SD 1.5 UNet's MACs that inner width 0 would take off; what a width costs where no bundle says it.
INNER_SHARE = 0.86

Bound = Annotated[float, Field(ge=0, le=UNBOUNDED)]
Interval = tuple[Bound, Bound | None]
Flags = Annotated[tuple[bool, ...], Field(min_length=1, max_length=2)]
Word = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
Sentence = Annotated[str, Field(min_length=1, max_length=400)]


class _Frozen(BaseModel):
    # Unknown fields are refused, unlike in a manifest: a condition that is not understood must not count as true.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class When(_Frozen):
    """Conditions that must all hold; what is left out does not matter. Intervals are closed; null = no upper end.

    affordable_calls: deadline_s divided by the seconds a UNet call takes at width 1.
    """

    thermal: Annotated[tuple[Literal["nominal", "fair", "serious", "critical"], ...], Field(min_length=1)] | None = None
    charging: Flags | None = None
    saver: Flags | None = None
    headroom: Interval | None = None
    battery: Interval | None = None
    free_memory_bytes: Interval | None = None
    deadline_s: Interval | None = None
    seconds_per_call: Interval | None = None
    affordable_calls: Interval | None = None

    @model_validator(mode="after")
    def _ordered(self) -> When:
        for axis, allowed in self.conditions():
            if axis not in SETS and allowed[1] is not None and allowed[0] > allowed[1]:
                raise ValueError(f"{axis} from {allowed[0]:g} to {allowed[1]:g} is empty")
        return self

    def conditions(self) -> list[tuple[str, Any]]:
        return [(axis, allowed) for axis in NOMINAL if (allowed := getattr(self, axis)) is not None]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether every condition is met by the values of a `point`."""
        for axis, allowed in self.conditions():
            value = values[axis]
            if axis in SETS:
                if value not in allowed:
                    return False
            elif value < allowed[0] or (allowed[1] is not None and value > allowed[1]):
                return False
        return True


class Outcome(_Frozen):
    """What a picture gets. guidance_until: share of the steps with guidance. cool_down_s: rest before going on."""

    steps: Annotated[int, Field(ge=1, le=1000)]
    width: Annotated[float, Field(gt=0, le=1)] = 1.0
    guidance_until: Annotated[float, Field(ge=0, le=1)] = 1.0
    tile: bool = False
    upscaler: bool = False
    refiner: bool = False
    cool_down_s: Annotated[float, Field(ge=0, le=3600)] = 0.0


class Row(_Frozen):
    """level: 0 where all is well, higher = worse; rows of one level give the same. reason: a sentence for the user."""

    name: Word
    level: Annotated[int, Field(ge=0, le=63)]
    when: When = When()
    then: Outcome
    reason: Sentence


class Policy(_Frozen):
    """The first row whose conditions hold is the answer. dwell_s: how long it must be better before it counts."""

    format: Literal["edgesd-policy-1"] = "edgesd-policy-1"
    name: Word
    about: Sentence
    dwell_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    rows: Annotated[tuple[Row, ...], Field(min_length=1, max_length=MAX_ROWS)]

    def axes(self) -> tuple[str, ...]:
        """The axes that any row looks at, in the order of NOMINAL."""
        used = {axis for row in self.rows for axis, _ in row.when.conditions()}
        return tuple(axis for axis in NOMINAL if axis in used)

    def match(self, values: Mapping[str, Any]) -> Row | None:
        return next((row for row in self.rows if row.when.holds(values)), None)


@dataclass(frozen=True)
class Limits:
    """What the user allows and the bundle offers. steps, widths: offered, ascending; tile … refiner: are they there?

    min and max bound what the policy may choose (the user's floor and ceiling); guidance_until has no offer.
    Raises RequestError where nothing is left to choose.
    """

    steps: tuple[int, ...] = tuple(range(1, 1001))
    widths: tuple[float, ...] = (1.0,)
    min_steps: int = 1
    max_steps: int = 1000
    min_width: float = 0.0
    max_width: float = 1.0
    min_guidance_until: float = 0.0
    max_guidance_until: float = 1.0
    tile: bool = False
    upscaler: bool = False
    refiner: bool = False

    def __post_init__(self) -> None:
        for name, low, high, offered in (
            ("steps", self.min_steps, self.max_steps, self.steps),
            ("width", self.min_width, self.max_width, self.widths),
            ("guidance until", self.min_guidance_until, self.max_guidance_until, (0.0, 1.0)),
        ):
            if low > high or (name != "guidance until" and not any(low <= x <= high for x in offered)):
                allowed = ", ".join(f"{x:g}" for x in offered[:20]) or "none"
                raise RequestError(f"{name} from {low:g} to {high:g}", f"a range that holds one of {allowed}",
                                   "Widen the floor or the ceiling")  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """What a picture gets and why. row, level: of the table. time_s: of the state.

    capped: what the policy wanted and limits did not give. assumed: axes that the device did not tell and the table
    looks at. better_since_s: since when it has been better than `row` says, None = it has not.
    """

    steps: int
    width: float
    guidance_until: float
    tile: bool
    upscaler: bool
    refiner: bool
    cool_down_s: float
    reason: str
    row: str
    level: int
    time_s: float
    capped: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    better_since_s: float | None = None

    @classmethod
    def from_json(cls, data: Any) -> Decision:
        """What `to_json` gave; DataError for anything else."""
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError:
            raise DataError("the saved decision does not parse", "what edgesd saved", "Draw the picture anew") from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"capped": list(self.capped), "assumed": list(self.assumed)}


def point(state: DeviceState) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(value by axis, the axes that are not known and count as nominal)."""
    values: dict[str, Any] = {axis: getattr(state, axis, None) for axis in NOMINAL}
    values["thermal"] = None if state.thermal == "unknown" else state.thermal
    values["seconds_per_call"] = seconds = state.seconds_per_call.get(1.0)
    known = state.deadline_s is not None and seconds is not None
    values["affordable_calls"] = min(state.deadline_s / seconds, UNBOUNDED) if known else None  # type: ignore[operator]
    unknown = tuple(axis for axis, value in values.items() if value is None)
    # A battery that is known but not said to be charging is taken to run down; no battery at all means the mains.
    nominal = NOMINAL | {"charging": state.battery is None}
    return {axis: nominal[axis] if value is None else value for axis, value in values.items()}, unknown


def decide(
    policy: Policy, state: DeviceState, previous: Decision | None = None, limits: Limits | None = None
) -> Decision:
    """The row in force, capped by the limits. Worse counts at once, better only after `dwell_s` without a break.

    previous: the last decision of this policy, None at first. Pure: the same arguments, the same answer.
    """
    values, unknown = point(state)
    row = policy.match(values)
    if row is None:  # the check at load leaves no gap, so the table was not checked
        raise DataError(f"policy {policy.name} says nothing for {values}", "a table without gaps", "Check it at load")
    since = None
    kept = next((r for r in policy.rows if previous is not None and r.name == previous.row), None)
    if kept is not None and previous is not None and row.level < kept.level:
        since = state.time_s if previous.better_since_s is None else min(previous.better_since_s, state.time_s)
        if state.time_s < previous.time_s:  # the clock began anew
            since = state.time_s
        if state.time_s - since >= policy.dwell_s:
            since = None
        else:
            row = kept
    given, capped = _cap(row.then, Limits() if limits is None else limits)
    assumed = tuple(axis for axis in policy.axes() if axis in unknown)
    return Decision(
        **given, reason=row.reason, row=row.name, level=row.level, time_s=state.time_s, capped=capped, assumed=assumed,
        better_since_s=since,
    )  # fmt: skip


def _cap(then: Outcome, limits: Limits) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the outcome within limits, the names of what came out otherwise than wanted)."""
    wanted = then.model_dump()
    low, high = limits.min_guidance_until, limits.max_guidance_until
    given = wanted | {
        "steps": _nearest(then.steps, [n for n in limits.steps if limits.min_steps <= n <= limits.max_steps]),
        "width": _nearest(then.width, [w for w in limits.widths if limits.min_width <= w <= limits.max_width]),
        "guidance_until": max(low, min(high, then.guidance_until)),
        **{name: wanted[name] and getattr(limits, name) for name in ("tile", "upscaler", "refiner")},
    }
    return given, tuple(name for name in given if given[name] != wanted[name])


def _nearest(wanted: Any, allowed: list[Any]) -> Any:
    """The largest that is not above what is wanted, else the smallest there is."""
    return max((x for x in allowed if x <= wanted), default=min(allowed))


def width_cost(width: float) -> float:
    """MACs of a UNet call at a width over those at 1, for SD 1.5's shape: 0.57 at 0.5, for only inner channels go."""
    return 1 - INNER_SHARE * (1 - width)


def cost(then: Outcome | Decision) -> float:
    """UNet work of a picture in calls at full width: steps x (1 + share with guidance) x width_cost."""
    return then.steps * (1 + then.guidance_until) * width_cost(then.width)


def policy_names() -> tuple[str, ...]:
    """The policies that ship with edgesd."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def load_policy(source: str | Path) -> Policy:
    """A shipped policy by name, or a JSON file by path (anything that ends in .json)."""
    if str(source) in policy_names():
        return _shipped(str(source))
    if not str(source).endswith(".json"):
        raise RequestError(f"policy {str(source)[:60]!r}", f"{', '.join(policy_names())} or a .json file",
                           "Choose one of these")  # fmt: skip
    try:
        with open_regular(Path(source)) as file:
            return parse_policy(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise RequestError(f"policy file {source}: {error.strerror}", "a JSON file that reads", "Check it") from None


@lru_cache
def _shipped(name: str) -> Policy:
    return parse_policy((FOLDER / f"{name}.json").read_bytes())


def parse_policy(data: bytes) -> Policy:
    """A checked policy from the bytes of its JSON. DataError for what does not parse, has gaps, or gets dearer."""
    from edgesd.runtime.policycheck import check

    do = "Correct the table as docs/policies.md describes"
    if len(data) > MAX_BYTES:
        raise DataError(f"a policy of more than {MAX_BYTES} bytes", f"up to {MAX_BYTES}", do)
    try:
        json.loads(data)  # pydantic's own reader takes NaN
        policy = Policy.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "policy"
        raise DataError(f"policy: {where[:80]}: {first['msg'][:160]}", f"a table of format {FORMAT}", do) from None
    except (ValueError, RecursionError):
        raise DataError("a policy that is no JSON", f"a table of format {FORMAT}", do) from None
    check(policy)
    return policy
