"""Policies: the algorithm against golden cases, what a table must fulfil, and properties of every shipped table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import LIMITS, every_axis, policies, policy_json

from edgesd.errors import DataError, RequestError
from edgesd.runtime.device import THERMAL, DeviceState
from edgesd.runtime.policy import Limits, Policy, cost, decide, load_policy, parse_policy, policy_names
from edgesd.runtime.policycheck import check

GOLDEN = Path(__file__).parent.parent / "golden" / "policy.json"
TABLES = policies()


def by_the_book(policy, state, previous, limits):
    """docs/policies.md again, in plain Python on plain JSON: an oracle that shares no code with `decide`."""
    top = 2**53 - 1
    known = {k: v for k, v in state.items() if v is not None}
    seconds = known.get("seconds_per_call", {}).get("1")
    affordable = min(known["deadline_s"] / seconds, top) if "deadline_s" in known and seconds else None
    found = {
        "thermal": known.get("thermal"), "charging": known.get("charging"), "saver": known.get("saver"),
        "headroom": known.get("headroom"), "battery": known.get("battery"),
        "free_memory_bytes": known.get("free_memory_bytes"), "deadline_s": known.get("deadline_s"),
        "seconds_per_call": seconds, "affordable_calls": affordable,
    }  # fmt: skip
    usual = ("nominal", "battery" not in known, False, 0, 1, top, top, 0, top)
    values = {axis: u if found[axis] is None else found[axis] for axis, u in zip(found, usual, strict=True)}

    def holds(when):
        for axis, allowed in when.items():
            if allowed is None:
                continue
            value = values[axis]
            if axis in ("thermal", "charging", "saver"):
                if value not in allowed:
                    return False
            elif value < allowed[0] or (allowed[1] is not None and value > allowed[1]):
                return False
        return True

    row = next(r for r in policy["rows"] if holds(r["when"]))
    since, now = None, state.get("time_s", 0.0)
    kept = next((r for r in policy["rows"] if previous and r["name"] == previous["row"]), None)
    if kept and row["level"] < kept["level"]:
        since = now if previous["better_since_s"] is None else previous["better_since_s"]
        if now < previous["time_s"] or now < since:
            since = now
        if now - since >= policy["dwell_s"]:
            since = None
        else:
            row = kept
    then, got = row["then"], dict(row["then"])
    for name, offered, low, high in (("steps", "steps", "min_steps", "max_steps"),
                                     ("width", "widths", "min_width", "max_width")):  # fmt: skip
        allowed = [x for x in limits[offered] if limits[low] <= x <= limits[high]]
        below = [x for x in allowed if x <= then[name]]
        got[name] = max(below) if below else min(allowed)
    got["guidance_until"] = max(limits["min_guidance_until"], min(limits["max_guidance_until"], then["guidance_until"]))
    for name in ("tile", "upscaler", "refiner"):
        got[name] = then[name] and limits[name]
    used = {axis for r in policy["rows"] for axis, allowed in r["when"].items() if allowed is not None}
    return got | {
        "reason": row["reason"], "row": row["name"], "level": row["level"], "time_s": now,
        "capped": [n for n in ("steps", "width", "guidance_until", "tile", "upscaler", "refiner") if got[n] != then[n]],
        "assumed": [axis for axis in found if axis in used and found[axis] is None], "better_since_s": since,
    }  # fmt: skip


def test_golden_cases_are_what_the_document_says_and_what_is_decided():
    golden = json.loads(GOLDEN.read_text())
    assert len(golden["cases"]) >= 500
    for case in golden["cases"]:
        policy, limits = golden["policies"][case["policy"]], golden["limits"][case["limits"]]
        assert by_the_book(policy, case["state"], case["previous"], limits) == case["decision"]
    hit = {(c["policy"], c["decision"]["row"]) for c in golden["cases"]}
    assert hit == {(i, row["name"]) for i, p in enumerate(golden["policies"]) for row in p["rows"]}
    assert golden == json.loads(json.dumps(policy_json(golden["command"])))  # and the file is up to date


states = st.builds(
    DeviceState,
    battery=st.none() | st.floats(0, 1), charging=st.none() | st.booleans(), saver=st.none() | st.booleans(),
    thermal=st.sampled_from((*THERMAL, "unknown")), headroom=st.none() | st.floats(0, 3),
    free_memory_bytes=st.none() | st.integers(0, 1 << 34), deadline_s=st.none() | st.floats(0, 100),
    seconds_per_call=st.just({}) | st.builds(lambda s: {1.0: s}, st.floats(0.01, 5)),
)  # fmt: skip
tables, limits = st.sampled_from(TABLES), st.sampled_from(LIMITS)


@settings(max_examples=300, deadline=None)
@given(tables, limits, states, st.data())
def test_hotter_or_emptier_never_costs_more(policy, bounds, state, data):
    level = THERMAL.index("nominal" if state.thermal == "unknown" else state.thermal)
    worse = replace(
        state,
        thermal=THERMAL[data.draw(st.integers(level, 3))],
        headroom=(state.headroom or 0.0) + data.draw(st.floats(0, 2)),
        battery=(1.0 if state.battery is None else state.battery) * data.draw(st.floats(0, 1)),
        charging=data.draw(st.booleans()) and (state.battery is None if state.charging is None else state.charging),
        saver=state.saver or data.draw(st.booleans()),
    )
    before, after = decide(policy, state, None, bounds), decide(policy, worse, None, bounds)
    assert cost(after) <= cost(before)
    assert (after.steps, after.width, after.guidance_until) <= (before.steps, before.width, before.guidance_until)
    assert after.refiner <= before.refiner
    assert after.upscaler <= before.upscaler


@settings(max_examples=100, deadline=None)
@given(tables, st.lists(st.tuples(states, st.floats(0, 20)), min_size=2, max_size=30))
def test_it_never_gets_better_within_the_dwell(policy, chain):
    previous, now, worse_at = None, 0.0, 0.0
    for state, passed in chain:
        now += passed
        state = replace(state, time_s=now)
        made = decide(policy, state, previous)
        if previous is not None and made.level < previous.level:
            assert now - worse_at >= policy.dwell_s
        if decide(policy, state).level >= made.level:  # as bad as it says, at this moment
            worse_at = now
        previous = made


def test_worse_counts_at_once_and_better_after_the_dwell():
    policy = load_policy("balanced")
    well, hot = DeviceState(thermal="nominal"), DeviceState(thermal="serious")
    chain = [(well, 0), (hot, 1), (well, 2), (well, 31), (hot, 31.5), (well, 32), (well, 61.9), (well, 62)]
    previous, levels = None, []
    for state, time_s in chain:
        previous = decide(policy, replace(state, time_s=float(time_s)), previous)
        levels.append(previous.level)
    assert levels == [0, 2, 2, 2, 2, 2, 2, 0]


def test_a_clock_that_begins_anew_begins_the_dwell_anew():
    policy, well = load_policy("balanced"), DeviceState(thermal="nominal")
    hot = decide(policy, DeviceState(thermal="serious", time_s=1000.0))
    waiting = decide(policy, replace(well, time_s=1020.0), hot)
    restarted = decide(policy, replace(well, time_s=3.0), waiting)
    assert (restarted.level, restarted.better_since_s) == (2, 3.0)
    assert decide(policy, replace(well, time_s=33.0), restarted).level == 0


@pytest.mark.parametrize(
    ("battery", "thermal", "expected"),
    [
        (0.19, "nominal", (15, 0.5, True, False, False)), (0.9, "serious", (15, 0.5, True, False, False)),
        (0.5, "critical", (15, 0.5, True, False, False)), (0.81, "fair", (30, 1.0, False, True, True)),
        (0.8, "nominal", (20, 0.75, False, True, False)), (0.2, "nominal", (20, 0.75, False, True, False)),
    ],
)  # fmt: skip
def test_the_seed_policy_is_the_first_design(battery, thermal, expected):
    everything = Limits(widths=(0.5, 0.75, 1.0), tile=True, upscaler=True, refiner=True)
    made = decide(load_policy("seed"), DeviceState(battery=battery, thermal=thermal), None, everything)
    assert (made.steps, made.width, made.tile, made.upscaler, made.refiner) == expected
    assert made.capped == ()


def test_unknown_is_nominal_and_said():
    made = decide(load_policy("balanced"), DeviceState())
    assert made.row == "well"
    assert made.assumed == ("thermal", "charging", "saver", "headroom", "battery", "free_memory_bytes")
    # A battery that is known but not said to be charging runs down.
    assert decide(load_policy("balanced"), DeviceState(battery=0.05)).row == "nearly-empty"


def test_the_users_ceiling_and_floor_win():
    policy, empty = load_policy("balanced"), DeviceState(battery=0.05)
    assert decide(policy, DeviceState(), None, Limits(max_steps=12)).steps == 12
    assert decide(policy, empty, None, Limits(min_steps=18)).steps == 18
    assert decide(policy, DeviceState(), None, Limits(max_guidance_until=0.5)).guidance_until == 0.5
    narrow = decide(policy, empty)
    assert (narrow.width, "width" in narrow.capped) == (1.0, True)


@pytest.mark.parametrize(
    "wrong",
    [{"min_steps": 9, "max_steps": 8}, {"steps": (4, 8), "min_steps": 5, "max_steps": 7}, {"widths": ()},
     {"min_width": 0.9, "max_width": 0.95}, {"min_guidance_until": 0.6, "max_guidance_until": 0.5}],
)  # fmt: skip
def test_limits_that_leave_nothing_are_refused(wrong):
    with pytest.raises(RequestError):
        Limits(**wrong)


def table(*rows, **more):
    """The bytes of a policy of (name, level, when, then)."""
    listed = [{"name": n, "level": lv, "when": w, "then": t, "reason": "x"} for n, lv, w, t in rows]
    return json.dumps({"format": "edgesd-policy-1", "name": "t", "about": "x", "rows": listed} | more).encode()


HOT, LOW = {"thermal": ["serious", "critical"]}, {"battery": [0, 0.2]}


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        (table(("low", 1, LOW, {"steps": 9}), ("high", 0, {"battery": [0.21, 1]}, {"steps": 20})), "a gap"),
        (table(("cool", 0, {"thermal": ["nominal", "fair"]}, {"steps": 20})), "thermal serious"),
        (table(("all", 0, {}, {"steps": 20}), ("hot", 1, HOT, {"steps": 9})), "row hot is never reached"),
        (table(("hot", 1, HOT, {"steps": 30}), ("well", 0, {}, {"steps": 20})), "row hot of level 1 costs 60, more"),
        (table(("hot", 1, HOT, {"steps": 25, "guidance_until": 0.0}), ("well", 0, {}, {"steps": 20})), "raises steps"),
        (table(("hot", 1, HOT, {"steps": 9, "refiner": True}), ("well", 0, {}, {"steps": 20})), "raises refiner"),
        (table(("hot", 0, HOT, {"steps": 20}), ("well", 1, {}, {"steps": 9})), "row hot (level 0, cost 40) follows"),
        (table(("high", 1, {"battery": [0.5, 1]}, {"steps": 9}), ("low", 0, {}, {"steps": 20})), "battery gets worse"),
        (table(("none", 0, {"battery": [0, 0]}, {"steps": 9}), ("well", 1, {}, {"steps": 9})), "battery gets worse"),
        (table(("full", 1, {"battery": [1, 1]}, {"steps": 9}), ("well", 0, {}, {"steps": 9})), "battery gets worse"),
        (table(("a", 0, HOT, {"steps": 9}), ("b", 0, {}, {"steps": 20})), "rows a and b of level 0"),
        (table(("a", 0, LOW, {"steps": 9}), ("a", 0, {}, {"steps": 9})), "two rows of one name"),
        (table(("a", 0, {"batery": [0, 1]}, {"steps": 9})), "rows.0.when.batery"),
        (table(("a", 0, {"battery": [0.5, 0.4]}, {"steps": 9})), "empty"),
        (table(("a", 0, {"battery": "b < 0.2"}, {"steps": 9})), "rows.0.when.battery"),
        (table(("a", 0, {}, {"steps": 0})), "steps"), (table(("a", 0, {}, {"steps": True})), "steps"),
        (table(("a", 0, {}, {"steps": 9}), format="edgesd-policy-2"), "format"), (table(), "rows"),
        (b"{", "no JSON"), (b"[" * 100_000, "no JSON"), (b'{"dwell_s": NaN}', "policy"), (b" " * (1 << 19), "bytes"),
    ],
)  # fmt: skip
def test_a_table_that_must_not_be_is_refused_by_name(data, phrase):
    with pytest.raises(DataError) as error:
        parse_policy(data)
    assert phrase in str(error.value)


def test_a_table_of_too_many_cells_is_refused_before_it_is_walked():
    axes = ("headroom", "battery", "free_memory_bytes", "deadline_s", "seconds_per_call")
    rows = [(f"r{i}", 1, {a: [i / 100, i / 100 + 0.001] for a in axes}, {"steps": 9}) for i in range(40)]
    with pytest.raises(DataError, match="cells"):
        parse_policy(table(*rows, ("well", 0, {}, {"steps": 20})))


@pytest.mark.parametrize("policy", TABLES, ids=lambda p: p.name)
def test_every_table_passes_its_own_check_and_travels_as_json(policy):
    check(policy)
    assert parse_policy(json.dumps(policy.model_dump(mode="json")).encode()) == policy
    assert Policy.model_validate_json(policy.model_dump_json()) == policy


def test_shipped_policies_load_by_name_and_files_by_path(tmp_path):
    assert policy_names() == ("balanced", "battery", "deadline", "quality", "seed")
    (tmp_path / "mine.json").write_text(every_axis().model_dump_json())
    assert load_policy(tmp_path / "mine.json") == every_axis()
    for wrong in ("turbo", str(tmp_path / "none.json"), str(tmp_path)):
        with pytest.raises(RequestError):
            load_policy(wrong)
