"""Sensors: files of a kernel as they really look, broken ones, merging, sampling."""

import json

import psutil
import pytest

from edgesd.errors import DataError, RequestError
from edgesd.runtime import device
from edgesd.runtime.device import DeviceState, Sensors, constant, merge


def put(root, **texts):
    """Files by path with __ for /."""
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def zone(root, number, heat, **trips):
    texts = {"temp": heat}
    for i, (kind, limit) in enumerate(trips.items()):
        texts |= {f"trip_point_{i}_type": kind, f"trip_point_{i}_temp": limit}
    put(root, **{f"class__thermal__thermal_zone{number}__{name}": text for name, text in texts.items()})


@pytest.mark.parametrize(
    ("heat", "trips", "thermal", "headroom"),
    [
        (45000, {"passive": 95000, "critical": 105000}, "nominal", 0.0),
        (86000, {"passive": 95000, "critical": 105000}, "fair", 0.7),
        (95000, {"passive": 95000, "critical": 105000}, "serious", 1.0),
        (101000, {"passive": 95000, "critical": 105000}, "critical", 1.2),
        (70000, {"critical": 105000}, "nominal", None),
        (101000, {"hot": 104000, "critical": 115000}, "critical", None),
        (70000, {}, "unknown", None),
        (-274000, {"passive": 95000}, "unknown", None),
        (70000, {"passive": 0}, "unknown", None),
        ("broken", {"passive": 95000}, "unknown", None),
        (70000, {"active": 60000}, "unknown", None),
    ],
)
def test_thermal_zones_are_held_against_their_trips(tmp_path, heat, trips, thermal, headroom):
    zone(tmp_path, 0, heat, **trips)
    state = device.from_sysfs(tmp_path)
    assert state.thermal == thermal
    assert state.headroom == (None if headroom is None else pytest.approx(headroom))


def test_the_hottest_zone_counts(tmp_path):
    zone(tmp_path, 0, 40000, passive=95000)
    zone(tmp_path, 1, 96000, passive=95000)
    zone(tmp_path, 2, 50000)
    assert device.from_sysfs(tmp_path).thermal == "serious"


def test_power_supplies_without_the_mouse(tmp_path):
    supplies = {"BAT0": ("Battery", None, 43, "Discharging"), "mouse": ("Battery", "Device", 3, "Discharging"),
                "AC": ("Mains", None, None, None)}  # fmt: skip
    for name, (kind, scope, capacity, status) in supplies.items():
        texts = {"type": kind, "scope": scope, "capacity": capacity, "status": status}
        put(tmp_path, **{f"class__power_supply__{name}__{k}": v for k, v in texts.items() if v is not None})
    put(tmp_path, firmware__acpi__platform_profile="low-power")
    state = device.from_sysfs(tmp_path)
    assert (state.battery, state.charging, state.saver) == (0.43, False, True)
    put(tmp_path, class__power_supply__BAT0__status="Full", firmware__acpi__platform_profile="balanced")
    state = device.from_sysfs(tmp_path)
    assert (state.charging, state.saver) == (True, False)


def test_a_machine_without_any_of_it_says_nothing(tmp_path):
    assert device.from_sysfs(tmp_path) == DeviceState()


def test_psutil_is_asked_where_it_can_tell(monkeypatch):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert device.from_psutil().battery is None
    assert device.from_psutil().free_memory_bytes > 0
    battery = type("Battery", (), {"percent": 100.4, "power_plugged": None})()
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert (device.from_psutil().battery, device.from_psutil().charging) == (1.0, None)
    monkeypatch.delattr(psutil, "sensors_battery")
    assert device.from_psutil().battery is None


def test_the_environment_speaks_by_field_names():
    said = {
        "EDGESD_DEVICE_BATTERY": "0.12",
        "EDGESD_DEVICE_THERMAL": "serious",
        "EDGESD_DEVICE_CHARGING": "false",
        "X": "1",
    }
    assert device.from_environment(said) == DeviceState(battery=0.12, thermal="serious", charging=False)
    for wrong in ({"EDGESD_DEVICE_BATERY": "1"}, {"EDGESD_DEVICE_BATTERY": "full"}, {"EDGESD_DEVICE_BATTERY": "NaN"}):
        with pytest.raises(RequestError, match="EDGESD_DEVICE_"):
            device.from_environment(wrong)


def test_a_file_is_read_anew_each_time(tmp_path):
    path = tmp_path / "state.json"
    state = DeviceState(battery=0.5, seconds_per_call={1.0: 0.25, 0.5: 0.125}, headroom=0.3)
    path.write_text(json.dumps(state.to_json()))
    read = device.from_file(path)
    assert read() == state
    path.write_text('{"battery": 0.4}')
    assert read().battery == 0.4
    for wrong in ("", "[1]", "3", '{"battery": 2}', '{"battery": true}', '{"surprise": 1}', '{"thermal": "hot"}',
                  '{"seconds_per_call": {"wide": 1}}', '{"seconds_per_call": 3}', "[" * 70_000):  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(DataError):
            read()


@pytest.mark.parametrize(
    "wrong",
    [{"battery": -0.1}, {"battery": 1.1}, {"battery": float("nan")}, {"charging": 1}, {"headroom": -1.0},
     {"thermal": "melting"}, {"seconds_per_call": {1.0: 0.0}}, {"seconds_per_call": {2.0: 1.0}}, {"deadline_s": -1.0}],
)  # fmt: skip
def test_readings_that_cannot_be_are_refused(wrong):
    with pytest.raises(RequestError, match="device state"):
        DeviceState(**wrong)


def test_merging_takes_each_figure_from_the_first_that_knows_it():
    first = DeviceState(battery=0.0, thermal="unknown", charging=False, seconds_per_call={1.0: 1.0}, time_s=1.0)
    second = DeviceState(battery=0.9, thermal="fair", saver=True, seconds_per_call={1.0: 2.0, 0.5: 3.0}, time_s=2.0)
    assert merge(first, second) == DeviceState(
        battery=0.0, charging=False, saver=True, thermal="fair", seconds_per_call={1.0: 1.0, 0.5: 3.0}, time_s=2.0
    )
    assert merge() == DeviceState()


def test_sensors_are_not_asked_twice_within_a_second():
    now, asked = [10.0], []

    def provider():
        asked.append(now[0])
        return DeviceState(battery=0.5)

    sense = Sensors(provider, constant(DeviceState(battery=0.9, saver=False)), clock=lambda: now[0])
    times = [(now.__setitem__(0, t), sense().time_s)[1] for t in (10.0, 10.5, 10.99, 11.0, 11.5, 3.0)]
    assert times == [10.0, 10.0, 10.0, 11.0, 11.0, 3.0]
    assert asked == [10.0, 11.0, 3.0]
    assert sense() == DeviceState(battery=0.5, saver=False, time_s=3.0)


def test_the_real_sensors_answer():
    state = device.default_sensors()()
    assert state.free_memory_bytes > 0
    assert state.thermal in (*device.THERMAL, "unknown")
