"""Cases for the policies of every language: chains of states, each decision the next one's `previous`."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from edgesd.runtime.device import DeviceState
from edgesd.runtime.policy import Decision, Limits, Outcome, Policy, Row, When, decide, load_policy, policy_names

CHAINS, LENGTH = 10, 10
BOUNDS = {
    "battery": [0.0, 0.05, 0.1, 0.1000001, 0.2, 0.25, 0.4, 0.5, 0.8, 0.81, 1.0],
    "headroom": [0.0, 0.5, 0.7, 0.85, 0.849999, 1.0, 1.4],
    "free_memory_bytes": [0, 1 << 27, 1 << 28, (1 << 28) + 1, 1 << 32],
    "deadline_s": [0.0, 2.0, 5.0, 10.5, 30.0],
    "seconds": [0.05, 0.1, 0.25, 1.0],
}


def every_axis() -> Policy:
    """A table that looks at all axes."""
    worst, middle = (
        Outcome(steps=8, width=0.5, guidance_until=0.3, tile=True, cool_down_s=7.5),
        Outcome(steps=14, width=0.6),
    )
    rows = (
        Row(name="hot", level=2, when=When(thermal=("serious", "critical")), then=worst, reason="hot"),
        Row(name="late", level=2, when=When(affordable_calls=(0.0, 10.0)), then=worst, reason="late"),
        Row(name="full", level=2, when=When(free_memory_bytes=(0.0, 134217728.0)), then=worst, reason="full"),
        Row(name="limit", level=1, when=When(headroom=(0.85, None)), then=middle, reason="limit"),
        Row(name="slow", level=1, when=When(seconds_per_call=(1.0, None)), then=middle, reason="slow"),
        Row(name="soon", level=1, when=When(deadline_s=(0.0, 5.0)), then=middle, reason="soon"),
        Row(name="low", level=1, when=When(battery=(0.0, 0.25), charging=(False,), saver=(True,)),
            then=middle, reason="low"),
        Row(name="well", level=0, then=Outcome(steps=20, upscaler=True, refiner=True), reason="well"),
    )  # fmt: skip
    return Policy(name="every-axis", about="All axes, for tests.", dwell_s=12.5, rows=rows)


LIMITS = (
    Limits(steps=tuple(range(1, 51))),
    Limits(steps=(4, 8, 12, 16, 20, 24), widths=(0.5, 0.75, 1.0), tile=True, upscaler=True, refiner=True),
    Limits(steps=tuple(range(1, 31)), widths=(0.6, 1.0), min_steps=12, max_steps=18, max_guidance_until=0.5, tile=True),
    Limits(widths=(0.5, 0.75, 1.0), min_width=0.75, max_width=0.9, min_guidance_until=0.4),
)


def policies() -> list[Policy]:
    return [*(load_policy(name) for name in policy_names()), every_axis()]


def random_state(rng: random.Random, time_s: float) -> DeviceState:
    """Some fields left out, values on and beside the bounds; two states of three have but one axis that is bad."""
    bad = rng.choice((None, "thermal", *BOUNDS)) if rng.random() < 0.67 else "all"
    words = ("nominal", "unknown") if bad not in ("thermal", "all") else ("fair", "serious", "critical")
    fields: dict[str, Any] = {
        "thermal": rng.choice(words),
        "charging": rng.choice((True, False, False, None)),
        "saver": rng.choice((True, False, False, None)),
    }
    well = {"battery": [0.81, 1.0], "headroom": [0.0, 0.5], "free_memory_bytes": [1 << 32], "deadline_s": [30.0]}
    for name, values in well.items():
        fields[name] = rng.choice([*(BOUNDS[name] if bad in (name, "all") else values), None])
    seconds = rng.choice([*(BOUNDS["seconds"] if bad in ("seconds", "deadline_s", "all") else [0.05]), None])
    fields["seconds_per_call"] = {} if seconds is None else {1.0: seconds}
    return DeviceState(**fields, time_s=time_s)


def told(state: DeviceState) -> dict[str, Any]:
    """A state as JSON, without what is not known."""
    return {key: value for key, value in state.to_json().items() if value not in (None, {}, "unknown")}


def case(index: int, policy: Policy, state: DeviceState, previous: Decision | None, bounds: int) -> dict[str, Any]:
    keys = ("row", "time_s", "better_since_s")
    before = None if previous is None else {key: getattr(previous, key) for key in keys}
    made = decide(policy, state, previous, LIMITS[bounds]).to_json()
    return {"policy": index, "limits": bounds, "state": told(state), "previous": before, "decision": made}


def policy_json(command: str) -> dict[str, Any]:
    """The golden file: policies, limits, and per policy a case for each row and 10 chains of 10 states."""
    rng, tables = random.Random(10), policies()
    cases: list[dict[str, Any]] = []
    for index, policy in enumerate(tables):
        for row in policy.rows:
            states = (random_state(rng, 0.0) for _ in range(100_000))
            state = next(s for s in states if decide(policy, s).row == row.name)
            cases.append(case(index, policy, state, None, rng.randrange(len(LIMITS))))
        for _ in range(CHAINS):
            previous, time_s, bounds = None, rng.choice((0.0, 1000.0)), rng.randrange(len(LIMITS))
            for _ in range(LENGTH):
                state = random_state(rng, time_s)
                cases.append(case(index, policy, state, previous, bounds))
                previous, time_s = (
                    decide(policy, state, previous),
                    max(0.0, time_s + rng.choice((0.5, 3.0, 10.0, 12.5, 31.0, -5.0))),
                )
    return {
        "command": command,
        "about": "docs/policies.md: what a state leaves out is not known; previous: what `decide` reads of it",
        "policies": [policy.model_dump(mode="json") for policy in tables],
        "limits": [asdict(limits) for limits in LIMITS],
        "cases": cases,
    }
