"""The main job on real input: checkpoint in, measured bundle out, opened without torch, the reference's picture."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import inline
import numpy as np
import pytest

from edgesd import bundle, packager, sources
from edgesd.buildplan import count_params, make_plan
from edgesd.errors import DataError, GateError, RequestError
from edgesd.models.load import embedded_folder, open_checkpoint
from edgesd.recipe import make_recipe
from edgesd.runtime.generate import generate

PROMPT = "a red circle above a blue square on a white background"
FIELDS = {"precision": "fp32", "steps": (4, 8)}
COMPONENTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


@pytest.fixture(scope="session")
def reference():
    return sources.open_pipeline(None)


@pytest.fixture(scope="session", params=["openvino", "onnx-web", pytest.param("tflite", marks=pytest.mark.slow)])
def made(request, tmp_path_factory):
    """A whole bundle of the embedded model, and what `package` said of it."""
    folder = tmp_path_factory.mktemp("packaged")
    result = packager.package_all(FIELDS, [request.param], folder / "out")
    return result.made[0].path, result


def test_a_bundle_draws_the_reference_picture(made, reference):
    pipeline = sources.open_pipeline(str(made[0]))
    options = {"seed": 3, "num_inference_steps": 8}
    truth, picture = (generate(p, PROMPT, **options)[0] for p in (reference, pipeline))
    assert np.abs(truth.image.astype(int) - picture.image.astype(int)).mean() <= 1
    start = {"image": truth.image, "strength": 0.5}
    truth, picture = (generate(p, "a green ring", **options, **start)[0] for p in (reference, pipeline))
    assert np.abs(truth.image.astype(int) - picture.image.astype(int)).mean() <= 1


def test_a_bundle_draws_without_torch(made, tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "import edgesd\n"
        f"pipeline = edgesd.open_pipeline({str(made[0])!r})\n"
        f"print(edgesd.generate(pipeline, {PROMPT!r}, num_inference_steps=4)[0].image.shape)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "(128, 128, 3)", ran.stderr


MANY = """
import json, sys, edgesd, psutil
pipeline, held = edgesd.open_pipeline(sys.argv[1]), []
for number in range(int(sys.argv[2])):
    edgesd.generate(pipeline, f"a red circle above {number} blue squares", seed=number, num_inference_steps=4)
    held.append(psutil.Process().memory_info().rss)
print(json.dumps(held))
"""


@pytest.mark.parametrize("pictures", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_memory_is_flat_from_the_tenth_picture_on(made, pictures):
    ran = subprocess.run([sys.executable, "-c", MANY, str(made[0]), str(pictures)], capture_output=True, text=True)
    held = json.loads(ran.stdout)
    assert len(held) == pictures, ran.stderr
    drift = [value / held[9] - 1 for value in held[9:]]
    print(f"\n{held[9] / 1e6:.1f} MB after 10 pictures, {min(drift):+.2%} to {max(drift):+.2%} up to {pictures}")
    assert max(map(abs, drift)) <= 0.02


def test_the_manifest_says_what_was_made_and_how_it_was_checked(made):
    manifest = bundle.read(made[0], verify=True).manifest
    assert [c.name for c in manifest.components] == COMPONENTS
    assert all(
        v.status == "executed" and v.snr_db >= 90 and v.macs > 0 for c in manifest.components for v in c.variants
    )
    assert manifest.model.defaults.guidance == 4.0
    assert manifest.provenance.licence == "Apache-2.0"
    assert manifest.quality["passed"]
    assert str(embedded_folder().parent) not in (made[0] / "manifest.json").read_text()
    assert {s.name: (min(s.steps), max(s.steps)) for s in manifest.samplers} == {
        "dpmpp_2m_karras": (4, 8), "ddim": (4, 8), "euler_a": (4, 8)
    }  # fmt: skip


def test_steps_and_samplers_a_bundle_lacks_are_refused(made):
    pipeline = sources.open_pipeline(str(made[0]))
    with pytest.raises(RequestError, match="4 to 8"):
        generate(pipeline, PROMPT, num_inference_steps=20)
    with pytest.raises(RequestError, match="dpmpp_2m_karras"):
        generate(pipeline, PROMPT, sampler="heun", num_inference_steps=8)


def test_an_existing_bundle_is_kept_unless_forced(made):
    path, result = made
    before = (path / "manifest.json").read_bytes()
    target = result.made[0].manifest.target
    with pytest.raises(RequestError, match="--force"):
        packager.package_all(FIELDS, [target], path.parent)
    assert (path / "manifest.json").read_bytes() == before


def test_a_second_run_takes_its_stages_from_the_cache(made):
    path, result = made
    again = packager.package_all(FIELDS, [result.made[0].manifest.target], path.parent, force=True)
    first, second = (
        {e.path: e.sha256 for e in r.made[0].manifest.files if not e.path.startswith("golden")} for r in (result, again)
    )
    assert first == second
    assert again.made[0].seconds < result.made[0].seconds


def test_what_falls_short_is_not_shipped(made, tmp_path, monkeypatch):
    from edgesd import golden

    target = made[1].made[0].manifest.target
    inline.install(monkeypatch.setattr)
    impossible = {k: g.model_copy(update={"snr_db": 199.0}) for k, g in golden.GATES.items()}
    monkeypatch.setattr("edgesd.golden.GATES", impossible)
    monkeypatch.setattr("edgesd.parity.GATES", impossible)
    with pytest.raises(GateError, match="Nothing was shipped"):
        packager.package_all(FIELDS, [target], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_predicts_and_makes_nothing(tmp_path):
    result = packager.package_all({"profile": "quality"}, ["openvino"], tmp_path, dry_run=True)
    told = result.to_json()
    assert told["dry_run"]
    assert not told["bundles"]
    assert not list(tmp_path.iterdir())
    assert told["plans"][0]["predicted_peak_bytes"] > told["plans"][0]["predicted_bytes"] > 25_000_000


def test_predicted_sizes_and_memory_hold(made):
    path, result = made
    plan = result.plans[0]
    actual = sum(e.bytes for e in bundle.read(path).manifest.files)
    assert abs(plan.bytes - actual) < 0.15 * actual
    assert result.made[0].peak_bytes <= plan.peak_bytes


def test_parameters_are_counted_from_headers_alone():
    counts = count_params(open_checkpoint())
    assert 12_500_000 < counts["unet"] < 12_700_000
    assert 400_000 < counts["vae_decoder"] + counts["vae_encoder"] < 500_000


@pytest.mark.parametrize("size", [(128, 200), (20, 128)])
def test_a_size_off_the_grid_is_refused_with_a_near_one(size, tmp_path):
    with pytest.raises(RequestError, match="multiples of 32"):
        make_plan(make_recipe(target="openvino", size_px=size), open_checkpoint(), tmp_path)


def test_not_a_pipeline_and_foreign_denoisers_are_named(tmp_path):
    with pytest.raises(RequestError, match="model_index"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    with pytest.raises(RequestError, match="FluxTransformer2DModel"):
        open_checkpoint(str(tmp_path))


def test_missing_weights_are_named(tmp_path):
    shutil.copytree(embedded_folder(), tmp_path / "model")
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match="vae"):
        open_checkpoint(str(tmp_path / "model"))


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_leaves_no_half_bundle_and_no_child(tmp_path):
    words = [sys.executable, "-m", "edgesd", "package", "--target", "openvino", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env={**os.environ, "EDGESD_CACHE": str(tmp_path)}
    )
    while not list((tmp_path / "out").glob(".*new")) and process.poll() is None:
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("target", "precision", "phrase"),
    [("onnx-web", "fp32", "32-bit memory"), ("tflite", "fp32", "flatbuffer"), ("coreml", "fp16", "chunks")],
)
def test_what_a_target_cannot_hold_is_refused_before_any_work(target, precision, phrase, tmp_path, monkeypatch):
    params = {"text_encoder": 123_060_480, "unet": 859_520_964, "vae_decoder": 49_490_199, "vae_encoder": 34_163_664}
    monkeypatch.setattr("edgesd.buildplan.count_params", lambda checkpoint: params)  # the shapes of SD 1.5
    with pytest.raises(RequestError, match=phrase):
        make_plan(make_recipe(target=target, precision=precision), open_checkpoint(), tmp_path)
