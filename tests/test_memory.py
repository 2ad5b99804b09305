"""--max-ram: what a plan gives up for memory, in which order, and when it says no."""

from dataclasses import replace

import pytest
import tiny

from edgesd import memory, sources
from edgesd.buildplan import make_plan
from edgesd.errors import RequestError
from edgesd.golden import record, settings_for
from edgesd.models.load import load_parts, open_checkpoint
from edgesd.recipe import make_recipe

# A UNet of a quarter of SD 1.5's size beside a large VAE: the reference is what needs most.
PARAMS = {"text_encoder": 123_000_000, "unet": 215_000_000, "vae_decoder": 400_000_000, "vae_encoder": 400_000_000}
GIB = 1 << 30


@pytest.fixture
def plan(monkeypatch, tmp_path):
    def make(target, params=PARAMS, **fields):
        monkeypatch.setattr("edgesd.buildplan.count_params", lambda checkpoint: params)
        return make_plan(make_recipe(target=target, **{"profile": "quality", **fields}), open_checkpoint(), tmp_path)

    return make


def test_without_a_limit_or_with_room_nothing_changes(plan):
    free = plan("openvino")
    assert memory.fit(free) is free
    roomy = plan("openvino", max_ram_bytes=memory.needed(free))
    assert memory.fit(roomy) is roomy


def test_the_reference_is_made_part_by_part_before_anything_is_left_out(plan):
    whole = plan("openvino")
    fitted = memory.fit(plan("openvino", max_ram_bytes=memory.needed(whole) - 1))
    assert fitted.one_at_a_time
    assert fitted.artefacts == whole.artefacts
    assert fitted.downgrades == ()
    assert "one part" in fitted.notes[0]
    assert memory.needed(fitted) < memory.needed(whole)
    assert fitted.reference_peak_bytes < whole.reference_peak_bytes


def heavy_fp32(made):
    """The plan as if float32 took three times the memory to lower."""
    peaks = [p.peak_bytes * (3 if p.axes.precision == "fp32" else 1) for p in made.artefacts]
    return replace(made, artefacts=tuple(replace(p, peak_bytes=n) for p, n in zip(made.artefacts, peaks, strict=True)))


def test_a_flavour_of_the_targets_own_choice_is_left_out_and_it_is_said(plan):
    whole = heavy_fp32(plan("onnx-web"))
    assert {p.axes.precision for p in whole.artefacts} == {"fp32", "fp16"}
    limit = memory.OWN_BYTES + max(p.peak_bytes for p in whole.artefacts if p.axes.precision == "fp16")
    limit = max(limit, memory.needed(plan("onnx-web", precision="fp16")))
    fitted = memory.fit(heavy_fp32(plan("onnx-web", max_ram_bytes=limit)))
    assert {p.axes.precision for p in fitted.artefacts} == {"fp16"}
    assert {p.component for p in fitted.artefacts} == {p.component for p in whole.artefacts}
    assert [d.what for d in fitted.downgrades] == ["no fp32 wasm"]
    assert any("left out: fp32 wasm" in line for line in fitted.notes)
    assert memory.needed(fitted) <= limit


def test_what_was_asked_for_by_name_is_refused_instead(plan):
    limit = memory.needed(plan("onnx-web", precision="fp16"))
    with pytest.raises(RequestError, match=r"vae_decoder fp32 takes about .*\(predicted\)"):
        memory.fit(heavy_fp32(plan("onnx-web", precision="fp32", max_ram_bytes=limit)))


def test_planning_int8_counts_and_may_be_what_is_left_out(plan):
    whole = plan("onnx-web", profile="balanced")
    assert memory.needed(whole) == memory.OWN_BYTES + whole.planning_peak_bytes
    assert memory.needed(plan("onnx-web")) < memory.needed(whole)
    fitted = memory.fit(plan("onnx-web", profile="balanced", max_ram_bytes=memory.needed(whole) - GIB // 4))
    assert [d.what for d in fitted.downgrades] == ["no int8 wasm"]
    with pytest.raises(RequestError, match=r"planning the UNet's int8 takes about .*--profile quality"):
        memory.fit(plan("openvino", profile="balanced", max_ram_bytes=memory.needed(whole) - GIB // 4))


@pytest.mark.parametrize("target", ["openvino", "onnx-web", "tflite", "coreml"])
def test_a_refusal_names_the_smallest_limit_that_works(target, plan):
    with pytest.raises(RequestError, match=r"--max-ram of 0\.2 GiB") as refused:
        memory.fit(plan(target, max_ram_bytes=GIB // 5))
    named = float(refused.value.do.split("Allow ")[1].split(" GiB")[0])
    memory.fit(plan(target, max_ram_bytes=int(named * GIB)))
    with pytest.raises(RequestError):
        memory.fit(plan(target, max_ram_bytes=int((named - 0.1) * GIB)))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_reference_part_by_part_says_the_same(family, tmp_path):
    checkpoint = open_checkpoint(tiny.folder(family, tmp_path / "model"))
    whole, parts = (sources.torch_pipeline(made) for made in (load_parts(checkpoint), checkpoint))
    settings = settings_for(checkpoint.spec, {"euler": (2, 2)})
    first, second = (record(pipeline, settings) for pipeline in (whole, parts))
    assert first.facts == second.facts
    assert first.tensors.keys() == second.tensors.keys()
    assert all((first.tensors[name] == second.tensors[name]).all() for name in first.tensors)


def test_it_holds_one_part_at_a_time(tmp_path, monkeypatch):
    import weakref

    from edgesd.models import load

    checkpoint, held = open_checkpoint(tiny.folder("sd1", tmp_path / "model")), []
    real = load.load_parts

    def counted(opened, only):
        assert [part() for part in held if part() is not None] == []
        made = real(opened, only)
        held.extend(weakref.ref(module) for module in made.modules.values())
        return made

    monkeypatch.setattr(load, "load_parts", counted)
    pipeline = sources.torch_pipeline(checkpoint)
    record(pipeline, settings_for(checkpoint.spec, {"euler": (2, 2)}))
    assert len(held) >= 3


def test_pruning_counts_and_a_limit_below_it_is_refused_with_what_takes_so_much(plan):
    whole, pruned = plan("openvino", precision="fp16"), plan("openvino", precision="fp16", prune=0.25)
    assert memory.needed(pruned) > memory.needed(whole)
    assert memory.needed(pruned) == memory.OWN_BYTES + pruned.pruning_peak_bytes
    limit = memory.needed(pruned) - 1
    with pytest.raises(RequestError, match=r"pruning the UNet takes about .* GiB.*Allow"):
        memory.fit(plan("openvino", precision="fp16", prune=0.25, max_ram_bytes=limit))
    roomy = plan("openvino", precision="fp16", prune=0.25, max_ram_bytes=limit + 1)
    assert memory.fit(roomy) is roomy
