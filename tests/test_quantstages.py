"""From a request in int8 to plans, weights and gates; the converters have their own tests."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from edgesd import golden, narrowing, packager, quantstages, targets
from edgesd.buildplan import make_plan
from edgesd.calibration.sets import open_set
from edgesd.compress.quantize import adjusted, quantized
from edgesd.compress.quantplan import OWN_INTEGERS
from edgesd.errors import GateError, RequestError
from edgesd.manifest import Variant
from edgesd.models.load import load, open_checkpoint
from edgesd.models.modules import build
from edgesd.parity import gate_db, snr_db
from edgesd.recipe import make_recipe
from edgesd.sources import torch_pipeline


class Direct:
    """Runs stages here and now, in folders of their own."""

    def __init__(self, folder):
        self.folder, self.ran = folder, []

    def stage(self, what, weight_bytes, key, work, *args):
        place = self.folder / key
        if not place.exists():
            self.ran.append(what)
            place.mkdir(parents=True)
            work(*args, place)
        return place


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.folder("sd1", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def able():
    """openvino as a target that takes int8, whatever its converter can do by now."""
    target = targets.load("openvino", lowering=True)
    whole = target.capabilities
    with pytest.MonkeyPatch.context() as patch:
        more = tuple(dict.fromkeys((*whole.precisions, "int8", "hybrid", "w8")))
        patch.setattr(target, "capabilities", type(whole)(**{**vars(whole), "precisions": more}))
        patch.setattr(quantstages, "CALLS", 8)
        yield


def plan_for(source, tmp_path, **fields):
    given = {"precision": "int8", "steps": (2, 2), "size_px": (64, 64), "gate_db": 5.0} | fields
    recipe = make_recipe(source=source, target="openvino", **given)
    return make_plan(recipe, open_checkpoint(source), tmp_path)


@pytest.fixture(scope="module")
def prepared(checkpoint, able, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    plan, workers = plan_for(checkpoint, folder), Direct(folder)
    return plan, workers, quantstages.prepare(plan, workers, packager.LIBRARIES)


def test_every_component_gets_a_plan_from_one_calibration(prepared):
    plan, workers, made = prepared
    assert [what.split(":")[0] for what in workers.ran] == [
        "calibration", "text_encoder int8", "unet int8", "vae_decoder int8", "vae_encoder int8"
    ]  # fmt: skip
    for (component, precision, _), (_, folder) in made.items():
        read, tensors = quantstages.read(folder)
        assert (read.component, read.precision, read.source_sha256) == (component, precision, plan.checkpoint.sha256)
        assert read.snr_db >= 5
        assert all(t.dtype == torch.float32 for t in tensors.values())
    assert quantstages.read(made["unet", "int8", 1.0][1])[0].latents_snr_db > 0


def test_a_second_request_takes_all_from_the_cache_and_a_gate_redoes_only_plans(prepared, checkpoint):
    plan, workers, made = prepared
    before = list(workers.ran)
    assert quantstages.prepare(plan, workers, packager.LIBRARIES) == made
    assert workers.ran == before
    other = plan_for(checkpoint, workers.folder, gate_db=6.0)
    again = quantstages.prepare(other, workers, packager.LIBRARIES)
    assert "calibration" not in workers.ran[len(before) :]
    assert {key for key, _ in again.values()}.isdisjoint(key for key, _ in made.values())


def test_floats_need_no_plan(checkpoint, able, tmp_path):
    workers = Direct(tmp_path)
    assert quantstages.prepare(plan_for(checkpoint, tmp_path, precision="fp32"), workers, ()) == {}
    assert workers.ran == []


def test_a_calibration_of_another_model_is_refused(prepared, able, tmp_path):
    _, workers, _ = prepared
    recorded = next(p for p in workers.folder.iterdir() if p.name.startswith("calibration"))
    other = tiny.folder("lcm", tmp_path / "other")
    with pytest.raises(RequestError, match="a calibration set of tiny"):
        quantstages.prepare(plan_for(other, tmp_path, calibration=str(recorded)), Direct(tmp_path), ())
    assert open_set(recorded).info.runs >= 1


def test_a_gate_out_of_reach_stops_the_build(prepared, checkpoint):
    _, workers, _ = prepared
    with pytest.raises(GateError, match="119 dB at every noise level"):
        quantstages.prepare(plan_for(checkpoint, workers.folder, gate_db=119.0), workers, packager.LIBRARIES)


def test_few_step_models_have_a_gate_of_their_own():
    normal, few = (tiny.spec(family) for family in ("sd1", "lcm"))
    assert quantstages.gate_db(None, "unet", few) > quantstages.gate_db(None, "unet", normal) == 32
    assert quantstages.gate_db(None, "vae_decoder", few) == quantstages.gate_db(None, "vae_decoder", normal)
    assert quantstages.gate_db(21.0, "unet", few) == 21


def test_what_an_artefact_owes_is_its_own_simulation_less_the_margin(prepared, checkpoint, tmp_path):
    plan, _, made = prepared
    model = load(checkpoint)
    spec = plan.checkpoint.spec
    truth = torch_pipeline(load(checkpoint))
    truth = type(truth)(**{**vars(truth), "spec": spec})
    stored = golden.record(truth, golden.settings_for(spec, {spec.defaults.sampler: (2,)}))
    stored.save(tmp_path)
    read, tensors = quantstages.read(made["unet", "int8", 1.0][1])
    axes = next(p.axes for p in plan.artefacts if p.component == "unet")
    component = adjusted(build("unet", model.modules, spec, axes), tensors)
    owed = quantstages.owed_db(component, read, (), tmp_path, axes)
    figures = []
    for call in stored.calls("unet"):
        got = quantstages.run_component(quantized(component, read, "simulated"), call.inputs)
        figures.append(snr_db(call.outputs["model_output"], got["model_output"]))
    assert owed == pytest.approx(min(figures) - 20 * np.log10(1.25), abs=0.01)
    with_outputs = quantstages.owed_db(component, read, ("conv", "linear"), tmp_path, axes)
    assert with_outputs < owed
    assert quantstages.owed_db(component, read, (), tmp_path, axes.model_copy(update={"size_px": (8, 8)})) is None


def test_a_narrow_width_has_a_plan_of_its_own_and_owes_what_its_own_truth_says(able, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(narrowing, "CALLS", 24)
    plan = plan_for(checkpoint, tmp_path, widths=(1.0, 0.5), width_mode="separate")
    (narrowest,) = (p for p in plan.artefacts if p.axes.width < 1)
    plan, workers = replace(plan, artefacts=(narrowest,)), Direct(tmp_path)
    narrow = narrowing.made(plan, workers)
    ((found, (_, folder)),) = quantstages.prepare(plan, workers, packager.LIBRARIES, narrow).items()
    assert found == ("unet", "int8", 0.5)
    read, tensors = quantstages.read(folder)
    model, spec = load(checkpoint), plan.checkpoint.spec
    modules = narrowing.with_width(model.modules, narrow, 0.5)
    component = adjusted(build("unet", modules, spec, narrowest.axes), tensors)  # its shapes are the narrow ones
    truth = replace(torch_pipeline(model, **narrowing.narrower(plan, model, narrow)), spec=spec)
    stored = golden.record(truth, golden.settings_for(spec, {spec.defaults.sampler: (2,)}))
    stored.save(tmp_path)
    owed = quantstages.owed_db(component, read, (), tmp_path, narrowest.axes)
    wide = quantstages.owed_db(component, read, (), tmp_path, narrowest.axes.model_copy(update={"width": 1.0}))
    assert owed > wide + 3  # width 1's answers are no truth for it


def test_a_shared_narrow_width_is_planned_after_the_widest_and_takes_its_integers(
    able, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(narrowing, "CALLS", 24)

    def prepare(**fields):
        plan = plan_for(checkpoint, tmp_path, widths=(1.0, 0.5), **fields)
        plan = replace(plan, artefacts=tuple(p for p in plan.artefacts if p.component == "unet"))
        return quantstages.prepare(plan, workers, packager.LIBRARIES, narrowing.made(plan, workers))

    workers = Direct(tmp_path)
    made = prepare()
    (wide, theirs), (narrow, mine) = (quantstages.read(made["unet", "int8", width][1]) for width in (1.0, 0.5))
    assert {x.name for x in wide.layers if x.mode == "float"} <= {x.name for x in narrow.layers if x.mode == "float"}
    layer = next(x.name for x in narrow.layers if x.mode != "float" and x.name.endswith("attn1.to_q"))
    integers = mine[f"{layer}.{OWN_INTEGERS}"]
    assert torch.equal(integers, theirs[f"{layer}.{OWN_INTEGERS}"][: len(integers)])
    assert len(integers) < len(theirs[f"{layer}.{OWN_INTEGERS}"])
    assert quantstages.corrections(made).keys() == {("int8", 0.5)}
    other = prepare(gate_db=6.0)  # another plan of the widest, and so another of what follows it
    assert {key for key, _ in other.values()}.isdisjoint(key for key, _ in made.values())


def test_a_variant_is_held_to_its_own_gate():
    tensor = {"name": "x", "dtype": "float32", "shape": [1]}
    one = json.dumps({"axes": {"size_px": [8, 8], "precision": "int8"}, "files": ["a"], "inputs": [tensor],
                      "outputs": [tensor], "gate_db": 27.5})  # fmt: skip
    assert gate_db(Variant.model_validate_json(one)) == 27.5
    plain = Variant.model_validate_json(one.replace("27.5", "null"))
    assert gate_db(plain) == golden.GATES["int8"].snr_db
