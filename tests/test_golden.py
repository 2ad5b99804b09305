import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgesd import bundle, golden, parity
from edgesd.errors import DataError
from edgesd.manifest import parse


@pytest.fixture(scope="module")
def recorded(fake_target):
    return fake_target.recorded()


@pytest.fixture
def copied(small_bundle, tmp_path):
    """A copy of the small bundle to spoil; `reseal` makes its manifest fit what is there."""
    return shutil.copytree(small_bundle, tmp_path / "copy.edgesd")


def reseal(folder):
    manifest = parse((folder / "manifest.json").read_bytes())
    bundle.seal(folder, manifest.model_copy(update={"files": bundle.entries(folder)}))


def test_every_component_has_calls_that_the_truth_repeats(recorded, fake_target):
    session = fake_target.truth().session
    assert recorded.components() == ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    for component in recorded.components():
        for call in recorded.calls(component):
            got = session.run(component, call.inputs)
            assert {name: value.shape for name, value in got.items()} == {n: v.shape for n, v in call.outputs.items()}
            assert all(parity.snr_db(call.outputs[name], value) > 110 for name, value in got.items())


def test_unet_calls_are_early_middle_and_late_with_and_without_the_prompt(recorded):
    calls = recorded.calls("unet")
    times = [float(call.inputs["timestep"][0]) for call in calls]
    assert len(calls) == 6
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3
    for uncond, cond in zip(calls[::2], calls[1::2], strict=True):
        assert np.array_equal(uncond.inputs["sample"], cond.inputs["sample"])
        assert not np.array_equal(uncond.inputs["encoder_hidden_states"], cond.inputs["encoder_hidden_states"])


def test_calls_of_two_rows_are_pairs_of_one_timestep(recorded):
    singles, pairs = recorded.calls("unet"), recorded.calls("unet", batch=2)
    assert len(pairs) == 3
    for index, pair in enumerate(pairs):
        assert pair.inputs["timestep"].shape == (1,)
        for row in (0, 1):
            single = singles[2 * index + row]
            assert np.array_equal(pair.inputs["sample"][row], single.inputs["sample"][0])
            assert np.array_equal(pair.outputs["model_output"][row], single.outputs["model_output"][0])


def test_calls_of_three_rows_repeat_what_is_there(recorded):
    (first, *_) = recorded.calls("unet", batch=3)
    assert np.array_equal(first.inputs["sample"][2], first.inputs["sample"][0])
    assert len(first.outputs["model_output"]) == 3


def test_the_recorded_run_is_the_picture_of_its_settings(recorded, fake_target):
    from edgesd.runtime.generate import generate
    from edgesd.runtime.image import psnr_db

    facts = recorded.facts
    assert (facts.sampler, facts.steps, facts.size_px) == ("dpmpp_2m_karras", 3, (128, 128))
    (picture,) = generate(
        fake_target.truth(), facts.prompt, seed=facts.seed, sampler=facts.sampler,
        num_inference_steps=facts.steps, guidance_scale=facts.guidance,
    )  # fmt: skip
    assert psnr_db(picture.image, recorded.tensors["picture"]) > 60
    assert parity.snr_db(picture.latents[0], recorded.tensors["latents"][-1]) > 90


def test_equal_contents_are_stored_once(recorded):
    kept = [(v.dtype.str, v.shape, v.tobytes()) for k, v in recorded.tensors.items() if "/" in k and k[:3] != "ids"]
    assert len(set(kept)) == len(kept)
    assert sum(value.nbytes for value in recorded.tensors.values()) < 1 << 20


def test_what_is_saved_reads_back(recorded, small_bundle):
    found = golden.read(bundle.read(small_bundle))
    assert found.facts == recorded.facts
    assert found.tensors.keys() == recorded.tensors.keys()
    assert all(np.array_equal(found.tensors[key], value) for key, value in recorded.tensors.items())


def test_large_pictures_are_thinned(fake_target, monkeypatch):
    monkeypatch.setattr(golden, "PICTURE_SIDE", 50)
    truth = fake_target.truth()
    small = golden.record(truth, golden.settings_for(truth.spec, {"dpmpp_2m_karras": (2,)}))
    assert small.facts.picture_stride == 3
    assert small.tensors["picture"].shape == (43, 43, 3)


def test_the_run_to_record_is_one_the_bundle_can_repeat(fake_target):
    spec = fake_target.truth().spec
    chosen = golden.settings_for(spec, {"ddim": range(20, 31)})
    assert (chosen.sampler, chosen.num_inference_steps) == ("ddim", 20)
    chosen = golden.settings_for(spec, {"ddim": (1,), spec.defaults.sampler: range(1, 51)})
    assert (chosen.sampler, chosen.num_inference_steps) == (spec.defaults.sampler, golden.STEPS)


@pytest.mark.parametrize("spoil", ["missing", "nan", "shape", "json", "unknown"])
def test_broken_golden_vectors_are_a_data_error(copied, spoil):
    facts, tensors = copied / golden.FACTS, load_file(copied / golden.TENSORS)
    if spoil == "missing":
        del tensors["noise"]
    elif spoil == "nan":
        tensors["latents"] = tensors["latents"] * np.float32("nan")
    elif spoil == "shape":
        tensors["picture"] = tensors["picture"][0]
    elif spoil == "json":
        facts.write_text(facts.read_text()[:-20])
    else:
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": "edgesd-golden-9"}))
    save_file(tensors, copied / golden.TENSORS)
    reseal(copied)
    with pytest.raises(DataError, match="golden vectors do not read"):
        golden.read(bundle.read(copied))


def test_a_bundle_without_golden_vectors_says_so(copied):
    manifest = parse((copied / "manifest.json").read_bytes())
    bundle.seal(copied, manifest.model_copy(update={"golden": None}))
    with pytest.raises(DataError, match="no golden vectors"):
        golden.read(bundle.read(copied))


def test_decibels_by_definition():
    truth = np.array([3.0, -4.0], np.float32)
    assert parity.snr_db(truth, truth + 0.5) == pytest.approx(10 * np.log10(25 / 0.5))
    assert parity.psnr_db(truth, truth + 0.5) == pytest.approx(10 * np.log10(49 / 0.25))


def test_decibels_stay_finite():
    truth = np.array([1.0, 2.0], np.float32)
    assert parity.snr_db(truth, truth) == parity.CAP_DB
    assert parity.snr_db(truth, truth * np.float32("nan")) == -parity.CAP_DB
    assert parity.snr_db(truth, truth[:1]) == -parity.CAP_DB
    assert parity.snr_db(np.zeros(2), truth) == -parity.CAP_DB
    assert parity.psnr_db(truth, truth * np.float32("inf")) == -parity.CAP_DB


def test_gates_are_those_that_are_promised():
    assert golden.GATES["fp32"].snr_db == 90
    assert golden.GATES["fp16"].snr_db == 45
    assert golden.GATES["fp16"].picture_psnr_db == 35
    assert golden.GATES["fp32"].picture_mean_abs == pytest.approx(1 / 255)
