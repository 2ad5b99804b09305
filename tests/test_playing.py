"""A session on a simulated phone: its physics against closed forms, and pictures at the runtime's cost."""

import math
from dataclasses import replace

import pytest

from edgesd import thermal
from edgesd.playing import Work, play
from edgesd.runtime.policy import Limits, Outcome, Policy, Row, When
from edgesd.runtime.widths import Widths
from edgesd.simulate import fixed
from edgesd.thermal import CLASSES, World, load_trace

HOT = load_trace("hot")
DEVICE = CLASSES["recent-npu"]
COOL = replace(DEVICE, throttle_c=90.0)
CALL = 1e12
NARROW, LOAD = 0.6, 8.0


def test_a_resting_phone_cools_along_the_exponential():
    world = World(DEVICE, HOT)
    world.rest(300.0)
    settled = 35.0 + DEVICE.resistance_k_per_w * DEVICE.idle_w
    fall = math.exp(-300.0 / (DEVICE.resistance_k_per_w * DEVICE.capacity_j_per_k))
    assert world.skin_c == pytest.approx(settled + (38.0 - settled) * fall, abs=1e-9)
    assert world.energy_j == pytest.approx(300 * DEVICE.idle_w)


def test_work_takes_its_time_and_energy_at_full_speed():
    cool = replace(DEVICE, throttle_c=90.0)
    world = World(cool, HOT)
    world.compute(10.5 * cool.macs_per_s)
    assert world.time_s == pytest.approx(10.5)
    assert world.energy_j == pytest.approx(10.5 * (cool.power_w + cool.idle_w))
    assert world.throttled_s == 0
    assert world.battery == pytest.approx(0.6 - world.energy_j / (cool.battery_wh * 3600))


def test_a_throttled_phone_settles_where_heat_in_equals_heat_out():
    world = World(DEVICE, HOT)
    world.compute(DEVICE.macs_per_s * 20_000)
    power = DEVICE.power_w * world.speed**2 + DEVICE.idle_w
    assert world.speed < 0.9
    assert world.skin_c == pytest.approx(35.0 + DEVICE.resistance_k_per_w * power, abs=0.05)


def test_speed_falls_steadily_with_heat():
    speeds = [DEVICE.speed(DEVICE.throttle_c + over) for over in (-10, 0, 1, 4, 8, 30)]
    assert speeds[:2] == [1.0, 1.0]
    assert speeds[1:5] == sorted(speeds[1:5], reverse=True)
    assert speeds[-1] == thermal.SLOWEST


def test_fixed_steps_cost_what_their_calls_cost():
    cool = replace(DEVICE, throttle_c=90.0)
    drawn, _ = play(fixed("x", 20, 0.5), Limits(steps=(20,), widths=(0.5,)), cool, HOT, Work(1e12, 2e12), pictures=2)
    assert [d.seconds for d in drawn] == [pytest.approx((40 * 0.57e12 + 2e12) / cool.macs_per_s)] * 2
    assert [(d.ran.steps, d.ran.width, d.ran.switch, d.ran.plain) for d in drawn] == [(20, 0.5, None, True)] * 2


def test_no_picture_is_counted_that_the_battery_or_the_time_did_not_finish():
    empty = HOT.model_copy(update={"start": HOT.start.model_copy(update={"battery": 0.0001})})
    drawn, world = play(fixed("x", 20, 1.0), Limits(), DEVICE, empty, Work(401.6e9, 0.0), pictures=50)
    assert (len(drawn), world.battery) == (0, 0.0)
    drawn, _ = play(fixed("x", 20, 1.0), Limits(), DEVICE, HOT, Work(401.6e9, 0.0), pictures=50, seconds=20.0)
    assert len(drawn) == 2


def by_battery(charge, **then):
    """A policy that does `then` once the battery is down to a charge."""
    rows = (
        Row(name="low", level=1, when=When(battery=(0.0, charge)), then=Outcome(**then), reason="low"),
        Row(name="well", level=0, then=Outcome(steps=20), reason="well"),
    )
    return Policy(name="by-battery", about="For tests.", rows=rows)


def work():
    """Two widths; a narrow call costs NARROW, loading LOAD calls."""
    widths = Widths({1.0: 1.0, 0.5: NARROW}, {}, {1.0: 6.0, 0.5: LOAD}, {})
    return Work(CALL, 0.0, widths.share, widths)


def test_a_picture_narrowed_under_way_costs_its_rows_and_the_loading():
    full_row = 2 * CALL / COOL.macs_per_s * (COOL.power_w + COOL.idle_w) / (COOL.battery_wh * 3600)
    policy = by_battery(0.6 - 6.5 * full_row, steps=20, width=0.5)
    first, second = play(policy, Limits(widths=(0.5, 1.0)), COOL, HOT, work(), pictures=2)[0]
    assert (first.ran.width, first.ran.switch, first.ran.steps, first.ran.plain) == (1.0, (7 / 20, 0.5), 20, True)
    assert first.ran.changes == 1
    assert first.ran.mean_width == pytest.approx((7 + 13 * 0.5) / 20)
    assert first.seconds == pytest.approx(CALL * (14 + LOAD + 26 * NARROW) / COOL.macs_per_s)
    assert (second.ran.width, second.ran.switch) == (0.5, None)  # what is loaded stays loaded
    assert second.seconds == pytest.approx(CALL * 40 * NARROW / COOL.macs_per_s)


def test_a_picture_with_another_table_under_way_is_drawn_by_no_settings():
    row = 2 * CALL / COOL.macs_per_s * (COOL.power_w + COOL.idle_w) / (COOL.battery_wh * 3600)
    first, second = play(by_battery(0.6 - 9.5 * row, steps=10), Limits(), COOL, HOT, work(), pictures=2)[0]
    assert (first.ran.steps, first.ran.plain) == (15, False)
    assert (second.ran.steps, second.ran.plain) == (10, True)


def test_a_switch_that_was_measured_to_win_is_played_with_its_loading():
    errors = {0.5: (1.0,) + (0.0,) * 9, 0.75: (1.0,) * 10}  # all that 0.5 loses, it loses in the first tenth
    priced = Widths({1.0: 1.0, 0.75: 0.8, 0.5: 0.5}, errors, {1.0: 0.1, 0.5: 0.1}, {})
    policy = by_battery(1.0, steps=20, width=0.75)
    bounds = Limits(widths=(0.5, 0.75, 1.0))
    first, second = play(policy, bounds, COOL, HOT, Work(CALL, 0.0, priced.share, priced), pictures=2)[0]
    share, width = first.ran.switch
    assert (first.ran.width, width) == (1.0, 0.5)
    rows = round(20 * share)
    expected = CALL * (2 * rows + 2 * (20 - rows) * 0.5 + 0.1)
    assert first.seconds == pytest.approx(expected / COOL.macs_per_s)
    assert second.seconds == pytest.approx((expected + 0.1 * CALL) / COOL.macs_per_s)  # the wide one is loaded again
    assert first.ran.plain
