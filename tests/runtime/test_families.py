"""Every family from a diffusers folder, drawn like diffusers' own pipeline draws it: tiny models, the same noise."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from edgesd import sources
from edgesd.errors import DataError, RequestError
from edgesd.runtime.generate import generate
from edgesd.runtime.settings import Settings

PROMPT = "a red circle above a blue square on a white background"
SIDE = 64
STEPS = 4


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """family, vae -> (edgesd's pipeline, diffusers' own), each made once."""
    made = {}

    def get(family, vae="tiny"):
        if (family, vae) not in made:
            path = tiny.folder(family, tmp_path_factory.mktemp(family), vae)
            made[family, vae] = sources.open_pipeline(path), tiny.pipeline(family, vae)
        return made[family, vae]

    return get


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def assert_same_picture(ours, theirs):
    difference = np.abs(ours.astype(int) - np.asarray(theirs).astype(int))
    assert np.asarray(theirs).std() > 2  # a flat picture would be like any other
    assert difference.mean() <= 1.0
    assert (difference.max(axis=-1) <= 2).mean() >= 0.99


def draw(pipeline, prompt=PROMPT, **settings):
    return generate(pipeline, prompt, num_inference_steps=STEPS, seed=3, rng="torch", **settings)[0].image


def start_picture():
    picture = np.full((SIDE, SIDE, 3), 245, np.uint8)
    picture[20:45, 15:40] = (45, 80, 210)
    return picture


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(("guidance", "negative"), [(5.0, None), (3.0, "a yellow star"), (1.0, None)])
def test_text_to_image_equals_diffusers(opened, family, guidance, negative):
    ours, theirs = opened(family)
    expected = theirs(
        PROMPT, negative_prompt=negative, num_inference_steps=STEPS, guidance_scale=guidance, generator=seeded(),
        height=SIDE, width=SIDE,
    ).images[0]  # fmt: skip
    assert_same_picture(draw(ours, guidance_scale=guidance, negative_prompt=negative), expected)


def test_facts_are_the_familys(opened):
    sd2, sdxl, lcm, refiner = (opened(f)[0].spec for f in ("sd2", "sdxl", "lcm", "sdxl_refiner"))
    assert (sd2.family, sd2.prediction_type) == ("sd2", "v_prediction")
    assert (sdxl.family, sdxl.time_ids, sdxl.zero_empty_negative) == ("sdxl", True, True)
    assert [t.component for t in sdxl.tokenizers] == ["text_encoder", "text_encoder_2"]
    assert (lcm.guidance_embedding_dim, lcm.defaults.sampler) == (10, "lcm")
    assert (refiner.family, refiner.zero_empty_negative) == ("sdxl_refiner", False)


def test_sdxl_takes_sizes_and_crops(opened):
    ours, theirs = opened("sdxl")
    sizes = {"original_size": (512, 768), "crops_coords_top_left": (10, 20), "target_size": (256, 128)}
    expected = theirs(
        PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, generator=seeded(), height=SIDE, width=SIDE, **sizes
    ).images[0]
    assert_same_picture(draw(ours, guidance_scale=5.0, **sizes), expected)
    plain = draw(ours, guidance_scale=5.0)
    assert np.abs(plain.astype(int) - np.asarray(expected).astype(int)).max() > 2  # the sizes do something


@pytest.mark.parametrize("vae", ["tiny", "full"])
@pytest.mark.parametrize(("family", "kind"), [("sdxl", "XLImg2Img"), ("sd2", "Img2Img")])
def test_image_to_image_equals_diffusers(opened, family, kind, vae):
    import diffusers

    ours, text_to_image = opened(family, vae)
    options = {} if family == "sdxl" else {"requires_safety_checker": False}
    theirs = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**text_to_image.components, **options)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPT, image=Image.fromarray(start_picture()), strength=0.5, num_inference_steps=STEPS, guidance_scale=4.0,
        generator=seeded(),
    ).images[0]  # fmt: skip
    assert_same_picture(draw(ours, image=start_picture(), strength=0.5, guidance_scale=4.0), expected)


@pytest.mark.parametrize(("guidance", "steps"), [(8.5, 4), (1.0, 1)])
def test_lcm_equals_diffusers(opened, guidance, steps):
    ours, theirs = opened("lcm")
    expected = theirs(
        PROMPT, num_inference_steps=steps, guidance_scale=guidance, generator=seeded(), height=SIDE, width=SIDE
    ).images[0]
    drawn = generate(ours, PROMPT, num_inference_steps=steps, guidance_scale=guidance, seed=3, rng="torch")[0]
    assert_same_picture(drawn.image, expected)
    assert drawn.calls == steps  # its guidance is an input: no second half


@pytest.mark.parametrize("vae", ["tiny", "full"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_nine_channel_inpainting_equals_diffusers(opened, strength, vae):
    ours, theirs = opened("inpaint", vae)
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[16:48, 16:48] = 1
    expected = theirs(
        PROMPT, image=Image.fromarray(start_picture()), mask_image=Image.fromarray((mask * 255).astype(np.uint8)),
        strength=strength, num_inference_steps=STEPS, guidance_scale=4.0, height=SIDE, width=SIDE, generator=seeded(),
    ).images[0]  # fmt: skip
    assert_same_picture(draw(ours, image=start_picture(), mask=mask, strength=strength, guidance_scale=4.0), expected)


def test_nine_channels_without_a_picture_draw_all_of_it(opened):
    ours, theirs = opened("inpaint")
    white = Image.fromarray(np.full((SIDE, SIDE), 255, np.uint8))
    expected = theirs(
        PROMPT, image=Image.fromarray(start_picture()), mask_image=white, strength=1.0, num_inference_steps=STEPS,
        guidance_scale=4.0, height=SIDE, width=SIDE, generator=seeded(),
    ).images[0]  # fmt: skip
    assert_same_picture(draw(ours, guidance_scale=4.0), expected)


def test_the_refiner_takes_over_like_diffusers_ensemble(opened):
    (base, their_base), (refiner, their_refiner) = opened("sdxl"), opened("sdxl_refiner")
    shared = {"num_inference_steps": 10, "guidance_scale": 4.0}
    latents = their_base(
        PROMPT, denoising_end=0.6, output_type="latent", generator=seeded(), height=SIDE, width=SIDE, **shared
    ).images
    expected = their_refiner(PROMPT, image=latents, denoising_start=0.6, **shared).images[0]
    ours = generate(base, PROMPT, refiner=refiner, refiner_start=0.6, seed=3, rng="torch", **shared)[0]
    assert_same_picture(ours.image, expected)
    assert (ours.steps_run, ours.calls) == (10, 20)


@pytest.mark.parametrize("start", [0.01, 0.9999])
def test_a_refiner_without_a_share_is_refused(opened, start):
    with pytest.raises(RequestError, match="refiner"):
        draw(opened("sdxl")[0], refiner=opened("sdxl_refiner")[0], refiner_start=start)


def test_half_a_refiner_is_refused(opened):
    with pytest.raises(RequestError, match="refiner"):
        draw(opened("sdxl")[0], refiner_start=0.8)


def test_sizes_travel_as_json():
    import json
    from dataclasses import asdict

    settings = Settings(prompt="x", original_size=(512, 768), crops_coords_top_left=(1, 2), refiner_start=0.8)
    assert Settings.from_json(json.loads(json.dumps(asdict(settings)))) == settings
    for broken in ({"original_size": [1]}, {"target_size": "64"}, {"crops_coords_top_left": None}, {"early_stop": "x"}):
        with pytest.raises(DataError):
            Settings.from_json({"prompt": "x"} | broken)
