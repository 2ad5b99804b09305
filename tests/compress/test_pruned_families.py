"""Every family through calibrate, prune and a picture: what SDXL, LCM and inpainting tell their UNets is recorded."""

import numpy as np
import pytest
import tiny

from edgesd.calibration.capture import calibrate
from edgesd.compress.prune import prune
from edgesd.models.load import load
from edgesd.runtime.generate import generate
from edgesd.sources import torch_pipeline

TOLD = {
    "sdxl": {"text_embeds", "time_ids"}, "sdxl_refiner": {"text_embeds", "time_ids"}, "lcm": {"timestep_cond"},
}  # fmt: skip


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_family_is_recorded_pruned_and_draws(family, tmp_path):
    model = load(tiny.folder(family, tmp_path / family))
    recorded = calibrate(model, tmp_path / "set", calls=20, steps=(4,))
    calls = recorded.calls("unet")
    rows = 1 if family == "lcm" else 2
    assert set(calls[0].inputs) == {"sample", "timestep", "encoder_hidden_states"} | TOLD.get(family, set())
    assert calls[0].inputs["sample"].shape[:2] == (rows, 9 if family == "inpaint" else 4)
    assert calls[0].target.shape[0] == 4

    done = prune(model, 0.1, calls, tmp_path / "out")
    assert 0.1 <= done.plan.off()["macs"] < 0.2
    again = load(str(tmp_path / "out"))
    assert again.spec.family == model.spec.family
    sampler = "lcm" if family == "lcm" else "euler"
    settings = {"num_inference_steps": 3, "sampler": sampler, "seed": 5}
    whole, smaller = (generate(torch_pipeline(m), "a red circle", **settings)[0].image for m in (model, again))
    assert smaller.std() > 2
    assert 0 < np.abs(whole.astype(int) - smaller.astype(int)).mean() < 40


@pytest.mark.parametrize(("family", "component"), [("sd1", "text_encoder"), ("sdxl", "text_encoder"),
                                                   ("sdxl", "text_encoder_2"), ("sd1", "vae_decoder"),
                                                   ("sd1", "vae_encoder")])  # fmt: skip
def test_other_components_shrink_too(family, component, tmp_path):
    model = load(tiny.folder(family, tmp_path / family))
    recorded = calibrate(model, tmp_path / "set", calls=40, steps=(2,))
    done = prune(model, 0.1, recorded.calls(component), tmp_path / "out", component=component)
    again = load(str(tmp_path / "out"))
    shrunk = sum(p.numel() for p in again.modules[component if "text" in component else "vae"].parameters())
    assert shrunk == done.plan.after.params < done.plan.before.params
    picture = generate(torch_pipeline(again), "a red circle", num_inference_steps=2, seed=1)[0].image
    assert picture.std() > 0
