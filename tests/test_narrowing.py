"""`package --widths` from request to bundle: refused, made, stored once, measured against narrow torch, drawn."""

import json

import inline
import numpy as np
import pytest
import tiny

from edgesd import bundle, narrowing, packager, quantstages, sources, targets
from edgesd.compress.quantplan import QuantPlan
from edgesd.errors import DataError, RequestError
from edgesd.recipe import make_recipe, parse_widths
from edgesd.runtime.generate import generate
from edgesd.runtime.policy import Limits
from edgesd.runtime.widths import BINS, Widths, read_widths

PROMPT = "a red circle above a blue square on a white background"


@pytest.fixture(scope="module", params=[("onnx-web", None), ("openvino", "separate")])
def made(request, tmp_path_factory):
    """(mode, bundle folder) of a tiny checkpoint in widths 1 and 0.5."""
    folder = tmp_path_factory.mktemp("widths")
    target, mode = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESD_CACHE", str(folder / "cache"))
        inline.install(patch.setattr)
        patch.setattr(narrowing, "CALLS", 24)
        fields = {
            "source": tiny.folder("sd1", folder / "tiny"), "precision": "fp32", "samplers": ("euler",), "steps": (4, 4),
            "widths": (0.5, 1.0), "width_mode": mode,
        }  # fmt: skip
        result = packager.package_all(fields, [target], folder / "out")
    return "shared" if mode is None else mode, result.made[0].path, result


def test_every_width_is_measured_against_its_own_truth(made):
    _, folder, result = made
    manifest = bundle.read(folder).manifest
    unet = manifest.component("unet").variants
    assert [v.axes.width for v in unet] == [1.0, 0.5]
    assert all(v.status == "executed" and v.snr_db > 90 for v in unet)
    assert unet[1].macs < unet[0].macs
    assert unet[1].params < unet[0].params
    told = json.dumps([s.note for s in result._made_sections()])
    assert "width 0.5 takes" in told


def test_shared_weights_are_stored_once(made):
    mode, folder, _ = made
    manifest = bundle.read(folder).manifest
    wide, narrow = (set(v.files) for v in manifest.component("unet").variants)
    assert manifest.quality["widths"]["mode"] == mode
    assert bool(wide & narrow) == (mode == "shared")


def test_the_manifest_says_what_a_width_saves_and_loses(made):
    found = read_widths(bundle.read(made[1]).manifest)
    assert 0 < found.share(0.5) < found.share(1.0) == 1
    assert len(found.errors[0.5]) == BINS
    assert min(found.errors[0.5]) >= 0 < max(found.errors[0.5])
    assert set(found.load_calls) == {1.0, 0.5}


def test_a_width_is_drawn_as_asked_and_another_is_refused(made):
    pipeline = sources.open_bundle(made[1])
    assert pipeline.session.widths("unet") == (1.0, 0.5)
    same = {"num_inference_steps": 4, "sampler": "euler", "seed": 1}
    wide, narrow, again = (generate(pipeline, PROMPT, width=w, **same)[0] for w in (1.0, 0.5, 1.0))
    assert np.array_equal(wide.image, again.image)
    assert not np.array_equal(wide.latents, narrow.latents)
    with pytest.raises(RequestError, match=r"width 0\.75 of unet"):
        generate(pipeline, PROMPT, width=0.75, **same)


@pytest.mark.parametrize(
    ("target", "fields", "phrase"),
    [
        ("openvino", {"widths": (0.5,)}, "widths 0.5"),
        ("openvino", {"widths": (1.0, 0.01)}, "widths 1,0.01"),
        ("openvino", {"width_mode": "shared"}, "--width-mode without"),
        ("tflite", {"widths": (1.0, 0.5), "width_mode": "shared"}, "shared widths for tflite"),
        ("coreml", {"widths": (1.0, 0.5), "chunks": 2}, "--chunks"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(target, fields, phrase):
    recipe = make_recipe(target=target, **fields)
    with pytest.raises(RequestError, match=phrase):
        narrowing.check(recipe, targets.load(target))


@pytest.mark.parametrize("target", ["onnx-web", "openvino"])
def test_int8_widths_are_shared_like_others(target):
    asked = {"target": target, "widths": (1.0, 0.5), "precision": "int8"}
    assert narrowing.mode(make_recipe(**asked), targets.load(target)) == "shared"
    narrowing.check(make_recipe(**asked), targets.load(target))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "separate"])
@pytest.mark.parametrize("target", ["onnx-web", "openvino"])
def test_int8_widths_have_plans_of_their_own_and_are_held_to_them(target, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "cache"))
    inline.install(monkeypatch.setattr)
    monkeypatch.setattr(narrowing, "CALLS", 24)
    monkeypatch.setattr(quantstages, "CALLS", 8)
    monkeypatch.setattr(quantstages, "PARITY_DB", 6.0)  # of so small and random a model one rounding moves decibels
    fields = {
        "source": tiny.folder("sd1", tmp_path / "tiny"), "precision": "int8", "samplers": ("euler",), "steps": (4, 4),
        "widths": (0.5, 1.0), "gate_db": 5.0, "width_mode": mode,
    }  # fmt: skip
    folder = packager.package_all(fields, [target], tmp_path / "out").made[0].path
    manifest = bundle.read(folder).manifest
    wide, narrow = manifest.component("unet").variants
    assert (wide.axes.width, narrow.axes.width, narrow.axes.precision) == (1.0, 0.5, "int8")
    plans = [QuantPlan.parse((folder / v.plan).read_bytes()) for v in (wide, narrow)]
    assert plans[1].shares()["int8"] > 0.2
    assert sum(layer.macs for layer in plans[1].layers) < sum(layer.macs for layer in plans[0].layers)
    scales = [{layer.name: layer.input.scale for layer in plan.layers if layer.input} for plan in plans]
    assert scales[0] != scales[1]
    assert all(v.status == "executed" and v.snr_db >= v.gate_db for v in (wide, narrow))
    weights = [{f for f in v.files if f.endswith((".bin", ".data"))} for v in (wide, narrow)]
    assert bool(weights[0] & weights[1]) == (mode == "shared")
    stored = sum((folder / f).stat().st_size for f in weights[0] | weights[1])
    of_one = [plan.weight_bytes() for plan in plans]
    assert stored < of_one[0] + (0.75 if mode == "shared" else 1.1) * of_one[1] + (16 << 10)
    pipeline = sources.open_bundle(folder)
    same = {"num_inference_steps": 4, "sampler": "euler", "seed": 1}
    one, other = (generate(pipeline, PROMPT, width=w, **same)[0] for w in (1.0, 0.5))
    assert not np.array_equal(one.latents, other.latents)


def test_widths_parse():
    assert make_recipe(target="x", widths=parse_widths("0.5, 1")).widths == (1.0, 0.5)
    with pytest.raises(RequestError, match="widths 'wide'"):
        parse_widths("wide")


LIMITS = Limits(widths=(0.5, 0.75, 1.0))


def widths(late=1.0, load=1.0):
    """Narrow rows cost `late` in the second half of the run and 1 in the first."""
    half = BINS // 2
    errors = {w: (scale,) * half + (scale * late,) * half for w, scale in ((0.75, 1.0), (0.5, 2.0))}
    return Widths({1.0: 1.0, 0.75: 0.8, 0.5: 0.6}, errors, {1.0: load, 0.75: load, 0.5: load}, {1.0: 100, 0.5: 60})


def test_a_switch_puts_the_narrow_rows_where_they_cost_least():
    first, share, second = widths(late=0.01).switch(0.75, LIMITS, calls=40)
    assert first > second
    assert share * widths().share(first) + (1 - share) * widths().share(second) <= widths().share(0.75)


def test_no_switch_without_a_clear_win():
    assert widths(late=1.0).switch(0.75, LIMITS, calls=40) is None  # all rows lose alike
    assert widths(late=0.01, load=20).switch(0.75, LIMITS, calls=40) is None  # loading eats what it saves
    assert widths(late=0.01).switch(1.0, LIMITS, calls=40) is None
    assert widths(late=0.01).switch(0.75, LIMITS, calls=40, free_bytes=50) is None
    narrow = Limits(widths=(0.5, 0.75, 1.0), max_width=0.5)
    assert widths(late=0.01).switch(0.5, narrow, calls=40) is None


@pytest.mark.parametrize(
    "told", [{"sensitivity": {"0.5": [1]}}, {"sensitivity": {"x": [0] * BINS}}, {"load_calls": {"0.5": -1}},
             {"sensitivity": [1]}, {"sensitivity": {"0.5": ["a"] * BINS}}, {"load_calls": {"1": float("nan")}}]
)  # fmt: skip
def test_hostile_figures_are_refused(made, told):
    manifest = bundle.read(made[1]).manifest
    with pytest.raises(DataError, match="figures of widths"):
        read_widths(manifest.model_copy(update={"quality": {"widths": told}}))
