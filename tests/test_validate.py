import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from edgesd import bundle, golden, parity, validate
from edgesd.errors import DataError, GateError, RequestError
from edgesd.manifest import parse


def shown(report):
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table())
    return console.export_text()


@pytest.fixture(scope="module")
def report(small_bundle):
    return validate.validate(small_bundle)


@pytest.fixture(scope="module")
def perturbed(fake_target, tmp_path_factory):
    """A bundle whose fp32 UNet has every weight off by up to 1 %."""
    unet = {"unet": [(fake_target.FP32, {"perturb": 0.01})]}
    return fake_target.make(tmp_path_factory.mktemp("perturbed") / "off.edgesd", unet)


def test_an_exact_bundle_passes(report, small_bundle):
    found = report.to_json()
    assert found["passed"]
    assert found["status"] == "executed"
    assert list(found["components"]) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for figures in found["components"].values():
        assert set(figures) == {"snr_db", "psnr_db"}
        assert figures["snr_db"] >= 90
    assert found["picture"]["mean_abs"] <= 1 / 255
    assert found["picture"]["psnr_db"] >= 35
    assert found["failures"] == []
    json.dumps(found, allow_nan=False)
    report.require()
    text = shown(report)
    assert "passed" in text
    assert "FAILED" not in text


def test_every_variant_is_measured(report):
    seen = {(m.component, m.axes.precision, m.axes.form, m.axes.batch) for m in report.variants}
    assert len(seen) == len(report.variants) == 9
    assert ("unet", "fp32", "", 2) in seen
    assert ("vae_encoder", "fp16", "other", 1) in seen
    by_precision = {m.axes.precision: m.snr_db for m in report.variants if m.component == "unet" and m.axes.batch == 1}
    assert 60 < by_precision["fp16"] < 90 < by_precision["fp32"]


def test_the_other_flavour_draws_a_picture_too(report):
    assert any(check.what == "picture fp16 other" and check.unit == "dB PSNR" for check in report.checks)


def test_selftest_checks_what_an_app_checks(small_bundle):
    report = validate.selftest(small_bundle)
    report.require()
    what = {check.what for check in report.checks}
    assert {"token ids of text_encoder", "start noise", "unet", "latents of every row"} <= what
    assert "token ids of text_encoder" in shown(report)


@pytest.mark.parametrize("verb", [validate.validate, validate.selftest])
def test_weights_off_by_one_percent_fail_the_gate(perturbed, verb):
    report = verb(perturbed)
    assert not report.passed
    assert 20 < report.components["unet"]["snr_db"] < 70
    assert report.components["vae_decoder"]["snr_db"] > 90
    with pytest.raises(GateError) as caught:
        report.require()
    figure = f"{report.components['unet']['snr_db']:.4g}"
    assert "unet" in caught.value.came
    assert figure in caught.value.came
    assert "90 dB SNR" in caught.value.allowed
    assert caught.value.exit_code == 3
    assert "FAILED" in shown(report)
    assert next(f["what"] for f in report.to_json()["failures"]).startswith("unet")


def test_a_corrupted_component_fails_in_fp16_as_well(fake_target, tmp_path):
    wrong = {"vae_decoder": [(fake_target.FP16, {"perturb": 0.2})]}
    report = validate.validate(fake_target.make(tmp_path / "off.edgesd", wrong))
    assert "vae_decoder fp16 other" in [check.what for check in report.failures]


def test_a_flipped_byte_is_found(small_bundle, tmp_path):
    copied = shutil.copytree(small_bundle, tmp_path / "copy.edgesd")
    bundle.read(copied)
    tables = copied / "tables.safetensors"
    data, stamp = bytearray(tables.read_bytes()), tables.stat()
    data[-1] ^= 1
    tables.write_bytes(data)
    os.utime(tables, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError, match="sha256"):
        validate.validate(copied)


def test_wrong_token_ids_and_noise_are_found(fake_target):
    stored = fake_target.recorded()
    tensors = dict(stored.tensors)
    tensors["ids/0/prompt"] = tensors["ids/0/prompt"] + 1
    tensors["noise"] = np.nextafter(np.nextafter(tensors["noise"], np.float32(9)), np.float32(9))
    spoiled = golden.Golden(stored.facts, tensors)
    (ids,) = parity.check_text(fake_target.truth(), spoiled)
    assert ids.figure == tensors["ids/0/prompt"].size
    assert not ids.passed
    assert not parity.check_noise(spoiled).passed
    assert parity.check_noise(stored).passed


def test_recorded_calls_that_do_not_fit_are_broken_data(fake_target):
    class Strict(fake_target.Session):
        def run(self, component, inputs):
            raise RequestError(f"{component} got a shape", "another", "Pass that")

    with pytest.raises(DataError, match="do not fit: unet got a shape"):
        parity.run_calls(Strict.__new__(Strict), fake_target.recorded(), "unet", 1)


def test_one_ulp_of_noise_is_allowed(fake_target):
    stored = fake_target.recorded()
    nudged = np.nextafter(stored.tensors["noise"], np.float32(9))
    check = parity.check_noise(golden.Golden(stored.facts, {**stored.tensors, "noise": nudged}))
    assert check.figure == pytest.approx(1, rel=0.51)
    assert check.passed


def test_a_reference_at_hand_is_asked_instead_of_the_bundle(small_bundle, fake_target):
    assert not validate.validate(small_bundle, truth=fake_target.truth(0.01)).passed


def interpreted(place):
    """The bundle with a manifest that calls every variant interpreted."""
    manifest = parse((place / "manifest.json").read_bytes())
    components = tuple(
        c.model_copy(update={"variants": tuple(v.model_copy(update={"status": "interpreted"}) for v in c.variants)})
        for c in manifest.components
    )
    bundle.seal(place, manifest.model_copy(update={"components": components}))
    return place


def test_executing_an_interpreted_bundle_upgrades_it(fake_target, tmp_path):
    place = interpreted(fake_target.make(tmp_path / "one.edgesd"))
    assert validate.validate(place).passed
    unet = bundle.read(place).manifest.component("unet").variants[0]
    assert (unet.status, unet.runtime) == ("executed", "fake 1.0")
    assert unet.snr_db >= 90
    assert unet.seconds > 0


def test_a_failing_bundle_is_not_upgraded(perturbed, tmp_path):
    place = interpreted(shutil.copytree(perturbed, tmp_path / "off.edgesd"))
    assert not validate.validate(place).passed
    assert bundle.read(place).manifest.component("unet").variants[0].status == "interpreted"


def test_interpreting_leaves_no_seconds_in_the_manifest(report, small_bundle):
    measured = tuple(replace(m, status="interpreted") for m in report.variants)
    told = replace(report, variants=measured, status="interpreted")
    noted = validate.note(bundle.read(small_bundle).manifest, told)
    for component in noted.components:
        assert {(v.status, v.seconds, v.runtime) for v in component.variants} == {("interpreted", None, "fake 1.0")}
    assert noted.quality["status"] == "interpreted"
    assert noted.quality["components"]["unet"]["snr_db"] >= 90


def test_a_form_for_another_runtime_stays_unverified(report, small_bundle, fake_target, monkeypatch):
    monkeypatch.setattr(fake_target, "form_status", {"other": "unverified"})
    stored, manifest = fake_target.recorded(), bundle.read(small_bundle).manifest
    found = parity.measure_variants(
        manifest, stored, lambda part: fake_target.open(small_bundle, part), lambda f: parity.run_status(fake_target, f)
    )
    noted = parity.with_measurements(manifest, found, "fake 1.0").component("vae_decoder").variants
    assert [v.status for v in noted] == ["executed", "unverified"]
    assert noted[1].snr_db > 45
    assert noted[1].seconds is None


def test_other_sizes_and_widths_are_named_not_measured(small_bundle, fake_target):
    manifest, stored = bundle.read(small_bundle).manifest, fake_target.recorded()
    assert stored.fits(fake_target.FP32)
    assert not stored.fits(fake_target.FP32.model_copy(update={"width": 0.5}))
    assert not stored.fits(fake_target.FP32.model_copy(update={"size_px": (64, 64)}))
    assert [axes.batch for name, axes, _ in parity.artefacts(manifest) if name == "unet"] == [1, 2, 1]


def test_chunks_of_one_artefact_are_opened_together(small_bundle):
    manifest = bundle.read(small_bundle).manifest
    unet = manifest.component("unet")
    halves = tuple(
        unet.variants[0].model_copy(update={"axes": unet.variants[0].axes.model_copy(update={"chunk": (i, 2)})})
        for i in (0, 1)
    )
    split = manifest.model_copy(update={"components": (unet.model_copy(update={"variants": halves}),)})
    ((name, axes, part),) = parity.artefacts(split)
    assert (name, axes.chunk) == ("unet", (0, 2))
    assert part.components[0].variants == halves


def test_nothing_here_imports_torch():
    code = "import sys, edgesd.validate, edgesd.inspection, edgesd.golden; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
