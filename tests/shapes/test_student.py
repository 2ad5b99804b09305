"""`shapes-lcm`, the shipped student: the embedded model with a LoRA and settings of its own."""

import torch

from edgesd.compress.widths import trained_widths
from edgesd.drawing import draw_many
from edgesd.models.load import STUDENT, embedded_folder, load
from edgesd.runtime.generate import generate
from edgesd.shapes.oracle import judge
from edgesd.shapes.world import held_out_captions
from edgesd.sources import open_pipeline


def test_it_draws_what_captions_say_in_few_steps_and_better_than_its_teacher_in_as_many():
    assert right(STUDENT, steps=4) >= 30
    assert right(STUDENT, steps=2) >= right("shapes", steps=2) + 8


def right(name, steps, captions=32):
    """Pictures of so many that show their caption, by the `lcm` table without guidance."""
    texts, settings = held_out_captions(captions, seed=5), {"num_inference_steps": steps, "guidance_scale": 1.0}
    images = draw_many(open_pipeline(name), texts, list(range(captions)), sampler="lcm", **settings)
    return sum(judge(image, text).all for image, text in zip(images, texts, strict=True))


def test_its_settings_are_its_own_and_its_record_names_the_lora():
    student = load(STUDENT)
    assert (student.spec.name, student.source) == (STUDENT, STUDENT)
    defaults = student.spec.defaults
    assert (defaults.sampler, defaults.steps, defaults.guidance) == ("lcm", 4, 1.0)
    assert [(made.kind, made.name) for made in student.ingredients] == [("lora", f"{STUDENT}.safetensors")]
    assert trained_widths(student) == ()
    picture = generate(open_pipeline(STUDENT), "a red circle on a white background", seed=0)[0]
    assert picture.settings.num_inference_steps == 4


def test_another_lora_goes_on_top_of_it():
    file = str(embedded_folder(STUDENT) / f"{STUDENT}.safetensors")
    once, twice, plain = (load(*given, **added).modules["unet"].state_dict() for given, added in (
        ((STUDENT,), {}), ((STUDENT,), {"lora": [file]}), (("shapes",), {})))  # fmt: skip
    name = next(key for key in plain if not torch.equal(plain[key], once[key]))
    assert torch.allclose(twice[name] - once[name], once[name] - plain[name], atol=1e-5)
