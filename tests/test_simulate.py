"""The simulation: its physics against closed forms, its traces, and what the policies must show in it."""

import json
import math
from dataclasses import replace

import bundles
import pytest

from edgesd import simulate, thermal
from edgesd.errors import DataError, RequestError
from edgesd.manifest import parse
from edgesd.runtime.policy import Limits
from edgesd.simulate import Work, fixed, play
from edgesd.thermal import CLASSES, World, load_trace

HOT = load_trace("hot")
DEVICE = CLASSES["recent-npu"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A bundle of one width with the embedded model's name and proportions."""
    folder = tmp_path_factory.mktemp("bundle")
    bundles.fill(folder)
    document = bundles.document(folder)
    document["model"]["name"] = "shapes"
    document["samplers"][0]["steps"] = list(range(1, 51))
    document["components"][0]["variants"][0]["macs"] = 544964608
    document["components"][1]["variants"][0]["macs"] = 962887680
    return parse(json.dumps(document).encode())


def outcomes(manifest, trace, device, **options):
    return {o.name: o for o in simulate.simulate(manifest, load_trace(trace), CLASSES[device], **options)}


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
    assert [(d.steps, d.width) for d in drawn] == [(20, 0.5)] * 2


def test_no_picture_is_counted_that_the_battery_or_the_time_did_not_finish():
    empty = HOT.model_copy(update={"start": HOT.start.model_copy(update={"battery": 0.0001})})
    drawn, world = play(fixed("x", 20, 1.0), Limits(), DEVICE, empty, Work(401.6e9, 0.0), pictures=50)
    assert (len(drawn), world.battery) == (0, 0.0)
    drawn, _ = play(fixed("x", 20, 1.0), Limits(), DEVICE, HOT, Work(401.6e9, 0.0), pictures=50, seconds=20.0)
    assert len(drawn) == 2


@pytest.mark.parametrize("device", CLASSES)
@pytest.mark.parametrize("widths", [(), (0.5, 0.75)], ids=["one width", "three widths"])
def test_on_the_hot_trace_balanced_draws_more_at_nearly_the_same_alignment(manifest, device, widths):
    found = outcomes(manifest, "hot", device, pictures=20, policies=("balanced",), widths=widths)
    base, balanced = found["fixed 20"], found["balanced"]
    assert base.pictures == 20
    assert balanced.pictures >= 1.3 * base.pictures
    assert balanced.alignment >= 0.97 * base.alignment
    assert balanced.worst_s <= base.worst_s


@pytest.mark.parametrize("device", ["recent-npu", "older-npu"])
def test_with_widths_the_seed_policy_keeps_its_first_promise_in_the_heat(manifest, device):
    seed = outcomes(manifest, "hot", device, policies=("seed",), widths=(0.5, 0.75))["seed"]
    assert seed.rise_k <= 6
    assert seed.life >= 1.4


def test_what_is_worse_is_said(manifest):
    quality = outcomes(manifest, "cool", "recent-npu", policies=("quality",))["quality"]
    assert {"pictures", "latency", "battery"} <= set(quality.loses)
    assert quality.life < 1


def test_alignment_is_only_told_where_it_was_measured(manifest):
    found = outcomes(manifest, "hot", "recent-npu", policies=("battery",), widths=(0.5,))
    assert found["fixed 20 w0.75"].alignment == pytest.approx(0.7344)
    assert found["battery"].measured < 1
    other = manifest.model_copy(update={"model": manifest.model.model_copy(update={"name": "another"})})
    assert all(o.alignment is None for o in outcomes(other, "hot", "recent-npu", policies=("balanced",)).values())


def test_every_figure_of_a_device_class_names_its_source():
    for device in CLASSES.values():
        figures = {name for name, value in vars(device).items() if isinstance(value, float)}
        assert set(device.sources) == figures
        assert all("assumed" in text or "README" in text or "issue" in text for text in device.sources.values())


def test_the_verb_prints_and_plots(manifest, tmp_path):
    folder = bundles.make(tmp_path / "small.edgesd")
    sheet = simulate.run(folder, "hot", pictures=2, policies=("balanced",), plot=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [d["class"]["name"] for d in sheet.to_json()["devices"]] == list(CLASSES)
    json.dumps(sheet.to_json(), allow_nan=False)
    assert len(sheet.sections) == len(CLASSES)


def test_traces_are_checked(manifest, tmp_path):
    for name in ("cool", "hot", "sun", "empty", "charging"):
        assert load_trace(name).name == name
    good = json.loads(HOT.model_dump_json())
    for change in ({"format": "x"}, {"events": []}, {"start": {"skin_c": 1e9, "battery": 0.5}}, {"macs_per_call": 0},
                   {"extra": 1}, {"events": [{"at_s": 5, "ambient_c": 1}, {"at_s": 1, "ambient_c": 1}]}):  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=r"bad\.json"):
            load_trace(str(tmp_path / "bad.json"))
    with pytest.raises(RequestError, match="hot"):
        load_trace("volcano")
    with pytest.raises(RequestError):
        simulate.simulate(manifest, HOT, DEVICE, pictures=0)
