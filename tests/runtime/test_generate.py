"""The reference runtime against diffusers' own pipelines, on the embedded model and the same noise."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from edgesd import sources
from edgesd.errors import DataError, RequestError
from edgesd.models.load import embedded_folder
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.canvas import Start
from edgesd.runtime.generate import generate, sample, sample_batch
from edgesd.runtime.session import Watched
from edgesd.runtime.settings import Settings, resolve

PROMPT = "a red circle above a blue square on a white background"


@pytest.fixture(scope="session")
def pipeline():
    return sources.open_pipeline(None)


@pytest.fixture(scope="session")
def diffusers_pipeline():
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(embedded_folder(), torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_same_picture(ours, theirs):
    difference = np.abs(ours.astype(int) - np.asarray(theirs).astype(int))
    assert difference.mean() <= 1.0
    assert (difference.max(axis=-1) <= 2).mean() >= 0.99


@pytest.mark.parametrize(("seed", "guidance", "negative"), [(0, 4.0, ""), (7, 7.5, "a yellow star")])
def test_text_to_image_equals_diffusers(pipeline, diffusers_pipeline, seed, guidance, negative):
    theirs = diffusers_pipeline(
        PROMPT, negative_prompt=negative, num_inference_steps=12, guidance_scale=guidance, generator=seeded(seed)
    ).images[0]
    ours = generate(
        pipeline,
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=12,
        guidance_scale=guidance,
        seed=seed,
        rng="torch",
    )[0]
    assert_same_picture(ours.image, theirs)


def start_picture():
    picture = np.full((128, 128, 3), 245, np.uint8)
    picture[40:90, 30:80] = (45, 80, 210)
    return picture


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_equals_diffusers(pipeline, diffusers_pipeline, strength):
    from diffusers import StableDiffusionImg2ImgPipeline

    theirs = StableDiffusionImg2ImgPipeline(**diffusers_pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPT, image=Image.fromarray(start_picture()), strength=strength, num_inference_steps=10, guidance_scale=4.0,
        generator=seeded(3),
    ).images[0]  # fmt: skip
    ours = generate(
        pipeline, PROMPT, image=start_picture(), strength=strength, num_inference_steps=10, guidance_scale=4.0, seed=3,
        rng="torch",
    )[0]  # fmt: skip
    assert_same_picture(ours.image, expected)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_equals_diffusers(pipeline, diffusers_pipeline, strength):
    from diffusers import StableDiffusionInpaintPipeline

    mask = np.zeros((128, 128), np.float32)
    mask[32:96, 32:96] = 1
    theirs = StableDiffusionInpaintPipeline(**diffusers_pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPT, image=Image.fromarray(start_picture()), mask_image=Image.fromarray((mask * 255).astype(np.uint8)),
        strength=strength, num_inference_steps=10, guidance_scale=4.0, height=128, width=128, generator=seeded(5),
    ).images[0]  # fmt: skip
    ours = generate(
        pipeline, PROMPT, image=start_picture(), mask=mask, strength=strength, num_inference_steps=10,
        guidance_scale=4.0, seed=5, rng="torch",
    )[0]  # fmt: skip
    assert_same_picture(ours.image, expected)


def test_the_text_is_encoded_once_for_any_number_of_pictures(pipeline):
    cache = PromptCache()
    pictures = generate(pipeline, PROMPT, num_images=3, num_inference_steps=2, cache=cache)
    assert cache.stats()["misses"] == 2  # the prompt and the empty negative prompt
    assert not np.array_equal(pictures[0].image, pictures[1].image)


def test_pictures_of_one_request_equal_pictures_drawn_alone(pipeline):
    together = generate(pipeline, PROMPT, num_images=2, num_inference_steps=3, seed=4)
    alone = generate(pipeline, PROMPT, num_inference_steps=3, seed=4, index=1)
    assert np.array_equal(together[1].image, alone[0].image)


def test_a_batch_draws_what_its_pictures_draw_alone(pipeline):
    several = [resolve(pipeline.spec, p, seed=s, num_inference_steps=4) for p, s in ((PROMPT, 1), ("a green ring", 2))]
    *_, together = sample_batch(pipeline, several)
    for settings, picture in zip(several, together, strict=True):
        *_, alone = sample(pipeline, settings)
        assert np.abs(alone.latents - picture.latents).max() < 1e-3


def test_several_prompts_go_through_phase_by_phase(pipeline):
    """Encode all, denoise all, decode all: a runtime that holds one component at a time loads each once."""

    class Order(Watched):
        ran: tuple[str, ...] = ()

        def run(self, component, inputs):
            self.ran += (component,) if self.ran[-1:] != (component,) else ()
            return super().run(component, inputs)

    session = Order(pipeline.session)
    several = [resolve(pipeline.spec, p, seed=0, num_inference_steps=2) for p in (PROMPT, "a green ring")]
    *_, pictures = sample_batch(replace(pipeline, session=session), several, cache=PromptCache())
    assert len(pictures) == 2
    assert session.ran == ("text_encoder", "unet", "vae_decoder")


def test_guidance_until_skips_unconditional_calls(pipeline):
    full = generate(pipeline, PROMPT, num_inference_steps=8)[0]
    part = generate(pipeline, PROMPT, num_inference_steps=8, guidance_until=0.75)[0]
    none = generate(pipeline, PROMPT, num_inference_steps=8, guidance_scale=1.0)[0]
    assert (full.calls, part.calls, none.calls) == (16, 14, 8)


def test_early_stop_saves_calls_and_says_so(pipeline):
    picture = generate(pipeline, PROMPT, num_inference_steps=20, early_stop=0.2)[0]
    assert picture.steps_run < 20
    assert picture.calls == 2 * picture.steps_run
    assert picture.notes == (
        f"stopped early after row {picture.steps_run} of 20: {40 - picture.calls} UNet calls saved",
    )


def test_seed_zero_and_guidance_zero_are_values(pipeline):
    settings = resolve(pipeline.spec, PROMPT, seed=0, guidance_scale=0.0, negative_prompt="")
    assert (settings.seed, settings.guidance_scale, settings.negative_prompt) == (0, 0.0, "")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 0), ("num_inference_steps", 1001), ("seed", -1), ("seed", 2**53), ("strength", 0.0),
        ("strength", 1.5), ("guidance_scale", -1.0), ("guidance_scale", float("nan")), ("guidance_until", 2.0),
        ("guidance_schedule", "wobbly"), ("early_stop", 0.0), ("rng", "dice"), ("sampler", "nope"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_by_name(pipeline, field, value):
    with pytest.raises(RequestError):
        generate(pipeline, PROMPT, **{field: value})


@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt_is_refused(pipeline, prompt):
    with pytest.raises(RequestError, match="empty prompt"):
        generate(pipeline, prompt)


def test_one_step_runs(pipeline):
    assert generate(pipeline, PROMPT, num_inference_steps=1)[0].image.shape == (128, 128, 3)


def test_a_callback_sees_every_step_and_can_stop(pipeline):
    seen = []

    def stop_after_three(_, row, timestep, told):
        seen.append((row, timestep, told["denoised"].shape))
        return len(seen) < 3

    assert generate(pipeline, PROMPT, num_inference_steps=10, callback_on_step_end=stop_after_three) == []
    assert [row for row, _, _ in seen] == [0, 1, 2]
    assert seen[0][2] == (1, 4, 16, 16)


def test_a_long_prompt_is_cut_and_reported(pipeline):
    picture = generate(pipeline, PROMPT + " and" * 40 + " tail", num_inference_steps=1)[0]
    assert picture.truncated.endswith("tail")


def test_settings_travel_as_json():
    from dataclasses import asdict

    settings = Settings(prompt="x", seed=5, guidance_scale=0.0)
    assert Settings.from_json(asdict(settings)) == settings
    for broken in ({}, {"prompt": 3}, {"prompt": "x", "seed": "5"}, {"prompt": "x", "surprise": 1}, None):
        with pytest.raises(DataError):
            Settings.from_json(broken)


def test_a_start_picture_of_odd_size_is_refused(pipeline):
    settings = resolve(pipeline.spec, PROMPT, strength=0.5)
    with pytest.raises(RequestError, match="multiples of 8"):
        list(sample(pipeline, settings, Start(np.zeros((100, 130, 3), np.uint8))))


@pytest.mark.parametrize(("sampler", "rng"), [("dpmpp_2m_karras", "philox"), ("euler_a", "torch"), ("heun", "philox")])
def test_a_resumed_picture_equals_the_uninterrupted_one_to_the_bit(pipeline, sampler, rng):
    settings = resolve(pipeline.spec, PROMPT, seed=6, num_inference_steps=6, sampler=sampler, rng=rng)
    *steps, whole = sample(pipeline, settings)
    for step in (steps[0], steps[3]):
        *rest, resumed = sample(pipeline, settings, resume=step.state)
        assert len(rest) == len(steps) - step.row - 1
        assert np.array_equal(resumed.latents, whole.latents)
        assert np.array_equal(resumed.image, whole.image)


def test_an_old_scheduler_config_is_read_as_diffusers_pipeline_reads_it(tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    shutil.copytree(embedded_folder(), tmp_path / "model")
    old = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert (old.config.steps_offset, old.config.clip_sample) == (0, True)
    old.save_pretrained(tmp_path / "model" / "scheduler")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32, scheduler=old)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPT, num_inference_steps=6, guidance_scale=4.0, generator=seeded(1)).images[0]
    opened = sources.open_pipeline(str(tmp_path / "model"))
    options = {"sampler": "ddim", "num_inference_steps": 6, "guidance_scale": 4.0, "seed": 1, "rng": "torch"}
    ours = generate(opened, PROMPT, **options)[0]
    assert_same_picture(ours.image, expected)
