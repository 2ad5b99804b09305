"""The comparison of policies on simulated phones: what they must show in it, and what it says of them."""

import json

import bundles
import pytest

from edgesd import simulate
from edgesd.errors import DataError, RequestError
from edgesd.manifest import parse
from edgesd.playing import Ran
from edgesd.simulate import drawable, measured_alignment
from edgesd.thermal import CLASSES, load_trace

HOT = load_trace("hot")


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
    assert found["fixed 20 w0.75"].alignment == pytest.approx(0.9805)
    assert found["battery"].measured < 1
    other = manifest.model_copy(update={"model": manifest.model.model_copy(update={"name": "another"})})
    assert all(o.alignment is None for o in outcomes(other, "hot", "recent-npu", policies=("balanced",)).values())


def test_alignment_is_that_of_the_settings_that_draw_a_picture(manifest):
    known = measured_alignment()
    assert known[drawable(Ran(15, 0.75, None, 1.0, 0, True))] == pytest.approx(0.9844)
    switched = Ran(15, 1.0, (7 / 15, 0.75), 1.0, 1, True)
    assert drawable(switched) == (15, 1.0, 1.0, (0.5, 0.75))  # not the alignment of either width alone
    assert drawable(Ran(17, 1.0, None, 1.0, 1, False)) is None  # shortened under way: no table of 17 steps drew it


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
        simulate.simulate(manifest, HOT, CLASSES["recent-npu"], pictures=0)
