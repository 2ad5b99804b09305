import json
from itertools import cycle

import pytest
from rich.console import Console

from edgesd import sheet, sustained
from edgesd.errors import RequestError, SetupError
from edgesd.runtime.device import DeviceState


class Device:
    """A clock that drawing moves: each event takes what `takes` says; it warms a degree and loses 1 % a reading."""

    def __init__(self, takes):
        self.now, self.takes, self.reads = 100.0, takes, 0

    def clock(self):
        return self.now

    def drawing(self, steps=3):
        for i in cycle(range(steps + 1)):
            self.now += 5.0 if i == steps else next(self.takes)
            yield i == steps

    def sense(self):
        self.reads += 1
        self.now += 50.0  # slow sensors: no step's time
        return DeviceState(battery=1 - 0.01 * self.reads, charging=False, thermal="fair")

    def celsius(self):
        return 40.0 + self.reads

    def watch(self, seconds, **options):
        return sustained.watch(
            self.drawing(), seconds, clock=self.clock, sense=self.sense, celsius=self.celsius, **options
        )


def growing(start, by):
    while True:
        yield start
        start += by


def test_steps_are_timed_apart_from_decoding_and_from_the_sensors():
    found = Device(iter(cycle([1.0, 2.0, 3.0]))).watch(200, every_s=20)
    assert {s["seconds_per_step"] for s in found["samples"]} <= {1.0, 1.5, 2.0, 2.5, 3.0}
    assert (found["seconds_per_step"]["min"], found["seconds_per_step"]["max"]) == (1.0, 3.0)
    assert sum(s["steps"] for s in found["samples"]) == found["seconds_per_step"]["runs"]
    assert found["seconds"] >= 200
    assert found["battery_used"] == pytest.approx(0.01 * (len(found["samples"]) - 1))
    assert [s["celsius"] for s in found["samples"]] == [41.0 + i for i in range(len(found["samples"]))]


def test_a_device_that_slows_down_shows_it():
    found = Device(growing(1.0, 0.5)).watch(600, every_s=10)
    assert found["last_minute"] > found["first_minute"]
    assert found["slowdown"] == pytest.approx(found["last_minute"] / found["first_minute"], abs=1e-3)
    steady = Device(cycle([1.0])).watch(600, every_s=10)
    assert steady["slowdown"] == 1.0


def test_one_step_longer_than_the_run_is_still_a_run():
    found = Device(cycle([500.0])).watch(1)
    assert (found["seconds_per_step"]["runs"], found["slowdown"]) == (1, 1.0)


def test_energy_is_counted_from_the_first_reading():
    readings = iter([0.0, 30.0, 90.0, 200.0, 300.0, 400.0, 500.0])
    found = Device(cycle([1.0])).watch(100, every_s=60, joules=lambda: next(readings))
    steps = found["seconds_per_step"]["runs"]
    assert found["energy_j"] == found["samples"][-1]["energy_j"] > 0
    assert found["joules_per_step"] == pytest.approx(found["energy_j"] / steps, abs=1e-3)
    assert Device(cycle([1.0])).watch(100)["joules_per_step"] is None


def put(root, zone, name, **figures):
    folder = root / "class/powercap" / zone
    folder.mkdir(parents=True)
    for key, value in {"name": name, **figures}.items():
        (folder / key).write_text(f"{value}\n")
    return folder


def test_rapl_counts_packages_once_and_through_the_end_of_the_counter(tmp_path):
    one = put(tmp_path, "intel-rapl:0", "package-0", energy_uj=9_000_000, max_energy_range_uj=10_000_000)
    two = put(tmp_path, "intel-rapl:1", "package-1", energy_uj=0, max_energy_range_uj=10_000_000)
    put(tmp_path, "intel-rapl:0:0", "core", energy_uj=0, max_energy_range_uj=10_000_000)
    put(tmp_path, "intel-rapl:2", "psys", energy_uj=0, max_energy_range_uj=10_000_000)
    energy = sustained.Rapl(tmp_path)
    assert energy() == 0.0
    (one / "energy_uj").write_text("1000000")
    (two / "energy_uj").write_text("3000000")
    assert energy() == pytest.approx(2.0 + 3.0)
    (one / "energy_uj").unlink()
    (two / "energy_uj").write_text("3500000")
    assert energy() == pytest.approx(5.5)


def test_gauges_that_are_not_there_say_none(tmp_path):
    assert sustained.Rapl(tmp_path)() is None
    assert sustained.hottest_celsius(tmp_path) is None
    for number, text in enumerate(("45000", "61000", "-274000", "broken")):
        zone = tmp_path / f"class/thermal/thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(text)
    assert sustained.hottest_celsius(tmp_path) == 61.0


def test_a_bundle_draws_until_the_time_is_over(small_bundle, monkeypatch):
    monkeypatch.setattr(sustained, "default_sensors", lambda: lambda: DeviceState())
    found = sustained.sustained(small_bundle, 1e-6, threads=1)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["format"] == "edgesd-sustained-1"
    assert data["options"] == {"threads": 1}
    assert data["picture"] == {"size_px": [128, 128], "sampler": "dpmpp_2m_karras", "steps": 3, "guidance": 4.0}
    assert data["samples"][0]["battery"] is None
    console = Console(width=160, record=True, quiet=True)
    console.print(found.table())
    assert "a step" in str(sheet.render(found.sections)) or found.sections[0].rows


def test_the_table_stays_short():
    found = Device(cycle([1.0])).watch(3600, every_s=10)
    shown = sustained.section(found | {"bundle": "b.edgesd", "target": "fake", "minutes": 60})
    assert len(shown.rows) <= sustained.MAX_ROWS
    assert "times the first's" in shown.note


def test_what_cannot_be_measured_is_refused(small_bundle, fake_target, monkeypatch):
    with pytest.raises(RequestError, match="0 minutes"):
        sustained.sustained(small_bundle, 0)
    monkeypatch.setattr(fake_target, "speed_is_meaningful", lambda: False, raising=False)
    with pytest.raises(SetupError, match="says nothing about its speed"):
        sustained.sustained(small_bundle, 1)
