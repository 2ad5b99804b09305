"""Predictions of fit: worked out by hand on plans of known size."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from edgesd import buildplan, devices
from edgesd.errors import RequestError
from edgesd.models.load import open_checkpoint
from edgesd.recipe import make_recipe


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tiny.folder("sd1", tmp_path_factory.mktemp("sd1"))
    recipe = make_recipe(source=folder, target="onnx-web", precision="fp32")
    return buildplan.make_plan(recipe, open_checkpoint(folder), Path("nowhere"))


def sized(plan, **gib):
    """The plan with components of these sizes."""
    kept = tuple(replace(p, bytes=int(gib[p.component] * devices.GIB)) for p in plan.artefacts if p.component in gib)
    return replace(plan, artefacts=kept)


def test_what_fits_at_once_one_by_one_and_not_at_all(plan):
    device = devices.DEVICES["browser-wasm"]  # 4 GiB, two copies of the weights
    fits = [
        devices.predict(device, sized(plan, text_encoder=0.2, unet=size, vae_decoder=0.2)) for size in (1.0, 1.7, 2.1)
    ]
    assert [fit.how for fit in fits] == ["all at once", "one component at a time", "no"]
    assert fits[1].needed_bytes == pytest.approx(3.4 * devices.GIB + devices.BASE_BYTES, rel=0.01)
    assert "unet alone" in fits[2].why
    assert all("predicted" in fit.describe() and fit.to_json()["predicted"] for fit in fits)


def test_a_bundle_of_another_target_does_not_run_there(plan):
    fit = devices.predict(devices.DEVICES["iphone-6gb"], plan)
    assert fit.how == "no"
    assert "coreml" in fit.why


def test_a_tensor_beyond_the_promised_buffer_is_told(plan):
    large = tuple(replace(p, axes=p.axes.model_copy(update={"size_px": (2048, 2048)})) for p in plan.artefacts)
    fit = devices.predict(devices.DEVICES["browser-webgpu"], replace(plan, artefacts=large))
    assert fit.how == "no"
    assert "--size-px" in fit.why
    assert devices.predict(devices.DEVICES["browser-webgpu"], plan).how == "all at once"


def test_unknown_classes_are_refused_before_any_work(plan):
    with pytest.raises(RequestError, match="iphone-4gb"):
        devices.find(["toaster"])
    recipe = plan.recipe.model_copy(update={"device_classes": ("toaster",)})
    with pytest.raises(RequestError, match="toaster"):
        buildplan.make_plan(recipe, plan.checkpoint, Path("nowhere"))


def test_the_documented_table_has_every_class():
    text = (Path(__file__).parent.parent / "docs" / "devices.md").read_text()
    for name in devices.DEVICES:
        assert name in text or f"-{name.split('-')[1]}" in text
    for device in devices.DEVICES.values():
        assert 0 < device.app_bytes <= device.ram_bytes


def test_attention_scores_are_the_largest_tensor_of_a_unet(plan):
    """The tiny UNet has 2 heads and attends at the latents' own size, 8 x 8 cells for 64 px."""
    unet = next(p for p in plan.artefacts if p.component == "unet")
    assert unet.axes.size_px == (64, 64)
    assert devices._tensors(plan, unet) == (4 * 2 * 64**2 + devices.TENSORS * 4 * 16 * 64, 4 * 2 * 64**2)
